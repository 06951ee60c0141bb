"""Which public checkpoints open, and how the others, and wrong settings, are refused by name."""

import json
import warnings
from pathlib import Path

import pytest
import safetensors.numpy
from make_synthetic_checkpoint import write_checkpoint
from places import CHECKPOINTS
from tiny_models import small_config
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from dlm_jax import checkpoint, generate, models
from dlm_jax.models import dream, llada
from dlm_jax.weights import files as weight_files

LLADA = dict(
    architectures=["LLaDAModelLM"],
    model_type="llada",
    auto_map={"AutoModelForCausalLM": "modeling_llada.LLaDAModelLM"},
    activation_type="silu",
    alibi=False,
    alibi_bias_max=8.0,
    attention_dropout=0.0,
    attention_layer_norm=False,
    attention_layer_norm_with_affine=True,
    bias_for_layer_norm=False,
    block_group_size=1,
    block_type="llama",
    embedding_size=126464,
    eos_token_id=126081,
    flash_attention=False,
    include_bias=False,
    include_qkv_bias=False,
    init_device="meta",
    input_emb_norm=False,
    layer_norm_type="rms",
    layer_norm_with_affine=True,
    mask_token_id=126336,
    max_sequence_length=4096,
    mlp_ratio=4,
    multi_query_attention=None,
    pad_token_id=126081,
    rms_norm_eps=1e-5,
    rope=True,
    rope_full_precision=True,
    rope_theta=500000.0,
    scale_logits=False,
    torch_dtype="bfloat16",
    vocab_size=126464,
    weight_tying=False,
)
LLADA_SIZES = dict(d_model=4096, mlp_hidden_size=12288, n_heads=32, n_kv_heads=32, n_layers=32)
LLADA_CUT = dict(d_model=8, mlp_hidden_size=24, n_heads=2, n_kv_heads=2, n_layers=2)
DREAM = dict(
    architectures=["DreamModel"],
    model_type="Dream",
    auto_map={"AutoModel": "modeling_dream.DreamModel"},
    attention_dropout=0.0,
    bos_token_id=151643,
    eos_token_id=151643,
    hidden_act="silu",
    mask_token_id=151666,
    max_position_embeddings=131072,
    max_window_layers=28,
    pad_token_id=151643,
    rms_norm_eps=1e-6,
    rope_scaling=None,
    rope_theta=1000000.0,
    sliding_window=None,
    tie_word_embeddings=False,
    torch_dtype="bfloat16",
    use_cache=True,
    use_mrope=False,
    use_sliding_window=False,
    vocab_size=152064,
)
DREAM_SIZES = dict(
    hidden_size=3584,
    intermediate_size=18944,
    num_attention_heads=28,
    num_hidden_layers=28,
    num_key_value_heads=4,
)
DREAM_CUT = dict(
    hidden_size=8,
    intermediate_size=24,
    num_attention_heads=4,
    num_hidden_layers=2,
    num_key_value_heads=2,
)
QWEN = DREAM | DREAM_SIZES | dict(mask_token_id=None)

OPENED = {
    "LLaDA-8B": (LLADA, None),
    "d3LLM_LLaDA, dParallel-LLaDA": (LLADA | dict(transformers_version="4.46.3"), None),
    "Dream-v0": (DREAM, dict(eos_token_id=151643, pad_token_id=151643, bos_token_id=151643)),
    "Dream-Coder, d3LLM_Dream": (
        DREAM | dict(bos_token_id=151665, max_position_embeddings=32768),
        dict(eos_penalty=0.0, eos_token_id=151643, mask_token_id=151666),
    ),
    "DiffuCoder": (DREAM | dict(head_dim=None), None),
    "saved by transformers 5": (
        {name: value for name, value in DREAM.items() if name not in ("rope_theta", "torch_dtype")}
        | dict(
            dtype="bfloat16",
            rope_parameters=dict(rope_theta=1000000.0, rope_type="default"),
            layer_types=["full_attention"] * 2,
        ),
        None,
    ),
}
REFUSED = {
    "LLaDA-MoE": (
        LLADA | dict(architectures=["LLaDAMoEModelLM"], num_experts=64, eos_token_id=156892),
        "this is LLaDA-MoE .* needs a mixture of experts",
    ),
    "LLaDA-MoE without its architecture": (
        LLADA | dict(architectures=None, num_experts=64),
        "num_experts is 64.* needs experts",
    ),
    "DreamOn": (DREAM | dict(expand_token_id=151667), "this is DreamOn .* variable length"),
    "LLaDA2.0-mini": (
        dict(architectures=["LLaDA2MoeModelLM"], model_type="llada2_moe"),
        "this is LLaDA2 .*block-causal",
    ),
    "SDAR": (dict(architectures=["SDARForCausalLM"], model_type="sdar"), "SDAR .*block-causal"),
    "SDAR without its architecture": (dict(model_type="sdar"), "SDAR .*block-causal"),
    "Fast_dLLM_v2": (
        QWEN | dict(architectures=["Fast_dLLM_QwenForCausalLM"], model_type="Fast_dLLM_Qwen"),
        "Fast-dLLM v2 .*block-causal",
    ),
    "Stable-DiffCoder": (
        dict(architectures=["StableDiffcoderForCausalLM"], model_type="llama", vocab_size=155136),
        "Stable-DiffCoder .*block-causal",
    ),
    "Stable-DiffCoder as Llama": (
        dict(
            architectures=["LlamaForCausalLM"],
            model_type="llama",
            auto_map={"AutoModelForCausalLM": "modeling_seed_diffcoder.SeedDiffcoderForCausalLM"},
        ),
        "Stable-DiffCoder .*block-causal",
    ),
    "Nemotron-Labs-Diffusion": (
        dict(architectures=["NemotronLabsDiffusionModel"], model_type="nemotron_labs_diffusion"),
        "Nemotron-Labs-Diffusion .*block-causal",
    ),
    "WeDLM": (
        QWEN | dict(architectures=["WeDLMForCausalLM"], model_type="wedlm"),
        "WeDLM .* causal attention",
    ),
    "Efficient-DLM": (
        QWEN | dict(architectures=["EfficientDLM"], model_type="qwen3"),
        "Efficient-DLM .*block-causal",
    ),
    "Qwen3": (
        QWEN | dict(architectures=["Qwen3ForCausalLM"], model_type="qwen3"),
        "a Qwen3, or .* Efficient-DLM .*autoregressive",
    ),
    "SDLM": (
        QWEN
        | dict(
            architectures=["Qwen2ForCausalLM"],
            model_type="qwen2",
            auto_map={"AutoModelForCausalLM": ["modeling_sdlm.SDLMQwen2ForCausalLM"]},
        ),
        "this is SDLM .*block-causal",
    ),
    "Dream-reasoner": (
        DREAM | dict(architectures=["DreamForCausalLM"]),
        "Dream-reasoner .*block-causal",
    ),
    "unknown": (dict(architectures=["Some"], model_type="llada"), "must be one of llada, dream"),
    "nothing": ({}, "architectures and model_type are missing"),
}


def write_config(directory: Path, raw: dict, generation: dict | None = None) -> None:
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(raw))
    if generation is not None:
        (directory / "generation_config.json").write_text(json.dumps(generation))


@pytest.mark.parametrize(("raw", "generation"), OPENED.values(), ids=OPENED.keys())
def test_public_checkpoints_open(tmp_path, raw, generation):
    """Cut to two narrow layers, but with all of the vocabulary and its special tokens."""
    family = "llada" if raw["model_type"] == "llada" else "dream"
    full, cut = (LLADA_SIZES, LLADA_CUT) if family == "llada" else (DREAM_SIZES, DREAM_CUT)
    config = models.config_from_hf(raw | full, generation)
    length = raw.get("max_sequence_length") or raw["max_position_embeddings"]
    preset = models.PRESETS["llada-8b-base" if family == "llada" else "dream-v0-base-7b"]
    assert config == models.FAMILIES[family].from_hf(raw | full)
    assert {**vars(config), "max_length": 0} == {**vars(preset), "max_length": 0}
    assert config.max_length == length
    write_checkpoint(tmp_path / "model", models.config_from_hf(raw | cut))
    write_config(tmp_path / "model", raw | cut, generation)
    opened = checkpoint.inspect(tmp_path / "model")
    assert opened.config.eos_id == preset.eos_id and opened.config.more_eos_ids == ()


@pytest.mark.parametrize(("raw", "words"), REFUSED.values(), ids=REFUSED.keys())
def test_other_public_models_are_refused_by_name(tmp_path, capsys, raw, words):
    with pytest.raises(ValueError, match=words) as raised:
        models.config_from_hf(raw)
    assert str(raised.value).endswith(".") and "\n" not in str(raised.value)
    write_config(tmp_path / "model", raw)
    assert generate.main(["--model", str(tmp_path / "model"), "Hi"]) == 2
    assert str(raised.value) in capsys.readouterr().err


def test_dreamon_is_told_by_its_generation_config_too():
    with pytest.raises(ValueError, match="this is DreamOn"):
        models.config_from_hf(DREAM | DREAM_SIZES, dict(expand_token_id=151667))


@pytest.mark.parametrize("model_type", ["gpt2", "llama", None])
def test_the_architecture_decides(model_type):
    raw = LLADA | LLADA_SIZES | dict(model_type=model_type)
    assert models.config_from_hf(raw) == models.PRESETS["llada-8b-base"]
    raw = DREAM | DREAM_SIZES | dict(architectures=None)
    assert models.config_from_hf(raw) == models.PRESETS["dream-v0-base-7b"]


# --- settings -------------------------------------------------------------------------------------

SMALL, SMALL_DREAM = llada.to_hf(small_config()), dream.to_hf(small_config("dream"))


@pytest.mark.parametrize(
    ("config", "generation", "eos", "more"),
    [
        (38, None, 38, ()),
        ([38], None, 38, ()),
        ([38, 5, 38], None, 38, (5,)),
        (38, dict(eos_token_id=[7, 38, 5]), 38, (7, 5)),
        ([5, 6], dict(eos_token_id=9), 5, (6, 9)),
        (None, dict(eos_token_id=[7, 8]), 7, (8,)),
        (0, dict(eos_token_id=None), 0, ()),
    ],
)
@pytest.mark.parametrize("raw", [SMALL, SMALL_DREAM], ids=["llada", "dream"])
def test_ends_of_text(raw, config, generation, eos, more):
    read = models.config_from_hf(raw | dict(eos_token_id=config, pad_token_id=None), generation)
    assert (read.eos_id, read.more_eos_ids, read.pad_id) == (eos, more, eos)
    assert models.config_from_hf(models.config_to_hf(read)) == read
    assert hash(read) == hash(read)


@pytest.mark.parametrize(
    "rope",
    [
        dict(rope_scaling={}),
        dict(rope_scaling=dict(type="default")),
        dict(rope_scaling=dict(rope_type="default", factor=1.0)),
        dict(rope_parameters=dict(rope_theta=10000, rope_type="default")),
        dict(rope_parameters=dict(rope_theta=1e4)),
        dict(rope_theta=None, rope_parameters=dict(rope_theta=10000)),
        dict(rope_theta=None, rope_scaling=dict(rope_theta=10000, rope_type="default")),
    ],
)
def test_plain_rotary_positions(rope):
    for raw in (SMALL, SMALL_DREAM):
        assert models.config_from_hf(raw | rope) == models.config_from_hf(raw)
    other = dict(rope_theta=None, rope_parameters=dict(rope_theta=500.0))
    assert models.config_from_hf(SMALL | other).rope_theta == 500.0


def test_a_head_width_that_is_the_usual_one():
    assert models.config_from_hf(SMALL | dict(head_dim=4)) == models.config_from_hf(SMALL)


NAN, INFINITE = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (dict(eos_token_id="x"), "eos_token_id is 'x'; it must be a token id or a list of them"),
        (dict(eos_token_id=True), "eos_token_id is True; it must be"),
        (dict(eos_token_id=[38, "5"]), r"eos_token_id is \[38, '5'\]"),
        (dict(eos_token_id=[]), r"eos_token_id is \[\]"),
        (dict(eos_token_id=5.0), "eos_token_id is 5.0"),
        (dict(eos_token_id=[38, 40]), "eos_token_id is 40; .* below the vocabulary's size, 40"),
        (dict(eos_token_id=None), "eos_token_id is missing"),
        (dict(eos_token_id=39), "mask_token_id and eos_token_id are both 39"),
        (dict(pad_token_id="x"), "pad_token_id is 'x'; it must be a token id"),
        (dict(pad_token_id=False), "pad_token_id is False"),
        (dict(mask_token_id=[39]), r"mask_token_id is \[39\]"),
        (dict(mask_token_id=-1), "mask_token_id is -1"),
        (dict(head_dim=8), "head_dim is 8, which is not implemented; it must be .*, 4"),
        (dict(head_dim="4"), "head_dim is '4'"),
        (
            dict(rope_parameters=dict(rope_theta=20000.0)),
            "rope_theta is 10000.0, but rope_parameters.rope_theta is 20000.0",
        ),
        (dict(rope_theta=1000001, rope_parameters=dict(rope_theta=1000000)), "1000001.* 1000000"),
        (dict(rope_scaling=dict(factor=4.0)), r"rope_scaling is {'factor': 4.0}, which has no"),
        (dict(rope_parameters=dict(rope_theta=1e4, factor=4.0)), "factor': 4.0}, which has no"),
        (dict(rope_scaling=dict(type="default", factor=4.0)), "rope_scaling.factor is 4.0"),
        (dict(rope_scaling=dict(rope_type="yarn", factor=4)), "'factor': 4}; .* type 'yarn'"),
        (dict(rope_scaling=dict(rope_type="default", type="linear")), "not implemented"),
        (dict(rope_scaling=4.0), "rope_scaling is 4.0; it must be null or an object"),
        (dict(rope_parameters=dict(full_attention=dict(rope_theta=1e4))), "full_attention"),
        (dict(rope_theta="10000"), "rope_theta is '10000'; it must be a number above 0"),
        (dict(rope_theta=True), "rope_theta is True"),
        (dict(rope_theta=0), "rope_theta is 0"),
        (dict(rope_theta=None), "rope_theta is missing"),
        (dict(rope_theta=INFINITE), "rope_theta is inf; numbers must be finite"),
        (dict(rope_scaling=dict(type="default", factor=NAN)), "rope_scaling is .*nan"),
        (dict(rms_norm_eps=NAN), "rms_norm_eps is nan; numbers must be finite"),
        (dict(rms_norm_eps="1e-5"), "rms_norm_eps is '1e-5'"),
        (dict(d_model=16.0), "d_model is 16.0; it must be a whole number"),
        (dict(d_model=True), "d_model is True"),
        (dict(n_heads=0), "n_heads is 0"),
        (dict(n_layers="2"), "n_layers is '2'"),
        (dict(n_layers=-1), "n_layers is -1"),
        (dict(vocab_size=[40]), r"vocab_size is \[40\]"),
        (dict(max_sequence_length=None), "max_sequence_length is missing"),
        (dict(weight_tying=1), "weight_tying is 1; it must be true or false"),
        (dict(weight_tying="false"), "weight_tying is 'false'"),
        (dict(rope=1), "rope is 1, which is not implemented"),
        (dict(layer_types=["full_attention", "sliding_attention"]), "'sliding_attention'"),
        (dict(layer_types="full_attention"), "layer_types is 'full_attention'; it must be a list"),
        (dict(layer_types=5), "layer_types is 5"),
        (dict(dtype=3), "dtype is 3; it must be a name"),
        (dict(torch_dtype=["float16"]), "torch_dtype is"),
        (dict(rope_theta=10**400), "rope_theta is 10+; it must be a number above 0"),
        (dict(n_layers=10**9), "n_layers is 1000000000; it must be a whole number from 1 to 10000"),
        (dict(d_model=10**12), "d_model is 1000000000000; it must be"),
        (dict(architectures="LLaDAModelLM"), "architectures is 'LLaDAModelLM'; it must be a list"),
        (dict(model_type=3), "model_type is 3; it must be a name"),
    ],
)
def test_settings_of_the_wrong_kind(change, words):
    with pytest.raises(ValueError, match=words) as raised:
        models.config_from_hf(SMALL | change)
    assert str(raised.value).startswith("config.json: ") and str(raised.value).endswith(".")


@pytest.mark.parametrize("value", ["x", True, [1.5], 99, [[5]], INFINITE])
def test_generation_configs_of_the_wrong_kind(value):
    with pytest.raises(ValueError, match="generation_config.json: eos_token_id is"):
        models.config_from_hf(SMALL, dict(eos_token_id=value))


# --- files ----------------------------------------------------------------------------------------


@pytest.fixture
def model(tmp_path) -> Path:
    write_checkpoint(tmp_path / "model", small_config(), dtype="F32")
    return tmp_path / "model"


def rewrite(path: Path, change) -> None:
    path.write_bytes(change(path.read_bytes()))


def test_a_byte_order_mark_is_no_text(model):
    wanted = checkpoint.load(model).config
    write_config(model, models.config_to_hf(wanted), dict(eos_token_id=[38, 3]))
    for name in ("config.json", "generation_config.json", "model.safetensors.index.json"):
        rewrite(model / name, lambda data: b"\xef\xbb\xbf" + data)
    assert checkpoint.load(model).config.more_eos_ids == (3,)


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n"
FILES = [
    "config.json",
    "generation_config.json",
    "model.safetensors.index.json",
    "model-00001-of-00001.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "adapter_config.json",
]


@pytest.mark.parametrize("name", FILES)
def test_a_git_lfs_pointer_is_told(model, name, capsys):
    (model / name).write_bytes(POINTER)
    sentence = f"{model / name} is a Git LFS pointer; fetch the file itself with `git lfs pull`."
    with pytest.raises(ValueError) as raised:
        checkpoint.load(model)
    assert str(raised.value) == sentence
    assert generate.main(["--model", str(model), "Hi"]) == 2
    assert sentence in capsys.readouterr().err


@pytest.mark.parametrize(
    "prefix", ["module.", "_orig_mod.", "module._orig_mod.", "base_model.model."]
)
def test_what_wrapped_a_model_is_left_out_of_the_names(tmp_path, prefix):
    wanted = weight_files.open_weights(CHECKPOINTS / "llada-tiny")
    tensors = safetensors.numpy.load_file(CHECKPOINTS / "llada-tiny" / "model.safetensors")
    wrapped = {prefix + name: tensor for name, tensor in tensors.items()}
    write_config(tmp_path, json.loads((CHECKPOINTS / "llada-tiny" / "config.json").read_text()))
    safetensors.numpy.save_file(wrapped, tmp_path / "model.safetensors")
    assert weight_files.open_weights(tmp_path).keys() == wanted.keys()
    params = checkpoint.load(tmp_path).params
    back = models.params_to_hf(checkpoint.inspect(tmp_path).config, params)
    assert all((back[name] == tensor).all() for name, tensor in tensors.items())
    # Only some of them: nobody knows what that is.
    name = next(iter(tensors))
    mixed = wrapped | {name: wrapped.pop(prefix + name)}
    safetensors.numpy.save_file(mixed, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="do not fit config.json"):
        checkpoint.load(tmp_path)


# --- the tokenizer --------------------------------------------------------------------------------


def add_tokenizer(directory: Path, special: dict[str, int], size: int = 40, **named: str) -> None:
    """A tokenizer of `size` words, some of which are special tokens."""
    words = {f"w{i}": i for i in range(size)}
    by_id = {token: text for text, token in special.items()}
    vocab = {by_id.get(i, word): i for word, i in words.items()}
    backend = Tokenizer(WordLevel(vocab, unk_token="w0"))
    backend.add_special_tokens(list(special))
    backend.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps(named))


END, MASK = "<|endoftext|>", "<|mdm_mask|>"


@pytest.mark.parametrize(
    ("special", "named"),
    [
        ({END: 38, MASK: 39}, dict(eos_token=END, pad_token=END)),  # LLaDA names no mask
        ({END: 38, MASK: 39}, dict(eos_token=END, mask_token=MASK)),
        ({END: 38, MASK: 39, "<|eot_id|>": 30}, dict(eos_token="<|eot_id|>")),
        ({END: 38, "<|im_end|>": 30}, dict(eos_token="<|im_end|>", pad_token="w3")),
        ({END: 38, "<pad>": 30}, dict(eos_token=END, pad_token="<pad>", bos_token="w4")),
        ({}, {}),
    ],
)
def test_tokenizers_that_fit(model, special, named):
    add_tokenizer(model, special, **named)
    assert checkpoint.load(model).tokenizer is not None


@pytest.mark.parametrize("config, told", [(31, True), (30, False), (38, False)])
def test_another_padding_is_told(model, recwarn, config, told):
    """Nothing sees it; and a model that pads with the end of a text has none of its own."""
    raw = json.loads((model / "config.json").read_text())
    write_config(model, raw | dict(pad_token_id=config))
    add_tokenizer(model, {END: 38, "<pad>": 30}, eos_token=END, pad_token="<pad>")
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        assert checkpoint.load(model).tokenizer is not None
    sentences = [str(warning.message) for warning in recwarn]
    assert any("pad_token_id is 31, and the tokenizer's is 30" in s for s in sentences) == told


@pytest.mark.parametrize(
    ("special", "size", "named", "words"),
    [
        (
            {END: 38, "<m>": 30},
            40,
            dict(mask_token="<m>"),
            "mask_token_id is 39, .* mask token is 30",
        ),
        ({END: 38, MASK: 30}, 40, dict(eos_token=END), "mask_token_id is 39, .* mask token is 30"),
        ({END: 30, MASK: 39}, 40, dict(eos_token=END), "eos_token_id is 38, .* is 30"),
        ({"<|eot_id|>": 30}, 40, dict(eos_token="<|eot_id|>"), "eos_token_id is 38, .* is 30"),
        ({END: 38}, 39, dict(eos_token=END), "mask_token_id is 39, but .* has 39 tokens"),
        ({}, 20, {}, "mask_token_id is 39, but .* has 20 tokens"),
    ],
)
def test_a_tokenizer_of_another_model(model, capsys, special, size, named, words):
    add_tokenizer(model, special, size, **named)
    with pytest.raises(ValueError, match=words):
        checkpoint.load(model)
    assert generate.main(["--model", str(model), "w1"]) == 2
    assert "config.json says that" in capsys.readouterr().err


def test_any_end_of_the_model_may_be_the_tokenizers(model):
    raw = models.config_to_hf(small_config())
    write_config(model, raw, dict(eos_token_id=[38, 30]))
    add_tokenizer(model, {"<end>": 30, MASK: 39}, eos_token="<end>")
    assert checkpoint.load(model).config.more_eos_ids == (30,)
    write_config(model, raw | dict(vocab_size=50, embedding_size=40), dict(eos_token_id=45))
    with pytest.raises(ValueError, match="eos_token_id is 45; it must be a token id below"):
        checkpoint.load(model)
