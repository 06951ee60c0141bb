"""LLaDA (arXiv 2502.09992): presets, its Hugging Face configuration and its weight names."""

import dataclasses
from typing import Any

from dlm_jax.models import hf
from dlm_jax.models.base import Config

NAME = "llada"
"""Key of this family, and `model_type` in its config.json."""

ARCHITECTURE = "LLaDAModelLM"
"""What `architectures` in its config.json says."""

MASK_TOKEN = "<|mdm_mask|>"
"""Text of the mask in its tokenizers, which do not say themselves that it is one."""

_8B: dict[str, Any] = dict(
    family=NAME,
    vocab_size=126464,
    width=4096,
    mlp_width=12288,
    num_layers=32,
    num_heads=32,
    num_kv_heads=32,
    head_dim=128,
    rope_theta=500000.0,
    norm_eps=1e-5,
    qkv_bias=False,
    tied_head=False,
    max_length=4096,
    shift=0,
    mask_id=126336,
    eos_id=126081,
    pad_id=126081,
)

PRESETS: dict[str, Config] = {
    "llada-8b-base": Config(**_8B),
    "llada-8b-instruct": Config(**_8B),
    "llada-1.5": Config(**_8B),
    # Not a published model: small enough for a CPU, large enough that a cache matters.
    "bench-60m": dataclasses.replace(
        Config(**_8B),
        vocab_size=32000,
        width=512,
        mlp_width=1536,
        num_layers=8,
        num_heads=8,
        num_kv_heads=8,
        head_dim=64,
        mask_id=31999,
        eos_id=31998,
        pad_id=31998,
    ),
}

DECODE: dict[str, Any] = dict(schedule="even", alg="low_confidence", block_length=32)
"""Decoding settings of the original where the user chooses none; fields of `DecodeConfig`."""

LIKELIHOOD: dict[str, Any] = dict(estimator="mc_count")
"""The same for the log-likelihood of an answer; fields of `LikelihoodConfig`."""

WEIGHTS: dict[str, str] = {
    "embed/embedding": "model.transformer.wte.weight",
    "final_norm/scale": "model.transformer.ln_f.weight",
    "head/kernel": "model.transformer.ff_out.weight",
    "blocks_{i}/attn_norm/scale": "model.transformer.blocks.{i}.attn_norm.weight",
    "blocks_{i}/q/kernel": "model.transformer.blocks.{i}.q_proj.weight",
    "blocks_{i}/q/bias": "model.transformer.blocks.{i}.q_proj.bias",
    "blocks_{i}/k/kernel": "model.transformer.blocks.{i}.k_proj.weight",
    "blocks_{i}/k/bias": "model.transformer.blocks.{i}.k_proj.bias",
    "blocks_{i}/v/kernel": "model.transformer.blocks.{i}.v_proj.weight",
    "blocks_{i}/v/bias": "model.transformer.blocks.{i}.v_proj.bias",
    "blocks_{i}/o/kernel": "model.transformer.blocks.{i}.attn_out.weight",
    "blocks_{i}/mlp_norm/scale": "model.transformer.blocks.{i}.ff_norm.weight",
    "blocks_{i}/gate/kernel": "model.transformer.blocks.{i}.ff_proj.weight",
    "blocks_{i}/up/kernel": "model.transformer.blocks.{i}.up_proj.weight",
    "blocks_{i}/down/kernel": "model.transformer.blocks.{i}.ff_out.weight",
}
"""Parameter path -> tensor name in the Hugging Face checkpoint; `{i}` is the layer."""

_SUPPORTED: dict[str, tuple[Any, ...]] = {
    "activation_type": ("silu",),
    "alibi": (False,),
    "attention_layer_norm": (False,),
    "bias_for_layer_norm": (False, None),
    "block_group_size": (1,),
    "block_type": ("llama",),
    "include_bias": (False,),
    "input_emb_norm": (False,),
    "layer_norm_type": ("rms",),
    "layer_norm_with_affine": (True,),
    "multi_query_attention": (None, False),
    "rope": (True,),
    "scale_logits": (False,),
    "sliding_window": (None, False),
}


def from_hf(raw: dict[str, Any]) -> Config:
    """Makes a `Config` of LLaDA's config.json.

    Raises:
      ValueError: a value that this transformer does not implement, or a missing one; it is named.
    """
    hf.expect(raw, _SUPPORTED)
    for name in ("layer_norm_type", "rope"):  # whose defaults in the original are other than ours
        hf.read(raw, name)
    width, heads = hf.whole(raw, "d_model"), hf.whole(raw, "n_heads")
    # The embedding may have more rows than there are tokens (padding for speed).
    vocab_size = hf.whole(raw, "embedding_size", hf.whole(raw, "vocab_size"))
    if raw.get("mlp_hidden_size") is None:
        mlp_width = width * hf.whole(raw, "mlp_ratio")
    else:
        mlp_width = hf.whole(raw, "mlp_hidden_size")
    return Config(
        family=NAME,
        vocab_size=vocab_size,
        width=width,
        mlp_width=mlp_width,
        num_layers=hf.layers(raw, "n_layers"),
        num_heads=heads,
        num_kv_heads=hf.whole(raw, "n_kv_heads", heads),
        head_dim=hf.head_dim(raw, "d_model", "n_heads"),
        rope_theta=hf.rope_theta(raw),
        norm_eps=hf.number(raw, "rms_norm_eps"),
        qkv_bias=hf.flag(raw, "include_qkv_bias"),
        tied_head=hf.flag(raw, "weight_tying"),
        max_length=hf.whole(raw, "max_sequence_length"),
        shift=0,
        **hf.special_ids(raw, vocab_size),
    )


def to_hf(config: Config) -> dict[str, Any]:
    """The inverse of `from_hf`: a config.json that the original code reads."""
    return {name: values[0] for name, values in _SUPPORTED.items()} | {
        "architectures": [ARCHITECTURE],
        "model_type": NAME,
        "vocab_size": config.vocab_size,
        "embedding_size": config.vocab_size,
        "d_model": config.width,
        "mlp_hidden_size": config.mlp_width,
        "n_layers": config.num_layers,
        "n_heads": config.num_heads,
        "n_kv_heads": config.num_kv_heads,
        "rope_theta": config.rope_theta,
        "rope_full_precision": True,
        "rms_norm_eps": config.norm_eps,
        "include_qkv_bias": config.qkv_bias,
        "weight_tying": config.tied_head,
        "max_sequence_length": config.max_length,
        "mask_token_id": config.mask_id,
        "eos_token_id": hf.eos_token_id(config.eos_id, config.more_eos_ids),
        "pad_token_id": config.pad_id,
    }
