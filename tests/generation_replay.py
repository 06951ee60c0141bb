"""What a generation must never do, and what each of its steps had to choose.

`replay` follows a generation forward by forward with the plain network, and works out in numpy what
each step had to commit.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from reference_rules import by_score, slow_bounded, slow_factored
from strategy_table import FREQUENCY, GEN, LENGTH, MASK, VOCAB, parameter
from tiny_models import small

from dlm_jax.decoding import shadow
from dlm_jax.decoding.config import DecodeConfig
from dlm_jax.models.base import lay_out, unembed


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
                    assert decode.strategy.name == "wino" and after[position] == MASK
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
            hidden = shadow.predict(model, params, canvas_BL, valid_BL, valid_BL, layout, slot_BS)
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


class RowReplay:
    """Works out what each step of one row has to commit."""

    def __init__(self, decode: DecodeConfig, prompt: int, debiased: bool):
        self.decode, self.prompt, self.debiased = decode, prompt, debiased
        self.block, self.block_step, self.start = None, 0, 0
        self.before = np.zeros((GEN, VOCAB))
        self.kind = decode.strategy.name
        history = parameter(decode, "kl_history_length") or 0
        self.divergence = [np.zeros(GEN) for _ in range(history)]

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
        threshold, wide_in_thres, factor, gamma = (
            parameter(self.decode, name)
            for name in ("threshold", "wide_in_thres", "factor", "gamma")
        )
        if threshold is not None or wide_in_thres is not None:
            level = wide_in_thres if threshold is None else threshold
            return sum(bool(among[i]) and score[i] >= level for i in range(len(score)))
        if factor is not None:
            found = slow_factored(score, among, factor)
            return min(found, int(among.sum()) - parameter(self.decode, "spare_last"))
        with np.errstate(divide="ignore", invalid="ignore"):
            entropy = -np.where(p > 0, p * np.log(p), 0).sum(axis=-1)
        return slow_bounded(score, entropy, among, gamma)

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
        if self.kind == "klass":
            stable = self.stable(p[prompt:])
            sure = eligible & np.concatenate([np.zeros(prompt, bool), stable])
            found = self.count(score, confidence, p, sure)
            if found:
                among, number = sure, found
        elif self.kind == "wino":
            most = max(min(max(int(0.7 * eligible.sum()), 5), 20), least)
            number = min(max(self.count(score, confidence, p, eligible), least), most)
        elif decode.strategy.adaptive:
            number = min(max(self.count(score, confidence, p, eligible), least), most)
        if self.kind != "origin":
            assert chosen.sum() == number
        assert not (chosen & ~among).any()
        ranked = decode.strategy.ranks and not decode.alg_temp
        if ranked and not decode.temperature and chosen.any() and (among & ~chosen).any():
            assert score[chosen].min() >= score[among & ~chosen].max() - 1e-5
        return dict(token=token, confidence=confidence, p=p, least=least)

    def stable(self, p: np.ndarray) -> np.ndarray:
        moved = np.log(p + 1e-12) - np.log(self.before + 1e-12)
        self.divergence = [*self.divergence[1:], (p * moved).sum(axis=-1)]
        self.before = p
        return np.all([d < parameter(self.decode, "kl_threshold") for d in self.divergence], axis=0)


def replay(family: str, out, prompt, mask, decode: DecodeConfig, debiased=False) -> None:
    """Checks every choice of a generation; tokens and confidences too, where nothing is random."""
    length = prompt.shape[1]
    logits_of = network(family, decode.guided, decode.strategy.name == "wino")
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
            if decode.strategy.name == "wino":
                revoked = (before != MASK) & (after[row] == MASK)
                p = np.take_along_axis(step["p"], before[:, None], axis=-1)[:, 0]
                inside = np.isin(np.arange(LENGTH), slots[row]) & committed[row]
                doubtful = inside & (p < parameter(decode, "narrow_out_thres"))
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
