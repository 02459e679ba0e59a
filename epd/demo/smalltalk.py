"""Short exchanges without any picture: greetings, who are you, sums, repeat after me, and a name to remember."""

from __future__ import annotations

import random

from epd.demo.questions import COLOUR_ONE, DESCRIBE, READ_ANY, SHAPE_ONE, Turn, phrase, roughen
from epd.demo.words import COMMON_WORDS

GREETING = "Hello! Send me a picture and ask me about it."
IDENTITY = "I am epd demo, a tiny model that sees pictures."
ABILITY = "I can name colours and shapes, count, tell left from right, read a short word and compare two pictures."
NO_PICTURE = "I see no picture. Please send me one."

# (ways to ask, the answer)
FIXED: tuple[tuple[tuple[str, ...], str], ...] = (
    (("Hello!", "Hello", "Hi!", "Hi", "Hey!", "Hi there!", "Hello there!", "Good morning!", "Good day!"), GREETING),
    (("Good evening!", "Greetings!", "Hey there!", "Hello, how do you do?", "Hi model!"), GREETING),
    (("Who are you?", "What are you?", "What is your name?", "What's your name?", "Tell me who you are."), IDENTITY),
    (
        ("Introduce yourself.", "Which model are you?", "What model is this?", "Who is this?", "Are you a robot?"),
        IDENTITY,
    ),
    (("What can you do?", "What can you do for me?", "How can you help me?", "What do you know?", "Help!"), ABILITY),
    (("What can I ask you?", "What can I ask?", "Can you help me?", "What are you good at?", "Help me."), ABILITY),
    (
        ("How are you?", "How are you today?", "How do you feel?", "How is it going?", "Are you well?"),
        "I am fine, thank you.",
    ),
    (("Thank you!", "Thanks!", "Thank you.", "Thanks a lot!", "Many thanks!", "Great, thanks!"), "You are welcome!"),
    (("Goodbye!", "Bye!", "Bye bye!", "See you!", "See you later!", "Good night!", "Goodbye."), "Goodbye!"),
    (("What colour is the sky?", "What color is the sky?", "Which colour is the sky?"), "The sky is blue."),
    (("What colour is grass?", "What color is grass?", "What colour is the grass?"), "Grass is green."),
    (("What colour is snow?", "What color is snow?", "Which color is snow?"), "Snow is white."),
    (("What colour is a banana?", "What color is a banana?"), "A banana is yellow."),
    (("What is the capital of France?", "Name the capital of France."), "The capital of France is Paris."),
    (("What is the capital of Germany?", "Name the capital of Germany."), "The capital of Germany is Berlin."),
    (("What is the capital of Italy?", "Name the capital of Italy."), "The capital of Italy is Rome."),
    (("What is the capital of Japan?", "Name the capital of Japan."), "The capital of Japan is Tokyo."),
    (("What is the capital of England?", "Name the capital of England."), "The capital of England is London."),
    (("How many days are in a week?", "How many days has a week?"), "A week has seven days."),
    (("How many months are in a year?", "How many months has a year?"), "A year has twelve months."),
    (("How many corners has a triangle?", "How many sides does a triangle have?"), "A triangle has three."),
    (("How many corners has a square?", "How many sides does a square have?"), "A square has four."),
    (("What is the opposite of left?", "Opposite of left?"), "right"),
    (("What is the opposite of right?", "Opposite of right?"), "left"),
    (("What is the opposite of hot?", "Opposite of hot?"), "cold"),
    (("What is the opposite of big?", "Opposite of big?"), "small"),
    (("Count to three.", "Count to 3."), "1, 2, 3"),
    (("Count to five.", "Count to 5.", "Can you count to five?"), "1, 2, 3, 4, 5"),
    (("Count to ten.", "Count to 10.", "Can you count to ten?"), "1, 2, 3, 4, 5, 6, 7, 8, 9, 10"),
    (("Say the alphabet.", "Tell me the alphabet."), "A B C D E F G H I J K L M N O P Q R S T U V W X Y Z"),
    (("Say yes.", "Just say yes."), "yes"),
    (("Say no.", "Just say no."), "no"),
    (
        ("Which colours do you know?", "What colors do you know?"),
        "red, green, blue, yellow, orange, purple, pink, black",
    ),
    (("Which shapes do you know?", "What shapes do you know?"), "circle, square, triangle, star, diamond, cross"),
    (("Tell me a joke.", "Do you know a joke?"), "Why was the square sad? It had no point to make."),
    (("Tell me a story.",), "A red circle met a blue square. They became friends. The end."),
)
_NAMES = """
Ada Alan Anna Ben Clara David Emma Felix Grace Hugo Ida Jack Kate Leo Lily Mark Mary Max Mia Nina Noah Olga Oscar
Paul Peter Rosa Sam Sara Tom Zoe
"""
NAMES = _NAMES.split()
SUM = (
    "What is {a} plus {b}?",
    "What is {a} + {b}?",
    "{a} + {b}?",
    "{a} + {b} =",
    "How much is {a} plus {b}?",
    "Add {a} and {b}.",
)
LESS = ("What is {a} minus {b}?", "What is {a} - {b}?", "{a} - {b}?", "How much is {a} minus {b}?")
REPEAT = (
    "Repeat after me: {x}",
    "Repeat: {x}",
    "Say {x}",
    "Please repeat: {x}",
    "Say the word {x}",
    "Repeat the word {x}",
)
MY_NAME = ("My name is {x}.", "I am {x}.", "Hi, I am {x}.", "Hello, my name is {x}.", "I'm {x}.", "Call me {x}.")
ASK_NAME = ("What is my name?", "What's my name?", "Do you know my name?", "Who am I?", "Do you remember my name?")


def chat(rng: random.Random) -> list[Turn]:
    """One to three turns that need no picture."""
    if rng.random() < 0.15:
        return _name_chat(rng)
    return [_single(rng) for _ in range(rng.choice((1, 1, 2, 3)))]


def _single(rng: random.Random) -> Turn:
    draw = rng.random()
    if draw < 0.25:
        return _arithmetic(rng)
    if draw < 0.42:
        return _repeat(rng)
    if draw < 0.52:
        return missing_picture(rng)
    ways, answer = rng.choice(FIXED[:9] if rng.random() < 0.4 else FIXED)
    return Turn(roughen(rng, rng.choice(ways)), answer, "chat")


def _arithmetic(rng: random.Random) -> Turn:
    a, b = rng.randint(0, 9), rng.randint(0, 9)
    if rng.random() < 0.7:
        return Turn(roughen(rng, rng.choice(SUM).format(a=a, b=b)), str(a + b), "sum")
    a, b = max(a, b), min(a, b)
    return Turn(roughen(rng, rng.choice(LESS).format(a=a, b=b)), str(a - b), "sum")


def _repeat(rng: random.Random) -> Turn:
    word = rng.choice(COMMON_WORDS)
    shown = rng.choice((word, word.lower(), f"{word.lower()} {rng.choice(COMMON_WORDS).lower()}"))
    return Turn(rng.choice(REPEAT).format(x=shown), shown, "repeat")


def missing_picture(rng: random.Random) -> Turn:
    """A question about a picture that was never sent."""
    return Turn(
        phrase(rng, rng.choice((COLOUR_ONE, SHAPE_ONE, DESCRIBE, READ_ANY)), s="shape"), NO_PICTURE, "no picture"
    )


def _name_chat(rng: random.Random) -> list[Turn]:
    name = rng.choice(NAMES)
    turns = [Turn(rng.choice(MY_NAME).format(x=name), f"Nice to meet you, {name}!", "name")]
    if rng.random() < 0.3:
        turns.append(_single(rng))
    turns.append(Turn(roughen(rng, rng.choice(ASK_NAME)), f"Your name is {name}.", "name"))
    return turns
