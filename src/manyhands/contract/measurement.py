"""One record for what a run cost and for what a model says it will cost: step time in parts, memory, bytes."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Spread:
    """Median with the tenth and ninetieth percentile, in seconds."""

    median: float
    p10: float
    p90: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Of a sample; all zero for an empty one."""
        if not values:
            return cls(0.0, 0.0, 0.0)
        ordered = sorted(values)
        at = [ordered[min(len(ordered) - 1, int(q * len(ordered)))] for q in (0.5, 0.1, 0.9)]
        return cls(*at)


@dataclass(frozen=True)
class StepParts:
    """Where a step's time goes, in seconds (means over the steps of rank 0)."""

    compute: float = 0.0
    communicate: float = 0.0
    wait: float = 0.0
    update: float = 0.0


@dataclass(frozen=True)
class Measurement:
    """``summary.json``: what one plan did (or, from the model, would do) on one task."""

    strategy: str
    model: str
    data: str
    workers: int
    transport: str
    device: str
    parameters: int
    global_batch: int
    steps: int
    epochs: float
    seed: int
    train_loss: float | None
    test_accuracy: float | None
    samples_per_s: float
    step_s: Spread
    step_parts_s: StepParts
    sent_B_per_step: float  # payload, under the reference algorithms: the same on every transport
    moved_B_per_step: float | None  # what the transport really moved, where it knows
    peak_memory_B: int
    wall_s: float
    versions: dict[str, str] = field(default_factory=dict)
    #: Mean time that each worker spent waiting for others in a step, in rank order (of those left at the end).
    wait_s_by_worker: list[float] = field(default_factory=list)
    #: By how many updates of others (under ssp: steps) the parameters of a gradient were behind; None: nobody counts.
    staleness_mean: float | None = None
    staleness_max: int | None = None
    #: Of a pipeline: of a step's time the part in which a worker computed nothing, neither forward nor backward nor
    #: update, its median over the steps, in rank order; the same of the schedule with stages of equal cost; and
    #: (p − 1)/(m + p − 1).
    bubble_by_worker: list[float] = field(default_factory=list)
    bubble_of_schedule: float | None = None
    bubble_of_flush: float | None = None
    #: Of compressed exchanges, worker 0's (see `communication.compression.meter`): bytes of dense ones over those sent;
    #: ‖x − C(x)‖ / ‖x‖ and ‖C(x)‖² / ‖x‖² in the exchanges that were looked at; what a step spent making and reading
    #: payloads. None: nothing was compressed.
    compression_ratio: float | None = None
    compression_error: float | None = None
    compression_kept: float | None = None
    compression_s: float | None = None

    def as_dict(self) -> dict[str, Any]:
        """Plain values only, ready for JSON."""
        return dataclasses.asdict(self)
