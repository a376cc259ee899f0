"""No test of data reaches the network or the user's home."""

import urllib.error
from pathlib import Path
from typing import Any

import pytest

from manyhands.data import download


class Unreachable:
    """Counts who tries."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def __call__(self, url: str, timeout_s: float) -> Any:
        self.asked.append(url)
        raise urllib.error.URLError("no network in tests")


@pytest.fixture
def network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Unreachable:
    """An empty home, no stated folder, no network."""
    unreachable = Unreachable()
    monkeypatch.setattr(download, "_open", unreachable)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("MANYHANDS_DATA", raising=False)
    return unreachable
