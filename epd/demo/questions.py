"""Questions about pictures in many phrasings, with their one right answer."""

from __future__ import annotations

import random
from dataclasses import dataclass

from epd.demo.pictures import Picture

NUMBER_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")

# {c} is colour or color; {p} is picture, image or photo; {s} is a shape's name or "shape".
COLOUR_ONE = (
    "What {c} is the {s}?",
    "What {c} is it?",
    "What {c} is this?",
    "What {c} is this {s}?",
    "Which {c} is the {s}?",
    "Which {c} does the {s} have?",
    "What is the {c} of the {s}?",
    "What is the {c} of this {s}?",
    "What's the {c} of the {s}?",
    "Tell me the {c} of the {s}.",
    "Name the {c} of the {s}.",
    "What {c} do you see?",
    "What {c} is the {s} in the {p}?",
    "What {c} is the {s} in this {p}?",
)
SHAPE_ONE = (
    "What shape is it?",
    "What shape is this?",
    "What shape is that?",
    "Which shape is this?",
    "Which shape is it?",
    "What shape do you see?",
    "Which shape do you see?",
    "What is the shape?",
    "Name the shape.",
    "Name this shape.",
    "What shape is in the {p}?",
    "What shape is shown?",
    "What shape is shown in the {p}?",
    "Which shape is in this {p}?",
    "What is this shape called?",
)
SHAPE_BY_COLOUR = (
    "What shape is {k}?",
    "Which shape is {k}?",
    "What shape is the {k} one?",
    "What is the {k} shape?",
    "What is the shape of the {k} one?",
    "Which shape is the {k} one?",
)
COLOUR_BY_SHAPE = (
    "What {c} is the {s}?",
    "Which {c} is the {s}?",
    "What is the {c} of the {s}?",
    "What's the {c} of the {s}?",
    "Tell me the {c} of the {s}.",
    "Which {c} does the {s} have?",
)
SIDE = (
    "Is the {t} on the left or on the right?",
    "Is the {t} on the left or the right?",
    "Is the {t} left or right?",
    "Is the {t} to the left or to the right?",
    "Left or right: where is the {t}?",
    "Where is the {t}?",
    "Where is the {t}, left or right?",
    "On which side is the {t}?",
    "Which side is the {t} on?",
    "Which side of the {p} is the {t} on?",
)
AT_SIDE = (
    "What is on the {d}?",
    "What is on the {d} side?",
    "What do you see on the {d}?",
    "Which shape is on the {d}?",
    "What shape is on the {d}?",
    "What's on the {d}?",
)
COLOUR_AT_SIDE = ("What {c} is the shape on the {d}?", "Which {c} is on the {d}?", "What {c} is the {d} one?")
COUNT = (
    "How many {n} are there?",
    "How many {n} do you see?",
    "How many {n} can you see?",
    "How many {n} are in the {p}?",
    "How many {n} are there in the {p}?",
    "How many {n} are in this {p}?",
    "How many {n} are shown?",
    "Count the {n}.",
    "Count the {n} in the {p}.",
    "What is the number of {n}?",
)
DESCRIBE = (
    "Describe the {p}.",
    "Describe this {p}.",
    "Describe what you see.",
    "Describe it.",
    "What do you see?",
    "What do you see in this {p}?",
    "What can you see?",
    "What is in the {p}?",
    "What is in this {p}?",
    "What is this?",
    "What does the {p} show?",
    "What is shown in the {p}?",
    "What's in the {p}?",
    "What's in this {p}?",
    "Tell me what you see.",
)
READ_ANY = (
    "What does it say?",
    "What does the {p} say?",
    "What does this {p} say?",
    "What does this say?",
    "What is written here?",
    "What is written in the {p}?",
    "What is written?",
    "What text is in the {p}?",
    "What is the text?",
    "Read the text.",
    "Read this.",
    "Read it.",
    "Read the {p}.",
    "Can you read this?",
    "Please read the text.",
)
READ_WORD = (
    "What word is this?",
    "What is the word?",
    "Which word is this?",
    "What word is in the {p}?",
    "What word do you see?",
    "What word is written here?",
    "Which word do you see?",
    "Read the word.",
    "Please read the word.",
    "What does the word say?",
    "What is the word in the {p}?",
)
READ_NUMBER = (
    "What number is this?",
    "What is the number?",
    "Which number is this?",
    "What number is in the {p}?",
    "What number do you see?",
    "What number is written here?",
    "Which number do you see?",
    "Read the number.",
    "Please read the number.",
    "What is the number in the {p}?",
)
FIRST_LETTER = ("What is the first letter?", "Which letter comes first?", "What letter does it start with?")
LAST_LETTER = ("What is the last letter?", "Which letter comes last?", "What letter does it end with?")
TEXT_COLOUR = ("What {c} is the {w}?", "What is the {c} of the {w}?", "Which {c} is the {w}?", "What {c} is it?")
WHICH_PICTURE = (
    "Which {p} has the {t}?",
    "Which {p} has a {t}?",
    "Which {p} shows the {t}?",
    "Which {p} shows a {t}?",
    "Which {p} contains the {t}?",
    "In which {p} is the {t}?",
    "Which of the two {p}s has the {t}?",
    "Where is the {t}, in the first or the second {p}?",
    "Which one has the {t}?",
    "Which one is the {t}?",
)
WHICH_SAYS = ("Which {p} says {x}?", "Which one says {x}?", "In which {p} is the word {x}?", "Which {p} shows {x}?")
SAME_SHAPE = (
    "Are the shapes the same?",
    "Do both {p}s show the same shape?",
    "Is it the same shape in both {p}s?",
    "Do the two {p}s have the same shape?",
)
SAME_COLOUR = (
    "Are the {c}s the same?",
    "Do both shapes have the same {c}?",
    "Is it the same {c} in both {p}s?",
    "Do the two {p}s have the same {c}?",
)
NTH_COLOUR = (
    "What {c} is the shape in the {o} {p}?",
    "What {c} is the {o} one?",
    "Which {c} is the {o} shape?",
    "What {c} is the shape in {p} {i}?",
    "What is the {c} of the {o} shape?",
)
NTH_SHAPE = (
    "What shape is in the {o} {p}?",
    "What shape is the {o} one?",
    "Which shape is in the {o} {p}?",
    "What shape is in {p} {i}?",
    "What is the shape in the {o} {p}?",
)
NTH_READ = (
    "What does the {o} {p} say?",
    "What is written in the {o} {p}?",
    "What does {p} {i} say?",
    "What word is in the {o} {p}?",
    "Read the {o} {p}.",
)
DESCRIBE_BOTH = ("Describe both {p}s.", "Describe the {p}s.", "What do the {p}s show?", "What is in the two {p}s?")


@dataclass(frozen=True)
class Turn:
    """One question and its answer. `task` names the row of the accuracy report that it counts in."""

    question: str
    answer: str
    task: str


def phrase(rng: random.Random, templates: tuple[str, ...], **slots: str) -> str:
    """Pick a template, fill it, and roughen it as people type: lower case, no question mark, a "please"."""
    text = rng.choice(templates)
    picture = rng.choices(("picture", "image", "photo"), (5, 5, 1))[0]
    colour = rng.choice(("colour", "color"))
    return roughen(rng, text.format(p=picture, c=colour, **slots))


def roughen(rng: random.Random, text: str) -> str:
    """Vary capitals, the closing mark and politeness without changing the meaning."""
    if rng.random() < 0.2:
        text = text[0].lower() + text[1:]
    if rng.random() < 0.15:
        text = text.rstrip("?.")
    elif rng.random() < 0.05:
        text = text.rstrip("?.") + rng.choice((", please?", " please", ", please."))
    if rng.random() < 0.03:
        text = rng.choice(("Hi, ", "Hello! ", "Please tell me: ", "Question: ")) + text
    return text


def with_article(name: str) -> str:
    """red circle -> a red circle; orange star -> an orange star."""
    return ("an " if name[0] in "aeiou" else "a ") + name


def ask_picture(rng: random.Random, picture: Picture, task: str = "") -> Turn:
    """A random question about one picture; `task` narrows the choice to that task."""
    if picture.kind == "one":
        return _ask_one(rng, picture, task)
    if picture.kind == "pair":
        return _ask_pair(rng, picture, task)
    if picture.kind == "many":
        return _ask_many(rng, picture, task)
    return _ask_text(rng, picture, task)


def describe(picture: Picture) -> str:
    """The model answer to "Describe the picture", without capital and full stop."""
    if picture.kind == "text":
        noun = "number" if picture.text.isdigit() else "word"
        return f"the {noun} {picture.text} in {picture.text_colour}"
    if picture.kind == "one":
        return with_article(picture.things[0].name) + (f" on the {picture.side}" if picture.side else "")
    if picture.kind == "pair":
        left, right = (with_article(thing.name) for thing in picture.things)
        return f"{left} on the left and {right} on the right"
    count, first = len(picture.things), picture.things[0]
    same = all(thing.colour == first.colour for thing in picture.things)
    name = first.name if same else first.shape
    return with_article(name) if count == 1 else f"{NUMBER_WORDS[count]} {plural(name)}"


def plural(name: str) -> str:
    """red cross -> red crosses."""
    return name + ("es" if name.endswith("s") else "s")


def sentence(text: str) -> str:
    """Capital and full stop."""
    return text[0].upper() + text[1:] + "."


def _describe_turn(rng: random.Random, picture: Picture) -> Turn:
    return Turn(phrase(rng, DESCRIBE), sentence(describe(picture)), "describe")


def _pick(rng: random.Random, task: str, weights: dict[str, int]) -> str:
    return task or rng.choices(list(weights), list(weights.values()))[0]


def _ask_one(rng: random.Random, picture: Picture, task: str) -> Turn:
    thing = picture.things[0]
    task = _pick(rng, task, {"colour": 4, "shape": 4, "side": 4 if picture.side else 0, "count": 1, "describe": 3})
    named = rng.choice((thing.shape, "shape"))
    if task == "colour":
        return Turn(phrase(rng, COLOUR_ONE, s=named), thing.colour, task)
    if task == "shape":
        by_colour = rng.random() < 0.2
        question = phrase(rng, SHAPE_BY_COLOUR, k=thing.colour) if by_colour else phrase(rng, SHAPE_ONE)
        return Turn(question, thing.shape, task)
    if task == "side":
        return Turn(phrase(rng, SIDE, t=rng.choice((named, thing.name, f"{thing.colour} shape"))), picture.side, task)
    if task == "count":
        return Turn(phrase(rng, COUNT, n=rng.choice(("shapes", plural(thing.shape)))), "1", task)
    return _describe_turn(rng, picture)


def _ask_pair(rng: random.Random, picture: Picture, task: str) -> Turn:
    index = rng.randrange(2)
    thing, side = picture.things[index], ("left", "right")[index]
    task = _pick(rng, task, {"colour": 3, "shape": 2, "side": 4, "at side": 3, "count": 1, "describe": 3})
    if task == "colour":
        return Turn(phrase(rng, COLOUR_BY_SHAPE, s=thing.shape), thing.colour, task)
    if task == "shape":
        return Turn(phrase(rng, SHAPE_BY_COLOUR, k=thing.colour), thing.shape, task)
    if task == "side":
        return Turn(phrase(rng, SIDE, t=rng.choice((thing.shape, thing.name, f"{thing.colour} shape"))), side, task)
    if task == "at side":
        if rng.random() < 0.35:
            return Turn(phrase(rng, COLOUR_AT_SIDE, d=side), thing.colour, task)
        return Turn(phrase(rng, AT_SIDE, d=side), thing.name, task)
    if task == "count":
        return Turn(phrase(rng, COUNT, n="shapes"), "2", task)
    return _describe_turn(rng, picture)


def _ask_many(rng: random.Random, picture: Picture, task: str) -> Turn:
    first = picture.things[0]
    same = all(thing.colour == first.colour for thing in picture.things)
    task = _pick(rng, task, {"count": 7, "colour": 1 if same else 0, "shape": 1, "describe": 2})
    if task == "colour":
        name = plural(rng.choice((first.shape, "shape")))
        return Turn(phrase(rng, ("What {c} are the {s}?", "Which {c} are the {s}?"), s=name), first.colour, task)
    if task == "shape":
        return Turn(phrase(rng, ("What shape are they?", "What shapes are these?", *SHAPE_ONE)), first.shape, task)
    if task == "count":
        names = ["shapes", plural(first.shape), plural(first.shape)]
        if same:
            names.append(plural(first.name))
        return Turn(phrase(rng, COUNT, n=rng.choice(names)), str(len(picture.things)), task)
    return _describe_turn(rng, picture)


def _ask_text(rng: random.Random, picture: Picture, task: str) -> Turn:
    digits = picture.text.isdigit()
    task = _pick(rng, task, {"read": 12, "letter": 0 if digits else 5, "text colour": 1, "describe": 2})
    if task == "read":
        templates = READ_ANY if rng.random() < 0.5 else READ_NUMBER if digits else READ_WORD
        return Turn(phrase(rng, templates), picture.text, "read number" if digits else "read word")
    if task == "letter":
        first = rng.random() < 0.5
        question = phrase(rng, FIRST_LETTER if first else LAST_LETTER)
        return Turn(question, picture.text[0] if first else picture.text[-1], task)
    if task == "text colour":
        return Turn(
            phrase(rng, TEXT_COLOUR, w=rng.choice(("text", "number" if digits else "word"))),
            picture.text_colour,
            "text colour",
        )
    return _describe_turn(rng, picture)


def ask_two(rng: random.Random, first: Picture, second: Picture) -> Turn:
    """A random question about two pictures, both of one shape or both of one word."""
    index = rng.randrange(2)
    chosen, ordinal = (first, second)[index], ("first", "second")[index]
    where = {"o": ordinal, "i": str(index + 1)}
    draw = rng.random()
    if draw < 0.1:
        return Turn(phrase(rng, DESCRIBE_BOTH), sentence(f"{describe(first)}, and {describe(second)}"), "two: describe")
    if chosen.kind == "text":
        if draw < 0.55 or first.text == second.text:
            return Turn(phrase(rng, NTH_READ, **where), chosen.text, "two: read")
        return Turn(phrase(rng, WHICH_SAYS, x=chosen.text), f"the {ordinal} image", "two: which says")
    return _ask_two_shapes(rng, first, second, chosen, where, draw)


def _ask_two_shapes(
    rng: random.Random, first: Picture, second: Picture, chosen: Picture, where: dict[str, str], draw: float
) -> Turn:
    one, two, thing = first.things[0], second.things[0], chosen.things[0]
    if draw < 0.2:
        return Turn(phrase(rng, SAME_SHAPE), "yes" if one.shape == two.shape else "no", "two: same")
    if draw < 0.3:
        return Turn(phrase(rng, SAME_COLOUR), "yes" if one.colour == two.colour else "no", "two: same")
    if draw < 0.42:
        return Turn(phrase(rng, NTH_COLOUR, **where), thing.colour, "two: colour")
    if draw < 0.54:
        return Turn(phrase(rng, NTH_SHAPE, **where), thing.shape, "two: shape")
    names = []
    if one.shape != two.shape:
        names.append(thing.shape)
    if one.colour != two.colour:
        names.append(f"{thing.colour} shape")
    if names:
        names += [thing.name, thing.name]
        return Turn(phrase(rng, WHICH_PICTURE, t=rng.choice(names)), f"the {where['o']} image", "two: which")
    return Turn(phrase(rng, SAME_SHAPE), "yes", "two: same")
