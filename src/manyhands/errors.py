"""Every exception this library raises on purpose, drawn as a tree.

    ManyhandsError
    ├── BadInput                 the user's request cannot work; found before any work (exit 2)
    │   ├── UnknownName          no such strategy, model, option …; offers the nearest one
    │   ├── InvalidPlan          all problems of a plan at once
    │   └── DamagedFile          a data file or checkpoint fails its checksum or is cut short
    ├── WorkerFailed             a worker raised; carries its rank, step and own traceback (exit 1)
    │   └── FactoryFailed        so did the user's factory of a model, data, loss, optimizer or schedule
    ├── LastCheckpointNotWritten (in verbs) training is done, but the disk is full; carries the result (exit 1)
    ├── NonFiniteLoss            every worker stopped at the same step, last good state named (exit 1)
    └── CommunicationError
        ├── PeerLost             another rank died or reported failure while we waited for it
        ├── DamagedPayload       a compressed vector does not fit the vector it is for; nothing was written
        ├── Vetoed               a rank gave a weight that is not finite: it refuses this exchange for everybody
        ├── DeadlineExceeded     a wait outlasted its deadline; names who waits for whom
        └── Deadlock             nothing can run any more (simulated: found at once)

A message says what was asked, what the rule is and what would work, in that order.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


class ManyhandsError(Exception):
    """Root of the tree above."""

    exit_code = 1

    def details(self) -> dict[str, object]:
        """The attributes that can travel to another process beside the message."""
        return {k: v for k, v in vars(self).items() if v is None or isinstance(v, str | bool | int | float)}


class BadInput(ManyhandsError):
    """The request cannot work. Nothing was started and nothing was lost."""

    exit_code = 2


class UnknownName(BadInput):
    """A name that is in no catalogue; the message lists the choices, the nearest one first."""

    def __init__(self, kind: str, name: str, choices: Iterable[str], *, also: str = "") -> None:
        self.kind, self.name, self.choices = kind, name, tuple(choices)
        near = difflib.get_close_matches(name, self.choices, n=1, cutoff=0.5)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        known = ", ".join(self.choices) or "none"
        super().__init__(f"There is no {kind} named {name!r}.{hint} Known: {known}.{' ' + also if also else ''}")


@dataclass(frozen=True)
class Problem:
    """One thing wrong with a plan: what was asked, what the rule is, what would work."""

    asked: str
    rule: str
    cure: str

    def __str__(self) -> str:
        return f"{self.asked}: {self.rule} {self.cure}"


class InvalidPlan(BadInput):
    """All problems of a plan at once, so that nobody fixes them one run at a time."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        self.problems = tuple(problems)
        lines = [str(p) for p in self.problems]
        super().__init__(lines[0] if len(lines) == 1 else "\n".join(f"{i}. {x}" for i, x in enumerate(lines, 1)))


class DamagedFile(BadInput):
    """A file that does not hold what its checksum or header promises."""


class WorkerFailed(ManyhandsError):
    """A worker raised. ``traceback`` is the worker's own, shown once."""

    def __init__(self, rank: int, step: int | None, reason: str, traceback: str = "") -> None:
        self.rank, self.step, self.reason, self.traceback = rank, step, reason, traceback
        where = f"worker {rank}" + (f" at step {step}" if step is not None else "")
        super().__init__(f"{where} failed: {reason}")


class FactoryFailed(WorkerFailed):
    """A factory of the user's (model, data, loss, optimizer or schedule) raised; with the user's own traceback."""

    def __init__(self, what: str, reason: str, traceback: str) -> None:
        super().__init__(0, None, reason, traceback)
        self.args = (f"{what} failed: {reason}",)


class NonFiniteLoss(ManyhandsError):
    """The loss (or ``what`` else) became NaN or infinite, and every worker stopped.

    In the same step where they go in ``lockstep``; else when they next met: ``rank`` is whose it was. ``spoilt``: the
    parameters had become so before, by a gradient that was not finite though its loss was. ``steadier``: what of the
    strategy to change against it.
    """

    def __init__(
        self,
        step: int | None,
        kept: str = "",
        *,
        what: str = "loss",
        spoilt: bool = False,
        rank: int | None = None,
        steadier: str = "",
    ) -> None:
        self.step, self.kept, self.what, self.spoilt, self.rank = step, kept, what, spoilt, rank
        when = f" at step {step}" if step is not None else ""
        if rank is None:
            said = [f"The {what} is not finite{when}. Every worker stopped there and none applied that update."]
        else:
            said = [f"The {what} of worker {rank} is not finite{when}. It applied nothing more, and all stopped."]
        if spoilt:
            said.append("The parameters are not finite either: an earlier gradient was not, though its loss was.")
            said.append(f"The newest good state is {kept}." if kept else "No checkpoint of a good state exists.")
        elif kept:
            said.append(f"The last good state is kept in {kept}.")
        also = f", or {steadier}" if steadier else ""
        said.append(f"A smaller learning rate or a gradient clip (--clip 1.0) usually helps{also}.")
        super().__init__(" ".join(said))


class CommunicationError(ManyhandsError):
    """Something between the ranks went wrong."""


class Vetoed(CommunicationError):
    """A rank entered a weighted collective with a weight that is not finite, which stops it on every rank alike."""

    def __init__(self, rank: int | None = None) -> None:
        self.rank = rank
        super().__init__("this exchange was vetoed" + (f" by rank {rank}" if rank is not None else ""))


class DamagedPayload(CommunicationError):
    """A compressed vector has another length, or other indices and codes, than the vector it is for can have."""


class PeerLost(CommunicationError):
    """A rank we waited for has died or has reported its own failure."""

    def __init__(self, rank: int, peer: int | None, step: int | None, doing: str) -> None:
        self.rank, self.peer, self.step, self.doing = rank, peer, step, doing
        who = f"rank {peer}" if peer is not None else "another rank"
        when = f" at step {step}" if step is not None else ""
        super().__init__(f"rank {rank} lost {who} while in {doing}{when}")


class DeadlineExceeded(CommunicationError):
    """A wait outlasted its deadline."""

    def __init__(self, rank: int, waiting_for: str, step: int | None, seconds: float, doing: str) -> None:
        self.rank, self.waiting_for, self.step, self.seconds, self.doing = rank, waiting_for, step, seconds, doing
        when = f" at step {step}" if step is not None else ""
        super().__init__(
            f"rank {rank} waited {seconds:.1f} s in {doing}{when} for {waiting_for}; "
            "a larger deadline (--timeout SECONDS) helps only if that rank is slow rather than stuck"
        )


class Deadlock(CommunicationError):
    """No rank can run any more; the message says who waits in what."""
