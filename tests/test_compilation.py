"""What is compiled only once: prompts share a program, and processes share a folder of them."""

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from places import CHECKPOINTS, ROOT
from tiny_models import prompts, small

import dlm_jax
from dlm_jax import DecodeConfig, cache, compilation, generate
from dlm_jax.decoding.loop import diffusion_generate
from dlm_jax.engine import Engine

CHANGED = (
    "jax_enable_compilation_cache",
    "jax_compilation_cache_dir",
    "jax_persistent_cache_min_compile_time_secs",
)


@pytest.fixture
def compiled():
    """The names of all programs that XLA compiles from now on."""
    names = []

    def listen(event, _seconds, **about):
        if event == "/jax/core/compile/backend_compile_duration":
            names.append(about.get("fun_name"))

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield names
    jax.monitoring.unregister_event_duration_listener(listen)


def test_prompts_of_like_length_share_a_program(compiled):
    """32 slots hold up to 32 tokens; neither the tokens, the other row nor the key matter."""
    checkpoint = dlm_jax.load(CHECKPOINTS / "llada-tiny")
    decode = DecodeConfig.for_model(checkpoint.config, gen_length=4)
    engine = Engine(checkpoint, decode, cache.make("none"))

    def run(*lengths: int) -> int:
        """Answers prompts of these lengths; returns how many programs that took."""
        del compiled[:]
        rows = [[start + length] * length for start, length in enumerate(lengths)]
        engine.run(rows, jax.random.key(sum(lengths)))
        return len(compiled)

    assert run(5, 2) >= 1
    assert (run(17, 1), run(4, 30), run(32, 32)) == (0, 0, 0)
    assert (run(33, 1), run(3, 64)) == (1, 0)


@pytest.mark.parametrize("name", ["none", "dual", pytest.param("d2cache", marks=pytest.mark.slow)])
def test_watching_compiles_all_step_shapes_before_the_clock_starts(compiled, name):
    checkpoint = dlm_jax.load(CHECKPOINTS / "llada-tiny")
    decode = DecodeConfig.for_model(checkpoint.config, gen_length=16, block_length=8)
    phases = []

    @contextlib.contextmanager
    def progress(phase):
        phases.append(phase)
        yield
        del compiled[:]  # what was compiled before the clock starts

    engine = Engine(checkpoint, decode, cache.make(name), progress=progress)
    rows, snapshots = [[5, 6, 7], [8, 9]], []
    first = engine.run(rows, jax.random.key(0), snapshots.append)
    assert phases == ["compiling"] and compiled == []
    assert len(snapshots) == first.nfe >= 16
    width = 32 + 16  # the prompts are padded
    assert (first.positions == width) if name == "none" else (first.positions < width)
    # Nothing is compiled, or tried out, for prompts that are like these.
    again = engine.run([[1] * 9, [2] * 4], jax.random.key(1), snapshots.append)
    assert phases == ["compiling"] and compiled == []
    assert again.compile_seconds < first.compile_seconds


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A user's home, and JAX as a command finds it; afterwards both are what they were."""
    before = {name: getattr(jax.config, name) for name in CHANGED}
    jax.config.update("jax_enable_compilation_cache", True)
    jax.config.update("jax_compilation_cache_dir", None)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    yield tmp_path
    for name, value in before.items():
        jax.config.update(name, value)


def test_all_programs_are_kept_where_only_the_user_can_write(home):
    folder = home / ".cache" / "dlm_jax" / "xla"
    assert compilation.use_cache() == str(folder) == jax.config.jax_compilation_cache_dir
    assert folder.stat().st_mode & 0o777 == 0o700
    assert jax.config.jax_persistent_cache_min_compile_time_secs == 0
    assert compilation.use_cache() == str(folder)


@pytest.mark.parametrize(("root", "wanted"), [("{home}/xdg", "xdg"), ("relative", ".cache")])
def test_the_cache_folder_of_the_user_is_taken(root, wanted, home, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", root.format(home=home))
    assert compilation.use_cache() == str(home / wanted / "dlm_jax" / "xla")


def test_what_the_user_configured_stays(home):
    jax.config.update("jax_compilation_cache_dir", "gs://bucket/cache")
    minimum = jax.config.jax_persistent_cache_min_compile_time_secs
    assert compilation.use_cache() == "gs://bucket/cache"
    assert jax.config.jax_persistent_cache_min_compile_time_secs == minimum
    assert compilation.use_cache(enabled=False) is None  # but not against an option
    assert compilation.use_cache() is None  # switched off is a configuration, too
    assert not any(home.iterdir())


def test_a_folder_that_cannot_be_or_is_not_safe_is_left_alone(home, monkeypatch):
    folder = home / ".cache" / "dlm_jax" / "xla"
    folder.mkdir(parents=True)
    folder.chmod(0o777)
    assert compilation.use_cache() is None  # anyone could have put programs there
    (home / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(home / "file"))
    assert compilation.use_cache() is None

    def missing():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", missing)
    assert compilation.use_cache() is None
    assert jax.config.jax_compilation_cache_dir is None


def test_what_was_not_used_for_longest_is_forgotten(home, monkeypatch):
    folder = Path(compilation.use_cache() or "")
    for day, name in enumerate(("old", "used", "new")):
        (folder / name).write_bytes(bytes(100))
        os.utime(folder / name, (day, day))
    os.utime(folder / "used", (9, 1))  # read later than written
    jax.config.update("jax_compilation_cache_dir", None)
    monkeypatch.setattr(compilation, "MAX_BYTES", 200)
    assert compilation.use_cache() == str(folder)
    assert {path.name for path in folder.iterdir()} == {"used", "new"}


def test_the_command_has_an_option_for_it(monkeypatch):
    asked = []

    def use_cache(enabled: bool) -> None:
        asked.append(enabled)
        raise ValueError("That was all.")

    monkeypatch.setattr(compilation, "use_cache", use_cache)
    assert (generate.main([]), generate.main(["--no-compile-cache"])) == (2, 2)
    assert asked == [True, False]


COMMAND = """
import collections, json, sys
import jax
from dlm_jax import checkpoint, generate, tokenizer
from dlm_jax.cli import options
events = collections.Counter()
jax.monitoring.register_event_listener(lambda event, **_: events.update([event.split("/")[-1]]))
assert generate.main(sys.argv[1:]) == 0
ran = sorted(sys.modules)
tokenizer.open_tokenizer(checkpoint.find(options.MODEL))
print(json.dumps([ran, sorted(sys.modules), events]))
"""
"""Runs the command, and tells what it imported (then with a tokenizer) and what became of JAX's
requests for programs."""


def test_a_second_process_compiles_nothing_and_none_imports_what_it_does_not_need(tmp_path):
    (tmp_path / "ids.json").write_text("[[5, 6, 7]]")
    argv = ["--model", str(CHECKPOINTS / "llada-tiny"), "--prompt-ids=ids.json", "--gen-length=4"]
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path)}
    for name in ("JAX_ENABLE_COMPILATION_CACHE", "JAX_COMPILATION_CACHE_DIR"):
        environment.pop(name, None)

    def run() -> tuple[set[str], set[str], dict[str, int]]:
        done = subprocess.run(
            [sys.executable, "-W", "error", "-c", COMMAND, *argv],
            capture_output=True,
            text=True,
            env=environment,
            cwd=tmp_path,
        )
        told = done.stderr.splitlines()
        assert done.returncode == 0 and told[0].startswith("loading "), done.stderr
        assert "tokens/s" in told[-1] and len(told) == 5, done.stderr  # and no warning
        ran, opened, events = json.loads(done.stdout.splitlines()[-1])
        return set(ran), set(opened), events

    ran, opened, first = run()
    _, _, second = run()
    assert "cache_hits" not in first and "cache_misses" not in second
    assert first["cache_misses"] == second["cache_hits"] > 0
    assert not {"orbax", "optax", "chex", "torch", "transformers", "tokenizers"} & ran
    assert {"transformers", "tokenizers"} <= opened and not {"orbax", "optax", "torch"} & opened
    assert not {f"transformers.{name}" for name in ("modeling_utils", "generation")} & opened


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (RuntimeError("Unable to initialize backend 'x': no (set JAX_PLATFORMS='')"), "'x': no; "),
        (AssertionError(), "there is no such device; "),
    ],
)
def test_devices_that_are_not_there_are_told(monkeypatch, error, told):
    def devices():
        raise error

    monkeypatch.setattr(jax, "devices", devices)
    with pytest.raises(ValueError, match=r"^JAX_PLATFORMS is 'cpu'|^JAX has no device") as caught:
        compilation.check_devices()
    assert told.rstrip("; ") in str(caught.value)


@pytest.mark.slow
@pytest.mark.parametrize("platforms", ["cuda", "nonsense", ",", "cpu,nonsense"])
@pytest.mark.parametrize("module", ["generate", "evaluate"])
def test_a_command_without_its_devices_is_one_sentence(module, platforms):
    done = subprocess.run(
        [sys.executable, "-m", f"dlm_jax.{module}"],
        env=os.environ | dict(JAX_PLATFORMS=platforms, PYTHONPATH=str(ROOT)),
        capture_output=True,
        encoding="utf-8",
    )
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert f"JAX_PLATFORMS is '{platforms}', which does not work here: " in done.stderr


X64 = """
import sys, warnings
from dlm_jax import generate
warnings.simplefilter("error")
for argv in sys.argv[1:]:
    assert generate.main(["--gen-length=8", "--no-compile-cache", *argv.split(), "Hi"]) == 0, argv
"""


def test_64_bits_do_not_change_the_dtypes_of_a_generation():
    model, params = small()
    prompt = prompts(2, 3)

    for decode, method in (
        (DecodeConfig(gen_length=8, block_length=4, temperature=1.0), cache.make("dual")),
        (DecodeConfig(gen_length=8, alg="random"), cache.make("none")),
    ):
        with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):  # as users have it
            out = diffusion_generate(
                params, model, prompt, key=jax.random.key(0), decode=decode, cache=method
            )
        assert {str(leaf.dtype) for leaf in jax.tree.leaves(out)} == {"int32", "float32"}


@pytest.mark.slow
def test_the_command_with_64_bits_says_no_warning():
    argvs = (
        "",
        "--model=dream-tiny-math --temperature=1 --top-p=0.9 --min-p=0.1 --stop-at-eos",
        "--cache=dual --block-length=4",
        "--cache=dllm --threshold=0.9",
        "--cache=dkv-greedy --alg=random",
        "--strategy=wino",
    )
    done = subprocess.run(
        [sys.executable, "-c", X64, *argvs],
        env=os.environ | dict(JAX_ENABLE_X64="1", JAX_PLATFORMS="cpu", PYTHONPATH=str(ROOT)),
        capture_output=True,
        encoding="utf-8",
    )
    assert done.returncode == 0, done.stderr
