"""What a task is decoded with where nobody says otherwise: the d2Cache framework's settings.

The tables of the papers hang on such settings, which differ by task, model and cache method. They
apply to a model family's published weights, which are told apart by name (`variant`). What a
user gives always wins; what neither gives is the family's default.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dlm_jax import cache as cache_lib
from dlm_jax import tokenizer
from dlm_jax.cache import CacheMethod
from dlm_jax.decoding.config import DecodeConfig
from dlm_jax.decoding.strategies import STRATEGIES
from dlm_jax.eval.arguments import Settings
from dlm_jax.models import Config
from dlm_jax.weights import hub

VARIANTS = ("base", "inst", "1.5")
"""Base, instruction-tuned, and LLaDA 1.5, which the framework treats as a base model."""

GEN_LENGTH = 512
GEN_LENGTHS = {
    "gsm8k": 256,
    "gsm8k_cot": 256,
    "math-500": 256,
    "gpqa_main_generative_n_shot": 256,
    "mmlu_pro": 256,
    "humaneval": 512,
    "humaneval_instruct": 512,
    "mbpp": 512,
    "mbpp_instruct": 512,
}
"""Tasks whose length holds whatever the task itself asks for, as in the framework."""

GROUPS = ("mmlu_pro",)
"""Of the tasks above, those that are groups."""

BLOCK_LENGTH = 32
"""Of instruction-tuned models, and of Fast-dLLM's caches; otherwise everything is one block."""

OWN = {"tiny_math": dict(gen_length=64, block_length=16)}
"""Tasks of this package, which are decoded in one way whatever the cache."""

PERIODS = {
    "gsm8k": ((25, 5), (50, 7), (100, 8), (25, 2)),
    "gsm8k_cot": ((25, 5), (50, 7), (100, 8), (25, 2)),
    "humaneval": ((50, 5), (25, 5), (5, 1), (50, 1)),
    "math-500": ((50, 8), (50, 1), (100, 4), (50, 1)),
    "mbpp": ((25, 4), (100, 5), (25, 8), (10, 8)),
    "gpqa_main_generative_n_shot": ((100, 8), (50, 6), (100, 8), (10, 8)),
    "mmlu_pro": ((100, 6), (50, 3), (25, 2), (5, 1)),
}
"""dLLM-Cache's (kp, kr) for the models of `_MODELS` (d2Cache, arXiv 2509.23094, table 3)."""
_MODELS = (("llada", "base"), ("llada", "inst"), ("dream", "base"), ("dream", "inst"))
_OTHER_PERIODS = (50, 4)


def variant(given: str | float | None, directory: str | Path, tok: Any) -> str:
    """Which of `VARIANTS` a model is: the given one, or what its name or chat template tells.

    Args:
      given: a variant; 1.5 may be a number.
      directory: of the model, also in the hub's cache.
      tok: the tokenizer.

    Raises:
      ValueError: there is no such variant.
    """
    if given is not None:
        if str(given) not in VARIANTS:
            raise ValueError(f"variant is {given!r}; it must be one of {', '.join(VARIANTS)}.")
        return str(given)
    name = hub.name_of(directory).lower()
    if "1.5" in name:
        return "1.5"
    if "inst" in name:
        return "inst"
    return "base" if "base" in name or not tokenizer.has_chat_template(tok) else "inst"


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How a model is to decode whatever task comes.

    Attributes:
      config: the model.
      variant: one of `VARIANTS`.
      settings: what is given.
    """

    config: Config
    variant: str
    settings: Settings

    def plan(self, task: str, wishes: Mapping[str, Any]) -> tuple[DecodeConfig, CacheMethod]:
        """Decoding and cache method for a task.

        A cache method that must know the order of the tokens in advance gets a random one, unless
        an order is asked for.

        Args:
          task: its name.
          wishes: fields of `DecodeConfig` that the task asks for.

        Raises:
          ValueError: settings that cannot work, in one sentence.
        """
        try:
            return self._plan(task, wishes)
        except TypeError as error:  # a value from a command line can be of any type
            reason = str(error).partition("\n")[0]
            raise ValueError(f"A setting has a value of the wrong type: {reason}.") from error

    def _plan(self, task: str, wishes: Mapping[str, Any]) -> tuple[DecodeConfig, CacheMethod]:
        given = self.settings
        chosen = _decoding(task, self, wishes) | dict(given.decode)
        if chosen.get("sigma") == 0:
            del chosen["sigma"]  # the framework's way to do without
        decode = DecodeConfig.for_model(self.config, **chosen)
        if self.config.room(decode.gen_length) < 1:
            raise ValueError(
                f"gen_length is {decode.gen_length} for {task}; it must leave room for a prompt in "
                f"the model's context of {self.config.max_length} tokens."
            )
        method = cache_lib.make(given.cache, **_cache_args(task, self) | dict(given.cache_args))
        if "alg" not in given.decode:
            decode = decode.for_cache(method)
        method.check(self.config, decode)
        return decode, method


def _decoding(task: str, recipe: Recipe, wishes: Mapping[str, Any]) -> dict[str, Any]:
    given, cache = recipe.settings.decode, recipe.settings.cache
    if task in OWN:
        fields = dict(wishes) | OWN[task]
        if (given.get("gen_length") or fields["gen_length"]) % fields["block_length"]:
            del fields["block_length"]
        return fields
    fields: dict[str, Any] = dict(gen_length=GEN_LENGTH, alg="maskgit_plus")
    if recipe.config.family == "dream":
        fields["top_p"] = 0.9
    fields |= wishes
    if _name(task) in GEN_LENGTHS:
        fields["gen_length"] = GEN_LENGTHS[_name(task)]
    order = STRATEGIES.get(given.get("alg") or "")  # where alg is no measure
    paced = order is not None and "fixed" not in order.schedules  # by a schedule of its own
    if not paced and not {"steps", "schedule", "strategy"} & given.keys():
        fields["schedule"] = "fixed"  # one token per step
    if cache == "d2cache":
        fields["sigma"] = 10.0
    in_blocks = recipe.variant == "inst" or cache in ("prefix", "dual")
    length = given.get("gen_length") or fields["gen_length"]
    fits = in_blocks and cache != "d2cache" and length % BLOCK_LENGTH == 0
    return fields | dict(block_length=BLOCK_LENGTH if fits else length)


def _name(task: str) -> str:
    """The name of a task in the tables: that of its group, if the whole group is meant."""
    return next((group for group in GROUPS if task.startswith(f"{group}_")), task)


def _cache_args(task: str, recipe: Recipe) -> dict[str, Any]:
    if task in OWN:
        return {}
    if recipe.settings.cache == "d2cache":
        return dict(rollout_p=0.1, current_k=32, sigma=10.0, inflate_w=0)
    if recipe.settings.cache == "dllm":
        periods = dict(zip(_MODELS, PERIODS.get(_name(task), ()), strict=False))
        kp, kr = periods.get((recipe.config.family, recipe.variant), _OTHER_PERIODS)
        return dict(kp=kp, kr=kr, rou=0.25)
    return {}
