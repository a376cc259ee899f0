"""PipeDream as a strategy: an asynchronous pipeline whose stages update after every backward, with weight stashing.

D. Narayanan, A. Harlap, A. Phanishayee and others (2019), PipeDream: generalized pipeline parallelism for DNN training,
SOSP, arXiv 1806.03377, section 3.3. With p stages, w_k those of stage k and u_t the optimizer's t-th update,

    stashing        w_k(t+1) = u_t(w_k(t), ∇_k f(w_1(t − p + 1), w_2(t − p + 2), …, w_p(t)))
    vertical sync   w_k(t+1) = u_t(w_k(t), ∇_k f(w_1(t − p + 1), w_2(t − p + 1), …, w_p(t − p + 1)))

It lies in ``partition`` because the update is part of the cut. The order of actions is `pipedream.pipedream`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from manyhands.catalogue import Reference
from manyhands.communication.communicator import Communicator, reference_B
from manyhands.contract import Batch, Replica, Setting, Strategy, Traffic, Worker
from manyhands.errors import Problem

if TYPE_CHECKING:
    from manyhands.partition.pipeline.stashing import StashingReplica


@dataclass(frozen=True)
class PipeDream(Strategy):
    """Stages update after every micro-batch, which passes forward and backward with the same weights at each stage.

    A step's batch is divided into the plan's ``micro_batches`` (the paper's mini-batches), each with an update of its
    own, by its own mean; ``in_flight`` of them are on their way at once (default: as many as there are stages). At the
    end of a step the pipeline is drained, so evaluations, checkpoints and schedules of the learning rate see whole
    updates; a step of many micro-batches comes near to the paper's pipeline, which never is. ``vertical_sync``: a
    micro-batch uses the same version of the weights at all stages.

    *Guarantee*: results repeat bit for bit, on any transport; with one stage, or ``in_flight=1``, it is SGD over the
    micro-batches one after the other. *Approximation*: once the pipeline is full, a gradient of stage k of p lacks
    the updates of the p − 1 − k micro-batches before it (``vertical_sync``: of p − 1).

    Replicas along the data axis divide every micro-batch and average their gradients stage by stage. Sends activations
    and gradients at each cut and, with R replicas, 2(R−1)/R · n a micro-batch; all of it counted as ``cut``. Keeps
    min(p − k, in_flight) versions of stage k's weights beside the newest ones, none at the last stage
    (``vertical_sync``: in_flight at every one).
    """

    in_flight: int | None = None
    vertical_sync: bool = False

    name: ClassVar[str] = "pipedream"
    paper: ClassVar[Reference] = Reference(
        "D. Narayanan, A. Harlap, A. Phanishayee, V. Seshadri, N. R. Devanur, G. R. Ganger, P. B. Gibbons, M. Zaharia",
        "PipeDream: generalized pipeline parallelism for DNN training",
        2019,
        "SOSP, arXiv 1806.03377",
        survey="V-C",
    )
    identical: ClassVar[bool] = True
    bears_cuts: ClassVar[bool] = True
    updates_within: ClassVar[bool] = True
    steadier: ClassVar[str] = "with pipedream, a smaller in_flight="

    def traffic(self, numel: int, size: int, itemsize: int = 4) -> Traffic:
        """Nothing of the strategy's own: the cut averages its gradients as it goes."""
        return Traffic()

    def averaged_B(self, gradients_B: int, replicas: int, micro_batches: int) -> int:
        """What a rank sends in a step for the mean over replicas, of so many bytes of gradients at its stage."""
        return micro_batches * reference_B("all_reduce", gradients_B, replicas)

    def problems(self, setting: Setting) -> list[Problem]:
        """A word for a yes or no, and a clip by the norm of a gradient that never exists as one."""
        found = []
        if self.vertical_sync not in (True, False):
            found.append(
                Problem(
                    f"pipedream(vertical_sync={self.vertical_sync!r})",
                    "it is True or False.",
                    "Use vertical_sync=True.",
                )
            )
        if setting.clip:
            found.append(
                Problem(
                    "clip with pipedream",
                    "stages update by themselves, so nobody knows the norm of the whole gradient.",
                    "Leave clip out, or use strategy=synchronous on the same mesh.",
                )
            )
        return found

    def start(self, replica: Replica, comm: Communicator) -> Worker:
        """This rank's worker, of a `StashingReplica`."""
        return PipeDreamWorker(replica, comm)


class PipeDreamWorker(Worker):
    """Its `step` is the replica's: stages update within."""

    replica: StashingReplica

    def step(self, batch: Batch) -> Tensor:
        """All micro-batches of a batch forward and backward, each with its update; their mean loss."""
        loss, _ = self.replica.gradients(batch)
        return loss

    @property
    def staleness(self) -> Mapping[int, int]:
        """Of this stage's gradients, how many lacked how many updates."""
        return self.replica.staleness

    def state_dict(self) -> dict[str, Any]:
        """How many updates there have been; between steps nothing is on its way and nothing is stashed."""
        return {"updates": self.replica.updates}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up a `state_dict` of the same rank."""
        self.replica.updates = state["updates"]
