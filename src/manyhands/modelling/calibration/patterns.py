"""One round of an operation as a training step has it: compute a little, write one's input anew, enter.

A tight loop measures something else: inputs that nobody has written since, caches that hold nothing but the transport,
and ranks that arrive together, wide awake. So before each round all ranks meet, multiply two matrices (or as many as
take a step's time) and fill their tensors as a backward pass does. What strategies of common memory do is measured in
their order: scatter the gradients, update a slice, gather (a barrier there), read all.

A pattern names its series, each timed by two stamps of every rank, and how its stamps become a time.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from manyhands.cluster.measured import COMMON_GATHER, REREAD, WOKEN
from manyhands.communication.communicator import Communicator
from manyhands.modelling.calibration import stamps
from manyhands.modelling.calibration.stamps import Stamps

#: The round for so many floats: stamps of arrival and leaving, a pair for each series.
Round = Callable[[int], list[float]]
_NOT_HERE = [float("nan"), float("nan")]
#: What reading takes of what the rank has written itself; `REREAD` is what reading takes more of what others wrote.
OWN_READ = "own_read"
#: Some 20 µs of a core: 48 KB and more than the first cache holds.
_WORK = 80
#: So long a lock is held: who comes at any moment of an update of some ten thousand parameters waits as long.
HELD_S = 3e-5
#: What a rank computes before it enters.
Computing = Callable[[], object]


@dataclass(frozen=True)
class Pattern:
    """``make(comm, floats, compute)`` gives the round of tensors up to that long; collective."""

    series: tuple[str, ...]
    make: Callable[[Communicator, int, Computing], Round]
    times: Callable[[Stamps, Stamps], Stamps] = stamps.since_last_arrival
    #: Series that a rank does by itself.
    alone: tuple[str, ...] = ()
    sized: bool = True


def computing(seconds: float = 0.0) -> Computing:
    """Some matrices multiplied, once or for so long; whoever waits meanwhile has gone to sleep when it is over."""
    factor, product, clock = torch.full((_WORK, _WORK), 0.5), torch.empty(_WORK, _WORK), time.perf_counter

    def compute() -> None:
        until = clock() + seconds
        torch.mm(factor, factor, out=product)
        while clock() < until:
            torch.mm(factor, factor, out=product)

    return compute


def _meeting(operation: Callable[[Communicator, Tensor], object]) -> Callable[[Communicator, int, Computing], Round]:
    """A collective on memory of each rank's own, in the transport's kind of it."""

    def make(comm: Communicator, most: int, compute: Computing) -> Round:
        whole, clock = comm.allocate(most), time.perf_counter

        def once(n: int) -> list[float]:
            x = whole[:n]
            comm.barrier()
            compute()
            x.fill_(1.0)
            arrived = clock()
            operation(comm, x)
            return [arrived, clock()]

        return once

    return make


def _barrier(comm: Communicator, most: int, compute: Computing) -> Round:
    clock = time.perf_counter

    def once(n: int) -> list[float]:
        compute()
        arrived = clock()
        comm.barrier()
        return [arrived, clock()]

    return once


def _sharded(comm: Communicator, most: int, compute: Computing) -> Round:
    """A step of ``synchronous(update='sharded')`` without its model."""
    grads, params = comm.allocate(most), comm.allocate(most, common=True)
    mine, clock = torch.empty(most), time.perf_counter

    def once(n: int) -> list[float]:
        grad, flat, private = grads[:n], params[:n], mine[:n]
        comm.barrier()
        compute()
        grad.fill_(1.0)
        a = clock()
        lo, hi = comm.reduce_scatter(grad, weight=1.0)
        b = clock()
        flat[lo:hi].add_(grad[lo:hi], alpha=-1e-3)
        c = clock()
        comm.all_gather(flat).wait()
        d = clock()
        flat.sum()
        e = clock()
        private.fill_(1.0)
        f = clock()
        private.sum()
        return [a, b, c, d, d, e, f, clock()]

    return once


def _scattered(comm: Communicator, most: int, compute: Computing) -> Round:
    """The same where every rank has parameters of its own."""
    grads, params, clock = comm.allocate(most), comm.allocate(most), time.perf_counter

    def once(n: int) -> list[float]:
        grad, flat = grads[:n], params[:n]
        comm.barrier()
        compute()
        grad.fill_(1.0)
        a = clock()
        lo, hi = comm.reduce_scatter(grad, weight=1.0)
        b = clock()
        flat[lo:hi].add_(grad[lo:hi], alpha=-1e-3)
        c = clock()
        comm.all_gather(flat).wait()
        return [a, b, c, clock()]

    return once


def _send(comm: Communicator, most: int, compute: Computing) -> Round:
    """Rank 2k sends to 2k + 1, all pairs at once."""
    whole, clock = torch.empty(most), time.perf_counter
    peer = comm.rank ^ 1
    sends, takes_part = comm.rank % 2 == 0, peer < comm.size

    def once(n: int) -> list[float]:
        x = whole[:n]
        comm.barrier()
        compute()
        x.fill_(1.0)
        arrived = clock()
        if takes_part and sends:
            comm.send(x, peer).wait()
        elif takes_part:
            comm.recv(x, peer)
        return [arrived, clock()]

    return once


def _swap(comm: Communicator, most: int, compute: Computing) -> Round:
    """Ranks 2k and 2k + 1 send to each other, and read what has come."""
    whole, theirs, clock = torch.empty(most), torch.empty(most), time.perf_counter
    peer = comm.rank ^ 1
    takes_part = peer < comm.size

    def once(n: int) -> list[float]:
        x = whole[:n]
        comm.barrier()
        compute()
        x.fill_(1.0)
        arrived = clock()
        if takes_part:
            sent = comm.send(x, peer)
            comm.recv(theirs[:n], peer)
            sent.wait()
        return [arrived, clock()]

    return once


def _served(comm: Communicator, most: int, compute: Computing) -> Round:
    """A server that is memory: ranks take turns to add a gradient to it and to read it, under its lock.

    Each reads what another has written last. Nobody waits for the lock: queues are the simulation's business.
    """
    window = comm.window(most * 4) if not comm.shares_memory else None
    shard = comm.allocate(most, common=True) if window is None else torch.empty(most)
    lock, mine, clock = comm.locks(1)[0], torch.ones(most), time.perf_counter
    turn = 0

    def push(n: int) -> None:
        with lock:
            if window is not None:
                window.get(0, (0, shard[:n]))
            shard[:n].add_(mine[:n], alpha=-1e-3)
            if window is not None:
                window.put(0, (0, shard[:n]))

    def pull(n: int) -> None:
        with lock:
            if window is None:
                mine[:n].copy_(shard[:n])
            else:
                window.get(0, (0, mine[:n]))

    def once(n: int) -> list[float]:
        nonlocal turn
        turn += 1
        found: list[float] = []
        for place, access in enumerate((pull, push)):
            comm.barrier()
            if (turn + place) % comm.size != comm.rank:
                found += _NOT_HERE
                continue
            arrived = clock()
            access(n)
            found += [arrived, clock()]
        return found

    return once


def _handed(comm: Communicator, most: int, compute: Computing) -> Round:
    """All want one lock at once, and whoever has it keeps it for a while: who waits has gone to sleep by then."""
    lock, clock = comm.locks(1)[0], time.perf_counter

    def once(n: int) -> list[float]:
        comm.barrier()
        compute()
        waited = comm.counters.wait_s
        with lock:
            got = clock()
            while clock() < got + HELD_S:
                pass
            left = clock()
        return [left, got if comm.counters.wait_s > waited else _NOT_HERE[0]]

    return once


PATTERNS: dict[str, Pattern] = {
    "sharded": Pattern(("reduce_scatter", COMMON_GATHER, REREAD, OWN_READ), _sharded, alone=(REREAD, OWN_READ)),
    "scattered": Pattern(("reduce_scatter", "all_gather"), _scattered),
    "all_reduce": Pattern(("all_reduce",), _meeting(lambda comm, x: comm.all_reduce(x, weight=1.0).wait())),
    "all_gather": Pattern(("all_gather",), _meeting(lambda comm, x: comm.all_gather(x).wait())),
    "broadcast": Pattern(("broadcast",), _meeting(lambda comm, x: comm.broadcast(x).wait())),
    "all_to_all": Pattern(("all_to_all",), _meeting(lambda comm, x: comm.all_to_all(x))),
    "barrier": Pattern(("barrier",), _barrier, sized=False),
    "send": Pattern(("send",), _send, stamps.of_pairs),
    "swap": Pattern(("send",), _swap),
    "served": Pattern(("pull", "push"), _served, alone=("pull", "push")),
    "handed": Pattern((WOKEN,), _handed, stamps.handed_over, sized=False),
}


def patterns_of(*, shares_memory: bool, one_sided: bool, ranks: int) -> Sequence[str]:
    """What a transport is measured in; a server that is memory once, as one rank at a time is there."""
    steps = ("sharded", "all_gather") if shares_memory else ("scattered",)
    served = ("served",) if (shares_memory or one_sided) and ranks == 2 else ()
    return (*steps, "all_reduce", "broadcast", "all_to_all", "barrier", "send", *served)
