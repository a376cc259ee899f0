"""How much of the processors a container may use: the control group's quota, which the affinity does not tell."""

from __future__ import annotations

import functools
from pathlib import Path


def cpu_quota(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> float | None:
    """How many cores' worth of time the control group (version 2 or 1) allows; None = no limit, or none to see."""
    try:
        groups = [line.split(":", 2) for line in own.read_text().splitlines()]
    except OSError:
        groups = []
    unified = next((path for number, _, path in groups if number == "0"), "/").lstrip("/")
    cpu = next((path for _, controllers, path in groups if "cpu" in controllers.split(",")), "/").lstrip("/")
    for folder in (root / unified, root):
        try:
            quota, period = (folder / "cpu.max").read_text().split()
            return None if quota == "max" else int(quota) / int(period)
        except (OSError, ValueError, ZeroDivisionError):
            continue
    for folder in (root / "cpu" / cpu, root / "cpu"):
        try:
            quota_us = int((folder / "cpu.cfs_quota_us").read_text())
            return None if quota_us <= 0 else quota_us / int((folder / "cpu.cfs_period_us").read_text())
        except (OSError, ValueError, ZeroDivisionError):
            continue
    return None


@functools.cache
def own_quota() -> float | None:
    """`cpu_quota` of this process, read once: whoever starts workers asks often, and a container keeps its quota."""
    return cpu_quota()
