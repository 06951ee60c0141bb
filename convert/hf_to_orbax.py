"""Converts a Hugging Face checkpoint of LLaDA or Dream to Orbax, one part at a time.

    python convert/hf_to_orbax.py --src GSAI-ML/LLaDA-8B-Instruct --dst llada-8b --verify
    python convert/hf_to_orbax.py --src LLaDA-8B-Instruct --dst llada-8b --dtype bfloat16 --verify
    python convert/hf_to_orbax.py --verify --dst llada-8b        # checks a finished one again
    python convert/hf_to_orbax.py --src LLaDA-8B-Base --adapter my-lora --dst llada-8b-mine

The result is what `dlm_jax.load` opens; `dlm_jax/weights/converted.py` describes the layout.
Memory is bounded by the largest part, not by the model (LLaDA-8B's are the embedding and the head,
1 GiB each in bfloat16): tensors are read a few rows at a time straight into their place, and Orbax,
which copies at most once more, writes them before the next part is read.

A LoRA adapter that is given, or lies beside the weights, is merged while they are read. Values that
are not finite are refused.

Nothing appears at the destination before everything is written (and verified): work is done in a
hidden directory beside it, which is renamed at the end. Bad input is told in one sentence, with
exit code 2.
"""

import argparse
import contextlib
import errno
import glob
import logging
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dlm_jax import checkpoint, files, models, tokenizer
from dlm_jax.cli import options, streams
from dlm_jax.weights import converted, layout
from dlm_jax.weights.converted import Converted, Entry
from dlm_jax.weights.files import check_fetched
from dlm_jax.weights.source import Source

# Largest piece of a stored array, so that a device that needs a shard reads little else.
_STORAGE_CHUNK_BYTES = 64 << 20
_LINE_SECONDS = 10.0
# No room is left for what is written.
_DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def convert(
    src: str | Path,
    dst: Path,
    dtype: np.dtype | None = None,
    *,
    verify_after: bool,
    adapter: str | Path | None = None,
) -> int:
    """Converts `src` to a new directory `dst`.

    Args:
      src: a directory in the Hugging Face layout, or the name of a checkpoint on the hub.
      dst: must not exist.
      dtype: dtype of the result; None keeps that of each tensor.
      verify_after: whether to read the result back before it appears at `dst`.
      adapter: directory of a LoRA adapter to merge.

    Returns:
      Bytes of parameters written.

    Raises:
      OSError, ValueError: with one sentence; nothing is left behind.
    """
    if dst.exists() or dst.is_symlink():
        raise FileExistsError(f"{dst} exists; remove it first, or give another destination.")
    files.check_folder(dst, "the destination")  # before a long download
    directory = checkpoint.locate(src)
    if directory is None:
        raise FileNotFoundError(
            f"{src} is no directory; it must be one in the Hugging Face layout, or owner/name on "
            "the hub."
        )
    if converted.is_converted(directory):
        raise ValueError(
            f"{src} is already converted; give a directory in the Hugging Face layout."
        )
    source = Source.open(directory, adapter)
    copied = [layout.CONFIG, layout.GENERATION, *tokenizer.FILES]
    for name in copied:
        check_fetched(directory / name)
    total = sum(source.size(path, dtype) for path in source.shapes)
    with _staging(dst) as work:
        _check_space(work, total)
        with _disk_errors(dst), _progress("converting", total) as advance:
            converted.write_metadata(work, _write_params(source, work, dtype, advance))
            for name in copied:
                if (directory / name).is_file():
                    shutil.copyfile(directory / name, work / name)
        if verify_after:
            verify(work)
    return total


def verify(directory: Path) -> int:
    """Reads a converted directory back and compares it with the checksums taken during conversion.

    Returns:
      Bytes of parameters read.

    Raises:
      FileNotFoundError, ValueError: it is incomplete, damaged or different; in one sentence.
    """
    if not converted.is_converted(directory):
        raise FileNotFoundError(
            f"{directory} is no converted checkpoint; it has no {converted.METADATA}."
        )
    stored = Converted.open(directory)
    total = sum(entry.nbytes for entry in stored.entries.values())
    different = []
    with _progress("verifying", total) as advance:
        for paths in layout.parts(stored.shapes).values():
            arrays = stored.restore(paths)
            for path in paths:
                if converted.checksum(arrays[path]) != stored.entries[path].crc32:
                    different.append(path)
                advance(stored.entries[path].nbytes)
            del arrays
    if different:
        raise ValueError(
            f"{directory}: {len(different)} of {len(stored.entries)} parameters are not what was "
            f"written, first: {different[0]}; convert the model again."
        )
    return total


def _write_params(
    source: Source, work: Path, dtype: np.dtype | None, advance: Callable[[int], None]
) -> dict[str, Entry]:
    """Writes one Orbax checkpoint per part, and returns what is in them."""
    import orbax.checkpoint as ocp

    checkpointer = ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_compression=False))
    cpu = jax.local_devices(backend="cpu")[0]
    entries: dict[str, Entry] = {}
    for part, paths in layout.parts(source.shapes).items():
        flat = {}
        for path in paths:
            array = source.read(path, dtype)
            entries[path] = Entry(array.shape, array.dtype, converted.checksum(array))
            flat[path] = jax.device_put(array, cpu)  # adopts the memory, where Orbax would copy it
            advance(array.nbytes)
        tree = models.unflatten(flat)[part]
        save_args = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=_STORAGE_CHUNK_BYTES), tree)
        checkpointer.save(
            (work / converted.PARAMS / part).resolve(), args=ocp.args.PyTreeSave(tree, save_args)
        )
        for leaf in flat.values():
            leaf.delete()  # Orbax leaves cycles of references, which would keep it for a while
        del array
    return entries


@contextlib.contextmanager
def _staging(dst: Path) -> Iterator[Path]:
    """A hidden directory beside `dst`: becomes `dst` at the end, or vanishes after an error.

    A process that was killed cannot tidy up, so the next conversion to the same destination does.
    """
    dst = dst.absolute()
    prefix = f".{dst.name}.partial-"
    for stale in dst.parent.glob(f"{glob.escape(prefix)}*"):
        if not _is_running(stale.name.removeprefix(prefix)):
            shutil.rmtree(stale)
    work = dst.parent / f"{prefix}{os.getpid()}"
    work.mkdir(parents=True)
    try:
        yield work
        work.rename(dst)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise


@contextlib.contextmanager
def _disk_errors(dst: Path) -> Iterator[None]:
    """Tells in one sentence that the disk is full, which Orbax wraps in other errors."""
    try:
        yield
    except Exception as error:
        number = _disk_error(error)
        if number is None:
            raise
        raise OSError(
            f"{dst} cannot be written: {os.strerror(number)}; nothing was kept."
        ) from error


def _disk_error(error: BaseException | None) -> int | None:
    """The system's number of an error that this one is, tells of in its text, or comes from."""
    if error is None:
        return None
    code = re.search(r"os_error_code='(\d+)'", str(error))
    for number in (error.errno if isinstance(error, OSError) else None, code and int(code[1])):
        if number in _DISK_ERRORS:
            return number
    if os.strerror(errno.ENOSPC) in str(error):
        return errno.ENOSPC
    return _disk_error(error.__cause__ or error.__context__)


def _is_running(pid: str) -> bool:
    """Whether another process has this id."""
    if not pid.isdecimal() or int(pid) == os.getpid():
        return False
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _check_space(directory: Path, needed: int) -> None:
    free = shutil.disk_usage(directory).free
    if free < needed:
        raise ValueError(
            f"{directory.parent} has {free / 1e9:.1f} GB of free space, and {needed / 1e9:.1f} GB "
            f"are needed."
        )


@contextlib.contextmanager
def _progress(verb: str, total: int) -> Iterator[Callable[[int], None]]:
    """Bytes done and their rate on stderr: a bar on a terminal, otherwise a line now and then."""
    if sys.stderr.isatty():
        with _bar() as bar:
            task = bar.add_task(verb, total=total)
            yield lambda count: bar.advance(task, count)
        return
    start = said = time.monotonic()
    done = 0

    def advance(count: int) -> None:
        nonlocal done, said
        done += count
        now = time.monotonic()
        if done == total or now - said > _LINE_SECONDS:
            said = now
            rate = done / 1e6 / max(now - start, 1e-9)
            # Notes that cannot be written are no reason to stop.
            streams.tell(f"{verb}: {done / 1e9:.2f} of {total / 1e9:.2f} GB, {rate:.0f} MB/s")

    yield advance


def _bar() -> Any:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    return Progress(TextColumn("{task.description}"), *columns, console=Console(stderr=True))


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    parser = argparse.ArgumentParser(
        prog="hf_to_orbax.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--src",
        metavar="DIR",
        help="directory in the Hugging Face layout, or owner/name[@revision] on the hub",
    )
    parser.add_argument("--dst", type=Path, required=True, help="directory to make")
    parser.add_argument("--adapter", type=Path, help="directory of a LoRA adapter to merge")
    parser.add_argument("--dtype", help="float32, bfloat16 or float16; default: as in the source")
    parser.add_argument(
        "--verify",
        action="store_true",
        help="read the result back and compare checksums; without --src: of a finished conversion",
    )
    args = parser.parse_args(argv)
    if args.src is None and not args.verify:
        parser.error("--src is required")
    if args.src is None and args.adapter is not None:
        parser.error("--adapter is merged while converting; it needs --src")

    def work() -> Callable[[], None]:
        start = time.monotonic()
        dtype = checkpoint.as_dtype(args.dtype)
        try:
            if args.src is None:
                total = verify(args.dst)
            else:
                total = convert(
                    args.src, args.dst, dtype, verify_after=args.verify, adapter=args.adapter
                )
        except KeyboardInterrupt:
            streams.tell(f"{parser.prog}: interrupted; nothing was written.")
            raise
        verified = " and checksums verified" if args.verify else ""
        took = f"{args.dst}: {total / 1e9:.2f} GB in {time.monotonic() - start:.1f} s{verified}"
        return lambda: print(took)

    return options.command(parser.prog, work, memory="convert on another machine", prints=False)


def _silence_threads() -> None:
    """Keeps Orbax's threads from printing a traceback each of an error that `save` also raises."""
    for name in ("absl", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL + 1)
    sys.unraisablehook = lambda _: None


if __name__ == "__main__":
    _silence_threads()
    jax.config.update("jax_platforms", "cpu")  # a GPU would lend most of its memory to this process
    sys.exit(main())
