"""A hub on the loopback in place of the real one, and a cache of its own."""

from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import constants
from loopback_hub import NAME, TINY, LoopbackHub, reach


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """The hub's cache, and nothing else of what the environment says."""
    cache = tmp_path / "cache"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1024)
    for variable in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.chdir(tmp_path)
    return cache


@pytest.fixture
def hub(cache, monkeypatch) -> Iterator[LoopbackHub]:
    with LoopbackHub() as hub:
        reach(hub.url, monkeypatch)
        hub.add(NAME, TINY)
        yield hub
    huggingface_hub.close_session()
