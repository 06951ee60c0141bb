"""No cache: every step computes every position."""

import dataclasses
from typing import ClassVar

from dlm_jax.cache.base import CacheMethod, StepShape
from dlm_jax.decoding.rows import Row
from dlm_jax.geometry import Geometry
from dlm_jax.models.base import Config, LayerFn, Transformer, plain_layer
from dlm_jax.typing import Array, Bool, DTypeLike, PyTree


@dataclasses.dataclass(frozen=True)
class NoCache(CacheMethod):
    """The plain denoising loop; keeps no K/V at all."""

    name: ClassVar[str] = "none"
    keeps: ClassVar[bool] = False

    def select(self, memory: PyTree, row: Row, geo: Geometry) -> Bool[Array, " L"]:
        del memory, geo
        return row.valid_L

    def init_cache(self, model: Transformer, geo: Geometry, dtype: DTypeLike) -> tuple[PyTree, ...]:
        del geo, dtype
        return ((),) * model.config.num_layers

    def layers(
        self, shape: StepShape, config: Config, geo: Geometry
    ) -> tuple[tuple[int, int, LayerFn], ...]:
        del shape, geo
        return ((0, config.num_layers, plain_layer),)
