from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from epd import cpu_runtime


def touch(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    return path


def test_what_is_installed_is_found_one_allocator_at_most(tmp_path: Path) -> None:
    assert cpu_runtime.libraries(tmp_path, (str(tmp_path),)) == []
    openmp = touch(tmp_path / "lib" / "libiomp5.so")
    full = touch(tmp_path / "b" / "libtcmalloc.so.4")
    assert cpu_runtime.libraries(tmp_path, (str(tmp_path / "a"), str(tmp_path / "b"))) == [openmp, full]
    minimal = touch(tmp_path / "a" / "libtcmalloc_minimal.so.4")
    assert cpu_runtime.libraries(tmp_path, (str(tmp_path / "a"), str(tmp_path / "b"))) == [openmp, minimal]


def test_what_the_user_chose_stays() -> None:
    found = [Path("/x/libiomp5.so"), Path("/y/libtcmalloc.so.4")]
    chosen = {"LD_PRELOAD": "/own/libiomp5.so /own/other.so", "KMP_BLOCKTIME": "7", "HOME": "/h"}
    made = cpu_runtime.environment(chosen, found)
    assert made is not None
    assert made["LD_PRELOAD"] == "/y/libtcmalloc.so.4:/own/libiomp5.so:/own/other.so"
    assert (made["KMP_BLOCKTIME"], made["HOME"]) == ("7", "/h")


def test_a_process_is_replaced_once() -> None:
    made = cpu_runtime.environment({}, [Path("/x/libiomp5.so")])
    assert made is not None
    assert cpu_runtime.environment(made, [Path("/x/libiomp5.so")]) is None
    # Not even where the loader did without it.
    assert cpu_runtime.environment({**made, "LD_PRELOAD": ""}, [Path("/x/libiomp5.so")]) is None
    assert cpu_runtime.environment({}, []) is None


def test_the_same_command_runs_with_the_libraries(tmp_path: Path) -> None:
    """In a process of its own, with a library that is there everywhere in the place of the real ones."""
    script = tmp_path / "command.py"
    script.write_text(
        "import os, sys\n"
        "from pathlib import Path\n"
        "from epd import cpu_runtime\n"
        "print('started', flush=True)\n"
        "cpu_runtime.libraries = lambda: [Path(sys.argv[2])]\n"
        "cpu_runtime.ensure()\n"
        "print(sys.argv[1], os.environ['LD_PRELOAD'])\n"
    )
    library = touch(tmp_path / "libnothing.so")
    environment = {"PYTHONPATH": str(Path(cpu_runtime.__file__).parent.parent)}
    command = [sys.executable, str(script), "--flag", str(library)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    expected = ["started", "started", f"--flag {library}"] if sys.platform == "linux" else ["started"]
    assert done.stdout.splitlines()[: len(expected)] == expected
