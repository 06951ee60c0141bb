"""Arguments of a generation: checked, and split into what is traced and what is static."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from dlm_jax.cache.base import CacheMethod
from dlm_jax.decoding.config import DecodeConfig, Numbers
from dlm_jax.decoding.state import Draws, LogitsProcessor, static
from dlm_jax.models.base import Transformer
from dlm_jax.typing import Array, ArrayOrNumpy, Bool, Float, Int, Key, Params


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Call:
    """What `diffusion_generate` was asked for, as one pytree."""

    model: Transformer = static()
    decode: DecodeConfig = static()
    method: CacheMethod = static()
    logits_processor: LogitsProcessor | None = static()
    params: Params
    prompt_BP: Int[Array, "B P"]
    mask_BP: Bool[Array, "B P"]
    key: Key[Array, "..."]
    """One, or one per row."""
    numbers: Numbers
    draws: Draws
    token_freq_V: Float[Array, " V"] | None


def prepare(
    params: Params,
    model: Transformer,
    prompt_BP: ArrayOrNumpy,
    prompt_mask_BP: ArrayOrNumpy | None,
    key: Array,
    decode: DecodeConfig,
    cache: CacheMethod,
    draws: Draws = Draws(),  # noqa: B008 (immutable)
    logits_processor: LogitsProcessor | None = None,
    token_freq: ArrayOrNumpy | None = None,
) -> Call:
    """Checks the arguments of `diffusion_generate`.

    Raises:
      ValueError: one sentence.
    """
    config = model.config
    given_BP = prompt_BP  # sharded, perhaps; what is checked is a copy
    if not isinstance(prompt_BP, Tracer):
        prompt_BP = np.asarray(prompt_BP)
    if jnp.ndim(prompt_BP) != 2:
        raise ValueError(
            f"The prompt has shape {jnp.shape(prompt_BP)}; it must be [batch, prompt length]."
        )
    if prompt_mask_BP is None:
        prompt_mask_BP = np.ones(jnp.shape(prompt_BP), bool)
    if jnp.shape(prompt_mask_BP) != jnp.shape(prompt_BP):
        raise ValueError(
            f"The prompt mask has shape {jnp.shape(prompt_mask_BP)}; it must be that of the "
            f"prompt, {jnp.shape(prompt_BP)}."
        )
    batch, prompt = jnp.shape(prompt_BP)
    if batch < 1:
        raise ValueError("The prompt has no rows; at least one is needed.")
    if not jnp.issubdtype(prompt_BP.dtype, jnp.integer):
        raise ValueError(f"The prompt has dtype {prompt_BP.dtype}; token ids must be integers.")
    if not isinstance(cache, CacheMethod):
        raise ValueError(f"cache is {cache!r}; make one with dlm_jax.cache.make(name, ...).")
    cache.check(config, decode)
    geo = decode.geometry(prompt=prompt, shift=config.shift)
    _check_draws(draws, (batch, geo.length), decode)
    if token_freq is not None and not (decode.measure.is_probability and decode.measure.ranks):
        raise ValueError(
            f"token_freq debiases probabilities that rank positions, which alg {decode.alg!r} does "
            "not go by; take 'low_confidence' or 'maskgit_plus'."
        )
    if token_freq is not None and jnp.shape(token_freq) != (config.vocab_size,):
        raise ValueError(
            f"token_freq has shape {jnp.shape(token_freq)}; it must hold a number for each of the "
            f"{config.vocab_size} tokens."
        )
    if token_freq is not None and not isinstance(token_freq, Tracer):
        share_V = np.asarray(token_freq)
        if not ((share_V >= 0) & (share_V <= 1)).all():
            raise ValueError("token_freq holds numbers outside [0, 1]; it must hold shares.")
    config.check_length(prompt, geo.gen)
    if not isinstance(prompt_BP, Tracer):
        if prompt_BP.min() < 0 or prompt_BP.max() >= config.vocab_size:
            raise ValueError(
                f"The prompt holds token ids from {prompt_BP.min()} to {prompt_BP.max()}; they "
                f"must lie in 0 to {config.vocab_size - 1}."
            )
        if not decode.infill and (prompt_BP == config.mask_id).any():
            raise ValueError("The prompt holds mask tokens; set infill=True to have them filled.")
    if not isinstance(prompt_mask_BP, Tracer):
        prompt_mask_BP = np.asarray(prompt_mask_BP, bool)
        if (prompt_mask_BP[:, :-1] & ~prompt_mask_BP[:, 1:]).any():
            raise ValueError(
                "The prompt mask has padding behind tokens; prompts must be padded left."
            )
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        key = jax.random.wrap_key_data(key)
    if key.shape not in ((), (batch,)):
        raise ValueError(
            f"key has shape {key.shape}; it must be one key, or one per row, ({batch},)."
        )
    static, numbers = decode.split()
    return Call(
        model=model,
        decode=static,
        method=cache,
        logits_processor=logits_processor,
        params=params,
        prompt_BP=jnp.asarray(given_BP, jnp.int32),
        mask_BP=jnp.asarray(prompt_mask_BP, bool),
        key=key,
        numbers=numbers,
        draws=draws,
        token_freq_V=None if token_freq is None else jnp.asarray(token_freq, jnp.float32),
    )


def _check_draws(draws: Draws, row: tuple[int, int], decode: DecodeConfig) -> None:
    """Refuses choices from outside that fit neither the shape [B, L] nor the algorithm."""
    order, transfer = draws
    if order is not None and not (
        decode.measure.drawn and jnp.ndim(order) in (2, 3) and jnp.shape(order)[-2:] == row
    ):
        raise ValueError(
            f"draws.order has shape {jnp.shape(order)} and alg is {decode.alg!r}; it must be "
            f"{row}, or one such array per forward, a number per row and position, for 'random'."
        )
    if transfer is not None and not (
        (decode.measure.thinned or decode.draws_positions)
        and jnp.ndim(transfer) == 3
        and jnp.shape(transfer)[-2:] == row
    ):
        raise ValueError(
            f"draws.transfer has shape {jnp.shape(transfer)}; it must be (forwards, "
            f"{row[0]}, {row[1]}), what each forward fills, for alg 'origin' or an alg_temp."
        )
