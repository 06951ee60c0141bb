"""From sound options to the work that they ask for: what `dlm_jax.generate` imports late.

prompts -> questions -> answering: batches -> Engine -> responses -> text, JSON, history
or a conversation
"""

import argparse
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

import dlm_jax
from dlm_jax import cache, checkpoint, tokenizer
from dlm_jax.batching import fit
from dlm_jax.batching.fingerprint import fingerprint
from dlm_jax.batching.responses import digest
from dlm_jax.cli import chat, choices, output, plan, progress, streams
from dlm_jax.cli.answering import Answering, Line
from dlm_jax.cli.model import Model
from dlm_jax.cli.plan import Planner, Question
from dlm_jax.cli.prompts import Prompt


def prepare(args: argparse.Namespace, prompts: Sequence[Prompt]) -> Callable[[], None]:
    """Checks all that the model decides, loads it, and returns the long work.

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
    with progress.Spinner(console).phase(f"loading {args.model}"):
        return _prepare(args, console, directory, prompts)


def _prepare(
    args: argparse.Namespace, console: Console, directory: Path, prompts: Sequence[Prompt]
) -> Callable[[], None]:
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
    decode = planner.decoding(None, infill=args.infill)
    questions = planner.questions(prompts, decode)
    token_freq = choices.token_freq(args, config, decode)

    asked = [question for question in questions if isinstance(question, Question)]
    one_batch = args.history is not None
    rows = len(asked) if one_batch else args.batch_size or fit.CPU
    identity = digest(
        dlm_jax.__version__,
        fingerprint(directory, args.adapter),
        [args.dtype, args.attention, repr(method), args.stop],
        None if token_freq is None else token_freq.tolist(),
    )
    requests = plan.requests(asked, config, max(rows, 1), identity, apart=one_batch)
    if one_batch:
        _check_history(args, [request.group for request in requests])

    with output.keeping(args.output) as responses:
        opened = None
        if asked or args.interactive:
            opened = checkpoint.load(
                directory, dtype=args.dtype, adapter=args.adapter, attention=args.attention
            )
    model = Model(args, console, opened, decode, method, token_freq, progress.Spinner(console))
    if args.interactive:
        return functools.partial(chat.hold, model, as_chat=as_chat)
    work = iter(requests)
    lines = [
        Line(question.prompt, next(work))
        if isinstance(question, Question)
        else Line(question, None)
        for question in questions
    ]
    return Answering(args, model, lines, responses).run


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


def _check_history(args: argparse.Namespace, groups: Sequence[plan.Group]) -> None:
    """Refuses a history of several batches."""
    small = args.batch_size is not None and args.batch_size < len(groups)
    if small or len(set(groups)) > 1:
        raise ValueError(
            "--history is about one batch; take prompts of one gen_length, all with masks to fill "
            "or none, and leave --batch-size out."
        )
