"""Downpour SGD of DistBelief: replicas that fetch and push at their own pace (survey §VI-A).

    every step                 g = ∇ at θ_p;   a ← a + g;   θ_p ← u(θ_p, g)
    after steps p, 2p, …       push a:  θ ← u_server(θ, a);   a ← 0
    after steps f, 2f, …       θ_p ← the servers' θ

f = ``fetch``, p = ``push``. Between exchanges a worker goes on by itself with the user's optimizer; what it pushes is
the sum of its gradients. Each shard of the servers applies ``server``, Adagrad in the paper, whose rates fall where
many workers push much; by default it is the user's own optimizer.

``compress`` pushes something shorter than a, and keeps the rest for the next push (`strategy.OnShards`); by itself a
worker goes on with its whole gradients.

Payload per rank and step: n/f + n/p elements; compressed, n/f and what the compressor makes of a in p steps.
Approximation; results differ from run to run. Guarantee: what is pushed is what was accrued. One worker with
fetch=push=1 is the servers' optimizer bit for bit. A resume takes up accrued gradients, parameters and server state.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from manyhands.checks import is_whole
from manyhands.communication.communicator import Communicator
from manyhands.communication.compression.layout import Shape
from manyhands.consistency.parameter_server import shards
from manyhands.consistency.parameter_server.opening import opened
from manyhands.consistency.parameter_server.store import Store
from manyhands.consistency.parameter_server.strategy import OnShards
from manyhands.consistency.parameter_server.worker import ServedWorker
from manyhands.contract import Batch, Reference, Replica, Setting, StateSlice, Traffic, Worker
from manyhands.errors import BadInput
from manyhands.models import optimizers
from manyhands.models.update_rules import served


@dataclass(frozen=True)
class Downpour(OnShards):
    """Asynchronous replicas with periods; ``server``: the servers' optimizer, e.g. ``"adagrad(lr=0.05)"``."""

    name: ClassVar[str] = "downpour"
    bears_stages: ClassVar[bool] = True
    by_itself: ClassVar[bool] = True
    paper: ClassVar[Reference] = Reference(
        "Dean et al.", "Large scale distributed deep networks", 2012, "NeurIPS 25", survey="VI-A"
    )
    steadier: ClassVar[str] = "with downpour, smaller fetch= and push=, or server='adagrad(lr=…)'"

    fetch: int = 1
    push: int = 1
    server: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("fetch", "push"):
            value = getattr(self, name)
            if not is_whole(value, 1):
                raise ValueError(f"{name}={value!r}: a period in steps is a whole number from 1")
        if self.server and not served(_trial(self.server)):
            raise ValueError(f"server={self.server!r}: a server applies sgd, adagrad, adam or adamw")

    @property
    def plain_alone(self) -> bool:  # type: ignore[override]
        """With every gradient pushed at once to the user's own optimizer."""
        return self.fetch == self.push == 1 and not self.server

    @property
    def servers_update(self) -> bool:
        """With the user's optimizer, unless they have one of their own."""
        return not self.server

    def traffic(self, numel: int, size: int, itemsize: int = 4) -> Traffic:
        """A pull in ``fetch`` steps and a push, compressed or not, in ``push`` steps."""
        return self.traffic_of(((numel,),), size, itemsize)

    def traffic_of(self, shapes: Sequence[Shape], size: int, itemsize: int = 4) -> Traffic:
        """See `traffic`."""
        pulls = shards.traffic(shapes, size, itemsize, self.shards, every=self.fetch)
        return pulls + self.pushed(shapes, size, itemsize, every=self.push)

    def exact(self, setting: Setting) -> bool:
        """Only alone."""
        return setting.workers == 1 and self.plain_alone

    def start(self, replica: Replica, comm: Communicator) -> Worker:
        """This rank's worker."""
        optimizer = _trial(self.server) if self.server else replica.optimizer
        kept = opened(replica, comm, self.shards, optimizer=optimizer, compressor=self.pushes)
        return DownpourWorker(replica, comm, kept, self)


def due(step: int, period: int) -> bool:
    """Whether what happens every ``period`` steps follows ``step``; steps count from 1, over the whole run."""
    return step % period == 0


@functools.lru_cache
def _trial(server: str) -> torch.optim.Optimizer:
    """The servers' optimizer, for its kind and its hyper-parameters."""
    try:
        return optimizers.trial(server)
    except BadInput as e:
        raise ValueError(f"server={server!r}: {e}") from e


class DownpourWorker(ServedWorker):
    """Accrues gradients, and goes on by itself between exchanges."""

    def __init__(self, replica: Replica, comm: Communicator, kept: Store, strategy: Downpour) -> None:
        super().__init__(replica, comm, kept)
        self._fetch, self._push = strategy.fetch, strategy.push
        self._sums = strategy.push > 1
        self.accrued = [torch.zeros_like(p.flat) if self._sums else p.grad for p in replica.pieces]
        self.pending = False  # there is something accrued

    def step(self, batch: Batch) -> Tensor:
        """One step; see the file's head."""
        loss, usable = self.gradients(batch)
        fetches = due(self.steps, self._fetch)
        if usable and self._sums:
            for mine, piece in zip(self.accrued, self.replica.pieces, strict=True):
                mine.add_(piece.grad)
        self.pending |= usable
        if self.pending and due(self.steps, self._push):
            self.store.push(self.accrued, pull=fetches)
            if self._sums:
                for mine in self.accrued:
                    mine.zero_()
            self.pending = False
        elif fetches:
            self.store.pull()
        if usable and not fetches:
            self._go_on()
        return loss

    def _go_on(self) -> None:
        if self.replica.watching:
            self.replica.settle(self.replica.reached())
        for piece in self.replica.pieces:
            self.replica.apply(piece, 0, piece.flat.numel())

    def state_dict(self) -> dict[str, Any]:
        """Also what has been accrued, and this worker's own optimizer."""
        own = [[s.parameter, s.key, s.lo, s.hi, s.values] for s in self.replica.optimizer_state()]
        accrued = [each.clone() for each in self.accrued]
        return super().state_dict() | {"accrued": accrued, "pending": self.pending, "optimizer": own}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up a `state_dict` of the same rank. Collective."""
        super().load_state_dict(state)
        for mine, saved in zip(self.accrued, state["accrued"], strict=True):
            mine.copy_(saved)
        self.pending = state["pending"]
        self.replica.load_optimizer_state([StateSlice(*entry) for entry in state["optimizer"]])
