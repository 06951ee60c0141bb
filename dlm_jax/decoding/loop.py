"""Generation: makes the first state, and repeats the denoising step.

All drivers call the same `step.step`: nested `lax.scan`s where it is known which step shapes come
after one another (`cache/runs.py`), `lax.while_loop`s where that depends on data, Python where
somebody wants to watch (`diffusion_stream`).
"""

import functools
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.core import Tracer

from dlm_jax.cache.base import CacheMethod, StepShape
from dlm_jax.cache.none import NoCache
from dlm_jax.cache.runs import Plan, Repeat, Run
from dlm_jax.decoding import history
from dlm_jax.decoding.config import DecodeConfig
from dlm_jax.decoding.progress import unfinished
from dlm_jax.decoding.start import begin, prepare, start
from dlm_jax.decoding.state import DecodeState, Draws, LogitsProcessor, Setup
from dlm_jax.decoding.step import step
from dlm_jax.models.base import Transformer
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
    not_finite_at: Int[Array, " B"]
    """The first forward in which a prediction for the row was made of a NaN, or of infinite logits
    only or at best, as float16 overflow makes them: its tokens are then meaningless. -1 if none
    was."""
    history: Int[Array, "T B L"] | None
    """The canvas after every forward, if recorded; the first `nfe` entries are meaningful."""
    positions_asked: Float[Array, "T B"]
    """Positions that the cache method asked for in every forward, mean over the layers."""
    positions_computed: Float[Array, "T B"]
    """Query slots that were computed for them, padding included, mean over the layers; also those
    that wide forwards spare a row because it is done, or begins like another one."""
    shape: Int[Array, " T"]
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
    not_finite_at: Int[Array, " B"]


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

    Composes with `jit`, `vmap` and sharded parameters; `model`, `cache`, `record`,
    `logits_processor` and the structure of `decode` are static. A batch that is sharded over
    devices becomes what it should, but every device computes all of its wide forwards;
    `jax.shard_map`, with one key per row, splits them.

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
    for name in [record] if isinstance(record, str) else record:
        if isinstance(record, str) or name not in RECORDS:
            raise ValueError(
                f"record is {record!r}; it must be a tuple of names among {', '.join(RECORDS)}."
            )
    if state is not None:
        _check_state(state, record, setup, tokens_BL)
    return _generate(setup, tokens_BL, state, record=tuple(sorted(record)))


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
    return frames(
        *start(
            params,
            model,
            prompt_BP,
            prompt_mask_BP,
            key=key,
            decode=decode,
            cache=cache,
            logits_processor=logits_processor,
            token_freq=token_freq,
        )
    )


def frames(setup: Setup, state: DecodeState) -> Iterator[Frame]:
    """The frames that follow a state of `start`, which keeps its cache no longer."""
    shapes = setup.method.step_shapes(setup.geo)
    while unfinished(setup, state):
        step_index = int(state.nfe)
        shape = int(state.shape)
        cache, state = state.cache, state._replace(cache=())
        state = _jit_step(setup, state, cache, shapes[shape])
        yield Frame(
            step_index,
            state.rows.tokens_BL,
            state.committed_at_BL,
            state.confidence_BL,
            float(setup.widths[shape]),
            state.rows.step_B,
            state.not_finite_at_B,
        )


def warm(setup: Setup, state: DecodeState) -> None:
    """Compiles what `frames` needs, every step shape of it, by making each step once in vain."""
    jax.block_until_ready(unfinished(setup, state))
    for shape in setup.method.step_shapes(setup.geo):
        copied = jax.tree.map(jnp.copy, state.cache)
        jax.block_until_ready(_jit_step(setup, state._replace(cache=()), copied, shape))


def _check_state(
    state: DecodeState, record: tuple[str, ...], setup: Setup, tokens_BL: Int[Array, "B L"]
) -> None:
    """Refuses a state that cannot be of the call with these arguments."""
    kept = dict(computed=state.computed_TBL, computed_layers=state.layer_sets)
    if setup.strategy.revokes:  # a history that no later state can tell
        kept["history"] = state.canvas_TBL
    for name, records in kept.items():
        if name in record and records is None:
            raise ValueError(
                f"record holds {name!r}, which the state lacks; the interrupted call must record "
                "it as well."
            )
    recorded = tuple(name for name, records in kept.items() if records is not None)
    wanted = jax.eval_shape(functools.partial(begin, record=recorded), setup, tokens_BL)

    def shapes(state: DecodeState) -> tuple:
        leaves, structure = jax.tree.flatten(state)
        return structure, [(jnp.shape(leaf), leaf.dtype) for leaf in leaves]

    begun_BL, prompt = state.rows.tokens_BL, setup.geo.prompt
    concrete = not any(isinstance(given, Tracer) for given in (begun_BL, tokens_BL))
    concrete = concrete and not setup.decode.infill
    other = shapes(state) != shapes(wanted)
    if other or (concrete and (begun_BL[:, :prompt] != tokens_BL[:, :prompt]).any()):
        raise ValueError(
            "The state is not of this generation; resume with the prompt, the decoding, the cache "
            "and the attention of the interrupted call."
        )


@functools.partial(jax.jit, static_argnames=("record", "planned"))
def _generate(
    setup: Setup,
    tokens_BL: Int[Array, "B L"],
    state: DecodeState | None = None,
    *,
    record: tuple[str, ...],
    planned: bool = True,
) -> GenerateOutput:
    if state is None:
        state = begin(setup, tokens_BL, record)
    else:
        planned = False  # how many forwards are left depends on the state
    shapes = setup.method.step_shapes(setup.geo)
    if planned and setup.plan:
        state = _planned(setup, state, shapes, setup.plan)
    else:
        state = _while(setup, state, shapes)
    ran_T = state.shape_T >= 0
    slots_T = jnp.where(ran_T, jnp.asarray(setup.widths)[state.shape_T], 0.0)
    canvas_TBL = state.canvas_TBL
    if "history" in record and canvas_TBL is None:
        canvas_TBL = history.rebuild(
            state.rows.tokens_BL,
            state.committed_at_BL,
            mask_id=setup.model.config.mask_id,
            forwards=setup.most_forwards,
        )
    return GenerateOutput(
        tokens=state.rows.tokens_BL,
        committed_at=state.committed_at_BL,
        confidence=state.confidence_BL,
        nfe=state.nfe,
        steps=state.rows.step_B,
        not_finite_at=state.not_finite_at_B,
        history=canvas_TBL,
        positions_asked=state.asked_TB,
        positions_computed=jnp.broadcast_to(slots_T[:, None], state.asked_TB.shape),
        shape=state.shape_T,
        computed=state.computed_TBL,
        computed_layers=(None if state.layer_sets is None else jnp.stack(state.layer_sets, axis=2)),
        state=state if "state" in record else None,
    )


def _planned(
    setup: Setup, state: DecodeState, shapes: tuple[StepShape, ...], plan: Plan
) -> DecodeState:
    """A loop of known length per part of the plan."""

    def turn(part: Run | Repeat, state: DecodeState, _: None) -> tuple[DecodeState, None]:
        if isinstance(part, Repeat):
            return _planned(setup, state, shapes, part.parts), None
        state = state._replace(shape=jnp.int32(part.shape))
        return step(setup, state, shapes[part.shape]), None

    for part in plan:
        state, _ = jax.lax.scan(functools.partial(turn, part), state, length=part.count)
    return state


def _while(setup: Setup, state: DecodeState, shapes: tuple[StepShape, ...]) -> DecodeState:
    """Until all rows are done; an inner loop per step shape, so that no branch copies the cache."""

    def sweep(state: DecodeState) -> DecodeState:
        for i, shape in enumerate(shapes):
            state = jax.lax.while_loop(
                lambda state, i=i: unfinished(setup, state) & (state.shape == i),
                functools.partial(step, setup, shape=shape),
                state,
            )
        return state

    return jax.lax.while_loop(functools.partial(unfinished, setup), sweep, state)


@functools.partial(jax.jit, static_argnames=("shape",), donate_argnames=("cache",))
def _jit_step(setup: Setup, state: DecodeState, cache: PyTree, shape: StepShape) -> DecodeState:
    """`step`, which writes into the cache where it lies; frames hold on to the rest of a state."""
    return step(setup, state._replace(cache=cache), shape)
