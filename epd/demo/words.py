"""What is printed on word pictures, and the rule that keeps some of it out of training."""

from __future__ import annotations

import random
import string
import zlib

MAX_LETTERS = 6

_COMMON_WORDS = """
UP ON GO NO YES HI OK IN OUT TOP CAT DOG COW PIG HEN FOX BEE ANT OWL BAT RAT FISH BIRD DUCK FROG BEAR LION TIGER
HORSE SHEEP GOAT MOUSE WOLF SNAKE ZEBRA MONKEY RABBIT SUN MOON STAR SKY RAIN SNOW WIND CLOUD STORM FIRE WATER ICE
SEA LAKE RIVER ISLAND BEACH SAND ROCK STONE HILL TREE LEAF ROOT FLOWER GRASS ROSE GARDEN FOREST FARM FIELD ROAD
STREET BRIDGE CITY TOWN HOUSE HOME ROOM DOOR WALL ROOF WINDOW KITCHEN TABLE CHAIR BED LAMP CLOCK MIRROR BOX BAG
BOOK PEN PAPER PENCIL LETTER WORD PAGE NOTE MAP KEY LOCK COIN MONEY BANK SHOP STORE MARKET OPEN CLOSED STOP START
WAIT WALK RUN JUMP SWIM FLY SING DANCE PLAY WORK REST SLEEP DREAM READ WRITE DRAW PAINT COOK EAT DRINK BREAD MILK
EGG CHEESE BUTTER SUGAR SALT RICE SOUP CAKE PIE APPLE PEAR PLUM LEMON ORANGE BANANA GRAPE CHERRY TEA COFFEE JUICE
CUP GLASS PLATE BOWL FORK SPOON KNIFE HAT COAT SHIRT SHOE SOCK GLOVE SCARF BOOT DRESS RING HEAD HAND FOOT EYE EAR
NOSE MOUTH HAIR ARM LEG HEART BRAIN BABY BOY GIRL MAN WOMAN MOTHER FATHER FRIEND KING QUEEN DOCTOR NURSE PILOT
CAR BUS BIKE TRAIN TRUCK SHIP BOAT PLANE TAXI WHEEL ENGINE MOTOR RADIO PHONE CAMERA ROBOT LASER ROCKET PLANET
EARTH MARS SPACE ORBIT LIGHT DARK NIGHT DAY HOUR MINUTE WEEK MONTH YEAR SPRING SUMMER AUTUMN WINTER HOT COLD WARM
COOL BIG SMALL TALL LONG SHORT FAST SLOW OLD NEW YOUNG GOOD BAD HAPPY SAD ANGRY QUIET LOUD HARD SOFT RED GREEN
BLUE YELLOW PINK BLACK WHITE BROWN GOLD SILVER ONE TWO THREE FOUR FIVE SIX SEVEN EIGHT NINE TEN ZERO FIRST LAST
LEFT RIGHT NORTH SOUTH EAST WEST HELLO WORLD PEACE LOVE HOPE LUCK MAGIC MUSIC SONG GAME BALL CHESS PUZZLE PRIZE
EXIT ENTER PUSH PULL SALE FREE HELP DANGER SAFE PARK HOTEL CAFE PIZZA TAXI ZOO JAZZ QUIZ FOXES WAX VEX JOY KIWI
"""
COMMON_WORDS: tuple[str, ...] = tuple(_COMMON_WORDS.split())


def is_held_out(text: str) -> bool:
    """One printed text in ten is never shown in training, whatever the seed: reading it cannot be recall."""
    return zlib.crc32(text.encode()) % 10 == 0


def random_word(rng: random.Random, longest: int) -> str:
    """An English word of at most `longest` letters."""
    while True:
        word = rng.choice(COMMON_WORDS)
        if len(word) <= longest:
            return word


def random_letters(rng: random.Random, longest: int, shortest: int = 2) -> str:
    """A string of random capitals; it cannot be guessed, only read."""
    length = rng.randint(shortest, longest)
    return "".join(rng.choice(string.ascii_uppercase) for _ in range(length))


def random_number(rng: random.Random, longest: int = 4) -> str:
    """A number of 1 to `longest` digits without a leading zero."""
    length = rng.randint(1, longest)
    return str(rng.randrange(10 ** (length - 1) if length > 1 else 0, 10**length))


def printed_text(rng: random.Random, longest: int = MAX_LETTERS, *, held_out: bool | None = False) -> str:
    """What a word picture shows. `held_out`: False for training, True for measuring, None for either."""
    while True:
        draw = rng.random()
        if draw < 0.45:
            text = random_letters(rng, longest)
        elif draw < 0.80:
            text = random_word(rng, longest)
        else:
            text = random_number(rng, min(4, longest))
        if held_out is None or is_held_out(text) == held_out:
            return text
