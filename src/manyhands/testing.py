"""Public test harness: run a function on several ranks of any transport, and check a strategy's promises.

`run_ranks` keeps one standing team per (transport, size) for the whole session, so that a test costs a message rather
than a launch; a team in which a worker failed is replaced at the next use.
"""

from __future__ import annotations

import atexit
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from manyhands.catalogue import import_object
from manyhands.communication.communicator import Communicator
from manyhands.consistency.parameter_server.server import serving
from manyhands.contract import Strategy
from manyhands.plan import SERVERS_IN_MEMORY, strategy_from
from manyhands.studies import parity
from manyhands.training.member import Member
from manyhands.training.team import Team, team

_standing: dict[tuple[str, int], Team] = {}


def run_ranks(
    fn: Callable[..., Any],
    n: int,
    *,
    on: str = "shared",
    args: Sequence[Any] = (),
    timeout_s: float = 60.0,
    servers: int = 0,
) -> list[Any]:
    """``fn(comm, *args)`` on ``n`` ranks; the results in rank order. So many ``servers`` more are there to be asked.

    ``fn`` is defined at the top level of an importable module. Arguments and results are numbers, text, lists, tuples,
    dicts or tensors. A rank that raises → `WorkerFailed` with its traceback.
    """
    path = f"{fn.__module__}:{fn.__qualname__}"
    crew = standing_team(on, n + servers)
    stands = False
    try:
        answers = crew.run("manyhands.testing:_call", path, list(args), servers, deadline_s=timeout_s)
        stands = all(usable for _, usable in answers)  # an error that ``fn`` caught may have ended the group
        return [result for result, _ in answers[:n]]
    finally:
        if not stands:
            _standing.pop((on, n + servers), None)
            crew.close()


def check_strategy(
    strategy: Strategy | str, *, workers: int = 2, on: str = "shared", optimizer: str = "sgd(lr=0.1, momentum=0.9)"
) -> parity.Row:
    """Assert the promises of a strategy, your own included, against torch alone; returns what was measured.

    One worker equals plain torch bit for bit; ``workers`` equal one on the joined batch to 1e-12 where the strategy
    says ``exact``; replicas are bit-identical where it says ``identical``; bytes counted are bytes declared. Batches
    do not divide by the workers. Raises AssertionError that says which promise is broken and by how much.

        check_strategy("synchronous(update='replicated')", workers=3, on="gloo")
        check_strategy("my_pkg.module:MyStrategy", workers=4)
    """
    for size in (1, workers):
        place = "single" if size == 1 else on
        servers = strategy_from(strategy).server_ranks(in_memory=place in SERVERS_IN_MEMORY)
        found = run_ranks(parity_row, size, on=place, args=(str(strategy), optimizer), servers=servers)
        row = parity.Row(**found[0])
        if not row.passed:
            raise AssertionError(f"{row.strategy} with {size} workers on {row.transport}: {row.problem}")
    return row


def parity_row(comm: Communicator, strategy: str, optimizer: str) -> dict[str, Any]:
    """One rank's part of `check_strategy`."""
    return dataclasses.asdict(parity.check(comm, strategy_from(strategy), optimizer))


def standing_team(on: str, n: int) -> Team:
    """The session's team of ``n`` ranks on a transport; made at first use."""
    if (on, n) not in _standing:
        _standing[on, n] = team(on, n, threads=1, timeout_s=20.0, allocator="plain")
    return _standing[on, n]


def standing_pids() -> set[int]:
    """Process ids of all standing workers."""
    return {pid for crew in _standing.values() for pid in crew.pids}


@atexit.register
def close_standing() -> None:
    """End all standing teams; an MPI takes seconds to end, and so all of them do so at once."""
    for crew in _standing.values():
        crew.dismiss()
    while _standing:
        _standing.popitem()[1].close()


def _call(member: Member, path: str, args: list[Any], servers: int) -> Any:
    member.comm.step = None
    with serving(member.comm, servers) as comm:
        result = None if comm is None else import_object(path, kind="function")(comm, *args)
    return result, member.comm.usable
