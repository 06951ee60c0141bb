"""What becomes of answers: text or JSON lines, on standard output or in a file, in order."""

import contextlib
import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from dlm_jax import files
from dlm_jax.answers import Answer, Result
from dlm_jax.batching.responses import Responses

Response = dict[str, Any]
"""What is known of an answer, as JSON can hold it: `text`, `tokens`, `stats`."""


def response(answer: Answer, result: Result, text: str | None, steps: int | None) -> Response:
    """An answer of a batch, with what was measured.

    Args:
      answer: one of `result.answers`.
      result: of its batch.
      text: the answer as it is shown; None without a tokenizer.
      steps: denoising steps that were planned; None where that is not known beforehand.
    """
    return {
        "text": text,
        "tokens": answer.ids,
        "stats": {
            "tokens": answer.tokens,
            "batch_tokens": result.tokens,
            "seconds": round(result.seconds, 6),
            "tokens_per_second": round(result.tokens_per_second, 3),
            "compile_seconds": round(result.compile_seconds, 6),
            "steps": steps,
            "forwards": result.nfe,
            "positions_per_forward": round(result.positions, 3),
            "tokens_per_forward": round(result.tokens_per_forward, 3),
        },
    }


def line(fields: dict[str, Any], found: Response) -> str:
    """A JSON line."""
    return json.dumps(fields | found)


def shown(found: Response) -> str:
    """The text of an answer; its ids where there is no tokenizer."""
    text = found["text"]
    return " ".join(map(str, found["tokens"])) if text is None else text


@dataclasses.dataclass
class Totals:
    """What all batches of a run did together.

    Attributes:
      results: how many batches there were.
      tokens: of all answers.
      seconds: of decoding.
      compile_seconds: of compiling.
      forwards: of the model.
      positions: that a forward computed per row, summed over the forwards.
      rows: answers.
      tokens_per_forward: summed over the answers.
      masks: that were left.
    """

    results: int = 0
    tokens: int = 0
    seconds: float = 0.0
    compile_seconds: float = 0.0
    forwards: int = 0
    positions: float = 0.0
    rows: int = 0
    tokens_per_forward: float = 0.0
    masks: int = 0

    def add(self, result: Result) -> None:
        rows = len(result.answers)
        self.results += 1
        self.tokens += result.tokens
        self.seconds += result.seconds
        self.compile_seconds += result.compile_seconds
        self.forwards += result.nfe
        self.positions += result.positions * result.nfe
        self.rows += rows
        self.tokens_per_forward += result.tokens_per_forward * rows
        self.masks += sum(answer.masks for answer in result.answers)

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds if self.seconds > 0 else 0.0

    def seconds_left(self, rows: int) -> float:
        """How long as many answers more will take, compiling included, at the pace so far."""
        return (self.seconds + self.compile_seconds) / max(self.rows, 1) * rows

    def sentence(self, steps: int | None) -> str:
        """The statistics; `steps` as in `response`."""
        planned = "" if steps is None else f"{steps} denoising steps, "
        batches = "" if self.results == 1 else f"{self.rows} prompts in {self.results} batches, "
        return (
            f"{batches}{self.tokens} tokens in {self.seconds:.2f} s "
            f"({self.tokens_per_second:.1f} tokens/s), compiled in {self.compile_seconds:.1f} s; "
            f"{planned}{self.forwards} model forwards of "
            f"{self.positions / max(self.forwards, 1):.1f} positions, "
            f"{self.tokens_per_forward / max(self.rows, 1):.2f} tokens per forward"
            + (f"; masks left: {self.masks}" if self.masks else "")
        )


# --- a file ---------------------------------------------------------------------------------------


def partial(target: Path) -> Path:
    """The folder beside a file in which answers are kept until the file is complete."""
    return target.with_name(target.name + ".partial")


def check(target: Path, *, resume: bool) -> None:
    """Refuses a file that could not be written, or would lose answers of an interrupted run.

    Raises:
      ValueError: one sentence.
    """
    files.check_target(target, "--output")
    kept = partial(target)
    if kept.is_symlink() or (kept.exists() and not _is_ours(kept)):
        raise ValueError(
            f"{kept} is where answers for --output are kept until it is complete, but holds "
            "something else; move that away."
        )
    if kept.exists() and not resume:
        raise ValueError(
            f"{kept} holds the answers of an interrupted run; go on with --resume, or delete it."
        )
    if resume and target.exists() and not kept.exists():
        raise ValueError(f"{target} is complete; leave --resume out to make it anew.")


def _is_ours(kept: Path) -> bool:
    """Whether there is a folder with nothing in it but kept answers."""
    return kept.is_dir() and all(path in Responses.files(kept) for path in kept.iterdir())


def forget(target: Path) -> None:
    """Deletes what was kept for a file."""
    kept = partial(target)
    for path in Responses.files(kept):
        path.unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # somebody put something else there
        kept.rmdir()


@contextlib.contextmanager
def keeping(target: Path | None) -> Iterator[Responses]:
    """Where responses are kept: beside the file that they are for, or in memory only.

    If the context ends with an error, nothing is left of a folder that holds no response.

    Raises:
      ValueError, OSError: another run writes there, or something else is there.
    """
    responses = Responses(None if target is None else partial(target))
    try:
        yield responses
    except BaseException:
        responses.close()
        if target is not None and not len(responses):
            forget(target)
        raise


def write(target: Path, lines: Sequence[str]) -> None:
    """Writes the file in one step; what was kept for it is then needed no more."""
    files.write(target, "".join(text + "\n" for text in lines).encode("utf-8", "backslashreplace"))
    forget(target)


def history(path: Path, result: Result, mask_id: int) -> None:
    """Writes the frames of a batch in one step."""
    found = {
        "frames": result.frames,
        "committed_at": [answer.committed_at for answer in result.answers],
        "mask_id": mask_id,
    }
    files.write(path, (json.dumps(found) + "\n").encode())
