"""The options that commands share: how a model, a decoding and a cache are asked for.

A command adds these to its parser, so that an option has one name, one check and one help text
everywhere; `dlm_jax.cli.choices` makes configurations of what was parsed. Nothing here takes time
to import.
"""

import argparse
import contextlib
import importlib
import importlib.util
import json
import math
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from dlm_jax import compilation, files
from dlm_jax.answers import NotFinite
from dlm_jax.cli import interrupt, streams

MODEL = "llada-tiny-math"
"""The embedded model that is used without --model."""

TABLES = {
    "cache": ("dlm_jax.cache", "METHODS"),
    "strategy": ("dlm_jax.decoding.strategies", "STRATEGIES"),
}
"""Option -> module and table that know what it can be."""
Add = Callable[..., Any]
"""`add_argument` of a parser or a group."""


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one sentence, without the usage that --help shows."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; see --help\n")

    def exit(self, status: int = 0, message: str | None = None) -> NoReturn:
        if message:
            streams.tell(message.rstrip("\n"))
        sys.exit(status if streams.flushed(self.prog) else 1)

    def print_help(self, file: Any = None) -> None:
        try:  # argparse would swallow what goes wrong
            print(self.format_help(), end="", file=file or sys.stdout, flush=True)
        except BrokenPipeError:
            streams.give_up(sys.stdout)
        except OSError as error:
            streams.tell_failure(self.prog, error)
            sys.exit(1)

    def format_help(self) -> str:
        """Reads the names that an option can have only now, since importing them takes time."""
        for action in self._actions:
            if action.dest in TABLES and action.help is not None:
                module, table = TABLES[action.dest]
                names = ", ".join(getattr(importlib.import_module(module), table))
                action.help = action.help.replace("{names}", names)
        return super().format_help()


def add_model(add: Add) -> None:
    """Which model, and in which dtype."""
    add(
        "--model",
        default=MODEL,
        metavar="DIR",
        help=f"checkpoint, embedded model, or owner/name[@revision] on the hub [{MODEL}]",
    )
    add("--adapter", metavar="DIR", help="LoRA adapter to merge into the model [none]")
    add(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="dtype of the parameters [as stored]",
    )
    add(
        "--attention",
        choices=("auto", "cudnn", "xla"),
        default="auto",
        help="whose attention: cuDNN's in 16 bits on GPUs, or XLA's [auto]",
    )
    compilation.add_option(add)


def add_decoding(add: Add, *, gen_length: str, otherwise: str) -> None:
    """How long the text is, how it is sampled, and when it ends.

    Args:
      add: adds an option.
      gen_length: says how many tokens are generated without --gen-length.
      otherwise: says what holds where no option decides.
    """
    add("--gen-length", type=whole, metavar="G", help=f"tokens to generate [{gen_length}]")
    add(
        "--block-length",
        type=whole,
        metavar="N",
        help=f"tokens per block; blocks are filled from left to right [{otherwise}]",
    )
    add("--temperature", type=number, metavar="X", help="0 takes the most probable token [0]")
    add("--top-p", type=number, metavar="X", help="nucleus filter, in (0, 1] [off]")
    add("--top-k", type=whole, metavar="K", help="draw from the K most probable tokens [off]")
    add("--min-p", type=number, metavar="X", help="drop what is less than X times the best's [off]")
    add("--seed", type=seed, default=0, metavar="N", help="seed of the sampling [0]")
    add("--cfg-scale", type=number, metavar="X", help="classifier-free guidance [0, off]")
    add(
        "--suppress",
        action="append",
        default=[],
        metavar="TEXT",
        help="a token, as its text or id:N, that is never generated; may be repeated",
    )
    add(
        "--eos",
        action="append",
        default=[],
        metavar="TEXT",
        help="a token, as its text or id:N, that ends an answer; may be repeated [the model's]",
    )
    add("--stop-at-eos", action="store_true", help="spend nothing on what follows the answer's end")
    add(
        "--step-shapes",
        type=whole,
        metavar="N",
        help="compile at most N step shapes for a cache [6; 4 for large models]",
    )


def add_pace(add: Add, *, otherwise: str) -> None:
    """How many tokens a step commits; `otherwise` as in `add_decoding`."""
    add("--steps", type=whole, metavar="N", help="denoising steps [one per token]")
    add(
        "--schedule",
        metavar="NAME",
        help=f"even, timestep, fixed or, with a rule, capped [{otherwise}]",
    )
    add(
        "--num-transfer-tokens",
        type=whole,
        metavar="N",
        help="tokens per step of the schedule fixed; with a rule, the least [1]",
    )
    add("--threshold", type=number, metavar="X", help="rule: all that are at least so sure")
    add("--factor", type=number, metavar="X", help="rule: the surer, the more at once")
    add("--gamma", type=number, metavar="X", help="rule: as long as entropies sum up to X nats")
    add("--strategy", metavar="NAME", help="which positions a step commits: {names} [surest]")
    add(
        "--strategy-args",
        type=pairs,
        default={},
        metavar="K=V,...",
        help="arguments of the strategy; docs/decoding.md describes them",
    )


def add_order(add: Add, *, otherwise: str) -> None:
    """Which tokens a step commits; `otherwise` as in `add_decoding`."""
    add("--alg", metavar="NAME", help=f"measure of confidence [{otherwise}]")
    add(
        "--alg-temp",
        type=number,
        metavar="X",
        help="draw the positions; the higher, the less their confidence matters [0, off]",
    )
    add(
        "--sigma",
        type=number,
        metavar="X",
        help="prefer what has known tokens within about X positions [off]",
    )
    add(
        "--debias",
        metavar="FILE",
        help="prefer tokens that are rare in a corpus; JSON with their counts or shares",
    )
    add("--clip-alpha", type=number, metavar="X", help="the most a debiased confidence can be [10]")


def add_cache(add: Add) -> None:
    """Which cache method."""
    add(
        "--cache",
        default="none",
        metavar="NAME",
        help="{names} [none]",
    )
    add(
        "--cache-args",
        type=pairs,
        default={},
        metavar="K=V,...",
        help="arguments of the cache, as kp=25,kr=5,rou=0.25",
    )


def check(args: argparse.Namespace) -> None:
    """Refuses what these options alone show to be wrong.

    Raises:
      ValueError: one sentence.
    """
    for option, texts in (("--suppress", args.suppress), ("--eos", args.eos)):
        for text in texts:
            if not text or not is_unicode(text):
                raise ValueError(f"{option} is {text!r}; it must be a token's text, or id:N.")
    if args.strategy_args and args.strategy is None:
        raise ValueError("--strategy-args are arguments of a strategy; choose it with --strategy.")
    if args.clip_alpha is not None and args.debias is None:
        raise ValueError("--clip-alpha bounds debiased confidences; it needs --debias.")


def check_matplotlib() -> None:
    """Refuses to draw without it.

    Raises:
      ValueError: one sentence.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError("Drawing needs matplotlib: pip install '.[plot]'.")


def check_picture(path: Path, option: str) -> None:
    """Refuses a picture that could not be drawn or written in the end; see `files.check_target`.

    Raises:
      ValueError: one sentence.
    """
    check_matplotlib()
    if path.suffix != ".png":
        raise ValueError(f"{option} is {path}; it must name a PNG file.")
    files.check_target(path, option)


def command(
    program: str,
    prepare: Callable[[], Callable[[], None]],
    *,
    memory: str,
    prints: bool = True,
) -> int:
    """Runs a command; returns its exit status.

    Args:
      program: its name.
      prepare: checks what was asked for, and returns the long work. What it raises is told in one
        sentence, with status 2, or 1 if it is about the standard streams.
      memory: what to do if the memory does not suffice.
      prints: whether it needs standard output.
    """
    with streams.ready(), _warnings_told(program):
        return _command(program, prepare, memory, prints)


@contextlib.contextmanager
def _warnings_told(program: str) -> Iterator[None]:
    """Has warnings that are meant for users read like all else that a command tells them."""
    show = warnings.showwarning

    def tell(message: Any, category: type[Warning], *where: Any) -> None:
        if category is UserWarning:
            streams.tell(f"{program}: {message}")
        else:
            show(message, category, *where)

    with warnings.catch_warnings():
        warnings.showwarning = tell
        yield


def _command(
    program: str, prepare: Callable[[], Callable[[], None]], memory: str, prints: bool
) -> int:
    try:
        try:
            if prints:
                streams.check_output()
            work = prepare()
        except streams.StreamError:
            raise
        except (ValueError, OSError) as error:
            return _fail(program, error, 2)
        work()
        sys.stdout.flush()
    except KeyboardInterrupt:
        return interrupt.STATUS
    except BrokenPipeError:  # nobody reads on
        streams.give_up(sys.stdout)
        return 141
    except (OSError, NotFinite) as error:
        return _fail(program, error, 1)
    except RuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return _fail(program, MemoryError(f"Not enough memory; {memory}."), 1)
    return 0


def _fail(program: str, error: Exception, status: int) -> int:
    """Tells in one line what is wrong."""
    sentence = " ".join(str(error).split())
    if isinstance(error, OSError) and error.strerror:
        if streams.is_of_stream(error):
            streams.tell_failure(program, error)
            return 1
        where = "" if error.filename is None else f"{error.filename}: "
        sentence = f"{where}{error.strerror}."
    streams.tell(f"{program}: {sentence}")
    return status


def is_unicode(text: str) -> bool:
    return text.isprintable() or not any("\ud800" <= letter <= "\udfff" for letter in text)


class Named(NamedTuple):
    """Something that an option asks for by name, with arguments of its own.

    Attributes:
      label: what the user wrote, by which it can be told from others.
      name: of a cache method, for instance.
      arguments: by their names.
    """

    label: str
    name: str
    arguments: dict[str, Any]


# --- what an option's value can be ----------------------------------------------------------------


def whole(text: str) -> int:
    """A whole number that an int32 can hold."""
    try:
        value = int(text)
    except ValueError:
        value = None
    if value is None or abs(value) >= 2**31:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number below {2**31}")
    return value


def number(text: str) -> float:
    """A finite number."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number")
    return value


def file(text: str) -> Path:
    """The name of a file."""
    if not text:
        raise argparse.ArgumentTypeError("it is empty; it must name a file")
    return Path(text).expanduser()


def pairs(text: str, comma: str = ",") -> dict[str, Any]:
    """`name=value,name=value`; values are JSON where they can be, and text elsewhere."""
    found: dict[str, Any] = {}
    for pair in filter(None, text.split(comma)):
        name, equals, value = pair.partition("=")
        if not equals or not name.strip():
            raise argparse.ArgumentTypeError(f"{pair!r} is not of the form name=value")
        try:
            found[name.strip()] = json.loads(value)
        except json.JSONDecodeError:
            found[name.strip()] = value.strip()
    return found


def named(text: str) -> Named:
    """`NAME` or `NAME:K=V+K=V`, since a comma ends it where several are listed."""
    label = text.strip()
    name, colon, arguments = label.partition(":")
    if not name.strip() or (colon and not arguments.strip()):
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form NAME or NAME:K=V+K=V")
    return Named(label, name.strip(), pairs(arguments, "+"))


def named_list(text: str) -> list[Named]:
    """`none,dual,d2cache:rollout_p=0.2+sigma=0`: a name may occur with different arguments."""
    return list(map(named, names(text)))


def names(text: str) -> list[str]:
    """Different texts, separated by commas."""
    found = [name.strip() for name in text.split(",")]
    if not all(found) or len(set(found)) < len(found):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of different names")
    return found


def seed(text: str) -> int:
    """A whole number that an uint32 can hold."""
    if not text.isdecimal() or int(text) >= 2**32:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0 to {2**32 - 1}")
    return int(text)
