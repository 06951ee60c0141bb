"""Several processes, on one host or many: each works on its own devices, and then all is gathered.

Nothing is exchanged during the work, so that no process waits for another. What is gathered goes
through the processes' coordinator and not through their devices: that connection is known to work
from the start of the run and not only at its end, and neither the kind nor the number of devices
has to be the same everywhere.
"""

import json
import os
import sys
import traceback
import zlib
from collections.abc import Callable
from typing import Any, TypeVar

import jax

T = TypeVar("T")
_PATIENCE_MS = 7 * 24 * 3600 * 1000
"""How long to wait for a slower process; that one is gone is noticed within minutes."""


def initialize(
    coordinator: str | None = None, num_processes: int | None = None, process_id: int | None = None
) -> None:
    """Joins the processes of a run; to be called before JAX is asked for any device.

    Args:
      coordinator: `host:port` where the process 0 listens; the port must be free there.
      num_processes: how many processes there are.
      process_id: which one this is, from 0.

    All three are given, or none: SLURM, Open MPI and what else JAX knows are then asked.

    Raises:
      ValueError: some are missing or impossible, or nothing is known of other processes.
    """
    if jax.distributed.is_initialized():
        raise ValueError("The processes have been joined already; initialize is for once only.")
    given = dict(coordinator=coordinator, num_processes=num_processes, process_id=process_id)
    missing = [name for name, value in given.items() if value is None]
    if len(missing) == len(given):
        _detect()
        return
    if missing:
        raise ValueError(
            f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing; give "
            f"{', '.join(given)} together, or none of them under SLURM or Open MPI."
        )
    _check(str(coordinator), int(num_processes or 0), int(process_id or 0))
    # Without looking around for a cluster, which would take away all but one of the GPUs.
    jax.distributed.initialize(
        coordinator, num_processes, process_id, cluster_detection_method="deactivate"
    )


def _detect() -> None:
    try:
        jax.distributed.initialize()
    except ValueError as error:
        raise ValueError(
            "No cluster is found around this process; start it under SLURM or Open MPI 4, or give "
            "coordinator, num_processes and process_id (Open MPI 5 has them in "
            "OMPI_COMM_WORLD_SIZE and OMPI_COMM_WORLD_RANK)."
        ) from error


def _check(coordinator: str, num_processes: int, process_id: int) -> None:
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isascii() or not port.isdigit() or not 0 < int(port) < 2**16:
        raise ValueError(
            f"coordinator is {coordinator!r}; it must be a host and a port, such as 10.0.0.1:1234."
        )
    if num_processes < 1:
        raise ValueError(f"num_processes is {num_processes}; it must be at least 1.")
    if not 0 <= process_id < num_processes:
        raise ValueError(
            f"process_id is {process_id}; with {num_processes} processes it must lie in 0 to "
            f"{num_processes - 1}."
        )


def index() -> int:
    """Which process this is, from 0."""
    return jax.process_index()


def count() -> int:
    """How many processes there are."""
    return jax.process_count()


def gather(value: Any) -> list[Any]:
    """Every process's value, in the order of the processes, on every process.

    All processes must call it, equally often.

    Args:
      value: what JSON can tell; tuples come back as lists.
    """
    payload = json.dumps(value)
    if count() == 1:
        return [json.loads(payload)]
    client, place = _client(), _place("gather")
    client.key_value_set_bytes(f"{place}/{index()}", zlib.compress(payload.encode()))
    packed = [
        client.blocking_key_value_get_bytes(f"{place}/{i}", _PATIENCE_MS) for i in range(count())
    ]
    # The coordinator holds it in memory, which is free again when all have read it.
    client.wait_at_barrier(place, _PATIENCE_MS)
    client.key_value_delete(f"{place}/{index()}")
    return [json.loads(zlib.decompress(each)) for each in packed]


def barrier(name: str) -> None:
    """Waits until all processes have come here; `name` is for error messages."""
    if count() > 1:
        _client().wait_at_barrier(_place(f"barrier/{name}"), _PATIENCE_MS)


def together(prepare: Callable[[], T]) -> T:
    """What `prepare` returns, unless it refuses in any process: then all refuse alike.

    All processes must call it.

    Raises:
      ValueError: `prepare` raised it, or OSError, in this process or another.
    """
    if count() == 1:
        return prepare()
    prepared, problem = None, None
    try:
        prepared = prepare()
    except (ValueError, OSError) as error:
        problem = f"{error} (process {index()})"
    problems = [told for told in gather(problem) if told is not None]
    if problems:
        raise ValueError(problems[0])
    return prepared  # pyright: ignore[reportReturnType]


def or_leave(work: Callable[[], None]) -> None:
    """Does work; if it fails in one of several processes, that one is gone at once.

    The others notice that; at an orderly end, each would wait for the other.
    """
    try:
        work()
    except BaseException:
        if count() == 1:
            raise
        traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)


def _place(name: str) -> str:
    """A name that has not been used: processes that do the same get the same."""
    turn = _client().key_value_increment(f"dlm_jax/{name}/turns/{index()}", 1)
    return f"dlm_jax/{name}/{turn}"


def _client() -> Any:
    """The connection to the coordinator, which JAX has but does not hand out itself."""
    from orbax.checkpoint import multihost

    return multihost.get_jax_distributed_client()
