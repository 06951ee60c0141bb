"""How fast a denoising step could be: its matrix products, and what the device can do at best.

The work is counted from shapes, in the jaxpr of one step of one row; nothing is computed. The rows
of a batch do not interact, so B rows have B times the FLOPs and read B times as many keys, values
and activations, but every weight once:

    seconds of a product = max(B FLOPs / FLOP rate, (weights + B other bytes) / byte rate)

The products run one after the other, so that the limit of a step is their sum. Operands count as
read once and results as written once, except for attention scores, which a fused kernel never
writes. Everything that is no matrix product (norms, softmax, sampling, writing the cache) counts as
free, and so does launching it: no program is faster than the limit, and a good one is near it.

The ceilings are measured: a large matrix product, and a pass that reads and writes a large array.
"""

import functools
import math
import time
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Jaxpr, JaxprEqn, Literal, Var, jaxprs_in_params

from dlm_jax.cache import CacheMethod
from dlm_jax.cache.base import StepShape
from dlm_jax.decoding.config import DecodeConfig
from dlm_jax.decoding.start import start
from dlm_jax.decoding.state import DecodeState
from dlm_jax.decoding.step import step
from dlm_jax.models import Transformer
from dlm_jax.models.layers import precision
from dlm_jax.typing import Array, DTypeLike, Params

_WEIGHT, _SCORES = "weight", "scores"
"""What is known of a variable of a jaxpr; None where it is neither."""
_RUNS, _ENOUGH_S = 5, 0.05
"""How often a ceiling is measured, and for how many seconds at least."""


class Product(NamedTuple):
    """A matrix product, as one row of a batch needs it."""

    flops: int
    """2 M N K."""
    weight_bytes: int
    """Read once for all rows."""
    row_bytes: int
    """Read and written for each row."""


class Ceilings(NamedTuple):
    """What a device can do at best."""

    flops: float
    """Per second, in matrix products."""
    bytes: float
    """Per second, read and written."""

    def seconds(self, products: Iterable[Product], batch: int) -> float:
        """The least time that the products take for `batch` rows, one after the other."""
        return sum(
            max(
                batch * product.flops / self.flops,
                (product.weight_bytes + batch * product.row_bytes) / self.bytes,
            )
            for product in products
        )


def total_flops(products: Iterable[Product], batch: int = 1) -> int:
    """FLOPs of all products for `batch` rows."""
    return sum(batch * product.flops for product in products)


def total_bytes(products: Iterable[Product], batch: int = 1) -> int:
    """Bytes that all products move for `batch` rows."""
    return sum(product.weight_bytes + batch * product.row_bytes for product in products)


# --- counting -------------------------------------------------------------------------------------


def step_products(
    model: Transformer,
    params: Params,
    prompt_BP: np.ndarray,
    decode: DecodeConfig,
    method: CacheMethod,
) -> list[list[Product]]:
    """The products of a step of one row, for each step shape of the cache method in its order.

    Args:
      model: the network.
      params: its parameters, or their shapes.
      prompt_BP: token ids [B, P], of which the first row is looked at.
      decode: decoding configuration.
      method: cache method.

    Raises:
      ValueError: the arguments do not fit each other.
    """
    geo = decode.geometry(prompt=prompt_BP.shape[1], shift=model.config.shift)
    key = jax.random.key(0)

    def first_step(params: Params, *, shape: StepShape) -> DecodeState:
        # No products before the step.
        setup, state = start(params, model, prompt_BP[:1], key=key, decode=decode, cache=method)
        return step(setup, state, shape)

    kinds = [_WEIGHT] * len(jax.tree.leaves(params))
    steps = [functools.partial(first_step, shape=shape) for shape in method.step_shapes(geo)]
    return [find_products(jax.make_jaxpr(one)(params).jaxpr, kinds)[0] for one in steps]


def find_products(
    jaxpr: Jaxpr, kinds: Sequence[str | None] = ()
) -> tuple[list[Product], list[str | None]]:
    """All matrix products of a jaxpr, bodies of loops once per turn; and the kinds of its results.

    Args:
      jaxpr: of one row.
      kinds: what each of its arguments is; nothing is known of them where it is empty.

    Raises:
      ValueError: a loop whose number of turns is not known holds products.
    """
    known = dict(zip(jaxpr.invars, kinds, strict=bool(kinds)))

    def kind(variable: Var | Literal) -> str | None:
        return None if isinstance(variable, Literal) else known.get(variable)

    products = []
    for eqn in jaxpr.eqns:
        given = [kind(variable) for variable in eqn.invars]
        if eqn.primitive.name == "dot_general":
            product, result = _product(eqn, given)
            found, results = [product], [result]
        elif bodies := list(jaxprs_in_params(eqn.params)):
            found, results = _inside(eqn, bodies, given)
        else:
            found, results = [], [_derived(eqn, given, result) for result in eqn.outvars]
        products += found
        known.update(zip(eqn.outvars, results, strict=True))
    return products, [kind(variable) for variable in jaxpr.outvars]


def _product(eqn: JaxprEqn, given: Sequence[str | None]) -> tuple[Product, str | None]:
    """A product and the kind of its result, given the kinds of its operands."""
    (contracted, _), (batched, _) = eqn.params["dimension_numbers"]
    depth = math.prod(eqn.invars[0].aval.shape[axis] for axis in contracted)
    flops = 2 * eqn.outvars[0].aval.size * depth
    sizes = [_bytes(operand) for operand in eqn.invars]
    weights = sum(size for size, kind in zip(sizes, given, strict=True) if kind == _WEIGHT)
    moved = sum(size for size, kind in zip(sizes, given, strict=True) if kind is None)
    # Products of every head by itself are attention: first the scores, then what they weigh.
    if batched and not weights and _SCORES not in given:
        return Product(flops, weights, moved), _SCORES
    return Product(flops, weights, moved + _bytes(eqn.outvars[0])), None


def _inside(
    eqn: JaxprEqn, bodies: Sequence[Jaxpr], given: Sequence[str | None]
) -> tuple[list[Product], list[str | None]]:
    """The products within an operation that is none itself, and the kinds of its results."""
    # What a body takes stands last, behind the index of a branch or what only the test takes.
    inner = [find_products(body, given[len(given) - len(body.invars) :]) for body in bodies]
    if eqn.primitive.name == "cond":
        found, results = max(inner, key=lambda branch: total_flops(branch[0]))
    else:
        found = [product for products, _ in inner for product in products]
        found, results = found * eqn.params.get("length", 1), inner[-1][1]
    if eqn.primitive.name == "while" and found:
        raise ValueError("A loop of unknown length holds matrix products; they have no number.")
    return found, results if len(results) == len(eqn.outvars) else [None] * len(eqn.outvars)


def _derived(eqn: JaxprEqn, given: Sequence[str | None], result: Var) -> str | None:
    """The kind of what an operation makes: of weights alone weights, of all scores scores."""
    operands = [
        (kind, operand.aval.size)
        for kind, operand in zip(given, eqn.invars, strict=True)
        if not isinstance(operand, Literal)
    ]
    if operands and all(kind == _WEIGHT for kind, _ in operands):
        return _WEIGHT
    return _SCORES if (_SCORES, result.aval.size) in operands else None


def _bytes(variable: Var | Literal) -> int:
    return variable.aval.size * variable.aval.dtype.itemsize


# --- measuring ------------------------------------------------------------------------------------


def measure_ceilings(dtype: DTypeLike) -> Ceilings:
    """Both ceilings of the default device, the best of several runs each; takes about a second.

    The product is one of square matrices of the dtype with random entries, at the precision that
    the network asks for. The other is a negation in place, so that no page is touched for the first
    time. Nothing stays in memory.
    """
    cpu = jax.default_backend() == "cpu"
    side, items = (1024, 2**26) if cpu else (8192, 2**28)
    x, kernel = jax.random.normal(jax.random.key(0), (2, side, side), dtype)
    kernel = kernel / jnp.asarray(math.sqrt(side), dtype)  # keeps the scale of what it multiplies
    return Ceilings(
        flops=_rate(lambda x: _multiply(x, kernel, precision=precision(dtype)), x, 2 * side**3),
        bytes=_rate(_negate, jnp.arange(items, dtype=jnp.float32), 2 * 4 * items),
    )


_multiply = jax.jit(jnp.matmul, static_argnames="precision")
_negate = jax.jit(jnp.negative, donate_argnums=0)


def _rate(function: Callable[[Array], Array], x: Array, work: int) -> float:
    """Work per second of a function that is applied to its own result; the best of several runs."""
    x, turns, rates = jax.block_until_ready(function(x)), 1, []
    while len(rates) < _RUNS:
        start = time.perf_counter()
        for _ in range(turns):
            x = function(x)
        jax.block_until_ready(x)
        seconds = time.perf_counter() - start
        if seconds < _ENOUGH_S:  # too few turns to hide what starting them takes
            turns *= 2
        else:
            rates.append(turns * work / seconds)
    return max(rates)
