"""The helper process of `compiled_forward`: compiles a model's graph and leaves it in a file.

    python -m workers.engine.compile_helper THREADS FILE < engine settings as JSON

The weights are random: the graph does not depend on them.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
from pathlib import Path

import torch

from workers.engine import model_loader
from workers.engine.compiled_forward import compile_hidden, save_hidden
from workers.engine.config import EngineConfig

_PR_SET_PDEATHSIG = 1


def main() -> None:
    """Compile what standard input describes."""
    os.nice(19)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # a worker that is gone needs no graph
    torch.set_num_threads(int(sys.argv[1]))
    config = EngineConfig(**json.load(sys.stdin))
    save_hidden(compile_hidden(model_loader.load(config).model), Path(sys.argv[2]))


if __name__ == "__main__":
    main()
