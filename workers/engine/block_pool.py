"""The blocks of the KV cache as integers: which are free, how often each is used, and what each holds."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence


class BlockPool:
    """Hands out block numbers 0 … num_blocks - 1.

    Counts references rather than a plain used flag, so that requests with a common prefix can share blocks. A block
    whose content has a name (`remember`) can be found by it (`find`), also when it is free: it keeps its content until
    it is handed out again. Blocks without a name go first, then the ones that have been free for the longest time.
    """

    def __init__(self, num_blocks: int) -> None:
        """All blocks start free. `num_blocks` is at least 1."""
        if num_blocks < 1:
            raise ValueError(f"a pool needs at least one block, got {num_blocks}")
        self.num_blocks = num_blocks
        # A stack: the block freed last is handed out next, while it may still be in the processor's caches.
        self._free = list(range(num_blocks - 1, -1, -1))
        self._free_named: OrderedDict[int, None] = OrderedDict()  # longest free first
        self._references = [0] * num_blocks
        self._names: list[bytes | None] = [None] * num_blocks
        self._by_name: dict[bytes, int] = {}

    @property
    def num_free(self) -> int:
        """Blocks that `allocate` can still give."""
        return len(self._free) + len(self._free_named)

    @property
    def num_used(self) -> int:
        """Blocks with at least one reference."""
        return self.num_blocks - self.num_free

    @property
    def num_named(self) -> int:
        """Blocks that `find` could return."""
        return len(self._by_name)

    def allocate(self, count: int) -> list[int]:
        """Take `count` free blocks, each with one reference and without a name.

        Raises:
            ValueError: fewer are free; ask `num_free` first.
        """
        if count > self.num_free:
            raise ValueError(f"{count} blocks asked, {self.num_free} free")
        blocks = [self._take_free() for _ in range(count)]
        for block in blocks:
            self._references[block] = 1
        return blocks

    def share(self, blocks: Sequence[int]) -> None:
        """Add one reference to each of these blocks, which are used or have a name.

        Raises:
            ValueError: a block is free and has no name, so that nobody can know what it holds.
        """
        for block in blocks:
            if self._references[block] == 0:
                if self._names[block] is None:
                    raise ValueError(f"block {block} is free and cannot be shared")
                del self._free_named[block]
            self._references[block] += 1

    def free(self, blocks: Sequence[int]) -> None:
        """Drop one reference of each; those without any left are free again.

        Raises:
            ValueError: a block was free already.
        """
        # Last block first: the stack hands a freed run out again in rising order, and of a prefix its end goes first.
        for block in reversed(blocks):
            if self._references[block] == 0:
                raise ValueError(f"block {block} freed twice")
            self._references[block] -= 1
            if self._references[block] == 0:
                if self._names[block] is None:
                    self._free.append(block)
                else:
                    self._free_named[block] = None

    def remember(self, block: int, name: bytes) -> None:
        """Name the content of a used block, which from now on must not be written to.

        Where another block holds the same already, that one keeps the name.
        """
        if self._references[block] == 0:
            raise ValueError(f"block {block} is free and holds nothing")
        if self._names[block] is None and name not in self._by_name:
            self._names[block] = name
            self._by_name[name] = block

    def forget(self, block: int) -> None:
        """Take the name of a used block away, if it has one: its content can't be trusted."""
        name = self._names[block]
        if name is not None:
            self._names[block] = None
            del self._by_name[name]

    def find(self, name: bytes) -> int | None:
        """The block that holds this, used or free."""
        return self._by_name.get(name)

    def name_of(self, block: int) -> bytes | None:
        """What the block's content is called."""
        return self._names[block]

    def references(self, block: int) -> int:
        """How many tables have the block."""
        return self._references[block]

    def check_integrity(self, tables: list[list[int]]) -> None:
        """Recount every block.

        Args:
            tables: the block tables of all requests.

        Raises:
            AssertionError: references and tables disagree, or the free lists or the names are wrong.
        """
        counted = [0] * self.num_blocks
        for table in tables:
            for block in table:
                counted[block] += 1
        if counted != self._references:
            wrong = [b for b in range(self.num_blocks) if counted[b] != self._references[b]]
            raise AssertionError(f"blocks {wrong} are counted {[counted[b] for b in wrong]} times")
        if sorted([*self._free, *self._free_named]) != [b for b in range(self.num_blocks) if counted[b] == 0]:
            raise AssertionError("the free lists disagree with the references")
        if {name: block for block, name in enumerate(self._names) if name is not None} != self._by_name:
            raise AssertionError("the names of the blocks disagree with the index")
        if any(self._names[b] is None for b in self._free_named) or any(self._names[b] is not None for b in self._free):
            raise AssertionError("a free block is in the wrong list")

    def _take_free(self) -> int:
        if self._free:
            return self._free.pop()
        block, _ = self._free_named.popitem(last=False)
        self.forget(block)
        return block
