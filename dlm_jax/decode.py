"""Generation: checks the arguments, makes the first canvas, and repeats the denoising step.

All drivers call the same `step.step`: `lax.scan` where the number of forwards is known,
`lax.while_loop` where it depends on data, Python where somebody wants to watch
(`diffusion_stream`).
"""

import dataclasses
import functools
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from dlm_jax import history
from dlm_jax.cache.base import CacheMethod, Variant
from dlm_jax.cache.none import NoCache
from dlm_jax.config import DecodeConfig, Numbers
from dlm_jax.models.base import Transformer
from dlm_jax.step import DecodeState, Setup, begin, draw_order, step, unfinished
from dlm_jax.typing import Array, ArrayOrNumpy, Bool, Float, Int, Params

RECORDS = ("computed", "computed_layers", "history", "state")
"""What `diffusion_generate(record=...)` can be asked for."""


class GenerateOutput(NamedTuple):
    """Result of a generation; L = P + G with the prompt as it was given, padding included."""

    tokens: Int[Array, "B L"]
    committed_at: Int[Array, "B L"]
    """Model forward in which the token was committed; -1 if it was given, or is still a mask."""
    confidence: Float[Array, "B L"]
    """Confidence of the token when it was committed; 0 where nothing was."""
    nfe: Int[Array, ""]
    """Model forwards."""
    history: Int[Array, "T B L"] | None
    """The canvas after every forward, if recorded; the first `nfe` entries are meaningful."""
    positions_asked: Float[Array, "T B"]
    """Positions that the cache method asked for in every forward, mean over the layers."""
    positions_computed: Float[Array, "T B"]
    """Query slots that were computed for them, padding included, mean over the layers."""
    variant: Int[Array, " T"]
    """Which of the cache method's step shapes every forward had; -1 where there was none."""
    computed: Bool[Array, "T B L"] | None
    """The positions that entered the network in every forward, if recorded."""
    computed_layers: Bool[Array, "T B layers L"] | None
    """The positions whose queries each layer computed, if recorded."""
    state: DecodeState | None
    """From which `diffusion_generate(state=...)` goes on, if recorded: a pytree of arrays."""


class Draws(NamedTuple):
    """Random numbers given from outside instead of drawn from the key; None draws."""

    order: ArrayOrNumpy | None = None
    """[B, L] for the algorithm `random`: the lower, the earlier a position is filled."""


class Frame(NamedTuple):
    """The canvas after one forward of `diffusion_stream`; fields as in `GenerateOutput`."""

    step: int
    tokens: Int[Array, "B L"]
    committed_at: Int[Array, "B L"]
    confidence: Float[Array, "B L"]
    positions_computed: float
    """Of this forward, per row."""


def diffusion_generate(
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
    state: DecodeState | None = None,
) -> GenerateOutput:
    """Generates `decode.gen_length` tokens after each prompt, in one compiled program.

    Composes with `jit`, `vmap` and sharded parameters; `model`, `decode`, `cache` and `record` are
    static.

    Args:
      params: parameters of `model`; the forward runs in their dtype.
      model: the network.
      prompt_BP: integer token ids [B, P], left-padded to a common length. Rows do not influence
        each other.
      prompt_mask_BP: bool [B, P], False at padding; None if there is none.
      key: one PRNG key, or one per row [B]. Used at temperature > 0 and for random orders only; a
        row's noise depends on its key, its denoising step and the position, not on its neighbours.
      decode: decoding configuration.
      cache: cache method.
      record: names out of `RECORDS`; what is not asked for costs nothing.
      draws: random numbers to use instead of those that `key` gives.
      state: goes on from `GenerateOutput.state` of an earlier call with the same arguments
        (`decode.max_forwards` apart, which counts from the start of the generation); the result is
        that of one uninterrupted call.

    Raises:
      ValueError: shapes or settings that do not fit; one sentence says what would be right.
    """
    args = _prepare(params, model, prompt_BP, prompt_mask_BP, key, decode, cache, draws)
    for name in [record] if isinstance(record, str) else record:
        if isinstance(record, str) or name not in RECORDS:
            raise ValueError(
                f"record is {record!r}; it must be a tuple of names among {', '.join(RECORDS)}."
            )
    if state is not None:
        _check_state(state, record, args)
    return _generate(*args, record=tuple(sorted(record)), state=state)


def diffusion_stream(
    params: Params,
    model: Transformer,
    prompt_BP: ArrayOrNumpy,
    prompt_mask_BP: ArrayOrNumpy | None = None,
    *,
    key: Array,
    decode: DecodeConfig,
    cache: CacheMethod = NoCache(),  # noqa: B008 (immutable)
) -> Iterator[Frame]:
    """The same generation as `diffusion_generate`, one `Frame` after every model forward.

    Each forward is a compiled call of its own and its result is brought to the host, so this is for
    watching and debugging, not for speed.
    """
    setup, tokens_BL = _jit_setup(
        *_prepare(params, model, prompt_BP, prompt_mask_BP, key, decode, cache)
    )
    return _frames(setup, _jit_begin(setup, tokens_BL))


def _frames(setup: Setup, state: DecodeState) -> Iterator[Frame]:
    variants = setup.method.variants(setup.geo)
    while unfinished(setup, state):
        step_index = int(state.nfe)
        state = _jit_step(setup, state, variants[int(state.variant)])
        yield Frame(
            step_index,
            state.tokens_BL,
            state.committed_at_BL,
            state.confidence_BL,
            float(setup.slots[int(state.variant_T[step_index])]),
        )


def _prepare(
    params: Params,
    model: Transformer,
    prompt_BP: ArrayOrNumpy,
    prompt_mask_BP: ArrayOrNumpy | None,
    key: Array,
    decode: DecodeConfig,
    cache: CacheMethod,
    draws: Draws = Draws(),  # noqa: B008 (immutable)
) -> tuple:
    """Checks the arguments and splits them into what is traced and what is static."""
    config = model.config
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
    if draws.order is not None and jnp.shape(draws.order) != (batch, geo.length):
        raise ValueError(
            f"draws.order has shape {jnp.shape(draws.order)}; it must be ({batch}, {geo.length}), "
            "a number per row and position."
        )
    if geo.length > config.max_length:
        raise ValueError(
            f"Prompt and answer have {prompt} + {geo.gen} tokens; the model's context ends at "
            f"{config.max_length}."
        )
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
    return (
        params,
        jnp.asarray(prompt_BP, jnp.int32),
        jnp.asarray(prompt_mask_BP, bool),
        key,
        numbers,
        draws,
        model,
        static,
        cache,
    )


def _check_state(state: DecodeState, record: tuple[str, ...], args: tuple) -> None:
    """Refuses a state that cannot be of the call with these arguments."""
    kept = dict(computed=state.computed_TBL, computed_layers=state.layer_sets)
    for name, records in kept.items():
        if name in record and records is None:
            raise ValueError(
                f"record holds {name!r}, which the state lacks; the interrupted call must record "
                "it as well."
            )
    recorded = tuple(name for name, records in kept.items() if records is not None)
    traced, static = args[:6], args[6:]
    wanted = jax.eval_shape(lambda traced: begin(*_setup(*traced, *static), recorded), traced)

    def shapes(state: DecodeState) -> tuple:
        leaves, structure = jax.tree.flatten(state)
        return structure, [(jnp.shape(leaf), leaf.dtype) for leaf in leaves]

    _, prompt_BP, *_ = traced
    tokens_BL, concrete = state.tokens_BL, not isinstance(prompt_BP, Tracer)
    concrete = concrete and not isinstance(tokens_BL, Tracer) and not static[1].infill
    other = shapes(state) != shapes(wanted)
    if other or (concrete and (tokens_BL[:, : prompt_BP.shape[1]] != prompt_BP).any()):
        raise ValueError(
            "The state is not of this generation; resume with the prompt, the decoding and the "
            "cache of the interrupted call."
        )


def _setup(
    params: Params,
    prompt_BP: Array,
    prompt_mask_BP: Array,
    key: Array,
    numbers: Numbers,
    draws: Draws,
    model: Transformer,
    decode: DecodeConfig,
    method: CacheMethod,
) -> tuple[Setup, Int[Array, "B L"]]:
    """The constants of a generation, and its first canvas: the prompt, then masks."""
    batch, prompt = prompt_BP.shape
    geo = decode.geometry(prompt=prompt, shift=model.config.shift)
    if key.ndim == 0:
        key = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(batch))
    masks_BG = jnp.full((batch, geo.gen), model.config.mask_id, jnp.int32)
    setup = Setup(
        model=model,
        decode=decode,
        method=method,
        geo=geo,
        params=params,
        valid_BL=jnp.concatenate([prompt_mask_BP, jnp.ones_like(masks_BG, bool)], axis=1),
        key_B=key,
        order_BL=None if draws.order is None else jnp.asarray(draws.order, jnp.float32),
        numbers=numbers,
    )
    if setup.order_BL is None:
        setup = dataclasses.replace(setup, order_BL=draw_order(setup))
    return setup, jnp.concatenate([prompt_BP, masks_BG], axis=1)


@functools.partial(jax.jit, static_argnames=("model", "decode", "method", "record", "driver"))
def _generate(
    params: Params,
    prompt_BP: Array,
    prompt_mask_BP: Array,
    key: Array,
    numbers: Numbers,
    draws: Draws,
    model: Transformer,
    decode: DecodeConfig,
    method: CacheMethod,
    *,
    record: tuple[str, ...],
    state: DecodeState | None = None,
    driver: str | None = None,
) -> GenerateOutput:
    setup, tokens_BL = _setup(
        params, prompt_BP, prompt_mask_BP, key, numbers, draws, model, decode, method
    )
    if state is None:
        state = begin(setup, tokens_BL, record)
    elif setup.fixed_length:
        driver = "while"  # how many forwards are left depends on the state
    variants = method.variants(setup.geo)
    if driver is None:
        driver = "scan" if setup.fixed_length and len(variants) == 1 else "while"
    state = _DRIVERS[driver](setup, state, variants)
    ran_T = state.variant_T >= 0
    slots_T = jnp.where(ran_T, jnp.asarray(setup.slots)[state.variant_T], 0.0)
    frames = None
    if "history" in record:
        frames = history.frames(
            state.tokens_BL,
            state.committed_at_BL,
            mask_id=model.config.mask_id,
            forwards=setup.most_forwards,
        )
    return GenerateOutput(
        tokens=state.tokens_BL,
        committed_at=state.committed_at_BL,
        confidence=state.confidence_BL,
        nfe=state.nfe,
        history=frames,
        positions_asked=state.asked_TB,
        positions_computed=jnp.broadcast_to(slots_T[:, None], state.asked_TB.shape),
        variant=state.variant_T,
        computed=state.computed_TBL,
        computed_layers=(None if state.layer_sets is None else jnp.stack(state.layer_sets, axis=2)),
        state=state if "state" in record else None,
    )


def _scan(setup: Setup, state: DecodeState, variants: tuple[Variant, ...]) -> DecodeState:
    """Every step has the same shape and their number is known."""
    (variant,) = variants
    state, _ = jax.lax.scan(
        lambda state, _: (step(setup, state, variant), None), state, length=setup.most_forwards
    )
    return state


def _while(setup: Setup, state: DecodeState, variants: tuple[Variant, ...]) -> DecodeState:
    """Until all rows are done; an inner loop per step shape, so that no branch copies the cache."""

    def sweep(state: DecodeState) -> DecodeState:
        for i, variant in enumerate(variants):
            state = jax.lax.while_loop(
                lambda state, i=i: unfinished(setup, state) & (state.variant == i),
                functools.partial(step, setup, variant=variant),
                state,
            )
        return state

    return jax.lax.while_loop(functools.partial(unfinished, setup), sweep, state)


_DRIVERS = {"scan": _scan, "while": _while}


_jit_setup = jax.jit(_setup, static_argnames=("model", "decode", "method"))
_jit_begin = jax.jit(begin)
_jit_step = jax.jit(step, static_argnames=("variant",))
