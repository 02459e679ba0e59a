"""The blocks of the KV cache as integers: which are free, how often each is used."""

from __future__ import annotations


class BlockPool:
    """Hands out block numbers 0 … num_blocks - 1.

    Counts references rather than a plain used flag, so that requests with a common prefix can share blocks.
    """

    def __init__(self, num_blocks: int) -> None:
        """All blocks start free. `num_blocks` is at least 1."""
        if num_blocks < 1:
            raise ValueError(f"a pool needs at least one block, got {num_blocks}")
        self.num_blocks = num_blocks
        # A stack: the block freed last is handed out next, while it may still be in the processor's caches.
        self._free = list(range(num_blocks - 1, -1, -1))
        self._references = [0] * num_blocks

    @property
    def num_free(self) -> int:
        """Blocks that `allocate` can still give."""
        return len(self._free)

    @property
    def num_used(self) -> int:
        """Blocks with at least one reference."""
        return self.num_blocks - len(self._free)

    def allocate(self, count: int) -> list[int]:
        """Take `count` free blocks, each with one reference.

        Raises:
            ValueError: fewer are free; ask `num_free` first.
        """
        if count > len(self._free):
            raise ValueError(f"{count} blocks asked, {len(self._free)} free")
        blocks = [self._free.pop() for _ in range(count)]
        for block in blocks:
            self._references[block] = 1
        return blocks

    def share(self, blocks: list[int]) -> None:
        """Add one reference to each of these used blocks."""
        for block in blocks:
            if self._references[block] == 0:
                raise ValueError(f"block {block} is free and cannot be shared")
            self._references[block] += 1

    def free(self, blocks: list[int]) -> None:
        """Drop one reference of each; those without any left are free again.

        Raises:
            ValueError: a block was free already.
        """
        # Last block first, so that the stack hands a freed run out again in rising order.
        for block in reversed(blocks):
            if self._references[block] == 0:
                raise ValueError(f"block {block} freed twice")
            self._references[block] -= 1
            if self._references[block] == 0:
                self._free.append(block)

    def check_integrity(self, tables: list[list[int]]) -> None:
        """Recount every block.

        Args:
            tables: the block tables of all requests.

        Raises:
            AssertionError: references and tables disagree, or the free list is wrong.
        """
        counted = [0] * self.num_blocks
        for table in tables:
            for block in table:
                counted[block] += 1
        if counted != self._references:
            wrong = [b for b in range(self.num_blocks) if counted[b] != self._references[b]]
            raise AssertionError(f"blocks {wrong} are counted {[counted[b] for b in wrong]} times")
        if sorted(self._free) != [b for b in range(self.num_blocks) if counted[b] == 0]:
            raise AssertionError("the free list disagrees with the references")
