"""The shipped demo model: its checkpoint, its gallery, and the code that made both.

Importing this package is cheap: torch and transformers are imported only by the modules that need them.
"""

from __future__ import annotations

from pathlib import Path

CHECKPOINT_DIR: Path = Path(__file__).resolve().parent / "checkpoint"
GALLERY_DIR: Path = Path(__file__).resolve().parent / "gallery"

__all__ = ["CHECKPOINT_DIR", "GALLERY_DIR"]
