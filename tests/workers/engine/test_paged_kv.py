from __future__ import annotations

import os
import subprocess
import sys

from epd import cpu_runtime

SCRIPT = """
import resource, torch
from workers.engine.paged_kv import KVShape, PagedKVCache

def resident_bytes():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()

before = resident_bytes()
cache = PagedKVCache(KVShape(4, 2, 64, torch.bfloat16), 4096, 16, torch.device("cpu"))
assert not any(layer[7].any() for layer in (*cache.keys, *cache.values))
print(sum(layer.nbytes for layer in (*cache.keys, *cache.values)), resident_bytes() - before)
"""


def test_a_cache_takes_memory_when_it_is_written() -> None:
    """In a process with the allocator that workers start with, where there is one: it writes what should be zero."""
    environment = cpu_runtime.environment({}, cpu_runtime.libraries()) or {}
    command = [sys.executable, "-c", SCRIPT]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ, **environment})
    size, resident = map(int, done.stdout.split())
    assert size == 128 << 20
    assert resident < size / 4
