"""`DecodeConfig`: everything a user chooses about decoding, validated when it is made."""

import dataclasses
from typing import TYPE_CHECKING, Any, NamedTuple

import jax.numpy as jnp

from dlm_jax import models
from dlm_jax.decoding import checks
from dlm_jax.decoding.checks import concrete, positive
from dlm_jax.decoding.sampler import ALGORITHMS, Measure
from dlm_jax.decoding.schedule import SCHEDULES, Schedule
from dlm_jax.geometry import Geometry
from dlm_jax.models import Config
from dlm_jax.typing import Array, Float, Int

if TYPE_CHECKING:
    import dlm_jax.cache.base

Number = Float[Array, ""] | None


class Numbers(NamedTuple):
    """The values of a `DecodeConfig` that shape nothing, hence traced; None switches one off.

    Switching on or off changes the compiled program, another value does not.
    """

    temperature: Number = None
    top_p: Number = None
    top_k: Int[Array, ""] | None = None
    alg_temp: Number = None
    threshold: Number = None
    factor: Number = None
    gamma: Number = None
    sigma: Number = None
    clip_alpha: Number = None
    kl_threshold: Number = None
    wide_in_thres: Number = None
    narrow_out_thres: Number = None
    cfg_scale: Number = None
    max_forwards: Int[Array, ""] | None = None

    def sampling(self) -> dict[str, Any]:
        """What `sampler.sample` wants of them."""
        return dict(temperature=self.temperature, top_p=self.top_p, top_k=self.top_k)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecodeConfig:
    """How a canvas of masks becomes text. Hashable, hence static under jit.

    The defaults are LLaDA's schedule and confidence on one block; `for_model` takes what the
    original of the model at hand does. docs/decoding.md tells the strategies apart. Of the numbers,
    only `num_transfer_tokens`, `eps`, the lengths and `steps` shape the compiled program.

    Attributes:
      gen_length: G, tokens to generate; 0 only fills the masks in the prompt (`infill`).
      block_length: generated tokens per semi-autoregressive block, filled from left to right; None
        makes one block of everything.
      steps: denoising steps (model forwards) over the whole generation, split evenly over the
        blocks; None means one per generated token. Unused by the schedule `fixed`.
      schedule: how many tokens each step commits, a key of `schedule.SCHEDULES`; None takes the one
        that `alg` or a rule needs, `fixed` for infilling without `steps`, or else `even`.
      num_transfer_tokens: tokens per step of the schedule `fixed`; with a rule, the least (with
        `klass`, only where nothing that has settled is sure).
      eps: last time of the schedule `timestep`.
      alg: what a confidence is, a key of `sampler.ALGORITHMS`; or `random` (an order drawn in
        advance), or Dream's `origin` (every mask by itself, as probable as the timestep says).
      temperature: 0 takes the most probable token, above 0 samples.
      top_p: nucleus filter in (0, 1]; None switches it off.
      top_k: keeps the k most probable tokens; None switches it off.
      alg_temp: above 0, the positions of a step are drawn from the softmax of confidence divided
        by it (Dream); None or 0 takes the surest.
      threshold: rule: commits every token at least this sure (Fast-dLLM, arXiv 2505.22618).
      factor: rule: commits the n surest tokens, n the largest with (n + 1)(1 - confidence of the
        n-th) below it (Fast-dLLM).
      spare_last: with `factor`, leave out the least sure position where the rule would take all, as
        the d2Cache framework does by mistake.
      gamma: rule: commits the surest tokens as long as their entropies, the largest one left out,
        sum up to at most this many nats (EB-Sampler, arXiv 2505.24857).
      sigma: certainty-prior guidance: a confidence counts in proportion to how much is known
        around, with a Gaussian of this width in positions (d2Cache, arXiv 2509.23094); None: off.
      clip_alpha: the most that a debiased confidence can be (PC-Sampler); see the argument
        `token_freq` of `diffusion_generate`.
      strategy: `klass` (arXiv 2511.05664: of the tokens that the rule finds sure, only those whose
        distribution has settled), `wino` (arXiv 2507.18578: commits what is sure of a block, and
        revokes what the rest makes unsure), or None.
      kl_threshold: for `klass`, a distribution has settled when its divergence from the one before
        was below this, in nats, ...
      kl_history_length: ... for so many steps.
      wide_in_thres: for `wino`, how sure a token must be to be committed.
      narrow_out_thres: for `wino`, what it must stay above in order not to be revoked.
      cfg_scale: classifier-free guidance, at twice the computation; 0 switches it off (LLaDA).
      stop_until_eos: a row is done once everything before its first end-of-text token is decided;
        what is then a mask stays one.
      fill_past_eos: with `stop_until_eos`, a row that is not done yet may also commit tokens of its
        block behind the end of the text, as the d2Cache framework does.
      eos_id: the end-of-text token; None takes the model's.
      suppress: ids of tokens that are never predicted, as if the model gave them no probability.
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

    Raises:
      ValueError: one sentence that names the argument, its value and what would be right.
    """

    gen_length: int = 128
    block_length: int | None = None
    steps: int | None = None
    schedule: str | None = None
    num_transfer_tokens: int = 1
    eps: float = 1e-3
    alg: str = "low_confidence"
    temperature: Any = 0.0
    top_p: Any = None
    top_k: Any = None
    alg_temp: Any = None
    threshold: Any = None
    factor: Any = None
    spare_last: bool = False
    gamma: Any = None
    sigma: Any = None
    clip_alpha: Any = 10.0
    strategy: str | None = None
    kl_threshold: Any = 0.01
    kl_history_length: int = 2
    wide_in_thres: Any = 0.6
    narrow_out_thres: Any = 0.9
    cfg_scale: Any = 0.0
    stop_until_eos: bool = False
    fill_past_eos: bool = False
    eos_id: int | None = None
    suppress: tuple[int, ...] = ()
    infill: bool = False
    ban_mask: bool = True
    leave_early: bool = True
    max_forwards: Any = None
    lockstep: bool | None = None

    def __post_init__(self) -> None:
        if isinstance(self.suppress, list):
            object.__setattr__(self, "suppress", tuple(self.suppress))
        checks.check(self)
        self.geometry(prompt=1, shift=0)

    @classmethod
    def for_model(cls, config: Config, **overrides: Any) -> "DecodeConfig":
        """The model family's defaults where an argument is not given or None.

        A default block length is lowered to a divisor of `gen_length`, to no less than half of it;
        if there is none, everything is one block. A rule, a strategy or `sigma` without an `alg`
        looks at probabilities, whatever the family's own measure.
        """
        given = {name: value for name, value in overrides.items() if value is not None}
        family = dict(models.FAMILIES[config.family].DECODE)
        ruled = any(name in given for name in (*checks.RULES, "strategy"))
        if (ruled or "sigma" in given) and not ALGORITHMS[family["alg"]].is_probability:
            family["alg"] = "maskgit_plus"
        thinned = given.get("alg") in ALGORITHMS and ALGORITHMS[given["alg"]].thinned
        if ruled or thinned or (given.get("infill") and "steps" not in given):
            del family["schedule"]
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
        if self.measure.drawn or not method.needs_order:
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
    def parallel(self) -> bool:
        """Whether data decide how many tokens a step commits."""
        rules = (getattr(self, name) for name in checks.RULES)
        return self.strategy is not None or any(rule is not None for rule in rules)

    @property
    def guided(self) -> bool:
        """Whether every forward has a second, unconditional copy of each row."""
        return positive(self.cfg_scale)

    @property
    def draws_positions(self) -> bool:
        """Whether `alg_temp` is on."""
        return positive(self.alg_temp)

    @property
    def pace(self) -> str:
        """The schedule, a key of `schedule.SCHEDULES`."""
        return self.schedules[0] if self.schedule is None else self.schedule

    @property
    def schedules(self) -> tuple[str, ...]:
        """The schedules that fit, the usual one first."""
        if self.strategy is not None:
            return ("fixed",)
        if self.parallel:
            return ("fixed", "capped")
        if self.measure.thinned:
            return ("timestep",)
        if self.infill and self.steps is None:
            return ("fixed", "even", "timestep")
        return tuple(name for name in SCHEDULES if name != "capped")

    def check(self, config: Config) -> None:
        """Refuses a model that this decoding has no meaning for.

        Raises:
          ValueError: one sentence that says what would be right.
        """
        checks.check_model(self, config)

    def end_of_text(self, config: Config) -> int:
        """The token that ends an answer: `eos_id`, or else the model's."""
        return config.eos_id if self.eos_id is None else self.eos_id

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
        )
        first_block = geo.block + (prompt if self.infill else 0)
        return dataclasses.replace(geo, quota=self.make_schedule(geo).most(first_block))

    def make_schedule(self, geo: Geometry) -> Schedule:
        """How many tokens each step of such a generation commits."""
        return SCHEDULES[self.pace](geo, eps=self.eps, num_transfer_tokens=self.num_transfer_tokens)

    def split(self) -> tuple["DecodeConfig", Numbers]:
        """The part that shapes the compiled program, and the numbers that do not."""
        nucleus = self.top_p is not None and not (concrete(self.top_p) and self.top_p >= 1)
        switches = dict(
            temperature=positive(self.temperature),
            top_p=nucleus,
            alg_temp=self.draws_positions,
            kl_threshold=self.strategy == "klass",
            wide_in_thres=self.strategy == "wino",
            narrow_out_thres=self.strategy == "wino",
            cfg_scale=self.guided,
        )
        numbers, static = {}, {}
        for name in Numbers._fields:
            value = getattr(self, name)
            on = value is not None and switches.get(name, True)
            dtype = jnp.int32 if name in ("top_k", "max_forwards") else jnp.float32
            numbers[name] = jnp.asarray(value, dtype) if on else None
            # Whatever its value, a number that is on makes the same program.
            default = getattr(type(self), name)
            static[name] = _ON.get(name, default) if on else default
        return dataclasses.replace(self, **static), Numbers(**numbers)


_ON = dict(temperature=1.0, top_p=0.5, top_k=1, alg_temp=1.0, threshold=0.0, factor=1.0)
_ON |= dict(gamma=1.0, sigma=1.0, cfg_scale=1.0, max_forwards=1)
"""A value of each number that is off by default, to say that it is on; none that is refused."""
