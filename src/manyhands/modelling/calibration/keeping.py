"""Where a calibration is kept, and whether it still holds.

In the user's cache, a file for each machine and set of versions. A machine is known by its processor, cores, memory and
kernel and not by its name: a container has another name every day, and nodes of a cluster that share a home may share a
calibration if they are alike.
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from manyhands.cluster import Cluster, read, write
from manyhands.cluster.file import dumps, parse
from manyhands.communication import futex
from manyhands.data.places import cache
from manyhands.errors import BadInput, ManyhandsError
from manyhands.training import environment
from manyhands.training.conclusion import versions

#: What of a machine is compared, as the host table has it.
_MACHINE = ("processor", "cores", "memory_GB", "kernel")


def processor() -> str:
    """Its name, as the system has it."""
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found.group(1).strip() if found else platform.processor() or platform.machine()


def machine() -> dict[str, Any]:
    """This one: processor, cores for this process, memory, kernel."""
    memory_B = environment.memory_B()
    return {
        "processor": processor(),
        "cores": futex.cores(),
        "memory_GB": round((memory_B or 0) / 1e9),
        "kernel": platform.release(),
    }


def key() -> str:
    """The name of this machine's and these versions' file."""
    text = repr(sorted({**machine(), **versions()}.items()))
    name = re.sub(r"[^a-z0-9]+", "-", processor().lower()).strip("-")[:40] or "host"
    return f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"


def place() -> Path:
    """The file of the cache that is written here and now, whether or not it is there."""
    return cache("calibration") / f"{key()}.toml"


def stale(cluster: Cluster) -> str | None:
    """Why a calibration does not hold here: another machine, other versions; None: it holds."""
    if cluster.measured is None:
        return f"cluster {cluster.name} has no [measured] tables: it is a specification, not a calibration"
    host, here = cluster.measured.host, machine()
    for name in _MACHINE:
        if host.get(name) != here[name]:
            return f"it was measured on another machine: {name} {host.get(name)!r} there, {here[name]!r} here"
    for name, version in versions().items():
        if cluster.versions.get(name) != version:
            return f"it was measured with {name} {cluster.versions.get(name, 'unknown')}, here is {version}"
    return None


@dataclass(frozen=True)
class Found:
    """What the cache holds for this machine: a calibration that holds, or why there is none."""

    cluster: Cluster | None
    reason: str = ""


def look() -> Found:
    """Ask the cache. A file that cannot be read, or is of another machine or other versions, is a reason."""
    path = place()
    if path.is_file():
        try:
            cluster = read(path)
        except ManyhandsError as e:
            return Found(None, f"{e} Measure anew: manyhands calibrate.")
        why = stale(cluster)
        return Found(cluster) if why is None else Found(None, f"{path}: {why}. Measure anew: manyhands calibrate.")
    others = sorted(path.parent.glob("*.toml"), key=lambda p: p.stat().st_mtime) if path.parent.is_dir() else []
    if not others:
        return Found(None, "this machine has not been measured yet: manyhands calibrate.")
    try:
        why = stale(read(others[-1]))
    except ManyhandsError as e:
        why = str(e)
    return Found(None, f"the newest calibration, {others[-1]}, does not hold here: {why}. Run manyhands calibrate.")


def cached() -> Cluster | None:
    """This machine's calibration, or None where there is none that holds; `look` says why."""
    return look().cluster


def check_writable(path: Path) -> None:
    """Raise `BadInput` now rather than after two minutes of measuring."""
    beside = path.with_name(f".{path.name}.{os.getpid()}.try")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        beside.touch()
        beside.unlink()
        if path.is_dir():
            raise IsADirectoryError(21, "it is a folder")
    except OSError as e:
        raise BadInput(
            f"the calibration cannot be written to {path}: {e.strerror}. Name a file that can be: --out machine.toml."
        ) from None


def keep(cluster: Cluster, path: Path) -> None:
    """Whole or not at all; figures that nobody would believe are refused now and not when they are needed."""
    parse(dumps(cluster), name=os.fspath(path))
    write(cluster, path)
