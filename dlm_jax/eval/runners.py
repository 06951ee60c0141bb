"""Batches of requests on the devices: answers and likelihoods.

Both are functions for `batches.complete`: rows of unequal length in, JSON-able responses out. A
short batch is filled up with copies, so that all run the same compiled program.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dlm_jax import sharding, tokenizer
from dlm_jax.answers import NotFinite
from dlm_jax.batching.batches import Request
from dlm_jax.cache import CacheMethod, NoCache
from dlm_jax.checkpoint import Checkpoint
from dlm_jax.decoding.config import DecodeConfig
from dlm_jax.engine import Engine
from dlm_jax.likelihood import LikelihoodConfig, log_likelihood


class Prompt(NamedTuple):
    """What `Generator` is asked.

    Attributes:
      ids: token ids.
      stops: texts at which the answer ends.
      noise: seeds what is drawn for the answer.
    """

    ids: list[int]
    stops: tuple[str, ...]
    noise: int


class Pair(NamedTuple):
    """What `Scorer` is asked: how probable is the answer after the prompt.

    Attributes:
      prompt: token ids.
      answer: token ids, at least one.
      end: how many of these, at the end, only say that it ends.
      noise: seeds the masks.
    """

    prompt: list[int]
    answer: list[int]
    end: int
    noise: int


class Generator:
    """Answers prompts; one compiled program for every decoding, cache method and shape."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        mesh: Mesh,
        seed: int,
        token_freq: np.ndarray | None = None,
    ) -> None:
        self._checkpoint = checkpoint
        self._mesh = None if mesh.size == 1 else mesh
        self._where = _describe(mesh)
        self._key = jax.random.key(seed)
        self._token_freq = token_freq
        self._engines: dict[Any, Engine] = {}

    def __call__(
        self, group: tuple[DecodeConfig, CacheMethod], batch: Sequence[Request], *, rows: int
    ) -> list[dict[str, Any]]:
        """Generates one batch.

        Args:
          group: how to decode.
          batch: requests whose `work` is a `Prompt`.
          rows: sequences to which the batch is filled up.

        Returns:
          A response per request: `text`, and what was measured.
            tokens: generated tokens up to the end of the answer.
            input_length: tokens of the prompt.
            forwards: model forwards in which the sample had something to fill.
            last_forward: forwards until the answer was complete.
            positions: positions that a forward computed, mean over the forwards.
            seconds: time of the batch, divided by its samples.
            compile_seconds: the same of compiling its program, which is not in `seconds`.
            memory_mib: memory that the largest program so far needs on a device.
            setup: devices, and sequences that are decoded at a time.

        Raises:
          NotFinite: the model's numbers are NaN or infinite.
        """
        prompts: list[Prompt] = [request.work for request in batch]
        engine = self._engine(*group)
        filled = _filled(prompts, rows)
        keys = _keys(self._key, [prompt.noise for prompt in filled])
        result = engine.run([prompt.ids for prompt in filled], keys)
        return [
            dict(
                text=engine.text(answer, prompt.stops),
                tokens=answer.tokens,
                input_length=len(prompt.ids),
                forwards=answer.forwards,
                last_forward=answer.last_forward,
                positions=round(result.positions, 3),
                seconds=result.seconds / len(batch),
                compile_seconds=result.compile_seconds / len(batch),
                memory_mib=round(engine.memory_mib, 1),
                setup=f"{self._where}, batch {rows}",
            )
            for answer, prompt in zip(result.answers, prompts, strict=False)
        ]

    def greedy(self, decode: DecodeConfig, prompts: Sequence[list[int]]) -> list[list[int]]:
        """The token ids that follow the prompts, without a cache; nothing is drawn."""
        result = self._engine(decode, NoCache()).run(prompts, self._key)
        return [answer.ids for answer in result.answers]

    def _engine(self, decode: DecodeConfig, method: CacheMethod) -> Engine:
        engine = self._engines.get((decode, method))
        if engine is None:
            engine = self._engines[decode, method] = Engine(
                self._checkpoint, decode, method, token_freq=self._token_freq, mesh=self._mesh
            )
        return engine


class Scorer:
    """Says how probable answers are; one compiled program for every shape."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        mesh: Mesh,
        seed: int,
        config: LikelihoodConfig,
        *,
        greedy: Generator | None = None,
    ) -> None:
        """Compiles nothing yet.

        Args:
          checkpoint: the model.
          mesh: devices.
          seed: of the masks.
          config: the estimator.
          greedy: generates what the model would say, to compare with; None says that it differs.
        """
        self._checkpoint = checkpoint
        self._split = NamedSharding(mesh, PartitionSpec(sharding.DATA))
        self._key = jax.random.key(seed)
        self._greedy = greedy
        model = checkpoint.model

        def score(params: Any, rows: tuple[Any, ...], keys: jax.Array) -> jax.Array:
            return log_likelihood(params, model, *rows, key=keys, config=config)

        self._score = jax.jit(score)

    def group(self, pair: Pair) -> int:
        """Requests of a group can share a batch: the length to which answers are padded."""
        length = len(pair.answer)
        if self._greedy is not None:
            return length
        padded = -(-length // tokenizer.BUCKET) * tokenizer.BUCKET
        # Pairs that would not fit with that share a batch with answers of their own length.
        fits = len(pair.prompt) <= self._checkpoint.config.room(padded)
        return padded if fits else length

    def __call__(self, group: int, batch: Sequence[Request], *, rows: int) -> list[dict[str, Any]]:
        """Scores one batch.

        Args:
          group: see `group`.
          batch: requests whose `work` is a `Pair`.
          rows: sequences to which the batch is filled up.

        Returns:
          A response per request: `log_likelihood` in nats, and whether it is `greedy`.

        Raises:
          NotFinite: the model's numbers are NaN or infinite.
        """
        if group == 0:  # nothing is certain
            certain = dict(log_likelihood=0.0, greedy=self._greedy is not None)
            return [certain] * len(batch)
        rows += -rows % self._split.mesh.shape[sharding.DATA]
        pairs: list[Pair] = _filled([request.work for request in batch], rows)
        keys = _keys(self._key, [pair.noise for pair in pairs])
        inputs = jax.device_put((self._pad(pairs, group), keys), self._split)
        scores = np.asarray(self._score(self._checkpoint.params, *inputs)).tolist()
        if not np.isfinite(scores).all():
            raise NotFinite("in the forwards of a likelihood")
        greedy = self._is_greedy(pairs)
        return [dict(log_likelihood=scores[i], greedy=greedy[i]) for i in range(len(batch))]

    def _pad(self, pairs: Sequence[Pair], group: int) -> tuple[np.ndarray, ...]:
        """Prompts padded left and answers padded right, within the context, and their masks."""
        config = self._checkpoint.config
        longest = max(len(pair.prompt) for pair in pairs)
        answers = min(group, config.max_length - longest)
        ids_BP, prompt_mask_BP = tokenizer.pad(
            [pair.prompt for pair in pairs], config.pad_id, limit=config.room(answers)
        )
        reversed_BA, reversed_mask_BA = tokenizer.pad(
            [pair.answer[::-1] for pair in pairs], config.pad_id, bucket=answers
        )
        return ids_BP, reversed_BA[:, ::-1], prompt_mask_BP, reversed_mask_BA[:, ::-1]

    def _is_greedy(self, pairs: Sequence[Pair]) -> list[bool]:
        """Whether each answer is what the model gives, its surest token first."""
        if self._greedy is None:
            return [False] * len(pairs)
        answers = [pair.answer[: len(pair.answer) - pair.end] for pair in pairs]
        length = len(answers[0])
        decode = DecodeConfig.for_model(
            self._checkpoint.config, gen_length=length, block_length=length
        )
        # An answer that leaves no room for a prompt is nothing that the model could say.
        said = iter(self._greedy.greedy(decode, [pair.prompt for pair in pairs if pair.prompt]))
        return [
            bool(pair.prompt) and next(said) == answer
            for pair, answer in zip(pairs, answers, strict=True)
        ]


def _describe(mesh: Mesh) -> str:
    """The devices of a mesh, as `cpu` or `NVIDIA H200, data=4, model=2`."""
    kind = mesh.devices.flat[0].device_kind
    sizes = (f"{axis}={size}" for axis, size in mesh.shape.items() if size > 1)
    return ", ".join([kind, *sizes])


def _filled(work: list[Any], rows: int) -> list[Any]:
    """The work of a batch, filled up with copies of its first."""
    return work + [work[0]] * (rows - len(work))


def _keys(key: jax.Array, noises: Sequence[int]) -> jax.Array:
    """A PRNG key per row."""
    return jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.asarray(noises, jnp.uint32))
