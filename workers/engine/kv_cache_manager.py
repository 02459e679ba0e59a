"""Which blocks of the KV cache belong to which request."""

from __future__ import annotations

from collections.abc import Collection

from workers.engine.block_pool import BlockPool
from workers.engine.prefix_cache import BlockHasher
from workers.engine.request import EngineRequest


class KVCacheManager:
    """Grows and frees the block tables of requests, which share the blocks of common prefixes.

    Token i of a request lives in slot `table[i // block_size] * block_size + i % block_size`.

    A block that a request has filled gets a name (see `prefix_cache`) and keeps its content when the request ends,
    until the room is needed. A request that begins, or begins again after a preemption, takes over the named blocks of
    its longest such prefix. Those are full, and it goes on in blocks of its own: so nobody writes to a shared one.
    """

    def __init__(self, num_blocks: int, block_size: int, *, prefix_caching: bool = True) -> None:
        """Manage `num_blocks` blocks of `block_size` tokens each. Without `prefix_caching`, nothing is shared."""
        self.block_size = block_size
        self._pool = BlockPool(num_blocks)
        self._hasher = BlockHasher(block_size) if prefix_caching else None
        self._tables: dict[str, list[int]] = {}
        self._held: frozenset[str] = frozenset()
        self._leaving: list[list[int]] = []
        """Tables that were given back while they were held."""

    @property
    def prefix_caching(self) -> bool:
        """Whether blocks are shared."""
        return self._hasher is not None

    @property
    def num_blocks(self) -> int:
        """Blocks in all."""
        return self._pool.num_blocks

    @property
    def num_used_blocks(self) -> int:
        """Blocks that requests hold."""
        return self._pool.num_used

    @property
    def num_cached_blocks(self) -> int:
        """Blocks whose content another request could take over, used or free."""
        return self._pool.num_named

    def blocks_for(self, num_tokens: int) -> int:
        """How many blocks so many tokens fill, the last one perhaps in part."""
        return -(-num_tokens // self.block_size)

    # -- tables ----------------------------------------------------------------------------------------------------

    def admit(self, request: EngineRequest, num_tokens: int, prefix: list[int], *, spare: int = 0) -> bool:
        """Make a table for a request without one: a cached prefix, and new blocks behind it.

        Args:
            request: whose table.
            num_tokens: tokens to cover.
            prefix: what `cached_prefix` returned just now.
            spare: blocks that must stay free.

        Returns:
            False, with nothing changed, when too few blocks are free.
        """
        if not self.has_room(num_tokens, prefix, spare=spare):
            return False
        self._pool.share(prefix)  # before any is allocated, which may take free blocks of the prefix
        missing = self.blocks_for(num_tokens) - len(prefix)
        self._tables[request.request_id] = prefix + self._pool.allocate(missing)
        return True

    def has_room(self, num_tokens: int, prefix: list[int], *, spare: int = 0) -> bool:
        """Whether `admit` would succeed."""
        missing = self.blocks_for(num_tokens) - len(prefix)
        revived = sum(self._pool.references(block) == 0 for block in prefix)
        return missing + revived + spare <= self._pool.num_free

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
        if missing <= 0:
            return True
        if missing + spare > self._pool.num_free:
            return False
        self._tables.setdefault(request_id, []).extend(self._pool.allocate(missing))
        return True

    def block_table(self, request_id: str) -> list[int]:
        """The request's blocks in token order. Read only."""
        return self._tables[request_id]

    def has_table(self, request_id: str) -> bool:
        """Whether the request holds blocks."""
        return request_id in self._tables

    def free(self, request_id: str) -> None:
        """Give the request's blocks back; a request without any is fine. They are free at once, unless held."""
        table = self._tables.pop(request_id, None)
        if table is not None and request_id in self._held:
            self._leaving.append(table)
        elif table is not None:
            self._pool.free(table)

    def hold(self, request_ids: Collection[str]) -> None:
        """Until the next call, nobody else gets blocks of these requests, also when they are given back: a step that is
        being computed writes to them. What the call before held, and was given back, is free now."""
        self._held = frozenset(request_ids)
        leaving, self._leaving = self._leaving, []
        for table in leaving:
            self._pool.free(table)

    def owners(self) -> set[str]:
        """Requests that hold blocks."""
        return set(self._tables)

    # -- what the blocks hold --------------------------------------------------------------------------------------

    def cached_prefix(self, request: EngineRequest) -> list[int]:
        """Blocks that hold the longest prefix of the request that is cached.

        It leaves at least one token to compute, for only a computed token gives the next one, and ends at no atomic
        span's inside. Empty for a request that must not read the cache.
        """
        prefix: list[int] = []
        for name in self._names_to_read(request):
            block = self._pool.find(name)
            if block is None:
                break
            prefix.append(block)
        while prefix and request.atomic_span_around(len(prefix) * self.block_size) is not None:
            prefix.pop()
        return prefix

    def first_missing(self, request: EngineRequest, prefix: list[int]) -> bytes | None:
        """Name of the block behind a cached prefix, which the request would have to compute; None: it couldn't use it
        if another request did."""
        names = self._names_to_read(request)
        return names[len(prefix)] if len(prefix) < len(names) else None

    def names_between(self, request: EngineRequest, start: int, end: int) -> list[bytes]:
        """Names of the blocks that tokens [start, end) of the request touch, but for a last one that it can't fill."""
        if self._hasher is None:
            return []
        return self._hasher.names(request)[start // self.block_size : self.blocks_for(end)]

    def record(self, request: EngineRequest, start: int) -> None:
        """Name the blocks that the request has filled, now that its tokens from `start` on are computed."""
        if self._hasher is None:
            return
        filled = range(start // self.block_size, request.num_computed_tokens // self.block_size)
        if filled:
            table, names = self._tables[request.request_id], self._hasher.names(request)
            for index in filled:
                self._pool.remember(table[index], names[index])

    def distrust(self, request_id: str) -> None:
        """Have nobody else take over the request's blocks: the model failed on it, so they may hold anything."""
        for block in self._tables.get(request_id, ()):
            self._pool.forget(block)

    def check_integrity(self) -> None:
        """Recount blocks against tables; raises AssertionError on a leak or double use."""
        self._pool.check_integrity([*self._tables.values(), *self._leaving])

    def check_contents(self, request: EngineRequest) -> None:
        """Look at the names of a running request's blocks; raises AssertionError on a wrong one."""
        names = self.names_between(request, 0, request.num_computed_tokens)
        for index, block in enumerate(self._tables[request.request_id]):
            is_full = (index + 1) * self.block_size <= request.num_computed_tokens
            name = self._pool.name_of(block)
            if name is not None and (not is_full or name != names[index]):
                raise AssertionError(f"{request} has block {block} under the name of another content")
            if not is_full and self._pool.references(block) > 1:
                raise AssertionError(f"{request} would write to block {block}, which it shares")

    def _names_to_read(self, request: EngineRequest) -> list[bytes]:
        if self._hasher is None or not request.reads_prefix_cache:
            return []
        return self._hasher.names(request)[: (request.num_tokens - 1) // self.block_size]
