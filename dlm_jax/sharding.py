"""Where a model lies on several devices: a mesh of two axes, and the place of each parameter.

`data` divides a batch: its parts share nothing and wait for nobody. `model` divides the network as
Megatron does (arXiv 1909.08053): attention by heads, the feed-forward network by hidden width, the
vocabulary by tokens. That costs two sums over the axis per layer, so it is for networks that one
device cannot hold. Keys and values are divided by heads like the projections that make them: the
compiler carries that through every cache, and no cache knows.
"""

import math
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from dlm_jax import models
from dlm_jax.models import Config
from dlm_jax.typing import Array, Params, PyTree

DATA, MODEL = "data", "model"
AXES = (DATA, MODEL)
"""The axes of a mesh, in the order of its devices: those of one `model` group are neighbours."""


def parse_mesh(text: str | None, devices: int) -> tuple[int, int]:
    """The sizes of the axes `data` and `model`, from a text like `data=4,model=2`.

    Args:
      text: either axis may be missing: `model` is then 1, and `data` is what makes use of all
        devices. None leaves out both.
      devices: how many there are.

    Raises:
      ValueError: no such text, or not for so many devices.
    """
    sizes = {} if text is None else _sizes(text)
    model = sizes.get(MODEL, 1)
    if DATA not in sizes and model <= devices and devices % model:
        raise ValueError(
            f"The mesh {text!r} has model={model}, which must divide the {devices} devices unless "
            "data is given as well."
        )
    data = sizes.get(DATA, max(1, devices // model))
    if data * model > devices:
        raise ValueError(
            f"The mesh {text!r} takes {data * model} devices, and there are {devices} here; take "
            "smaller axes."
        )
    return data, model


def _sizes(text: str) -> dict[str, int]:
    """The axes that a text names."""
    sizes: dict[str, int] = {}
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\w+)\s*=\s*([0-9]{1,9})\s*", part)
        if not match:
            raise ValueError(
                f"The mesh is {text!r}; it must be axes with their sizes, such as data=4,model=2."
            )
        axis, size = match[1], int(match[2])
        if axis not in AXES:
            raise ValueError(
                f"The mesh {text!r} has the axis {axis!r}; it must be one of {', '.join(AXES)}."
            )
        if axis in sizes:
            raise ValueError(f"The mesh {text!r} has the axis {axis!r} twice; once is enough.")
        if size < 1:
            raise ValueError(f"The mesh {text!r} has {axis}={size}; it must be at least 1.")
        sizes[axis] = size
    return sizes


def make_mesh(text: str | None = None, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh of this process's devices with the axes `data` and `model`.

    Args:
      text: see `parse_mesh`; None takes all devices for `data`.
      devices: which ones; None means all that are local to this process.

    Raises:
      ValueError: see `parse_mesh`.
    """
    devices = jax.local_devices() if devices is None else devices
    sizes = parse_mesh(text, len(devices))
    used = np.array(devices[: math.prod(sizes)]).reshape(sizes)
    return _mesh(used)


def param_shardings(config: Config, mesh: Mesh) -> Callable[[str], NamedSharding]:
    """Where each parameter goes: a function of its path, for `checkpoint.load(shardings=...)`.

    Every part of the `data` axis has all parameters. Over `model`, what a layer makes is divided in
    the projections into it and summed in the projection out of it. What the size of the axis does
    not divide evenly is replicated, as the norms are.

    Args:
      config: of the model.
      mesh: has an axis `model`.
    """
    ways = mesh.shape[MODEL]
    specs = {
        name: spec
        for size, those in _specs(config)
        for name, spec in those.items()
        if ways > 1 and size % ways == 0
    }

    def sharding(path: str) -> NamedSharding:
        name = "/".join(path.split("/")[-2:])
        return NamedSharding(mesh, specs.get(name, PartitionSpec()))

    return sharding


def _specs(config: Config) -> list[tuple[int, dict[str, PartitionSpec]]]:
    """The sizes to divide, each with the parameters that have an axis of that size."""
    first, second = PartitionSpec(MODEL), PartitionSpec(None, MODEL)
    return [
        (config.num_heads, {"q/kernel": second, "q/bias": first, "o/kernel": first}),
        (
            config.num_kv_heads,
            {"k/kernel": second, "k/bias": first, "v/kernel": second, "v/bias": first},
        ),
        (config.mlp_width, {"gate/kernel": second, "up/kernel": second, "down/kernel": first}),
        # The embedding also where it is not the head: a lookup in parts ends with a sum no larger
        # than that of any projection, and the table is among the largest parameters.
        (config.vocab_size, {"head/kernel": second, "embed/embedding": first}),
    ]


def place(params: Params, config: Config, mesh: Mesh) -> Params:
    """The parameters as `param_shardings` wants them; those that lie there already stay."""
    where = param_shardings(config, mesh)
    flat = models.flatten(params)
    return models.unflatten(
        {path: jax.device_put(leaf, where(path)) for path, leaf in flat.items()}
    )


def islands(mesh: Mesh) -> list[Mesh]:
    """The parts of a mesh that run programs of their own; either axis of each has size 1.

    Parts of a batch leave their loops at different times. Where `model` is 1 no device waits for
    another, and one program serves all of them. Otherwise a program has collectives, and in some of
    these (permutations, above all) every device of the program has to take part, whomever they
    concern: inside a loop that others have left, forever. So each group along `model` has its own.

    Raises:
      ValueError: the mesh has other axes.
    """
    if mesh.axis_names != AXES:
        raise ValueError(
            f"The mesh has the axes {', '.join(map(str, mesh.axis_names))}; they must be "
            f"{', '.join(AXES)}, as make_mesh has them."
        )
    return [mesh] if mesh.shape[MODEL] == 1 else [_mesh(group[None]) for group in mesh.devices]


def on_island(params: Params, island: Mesh) -> Params:
    """Parameters that lie on a whole mesh as one of its islands sees them; nothing is copied."""

    def view(array: Array) -> Array:
        sharding: Any = array.sharding
        pieces = {shard.device: shard.data for shard in array.addressable_shards}
        return jax.make_array_from_single_device_arrays(
            array.shape,
            NamedSharding(island, sharding.spec),
            [pieces[device] for device in island.devices.flat],
        )

    return jax.tree.map(view, params)


def split_rows(values: PyTree, parts: Sequence[Mesh]) -> list[PyTree]:
    """Hands each island its share of `[B, ...]` arrays, where it wants it.

    Args:
      values: B must be a multiple of what the `data` axes of all islands amount to.
      parts: the islands.
    """

    def share(array: Any, i: int, island: Mesh) -> Array:
        size = array.shape[0] // len(parts)
        where = NamedSharding(island, PartitionSpec(DATA))
        return jax.device_put(array[i * size : (i + 1) * size], where)

    return [
        jax.tree.map(lambda array, i=i, island=island: share(array, i, island), values)
        for i, island in enumerate(parts)
    ]


def over_rows(function: Callable[..., Any], island: Mesh, out_specs: Any) -> Callable[..., Any]:
    """`function(params, values)` with each part of the `data` axis on its own.

    Args:
      function: takes parameters and a pytree of `[B, ...]` arrays.
      island: see `islands`.
      out_specs: a pytree of `PartitionSpec` as the function's result, or a prefix of it.
    """
    if island.shape[DATA] == 1:
        return function  # the compiler divides the network
    specs = (PartitionSpec(), PartitionSpec(DATA))
    # Loop states begin as constants and become values that vary, which the check would refuse.
    return jax.shard_map(
        function, mesh=island, in_specs=specs, out_specs=out_specs, check_vma=False
    )


def at_once(programs: Sequence[Callable[..., Any]], arguments: Sequence[tuple]) -> list[Any]:
    """Runs the programs of all islands at the same time, and waits for their results."""

    def run(program: Callable[..., Any], given: tuple) -> Any:
        return jax.block_until_ready(program(*given))

    if len(programs) == 1:
        return [run(programs[0], arguments[0])]
    # A call returns late where the host follows a loop's condition, as it does on GPUs.
    with ThreadPoolExecutor(len(programs)) as pool:
        return list(pool.map(run, programs, arguments))


def _mesh(devices: np.ndarray) -> Mesh:
    return Mesh(devices, AXES, axis_types=(AxisType.Auto,) * len(AXES))
