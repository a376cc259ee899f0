"""The gradients of all workers in one pass: what lock-step workers compute on equal parameters, they compute together.

    g_p = ∇ (1/b) Σ_i ℓ(θ, x_pi)        p = 1 … P,   one vmap over p of one grad   (torch.func)

A forward over P small batches costs P dispatches of every operator; over one batch of P · b rows it costs one. Used
where it is the same: a strategy whose replicas are bit-identical, equal shares, a model that draws no random numbers
and keeps no buffers, a loss that is a mean. The first batched step is compared with the plain one, and whatever cannot
be batched, or differs, goes on plainly.

Guarantee: gradients equal the plain ones up to summation order (compared to `TOLERANCE` of the largest element).
Memory: P gradients more.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from manyhands.contract import Batch

if TYPE_CHECKING:
    from manyhands.simulation.replica import TimedReplica

log = logging.getLogger(__name__)

#: From so many workers on. Two are as fast by themselves, and then bit-equal to two real ones.
FEWEST = 8
#: Of the largest element of a gradient, by the dtype's precision.
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}


class Together:
    """Everybody's gradients of a step, computed when the first asks, handed out one by one."""

    def __init__(
        self, model: nn.Module, loss: Callable[..., Any], workers: int, rows: Callable[[int], tuple[Any, Any, int]]
    ) -> None:
        self._workers, self._rows = workers, rows
        self._step: int | None = None
        self._found: tuple[Tensor, dict[str, Tensor]] | None = None
        self._first_rank = -1
        self._checked = False
        self.works = _is_plain(model)
        self.why_not = "" if self.works else "the model keeps buffers or is not in one dtype that is compared"

        def one(parameters: dict[str, Tensor], inputs: Any, target: Any) -> tuple[Tensor, Tensor]:
            value = loss(torch.func.functional_call(model, parameters, (inputs,)), target)
            if not isinstance(value, Tensor):
                raise TypeError("a loss that counts for itself")
            return value, value.detach()

        self._all = torch.func.vmap(torch.func.grad(one, has_aux=True), in_dims=(None, 0, 0), randomness="error")

    def take(self, replica: TimedReplica, batch: Batch) -> tuple[Tensor, float] | None:
        """This worker's gradients into its pieces, and its loss and count; None: it has to compute them itself."""
        step, rank = replica._comm.step, replica._comm.rank
        if not self.works or replica.watching or step is None or batch.total != batch.count * self._workers:
            return None
        if step != self._step:
            self._step, self._found = step, self._compute(replica, step)
        if self._found is None:
            return None
        losses, gradients = self._found
        if not self._checked and not self._agrees(replica, batch, gradients, rank):
            return None
        with torch.no_grad():
            for spans in replica._spans:
                for s in spans:
                    assert s.parameter.grad is not None
                    s.parameter.grad.copy_(gradients[s.name][rank])
        return losses[rank], float(batch.count)

    def _compute(self, replica: TimedReplica, step: int) -> tuple[Tensor, dict[str, Tensor]] | None:
        inputs, target, count = self._rows(step)
        if count % self._workers:
            return None
        shape = (self._workers, count // self._workers)
        parameters = {name: p.detach() for name, p in replica.model.named_parameters()}
        try:
            cut = [
                torch.utils._pytree.tree_map(lambda t: t.view(shape + t.shape[1:]), tree) for tree in (inputs, target)
            ]
            gradients, losses = self._all(parameters, *cut)
        except Exception as e:  # an operator without a batching rule, data-dependent control flow, dropout …
            self._give_up(f"{type(e).__name__}: {str(e).splitlines()[0] if str(e) else ''}")
            return None
        return losses, gradients

    def _agrees(self, replica: TimedReplica, batch: Batch, gradients: dict[str, Tensor], rank: int) -> bool:
        """Once: whether that is what this worker computes by itself."""
        self._checked = True
        replica.plain_gradients(batch)
        for spans in replica._spans:
            for s in spans:
                plain = s.parameter.grad
                assert plain is not None
                scale = float(plain.abs().max()) or 1.0
                if float((gradients[s.name][rank] - plain).abs().max()) > TOLERANCE[plain.dtype] * scale:
                    self._give_up(f"the gradient of {s.name} differs")
                    return False
        return True

    def _give_up(self, why: str) -> None:
        self.works, self.why_not, self._found = False, why, None
        log.info("gradients of all workers at once do not work for this model (%s); one after the other", why)


def _is_plain(model: nn.Module) -> bool:
    return not list(model.buffers()) and {p.dtype for p in model.parameters()} <= TOLERANCE.keys()
