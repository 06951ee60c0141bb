"""Text to text on the command line.

    python -m dlm_jax.generate
    python -m dlm_jax.generate --model DIR --live "Why is the sky blue?"

Without arguments the embedded model answers a question of its kind. The generated text goes to
standard output and everything else to standard error. A value that cannot work ends the command
with one sentence and exit status 2, before any long work starts.

This module knows the options and the prompts they point to, and imports nothing that takes time;
`dlm_jax.cli.run`, which imports JAX, runs what was asked for.
"""

import argparse
import functools
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from dlm_jax import compilation, files
from dlm_jax.cli import options

PROGRAM = "dlm-jax-generate"
QUESTION = "Tom has 7 boxes with 4 apples each. He gives away 5 apples. How many apples are left?"
"""What it is asked without a prompt."""


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    args = parse(argv)
    return options.command(
        PROGRAM, functools.partial(_prepare, args), memory="take fewer or shorter prompts"
    )


def _prepare(args: argparse.Namespace) -> Callable[[], None]:
    check(args)
    texts = read_texts(args) if not args.interactive and args.prompt_ids is None else []
    rows = read_ids(args.prompt_ids) if args.prompt_ids is not None else []

    from dlm_jax.cli.run import Job

    compilation.check_devices()
    compilation.use_cache(args.compile_cache)
    job = Job.prepare(args, texts, rows)
    return job.converse if args.interactive else job.answer


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parses the arguments; ends the process with status 2 if they are wrong in themselves."""
    parser = options.Parser(
        prog=PROGRAM,
        description="Generates text with a masked diffusion language model. The text goes to "
        "standard output, everything else to standard error. Without arguments the embedded model "
        "answers a question of its kind.",
        allow_abbrev=False,
    )
    options.add_model(parser.add_argument_group("model").add_argument)

    add = parser.add_argument_group("prompts; several make one batch").add_argument
    add("words", nargs="*", metavar="PROMPT", help="a prompt; - reads it from standard input")
    add("--prompt", action="append", default=[], metavar="TEXT", help="the same; may be repeated")
    add(
        "--prompt-file",
        action="append",
        default=[],
        metavar="FILE",
        help="a file that is one prompt, or FILE.jsonl with a JSON string, or an object with a "
        "'prompt', on every line; may be repeated",
    )
    add(
        "--prompt-ids",
        metavar="FILE",
        help="a JSON list of lists of token ids; mask ids among them are filled in",
    )
    add(
        "--chat",
        action=argparse.BooleanOptionalAction,
        help="put each prompt as a user's message [if the tokenizer has a chat template]",
    )
    add("--interactive", action="store_true", help="hold a conversation")

    family = "as the model family does"
    add = parser.add_argument_group("decoding").add_argument
    add(
        "--infill",
        action="store_true",
        help="fill the masks in the prompts: [MASK] is one, [MASK*5] five; the text is the whole "
        "row",
    )
    options.add_decoding(
        add,
        gen_length="128, or a quarter of the model's context if that is less; with --infill none",
        otherwise=family,
    )
    add(
        "--max-forwards",
        type=options.whole,
        metavar="N",
        help="stop after so many model forwards [off]",
    )
    add = parser.add_argument_group("how many tokens a step commits").add_argument
    options.add_pace(add, otherwise=family)
    add = parser.add_argument_group("which tokens a step commits").add_argument
    options.add_order(add, otherwise=family)
    options.add_cache(parser.add_argument_group("cache").add_argument)

    add = parser.add_argument_group("output").add_argument
    add("--json", action="store_true", help="one JSON object per prompt and line")
    add(
        "--stop",
        action="append",
        default=[],
        metavar="TEXT",
        help="cut the answer at this text; may be repeated",
    )
    add(
        "--history",
        type=Path,
        metavar="FILE",
        help="write the canvas after every step as JSON",
    )
    add("--live", action="store_true", help="draw the denoising in the terminal, step by step")
    return parser.parse_args(argv)


def check(args: argparse.Namespace) -> None:
    """Refuses options that contradict each other, and a target that cannot be written.

    Raises:
      ValueError: one sentence.
    """
    prompts = bool(args.words or args.prompt or args.prompt_file)
    if args.prompt_ids is not None:
        if prompts:
            raise ValueError("--prompt-ids stands for all prompts; give no others beside it.")
        if args.chat:
            raise ValueError("--prompt-ids are taken as they are; leave --chat out.")
    if args.interactive:
        for given, option in (
            (prompts, "prompts"),
            (args.prompt_ids, "--prompt-ids"),
            (args.json, "--json"),
            (args.history, "--history"),
            (args.infill, "--infill"),
        ):
            if given:
                raise ValueError(f"--interactive asks for its prompts; {option} cannot go with it.")
    if "" in args.stop:
        raise ValueError("--stop is empty; it must be the text at which to cut.")
    options.check(args)
    if args.history is not None:
        files.check_target(args.history, "--history")


def read_texts(args: argparse.Namespace) -> list[str]:
    """The prompts: positional, --prompt, --prompt-file, in this order; without any the default.

    Raises:
      ValueError, OSError: a prompt is empty or cannot be read.
    """
    sources = [("The prompt", text) for text in (*args.words, *args.prompt)]
    found = [
        ("Standard input", _read_file("-")) if text == "-" else (name, text)
        for name, text in sources
    ]
    for file in args.prompt_file:
        if file.endswith(".jsonl"):
            found += _read_lines(file)
        else:
            found.append(("Standard input" if file == "-" else file, _read_file(file)))
    for name, text in found:
        if not text.strip():
            raise ValueError(f"{name} is empty; a prompt must hold some text.")
        if not options.is_unicode(text):
            raise ValueError(f"{name} is no valid Unicode text.")
    return [text for _, text in found] or [QUESTION]


def read_ids(file: str) -> list[list[int]]:
    """The token ids in a --prompt-ids file.

    Raises:
      ValueError, OSError: the file cannot be read or is no list of lists of integers.
    """
    try:
        rows = json.loads(_read_file(file))
    except json.JSONDecodeError as error:
        raise ValueError(f"{file} is not JSON: {error}.") from error
    whole = isinstance(rows, list) and all(
        isinstance(row, list) and all(type(token) is int for token in row) for row in rows
    )
    if not whole or not rows:
        raise ValueError(f"{file} must hold a list of lists of token ids, one list per prompt.")
    return rows


def _read_lines(file: str) -> list[tuple[str, str]]:
    found = []
    for number, line in enumerate(_read_file(file).splitlines(), 1):
        name = f"{file}, line {number},"
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{name} is not JSON: {error}.") from error
        text = value.get("prompt") if isinstance(value, dict) else value
        if not isinstance(text, str):
            raise ValueError(f'{name} must be a string or an object with a string as "prompt".')
        found.append((name, text))
    if not found:
        raise ValueError(f"{file} holds no prompt; every line must be one.")
    return found


def _read_file(file: str) -> str:
    """A text file, or standard input for `-`, without the newline at its end."""
    try:
        text = sys.stdin.read() if file == "-" else Path(file).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 text: {error}.") from error
    return text.removesuffix("\n")


if __name__ == "__main__":
    sys.exit(main())
