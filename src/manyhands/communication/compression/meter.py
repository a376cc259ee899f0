"""What compressing costs and what it keeps, counted beside training.

    ratio     what a dense exchange of the same vectors would have sent, over what was sent
    coding    time in `Compressor.aggregate` that no operation took: making payloads, and what was made of them
    error     ‖x − C(x)‖ / ‖x‖          x the gradient and what had not been sent before, C(x) what stands for it
    kept      ‖C(x)‖² / ‖x‖²            above 1 where a scheme draws by chance and is unbiased

Bytes and time are of every exchange. Error and kept mass want copies of the vector and passes over it, so they are
looked at in one exchange of `EVERY`, 1 % of a step or less. They are of this rank's own vector; of PowerSGD, whose C(x)
is that of all workers together, what the workers' gradients differ by counts as error. Votes have no magnitude, and
neither has their error.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor, linalg

#: Of so many exchanges of a vector one is looked at, and which (the residual has filled by then).
EVERY, FIRST = 64, 5


@dataclass
class Meter:
    """Sums over all vectors of a rank so far; differences of two are those of the time between."""

    dense_B: int = 0
    sent_B: int = 0
    coding_s: float = 0.0
    given: float = 0.0  # ‖x‖² of what was looked at
    left: float = 0.0  # ‖x − C(x)‖²
    kept_of: float = 0.0  # ‖C(x)‖²

    def __sub__(self, before: Meter) -> Meter:
        return Meter(*(getattr(self, f) - getattr(before, f) for f in self.__dataclass_fields__))

    def copy(self) -> Meter:
        """As it stands."""
        return Meter(*(getattr(self, f) for f in self.__dataclass_fields__))

    def looked(self, given: Tensor, left: Tensor) -> None:
        """Count a vector and what was not sent of it; ``given`` is overwritten."""
        self.given += _squared(given)
        self.left += _squared(left)
        self.kept_of += _squared(given.sub_(left))

    @property
    def used(self) -> bool:
        """Whether anything was compressed."""
        return self.dense_B > 0

    @property
    def ratio(self) -> float | None:
        """How many times fewer bytes were sent; None: nothing was."""
        return self.dense_B / self.sent_B if self.sent_B else None

    @property
    def error(self) -> float | None:
        """‖x − C(x)‖ / ‖x‖ over all that was looked at; None: nothing was, or all of it was zero."""
        return math.sqrt(self.left / self.given) if self.given else None

    @property
    def kept(self) -> float | None:
        """‖C(x)‖² / ‖x‖², likewise."""
        return self.kept_of / self.given if self.given else None


def is_looked_at(exchange: int) -> bool:
    """Whether this exchange of a vector, counted from 0, is one whose error is told."""
    return exchange % EVERY == FIRST


def _squared(x: Tensor) -> float:
    return float(linalg.vector_norm(x)) ** 2
