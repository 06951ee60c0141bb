"""Several processes: real ones, on this machine, that find each other and share what they have."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from places import CHECKPOINTS, ROOT

from dlm_jax import distributed

SHARES = """
import sys
from dlm_jax import distributed

me = int(sys.argv[2])
distributed.initialize(sys.argv[1], 2, me)
assert (distributed.index(), distributed.count()) == (me, 2)

values = [{"text": "Grüße, 世界 \\U0001f600"}, {"rows": [[i, i / 3] for i in range(9999)]}]
assert distributed.gather(values[me]) == values
assert distributed.gather([None, ""][me]) == [None, ""]
for value in (0, [], float("inf")):
    assert distributed.gather(value) == [value] * 2
distributed.barrier("half time")
distributed.barrier("half time")
megabytes = "".join(map(str, range(3_000_000 * me)))
assert [len(each) for each in distributed.gather(megabytes)] == [0, 19_888_890]
try:
    distributed.initialize(sys.argv[1], 2, me)
except ValueError as error:
    print(error)
"""


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def run_two(code: str, *arguments: str | Path, devices: int = 1) -> list[str]:
    """What two processes print that are told the coordinator, their numbers and the arguments."""
    flags = dict(
        PYTHONPATH=os.pathsep.join(sys.path),
        JAX_PLATFORMS="cpu",
        XLA_FLAGS=f"--xla_force_host_platform_device_count={devices}",
    )
    coordinator = f"127.0.0.1:{free_port()}"
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code, coordinator, str(i), *map(str, arguments)],
            env=os.environ | flags,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]
    try:
        told = [process.communicate(timeout=120) for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, (_, error) in zip(processes, told, strict=True):
        assert process.returncode == 0, error
    return [out for out, _ in told]


def test_processes_gather_what_they_have():
    for out in run_two(SHARES):
        assert out == "The processes have been joined already; initialize is for once only.\n"


GENERATES = """
import sys
import jax
import numpy as np
from dlm_jax import DecodeConfig, cache, checkpoint, distributed, models, sharding
from dlm_jax.engine import Engine

me = int(sys.argv[2])
distributed.initialize(sys.argv[1], 2, me)
mesh = sharding.make_mesh("data=2,model=2")
assert mesh.size == len(jax.local_devices()) == 4 and len(jax.devices()) == 8
answers = []
for directory in sys.argv[3:]:
    config = checkpoint.inspect(checkpoint.find(directory)).config
    opened = checkpoint.load(directory, shardings=sharding.param_shardings(config, mesh))
    decode = DecodeConfig.for_model(config, gen_length=4, block_length=4)
    engine = Engine(opened, decode, cache.make("none"), mesh=mesh)
    own = [[[5, 6], [7]], [[8]]][me]  # as much as there is for each
    result = engine.run(own, jax.random.key(0))
    answers.append(distributed.gather([answer.ids for answer in result.answers]))
assert answers[0] == answers[1] and list(map(len, answers[0])) == [2, 1]
"""


@pytest.mark.slow
def test_processes_generate_on_their_own_devices(tmp_path):
    source, converted = CHECKPOINTS / "llada-tiny", tmp_path / "converted"
    script = [sys.executable, ROOT / "convert" / "hf_to_orbax.py"]
    subprocess.run([*script, "--src", source, "--dst", converted], check=True, capture_output=True)
    run_two(GENERATES, source, converted, devices=4)


def test_alone():
    value = {"a": [1, "ü"]}
    assert distributed.gather(value) == [value]
    assert (distributed.index(), distributed.count()) == (0, 1)
    distributed.barrier("alone")


@pytest.mark.parametrize(
    "arguments, words",
    [
        (("localhost:1",), "num_processes and process_id are missing; give coordinator"),
        ((None, 2, 0), "coordinator is missing"),
        (("localhost:1", 2), "process_id is missing"),
        (("localhost", 2, 0), "it must be a host and a port"),
        ((":1", 2, 0), "it must be a host and a port"),
        (("localhost:x", 2, 0), "it must be a host and a port"),
        (("localhost:99999", 2, 0), "it must be a host and a port"),
        (("localhost:1", 0, 0), "num_processes is 0"),
        (("localhost:1", 2, 2), "must lie in 0 to 1"),
        (("localhost:1", 2, -1), "must lie in 0 to 1"),
    ],
)
def test_impossible_arguments(arguments, words):
    with pytest.raises(ValueError, match=words):
        distributed.initialize(*arguments)


def test_no_cluster(monkeypatch):
    for name in os.environ:
        if name.startswith(("SLURM_", "OMPI_", "JAX_COORDINATOR")):
            monkeypatch.delenv(name)
    code = "from dlm_jax import distributed; distributed.initialize()"
    env = os.environ | dict(PYTHONPATH=os.pathsep.join(sys.path), JAX_PLATFORMS="cpu")
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120
    )
    assert done.returncode and "ValueError: No cluster is found" in done.stderr
