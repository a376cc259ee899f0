"""Public test harness: run a function on several ranks of any transport, and check a strategy's promises.

`run_ranks` keeps one standing team per (transport, size) for the whole session, so that a test costs a message rather
than a launch; a team in which a worker failed is replaced at the next use.
"""

from __future__ import annotations

import atexit
from collections.abc import Callable, Sequence
from typing import Any

from manyhands.catalogue import import_object
from manyhands.training.member import Member
from manyhands.training.team import Team, team

_standing: dict[tuple[str, int], Team] = {}


def run_ranks(
    fn: Callable[..., Any], n: int, *, on: str = "shared", args: Sequence[Any] = (), timeout_s: float = 60.0
) -> list[Any]:
    """``fn(comm, *args)`` on ``n`` ranks; the results in rank order.

    ``fn`` is defined at the top level of an importable module. Arguments and results are numbers, text, lists, tuples,
    dicts or tensors. A rank that raises → `WorkerFailed` with its traceback.
    """
    path = f"{fn.__module__}:{fn.__qualname__}"
    crew = standing_team(on, n)
    try:
        return crew.run("manyhands.testing:_call", path, list(args), deadline_s=timeout_s)
    except BaseException:
        _standing.pop((on, n), None)
        crew.close()
        raise


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
    """End all standing teams."""
    while _standing:
        _standing.popitem()[1].close()


def _call(member: Member, path: str, args: list[Any]) -> Any:
    comm = member.comm
    comm.step = None
    return import_object(path, kind="function")(comm, *args)
