"""Stages for the tests of `scripts/gpu_suite.py`: what can befall a process, without a device."""

import os
import sys
import time


class Session:
    """What `gpu_stages.Session` is for the suite."""

    def __init__(self, refuses: str = "") -> None:
        if refuses:
            raise ValueError(refuses)

    def tell(self, table: str = "memory", **entry):
        yield table, entry | dict(pid=os.getpid(), flags=os.environ.get("XLA_FLAGS"))

    def hang(self, seconds: float = 600):
        yield from self.tell()
        time.sleep(seconds)

    def die(self):
        yield from self.tell()
        print("the device is on fire", file=sys.stderr, flush=True)
        os.abort()

    def fail(self):
        yield from self.tell()
        raise RuntimeError("out of\nluck")
