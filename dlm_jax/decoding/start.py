"""Where a generation begins: its arguments are checked, its constants and its first canvas made."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from dlm_jax.cache.base import CacheMethod
from dlm_jax.cache.none import NoCache
from dlm_jax.decoding import progress
from dlm_jax.decoding.config import DecodeConfig
from dlm_jax.decoding.rows import TOKEN, Rows
from dlm_jax.decoding.settings import traced
from dlm_jax.decoding.state import DecodeState, Draws, LogitsProcessor, Setup
from dlm_jax.decoding.strategies import STRATEGIES
from dlm_jax.keys import row_keys
from dlm_jax.models.base import Config, Transformer, lay_out
from dlm_jax.queries import Slots
from dlm_jax.typing import Array, ArrayOrNumpy, Bool, Int, Params, PyTree


def start(
    params: Params,
    model: Transformer,
    prompt_BP: ArrayOrNumpy,
    prompt_mask_BP: ArrayOrNumpy | None = None,
    *,
    key: Array,
    decode: DecodeConfig,
    cache: CacheMethod = NoCache(),  # noqa: B008 (immutable)
    record: tuple[str, ...] = (),
    draws: Draws = Draws(),  # noqa: B008 (immutable)
    logits_processor: LogitsProcessor | None = None,
    token_freq: ArrayOrNumpy | None = None,
) -> tuple[Setup, DecodeState]:
    """The constants of a generation and its state before the first step.

    For whoever drives the steps: `step.step(setup, state, shape)` makes one, of the step shape
    `cache.step_shapes(setup.geo)[state.shape]`, and `progress.unfinished` says whether there is
    more to do. Arguments and errors are those of `diffusion_generate`.
    """
    setup, tokens_BL = prepare(
        params,
        model,
        prompt_BP,
        prompt_mask_BP,
        key=key,
        decode=decode,
        cache=cache,
        draws=draws,
        logits_processor=logits_processor,
        token_freq=token_freq,
    )
    return setup, _jit_begin(setup, tokens_BL, record=tuple(sorted(record)))


def prepare(
    params: Params,
    model: Transformer,
    prompt_BP: ArrayOrNumpy,
    prompt_mask_BP: ArrayOrNumpy | None,
    *,
    key: Array,
    decode: DecodeConfig,
    cache: CacheMethod,
    draws: Draws,
    logits_processor: LogitsProcessor | None,
    token_freq: ArrayOrNumpy | None,
) -> tuple[Setup, Int[Array, "B L"]]:
    """The constants of a generation and its first canvas; all arguments are checked.

    Raises:
      ValueError: one sentence.
    """
    config = model.config
    mask_BP = _check_prompt(prompt_BP, prompt_mask_BP, config, decode)
    if not isinstance(cache, CacheMethod):
        raise ValueError(f"cache is {cache!r}; make one with dlm_jax.cache.make(name, ...).")
    cache.check(config, decode)
    batch, prompt = jnp.shape(prompt_BP)
    geo = decode.geometry(prompt=prompt, shift=config.shift)
    config.check_length(prompt, geo.gen)
    _check_draws(draws, (batch, geo.length), decode)
    if token_freq is not None:
        _check_token_freq(token_freq, config, decode)
    slots, tokens_BL = _canvas(
        jnp.asarray(prompt_BP, jnp.int32),
        jnp.asarray(mask_BP, bool),
        gen=geo.gen,
        config=config,
    )
    setup = Setup(
        model=model,
        method=cache,
        geo=geo,
        logits_processor=logits_processor,
        decode=traced(decode),
        params=params,
        slots=slots,
        key_B=_row_keys(key, batch),
        draws=draws,
        token_freq_V=None if token_freq is None else jnp.asarray(token_freq, jnp.float32),
    )
    strategy = decode.strategy
    if strategy.ordered and not strategy.redraws and draws.order is None:
        setup = dataclasses.replace(setup, draws=draws._replace(order=_draw_order(setup)))
    return setup, tokens_BL


def begin(setup: Setup, tokens_BL: Int[Array, "B L"], record: tuple[str, ...] = ()) -> DecodeState:
    """The state before the first step; `record` as in `diffusion_generate`."""
    geo, config, method, strategy = setup.geo, setup.model.config, setup.method, setup.strategy
    batch = tokens_BL.shape[0]
    zeros_B, false_BL = jnp.zeros(batch, jnp.int32), jnp.zeros(tokens_BL.shape, bool)
    nothing_BL = jnp.zeros(tokens_BL.shape, jnp.float32)
    dtype = setup.params["embed"]["embedding"].dtype
    forwards = setup.most_forwards
    sets_TBL = jnp.zeros((forwards, *tokens_BL.shape), bool)

    def for_each(one: PyTree, rows: int) -> PyTree:
        return jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (rows, *jnp.shape(leaf))), one)

    state = DecodeState(
        rows=Rows(
            tokens_BL=tokens_BL,
            valid_BL=setup.slots.valid_BL,
            masked_BL=false_BL,
            committed_BL=false_BL,
            eligible_BL=false_BL,
            next_BL=false_BL,
            order_BL=nothing_BL,
            attended_BL=setup.slots.valid_BL,
            least_B=zeros_B,
            most_B=zeros_B,
            share_B=jnp.zeros(batch, jnp.float32),
            block_B=zeros_B,
            block_step_B=zeros_B,
            step_B=zeros_B,
        ),
        committed_at_BL=jnp.full(tokens_BL.shape, -1, jnp.int32),
        confidence_BL=nothing_BL,
        not_finite_at_B=jnp.full(batch, -1, jnp.int32),
        nfe=jnp.zeros((), jnp.int32),
        block_masks_B=zeros_B,
        strategy_memory=for_each(strategy.init(config, geo), batch),
        selected_BL=false_BL,
        shape=jnp.zeros((), jnp.int32),
        memory=for_each(method.init(geo), batch),
        cache=for_each(method.init_cache(setup.model, geo, dtype), setup.copies * batch),
        asked_TB=jnp.zeros((forwards, batch), jnp.float32),
        shape_T=jnp.full(forwards, -1, jnp.int32),
        computed_TBL=sets_TBL if "computed" in record else None,
        layer_sets=(sets_TBL,) * config.num_layers if "computed_layers" in record else None,
        canvas_TBL=(
            jnp.zeros(sets_TBL.shape, jnp.int32)
            if "history" in record and strategy.revokes
            else None
        ),
    )
    return progress.enter(setup, state)


@functools.partial(jax.jit, static_argnames=("gen", "config"))
def _canvas(
    prompt_BP: Int[Array, "B P"], mask_BP: Bool[Array, "B P"], *, gen: int, config: Config
) -> tuple[Slots, Int[Array, "B L"]]:
    """The prompt, and masks behind it."""
    masks_BG = jnp.full((len(prompt_BP), gen), config.mask_id, jnp.int32)
    valid_BL = jnp.concatenate([mask_BP, jnp.ones_like(masks_BG, bool)], axis=1)
    return lay_out(config, valid_BL), jnp.concatenate([prompt_BP, masks_BG], axis=1)


@jax.jit
def _draw_order(setup: Setup) -> Array:
    # No denoising step has this number, so that no noise is correlated with the order.
    return setup.draw_order(jnp.full(len(setup.key_B), -1, jnp.int32), TOKEN)


_row_keys = jax.jit(row_keys, static_argnums=1)
_jit_begin = jax.jit(begin, static_argnames="record")


def _check_prompt(
    prompt_BP: ArrayOrNumpy,
    mask_BP: ArrayOrNumpy | None,
    config: Config,
    decode: DecodeConfig,
) -> ArrayOrNumpy:
    """Refuses token ids that are none, or padding in the wrong place; returns the mask."""
    if not isinstance(prompt_BP, Tracer):
        prompt_BP = np.asarray(prompt_BP)  # sharded, perhaps; what is checked is a copy
    if jnp.ndim(prompt_BP) != 2:
        raise ValueError(
            f"The prompt has shape {jnp.shape(prompt_BP)}; it must be [batch, prompt length]."
        )
    if mask_BP is None:
        mask_BP = np.ones(jnp.shape(prompt_BP), bool)
    if jnp.shape(mask_BP) != jnp.shape(prompt_BP):
        raise ValueError(
            f"The prompt mask has shape {jnp.shape(mask_BP)}; it must be that of the prompt, "
            f"{jnp.shape(prompt_BP)}."
        )
    if len(prompt_BP) < 1:
        raise ValueError("The prompt has no rows; at least one is needed.")
    if not jnp.issubdtype(prompt_BP.dtype, jnp.integer):
        raise ValueError(f"The prompt has dtype {prompt_BP.dtype}; token ids must be integers.")
    if not isinstance(prompt_BP, Tracer) and prompt_BP.size:
        if prompt_BP.min() < 0 or prompt_BP.max() >= config.vocab_size:
            raise ValueError(
                f"The prompt holds token ids from {prompt_BP.min()} to {prompt_BP.max()}; they "
                f"must lie in 0 to {config.vocab_size - 1}."
            )
        if not decode.infill and (prompt_BP == config.mask_id).any():
            raise ValueError("The prompt holds mask tokens; set infill=True to have them filled.")
    if not isinstance(mask_BP, Tracer):
        mask_BP = np.asarray(mask_BP, bool)
        if (mask_BP[:, :-1] & ~mask_BP[:, 1:]).any():
            raise ValueError(
                "The prompt mask has padding behind tokens; prompts must be padded left."
            )
    return mask_BP


def _check_token_freq(token_freq: ArrayOrNumpy, config: Config, decode: DecodeConfig) -> None:
    """Refuses frequencies that the decoding has no use for, or that are none."""
    if not decode.debiasable:
        raise ValueError(
            "token_freq debiases probabilities that rank positions, which "
            f"{decode.strategy.spelling} with alg {decode.alg!r} does not go by; take alg "
            "'low_confidence' or 'maskgit_plus'."
        )
    if jnp.shape(token_freq) != (config.vocab_size,):
        raise ValueError(
            f"token_freq has shape {jnp.shape(token_freq)}; it must hold a number for each of the "
            f"{config.vocab_size} tokens."
        )
    if not isinstance(token_freq, Tracer):
        share_V = np.asarray(token_freq)
        if not ((share_V >= 0) & (share_V <= 1)).all():
            raise ValueError("token_freq holds numbers outside [0, 1]; it must hold shares.")


def _check_draws(draws: Draws, row: tuple[int, int], decode: DecodeConfig) -> None:
    """Refuses choices from outside that fit neither the shape [B, L] nor the strategy."""
    (order, transfer), strategy = draws, decode.strategy
    axes = 3 if strategy.redraws else 2
    if order is not None and not (
        strategy.ordered and jnp.ndim(order) == axes and jnp.shape(order)[-2:] == row
    ):
        raise ValueError(
            f"draws.order has shape {jnp.shape(order)} and {strategy.spelling}; it must be {row}, "
            f"a number per row and position, for the strategy {_names('ordered')}, or one such "
            "array per forward if that is redrawn."
        )
    if transfer is not None and not (
        (strategy.drawn or decode.alg_temp is not None)
        and jnp.ndim(transfer) == 3
        and jnp.shape(transfer)[-2:] == row
    ):
        raise ValueError(
            f"draws.transfer has shape {jnp.shape(transfer)}; it must be (forwards, "
            f"{row[0]}, {row[1]}), what each forward fills, for the strategy {_names('drawn')} or "
            "an alg_temp."
        )


def _names(trait: str) -> str:
    """The strategies that have something in common."""
    having = (name for name, strategy in STRATEGIES.items() if getattr(strategy, trait))
    return " or ".join(map(repr, having))
