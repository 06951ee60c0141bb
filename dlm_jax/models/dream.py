"""Dream (arXiv 2508.15487): presets, its Hugging Face configuration and its weight names.

Dream starts from Qwen2.5, an autoregressive model, and keeps its habit: the output at position p
predicts the token at p + 1. Hence `shift=1`.
"""

from typing import Any

from dlm_jax.models import hf
from dlm_jax.models.base import Config

NAME = "dream"
"""Key of this family, and `model_type` in its config.json (there spelled `Dream`)."""

ARCHITECTURE = "DreamModel"
"""What `architectures` in its config.json says."""

MASK_TOKEN = "<|mask|>"
"""Text of the mask in its tokenizers."""

_7B: dict[str, Any] = dict(
    family=NAME,
    vocab_size=152064,
    width=3584,
    mlp_width=18944,
    num_layers=28,
    num_heads=28,
    num_kv_heads=4,
    head_dim=128,
    rope_theta=1000000.0,
    norm_eps=1e-6,
    qkv_bias=True,
    tied_head=False,
    max_length=131072,
    shift=1,
    mask_id=151666,
    eos_id=151643,
    pad_id=151643,
)

PRESETS: dict[str, Config] = {
    "dream-v0-base-7b": Config(**_7B),
    "dream-v0-instruct-7b": Config(**_7B),
}

DECODE: dict[str, Any] = dict(schedule="timestep", alg="entropy", block_length=None)
"""Decoding settings of the original where the user chooses none; fields of `DecodeConfig`."""

LIKELIHOOD: dict[str, Any] = dict(estimator="mc_rate")
"""The same for the log-likelihood of an answer; fields of `LikelihoodConfig`."""

WEIGHTS: dict[str, str] = {
    "embed/embedding": "model.embed_tokens.weight",
    "final_norm/scale": "model.norm.weight",
    "head/kernel": "lm_head.weight",
    "blocks_{i}/attn_norm/scale": "model.layers.{i}.input_layernorm.weight",
    "blocks_{i}/q/kernel": "model.layers.{i}.self_attn.q_proj.weight",
    "blocks_{i}/q/bias": "model.layers.{i}.self_attn.q_proj.bias",
    "blocks_{i}/k/kernel": "model.layers.{i}.self_attn.k_proj.weight",
    "blocks_{i}/k/bias": "model.layers.{i}.self_attn.k_proj.bias",
    "blocks_{i}/v/kernel": "model.layers.{i}.self_attn.v_proj.weight",
    "blocks_{i}/v/bias": "model.layers.{i}.self_attn.v_proj.bias",
    "blocks_{i}/o/kernel": "model.layers.{i}.self_attn.o_proj.weight",
    "blocks_{i}/mlp_norm/scale": "model.layers.{i}.post_attention_layernorm.weight",
    "blocks_{i}/gate/kernel": "model.layers.{i}.mlp.gate_proj.weight",
    "blocks_{i}/up/kernel": "model.layers.{i}.mlp.up_proj.weight",
    "blocks_{i}/down/kernel": "model.layers.{i}.mlp.down_proj.weight",
}
"""Parameter path -> tensor name in the Hugging Face checkpoint; `{i}` is the layer."""

_SUPPORTED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "use_mrope": (False, None),
}


def from_hf(raw: dict[str, Any]) -> Config:
    """Makes a `Config` of Dream's config.json.

    Raises:
      ValueError: a value that this transformer does not implement, or a missing one; it is named.
    """
    hf.expect(raw, _SUPPORTED)
    vocab_size, heads = hf.whole(raw, "vocab_size"), hf.whole(raw, "num_attention_heads")
    return Config(
        family=NAME,
        vocab_size=vocab_size,
        width=hf.whole(raw, "hidden_size"),
        mlp_width=hf.whole(raw, "intermediate_size"),
        num_layers=hf.layers(raw, "num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=hf.whole(raw, "num_key_value_heads", heads),
        head_dim=hf.head_dim(raw, "hidden_size", "num_attention_heads"),
        rope_theta=hf.rope_theta(raw),
        norm_eps=hf.number(raw, "rms_norm_eps"),
        qkv_bias=True,
        tied_head=hf.flag(raw, "tie_word_embeddings"),
        max_length=hf.whole(raw, "max_position_embeddings"),
        shift=1,
        **hf.special_ids(raw, vocab_size),
    )


def to_hf(config: Config) -> dict[str, Any]:
    """The inverse of `from_hf`: a config.json that the original code reads."""
    return {name: values[0] for name, values in _SUPPORTED.items()} | {
        "architectures": [ARCHITECTURE],
        "model_type": "Dream",
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "intermediate_size": config.mlp_width,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "rope_theta": config.rope_theta,
        "rope_scaling": None,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tied_head,
        "max_position_embeddings": config.max_length,
        "mask_token_id": config.mask_id,
        "eos_token_id": hf.eos_token_id(config.eos_id, config.more_eos_ids),
        "pad_token_id": config.pad_id,
        "bos_token_id": config.eos_id,
    }
