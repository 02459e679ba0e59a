"""The proxy as a process of its own."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import textwrap
import threading
import urllib.request
from pathlib import Path

import pytest

from epd.config import ProxyConfig
from epd.errors import ConfigError
from proxy.app import run_proxy


def python(code: str, *arguments: str) -> list[str]:
    return [sys.executable, "-c", textwrap.dedent(code), *arguments]


def test_imports_neither_torch_nor_transformers() -> None:
    code = """
        import sys
        import proxy.app
        print([name for name in ("torch", "transformers", "numpy", "redis") if name in sys.modules])
    """
    done = subprocess.run(python(code), capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


SERVE = """
    import sys
    from pathlib import Path
    from epd.config import ProxyConfig
    from epd.observability import setup_logging
    from proxy.app import run_proxy
    setup_logging("proxy")
    sys.exit(run_proxy(ProxyConfig(model=Path(sys.argv[1]), host="127.0.0.1", port=0)))
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_serves_and_ends_cleanly(model: Path, number: signal.Signals) -> None:
    with subprocess.Popen(python(SERVE, str(model)), stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        watchdog = threading.Timer(30, process.kill)
        watchdog.start()
        line = next(line for line in process.stderr if "serving" in line)
        url = line.split()[-1]
        with urllib.request.urlopen(f"{url}/v1/models", timeout=10) as answer:
            assert json.load(answer)["object"] == "list"
        process.send_signal(number)
        rest = process.stderr.read()
        assert process.wait() == 0
        watchdog.cancel()
    assert "Traceback" not in rest


def test_port_in_use_is_a_config_error(model: Path) -> None:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"--port {port}"):
            run_proxy(ProxyConfig(model=model, host="127.0.0.1", port=port))


def test_impossible_port_is_a_config_error(model: Path) -> None:
    with pytest.raises(ConfigError, match="--port 70000"):
        run_proxy(ProxyConfig(model=model, host="127.0.0.1", port=70000))
