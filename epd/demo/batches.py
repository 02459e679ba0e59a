"""Training data of one step: pictures, packed conversations and labels, from (seed, step) alone.

A row is one shared prefix (system turn, the user's opening, the pictures) and several branches, each a conversation
that continues the prefix and sees nothing of the other branches:

    prefix | branch 1 | branch 2 | ... | padding          every branch's positions go on where the prefix ends

So one picture costs one pass of the vision tower and serves many independent single questions. Rows without pictures
have an empty prefix.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from epd.demo import chat_format as chat
from epd.demo.pictures import COLOURS, SHAPES, Picture, draw_picture, draw_single, random_size
from epd.demo.questions import Turn, ask_picture, ask_two
from epd.demo.smalltalk import chat as small_talk

Ints = npt.NDArray[np.int64]

PATCH = 14
CELL = 28  # pixels per language-model token
GLYPHS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"
ROW_TOKENS = 96  # branches are added while a row stays within this length
ROW_BRANCHES = 5
# Kinds of rows and their share. Reading is the slowest to learn and gets the most.
ROW_KINDS: dict[str, float] = {
    "text": 0.44,
    "one": 0.13,
    "pair": 0.12,
    "many": 0.10,
    "two shapes": 0.08,
    "two words": 0.04,
    "chat": 0.09,
}


# From `focus` on, more of what is still weak by then: counting, comparing, and words of four letters and more.
FOCUS_KINDS: dict[str, float] = {
    "text": 0.37,
    "one": 0.08,
    "pair": 0.10,
    "many": 0.14,
    "two shapes": 0.16,
    "two words": 0.05,
    "chat": 0.10,
}


@dataclass
class PictureGroup:
    """Pictures of one size. `labels` says per patch which glyph, shape and colour is there, 0 for none."""

    pixels: npt.NDArray[np.uint8]  # (pictures, height, width, 3)
    labels: Ints  # (pictures, patches, 3), patches in the image processor's order


@dataclass
class Batch:
    """One step. `target` is the id that each token should predict, -1 where nothing is learnt."""

    groups: list[PictureGroup]
    ids: Ints  # (rows, tokens)
    positions: Ints  # (3, rows, tokens): time, height, width
    branch: Ints  # (rows, tokens): 0 prefix, -1 padding
    target: Ints  # (rows, tokens)
    image_rows: Ints  # for each image token, row by row, its row in the groups' merged outputs laid end to end


@dataclass
class _Row:
    pictures: list[tuple[int, int]] = field(default_factory=list)  # (group, index in the group)
    ids: list[int] = field(default_factory=list)
    positions: list[tuple[int, int, int]] = field(default_factory=list)
    branch: list[int] = field(default_factory=list)
    target: list[int] = field(default_factory=list)
    prefix_end: int = 0  # the position that follows the prefix
    branches: int = 0

    def add_prefix(self, ids: list[int]) -> None:
        self._extend(ids, self.prefix_end, 0)
        self.prefix_end += len(ids)

    def add_image(self, size: tuple[int, int], where: tuple[int, int]) -> None:
        """`size` is (width, height) in pixels."""
        self.pictures.append(where)
        self.add_prefix([chat.VISION_START])
        across, down, start = size[0] // CELL, size[1] // CELL, self.prefix_end
        self.ids += [chat.IMAGE_PAD] * (across * down)
        self.positions += [(start, start + y, start + x) for y in range(down) for x in range(across)]
        self.branch += [0] * (across * down)
        self.target += [-1] * (across * down)
        self.prefix_end = start + max(across, down)
        self.add_prefix([chat.VISION_END])

    def add_branch(self, ids: list[int], learnt: list[bool]) -> bool:
        """`learnt` marks the tokens that the model has to produce. False: the row is full and stays as it was."""
        if self.branches and (len(self.ids) + len(ids) > ROW_TOKENS or self.branches == ROW_BRANCHES):
            return False
        self.branches += 1
        first = len(self.ids)
        self._extend(ids, self.prefix_end, self.branches)
        for offset in range(len(ids) - 1):
            if learnt[offset + 1]:
                self.target[first + offset] = ids[offset + 1]
        return True

    def _extend(self, ids: list[int], start: int, branch: int) -> None:
        self.ids += ids
        self.positions += [(at, at, at) for at in range(start, start + len(ids))]
        self.branch += [branch] * len(ids)
        self.target += [-1] * len(ids)


class BatchMaker:
    """Makes the batch of any step.

    `warmup` steps bring printed words from 2 letters up to 6; from step `focus` on, FOCUS_KINDS holds.
    """

    def __init__(self, encoder: chat.ChatEncoder, seed: int, rows: int, warmup: int, focus: int | None = None) -> None:
        self._encoder = encoder
        self._seed = seed
        self._rows = rows
        self._warmup = warmup
        self._focus = focus

    def make(self, step: int) -> Batch:
        """The batch of `step`: always the same for the same seed."""
        rng = random.Random(f"train:{self._seed}:{step}")
        longest = min(6, 2 + 5 * step // max(1, self._warmup))
        sizes = (random_size(rng), random_size(rng))
        drawn: tuple[list[Picture], list[Picture]] = ([], [])
        rows = []
        focused = self._focus is not None and step >= self._focus
        kinds = FOCUS_KINDS if focused else ROW_KINDS
        for kind in rng.choices(list(kinds), list(kinds.values()), k=self._rows):
            if kind == "chat":
                rows.append(self._chat_row(rng))
            else:
                rows.append(self._picture_row(rng, kind, sizes, drawn, longest, focused))
        return _collate(rows, [picture_group(pictures) for pictures in drawn if pictures], drawn)

    def _chat_row(self, rng: random.Random) -> _Row:
        row = _Row()
        while row.add_branch(*self._chat_branch(rng)):
            pass
        return row

    def _chat_branch(self, rng: random.Random) -> tuple[list[int], list[bool]]:
        ids: list[int] = []
        if rng.random() < 0.15:
            ids = self._encoder.message("system", rng.choice(chat.SYSTEM_PROMPTS))
        ids += self._encoder.opening("user")
        more, learnt = self.conversation(small_talk(rng))
        return ids + more, [False] * len(ids) + learnt

    def _picture_row(
        self,
        rng: random.Random,
        kind: str,
        sizes: tuple[tuple[int, int], tuple[int, int]],
        drawn: tuple[list[Picture], list[Picture]],
        longest: int,
        focused: bool,
    ) -> _Row:
        row = _Row()
        count = 2 if kind.startswith("two") else 1
        groups = [rng.choices((0, 1), (2, 1))[0] for _ in range(count)]
        pictures = draw_row(rng, kind, [sizes[group] for group in groups], longest)
        while focused and kind == "text" and len(pictures[0].text) < 4 and rng.random() < 0.6:
            pictures = draw_row(rng, kind, [sizes[groups[0]]], longest)

        def ask() -> Turn:
            if count == 1:
                return ask_picture(rng, pictures[0])
            turn = ask_two(rng, *pictures)
            easy = not turn.task.startswith(("two: which", "two: same"))
            return ask_two(rng, *pictures) if focused and easy and rng.random() < 0.6 else turn

        if rng.random() < 0.12:
            row.add_prefix(self._encoder.message("system", rng.choice(chat.SYSTEM_PROMPTS)))
        row.add_prefix(self._encoder.opening("user"))
        early = ask() if rng.random() < 0.06 else None  # the question before the picture
        if early:
            row.add_prefix(self._encoder.text(early.question))
        for group, picture in zip(groups, pictures, strict=True):
            row.add_image(picture.image.size, (group, len(drawn[group])))
            drawn[group].append(picture)
        if early:
            row.add_branch(*self.conversation([Turn("", early.answer, early.task)]))
            return row
        while row.add_branch(*self.conversation([ask() for _ in range(rng.choices((1, 2, 3), (14, 3, 1))[0])])):
            pass
        return row

    def conversation(self, turns: list[Turn]) -> tuple[list[int], list[bool]]:
        """The turns after the first "<|im_start|>user" line, and which tokens are the assistant's."""
        encoder, ids, learnt = self._encoder, list[int](), list[bool]()
        for index, turn in enumerate(turns):
            asked = [] if index == 0 else encoder.opening("user")
            asked += [*encoder.text(turn.question), chat.IM_END, *encoder.newline, *encoder.opening("assistant")]
            answer = [*encoder.text(turn.answer), chat.IM_END]
            ids += asked + answer + encoder.newline
            learnt += [False] * len(asked) + [True] * len(answer) + [False] * len(encoder.newline)
        return ids, learnt


def draw_row(
    rng: random.Random, kind: str, sizes: list[tuple[int, int]], longest: int, *, held_out: bool | None = False
) -> list[Picture]:
    """The one or two pictures of a row; two shapes share their shape or their colour now and then."""
    if kind == "two words":
        return [draw_picture(rng, "text", size, longest=longest, held_out=held_out) for size in sizes]
    if kind == "two shapes":
        shapes = [rng.choice(SHAPES), rng.choice(SHAPES)]
        colours = rng.choices(list(COLOURS), k=2)
        if rng.random() < 0.2:
            shapes[1] = shapes[0]
        if rng.random() < 0.2:
            colours[1] = colours[0]
        return [draw_single(rng, size, shapes[at], colours[at]) for at, size in enumerate(sizes)]
    return [draw_picture(rng, kind, sizes[0], longest=longest, held_out=held_out)]


def picture_group(pictures: list[Picture]) -> PictureGroup:
    """Stack pictures of one size."""
    pixels = np.stack([np.asarray(picture.image, dtype=np.uint8) for picture in pictures])
    return PictureGroup(pixels, np.stack([patch_labels(picture) for picture in pictures]))


def patch_labels(picture: Picture) -> Ints:
    """(patches, 3) glyph, shape and colour at each patch, in the image processor's order of patches."""
    width, height = picture.image.size
    grid = np.zeros((height // PATCH, width // PATCH, 3), dtype=np.int64)
    for glyph in picture.glyphs:
        _mark(grid, glyph.box, 0, 1 + GLYPHS.index(glyph.char))
        _mark(grid, glyph.box, 2, 1 + list(COLOURS).index(picture.text_colour))
    for thing in picture.things:
        _mark(grid, thing.box, 1, 1 + SHAPES.index(thing.shape))
        _mark(grid, thing.box, 2, 1 + list(COLOURS).index(thing.colour))
    down, across = grid.shape[0] // 2, grid.shape[1] // 2
    return grid.reshape(down, 2, across, 2, 3).transpose(0, 2, 1, 3, 4).reshape(-1, 3)


def _mark(grid: Ints, box: tuple[float, float, float, float], layer: int, value: int) -> None:
    """Write `value` where a patch's centre is inside the box, and at least where the box's centre is."""
    rows, columns = grid.shape[:2]
    centres_x, centres_y = (np.arange(columns) + 0.5) * PATCH, (np.arange(rows) + 0.5) * PATCH
    inside_x = (centres_x >= box[0]) & (centres_x < box[2])
    inside_y = (centres_y >= box[1]) & (centres_y < box[3])
    inside_x[min(columns - 1, max(0, int((box[0] + box[2]) / 2 / PATCH)))] = True
    inside_y[min(rows - 1, max(0, int((box[1] + box[3]) / 2 / PATCH)))] = True
    grid[np.ix_(inside_y, inside_x)] = np.where(np.arange(3) == layer, value, grid[np.ix_(inside_y, inside_x)])


def _collate(rows: list[_Row], groups: list[PictureGroup], drawn: tuple[list[Picture], list[Picture]]) -> Batch:
    length = max(len(row.ids) for row in rows)
    length = -(-length // 8) * 8
    ids = np.full((len(rows), length), chat.PAD, dtype=np.int64)
    positions = np.zeros((3, len(rows), length), dtype=np.int64)
    branch, target = np.full_like(ids, -1), np.full_like(ids, -1)
    image_rows = []
    cells = [_cells(pictures[0]) if pictures else 0 for pictures in drawn]
    starts = [0, cells[0] * len(drawn[0])]
    for at, row in enumerate(rows):
        used = len(row.ids)
        ids[at, :used], branch[at, :used], target[at, :used] = row.ids, row.branch, row.target
        positions[:, at, :used] = np.array(row.positions).T
        for group, index in row.pictures:
            first = starts[group] + index * cells[group]
            image_rows.append(np.arange(first, first + cells[group]))
    joined = np.concatenate(image_rows) if image_rows else np.zeros(0, dtype=np.int64)
    return Batch(groups, ids, positions, branch, target, joined)


def _cells(picture: Picture) -> int:
    return (picture.image.width // CELL) * (picture.image.height // CELL)
