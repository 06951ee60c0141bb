"""Opening checkpoints in the Hugging Face layout: values, dtypes, shardings, refusals."""

import importlib.util
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from make_synthetic_checkpoint import write_checkpoint
from places import CHECKPOINTS, ROOT
from tiny_models import small_config

from dlm_jax import checkpoint, models
from dlm_jax.weights import files as weight_files
from dlm_jax.weights.source import Source

NAMES = ["llada-tiny", "dream-tiny"]
HAS_TORCH = importlib.util.find_spec("torch") is not None


def tensors_of(directory: Path) -> dict[str, np.ndarray]:
    return safetensors.numpy.load_file(directory / "model.safetensors")


def assert_same_tensors(got: dict[str, np.ndarray], wanted: dict[str, np.ndarray]) -> None:
    assert got.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert got[name].dtype == tensor.dtype, name
        np.testing.assert_array_equal(got[name], tensor, err_msg=name)


@pytest.fixture
def llada(tmp_path) -> Path:
    """A copy that a test may damage."""
    return shutil.copytree(
        CHECKPOINTS / "llada-tiny", tmp_path / "llada", copy_function=shutil.copyfile
    )


@pytest.mark.parametrize("dtype", [None, "float32", jnp.bfloat16, np.dtype("float16")])
@pytest.mark.parametrize("name", NAMES)
def test_every_tensor_arrives(name, dtype):
    opened = checkpoint.load(CHECKPOINTS / name, dtype=dtype)
    stored = np.dtype(np.float32 if dtype is None else dtype)
    wanted = {key: value.astype(stored) for key, value in tensors_of(CHECKPOINTS / name).items()}
    assert_same_tensors(models.params_to_hf(opened.config, opened.params), wanted)
    assert opened.model.config == opened.config
    assert opened.tokenizer is None
    shapes = {path: leaf.shape for path, leaf in models.flatten(opened.params).items()}
    assert shapes == models.param_shapes(opened.config)


def test_heads_become_axes():
    """The layout of kernels, spelled out by hand."""
    opened = checkpoint.load(CHECKPOINTS / "dream-tiny")
    block, raw = opened.params["blocks_1"], tensors_of(CHECKPOINTS / "dream-tiny")
    prefix, width = "model.layers.1.self_attn", opened.config.head_dim
    query = raw[f"{prefix}.q_proj.weight"]
    output = raw[f"{prefix}.o_proj.weight"]
    for head in range(opened.config.num_heads):
        rows = slice(head * width, (head + 1) * width)
        np.testing.assert_array_equal(block["q"]["kernel"][:, head], query[rows].T)
        np.testing.assert_array_equal(block["q"]["bias"][head], raw[f"{prefix}.q_proj.bias"][rows])
        np.testing.assert_array_equal(block["o"]["kernel"][head], output[:, rows].T)


def test_synthetic_weights_have_the_scale_of_real_ones(tmp_path):
    """So that activations stay about 1, and no two logits are equal because weights recur."""
    config = small_config("dream", width=64, head_dim=16, vocab_size=70_000)
    write_checkpoint(tmp_path / "m", config, dtype="F32")
    flat = models.flatten(checkpoint.load(tmp_path / "m").params)
    for path, value in flat.items():
        value = np.asarray(value)
        if path.endswith("/scale"):
            assert 0 < np.abs(value - 1).max() < 0.2
        elif path.endswith("/kernel"):
            inputs = value.size // config.vocab_size if "head" in path else None
            inputs = inputs or {"o": 64, "down": config.mlp_width}.get(path.split("/")[-2], 64)
            assert value.std() * np.sqrt(inputs) == pytest.approx(1, rel=0.1)
    head_VD = np.asarray(flat["head/kernel"]).T
    assert len(np.unique(head_VD[:, :2], axis=0)) == config.vocab_size


def test_shards_and_bfloat16(tmp_path):
    """Chunks, shards and their index, against a plain reading of the files."""
    config = small_config(width=256, head_dim=64, mlp_width=3000, vocab_size=700)
    write_checkpoint(tmp_path / "m", config, shard_bytes=2 << 20)
    files = sorted((tmp_path / "m").glob("*.safetensors"))
    assert len(files) > 2
    wanted = {}
    for file in files:
        data = file.read_bytes()
        start = 8 + int.from_bytes(data[:8], "little")
        for name, entry in json.loads(data[8:start]).items():
            low, high = entry["data_offsets"]
            flat = np.frombuffer(data[start + low : start + high], ml_dtypes.bfloat16)
            wanted[name] = flat.reshape(entry["shape"])
    opened = checkpoint.load(tmp_path / "m")
    assert_same_tensors(models.params_to_hf(config, opened.params), wanted)
    wide = checkpoint.load(tmp_path / "m", dtype="float32")
    wanted = {name: tensor.astype(np.float32) for name, tensor in wanted.items()}
    assert_same_tensors(models.params_to_hf(config, wide.params), wanted)


def test_embedded_models_open_by_name(monkeypatch, tmp_path):
    monkeypatch.setattr(checkpoint, "_ASSETS", CHECKPOINTS)
    monkeypatch.chdir(tmp_path)
    assert checkpoint.embedded() == sorted(NAMES)
    assert checkpoint.load("llada-tiny").config.family == "llada"
    with pytest.raises(
        FileNotFoundError, match=r"nor an embedded model; .* dream-tiny, llada-tiny"
    ):
        checkpoint.load("llada-huge")


def test_opening_imports_nothing_heavy():
    code = (
        "import sys, dlm_jax; dlm_jax.load(sys.argv[1]); "
        "heavy = {'orbax.checkpoint', 'transformers', 'torch', 'huggingface_hub'}; "
        "sys.exit(bool(heavy & set(sys.modules)))"
    )
    subprocess.run([sys.executable, "-c", code, CHECKPOINTS / "llada-tiny"], cwd=ROOT, check=True)


def test_shardings_are_found_by_path():
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    asked = []

    def sharding_of(path: str):
        asked.append(path)
        return device

    params = checkpoint.load(CHECKPOINTS / "llada-tiny", shardings=sharding_of).params
    assert sorted(asked) == sorted(models.flatten(params))
    tree = jax.tree.map(lambda _: device, params)
    again = checkpoint.load(CHECKPOINTS / "llada-tiny", shardings=tree).params
    jax.tree.map(np.testing.assert_array_equal, params, again)
    del tree["head"]
    with pytest.raises(
        ValueError, match=r"no entry for 1 of the 30 parameters, first: head/kernel"
    ):
        checkpoint.load(CHECKPOINTS / "llada-tiny", shardings=tree)


def test_derived_tensors_are_ignored(tmp_path):
    config = small_config("dream", tied_head=True)
    rng = np.random.default_rng(0)
    params = models.unflatten(
        {
            path: rng.standard_normal(shape, np.float32)
            for path, shape in models.param_shapes(config).items()
        }
    )
    tensors = models.params_to_hf(config, params)
    extra = {
        "lm_head.weight": tensors["model.embed_tokens.weight"],
        "model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(2, np.float32),
    }
    safetensors.numpy.save_file(tensors | extra, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(models.config_to_hf(config)))
    opened = checkpoint.load(tmp_path)
    assert opened.config == config
    jax.tree.map(np.testing.assert_array_equal, opened.params, params)


# --- what is refused -----------------------------------------------------------------------------


def edit_tensors(change: Callable[[dict], None]) -> Callable[[Path], None]:
    def damage(directory: Path) -> None:
        tensors = tensors_of(directory)
        change(tensors)
        safetensors.numpy.save_file(tensors, directory / "model.safetensors")

    return damage


def edit_config(**changes) -> Callable[[Path], None]:
    def damage(directory: Path) -> None:
        path = directory / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return damage


def cut(size: int) -> Callable[[Path], None]:
    def damage(directory: Path) -> None:
        path = directory / "model.safetensors"
        path.write_bytes(path.read_bytes()[:size])

    return damage


def write(name: str, text: str) -> Callable[[Path], None]:
    return lambda directory: (directory / name).write_text(text)


def to_torch_name(directory: Path) -> None:
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")


def to_missing_shard(directory: Path) -> None:
    (directory / "model.safetensors").unlink()
    index = {"weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    shutil.copyfile(CHECKPOINTS / "llada-tiny" / "model.safetensors", directory / "1.safetensors")


def to_shard_twice(directory: Path) -> None:
    to_missing_shard(directory)
    shutil.copyfile(directory / "1.safetensors", directory / "2.safetensors")


def to_index(text: str) -> Callable[[Path], None]:
    def damage(directory: Path) -> None:
        (directory / "model.safetensors").unlink()
        (directory / "model.safetensors.index.json").write_text(text)

    return damage


def drop_three(tensors: dict) -> None:
    for i in range(3):
        del tensors[f"model.transformer.blocks.{i}.ff_out.weight"]


LN_F, HEAD = "model.transformer.ln_f.weight", "model.transformer.ff_out.weight"
HEADER = '{"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, -4]}}'
DAMAGES = {
    "missing": (
        edit_tensors(lambda t: t.pop(HEAD)),
        ValueError,
        f"1 tensor missing, first: {HEAD}",
    ),
    "three missing": (
        edit_tensors(drop_three),
        ValueError,
        r"3 tensors missing, first: model.transformer.blocks.0.ff_out.weight\.",
    ),
    "unexpected": (
        edit_tensors(lambda t: t.update({"model.extra": np.ones(3, np.float32)})),
        ValueError,
        "1 tensor unexpected, first: model.extra",
    ),
    "mis-shaped": (
        edit_tensors(lambda t: t.update({LN_F: np.ones(63, np.float32)})),
        ValueError,
        rf"1 tensor mis-shaped, first: {LN_F} has shape \[63\] instead of \[64\]",
    ),
    "integers": (
        edit_tensors(lambda t: t.update({LN_F: np.ones(64, np.int64)})),
        ValueError,
        f"tensor {LN_F} has dtype I64; it must be F32, F16, BF16",
    ),
    "sizes that are none": (
        write("model.safetensors", "\x7f" + 7 * "\0" + HEADER.ljust(127)),
        ValueError,
        "its header cannot be read",
    ),
    "an index of anything": (
        to_index('{"weight_map": {"a": 3}}'),
        ValueError,
        "has no weight_map; it must map tensor names to files",
    ),
    "truncated": (
        cut(-4),
        ValueError,
        "is truncated: it has 734060 bytes, and 734064 were expected",
    ),
    "cut in the header": (cut(1000), ValueError, "ends within its header"),
    "empty file": (cut(0), ValueError, "ends within its header"),
    "no safetensors": (
        write("model.safetensors", "\x08" + 7 * "\0" + "[1,2,3,]"),
        ValueError,
        "its header cannot be read",
    ),
    "Git LFS": (
        write("model.safetensors", "version https://git-lfs.github.com/spec/v1"),
        ValueError,
        "git lfs pull",
    ),
    "too few layers": (edit_config(n_layers=2), ValueError, "9 tensors unexpected"),
    "too many layers": (edit_config(n_layers=4), ValueError, "9 tensors missing"),
    "wrong width": (edit_config(d_model=32), ValueError, "instead of"),
    "wrong type": (edit_config(d_model="64"), ValueError, "d_model is '64'; it must be a whole"),
    "unknown model": (
        edit_config(architectures=["GPT2LMHeadModel"], model_type="gpt2"),
        ValueError,
        "must be one of llada, dream",
    ),
    "no JSON": (write("config.json", "{"), ValueError, "config.json is not valid JSON"),
    "no object": (write("config.json", "[]"), ValueError, "config.json must hold a JSON object"),
    "no config": (lambda d: (d / "config.json").unlink(), FileNotFoundError, "has no config.json"),
    "no weights": (
        lambda d: (d / "model.safetensors").unlink(),
        FileNotFoundError,
        "holds no weights; it must hold model.safetensors",
    ),
    "missing shard": (
        to_missing_shard,
        FileNotFoundError,
        "1 of the 2 weight files .* are missing, first: 2.safetensors",
    ),
    "tensor twice": (to_shard_twice, ValueError, "is in an earlier weight file too"),
}


@pytest.mark.parametrize("damage, error, message", DAMAGES.values(), ids=DAMAGES.keys())
def test_damage_is_named_in_one_sentence(llada, damage, error, message):
    damage(llada)
    with pytest.raises(error, match=message) as raised:
        checkpoint.load(llada)
    assert str(raised.value).endswith(".") and "\n" not in str(raised.value)


def test_a_file_that_shrinks_meanwhile(llada):
    source = Source.open(llada)
    cut(5000)(llada)
    with pytest.raises(ValueError, match="is truncated"):
        source.read("head/kernel", None)


@pytest.mark.parametrize("dtype", ["int8", "float64", "half", jnp.float64, 3])
def test_unknown_dtype(dtype):
    with pytest.raises(ValueError, match="must be one of float32, bfloat16, float16"):
        checkpoint.load(CHECKPOINTS / "llada-tiny", dtype=dtype)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("stored", ["float32", "float16", "bfloat16"])
def test_values_that_are_not_finite(llada, stored, value):
    def change(tensors: dict) -> None:
        kind = ml_dtypes.bfloat16 if stored == "bfloat16" else stored
        tensors.update({name: tensor.astype(kind) for name, tensor in tensors.items()})
        tensors[HEAD][-1, 7] = value

    edit_tensors(change)(llada)
    with pytest.raises(ValueError, match=f"tensor {HEAD} has values that are not finite"):
        checkpoint.load(llada)


def test_values_beyond_float16(llada):
    edit_tensors(lambda t: t.update({LN_F: np.full(64, 7e4, np.float32)}))(llada)
    with pytest.raises(ValueError, match=f"tensor {LN_F} has values beyond the range of float16"):
        checkpoint.load(llada, dtype="float16")


@pytest.mark.skipif(HAS_TORCH, reason="PyTorch is installed, so .bin files are read")
def test_bin_is_refused_without_torch(llada):
    to_torch_name(llada)
    with pytest.raises(ValueError, match="PyTorch is not installed"):
        checkpoint.load(llada)


@pytest.mark.torch
@pytest.mark.skipif(not HAS_TORCH, reason="PyTorch is not installed")
def test_bin_is_read_with_torch(llada):
    import torch

    wanted = {name: tensor.astype(ml_dtypes.bfloat16) for name, tensor in tensors_of(llada).items()}
    state = {name: torch.from_numpy(t).bfloat16() for name, t in tensors_of(llada).items()}
    (llada / "model.safetensors").unlink()
    torch.save(state, llada / "pytorch_model.bin")
    opened = checkpoint.load(llada)
    assert_same_tensors(models.params_to_hf(opened.config, opened.params), wanted)
    torch.save(Source, llada / "pytorch_model.bin")
    with pytest.raises(ValueError, match="holds more than tensors"):
        checkpoint.load(llada)


def test_empty_is_aligned():
    array = weight_files.empty((3, 5), np.dtype(np.float32))
    assert array.shape == (3, 5)
    assert array.ctypes.data % 64 == 0
