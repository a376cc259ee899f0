"""What a worker does to its servers' memory, measured by itself: the strategy's own store, one worker at a time.

    visit   lock;  push: θ ← u(θ, g);  pull: a copy of θ;  unlock

Each of ``push`` and ``pull`` is timed under the lock, from when it is asked for until the next one or the lock's end.
Workers take turns, each after as much computing as a step has. So a visit finds what another has written last, and
nobody waits for the lock: queues are the simulation's business, and how late who waited is woken is a price of its own
(`calibration.patterns`). What is pushed is the gradient of the replica's last step, again and again, since time depends
on it (Adam takes three times as long for zeros); the replica's parameters are put back in the end.

Cost: `SECONDS` for each kind of visit, and a store's memory, in workers that are there already.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from manyhands.cluster.measured import Curve
from manyhands.communication import futex
from manyhands.communication.communicator import Communicator, Lock
from manyhands.contract import Replica, Strategy
from manyhands.modelling.calibration import stamps
from manyhands.modelling.calibration.patterns import computing
from manyhands.modelling.calibration.repeating import digits

#: For each kind of visit; of a worker's there are so many at least, and so many at most.
SECONDS, FEWEST, MOST = 0.15, 5, 200
#: And so many before the first that counts, which touch new memory.
WARM = 3
#: A worker computes for as long as a step before its visit, but no longer than this.
LONGEST_S = 0.003

#: What is done under one lock: ``push``, ``pull``, or both.
Kind = tuple[str, ...]
#: Operation, bytes, seconds.
Found = list[tuple[str, int, float]]


class Visits:
    """A worker's; to be made, and measured again and again, by all ranks of ``comm`` together."""

    def __init__(self, strategy: Strategy, replica: Replica, comm: Communicator, kinds: Sequence[Kind]) -> None:
        self._comm, self._kinds, self._watched = comm, sorted(kinds), _Watched(comm)
        worker: Any = strategy.start(replica, cast(Communicator, self._watched))
        self._store = worker.store
        self._push = self._store.add if strategy.servers_add else self._store.push
        self._pieces = replica.pieces
        self._pushed = [torch.empty_like(piece.flat) for piece in replica.pieces]

    def take(self, compute_s: float, seconds: float = SECONDS) -> Found:
        """What this worker's visits take, ``seconds`` of each kind; ``compute_s``: what a step computes."""
        compute, found = computing(min(compute_s, LONGEST_S)), self._watched.found
        found.clear()
        before = [piece.flat.clone() for piece in self._pieces]
        self._store.rebase()
        for kind in self._kinds:
            kept = len(found)
            began = time.perf_counter()
            self._turns(kind, compute, WARM)
            del found[kept:]
            each_s = self._longest(time.perf_counter() - began) / WARM
            self._turns(kind, compute, min(max(int(seconds / each_s), FEWEST), MOST))
        for piece, own in zip(self._pieces, before, strict=True):
            piece.flat.copy_(own)
        return list(found)

    def _turns(self, kind: Kind, compute: Any, times: int) -> None:
        comm = self._comm
        for turn in range(times * comm.size):
            comm.barrier()
            compute()
            if turn % comm.size != comm.rank:
                continue
            for x, piece in zip(self._pushed, self._pieces, strict=True):
                x.copy_(piece.grad)  # as backward has just written it
            if kind == ("pull",):
                self._store.pull()
            elif "pull" in kind:
                self._push(self._pushed, pull=True)
            else:
                self._push(self._pushed)

    def _longest(self, mine_s: float) -> float:
        """Of all ranks, so that all go on alike."""
        comm = self._comm
        everybodys = torch.zeros(comm.size, dtype=torch.float64)
        everybodys[comm.rank] = mine_s
        comm.all_gather(everybodys, [(p, p + 1) for p in range(comm.size)]).wait()
        return float(everybodys.max())


def curves(found: Sequence[Found], transport: str, ranks: int) -> tuple[Curve, ...]:
    """Medians of all that workers have found, with a knot for each size of a shard."""
    by_size: dict[str, dict[int, list[float]]] = {}
    for one in found:
        for operation, n_B, seconds in one:
            by_size.setdefault(operation, {}).setdefault(n_B, []).append(seconds)
    made = []
    for operation, sizes in sorted(by_size.items()):
        knots = [(n_B, *stamps.median_and_spread(np.array(sizes[n_B]))) for n_B in sorted(sizes)]
        made.append(
            Curve(
                transport=transport,
                operation=operation,
                ranks=ranks,
                sizes_B=tuple(n_B for n_B, _, _ in knots),
                seconds=tuple(digits(s) for _, s, _ in knots),
                spread=tuple(digits(s, 2) for _, _, s in knots),
                oversubscribed=ranks > futex.cores(),
            )
        )
    return tuple(made)


class _Watched:
    """A communicator whose locks and accesses are timed; else it is ``comm``."""

    def __init__(self, comm: Communicator) -> None:
        self._comm = comm
        self._asked: list[tuple[str, int, float]] = []  # in the visit under way, and when
        self.found: Found = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._comm, name)

    def locks(self, count: int) -> list[_Timed]:
        return [_Timed(self, lock) for lock in self._comm.locks(count)]

    def access(self, operation: str, x: Tensor, *, at: int = 0) -> None:
        self._comm.access(operation, x, at=at)
        self._asked.append((operation, x.nbytes, time.perf_counter()))

    def over_at(self, began: float, ended: float) -> None:
        """A visit was from one moment to another: what was asked for first has its beginning, the last its end."""
        asked = self._asked
        starts = [began, *(at for _, _, at in asked[1:]), ended]
        for (operation, n_B, _), t0, t1 in zip(asked, starts, starts[1:], strict=False):
            self.found.append((operation, n_B, t1 - t0))
        asked.clear()


class _Timed:
    """A lock that tells how long it was held, taking it and giving it back included."""

    def __init__(self, watched: _Watched, lock: Lock) -> None:
        self._watched, self._lock = watched, lock
        self.lost = lock.lost

    def __enter__(self) -> None:
        self._began = time.perf_counter()
        self._lock.__enter__()

    def __exit__(self, *error: Any) -> None:
        self._lock.__exit__(*error)
        self._watched.over_at(self._began, time.perf_counter())
