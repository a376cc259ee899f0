"""What teams of processes share: one connection a worker, jobs, failures, an end."""

from __future__ import annotations

import contextlib
import logging
import signal
import time
from abc import abstractmethod
from collections.abc import Collection, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any

from manyhands import errors
from manyhands.errors import BadInput, WorkerFailed
from manyhands.training.team.base import Report, Team
from manyhands.training.wire import decode, encode, rebuilt

log = logging.getLogger(__name__)

#: How long after the first failure the others may still say what they saw: the first report is not always the cause.
GRACE_S = 2.0
#: A worker imports torch and joins within this time, or something is wrong.
START_S = 120.0
#: A worker that has been asked to end does so within this time, or is made to.
END_S = 10.0


class ProcessTeam(Team):
    """What teams of processes share: one connection a worker, jobs, failures, an end."""

    def __init__(self, transport: str, size: int) -> None:
        super().__init__(transport, size)
        self._connections: list[Connection] = []
        self._closed = False

    def _lose(self, rank: int) -> bool:
        """Tell the other workers that ``rank`` has died and they go on; False where there is no way to."""
        return False

    def _fail(self, rank: int) -> None:
        """Tell the other workers that ``rank`` is gone, where there is a way to."""

    @abstractmethod
    def _alive(self, rank: int) -> str | None:
        """None while the worker runs, else how it ended."""

    def _step_of(self, rank: int) -> int | None:
        return None

    def _end(self, patience_s: float) -> None:
        """Wait so long for the workers to end, then make sure that none runs any more."""

    def run(
        self,
        job: str,
        *arguments: Any,
        report: Report | None = None,
        deadline_s: float | None = None,
        may_lose: Collection[int] = (),
    ) -> list[Any]:
        """Send the job to all workers and collect what they answer."""
        if self._closed:
            raise BadInput("this team is closed; make a new one.")
        message = encode(["job", job, list(arguments)])
        try:
            for connection in self._connections:
                with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                    connection.send_bytes(message)
            return self._collect("result", report, deadline_s, may_lose=may_lose)
        except BaseException:
            self.abandon()
            raise

    def _collect(
        self, wanted: str, report: Report | None, deadline_s: float | None, *, may_lose: Collection[int] = ()
    ) -> list[Any]:
        results: dict[int, Any] = {}
        failures: list[dict[str, Any]] = []
        borne: list[dict[str, Any]] = []  # deaths with which the others go on
        ended: set[int] = set()
        end = time.monotonic() + deadline_s if deadline_s is not None else None
        while len(results) + len(ended) < self.size:
            open_ = {c: r for r, c in enumerate(self._connections) if r not in results and r not in ended}
            ready = wait(list(open_), timeout=0.2)
            for connection in ready:
                rank = open_[connection]  # type: ignore[index]
                try:
                    kind, *rest = decode(connection.recv_bytes())  # type: ignore[union-attr]
                except (EOFError, ConnectionResetError):
                    ended.add(rank)
                    self._died(rank, rank in may_lose, borne, failures)
                    continue
                if kind == wanted:
                    results[rank] = rest[0] if rest else None
                elif kind == "failed":
                    failures.append(rest[0])
                    ended.add(rank)
                    self._fail(rank)
                elif kind == "report" and report is not None:
                    report(rank, rest[0])
            for rank in range(self.size):
                if rank not in results and rank not in ended and self._connections[rank] not in ready:
                    how = self._alive(rank)
                    if how is not None and not self._connections[rank].poll(0):
                        ended.add(rank)
                        self._died(rank, rank in may_lose, borne, failures)
            now = time.monotonic()
            if failures:
                end = now + GRACE_S if end is None else min(end, now + GRACE_S)
            if end is not None and now > end:
                break
        if failures:
            raise_cause([*failures, *borne])  # others may have failed for want of one that could be missed
        if len(results) + len(ended) < self.size:
            late = [r for r in range(self.size) if r not in results]
            raise errors.DeadlineExceeded(
                late[0], "its own job to end", self._step_of(late[0]), deadline_s or 0.0, "run"
            )
        return [results.get(r) for r in range(self.size)]

    def _died(self, rank: int, may_be_lost: bool, borne: list[dict[str, Any]], failures: list[dict[str, Any]]) -> None:
        death = self._death(rank)
        if may_be_lost and self._lose(rank):
            log.warning("worker %d is lost (%s); the others go on", rank, death["reason"])
            borne.append(death)
        else:
            failures.append(death)
            self._fail(rank)

    def _death(self, rank: int) -> dict[str, Any]:
        how = None
        for _ in range(50):
            if (how := self._alive(rank)) is not None:
                break
            time.sleep(0.01)
        return {
            "rank": rank,
            "step": self._step_of(rank),
            "peer_lost": False,
            "reason": f"its process {how or 'closed its connection'}",
            "kind": None,
            "details": {},
            "traceback": "",
        }

    def dismiss(self) -> None:
        """See `Team.dismiss`."""
        if not self._closed:
            for connection in self._connections:
                with contextlib.suppress(OSError):
                    connection.send_bytes(encode(["end"]))

    def close(self) -> None:
        """Ask the workers to end, then see to it."""
        if not self._closed:
            self.dismiss()
            self._leave(END_S)

    def abandon(self) -> None:
        """End the workers at once, whatever they are doing."""
        if not self._closed:
            self._leave(0.0)

    def _leave(self, patience_s: float) -> None:
        self._closed = True
        self._end(patience_s)
        for connection in self._connections:
            connection.close()


def ended(exitcode: int) -> str:
    """An exit status in words."""
    if exitcode < 0:
        with contextlib.suppress(ValueError):
            return f"was killed by {signal.Signals(-exitcode).name}"
    return f"exited with status {exitcode}"


def raise_cause(failures: Sequence[dict[str, Any]]) -> None:
    """Raise what went wrong first: a rank's own error rather than its peers' complaints about it."""
    own = [f for f in failures if not f["peer_lost"]]
    cause = (own or list(failures))[0]
    step = cause["step"]
    if step is None:
        # A killed worker cannot say where it was; its peers can.
        step = next((f["step"] for f in failures if f["step"] is not None), None)
    if cause["kind"] is not None and not cause["peer_lost"]:
        error = rebuilt(cause["kind"], cause["reason"])
        error.__dict__.update(cause["details"])
        raise error
    raise WorkerFailed(cause["rank"], step, cause["reason"], cause["traceback"])
