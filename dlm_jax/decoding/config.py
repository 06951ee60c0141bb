"""`DecodeConfig`: everything a user chooses about decoding, validated when it is made."""

import dataclasses
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp

from dlm_jax import models
from dlm_jax.decoding import checks, strategies
from dlm_jax.decoding.sampler import ALGORITHMS, Measure
from dlm_jax.decoding.schedule import SCHEDULES, Schedule
from dlm_jax.decoding.settings import Number, concrete, nested, number, positive, settings
from dlm_jax.decoding.strategies import Strategy
from dlm_jax.geometry import Geometry
from dlm_jax.models import Config

if TYPE_CHECKING:
    import dlm_jax.cache.base

FEW_SHAPES = 4
"""Step shapes of large models: each takes as long to compile as some tens of tokens to generate."""


@settings(kw_only=True)
class DecodeConfig:
    """How a canvas of masks becomes text. A pytree whose leaves are the numbers that shape nothing.

    The defaults are LLaDA's schedule and confidence on one block; `for_model` takes what the
    original of the model at hand does. docs/decoding.md tells the strategies apart. Another value
    of a leaf (`temperature` to `cfg_scale`, `max_forwards`, and the numbers of a strategy) compiles
    nothing; switching one on or off does, and so does everything else.

    Attributes:
      gen_length: G, tokens to generate; 0 only fills the masks in the prompt (`infill`).
      block_length: generated tokens per semi-autoregressive block, filled from left to right; None
        makes one block of everything.
      steps: denoising steps (model forwards) over the whole generation, split evenly over the
        blocks; None means one per generated token. Unused by the schedule `fixed`.
      schedule: how many tokens each step commits, a key of `schedule.SCHEDULES`; None takes the one
        that the strategy needs, `fixed` for infilling without `steps`, or else `even`.
      num_transfer_tokens: tokens per step of the schedule `fixed`; where a strategy looks at
        confidences to decide how many, the least.
      eps: last time of the schedule `timestep`.
      strategy: which positions a step commits: a `Strategy`, whose name makes one as well. The
        default takes the surest, as many as the schedule says.
      threshold: short for `strategy=Threshold(threshold)`, which commits every token at least this
        sure; beside the name of a strategy, its argument of this name or the rule that it narrows.
        Like the next two an argument only: `strategy` holds it.
      factor: the same for `Factor`: the n surest tokens, n the largest with (n + 1)(1 - confidence
        of the n-th) below it.
      gamma: the same for `EntropyBound`: as long as entropies, the largest one left out, sum up to
        at most this many nats.
      alg: what a confidence is, a key of `sampler.ALGORITHMS`. `random` and `origin`, which the
        originals name here, are short for the strategies of these names.
      temperature: 0 or None takes the most probable token, above 0 samples.
      top_p: nucleus filter in (0, 1]; 1 or None switches it off.
      top_k: keeps the k most probable tokens; None switches it off.
      min_p: keeps the tokens with at least this share of the most probable one's probability, in
        [0, 1); 0 or None switches it off. A token must pass all filters that are on.
      alg_temp: above 0, the positions of a step are drawn from the softmax of confidence divided
        by it (Dream); None or 0 takes the surest.
      sigma: certainty-prior guidance: a confidence counts in proportion to how much is known
        around, with a Gaussian of this width in positions (d2Cache, arXiv 2509.23094); None: off.
      clip_alpha: the most that a debiased confidence can be (PC-Sampler); see the argument
        `token_freq` of `diffusion_generate`.
      cfg_scale: classifier-free guidance, at twice the computation; 0 or None switches it off
        (LLaDA).
      stop_until_eos: a row is done once everything before its first end-of-text token is decided;
        what is then a mask stays one.
      fill_past_eos: with `stop_until_eos`, a row that is not done yet may also commit tokens of its
        block behind the end of the text, as the d2Cache framework does.
      eos_id: the token that ends a text, or several of which any does; None takes the model's.
      suppress: ids of tokens that are never predicted, as if the model gave them no probability.
      unused: the same for ranges of ids, `(first, behind the last)`: what a vocabulary has beyond
        its tokenizer. An `Engine` adds what its tokenizer has no token for.
      infill: whether masks inside the prompt are to be filled as well; they belong to the first
        block. Costs logits at every position. Without it prompts never change.
      ban_mask: never commit the mask token. Confidences stay normalised over the whole vocabulary.
        The originals do not ban it: a step may then be spent on a position that stays masked.
      leave_early: leave a block as soon as it holds no mask. The original LLaDA and Dream loops do
        not: steps beyond the number of tokens cost a forward and commit nothing.
      max_forwards: stop after this many model forwards, with what is a mask then left a mask; None
        sets no limit. With `record=("state",)` the generation can be resumed.
      lockstep: rows of a batch leave a block together (True) or each by itself (False); None takes
        what suits the cache method. With the mask token banned, a row's tokens do not depend on it.
      step_shapes: the most step shapes that are compiled for a cache method whose sets differ in
        size. Fewer are compiled sooner, and compute more slots that nobody asked for; no token
        depends on it.

    Raises:
      ValueError: one sentence that names the argument, its value and what would be right.
    """

    gen_length: int = 128
    block_length: int | None = None
    steps: int | None = None
    schedule: str | None = None
    num_transfer_tokens: int = 1
    eps: float = 1e-3
    strategy: Any = nested(None)
    threshold: dataclasses.InitVar[Number] = None
    factor: dataclasses.InitVar[Number] = None
    gamma: dataclasses.InitVar[Number] = None
    alg: str = "low_confidence"
    temperature: Number = number(None)
    top_p: Number = number(None)
    top_k: Number = number(None, dtype=jnp.int32)
    min_p: Number = number(None)
    alg_temp: Number = number(None)
    sigma: Number = number(None)
    clip_alpha: Number = number(10.0)
    cfg_scale: Number = number(None)
    stop_until_eos: bool = False
    fill_past_eos: bool = False
    eos_id: int | tuple[int, ...] | None = None
    suppress: tuple[int, ...] = ()
    unused: tuple[tuple[int, int], ...] = ()
    infill: bool = False
    ban_mask: bool = True
    leave_early: bool = True
    max_forwards: Number = number(None, dtype=jnp.int32)
    lockstep: bool | None = None
    step_shapes: int = 6

    def __post_init__(self, threshold: Number, factor: Number, gamma: Number) -> None:
        given = dict(threshold=threshold, factor=factor, gamma=gamma)
        rules = {name: value for name, value in given.items() if value is not None}
        self._set(strategy=_strategy(self.strategy, rules, self.alg))
        if self.alg in _named_by_alg():
            self._set(alg="low_confidence")
        for name in ("eos_id", "suppress"):
            if isinstance(getattr(self, name), list):
                self._set(**{name: tuple(getattr(self, name))})
        if isinstance(self.unused, list | tuple):
            ranges = (tuple(part) if isinstance(part, list) else part for part in self.unused)
            self._set(unused=tuple(ranges))
        checks.check(self)
        if isinstance(self.eos_id, tuple) and len(self.eos_id) == 1:
            self._set(eos_id=self.eos_id[0])
        # One way to say that something is off, so that this decides the program.
        for name in ("temperature", "min_p", "alg_temp", "cfg_scale"):
            if not positive(getattr(self, name)):
                self._set(**{name: None})
        if concrete(self.top_p) and self.top_p >= 1:
            self._set(top_p=None)
        self.geometry(prompt=1, shift=0)

    def _set(self, **changes: Any) -> None:
        for name, value in changes.items():
            object.__setattr__(self, name, value)

    @classmethod
    def for_model(cls, config: Config, **overrides: Any) -> "DecodeConfig":
        """The model family's defaults where an argument is not given or None.

        A default block length is lowered to a divisor of `gen_length`, to no less than half of it;
        if there is none, everything is one block. A strategy that compares confidences, or `sigma`,
        without an `alg` looks at probabilities, whatever the family's own measure. Of models with
        more than 10^9 parameters, whose layers take long to compile, few step shapes are compiled.
        """
        given = {name: value for name, value in overrides.items() if value is not None}
        family = dict(models.FAMILIES[config.family].DECODE)
        rules = {name: given[name] for name in strategies.shorthands() if name in given}
        strategy = _strategy(given.get("strategy"), rules, given.get("alg", family["alg"]))
        compares = strategy.adaptive or "sigma" in given
        if compares and not ALGORITHMS[family["alg"]].is_probability:
            family["alg"] = "maskgit_plus"
        uncounted = given.get("infill") and "steps" not in given
        if uncounted or family["schedule"] not in strategy.schedules:
            del family["schedule"]
        if config.parameters > 10**9:
            family["step_shapes"] = FEW_SHAPES
        chosen = family | given
        gen_length = chosen.get("gen_length", cls.gen_length)
        if "block_length" not in given and chosen["block_length"] is not None:
            usual = chosen["block_length"]
            fitting = (n for n in range(usual, usual // 2 - 1, -1) if n and gen_length % n == 0)
            chosen["block_length"] = next(fitting, None) if gen_length > 0 else None
        return cls(**chosen)

    def for_cache(self, method: "dlm_jax.cache.base.CacheMethod") -> "DecodeConfig":
        """This configuration, with a random order if the method must know it in advance.

        Raises:
          ValueError: something else goes by confidence; one sentence.
        """
        if self.strategy.ordered or not method.needs_order:
            return self
        try:
            return dataclasses.replace(self, alg="random")
        except ValueError as error:
            raise ValueError(
                f"With the cache {method.name!r}, which must know the order of the tokens in "
                f"advance, {error}"
            ) from error

    @property
    def measure(self) -> Measure:
        """What `alg` names."""
        return ALGORITHMS[self.alg]

    @property
    def guided(self) -> bool:
        """Whether every forward has a second, unconditional copy of each row."""
        return positive(self.cfg_scale)

    @property
    def debiasable(self) -> bool:
        """Whether probabilities rank positions, so that they can be debiased."""
        return self.measure.is_probability and self.strategy.ranks

    @property
    def pace(self) -> str:
        """The schedule, a key of `schedule.SCHEDULES`."""
        return self.schedules[0] if self.schedule is None else self.schedule

    @property
    def schedules(self) -> tuple[str, ...]:
        """The schedules that fit, the usual one first."""
        fitting = self.strategy.schedules
        if self.infill and self.steps is None:  # who knows how many steps that takes
            return tuple(sorted(fitting, key=lambda name: name != "fixed"))
        return fitting

    def ends_of_text(self, config: Config) -> tuple[int, ...]:
        """The tokens of which any ends a text."""
        if self.eos_id is None:
            return (config.eos_id, *config.more_eos_ids)
        return self.eos_id if isinstance(self.eos_id, tuple) else (self.eos_id,)

    def check(self, config: Config) -> None:
        """Refuses a model that this decoding has no meaning for.

        Raises:
          ValueError: one sentence that says what would be right.
        """
        checks.check_model(self, config)

    def geometry(self, *, prompt: int, shift: int) -> Geometry:
        """The static shape of a generation after a prompt of `prompt` slots."""
        steps = self.steps
        if steps is None and self.pace != "fixed":
            steps = self.gen_length
        geo = Geometry(
            prompt=prompt,
            gen=self.gen_length,
            block=self.gen_length if self.block_length is None else self.block_length,
            steps=steps,
            shift=shift,
            infill=self.infill,
            step_shapes=self.step_shapes,
        )
        first_block = geo.block + (prompt if self.infill else 0)
        return dataclasses.replace(geo, most_per_step=self.make_schedule(geo).most(first_block))

    def make_schedule(self, geo: Geometry) -> Schedule:
        """How many tokens each step of such a generation commits."""
        return SCHEDULES[self.pace](geo, eps=self.eps, num_transfer_tokens=self.num_transfer_tokens)


def _strategy(given: Any, rules: dict[str, Number], alg: str) -> Strategy:
    """The strategy that the arguments of `DecodeConfig` mean."""
    usual = strategies.Surest()
    if isinstance(given, str):
        strategy = strategies.make(given, **rules)
    elif given is None or given == usual:
        strategy = strategies.by_shorthand(rules) if rules else usual
    elif not isinstance(given, Strategy):
        raise ValueError(
            f"strategy is {given!r}; it must be a name among {', '.join(strategies.STRATEGIES)}, "
            "or one made by dlm_jax.decoding.strategies."
        )
    elif rules:
        raise ValueError(
            f"{next(iter(rules))} and {given} are both given; one of them decides how many tokens "
            "a step commits."
        )
    else:
        strategy = given
    if alg not in _named_by_alg() or strategy.name == alg:
        return strategy
    if strategy != usual:
        raise ValueError(
            f"alg is {alg!r}, which ignores confidence; with {strategy.spelling} it must be one of "
            f"{', '.join(ALGORITHMS)}."
        )
    return strategies.make(alg)


def _named_by_alg() -> list[str]:
    """Strategies that `alg` may name."""
    return [name for name, strategy in strategies.STRATEGIES.items() if strategy.as_alg]
