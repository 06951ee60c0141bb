"""From prompts to work: rows of token ids, each with its decoding and seed, in groups of like size.

    Prompt --encode--> Question --group--> Request(group=Group, work=Question)

Everything that configuration and tokenizer can refuse is refused here, before weights are read.
"""

import argparse
import bisect
import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from dlm_jax import tokenizer
from dlm_jax.batching.batches import Request
from dlm_jax.batching.responses import digest
from dlm_jax.cache import CacheMethod
from dlm_jax.cli import choices
from dlm_jax.cli.prompts import Prompt, titles
from dlm_jax.decoding.config import DecodeConfig
from dlm_jax.engine import check_rows
from dlm_jax.models import Config


class Question(NamedTuple):
    """A prompt that the model can take."""

    prompt: Prompt
    row: list[int]
    """Token ids."""
    decode: DecodeConfig
    seed: int


class Group(NamedTuple):
    """Questions of a group share compiled programs."""

    decode: DecodeConfig
    slots: int
    """Prompt slots, to which shorter prompts are padded."""


@dataclasses.dataclass(frozen=True)
class Planner:
    """Makes questions of prompts.

    Attributes:
      args: the options.
      tok: the tokenizer, or None.
      config: of the model.
      method: the cache method.
      as_chat: whether texts are put as a conversation.
    """

    args: argparse.Namespace
    tok: Any
    config: Config
    method: CacheMethod
    as_chat: bool

    def questions(self, prompts: Sequence[Prompt], usual: DecodeConfig) -> list[Question | Prompt]:
        """A question for each prompt; a `Prompt` with an error, if that is to be skipped.

        Args:
          prompts: as they were given.
          usual: the decoding of prompts that ask for nothing else.

        Raises:
          ValueError: what is wrong, in one sentence; with `args.skip_invalid` only if it concerns
            all prompts.
        """
        # Texts with masks are filled in by request, ids wherever they hold any. The rows of
        # --prompt-ids belong together: all are shown whole, or none is.
        masks = any(self.config.mask_id in (prompt.ids or ()) for prompt in prompts)
        whole = self.args.infill or (self.args.prompt_ids is not None and masks)
        known: dict[tuple[int | None, bool], DecodeConfig] = {(None, self.args.infill): usual}

        def question(number: int, prompt: Prompt, title: str) -> Question:
            infill = whole or self.config.mask_id in (prompt.ids or ())
            how = (prompt.gen_length, infill)
            if how not in known:
                with _naming(title, prompt.gen_length is not None):
                    known[how] = self.decoding(prompt.gen_length, infill=infill)
            with _naming(title, prompt.place is not None, tokenizer.TemplateError):
                row = self._row(prompt, title)
            self._check_masks(title, row, known[how], prompt)
            check_rows([row], self.config, known[how], titles=[title])
            seed = (self.args.seed + number) % 2**32 if prompt.seed is None else prompt.seed
            return Question(prompt, row, known[how], seed)

        found: list[Question | Prompt] = []
        for number, (prompt, title) in enumerate(zip(prompts, titles(prompts), strict=True)):
            if prompt.error is not None:
                found.append(prompt)
                continue
            try:
                found.append(question(number, prompt, title))
            except ValueError as error:
                if not self.args.skip_invalid:
                    raise
                found.append(dataclasses.replace(prompt, error=str(error)))
        return found

    def decoding(self, gen_length: int | None, *, infill: bool) -> DecodeConfig:
        """What the options and the model say about decoding; None takes the options' length."""
        args, config = self.args, self.config
        if gen_length is None:
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
                        f"{option} is about what follows the prompt, but with --infill nothing "
                        "does; leave it out, or set --gen-length."
                    )
        decode = DecodeConfig.for_model(
            config,
            gen_length=gen_length,
            infill=infill or None,
            **choices.overrides(args, self.tok),
        )
        self.method.check(config, decode)
        return decode

    def _row(self, prompt: Prompt, title: str) -> list[int]:
        """The prompt's token ids, with the masks that --infill is about."""
        args, tok, config = self.args, self.tok, self.config
        if prompt.ids is not None:
            return list(prompt.ids)
        if tok is None:
            raise ValueError(
                f"{args.model} has no tokenizer; give the prompts as token ids with --prompt-ids."
            )
        if prompt.messages is not None:
            if args.chat is False or args.infill:
                option = "--infill" if args.infill else "--no-chat"
                raise ValueError(f"{title} is a conversation; {option} cannot go with it.")
            if not tokenizer.has_chat_template(tok):
                raise ValueError(
                    f"{title} is a conversation, and the tokenizer of {args.model} has no chat "
                    'template; give the text as "prompt".'
                )
            return tokenizer.encode_chat(tok, prompt.messages)
        text = prompt.text or ""
        if not text:
            if args.chat:
                raise ValueError(f"{title} is empty; a user's message must hold some text.")
            return [tokenizer.beginning(tok, config.eos_id)]
        if args.infill:
            text = tokenizer.write_masks(tok, text, config.mask_id, limit=config.max_length)
        return tokenizer.encode(tok, [text], chat=self.as_chat)[0]

    def _check_masks(
        self, title: str, row: list[int], decode: DecodeConfig, prompt: Prompt
    ) -> None:
        """Refuses masks that nobody asked to fill, and prompts in which there is nothing to do."""
        mask_id = self.config.mask_id
        if mask_id in row and not decode.infill:
            raise ValueError(f"{title} holds the mask token; have it filled with --infill.")
        if mask_id not in row and decode.gen_length == 0 and decode.infill:
            mask = f"id {mask_id}" if prompt.ids is not None else "[MASK], or [MASK*5] for five,"
            raise ValueError(
                f"{title} holds no mask, and nothing is to follow it; put {mask} where tokens are "
                "to be filled in, or set --gen-length."
            )


@contextlib.contextmanager
def _naming(title: str, wanted: bool = True, kind: type[ValueError] = ValueError) -> Iterator[None]:
    """Has errors say which prompt they are about, if that is wanted."""
    try:
        yield
    except kind as error:
        if not wanted:
            raise
        raise ValueError(f"{title.rstrip(',')}: {error}") from error


def requests(
    questions: Sequence[Question],
    config: Config,
    rows: int,
    identity: str = "",
    *,
    apart: bool = False,
) -> list[Request]:
    """The questions as work for batches of like length.

    Lengths are rounded up to few different ones, so that few programs are compiled; a group that
    would not fill a batch joins the next longer one.

    Args:
      questions: prompts that the model can take.
      config: of the model.
      rows: of a batch.
      identity: what answers depend on beside row, decoding and seed.
      apart: whether each is answered even if it equals another one.
    """
    lengths: dict[DecodeConfig, list[int]] = {}
    for question in questions:
        lengths.setdefault(question.decode, []).append(len(question.row))
    rungs = {
        decode: _rungs(sorted(each), config.room(decode.gen_length), rows)
        for decode, each in lengths.items()
    }

    def request(number: int, question: Question) -> Request:
        decode, row = question.decode, question.row
        steps = rungs[decode]
        slots = steps[bisect.bisect_left(steps, len(row))]
        key = digest(identity, repr(decode), row, question.seed, number if apart else None)
        return Request(key, Group(decode, slots), len(row), question)

    return [request(number, question) for number, question in enumerate(questions)]


def _rungs(lengths: list[int], room: int, rows: int) -> list[int]:
    """Numbers of prompt slots, growing; every length belongs to the first that holds it."""
    found: list[int] = []
    count = 0
    for i, length in enumerate(lengths):
        count += 1
        last = i + 1 == len(lengths)
        if last or (_rung(lengths[i + 1]) > _rung(length) and count >= rows):
            found.append(min(tokenizer.slots(length), max(room, length)))
            count = 0
    return found


def _rung(length: int) -> int:
    """1 and 1.5 times the powers of two, from `tokenizer.BUCKET` on, in whole buckets.

    Whole, since a group takes every length that its slots hold, also those above its rung.
    """
    rung = tokenizer.BUCKET
    while rung < length:
        rung = rung * 3 // 2 if rung & (rung - 1) == 0 else rung * 4 // 3
    return tokenizer.slots(rung)
