"""What a plan's own exchanges take here, at their own sizes, by the workers that are being profiled.

A calibrated curve is some minutes old, and of sizes that are not the plan's. Prices that are as old as the profile, in
the same workers, are what predicting a step to a few percent takes: with tables some minutes old the error is three
times as large on a host whose neighbours come and go. So the operations that a step asks for are measured once more, a
moment each, in rounds as a step has them (`calibration.patterns`); nothing of the plan's own step is timed as a whole.

Cost: `SECONDS` a pattern, in workers that are there already; a few rounds for tensors that take longer.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from manyhands.cluster.measured import Curve
from manyhands.communication import futex, transports
from manyhands.communication.communicator import ASIDE, Communicator
from manyhands.communication.transports.events import Operation
from manyhands.modelling.calibration.collectives import meter
from manyhands.modelling.calibration.repeating import Try
from manyhands.simulation.prices import SERVED
from manyhands.training.member import Member
from manyhands.training.team import Team

JOB = f"{__name__}:job"
#: For each pattern.
SECONDS = 0.15
#: Ranks compute for as long as a step before a round, and so long at most: who waits has gone to sleep by then.
LONGEST_S = 0.003
#: Sizes of one operation; of more, as many that lie between the least and the largest.
MOST_SIZES = 6
#: Patterns of no size.
UNSIZED = ("barrier", "handed")
#: A gap in the deadline, for the tensors and the first rounds.
DEADLINE_S = 60.0


def curves_here(
    crew: Team,
    transport: str,
    ranks: int,
    operations: Iterable[Operation],
    compute_s: float,
    *,
    visited: bool = False,
) -> tuple[Curve, ...]:
    """Curves with a knot at each size that ``operations`` have, by a crew of exactly ``ranks`` on ``transport``.

    ``compute_s``: what a step computes. ``visited``: what servers' memory takes is measured elsewhere (`visits`).
    """
    kind = transports.load(transport)
    wanted = patterns_for(
        operations, ranks, shares_memory=kind.shares_memory, one_sided=kind.one_sided, visited=visited
    )
    if not wanted:
        return ()
    listed = [[name, list(sizes)] for name, sizes in wanted.items()]
    told = crew.run(JOB, listed, SECONDS, min(compute_s, LONGEST_S), deadline_s=DEADLINE_S + 4 * SECONDS * len(listed))[
        0
    ]
    return _curves(told, transport, ranks)


def curves_by(comm: Communicator, operations: Iterable[Operation], compute_s: float) -> tuple[Curve, ...]:
    """As `curves_here`, by ranks that there are. Collective; all get the same."""
    wanted = patterns_for(operations, comm.size, shares_memory=comm.shares_memory, one_sided=comm.one_sided)
    told = [meter(comm, name, sizes, SECONDS, compute_s)() for name, sizes in wanted.items()]
    return _curves(told, comm.transport, comm.size)


def _curves(told: Sequence[dict[str, Any]], transport: str, ranks: int) -> tuple[Curve, ...]:
    oversubscribed = ranks > futex.cores()
    return tuple(curve for found in told for curve in Try(found, None, None, oversubscribed).curves(transport, ranks))


def job(
    member: Member, wanted: Sequence[tuple[str, Sequence[int]]], seconds: float, compute_s: float
) -> list[dict[str, Any]]:
    """What a worker does: rounds of each pattern at its sizes; what `meter` has found of each."""
    return [meter(member.comm, name, sizes, seconds, compute_s)() for name, sizes in wanted]


def patterns_for(
    operations: Iterable[Operation], ranks: int, *, shares_memory: bool, one_sided: bool, visited: bool = False
) -> dict[str, Sequence[int]]:
    """The patterns that have what is asked for, and the sizes to measure them at, in bytes.

    Only what all ``ranks`` take part in, or two of them; and nothing that goes `ASIDE`.
    """
    asked = [x for x in operations if x.purpose not in ASIDE and (x.size == ranks or x.name in ("send", *SERVED))]
    one_copy = shares_memory and any(x.name == "all_gather" and x.common for x in asked)
    scatters = any(x.name == "reduce_scatter" for x in asked)
    found: dict[str, set[int]] = {}
    for x in asked:
        match x.name:
            case "reduce_scatter":
                name = "sharded" if one_copy else "scattered"
            case "all_gather":
                name = "sharded" if x.common and shares_memory else "scattered" if scatters else "all_gather"
            case "broadcast" if x.common:
                name = "barrier"
            case "pull" | "push":
                if shares_memory:
                    found["handed"] = {0}
                if visited:
                    continue
                name = "served" if shares_memory or one_sided else "send"
            case "send":  # neighbours exchange; a stage hands on
                name = "send" if x.purpose == "cut" else "swap"
            case "all_reduce" | "broadcast" | "all_to_all" | "barrier":
                name = x.name
            case _:
                continue
        found.setdefault(name, set()).add(0 if name == "barrier" else x.payload_B)
    return {name: _few(sorted(sizes - {0} or {0})) for name, sizes in found.items() if name in UNSIZED or any(sizes)}


def _few(sizes: Sequence[int]) -> Sequence[int]:
    if len(sizes) <= MOST_SIZES:
        return sizes
    last = len(sizes) - 1
    return [sizes[round(i * last / (MOST_SIZES - 1))] for i in range(MOST_SIZES)]
