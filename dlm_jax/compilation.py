"""Compiled programs: kept on disk for the next process that needs them, and measured.

Compiling takes longer than most answers of a small model. JAX can keep what XLA made of a program
and find it again by its text, the compiler's version and options, and the hardware. A library has
no business to write files unasked, so importing `dlm_jax` switches nothing on; the commands do.
"""

import contextlib
import math
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

MAX_BYTES = 2 << 30
"""What may lie in the folder when a command starts."""
GPU_OPTIONS: dict[str, Any] = {"xla_gpu_dot_merger_threshold_mb": 512}
"""See `options`."""


def add_option(add_argument: Callable[..., Any]) -> None:
    """Adds `--no-compile-cache` to a parser; `use_cache` wants `args.compile_cache`."""
    add_argument(
        "--no-compile-cache",
        action="store_false",
        dest="compile_cache",
        help="compile anew; read and keep no compiled programs",
    )


def use_cache(enabled: bool = True) -> str | None:
    """Has JAX keep compiled programs; to be called before the first one is compiled.

    A cache that the user has configured, or switched off, for all of JAX stays as it is. Otherwise
    programs are kept in `dlm_jax/xla` in the user's cache folder, `$XDG_CACHE_HOME` or `~/.cache`.
    Where that is impossible there is no cache, which is no error: everything is compiled anew.

    Args:
      enabled: False neither reads nor writes any cache, not even a configured one.

    Returns:
      The folder, or None if no programs are kept.
    """
    import jax  # takes a while, and a command has options to check first

    config: Any = jax.config  # its attributes come from a table
    if not enabled:
        config.update("jax_enable_compilation_cache", False)
    if not config.jax_enable_compilation_cache:
        return None
    if config.jax_compilation_cache_dir:
        return config.jax_compilation_cache_dir
    try:
        folder = _private_folder()
        _forget_oldest(folder, MAX_BYTES)
    except (OSError, RuntimeError):  # a RuntimeError is a missing home
        return None
    config.update("jax_compilation_cache_dir", str(folder))
    # Everything: most programs of a small model are compiled in less than JAX's minimum.
    config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    # JAX then compiles as if there were no entry, which is all that the user would do about it.
    warnings.filterwarnings("ignore", "Error (read|writ)ing persistent compilation cache entry")
    return str(folder)


def check_devices() -> None:
    """Refuses an environment whose devices JAX cannot use; not before `distributed.initialize`.

    Raises:
      ValueError: one sentence.
    """
    import jax

    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:  # what a backend raises that is not there
        asked: Any = jax.config  # its attributes come from a table
        reason = " ".join(str(error).partition(" (set JAX_PLATFORMS")[0].split()).rstrip(".")
        reason = reason or "there is no such device"
        if asked.jax_platforms:
            raise ValueError(
                f"JAX_PLATFORMS is {asked.jax_platforms!r}, which does not work here: {reason}; "
                "leave it unset, or set it to cpu."
            ) from error
        raise ValueError(f"JAX has no device to compute on: {reason}.") from error


def options() -> dict[str, Any]:
    """What the default device's compiler is to be told, as `jax.jit(compiler_options=...)` has it.

    On GPUs products of the same rows become one also where their weights are large: gate and up.
    """
    import jax

    return GPU_OPTIONS if jax.default_backend() == "gpu" else {}


def memory_mib(program: Any) -> dict[str, float]:
    """What a compiled program needs on a device, in MiB; the parameters are among the arguments."""
    stats = program.memory_analysis()
    arguments, temporaries = stats.argument_size_in_bytes, stats.temp_size_in_bytes
    total = arguments + temporaries + stats.output_size_in_bytes - stats.alias_size_in_bytes
    return dict(
        arguments_mib=arguments / 2**20,
        temporaries_mib=temporaries / 2**20,
        program_mib=total / 2**20,
    )


def free_mib(device: Any) -> float:
    """Memory of a device that nothing uses yet, in MiB; of a CPU, what this process may still take.

    Infinite where nobody knows.
    """
    if device.platform != "cpu":
        stats = device.memory_stats() or {}
        limit = stats.get("bytes_limit")
        return math.inf if limit is None else (limit - stats.get("bytes_in_use", 0)) / 2**20
    found = [math.inf]
    with contextlib.suppress(OSError, ValueError):
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
        fields = dict(line.split(":", 1) for line in lines)
        found.append(int(fields["MemAvailable"].split()[0]) / 2**10)
    with contextlib.suppress(OSError, ValueError):  # a container may have less
        group = Path("/sys/fs/cgroup")
        limit, used = ((group / f"memory.{name}").read_text() for name in ("max", "current"))
        found.append((int(limit) - int(used)) / 2**20)
    return min(found)


def _private_folder() -> Path:
    """The folder, made if it is missing.

    Raises:
      OSError, RuntimeError: there is none, or it is not the user's alone.
    """
    root = Path(os.environ.get("XDG_CACHE_HOME", ""))
    folder = (root if root.is_absolute() else Path.home() / ".cache") / "dlm_jax" / "xla"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    # Programs are machine code: whoever can write here decides what this process executes.
    status = folder.stat()
    if status.st_uid != os.geteuid() or status.st_mode & 0o022:
        raise PermissionError(f"{folder} can be written by others.")
    if not os.access(folder, os.R_OK | os.W_OK | os.X_OK):
        raise PermissionError(f"{folder} cannot be written.")
    return folder


def _forget_oldest(folder: Path, limit: int) -> None:
    """Deletes what was not used for longest until at most `limit` bytes are left.

    JAX has a limit of its own, `jax_compilation_cache_max_size`. It takes a lock for every program,
    and keeps nothing more once a process was killed between the two files of an entry.
    """
    entries = []
    for path in folder.rglob("*"):
        with contextlib.suppress(FileNotFoundError):  # another command tidies up as well
            if path.is_file():
                entries.append((path, path.stat()))
    entries.sort(key=lambda entry: max(entry[1].st_atime, entry[1].st_mtime), reverse=True)
    total = 0
    for path, status in entries:
        total += status.st_size
        if total > limit:
            path.unlink(missing_ok=True)
