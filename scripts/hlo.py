"""Reads what XLA compiled: the kernels of each loop, what they move, and what they must cost.

Nothing is measured. A kernel counts as the larger of its FLOPs over the FLOP rate and its bytes
over the rate of the memory, and a launch; operands count as read once and results as written once.
"""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from roofline import Ceilings

LAUNCH_S = 2e-6
"""Seconds that a kernel costs beside its work, where launches are queued ahead."""
LARGE = 1e6
"""Bytes from which on an array is worth a line."""

_NO_KERNEL = {"get-tuple-element", "parameter", "tuple", "bitcast", "constant", "while"}
_BYTES = {
    **dict.fromkeys(("pred", "s8", "u8", "f8e4m3fn", "f8e5m2"), 1),
    **dict.fromkeys(("bf16", "f16", "s16", "u16"), 2),
    **dict.fromkeys(("f32", "s32", "u32"), 4),
    **dict.fromkeys(("f64", "s64", "u64"), 8),
    **dict.fromkeys(("s4", "u4"), 0.5),
}
_HEAD = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
_INSTRUCTION = re.compile(r"\s+(ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)")
_TAKE = {"slice", "dynamic-slice", "gather"}
_UPDATE = {"scatter", "dynamic-update-slice"}
_MOVES = {"parameter", "bitcast", "copy", "transpose", "reshape", "tuple", "get-tuple-element"}
"""Operations that change nothing but where something lies."""


class Instruction(NamedTuple):
    """A line of a computation."""

    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    text: str
    """What stands behind the opcode, attributes included."""
    root: bool
    """Whether it is the result of the computation."""

    def attribute(self, name: str) -> str | None:
        """A computation that it names, as its body or its fused operations."""
        found = re.search(rf"\b{name}=%?([\w.\-]+)", self.text)
        return found and found[1]

    @property
    def source(self) -> str:
        """What in the program it was made from."""
        found = re.search(r'op_name="([^"]*)"', self.text)
        return found[1] if found else ""


class Kernel(NamedTuple):
    """What one launch does."""

    name: str
    shape: str
    source: str
    written: float
    """Bytes; of what it updates in place, the updates."""
    moved: float
    """Bytes that it reads and writes."""
    flops: float
    """In matrix products."""
    copies: bool
    """Whether it only moves data."""

    def seconds(self, ceilings: Ceilings) -> float:
        """The least time that it takes."""
        return max(self.flops / ceilings.flops, self.moved / ceilings.bytes) + LAUNCH_S


class Loop(NamedTuple):
    """The body of a loop."""

    name: str
    trips: int | None
    """How often it runs, where the compiler knows."""
    kernels: tuple[Kernel, ...]
    """Those of inner loops are not among them."""
    loops: tuple["Loop", ...]

    @property
    def label(self) -> str:
        """The step shape whose body this is, as `loop.py` names its scope; empty elsewhere."""
        found = [re.search(r"/(step_\w+)", kernel.source) for kernel in self.kernels]
        names = [match[1] for match in found if match]
        return max(set(names), key=names.count) if names else ""

    @property
    def copies(self) -> list[Kernel]:
        """Kernels that copy a large array and do nothing else, those of inner loops included."""
        return [kernel for kernel in self.all() if kernel.copies and kernel.written > LARGE]

    @property
    def large(self) -> list[Kernel]:
        """Kernels that write a large array, the largest first, those of inner loops included."""
        found = [kernel for kernel in self.all() if kernel.written > LARGE]
        return sorted(found, key=lambda kernel: -kernel.written)

    def all(self) -> Iterator[Kernel]:
        """Its kernels, and those of inner loops once."""
        yield from self.kernels
        for loop in self.loops:
            yield from loop.all()

    def count(self, turns: int) -> int:
        """Launches of one turn of the loop.

        Args:
          turns: how often inner loops run whose number of turns the compiler does not know.
        """
        inner = (_known(loop, turns) * loop.count(turns) for loop in self.loops)
        return len(self.kernels) + sum(inner)

    def seconds(self, ceilings: Ceilings, turns: int) -> float:
        """The least time of one turn of the loop; see `count`."""
        inner = (_known(loop, turns) * loop.seconds(ceilings, turns) for loop in self.loops)
        return sum(kernel.seconds(ceilings) for kernel in self.kernels) + sum(inner)


def steps(loops: Sequence[Loop]) -> dict[str, Loop]:
    """The loops over denoising steps by their labels; turns inside a step have no entry."""
    found: dict[str, Loop] = {}
    for loop in loops:
        found |= {loop.label: loop} if loop.label else steps(loop.loops)
    return found


def _known(loop: Loop, turns: int) -> int:
    return turns if loop.trips is None else loop.trips


def read(text: str) -> list[Loop]:
    """The loops of a compiled program that are not inside another one, in their order.

    Args:
      text: of the optimised, scheduled program.
    """
    computations = _computations(text)
    (entry,) = re.findall(r"^ENTRY %?([\w.\-]+)", text, re.M)
    return _loops(computations[entry], computations)


def _computations(text: str) -> dict[str, list[Instruction]]:
    """Every computation by its name."""
    found: dict[str, list[Instruction]] = {}
    lines: list[Instruction] = []
    for line in text.splitlines():
        if head := _HEAD.match(line):
            lines = found.setdefault(head[1], [])
        elif match := _INSTRUCTION.match(line):
            root, name, shape, opcode, rest = match.groups()
            operands = tuple(re.findall(r"%([\w.\-]+)", rest.split("), ")[0]))
            lines.append(Instruction(name, shape, opcode, operands, rest, root is not None))
    return found


def _loops(
    lines: Sequence[Instruction], computations: Mapping[str, Sequence[Instruction]]
) -> list[Loop]:
    found = []
    for instruction in lines:
        body = instruction.attribute("body")
        if instruction.opcode != "while" or body is None:
            continue
        trips = re.search(r'known_trip_count":\{"n":"(\d+)"', instruction.text)
        inside = computations[body]
        shapes = {line.name: line.shape for line in inside}
        kernels = [
            _kernel(line, shapes, computations) for line in inside if line.opcode not in _NO_KERNEL
        ]
        loops = _loops(inside, computations)
        found.append(Loop(body, trips and int(trips[1]), tuple(kernels), tuple(loops)))
    return found


def _kernel(
    line: Instruction,
    shapes: Mapping[str, str],
    computations: Mapping[str, Sequence[Instruction]],
) -> Kernel:
    fused = computations.get(line.attribute("calls") or "", [])
    written, reads = size(line.shape), [size(shapes.get(name, "")) for name in line.operands]
    if fused:
        written, reads = _written(fused), _read(fused)
    copies = line.opcode == "copy" or bool(fused) and {each.opcode for each in fused} <= _MOVES
    flops = _fused_attention(line, shapes) or _products(fused)
    return Kernel(line.name, line.shape, line.source, written, written + sum(reads), flops, copies)


def _read(fused: Sequence[Instruction]) -> list[float]:
    """Bytes that a fused computation reads of each parameter: slices, where it takes no more."""

    def needed(name: str, whole: float) -> float:
        total = 0.0
        for user in fused:
            if name not in user.operands:
                continue
            if user.opcode == "bitcast":
                total += needed(user.name, whole)
            elif user.opcode in _TAKE and user.operands[0] == name:
                total += size(user.shape)
            elif not (user.opcode in _UPDATE and user.operands[0] == name):
                return whole
        return min(total, whole)

    inputs = [line for line in fused if line.opcode == "parameter"]
    return [needed(line.name, size(line.shape)) for line in inputs]


def _written(fused: Sequence[Instruction]) -> float:
    """Bytes that a fused computation writes: of what it updates in place, the updates."""
    by_name = {line.name: line for line in fused}

    def result(line: Instruction) -> float:
        if line.opcode == "tuple":
            return sum(result(by_name[name]) for name in line.operands)
        if line.opcode == "bitcast" and line.operands[0] in by_name:
            return result(by_name[line.operands[0]])
        if line.opcode in _UPDATE:
            # (buffer, updates, ...) or (buffer, indices, updates)
            update = by_name[line.operands[2 if line.opcode == "scatter" else 1]]
            return size(update.shape)
        return size(line.shape)

    return sum(result(line) for line in fused if line.root)


def size(shape: str) -> float:
    """Bytes of an array, or of all arrays of a tuple, as XLA writes their shapes."""
    found = re.findall(r"(\w+)\[([\d,]*)\]", shape)
    return sum(_BYTES.get(dtype, 0) * math.prod(_axes(axes)) for dtype, axes in found)


def _axes(text: str) -> list[int]:
    return [int(axis) for axis in text.split(",") if axis]


def _products(lines: Sequence[Instruction]) -> float:
    """FLOPs of the matrix products among the lines."""
    shapes, total = {line.name: line.shape for line in lines}, 0.0
    for line in lines:
        if line.opcode != "dot":
            continue
        contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", line.text)
        left = re.search(r"\[([\d,]*)\]", shapes.get(line.operands[0], ""))
        result = re.search(r"\[([\d,]*)\]", line.shape)
        if contracted and left and result:
            axes = _axes(left[1])
            depth = math.prod(axes[axis] for axis in _axes(contracted[1]))
            total += 2 * math.prod(_axes(result[1])) * depth
    return total


def _fused_attention(line: Instruction, shapes: Mapping[str, str]) -> float:
    """FLOPs of an attention that cuDNN computes in one kernel: of queries [B, Q, N, H] with keys
    [B, L, K, H], and of the weights with as many values."""
    if "__cudnn$fmha" not in line.text:
        return 0.0
    arrays = (re.search(r"\[([\d,]*)\]", shapes.get(name, "")) for name in line.operands[:2])
    queries, keys = (_axes(found[1]) for found in arrays if found)
    return 4 * math.prod(queries) * keys[1]
