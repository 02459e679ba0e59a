"""Which blocks of the KV cache belong to which request."""

from __future__ import annotations

from workers.engine.block_pool import BlockPool


class KVCacheManager:
    """Grows and frees the block tables of requests.

    Token i of a request lives in slot `table[i // block_size] * block_size + i % block_size`.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        """Manage `num_blocks` blocks of `block_size` tokens each."""
        self.block_size = block_size
        self._pool = BlockPool(num_blocks)
        self._tables: dict[str, list[int]] = {}

    @property
    def num_blocks(self) -> int:
        """Blocks in all."""
        return self._pool.num_blocks

    @property
    def num_used_blocks(self) -> int:
        """Blocks that requests hold."""
        return self._pool.num_used

    def blocks_for(self, num_tokens: int) -> int:
        """How many blocks so many tokens fill, the last one perhaps in part."""
        return -(-num_tokens // self.block_size)

    def grow(self, request_id: str, num_tokens: int, *, spare: int = 0) -> bool:
        """Make the request's table cover its first `num_tokens` tokens.

        Args:
            request_id: whose table.
            num_tokens: tokens to cover; a table never shrinks.
            spare: blocks that must stay free if any are taken.

        Returns:
            False, with nothing changed, when too few blocks are free.
        """
        missing = self.blocks_for(num_tokens) - len(self._tables.get(request_id, ()))
        if missing > 0 and missing + spare > self._pool.num_free:
            return False
        if missing > 0:
            self._tables.setdefault(request_id, []).extend(self._pool.allocate(missing))
        return True

    def block_table(self, request_id: str) -> list[int]:
        """The request's blocks in token order. Read only."""
        return self._tables[request_id]

    def free(self, request_id: str) -> None:
        """Give the request's blocks back; a request without any is fine."""
        table = self._tables.pop(request_id, None)
        if table is not None:
            self._pool.free(table)

    def owners(self) -> set[str]:
        """Requests that hold blocks."""
        return set(self._tables)

    def check_integrity(self) -> None:
        """Recount blocks against tables; raises AssertionError on a leak or double use."""
        self._pool.check_integrity(list(self._tables.values()))
