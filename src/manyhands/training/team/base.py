"""What every team is: ``size`` workers that do jobs together."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection
from typing import Any

Report = Callable[[int, Any], None]


class Team(ABC):
    """``size`` workers that do jobs together."""

    def __init__(self, transport: str, size: int) -> None:
        self.transport, self.size = transport, size

    @abstractmethod
    def run(
        self,
        job: str,
        *arguments: Any,
        report: Report | None = None,
        deadline_s: float | None = None,
        may_lose: Collection[int] = (),
    ) -> list[Any]:
        """Call ``module:function`` as ``function(member, *arguments)`` on every worker; results in rank order.

        ``report(rank, value)`` gets what workers report on the way. Raises `WorkerFailed` (or the worker's own
        `ManyhandsError`) when one fails; the team is closed then. ``deadline_s`` ends a job of processes that takes
        longer; workers inside this process (single, threads, simulated) cannot be ended, and pass it over.
        ``may_lose``: on shared and gloo the team goes on without one of these ranks that is killed, and its result is
        None; elsewhere, and where a worker raises, the team is told and ends.
        """

    @property
    def pids(self) -> list[int]:
        """Process ids of the workers, empty where they are threads."""
        return []

    def dismiss(self) -> None:
        """Ask the workers to end and wait for none, which `close` does; so several teams end side by side."""
        return

    def close(self) -> None:
        """End the workers. Safe to call twice."""
        return

    def __enter__(self) -> Team:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
