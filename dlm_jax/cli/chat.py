"""A conversation in the terminal: `python -m dlm_jax.generate --interactive`."""

import functools
import sys
from collections.abc import Callable

import jax

from dlm_jax import tokenizer
from dlm_jax.cli import options, streams
from dlm_jax.cli.live import Canvas
from dlm_jax.cli.model import Model
from dlm_jax.cli.prompts import Message
from dlm_jax.engine import PromptError
from dlm_jax.tokenizer import TemplateError


def hold(model: Model, *, as_chat: bool) -> None:
    """Holds a conversation with a model until the user leaves.

    Args:
      model: what replies.
      as_chat: whether earlier messages are part of the prompt, as its chat template puts them.
    """
    reply = functools.partial(_reply, model, as_chat)
    converse(reply, model.note, remembers=as_chat)


def _reply(model: Model, as_chat: bool, messages: list[Message], turn: int) -> str:
    """The next message; every turn has its own seed."""
    tok, text = model.checkpoint.tokenizer, messages[-1]["content"]
    if as_chat:
        row = tokenizer.encode_chat(tok, messages)
    else:
        (row,) = tokenizer.encode(tok, [text], chat=False)
    key = jax.random.key((model.args.seed + turn) % 2**32)
    engine = model.engine(model.decode)
    if model.args.live:
        with Canvas(model.console, [text], [row], model.checkpoint) as canvas:
            result = engine.run([row], key, canvas.draw)
    else:
        result = engine.run([row], key)
    model.note_statistics(result)
    return engine.text(result.answers[0], model.args.stop) or ""


def converse(
    reply: Callable[[list[Message], int], str], note: Callable[[str], None], *, remembers: bool
) -> None:
    """Reads messages from standard input and prints the replies, until either side ends it.

    A message that gets no reply, because the conversation outgrew the model's context, the chat
    template has no place for it or the user interrupted, is taken back; so is one that is no text.

    Args:
      reply: messages so far and number of the turn -> the next message.
      note: tells the user something about the conversation.
      remembers: whether earlier messages are part of the prompt.
    """
    if remembers:
        note("Type a message; /reset forgets the conversation, /quit or Ctrl-D ends it.")
    else:
        note("No chat template, so every line is a prompt of its own; /quit or Ctrl-D ends.")
    streams.take_any_bytes()
    messages: list[Message] = []
    turn = 0
    while (line := _read()) not in (None, "/quit"):
        if not options.is_unicode(line):
            note("That is no valid Unicode text, so nothing is made of it; type it anew.")
        elif line == "/reset":
            messages = []
            note("The conversation starts anew.")
        elif line.startswith("/"):
            note(f"{line.split()[0]} is no command; there are /reset and /quit.")
        elif line:
            asked = [*messages, {"role": "user", "content": line}]
            try:
                text = reply(asked, turn)
            except (PromptError, TemplateError) as error:
                note(f"{error} Or forget the conversation with /reset." if messages else str(error))
                continue
            except KeyboardInterrupt:
                note("Interrupted.")
                continue
            print(text, flush=True)
            turn += 1
            if remembers:
                messages = [*asked, {"role": "assistant", "content": text}]


def _read() -> str | None:
    """The next line without blanks around it; None at the end of the input or on Ctrl-C."""
    prompt = "> " if sys.stdin.isatty() else ""
    try:
        if prompt and sys.stdout.isatty():
            import readline  # noqa: F401 (gives `input` line editing)

            return input(prompt).strip()
        # `input` would write the prompt to standard output.
        print(prompt, end="", file=sys.stderr, flush=True)
        return input().strip()
    except (EOFError, KeyboardInterrupt):
        print(file=sys.stderr)
        return None
