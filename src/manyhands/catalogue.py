"""What a package offers, as one table from name to module, and where each idea was published.

A package's ``__init__`` holds one `Catalogue`; it *is* the registry: the command line, the documentation tables and
the contract test iterate it. Nothing is imported until a name is asked for, so listing names costs no torch import.
Classes outside this project are reached as ``my_pkg.module:Class``.
"""

from __future__ import annotations

import importlib
import sys
import traceback
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from manyhands.errors import BadInput, UnknownName


@dataclass(frozen=True)
class Reference:
    """Where an idea comes from, precisely enough to find it."""

    authors: str
    title: str
    year: int
    where: str = ""
    survey: str = ""  # the section of the survey that treats it, e.g. "VI-A"

    def __str__(self) -> str:
        return ". ".join(x for x in (f"{self.authors} ({self.year})", self.title, self.where) if x)


class Catalogue(Mapping[str, str]):
    """Name → ``module:attribute``, in the survey's order; `load` imports one entry."""

    def __init__(self, kind: str, entries: Mapping[str, str]) -> None:
        self.kind = kind
        self._entries = dict(entries)

    def __getitem__(self, name: str) -> str:
        return self._entries[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def load(self, name: str) -> Any:
        """The class or factory called ``name``, or the one at ``my_pkg.module:attribute``."""
        if ":" in name:
            return import_object(name, kind=self.kind)
        if name not in self._entries:
            raise UnknownName(self.kind, name, self._entries, also="Your own is reached as my_pkg.module:Name.")
        return import_object(self._entries[name], kind=self.kind)


def import_object(path: str, *, kind: str = "object") -> Any:
    """Import ``pkg.module:attribute``; the current folder counts, as with ``python -m``."""
    module_name, _, attribute = path.partition(":")
    if not module_name or not attribute:
        raise BadInput(f"{kind} {path!r}: an object of your own is written my_pkg.module:name, e.g. my_models:build.")
    if str(Path.cwd()) not in sys.path and "" not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as e:
        if e.name is None or not (module_name == e.name or module_name.startswith(e.name + ".")):
            raise BadInput(f"{kind} {path!r}: importing {module_name} failed: {e}{_place(e)}") from e
        raise BadInput(
            f"{kind} {path!r}: there is no module {e.name!r} on the path or in {Path.cwd()}. Run from the folder that "
            "holds it, or install the package."
        ) from e
    except Exception as e:
        raise BadInput(f"{kind} {path!r}: importing {module_name} failed: {type(e).__name__}: {e}{_place(e)}") from e
    try:
        target: Any = module
        for part in attribute.split("."):
            target = getattr(target, part)
        return target
    except AttributeError:
        own = {n: v for n, v in vars(module).items() if getattr(v, "__module__", module_name) == module_name}
        names = [n for n, value in own.items() if not n.startswith("_") and not isinstance(value, ModuleType)]
        raise UnknownName(f"{kind} in {module_name}", attribute, names) from None


def _place(error: Exception) -> str:
    """Where an import went wrong: file and line of the innermost frame that is not the import machinery's."""
    if isinstance(error, SyntaxError):  # says so itself
        return ""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if "importlib" not in f.filename]
    last = frames[-1] if frames else None
    return "" if last is None or last.filename == __file__ else f" ({last.filename}, line {last.lineno})"
