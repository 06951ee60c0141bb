"""Rows of token ids in, answers out: decoding compiled once per batch shape, and timed.

The layer between `diffusion_generate`, which wants rectangular arrays, and whoever has prompts of
unequal length: the command, the conversation, an evaluation. Compilation is a step of its own, so
that it can be announced and is never counted as decoding time.
"""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import jax
import numpy as np

from dlm_jax import tokenizer as tokenizer_lib
from dlm_jax.cache import CacheMethod
from dlm_jax.checkpoint import Checkpoint
from dlm_jax.config import DecodeConfig
from dlm_jax.decode import Frame, diffusion_generate, diffusion_stream
from dlm_jax.models import Config


@dataclasses.dataclass(frozen=True)
class Answer:
    """What became of one prompt.

    Attributes:
      ids: the generated token ids; with infilling the whole row, prompt included. What was not
        filled in the end is a mask.
      committed_at: model forward in which each of `ids` was committed; -1 if it was given, or is
        still a mask.
      text: `ids` up to the end of the answer as text, without masks; None without a tokenizer.
      tokens: number of generated tokens up to the end of the answer.
      masks: number of masks that were left there.
    """

    ids: list[int]
    committed_at: list[int]
    text: str | None
    tokens: int
    masks: int


@dataclasses.dataclass(frozen=True)
class Result:
    """A finished batch.

    Attributes:
      answers: one per prompt.
      frames: `[step][row]` the ids after every model forward, over the same positions as
        `Answer.ids`; None unless asked for.
      nfe: model forwards.
      positions: positions that a forward computed per row, mean over the forwards.
      tokens_per_forward: tokens that a row committed in each forward in which it had something to
        fill, those behind the end of the answer included; mean over the rows.
      compile_seconds: time spent on tracing and compiling; 0 if the program was there already.
      seconds: time spent on decoding.
    """

    answers: list[Answer]
    frames: list[list[list[int]]] | None
    nfe: int
    positions: float
    tokens_per_forward: float
    compile_seconds: float
    seconds: float

    @property
    def tokens(self) -> int:
        return sum(answer.tokens for answer in self.answers)

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds if self.seconds > 0 else 0.0


class PromptError(ValueError):
    """A prompt that the model cannot take; one sentence says why."""


class Snapshot(NamedTuple):
    """The canvas after one model forward: per row and position the id, when and how surely."""

    step: int
    ids: list[list[int]]
    committed_at: list[list[int]]
    confidence: list[list[float]]
    pending: list[int]
    """Masks of each row that are still to be filled."""


def check_rows(rows: Sequence[Sequence[int]], config: Config, decode: DecodeConfig) -> None:
    """Refuses prompts that the model cannot take.

    Raises:
      PromptError: names the first row that is empty, too long, holds an id that is not in
        the vocabulary, or a mask that nobody asked to fill.
    """
    for number, row in enumerate(rows, 1):
        which = "The prompt" if len(rows) == 1 else f"Prompt {number}"
        if not row:
            raise PromptError(f"{which} is empty; it must hold at least one token.")
        if min(row) < 0 or max(row) >= config.vocab_size:
            wrong = min(row) if min(row) < 0 else max(row)
            raise PromptError(
                f"{which} holds token id {wrong}; ids must lie in 0 to {config.vocab_size - 1}."
            )
        if config.mask_id in row and not decode.infill:
            raise PromptError(f"{which} holds the mask token, which only infilling replaces.")
        if len(row) + decode.gen_length > config.max_length:
            raise PromptError(
                f"{which} has {len(row)} tokens, and {decode.gen_length} are to be generated, but "
                f"the model's context ends at {config.max_length}; take a shorter prompt or a "
                "smaller gen_length."
            )


class Engine:
    """A model with its decoding settings, ready for batches of any shape.

    Attributes:
      checkpoint: model, parameters and tokenizer.
      decode: decoding settings.
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
    ) -> None:
        """Compiles nothing yet.

        Args:
          checkpoint: see the attributes.
          decode: see the attributes.
          cache: cache method.
          token_freq: see `diffusion_generate`.
          history: whether results hold the frames.
          progress: makes a context around a phase that takes its time, told the phase's name.
        """
        self.checkpoint = checkpoint
        self.decode = decode
        self._cache = cache
        self._token_freq = token_freq
        self._history = history
        self._progress = progress
        self._programs: dict[tuple[int, ...], Any] = {}

    def run(
        self,
        rows: Sequence[Sequence[int]],
        key: jax.Array,
        draw: Callable[[Snapshot], None] | None = None,
    ) -> Result:
        """Answers all rows as one batch.

        Args:
          rows: token ids of the prompts, of any lengths.
          key: PRNG key; used at temperature > 0 only.
          draw: called after every model forward. The answers are the same with and without it, but
            the forwards are then compiled calls of their own. The time spent in it does not count.

        Raises:
          PromptError: see `check_rows`.
        """
        config = self.checkpoint.config
        check_rows(rows, config, self.decode)
        limit = config.max_length - self.decode.gen_length
        ids_BP, mask_BP = tokenizer_lib.pad(rows, config.pad_id, limit=limit)
        if draw is not None:
            return self._stepwise(rows, ids_BP, mask_BP, key, draw)

        start = time.perf_counter()
        if ids_BP.shape not in self._programs:
            with self._progress("compiling"):
                traced = jax.jit(self._generate).lower(self.checkpoint.params, ids_BP, mask_BP, key)
                self._programs[ids_BP.shape] = traced.compile()
        compiled = time.perf_counter()
        with self._progress("denoising"):
            out = self._programs[ids_BP.shape](self.checkpoint.params, ids_BP, mask_BP, key)
            out = jax.block_until_ready(out)
        done = time.perf_counter()

        nfe = int(out.nfe)
        frames = None
        if out.history is not None:
            frames = [self._cut(canvas_BL, rows) for canvas_BL in np.asarray(out.history)[:nfe]]
        ids, committed_at = self._cut(out.tokens, rows), self._cut(out.committed_at, rows)
        return self._result(
            ids,
            committed_at,
            frames,
            np.asarray(out.positions_computed)[:nfe],
            np.asarray(out.steps),
            compiled - start,
            done - compiled,
        )

    def _stepwise(
        self,
        rows: Sequence[Sequence[int]],
        ids_BP: np.ndarray,
        mask_BP: np.ndarray,
        key: jax.Array,
        draw: Callable[[Snapshot], None],
    ) -> Result:
        def stream() -> Iterator[Frame]:
            return diffusion_stream(
                self.checkpoint.params,
                self.checkpoint.model,
                ids_BP,
                mask_BP,
                key=key,
                decode=self.decode,
                cache=self._cache,
                token_freq=self._token_freq,
            )

        start = time.perf_counter()
        with self._progress("compiling"):
            next(stream(), None)
        compile_seconds = time.perf_counter() - start
        masks = [self.checkpoint.config.mask_id] * self.decode.gen_length
        ids = [[*row, *masks] if self.decode.infill else masks for row in rows]
        committed_at = [[-1] * len(row) for row in ids]
        frames, positions = [], []
        steps_B = np.zeros(len(rows), int)
        seconds = 0.0
        start = time.perf_counter()
        for frame in stream():
            steps_B = np.asarray(frame.steps)
            canvas = (frame.tokens, frame.committed_at, frame.confidence)
            ids, committed_at, confidence = (self._cut(array, rows) for array in canvas)
            frames.append(ids)
            positions.append(frame.positions_computed)
            seconds += time.perf_counter() - start
            pending = [self._pending(row) for row in ids]
            draw(Snapshot(frame.step, ids, committed_at, confidence, pending))
            start = time.perf_counter()
        return self._result(
            ids,
            committed_at,
            frames if self._history else None,
            np.asarray(positions),
            steps_B,
            compile_seconds,
            seconds,
        )

    def _generate(self, params: Any, ids_BP: Any, mask_BP: Any, key: jax.Array) -> Any:
        return diffusion_generate(
            params,
            self.checkpoint.model,
            ids_BP,
            mask_BP,
            key=key,
            decode=self.decode,
            cache=self._cache,
            token_freq=self._token_freq,
            record=("history",) if self._history else (),
        )

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
        given = len(ids) - self.decode.gen_length
        eos_id = self.decode.eos_id
        eos_id = self.checkpoint.config.eos_id if eos_id is None else eos_id
        return [*ids[:given], *tokenizer_lib.until_eos(ids[given:], eos_id)]

    def _result(
        self,
        ids: list[list[int]],
        committed_at: list[list[int]],
        frames: list[list[list[int]]] | None,
        positions_T: np.ndarray,
        steps_B: np.ndarray,
        compile_seconds: float,
        seconds: float,
    ) -> Result:
        committed_B = np.array([sum(step >= 0 for step in row) for row in committed_at])
        return Result(
            answers=[self._answer(*row) for row in zip(ids, committed_at, strict=True)],
            frames=frames,
            nfe=len(positions_T),
            positions=float(positions_T.mean()) if len(positions_T) else 0.0,
            tokens_per_forward=float((committed_B / np.maximum(steps_B, 1)).mean()),
            compile_seconds=compile_seconds,
            seconds=seconds,
        )

    def _answer(self, ids: list[int], committed_at: list[int]) -> Answer:
        tokenizer, mask_id = self.checkpoint.tokenizer, self.checkpoint.config.mask_id
        kept = self._until_end(ids)
        filled = [token for token in kept if token != mask_id]
        return Answer(
            ids=ids,
            committed_at=committed_at,
            text=None if tokenizer is None else tokenizer_lib.decode(tokenizer, filled),
            tokens=sum(step >= 0 for step in committed_at[: len(kept)]),
            masks=len(kept) - len(filled),
        )
