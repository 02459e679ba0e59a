"""What holds for all tests."""

from __future__ import annotations

import os

# The processes that share the tests share the cores as well, and more threads than cores wait for each other in every
# matrix product. Said before torch is imported, which asks once.
os.environ.setdefault("OMP_NUM_THREADS", "1")
