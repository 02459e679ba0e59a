"""Measure a checkpoint on held-out pictures, through unmodified transformers: `python -m epd.demo.evaluate`.

Held out means: other random streams than training, and printed texts that training never shows (see words.is_held_out).
An answer counts only when it is exact, to the last character.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tqdm import tqdm  # type: ignore[import-untyped]
from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer

from epd.demo import CHECKPOINT_DIR
from epd.demo.batches import draw_row
from epd.demo.pictures import Picture, draw_picture, random_size
from epd.demo.questions import Turn, ask_picture, ask_two
from epd.demo.smalltalk import chat, missing_picture

BATCH = 32
MAX_NEW_TOKENS = 64


@dataclass(frozen=True)
class Item:
    """A conversation to finish: pictures, earlier turns, and the turn whose answer counts."""

    pictures: tuple[Image.Image, ...]
    turn: Turn
    earlier: tuple[Turn, ...] = ()


class Answerer:
    """Greedy answers of a checkpoint folder, by stock transformers."""

    def __init__(self, folder: Path, dtype: torch.dtype = torch.float32) -> None:
        self._model: Any = AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype)
        self._model.eval()
        self._tokenizer: Any = AutoTokenizer.from_pretrained(folder, padding_side="left")
        self._processor: Any = AutoImageProcessor.from_pretrained(folder)
        self._image_id = self._model.config.image_token_id

    def answer(self, items: Sequence[Item]) -> list[str]:
        """One answer per item, without special tokens."""
        answers: list[str] = []
        for first in range(0, len(items), BATCH):
            answers += self._answer_batch(items[first : first + BATCH])
        return answers

    @torch.inference_mode()
    def _answer_batch(self, items: Sequence[Item]) -> list[str]:
        pictures = [picture for item in items for picture in item.pictures]
        seen = dict(self._processor(images=pictures, return_tensors="pt")) if pictures else {}
        grids = iter(seen["image_grid_thw"].tolist() if pictures else [])
        prompts = [self._prompt(item, grids) for item in items]
        padded = self._tokenizer.pad({"input_ids": prompts}, return_tensors="pt")
        ids = padded["input_ids"]
        if pictures:
            seen["mm_token_type_ids"] = (ids == self._image_id).int()
            seen["pixel_values"] = seen["pixel_values"].to(self._model.dtype)
        made = self._model.generate(
            input_ids=ids,
            attention_mask=padded["attention_mask"],
            do_sample=False,
            max_new_tokens=MAX_NEW_TOKENS,
            **seen,
        )
        texts: list[str] = self._tokenizer.batch_decode(made[:, ids.shape[1] :], skip_special_tokens=True)
        return texts

    def _prompt(self, item: Item, grids: Any) -> list[int]:
        """Prompt ids with each placeholder widened to its picture's tokens."""
        content = [{"type": "image"} for _ in item.pictures]
        messages: list[dict[str, Any]] = []
        for turn in (*item.earlier, item.turn):
            messages.append({"role": "user", "content": [*content, {"type": "text", "text": turn.question}]})
            messages.append({"role": "assistant", "content": turn.answer})
            content = []
        text = self._tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)
        ids: list[int] = []
        for token in self._tokenizer(text, add_special_tokens=False)["input_ids"]:
            repeat = 1
            if token == self._image_id:
                _, down, across = next(grids)
                repeat = down * across // self._processor.merge_size**2
            ids += [token] * repeat
        return ids


Maker = Callable[[random.Random], Item]


def _one_picture(kinds: Sequence[str], task: str, *, odd: bool = False) -> Maker:
    def make(rng: random.Random) -> Item:
        while True:
            picture = draw_picture(rng, rng.choice(kinds), random_size(rng), held_out=True)
            if task == "side" and picture.kind == "one" and not picture.side:
                continue
            turn = ask_picture(rng, picture, task)
            return Item((_rescaled(rng, picture.image) if odd else picture.image,), turn)

    return make


def _rescaled(rng: random.Random, image: Image.Image) -> Image.Image:
    """A larger file that is no multiple of 28 and a little out of proportion, for the processor to scale down."""
    factor = rng.uniform(1.3, 3.5)
    size = (round(image.width * factor * rng.uniform(0.95, 1.05)), round(image.height * factor))
    return image.resize(size, Image.Resampling.BICUBIC)


def _read(letters: int) -> Maker:
    def make(rng: random.Random) -> Item:
        while True:
            picture = draw_picture(rng, "text", random_size(rng), held_out=True)
            if picture.text.isalpha() and len(picture.text) == letters:
                return Item((picture.image,), ask_picture(rng, picture, "read"))

    return make


def _read_number(rng: random.Random) -> Item:
    while True:
        picture = draw_picture(rng, "text", random_size(rng), held_out=True)
        if picture.text.isdigit():
            return Item((picture.image,), ask_picture(rng, picture, "read"))


def _letter(rng: random.Random) -> Item:
    while True:
        picture = draw_picture(rng, "text", random_size(rng), held_out=True)
        if picture.text.isalpha():
            return Item((picture.image,), ask_picture(rng, picture, "letter"))


def _two(kind: str, task: str) -> Maker:
    def make(rng: random.Random) -> Item:
        while True:
            sizes = [random_size(rng), random_size(rng)]
            pictures: list[Picture] = draw_row(rng, kind, sizes, 6, held_out=True)
            turn = ask_two(rng, *pictures)
            if turn.task == task:
                return Item(tuple(picture.image for picture in pictures), turn)

    return make


def _talk(task: str) -> Maker:
    def make(rng: random.Random) -> Item:
        while True:
            turns = [missing_picture(rng)] if task == "no picture" else chat(rng)
            if turns[-1].task == task:
                return Item((), turns[-1], tuple(turns[:-1]))

    return make


SHAPE_KINDS = ("one", "pair", "many")
# Rows of the report, in its order.
TASKS: dict[str, Maker] = {
    "colour": _one_picture(("one", "pair"), "colour"),
    "shape": _one_picture(SHAPE_KINDS, "shape"),
    "count": _one_picture(("many",), "count"),
    "left or right": _one_picture(("one", "pair"), "side"),
    "what is on that side": _one_picture(("pair",), "at side"),
    "describe shapes": _one_picture(SHAPE_KINDS, "describe"),
    **{f"read {letters} letters": _read(letters) for letters in range(2, 7)},
    "read a number": _read_number,
    "first or last letter": _letter,
    "colour of a word": _one_picture(("text",), "text colour"),
    "describe a word": _one_picture(("text",), "describe"),
    "two pictures: which has it": _two("two shapes", "two: which"),
    "two pictures: colour of one": _two("two shapes", "two: colour"),
    "two pictures: shape of one": _two("two shapes", "two: shape"),
    "two pictures: same or not": _two("two shapes", "two: same"),
    "two pictures: which says it": _two("two words", "two: which says"),
    "two pictures: read one": _two("two words", "two: read"),
    "two pictures: describe both": _two("two shapes", "two: describe"),
    "rescaled file: colour": _one_picture(("one", "pair"), "colour", odd=True),
    "rescaled file: shape": _one_picture(SHAPE_KINDS, "shape", odd=True),
    "rescaled file: read": _one_picture(("text",), "read", odd=True),
    "text only: chat and facts": _talk("chat"),
    "text only: sums": _talk("sum"),
    "text only: repeat": _talk("repeat"),
    "text only: remember a name": _talk("name"),
    "text only: no picture sent": _talk("no picture"),
}


def held_out_items(task: str, count: int) -> list[Item]:
    """The first `count` held-out items of a task; always the same."""
    return [TASKS[task](random.Random(f"held out:{task}:{index}")) for index in range(count)]


def measure(answerer: Answerer, count: int, show: int = 0) -> dict[str, float]:
    """Exact answers per task, 0 to 1, on `count` items each. `show` prints that many mistakes per task."""
    scores = {}
    for task in tqdm(TASKS, unit="task", leave=False):
        items = held_out_items(task, count)
        answers = answerer.answer(items)
        wrong = [(item, said) for item, said in zip(items, answers, strict=True) if said != item.turn.answer]
        scores[task] = 1 - len(wrong) / count
        for item, said in wrong[:show]:
            tqdm.write(f"{task}: {item.turn.question} -> {said!r}, right is {item.turn.answer!r}")
    return scores


def as_table(scores: dict[str, float], count: int) -> str:
    """A Markdown table."""
    lines = [f"| task ({count} held-out questions each) | exact |", "|---|---|"]
    lines += [f"| {task} | {100 * score:.1f} % |" for task, score in scores.items()]
    return "\n".join(lines)


def report(folder: Path, count: int, dtype: torch.dtype = torch.float32, show: int = 0) -> str:
    """Load a checkpoint folder, measure it, and return the table."""
    return as_table(measure(Answerer(folder, dtype), count, show), count)


def main() -> None:
    """The command line."""
    flags = argparse.ArgumentParser(
        prog="python -m epd.demo.evaluate",
        description="Ask a checkpoint held-out questions and print how many answers are exact, per task.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    flags.add_argument("--checkpoint", type=Path, default=CHECKPOINT_DIR, help="checkpoint folder")
    flags.add_argument("--count", type=int, default=200, help="questions per task")
    flags.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="arithmetic")
    flags.add_argument("--show", type=int, default=0, help="print this many mistakes per task")
    flags.add_argument("--threads", type=int, default=2, help="torch threads")
    args = flags.parse_args()
    torch.set_num_threads(args.threads)
    print(report(args.checkpoint, args.count, getattr(torch, args.dtype), args.show))


if __name__ == "__main__":
    main()
