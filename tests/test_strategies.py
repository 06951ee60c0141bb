"""Whole generations with every strategy: what they must never do, and what they must choose."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from generation_replay import check, replay
from hypothesis import given, settings
from hypothesis import strategies as st
from strategy_table import (
    BLOCK,
    COMMON,
    GEN,
    KEYS,
    MASK,
    PROMPT,
    ROWS,
    TABLE,
    VOCAB,
    cases,
    config,
    is_slow,
    padding,
    parameter,
    run,
)
from tiny_models import prompts

from dlm_jax.decoding.config import DecodeConfig


@cases()
def test_every_step_commits_what_it_should(name, family):
    strategy = TABLE[name]

    @settings(max_examples=5, deadline=None, derandomize=True, database=None)
    @given(
        numbers=st.fixed_dictionaries(strategy.numbers),
        seed=st.integers(0, 10**6),
        pads=st.lists(st.integers(0, PROMPT - 1), min_size=ROWS, max_size=ROWS),
    )
    def generations(numbers, seed, pads):
        decode = config(name, family, **numbers)
        prompt, mask = prompts(ROWS, PROMPT, seed=seed), padding(*pads)
        key = jax.random.split(jax.random.key(seed), ROWS)
        arguments = dict(decode=decode, debiased=strategy.debiased)
        out = run(family, prompt, mask, key=key, **arguments)
        check(out, prompt, decode)
        replay(family, out, prompt, mask, **arguments)
        assert not np.isin(out.tokens[:, PROMPT:], decode.suppress).any()
        # A row has no neighbours.
        other = prompts(ROWS, PROMPT, seed=seed + 1)
        prompt, other[1] = other, prompt[1]
        mask[[0, 2]] = True
        again = run(family, other, mask, key=key, **arguments)
        np.testing.assert_array_equal(again.tokens[1], out.tokens[1])
        np.testing.assert_array_equal(again.committed_at[1], out.committed_at[1])

    generations()


ALONE = [
    pytest.param(
        family,
        name,
        id=f"{family}, {name}",
        marks=pytest.mark.slow,  # the contract of all strategies says as much in the default run
    )
    for name in TABLE
    for family in TABLE[name].families
]


@pytest.mark.parametrize(("family", "name"), ALONE)
def test_a_row_alone_is_what_it_is_behind_padding(family, name):
    decode, debiased = config(name, family), TABLE[name].debiased
    prompt, mask = prompts(ROWS, PROMPT, seed=11), padding(0, 3, 1)
    together = run(family, prompt, mask, decode=decode, debiased=debiased)
    alone = run(family, prompt[1:2, 3:], decode=decode, debiased=debiased, key=KEYS[1:2])
    np.testing.assert_array_equal(together.tokens[1, 3:], alone.tokens[0])
    np.testing.assert_array_equal(together.committed_at[1, 3:], alone.committed_at[0])
    np.testing.assert_allclose(together.confidence[1, 3:], alone.confidence[0], atol=1e-5)
    assert together.steps[1] == alone.steps[0] == alone.nfe


class TestLimits:
    """Numbers at which one strategy is another."""

    @cases("threshold")
    def test_a_threshold_that_nothing_reaches_is_one_token_per_step(self, name, family):
        prompt, mask = prompts(ROWS, PROMPT, seed=3), padding(0, 2, 5)
        sure = run(family, prompt, mask, decode=config("threshold", threshold=1.01))
        plain = run(family, prompt, mask, decode=config("fixed"))
        assert sure.nfe == GEN
        for field in ("tokens", "committed_at", "confidence"):
            np.testing.assert_array_equal(getattr(sure, field), getattr(plain, field))

    @cases("threshold")
    def test_a_threshold_of_zero_fills_a_block_per_step(self, name, family):
        prompt = prompts(ROWS, PROMPT, seed=4)
        out = run(family, prompt, decode=config("threshold", threshold=0.0))
        assert out.nfe == GEN // BLOCK
        expected = np.broadcast_to(np.arange(GEN) // BLOCK, (ROWS, GEN))
        np.testing.assert_array_equal(out.committed_at[:, PROMPT:], expected)

    @cases("sigma")
    def test_a_very_wide_prior_changes_no_order(self, name, family):
        prompt = prompts(ROWS, PROMPT, seed=5)
        wide = run(family, prompt, decode=config("sigma", sigma=1e4))
        plain = run(family, prompt, decode=config("plain"))
        np.testing.assert_array_equal(wide.tokens, plain.tokens)
        np.testing.assert_array_equal(wide.committed_at, plain.committed_at)
        narrow = run(family, prompt, decode=config("sigma", sigma=0.5))
        assert (narrow.committed_at != plain.committed_at).any()

    @cases("klass")
    def test_klass_is_the_threshold_alone_where_everything_counts_as_stable(self, name, family):
        prompt = prompts(ROWS, PROMPT, seed=6)
        klass = run(family, prompt, decode=config("klass", threshold=0.9, kl_threshold=1e9))
        plain = run(family, prompt, decode=config("threshold", threshold=0.9))
        np.testing.assert_array_equal(klass.committed_at, plain.committed_at)
        # And the schedule alone where nothing does.
        never = run(family, prompt, decode=config("klass", threshold=0.0, kl_threshold=1e-9))
        assert never.nfe == GEN

    @cases("cfg")
    def test_guidance_changes_tokens(self, name, family):
        prompt = prompts(ROWS, PROMPT, seed=7)
        tokens = [run(family, prompt, decode=config("cfg", cfg_scale=w)).tokens for w in (1e-6, 3)]
        assert (tokens[0] != tokens[1]).any()

    @cases("until eos")
    def test_stopping_at_the_end_of_the_text_saves_forwards(self, name, family):
        decode = config("until eos", family, threshold=0.95)
        prompt = prompts(ROWS, PROMPT, seed=8)
        stopped = run(family, prompt, decode=decode)
        plain = run(family, prompt, decode=config("threshold", threshold=0.95))
        ended = (stopped.tokens == MASK).any(axis=1)
        assert ended.any() and (stopped.steps[ended] < plain.steps[ended]).all()
        for row in np.flatnonzero(ended):
            text = stopped.tokens[row].tolist()
            assert COMMON[family] in text[PROMPT:]
            assert MASK not in text[: text.index(COMMON[family], PROMPT)]

    def test_tokens_are_revoked(self):
        decode = config("wino", wide_in_thres=0.3, narrow_out_thres=0.9)
        out = run("llada", prompts(ROWS, PROMPT, seed=9), decode=decode)
        before, after = out.history[:-1], out.history[1:]
        revoked = (before != MASK) & (after == MASK)
        assert revoked.any() and (out.tokens != MASK).all()
        # What is told is the last commit.
        again = revoked.any(axis=0)
        last = out.nfe - 1 - (out.history == MASK)[::-1].argmax(axis=0)
        np.testing.assert_array_equal(out.committed_at[again], last[again] + 1)
        bold = config("wino", wide_in_thres=0.3, narrow_out_thres=0.0)
        bold = run("llada", prompts(ROWS, PROMPT, seed=9), decode=bold)
        assert bold.nfe < out.nfe and ((bold.history == MASK).sum(axis=(1, 2)) > 0).sum() < out.nfe


def test_an_early_end_does_not_slow_a_cap():
    """Everything is sure, and the end stands behind half of the tokens: it is decided first."""
    forced = np.full(GEN, 3)
    forced[GEN // 2] = 4

    def end_first(tokens, logits, step, positions):
        place = jnp.clip(positions - PROMPT, 0, GEN - 1)
        sure = jnp.where(place == GEN // 2, 60.0, 50.0) - place.astype(jnp.float32) / 100
        return jax.nn.one_hot(jnp.asarray(forced)[place], VOCAB) * sure[..., None]

    nfe = []
    for rule in (dict(schedule="even"), dict(schedule="capped", threshold=0.5)):
        decode = DecodeConfig(gen_length=GEN, steps=6, stop_until_eos=True, eos_id=4, **rule)
        out = run("llada", prompts(1, PROMPT), decode=decode, logits_processor=end_first)
        assert (out.tokens[0, PROMPT + GEN // 2 + 1 :] == MASK).all()
        nfe.append(int(out.nfe))
    assert nfe == [4, 4]  # the end and 6 tokens before it, at 2 per step


def test_wino_revokes_by_the_measure_it_commits_by():
    """Tokens that are sure by themselves stay, however flat what they are drawn from."""

    def sure(tokens, logits, step):
        return jnp.broadcast_to(jax.nn.one_hot(3, VOCAB) * 8.0, logits.shape)

    decode = DecodeConfig(gen_length=GEN, strategy="wino", temperature=0.1, top_k=1)
    out = run("llada", prompts(1, PROMPT), decode=decode, logits_processor=sure)
    assert out.nfe == 2  # 70% of the block, then the rest
    hot = DecodeConfig(gen_length=GEN, strategy="wino", temperature=3.0)
    out = run("llada", prompts(1, PROMPT), decode=hot, logits_processor=sure)
    surest = out.tokens[0, PROMPT:] == 3
    first = out.history[0, 0, PROMPT:] == 3
    assert surest[first].all()  # what came in for sure was never revoked


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("llada", "klass"),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                ("llada", "wino"),
                ("dream", "threshold, capped"),
                ("llada", "until eos"),
                ("dream", "random"),
                ("dream", "sampled"),
            )
        ),
    ],
)
def test_a_limit_on_forwards_can_be_lifted_later(family, name, caplog):
    prompt = prompts(ROWS, PROMPT, seed=13)
    whole = run(family, prompt, decode=config(name, family))
    record = ("history", "state")
    for limit in (1, 2):
        with jax.log_compiles(limit > 1), caplog.at_level("WARNING"):
            decode = config(name, family, max_forwards=limit)
            part = run(family, prompt, decode=decode, record=record)
        assert part.nfe == limit < whole.nfe
        np.testing.assert_array_equal(part.history, whole.history[:limit])
        np.testing.assert_array_equal(part.tokens, part.history[-1])
    assert not [text for text in caplog.messages if "_generate" in text]
    rest = run(
        family,
        prompt,
        decode=config(name, family, max_forwards=1000),
        record=record,
        state=part.state,
    )
    for field in ("tokens", "committed_at", "confidence", "nfe", "steps", "history"):
        np.testing.assert_array_equal(getattr(rest, field), getattr(whole, field))


def test_another_value_of_a_number_compiles_nothing(caplog):
    varied = set()
    for name, strategy in TABLE.items():
        families = [family for family in strategy.families if not is_slow(name, family)]
        if not families or not strategy.numbers:
            continue
        varied |= set(strategy.numbers)
        arguments = dict(debiased=strategy.debiased)
        prompt, family = prompts(ROWS, PROMPT), families[0]
        run(family, prompt, decode=config(name, family), **arguments)
        decode = config(name, family)
        other = {number: 0.9 * parameter(decode, number) for number in strategy.numbers}
        with jax.log_compiles(), caplog.at_level("WARNING"):
            run(family, prompt, decode=config(name, family, **other), **arguments)
        assert not [text for text in caplog.messages if "_generate" in text], name
    assert varied >= {"threshold", "factor", "gamma", "sigma", "cfg_scale", "alg_temp"}
    assert varied >= {"kl_threshold", "wide_in_thres", "narrow_out_thres", "clip_alpha"}
