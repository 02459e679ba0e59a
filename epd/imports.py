"""What a worker need not import."""

from __future__ import annotations

import sys
from collections.abc import MutableMapping
from pathlib import Path
from typing import Any

_PACKAGE = "torchao"


def leave_out_torchao(model: Path, modules: MutableMapping[str, Any] = sys.modules) -> bool:
    """Let torchao count as not installed in this process, unless the checkpoint's configuration names it.

    transformers imports it whenever it is there, which takes a tenth of a worker's start; few checkpoints need it.
    Call it before transformers is imported. Returns whether torchao is left out.
    """
    try:
        is_needed = _PACKAGE in (model / "config.json").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False  # what is wrong with the checkpoint is said by those who load it
    if is_needed or _PACKAGE in modules:
        return False
    # Python's own way to say so: importing it raises ImportError, and `find_spec` finds nothing.
    modules[_PACKAGE] = None
    return True
