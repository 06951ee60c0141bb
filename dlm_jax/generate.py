"""Text to text on the command line.

    python -m dlm_jax.generate
    python -m dlm_jax.generate --model DIR --live "Why is the sky blue?"

Without arguments the embedded model answers a question of its kind. The generated text goes to
standard output and everything else to standard error. A value that cannot work ends the command
with one sentence and exit status 2, before any long work starts.

This module knows the options and the prompts they point to, and imports nothing that takes time;
`dlm_jax.job`, which imports JAX, runs what was asked for.
"""

import argparse
import json
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from dlm_jax import compilation

PROGRAM = "dlm-jax-generate"
MODEL = "llada-tiny-math"
"""The embedded model that is used without --model."""
QUESTION = "Tom has 7 boxes with 4 apples each. He gives away 5 apples. How many apples are left?"
"""What it is asked without a prompt."""


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    args = parse(argv)
    try:
        try:
            check(args)
            asked = not args.interactive and args.prompt_ids is None
            texts = read_texts(args) if asked else []
            rows = read_ids(args.prompt_ids) if args.prompt_ids is not None else []

            from dlm_jax.job import Job

            compilation.use_cache(args.compile_cache)
            job = Job.prepare(args, texts, rows)
        except (ValueError, OSError) as error:
            return _fail(error, 2)
        if args.interactive:
            job.converse()
        else:
            job.answer()
        sys.stdout.flush()
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # Nobody reads on. Without this, Python would complain when it closes standard output.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:
        return _fail(error, 1)
    except RuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return _fail(MemoryError("Not enough memory; take fewer or shorter prompts."), 1)
    return 0


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one sentence, without the usage that --help shows."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; see --help\n")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parses the arguments; ends the process with status 2 if they are wrong in themselves."""
    parser = _Parser(
        prog=PROGRAM,
        description="Generates text with a masked diffusion language model. The text goes to "
        "standard output, everything else to standard error. Without arguments the embedded model "
        "answers a question of its kind.",
        allow_abbrev=False,
    )
    add = parser.add_argument_group("model").add_argument
    add("--model", default=MODEL, metavar="DIR", help=f"checkpoint or embedded model [{MODEL}]")
    add(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="dtype of the parameters [as stored]",
    )
    compilation.add_option(add)

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

    add = parser.add_argument_group("decoding").add_argument
    add(
        "--gen-length",
        type=_whole,
        metavar="G",
        help="tokens to generate [128, or a quarter of the model's context if that is less; with "
        "--infill none]",
    )
    add(
        "--infill",
        action="store_true",
        help="fill the masks in the prompts: [MASK] is one, [MASK*5] five; the text is the whole "
        "row",
    )
    add(
        "--block-length",
        type=_whole,
        metavar="N",
        help="tokens per block; blocks are filled from left to right [as the model family does]",
    )
    add("--temperature", type=_number, metavar="X", help="0 takes the most probable token [0]")
    add("--top-p", type=_number, metavar="X", help="nucleus filter, in (0, 1] [off]")
    add("--top-k", type=_whole, metavar="K", help="draw from the K most probable tokens [off]")
    add("--seed", type=_seed, default=0, metavar="N", help="seed of the sampling [0]")
    add("--cfg-scale", type=_number, metavar="X", help="classifier-free guidance [0, off]")
    add(
        "--suppress",
        action="append",
        default=[],
        metavar="TEXT",
        help="a token, as text or id, that is never generated; may be repeated",
    )
    add("--stop-at-eos", action="store_true", help="spend nothing on what follows the answer's end")
    add("--max-forwards", type=_whole, metavar="N", help="stop after so many model forwards [off]")

    add = parser.add_argument_group("how many tokens a step commits").add_argument
    add("--steps", type=_whole, metavar="N", help="denoising steps [one per token]")
    add(
        "--schedule",
        metavar="NAME",
        help="even, timestep, fixed or, with a rule, capped [as the model family does]",
    )
    add(
        "--num-transfer-tokens",
        type=_whole,
        metavar="N",
        help="tokens per step of the schedule fixed; with a rule, the least [1]",
    )
    add("--threshold", type=_number, metavar="X", help="rule: all that are at least so sure")
    add("--factor", type=_number, metavar="X", help="rule: the surer, the more at once")
    add("--gamma", type=_number, metavar="X", help="rule: as long as entropies sum up to X nats")
    add("--strategy", metavar="NAME", help="klass, with a threshold or factor; or wino")
    add(
        "--strategy-args",
        type=_pairs,
        default={},
        metavar="K=V,...",
        help="arguments of the strategy, as kl_threshold=0.01,kl_history_length=2 or "
        "wide_in_thres=0.6,narrow_out_thres=0.9",
    )

    add = parser.add_argument_group("which tokens a step commits").add_argument
    add("--alg", metavar="NAME", help="measure of confidence [as the model family does]")
    add(
        "--alg-temp",
        type=_number,
        metavar="X",
        help="draw the positions; the higher, the less their confidence matters [0, off]",
    )
    add(
        "--sigma",
        type=_number,
        metavar="X",
        help="prefer what has known tokens within about X positions [off]",
    )
    add(
        "--debias",
        metavar="FILE",
        help="prefer tokens that are rare in a corpus; JSON with their counts or shares",
    )
    add(
        "--clip-alpha", type=_number, metavar="X", help="the most a debiased confidence can be [10]"
    )

    add = parser.add_argument_group("cache").add_argument
    add(
        "--cache",
        default="none",
        metavar="NAME",
        help="none, dkv-decode, dkv-greedy, dkv-prefill, dkv-pd, prefix, dual, dllm or d2cache "
        "[none]",
    )
    add(
        "--cache-args",
        type=_pairs,
        default={},
        metavar="K=V,...",
        help="arguments of the cache, as kp=25,kr=5,rou=0.25",
    )

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
    for text in args.suppress:
        if not text or not _is_unicode(text):
            raise ValueError(f"--suppress is {text!r}; it must be a token's text, or its id.")
    if args.strategy_args and args.strategy is None:
        raise ValueError("--strategy-args are arguments of a strategy; choose it with --strategy.")
    if args.clip_alpha is not None and args.debias is None:
        raise ValueError("--clip-alpha bounds debiased confidences; it needs --debias.")
    if args.history is not None:
        _check_target(args.history)


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
        if not _is_unicode(text):
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


def _check_target(path: Path) -> None:
    # The file is replaced when it is complete, which must not befall /dev/stdout.
    if path.is_symlink() or (path.exists() and not path.is_file()):
        raise ValueError(f"{path} is no regular file; --history must name one, or a new file.")
    if not path.parent.is_dir() or not os.access(path.parent, os.W_OK | os.X_OK):
        raise ValueError(f"{path} cannot be written; its directory must exist and be writable.")


def _is_unicode(text: str) -> bool:
    return text.isprintable() or not any("\ud800" <= letter <= "\udfff" for letter in text)


def _whole(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = None
    if value is None or abs(value) >= 2**31:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number below {2**31}")
    return value


def _number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number")
    return value


def _seed(text: str) -> int:
    if not text.isdecimal() or int(text) >= 2**32:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0 to {2**32 - 1}")
    return int(text)


def _pairs(text: str) -> dict[str, Any]:
    pairs: dict[str, Any] = {}
    for pair in filter(None, text.split(",")):
        name, equals, value = pair.partition("=")
        if not equals or not name.strip():
            raise argparse.ArgumentTypeError(f"{pair!r} is not of the form name=value")
        try:
            pairs[name.strip()] = json.loads(value)
        except json.JSONDecodeError:
            pairs[name.strip()] = value.strip()
    return pairs


def _fail(error: Exception, status: int) -> int:
    """Tells what is wrong in one line."""
    sentence = " ".join(str(error).split())
    if isinstance(error, OSError) and error.strerror:
        sentence = f"{error.filename}: {error.strerror}."
    print(f"{PROGRAM}: {sentence}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
