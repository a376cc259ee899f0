"""What a run's figures depend on beside its plan: the machine, and how busy that was when the run began."""

from __future__ import annotations

import functools
import os
import platform
import socket
import time
import traceback
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from manyhands.communication import futex
from manyhands.contract import Measurement
from manyhands.errors import BadInput, WorkerFailed
from manyhands.plan import Plan
from manyhands.studies.grid import Cell
from manyhands.studies.row import Row, Status


@dataclass(frozen=True)
class Started:
    """A run that has begun; `row` says how it ended."""

    study: str
    cell: Cell
    repeat: int
    at: str
    load_average: float
    clock: float

    @classmethod
    def now(cls, study: str, cell: Cell, repeat: int) -> Started:
        """Look at the clock and at the load."""
        load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
        return cls(study, cell, repeat, datetime.now(UTC).isoformat(timespec="seconds"), load, time.monotonic())

    def row(
        self,
        status: Status,
        *,
        plan: Plan | None = None,
        reason: str = "",
        traceback: str = "",
        measurement: Measurement | None = None,
        history: list[dict[str, Any]] | None = None,
        noise: dict[str, float] | None = None,
        simulated_on: str = "",
    ) -> Row:
        """The run's row; ``plan`` is the one decided, None where it did not come to that."""
        return Row(
            study=self.study,
            cell=self.cell.id,
            repeat=self.repeat,
            status=status,
            task=dict(self.cell.task),
            plan=dict(self.cell.plan),
            workers=plan.workers if plan else None,
            threads=plan.threads if plan else None,
            transport=plan.transport if plan else None,
            cores=futex.cores(),
            host=socket.gethostname(),
            processor=processor(),
            started_at=self.at,
            seconds=time.monotonic() - self.clock,
            load_average=self.load_average,
            measure=self.cell.measure,
            reason=reason,
            traceback=traceback,
            history=history or [],
            noise=noise,
            simulated_on=simulated_on,
            measurement=measurement,
        )

    def not_done(self, e: Exception, *, plan: Plan | None = None) -> Row:
        """The row of a run that came to nothing."""
        if isinstance(e, BadInput):
            return self.row("refused", plan=plan, reason=str(e))
        own = e.traceback if isinstance(e, WorkerFailed) else ""
        text = own or "".join(traceback.format_exception(e))
        return self.row("failed", plan=plan, reason=str(e) or type(e).__name__, traceback=text)


@functools.cache
def processor() -> str:
    """The processor's own name where Linux tells it, else its architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return next(filter(None, names), platform.machine())
