"""`epd`, with an engine that never comes out of its first step. Run as `python -m tests.cluster.hanging_worker`."""

from __future__ import annotations

import sys
import threading
from unittest.mock import patch

from epd.cli import main
from workers.engine.engine import Engine
from workers.engine.outputs import StepOutput

_step = Engine.step


def _step_or_hang(engine: Engine) -> list[StepOutput]:
    if engine.has_work():
        threading.Event().wait()
    return _step(engine)


if __name__ == "__main__":
    with patch.object(Engine, "step", _step_or_hang):
        sys.exit(main())
