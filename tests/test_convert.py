"""The converter as a command: what it writes and refuses, what a kill leaves, its memory."""

import errno
import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from make_synthetic_checkpoint import write_checkpoint
from measure_convert_memory import convert_and_measure
from places import CHECKPOINTS, ROOT
from tiny_models import small_config

from dlm_jax import checkpoint, models
from dlm_jax.weights.converted import is_converted, read_metadata
from dlm_jax.weights.source import Source

SCRIPT = ROOT / "convert" / "hf_to_orbax.py"
NAMES = ["llada-tiny", "dream-tiny"]


def convert(*arguments) -> int:
    main = runpy.run_path(str(SCRIPT))["main"]
    return main([str(argument) for argument in arguments])


def command(*arguments, **options) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, SCRIPT, *arguments], cwd=ROOT, text=True, capture_output=True, **options
    )


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    """Lets the command find the package when it is not installed."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))


@pytest.fixture(scope="module")
def converted(tmp_path_factory) -> dict[str, Path]:
    """Both tiny checkpoints, converted as they are. Read only."""
    made = {name: tmp_path_factory.mktemp("converted") / name for name in NAMES}
    for name, dst in made.items():
        assert convert("--src", CHECKPOINTS / name, "--dst", dst) == 0
    return made


@pytest.fixture
def damaged(converted, tmp_path) -> Path:
    """A converted checkpoint that a test may damage."""
    return shutil.copytree(converted["llada-tiny"], tmp_path / "damaged")


def assert_same(got, wanted) -> None:
    got, wanted = models.flatten(got.params), models.flatten(wanted.params)
    assert got.keys() == wanted.keys()
    for path, array in wanted.items():
        assert got[path].dtype == array.dtype, path
        np.testing.assert_array_equal(np.asarray(got[path]), np.asarray(array), err_msg=path)


def data_files(directory: Path) -> list[Path]:
    """The files that hold a part's numbers, largest first."""
    files = [path for path in directory.rglob("*") if path.parent.name == "d"]
    return sorted(files, key=lambda path: -path.stat().st_size)


# --- what is written -----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
@pytest.mark.parametrize("name", NAMES)
def test_restores_what_the_source_holds(converted, name, dtype):
    restored = checkpoint.load(converted[name], dtype=dtype)
    direct = checkpoint.load(CHECKPOINTS / name, dtype=dtype)
    assert restored.config == direct.config
    assert_same(restored, direct)
    raw = safetensors.numpy.load_file(CHECKPOINTS / name / "model.safetensors")
    back = models.params_to_hf(restored.config, restored.params)
    assert back.keys() == raw.keys()
    stored = ml_dtypes.bfloat16 if dtype else np.float32
    for tensor in raw:
        np.testing.assert_array_equal(back[tensor], raw[tensor].astype(stored), err_msg=tensor)


def test_casts_while_converting(tmp_path, capsys):
    src, dst = CHECKPOINTS / "dream-tiny", tmp_path / "out"
    assert convert("--src", src, "--dst", dst, "--dtype", "bfloat16", "--verify") == 0
    assert "checksums verified" in capsys.readouterr().out
    assert_same(checkpoint.load(dst), checkpoint.load(src, dtype="bfloat16"))
    entries = read_metadata(dst)
    assert {entry.dtype.name for entry in entries.values()} == {"bfloat16"}


def test_shards_in_bfloat16_stay_bfloat16(tmp_path):
    write_checkpoint(tmp_path / "src", small_config("dream"), shard_bytes=4000)
    assert convert("--src", tmp_path / "src", "--dst", tmp_path / "out", "--verify") == 0
    assert_same(checkpoint.load(tmp_path / "out"), checkpoint.load(tmp_path / "src"))


def test_config_and_tokenizer_come_along(tmp_path):
    src = shutil.copytree(
        CHECKPOINTS / "llada-tiny", tmp_path / "src", copy_function=shutil.copyfile
    )
    for name in ("tokenizer.json", "special_tokens_map.json", "modeling_llada.py"):
        (src / name).write_text(f'"{name}"')
    assert convert("--src", src, "--dst", tmp_path / "out") == 0
    made = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert made == [
        "checkpoint.json",
        "config.json",
        "params",
        "special_tokens_map.json",
        "tokenizer.json",
    ]
    for name in ("config.json", "tokenizer.json"):
        assert (tmp_path / "out" / name).read_bytes() == (src / name).read_bytes()


def test_restores_onto_a_mesh(converted):
    """Sharded heads in both layouts, in a process of its own that has two devices."""
    name = "dream-tiny"
    code = """
import sys
import jax, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
from dlm_jax import checkpoint, models

assert jax.device_count() == 2
mesh = jax.make_mesh((2,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
AXIS = {"q/kernel": P(None, "model"), "o/kernel": P("model"), "head/kernel": P(None, "model")}

def sharding_of(path):
    spec = next((spec for end, spec in AXIS.items() if path.endswith(end)), P())
    return NamedSharding(mesh, spec)

plain = checkpoint.load(sys.argv[1])
for directory in sys.argv[1:]:
    for dtype in (None, "bfloat16"):
        params = checkpoint.load(directory, dtype=dtype, shardings=sharding_of).params
        flat = models.flatten(params)
        tree = models.unflatten({path: array.sharding for path, array in flat.items()})
        same = checkpoint.load(directory, dtype=dtype, shardings=tree).params
        for path, wanted in models.flatten(plain.params).items():
            assert flat[path].sharding == sharding_of(path), path
            np.testing.assert_array_equal(flat[path], wanted.astype(flat[path].dtype))
            np.testing.assert_array_equal(flat[path], models.flatten(same)[path])
        q = flat["blocks_0/q/kernel"]
        assert {shard.data.shape[1] for shard in q.addressable_shards} == {q.shape[1] // 2}
    try:
        checkpoint.load(directory, shardings=NamedSharding(mesh, P(None, None, None, "model")))
    except ValueError as error:
        assert str(error).startswith("shardings: blocks_0/attn_norm/scale has shape [64]")
    else:
        raise AssertionError("a sharding of too high rank passed")
    everywhere = checkpoint.load(directory, shardings=NamedSharding(mesh, P())).params
    assert all(leaf.is_fully_replicated for leaf in jax.tree.leaves(everywhere))
"""
    subprocess.run(
        [sys.executable, "-W", "error", "-c", code, CHECKPOINTS / name, converted[name]],
        env=os.environ
        | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2", "JAX_PLATFORMS": "cpu"},
        check=True,
    )


# --- what is refused: exit code 2, one sentence, nothing left behind -----------------------------


def truncate(src: Path, dst: Path) -> None:
    path = src / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def drop_tensor(src: Path, dst: Path) -> None:
    path = src / "model.safetensors"
    tensors = safetensors.numpy.load_file(path)
    del tensors["model.transformer.ln_f.weight"]
    safetensors.numpy.save_file(tensors, path)


def overflow(src: Path, dst: Path) -> None:
    """Found only when the tensor is cast, after other parts were written."""
    path = src / "model.safetensors"
    tensors = safetensors.numpy.load_file(path)
    tensors["model.transformer.ff_out.weight"][3, 3] = 1e6
    safetensors.numpy.save_file(tensors, path)


def put(value: float):
    """One number that is not finite; found only when the tensor is read."""

    def damage(src: Path, dst: Path) -> None:
        path = src / "model.safetensors"
        tensors = safetensors.numpy.load_file(path)
        tensors["model.transformer.blocks.2.ff_out.weight"][-1, -1] = value
        safetensors.numpy.save_file(tensors, path)

    return damage


def occupy(src: Path, dst: Path) -> None:
    dst.mkdir()
    (dst / "keep").write_text("me")


NOT_FINITE = "tensor model.transformer.blocks.2.ff_out.weight has values that are not finite"
POINTER = "version https://git-lfs.github.com/spec/v1\n"
REFUSALS = {
    "NaN": (put(float("nan")), [], NOT_FINITE),
    "infinite": (put(float("-inf")), ["--dtype", "bfloat16"], NOT_FINITE),
    "broken link": (lambda src, dst: dst.symlink_to("nowhere"), [], "exists; remove it first"),
    "a pointer": (
        lambda src, dst: (src / "tokenizer.json").write_text(POINTER),
        [],
        "tokenizer.json is a Git LFS pointer",
    ),
    "no adapter": (
        lambda src, dst: None,
        ["--adapter", "/nowhere"],
        "is no directory; an adapter is one",
    ),
    "missing tensor": (drop_tensor, [], "1 tensor missing, first: model.transformer.ln_f.weight."),
    "truncated": (truncate, [], "is truncated"),
    "destination exists": (occupy, [], "exists; remove it first"),
    "missing source": (lambda src, dst: shutil.rmtree(src), [], "is no directory"),
    "no config": (lambda src, dst: (src / "config.json").unlink(), [], "has no config.json"),
    "unknown dtype": (
        lambda src, dst: None,
        ["--dtype", "int8"],
        "must be one of float32, bfloat16",
    ),
    "too large for float16": (overflow, ["--dtype", "float16"], "beyond the range of float16"),
    "converted already": (
        lambda src, dst: (src / "checkpoint.json").write_text("{}"),
        [],
        "is already converted",
    ),
}


@pytest.mark.parametrize("prepare, options, message", REFUSALS.values(), ids=REFUSALS.keys())
def test_bad_input(tmp_path, capsys, prepare, options, message):
    src, dst = tmp_path / "src", tmp_path / "out"
    shutil.copytree(CHECKPOINTS / "llada-tiny", src, copy_function=shutil.copyfile)
    prepare(src, dst)
    before = {path: path.lstat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert convert("--src", src, "--dst", dst, *options) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert message in captured.err
    assert captured.err.startswith("hf_to_orbax.py: ") and captured.err.count("\n") == 1
    assert {path: path.lstat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_a_destination_that_cannot_be_written(tmp_path, capsys):
    (tmp_path / "file").touch()
    target = tmp_path / "file" / "out"
    assert convert("--src", CHECKPOINTS / "llada-tiny", "--dst", target) == 2
    said = f"{target} cannot be written; the destination must name a writable folder."
    assert capsys.readouterr().err == f"hf_to_orbax.py: {said}\n"


def test_bad_input_as_a_command(tmp_path):
    result = command("--src", tmp_path / "nothing", "--dst", tmp_path / "out")
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1 and "nothing is no directory" in result.stderr
    result = command("--dst", tmp_path / "out")
    assert result.returncode == 2 and "--src is required" in result.stderr
    assert not list(tmp_path.iterdir())


def test_too_little_space(tmp_path, capsys, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    assert convert("--src", CHECKPOINTS / "llada-tiny", "--dst", tmp_path / "out") == 2
    assert "0.0 GB of free space" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_the_folder_of_the_destination_is_a_broken_link(tmp_path, capsys):
    (tmp_path / "link").symlink_to("nowhere")
    assert convert("--src", CHECKPOINTS / "llada-tiny", "--dst", tmp_path / "link" / "out") == 2
    assert "must name a writable folder." in capsys.readouterr().err


def test_a_disk_that_fills_up(tmp_path):
    """The system lets no file grow beyond a size, which Orbax meets while it writes."""
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))"
    code = f"import runpy, sys; {limit}; runpy.run_path(sys.argv[0], run_name='__main__')"
    arguments = ["--src", CHECKPOINTS / "llada-tiny", "--dst", tmp_path / "out"]
    result = subprocess.run(
        [sys.executable, "-c", f"import sys; del sys.argv[0]; {code}", SCRIPT, *arguments],
        text=True,
        capture_output=True,
    )
    assert result.returncode == 2
    sentence = f"{tmp_path / 'out'} cannot be written: File too large; nothing was kept."
    assert result.stderr == f"hf_to_orbax.py: {sentence}\n"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device", "file"),
        ValueError("RESOURCE_EXHAUSTED: Failed writing: x\n[os_error_code='28']"),
        RuntimeError("Failed to write 9 bytes to file 7: No space left on device"),
    ],
)
def test_a_full_disk_however_it_is_told(tmp_path, capsys, monkeypatch, error):
    def fail(*args, **kwargs):
        raise ValueError("several\nlines") from error

    monkeypatch.setattr("orbax.checkpoint.Checkpointer.save", fail)
    assert convert("--src", CHECKPOINTS / "llada-tiny", "--dst", tmp_path / "out") == 2
    assert "out cannot be written: No space left on device; nothing" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_an_adapter_is_merged(tmp_path):
    src, adapter = tmp_path / "src", tmp_path / "adapter"
    shutil.copytree(CHECKPOINTS / "llada-tiny", src, copy_function=shutil.copyfile)
    adapter.mkdir()
    settings = dict(peft_type="LORA", r=2, lora_alpha=4, target_modules=["blocks.1.q_proj"])
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    rng, name = np.random.default_rng(0), "base_model.model.model.transformer.blocks.1.q_proj"
    halves = {"lora_A": (2, 64), "lora_B": (64, 2)}
    tensors = {
        f"{name}.{part}.weight": rng.standard_normal(shape, np.float32)
        for part, shape in halves.items()
    }
    safetensors.numpy.save_file(tensors, adapter / "adapter_model.safetensors")
    given, beside = tmp_path / "given", tmp_path / "beside"
    assert convert("--src", src, "--adapter", adapter, "--dst", given, "--verify") == 0
    assert_same(checkpoint.load(given), checkpoint.load(src, adapter=adapter))
    for file in adapter.iterdir():
        shutil.copy(file, src)
    assert convert("--src", src, "--dst", beside, "--dtype", "bfloat16") == 0
    assert_same(checkpoint.load(beside), checkpoint.load(src, dtype="bfloat16"))
    assert not (beside / "adapter_config.json").exists()
    with pytest.raises(ValueError, match=r"into which no adapter can be merged; convert .* --adap"):
        checkpoint.load(given, adapter=adapter)


def test_ends_of_text_come_along(tmp_path):
    src = tmp_path / "src"
    shutil.copytree(CHECKPOINTS / "llada-tiny", src, copy_function=shutil.copyfile)
    (src / "generation_config.json").write_text('{"eos_token_id": [5, 6]}')
    assert convert("--src", src, "--dst", tmp_path / "out") == 0
    assert checkpoint.inspect(tmp_path / "out").config.more_eos_ids == (5, 6)


@pytest.mark.parametrize(
    ("script", "arguments"),
    [
        ("measure_convert_memory.py", ["--dir"]),
        ("make_synthetic_checkpoint.py", ["--layers", "1", "--dst"]),
        ("replay.py", ["--checkpoints", "x"]),
        ("trace_summary.py", []),
    ],
)
def test_scripts_tell_of_a_missing_folder_in_one_sentence(tmp_path, capsys, script, arguments):
    (tmp_path / "file").touch()
    main = runpy.run_path(str(ROOT / "scripts" / script))["main"]
    assert main([*arguments, str(tmp_path / "file" / "none")]) == 2
    out, err = capsys.readouterr()
    assert not out and err.startswith(script.removesuffix(".py")) and err.count("\n") == 1
    assert "file" in err


@pytest.mark.parametrize(
    ("streams", "status", "told"),
    [
        (">/dev/full", 1, "Standard output cannot be written: No space left on device."),
        ("2>/dev/full", 0, "out: 0.00 GB in "),
        (">&-", 0, "converting: 0.00 of 0.00 GB"),
    ],
)
def test_streams_that_cannot_be_used(tmp_path, streams, status, told):
    """What was converted is there."""
    target = tmp_path / "out"
    words = [sys.executable, SCRIPT, "--src", CHECKPOINTS / "llada-tiny", "--dst", target]
    done = subprocess.run(
        ["sh", "-c", f'"$0" "$@" {streams}', *words], cwd=ROOT, text=True, capture_output=True
    )
    assert done.returncode == status
    assert told in done.stdout + done.stderr and "Traceback" not in done.stdout + done.stderr
    assert is_converted(target)


def test_interrupt(tmp_path, capsys, monkeypatch):
    def interrupt(self, path, dtype):
        raise KeyboardInterrupt

    monkeypatch.setattr(Source, "read", interrupt)
    assert convert("--src", CHECKPOINTS / "llada-tiny", "--dst", tmp_path / "out") == 130
    assert "interrupted; nothing was written." in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


# --- damage after conversion ---------------------------------------------------------------------


def test_verify_finds_a_flipped_bit(damaged, capsys):
    assert convert("--verify", "--dst", damaged) == 0
    file = data_files(damaged / "params" / "blocks_1")[0]
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    assert convert("--verify", "--dst", damaged) == 2
    assert (
        "1 of 30 parameters are not what was written, first: blocks_1/" in capsys.readouterr().err
    )


def test_truncated_part(damaged, capsys):
    file = data_files(damaged / "params" / "head")[0]
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(
        ValueError, match=r"params/head cannot be restored \(.*\); if it is damaged"
    ):
        checkpoint.load(damaged)
    assert convert("--verify", "--dst", damaged) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_missing_part(damaged):
    shutil.rmtree(damaged / "params" / "blocks_2")
    with pytest.raises(FileNotFoundError, match="is incomplete: params/blocks_2 is missing"):
        checkpoint.load(damaged)


def test_config_of_another_model(damaged):
    shutil.copyfile(CHECKPOINTS / "dream-tiny" / "config.json", damaged / "config.json")
    with pytest.raises(ValueError, match="9 tensors missing, first: blocks_0/k/bias"):
        checkpoint.load(damaged)


@pytest.mark.parametrize(
    "text, message",
    [
        ('{"version": 99}', "version is 99; it must be 1"),
        ('{"version": 1}', "checkpoint.json is damaged"),
        ("nothing", "checkpoint.json is not valid JSON"),
    ],
)
def test_metadata_of_another_kind(damaged, text, message):
    (damaged / "checkpoint.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        checkpoint.load(damaged)


def test_verify_of_something_else(tmp_path, capsys):
    assert convert("--verify", "--dst", tmp_path) == 2
    assert "is no converted checkpoint" in capsys.readouterr().err


# --- a run that is killed ------------------------------------------------------------------------


def test_killed_run(tmp_path):
    src, dst = tmp_path / "src", tmp_path / "out"
    write_checkpoint(src, small_config(num_layers=6))
    process = subprocess.Popen(
        [sys.executable, SCRIPT, "--src", src, "--dst", dst], stderr=subprocess.DEVNULL, cwd=ROOT
    )
    try:
        deadline = time.monotonic() + 300  # only against a hang
        while not (parts := list(tmp_path.glob(".out.partial-*/params/blocks_1"))):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.005)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert process.returncode == -signal.SIGKILL
    assert parts and not dst.exists()
    with pytest.raises(FileNotFoundError):
        checkpoint.load(dst)
    (stale,) = tmp_path.glob(".out.partial-*")
    assert not is_converted(stale)
    running = tmp_path / f".out.partial-{os.getppid()}"  # someone else's, still at work
    running.mkdir()
    assert convert("--src", src, "--dst", dst, "--verify") == 0
    assert_same(checkpoint.load(dst), checkpoint.load(src))
    assert sorted(path.name for path in tmp_path.iterdir()) == [running.name, "out", "src"]


# --- memory --------------------------------------------------------------------------------------


def test_peak_memory_does_not_grow_with_layers(tmp_path):
    """2 against 6 layers of 27 MB; their difference would show if parts were kept."""
    peaks = []
    for layers in (2, 6):
        src, dst = tmp_path / f"src{layers}", tmp_path / f"out{layers}"
        size = write_checkpoint(
            src,
            small_config(
                width=1024,
                mlp_width=3072,
                num_heads=16,
                num_kv_heads=16,
                head_dim=64,
                num_layers=layers,
            ),
        )
        peak, _ = convert_and_measure(src, dst)
        peaks.append((size, peak))
    (small, low), (large, high) = peaks
    assert large - small > 100e6
    assert high - low < 0.25 * (large - small)


def test_metadata_lists_every_parameter(converted):
    raw = json.loads((converted["llada-tiny"] / "checkpoint.json").read_text())
    assert raw["version"] == 1
    assert raw["params"]["blocks_0/q/kernel"].keys() == {"shape", "dtype", "crc32"}
    assert raw["params"]["blocks_0/q/kernel"]["shape"] == [64, 4, 16]
    assert len(raw["params"]) == 30
