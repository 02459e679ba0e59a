"""Random loads on a model that reads its answers out of the KV cache, so that a wrong block gives a wrong answer."""

from __future__ import annotations

import hashlib
import random
from collections import Counter
from collections.abc import Sequence

import pytest
import torch

from epd.types import FinishReason, SamplingParams
from tests.workers.engine.fakes import HIDDEN, IMAGE_TOKEN, FakeClock, FakeRunner, fake_engine
from tests.workers.engine.oracle import Answers
from workers.engine.adapter import PlacedImage
from workers.engine.request import ImagePlaceholder
from workers.engine.sampler import Sampled, SamplingRow
from workers.engine.scheduler import ScheduledChunk

BLOCK_SIZE = 4
NUM_BLOCKS = 18
PICTURE_ROWS = 6
PICTURES = 3
Content = bytes
"""What the cache holds of a token: it depends on the token and on all before it."""


def content_after(before: Content, token: int, picture: int | None) -> Content:
    return hashlib.blake2b(before + bytes([token, 0 if picture is None else 1 + picture]), digest_size=8).digest()


def token_after(content: Content) -> int:
    return content[0] % 90


class MemoryRunner(FakeRunner):
    """Keeps slots as the real cache does; next tokens follow from the last slot of a sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.slots: dict[int, Content] = {}
        self.pictures: dict[str, dict[int, int]] = {}
        self.seen: Counter[str] = Counter()

    def add(self, request_id: str, token_ids: Sequence[int], images: Sequence[PlacedImage]) -> None:
        super().add(request_id, token_ids, images)
        self.pictures[request_id] = {
            offset + index: int(image.rows[0, 0]) for offset, image in images for index in image.row_indices
        }

    def run(self, chunks: Sequence[ScheduledChunk], rows: Sequence[SamplingRow]) -> list[Sampled]:
        # Nothing is written before all is read: what a chunk reads must come from earlier steps, or from itself.
        written: dict[int, Content] = {}
        for chunk in chunks:
            self._compute(chunk, written)
        self.slots |= written
        return [Sampled(token_after(written[self._slot(c, c.end - 1)])) for c in chunks if c.samples]

    def _compute(self, chunk: ScheduledChunk, written: dict[int, Content]) -> None:
        request = chunk.request
        pictures = self.pictures[request.request_id]
        spans = request.atomic_spans
        assert not any(start < cut < end for start, end in spans for cut in (chunk.start, chunk.end))
        if chunk.end > request.num_prompt_tokens or chunk.samples:
            assert all(
                index in pictures for span in request.image_spans for index in range(span.offset, span.offset + 6)
            )
        self._clear(chunk)
        content = b""
        for index in range(chunk.end):
            slot = self._slot(chunk, index)
            content = content_after(content, request.token_ids[index], pictures.get(index))
            if index >= chunk.start:
                assert slot not in written, "two requests write to one slot"
                written[slot] = content
            else:
                assert self.slots.get(slot) == content, f"{request}: slot of token {index} holds something else"
        self.seen["early"] += request.image_spans == () and bool(request.images) and not chunk.samples

    def _clear(self, chunk: ScheduledChunk) -> None:
        """As the real attention does: the rest of the block that the chunk ends in, when it is entered."""
        last = (chunk.end - 1) // BLOCK_SIZE
        if chunk.start <= last * BLOCK_SIZE:
            for index in range(chunk.end, (last + 1) * BLOCK_SIZE):
                self.slots.pop(self._slot(chunk, index), None)

    def _slot(self, chunk: ScheduledChunk, index: int) -> int:
        return chunk.block_table[index // BLOCK_SIZE] * BLOCK_SIZE + index % BLOCK_SIZE


class Load:
    """One random load: what is asked, what should come back, and what happened on the way."""

    def __init__(self, seed: int, *, caching: bool) -> None:
        self.draw = random.Random(seed)
        self.clock = FakeClock()
        self.runner = MemoryRunner()
        self.engine = fake_engine(
            self.runner, clock=self.clock, num_blocks=NUM_BLOCKS, max_waiting=100, caching=caching, batched_tokens=8
        )
        self.engine.info.adapter.bidirectional_images = seed % 2 == 0
        self.openings = [[self.draw.randrange(90) for _ in range(28)] for _ in range(3)]
        self.expected: dict[str, list[int]] = {}
        self.aborted: set[str] = set()
        self.undelivered: list[tuple[str, int]] = []
        self.answers = Answers()

    def run(self, num_requests: int = 25) -> None:
        while len(self.expected) < num_requests:
            action = self.draw.random()
            if action < 0.25:
                self.ask(f"r{len(self.expected)}")
            elif action < 0.35 and self.undelivered:
                self.deliver(self.draw.randrange(len(self.undelivered)))
            elif action < 0.38 and self.expected:
                self.abort(self.draw.choice(list(self.expected)))
            self.step()
        while self.undelivered or self.engine.has_work():
            if self.undelivered and (self.draw.random() < 0.2 or not self.engine.has_work()):
                self.deliver(0)
            self.step()

    def ask(self, name: str) -> None:
        """A common opening, perhaps with pictures in it, and an end of its own; some ask for the same twice."""
        opening = self.draw.choice(self.openings)
        prompt = opening[: self.draw.choice([4, 9, 16, 28])] + [self.draw.randrange(90)] * self.draw.randrange(4)
        images: list[ImagePlaceholder] = []
        pictures: list[int] = []
        num_pictures = min(self.draw.choice([0, 0, 1, 3]), len(prompt) - 2)
        for offset in sorted(self.draw.sample(range(2, len(prompt)), num_pictures)):
            picture = self.draw.randrange(PICTURES)
            # Some pictures are known by now; others come under a new key.
            key = f"{picture}" if self.draw.random() < 0.3 else f"{picture} of {name} at {offset}"
            images.append(ImagePlaceholder(key, offset + len(images)))
            prompt.insert(offset + len(images) - 1, IMAGE_TOKEN)
            pictures.append(picture)
            if not self.engine.has_embeddings(key) and (key, picture) not in self.undelivered:
                self.undelivered.append((key, picture))
        max_tokens = self.draw.randint(1, 14)
        self.expected[name] = _answer(prompt, [image.offset for image in images], pictures, max_tokens)
        self.engine.add_request(
            name,
            prompt,
            SamplingParams(max_tokens=max_tokens, ignore_eos=True),
            images=images,
            priority=self.draw.choice([0, 0, 0, 1, -1]),
        )

    def deliver(self, index: int) -> None:
        key, picture = self.undelivered.pop(index)
        rows = torch.full((PICTURE_ROWS, HIDDEN), float(picture))
        self.engine.provide_embeddings(key, [IMAGE_TOKEN] * PICTURE_ROWS, (1, 2, 2), rows)

    def abort(self, name: str) -> None:
        if name not in self.answers.ends:
            self.aborted.add(name)
            self.engine.abort(name)

    def step(self) -> None:
        self.clock.now += self.draw.random() * 20
        self.engine.check_integrity()
        self.answers.take(self.engine.step())
        self.engine.check_integrity()

    def check(self) -> None:
        assert set(self.answers.ends) == set(self.expected)
        for name, expected in self.expected.items():
            end, tokens = self.answers.ends[name], self.answers.tokens[name]
            if name in self.aborted:
                assert end.finish_reason is FinishReason.ABORT
                assert tokens == expected[: len(tokens)]
            else:
                assert end.error is None
                assert tokens == expected
        assert self.engine.load().kv_used_blocks == 0


def _answer(prompt: list[int], offsets: list[int], pictures: list[int], max_tokens: int) -> list[int]:
    """What a model without cache, batches and interruptions says."""
    placed = dict(zip(offsets, pictures, strict=True))
    content = b""
    for offset, token in enumerate(prompt):
        for _ in range(PICTURE_ROWS if offset in placed else 1):
            content = content_after(content, token, placed.get(offset))
    answer: list[int] = []
    while len(answer) < max_tokens:
        answer.append(token_after(content))
        content = content_after(content, answer[-1], None)
    return answer


@pytest.mark.parametrize("caching", [True, False])
def test_answers_do_not_depend_on_what_happens_around_them(caching: bool) -> None:
    happened: Counter[str] = Counter()
    for seed in range(60):
        load = Load(seed, caching=caching)
        try:
            load.run()
            load.check()
        except AssertionError as error:
            raise AssertionError(f"seed {seed}") from error
        engine = load.engine.load()
        happened += Counter(hits=engine.prefix_cache_hits, preemptions=engine.preemptions, aborts=len(load.aborted))
        happened += load.runner.seen
    assert happened["preemptions"] > 0
    assert happened["aborts"] > 0
    assert (happened["hits"] > 0) == (happened["early"] > 0) == caching
