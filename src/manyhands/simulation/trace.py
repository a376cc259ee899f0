"""Who did what when in virtual time; the file is that of a real run (`training.trace`)."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from manyhands.communication.transports.events import Elapsed, Event, Meeting
from manyhands.communication.transports.inprocess import InProcessCommunicator
from manyhands.simulation.folded import FoldedObserver, Vector
from manyhands.training.trace import MOST, Span, write


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

    def write(self, file: Path) -> None:
        """As JSON."""
        workers = sorted({span.rank for span in self.spans})
        write(file, self.spans, workers, title="simulated", said={"left_out": self.left_out, "clock": "virtual"})
