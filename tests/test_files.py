"""Files that are written in one step, and targets that cannot be written."""

import json
import os
from pathlib import Path

import pytest

from dlm_jax import files
from dlm_jax.cli import options


@pytest.fixture
def locked(monkeypatch):
    """Makes a folder read-only, also for the superuser, whom no permission stops."""

    def lock(folder: Path) -> None:
        access = os.access
        monkeypatch.setattr(
            os, "access", lambda path, mode: Path(path) != folder and access(path, mode)
        )

    return lock


def test_a_file_is_the_old_one_or_complete(tmp_path, monkeypatch):
    path = tmp_path / "new" / "result.json"
    files.write_json(path, dict(name="\N{SNOWMAN}"))
    assert json.loads(path.read_text(encoding="utf-8")) == dict(name="\N{SNOWMAN}")

    def fail(*_):
        raise OSError("no space")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError, match="no space"):
        files.write(path, b"other")
    assert "name" in path.read_text() and list(path.parent.iterdir()) == [path]


def test_a_file_can_be_new_or_regular(tmp_path):
    files.check_target(tmp_path / "new.json", "--json")
    (tmp_path / "old.json").touch()
    files.check_target(tmp_path / "old.json", "--json")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["old.json"]


def test_targets_that_cannot_be_written_are_refused(tmp_path, locked):
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "file")
    (tmp_path / "dangling").symlink_to(tmp_path / "none")
    for path in (Path("/dev/stdout"), Path("/dev/null"), tmp_path, *tmp_path.glob("*[kg]")):
        with pytest.raises(ValueError, match="is no regular file; --json must name one, or a new"):
            files.check_target(path, "--json")
    locked(tmp_path)
    for path in (tmp_path / "new", tmp_path / "none" / "new", tmp_path / "file" / "new"):
        with pytest.raises(ValueError, match="; --json must name a file in a writable directory."):
            files.check_target(path, "--json")


def test_a_folder_can_be_new_or_old(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for path in (tmp_path, tmp_path / "a" / "b", Path("a/b"), Path(".")):
        files.check_folder(path, "--output")
    assert not list(tmp_path.iterdir())


def test_folders_that_cannot_be_written_are_refused(tmp_path, locked):
    (tmp_path / "file").touch()
    (tmp_path / "dangling").symlink_to(tmp_path / "none")
    for name in ("file", "dangling"):
        with pytest.raises(ValueError, match="is no folder; --output must name one, or a new one."):
            files.check_folder(tmp_path / name, "--output")
    locked(tmp_path)
    for path in (tmp_path, tmp_path / "a" / "b", tmp_path / "file" / "a"):
        with pytest.raises(ValueError, match="cannot be written; --output must name a writable"):
            files.check_folder(path, "--output")


def test_a_picture_is_a_png_file(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib", reason="pictures need matplotlib")
    options.check_picture(tmp_path / "a.png", "--plot")
    with pytest.raises(ValueError, match="a.svg; it must name a PNG file"):
        options.check_picture(tmp_path / "a.svg", "--plot")
    with pytest.raises(ValueError, match="--plot must name a file in a writable directory"):
        options.check_picture(tmp_path / "none" / "a.png", "--plot")
    monkeypatch.setattr(options.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ValueError, match="Drawing needs matplotlib"):
        options.check_picture(tmp_path / "a.png", "--plot")
