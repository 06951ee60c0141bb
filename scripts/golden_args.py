"""Translates recorded runs from the vocabularies of the originals into that of this library.

The only place that knows those vocabularies; `scripts/replay.py` runs what comes out. Whatever has
no counterpart here is refused (`Unsupported`), not ignored.
"""

import dataclasses
import functools
import re
from collections.abc import Callable
from typing import Any

import numpy as np

from dlm_jax.cache import (
    DKVPD,
    CacheMethod,
    D2Cache,
    DKVDecode,
    DKVGreedy,
    DKVPrefill,
    DLLMCache,
    Dual,
    NoCache,
    Prefix,
)
from dlm_jax.cache.dkv import SHIFT_TYPES
from dlm_jax.decoding.config import DecodeConfig
from dlm_jax.decoding.state import Draws
from dlm_jax.decoding.strategies import (
    EntropyBound,
    Factor,
    Klass,
    Random,
    Rule,
    Strategy,
    Surest,
    Threshold,
    Wino,
)
from dlm_jax.models import Config

AS_RECORDED: dict[str, Any] = dict(ban_mask=False, lockstep=True)
"""The originals do not ban the mask token, and let a batch leave a block together."""

NO_CACHE = NoCache()
SUREST = Surest()
CONFIDENCE_THRESHOLD = "confidence_threshold"
"""Fast-dLLM's name for its threshold, in the place of an algorithm."""

NARROWED_BLOCK = "src/generation/utils.py:196"
"""Where the framework narrows a step's block for good, unless mended: its d2Cache, WINO and rows of
a batch go wrong by it. Mended, tokens may also be committed behind the end of the text."""
FACTOR_DEFECT = "src/generation/vanilla.py:221"
"""Where its rule `factor` spares the last position, unless mended."""
EB_DEFECT = "src/generation/vanilla.py:236"
"""Where its EB-Sampler mixes the rows of a batch, unless mended."""
D2CACHE_DEFECTS = ("src/cache/d2cache.py:198", NARROWED_BLOCK, "src/generation/vanilla.py:81")
"""Where d2Cache must have been mended for its runs to be the method's."""


class Unsupported(Exception):
    """A case asks for something that dlm_jax does not do (yet); the message says what."""


@dataclasses.dataclass(frozen=True)
class Run:
    """A case in this library's vocabulary."""

    decode: DecodeConfig
    cache: CacheMethod
    draws: Draws = Draws()
    token_freq: np.ndarray | None = None


def translate(case: dict[str, Any], config: Config) -> Run:
    """A case's arguments as a decoding configuration and a cache method.

    Raises:
      Unsupported: naming the entry point, or the first argument, that has no counterpart.
      ValueError: the case lacks an argument, or one has an impossible value.
    """
    entry = case["source"]["entry"]
    if entry not in _ENTRIES:
        raise Unsupported(f"entry point {entry}")
    read = _ENTRIES[entry]
    args = case["args"]
    unknown = sorted(set(args) - _ARGUMENTS[read] - {"mask_id", "mask_token_id", "env"})
    if unknown:
        raise Unsupported(f"{unknown[0]}={args[unknown[0]]}")
    for name, value in (args | args.get("env", {})).items():
        if name.lower() in ("mask_id", "mask_token_id"):
            _only(args | {name: value}, name, (config.mask_id, None))
    try:
        # Noise is not recorded.
        _only(args, "temperature", (0.0,))
        return read(case)
    except KeyError as error:
        raise ValueError(f"argument {error} of {entry} is missing") from error


def _llada_loop(case: dict[str, Any]) -> Run:
    """`generate` of dKV-Cache's plain LLaDA loop."""
    args = case["args"]
    _only(args, "enable_cache", (None, False))
    return Run(_llada_decode(args), NoCache(), _recorded_ranks(case))


def _llada_dkv_decode(case: dict[str, Any]) -> Run:
    """`generate` of dKV-Cache-Decode: the plain loop with a cache."""
    args = case["args"]
    _only(args, "enable_cache", (False, True))
    _only(args, "cfg_scale", (0.0,))
    cache = DKVDecode(cache_steps=args["cache_reloading_step"])
    return Run(
        _llada_decode(args),
        cache if args["enable_cache"] else NoCache(),
        _recorded_ranks(case),
    )


def _llada_dkv_greedy(case: dict[str, Any]) -> Run:
    """`generate` of dKV-Cache-Greedy: the order in a block is drawn when the block begins."""
    args = case["args"]
    _only(args, "enable_cache", (False, True))
    _only(args, "remasking", ("random",))
    _only(args, "cfg_scale", (0.0,))
    cache = DKVGreedy(cache_steps=args["cache_reloading_step"], window_size=args["window_size"])
    return Run(
        _llada_decode(args, redrawn=False),
        cache if args["enable_cache"] else NoCache(),
        Draws(order=_recorded_order(case)),
    )


def _dllm_original(case: dict[str, Any]) -> Run:
    """`generate` of the original dLLM-Cache: the plain LLaDA loop over hooked layers."""
    args = case["args"]
    if case["prompt_mask"] is not None and not np.all(case["prompt_mask"]):
        # Its hooks attend to padding.
        raise Unsupported("prompt_mask with padding")
    _only(args, "attention_mask", ("all ones (B x P)",))
    options = {"cfg_interval_steps", "gen_interval_steps", "hook", "prompt_interval_steps"}
    cache = _cache_options(args, dLLMCache=options | {"transfer_ratio"})
    _only(cache, "hook", ("register_cache_LLaDA(model, 'model.transformer.blocks')",))
    return Run(
        _llada_decode(args),
        DLLMCache(
            kp=cache["prompt_interval_steps"],
            kr=cache["gen_interval_steps"],
            rou=cache["transfer_ratio"],
        ),
    )


def _fast_dllm_llada(case: dict[str, Any], cache: CacheMethod = NO_CACHE) -> Run:
    """`generate` of Fast-dLLM and its twins with a cache: leaves a block when it is full."""
    args = case["args"]
    _only(args, "remasking", ("low_confidence",))
    decode = _llada_decode(args, leave_early=True)
    if args["threshold"] is not None:
        # The number of steps then has no effect.
        strategy = Threshold(args["threshold"])
        decode = dataclasses.replace(decode, schedule=None, steps=None, strategy=strategy)
    return Run(decode, cache)


def _fast_dllm_llada_prefix(case: dict[str, Any]) -> Run:
    """`generate_with_prefix_cache` of Fast-dLLM."""
    return _fast_dllm_llada(case, Prefix())


def _fast_dllm_llada_dual(case: dict[str, Any]) -> Run:
    """`generate_with_dual_cache` of Fast-dLLM."""
    return _fast_dllm_llada(case, Dual())


def _dream_loop(case: dict[str, Any]) -> Run:
    """`diffusion_generate` of Dream, as dKV-Cache and Fast-dLLM ship it."""
    args = case["args"]
    _only(args, "use_cache", (None, False, True))
    decode, draws = _dream_decode(args, infill=True), _recorded_transfers(case)
    if not args.get("use_cache"):
        return Run(decode, NoCache(), draws)
    _only(args, "cache_type", ("decoded", "prefill"))
    if args["cache_type"] == "prefill":
        return Run(decode, DKVPrefill(), draws)
    _only(args, "shift_type", SHIFT_TYPES)
    cache = DKVDecode(cache_steps=args["cache_steps"], shift_type=args["shift_type"])
    return Run(decode, cache, draws)


def _dream_dkv_pd(case: dict[str, Any]) -> Run:
    """`diffusion_generate` of dKV-Cache-PD."""
    args = case["args"]
    _only(args, "use_cache", (True,))
    _only(args, "cache_type", ("pd", "prefill"))
    decode, draws = _dream_decode(args, infill=True), _recorded_transfers(case)
    if args["cache_type"] == "prefill":
        return Run(decode, DKVPrefill(), draws)
    _only(args, "shift_type", (None, *SHIFT_TYPES))
    if args["shift_type"] is None:
        # Without a rule for what is decoded, only the prompt is ever kept.
        return Run(decode, DKVPrefill(), draws)
    cache = DKVPD(cache_steps=args["cache_steps"], shift_type=args["shift_type"])
    return Run(decode, cache, draws)


def _fast_dllm_dream_block(case: dict[str, Any]) -> Run:
    """`diffusion_generate` of Fast-dLLM's Dream with prefix or dual cache."""
    args = case["args"]
    decode = _dream_decode(args, block_length=args["block_length"], leave_early=True)
    blocks = 1
    if args["block_length"] is not None:
        blocks = args["max_new_tokens"] // args["block_length"]
    if args["steps"] == blocks and args["alg"] != CONFIDENCE_THRESHOLD:
        raise Unsupported(
            f"steps={args['steps']}: with one step per block the original leaves masks behind"
        )
    _only(args, "dual_cache", (False, True))
    if args["alg"] == CONFIDENCE_THRESHOLD:
        # The number of steps has no effect here.
        decode = dataclasses.replace(decode, schedule=None, steps=None)
    elif not _mended(case, "dream/model/generation_utils_block.py:532"):
        # The original passes its scoring function the same flags whatever the argument says.
        decode = dataclasses.replace(decode, alg="entropy")
    method = Dual if args["dual_cache"] else Prefix
    return Run(decode, method(block_start="first-column"))


def _d2_framework(case: dict[str, Any]) -> Run:
    """The `vanilla` strategy of the d2Cache framework."""
    args = case["args"]
    _only(args, "strategy", ("vanilla",))
    if args["gamma"] is not None and _as_is(case) and not _mended(case, EB_DEFECT):
        raise Unsupported("gamma: the case records a defect of the original")
    rows = len(case["prompt"])
    if args["stop_until_eos"] and rows > 1 and _as_is(case) and args["cache"] is not None:
        raise Unsupported("stop_until_eos: the case records a defect of the original")
    decode, frequencies = _d2_decode(case, *_rules(case)), None
    # Other measures take the place of the debiased probability.
    if args["debias"] and decode.measure.is_probability:
        frequencies = np.asarray(args["token_freq"], np.float32)
    return Run(decode, _d2_framework_cache(case), token_freq=frequencies)


def _d2_klass(case: dict[str, Any]) -> Run:
    """The strategy KLASS of the framework."""
    args = case["args"]
    _only(args, "strategy", ("klass",))
    if args["threshold"] is None and args["factor"] is None:
        # Without a rule nothing is ever taken for its stability.
        return Run(_d2_decode(case), _d2_framework_cache(case))
    (rule,) = _rules(case)
    strategy = Klass(rule, args["kl_threshold"], args["kl_history_length"])
    return Run(_d2_decode(case, strategy), _d2_framework_cache(case))


def _d2_wino(case: dict[str, Any]) -> Run:
    """The strategy WINO of the framework."""
    args = case["args"]
    _only(args, "strategy", ("wino",))
    if case["model"].startswith("dream"):
        raise Unsupported("strategy=wino: the original's Dream sees the token that it verifies")
    if not _mended(case, NARROWED_BLOCK):
        raise Unsupported("strategy=wino: the case records a defect of the original")
    strategy = Wino(args["wide_in_thres"], args["narrow_out_thres"])
    return Run(_d2_decode(case, strategy), _d2_framework_cache(case))


def _rules(case: dict[str, Any]) -> list[Rule]:
    """The rule that a case of the framework gives, if any."""
    args = case["args"]
    spare_last = not _mended(case, FACTOR_DEFECT)
    made = {
        "threshold": Threshold,
        "factor": functools.partial(Factor, spare_last=spare_last),
        "gamma": EntropyBound,
    }
    return [make(args[name]) for name, make in made.items() if args.get(name) is not None]


def _d2_decode(case: dict[str, Any], strategy: Strategy = SUREST) -> DecodeConfig:
    args = case["args"]
    return DecodeConfig(
        **AS_RECORDED,
        strategy=strategy,
        gen_length=args["gen_length"],
        block_length=args["block_length"],
        schedule="fixed",
        num_transfer_tokens=args["num_transfer_tokens"],
        alg=args["alg"],
        temperature=args["temperature"],
        top_p=args["top_p"],
        top_k=args["top_k"],
        sigma=args["sigma"] or None,
        clip_alpha=10.0 if args.get("clip_alpha") is None else args["clip_alpha"],
        stop_until_eos=args["stop_until_eos"],
        fill_past_eos=_mended(case, NARROWED_BLOCK),
        eos_id=args["eos_token_id"],
    )


def _d2_framework_cache(case: dict[str, Any]) -> CacheMethod:
    if case["args"]["cache"] is None:
        return NoCache()
    options = _cache_options(
        case["args"],
        PrefixCache={"use_dual"},
        dLLMCache={"kp", "kr", "rou"},
        d2Cache={"current_k", "inflate_w", "rollout_p", "sigma"},
    )
    match options.pop("class"):
        case "PrefixCache":
            return Dual() if options["use_dual"] else Prefix()
        case "dLLMCache":
            return DLLMCache(kp=options["kp"], kr=options["kr"], rou=options["rou"])
    if not all(_mended(case, place) for place in D2CACHE_DEFECTS):
        raise Unsupported("cache.class=d2Cache: the case records defects of the original")
    return D2Cache(
        rollout_p=options["rollout_p"],
        current_k=options["current_k"],
        sigma=options["sigma"],
        inflate_w=options["inflate_w"],
    )


_ENTRIES: dict[str, Callable[[dict[str, Any]], Run]] = {
    # dKV-Cache
    "generation_utils.llada_generate.generate": _llada_loop,
    "generation_utils.llada_dkv_cache_decode.generate": _llada_dkv_decode,
    "generation_utils.llada_dkv_cache_greedy.generate": _llada_dkv_greedy,
    "generation_utils.dream_generation_utils.DreamGenerationMixin.diffusion_generate": _dream_loop,
    "generation_utils.dream_generation_utils_pd.DreamGenerationMixin.diffusion_generate": (
        _dream_dkv_pd
    ),
    # dLLM-Cache
    "utils.generate_function.generate": _dllm_original,
    # Fast-dLLM
    "llada.generate.generate": _fast_dllm_llada,
    "llada.generate.generate_with_prefix_cache": _fast_dllm_llada_prefix,
    "llada.generate.generate_with_dual_cache": _fast_dllm_llada_dual,
    "dream.model.generation_utils.DreamGenerationMixin.diffusion_generate": _dream_loop,
    "dream.model.generation_utils_block.DreamGenerationMixin.diffusion_generate": (
        _fast_dllm_dream_block
    ),
    # d2Cache framework
    "src.generation.vanilla.vanilla_generate": _d2_framework,
    "src.generation.klass.klass_generate": _d2_klass,
    "src.generation.wino.wino_generate": _d2_wino,
}
"""What a case's `source.entry` names -> how the case is read."""

_LLADA = {"block_length", "gen_length", "remasking", "steps", "temperature"}
_HUGGING_FACE = {"alg", "alg_temp", "bos_token_id", "eos_token_id", "eps", "max_new_tokens"}
_HUGGING_FACE |= {"num_return_sequences", "output_history", "pad_token_id"}
_HUGGING_FACE |= {"return_dict_in_generate", "steps", "temperature", "top_k", "top_p"}
_FRAMEWORK = {"alg", "attn_implementation", "block_length", "cache", "eos_token_id", "gen_length"}
_FRAMEWORK |= {"num_transfer_tokens", "output_hidden_states", "output_probs", "pad_token_id"}
_FRAMEWORK |= {"sigma", "stop_until_eos", "strategy", "temperature", "top_k", "top_p"}
_ARGUMENTS: dict[Callable[[dict[str, Any]], Run], set[str]] = {
    _llada_loop: _LLADA | {"cfg_scale", "enable_cache"},
    _llada_dkv_decode: _LLADA | {"cache_reloading_step", "cfg_scale", "enable_cache"},
    _llada_dkv_greedy: _LLADA
    | {"cache_reloading_step", "cfg_scale", "enable_cache", "window_size"},
    _dllm_original: _LLADA | {"attention_mask", "cache", "cfg_scale"},
    _fast_dllm_llada: _LLADA | {"threshold"},
    _fast_dllm_llada_prefix: _LLADA | {"threshold"},
    _fast_dllm_llada_dual: _LLADA | {"threshold"},
    _dream_loop: _HUGGING_FACE
    | {"cache_steps", "cache_type", "shift_type", "threshold", "use_cache"},
    _dream_dkv_pd: _HUGGING_FACE | {"cache_steps", "cache_type", "shift_type", "use_cache"},
    _fast_dllm_dream_block: _HUGGING_FACE | {"block_length", "dual_cache", "threshold"},
    _d2_framework: _FRAMEWORK
    | {"clip_alpha", "debias", "factor", "gamma", "threshold", "token_freq"},
    _d2_klass: _FRAMEWORK | {"factor", "kl_history_length", "kl_threshold", "threshold"},
    _d2_wino: _FRAMEWORK | {"narrow_out_thres", "wide_in_thres"},
}
"""Reader -> the arguments that it translates, or that change nothing in what is recorded.

(Special tokens other than the mask, what is returned, and what only matters with a cache.) Any
other argument makes a case unsupported.
"""


def _llada_decode(
    args: dict[str, Any], *, leave_early: bool = False, redrawn: bool = True
) -> DecodeConfig:
    _only(args, "remasking", ("low_confidence", "random"))
    random = args["remasking"] == "random"
    return DecodeConfig(
        **AS_RECORDED,
        gen_length=args["gen_length"],
        block_length=args["block_length"],
        steps=args["steps"],
        schedule="even",
        leave_early=leave_early,
        strategy=Random(redrawn=redrawn) if random else SUREST,
        temperature=args["temperature"],
        cfg_scale=args.get("cfg_scale", 0.0),
    )


def _dream_decode(
    args: dict[str, Any],
    *,
    block_length: int | None = None,
    infill: bool = False,
    leave_early: bool = False,
) -> DecodeConfig:
    _only(args, "num_return_sequences", (1,))
    # Fast-dLLM's threshold is only read by its algorithm "confidence_threshold".
    threshold = args["threshold"] if args["alg"] == CONFIDENCE_THRESHOLD else None
    _only(args, "alg", ("maskgit_plus", "topk_margin", "entropy", "origin", CONFIDENCE_THRESHOLD))
    return DecodeConfig(
        **AS_RECORDED,
        gen_length=args["max_new_tokens"],
        block_length=block_length,
        steps=args["steps"],
        schedule="timestep" if threshold is None else "capped",
        eps=args["eps"],
        leave_early=leave_early,
        alg=args["alg"] if threshold is None else "maskgit_plus",
        threshold=threshold,
        alg_temp=args["alg_temp"] if args["alg"] != "origin" else None,
        temperature=args["temperature"],
        top_p=args["top_p"],
        top_k=args["top_k"],
        infill=infill,
    )


def _recorded_order(case: dict[str, Any]) -> np.ndarray:
    """`[B, L]`: the place of every generated position in the order of its block."""
    rows, prompt = np.shape(case["prompt"])
    block = case["args"]["block_length"]
    place_BL = np.zeros((rows, prompt + case["args"]["gen_length"]), np.float32)
    for start, orders in zip(range(prompt, place_BL.shape[1], block), case["order"], strict=True):
        for row, order in enumerate(orders):
            if sorted(order) != list(range(start, start + block)):
                raise ValueError(f"The order from position {start} on does not hold its block.")
            place_BL[row, order] = np.arange(block)
    return place_BL


def _recorded_ranks(case: dict[str, Any]) -> Draws:
    """The numbers that stood in for confidence in every forward, highest first, if any did."""
    if case["args"]["remasking"] != "random":
        return Draws()
    recorded, fed = case["rand_rank"], case["expected"]["computed"]
    rows, prompt = np.shape(case["prompt"])
    length = prompt + case["args"]["gen_length"]
    order_TBL = np.zeros((len(recorded), rows, length), np.float32)
    for step, row in np.ndindex(len(recorded), rows):
        positions = None if fed[step] is None else fed[step][row]
        order_TBL[step, row, slice(None) if positions is None else positions] = [
            -rank for rank in recorded[step][row]
        ]
    return Draws(order=order_TBL)


def _recorded_transfers(case: dict[str, Any]) -> Draws:
    """What was filled in every forward, where that was drawn."""
    args = case["args"]
    if args["alg"] != "origin" and not args["alg_temp"]:
        return Draws()
    rows, prompt = np.shape(case["prompt"])
    transfer_TBL = np.zeros((len(case["transfer"]), rows, prompt + args["max_new_tokens"]), bool)
    for step, row in np.ndindex(len(case["transfer"]), rows):
        transfer_TBL[step, row, case["transfer"][step][row]] = True
    return Draws(transfer=transfer_TBL)


def _as_is(case: dict[str, Any]) -> bool:
    """Whether a case is there to show what the original does wrong."""
    return case["name"].endswith("-asis")


def _mended(case: dict[str, Any], place: str) -> bool:
    """Whether the recorded original was mended at `place`, a file and its first line."""
    return any(re.match(rf"{re.escape(place)}\b", mend) for mend in case["source"]["mended"])


def _cache_options(args: dict[str, Any], **known: set[str]) -> dict[str, Any]:
    """The recorded cache's options; `known` names the classes and what each of them takes."""
    options = dict(args["cache"])
    if options["class"] not in known:
        raise Unsupported(f"cache.class={options['class']}")
    for name in sorted(set(options) - known[options["class"]] - {"class"}):
        raise Unsupported(f"cache.{name}={options[name]}")
    return options


def _only(args: dict[str, Any], name: str, values: tuple[Any, ...]) -> None:
    if args.get(name, values[0]) not in values:
        raise Unsupported(f"{name}={args[name]}")
