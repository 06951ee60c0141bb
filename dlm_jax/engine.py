"""Rows of token ids in, answers out: decoding compiled once per batch shape, and timed.

The layer between `diffusion_generate`, which wants rectangular arrays, and whoever has prompts of
unequal length: the command, the conversation, an evaluation. Compilation is a step of its own, so
that it can be announced and is never counted as decoding time. A batch may be divided over the
devices of a mesh; a row's answer is the same wherever it is computed.
"""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from dlm_jax import compilation, sharding
from dlm_jax import tokenizer as tokenizer_lib
from dlm_jax.answers import Answer, NotFinite, Result, Snapshot
from dlm_jax.cache import CacheMethod
from dlm_jax.checkpoint import Checkpoint
from dlm_jax.decoding import loop
from dlm_jax.decoding.config import DecodeConfig
from dlm_jax.decoding.loop import diffusion_generate
from dlm_jax.decoding.start import start
from dlm_jax.decoding.state import DecodeState, Setup
from dlm_jax.keys import row_keys
from dlm_jax.models import Config
from dlm_jax.typing import Array, ArrayOrNumpy, Bool, Int, Key, Params


class PromptError(ValueError):
    """A prompt that the model cannot take; one sentence says why."""


def check_rows(
    rows: Sequence[Sequence[int]],
    config: Config,
    decode: DecodeConfig,
    titles: Sequence[str] | None = None,
) -> None:
    """Refuses prompts that the model cannot take.

    Args:
      rows: token ids.
      config: of the model.
      decode: decoding settings.
      titles: what errors call the rows; None names them by their numbers.

    Raises:
      PromptError: names the first row that is empty, too long, holds an id that is not in
        the vocabulary, or a mask that nobody asked to fill.
    """
    for number, row in enumerate(rows, 1):
        which = "The prompt" if len(rows) == 1 else f"Prompt {number}"
        if titles is not None:
            which = titles[number - 1]
        if not row:
            raise PromptError(f"{which} is empty; it must hold at least one token.")
        if min(row) < 0 or max(row) >= config.vocab_size:
            wrong = min(row) if min(row) < 0 else max(row)
            raise PromptError(
                f"{which} holds token id {wrong}; ids must lie in 0 to {config.vocab_size - 1}."
            )
        if config.mask_id in row and not decode.infill:
            raise PromptError(f"{which} holds the mask token, which only infilling replaces.")
        if len(row) > config.room(decode.gen_length):
            raise PromptError(
                f"{which} has {len(row)} tokens, and {decode.gen_length} are to be generated, but "
                f"the model's context ends at {config.max_length}; take a shorter prompt or a "
                "smaller gen_length."
            )


class _Raw(NamedTuple):
    """What results are made of; S is the number of parts that a program divided its rows into."""

    tokens_BL: Any
    committed_at_BL: Any
    steps_B: Any
    not_finite_at_B: Any
    nfe_S: Any
    positions_TB: Any
    history_TBL: Any


class _Batch(NamedTuple):
    """What the rows of a program differ in."""

    ids_BP: Int[ArrayOrNumpy, "B P"]
    mask_BP: Bool[ArrayOrNumpy, "B P"]
    key: Key[Array, "..."]
    """One, or one per row."""


class Engine:
    """A model with its decoding settings, ready for batches of any shape.

    Attributes:
      checkpoint: model, parameters and tokenizer.
      decode: decoding settings; of the vocabulary, what the tokenizer has no token for is unused.
      mesh: the devices that a batch is divided over; None leaves that to the parameters.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        decode: DecodeConfig,
        cache: CacheMethod,
        *,
        token_freq: np.ndarray | None = None,
        history: bool = False,
        progress: Callable[[str], AbstractContextManager[Any]] = contextlib.nullcontext,
        mesh: Mesh | None = None,
    ) -> None:
        """Compiles nothing yet.

        Args:
          checkpoint: see the attributes.
          decode: see the attributes.
          cache: cache method.
          token_freq: see `diffusion_generate`.
          history: whether results hold the frames.
          progress: makes a context around a phase that takes its time, told the phase's name.
          mesh: of `sharding.make_mesh`: the rows of a batch are divided over its axis `data`, the
            network over its axis `model`. Parameters that do not lie on it as
            `sharding.param_shardings` says are copied there.

        Raises:
          ValueError: the mesh has other axes.
        """
        self._islands = [] if mesh is None else sharding.islands(mesh)
        self._params = [checkpoint.params]
        if mesh is not None:
            params = sharding.place(checkpoint.params, checkpoint.config, mesh)
            checkpoint = checkpoint._replace(params=params)
            if checkpoint.attention == "auto" and mesh.shape[sharding.MODEL] > 1:
                # cuDNN's wants queries, keys and values divided alike, and nobody has tried it.
                checkpoint = checkpoint._replace(attention="xla")
            self._params = [sharding.on_island(params, island) for island in self._islands]
        self.checkpoint = checkpoint
        self.decode = _within_tokenizer(decode, checkpoint)
        self.mesh = mesh
        self._cache = cache
        self._token_freq = token_freq
        self._history = history
        self._progress = progress
        self._programs: dict[tuple[tuple[int, ...], ...], list[Any]] = {}
        self._unreported = 0.0
        """Seconds spent on compiling that no result tells yet."""
        self._warm: set[tuple[tuple[int, ...], ...]] = set()
        """Shapes of prompts and keys for which the steps of a watched batch are compiled."""

    @property
    def memory_mib(self) -> float:
        """What the largest program needs on a device so far, parameters included; 0 before any."""
        programs = (program for programs in self._programs.values() for program in programs)
        needs = (compilation.memory_mib(program)["program_mib"] for program in programs)
        return max(needs, default=0.0)

    def run(
        self,
        rows: Sequence[Sequence[int]],
        key: jax.Array,
        draw: Callable[[Snapshot], None] | None = None,
        *,
        shape: tuple[int, int] = (1, 1),
    ) -> Result:
        """Answers all rows as one batch.

        Args:
          rows: token ids of the prompts, of any lengths.
          key: one PRNG key, or one per row; used at temperature > 0 only.
          draw: called after every model forward. The answers are the same with and without it, but
            the forwards are then compiled calls of their own. The time spent in it does not count.
            Not for a batch that is divided over a mesh.
          shape: sequences and prompt slots to which the batch is filled up, with copies that get no
            answer and with padding, so that batches share a program. With `draw` nothing is copied.

        Raises:
          PromptError: see `check_rows`.
          ValueError: `key` is not for so many rows, or `draw` is given with a mesh.
          NotFinite: the model's numbers are NaN or infinite.
        """
        config = self.checkpoint.config
        check_rows(rows, config, self.decode)
        room = config.room(self.decode.gen_length)
        count, slots = shape
        bucket = tokenizer_lib.slots(slots) if slots > 1 else tokenizer_lib.BUCKET
        ids_BP, mask_BP = tokenizer_lib.pad(rows, config.pad_id, bucket=bucket, limit=room)
        if draw is not None:
            return self._stepwise(rows, ids_BP, mask_BP, key, draw)

        given = self._arguments(_Batch(ids_BP, mask_BP, key), count)
        programs, compile_seconds = self._compiled(given), self._unreported
        self._unreported = 0.0
        start = time.perf_counter()
        with self._progress("denoising"):
            parts = sharding.at_once(programs, given)
        return self._gather(parts, rows, compile_seconds, time.perf_counter() - start)

    def reserve(self, shape: tuple[int, int]) -> float:
        """Compiles the program for batches of a shape, with a key per row.

        Args:
          shape: sequences and prompt slots, as in `run`.

        Returns:
          MiB that it needs on a device beside parameters and prompts.
        """
        count, slots = shape
        config = self.checkpoint.config
        row = [config.pad_id] * min(slots, config.room(self.decode.gen_length))
        bucket = tokenizer_lib.slots(slots)
        ids_BP, mask_BP = tokenizer_lib.pad([row], config.pad_id, bucket=bucket, limit=len(row))
        keys = jax.random.split(jax.random.key(0), 1)
        programs = self._compiled(self._arguments(_Batch(ids_BP, mask_BP, keys), count))
        needs = [compilation.memory_mib(program) for program in programs]
        return max(need["program_mib"] - need["arguments_mib"] for need in needs)

    def _compiled(self, given: list[tuple[Params, _Batch]]) -> list[Any]:
        """The programs for such arguments."""
        shapes = tuple(leaf.shape for leaf in given[0][1])
        if shapes not in self._programs:
            start = time.perf_counter()
            with self._progress("compiling"):
                self._programs[shapes] = [
                    self._compile(i, arguments) for i, arguments in enumerate(given)
                ]
            self._unreported += time.perf_counter() - start
        return self._programs[shapes]

    def _arguments(self, batch: _Batch, count: int) -> list[tuple[Params, _Batch]]:
        """What each program is called with: parameters, and some of at least `count` rows."""
        rows = len(batch.ids_BP)
        count = max(rows, count)
        if self.mesh is not None:  # every part has as many
            count += -count % self.mesh.shape[sharding.DATA]
        if count > rows or self.mesh is not None:
            filled = np.minimum(np.arange(count), rows - 1)
            batch = batch._replace(key=row_keys(batch.key, rows))
            batch = jax.tree.map(lambda leaf: leaf[filled], batch)
        if self.mesh is None:
            return [(self._params[0], batch)]
        shares = sharding.split_rows(batch, self._islands)
        return list(zip(self._params, shares, strict=True))

    def _compile(self, i: int, arguments: tuple[Params, _Batch]) -> Any:
        """The program of the island `i`, or the only one."""
        generate = self._generate
        if self.mesh is not None:
            rows, steps = PartitionSpec(sharding.DATA), PartitionSpec(None, sharding.DATA)
            specs = _Raw(rows, rows, rows, rows, rows, steps, steps)
            generate = sharding.over_rows(self._generate, self._islands[i], specs)
        return jax.jit(generate).lower(*arguments).compile(compilation.options())

    def _gather(
        self,
        parts: Sequence[_Raw],
        rows: Sequence[Sequence[int]],
        compile_seconds: float,
        seconds: float,
    ) -> Result:
        """The result of the whole batch, without what was only there to fill its parts."""
        count = len(rows)

        def join(arrays: Sequence[Any], axis: int = 0) -> np.ndarray:
            joined = np.concatenate([np.asarray(array) for array in arrays], axis=axis)
            return joined[:, :count] if axis else joined[:count]

        tokens_BL = join([part.tokens_BL for part in parts])
        committed_at_BL = join([part.committed_at_BL for part in parts])
        each = [len(part.tokens_BL) // len(part.nfe_S) for part in parts]
        nfe_B = join([np.repeat(part.nfe_S, n) for part, n in zip(parts, each, strict=True)])
        nfe = int(nfe_B.max())
        _check_finite(join([part.not_finite_at_B for part in parts]))
        positions_TB = join([part.positions_TB for part in parts], axis=1)[:nfe]
        ran_TB = np.arange(nfe)[:, None] < nfe_B[None]
        frames = None
        if self._history:
            history_TBL = join([part.history_TBL for part in parts], axis=1)[:nfe]
            history_TBL = np.where(ran_TB[:, :, None], history_TBL, tokens_BL[None])
            frames = [self._cut(canvas_BL, rows) for canvas_BL in history_TBL]
        return self._result(
            self._cut(tokens_BL, rows),
            self._cut(committed_at_BL, rows),
            frames,
            nfe,
            positions_TB[ran_TB],
            join([part.steps_B for part in parts]),
            compile_seconds,
            seconds,
        )

    def _stepwise(
        self,
        rows: Sequence[Sequence[int]],
        ids_BP: np.ndarray,
        mask_BP: np.ndarray,
        key: jax.Array,
        draw: Callable[[Snapshot], None],
    ) -> Result:
        if self.mesh is not None:
            raise ValueError(
                "draw is given, but a batch that is divided over a mesh cannot be watched; leave "
                "out one of the two."
            )

        def begin() -> tuple[Setup, DecodeState]:
            return start(
                self.checkpoint.params,
                self.checkpoint.model,
                ids_BP,
                mask_BP,
                key=key,
                decode=self.decode,
                cache=self._cache,
                token_freq=self._token_freq,
            )

        began = time.perf_counter()
        shapes = (ids_BP.shape, key.shape)
        if shapes not in self._warm:
            with self._progress("compiling"):
                loop.warm(*begin())
            self._warm.add(shapes)
        compile_seconds = time.perf_counter() - began
        masks = [self.checkpoint.config.mask_id] * self.decode.gen_length
        ids = [[*row, *masks] if self.decode.infill else masks for row in rows]
        committed_at = [[-1] * len(row) for row in ids]
        frames, positions = [], []
        steps_B = np.zeros(len(rows), int)
        seconds = 0.0
        began = time.perf_counter()
        for frame in loop.frames(*begin()):
            steps_B = np.asarray(frame.steps)
            _check_finite(np.asarray(frame.not_finite_at))
            canvas = (frame.tokens, frame.committed_at, frame.confidence)
            ids, committed_at, confidence = (self._cut(array, rows) for array in canvas)
            frames.append(ids)
            positions.append(frame.positions_computed)
            seconds += time.perf_counter() - began
            pending = [self._pending(row) for row in ids]
            draw(Snapshot(frame.step, ids, committed_at, confidence, pending))
            began = time.perf_counter()
        return self._result(
            ids,
            committed_at,
            frames if self._history else None,
            len(positions),
            np.asarray(positions),
            steps_B,
            compile_seconds,
            seconds,
        )

    def _generate(self, params: Params, batch: _Batch) -> _Raw:
        out = diffusion_generate(
            params,
            self.checkpoint.model,
            batch.ids_BP,
            batch.mask_BP,
            key=batch.key,
            decode=self.decode,
            cache=self._cache,
            token_freq=self._token_freq,
            record=("history",) if self._history else (),
        )
        return _Raw(
            out.tokens,
            out.committed_at,
            out.steps,
            out.not_finite_at,
            out.nfe[None],
            out.positions_computed,
            out.history,
        )

    def text(self, answer: Answer, stops: Sequence[str] = ()) -> str | None:
        """The text of an answer up to its end or a stop text, which may be a special token.

        What was given is part of the text of an infilled row, and is never cut: a stop text that is
        at least partly in what was filled ends the part that was filled there.

        Returns:
          The text, without masks; None without a tokenizer.
        """
        if not stops or answer.text is None:
            return answer.text
        return self._text(answer.ids, answer.committed_at, stops)

    def _text(
        self, ids: Sequence[int], committed_at: Sequence[int], stops: Sequence[str] = ()
    ) -> str | None:
        if self.checkpoint.tokenizer is None:
            return None
        mask_id = self.checkpoint.config.mask_id
        kept = zip(self._until_end(ids), committed_at, strict=False)
        shown = [(token, step >= 0) for token, step in kept if token != mask_id]
        tokens, filled = [token for token, _ in shown], [new for _, new in shown]
        return tokenizer_lib.answer_text(self.checkpoint.tokenizer, tokens, stops, filled)

    def _cut(self, array_BL: Any, rows: Sequence[Sequence[int]]) -> list[list[Any]]:
        """What is new in each row, as lists: what was generated, with infilling all but padding."""
        array_BL = np.asarray(array_BL)
        prompt = array_BL.shape[1] - self.decode.gen_length
        shown = [len(row) if self.decode.infill else 0 for row in rows]
        return [array_BL[i, prompt - count :].tolist() for i, count in enumerate(shown)]

    def _pending(self, ids: Sequence[int]) -> int:
        """Masks among the ids of an answer that the decoding would go on to fill."""
        if self.decode.stop_until_eos:
            ids = self._until_end(ids)
        return list(ids).count(self.checkpoint.config.mask_id)

    def _until_end(self, ids: Sequence[int]) -> Sequence[int]:
        """The ids of an answer up to its end; a prompt may hold ends of text that were given."""
        given = len(ids) - self.decode.gen_length if self.decode.infill else 0
        ends = self.decode.ends_of_text(self.checkpoint.config)
        return [*ids[:given], *tokenizer_lib.until_eos(ids[given:], ends)]

    def _result(
        self,
        ids: list[list[int]],
        committed_at: list[list[int]],
        frames: list[list[list[int]]] | None,
        nfe: int,
        positions: np.ndarray,
        steps_B: np.ndarray,
        compile_seconds: float,
        seconds: float,
    ) -> Result:
        committed_B = np.array([sum(step >= 0 for step in row) for row in committed_at])
        answers = zip(ids, committed_at, steps_B.tolist(), strict=True)
        return Result(
            answers=[self._answer(*row) for row in answers],
            frames=frames,
            nfe=nfe,
            positions=float(positions.mean()) if len(positions) else 0.0,
            tokens_per_forward=float((committed_B / np.maximum(steps_B, 1)).mean()),
            compile_seconds=compile_seconds,
            seconds=seconds,
        )

    def _answer(self, ids: list[int], committed_at: list[int], forwards: int) -> Answer:
        kept = self._until_end(ids)
        return Answer(
            ids=ids,
            committed_at=committed_at,
            text=self._text(ids, committed_at),
            tokens=sum(step >= 0 for step in committed_at[: len(kept)]),
            masks=list(kept).count(self.checkpoint.config.mask_id),
            forwards=forwards,
            last_forward=1 + max(committed_at[: len(kept)], default=-1),
        )


def _within_tokenizer(decode: DecodeConfig, checkpoint: Checkpoint) -> DecodeConfig:
    """The same, and ids that the tokenizer has no token for are never predicted."""
    if checkpoint.tokenizer is None:
        return decode
    config = checkpoint.config
    needed = (config.mask_id, *decode.ends_of_text(config))
    unused = tokenizer_lib.unused(checkpoint.tokenizer, config.vocab_size, needed)
    return dataclasses.replace(decode, unused=(*decode.unused, *unused)) if unused else decode


def _check_finite(not_finite_at_B: np.ndarray) -> None:
    """Raises `NotFinite`, which tells of the first row whose numbers were not."""
    for row, forward in enumerate(not_finite_at_B.tolist(), 1):
        if forward >= 0:
            which = "" if len(not_finite_at_B) == 1 else f" of row {row}"
            raise NotFinite(f"in forward {forward + 1}{which}")
