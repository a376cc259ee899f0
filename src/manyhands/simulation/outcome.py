"""What a simulated run comes to."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from manyhands.communication.compression.meter import Meter


@dataclass
class Clocks:
    """Virtual times of a run, in seconds from the first step's beginning."""

    #: When rank 0 had done each step.
    ends: list[float] = field(default_factory=list)
    #: Where every rank's clock stood at last.
    last: Sequence[float] = ()
    wait_s: Sequence[float] = ()  # by rank, all in all
    compute_s: float = 0.0  # of rank 0, all in all, and so below
    communicate_s: float = 0.0
    update_s: float = 0.0
    staleness: Counter[int] = field(default_factory=Counter)
    sent_B: int = 0  # by rank 0
    compression: Meter = field(default_factory=Meter)  # of rank 0; its time is no virtual one

    @property
    def step_s(self) -> list[float]:
        """How long each step of rank 0 took."""
        return [b - a for a, b in zip([0.0, *self.ends], self.ends, strict=False)]


@dataclass
class Outcome:
    """A run in virtual time; ``history`` and the parameters only where there were numbers."""

    clocks: Clocks
    steps: int
    samples: int
    epochs: float
    how: str  # values | folded | vectors | ranks
    history: list[dict[str, Any]] = field(default_factory=list)
    state: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
