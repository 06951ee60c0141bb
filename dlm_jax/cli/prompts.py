"""Prompts, from the command line, files and standard input: what they say, not yet what it means.

Nothing here takes time to import. A prompt is a text, a conversation or token ids, and may bring an
id, a seed and a length of its own. What is wrong with one is said with the place where it stands.
"""

import argparse
import dataclasses
import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from dlm_jax.cli import options

QUESTION = "Tom has 7 boxes with 4 apples each. He gives away 5 apples. How many apples are left?"
"""What is asked without a prompt."""

FORMATS = ("text", "lines", "jsonl", "json")
"""What a file can be: one prompt; a prompt, a JSON value on every line; a JSON list."""

ROLES = ("system", "user", "assistant")
KINDS = ("prompt", "messages", "prompt_ids")
"""Fields of which an object has exactly one."""

Message = dict[str, str]
"""`{"role": one of ROLES, "content": text}`, as chat templates take it."""

_SUFFIXES = {".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json"}
_OBJECT = re.compile(rf'\s*\{{\s*"({"|".join(KINDS)})"\s*:')


@dataclasses.dataclass(frozen=True)
class Prompt:
    """One prompt, as it was given.

    Attributes:
      text: a text, or None.
      messages: a conversation that ends with the user's turn, or None.
      ids: token ids, or None.
      place: where it stands, as `questions.jsonl, line 3,`; None if it has no place but its number.
      id: what its answer is to be told by; None leaves that to the order.
      seed: what is drawn for it; None takes the command's.
      gen_length: tokens to generate; None takes the command's.
      error: what is wrong with it, in one sentence; None if nothing is.
    """

    text: str | None = None
    messages: tuple[Message, ...] | None = None
    ids: tuple[int, ...] | None = None
    place: str | None = None
    id: str | int | None = None
    seed: int | None = None
    gen_length: int | None = None
    error: str | None = None

    @property
    def title(self) -> str:
        """What is shown of it in one go."""
        if self.messages is not None:
            return self.messages[-1]["content"]
        return " ".join(map(str, self.ids)) if self.text is None and self.ids else self.text or ""

    @property
    def fields(self) -> dict[str, Any]:
        """What tells an answer's line which prompt it belongs to."""
        known: dict[str, Any] = {} if self.id is None else {"id": self.id}
        if self.messages is not None:
            known["messages"] = list(self.messages)
        elif self.ids is not None:
            known["prompt"] = list(self.ids)
        elif self.text is not None:
            known["prompt"] = self.text
        return known


def read(args: argparse.Namespace) -> list[Prompt]:
    """The prompts: positional, --prompt, --prompt-file, in this order; without any the default.

    --prompt-ids stands for all of them. With --skip-invalid a prompt of a list that is wrong is one
    with an `error`.

    Raises:
      ValueError, OSError: a prompt is wrong or cannot be read.
    """
    if args.prompt_ids is not None:
        return [_checked(Prompt(ids=tuple(row))) for row in _id_lists(args.prompt_ids)]
    found: list[Prompt] = []
    for text in (*args.words, *args.prompt):
        found += _file("-", args) if text == "-" else [_checked(Prompt(text))]
    for file in args.prompt_file:
        found += _file(file, args)
    return found or [Prompt(QUESTION)]


def _file(file: str, args: argparse.Namespace) -> list[Prompt]:
    """The prompts in a file, or in standard input for `-`."""
    name, text = "Standard input" if file == "-" else file, read_text(file)
    kind = args.prompt_format or _SUFFIXES.get(Path(file).suffix) or _guess(name, text)
    if kind == "text":
        if not text.strip():
            raise ValueError(f"{name} is empty; a prompt must hold some text.")
        return [_checked(Prompt(text.removesuffix("\n")), name)]
    if kind == "json":
        items = _json(name, text, "if it holds a value on each line, give --prompt-format jsonl")
        items = items if isinstance(items, list) else [items]
        places = [f"{name}, item {number}," for number in range(1, len(items) + 1)]
        values: list[Callable[[], Any]] = [lambda item=item: item for item in items]
    else:
        # Only a newline ends a line; JSON may hold what else Unicode calls a line's end.
        lines = [(i, line) for i, line in enumerate(text.split("\n"), 1) if line.strip()]
        places = [f"{name}, line {number}," for number, _ in lines]
        parse = json.loads if kind == "jsonl" else str
        values = [lambda line=line: parse(line) for _, line in lines]
    if not values:
        raise ValueError(f"{name} holds no prompt; every line must be one.")
    found = []
    for place, value in zip(places, values, strict=True):
        try:
            found.append(_prompt(place, value))
        except ValueError as error:
            if not args.skip_invalid:
                raise
            found.append(Prompt(place=place, id=_id_of(value), error=str(error)))
    return found


def _prompt(place: str, value: Callable[[], Any]) -> Prompt:
    """A prompt of a list: a text, token ids, or an object with one of `KINDS`."""
    item: Any
    try:
        item = value()
    except json.JSONDecodeError as error:
        raise ValueError(f"{place} is not JSON: {error.msg} at column {error.colno}.") from error
    except RecursionError as error:
        raise ValueError(f"{place} is nested too deeply to be read.") from error
    except ValueError as error:  # a number of thousands of digits
        raise ValueError(f"{place} cannot be read as JSON: {error}.") from error
    shorts = {str: "prompt", list: "prompt_ids"}
    if type(item) in shorts:
        item = {shorts[type(item)]: item}
    if not isinstance(item, dict) or sum(item.get(kind) is not None for kind in KINDS) != 1:
        raise ValueError(
            f'{place} must be a string or an object with a string as "prompt", a conversation as '
            '"messages" or token ids as "prompt_ids", and only one of them.'
        )
    text, messages, ids = (item.get(kind) for kind in KINDS)
    if text is not None and not isinstance(text, str):
        raise ValueError(
            f'{place} must be a string or an object with a string as "prompt", not {text!r:.50}.'
        )
    if ids is not None and not _are_ids(ids):
        raise ValueError(f'{place} has "prompt_ids" that are no list of token ids.')
    if ids == []:
        raise ValueError(f'{place} has empty "prompt_ids"; they must hold at least one token.')
    name = item.get("id")
    if name is not None and type(name) not in (str, int):
        raise ValueError(f'{place} has {name!r:.50} as "id"; it must be a string or a number.')
    prompt = Prompt(
        text=text,
        messages=None if messages is None else _messages(place, messages),
        ids=None if ids is None else tuple(ids),
        place=place,
        id=name,
        seed=_whole(place, item, "seed", least=0, below=2**32),
        gen_length=_whole(place, item, "gen_length", least=1, below=2**31),
    )
    return _checked(prompt, place)


def _id_of(value: Callable[[], Any]) -> str | int | None:
    """The id of a prompt that is wrong, if that is not what is wrong."""
    try:
        item = value()
    except (ValueError, RecursionError):
        return None
    name = item.get("id") if isinstance(item, dict) else None
    return name if type(name) in (str, int) else None


def _messages(place: str, value: Any) -> tuple[Message, ...]:
    right = isinstance(value, list) and all(
        isinstance(message, dict)
        and message.get("role") in ROLES
        and isinstance(message.get("content"), str)
        for message in value
    )
    if not right or not value:
        raise ValueError(
            f'{place} has "messages" that are no list of objects with a "role" '
            f'({", ".join(ROLES)}) and a text as "content".'
        )
    if value[-1]["role"] != "user":
        raise ValueError(
            f'{place} has "messages" that end with a turn of the {value[-1]["role"]}; the last one '
            "must be the user's, which is answered."
        )
    return tuple({"role": m["role"], "content": m["content"]} for m in value)


def _whole(place: str, item: dict[str, Any], name: str, *, least: int, below: int) -> int | None:
    value = item.get(name)
    if value is None or (type(value) is int and least <= value < below):
        return value
    raise ValueError(
        f'{place} has {value!r:.50} as "{name}"; it must be a whole number from {least} to '
        f"{below - 1}."
    )


def _checked(prompt: Prompt, name: str = "The prompt") -> Prompt:
    """The prompt, unless its text is blank or none. An empty one asks for text from nothing."""
    contents = [] if prompt.text is None else [prompt.text]
    contents += [message["content"] for message in prompt.messages or ()]
    for text in contents:
        if not options.is_unicode(text):
            raise ValueError(f"{name} is no valid Unicode text.")
    if prompt.text and not prompt.text.strip():
        raise ValueError(f"{name} is blank, neither empty nor a text; it must be one of the two.")
    return prompt


def _guess(name: str, text: str) -> str:
    """The format that the content shows.

    Raises:
      ValueError: it is JSON, but no prompts, so that nobody knows what is meant.
    """
    lines = [line for line in text.split("\n") if line.strip()]
    if _OBJECT.match(text):
        return "json" if _is_json(text) and not _is_json(lines[0]) else "jsonl"
    whole = _try_json(text)
    if isinstance(whole, list) and whole and all(map(_is_item, whole)):
        return "json"
    values = [_try_json(line) for line in lines]
    if any(map(_is_object, values)) and isinstance(values[0], dict | list | str):
        return "jsonl"
    if len(lines) > 1 and all(isinstance(value, str) or _is_item(value) for value in values):
        return "jsonl"
    found = values if whole is None else [whole]
    if lines and all(isinstance(value, dict | list) for value in found):
        raise ValueError(
            f"{name} is JSON, but none of prompts; say with --prompt-format what it is, as "
            "--prompt-format text for one prompt."
        )
    return "text"


def _is_item(value: Any) -> bool:
    return isinstance(value, str) or _is_object(value) or (_are_ids(value) and bool(value))


def _is_object(value: Any) -> bool:
    return isinstance(value, dict) and any(kind in value for kind in KINDS)


def _are_ids(value: Any) -> bool:
    return isinstance(value, list) and all(type(token) is int for token in value)


def _is_json(text: str) -> bool:
    return _try_json(text) is not None


def _try_json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _json(name: str, text: str, otherwise: str | None = None) -> Any:
    """The value of a JSON text; errors end with what to do `otherwise`."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        advice = "" if otherwise is None else f"; {otherwise}"
        raise ValueError(f"{name} is not JSON: {error}{advice}.") from error


def _id_lists(file: str) -> list[list[int]]:
    """The token ids in a --prompt-ids file."""
    rows = _json(file, read_text(file))
    if not isinstance(rows, list) or not rows or not all(map(_are_ids, rows)):
        raise ValueError(f"{file} must hold a list of lists of token ids, one list per prompt.")
    return rows


def read_text(file: str) -> str:
    """A UTF-8 text file, or standard input for `-`, without a byte order mark.

    Raises:
      ValueError, OSError: it is no UTF-8 text, or cannot be read.
    """
    try:
        text = _standard_input() if file == "-" else Path(file).read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        name = "Standard input" if file == "-" else file
        raise ValueError(f"{name} is not UTF-8 text: {error}.") from error
    return text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")


def _standard_input() -> str:
    if sys.stdin is None:
        raise ValueError("Standard input is closed; - reads a prompt from it.")
    if hasattr(sys.stdin, "buffer"):  # whatever the locale says of its encoding
        return sys.stdin.buffer.read().decode("utf-8-sig")
    return sys.stdin.read()


def titles(prompts: Sequence[Prompt]) -> list[str]:
    """What errors call the prompts: by their places, else by their numbers."""
    alone = len(prompts) == 1
    return [
        prompt.place or ("The prompt" if alone else f"Prompt {number}")
        for number, prompt in enumerate(prompts, 1)
    ]
