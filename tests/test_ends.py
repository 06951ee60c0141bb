"""Where an answer ends, and what it never holds: stop texts, ends of text, ids without a token."""

import itertools

import jax
import numpy as np
import pytest
from tiny_models import prompts, small, small_config
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE, WordLevel
from transformers import PreTrainedTokenizerFast

from dlm_jax import cache
from dlm_jax import tokenizer as tk
from dlm_jax.checkpoint import Checkpoint
from dlm_jax.decoding.config import DecodeConfig
from dlm_jax.decoding.loop import diffusion_generate
from dlm_jax.engine import Engine

TURN, END = "<|eot_id|>", "<|endoftext|>"


@pytest.fixture(scope="module")
def tok() -> PreTrainedTokenizerFast:
    """A token per byte, and special ones, of which the settings name but one."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(BPE({letter: i for i, letter in enumerate(letters)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([TURN, END])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=END)


def spoken(tok, text: str, stops=(), filled=None) -> str:
    ids = tok(text, add_special_tokens=False)["input_ids"]
    return tk.answer_text(tok, ids, stops, filled)


@pytest.mark.parametrize(
    ("text", "stops", "wanted"),
    [
        (f"one{TURN}two", [], "onetwo"),
        (f"one{TURN}two", ["none"], "onetwo"),
        (f"one{TURN}two", [TURN], "one"),
        (f"one{TURN}two", ["w", TURN], "one"),
        (f"one{TURN}two", [TURN, "n"], "o"),
        (f"{TURN}one{TURN}", [TURN], ""),
        (f"o{END}ne{TURN}two", [TURN], "one"),
        (f"one{TURN}two", ["eot"], "one"),  # half a special token is none
        (f"one{TURN}two", [f"e{TURN}t"], "on"),
        (f"one{TURN}two", ["et"], "on"),  # and what is shown never holds a stop text
        ("\N{SNOWMAN}\N{SNOWMAN} one", ["\N{SNOWMAN} "], "\N{SNOWMAN}"),
        ("", [TURN], ""),
    ],
)
def test_a_stop_text_may_be_a_special_token(tok, text, stops, wanted):
    assert spoken(tok, text, stops) == wanted


@pytest.mark.parametrize(
    ("text", "stops", "wanted"),
    [
        # What stands in brackets was filled in.
        ("a stop b [c d] e", ["stop"], "a stop b c d e"),
        ("a stop b [c stop d] e", ["stop"], "a stop b c  e"),
        ("a [c stop d] e stop [f] g", ["stop"], "a c  e stop f g"),
        ("a [stop b] c [d stop] e", ["stop"], "a  c d  e"),
        ("a st[op b] c", ["stop"], "a st c"),
        ("a [b st]op c", ["stop"], "a b op c"),
        ("st[o]p", ["stop"], "stp"),
        ("stop[ a]stop", ["stop"], "stop astop"),
        (f"{TURN}a{TURN}[b{TURN}c]d{TURN}", [TURN], "abd"),
        ("\N{SNOWMAN}[\N{SNOWMAN}]\N{SNOWMAN}", ["\N{SNOWMAN}"], "\N{SNOWMAN}\N{SNOWMAN}"),
    ],
)
def test_only_what_was_filled_in_is_cut(tok, text, stops, wanted):
    filled, plain, inside = [], "", False
    for part in text.replace("]", "[").split("["):
        filled += [inside] * len(tok(part, add_special_tokens=False)["input_ids"])
        plain, inside = plain + part, not inside
    assert spoken(tok, plain, stops, filled) == wanted


def test_text_without_a_stop_is_what_the_tokenizer_makes_of_it(tok):
    rng = np.random.default_rng(0)
    for _ in range(20):  # also bytes that are no letters
        ids = rng.integers(0, len(tok), 30).tolist()
        wanted = tk.decode(tok, ids)
        assert tk.answer_text(tok, ids) == tk.answer_text(tok, ids, ["no such text"]) == wanted
        stop = TURN if TURN in tok.convert_ids_to_tokens(ids) else wanted[5:7]
        assert wanted.startswith(
            tk.answer_text(tok, ids, [stop]).rstrip("\N{REPLACEMENT CHARACTER}")
        )


# --- ends of text ---------------------------------------------------------------------------------


def test_any_of_several_ends_ends_a_text():
    config = small_config(eos_id=3, more_eos_ids=(5, 7))
    assert DecodeConfig().ends_of_text(config) == (3, 5, 7)
    assert DecodeConfig(eos_id=4).ends_of_text(config) == (4,)
    assert DecodeConfig(eos_id=(4, 6)).ends_of_text(config) == (4, 6)
    assert DecodeConfig(eos_id=(4,)) == DecodeConfig(eos_id=4)
    assert tk.until_eos([1, 2, 6, 4], (4, 6)) == [1, 2]
    with pytest.raises(ValueError, match=r"more_eos_ids\[0\] is 40; it must be a token id below"):
        small_config(more_eos_ids=(40,))
    with pytest.raises(ValueError, match=r"eos_id is \(\); it must be a token id, or a tuple"):
        DecodeConfig(eos_id=())
    with pytest.raises(ValueError, match="eos_id has token id 99"):
        DecodeConfig(eos_id=(1, 99)).check(config)


def test_a_row_is_done_at_any_of_its_ends():
    """The ends are what an unhindered generation says early in one row, and not in another."""
    model, params = small()
    prompt, key = prompts(8, 5), jax.random.key(0)
    decode = DecodeConfig(gen_length=12, block_length=4)
    said = diffusion_generate(params, model, prompt, key=key, decode=decode).tokens[:, 5:].tolist()
    ends = next(
        (token, another)
        for one, other in itertools.permutations(said, 2)
        for token, another in itertools.product(one[:6], other[:6])
        if token not in other and another not in one
    )
    decode = DecodeConfig(gen_length=12, block_length=4, stop_until_eos=True, eos_id=ends)
    out = diffusion_generate(params, model, prompt, key=key, decode=decode)
    met = set()
    for row, steps in zip(out.tokens[:, 5:].tolist(), out.steps.tolist(), strict=True):
        kept = tk.until_eos(row, ends)
        assert model.config.mask_id not in kept
        met.update(row[len(kept) : len(kept) + 1])
        assert (steps < 12) == (model.config.mask_id in row)
    assert met == set(ends)


# --- ids without a token --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sparse() -> Checkpoint:
    """A model of 40 ids and a tokenizer without 10 to 12, 20 and, the mask apart, 30 on."""
    model, params = small()
    ids = [id for id in range(30) if id not in (10, 11, 12, 20)] + [39]
    backend = Tokenizer(WordLevel({f"w{id}": id for id in ids}, unk_token="w0"))
    return Checkpoint(model.config, params, PreTrainedTokenizerFast(tokenizer_object=backend))


def test_unused_ids_are_ranges(sparse, tok):
    assert tk.unused(sparse.tokenizer, 40) == ((10, 13), (20, 21), (30, 39))
    assert tk.unused(sparse.tokenizer, 40, (38, 39)) == ((10, 13), (20, 21), (30, 38))
    assert tk.unused(sparse.tokenizer, 25) == ((10, 13), (20, 21))
    assert tk.unused(tok, len(tok)) == ()
    assert tk.unused(tok, len(tok) + 5) == ((len(tok), len(tok) + 5),)


def test_ids_without_a_token_are_never_predicted(sparse):
    decode = DecodeConfig(gen_length=32, steps=2, temperature=50.0)
    rows, key = [[1, 2, 3]] * 8, jax.random.key(0)

    def drawn(checkpoint: Checkpoint, decode: DecodeConfig) -> set[int]:
        result = Engine(checkpoint, decode, cache.make("none")).run(rows, key)
        return {token for answer in result.answers for token in answer.ids}

    without = {10, 11, 12, 20, *range(30, 38)}
    assert not drawn(sparse, decode) & without
    assert drawn(sparse._replace(tokenizer=None), decode) >= without


def test_ranges_that_are_none_are_refused():
    config = small_config()
    for unused, words in (
        (((3, 41),), "unused has the range 3 to 41; it must lie within the vocabulary"),
        (((5, 5),), "unused has the range 5 to 5"),
        (((0, 39),), "leave some that can be predicted"),
    ):
        with pytest.raises(ValueError, match=words):
            DecodeConfig(unused=unused).check(config)
