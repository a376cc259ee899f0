"""What a calibration found, for a person: the host's figures, a line a transport and number of ranks, the notes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from manyhands.cli.summary import seconds
from manyhands.cluster.measured import Curve
from manyhands.studies.table import in_bytes as size

if TYPE_CHECKING:
    from manyhands.modelling.calibration import Calibration

#: Of each transport these are shown, the first of them that was measured.
_SHOWN = ("all_reduce", "send", "barrier")


def lines(found: Calibration) -> list[str]:
    """The figures, what some operations take, what a reader is to know, and where the file is."""
    cluster = found.cluster
    measured, device, node = cluster.measured, cluster.device, cluster.node
    assert measured is not None
    rows = [
        ("memory", f"{device.memory_bandwidth} for one process, {node.memory_bandwidth} for {cluster.devices}"),
        ("arithmetic", ", ".join(f"{dtype} {figure}" for dtype, figure in device.peak.items()) + " a core"),
        ("dispatch", f"{device.dispatch}; jitter {100 * (device.jitter.si if device.jitter else 0):.2g} %"),
    ]
    if probe := measured.host.get("probe_us"):
        rows.append(("a cache line", f"{probe['median']} us, {probe['least']} to {probe['most']}: the host's state"))
    rows += [(f"{name}, {ranks}", text) for name, ranks, text in _transports(measured.curves)]
    rows.append(("tables", f"{len(measured.curves)} curves, {len(measured.operators):,} operators"))
    width = max(len(name) for name, _ in rows)
    head = f"{cluster.about}, in {seconds(found.took_s)}"
    said = [f"  note: {note}" for note in measured.notes]
    return [head, *(f"  {name:<{width}}  {text}" for name, text in rows), *said, f"written to {found.path}"]


def _transports(curves: tuple[Curve, ...]) -> Iterator[tuple[str, str, str]]:
    for transport, ranks in dict.fromkeys((c.transport, c.ranks) for c in curves):
        here = {c.operation: c for c in curves if (c.transport, c.ranks) == (transport, ranks)}
        texts = [_in_words(name, here[name]) for name in _SHOWN if name in here]
        crowded = " (more workers than cores)" if any(c.oversubscribed for c in here.values()) else ""
        yield transport, f"{ranks} workers", ", ".join(texts) + crowded


def _in_words(name: str, curve: Curve) -> str:
    if len(curve.sizes_B) == 1:
        return f"{name} {seconds(curve.seconds[0])}"
    ends = (0, -1)
    return f"{name} " + " … ".join(f"{seconds(curve.seconds[i])} ({size(curve.sizes_B[i])})" for i in ends)
