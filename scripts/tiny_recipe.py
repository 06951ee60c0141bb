"""What the embedded models are trained on: recipes, tokenizer and batches, all in NumPy.

    problems -tokenizer-> tokens, where answers start -batches-> one step's rows and what to mask

`train_tiny.py` is the command.
"""

import dataclasses
import itertools
import re
from collections.abc import Iterator

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers.models import BPE

from dlm_jax.arithmetic import Problem, problems

EOS, MASK, USER, ASSISTANT = "<|endoftext|>", "<|mdm_mask|>", "<|user|>", "<|assistant|>"
# No token crosses the border of such a piece: one digit; punctuation with the blanks around it; a
# word with the blank before it; other blanks.
PIECES = r"\p{N}| ?[^\s\p{L}\p{N}]+ ?| ?\p{L}+|\s+"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that decides the trained weights.

    Attributes:
      family: of the model, a key of `FAMILIES`.
      width: D.
      mlp_width: F.
      layers: number of blocks.
      heads: N.
      kv_heads: K.
      problems: size of the training set.
      tokenizer_problems: how many of them the tokenizer and the drill are made of.
      vocab_size: upper bound; training stops when every word is one token.
      length: of prompt and canvas together.
      long_length: the same in every `long_every`-th step, so that longer canvases are known too.
      long_every: see `long_length`.
      drill_rows: rows per step that hold bare facts such as `7 * 8 = 56. 23 + 15 = 38. ` from the
        training answers, of which only the results are masked: arithmetic is what takes longest.
      drill_from: the step at which these rows begin, when questions are understood.
      drill_until: the step at which they end, when arithmetic is.
      result_rows: from then on, rows per step in which one result of the answer is masked, and so
        is all that would give it away: what decoding meets when all else is settled.
      cut_rows: fraction of these rows in which nothing behind the result is visible, so that its
        number of digits is open, and the token behind it is asked for too.
      min_canvas: each row's canvas has a random length between this and all that is left.
      batch: rows per step.
      steps: number of steps.
      learning_rate: its highest value.
      warmup: steps in which it rises linearly, before it stays constant.
      decay: fraction of the steps, the last ones, in which it falls linearly to zero.
      weight_decay: decoupled, of the matrices inside the blocks.
      clip: largest global norm of the gradient.
      ema: decay of the running mean of the parameters; the mean is what is written.
      seed: of problems, initial parameters, batches and masks.
    """

    family: str = "llada"
    width: int = 160
    mlp_width: int = 480
    layers: int = 4
    heads: int = 5
    kv_heads: int = 5
    problems: int = 400_000
    tokenizer_problems: int = 20_000
    vocab_size: int = 1024
    length: int = 72
    long_length: int = 104
    long_every: int = 16
    drill_rows: int = 12
    drill_from: int = 1500
    drill_until: int = 5000
    result_rows: int = 16
    cut_rows: float = 0.0
    min_canvas: int = 32
    batch: int = 32
    steps: int = 13_000
    learning_rate: float = 2e-3
    warmup: int = 300
    decay: float = 0.3
    weight_decay: float = 0.01
    clip: float = 1.0
    ema: float = 0.998
    seed: int = 0


RECIPES: dict[str, Recipe] = {
    "llada": Recipe(),
    "dream": Recipe(
        family="dream",
        heads=4,
        kv_heads=2,
        drill_from=1000,
        drill_until=3000,
        cut_rows=0.5,
        steps=5500,
    ),
}
"""Family -> how its embedded model is trained."""


def draw(seed: int, split: str, count: int) -> list[Problem]:
    """The first `count` problems of a split."""
    return list(itertools.islice(problems(seed, split), count))


def train_tokenizer(drawn: list[Problem], vocab_size: int) -> Tokenizer:
    """Byte-level BPE with single digits; any text survives encoding and decoding."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOS, MASK, USER, ASSISTANT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator((f"{p.question}\n{p.answer}" for p in drawn), trainer)
    return tokenizer


def encode_prompts(tokenizer: Tokenizer, drawn: list[Problem]) -> list[list[int]]:
    """Each question as the chat template puts it, up to where the answer begins."""
    return [e.ids for e in tokenizer.encode_batch([USER + p.question + ASSISTANT for p in drawn])]


def encode_problems(
    tokenizer: Tokenizer, drawn: list[Problem], length: int
) -> tuple[np.ndarray, np.ndarray]:
    """Prompts and answers, filled up with `<|endoftext|>`.

    Returns:
      Tokens `[problems, length]` and where each response starts, both int16.

    Raises:
      ValueError: a problem is longer than `length`.
    """
    prompts = encode_prompts(tokenizer, drawn)
    answers = tokenizer.encode_batch([p.answer for p in drawn])
    tokens = np.full((len(drawn), length), tokenizer.token_to_id(EOS), np.int16)
    for row, prompt, answer in zip(tokens, prompts, answers, strict=True):
        ids = prompt + answer.ids
        if len(ids) > length:
            raise ValueError(f"A problem has {len(ids)} tokens; length is {length}, raise it.")
        row[: len(ids)] = ids
    return tokens, np.array([len(prompt) for prompt in prompts], np.int16)


def encode_facts(tokenizer: Tokenizer, drawn: list[Problem]) -> list[tuple[list[int], list[bool]]]:
    """The steps of all answers as tokens, each with its result's digits marked."""
    facts = []
    steps = [step for problem in drawn for step in re.findall(r"\d+ . \d+ = \d+", problem.answer)]
    for encoded in tokenizer.encode_batch([step + ". " for step in steps]):
        equals = next(i for i, token in enumerate(encoded.tokens) if "=" in token)
        digits = [i > equals and token.isdigit() for i, token in enumerate(encoded.tokens)]
        facts.append((encoded.ids, digits))
    return facts


def hide_result(
    ids: list[int],
    start: int,
    digits: set[int],
    equals: int,
    cut: float,
    rng: np.random.Generator,
) -> tuple[np.ndarray, np.ndarray]:
    """Chooses one result of an answer.

    Returns:
      Its digits, and the digits of the later numbers: its copies, everything that follows from it,
      and at random half of the numbers that do not. With probability `cut`: its digits and the
      token behind them, and everything behind that.
    """
    numbers: list[list[int]] = []  # slots
    for slot in range(start, len(ids)):
        if ids[slot] in digits:
            if slot - 1 in (numbers[-1] if numbers else ()):
                numbers[-1].append(slot)
            else:
                numbers.append([slot])
    values = [[ids[slot] for slot in number] for number in numbers]
    results = [i for i, number in enumerate(numbers) if ids[number[0] - 1] == equals]
    chosen = results[rng.integers(len(results))]
    derived = [values[i] for i in results if i >= chosen]
    target, hidden = np.zeros((2, len(ids)), bool)
    target[numbers[chosen]] = True
    if cut and rng.random() < cut:
        behind = numbers[chosen][-1] + 1
        target[behind], hidden[behind + 1 :] = True, True
        return target, hidden
    for number, value in zip(numbers[chosen + 1 :], values[chosen + 1 :], strict=True):
        hidden[number] = value in derived or rng.random() < 0.5
    return target, hidden


def batches(
    tokens: np.ndarray,
    starts: np.ndarray,
    facts: list[tuple[list[int], list[bool]]],
    tokenizer: Tokenizer,
    recipe: Recipe,
    first: int,
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]]:
    """The batches from step `first` on; each depends on the seed and its own step only.

    Yields:
      `tokens_BL`, where each row's canvas begins, which tokens may be masked to be predicted,
      and which are masked in any case and not predicted.
    """
    digits = {tokenizer.token_to_id(digit) for digit in "0123456789"}
    equals = tokenizer.encode("1 = 1").ids[1]
    for step in range(first, recipe.steps):
        rng = np.random.default_rng((recipe.seed, step))
        row = rng.integers(len(tokens), size=recipe.batch)
        long = step % recipe.long_every == recipe.long_every - 1
        tokens_BL = tokens[row, : recipe.long_length if long else recipe.length]
        start_B, target_BL = starts[row], np.ones(tokens_BL.shape, bool)
        hidden_BL = np.zeros_like(target_BL)
        if recipe.drill_from <= step < recipe.drill_until:
            for drill in rng.choice(recipe.batch, recipe.drill_rows, replace=False):
                # A fact has at least six tokens.
                some = [facts[i] for i in rng.integers(len(facts), size=tokens_BL.shape[1] // 6)]
                start_B[drill] = 0
                for array_BL, part in ((tokens_BL, 0), (target_BL, 1)):
                    flat = [item for fact in some for item in fact[part]]
                    array_BL[drill, :] = (flat + [0] * array_BL.shape[1])[: array_BL.shape[1]]
        elif step >= recipe.drill_until:
            for chosen in rng.choice(recipe.batch, recipe.result_rows, replace=False):
                target_BL[chosen], hidden_BL[chosen] = hide_result(
                    tokens_BL[chosen].tolist(),
                    int(start_B[chosen]),
                    digits,
                    equals,
                    recipe.cut_rows,
                    rng,
                )
        yield tokens_BL, start_B, target_BL, hidden_BL
