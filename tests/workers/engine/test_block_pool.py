from __future__ import annotations

import pytest

from workers.engine.block_pool import BlockPool
from workers.engine.kv_cache_manager import KVCacheManager


def test_blocks_are_handed_out_once_and_come_back() -> None:
    pool = BlockPool(4)
    first = pool.allocate(3)
    second = pool.allocate(1)
    assert sorted(first + second) == [0, 1, 2, 3]
    assert pool.num_free == 0
    pool.free(first)
    assert pool.num_free == 3
    pool.check_integrity([second])


def test_too_many_blocks_take_none() -> None:
    pool = BlockPool(2)
    with pytest.raises(ValueError, match="2 free"):
        pool.allocate(3)
    assert pool.num_free == 2


def test_shared_block_is_free_after_its_last_user() -> None:
    pool = BlockPool(2)
    blocks = pool.allocate(1)
    pool.share(blocks)
    pool.free(blocks)
    assert pool.num_free == 1
    pool.check_integrity([blocks])
    pool.free(blocks)
    assert pool.num_free == 2


def test_freeing_twice_is_refused() -> None:
    pool = BlockPool(2)
    blocks = pool.allocate(1)
    pool.free(blocks)
    with pytest.raises(ValueError, match="freed twice"):
        pool.free(blocks)
    with pytest.raises(ValueError, match="cannot be shared"):
        pool.share(blocks)


def test_integrity_check_sees_a_leak() -> None:
    pool = BlockPool(2)
    pool.allocate(1)
    with pytest.raises(AssertionError):
        pool.check_integrity([])


def test_a_freed_run_is_handed_out_in_the_same_order() -> None:
    pool = BlockPool(4)
    blocks = pool.allocate(4)
    pool.free(blocks)
    assert pool.allocate(4) == blocks


def test_tables_grow_by_whole_blocks() -> None:
    manager = KVCacheManager(num_blocks=3, block_size=4)
    assert manager.grow("a", 5)
    assert len(manager.block_table("a")) == 2
    assert manager.grow("a", 8)
    assert len(manager.block_table("a")) == 2
    assert not manager.grow("b", 8)
    assert manager.owners() == {"a"}
    manager.free("a")
    manager.free("a")
    assert manager.num_used_blocks == 0
    manager.check_integrity()


def test_spare_blocks_stay_free() -> None:
    manager = KVCacheManager(num_blocks=3, block_size=4)
    assert not manager.grow("a", 8, spare=2)
    assert manager.grow("a", 8, spare=1)
    assert manager.grow("a", 8, spare=5)  # takes none, so leaves none
