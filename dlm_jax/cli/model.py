"""The model as the options want it: opened, with an engine for every decoding, on a console."""

import argparse
import dataclasses

import numpy as np
from rich.console import Console

from dlm_jax.answers import Result
from dlm_jax.cache import CacheMethod
from dlm_jax.checkpoint import Checkpoint
from dlm_jax.cli.output import Totals
from dlm_jax.cli.progress import Bar, Spinner
from dlm_jax.decoding.config import DecodeConfig
from dlm_jax.engine import Engine


@dataclasses.dataclass
class Model:
    """What prompts are answered with.

    Attributes:
      args: the options.
      console: standard error.
      opened: the model; None if it is not asked anything.
      decode: the decoding of prompts that do not ask for another length.
      method: the cache method.
      token_freq: see `diffusion_generate`.
      shows: tells the phases of the work.
    """

    args: argparse.Namespace
    console: Console
    opened: Checkpoint | None
    decode: DecodeConfig
    method: CacheMethod
    token_freq: np.ndarray | None
    shows: Spinner | Bar
    _engines: dict[DecodeConfig, Engine] = dataclasses.field(default_factory=dict)

    @property
    def checkpoint(self) -> Checkpoint:
        if self.opened is None:
            raise RuntimeError("The model was not opened, since it was not to be asked anything.")
        return self.opened

    def engine(self, decode: DecodeConfig) -> Engine:
        """The engine of a decoding; the same one each time, so that programs are kept."""
        if decode not in self._engines:
            self._engines[decode] = Engine(
                self.checkpoint,
                decode,
                self.method,
                token_freq=self.token_freq,
                history=self.args.history is not None,
                progress=lambda name: self.shows.phase(name),
            )
        return self._engines[decode]

    @property
    def draws(self) -> bool:
        """Whether anything hangs on seeds."""
        decode = self.decode
        by_chance = decode.strategy.ordered or decode.strategy.drawn
        return by_chance or decode.temperature is not None or decode.alg_temp is not None

    def note(self, text: str, *, style: str | None = None) -> None:
        """Writes a line to standard error."""
        self.console.print(text, style=style, soft_wrap=True)

    def note_statistics(self, result: Result) -> None:
        """Writes what a batch took."""
        totals = Totals()
        totals.add(result)
        self.note(totals.sentence(steps(self.decode)), style="dim")


def steps(decode: DecodeConfig) -> int | None:
    """The planned number of denoising steps; None where tokens are counted instead."""
    return None if decode.pace == "fixed" else decode.steps or decode.gen_length
