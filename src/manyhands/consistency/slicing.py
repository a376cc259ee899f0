"""What the strategies have in common that divide the update and exchange no gradients (Ma 2018, U2 and U2b)."""

from __future__ import annotations

from typing import ClassVar, Literal

from manyhands.communication.communicator import Communicator, reference_B
from manyhands.communication.reduction import slices
from manyhands.contract import Reference, Replica, Setting, Strategy, Traffic, Worker
from manyhands.errors import Problem


class Slicing(Strategy):
    """Worker p updates slice p of the parameters; an all-gather of the slices makes them whole again."""

    paper: ClassVar[Reference] = Reference(
        "Ma", "Parallel parameter update for deep neural network", 2018, "CSE 633 course project", survey="V-A"
    )
    identical: ClassVar[bool] = True
    uncompressed: ClassVar[str] = "slices of parameters are gathered, and a compressed parameter is another one."

    @property
    def parameters(self) -> Literal["common", "own"]:
        """One writer an element."""
        return "common"

    def traffic(self, numel: int, size: int, itemsize: int = 4) -> Traffic:
        """(P−1)/P · n elements: an all-gather of slices."""
        return Traffic(reference_B("all_gather", numel * itemsize, size), size - 1)

    def problems(self, setting: Setting) -> list[Problem]:
        """A whole-tensor optimizer cannot be asked for a slice."""
        if setting.workers == 1 or setting.elementwise:
            return []
        return [
            Problem(
                f"{self.name} with an optimizer that looks at whole tensors",
                "a slice can be updated alone only if the optimizer works element by element.",
                "Use synchronous(update='replicated'), or an optimizer such as sgd, adam, adamw, adagrad or rmsprop.",
            )
        ]


class SlicingWorker(Worker):
    """Knows its slice of each piece."""

    def __init__(self, replica: Replica, comm: Communicator) -> None:
        super().__init__(replica, comm)
        self._groups = [comm.over(piece.replicated_over) for piece in replica.pieces]
        self._bounds = [
            slices(piece.flat.numel(), group.size)[group.rank]
            for piece, group in zip(replica.pieces, self._groups, strict=True)
        ]
