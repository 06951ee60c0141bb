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
from jax.core import Tracer

from dlm_jax.cache.base import CacheMethod, Variant
from dlm_jax.cache.none import NoCache
from dlm_jax.decoding import history
from dlm_jax.decoding.arguments import Call, prepare
from dlm_jax.decoding.canvas import unfinished
from dlm_jax.decoding.config import DecodeConfig
from dlm_jax.decoding.state import DecodeState, Draws, LogitsProcessor, Setup, draw_order
from dlm_jax.decoding.step import begin, step
from dlm_jax.models.base import Transformer, lay_out
from dlm_jax.typing import Array, ArrayOrNumpy, Bool, Float, Int, Params, PyTree

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
    """Model forwards of the batch."""
    steps: Int[Array, " B"]
    """Forwards in which the row had something to fill."""
    history: Int[Array, "T B L"] | None
    """The canvas after every forward, if recorded; the first `nfe` entries are meaningful."""
    positions_asked: Float[Array, "T B"]
    """Positions that the cache method asked for in every forward, mean over the layers."""
    positions_computed: Float[Array, "T B"]
    """Query slots that were computed for them, padding included, mean over the layers; also those
    that wide forwards spare a row because it is done, or begins like another one."""
    variant: Int[Array, " T"]
    """Which of the cache method's step shapes every forward had; -1 where there was none."""
    computed: Bool[Array, "T B L"] | None
    """The positions that entered the network in every forward, if recorded."""
    computed_layers: Bool[Array, "T B layers L"] | None
    """The positions whose queries each layer computed, if recorded."""
    state: DecodeState | None
    """From which `diffusion_generate(state=...)` goes on, if recorded: a pytree of arrays."""

    @property
    def tokens_per_forward(self) -> Float[Array, " B"]:
        """Tokens that each row committed, per forward in which it had something to fill."""
        committed_B = jnp.sum(self.committed_at >= 0, axis=-1, dtype=jnp.float32)
        return committed_B / jnp.maximum(self.steps, 1).astype(jnp.float32)


class Frame(NamedTuple):
    """The canvas after one forward of `diffusion_stream`; fields as in `GenerateOutput`."""

    step: int
    tokens: Int[Array, "B L"]
    committed_at: Int[Array, "B L"]
    confidence: Float[Array, "B L"]
    positions_computed: float
    """Of this forward, per row."""
    steps: Int[Array, " B"]
    """Forwards so far in which the row had something to fill."""


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
    logits_processor: LogitsProcessor | None = None,
    token_freq: ArrayOrNumpy | None = None,
    state: DecodeState | None = None,
) -> GenerateOutput:
    """Generates `decode.gen_length` tokens after each prompt, in one compiled program.

    Composes with `jit`, `vmap` and sharded parameters; `model`, `decode`, `cache`, `record` and
    `logits_processor` are static. A batch that is sharded over devices becomes what it should, but
    every device computes all of its wide forwards; `jax.shard_map`, with one key per row, splits
    them.

    Args:
      params: parameters of `model`; the forward runs in their dtype.
      model: the network.
      prompt_BP: integer token ids [B, P], left-padded to a common length. Rows do not influence
        each other.
      prompt_mask_BP: bool [B, P], False at padding; None if there is none.
      key: one PRNG key, or one per row [B]. Used at temperature > 0 and for random choices of
        positions only; a row's noise depends on its key, its denoising step and the position, not
        on its neighbours.
      decode: decoding configuration.
      cache: cache method.
      record: names out of `RECORDS`; what is not asked for costs nothing.
      draws: random choices to use instead of those that `key` gives.
      logits_processor: a jittable function `(tokens, logits, step) -> logits`, called in every
        forward before anything is sampled: int [B, L] the canvas, float32 [B, W, V] what the model
        says about W positions, int [] the number of the forward. If it has a fourth parameter named
        `positions`, that gets int [B, W] the slots of the logits, L at unused entries. Pass the
        same function object again where nothing is to be compiled anew.
      token_freq: share of each token in a corpus, float [V], as `tokenizer.frequencies` reads it:
        confidences are then debiased, so that common tokens count for less (PC-Sampler,
        arXiv 2508.13021). For algorithms whose confidence is a probability.
      state: goes on from `GenerateOutput.state` of an earlier call with the same arguments
        (`decode.max_forwards` apart, which counts from the start of the generation); the result is
        that of one uninterrupted call.

    Raises:
      ValueError: shapes or settings that do not fit; one sentence says what would be right.
    """
    call = prepare(
        params,
        model,
        prompt_BP,
        prompt_mask_BP,
        key,
        decode,
        cache,
        draws,
        logits_processor,
        token_freq,
    )
    for name in [record] if isinstance(record, str) else record:
        if isinstance(record, str) or name not in RECORDS:
            raise ValueError(
                f"record is {record!r}; it must be a tuple of names among {', '.join(RECORDS)}."
            )
    if state is not None:
        _check_state(state, record, call)
    return _generate(call, state, record=tuple(sorted(record)))


def diffusion_stream(
    params: Params,
    model: Transformer,
    prompt_BP: ArrayOrNumpy,
    prompt_mask_BP: ArrayOrNumpy | None = None,
    *,
    key: Array,
    decode: DecodeConfig,
    cache: CacheMethod = NoCache(),  # noqa: B008 (immutable)
    logits_processor: LogitsProcessor | None = None,
    token_freq: ArrayOrNumpy | None = None,
) -> Iterator[Frame]:
    """The same generation as `diffusion_generate`, one `Frame` after every model forward.

    Each forward is a compiled call of its own and its result is brought to the host, so this is for
    watching and debugging, not for speed.
    """
    call = prepare(
        params,
        model,
        prompt_BP,
        prompt_mask_BP,
        key,
        decode,
        cache,
        Draws(),
        logits_processor,
        token_freq,
    )
    setup, tokens_BL = _jit_setup(call)
    return _frames(setup, _jit_begin(setup, tokens_BL))


def _frames(setup: Setup, state: DecodeState) -> Iterator[Frame]:
    variants = setup.method.variants(setup.geo)
    while unfinished(setup, state):
        step_index = int(state.nfe)
        cache, state = state.cache, state._replace(cache=())
        state = _jit_step(setup, state, cache, variants[int(state.variant)])
        yield Frame(
            step_index,
            state.tokens_BL,
            state.committed_at_BL,
            state.confidence_BL,
            float(setup.widths[int(state.variant_T[step_index])]),
            state.step_B,
        )


def _check_state(state: DecodeState, record: tuple[str, ...], call: Call) -> None:
    """Refuses a state that cannot be of the call with these arguments."""
    kept = dict(computed=state.computed_TBL, computed_layers=state.layer_sets)
    if call.decode.strategy == "wino":  # whose history no later state can tell
        kept["history"] = state.canvas_TBL
    for name, records in kept.items():
        if name in record and records is None:
            raise ValueError(
                f"record holds {name!r}, which the state lacks; the interrupted call must record "
                "it as well."
            )
    recorded = tuple(name for name, records in kept.items() if records is not None)
    wanted = jax.eval_shape(lambda call: begin(*_setup(call), recorded), call)

    def shapes(state: DecodeState) -> tuple:
        leaves, structure = jax.tree.flatten(state)
        return structure, [(jnp.shape(leaf), leaf.dtype) for leaf in leaves]

    tokens_BL, prompt_BP = state.tokens_BL, call.prompt_BP
    concrete = not any(isinstance(given, Tracer) for given in (tokens_BL, prompt_BP))
    concrete = concrete and not call.decode.infill
    other = shapes(state) != shapes(wanted)
    if other or (concrete and (tokens_BL[:, : prompt_BP.shape[1]] != prompt_BP).any()):
        raise ValueError(
            "The state is not of this generation; resume with the prompt, the decoding and the "
            "cache of the interrupted call."
        )


def _setup(call: Call) -> tuple[Setup, Int[Array, "B L"]]:
    """The constants of a generation, and its first canvas: the prompt, then masks."""
    batch, prompt = call.prompt_BP.shape
    geo = call.decode.geometry(prompt=prompt, shift=call.model.config.shift)
    key = call.key
    if key.ndim == 0:
        key = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(batch))
    masks_BG = jnp.full((batch, geo.gen), call.model.config.mask_id, jnp.int32)
    valid_BL = jnp.concatenate([call.mask_BP, jnp.ones_like(masks_BG, bool)], axis=1)
    setup = Setup(
        model=call.model,
        decode=call.decode,
        method=call.method,
        geo=geo,
        logits_processor=call.logits_processor,
        params=call.params,
        slots=lay_out(call.model.config, valid_BL),
        key_B=key,
        draws=call.draws,
        numbers=call.numbers,
        token_freq_V=call.token_freq_V,
    )
    if call.draws.order is None:
        setup = dataclasses.replace(setup, draws=call.draws._replace(order=draw_order(setup)))
    return setup, jnp.concatenate([call.prompt_BP, masks_BG], axis=1)


@functools.partial(jax.jit, static_argnames=("record", "driver"))
def _generate(
    call: Call,
    state: DecodeState | None = None,
    *,
    record: tuple[str, ...],
    driver: str | None = None,
) -> GenerateOutput:
    setup, tokens_BL = _setup(call)
    if state is None:
        state = begin(setup, tokens_BL, record)
    elif setup.fixed_length:
        driver = "while"  # how many forwards are left depends on the state
    variants = setup.method.variants(setup.geo)
    if driver is None:
        driver = "scan" if setup.fixed_length and len(variants) == 1 else "while"
    state = _DRIVERS[driver](setup, state, variants)
    ran_T = state.variant_T >= 0
    slots_T = jnp.where(ran_T, jnp.asarray(setup.widths)[state.variant_T], 0.0)
    frames = state.canvas_TBL
    if "history" in record and frames is None:
        frames = history.frames(
            state.tokens_BL,
            state.committed_at_BL,
            mask_id=setup.model.config.mask_id,
            forwards=setup.most_forwards,
        )
    return GenerateOutput(
        tokens=state.tokens_BL,
        committed_at=state.committed_at_BL,
        confidence=state.confidence_BL,
        nfe=state.nfe,
        steps=state.step_B,
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


_jit_setup = jax.jit(_setup)
_jit_begin = jax.jit(begin)


@functools.partial(jax.jit, static_argnames=("variant",), donate_argnames=("cache",))
def _jit_step(setup: Setup, state: DecodeState, cache: PyTree, variant: Variant) -> DecodeState:
    """`step`, which writes into the cache where it lies; frames hold on to the rest of a state."""
    return step(setup, state._replace(cache=cache), variant)
