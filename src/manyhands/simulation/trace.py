"""Who did what when, for chrome://tracing and Perfetto: one row a worker, of compute, communicate, update and wait.

The file is the Trace Event Format's JSON (Google, 2016): complete events, ``ts`` and ``dur`` in µs of virtual time.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from manyhands.communication.transports.events import Elapsed, Event, Meeting
from manyhands.communication.transports.inprocess import InProcessCommunicator
from manyhands.errors import BadInput
from manyhands.simulation.folded import FoldedObserver, Vector

#: More make a file that no viewer opens (100 bytes each).
MOST = 1_000_000
_COLOURS = {"compute": "good", "update": "olive", "wait": "terrible", "communicate": "thread_state_running"}


class Span(NamedTuple):
    """Part of a worker's time."""

    rank: int
    kind: str  # compute | update | communicate | wait
    name: str
    begun: float
    ended: float
    step: int | None


class Spans:
    """The spans of a run, up to `MOST`."""

    def __init__(self) -> None:
        self.spans: list[Span] = []
        self.left_out = 0
        self.step: int | None = None  # for `folded`
        self.begun = False  # what is set up is no part of the run

    def clear(self) -> None:
        """Forget all."""
        self.spans.clear()
        self.left_out = 0

    def add(self, rank: int, kind: str, name: str, begun: float, ended: float, step: int | None) -> None:
        """One more, if it takes any time."""
        if ended <= begun:
            return
        if len(self.spans) < MOST:
            self.spans.append(Span(rank, kind, name, begun, ended, step))
        else:
            self.left_out += 1

    def observe(self, comm: InProcessCommunicator, event: Event, begun: float, ended: float) -> None:
        """What a `SimulatedWorld` tells."""
        rank, step = comm.world_rank, comm.step
        works_from = max(begun, ended - event.cost_s)
        name = event.operation.name if isinstance(event, Meeting) else str(event)
        self.add(rank, "wait", name, begun, works_from, step)
        own = isinstance(event, Elapsed) and event.doing in ("compute", "update")
        self.add(rank, name if own else "communicate", name, works_from, ended, step)

    def folded(self, workers: int) -> FoldedObserver:
        """What a `FoldedCommunicator` tells."""

        def observe(name: str, begun: Vector, waited: Vector, ended: Vector) -> None:
            rows = np.broadcast_to(np.stack([begun, begun + waited, ended]), (3, workers)).T.tolist()
            for rank, (t0, t1, t2) in enumerate(rows):
                self.add(rank, "wait", name, t0, t1, self.step)
                self.add(rank, name if name in ("compute", "update") else "communicate", name, t1, t2, self.step)

        return observe

    def as_dict(self) -> dict[str, Any]:
        """The Trace Event Format."""
        ranks = sorted({span.rank for span in self.spans})
        names = [
            {"ph": "M", "pid": 0, "tid": rank, "name": "thread_name", "args": {"name": f"worker {rank}"}}
            for rank in ranks
        ]
        events = [
            {
                "ph": "X",
                "pid": 0,
                "tid": span.rank,
                "name": span.name if span.kind != "wait" else f"wait: {span.name}",
                "cat": span.kind,
                "cname": _COLOURS[span.kind],
                "ts": span.begun * 1e6,
                "dur": (span.ended - span.begun) * 1e6,
                "args": {"step": span.step},
            }
            for span in self.spans
        ]
        return {"traceEvents": [*names, *events], "displayTimeUnit": "ms", "otherData": {"left_out": self.left_out}}

    def write(self, file: Path) -> None:
        """As JSON."""
        try:
            file.write_text(json.dumps(self.as_dict()), encoding="utf-8")
        except OSError as e:
            raise BadInput(f"--trace {file} cannot be written: {e.strerror or e}.") from None
