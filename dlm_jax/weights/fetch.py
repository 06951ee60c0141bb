"""Fetches a checkpoint from the Hugging Face hub, unless the hub's cache here has all of it.

`huggingface_hub` does it, into its cache and under the environment variables that all its users
know. Of a repository comes only what a checkpoint consists of: never code, never pickles. The small
files are first, so that a model that cannot be used is refused before its weights are fetched.
"""

import contextlib
import errno
import hashlib
import importlib.util
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from dlm_jax.tokenizer import FILES as TOKENIZER
from dlm_jax.weights import hub


def fetch(
    name: hub.Name, *, kind: hub.Kind = hub.MODEL, check: Callable[[Path], object] | None = None
) -> Path:
    """The directory with a checkpoint of the hub: from the cache if it is all there.

    Args:
      name: which.
      kind: as in `hub.locate`.
      check: as in `hub.locate`.

    Raises:
      OSError, ValueError: as in `hub.locate`.
    """
    repository = _Repository(name, kind)
    if repository.missing() == []:
        return repository.snapshot
    try:
        repository.fetch_small()
        repository.check()
        if check is not None:
            check(repository.snapshot)
        repository.fetch_weights()
    except _Unreachable as unreachable:
        # Somebody else may have cached the model without its tokenizer, and without a list.
        if repository.missing(whole=False) != []:
            raise FileNotFoundError(str(unreachable)) from None
    except KeyboardInterrupt:
        print(
            f"\n{name.text}: interrupted; the same command goes on where it stopped.",
            file=sys.stderr,
        )
        raise
    return repository.snapshot


class _Unreachable(Exception):
    """The hub cannot be asked; says so, and what is missing."""


class _Repository:
    """A repository of the hub, and what the cache has of it."""

    def __init__(self, name: hub.Name, kind: hub.Kind) -> None:
        self.name, self.kind = name, kind
        self._client, self._constants = _import()
        self._cache = Path(self._constants.HF_HUB_CACHE)
        self._endpoint = self._constants.ENDPOINT
        self._folder = self._cache / f"{hub.PREFIX}{name.repository.replace('/', '--')}"

    @property
    def commit(self) -> str | None:
        return hub.commit_of(self._folder, self.name.revision)

    @property
    def snapshot(self) -> Path:
        return self._folder / "snapshots" / str(self.commit)

    def missing(self, *, whole: bool = True) -> list[str] | None:
        """What the cache lacks of the checkpoint; None if it has nothing.

        Args:
          whole: whether one without a list of its files, which may lack any, is to have a
            tokenizer.
        """
        if self.commit is None or not self.snapshot.is_dir():
            return None
        listed = self._listed()
        files = set(os.listdir(self.snapshot) if listed is None else listed)
        wanted = hub.wanted(self.snapshot, self.kind, files)
        if whole and listed is None and self.kind == hub.MODEL and files.isdisjoint(TOKENIZER):
            wanted.append(TOKENIZER[0])
        return [name for name in wanted if not (self.snapshot / name).exists()]

    def _listed(self) -> Mapping[str, Any] | None:
        """The files of the repository and what is known of them, if the cache has the list."""
        if self.commit is None:
            return None
        try:
            tree = self._client.get_cached_repo_tree(self.name.repository, revision=self.commit)
        except self._client.errors.CachedRepoTreeNotFoundError:
            return None
        return {file.path: file for file in tree}

    def fetch_small(self) -> None:
        """Fetches everything but the weights, and the list of all files."""
        with self._told(), _quiet(self._client):
            self._client.snapshot_download(
                self.name.repository, revision=self.name.revision, allow_patterns=list(hub.SMALL)
            )

    def check(self) -> None:
        """Refuses a repository that is no checkpoint.

        Raises:
          FileNotFoundError, ValueError: it lacks something.
        """
        text, kind, listed = self.name.text, self.kind, self._listed()
        if listed is None:  # the network is gone, and the cache has but a part
            raise self._unreachable()
        if kind.config not in listed:
            others = [other for other in (hub.MODEL, hub.ADAPTER) if other.config in listed]
            told = f"; it holds {others[0].title}" if others else ""
            raise FileNotFoundError(
                f"{text} on the hub has no {kind.config}, which {kind.title} needs{told}."
            )
        if kind.weights not in listed and kind.index not in listed:
            pickles = any(file.endswith(".bin") for file in listed)
            told = (
                "has its weights as .bin files only, which can hold code and are not fetched"
                if pickles
                else "holds no weights"
            )
            raise FileNotFoundError(
                f"{text} on the hub {told}; it must have {kind.weights} or {kind.index}."
            )
        absent = [file for file in self._files() if file not in listed]
        if absent:
            raise FileNotFoundError(
                f"{text} on the hub is incomplete: {len(absent)} of the files that {kind.index} "
                f"names are missing, first: {absent[0]}."
            )

    def _files(self) -> list[str]:
        return hub.wanted(self.snapshot, self.kind, self._listed() or ())

    def fetch_weights(self) -> None:
        """Fetches what is still missing, one file after the other.

        One at a time, in this thread: so Ctrl-C ends it at once, and costs at most one file.
        """
        files, listed = self.missing() or [], self._listed() or {}
        self._check_space(files)
        for file in files:
            with self._told():
                if not sys.stderr.isatty():  # where the client draws no bar
                    size = listed[file].size / 1e9
                    print(f"fetching {file}, {size:.2f} GB ...", file=sys.stderr, flush=True)
                self._fetch(file)

    def _check_space(self, files: list[str]) -> None:
        needed = 0
        listed = self._listed() or {}
        for file in files:
            blob_id = listed[file].lfs.sha256 if listed[file].lfs else listed[file].blob_id
            blob = self._folder / "blobs" / blob_id
            if not blob.exists():
                needed += listed[file].size - _size(_partial(blob))
        free = shutil.disk_usage(self._folder).free
        if free < needed:
            raise OSError(
                f"{self._cache} has {free / 1e9:.1f} GB of free space, and {needed / 1e9:.1f} GB "
                f"of {self.name.text} are to be fetched; HF_HUB_CACHE can name another folder."
            )

    def _fetch(self, file: str) -> None:
        url = self._client.hf_hub_url(self.name.repository, file, revision=self.commit)
        facts = self._client.get_hf_file_metadata(url)
        can_xet = importlib.util.find_spec("hf_xet") and not self._constants.HF_HUB_DISABLE_XET
        if facts.etag and not (can_xet and facts.xet_file_data):
            self._fetch_blob(url, facts, file)
        # Links the blob, or fetches it in the way of Xet: many pieces at once, always anew.
        self._client.hf_hub_download(self.name.repository, file, revision=self.commit)

    def _fetch_blob(self, url: str, facts: Any, file: str) -> None:
        """Fetches a large file, or the rest of it: the hub's own client would begin anew."""
        from huggingface_hub.file_download import http_get
        from huggingface_hub.utils import WeakFileLock, build_hf_headers

        blob = self._folder / "blobs" / facts.etag
        lock = self._cache / ".locks" / self._folder.name / f"{facts.etag}.lock"
        for folder in (blob.parent, lock.parent):
            folder.mkdir(parents=True, exist_ok=True)
        with WeakFileLock(lock):
            if blob.exists():
                return
            partial = _partial(blob)
            with partial.open("ab") as target:
                start = target.tell()
                if facts.size is not None and start > facts.size:
                    start = target.truncate(0)
                http_get(
                    url,
                    target,
                    resume_size=start,
                    headers=build_hf_headers(),
                    expected_size=facts.size,
                    displayed_filename=file,
                )
            if start > 0 and not _is_what_it_says(partial, facts):
                partial.unlink()
                raise OSError(f"the parts of {file} do not fit together")
            partial.rename(blob)

    # --- what went wrong --------------------------------------------------------------------------

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        """Makes one sentence of whatever the hub's client and what it uses raise."""
        try:
            yield
        except Exception as error:
            told = self._explain(error)
        else:
            return
        raise told from None  # which would be pages about sockets

    def _explain(self, error: Exception) -> Exception:
        errors = self._client.errors
        if isinstance(error, errors.LocalEntryNotFoundError) and isinstance(
            error.__cause__, Exception
        ):
            error = error.__cause__  # why it looked for a local file
        text, repository, host = self.name.text, self.name.repository, self._endpoint
        status = getattr(getattr(error, "response", None), "status_code", None)
        reason = _reason(error)
        if isinstance(error, errors.OfflineModeIsEnabled):
            return self._unreachable()
        if isinstance(error, UnicodeEncodeError) or "bearer" in str(error).lower():
            return ValueError(
                "HF_TOKEN (or what `hf auth login` has kept) has characters that no token can have."
            )
        if isinstance(error, errors.GatedRepoError):
            return PermissionError(
                f"{text} is for those who accept its licence: do so at {host}/{repository}, and "
                "set HF_TOKEN to a token of that account (or use `hf auth login`)."
            )
        unseen = status == 401 and self._client.get_token() is None
        if unseen or isinstance(error, errors.RepositoryNotFoundError):
            return FileNotFoundError(
                f"There is no directory {text!r} here, and no repository {repository} on {host} "
                "that may be seen; if it is private, set HF_TOKEN (or use `hf auth login`)."
            )
        if isinstance(error, errors.RevisionNotFoundError):
            return FileNotFoundError(
                f"{repository} on {host} has no revision {self.name.revision!r}; it must be a "
                "branch, a tag or a commit."
            )
        if status in (401, 403):
            return PermissionError(
                f"{host} refuses access to {repository} ({status}); set HF_TOKEN to a valid token "
                "(or use `hf auth login`) that may read it."
            )
        if status is not None:
            return OSError(f"{host} answers {status} for {text}; try again later ({reason}).")
        number = error.errno if isinstance(error, OSError) else None
        if number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            return OSError(
                f"{self._cache} has no space left for {text}; make some, and the same command goes "
                "on where it stopped, or let HF_HUB_CACHE name another folder."
            )
        if number is not None and not isinstance(error, ConnectionError):
            return OSError(
                f"{self._cache} cannot be used ({reason}); HF_HUB_CACHE can name another folder."
            )
        if self.missing() is None or self._listed() is None:
            return self._unreachable(f" ({reason})")
        return ConnectionError(
            f"Fetching {text} from {host} broke off ({reason}); the same command goes on where it "
            "stopped."
        )

    def _unreachable(self, reason: str = "") -> _Unreachable:
        """What to say of a checkpoint that is not all here, where nothing can be fetched."""
        why = f"{self._endpoint} cannot be reached{reason}; try again with a connection"
        if self._constants.is_offline_mode():
            why = "HF_HUB_OFFLINE forbids to fetch it; unset that"
        missing = self.missing()
        if missing is None:
            text, cache = self.name.text, self._cache
            return _Unreachable(
                f"There is no directory {text!r} here, it is not in the hub's cache, {cache}, and "
                f"{why}."
            )
        lacks = ", ".join(missing[:1]) or "files"
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        return _Unreachable(
            f"{self.name.text} is incomplete in the hub's cache, {self._cache} (it lacks "
            f"{lacks}{more}), and {why}."
        )


def _import() -> tuple[Any, Any]:
    """The package and its constants."""
    try:
        import huggingface_hub
        from huggingface_hub import constants, errors, snapshot_download

        del errors, snapshot_download  # imported only when they are named
    except Exception as error:  # such as a variable of its own that is no number
        raise ValueError(
            f"huggingface_hub cannot be used ({_reason(error)}); the HF_ variables must suit it."
        ) from error
    return huggingface_hub, constants


@contextlib.contextmanager
def _quiet(client: Any) -> Iterator[None]:
    """Keeps the client from warning of what is told in one sentence anyway."""
    logging = client.utils.logging
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)


def _reason(error: Exception) -> str:
    """The gist of an error."""
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return line.rstrip(".")[:200] or type(error).__name__


def _partial(blob: Path) -> Path:
    return blob.with_name(f"{blob.name}.incomplete")


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _is_what_it_says(path: Path, facts: Any) -> bool:
    """Whether a file has the right size and, if the hub tells it, the right checksum."""
    if facts.size is not None and _size(path) != facts.size:
        return False
    if not re.fullmatch(r"[0-9a-f]{64}", facts.etag):
        return True
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == facts.etag
