"""Checkpoints by their name on the Hugging Face hub: `owner/name[@revision]` -> a directory.

Here are names, and the layout of the hub's cache. `fetch` looks a name up; it, and with it
`huggingface_hub`, is imported when that is to be done, and not before.
"""

import contextlib
import os
import re
from collections.abc import Callable, Collection
from pathlib import Path
from typing import NamedTuple

from dlm_jax.tokenizer import FILES as TOKENIZER_FILES
from dlm_jax.weights.files import SHARDED, SINGLE, shard_names


class Kind(NamedTuple):
    """What a repository is read as.

    Attributes:
      title: what it is called, with its article.
      config: its configuration.
      weights: its weights, if they are one file; the index of several is named after it.
    """

    title: str
    config: str
    weights: str

    @property
    def index(self) -> str:
        return f"{self.weights}.index.json"


MODEL = Kind("a model", "config.json", SINGLE)
ADAPTER = Kind("an adapter", "adapter_config.json", "adapter_model.safetensors")
SMALL = (MODEL.config, "generation_config.json", ADAPTER.config, SHARDED, *TOKENIZER_FILES)
"""All files but the weights."""

MAIN = "main"
PREFIX = "models--"
_PART = r"(?!.*(?:--|\.\.))\w(?:[\w.-]{0,94}\w)?"
_REPOSITORY = re.compile(rf"{_PART}/{_PART}(?<!\.git)", re.ASCII)
_REVISION = re.compile(r"(?!.*\.\.)\w[\w.+/-]*", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{40}")


class Name(NamedTuple):
    """A checkpoint on the hub.

    Attributes:
      text: as the user wrote it.
      repository: `owner/name`.
      revision: a branch, a tag or a commit.
    """

    text: str
    repository: str
    revision: str

    @classmethod
    def parse(cls, text: str) -> "Name | None":
        """Takes a name apart; None if it is a path or a plain word, which nothing here fetches.

        Raises:
          ValueError: it is neither a path nor a name of the right form.
        """
        repository, at, revision = text.partition("@")
        nested = "/" in revision and not revision.startswith("refs/")
        looks_local = text.startswith(("/", ".", "~")) or text.endswith("/") or nested
        if looks_local or repository.count("/") != 1:
            return None
        if not _REPOSITORY.fullmatch(repository) or (at and not _REVISION.fullmatch(revision)):
            raise ValueError(
                f"{text!r} is no directory, and no checkpoint of the hub could have this name; "
                "that is owner/name or owner/name@revision."
            )
        return cls(text, repository, revision or MAIN)


def locate(
    path_or_name: str | Path,
    *,
    kind: Kind = MODEL,
    check: Callable[[Path], object] | None = None,
) -> Path | None:
    """The directory of a checkpoint, fetched from the hub if need be.

    Args:
      path_or_name: a directory, which may be a repository in the hub's cache (`models--...`), or
        a text that names a checkpoint of the hub.
      kind: what it is to be.
      check: raises a ValueError if the small files in a directory show that it cannot be used.

    Returns:
      The directory, or None if there is none and nothing of the hub could be meant.

    Raises:
      OSError, ValueError: it is named but cannot be had; one sentence says why.
    """
    path = Path(os.path.expanduser(path_or_name))
    if path.is_dir():
        return _inside_cache(path)
    if path.exists():
        return None
    name = Name.parse(path_or_name) if isinstance(path_or_name, str) else None
    if name is None:
        return None
    from dlm_jax.weights import fetch

    return fetch.fetch(name, kind=kind, check=check)


def name_of(path_or_name: str | Path) -> str:
    """What a model is called: the last part of its path, or the repository that it is a copy of.

    Args:
      path_or_name: a directory, also in the hub's cache, or a name on the hub.
    """
    path = Path(os.path.expanduser(path_or_name))
    if not path.exists():
        return Path(str(path_or_name).partition("@")[0]).name
    path = path.resolve()
    if path.parent.name == "snapshots":
        path = path.parent.parent
    elif path.name == "snapshots":
        path = path.parent
    return path.name.split("--")[-1] if path.name.startswith(PREFIX) else path.name


def _inside_cache(directory: Path) -> Path:
    """The snapshot in a repository of the hub's cache; any other directory is what it is.

    Raises:
      FileNotFoundError, ValueError: it holds none, or several and does not say which is meant.
    """
    path = directory.absolute()
    folder = path.parent if path.name == "snapshots" else path
    is_repository = folder.name.startswith(PREFIX) or (folder / "blobs").is_dir()
    if not is_repository or path.parent.name == "snapshots" or (path / MODEL.config).exists():
        return directory
    snapshots = folder / "snapshots"
    found = sorted(entry.name for entry in snapshots.iterdir()) if snapshots.is_dir() else []
    if not found:
        raise FileNotFoundError(
            f"{folder} is a folder of the hub's cache without a snapshot; fetch the model again."
        )
    commit = commit_of(folder, MAIN)
    if commit is None and len(found) > 1:
        raise ValueError(
            f"{folder} holds several snapshots, and nothing says which is meant; give the path of "
            f"one of them: {', '.join(str(snapshots / name) for name in found)}."
        )
    commit = commit or found[0]
    if commit not in found:
        raise FileNotFoundError(
            f"{folder} lacks the snapshot {commit} that its refs/{MAIN} names; fetch the model "
            "again."
        )
    return snapshots / commit


def commit_of(folder: Path, revision: str) -> str | None:
    """Which commit a revision is, as far as the cache knows; its snapshot need not be there."""
    if _COMMIT.fullmatch(revision):
        return revision
    with contextlib.suppress(OSError):
        return (folder / "refs" / revision).read_text(encoding="utf-8").strip() or None
    return None


def wanted(snapshot: Path, kind: Kind, files: Collection[str]) -> list[str]:
    """Which of a repository's files a checkpoint consists of, as far as the index is there."""
    names = [kind.config, *(name for name in SMALL if name in files and name != kind.config)]
    if kind.weights in files or kind.index not in files:
        names.append(kind.weights)
    elif (snapshot / kind.index).is_file():
        names += shard_names(snapshot / kind.index)
    if kind == MODEL and ADAPTER.weights in files:
        names.append(ADAPTER.weights)
    return names
