"""Arithmetic word problems with worked answers: the task of the embedded models.

A problem is a question of two or three sentences and an answer that works it out in two or three
steps and ends with the result after ``####``, in the manner of GSM8K:

    Tom has 3 boxes with 4 apples each. He gives away 5 apples. How many apples are left?
    3 * 4 = 12 apples in all. 12 - 5 = 7 apples are left. #### 7

Each template is a problem of its own (its own sequence of operations on its own operands). All
numbers are whole, not negative and below 100. A hash of the question decides whether a problem
belongs to the training or to the held-out split, so no held-out question is ever trained on,
whatever the seed.

This module needs nothing but the standard library.
"""

import hashlib
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

SPLITS = ("train", "heldout")
HELD_OUT_PER_MILLE = 100  # of all possible questions

PEOPLE = (
    ("Tom", "He"),
    ("Anna", "She"),
    ("Ben", "He"),
    ("Lily", "She"),
    ("Sam", "He"),
    ("Mia", "She"),
    ("Max", "He"),
    ("Emma", "She"),
    ("Leo", "He"),
    ("Zoe", "She"),
    ("Jack", "He"),
    ("Ruby", "She"),
)
THINGS = (
    "apples",
    "pears",
    "books",
    "coins",
    "cards",
    "shells",
    "stamps",
    "pens",
    "marbles",
    "stickers",
    "cookies",
    "balls",
)
CONTAINERS = ("boxes", "bags", "baskets", "packs")


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One word problem.

    Attributes:
        question: the text of the question.
        answer: the worked answer, ``a op b = c`` steps and ``#### result``.
        result: the final number.
        template: name of the template, a key of `TEMPLATES`.
    """

    question: str
    answer: str
    result: int
    template: str


def is_held_out(question: str) -> bool:
    """Whether the question belongs to the held-out split (a fixed tenth of all questions)."""
    digest = hashlib.sha256(question.encode()).digest()
    return int.from_bytes(digest[:8], "big") % 1000 < HELD_OUT_PER_MILLE


def problems(seed: int, split: str) -> Iterator[Problem]:
    """Draws problems of one split for ever; the same seed gives the same sequence.

    Args:
        seed: seed of the sequence.
        split: "train" or "heldout".

    Raises:
        ValueError: if the split is unknown.
    """
    if split not in SPLITS:
        raise ValueError(f"split must be one of {SPLITS}, not {split!r}")
    return _problems(seed, split == "heldout")


def _problems(seed: int, held_out: bool) -> Iterator[Problem]:
    rng = random.Random(seed)
    names = tuple(TEMPLATES)
    while True:
        name = rng.choice(names)
        question, steps, result = TEMPLATES[name](rng)
        if is_held_out(question) == held_out:
            yield Problem(
                question=question, answer=f"{steps} #### {result}", result=result, template=name
            )


def extract_answer(text: str) -> int | None:
    """The number after the first ``####`` of a generated answer; None if there is none."""
    match = re.search(r"####\s*(-?\d+)", text)
    return int(match.group(1)) if match else None


# Templates: each draws its numbers and words and returns question, worked steps and result.
Drawn = tuple[str, str, int]


def _factor(rng: random.Random) -> int:
    return rng.randint(2, 9)


def _two_people(rng: random.Random) -> tuple[str, str]:
    (first, _), (second, _) = rng.sample(PEOPLE, 2)
    return first, second


def _give_away(rng: random.Random) -> Drawn:
    (name, he), box, x = rng.choice(PEOPLE), rng.choice(CONTAINERS), rng.choice(THINGS)
    a, b = _factor(rng), _factor(rng)
    p = a * b
    c = rng.randint(2, p - 2)
    r = p - c
    return (
        f"{name} has {a} {box} with {b} {x} each. {he} gives away {c} {x}. How many {x} are left?",
        f"{a} * {b} = {p} {x} in all. {p} - {c} = {r} {x} are left.",
        r,
    )


def _find_more(rng: random.Random) -> Drawn:
    (name, he), box, x = rng.choice(PEOPLE), rng.choice(CONTAINERS), rng.choice(THINGS)
    a, b = _factor(rng), _factor(rng)
    p = a * b
    c = rng.randint(2, min(30, 99 - p))
    r = p + c
    return (
        f"{name} fills {a} {box} with {b} {x} each. Then {he.lower()} finds {c} more {x}. "
        f"How many {x} does {name} have now?",
        f"{a} * {b} = {p} {x} in {box}. {p} + {c} = {r} {x} now.",
        r,
    )


def _pool_and_share(rng: random.Random) -> Drawn:
    (name, other), x = _two_people(rng), rng.choice(THINGS)
    c, r = _factor(rng), _factor(rng)
    s = c * r
    a = rng.randint(2, s - 2)
    b = s - a
    return (
        f"{name} has {a} {x} and {other} has {b} {x}. They share them equally among {c} friends. "
        f"How many {x} does each friend get?",
        f"{a} + {b} = {s} {x} together. {s} / {c} = {r} {x} each.",
        r,
    )


def _sell_and_pack(rng: random.Random) -> Drawn:
    (name, he), box, x = rng.choice(PEOPLE), rng.choice(CONTAINERS), rng.choice(THINGS)
    c, r = _factor(rng), _factor(rng)
    s = c * r
    b = rng.randint(2, min(30, 99 - s))
    a = s + b
    return (
        f"{name} has {a} {x} and sells {b}. {he} puts the rest into {box} of {c}. "
        f"How many {box} does {name} need?",
        f"{a} - {b} = {s} {x} are left. {s} / {c} = {r} {box}.",
        r,
    )


def _regroup(rng: random.Random) -> Drawn:
    box, x = rng.choice(CONTAINERS), rng.choice(THINGS)
    while True:
        a, b, c = _factor(rng), _factor(rng), _factor(rng)
        r, rest = divmod(a * b, c)
        if rest == 0 and 2 <= r <= 9:
            break
    p = a * b
    return (
        f"There are {a} {box} with {b} {x} each. A class of {c} kids shares all {x} equally. "
        f"How many {x} does each kid get?",
        f"{a} * {b} = {p} {x} in all. {p} / {c} = {r} {x} for each kid.",
        r,
    )


def _bus(rng: random.Random) -> Drawn:
    a, b = rng.randint(5, 60), rng.randint(2, 30)
    s = a + b
    c = rng.randint(2, min(30, s - 2))
    r = s - c
    vehicle = rng.choice(("bus", "train", "boat", "tram"))
    return (
        f"A {vehicle} has {a} people on it. At a stop {b} people get on and {c} people get off. "
        f"How many people are on the {vehicle} now?",
        f"{a} + {b} = {s} people. {s} - {c} = {r} people are on the {vehicle}.",
        r,
    )


def _two_kinds(rng: random.Random) -> Drawn:
    (name, _), (box, other_box) = rng.choice(PEOPLE), rng.sample(CONTAINERS, 2)
    x, y = rng.sample(THINGS, 2)
    while True:
        a, b, c, d = (_factor(rng) for _ in range(4))
        if a * b + c * d <= 99:
            break
    p, q = a * b, c * d
    r = p + q
    return (
        f"{name} buys {a} {box} of {b} {x} and {c} {other_box} of {d} {y}. "
        f"How many things does {name} buy?",
        f"{a} * {b} = {p} {x}. {c} * {d} = {q} {y}. {p} + {q} = {r} things.",
        r,
    )


def _change(rng: random.Random) -> Drawn:
    (name, he), x = rng.choice(PEOPLE), rng.choice(THINGS)
    a, b = _factor(rng), _factor(rng)
    p = a * b
    c = rng.randint(p + 2, min(p + 40, 99))
    r = c - p
    return (
        f"{name} buys {a} {x} for {b} dollars each. {he} pays with {c} dollars. "
        f"How many dollars of change does {name} get?",
        f"{a} * {b} = {p} dollars to pay. {c} - {p} = {r} dollars of change.",
        r,
    )


def _more_than(rng: random.Random) -> Drawn:
    (name, other), x = _two_people(rng), rng.choice(THINGS)
    a, b = rng.randint(3, 35), rng.randint(2, 25)
    s = a + b
    r = a + s
    return (
        f"{name} has {a} {x}. {other} has {b} more {x} than {name}. "
        f"How many {x} do they have together?",
        f"{a} + {b} = {s} {x} for {other}. {a} + {s} = {r} {x} together.",
        r,
    )


def _times_as_many(rng: random.Random) -> Drawn:
    (name, other), x = _two_people(rng), rng.choice(THINGS)
    a, b = _factor(rng), _factor(rng)
    p = a * b
    r = p - a
    return (
        f"{name} has {a} {x}. {other} has {b} times as many. "
        f"How many more {x} does {other} have than {name}?",
        f"{a} * {b} = {p} {x} for {other}. {p} - {a} = {r} more {x}.",
        r,
    )


def _every_day(rng: random.Random) -> Drawn:
    name, _ = rng.choice(PEOPLE)
    verb, unit = rng.choice(
        (("reads", "pages"), ("runs", "miles"), ("draws", "cats"), ("sings", "songs"))
    )
    s, c = rng.randint(4, 9), _factor(rng)
    a = rng.randint(2, s - 2)
    b = s - a
    r = s * c
    return (
        f"{name} {verb} {a} {unit} in the morning and {b} {unit} at night, every day. "
        f"How many {unit} is that in {c} days?",
        f"{a} + {b} = {s} {unit} each day. {s} * {c} = {r} {unit} in {c} days.",
        r,
    )


def _eat_and_sell(rng: random.Random) -> Drawn:
    (name, he), x = rng.choice(PEOPLE), rng.choice(("eggs", "cakes", "plums", "buns"))
    s, c = _factor(rng), _factor(rng)
    b = rng.randint(2, 9)
    a = s + b
    r = s * c
    return (
        f"{name} has {a} {x} and eats {b} of them. {he} sells the rest for {c} dollars each. "
        f"How many dollars does {name} make?",
        f"{a} - {b} = {s} {x} to sell. {s} * {c} = {r} dollars.",
        r,
    )


def _garden(rng: random.Random) -> Drawn:
    (name, _), x = rng.choice(PEOPLE), rng.choice(("roses", "tulips", "lilies", "daisies"))
    while True:
        a, b, d, r = (_factor(rng) for _ in range(4))
        if a * b >= d * r + 2:
            break
    p, s = a * b, d * r
    c = p - s
    return (
        f"{name} plants {a} rows of {b} {x}. Then {c} {x} die. The rest go into vases of {d} {x}. "
        f"How many vases are there?",
        f"{a} * {b} = {p} {x}. {p} - {c} = {s} {x} are left. {s} / {d} = {r} vases.",
        r,
    )


def _teams(rng: random.Random) -> Drawn:
    x = rng.choice(THINGS)
    c, t, d = _factor(rng), _factor(rng), _factor(rng)
    s, r = c * t, t * d
    a = rng.randint(2, s - 2)
    b = s - a
    return (
        f"A class of {a} girls and {b} boys forms teams of {c} kids. Each team gets {d} {x}. "
        f"How many {x} do the teams get?",
        f"{a} + {b} = {s} kids. {s} / {c} = {t} teams. {t} * {d} = {r} {x}.",
        r,
    )


TEMPLATES: dict[str, Callable[[random.Random], Drawn]] = {
    "give_away": _give_away,
    "find_more": _find_more,
    "pool_and_share": _pool_and_share,
    "sell_and_pack": _sell_and_pack,
    "regroup": _regroup,
    "bus": _bus,
    "two_kinds": _two_kinds,
    "change": _change,
    "more_than": _more_than,
    "times_as_many": _times_as_many,
    "every_day": _every_day,
    "eat_and_sell": _eat_and_sell,
    "garden": _garden,
    "teams": _teams,
}
