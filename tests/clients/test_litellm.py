"""LiteLLM, in a process of its own: see `litellm_checks`."""

from __future__ import annotations

import os
import subprocess
import sys

from tests.cluster.harness import ROOT, Cluster


def test_litellm(demo: Cluster) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.clients.litellm_checks", demo.base_url],
        env=os.environ | {"LITELLM_LOCAL_MODEL_COST_MAP": "True"},  # its import asks the network for prices else
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    lines = done.stdout.splitlines()
    assert lines[-1] == "all checks passed", done.stdout
    assert len(lines) == 3 * 6 + 1
