"""A small Hugging Face hub on the loopback: it answers what `huggingface_hub` asks to download.

with LoopbackHub() as hub:
    hub.add("owner/name", {"config.json": b"{}"})
    ...  # with HF_ENDPOINT=hub.url
"""

import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

from huggingface_hub import constants
from places import CHECKPOINTS

NAME = "owner/LLaDA-tiny"
TINY = CHECKPOINTS / "llada-tiny"


class Request(NamedTuple):
    """What was asked."""

    method: str
    path: str
    range: str | None
    authorization: str | None


class Repository(NamedTuple):
    """Files by commit, and the commit of every branch."""

    commits: dict[str, dict[str, bytes]]
    refs: dict[str, str]


class LoopbackHub:
    """Serves repositories, and misbehaves on request.

    Attributes:
      url: where.
      requests: what was asked, in order.
      repositories: what there is.
      gated: repositories whose files need `token`; `private` ones are not even seen without it.
      breaks: file -> how many bytes of it arrive before the connection ends. Each holds once.
      stalls: file -> how many bytes of it arrive before an event must happen.
      broken: a status that all requests are answered with.
      cdn: another server, to which requests for large files are sent on.
    """

    def __init__(self) -> None:
        self.requests: list[Request] = []
        self.repositories: dict[str, Repository] = {}
        self.gated: set[str] = set()
        self.private: set[str] = set()
        self.token = "hf_loopback"
        self.breaks: dict[str, list[int]] = {}
        self.stalls: dict[str, tuple[int, threading.Event]] = {}
        self.broken: int | None = None
        self.cdn: LoopbackHub | None = None
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> "LoopbackHub":
        self._thread = threading.Thread(
            target=self._server.serve_forever, kwargs=dict(poll_interval=0.01), daemon=True
        )
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def add(self, name: str, source: Path | Mapping[str, bytes], branch: str = "main") -> str:
        """Commits files, given as a directory or by name; returns the commit."""
        if isinstance(source, Path):
            files = {path.name: path.read_bytes() for path in source.iterdir()}
        else:
            files = dict(source)
        told = json.dumps([(name, _etag(name, data)) for name, data in sorted(files.items())])
        commit = hashlib.sha1(told.encode()).hexdigest()
        repository = self.repositories.setdefault(name, Repository({}, {}))
        repository.commits[commit] = files
        repository.refs[branch] = commit
        return commit

    def asked(self, file: str, method: str = "GET") -> list[Request]:
        """The requests for a file."""
        return [
            request
            for request in self.requests
            if request.method == method and request.path.endswith(f"/{file}")
        ]


def _is_large(name: str) -> bool:
    return name.endswith((".safetensors", ".bin"))


def _etag(name: str, data: bytes) -> str:
    if _is_large(name):
        return hashlib.sha256(data).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    hub: LoopbackHub
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def log_message(self, format: str, *args: object) -> None:
        del format, args

    def _answer(self) -> None:
        hub, path = self.hub, unquote(urlsplit(self.path).path)
        authorization = self.headers.get("Authorization")
        asked = Request(self.command, path, self.headers.get("Range"), authorization)
        hub.requests.append(asked)
        if hub.broken is not None:
            return self._refuse(hub.broken, "Broken")
        match = re.fullmatch(
            r"(/api/models)?/([^/]+/[^/]+)/(revision|tree|resolve)/(refs/.+?/[^/]+|[^/]+)(?:/(.*))?",
            path,
        )
        if match is None:
            return self._refuse(404, "")
        _, name, verb, revision, file = match.groups()
        known = authorization == f"Bearer {hub.token}"
        if authorization and not known:
            return self._refuse(401, "", "Invalid credentials in Authorization header")
        if name not in hub.repositories or (name in hub.private and not known):
            return self._refuse(404, "RepoNotFound") if known else self._refuse(401, "")
        repository = hub.repositories[name]
        commit = repository.refs.get(revision, revision)
        if commit not in repository.commits:
            return self._refuse(404, "RevisionNotFound")
        files = repository.commits[commit]
        if verb == "revision":
            return self._send_json({"id": name, "sha": commit, "siblings": []})
        if verb == "tree":
            return self._send_json([_entry(file, data) for file, data in files.items()])
        if name in hub.gated and not known:
            return self._refuse(401, "GatedRepo")
        if file not in files:
            return self._refuse(404, "EntryNotFound")
        self._send_file(file, files[file], commit)

    def _send_json(self, value: object) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _refuse(self, status: int, code: str, message: str = "no") -> None:
        self._send(status, b"", {"X-Error-Code": code, "X-Error-Message": message})

    def _send_file(self, name: str, data: bytes, commit: str) -> None:
        headers = {"X-Repo-Commit": commit, "ETag": f'"{_etag(name, data)}"'}
        if self.hub.cdn is not None and _is_large(name):
            headers |= {"Location": self.hub.cdn.url + self.path, "X-Linked-Size": str(len(data))}
            return self._send(302, b"", headers | {"X-Linked-ETag": headers["ETag"]})
        headers |= {"Accept-Ranges": "bytes"}
        start = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")
        if start is None:
            return self._send(200, data, headers, name)
        first = int(start[1])
        headers |= {"Content-Range": f"bytes {first}-{len(data) - 1}/{len(data)}"}
        self._send(206, data[first:], headers, name)

    def _send(
        self, status: int, data: bytes, headers: Mapping[str, str], name: str | None = None
    ) -> None:
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if name in self.hub.stalls:
            count, event = self.hub.stalls[name]
            self.wfile.write(data[:count])
            event.wait(30)
            data = data[count:]
        breaks = self.hub.breaks.get(name or "")
        if not breaks:
            with contextlib.suppress(ConnectionError):  # whoever asked may be gone
                self.wfile.write(data)
            return
        self.wfile.write(data[: breaks.pop(0)])
        self.close_connection = True


def _entry(name: str, data: bytes) -> dict[str, object]:
    """A file in a list of files."""
    entry: dict[str, object] = dict(type="file", path=name, size=len(data), oid=_etag(name, data))
    if _is_large(name):
        entry["lfs"] = dict(oid=_etag(name, data), size=len(data), pointerSize=134)
    return entry


def reach(url: str, monkeypatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", url)
    template = url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
