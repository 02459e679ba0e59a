"""Embeddings of pictures: checked on arrival, kept by content key until their requests are done, then as a cache."""

from __future__ import annotations

import bisect
import time
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from epd.errors import Overloaded, WorkerFailed
from workers.engine.request import Clock, EngineRequest, ImageSpan


@dataclass(frozen=True)
class ImageEmbeddings:
    """What a picture's placeholder becomes. Row i of `rows` stands at expanded index `row_indices[i]`."""

    token_ids: tuple[int, ...]
    grid_thw: tuple[int, int, int] | None
    rows: torch.Tensor
    """[number of image tokens, hidden size], on the CPU, in the model's dtype."""
    row_indices: tuple[int, ...]
    """Rising indices into `token_ids`."""
    deepstack: torch.Tensor | None = None
    """[levels, number of image tokens, hidden size]: what the first layers add to the hidden states there."""

    @classmethod
    def checked(
        cls,
        token_ids: Sequence[int],
        grid_thw: tuple[int, int, int] | None,
        rows: torch.Tensor,
        *,
        image_token_id: int,
        vocab_size: int,
        hidden_size: int,
        dtype: torch.dtype,
        deepstack_levels: int = 0,
    ) -> ImageEmbeddings:
        """Take an encoder's answer: `rows` [image tokens, hidden size], or [1 + levels, …] with deepstack.

        Raises:
            WorkerFailed: shape, values or tokens are not what this model can take. The picture itself may be fine, so
                that another encoder can be asked.
        """
        row_indices = tuple(index for index, token in enumerate(token_ids) if token == image_token_id)
        levels = (1 + deepstack_levels,) if deepstack_levels else ()
        if tuple(rows.shape) != (*levels, len(row_indices), hidden_size) or not row_indices:
            raise WorkerFailed(
                f"The encoder sent embeddings of shape {tuple(rows.shape)} for {len(row_indices)} image tokens of "
                f"hidden size {hidden_size}" + (f" in {levels[0]} levels." if levels else ".")
            )
        if not all(0 <= token < vocab_size for token in token_ids):
            raise WorkerFailed("The encoder sent token ids outside the vocabulary.")
        if not rows.is_floating_point():
            raise WorkerFailed(f"The encoder sent embeddings of type {rows.dtype}.")
        converted = rows.to(device="cpu", dtype=dtype)
        if not bool(torch.isfinite(converted).all()):
            raise WorkerFailed("The encoder sent embeddings that are not finite.")
        first, deepstack = (converted[0], converted[1:]) if deepstack_levels else (converted, None)
        return cls(tuple(token_ids), grid_thw, first, row_indices, deepstack)

    @property
    def num_bytes(self) -> int:
        """Size of the rows in memory, of all levels."""
        return self.rows.nbytes + (0 if self.deepstack is None else self.deepstack.nbytes)

    def rows_between(self, start: int, end: int) -> slice:
        """Which rows have their expanded index in [start, end)."""
        return slice(bisect.bisect_left(self.row_indices, start), bisect.bisect_left(self.row_indices, end))

    def runs(self) -> list[tuple[int, int]]:
        """Half-open ranges of neighbouring image tokens, as indices into `token_ids`."""
        runs: list[tuple[int, int]] = []
        for index in self.row_indices:
            if runs and runs[-1][1] == index:
                runs[-1] = (runs[-1][0], index + 1)
            else:
                runs.append((index, index + 1))
        return runs


@dataclass
class _Entry:
    embeddings: ImageEmbeddings
    expires_at: float
    """Until when it waits for a request."""
    claimed: bool = False
    """Whether a request used it since it was sent."""
    users: set[str] = field(default_factory=set)


class EmbeddingStore:
    """Pictures by content key, bounded in bytes.

    Requests and embeddings race on different sockets, so an entry may come before anybody asks for it. It is kept
    until its first request claims it, or `unclaimed_ttl_s` passes: the request died on its way. An entry in use stays.
    One that was used and is idle is a cache entry, dropped when room is needed, least recently used first.
    """

    def __init__(self, max_bytes: int, unclaimed_ttl_s: float, clock: Clock = time.monotonic) -> None:
        """Make an empty store for `max_bytes` bytes of rows."""
        self._max_bytes = max_bytes
        self._unclaimed_ttl_s = unclaimed_ttl_s
        self._clock = clock
        self._entries: OrderedDict[str, _Entry] = OrderedDict()  # least recently used first
        self._num_bytes = 0
        self._keys: tuple[str, ...] | None = ()

    def __contains__(self, content_key: str) -> bool:
        return content_key in self._entries

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def num_bytes(self) -> int:
        """Bytes of all rows in the store."""
        return self._num_bytes

    @property
    def keys(self) -> tuple[str, ...]:
        """Content keys of all entries; the same object as long as they stay the same."""
        if self._keys is None:
            self._keys = tuple(self._entries)
        return self._keys

    def put(self, content_key: str, embeddings: ImageEmbeddings) -> None:
        """Keep an entry; a key that is there already keeps what it has.

        Raises:
            WorkerFailed: it is larger than the whole store.
            Overloaded: no room, and what is there is in use or waits for its request.
        """
        if content_key in self._entries:
            return
        self._make_room(embeddings.num_bytes)
        self._entries[content_key] = _Entry(embeddings, self._clock() + self._unclaimed_ttl_s)
        self._num_bytes += embeddings.num_bytes
        self._keys = None

    def expect(self, content_key: str) -> None:
        """Embeddings that are here have been sent again, for a request that may be on its way: keep them for it.

        Those in use stay as they are: the request is most likely among the users.
        """
        entry = self._entries[content_key]
        if not entry.users:
            entry.claimed = False
            entry.expires_at = self._clock() + self._unclaimed_ttl_s

    def claim(self, content_key: str, request_id: str) -> ImageEmbeddings:
        """Use an entry for a request until `release`. Claiming twice for one request counts once."""
        entry = self._entries[content_key]
        entry.claimed = True
        entry.users.add(request_id)
        self._entries.move_to_end(content_key)
        return entry.embeddings

    def release(self, content_key: str, request_id: str) -> None:
        """End a request's use, if it has one; the entry stays as long as there is room."""
        entry = self._entries.get(content_key)
        if entry is not None:
            entry.users.discard(request_id)

    def users(self) -> set[str]:
        """Requests that use entries."""
        return {user for entry in self._entries.values() for user in entry.users}

    def check_integrity(self) -> None:
        """Recount the bytes; raises AssertionError when they are off."""
        counted = sum(entry.embeddings.num_bytes for entry in self._entries.values())
        if counted != self._num_bytes:
            raise AssertionError(f"{counted} bytes in the store, {self._num_bytes} counted")

    def _make_room(self, num_bytes: int) -> None:
        if num_bytes > self._max_bytes:
            raise WorkerFailed(f"One picture's embeddings take {num_bytes} bytes, more than the whole store.")
        now = self._clock()
        excess = self._num_bytes + num_bytes - self._max_bytes
        victims: list[str] = []
        for key, entry in self._entries.items():
            if excess <= 0:
                break
            if not entry.users and (entry.claimed or entry.expires_at <= now):
                victims.append(key)
                excess -= entry.embeddings.num_bytes
        if excess > 0:
            raise Overloaded("The store for image embeddings is full.")
        for key in victims:
            self._num_bytes -= self._entries.pop(key).embeddings.num_bytes
        self._keys = None


def expand_prompt(request: EngineRequest, embeddings: Mapping[str, ImageEmbeddings]) -> tuple[ImageSpan, ...]:
    """Replace placeholders of the request's prompt by their pictures' tokens, up to the first picture that is missing.

    Args:
        request: modified.
        embeddings: by content key, for pictures of the request.

    Returns:
        Where the pictures stand now, as also kept in the request.
    """
    prompt = request.sent_token_ids
    expanded: list[int] = []
    spans: list[ImageSpan] = []
    num_expanded = None
    done = 0
    for image in request.images:
        expanded += prompt[done : image.offset]
        done = image.offset
        if image.content_key not in embeddings:
            num_expanded = len(expanded)
            break
        tokens = embeddings[image.content_key].token_ids
        spans.append(ImageSpan(image.content_key, len(expanded), len(tokens)))
        expanded += tokens
        done += 1
    request.set_expanded_prompt([*expanded, *prompt[done:]], spans, num_expanded=num_expanded)
    return request.image_spans
