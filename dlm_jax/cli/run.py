"""One run of the command, from sound options to its output: what `dlm_jax.generate` imports late.

options, prompts -> rows of ids -> Engine -> answers -> text, JSON, history, conversation
"""

import argparse
import contextlib
import dataclasses
import functools
import json
import textwrap
from collections.abc import Iterator
from typing import Any

import jax
from rich.console import Console

from dlm_jax import cache, checkpoint, files, tokenizer
from dlm_jax.answers import Answer, Result
from dlm_jax.cli import chat, choices
from dlm_jax.cli.live import Canvas
from dlm_jax.decoding.config import DecodeConfig
from dlm_jax.engine import Engine, check_rows
from dlm_jax.models import Config


@dataclasses.dataclass(frozen=True)
class Job:
    """A model and prompts that fit each other, ready for the long work.

    Attributes:
      args: the options.
      console: standard error.
      engine: the model.
      as_chat: whether prompts are put as a conversation.
      texts: the prompts, as they are shown.
      rows: the prompts' token ids.
    """

    args: argparse.Namespace
    console: Console
    engine: Engine
    as_chat: bool
    texts: list[str]
    rows: list[list[int]]

    @classmethod
    def prepare(cls, args: argparse.Namespace, texts: list[str], rows: list[list[int]]) -> "Job":
        """Checks all that the model decides, and then loads it.

        Args:
          args: the options.
          texts: the prompts, if they are texts.
          rows: the prompts, if they are token ids. A conversation begins without any.

        Raises:
          ValueError, OSError: what is wrong, in one sentence.
        """
        console = Console(stderr=True, highlight=False, markup=False, emoji=False)
        if args.live and not console.is_terminal:
            raise ValueError("--live draws on standard error, which must be a terminal for it.")
        with _progress(console, f"loading {args.model}"):
            return cls._load(args, console, texts, rows)

    @classmethod
    def _load(
        cls, args: argparse.Namespace, console: Console, texts: list[str], rows: list[list[int]]
    ) -> "Job":
        # Configuration, headers and tokenizer suffice for all checks; the weights come last.
        directory = checkpoint.find(args.model)
        config = checkpoint.inspect(directory, args.adapter).config
        tok = checkpoint.open_tokenizer(directory, config)
        as_chat = _use_chat(args, tok)
        if texts:
            rows = _encode(args, tok, texts, config, chat=as_chat)
        else:
            texts = [" ".join(map(str, row)) for row in rows]
        decode = _decode_config(args, tok, config, rows)
        _check_masks(args, rows, config, decode)
        method = cache.make(args.cache, **args.cache_args)
        method.check(config, decode)
        check_rows(rows, config, decode)
        token_freq = choices.token_freq(args, config, decode)
        engine = Engine(
            checkpoint.load(directory, dtype=args.dtype, adapter=args.adapter),
            decode,
            method,
            token_freq=token_freq,
            history=args.history is not None,
            progress=functools.partial(_progress, console),
        )
        return cls(args, console, engine, as_chat, texts, rows)

    def ask(self, texts: list[str], rows: list[list[int]], turn: int = 0) -> Result:
        """Generates one batch, and draws it if asked to; every turn has its own seed."""
        key = jax.random.key((self.args.seed + turn) % 2**32)
        if not self.args.live:
            return self.engine.run(rows, key)
        with Canvas(self.console, texts, rows, self.engine.checkpoint) as canvas:
            return self.engine.run(rows, key, canvas.draw)

    def answer(self) -> None:
        """Answers the prompts and writes everything that was asked for."""
        echo = not self.args.json and not self.args.live
        alone = len(self.rows) == 1
        if echo and alone:
            self._echo(self.texts[0])  # something to read while the program compiles
        result = self.ask(self.texts, self.rows)
        if self.args.history is not None:
            self._write_history(result)
        for i, answer in enumerate(result.answers):
            if echo and not alone:
                self._echo(self.texts[i])
            print(
                self._json(i, answer, result) if self.args.json else self.text(answer), flush=True
            )
        self.note(self.statistics(result), style="dim")

    def converse(self) -> None:
        """Holds a conversation until the user leaves."""
        chat.converse(self._reply, self.note, remembers=self.as_chat)

    def _reply(self, messages: list[chat.Message], turn: int) -> str:
        tok, text = self.engine.checkpoint.tokenizer, messages[-1]["content"]
        if self.as_chat:
            row = tokenizer.encode_chat(tok, messages)
        else:
            (row,) = tokenizer.encode(tok, [text], chat=False)
        result = self.ask([text], [row], turn)
        self.note(self.statistics(result), style="dim")
        return self.text(result.answers[0])

    def text(self, answer: Answer) -> str:
        """The answer as it is printed: up to the first stop string; ids without a tokenizer."""
        if answer.text is None:
            return " ".join(map(str, answer.ids))
        return tokenizer.cut(answer.text, self.args.stop)

    def note(self, text: str, *, style: str | None = None) -> None:
        """Writes a line to standard error."""
        self.console.print(text, style=style, soft_wrap=True)

    def _echo(self, prompt: str) -> None:
        self.note(textwrap.shorten(prompt, 500, placeholder=" ..."), style="bold")

    def statistics(self, result: Result) -> str:
        steps = "" if self._steps is None else f"{self._steps} denoising steps, "
        left = sum(answer.masks for answer in result.answers)
        return (
            f"{result.tokens} tokens in {result.seconds:.2f} s "
            f"({result.tokens_per_second:.1f} tokens/s), compiled in {result.compile_seconds:.1f} "
            f"s; {steps}{result.nfe} model forwards of {result.positions:.1f} positions, "
            f"{result.tokens_per_forward:.2f} tokens per forward"
            + (f"; masks left: {left}" if left else "")
        )

    @property
    def _steps(self) -> int | None:
        """The planned number of denoising steps; None where tokens are counted instead."""
        decode = self.engine.decode
        return None if decode.pace == "fixed" else decode.steps or decode.gen_length

    def _json(self, i: int, answer: Answer, result: Result) -> str:
        return json.dumps(
            {
                "prompt": self.rows[i] if self.args.prompt_ids else self.texts[i],
                "text": None if answer.text is None else self.text(answer),
                "tokens": answer.ids,
                "stats": {
                    "tokens": answer.tokens,
                    "batch_tokens": result.tokens,
                    "seconds": round(result.seconds, 6),
                    "tokens_per_second": round(result.tokens_per_second, 3),
                    "compile_seconds": round(result.compile_seconds, 6),
                    "steps": self._steps,
                    "forwards": result.nfe,
                    "positions_per_forward": round(result.positions, 3),
                    "tokens_per_forward": round(result.tokens_per_forward, 3),
                },
            }
        )

    def _write_history(self, result: Result) -> None:
        """Writes the frames in one step."""
        history = {
            "frames": result.frames,
            "committed_at": [answer.committed_at for answer in result.answers],
            "mask_id": self.engine.checkpoint.config.mask_id,
        }
        files.write(self.args.history, (json.dumps(history) + "\n").encode())


def _use_chat(args: argparse.Namespace, tok: Any) -> bool:
    """Whether prompts are put as a conversation; refuses what needs a tokenizer or template."""
    if tok is None and args.stop:
        raise ValueError(f"{args.model} has no tokenizer, so --stop has no text to look into.")
    if tok is None and not args.prompt_ids:
        raise ValueError(
            f"{args.model} has no tokenizer; give the prompts as token ids with --prompt-ids."
        )
    if args.chat and not tokenizer.has_chat_template(tok):
        raise ValueError(f"The tokenizer of {args.model} has no chat template; leave --chat out.")
    if args.chat is None:
        return tokenizer.has_chat_template(tok) and not args.infill
    return args.chat


def _encode(
    args: argparse.Namespace, tok: Any, texts: list[str], config: Config, *, chat: bool
) -> list[list[int]]:
    """Token ids of the prompts, with the masks that --infill is about."""
    if args.infill:
        limit = config.max_length
        texts = [tokenizer.write_masks(tok, text, config.mask_id, limit=limit) for text in texts]
    return tokenizer.encode(tok, texts, chat=chat)


def _check_masks(
    args: argparse.Namespace, rows: list[list[int]], config: Config, decode: DecodeConfig
) -> None:
    """Refuses masks that nobody asked to fill, and prompts in which there is nothing to do."""
    for number, row in enumerate(rows, 1):
        which = "The prompt" if len(rows) == 1 else f"Prompt {number}"
        if config.mask_id in row and not decode.infill:
            raise ValueError(f"{which} holds the mask token; have it filled with --infill.")
        if config.mask_id not in row and decode.gen_length == 0 and decode.infill:
            mask = f"id {config.mask_id}" if args.prompt_ids else "[MASK], or [MASK*5] for five,"
            raise ValueError(
                f"{which} holds no mask, and nothing is to follow it; put {mask} where tokens are "
                "to be filled in, or set --gen-length."
            )


def _decode_config(
    args: argparse.Namespace, tok: Any, config: Config, rows: list[list[int]]
) -> DecodeConfig:
    """What the options, the model and the prompts say about decoding."""
    gen_length = args.gen_length
    if gen_length is None:
        gen_length = 0 if args.infill else min(128, config.max_length // 4)
    if gen_length == 0 and args.infill:
        for option, given in (
            ("--block-length", args.block_length is not None),
            ("--stop-at-eos", args.stop_at_eos),
        ):
            if given:
                raise ValueError(
                    f"{option} is about what follows the prompt, but with --infill nothing does; "
                    "leave it out, or set --gen-length."
                )
    infill = args.infill or (bool(args.prompt_ids) and any(config.mask_id in row for row in rows))
    return DecodeConfig.for_model(
        config,
        gen_length=gen_length,
        infill=infill or None,
        **choices.overrides(args, tok),
    )


@contextlib.contextmanager
def _progress(console: Console, phase: str) -> Iterator[None]:
    """Shows on standard error what goes on: a spinner in a terminal, a line elsewhere."""
    if console.is_terminal:
        with console.status(f"{phase} ..."):
            yield
    else:
        console.print(f"{phase} ...", soft_wrap=True)
        yield
