"""The other side of `sandbox.py`: what runs in the new process, by path, around the program.

It must import nothing but the standard library, and set the limits itself: code between fork and
exec would not be safe in a process with threads. The number of processes is limited by the audit
hook, since RLIMIT_NPROC counts all processes and threads of a user, and none of root's.
"""

import os
import resource
import sys
import types
from collections.abc import Callable
from typing import Any

FILE = "program.py"
TOO_MUCH_MEMORY = "too much memory"

FORBIDDEN = {
    "os.exec",
    "os.fork",
    "os.forkpty",
    "os.kill",
    "os.killpg",
    "os.posix_spawn",
    "os.spawn",
    "os.system",
    "pty.spawn",
    "socket.bind",
    "socket.connect",
    "socket.getaddrinfo",
    "socket.gethostbyaddr",
    "socket.gethostbyname",
    "socket.sendmsg",
    "socket.sendto",
    "subprocess.Popen",
}
"""Events of Python's audit hooks that a program may not raise."""

CHANGES = {
    "os.chmod": ((0, 2),),
    "os.chown": ((0, 3),),
    "os.link": ((1, 3),),
    "os.mkdir": ((0, 2),),
    "os.remove": ((0, 1),),
    "os.rename": ((0, 2), (1, 3)),
    "os.rmdir": ((0, 1),),
    "os.symlink": ((1, 2),),
    "os.truncate": ((0, None),),
    "os.utime": ((0, 3),),
    "shutil.rmtree": ((0, 1),),
}
"""Event -> where among its arguments are the paths that it changes, and the folders they lie in."""

WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


# Functions that a program could replace are bound before it starts, as default arguments.
def make_hook(
    home: str, realpath=os.path.realpath, join=os.path.join, fsdecode=os.fsdecode
) -> Callable[[str, tuple], None]:
    """An audit hook that refuses processes, connections, and changes to files outside `home`."""

    def refuse_outside(path: Any, folder: int | None = None) -> None:
        if isinstance(path, int):
            return
        if folder not in (None, -1):
            path = join(f"/proc/self/fd/{folder}", fsdecode(path))
        real = realpath(fsdecode(path))
        if real != "/dev/null" and not (real + "/").startswith(home + "/"):
            raise PermissionError(f"a program may not change {real}")

    def hook(event: str, arguments: tuple) -> None:
        if event in FORBIDDEN:
            raise PermissionError(f"a program may not use {event}")
        if event == "open" and arguments[2] & WRITING:
            refuse_outside(arguments[0])
        for path, folder in CHANGES.get(event, ()):
            refuse_outside(arguments[path], None if folder is None else arguments[folder])

    return hook


def limit(what: int, value: int) -> None:
    """Sets a limit of the process for good, or leaves a lower one that it has."""
    hard = resource.getrlimit(what)[1]
    value = value if hard == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(what, (value, value))


def describe(error: BaseException) -> bytes:
    """The verdict on a program that raised; its exceptions may be unable to say what they are."""
    try:
        text = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    except BaseException:
        text = type(error).__name__
    return f"failed: {text[:300]}".encode("utf-8", "replace")


def main(read=os.read, write=os.write, leave=os._exit) -> None:
    """Runs `FILE` in the current folder, and sends the verdict to whoever started the process.

    The arguments of the process are the number of an open socket, from which the token of a program
    that passes can be read, and the limits: seconds of the processor, and bytes of memory.
    """
    channel, seconds, memory = map(int, sys.argv[1:])
    limit(resource.RLIMIT_CORE, 0)
    limit(resource.RLIMIT_CPU, seconds)
    limit(resource.RLIMIT_AS, memory)
    limit(resource.RLIMIT_FSIZE, 2**24)
    limit(resource.RLIMIT_NOFILE, 64)
    with open(FILE, encoding="utf-8") as file:
        source = file.read()
    os.remove(FILE)
    os.environ.clear()
    sys.argv[:] = [FILE]
    module = sys.modules["program"] = types.ModuleType("program")
    sys.addaudithook(make_hook(os.getcwd()))
    try:
        exec(compile(source, FILE, "exec"), module.__dict__)
        verdict = read(channel, 64)  # the token: no earlier, so that it is in no variable
    except MemoryError:
        module.__dict__.clear()
        verdict = TOO_MUCH_MEMORY.encode()
    except BaseException as error:
        verdict = describe(error)
    write(channel, verdict)
    leave(0)


if __name__ == "__main__":
    main()
