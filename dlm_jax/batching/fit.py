"""How many rows a batch can have: as many as the device's memory holds, by the compiler's count."""

import math
from collections.abc import Callable

CPU, OTHER = 16, 256
"""The most rows that a batch gets unasked: more bring a processor nothing, and a GPU little."""
SHARE = 0.9
"""Of the free memory; the rest is for what the compiler does not count."""


def rows_that_fit(
    need: Callable[[int], float], count: int, *, free_mib: float, platform: str
) -> int:
    """The rows of a batch.

    Args:
      need: compiles the program for so many rows, and says how many MiB it takes.
      count: how many rows there are.
      free_mib: memory that may be used.
      platform: of the device, as `cpu`.

    Returns:
      At least 1, whether that fits or not.
    """
    room = SHARE * free_mib
    rows = min(count, CPU if platform == "cpu" else OTHER)
    if platform != "cpu" and rows > 1 and math.isfinite(room):
        # One row tells about how many fit: a program of its own, but the others are too large.
        rows = min(rows, max(1, int(room / max(need(1), 1.0))))
    while rows > 1 and need(rows) > room:
        rows = (rows + 1) // 2
    return rows
