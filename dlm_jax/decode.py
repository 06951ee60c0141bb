"""Generation: checks the arguments, makes the first canvas, and repeats the denoising step.

All drivers call the same `step.step`: `lax.scan` where the number of forwards is known,
`lax.while_loop` where it depends on data, Python where somebody wants to watch
(`diffusion_stream`).
"""

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
from dlm_jax.step import DecodeState, Setup, begin, finished, step
from dlm_jax.typing import Array, ArrayOrNumpy, Bool, Float, Int, Params

RECORDS = ("computed", "history")
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
    computed: Bool[Array, "T B L"] | None
    """The positions that entered the network in every forward, if recorded."""


class Frame(NamedTuple):
    """The canvas after one forward of `diffusion_stream`; fields as in `GenerateOutput`."""

    step: int
    tokens: Int[Array, "B L"]
    committed_at: Int[Array, "B L"]
    confidence: Float[Array, "B L"]


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
      key: one PRNG key, or one per row [B]. Used at temperature > 0 only; a row's noise depends on
        its key, its denoising step and the position, not on its neighbours.
      decode: decoding configuration.
      cache: cache method.
      record: names out of `RECORDS`; what is not asked for costs nothing.

    Raises:
      ValueError: shapes or settings that do not fit; one sentence says what would be right.
    """
    args = _prepare(params, model, prompt_BP, prompt_mask_BP, key, decode, cache)
    for name in record:
        if name not in RECORDS:
            raise ValueError(f"record holds {name!r}; it must be among {', '.join(RECORDS)}.")
    return _generate(*args, record=tuple(sorted(record)))


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
    for step_index in range(setup.max_forwards):
        if finished(setup, state):
            return
        state = _jit_step(setup, state, variants[int(state.variant)])
        yield Frame(step_index, state.tokens_BL, state.committed_at_BL, state.confidence_BL)


def _prepare(
    params: Params,
    model: Transformer,
    prompt_BP: ArrayOrNumpy,
    prompt_mask_BP: ArrayOrNumpy | None,
    key: Array,
    decode: DecodeConfig,
    cache: CacheMethod,
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
    geo = decode.geometry(prompt=prompt, shift=config.shift)
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
        model,
        static,
        cache,
    )


def _setup(
    params: Params,
    prompt_BP: Array,
    prompt_mask_BP: Array,
    key: Array,
    numbers: Numbers,
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
        numbers=numbers,
    )
    return setup, jnp.concatenate([prompt_BP, masks_BG], axis=1)


@functools.partial(jax.jit, static_argnames=("model", "decode", "method", "record", "driver"))
def _generate(
    params: Params,
    prompt_BP: Array,
    prompt_mask_BP: Array,
    key: Array,
    numbers: Numbers,
    model: Transformer,
    decode: DecodeConfig,
    method: CacheMethod,
    *,
    record: tuple[str, ...],
    driver: str | None = None,
) -> GenerateOutput:
    setup, tokens_BL = _setup(
        params, prompt_BP, prompt_mask_BP, key, numbers, model, decode, method
    )
    state = begin(setup, tokens_BL, record)
    variants = method.variants(setup.geo)
    if driver is None:
        driver = "scan" if setup.fixed_length and len(variants) == 1 else "while"
    state = _DRIVERS[driver](setup, state, variants)
    frames = None
    if "history" in record:
        frames = history.frames(
            state.tokens_BL,
            state.committed_at_BL,
            mask_id=model.config.mask_id,
            forwards=setup.max_forwards,
        )
    return GenerateOutput(
        tokens=state.tokens_BL,
        committed_at=state.committed_at_BL,
        confidence=state.confidence_BL,
        nfe=state.nfe,
        history=frames,
        computed=state.computed_TBL,
    )


def _scan(setup: Setup, state: DecodeState, variants: tuple[Variant, ...]) -> DecodeState:
    """Every step has the same shape and their number is known."""
    (variant,) = variants
    state, _ = jax.lax.scan(
        lambda state, _: (step(setup, state, variant), None), state, length=setup.max_forwards
    )
    return state


def _while(setup: Setup, state: DecodeState, variants: tuple[Variant, ...]) -> DecodeState:
    """Until all rows are done; an inner loop per step shape, so that no branch copies the cache."""

    def unfinished(state: DecodeState) -> Bool[Array, ""]:
        return ~finished(setup, state) & (state.nfe < setup.max_forwards)

    def sweep(state: DecodeState) -> DecodeState:
        for i, variant in enumerate(variants):
            state = jax.lax.while_loop(
                lambda state, i=i: unfinished(state) & (state.variant == i),
                functools.partial(step, setup, variant=variant),
                state,
            )
        return state

    return jax.lax.while_loop(unfinished, sweep, state)


_DRIVERS = {"scan": _scan, "while": _while}


_jit_setup = jax.jit(_setup, static_argnames=("model", "decode", "method"))
_jit_begin = jax.jit(begin)
_jit_step = jax.jit(step, static_argnames=("variant",))
