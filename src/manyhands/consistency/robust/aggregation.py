"""What every rule is: n workers' vectors in, one vector out.

    x = A(x_1, …, x_n),   at most f of the x_p arbitrary

Rules see vectors, not gradients, and know neither workers nor transports: whoever holds a row for each worker
(`RobustWorker`, a server) may use them. Every vector has one voice: how many samples stand behind it is a claim of its
sender's, and a claim is what a rule must bear.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

from torch import Tensor

from manyhands.calling import described
from manyhands.catalogue import Reference
from manyhands.checks import is_whole
from manyhands.consistency.robust import aggregations
from manyhands.contract import is_finite
from manyhands.errors import Problem
from manyhands.grammar import format_description


@dataclass(frozen=True)
class Aggregation(ABC):
    """Description of a rule: comparable, printable (`str` parses back), and pure."""

    name: ClassVar[str]
    paper: ClassVar[Reference]
    #: What `fewest` follows from, for people.
    needs: ClassVar[str] = "n ≥ 1"

    def __str__(self) -> str:
        return format_description(self.name, self)

    @property
    def fewest(self) -> int:
        """How many vectors the rule needs to keep its promise."""
        return 1

    @abstractmethod
    def bears(self, vectors: int) -> int:
        """How many of so many vectors may hold anything at all, and the result still stays with the others."""

    def without(self, failed: int) -> Self:
        """The same rule for the rest, when ``failed`` of those that it bears are known and left out."""
        return self

    @abstractmethod
    def combine(self, parts: Sequence[Tensor]) -> list[Tensor]:
        """Of each part ``(n, numel)``, row p being (a part of) vector p, the part ``(numel,)`` of the result."""


def aggregation_from(value: str | Aggregation) -> Aggregation:
    """A rule from its text; `str` of the result reads back to an equal one."""
    return described("aggregation", value, aggregations, Aggregation, "median")  # type: ignore[type-abstract]


def is_row_finite(parts: Sequence[Tensor], row: int) -> bool:
    """Whether all of one vector is; ``parts`` as in `Aggregation.combine`."""
    return all(is_finite(rows[row]) for rows in parts)


def too_few(rule: Aggregation, vectors: int, whose: str, cure: str) -> list[Problem]:
    """What is wrong with a ``rule`` for so many vectors, if anything; ``whose`` they are, and how to get more."""
    if vectors >= rule.fewest:
        return []
    return [
        Problem(
            f"aggregate={rule} with {whose}",
            f"it needs {rule.needs}, so {rule.fewest} here.",
            f"Use {cure}, a smaller f, or aggregate=median, which needs no f.",
        )
    ]


def check_f(f: object) -> None:
    """Refuse what is no number of workers."""
    if not is_whole(f, 0):
        raise ValueError(f"f={f!r}: it is a whole number from 0, of workers whose vectors may hold anything")
