"""LoRA adapters that are merged while a model is read, and those that are refused."""

import importlib.util
import json
import math
import shutil
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from make_synthetic_checkpoint import write_checkpoint
from places import CHECKPOINTS
from tiny_models import small_config

from dlm_jax import checkpoint, generate, models
from dlm_jax.batching.fingerprint import fingerprint

HAS_PEFT = all(importlib.util.find_spec(name) for name in ("peft", "torch"))
Q, DOWN = "model.transformer.blocks.0.q_proj", "model.transformer.blocks.1.ff_out"
NORM = "model.transformer.ln_f"
SETTINGS = dict(
    alpha_pattern={},
    auto_mapping=None,
    base_model_name_or_path="GSAI-ML/LLaDA-8B-Base",
    bias="none",
    fan_in_fan_out=False,
    inference_mode=True,
    init_lora_weights=True,
    layers_pattern=None,
    layers_to_transform=None,
    lora_alpha=6,
    lora_bias=False,
    lora_dropout=0.1,
    megatron_config=None,
    megatron_core="megatron.core",
    modules_to_save=None,
    peft_type="LORA",
    peft_version="0.18.0",
    r=3,
    rank_pattern={},
    target_modules=["q_proj", "blocks.1.ff_out"],
    task_type="CAUSAL_LM",
    use_dora=False,
    use_rslora=False,
)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A small model in float32. Read only."""
    directory = tmp_path_factory.mktemp("base") / "model"
    write_checkpoint(directory, small_config(mlp_width=32), dtype="F32")
    return directory


def base_tensors(base: Path) -> dict[str, np.ndarray]:
    (file,) = base.glob("*.safetensors")
    return safetensors.numpy.load_file(file)


def thin(module: str, shape: tuple[int, ...], rank: int) -> dict[str, np.ndarray]:
    """A and B of a module, of plain numbers."""
    rows, columns = shape
    a = (np.arange(rank * columns).reshape(rank, columns) % 7 - 3) / 64
    b = (np.arange(rows * rank).reshape(rows, rank) % 5 - 2) / 8
    return {
        f"base_model.model.{module}.lora_A.weight": a.astype(np.float32),
        f"base_model.model.{module}.lora_B.weight": b.astype(np.float32),
    }


def adapter_tensors(rank: int = 3) -> dict[str, np.ndarray]:
    other = Q.replace("0", "1")
    shapes = {Q: (16, 16), other: (16, 16), DOWN: (16, 32)}
    tensors: dict[str, np.ndarray] = {}
    for module, shape in shapes.items():
        tensors |= thin(module, shape, rank)
    return tensors


def write_adapter(directory: Path, tensors: dict | None = None, **settings) -> Path:
    directory.mkdir(exist_ok=True)
    (directory / "adapter_config.json").write_text(json.dumps(SETTINGS | settings))
    tensors = adapter_tensors() if tensors is None else tensors
    safetensors.numpy.save_file(tensors, directory / "adapter_model.safetensors")
    return directory


def half(tensors: dict, module: str, name: str) -> np.ndarray:
    return tensors[f"base_model.model.{module}.{name}.weight"].astype(np.float64)


def summed(base: Path, scale: float, tensors: dict | None = None) -> dict[str, np.ndarray]:
    """What a merged model holds, in float64."""
    tensors = adapter_tensors() if tensors is None else tensors
    wanted = {name: tensor.astype(np.float64) for name, tensor in base_tensors(base).items()}
    for name in tensors:
        if ".lora_A" in name:
            module = name.removeprefix("base_model.model.").partition(".lora_A")[0]
            product = half(tensors, module, "lora_B") @ half(tensors, module, "lora_A")
            wanted[f"{module}.weight"] += scale * product
    return wanted


def loaded(base: Path, **options) -> dict[str, np.ndarray]:
    opened = checkpoint.load(base, **options)
    return models.params_to_hf(opened.config, opened.params)


def assert_close(got: dict, wanted: dict, tolerance: float = 1e-6, least: float = 1e-8) -> None:
    """Up to a relative error, and below that up to the least number that a dtype can tell."""
    assert got.keys() == wanted.keys()
    for name, tensor in wanted.items():
        np.testing.assert_allclose(
            got[name].astype(np.float64), tensor, rtol=tolerance, atol=least, err_msg=name
        )


# --- what is merged -------------------------------------------------------------------------------


def test_the_sum_is_that_of_the_definition(base, tmp_path):
    adapter = write_adapter(tmp_path / "adapter")
    got = loaded(base, adapter=adapter)
    assert_close(got, summed(base, 6 / 3))
    assert_close(loaded(base, adapter=str(adapter)), got, 0)
    untouched = base_tensors(base)
    for name in untouched.keys() - {f"{m}.weight" for m in (Q, Q.replace("0", "1"), DOWN)}:
        np.testing.assert_array_equal(got[name], untouched[name])
        assert got[name].dtype == np.float32


def test_recorded_numbers(base, tmp_path):
    """Products written down: the first and fifth row of 2 B A."""
    adapter = write_adapter(tmp_path / "adapter")
    added = loaded(base, adapter=adapter)[f"{Q}.weight"] - base_tensors(base)[f"{Q}.weight"]
    np.testing.assert_allclose(added[0, :7] * 256, [7, 4, 1, -2, -5, -1, -4], atol=1e-4)
    np.testing.assert_allclose(added[4, :3] * 256, [1, 4, 7], atol=1e-4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("stored", [np.float32, ml_dtypes.bfloat16, np.float16])
def test_dtypes_of_base_and_adapter(base, tmp_path, stored, dtype):
    """Summed in float32 and rounded once."""
    model = shutil.copytree(base, tmp_path / "model")
    (file,) = model.glob("*.safetensors")
    rounded = {name: tensor.astype(stored) for name, tensor in base_tensors(base).items()}
    safetensors.numpy.save_file(rounded, file)
    tensors = {name: tensor.astype(stored) for name, tensor in adapter_tensors().items()}
    adapter = write_adapter(tmp_path / "adapter", tensors)
    wanted = summed(model, 2.0, tensors)
    as_stored = loaded(model, adapter=adapter)
    got = loaded(model, adapter=adapter, dtype=dtype)
    digits = {"float32": 1e-6, "bfloat16": 2**-8, "float16": 2**-10}
    least = {"float16": 2**-24}
    for merged, name in ((as_stored, np.dtype(stored).name), (got, dtype)):
        assert_close(merged, wanted, digits[name], least.get(name, 1e-8))
    assert {tensor.dtype.name for tensor in got.values()} == {dtype}


@pytest.mark.parametrize(
    ("settings", "scale"),
    [
        (dict(lora_alpha=12), 4.0),
        (dict(lora_alpha=1.5), 0.5),
        (dict(lora_alpha=0), 0.0),
        (dict(use_rslora=True), 6 / math.sqrt(3)),
        (dict(alpha_pattern={"ff_out|q_proj": 3}), 1.0),
        (dict(r=8, rank_pattern={r"transformer\.blocks\.\d\.(q_proj|ff_out)": 3}), 2.0),
        (dict(target_modules="all-linear"), 2.0),
        (dict(target_modules=None), 2.0),
        (dict(target_modules=r".*\.(q_proj|blocks\.1\.ff_out)"), 2.0),
        (dict(target_modules=["q_proj", "blocks.1.ff_out", "o_proj", "gate_proj"]), 2.0),
        (
            dict(
                target_modules=["q_proj", "ff_out"],
                exclude_modules=["0.ff_out", "transformer.ff_out"],
            ),
            2.0,
        ),
        (dict(target_modules=["q_proj"] * 2 + ["blocks.1.ff_out"], layers_pattern="blocks"), 2.0),
        (dict(init_lora_weights="gaussian", unsloth_fixed=True, something_new=None), 2.0),
    ],
)
def test_scales_and_targets(base, tmp_path, settings, scale):
    adapter = write_adapter(tmp_path / "adapter", **settings)
    assert_close(loaded(base, adapter=adapter), summed(base, scale))


def test_a_module_may_have_its_own_rank_and_alpha(base, tmp_path):
    tensors = adapter_tensors() | thin(DOWN, (16, 32), 5)
    adapter = write_adapter(
        tmp_path / "adapter", tensors, rank_pattern={"ff_out": 5}, alpha_pattern={DOWN: 20}
    )
    wanted = summed(base, 2.0, tensors)
    wanted[f"{DOWN}.weight"] = summed(base, 4.0, tensors)[f"{DOWN}.weight"]
    assert_close(loaded(base, adapter=adapter), wanted)


@pytest.mark.parametrize("settings", [dict(layers_to_transform=0), dict(layers_to_transform=[0])])
def test_only_some_layers(base, tmp_path, settings):
    tensors = thin(Q, (16, 16), 3)
    for more in (dict(), dict(layers_pattern="blocks"), dict(layers_pattern=["h", "blocks"])):
        adapter = write_adapter(
            tmp_path / "adapter", tensors, target_modules=["q_proj"], **settings, **more
        )
        assert_close(loaded(base, adapter=adapter), summed(base, 2.0, tensors))


@pytest.mark.parametrize("ending", ["", ".weight", ".default.weight"])
def test_dora(base, tmp_path, ending):
    lengths = np.linspace(0.5, 2.0, 16, dtype=np.float32)
    tensors = adapter_tensors()
    modules = [Q, Q.replace("0", "1"), DOWN]
    more = {f"base_model.model.{m}.lora_magnitude_vector{ending}": lengths for m in modules}
    adapter = write_adapter(tmp_path / "adapter", tensors | more, use_dora=True)
    wanted = summed(base, 2.0, tensors)
    for module in modules:
        matrix = wanted[f"{module}.weight"]
        wanted[f"{module}.weight"] = (
            matrix / np.linalg.norm(matrix, axis=1, keepdims=True) * lengths[:, None]
        )
    assert_close(loaded(base, adapter=adapter), wanted, 2e-6)


@pytest.mark.parametrize("prefix", ["", "base_model.model.", "base_model.model.module."])
def test_other_spellings_of_names(base, tmp_path, prefix):
    tensors = {
        prefix + name.removeprefix("base_model.model.").replace(".weight", ".default.weight"): t
        for name, t in adapter_tensors().items()
    }
    adapter = write_adapter(tmp_path / "adapter", tensors)
    assert_close(loaded(base, adapter=adapter), summed(base, 2.0))


def test_rows_that_come_in_pieces(base, tmp_path, monkeypatch):
    """The rows of B are those of the piece of W, with shards and a dtype to cast to."""
    monkeypatch.setattr("dlm_jax.weights.files._CHUNK_BYTES", 200)
    adapter = write_adapter(tmp_path / "adapter")
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    got = loaded(base, adapter=adapter, shardings=place)
    assert_close(got, summed(base, 2.0))


def test_dream(tmp_path):
    module = "model.layers.2.self_attn.k_proj"
    tensors = thin(module, (32, 64), 3)
    adapter = write_adapter(tmp_path / "adapter", tensors, target_modules=r".*\.2\..*k_proj")
    name = CHECKPOINTS / "dream-tiny"
    assert_close(loaded(name, adapter=adapter), summed(name, 2.0, tensors))


def test_an_adapter_beside_the_weights(base, tmp_path):
    model = shutil.copytree(base, tmp_path / "model")
    write_adapter(model)
    assert_close(loaded(model), summed(base, 2.0))
    assert_close(loaded(model, adapter=model), summed(base, 2.0))
    other = write_adapter(tmp_path / "other")
    with pytest.raises(ValueError, match="has an adapter beside its weights, and .*other is asked"):
        checkpoint.load(model, adapter=other)
    (model / "adapter_model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"has adapter_config.json, but no adapter_model\."):
        checkpoint.load(model)


@pytest.fixture
def ask(base, tmp_path):
    (tmp_path / "ids.json").write_text("[[1, 2, 3]]")
    asked = ["--prompt-ids", str(tmp_path / "ids.json"), "--gen-length", "4", "--model", str(base)]
    return lambda adapter: generate.main([*asked, "--adapter", str(adapter)])


@pytest.mark.slow
def test_the_command(ask, tmp_path, capsys):
    assert ask(write_adapter(tmp_path / "adapter")) == 0
    assert len(capsys.readouterr().out.split()) == 4


def test_the_command_refuses(ask, tmp_path, capsys):
    assert ask(tmp_path / "none") == 2
    assert "none' is no directory; an adapter is one" in capsys.readouterr().err
    assert ask(write_adapter(tmp_path / "adapter", r=4)) == 2
    assert "with rank 4 it must be" in capsys.readouterr().err


def test_responses_of_another_adapter_are_others(base, tmp_path):
    first = write_adapter(tmp_path / "first")
    known = {fingerprint(base), fingerprint(base, first)}
    assert fingerprint(base, str(first)) in known
    known.add(fingerprint(base, write_adapter(tmp_path / "second", lora_alpha=7)))
    model = shutil.copytree(base, tmp_path / "model")
    write_adapter(model)
    known.add(fingerprint(model))
    write_adapter(model, lora_alpha=7)
    known.add(fingerprint(model))
    assert len(known) == 5


@pytest.mark.slow
def test_evaluation_has_the_merged_model_and_responses_of_its_own(tmp_path):
    from dlm_jax.eval.model import DiffusionLM

    name = "model.transformer.blocks.1.q_proj"
    adapter = write_adapter(
        tmp_path / "adapter", thin(name, (160, 160), 3), target_modules=["blocks.1.q_proj"]
    )
    plain, tuned = DiffusionLM(), DiffusionLM(adapter=str(adapter))
    assert plain._identity != tuned._identity
    kernels = [lm.checkpoint.params["blocks_1"]["q"]["kernel"] for lm in (plain, tuned)]
    assert not np.array_equal(*map(np.asarray, kernels))


# --- what is refused ------------------------------------------------------------------------------


def changed(**arrays) -> dict[str, np.ndarray]:
    """The adapter's tensors with other ones for the first module; None leaves a half out."""
    tensors = adapter_tensors()
    for part, array in arrays.items():
        name = f"base_model.model.{Q}.{part}.weight"
        del tensors[name]
        if array is not None:
            tensors[name] = array
    return tensors


def zeros(*shape: int) -> np.ndarray:
    return np.zeros(shape, np.float32)


NOT_FINITE = np.full((3, 16), np.inf, np.float32)
EMBEDDING = {"base_model.model.model.transformer.wte.lora_embedding_A": zeros(3, 40)}
BIAS = {f"base_model.model.{Q}.lora_B.bias": zeros(16)}
SAVED = {"base_model.model.model.transformer.wte.weight": zeros(40, 16)}
REFUSED = {
    "other kinds": (None, dict(peft_type="IA3"), "peft_type is 'IA3'"),
    "no kind": (None, dict(peft_type=None), "peft_type is None"),
    "bias": (None, dict(bias="lora_only"), "bias is 'lora_only'"),
    "lora_bias": (None, dict(lora_bias=True), "lora_bias is True"),
    "saved": (None, dict(modules_to_save=["wte"]), r"modules_to_save is \['wte'\]"),
    "transposed": (None, dict(fan_in_fan_out=True), "fan_in_fan_out is True"),
    "parameters": (None, dict(target_parameters=["x"]), "target_parameters is"),
    "tokens": (None, dict(trainable_token_indices=[3]), "trainable_token_indices is"),
    "replicated": (None, dict(layer_replication=[[0, 2]]), "layer_replication is"),
    "unknown": (None, dict(use_something_new=True), "use_something_new is True"),
    "pissa": (None, dict(init_lora_weights="pissa"), "init_lora_weights is 'pissa', so"),
    "pissa_niter": (None, dict(init_lora_weights="pissa_niter_4"), "'pissa_niter_4', so"),
    "olora": (None, dict(init_lora_weights="olora"), "'olora', so"),
    "corda": (None, dict(init_lora_weights="corda"), "'corda', so"),
    "loftq": (None, dict(init_lora_weights="loftq"), "'loftq', so"),
    "rank": (None, dict(r=4), r"lora_A.weight has shape \[3, 16\]; with rank 4 .* \[4, 16\]"),
    "no rank": (None, dict(r="3"), "the rank of .* is '3'; it must be a whole number"),
    "rank yes": (None, dict(r=True), "the rank of .* is True"),
    "alpha": (None, dict(lora_alpha="6"), "lora_alpha of .* is '6'; it must be a number"),
    "alpha huge": (None, dict(lora_alpha=10**400), "lora_alpha of .* it must be a number"),
    "alpha NaN": (None, dict(lora_alpha=math.nan), "lora_alpha of .* is nan"),
    "patterns": (None, dict(rank_pattern=[3]), r"rank_pattern is \[3\]"),
    "no pattern": (None, dict(alpha_pattern={"(": 3}), "alpha_pattern has .* no regular expr"),
    "flag": (None, dict(use_rslora="yes"), "use_rslora is 'yes'; it must be true or false"),
    "targets": (None, dict(target_modules=3), "target_modules is 3; it must be names"),
    "incomplete": (None, dict(target_modules=["q_proj", "ff_out"]), r"no tensors for .*0\.ff_out"),
    "more": (None, dict(target_modules=["q_proj"]), r"tensors for .*ff_out, which target_mod"),
    "excluded": (None, dict(exclude_modules="nothing|.*q_proj"), "and exclude_modules do not"),
    "layers": (None, dict(layers_to_transform=[1]), r"0\.q_proj, which .* and layers_to_transf"),
    "no layers": (None, dict(layers_to_transform="0"), "layers_to_transform is '0'; it must be"),
    "no such layers": (None, dict(layers_to_transform=0, layers_pattern="h"), "layers_pattern do"),
    "no A": (changed(lora_A=None), {}, f"has no lora_A for {Q}"),
    "no B": (changed(lora_B=None), {}, f"has no lora_B for {Q}"),
    "shape of A": (changed(lora_A=zeros(3, 15)), {}, r"lora_A.weight has shape \[3, 15\]"),
    "shape of B": (changed(lora_B=zeros(3, 16)), {}, r"lora_B.weight has shape \[3, 16\]"),
    "infinite": (changed(lora_A=NOT_FINITE), {}, "lora_A.weight has values that are not finite"),
    "embedding": (adapter_tensors() | EMBEDDING, {}, "lora_embedding_A is not implemented"),
    "bias tensor": (adapter_tensors() | BIAS, {}, "lora_B.bias is not implemented"),
    "whole tensor": (adapter_tensors() | SAVED, {}, "wte.weight is not implemented"),
    "another model": (thin("model.layers.0.q_proj", (16, 16), 3), {}, "no linear map of this mod"),
    "a norm": (thin(NORM, (16, 16), 3), {}, "ln_f, which is no linear map"),
    "an embedding": (thin("model.transformer.wte", (40, 16), 3), {}, "wte, which is no linear map"),
    "nothing": ({}, {}, "holds no tensors"),
    "DoRA without lengths": (None, dict(use_dora=True), "has no lora_magnitude_vector for"),
    "lengths without DoRA": (
        adapter_tensors() | {f"base_model.model.{Q}.lora_magnitude_vector": zeros(16)},
        {},
        "lora_magnitude_vector is one of DoRA's, but .* does not say use_dora",
    ),
}


@pytest.mark.parametrize(("tensors", "settings", "words"), REFUSED.values(), ids=REFUSED.keys())
def test_adapters_that_are_refused(base, tmp_path, tensors, settings, words):
    adapter = write_adapter(tmp_path / "adapter", tensors, **settings)
    with pytest.raises(ValueError, match=words) as raised:
        checkpoint.load(base, adapter=adapter)
    assert str(raised.value).endswith(".") and "\n" not in str(raised.value)


def test_a_head_that_is_the_embedding_has_no_adapter(tmp_path):
    config = small_config(mlp_width=32, tied_head=True)
    write_checkpoint(tmp_path / "model", config, dtype="F32")
    head = thin("model.transformer.ff_out", (40, 16), 3)
    adapter = write_adapter(tmp_path / "adapter", head, target_modules=["ff_out"])
    with pytest.raises(ValueError, match="ff_out, which is no linear map of this model"):
        checkpoint.load(tmp_path / "model", adapter=adapter)


def test_files_that_are_no_adapter(base, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(FileNotFoundError, match="nowhere' is no directory; an adapter is one"):
        checkpoint.load(base, adapter=tmp_path / "nowhere")
    for adapter in (empty, base):
        with pytest.raises(FileNotFoundError, match="has no adapter_config.json; it must be"):
            checkpoint.load(base, adapter=adapter)
    adapter = write_adapter(tmp_path / "adapter")
    with pytest.raises(FileNotFoundError, match="is an adapter, and no model; give the base"):
        checkpoint.load(adapter)
    file = adapter / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(ValueError, match="is truncated"):
        checkpoint.load(base, adapter=adapter)
    (adapter / "adapter_config.json").write_text("[]")
    with pytest.raises(ValueError, match="must hold a JSON object"):
        checkpoint.load(base, adapter=adapter)


@pytest.mark.parametrize("middle", ["", ".base_layer"])
def test_a_model_that_peft_wrapped_is_told(base, tmp_path, middle):
    model = shutil.copytree(base, tmp_path / "model")
    (file,) = model.glob("*.safetensors")
    wrapped = {
        f"base_model.model.{name.replace('q_proj', f'q_proj{middle}')}": tensor
        for name, tensor in base_tensors(base).items()
    }
    safetensors.numpy.save_file(wrapped | adapter_tensors(), file)
    with pytest.raises(ValueError, match="holds a PEFT model whose adapter is not merged; give"):
        checkpoint.load(model)


# --- against PEFT ---------------------------------------------------------------------------------


@pytest.mark.torch
@pytest.mark.skipif(not HAS_PEFT, reason="PEFT and PyTorch are not installed")
@pytest.mark.parametrize(
    "settings",
    [
        dict(),
        dict(use_rslora=True),
        dict(use_dora=True),
        dict(rank_pattern={"ff_out": 5}, alpha_pattern={"q_proj": 2}),
    ],
)
def test_peft_merges_the_same(base, tmp_path, settings):
    """A stack of modules with the model's names, wrapped, saved and merged by PEFT itself."""
    import peft
    import torch

    torch.manual_seed(0)

    def module(names: dict[str, np.ndarray]) -> torch.nn.Module:
        if not names:
            return torch.nn.Module()
        if set(names) == {"weight"}:
            weight = torch.from_numpy(names["weight"].copy())
            if weight.ndim == 1:
                return torch.nn.LayerNorm(len(weight), bias=False)
            made = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
            made.weight.data = weight
            return made
        made = torch.nn.Module()
        for first in {name.partition(".")[0] for name in names}:
            below = {n.partition(".")[2]: t for n, t in names.items() if n.split(".")[0] == first}
            made.add_module(first, module(below))
        return made

    lora = peft.LoraConfig(
        r=3, lora_alpha=6, target_modules=["q_proj", r"blocks.1.ff_out"], **settings
    )
    wrapped = peft.get_peft_model(module(base_tensors(base)), lora)
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:
            parameter.data += torch.randn_like(parameter) / 8
    wrapped.save_pretrained(tmp_path / "adapter")
    merged = wrapped.merge_and_unload().state_dict()
    got = loaded(base, adapter=tmp_path / "adapter")
    for name, tensor in merged.items():
        if tensor.ndim == 2:
            np.testing.assert_allclose(got[name], tensor.numpy(), rtol=1e-5, atol=1e-7)
