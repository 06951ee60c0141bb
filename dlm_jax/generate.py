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
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from dlm_jax import compilation, files
from dlm_jax.cli import options, output, prompts

PROGRAM = "dlm-jax-generate"


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    args = parse(argv)
    return options.command(
        PROGRAM,
        functools.partial(_prepare, args),
        memory="lower --batch-size, or take shorter prompts",
        prints=args.output is None,
    )


def _prepare(args: argparse.Namespace) -> Callable[[], None]:
    check(args)
    given = [] if args.interactive else prompts.read(args)

    from dlm_jax.cli import run

    compilation.check_devices()
    compilation.use_cache(args.compile_cache)
    return run.prepare(args, given)


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

    add = parser.add_argument_group("prompts").add_argument
    add("words", nargs="*", metavar="PROMPT", help="a prompt; - reads it from standard input")
    add("--prompt", action="append", default=[], metavar="TEXT", help="the same; may be repeated")
    add(
        "--prompt-file",
        action="append",
        default=[],
        metavar="FILE",
        help="a file that is one prompt, or a list of them as JSON lines or JSON: strings, or "
        "objects with a 'prompt', 'messages' or 'prompt_ids', and perhaps an 'id', a 'seed' and a "
        "'gen_length'; may be repeated",
    )
    add(
        "--prompt-format",
        choices=prompts.FORMATS,
        help="what files and standard input are: one prompt, a prompt or a JSON value on every "
        "line, a JSON list [by the name, else by the content]",
    )
    add(
        "--skip-invalid",
        action="store_true",
        help="leave out prompts of a list that are wrong; their answers are an 'error'",
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
    add(
        "--json",
        action="store_true",
        dest="as_json",
        help="one JSON object per prompt and line",
    )
    add(
        "--output",
        type=options.file,
        metavar="FILE",
        help="write the answers there and not to standard output; FILE.jsonl as with --json",
    )
    add(
        "--resume",
        action="store_true",
        help="go on with the answers that an interrupted run kept for --output",
    )
    add(
        "--batch-size",
        type=options.whole,
        metavar="N",
        help="prompts at a time [as many as the memory holds, 16 on a CPU]",
    )
    add(
        "--stop",
        action="append",
        default=[],
        metavar="TEXT",
        help="cut the answer at this text; may be repeated",
    )
    add(
        "--history",
        type=options.file,
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
    given = bool(args.words or args.prompt or args.prompt_file)
    if args.prompt_ids is not None:
        if given:
            raise ValueError("--prompt-ids stands for all prompts; give no others beside it.")
        if args.chat:
            raise ValueError("--prompt-ids are taken as they are; leave --chat out.")
    if args.interactive:
        for wanted, option in (
            (given, "prompts"),
            (args.prompt_ids, "--prompt-ids"),
            (args.as_json, "--json"),
            (args.output, "--output"),
            (args.batch_size, "--batch-size"),
            (args.history, "--history"),
            (args.infill, "--infill"),
        ):
            if wanted:
                raise ValueError(f"--interactive asks for its prompts; {option} cannot go with it.")
    if "" in args.stop:
        raise ValueError("--stop is empty; it must be the text at which to cut.")
    options.check(args)
    if args.batch_size is not None and args.batch_size < 1:
        raise ValueError(f"--batch-size is {args.batch_size}; it must be at least 1.")
    if args.resume and args.history is not None:
        raise ValueError(
            "--history is about one whole batch, of which --resume would ask a part; leave one out."
        )
    if args.resume and args.output is None:
        raise ValueError("--resume goes on with the answers of a file; name it with --output.")
    read = {
        Path(file).resolve() for file in (*args.prompt_file, args.prompt_ids, args.debias) if file
    }
    for option, target in (("--output", args.output), ("--history", args.history)):
        if target is not None and target.resolve() in read:
            raise ValueError(f"{target} is read by this command; {option} must be another file.")
    if args.output is not None and args.output == args.history:
        raise ValueError(f"{args.output} cannot be both --output and --history; name two files.")
    if args.output is not None:
        output.check(args.output, resume=args.resume)
        args.as_json = args.as_json or args.output.suffix in (".json", ".jsonl", ".ndjson")
    if args.history is not None:
        files.check_target(args.history, "--history")


if __name__ == "__main__":
    sys.exit(main())
