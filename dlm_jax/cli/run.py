"""One run of the command, from sound options to its output: what `dlm_jax.generate` imports late.

prompts -> questions -> batches -> Engine -> responses -> text, JSON, history; or a conversation
"""

import argparse
import collections
import dataclasses
import functools
import shutil
import textwrap
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

import dlm_jax
from dlm_jax import cache, checkpoint, compilation, tokenizer
from dlm_jax.answers import Result
from dlm_jax.batching import fit
from dlm_jax.batching.batches import Request, answered, in_order
from dlm_jax.batching.responses import Responses, digest, fingerprint
from dlm_jax.cache import CacheMethod
from dlm_jax.checkpoint import Checkpoint
from dlm_jax.cli import chat, choices, output, plan, progress, streams
from dlm_jax.cli.interrupt import interruptible
from dlm_jax.cli.live import Canvas
from dlm_jax.cli.plan import Group, Planner, Question
from dlm_jax.cli.prompts import Message, Prompt
from dlm_jax.decoding.config import DecodeConfig
from dlm_jax.engine import Engine

Phase = Callable[[str], AbstractContextManager[None]]


@dataclasses.dataclass
class Job:
    """A model and prompts that fit each other, ready for the long work.

    Attributes:
      args: the options.
      console: standard error.
      as_chat: whether texts are put as a conversation.
      decode: the decoding of prompts that do not ask for another length.
      method: the cache method.
      questions: the prompts; one that is wrong, and to be skipped, has an error.
      requests: the questions as work, one for each that is a `Question`.
      token_freq: see `diffusion_generate`.
      opened: the model; None if there is nothing to ask it.
      identity: what the answers depend on, beside prompt and decoding.
      phase: shows a phase of the work.
    """

    args: argparse.Namespace
    console: Console
    as_chat: bool
    decode: DecodeConfig
    method: CacheMethod
    questions: list[Question | Prompt]
    requests: list[Request]
    token_freq: np.ndarray | None
    opened: Checkpoint | None
    identity: str
    phase: Phase
    _engines: dict[DecodeConfig, Engine] = dataclasses.field(default_factory=dict)
    _rows: dict[Group, int] = dataclasses.field(default_factory=dict)

    @classmethod
    def prepare(cls, args: argparse.Namespace, prompts: Sequence[Prompt]) -> "Job":
        """Checks all that the model decides, and then loads it.

        Args:
          args: the options.
          prompts: a conversation begins without any.

        Raises:
          ValueError, OSError: what is wrong, in one sentence.
        """
        console = Console(stderr=True, highlight=False, markup=False, emoji=False)
        if args.live and not console.is_terminal:
            raise ValueError("--live draws on standard error, which must be a terminal for it.")
        directory = checkpoint.find(args.model)  # which may draw the progress of a download
        with progress.phase(console, f"loading {args.model}"):
            return cls._load(args, console, directory, prompts)

    @classmethod
    def _load(
        cls,
        args: argparse.Namespace,
        console: Console,
        directory: Path,
        prompts: Sequence[Prompt],
    ) -> "Job":
        # Configuration, headers and tokenizer suffice for all checks; the weights come last.
        config = checkpoint.inspect(directory, args.adapter).config
        tok = checkpoint.open_tokenizer(directory, config)
        as_chat = _use_chat(args, tok)
        if args.interactive:
            streams.check_input()
            if as_chat:  # a template that is broken is told before the weights are read
                hello = [{"role": "user", "content": "Hello"}]
                tokenizer.conversation(tok, hello, add_generation_prompt=True)
        method = cache.make(args.cache, **args.cache_args)
        planner = Planner(args, tok, config, method, as_chat)
        questions = planner.questions(prompts)
        decode = planner.decoding(None, infill=args.infill)
        token_freq = choices.token_freq(args, config, decode)
        identity = digest(
            dlm_jax.__version__,
            fingerprint(directory, args.adapter),
            [args.dtype, repr(method), args.stop],
            None if token_freq is None else token_freq.tolist(),
        )
        asked = [question for question in questions if isinstance(question, Question)]
        rows = len(asked) if args.history is not None else args.batch_size or fit.CPU
        requests = plan.requests(asked, config, max(rows, 1), identity)
        if args.history is not None:
            _check_history(args, requests)
        opened = None
        if asked or args.interactive:
            opened = checkpoint.load(directory, dtype=args.dtype, adapter=args.adapter)
        return cls(
            args=args,
            console=console,
            as_chat=as_chat,
            decode=decode,
            method=method,
            questions=questions,
            requests=requests,
            token_freq=token_freq,
            opened=opened,
            identity=identity,
            phase=functools.partial(progress.phase, console),
        )

    # --- prompts ----------------------------------------------------------------------------------

    def answer(self) -> None:
        """Answers the prompts and writes everything that was asked for."""
        target = self.args.output
        kept = None if target is None else output.partial(target)
        responses = Responses(kept)
        try:
            lines, totals = self._answer(responses)
            if target is not None:
                output.write(target, lines)
        except BaseException as error:
            self._interrupted(responses, error)
            raise
        finally:
            responses.close()
        if totals.results:
            plans = {self._steps(request.group.decode) for request in self.requests}
            self.note(totals.sentence(plans.pop() if len(plans) == 1 else None), style="dim")
        skipped = [prompt for prompt in self.questions if isinstance(prompt, Prompt)]
        if skipped:
            self.note(
                f"{len(skipped)} of {len(self.questions)} prompts were left out, first: "
                f"{skipped[0].error}"
            )

    def _answer(self, responses: Responses) -> tuple[list[str], output.Totals]:
        """Answers batch by batch; returns the lines of --output, and what was measured."""
        args, totals = self.args, output.Totals()
        echo = not args.as_json and not args.live and args.output is None
        alone = len(self.questions) == 1
        lines: list[str] = []
        left = collections.deque(self.questions)
        keys = iter([request.key for request in self.requests])
        key = next(keys, None)

        def tell() -> None:
            """Writes what can be written, in the order of the prompts."""
            nonlocal key
            while left:
                question = left[0]
                if isinstance(question, Question) and (key is None or key not in responses):
                    return
                left.popleft()
                if isinstance(question, Prompt):
                    text = output.line(question.fields, {"error": question.error})
                    text = text if args.as_json else None
                else:
                    prompt, found = question.prompt, responses[str(key)]
                    key = next(keys, None)
                    if echo and not alone:
                        self._echo(prompt.title)
                    known = prompt.fields | ({"seed": question.seed} if self._draws else {})
                    text = output.line(known, found) if args.as_json else output.shown(found)
                if text is None:
                    continue
                if args.output is None:
                    print(text, flush=True)
                else:
                    lines.append(text)

        waiting = [request for request in self.requests if request.key not in responses]
        if echo and alone and waiting:
            self._echo(waiting[0].work.prompt.title)  # something to read while it compiles
        one_batch = len({request.group for request in waiting}) == 1 and len(waiting) <= fit.CPU
        tell()
        batches = answered(in_order(waiting, self._batch_rows), self._respond(totals), responses)
        if one_batch:
            for _ in batches:
                tell()
            return lines, totals
        with progress.Bar(self.console, len(self.requests)) as bar:
            self.phase = bar.phase
            bar.advance(len(self.requests) - len(waiting))
            for batch in batches:
                bar.advance(len(batch), totals)
                tell()
        return lines, totals

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
        engine, device = self._engine(group.decode), jax.devices()[0]

        def need(rows: int) -> float:
            return interruptible(engine.reserve, (rows, group.slots))

        free = compilation.free_mib(device)
        return fit.rows_that_fit(need, count, free_mib=free, platform=device.platform)

    def _respond(self, totals: output.Totals) -> Callable[[Group, Sequence[Request]], list[Any]]:
        """What answers the batches; adds what they took to the totals."""

        def respond(group: Group, batch: Sequence[Request]) -> list[output.Response]:
            questions: list[Question] = [request.work for request in batch]
            result = self._ask(group, questions)
            totals.add(result)
            if self.args.history is not None:
                output.history(self.args.history, result, self.checkpoint.config.mask_id)
            engine, steps = self._engine(group.decode), self._steps(group.decode)
            return [
                output.response(answer, result, engine.text(answer, self.args.stop), steps)
                for answer in result.answers
            ]

        return respond

    def _ask(self, group: Group, questions: Sequence[Question]) -> Result:
        """Generates one batch, and draws it if asked to."""
        engine, rows = self._engine(group.decode), [question.row for question in questions]
        keys = jnp.stack([jax.random.key(question.seed) for question in questions])
        if not self.args.live:
            shape = (self._rows[group], group.slots)
            return interruptible(engine.run, rows, keys, shape=shape)
        titles = [question.prompt.title for question in questions]
        with Canvas(self.console, titles, rows, self.checkpoint) as canvas:
            return engine.run(rows, keys, canvas.draw)

    def _interrupted(self, responses: Responses, error: BaseException) -> None:
        """Says what is kept of a run that does not come to its end."""
        self.console.show_cursor(True)
        if self.args.output is None:
            return
        kept = output.partial(self.args.output)
        count = sum(request.key in responses for request in self.requests)
        if count:
            self.note(
                f"{count} of {len(self.requests)} answers are kept in {kept}; the same command "
                "with --resume goes on."
            )
        else:
            shutil.rmtree(kept, ignore_errors=True)

    # --- a conversation ---------------------------------------------------------------------------

    def converse(self) -> None:
        """Holds a conversation until the user leaves."""
        chat.converse(self._reply, self.note, remembers=self.as_chat)

    def _reply(self, messages: list[Message], turn: int) -> str:
        """The next message; every turn has its own seed."""
        tok, text = self.checkpoint.tokenizer, messages[-1]["content"]
        if self.as_chat:
            row = tokenizer.encode_chat(tok, messages)
        else:
            (row,) = tokenizer.encode(tok, [text], chat=False)
        key = jax.random.key((self.args.seed + turn) % 2**32)
        engine = self._engine(self.decode)
        if self.args.live:
            with Canvas(self.console, [text], [row], self.checkpoint) as canvas:
                result = engine.run([row], key, canvas.draw)
        else:
            result = engine.run([row], key)
        totals = output.Totals()
        totals.add(result)
        self.note(totals.sentence(self._steps(self.decode)), style="dim")
        return engine.text(result.answers[0], self.args.stop) or ""

    # --- both -------------------------------------------------------------------------------------

    @property
    def checkpoint(self) -> Checkpoint:
        if self.opened is None:
            raise RuntimeError("The model was not loaded, since there is nothing to ask it.")
        return self.opened

    def _engine(self, decode: DecodeConfig) -> Engine:
        if decode not in self._engines:
            self._engines[decode] = Engine(
                self.checkpoint,
                decode,
                self.method,
                token_freq=self.token_freq,
                history=self.args.history is not None,
                progress=lambda name: self.phase(name),
            )
        return self._engines[decode]

    def note(self, text: str, *, style: str | None = None) -> None:
        """Writes a line to standard error."""
        self.console.print(text, style=style, soft_wrap=True)

    def _echo(self, prompt: str) -> None:
        self.note(textwrap.shorten(prompt, 500, placeholder=" ..."), style="bold")

    @property
    def _draws(self) -> bool:
        """Whether anything hangs on seeds."""
        strategy = self.decode.strategy
        drawn = strategy.ordered or strategy.drawn
        return drawn or not (self.decode.temperature is None and self.decode.alg_temp is None)

    @staticmethod
    def _steps(decode: DecodeConfig) -> int | None:
        """The planned number of denoising steps; None where tokens are counted instead."""
        return None if decode.pace == "fixed" else decode.steps or decode.gen_length


def _use_chat(args: argparse.Namespace, tok: Any) -> bool:
    """Whether prompts are put as a conversation; refuses what needs a tokenizer or template."""
    if tok is None and args.stop:
        raise ValueError(f"{args.model} has no tokenizer, so --stop has no text to look into.")
    if tok is None and args.interactive:
        raise ValueError(
            f"{args.model} has no tokenizer; give the prompts as token ids with --prompt-ids."
        )
    if args.chat and not tokenizer.has_chat_template(tok):
        raise ValueError(f"The tokenizer of {args.model} has no chat template; leave --chat out.")
    if args.chat is None:
        return tokenizer.has_chat_template(tok) and not args.infill
    return args.chat


def _check_history(args: argparse.Namespace, requests: Sequence[Request]) -> None:
    """Refuses a history of several batches."""
    if len({request.group for request in requests}) > 1 or (
        args.batch_size is not None and args.batch_size < len(requests)
    ):
        raise ValueError(
            "--history is about one batch; take prompts of one gen_length, and leave --batch-size "
            "out."
        )
