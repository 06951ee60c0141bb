"""Whole generations with every strategy: what they must never do, and what they must choose.

`replay` follows a generation forward by forward with the plain network, and works out in numpy what
each step had to commit.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import prompts, small
from hypothesis import given, settings
from hypothesis import strategies as st
from test_unmask import by_score, slow_bounded, slow_factored

from dlm_jax.cache import make
from dlm_jax.decoding import schedule
from dlm_jax.decoding.config import DecodeConfig
from dlm_jax.decoding.loop import diffusion_generate
from dlm_jax.decoding.state import Draws
from dlm_jax.decoding.strategies import wino
from dlm_jax.models.base import lay_out, unembed

ROWS, PROMPT, GEN, BLOCK = 3, 6, 12, 6
LENGTH = PROMPT + GEN
MASK, VOCAB = 39, 40
KEYS = jax.random.split(jax.random.key(7), ROWS)
FREQUENCY = np.random.default_rng(0).dirichlet(np.ones(VOCAB))
COMMON = {"llada": 21, "dream": 32}
"""A token that the small models like to predict."""


class Strategy(NamedTuple):
    """One row of `TABLE`."""

    arguments: dict[str, Any]
    """Of `DecodeConfig`; numbers among them are traced."""
    numbers: dict[str, st.SearchStrategy] = {}
    """Other values for the traced ones."""
    families: tuple[str, ...] = ("llada", "dream")
    debiased: bool = False


def among(low: float, high: float) -> st.SearchStrategy:
    return st.floats(low, high)


TABLE = {
    "plain": Strategy(dict(alg="maskgit_plus", steps=4)),
    "fixed": Strategy(dict(schedule="fixed")),
    "timestep": Strategy(dict(schedule="timestep", alg="entropy", steps=8)),
    "threshold": Strategy(dict(threshold=0.7), dict(threshold=among(-0.1, 1.1))),
    "threshold, two at least": Strategy(
        dict(threshold=0.9, num_transfer_tokens=2, alg="topk_margin"),
        dict(threshold=among(0, 1.1)),
    ),
    "threshold, capped": Strategy(
        dict(threshold=0.7, schedule="capped", steps=4), dict(threshold=among(0, 1.1))
    ),
    "factor": Strategy(dict(factor=1.0), dict(factor=among(0.01, 4))),
    "factor, spare last": Strategy(
        dict(factor=1.0, spare_last=True, alg="maskgit_plus"), dict(factor=among(0.01, 4))
    ),
    "gamma": Strategy(dict(gamma=0.5), dict(gamma=among(0, 3))),
    "sigma": Strategy(dict(sigma=2.0, alg="maskgit_plus", steps=4), dict(sigma=among(0.25, 40))),
    "sigma, threshold": Strategy(
        dict(sigma=4.0, threshold=0.5), dict(sigma=among(0.25, 40), threshold=among(0, 1))
    ),
    "klass": Strategy(
        dict(strategy="klass", threshold=0.7, kl_threshold=0.3),
        dict(threshold=among(0, 1), kl_threshold=among(0.001, 3)),
    ),
    "klass, factor": Strategy(
        dict(
            strategy="klass",
            factor=1.0,
            kl_threshold=0.3,
            kl_history_length=1,
            num_transfer_tokens=2,
        ),
        dict(factor=among(0.1, 4), kl_threshold=among(0.001, 3)),
    ),
    "wino": Strategy(
        dict(strategy="wino", block_length=GEN),
        dict(wide_in_thres=among(0, 1), narrow_out_thres=among(0, 1)),
        families=("llada",),
    ),
    "wino in blocks": Strategy(
        dict(strategy="wino", alg="maskgit_plus", num_transfer_tokens=2, sigma=5.0),
        dict(wide_in_thres=among(0, 1), narrow_out_thres=among(0, 1), sigma=among(0.25, 40)),
        families=("llada",),
    ),
    "origin": Strategy(dict(alg="origin", steps=8)),
    "alg_temp": Strategy(dict(alg_temp=0.5, steps=4), dict(alg_temp=among(0.01, 5))),
    "random": Strategy(dict(alg="random", steps=4)),
    "debias": Strategy(dict(steps=4), dict(clip_alpha=among(0.5, 10)), debiased=True),
    "debias, threshold": Strategy(
        dict(threshold=2.0), dict(clip_alpha=among(0.5, 10), threshold=among(0, 5)), debiased=True
    ),
    "cfg": Strategy(dict(cfg_scale=1.0, steps=4), dict(cfg_scale=among(0.1, 3))),
    "until eos": Strategy(dict(stop_until_eos=True, threshold=0.8), dict(threshold=among(0, 1.1))),
    "past eos": Strategy(
        dict(stop_until_eos=True, fill_past_eos=True, threshold=0.8),
        dict(threshold=among(0, 1.1)),
    ),
    "suppress": Strategy(dict(suppress=(21, 17, 32, 1), gamma=0.5), dict(gamma=among(0, 3))),
    "sampled": Strategy(dict(temperature=1.0), dict(temperature=among(0.1, 4))),
}
ON_DREAM = {"timestep", "threshold, capped", "alg_temp", "debias, threshold", "sampled"}
NOT_ON_LLADA = {"timestep", "threshold, two at least", "factor, spare last", "klass, factor"}
NOT_ON_LLADA |= {"alg_temp", "debias", "wino in blocks", "threshold, capped", "suppress", "sampled"}
NOT_ON_LLADA |= {"debias, threshold", "past eos"}


def is_slow(name: str, family: str) -> bool:
    """Most strategies are fast with one family; the other one takes as long again."""
    return name not in ON_DREAM if family == "dream" else name in NOT_ON_LLADA


def cases(*names: str) -> pytest.MarkDecorator:
    """Parametrises over `name` and `family`: the given strategies, or all."""
    return pytest.mark.parametrize(
        ("name", "family"),
        [
            pytest.param(
                name,
                family,
                marks=[pytest.mark.slow] if is_slow(name, family) else [],
                id=f"{family}, {name}",
            )
            for name in names or TABLE
            for family in TABLE[name].families
        ],
    )


def config(name: str, family: str = "llada", **changes) -> DecodeConfig:
    base = dict(gen_length=GEN, block_length=BLOCK)
    if TABLE[name].arguments.get("stop_until_eos"):
        base |= dict(eos_id=COMMON[family])
    return DecodeConfig(**base | TABLE[name].arguments | changes)


def run(family: str, prompt, mask=None, *, decode: DecodeConfig, debiased=False, **arguments):
    """A generation with its history, on the host."""
    model, params = small(family)
    if debiased:
        arguments["token_freq"] = FREQUENCY
    if mask is None:
        mask = np.ones(prompt.shape, bool)
    arguments = dict(key=KEYS[: len(prompt)], record=("history",)) | arguments
    out = diffusion_generate(params, model, prompt, mask, decode=decode, **arguments)
    out = jax.device_get(out)
    return out._replace(history=out.history[: out.nfe])


def padding(*pads: int, length: int = PROMPT) -> np.ndarray:
    return np.arange(length)[None] >= np.asarray(pads)[:, None]


def wanted(canvas, decode: DecodeConfig, prompt: int) -> np.ndarray:
    """Masks of a row that are still to be filled."""
    masked = canvas == MASK
    if not decode.infill:
        masked = masked & (np.arange(len(canvas)) >= prompt)
    if decode.stop_until_eos:
        ends = [p for p in range(prompt, len(canvas)) if canvas[p] == decode.eos_id]
        masked = masked & (np.arange(len(canvas)) < min(ends, default=len(canvas)))
    return masked


def block_of(masked: np.ndarray, decode: DecodeConfig, prompt: int) -> tuple[int, int]:
    """The first block that has something to fill: its first and its last slot, plus one."""
    first = max(int(masked.argmax()) - prompt, 0)
    size = decode.block_length or decode.gen_length or 1
    begin = prompt + first // size * size
    return 0 if decode.infill and begin == prompt else begin, begin + size


def check(out, prompt: np.ndarray, decode: DecodeConfig) -> None:
    """What holds of every generation."""
    length = prompt.shape[1]
    fixed = np.zeros(out.tokens.shape, bool)
    fixed[:, :length] = (prompt != MASK) | (not decode.infill)
    first = np.full(out.tokens.shape, MASK)
    first[:, :length] = prompt
    assert len(out.history) == out.nfe <= max(decode.steps or 0, int((~fixed).sum(axis=1).max()))
    np.testing.assert_array_equal(out.history[-1], out.tokens)
    np.testing.assert_array_equal(out.tokens[fixed], first[fixed])
    assert (out.committed_at[fixed] == -1).all() and (out.confidence[fixed] == 0).all()
    assert np.isfinite(out.confidence).all()
    filled = (out.tokens != MASK) & ~fixed
    np.testing.assert_array_equal(out.committed_at >= 0, filled)
    for row in range(len(prompt)):
        assert not wanted(out.tokens[row], decode, length).any()
        before, committed_at, active = first[row], np.full(len(first[row]), -1), 0
        for step, after in enumerate(out.history[:, row]):
            masked = wanted(before, decode, length)
            changed = np.flatnonzero(before != after)
            if masked.any():
                active += 1
                begin, end = block_of(masked, decode, length)
                assert all(begin <= position < end for position in changed)
            else:
                assert len(changed) == 0
            for position in changed:
                assert not fixed[row, position]
                if before[position] == MASK:
                    assert masked[position] or decode.fill_past_eos
                    committed_at[position] = step
                else:
                    assert decode.strategy == "wino" and after[position] == MASK
                    committed_at[position] = -1
            before = after
        np.testing.assert_array_equal(committed_at, out.committed_at[row])
        assert out.steps[row] == active


@functools.cache
def network(family: str, guided: bool, shadowed: bool):
    """`(canvas_BL, valid_BL, given_BL, slot_BS) -> logits_BLV` at every slot's own place.

    With guidance those of the unconditional copy come second. With shadows, the logits of the slots
    in `slot_BS` are those that WINO takes.
    """
    model, params = small(family)

    @jax.jit
    def logits(canvas_BL, valid_BL, given_BL, slot_BS):
        out = model.apply({"params": params}, canvas_BL, valid_BL)
        if guided:
            blank = model.apply({"params": params}, jnp.where(given_BL, MASK, canvas_BL), valid_BL)
            out = jnp.stack([out, blank])
        if shadowed:
            layout = lay_out(model.config, valid_BL)
            hidden = wino.predict(model, params, canvas_BL, valid_BL, layout, slot_BS)
            inside = unembed(model, params, hidden)
            out = jax.vmap(lambda o, s, slots: o.at[slots].set(s, mode="drop"))(
                out, inside, slot_BS
            )
        return out

    return logits


def softmax(logits: np.ndarray) -> np.ndarray:
    e = np.exp(logits - logits.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def density(known: np.ndarray, sigma: float) -> np.ndarray:
    """Weighted share of what is known around each generated position."""
    size = len(known)
    behind = np.full(size, float(known[-1]))
    around = np.concatenate([np.ones(size), known.astype(float), behind])
    weight = lambda d: np.exp(-(d**2) / (2 * sigma**2))  # noqa: E731
    total = weight(np.arange(-3 * size, 3 * size)).sum()
    places = np.arange(3 * size)
    return np.array([(weight(places - size - i) * around).sum() for i in range(size)]) / total


def bounds(decode: DecodeConfig, start: int, masks: int, step: int) -> tuple[int, int]:
    """The least and the most that a step commits in a block that had `start` masks."""
    if decode.pace == "fixed":
        return min(decode.num_transfer_tokens, masks), masks
    steps = (decode.steps or decode.gen_length) * decode.block_length // decode.gen_length
    if decode.pace == "timestep":
        share = schedule.time_shares(steps, decode.eps)[step]
        return int(np.float32(masks) * share), int(np.float32(masks) * share)
    parts = [len(part) for part in np.array_split(np.arange(start), steps)]
    if decode.pace == "even":
        share = parts[step] if step < steps else masks
        return share, share
    return 1, max(sum(parts[: step + 1]) - (start - masks), 1)


class RowReplay:
    """Works out what each step of one row has to commit."""

    def __init__(self, decode: DecodeConfig, prompt: int, debiased: bool):
        self.decode, self.prompt, self.debiased = decode, prompt, debiased
        self.block, self.block_step, self.start = None, 0, 0
        self.before = np.zeros((GEN, VOCAB))
        self.divergence = [np.zeros(GEN) for _ in range(decode.kl_history_length)]

    def measure(self, logits: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Best token, confidence and distribution of every slot."""
        logits = logits.copy()
        logits[:, list(self.decode.suppress)] = -np.inf
        p = softmax(logits)
        order = np.sort(p[:, :MASK], axis=-1)
        token = p[:, :MASK].argmax(axis=-1)
        best = order[:, -1]
        if self.decode.alg == "topk_margin":
            return token, best - order[:, -2], p
        if self.decode.alg == "entropy":
            return token, (p * np.log(p + 1e-10)).sum(axis=-1), p
        if self.debiased:
            best = np.minimum(best * -np.log(FREQUENCY[token] + 1e-10), self.decode.clip_alpha)
        return token, best, p

    def count(self, score, confidence, p, among: np.ndarray) -> int:
        """What the rule takes of the given positions; bounded by nothing."""
        decode = self.decode
        if decode.threshold is not None or decode.strategy == "wino":
            level = decode.wide_in_thres if decode.threshold is None else decode.threshold
            return sum(bool(among[i]) and score[i] >= level for i in range(len(score)))
        if decode.factor is not None:
            found = slow_factored(score, among, decode.factor)
            return min(found, int(among.sum()) - decode.spare_last)
        with np.errstate(divide="ignore", invalid="ignore"):
            entropy = -np.where(p > 0, p * np.log(p), 0).sum(axis=-1)
        return slow_bounded(score, entropy, among, decode.gamma)

    def step(self, canvas: np.ndarray, logits: np.ndarray, chosen: np.ndarray) -> dict:
        """Checks the positions that a step chose; returns what was to be put there."""
        decode, prompt = self.decode, self.prompt
        masked = wanted(canvas, decode, prompt)
        block = block_of(masked, decode, prompt)
        if block != self.block:
            inside = np.arange(len(canvas))
            inside = (block[0] <= inside) & (inside < block[1])
            self.block, self.block_step, self.start = block, 0, int((masked & inside).sum())
        slots = np.arange(len(canvas))
        eligible = masked | ((canvas == MASK) & decode.fill_past_eos)
        eligible = eligible & (block[0] <= slots) & (slots < block[1])
        token, confidence, p = self.measure(logits)
        score = confidence.copy()
        if decode.sigma is not None:
            score[prompt:] *= density(canvas[prompt:] != MASK, decode.sigma)
        geo = decode.geometry(prompt=prompt, shift=0)
        arrays = (
            jnp.asarray([n], jnp.int32) for n in (self.start, eligible.sum(), self.block_step)
        )
        least, most = (int(bound[0]) for bound in decode.make_schedule(geo).bounds(*arrays))
        self.block_step += 1
        among, number = eligible, least
        if decode.strategy == "klass":
            settled = self.settled(p[prompt:])
            sure = eligible & np.concatenate([np.zeros(prompt, bool), settled])
            found = self.count(score, confidence, p, sure)
            if found:
                among, number = sure, found
        elif decode.strategy == "wino":
            most = max(min(max(int(0.7 * eligible.sum()), 5), 20), least)
            number = min(max(self.count(score, confidence, p, eligible), least), most)
        elif decode.parallel:
            number = min(max(self.count(score, confidence, p, eligible), least), most)
        if not decode.measure.thinned:
            assert chosen.sum() == number
        assert not (chosen & ~among).any()
        ranked = decode.measure.ranks and not decode.alg_temp
        if ranked and not decode.temperature and chosen.any() and (among & ~chosen).any():
            assert score[chosen].min() >= score[among & ~chosen].max() - 1e-5
        return dict(token=token, confidence=confidence, p=p, least=least)

    def settled(self, p: np.ndarray) -> np.ndarray:
        moved = np.log(p + 1e-12) - np.log(self.before + 1e-12)
        self.divergence = [*self.divergence[1:], (p * moved).sum(axis=-1)]
        self.before = p
        return np.all([d < self.decode.kl_threshold for d in self.divergence], axis=0)


def replay(family: str, out, prompt, mask, decode: DecodeConfig, debiased=False) -> None:
    """Checks every choice of a generation; tokens and confidences too, where nothing is random."""
    length = prompt.shape[1]
    logits_of = network(family, decode.guided, decode.strategy == "wino")
    valid = np.concatenate([mask, np.ones((len(prompt), GEN), bool)], axis=1)
    canvas = np.concatenate([prompt, np.full((len(prompt), GEN), MASK, np.int32)], axis=1)
    committed = np.zeros(canvas.shape, bool)
    replays = [RowReplay(decode, length, debiased) for _ in prompt]
    told = np.zeros(canvas.shape)
    for after in out.history:
        slots = np.full((len(prompt), decode.block_length or GEN), LENGTH, np.int32)
        for row, before in enumerate(canvas):
            masked = wanted(before, decode, length)
            if masked.any():
                slots[row] = np.arange(*block_of(masked, decode, length))
        logits = np.asarray(logits_of(canvas, valid, ~committed, slots), np.float64)
        if decode.cfg_scale:
            logits = logits[1] + (decode.cfg_scale + 1) * (logits[0] - logits[1])
        if family == "dream":
            shifted = np.concatenate([logits[:, :1], logits[:, :-1]], axis=1)
            logits = np.where((slots_of(valid) == 0)[..., None], logits, shifted)
        for row, before in enumerate(canvas):
            if not wanted(before, decode, length).any():
                continue
            chosen = (before == MASK) & (after[row] != MASK)
            step = replays[row].step(before, logits[row], chosen)
            if not decode.temperature:
                np.testing.assert_array_equal(after[row][chosen], step["token"][chosen])
                told[row][chosen] = step["confidence"][chosen]
            if decode.strategy == "wino":
                revoked = (before != MASK) & (after[row] == MASK)
                p = np.take_along_axis(step["p"], before[:, None], axis=-1)[:, 0]
                inside = np.isin(np.arange(LENGTH), slots[row]) & committed[row]
                doubtful = inside & (p < decode.narrow_out_thres)
                order = by_score(-p, doubtful)[: max(chosen.sum() - step["least"], 0)]
                assert np.flatnonzero(revoked).tolist() == sorted(order)
                told[row][revoked] = 0
        committed = committed | ((canvas == MASK) & (after != MASK))
        committed &= after != MASK
        canvas = after
    if not decode.temperature:
        np.testing.assert_allclose(out.confidence, told, rtol=1e-3, atol=1e-5)


def slots_of(valid: np.ndarray) -> np.ndarray:
    """The number of tokens before each."""
    return np.maximum(np.cumsum(valid, axis=1) - 1, 0)


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


SEVERAL = [("llada", "klass"), ("llada", "wino")]
ALONE = [
    pytest.param(
        family,
        name,
        id=f"{family}, {name}",
        marks=[] if (family, name) in SEVERAL else [pytest.mark.slow],
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
    def test_klass_is_the_threshold_alone_where_everything_counts_as_settled(self, name, family):
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


INFILLED = ["plain", "threshold", "gamma", "sigma", "klass", "origin", "random", "cfg", "until eos"]
INFILLED += ["alg_temp", "threshold, capped", "debias", "past eos"]


INFILLED = [
    pytest.param(
        family,
        name,
        gen_length,
        id=f"{family}, {name}, {gen_length}",
        marks=[]
        if (family, name, gen_length) in [("llada", "plain", 0), ("dream", "threshold", GEN)]
        else [pytest.mark.slow],
    )
    for name in INFILLED
    for family in TABLE[name].families
    for gen_length in (GEN, 0)
]


@pytest.mark.parametrize(("family", "name", "gen_length"), INFILLED)
def test_masks_in_the_prompt_are_filled_and_the_rest_of_it_is_kept(family, name, gen_length):
    blocks = {} if gen_length else dict(block_length=None)
    decode = config(name, family, infill=True, gen_length=gen_length, **blocks)
    prompt, mask = prompts(ROWS, PROMPT, seed=12), padding(0, 1, 2)
    holes = np.zeros(prompt.shape, bool)
    holes[0, [0, 3, 5]] = holes[1, [1, 4]] = True
    prompt[holes] = MASK
    out = run(family, prompt, mask, decode=decode, debiased=TABLE[name].debiased)
    check(out, prompt, decode)
    assert (out.tokens[:, :PROMPT] != MASK).all() and out.tokens.shape[1] == PROMPT + gen_length


def test_caches_fill_masks_where_nothing_is_generated():
    """Two ways to begin a block that does not exist are one, and d2Cache has nothing to choose."""
    prompt, mask = prompts(2, PROMPT, seed=3), padding(0, 2)[:2]
    prompt[0, [0, 2]] = prompt[1, [4, 5]] = MASK
    decode = config("threshold", "dream", infill=True, gen_length=0, block_length=None)
    shifted, first_column = (
        run("dream", prompt, mask, decode=decode, cache=make("dual", block_start=start))
        for start in ("shifted", "first-column")
    )
    assert (shifted.tokens != MASK).all()
    np.testing.assert_array_equal(shifted.tokens, first_column.tokens)
    assert shifted.positions_asked[0].tolist() == mask.sum(axis=1).tolist()
    with pytest.raises(ValueError, match="gen_length is 0; the cache 'd2cache'"):
        run("dream", prompt, mask, decode=decode, cache=make("d2cache"))


def test_padding_changes_neither_pace_nor_noise_of_infilling():
    """Without a number of steps there is one per mask, not one per slot of the padded prompt."""
    prompt = prompts(1, PROMPT, seed=5)
    prompt[0, [2, 4, 5]] = MASK
    padded = np.pad(prompt, ((0, 0), (4, 0)), constant_values=1)
    decode = DecodeConfig.for_model(
        small("dream")[0].config, gen_length=0, infill=True, temperature=1.5
    )
    alone = run("dream", prompt, decode=decode)
    behind = run("dream", padded, np.arange(10)[None] >= 4, decode=decode)
    assert alone.nfe == behind.nfe == 3
    np.testing.assert_array_equal(alone.tokens[0], behind.tokens[0, 4:])


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
        other = {number: 0.9 * config(name).__dict__[number] for number in strategy.numbers}
        with jax.log_compiles(), caplog.at_level("WARNING"):
            run(family, prompt, decode=config(name, family, **other), **arguments)
        assert not [text for text in caplog.messages if "_generate" in text], name
    assert varied >= {"threshold", "factor", "gamma", "sigma", "cfg_scale", "alg_temp"}
    assert varied >= {"kl_threshold", "wide_in_thres", "narrow_out_thres", "clip_alpha"}


class TestHooks:
    """`logits_processor`."""

    def test_sees_the_canvas_and_bans_what_is_on_it(self):
        def once(tokens, logits, step):
            used = jax.nn.one_hot(tokens, VOCAB, dtype=bool).any(axis=1)
            return jnp.where(used[:, None], -jnp.inf, logits)

        prompt = prompts(ROWS, PROMPT, seed=14)
        out = run("llada", prompt, decode=config("fixed"), logits_processor=once)
        for known, text in zip(prompt, out.tokens, strict=True):
            assert len(set(text[PROMPT:])) == GEN and not set(text[PROMPT:]) & set(known)

    @pytest.mark.parametrize("family", ["dream", pytest.param("llada", marks=pytest.mark.slow)])
    def test_knows_the_forward_and_the_slots(self, family):
        def counted(tokens, logits, step, positions):
            """Forces token 5 at one slot, and the number of the forward elsewhere."""
            forced = jnp.where(positions == PROMPT + 7, 5, 10 + step)
            return 100.0 * jax.nn.one_hot(forced, VOCAB)

        prompt, mask = prompts(ROWS, PROMPT, seed=15), padding(0, 4, 1)
        out = run(family, prompt, mask, decode=config("fixed"), logits_processor=counted)
        expected = 10 + out.committed_at[:, PROMPT:]
        expected[:, 7] = 5
        np.testing.assert_array_equal(out.tokens[:, PROMPT:], expected)

    def test_must_keep_the_shape(self):
        with pytest.raises(ValueError, match="logits_processor returned shape"):
            run(
                "llada",
                prompts(ROWS, PROMPT),
                decode=config("fixed"),
                logits_processor=lambda tokens, logits, step: logits[:, :1],
            )


class TestDraws:
    """Random choices that are given."""

    @pytest.mark.parametrize(
        ("family", "name"),
        [("llada", "origin"), pytest.param("dream", "alg_temp", marks=pytest.mark.slow)],
    )
    def test_transfer_says_what_each_forward_fills(self, family, name):
        decode = config(name, family)
        steps = decode.steps
        transfer = np.random.default_rng(3).random((steps, ROWS, LENGTH)) < 0.4
        transfer[[steps // 2 - 1, steps - 1]] = True  # the last step of each block
        prompt = prompts(ROWS, PROMPT, seed=16)
        out = run(family, prompt, decode=decode, draws=Draws(transfer=transfer))
        check(out, prompt, decode)
        for row in range(ROWS):
            left, step = np.arange(PROMPT, LENGTH), 0
            while len(left):
                block = left[left < PROMPT + ((left[0] - PROMPT) // BLOCK + 1) * BLOCK]
                filled = block[transfer[step, row, block]]
                assert (out.committed_at[row, filled] == step).all()
                left, step = np.setdiff1d(left, filled), step + 1
            assert step == out.steps[row]

    @pytest.mark.parametrize(
        "shape",
        [pytest.param((ROWS, LENGTH), marks=pytest.mark.slow), (7, ROWS, LENGTH)],
        ids=["one order", "an order per forward"],
    )
    def test_order_says_what_comes_first(self, shape):
        order = np.random.default_rng(4).random(shape).astype(np.float32)
        prompt = prompts(ROWS, PROMPT, seed=17)
        out = run("llada", prompt, decode=config("random"), draws=Draws(order=order))
        check(out, prompt, config("random"))
        for row in range(ROWS):
            left = set(range(PROMPT, LENGTH))
            for step in range(4):
                now = order[row] if order.ndim == 2 else order[min(step, 6), row]
                block = [p for p in left if p < PROMPT + (1 + step // 2) * BLOCK]
                filled = sorted(block, key=now.__getitem__)[:3]
                assert (out.committed_at[row, filled] == step).all()
                left -= set(filled)
            assert not left


class TestDistributions:
    """Chi-square tests; bounds are the 99.9% quantiles of as many categories less one."""

    ROWS, PROMPT = 3000, 4

    def generate(self, family: str, **arguments) -> tuple[Any, np.ndarray]:
        """First forwards from one prompt, and the logits that they all see."""
        model, params = small(family)
        decode = DecodeConfig(max_forwards=1, **arguments)
        prompt = prompts(1, self.PROMPT, seed=5)
        out = diffusion_generate(
            params,
            model,
            np.repeat(prompt, self.ROWS, axis=0),
            key=jax.random.key(3),
            decode=decode,
        )
        canvas = np.pad(prompt, ((0, 0), (0, decode.gen_length)), constant_values=MASK)
        valid = np.ones(canvas.shape, bool)
        logits = np.asarray(network(family, False, False)(canvas, valid, valid, canvas))[0]
        logits = logits.astype(np.float64)
        begin = self.PROMPT - model.config.shift
        return jax.device_get(out), logits[begin : begin + decode.gen_length]

    def assert_as_expected(self, counts, shares, bound: float) -> None:
        expected = self.ROWS * np.asarray(shares)
        assert np.sum(counts) == self.ROWS and expected.sum() == pytest.approx(self.ROWS)
        assert expected.min() > 5
        assert np.sum((np.asarray(counts) - expected) ** 2 / expected) < bound

    def test_tokens_follow_the_softmax(self):
        out, logits = self.generate("dream", gen_length=1, temperature=2.5)
        p = softmax(logits[0, :MASK] / 2.5)
        frequent = np.argsort(-p)[:9]
        counts = [(out.tokens[:, -1] == token).sum() for token in frequent]
        counts, shares = [*counts, self.ROWS - sum(counts)], [*p[frequent], 1 - p[frequent].sum()]
        self.assert_as_expected(counts, shares, 27.88)

    def test_positions_follow_the_softmax_of_confidence(self):
        """Two in a step: the first by the softmax, the second by that of the others."""
        out, logits = self.generate(
            "llada", gen_length=4, schedule="fixed", num_transfer_tokens=2, alg_temp=0.3
        )
        p = softmax(logits)
        weight = softmax(p[:, :MASK].max(axis=-1) / 0.3)
        pairs = [(i, j) for i in range(4) for j in range(i)]
        shares = [
            weight[i] * weight[j] / (1 - weight[i]) + weight[j] * weight[i] / (1 - weight[j])
            for i, j in pairs
        ]
        first = out.committed_at[:, self.PROMPT :] == 0
        counts = [(first[:, i] & first[:, j]).sum() for i, j in pairs]
        assert max(shares) > 2 * min(shares)
        self.assert_as_expected(counts, shares, 20.52)

    def test_origin_fills_every_position_by_itself(self):
        out, _ = self.generate("llada", gen_length=8, steps=4, alg="origin", eps=0.2)
        first = out.committed_at[:, self.PROMPT :] == 0  # from time 1 to time 0.8
        choose = np.array([1, 8, 28, 56, 70, 56, 28, 8, 1])
        binomial = choose * 0.2 ** np.arange(9) * 0.8 ** np.arange(8, -1, -1)
        counts = np.bincount(first.sum(axis=1), minlength=9)
        merged = [*counts[:4], counts[4:].sum()], [*binomial[:4], binomial[4:].sum()]
        self.assert_as_expected(*merged, 18.47)
        per_position = first.sum(axis=0)
        assert np.abs(per_position - 600).max() < 4 * np.sqrt(3000 * 0.2 * 0.8)

    @pytest.mark.slow
    def test_the_order_of_random_is_uniform(self):
        out, _ = self.generate("dream", gen_length=5, schedule="fixed", alg="random")
        first = (out.committed_at[:, self.PROMPT :] == 0).sum(axis=0)
        self.assert_as_expected(first, [0.2] * 5, 18.47)


REFUSED = [
    (dict(sigma=2.0, alg="entropy"), "alg is 'entropy', .* sigma"),
    (dict(infill=True, schedule="even"), "steps is None, but the schedule 'even'"),
    (dict(num_transfer_tokens=2), "num_transfer_tokens is 2, but the schedule 'even'"),
    (dict(gen_length=0, infill=True), "block_length is 6; it must divide gen_length, 0"),
    (dict(narrow_out_thres=None), "narrow_out_thres is None"),
    (dict(threshold=0.9, factor=1.0), "threshold and factor are both given"),
    (dict(threshold=0.9, gamma=0.1), "threshold and gamma are both given"),
    (dict(factor=0.9, gamma=0.1), "factor and gamma are both given"),
    (dict(strategy="remdm"), "strategy is 'remdm'; it must be one of klass, wino"),
    (dict(strategy="klass"), "strategy is 'klass', .* a threshold or a factor"),
    (dict(strategy="klass", gamma=0.1), "strategy is 'klass', .* a threshold or a factor"),
    (dict(strategy="klass", threshold=0.9, schedule="capped"), "schedule is 'capped'; .*klass"),
    (dict(strategy="klass", threshold=0.9, steps=8), "steps is 8, but strategy='klass' decides"),
    (dict(strategy="klass", threshold=0.9, alg_temp=0.1), "alg_temp is 0.1, .*'klass' leave it"),
    (dict(strategy="wino", threshold=0.9), "'wino', which has no meaning with threshold"),
    (dict(strategy="wino", factor=0.9), "'wino', which has no meaning with factor"),
    (dict(strategy="wino", gamma=0.9), "'wino', which has no meaning with gamma"),
    (dict(strategy="wino", cfg_scale=1.0), "'wino', which has no meaning with cfg_scale"),
    (dict(strategy="wino", infill=True), "'wino', which has no meaning with infill"),
    (dict(strategy="wino", alg="topk_margin"), "alg is 'topk_margin'; the strategy 'wino'"),
    (dict(strategy="wino", alg="random"), "alg is 'random', .* with wino"),
    (dict(strategy="wino", alg_temp=0.5), "alg_temp is 0.5, .*'wino' leave it out"),
    (dict(strategy="wino", steps=8), "steps is 8, but strategy='wino' decides"),
    (dict(threshold=0.9, steps=8), "steps is 8, but threshold decides"),
    (dict(gamma=0.9, steps=8), "steps is 8, but gamma decides"),
    (dict(factor=0.9, steps=8, schedule="fixed"), "steps is 8, but the schedule 'fixed' counts"),
    (dict(schedule="fixed", steps=8), "steps is 8, but the schedule 'fixed' counts tokens"),
    (dict(threshold=0.9, schedule="even"), "schedule is 'even'; with threshold"),
    (dict(factor=0.9, schedule="timestep"), "schedule is 'timestep'; with factor"),
    (dict(schedule="capped"), "schedule is 'capped', .*; give one of threshold, factor"),
    (dict(schedule="linear"), "schedule is 'linear'; it must be one of"),
    (dict(alg="origin", schedule="even"), "schedule is 'even'; with alg='origin'"),
    (dict(alg="origin", schedule="fixed"), "schedule is 'fixed'; with alg='origin'"),
    (dict(alg="origin", threshold=0.9), "alg is 'origin', which ignores confidence; .* threshold"),
    (dict(alg="origin", alg_temp=0.9), "alg is 'origin', which ignores confidence; .* alg_temp"),
    (dict(alg="random", sigma=1.0), "alg is 'random', which ignores confidence; with sigma"),
    (dict(alg="random", gamma=1.0), "alg is 'random', which ignores confidence; with gamma"),
    (dict(alg="surest"), "alg is 'surest'; it must be one of"),
    (dict(alg_temp=0.5, threshold=0.9), "alg_temp is 0.5, .* with threshold leave it out"),
    (dict(alg="entropy", threshold=0.9), "threshold is 0.9, but confidences of alg 'entropy'"),
    (dict(stop_until_eos=True, leave_early=False), "stop_until_eos .* leave_early is False"),
    (dict(gen_length=0, block_length=None), "gen_length is 0; .* unless infill=True"),
    (dict(gen_length=-4, block_length=None), "gen_length is -4"),
    (dict(block_length=5), "block_length is 5; it must divide gen_length"),
    (dict(steps=5), "steps is 5; it must be a positive multiple"),
    (dict(eps=0.0), "eps is 0.0"),
    *(
        ({name: value}, f"{name} is {value}; it must be a whole number")
        for name in ("num_transfer_tokens", "kl_history_length", "max_forwards", "top_k")
        for value in (0, -3)
    ),
    *(
        ({name: value}, f"{name} is {value}; it must be 0 or above")
        for name in ("temperature", "alg_temp", "gamma", "cfg_scale")
        for value in (-1.0, float("nan"), float("inf"))
    ),
    *(
        ({name: value}, f"{name} is {value}; it must be above 0")
        for name in ("factor", "sigma", "clip_alpha", "kl_threshold")
        for value in (0.0, float("nan"))
    ),
    *(
        ({name: float("nan")}, f"{name} is nan; it must be a confidence")
        for name in ("threshold", "wide_in_thres", "narrow_out_thres")
    ),
    (dict(max_forwards=1.5), "max_forwards is 1.5; it must be a whole number"),
    *((dict(top_p=value), f"top_p is {value}; it must lie in") for value in (0.0, 1.5)),
]


@pytest.mark.parametrize(("arguments", "words"), REFUSED, ids=range(len(REFUSED)))
def test_what_does_not_go_together_is_refused(arguments, words):
    with pytest.raises(ValueError, match=words):
        DecodeConfig(**dict(gen_length=GEN, block_length=BLOCK) | arguments)


WRONG = [
    ("dream", dict(strategy="wino"), {}, "strategy is 'wino', .*dream predicts"),
    ("llada", dict(strategy="wino"), dict(cache=make("dual")), "cache is 'dual', .*'wino'"),
    ("llada", dict(suppress=(3, MASK)), {}, "suppress has the mask token"),
    ("llada", dict(suppress=(VOCAB,)), {}, "suppress has token id 40; it must lie in 0 to 39"),
    ("llada", dict(eos_id=-1), {}, "eos_id has token id -1"),
    ("llada", dict(alg="entropy"), dict(token_freq=FREQUENCY), "token_freq debiases .*'entropy'"),
    ("llada", dict(alg="topk_margin"), dict(token_freq=FREQUENCY), "token_freq debiases"),
    ("llada", {}, dict(token_freq=FREQUENCY[1:]), r"token_freq has shape \(39,\)"),
    ("llada", {}, dict(draws=Draws(order=np.ones((ROWS, LENGTH)))), "draws.order .*'low_conf"),
    (
        "llada",
        dict(alg="random"),
        dict(draws=Draws(order=np.ones((ROWS, GEN)))),
        r"draws.order has shape \(3, 12\)",
    ),
    (
        "llada",
        dict(alg="random"),
        dict(draws=Draws(transfer=np.ones((2, ROWS, LENGTH), bool))),
        "draws.transfer .* for alg 'origin' or an alg_temp",
    ),
    (
        "llada",
        dict(alg="origin"),
        dict(draws=Draws(transfer=np.ones((ROWS, LENGTH), bool))),
        r"draws.transfer has shape \(3, 18\)",
    ),
]


@pytest.mark.parametrize(("family", "arguments", "others", "words"), WRONG, ids=range(len(WRONG)))
def test_what_the_model_or_the_prompt_does_not_fit_is_refused(family, arguments, others, words):
    decode = DecodeConfig(**dict(gen_length=GEN, block_length=BLOCK) | arguments)
    with pytest.raises(ValueError, match=words):
        run(family, prompts(ROWS, PROMPT), decode=decode, **others)
