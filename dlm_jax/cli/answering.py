"""Prompts answered in batches, and their answers written in the order of the prompts."""

import argparse
import collections
import contextlib
import dataclasses
import textwrap
from collections.abc import Generator, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from dlm_jax import compilation
from dlm_jax.answers import Result
from dlm_jax.batching import fit
from dlm_jax.batching.batches import Request, answered, in_order
from dlm_jax.batching.responses import Responses
from dlm_jax.cli import output
from dlm_jax.cli.interrupt import interruptible
from dlm_jax.cli.live import Canvas
from dlm_jax.cli.model import Model, steps
from dlm_jax.cli.plan import Group, Question
from dlm_jax.cli.progress import Bar
from dlm_jax.cli.prompts import Prompt


class Line(NamedTuple):
    """A prompt, and what is asked for it; None if it is wrong, and left out."""

    prompt: Prompt
    request: Request | None


@dataclasses.dataclass
class Answering:
    """Prompts on their way to answers.

    Attributes:
      args: the options.
      model: answers them.
      lines: the prompts.
      responses: what is known already, and where answers are kept as they come.
      totals: what was done so far.
    """

    args: argparse.Namespace
    model: Model
    lines: list[Line]
    responses: Responses
    totals: output.Totals = dataclasses.field(default_factory=output.Totals)
    _rows: dict[Group, int] = dataclasses.field(default_factory=dict)

    def run(self) -> None:
        """Answers the prompts and writes everything that was asked for."""
        target = self.args.output
        try:
            with contextlib.closing(self._texts()) as texts:
                if target is None:
                    for text in texts:
                        print(text, flush=True)
                else:
                    output.write(target, list(texts))
        except BaseException:
            self._tell_what_is_kept()
            raise
        finally:
            self.responses.close()
        self._tell_the_rest()

    def _texts(self) -> Generator[str]:
        """What is written for each prompt, in their order, as soon as it is known."""
        left, responses = collections.deque(self.lines), self.responses

        def known() -> Iterator[str]:
            while left and (left[0].request is None or left[0].request.key in responses):
                line = left.popleft()
                text = self._text(line)
                if text is not None:
                    yield text

        waiting = [request for request in self._requests if request.key not in responses]
        if self._echoes and len(self.lines) == 1 and waiting:
            self._echo(self.lines[0].prompt)  # something to read while the program compiles
        yield from known()
        if not waiting:
            return
        batches = answered(in_order(waiting, self._batch_rows), self._respond, responses)
        if len(waiting) <= fit.CPU and len({request.group for request in waiting}) == 1:
            for _ in batches:
                yield from known()
            return
        with Bar(self.model.console, len(self._requests)) as bar:
            self.model.shows = bar
            bar.advance(len(self._requests) - len(waiting))
            for batch in batches:
                bar.advance(len(batch), self.totals)
                yield from known()

    @property
    def _requests(self) -> list[Request]:
        """What is asked; of several that are the same, one."""
        requests = (line.request for line in self.lines if line.request is not None)
        return list({request.key: request for request in requests}.values())

    def _text(self, line: Line) -> str | None:
        """What is written for a prompt whose answer is known; None writes nothing."""
        if line.request is None:
            error = {"error": line.prompt.error}
            return output.line(line.prompt.fields, error) if self.args.as_json else None
        found = self.responses[line.request.key]
        if self.args.as_json:
            question: Question = line.request.work
            seed = {"seed": question.seed} if self.model.draws else {}
            return output.line(line.prompt.fields | seed, found)
        if self._echoes and len(self.lines) > 1:
            self._echo(line.prompt)
        return output.shown(found)

    # --- batches ----------------------------------------------------------------------------------

    def _batch_rows(self, group: Group, count: int) -> int:
        """How many rows the batches of a group have; decided when the first one is due."""
        if group not in self._rows:
            if self.args.history is not None:
                rows = count
            elif self.args.batch_size is not None:
                rows = min(self.args.batch_size, count)
            elif self.args.live or count == 1:
                rows = min(count, fit.CPU)
            else:
                rows = self._fitting(group, count)
            self._rows[group] = rows
        return self._rows[group]

    def _fitting(self, group: Group, count: int) -> int:
        engine, device = self.model.engine(group.decode), jax.devices()[0]

        def need(rows: int) -> float:
            return interruptible(engine.reserve, (rows, group.slots))

        free = compilation.free_mib(device)
        return fit.rows_that_fit(need, count, free_mib=free, platform=device.platform)

    def _respond(self, group: Group, batch: Sequence[Request]) -> list[output.Response]:
        """Answers a batch."""
        model, stops = self.model, self.args.stop
        result = self._ask(group, [request.work for request in batch])
        self.totals.add(result)
        if self.args.history is not None:
            output.history(self.args.history, result, model.checkpoint.config.mask_id)
        engine, planned = model.engine(group.decode), steps(group.decode)
        return [
            output.response(answer, result, engine.text(answer, stops), planned)
            for answer in result.answers
        ]

    def _ask(self, group: Group, questions: Sequence[Question]) -> Result:
        """Generates a batch, and draws it if asked to."""
        engine, rows = self.model.engine(group.decode), [question.row for question in questions]
        keys = jnp.stack([jax.random.key(question.seed) for question in questions])
        if not self.args.live:
            return interruptible(engine.run, rows, keys, shape=(self._rows[group], group.slots))
        titles = [question.prompt.title for question in questions]
        with Canvas(self.model.console, titles, rows, self.model.checkpoint) as canvas:
            return engine.run(rows, keys, canvas.draw)

    # --- what is told -----------------------------------------------------------------------------

    @property
    def _echoes(self) -> bool:
        """Whether prompts are told beside their answers."""
        return not self.args.as_json and not self.args.live and self.args.output is None

    def _echo(self, prompt: Prompt) -> None:
        self.model.note(textwrap.shorten(prompt.title, 500, placeholder=" ..."), style="bold")

    def _tell_what_is_kept(self) -> None:
        """Of a run that does not come to its end."""
        self.model.shows.stop()
        if self.args.output is None:
            return
        kept = output.partial(self.args.output)
        count = sum(request.key in self.responses for request in self._requests)
        if count:
            self.model.note(
                f"{count} of {len(self._requests)} answers are kept in {kept}; the same command "
                "with --resume goes on."
            )
        elif not len(self.responses):
            output.forget(self.args.output)

    def _tell_the_rest(self) -> None:
        """Statistics, and what was left out."""
        note = self.model.note
        if self.totals.results:
            plans = {steps(request.group.decode) for request in self._requests}
            note(self.totals.sentence(plans.pop() if len(plans) == 1 else None), style="dim")
        wrong = [line.prompt for line in self.lines if line.request is None]
        if wrong:
            note(
                f"{len(wrong)} of {len(self.lines)} prompts were left out, first: {wrong[0].error}"
            )
