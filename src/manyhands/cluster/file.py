"""A cluster as a TOML file: read with every figure checked, and written.

    name = "mine"
    about = "two office machines"
    [device]
    name = "a core of a Ryzen 7"
    kind = "cpu"
    memory = { value = 8, unit = "GB", source = "dmidecode" }
    …
    [device.peak]
    float32 = { value = 100, unit = "GFLOP/s", source = "measured" }
    [node]
    devices = { value = 8, unit = "count", source = "lscpu" }
    [link.within]
    …

The tables that `manyhands calibrate` adds under [measured] are the business of `tables`. Whatever is missing, unknown,
absurd or in another unit is refused with the line, the unit and what would be plausible.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

import tomli_w

from manyhands.cluster import clusters
from manyhands.cluster.description import LEVELS, Cluster, Device, Link, Node, plausible, required
from manyhands.cluster.figure import Figure, Plausible
from manyhands.cluster.measured import Measured
from manyhands.cluster.tables import measured_from, measured_text
from manyhands.errors import BadInput, UnknownName

KINDS = ("cpu", "cuda")
_FIGURE = ("value", "unit", "source", "spread")


def load(name: str | os.PathLike[str]) -> Cluster:
    """The ready cluster of this name, or the one in this file (whatever ends in ``.toml`` or has a folder)."""
    text = os.fspath(name)
    if text.endswith(".toml") or os.sep in text:
        return read(text)
    if text not in clusters and ":" not in text:
        raise UnknownName("cluster", text, clusters, also="Your own is a file: --cluster mine.toml.")
    made: Cluster = clusters.load(text)()
    return made


def read(path: str | os.PathLike[str]) -> Cluster:
    """The cluster that a file describes; every figure is checked."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        reason = e.strerror if isinstance(e, OSError) else "it is not UTF-8 text"
        raise BadInput(
            f"cluster file {os.fspath(path)}: it cannot be read: {reason}. Ready ones: {', '.join(clusters)}."
        ) from None
    return _parsed(text, os.fspath(path))


@functools.lru_cache(maxsize=4)
def _parsed(text: str, name: str) -> Cluster:
    # A calibration with its operators takes half a second to parse, and each prediction asks for it.
    return parse(text, name=name)


def parse(text: str, *, name: str = "(text)") -> Cluster:
    """The cluster that ``text`` describes; ``name`` is what messages call it."""
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as e:
        raise BadInput(f"cluster file {name}: it is no TOML: {e}.") from None
    return _Reader(text, name).cluster(table)


def write(cluster: Cluster, path: str | os.PathLike[str]) -> None:
    """As `read` reads it back to an equal `Cluster`. Whole or not at all."""
    beside = Path(f"{os.fspath(path)}.{os.getpid()}.tmp")
    try:
        beside.write_text(dumps(cluster), encoding="utf-8")
        beside.replace(path)
    except OSError as e:
        raise BadInput(f"cluster file {os.fspath(path)}: it cannot be written: {e.strerror}.") from None
    finally:  # also of Ctrl-C
        with contextlib.suppress(OSError):
            beside.unlink(missing_ok=True)


def dumps(cluster: Cluster) -> str:
    """The text of a cluster file."""
    table = _table(cluster)
    table["link"] = table.pop("links")
    return tomli_w.dumps(table) + ("" if cluster.measured is None else "\n" + measured_text(cluster.measured))


def _table(described: Any) -> dict[str, Any]:
    found = {}
    for f in dataclasses.fields(described):
        value = getattr(described, f.name)
        if isinstance(value, Measured):
            continue
        if dataclasses.is_dataclass(value):
            value = _table(value)
        elif isinstance(value, Mapping):
            value = {k: _table(v) if dataclasses.is_dataclass(v) else v for k, v in value.items()}
        if value is not None and value != {}:
            found[f.name] = value
    return found


class _Reader:
    """Reads one file and knows its lines."""

    def __init__(self, text: str, name: str) -> None:
        self._name = name
        self._lines = _lines(text)

    def cluster(self, table: Mapping[str, Any]) -> Cluster:
        self._only(table, ("name", "about", "nodes", "device", "node", "link", "versions", "measured"), ())
        links = self._section(table, ("link",))
        self._only(links, LEVELS, ("link",))
        versions = self._section(table, ("versions",))
        if wrong := next((k for k, v in versions.items() if not isinstance(v, str)), None):
            self._refuse(("versions", wrong), "a version is text.")
        for what in ("device", "node"):
            if what not in table:
                self._refuse((), f"there is no [{what}]; a cluster file has [device], [node] and [link.within].")
        return Cluster(
            name=self._text(table, "name", ()),
            about=self._text(table, "about", ()),
            nodes=self._optional(Cluster, table, "nodes", ()),
            device=self._described(Device, self._section(table, ("device",)), ("device",)),
            node=self._described(Node, self._section(table, ("node",)), ("node",)),
            links={
                level: self._described(Link, self._section(links, (level,), ("link",)), ("link", level))
                for level in LEVELS
                if level in links
            },
            versions=dict(versions),
            measured=self._measured(table),
        )

    def _measured(self, table: Mapping[str, Any]) -> Measured | None:
        if "measured" not in table:
            return None
        return measured_from(self._section(table, ("measured",)), self._only, self._refuse)

    def _described(self, kind: type[Any], table: Mapping[str, Any], at: tuple[str, ...]) -> Any:
        names = [f.name for f in dataclasses.fields(kind)]
        self._only(table, names, at)
        rules = plausible(kind)
        made: dict[str, Any] = {}
        for name in names:
            if name not in table:
                if name in required(kind):
                    self._missing(at, name, rules.get(name))
            elif name == "peak":
                peaks = self._section(table, (name,), at)
                if not peaks:
                    self._missing((*at, name), "float32", rules[name])
                made[name] = {d: self._figure(peaks[d], (*at, name, d), rules[name]) for d in peaks}
            elif name in rules:
                made[name] = self._figure(table[name], (*at, name), rules[name])
            else:
                made[name] = self._text(table, name, at)
        if "kind" in made and kind is Device and made["kind"] not in KINDS:
            self._refuse((*at, "kind"), f"{made['kind']!r} is no kind of device: {' or '.join(KINDS)}.")
        return kind(**made)

    def _optional(self, kind: type[Any], table: Mapping[str, Any], name: str, at: tuple[str, ...]) -> Figure | None:
        return self._figure(table[name], (*at, name), plausible(kind)[name]) if name in table else None

    def _figure(self, said: Any, at: tuple[str, ...], rule: Plausible) -> Figure:
        if not isinstance(said, dict):
            self._refuse(at, f"a figure has value, unit and source; e.g. {_example(at[-1], rule)}.")
        self._only(said, _FIGURE, at)
        for part in ("value", "unit", "source"):
            if part not in said:
                self._refuse(at, f"its {part} is missing; e.g. {_example(at[-1], rule)}.")
        value, unit, source, spread = said["value"], said["unit"], said["source"], said.get("spread")
        if isinstance(value, bool) or not isinstance(value, int | float):
            self._refuse((*at, "value"), f"{value!r} is no number; {rule.about} is, e.g. {rule.example}.")
        if not isinstance(source, str) or not source.strip():
            self._refuse((*at, "source"), "the source is empty: say where the figure is from, or that it is assumed.")
        if isinstance(spread, bool) or not (spread is None or (isinstance(spread, int | float) and 0 <= spread < 10)):
            self._refuse((*at, "spread"), f"{spread!r} is no spread; it is relative, 0.02 for ±2 %.")
        if not isinstance(unit, str):
            self._refuse((*at, "unit"), f"{unit!r} is no unit; {rule.about} is given in {', '.join(rule.units)}.")
        if complaint := rule.complaint(value, unit):
            self._refuse(at, complaint)
        if rule.measures == "number" and value != int(value):
            self._refuse(at, f"{value:g} is no whole number.")
        return Figure(value, unit, source, spread)

    def _text(self, table: Mapping[str, Any], name: str, at: tuple[str, ...]) -> str:
        value = table.get(name)
        if not isinstance(value, str) or not value.strip():
            self._refuse((*at, name), f'it has to be said, as text; e.g. {name} = "…".')
        return value

    def _section(self, table: Mapping[str, Any], name: tuple[str], at: tuple[str, ...] = ()) -> Mapping[str, Any]:
        value = table.get(name[0], {})
        if not isinstance(value, dict):
            self._refuse((*at, *name), f"[{'.'.join((*at, *name))}] is a table.")
        return value

    def _only(self, table: Mapping[str, Any], names: Any, at: tuple[str, ...]) -> None:
        for key in table:
            if key not in names:
                where = f"cluster file {self._name}, line {self._line((*at, key))}"
                raise UnknownName(f"entry of {'.'.join(at) or 'a cluster file'} ({where})", key, names)

    def _missing(self, at: tuple[str, ...], name: str, rule: Plausible | None) -> NoReturn:
        example = f'{name} = "…"' if rule is None else _example(name, rule)
        between = "" if rule is None else f" {rule.about[0].upper()}{rule.about[1:]} lies between {rule.range()}."
        self._refuse(at, f"{name} is missing; e.g. {example}.{between}")

    def _refuse(self, at: tuple[str, ...], why: str) -> NoReturn:
        what = f": {'.'.join(at)}" if at else ""
        raise BadInput(f"cluster file {self._name}, line {self._line(at)}{what}: {why}")

    def _line(self, at: tuple[str, ...]) -> int:
        """Of an entry, or of the innermost table around it that is there."""
        while at and at not in self._lines:
            at = at[:-1]
        return self._lines.get(at, 1)


def _example(name: str, rule: Plausible) -> str:
    value, unit = rule.example.split(" ")
    return f'{name} = {{ value = {value}, unit = "{unit}", source = "…" }}'


_HEADER = re.compile(r"^\s*\[\s*([^\[\]]+?)\s*\]")
_ENTRY = re.compile(r"^\s*([A-Za-z0-9_.\-\"' ]+?)\s*=")


def _lines(text: str) -> dict[tuple[str, ...], int]:
    """Where each entry stands, as tomllib does not tell: headers and keys at the start of a line.

    Rows of an array of arrays that begin on a line of their own are numbered from 0.
    """
    found: dict[tuple[str, ...], int] = {}
    table: tuple[str, ...] = ()
    rows: tuple[str, ...] | None = None  # the array whose rows follow
    count = 0
    for number, line in enumerate(text.splitlines(), 1):
        if rows is not None and line.lstrip().startswith("["):
            found[*rows, str(count)] = number
            count += 1
        elif header := _HEADER.match(line):
            table, rows = _path(header.group(1)), None
            found.setdefault(table, number)
        elif entry := _ENTRY.match(line):
            keys = _path(entry.group(1))
            for i in range(len(keys)):
                found.setdefault((*table, *keys[: i + 1]), number)
            here = (*table, *keys)
            rows, count = (here, 0) if line.rstrip().endswith("= [") else (None, 0)
        elif line.strip() == "]":
            rows = None
    return found


def _path(dotted: str) -> tuple[str, ...]:
    return tuple(part.strip().strip("\"'") for part in dotted.split("."))
