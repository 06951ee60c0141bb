"""Checkpoints by their names on the hub, with the real client against a hub on the loopback."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub import constants
from huggingface_hub.utils import logging as client_logging
from loopback_hub import NAME, TINY, LoopbackHub, reach
from make_synthetic_checkpoint import write_checkpoint
from places import ROOT
from tiny_models import small_config

import dlm_jax
from dlm_jax import checkpoint, generate, models
from dlm_jax.eval import defaults
from dlm_jax.weights import hub as hub_lib

pytest_plugins = ["hub_fixtures"]

MATH = ROOT / "dlm_jax" / "assets" / "llada-tiny-math"
WEIGHTS = "model.safetensors"
BREAK = [5000, 0, 0, 0, 0, 0]
"""Bytes until a connection ends: the client tries five times more before it gives up."""


def go_offline(monkeypatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


@pytest.fixture
def sleepless(monkeypatch) -> None:
    """Retries come at once."""
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda seconds: None)


def files_of(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def refused(error: type[Exception] | tuple[type[Exception], ...], name: str = NAME) -> str:
    """The one sentence with which a name is refused, without a word of the client's."""
    with pytest.raises(error) as caught:
        checkpoint.find(name)
    sentence = str(caught.value)
    assert "\n" not in sentence and sentence.endswith(".")
    assert "Traceback" not in sentence and "httpx" not in sentence
    assert caught.value.__suppress_context__ or caught.value.__context__ is None
    return sentence


# --- names ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "repository", "revision"),
    [
        ("GSAI-ML/LLaDA-8B-Instruct", "GSAI-ML/LLaDA-8B-Instruct", "main"),
        ("GSAI-ML/LLaDA-1.5@v1.0", "GSAI-ML/LLaDA-1.5", "v1.0"),
        ("a/b_c@0123456789", "a/b_c", "0123456789"),
        ("a/b@refs/pr/1", "a/b", "refs/pr/1"),
    ],
)
def test_names(text, repository, revision):
    assert hub_lib.Name.parse(text) == (text, repository, revision)


PATHS = [
    "/a/b",
    "./a",
    "../a",
    "~/a",
    "~nobody/a",
    "a/b/c",
    "a/b/",
    "/a",
    "a",
    "",
    "a@b/c",
    "a/b@c/d",
]
PATHS += ["a/b@../c", "@a/b", "https://huggingface.co/a/b", "hf://a/b", "models--a--b"]


@pytest.mark.parametrize("text", PATHS)
def test_what_looks_like_a_path_is_never_looked_up(text, cache, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)  # cannot be imported
    assert hub_lib.Name.parse(text) is None
    if text:
        with pytest.raises(FileNotFoundError, match="neither a directory nor an embedded model"):
            checkpoint.find(text)
    with pytest.raises(FileNotFoundError, match="neither a directory nor an embedded model"):
        checkpoint.find(Path("owner/name"))
    (cache.parent / "owner").mkdir()
    (cache.parent / "owner" / "file").touch()
    with pytest.raises(FileNotFoundError, match="neither a directory nor an embedded model"):
        checkpoint.find("owner/file")


ODD = ["a b/c", "a/b c", "a/b--c", "a/b..c", "a/-b", "a/b.git", "a/b@", "a/b@x y", "é/b", "a/b?c"]


@pytest.mark.parametrize("text", [*ODD, "a/b@refs/../c", f"a/{'b' * 97}"])
def test_names_of_a_wrong_form(text, cache):
    assert "that is owner/name or owner/name@revision" in refused(ValueError, text)


# --- the cache ------------------------------------------------------------------------------------


def cached(folder: Path, commit: str, source: Path = TINY, ref: str | None = None) -> Path:
    snapshot = folder / "snapshots" / commit
    shutil.copytree(source, snapshot, copy_function=shutil.copyfile)
    if ref is not None:
        (folder / "refs").mkdir(exist_ok=True)
        (folder / "refs" / ref).write_text(commit)
    return snapshot


def test_a_directory_of_the_cache_is_its_snapshot(cache, monkeypatch):
    folder = cache / "models--owner--LLaDA-8B-Instruct"
    first = cached(folder, "a" * 40)
    for path in (folder, folder / "snapshots", first):
        assert checkpoint.find(path) == first
        assert hub_lib.name_of(path) == "LLaDA-8B-Instruct"
    monkeypatch.chdir(folder / "snapshots")
    assert checkpoint.find(".").samefile(first)
    second = cached(folder, "b" * 40)
    with pytest.raises(ValueError, match="several snapshots.*/a{40}, .*/b{40}"):
        checkpoint.find(folder)
    assert checkpoint.find(first) == first
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("b" * 40 + "\n")
    assert checkpoint.find(folder) == checkpoint.find(folder / "snapshots") == second
    shutil.rmtree(second)
    with pytest.raises(FileNotFoundError, match="lacks the snapshot b{40} that its refs/main"):
        checkpoint.find(folder)
    shutil.rmtree(folder / "snapshots")
    with pytest.raises(FileNotFoundError, match="without a snapshot"):
        checkpoint.find(folder)


def test_other_directories_are_what_they_are(cache, monkeypatch):
    for name in ("models--my--own", "snapshots", "model/snapshots/last"):
        directory = shutil.copytree(TINY, cache / name)
        assert checkpoint.find(directory) == directory
    monkeypatch.setenv("HOME", str(cache))
    assert checkpoint.find("~/snapshots") == cache / "snapshots"
    assert dlm_jax.load("~/snapshots").config.family == "llada"
    monkeypatch.chdir(cache)
    assert checkpoint.find("model/snapshots") == Path("model/snapshots")
    shutil.copytree(TINY, cache / "owner" / "name")
    assert checkpoint.find("owner/name") == Path("owner/name")  # and nobody asks the hub


def test_what_is_whole_in_the_cache_needs_no_network(cache, monkeypatch):
    reach("http://127.0.0.1:9", monkeypatch)
    folder = cache / "models--owner--LLaDA-tiny"
    snapshot = cached(folder, "a" * 40, MATH, ref="main")
    assert checkpoint.find(NAME) == snapshot
    assert checkpoint.find(f"{NAME}@{'a' * 40}") == snapshot
    go_offline(monkeypatch)
    (snapshot / "model.safetensors").unlink()
    told = refused(FileNotFoundError)
    assert "is incomplete in the hub's cache" in told and "(it lacks model.safetensors)" in told
    assert "HF_HUB_OFFLINE forbids" in told
    write_checkpoint(cache / "shards", small_config(), shard_bytes=4000)
    for path in (cache / "shards").iterdir():
        shutil.copyfile(path, snapshot / path.name)
    assert checkpoint.find(NAME) == snapshot
    next(iter(sorted(snapshot.glob("*-of-*")))).unlink()
    assert "it lacks model-00001-of-" in refused(FileNotFoundError)


def test_a_cached_model_without_a_tokenizer_is_completed_if_that_can_be(hub, cache, monkeypatch):
    files = files_of(MATH)
    commit = hub.add(NAME, files)
    snapshot = cached(cache / "models--owner--LLaDA-tiny", commit, TINY, ref="main")
    go_offline(monkeypatch)
    assert checkpoint.find(NAME) == snapshot and not hub.requests
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    assert checkpoint.find(NAME) == snapshot
    assert (snapshot / "tokenizer.json").read_bytes() == files["tokenizer.json"]
    assert not hub.asked(WEIGHTS)


# --- downloads ------------------------------------------------------------------------------------


def test_a_download(hub, cache, capsys):
    files = files_of(MATH)
    others = ["README.md", "modeling_llada.py", "pytorch_model.bin", "consolidated.safetensors"]
    others += ["model-00001-of-00002.safetensors", "training_args.bin"]
    hub.add(NAME, files | dict.fromkeys(others, b"?"))
    directory = checkpoint.find(NAME)
    assert directory.is_relative_to(cache)
    assert files_of(directory) == files
    told = capsys.readouterr()
    assert told.out == "" and "100%" in told.err and WEIGHTS in told.err
    hub.requests.clear()
    opened = dlm_jax.load(NAME)
    assert not hub.requests
    for path, leaf in models.flatten(dlm_jax.load(MATH).params).items():
        np.testing.assert_array_equal(leaf, models.flatten(opened.params)[path])
    assert hub_lib.name_of(directory) == hub_lib.name_of(NAME) == "LLaDA-tiny"


def test_shards(hub, tmp_path):
    write_checkpoint(tmp_path / "m", small_config(), shard_bytes=4000)
    files = files_of(tmp_path / "m")
    commit = hub.add(NAME, files, "shards")
    assert files_of(checkpoint.find(f"{NAME}@shards")) == files
    assert checkpoint.find(f"{NAME}@{commit}") == checkpoint.find(f"{NAME}@shards")
    assert checkpoint.find(NAME) != checkpoint.find(f"{NAME}@shards")  # main is something else
    del files["model-00002-of-" + sorted(files)[-2].split("-of-")[1]]
    hub.add(NAME, files, "hole")
    told = refused(FileNotFoundError, f"{NAME}@hole")
    assert "1 of the files that model.safetensors.index.json names are missing" in told


def test_a_commit_and_a_pull_request(hub):
    old = hub.repositories[NAME].refs["main"]
    hub.add(NAME, files_of(TINY) | {"generation_config.json": b"{}"})
    assert checkpoint.find(f"{NAME}@{old}").name == old
    assert checkpoint.find(NAME).name != old
    new = hub.add(NAME, files_of(TINY) | {"tokenizer_config.json": b"{}"}, "refs/pr/1")
    assert checkpoint.find(f"{NAME}@refs/pr/1").name == new


def test_an_adapter(hub):
    files = {"adapter_config.json": b"{}", "adapter_model.safetensors": b"weights", "x.py": b""}
    hub.add("owner/lora", files)
    told = refused(FileNotFoundError, "owner/lora")
    assert told == (
        "owner/lora on the hub has no config.json, which a model needs; it holds an adapter."
    )
    directory = hub_lib.locate("owner/lora", kind=hub_lib.ADAPTER)
    del files["x.py"]
    assert directory is not None and files_of(directory) == files
    hub.add("owner/both", files | files_of(TINY))
    assert files_of(checkpoint.find("owner/both")).keys() == files.keys() | files_of(TINY).keys()


# --- downloads that break off ---------------------------------------------------------------------


def test_a_broken_connection_is_resumed_in_the_same_run(hub, sleepless):
    hub.breaks[WEIGHTS] = [5000]
    assert files_of(checkpoint.find(NAME)) == files_of(TINY)
    (whole, rest) = hub.asked(WEIGHTS)
    assert whole.range is None and rest.range == "bytes=4096-"  # whole pieces of 1024 are kept


def test_the_next_run_goes_on_where_a_download_broke_off(hub, cache, sleepless):
    hub.breaks[WEIGHTS] = [*BREAK]
    told = refused(ConnectionError)
    assert "broke off" in told and "the same command goes on where it stopped" in told
    (partial,) = cache.rglob("*.incomplete")
    assert partial.stat().st_size == 4096
    hub.requests.clear()
    directory = checkpoint.find(NAME)
    assert files_of(directory) == files_of(TINY)
    (rest,) = hub.asked(WEIGHTS)
    assert rest.range == "bytes=4096-"
    assert not list(cache.rglob("*.incomplete")) and not hub.asked("config.json")


def test_parts_that_do_not_fit_are_fetched_anew(hub, cache, sleepless):
    hub.breaks[WEIGHTS] = [*BREAK]
    refused(ConnectionError)
    (partial,) = cache.rglob("*.incomplete")
    partial.write_bytes(b"x" * partial.stat().st_size)
    assert f"the parts of {WEIGHTS} do not fit together" in refused(ConnectionError)
    assert files_of(checkpoint.find(NAME)) == files_of(TINY)
    shutil.rmtree(cache / "models--owner--LLaDA-tiny" / "snapshots")
    (blob,) = (path for path in cache.rglob("blobs/*") if path.stat().st_size > 20000)
    blob.rename(f"{blob}.incomplete")
    with open(f"{blob}.incomplete", "ab") as file:
        file.write(b"too much")
    assert files_of(checkpoint.find(NAME)) == files_of(TINY)


def test_large_files_may_lie_elsewhere(hub, monkeypatch, sleepless):
    """The token goes to the hub, and not to where it sends on."""
    monkeypatch.setenv("HF_TOKEN", hub.token)
    with LoopbackHub() as cdn:
        cdn.repositories = hub.repositories
        hub.cdn = cdn
        cdn.breaks[WEIGHTS] = [*BREAK]
        refused(ConnectionError)
        assert files_of(checkpoint.find(NAME)) == files_of(TINY)
        first, *_, last = cdn.asked(WEIGHTS)
        assert first.range is None and last.range == "bytes=4096-"
        assert not any(request.authorization for request in cdn.requests)
        assert all(request.authorization for request in hub.requests)


def test_a_full_disk(hub, cache, monkeypatch):
    usage = shutil.disk_usage(cache.parent)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=20000))
        assert "0.0 GB of free space" in refused(OSError)
    assert not hub.asked(WEIGHTS)

    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("huggingface_hub.file_download.http_get", full)
        told = refused(OSError)
    assert f"{cache} has no space left" in told and "goes on where it stopped" in told


def test_a_cache_that_cannot_be_written(hub, cache):
    cache.write_text("no folder")
    assert "cannot be used" in refused(OSError) and "HF_HUB_CACHE" in refused(OSError)


# --- refusals -------------------------------------------------------------------------------------


def test_nothing_there(hub, monkeypatch):
    told = refused(FileNotFoundError, "owner/nothing")
    assert "no directory 'owner/nothing' here, and no repository owner/nothing" in told
    assert "HF_TOKEN" in told
    told = refused(FileNotFoundError, f"{NAME}@v9")
    assert f"{NAME} on {hub.url} has no revision 'v9'" in told
    told = refused(FileNotFoundError, f"{NAME}@{'0' * 40}")
    assert "has no revision '0000" in told
    monkeypatch.setenv("HF_TOKEN", hub.token)
    assert "no repository" in refused(FileNotFoundError, "owner/nothing")


def test_a_token(hub, monkeypatch):
    hub.gated.add(NAME)
    told = refused(PermissionError)
    assert f"do so at {hub.url}/{NAME}, and set HF_TOKEN" in told
    hub.private.add(NAME)
    assert "if it is private, set HF_TOKEN" in refused(FileNotFoundError)
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    told = refused(PermissionError)
    assert "refuses access" in told and "hf_wrong" not in told
    for token in ("hf_wröng", "hf_wr\x01ng"):
        monkeypatch.setenv("HF_TOKEN", token)
        told = refused((ValueError, PermissionError))
        assert "HF_TOKEN" in told and token not in told
    monkeypatch.setenv("HF_TOKEN", hub.token)
    assert files_of(checkpoint.find(NAME)) == files_of(TINY)


UNFIT: Mapping[str, tuple[dict[str, bytes], str]] = {
    "no config": ({WEIGHTS: b"?"}, "has no config.json, which a model needs."),
    "nothing": ({"model.gguf": b"?"}, "has no config.json"),
    "pickles": (
        {"config.json": b"{}", "pytorch_model.bin": b"?"},
        "has its weights as .bin files only, which can hold code and are not fetched",
    ),
    "no weights": ({"config.json": b"{}"}, "holds no weights; it must have model.safetensors or"),
    "another model": (
        {"config.json": json.dumps({"model_type": "gpt2"}).encode(), WEIGHTS: b"?"},
        "model_type",
    ),
    "damaged index": (
        {"config.json": b"{}", f"{WEIGHTS}.index.json": b"{}", "model-1.safetensors": b"?"},
        "has no weight_map",
    ),
}


@pytest.mark.parametrize(("files", "message"), UNFIT.values(), ids=UNFIT.keys())
def test_a_repository_that_cannot_be_used_is_refused_before_its_weights_come(hub, files, message):
    hub.add("owner/unfit", files)
    with pytest.raises((FileNotFoundError, ValueError), match=message):
        checkpoint.find("owner/unfit")
    commit = hub.repositories["owner/unfit"].refs["main"]
    with pytest.raises((FileNotFoundError, ValueError), match=message):
        checkpoint.find(f"owner/unfit@{commit}")
    assert not any(request.path.endswith((".safetensors", ".bin")) for request in hub.requests)


def test_without_a_connection(cache, monkeypatch):
    reach("http://127.0.0.1:9", monkeypatch)
    told = refused(FileNotFoundError)
    assert (
        f"it is not in the hub's cache, {cache}, and http://127.0.0.1:9 cannot be reached" in told
    )
    go_offline(monkeypatch)
    assert "HF_HUB_OFFLINE forbids to fetch it" in refused(FileNotFoundError)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    reach("no-url", monkeypatch)
    assert "cannot be reached" in refused(FileNotFoundError)


def test_an_incomplete_cache_without_a_connection(hub, monkeypatch, sleepless):
    hub.breaks[WEIGHTS] = [*BREAK]
    refused(ConnectionError)
    go_offline(monkeypatch)
    told = refused(FileNotFoundError)
    assert f"(it lacks {WEIGHTS})" in told and "HF_HUB_OFFLINE forbids" in told
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    reach("http://127.0.0.1:9", monkeypatch)
    assert "broke off" in refused(ConnectionError)


@pytest.mark.parametrize("status", [403, 429, 500, 503])
def test_a_hub_that_is_broken(hub, status):
    hub.broken = status
    assert str(status) in refused(OSError)


def test_the_client_keeps_its_level_of_warnings(hub):
    before = client_logging.get_verbosity()
    checkpoint.find(NAME)
    assert client_logging.get_verbosity() == before


# --- names in an evaluation -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("repository", "wanted"),
    [
        ("GSAI-ML/LLaDA-8B-Instruct", "inst"),
        ("GSAI-ML/LLaDA-1.5", "1.5"),
        ("instadeep/model-base", "base"),
        ("lab-1.5/model", "base"),
    ],
)
def test_the_variant_is_told_by_the_name_of_the_repository(cache, repository, wanted):
    folder = cache / f"models--{repository.replace('/', '--')}"
    snapshot = cached(folder, "c" * 40)
    for directory in (folder, folder / "snapshots", snapshot, f"{repository}@v1", repository):
        assert defaults.variant(None, directory, None) == wanted
        assert hub_lib.name_of(directory) == repository.split("/")[1]


# --- the commands ---------------------------------------------------------------------------------


def environment(hub: LoopbackHub, cache: Path) -> dict[str, str]:
    return os.environ | dict(
        HF_ENDPOINT=hub.url, HF_HUB_CACHE=str(cache), HF_HUB_DISABLE_XET="1", JAX_PLATFORMS="cpu"
    )


def test_a_process_heeds_the_variables(hub, cache, monkeypatch):
    code = "from dlm_jax.weights import hub; print(hub.locate('owner/LLaDA-tiny'))"
    argv = [sys.executable, "-c", code]
    env = environment(hub, cache)
    done = subprocess.run(argv, env=env, cwd=ROOT, capture_output=True, text=True, check=True)
    assert files_of(Path(done.stdout.strip())) == files_of(TINY)
    assert f"fetching {WEIGHTS}, " in done.stderr
    monkeypatch.setenv("HF_HUB_ETAG_TIMEOUT", "soon")
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True)
    assert "ValueError: huggingface_hub cannot be used (invalid literal" in done.stderr


def test_a_refusal_of_the_command(hub, capsys):
    assert generate.main(["--model", "owner/nothing"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    assert err.startswith("dlm-jax-generate: There is no directory 'owner/nothing' here")


@pytest.mark.slow
def test_the_command(hub, cache):
    hub.add("owner/math", MATH)
    argv = [sys.executable, "-m", "dlm_jax.generate", "--model", "owner/math", "--gen-length", "8"]
    done = subprocess.run(
        argv, env=environment(hub, cache), cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0 and done.stdout.strip()
    assert "loading owner/math ..." in done.stderr and WEIGHTS in done.stderr
    assert hub.asked(WEIGHTS)


def test_the_converter(hub, cache, tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(ROOT / "convert")
    import hf_to_orbax

    (tmp_path / "there").mkdir()
    assert hf_to_orbax.main(["--src", NAME, "--dst", str(tmp_path / "there")]) == 2
    assert not hub.requests
    assert hf_to_orbax.main(["--src", "owner/nothing", "--dst", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("hf_to_orbax.py: There is no")
    assert hf_to_orbax.main(["--src", NAME, "--dst", str(tmp_path / "out"), "--verify"]) == 0
    assert checkpoint.load(tmp_path / "out").config == checkpoint.load(TINY).config


def test_interrupted(hub, cache, monkeypatch, capsys):
    """Ctrl-C in the middle of a file ends it at once, and the next run goes on."""
    stalled = threading.Event()

    def interrupt() -> None:
        while not any(path.stat().st_size >= 8192 for path in cache.rglob("*.incomplete")):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)
        stalled.set()

    hub.stalls[WEIGHTS] = (20000, stalled)
    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        checkpoint.find(NAME)
    thread.join()
    told = capsys.readouterr().err.splitlines()[-1]
    assert told == f"{NAME}: interrupted; the same command goes on where it stopped."
    hub.stalls.clear()
    assert files_of(checkpoint.find(NAME)) == files_of(TINY)
    assert (hub.asked(WEIGHTS)[-1].range or "").startswith("bytes=")
