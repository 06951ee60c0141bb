"""Which model a config.json is about, and what a public one that does not work here would need.

`architectures` says it; `model_type` only counts where that is missing, since some models declare
the type of another one. What is refused is told by its name.
"""

import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any, NamedTuple

from dlm_jax.models.hf import CONFIG

_CAUSAL_BLOCKS = "blocks that do not see what follows them (block-causal attention)"
_AUTOREGRESSIVE = "causal attention, as autoregressive and block-causal models have it"


class _Kind(NamedTuple):
    """A model that is not implemented.

    Attributes:
      start: how its names in config.json begin, in lower case, without punctuation.
      name: what it is.
      needs: what would have to be there for it.
    """

    start: str
    name: str
    needs: str


PUBLIC = [
    _Kind("lladamoe", "LLaDA-MoE", "a mixture of experts"),
    _Kind("llada2", "LLaDA2", f"a mixture of experts and {_CAUSAL_BLOCKS}"),
    _Kind("sdar", "SDAR or TraDo", _CAUSAL_BLOCKS),
    _Kind("trado", "TraDo", _CAUSAL_BLOCKS),
    _Kind("fastdllm", "Fast-dLLM v2", _CAUSAL_BLOCKS),
    _Kind("stablediffcoder", "Stable-DiffCoder", _CAUSAL_BLOCKS),
    _Kind("seeddiffcoder", "Stable-DiffCoder", _CAUSAL_BLOCKS),
    _Kind("nemotronlabsdiffusion", "Nemotron-Labs-Diffusion", _CAUSAL_BLOCKS),
    _Kind("nemotrondiffusion", "Nemotron-Labs-Diffusion", _CAUSAL_BLOCKS),
    _Kind("wedlm", "WeDLM", "causal attention over reordered tokens"),
    _Kind("efficientdlm", "Efficient-DLM", _CAUSAL_BLOCKS),
    _Kind("sdlm", "SDLM", _CAUSAL_BLOCKS),
    _Kind("dreamreasoner", "Dream-reasoner", _CAUSAL_BLOCKS),
    _Kind("dreamforcausallm", "Dream-reasoner", _CAUSAL_BLOCKS),
    _Kind("dreamon", "DreamOn", "infilling of variable length"),
    _Kind("lladav", "LLaDA-V", "images"),
    _Kind("llavallada", "LLaDA-V", "images"),
    _Kind("mmada", "MMaDA", "images"),
    _Kind("dimple", "Dimple", "images"),
]
# Looked for last: others declare this type, and some the architecture as well.
_FOREIGN = [
    _Kind("llama", "a Llama, or a Stable-DiffCoder that declares to be one", _AUTOREGRESSIVE),
    _Kind("qwen2", "a Qwen2, or an SDLM that declares to be one", _AUTOREGRESSIVE),
    _Kind(
        "qwen3",
        "a Qwen3, or a Nemotron-Labs-Diffusion, WeDLM or Efficient-DLM that declares to be one",
        _AUTOREGRESSIVE,
    ),
]
_KNOWN = [*PUBLIC, *_FOREIGN]
_VARIANTS = {
    "expand_token_id": _Kind("", "DreamOn", "infilling of variable length"),
    "num_experts": _Kind("", "a mixture of experts, as LLaDA-MoE", "experts and their router"),
}
"""Setting -> what a supported architecture is that has it."""


def family(raw: dict[str, Any], generation: dict[str, Any], families: Mapping[str, str]) -> str:
    """The family of a model.

    Args:
      raw: the parsed config.json.
      generation: the parsed generation_config.json.
      families: family -> what it calls itself in `architectures`.

    Raises:
      ValueError: it is of none, which is told by name.
    """
    names, model_type = _architectures(raw), raw.get("model_type")
    if model_type is not None and not isinstance(model_type, str):
        raise ValueError(f"{CONFIG}: model_type is {model_type!r}; it must be a name.")
    found = next((family for family, name in families.items() if names == [name]), None)
    if found is None and not names and (model_type or "").lower() in families:
        found = (model_type or "").lower()
    says = ", ".join(
        f"{setting} is {raw[setting]!r}"
        for setting in ("architectures", "model_type", *_VARIANTS)
        if raw.get(setting) not in (None, [])
    )
    if found is None:
        kind = _known([*names, *_code(raw.get("auto_map")), model_type or ""], _KNOWN)
    else:
        kind = _variant(raw, generation) or _known([model_type or ""], PUBLIC)
    if kind is not None:
        raise ValueError(
            f"{CONFIG}: this is {kind.name} ({says}), which needs {kind.needs}; that is not "
            f"implemented, so it must be one of {_supported(families)}."
        )
    if found is None:
        raise ValueError(
            f"{CONFIG}: this is no model that is implemented "
            f"({says or 'architectures and model_type are missing'}); it must be one of "
            f"{_supported(families)}."
        )
    return found


def _supported(families: Mapping[str, str]) -> str:
    return f"{', '.join(families)} (architectures {', '.join(families.values())})"


def _architectures(raw: dict[str, Any]) -> list[str]:
    names = raw.get("architectures")
    if names is None:
        return []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{CONFIG}: architectures is {names!r}; it must be a list of names.")
    return list(dict.fromkeys(names))


def _variant(raw: dict[str, Any], generation: dict[str, Any]) -> _Kind | None:
    for setting, kind in _VARIANTS.items():
        if raw.get(setting) is not None or generation.get(setting) is not None:
            return kind
    return None


def _known(names: Collection[str], kinds: Collection[_Kind]) -> _Kind | None:
    """A model that is known but not implemented, by the names that it gives itself."""
    plain = [re.sub(r"[^a-z0-9]", "", name.lower()) for name in names]
    return next((kind for kind in kinds for name in plain if name.startswith(kind.start)), None)


def _code(auto_map: Any) -> Iterator[str]:
    """Names of the classes that a checkpoint brings along: `modeling_x.XForCausalLM`."""
    for value in auto_map.values() if isinstance(auto_map, dict) else ():
        for name in value if isinstance(value, list) else [value]:
            if isinstance(name, str):
                yield name.split(".")[-1]
