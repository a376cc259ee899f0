"""A network of the table that trains, as it would in a run: the same replica, gradients in one vector."""

from __future__ import annotations

import time

import torch
from torch import Tensor

from manyhands.communication.transports.single import SingleCommunicator
from manyhands.contract import Batch
from manyhands.modelling.operators.networks import Cell
from manyhands.modelling.operators.stamping import Told
from manyhands.models import losses, optimizers
from manyhands.partition.data import DataReplica

#: Different batches that a network sees in turn.
DATA = 3


class Training:
    """One network at one batch on one worker; ``compute`` and ``update`` say how many seconds they took."""

    def __init__(self, cell: Cell) -> None:
        self.model = cell.network.build()
        self.loss = Told(losses.build("cross_entropy") or torch.nn.functional.cross_entropy)
        self.optimizer = optimizers.build(cell.optimizer, self.model.parameters())
        self._replica = DataReplica(self.model, self.optimizer, self.loss, SingleCommunicator(), common=True)
        self._batches = [Batch(*cell.network.samples(cell.batch), cell.batch, cell.batch) for _ in range(DATA)]
        self._at = 0
        self.compute()
        self._replica.settle(self._replica.reached())
        self.update()

    @property
    def gradients(self) -> list[Tensor]:
        """The vectors into which they are added."""
        return [piece.grad for piece in self._replica.pieces]

    def compute(self) -> float:
        """Gradients of the next batch."""
        batch = self._batches[self._at % DATA]
        self._at += 1
        t0 = time.perf_counter()
        self._replica.gradients(batch)
        return time.perf_counter() - t0

    def update(self) -> float:
        """By the optimizer."""
        t0 = time.perf_counter()
        for piece in self._replica.pieces:
            self._replica.apply(piece, 0, piece.flat.numel())
        return time.perf_counter() - t0
