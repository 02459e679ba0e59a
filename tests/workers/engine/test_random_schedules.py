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
from workers.engine.chunks import ScheduledChunk
from workers.engine.request import EngineRequest, ImagePlaceholder
from workers.engine.sampler import Sampled, SamplingRow

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
        pictures = [self.pictures[chunk.request.request_id] for chunk in chunks]
        return self.compute(chunks, [chunk.request.token_ids for chunk in chunks], pictures)

    def compute(
        self,
        chunks: Sequence[ScheduledChunk],
        token_ids: Sequence[Sequence[int]],
        pictures: Sequence[dict[int, int]],
    ) -> list[Sampled]:
        # Nothing is written before all is read: what a chunk reads must come from earlier steps, or from itself.
        written: dict[int, Content] = {}
        for chunk, its_tokens, its_pictures in zip(chunks, token_ids, pictures, strict=True):
            self._compute(chunk, written, its_tokens, its_pictures)
        self.slots |= written
        return [Sampled(token_after(written[self._slot(c, c.end - 1)])) for c in chunks if c.samples]

    def _compute(
        self, chunk: ScheduledChunk, written: dict[int, Content], token_ids: Sequence[int], pictures: dict[int, int]
    ) -> None:
        request = chunk.request
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
            content = content_after(content, token_ids[index], pictures.get(index))
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


class LaunchedStep:
    """Of a `LaunchingMemoryRunner`."""

    was_revised = False

    def __init__(
        self, runner: LaunchingMemoryRunner, chunks: Sequence[ScheduledChunk], before: LaunchedStep | None
    ) -> None:
        self._runner = runner
        self._before = before
        self.chunks = list(chunks)
        self.samples = [chunk for chunk in chunks if chunk.samples]
        # What is known now. The rest comes from the step before.
        self._token_ids = [list(chunk.request.token_ids) for chunk in chunks]
        self._pictures = [runner.pictures[chunk.request.request_id] for chunk in chunks]
        self.sampled: list[Sampled] = []

    def writes(self) -> dict[int, EngineRequest]:
        """Blocks that the step writes to, and for whom."""
        return {
            chunk.block_table[index // BLOCK_SIZE]: chunk.request
            for chunk in self.chunks
            for index in range(chunk.start, chunk.end)
        }

    def compute(self) -> None:
        if self._before is not None:
            made = {
                c.request.request_id: s.token_id
                for c, s in zip(self._before.samples, self._before.sampled, strict=True)
            }
            for chunk, token_ids in zip(self.chunks, self._token_ids, strict=True):
                assert len(token_ids) == chunk.start
                token_ids.append(made[chunk.request.request_id])
        self.sampled = self._runner.compute(self.chunks, self._token_ids, self._pictures)

    def read(self) -> list[Sampled]:
        self._runner.compute_until(self)
        return self.sampled


class LaunchingMemoryRunner(MemoryRunner):
    """Computes as late as a device may: in the order of launches, when somebody waits for it."""

    def __init__(self) -> None:
        super().__init__()
        self.queued: list[LaunchedStep] = []
        self.wrong: list[str] = []
        """What must not be. A pipeline takes exceptions for failures of the model."""

    def launch(
        self, chunks: Sequence[ScheduledChunk], rows: Sequence[SamplingRow], before: LaunchedStep | None = None
    ) -> LaunchedStep:
        if self.queued != ([] if before is None else [before]):
            self.wrong.append("a step is launched behind one that it does not know of")
        if [row.position for row in rows] != [chunk.end for chunk in chunks if chunk.samples]:
            self.wrong.append("a token is sampled for another position")
        for step in self.queued:
            for chunk in chunks:
                writers = {step.writes().get(block) for block in chunk.block_table}
                if not writers <= {None, chunk.request}:
                    self.wrong.append("a block is given away while a step may still write to it")
        self.queued.append(LaunchedStep(self, chunks, before))
        self.seen["ahead"] += before is not None
        return self.queued[-1]

    def compute_until(self, last: LaunchedStep) -> None:
        while last in self.queued:
            self.queued.pop(0).compute()


class Load:
    """One random load: what is asked, what should come back, and what happened on the way."""

    def __init__(self, seed: int, *, caching: bool, pipelined: bool) -> None:
        self.draw = random.Random(seed)
        self.clock = FakeClock()
        self.runner = LaunchingMemoryRunner() if pipelined else MemoryRunner()
        self.engine = fake_engine(
            self.runner,
            clock=self.clock,
            num_blocks=NUM_BLOCKS,
            max_waiting=100,
            caching=caching,
            batched_tokens=8,
            pipelined=pipelined,
        )
        self.engine.info.adapter.bidirectional_images = seed % 2 == 0
        self.openings = [[self.draw.randrange(90) for _ in range(28)] for _ in range(3)]
        self.expected: dict[str, list[int]] = {}
        self.aborted: set[str] = set()
        self.timed: set[str] = set()
        """Those with a deadline."""
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
        expected = _answer(prompt, [image.offset for image in images], pictures, max_tokens)
        stop = expected[self.draw.randrange(max_tokens)] if self.draw.random() < 0.4 else None
        self.expected[name] = expected[: expected.index(stop) + 1] if stop is not None else expected
        timeout_s = self.draw.choice([None] * 9 + [400])
        if timeout_s is not None:
            self.timed.add(name)
        self.engine.add_request(
            name,
            prompt,
            SamplingParams(
                max_tokens=max_tokens, ignore_eos=True, stop_token_ids=() if stop is None else (stop,), temperature=0
            ),
            images=images,
            priority=self.draw.choice([0, 0, 0, 1, -1]),
            timeout_s=timeout_s,
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
            elif name in self.timed and end.error is not None:
                assert end.error.code == "timeout"
                assert tokens == expected[: len(tokens)]
                self.runner.seen["late"] += 1
            else:
                assert end.error is None
                assert tokens == expected
        assert self.engine.load().kv_used_blocks == 0
        assert not isinstance(self.runner, LaunchingMemoryRunner) or self.runner.wrong == []


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


@pytest.mark.parametrize("pipelined", [False, True])
@pytest.mark.parametrize("caching", [True, False])
def test_answers_do_not_depend_on_what_happens_around_them(caching: bool, pipelined: bool) -> None:
    happened: Counter[str] = Counter()
    for seed in range(60):
        load = Load(seed, caching=caching, pipelined=pipelined)
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
    assert happened["late"] > 0
    assert (happened["ahead"] > 0) == pipelined
    assert (happened["hits"] > 0) == (happened["early"] > 0) == caching
