"""What a prediction of memory says: the parts of each worker, and their totals."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Footprint:
    """Bytes of one worker at its peak, which is in ``phase``: loading, building or training."""

    rank: int
    parameters_B: int
    gradients_B: int
    optimizer_B: int
    activations_B: int
    buffers_B: int
    temporaries_B: int
    mapped_B: int
    data_B: int
    process_B: int
    allocator_B: int
    resident_B: int
    phase: str

    @property
    def tensors_B(self) -> int:
        """What a device's memory must hold: the model's own, without data set, process and allocator."""
        return (
            self.parameters_B
            + self.gradients_B
            + self.optimizer_B
            + self.activations_B
            + self.buffers_B
            + self.temporaries_B
        )

    def as_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {**dataclasses.asdict(self), "tensors_B": self.tensors_B}


@dataclass(frozen=True)
class Memory:
    """All workers of a plan; those that differ in nothing but their batches are told once."""

    workers: tuple[Footprint, ...]

    @property
    def resident_B(self) -> int:
        """The largest resident set of any worker: what a run's ``peak_memory_B`` says."""
        return max(w.resident_B for w in self.workers)

    @property
    def tensors_B(self) -> int:
        """Of the worker with most."""
        return max(w.tensors_B for w in self.workers)

    @property
    def largest(self) -> Footprint:
        """The worker with most."""
        return max(self.workers, key=lambda w: w.resident_B)

    def as_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return {
            "resident_B": self.resident_B,
            "tensors_B": self.tensors_B,
            "workers": [w.as_dict() for w in self.workers],
        }
