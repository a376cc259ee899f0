"""Where a study keeps its runs: ``runs/CELL-REPEAT``, each what `train` writes to ``out``, with the last checkpoint.

A run's model can so be looked at, trained further (``manyhands train --resume --out …/runs/CELL-REPEAT --epochs N``)
or deleted when the disk is short: no figure of the study is read from here, rows hold all of them.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from manyhands.studies.rows import lost

RUNS = "runs"


@dataclass(frozen=True)
class RunFolder:
    """Of one cell and repeat."""

    study: Path
    name: str

    @property
    def path(self) -> Path:
        """The folder that `train` is given."""
        return self.study / RUNS / self.name

    @property
    def _first(self) -> Path:
        return self.study / RUNS / f".{self.name}-first"

    def begin(self) -> Path:
        """The folder, empty: what an interrupted or an earlier run left is gone."""
        with self._writable():
            for old in (self.path, self._first):
                if old.exists():
                    shutil.rmtree(old)
            self.path.mkdir(parents=True)
        return self.path

    def again(self) -> Path:
        """The folder, empty, for a second attempt; the first is set aside."""
        with self._writable():
            self.path.rename(self._first)
            self.path.mkdir()
        return self.path

    def keep(self, *, first: bool) -> None:
        """After a second attempt: leave only the one that counts."""
        with self._writable():
            if first:
                shutil.rmtree(self.path)
                self._first.rename(self.path)
            else:
                shutil.rmtree(self._first)

    @contextlib.contextmanager
    def _writable(self) -> Iterator[None]:
        try:
            yield
        except OSError as e:
            raise lost(self.study, e) from e
