"""How probable a model finds an answer after a prompt, as the originals evaluate it, batched.

    plan (masked copies, slots to score, weights) -> encode -> log-probabilities there -> sum

`config.batch_size` copies of every row are forwarded at a time, in a loop on the device. What the
copies are is the estimator's (`estimators.py`).
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from dlm_jax import models, queries
from dlm_jax.decoding import guidance
from dlm_jax.estimators import ESTIMATORS, LikelihoodDraws, plan
from dlm_jax.keys import row_keys
from dlm_jax.models.base import Config, Transformer, lay_out, readout, unembed
from dlm_jax.typing import Array, ArrayOrNumpy, Bool, Float, Int, Key, Params


@dataclasses.dataclass(frozen=True, kw_only=True)
class LikelihoodConfig:
    """How a log-likelihood is estimated. Hashable, hence static under jit (`cfg_scale` is traced).

    Attributes:
      estimator: a key of `estimators.ESTIMATORS`. `mc_count` is LLaDA's: a drawn number of answer
        tokens is masked. `mc_rate` is Dream's `mc`: every token is masked with a drawn probability,
        but for the first and the last of the sequence, which are thus never scored. `ar_ftb` and
        `ar_btf` score token by token, forwards or backwards, and draw nothing.
      log_type: what is scored: the answer given the prompt (`ftb`), the prompt given the answer
        (`btf`), or both, per token of the sequence (`union`).
      mc_num: Monte Carlo samples, a multiple of `batch_size`; unused by `ar_*`.
      batch_size: S, masked copies of every row that are forwarded together.
      cfg_scale: weight w of unsupervised classifier-free guidance (arXiv 2410.18514), 0 or above,
        for `mc_count` only: `un + (w + 1) (cond - un)` with `un` the logits without the prompt. A
        number other than 0 doubles the forward; another such number does not compile again.
      eps: lowest masking probability of `mc_rate`.

    Raises:
      ValueError: one sentence that names the argument, its value and what would be right.
    """

    estimator: str = "mc_count"
    log_type: str = "ftb"
    mc_num: int = 128
    batch_size: int = 16
    cfg_scale: Any = 0.0
    eps: float = 1e-3

    def __post_init__(self) -> None:
        if self.estimator not in ESTIMATORS:
            raise ValueError(
                f"estimator is {self.estimator!r}; it must be one of {', '.join(ESTIMATORS)}."
            )
        method = ESTIMATORS[self.estimator]
        if self.log_type not in method.log_types:
            raise ValueError(
                f"log_type is {self.log_type!r}; with the estimator {self.estimator!r} it must be "
                f"one of {', '.join(method.log_types)}."
            )
        for name in ("batch_size", "mc_num"):
            value = getattr(self, name)
            if not isinstance(value, int | np.integer) or value < 1:
                raise ValueError(f"{name} is {value}; it must be a whole number from 1 on.")
        if method.draw is not None and self.mc_num % self.batch_size:
            raise ValueError(
                f"mc_num is {self.mc_num}; it must be a multiple of batch_size, {self.batch_size}."
            )
        if not 0.0 < self.eps < 1.0:
            raise ValueError(f"eps is {self.eps}; it must lie between 0 and 1.")
        # A traced number is taken as it is.
        if not isinstance(self.cfg_scale, Tracer) and not 0 <= self.cfg_scale < math.inf:
            raise ValueError(f"cfg_scale is {self.cfg_scale}; it must be 0 or above.")
        if self.guided and not method.guided:
            raise ValueError(
                f"cfg_scale is {self.cfg_scale}, but the estimator {self.estimator!r} has no "
                "guidance; leave it at 0."
            )

    @classmethod
    def for_model(cls, config: Config, **overrides: Any) -> "LikelihoodConfig":
        """The estimator of the model family where an argument is not given or None."""
        given = {name: value for name, value in overrides.items() if value is not None}
        return cls(**(models.FAMILIES[config.family].LIKELIHOOD | given))

    @property
    def guided(self) -> bool:
        return isinstance(self.cfg_scale, Tracer) or bool(self.cfg_scale > 0)

    def scored(self, prompt: int, answer: int) -> range:
        """The slots whose tokens are scored, out of `prompt` slots and then `answer` slots."""
        return range(
            prompt if self.log_type == "ftb" else 0,
            prompt if self.log_type == "btf" else prompt + answer,
        )

    def forwards(self, prompt: int, answer: int) -> int:
        """T, the model forwards of a call with so many slots."""
        if ESTIMATORS[self.estimator].draw is not None:
            return self.mc_num // self.batch_size
        return math.ceil(len(self.scored(prompt, answer)) / self.batch_size)


def log_likelihood(
    params: Params,
    model: Transformer,
    prompt_BP: ArrayOrNumpy,
    answer_BA: ArrayOrNumpy,
    prompt_mask_BP: ArrayOrNumpy | None = None,
    answer_mask_BA: ArrayOrNumpy | None = None,
    *,
    key: Array | None = None,
    config: LikelihoodConfig,
    draws: LikelihoodDraws | None = None,
) -> Float[Array, " B"]:
    """Estimates the log-likelihood of each answer given its prompt, in one compiled program.

    Composes with `jit`, `vmap` and sharded parameters; `model` and `config` are static. One forward
    has B x `config.batch_size` sequences; logits exist for one copy of the batch at a time, and
    only where tokens are scored.

    Args:
      params: parameters of `model`; the forward runs in their dtype.
      model: the network.
      prompt_BP: integer token ids [B, P], left-padded to a common length. P may be 0.
      answer_BA: integer token ids [B, A], right-padded to a common length. The original of Dream
        ends it with the end-of-text token, since `mc_rate` never scores the last token.
      prompt_mask_BP: bool [B, P], False at padding; None if there is none.
      answer_mask_BA: bool [B, A], False at padding; None if there is none.
      key: one PRNG key, or one per row [B]; needed by Monte Carlo estimators only. A row's masks
        depend on its key, the forward, the copy and the position in the row, neither on its
        neighbours nor on padding.
      config: the estimator.
      draws: masks to use instead of those that `key` gives.

    Returns:
      float32 [B], in nats; with the log type `union` per token of prompt and answer.

    Raises:
      ValueError: shapes or settings that do not fit; one sentence says what would be right.
    """
    prompt_ids, prompt_valid = _tokens("prompt", prompt_BP, prompt_mask_BP, model.config)
    answer_ids, answer_valid = _tokens("answer", answer_BA, answer_mask_BA, model.config)
    (batch, prompt), (rows, answer) = prompt_ids.shape, answer_ids.shape
    if batch != rows or batch < 1:
        raise ValueError(
            f"There are {batch} prompts and {rows} answers; there must be as many of one as of the "
            "other, and at least one."
        )
    model.config.check_length(prompt, answer)
    for name, side, mask in (("prompt", "left", prompt_valid), ("answer", "right", answer_valid)):
        if isinstance(mask, Tracer):
            continue
        inward = mask if side == "left" else mask[:, ::-1]
        if (inward[:, :-1] & ~inward[:, 1:]).any():
            raise ValueError(
                f"The {name} mask has padding on the wrong side; {name}s must be padded {side}."
            )
        if (name == "answer" or config.log_type == "btf") and not mask.any(axis=-1).all():
            raise ValueError(f"A row of the {name} is empty; it must have at least one token.")
    unscored = config.estimator == "mc_rate" and config.log_type == "ftb"
    if unscored and not isinstance(answer_valid, Tracer) and (answer_valid.sum(axis=-1) == 1).any():
        raise ValueError(
            "An answer has one token, the last of its row, which the estimator 'mc_rate' never "
            "scores; end answers with the end-of-text token, or take 'ar_ftb'."
        )
    method, forwards = ESTIMATORS[config.estimator], config.forwards(prompt, answer)
    if draws is not None:
        if method.draw is None:
            raise ValueError(f"The estimator {config.estimator!r} draws nothing; leave draws out.")
        shape = (batch, forwards, config.batch_size, prompt + answer)
        given = (jnp.shape(draws.masked), jnp.shape(draws.p_mask))
        if given != (shape, shape[:-1]):
            raise ValueError(
                f"draws has the shapes {given[0]} and {given[1]}; they must be {shape} and "
                f"{shape[:-1]}: row, forward, copy, and slot."
            )
        draws = LikelihoodDraws(
            jnp.asarray(draws.masked, bool), jnp.asarray(draws.p_mask, jnp.float32)
        )
    if method.draw is None or draws is not None:
        key_B = None
    elif key is None:
        raise ValueError(f"The estimator {config.estimator!r} draws masks; give it a key.")
    else:
        key_B = row_keys(key, batch)
    return _log_likelihood(
        params,
        jnp.asarray(prompt_ids, jnp.int32),
        jnp.asarray(answer_ids, jnp.int32),
        jnp.concatenate([jnp.asarray(prompt_valid), jnp.asarray(answer_valid)], axis=1),
        key_B,
        jnp.asarray(config.cfg_scale, jnp.float32) if config.guided else None,
        draws,
        model,
        dataclasses.replace(config, cfg_scale=0.0),
    )


def _tokens(name: str, tokens: Any, mask: Any, config: Config) -> tuple[Any, Any]:
    """Checks token ids and their mask; what is concrete comes back as NumPy."""
    if not isinstance(tokens, Tracer):
        tokens = np.asarray(tokens)
    if tokens.ndim != 2:
        raise ValueError(f"The {name} has shape {tokens.shape}; it must be [batch, {name} length].")
    if not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise ValueError(f"The {name} has dtype {tokens.dtype}; token ids must be integers.")
    if mask is None:
        mask = np.ones(tokens.shape, bool)
    if jnp.shape(mask) != tokens.shape:
        raise ValueError(
            f"The {name} mask has shape {jnp.shape(mask)}; it must be that of the {name}, "
            f"{tokens.shape}."
        )
    mask = mask.astype(bool) if isinstance(mask, Tracer) else np.asarray(mask, bool)
    if tokens.size and not isinstance(tokens, Tracer):
        if tokens.min() < 0 or tokens.max() >= config.vocab_size:
            raise ValueError(
                f"The {name} holds token ids from {tokens.min()} to {tokens.max()}; they must lie "
                f"in 0 to {config.vocab_size - 1}."
            )
        if not isinstance(mask, Tracer) and (mask & (tokens == config.mask_id)).any():
            raise ValueError(f"The {name} holds mask tokens; only text has a likelihood.")
    return tokens, mask


@functools.partial(jax.jit, static_argnames=("model", "config"))
def _log_likelihood(
    params: Params,
    prompt_BP: Int[Array, "B P"],
    answer_BA: Int[Array, "B A"],
    valid_BL: Bool[Array, "B L"],
    key_B: Key[Array, " B"] | None,
    cfg_scale: Float[Array, ""] | None,
    draws: LikelihoodDraws | None,
    model: Transformer,
    config: LikelihoodConfig,
) -> Float[Array, " B"]:
    prompt, answer = prompt_BP.shape[1], answer_BA.shape[1]
    tokens_BL = jnp.concatenate([prompt_BP, answer_BA], axis=1)
    forwards = config.forwards(prompt, answer)
    plan_row = functools.partial(
        plan,
        config.estimator,
        scored=config.scored(prompt, answer),
        forwards=forwards,
        copies=config.batch_size,
        eps=config.eps,
    )
    slots = lay_out(model.config, valid_BL)
    every = queries.every(slots)

    def logits(hidden_BLD: Array, slot_BW: Array) -> Float[Array, "B W V"]:
        place_BW = readout(every, slot_BW, model.config.shift)
        return unembed(model, params, queries.gather(hidden_BLD, place_BW))

    def score(copy: tuple[Array, Array, Array]) -> Float[Array, " B"]:
        """The weighted sum over one copy of every row."""
        hidden_GBLD, slot_BW, weight_BW = copy
        logits_BWV = logits(hidden_GBLD[0], slot_BW)
        if cfg_scale is not None:
            free_BWV = logits(hidden_GBLD[1], slot_BW)
            logits_BWV = guidance.combine(logits_BWV, free_BWV, cfg_scale)
        token_BW = queries.gather(tokens_BL, slot_BW)
        log_p = jnp.take_along_axis(jax.nn.log_softmax(logits_BWV), token_BW[..., None], axis=-1)
        return jnp.sum(jnp.where(weight_BW > 0, weight_BW * log_p[..., 0], 0.0), axis=-1)

    def forward(step: tuple[Array, LikelihoodDraws | None]) -> Float[Array, " B"]:
        index, draws = step
        copies = jax.vmap(plan_row, (0, 0, 0, None), 1)(key_B, valid_BL, draws, index)
        masked_SBL, slot_SBW, weight_SBW = copies
        versions = [jnp.where(masked_SBL, model.config.mask_id, tokens_BL[None])]
        if cfg_scale is not None:
            in_prompt_L = jnp.arange(valid_BL.shape[1]) < prompt
            versions.append(jnp.where(in_prompt_L[None, None], model.config.mask_id, versions[0]))
        tokens_SGBL = jnp.stack(versions, axis=1)
        shape = tokens_SGBL.shape
        rows = (-1, shape[-1])
        copied = jax.tree.map(
            lambda leaf: jnp.broadcast_to(leaf, (*shape[:2], *leaf.shape)).reshape(
                *rows, *leaf.shape[2:]
            ),
            slots,
        )
        hidden: Any = model.apply(
            {"params": params}, tokens_SGBL.reshape(rows), copied, method="encode"
        )
        # One copy at a time: the logits of all would be the largest array by far.
        scores_SB = jax.lax.map(score, (hidden.reshape(*shape, -1), slot_SBW, weight_SBW))
        return jnp.sum(scores_SB, axis=0)

    draws = jax.tree.map(lambda drawn: jnp.swapaxes(drawn, 0, 1), draws)
    sums_TB = jax.lax.map(forward, (jnp.arange(forwards, dtype=jnp.int32), draws))
    total_B = jnp.sum(sums_TB, axis=0)
    if config.log_type == "union":
        total_B = total_B / jnp.maximum(jnp.sum(valid_BL, axis=-1), 1).astype(jnp.float32)
    return total_B
