"""Make the gallery: a few small picture files with questions that the checkpoint answers right.

`python -m epd.demo.gallery` draws candidates from held-out random streams and keeps, per entry, the first one whose
questions are all answered exactly in float32 and in bfloat16. It shows what the model can do; how often it can is in
REPORT.md.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image

from epd.demo import CHECKPOINT_DIR, GALLERY_DIR
from epd.demo.evaluate import Answerer, Item
from epd.demo.pictures import Picture, draw_picture
from epd.demo.questions import Turn, describe, plural, sentence, with_article
from epd.demo.smalltalk import ABILITY, GREETING, IDENTITY
from epd.demo.words import COMMON_WORDS

CANDIDATES = 60  # more than this many wrong drafts of one entry: the checkpoint cannot do it


@dataclass(frozen=True)
class Entry:
    """Files of one or two pictures, and the questions about them."""

    files: tuple[str, ...]
    draw: Callable[[random.Random], tuple[Picture, ...]]
    ask: Callable[[tuple[Picture, ...]], list[Turn]]


def _draw(kind: str, size: tuple[int, int]) -> Callable[[random.Random], tuple[Picture, ...]]:
    return lambda rng: (draw_picture(rng, kind, size, held_out=True),)


def _draw_printed(fits: Callable[[str], bool], size: tuple[int, int]) -> Callable[[random.Random], tuple[Picture, ...]]:
    def draw(rng: random.Random) -> tuple[Picture, ...]:
        while True:
            picture = draw_picture(rng, "text", size, held_out=True)
            if fits(picture.text):
                return (picture,)

    return draw


def _is_real_word(text: str) -> bool:
    return len(text) in (4, 5) and text in COMMON_WORDS


def _draw_two(rng: random.Random) -> tuple[Picture, ...]:
    while True:
        one, two = draw_picture(rng, "one", (112, 112)), draw_picture(rng, "one", (112, 84))
        if one.things[0].shape != two.things[0].shape and one.things[0].colour != two.things[0].colour:
            return one, two


def _ask_one(pictures: tuple[Picture, ...]) -> list[Turn]:
    thing = pictures[0].things[0]
    return [
        Turn("What colour is the shape?", thing.colour, "colour"),
        Turn("What shape is it?", thing.shape, "shape"),
        Turn("Describe the picture.", sentence(describe(pictures[0])), "describe"),
    ]


def _ask_pair(pictures: tuple[Picture, ...]) -> list[Turn]:
    left, right = pictures[0].things
    return [
        Turn(f"Is the {left.name} on the left or on the right?", "left", "left or right"),
        Turn("What is on the right?", right.name, "what is on that side"),
        Turn(f"What color is the {left.shape}?", left.colour, "colour"),
    ]


def _ask_large(pictures: tuple[Picture, ...]) -> list[Turn]:
    return [Turn("Describe this image.", sentence(describe(pictures[0])), "describe")]


def _ask_many(pictures: tuple[Picture, ...]) -> list[Turn]:
    things = pictures[0].things
    return [Turn(f"How many {plural(things[0].shape)} are there?", str(len(things)), "count")]


def _ask_word(pictures: tuple[Picture, ...]) -> list[Turn]:
    return [Turn("What does it say?", pictures[0].text, "read a word")]


def _ask_number(pictures: tuple[Picture, ...]) -> list[Turn]:
    return [Turn("What number is this?", pictures[0].text, "read a number")]


def _ask_two(pictures: tuple[Picture, ...]) -> list[Turn]:
    one, two = (picture.things[0] for picture in pictures)
    return [
        Turn(f"Which image has the {one.name}?", "the first image", "compare two pictures"),
        Turn(f"Which image has {with_article(two.name)}?", "the second image", "compare two pictures"),
        Turn("What colour is the shape in the second image?", two.colour, "compare two pictures"),
    ]


ENTRIES: tuple[Entry, ...] = (
    Entry(("shape.png",), _draw("one", (112, 112)), _ask_one),
    Entry(("sides.jpg",), _draw("pair", (168, 112)), _ask_pair),
    Entry(("large.jpg",), _draw("pair", (400, 300)), _ask_large),
    Entry(("count.png",), _draw("many", (140, 140)), _ask_many),
    Entry(("word.png",), _draw_printed(_is_real_word, (168, 84)), _ask_word),
    Entry(("number.jpg",), _draw_printed(str.isdigit, (140, 84)), _ask_number),
    Entry(("first.png", "second.jpg"), _draw_two, _ask_two),
)
TEXT_ONLY: tuple[Turn, ...] = (
    Turn("Hello!", GREETING, "text only"),
    Turn("Who are you?", IDENTITY, "text only"),
    Turn("What can you do?", ABILITY, "text only"),
    Turn("What is 2 plus 3?", "5", "text only"),
)


def load_gallery(folder: Path = GALLERY_DIR) -> list[tuple[list[str], Item]]:
    """The gallery's entries: file names, and the item to ask."""
    entries = json.loads((folder / "gallery.json").read_text(encoding="utf-8"))
    loaded = []
    for entry in entries:
        pictures = tuple(Image.open(folder / name).convert("RGB") for name in entry["files"])
        loaded.append((entry["files"], Item(pictures, Turn(entry["question"], entry["answer"], entry["task"]))))
    return loaded


def make_gallery(checkpoint: Path, folder: Path) -> None:
    """Write the picture files and gallery.json."""
    answerers = [Answerer(checkpoint, dtype) for dtype in (torch.float32, torch.bfloat16)]
    folder.mkdir(parents=True, exist_ok=True)
    listed: list[dict[str, object]] = []
    for entry in ENTRIES:
        for turn in _draft(entry, answerers, folder):
            listed.append({"files": entry.files, "question": turn.question, "answer": turn.answer, "task": turn.task})
    for turn in TEXT_ONLY:
        if _all_right(answerers, [Item((), turn)]):
            listed.append({"files": [], "question": turn.question, "answer": turn.answer, "task": turn.task})
        else:
            print(f"left out, not answered right: {turn.question}")
    (folder / "gallery.json").write_text(json.dumps(listed, indent=1) + "\n", encoding="utf-8")


def _draft(entry: Entry, answerers: list[Answerer], folder: Path) -> list[Turn]:
    for number in range(CANDIDATES):
        pictures = entry.draw(random.Random(f"gallery:{entry.files[0]}:{number}"))
        turns = entry.ask(pictures)
        for name, picture in zip(entry.files, pictures, strict=True):
            picture.image.save(folder / name, quality=92)
        # Asked from the files, so that what JPEG did to them counts.
        saved = tuple(Image.open(folder / name).convert("RGB") for name in entry.files)
        if _all_right(answerers, [Item(saved, turn) for turn in turns]):
            print(f"{', '.join(entry.files)}: candidate {number}")
            return turns
    raise SystemExit(f"{', '.join(entry.files)}: no candidate is answered right")


def _all_right(answerers: list[Answerer], items: list[Item]) -> bool:
    return all(answerer.answer([item]) == [item.turn.answer] for item in items for answerer in answerers)


def main() -> None:
    """The command line."""
    flags = argparse.ArgumentParser(
        prog="python -m epd.demo.gallery",
        description="Draw the gallery's pictures and keep those that the checkpoint answers right.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    flags.add_argument("--checkpoint", type=Path, default=CHECKPOINT_DIR, help="checkpoint folder")
    flags.add_argument("--out", type=Path, default=GALLERY_DIR, help="folder to write")
    args = flags.parse_args()
    make_gallery(args.checkpoint, args.out)


if __name__ == "__main__":
    main()
