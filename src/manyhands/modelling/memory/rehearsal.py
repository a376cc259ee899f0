"""What strategies and optimizers keep and take, of the size of the parameters: they are tried on a small vector.

Their own code runs, on real numbers, on as many workers as there will be (threads in virtual time, `WORKERS` at most),
and the storages it makes are watched. What it keeps and takes grows with the parameters, so a small vector tells.
Approximation: memory of NumPy's, in which compressors compute, is not seen; nor is what a transport takes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from manyhands.communication.topology import Mesh
from manyhands.communication.transports.simulated import SimulatedWorld
from manyhands.communication.transports.single import SingleCommunicator
from manyhands.contract import Batch, Ready, Strategy
from manyhands.modelling.memory.liveness import Watch, left_B, peak_B
from manyhands.models import optimizers
from manyhands.partition.data import DataReplica

#: A square matrix so wide: large beside counters and weights of means, small beside everything else.
_WIDTH = 128
#: With more the copies that depend on their number are taken to grow as they did so far.
WORKERS = 8


@dataclass(frozen=True)
class Copies:
    """How often the parameters are there beside themselves, in bytes per byte."""

    kept: float = 0.0  # from the start on
    taken: float = 0.0  # at most, within a step
    agreed: float = 0.0  # when the workers agree on parameters, to evaluate or at the end


@dataclass(frozen=True)
class Update:
    """What an optimizer keeps and takes, in bytes per byte of what it updates."""

    kept: float
    taken: float
    #: Whether it takes that for one parameter after the other, or for all at once.
    one_by_one: bool


class _Still(DataReplica):
    """A replica whose gradients are there already."""

    def gradients(self, batch: Batch, ready: Ready | None = None) -> tuple[Tensor, float]:
        loss, self.count, self.watching = torch.zeros(()), float(batch.count), False
        for i, piece in enumerate(self.pieces):
            if ready is not None:
                ready(i, 0, piece.grad.numel(), loss, self.count)
        return loss, self.count


@functools.lru_cache(maxsize=64)
def copies(strategy: Strategy, workers: int) -> Copies:
    """Of a worker, the one with most. Nothing for what has none, or cannot be tried on a single layer."""
    size = min(workers, WORKERS)
    found: list[Copies] = []

    def rank(comm: Any) -> None:
        comm.mesh = Mesh(data=size)
        replica = _replica(nn.Linear(_WIDTH, _WIDTH, bias=False), "sgd(lr=0.1)", comm, strategy)
        own_B = replica.pieces[0].flat.nbytes
        with Watch([*(p.flat for p in replica.pieces), *(p.grad for p in replica.pieces)]) as watch:
            for group in {id(g): g for g in (comm, comm.over(frozenset({"data"})))}.values():
                _look_away(group, watch)
            worker = strategy.start(replica, comm)
            kept_B = [left_B(watch.events)]
            taken_B = kept_B[0]
            for _ in range(2 * _every(strategy)):
                worker.step(Batch(torch.zeros(1), None, 1, size))
            taken_B, at_end_B = max(taken_B, peak_B(watch.events)), left_B(watch.events)
            before = len(watch.events)
            agreed = worker.consensus()
            others = sum(x.nbytes for x, p in zip(agreed, replica.pieces, strict=True) if x is not p.flat)
            agreed_B = peak_B(watch.events[before:]) + others  # those in use are put aside meanwhile
        kept = max(kept_B[0], at_end_B)
        found.append(Copies(*(round(x / own_B, 2) for x in (kept, taken_B - kept, agreed_B))))

    try:
        SimulatedWorld(size).run(rank)
    except Exception:
        return Copies()
    growth = max(1.0, workers / size)
    most = Copies(*(max(getattr(c, name) for c in found) for name in ("kept", "taken", "agreed")))
    return Copies(most.kept * growth if most.kept > 3 else most.kept, most.taken, most.agreed)


def _look_away(comm: Any, watch: Watch) -> None:
    """What a collective takes is the transport's own, and a simulated one is none that trains."""

    def unwatched(method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            before, watch.looking = watch.looking, False
            try:
                return method(*arguments)
            finally:
                watch.looking = before

        return call

    for name in ("_all_reduce", "_reduce_scatter", "_all_gather", "_all_to_all", "_broadcast"):
        setattr(comm, name, unwatched(getattr(comm, name)))


def _every(strategy: Strategy) -> int:
    """Steps between two exchanges, as far as it is worth to wait for them."""
    return min(max(getattr(strategy, "every", 1) if isinstance(getattr(strategy, "every", 1), int) else 1, 1), 16)


def _replica(model: nn.Module, optimizer: str, comm: Any, strategy: Strategy | None) -> DataReplica:
    common = strategy is not None and strategy.parameters == "common"
    return _Still(model, optimizers.build(optimizer, model.parameters()), nn.MSELoss(), comm, common=common)


def update(optimizer: Any) -> Update:
    """Of an optimizer, by an update of one matrix and one of two."""
    if isinstance(optimizer, str):
        return _update_of(optimizer)
    return _tried(optimizer)


@functools.lru_cache(maxsize=64)
def _update_of(optimizer: str) -> Update:
    return _tried(optimizer)


def _tried(optimizer: Any) -> Update:
    found = []
    for n in (1, 2):
        model = nn.Sequential(*(nn.Linear(_WIDTH, _WIDTH, bias=False) for _ in range(n)))
        replica = _replica(model, optimizer, SingleCommunicator(), None)
        piece = replica.pieces[0]
        with Watch([piece.flat, piece.grad]) as watch:
            replica.apply(piece, 0, piece.flat.numel())
            kept_B = left_B(watch.events)
            watch.cut()
            replica.apply(piece, 0, piece.flat.numel())
            taken_B = peak_B(watch.events)
        found.append((kept_B / piece.flat.nbytes, taken_B / piece.flat.nbytes))
    (_, alone), (kept, both) = found
    return Update(round(kept, 2), round(alone, 2), one_by_one=both < 0.75 * alone)
