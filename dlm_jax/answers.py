"""What becomes of prompts: the answers of a finished batch, or how far it is."""

import dataclasses
from typing import NamedTuple


@dataclasses.dataclass(frozen=True)
class Answer:
    """What became of one prompt.

    Attributes:
      ids: the generated token ids; with infilling the whole row, prompt included. What was not
        filled in the end is a mask.
      committed_at: model forward in which each of `ids` was committed, counted from 0 in the part
        of the batch that the row was in; -1 if it was given, or is still a mask.
      text: `ids` up to the end of the answer as text, without masks; None without a tokenizer.
      tokens: number of generated tokens up to the end of the answer.
      masks: number of masks that were left there.
      forwards: model forwards in which the row had something to fill.
      last_forward: model forwards until the last of these tokens was committed, those included in
        which the row waited for others; 0 if there is none.
    """

    ids: list[int]
    committed_at: list[int]
    text: str | None
    tokens: int
    masks: int
    forwards: int = 0
    last_forward: int = 0


@dataclasses.dataclass(frozen=True)
class Result:
    """A finished batch.

    Attributes:
      answers: one per prompt.
      frames: `[step][row]` the ids after every model forward, over the same positions as
        `Answer.ids`; None unless asked for. A row whose part of the batch is done stays as it is.
      nfe: model forwards; of the part of the batch that needed most, if it was divided.
      positions: positions that a forward computed per row, mean over rows and forwards.
      tokens_per_forward: tokens that a row committed in each forward in which it had something to
        fill, those behind the end of the answer included; mean over the rows.
      compile_seconds: time spent on tracing and compiling since the last batch; 0 if the program
        was there already.
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


class NotFinite(ArithmeticError):
    """What the model computed is NaN or infinite, so that it says nothing; one sentence."""

    def __init__(self, where: str) -> None:
        super().__init__(
            f"The model's numbers are not finite {where}: its weights hold NaN or infinity, or "
            "overflow in their dtype, as float16 does above 65504; mend the weights, or take a "
            "dtype of a wider range."
        )


class Snapshot(NamedTuple):
    """The canvas after one model forward: per row and position the id, when and how surely."""

    step: int
    ids: list[list[int]]
    committed_at: list[list[int]]
    confidence: list[list[float]]
    pending: list[int]
    """Masks of each row that are still to be filled."""
