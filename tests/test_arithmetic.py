"""The generator of word problems: correct arithmetic, disjoint splits, reproducible draws."""

import itertools
import operator
import re

import pytest

from dlm_jax.arithmetic import TEMPLATES, Problem, extract_answer, is_held_out, problems

OPERATIONS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.floordiv}
STEP = re.compile(r"(\d+) ([-+*/]) (\d+) = (\d+)")


def draw(seed: int, split: str, count: int) -> list[Problem]:
    return list(itertools.islice(problems(seed, split), count))


def test_every_step_of_every_answer_is_correct():
    for problem in draw(0, "train", 3000) + draw(0, "heldout", 1000):
        steps = STEP.findall(problem.answer)
        assert 2 <= len(steps) <= 3, problem
        given = {int(number) for number in re.findall(r"\d+", problem.question)}
        for left, sign, right, result in steps:
            a, b, c = int(left), int(right), int(result)
            assert OPERATIONS[sign](a, b) == c, problem
            assert sign != "/" or a % b == 0, problem
            assert {a, b} <= given, problem  # from the question or from an earlier step
            assert 2 <= c <= 99, problem
            given.add(c)
        assert c == problem.result == extract_answer(problem.answer)
        assert problem.answer.endswith(f" #### {problem.result}")
        assert all(2 <= int(number) <= 99 for number in re.findall(r"\d+", problem.question))


def test_templates_are_different_problems():
    assert len(TEMPLATES) >= 12
    drawn = draw(0, "train", 3000)
    assert {problem.template for problem in drawn} == set(TEMPLATES)
    for name in TEMPLATES:
        signs = {
            tuple(sign for _, sign, _, _ in STEP.findall(problem.answer))
            for problem in drawn
            if problem.template == name
        }
        assert len(signs) == 1, name


def test_splits_are_disjoint():
    train = {problem.question for problem in draw(1, "train", 6000)}
    held_out = {problem.question for problem in draw(1, "heldout", 1000)}
    assert not train & held_out
    assert not any(map(is_held_out, train))
    assert all(map(is_held_out, held_out))


def test_a_tenth_is_held_out():
    train = draw(2, "train", 5000)
    changed = [is_held_out(problem.question + " ") for problem in train]
    assert 0.08 < sum(changed) / len(changed) < 0.12


def test_a_draw_depends_on_its_seed_only():
    assert draw(3, "train", 50) == draw(3, "train", 50)
    assert draw(3, "train", 50) != draw(4, "train", 50)


def test_the_held_out_split_is_fixed():
    # Were the hash to change, the embedded models would have been trained on held-out problems.
    questions = [f"What is {a} + {b}?" for a in range(20) for b in range(20)]
    assert sum(map(is_held_out, questions)) == 41


def test_an_unknown_split_is_refused():
    with pytest.raises(ValueError, match="'validation'"):
        problems(0, "validation")


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("3 * 4 = 12 apples. #### 12", 12),
        ("#### 7\n#### 8", 7),
        ("####-5", -5),
        ("12 - 5 = 7", None),
        ("#### seven", None),
        ("", None),
    ],
)
def test_extract_answer(text, number):
    assert extract_answer(text) == number
