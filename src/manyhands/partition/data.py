"""The whole model on every worker (survey §V-A, data or pattern parallelism): nothing is cut.

Parameters of one group and dtype are laid end to end in one flat vector, and so are their gradients; the model's
parameters become views, so backward writes each gradient where the exchange needs it. Views keep the strides of the
parameters: a convolution in channels-last memory stays so.

Cost beyond the model: nothing; parameters in common memory exist once for all workers.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from manyhands.communication.communicator import Communicator
from manyhands.contract import Batch, Piece, Ready, StateSlice
from manyhands.partition.backward import backward
from manyhands.partition.buckets import Announcer
from manyhands.partition.update import SliceUpdate, Span, strides_of

log = logging.getLogger(__name__)

#: Called before the backward that makes gradients final, with the loss and count it belongs to.
LastPass = Callable[[Tensor, float], None]

_NOTHING = contextlib.nullcontext()


class DataReplica:
    """A whole model with its optimizer, its parameters in ``comm``'s symmetric memory.

    ``common=True``: one copy of the parameters may serve all workers (the strategy keeps them equal). Collective:
    every worker starts with rank 0's parameters and buffers. ``shares``: into how many a batch is divided (default: one
    a worker), by which a sum over samples is scaled.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        loss: Callable[..., Any] | None,
        comm: Communicator,
        *,
        common: bool,
        micro_batches: int = 1,
        clip: float | None = None,
        precision: str = "float32",
        shares: int | None = None,
    ) -> None:
        self.model, self.optimizer, self.loss = model, optimizer, loss
        self.clip = clip
        self.compute_s = self.update_s = 0.0
        self.pieces: list[Piece] = []
        self.buffers: list[Tensor] = list(model.buffers())
        self._comm = comm
        self._shares = comm.size if shares is None else shares
        self._micro_batches = micro_batches
        self._l2 = float(getattr(loss, "l2", 0.0))
        self._decayed = False  # this step's gradients hold the L2 term already
        self._spans: list[list[Span]] = []
        self._groups: list[int] = []
        self._updates: dict[tuple[int, int, int], SliceUpdate] = {}
        self._saved_state: Sequence[StateSlice] = ()
        self._index: dict[int, int] = {}
        self._all_in_use = False
        self._in_use: set[str] = set()  # parameters that some worker's backward has reached; the same on all
        self._announcer: Announcer | None = None
        self._autocast: Callable[[], Any] = lambda: _NOTHING
        if precision == "bfloat16":
            device = next((p.device.type for p in model.parameters()), "cpu")
            self._autocast = lambda: torch.autocast(device, dtype=torch.bfloat16)
        self._lay_out(common)

    def _lay_out(self, common: bool) -> None:
        names = {id(p): name for name, p in self.model.named_parameters()}
        chunks: dict[tuple[int, torch.dtype], list[torch.nn.Parameter]] = {}
        for g, group in enumerate(self.optimizer.param_groups):
            for p in group["params"]:
                if p.requires_grad:
                    chunks.setdefault((g, p.dtype), []).append(p)
        for (g, dtype), parameters in chunks.items():
            numel = sum(p.numel() for p in parameters)
            flat = self._comm.allocate(numel, dtype, common=common)
            grad = self._comm.allocate(numel, dtype)
            spans: list[Span] = []
            at = 0
            writes = self._comm.rank == 0 or not self._comm.is_common(flat)
            for p in parameters:
                shape, strides = p.shape, strides_of(p)
                view = flat[at : at + p.numel()].as_strided(shape, strides, at + flat.storage_offset())
                if writes:
                    view.copy_(p.data)
                p.data = view
                p.grad = grad[at : at + p.numel()].as_strided(shape, strides, at + grad.storage_offset())
                spans.append(Span(names.get(id(p), f"group{g}.{len(spans)}"), p, at, at + p.numel()))
                at += p.numel()
            self._comm.broadcast(flat).wait()
            self._index[id(flat)] = len(self.pieces)
            self.pieces.append(Piece(flat, grad, frozenset({"data"}), name=f"group{g}.{str(dtype)[6:]}"))
            self._spans.append(spans)
            self._groups.append(g)
        frozen = [p.data for p in self.model.parameters() if not p.requires_grad]
        for tensor in itertools.chain(frozen, self.buffers):
            # Whole numbers and truth values of every width travel as int64, which all transports move.
            carried = tensor.contiguous() if tensor.dtype.is_floating_point else tensor.to(torch.int64).contiguous()
            self._comm.broadcast(carried).wait()
            tensor.copy_(carried)

    # -- gradients -------------------------------------------------------------------------------------------------

    def gradients(self, batch: Batch, ready: Ready | None = None) -> tuple[Tensor, float]:
        """See `contract.Replica.gradients`."""
        t0 = time.perf_counter()
        for piece in self.pieces:
            piece.grad.zero_()
        self._decayed = False
        announcer = None
        if ready is not None:
            announcer = self._announcer = self._announcer or Announcer(self.pieces, self._spans)
            announcer.begin(ready)
        with _NOTHING if self._all_in_use else self._watch_for_unused():
            loss, count = self._passes(batch, _nothing if announcer is None else announcer.last_pass)
            # Before the watch asks around: collectives match by order, also where a share reaches no parameter.
            if announcer is not None:
                announcer.finish(loss, count)
        self.compute_s += time.perf_counter() - t0
        return loss, count

    def _passes(self, batch: Batch, last_pass: LastPass) -> tuple[Tensor, float]:
        if batch.count == 0:
            return torch.zeros(()), 1.0 if self._sums() else 0.0
        if self._micro_batches > 1:
            return self._many_passes(batch, last_pass)
        result = self._forward(batch.inputs, batch.target)
        if isinstance(result, Tensor):
            objective, loss, count = result, result.detach(), float(batch.count)
        else:
            total, counted = result
            count = 1.0 if counted is None else float(counted)
            objective = self._summed(total) if counted is None else total / (count or 1.0)
            loss = total.detach() / (count or 1.0)
        last_pass(loss, count)
        backward(objective)
        return loss, count

    def _many_passes(self, batch: Batch, last_pass: LastPass) -> tuple[Tensor, float]:
        """Micro-batches of (nearly) equal size, one after the other; gradients add up in place."""
        n, m = batch.count, min(self._micro_batches, batch.count)
        loss, count, counts_itself = torch.zeros(()), 0.0, False
        for k in range(m):
            lo, hi = k * n // m, (k + 1) * n // m
            result = self._forward(_rows(batch.inputs, lo, hi), _rows(batch.target, lo, hi))
            if isinstance(result, Tensor):
                objective = result * ((hi - lo) / n)
                loss, count = loss + objective.detach(), count + hi - lo
            else:
                total, counted = result
                counts_itself = counted is not None
                objective = self._summed(total) if counted is None else total
                loss, count = loss + total.detach(), count + float(counted) if counts_itself else 1.0
            if k == m - 1 and not counts_itself:
                last_pass(loss, count)
            backward(objective)
        if counts_itself:
            for piece in self.pieces:
                piece.grad.div_(count or 1.0)
            loss = loss / (count or 1.0)
        return loss, count

    def _forward(self, inputs: Any, target: Any) -> Any:
        with self._autocast():
            if self.loss is not None:
                return self.loss(self.model(inputs), target)
            outputs = self.model(inputs) if target is None else self.model(inputs, target)
            return getattr(outputs, "loss", outputs)

    def _sums(self) -> bool:
        return getattr(self.loss, "reduction", "mean") == "sum"

    def _summed(self, total: Tensor) -> Tensor:
        """A sum over a share, scaled so that the mean over shares is the sum over the batch."""
        return total * self._shares if self._shares > 1 else total

    @contextlib.contextmanager
    def _watch_for_unused(self) -> Iterator[None]:
        """Find the parameters that no worker's backward has reached so far; in every step while there are any."""
        spans = [s for group in self._spans for s in group]
        reached: set[str] = set()
        watch: Callable[[Span], Any] = lambda s: s.parameter.register_post_accumulate_grad_hook(  # type: ignore[no-untyped-call]  # noqa: E731
            lambda _: reached.add(s.name)
        )
        hooks = [watch(s) for s in spans]
        yield
        for hook in hooks:
            hook.remove()
        seen = torch.tensor([float(s.name in reached or s.name in self._in_use) for s in spans])
        with self._comm.counting("control"):
            self._comm.all_reduce(seen).wait()
        for s, workers in zip(spans, seen.tolist(), strict=True):
            s.unused = workers == 0
        unused = [s.name for s in spans if s.unused]
        first = not self._in_use
        self._in_use.update(s.name for s in spans if not s.unused)
        self._all_in_use = not unused
        if unused and first and self._comm.rank == 0:
            log.warning("parameters that no worker's loss depends on stay as they are: %s", ", ".join(unused))

    # -- update ----------------------------------------------------------------------------------------------------

    def apply(self, piece: Piece, lo: int, hi: int) -> None:
        """See `contract.Replica.apply`."""
        if lo >= hi:
            return
        t0 = time.perf_counter()
        i = self._index[id(piece.flat)]
        if self._l2 and not self._decayed:
            piece.grad[lo:hi].add_(piece.flat[lo:hi], alpha=self._l2)
        self._update(i, lo, hi)()
        self.update_s += time.perf_counter() - t0

    def _update(self, i: int, lo: int, hi: int) -> SliceUpdate:
        try:
            return self._updates[i, lo, hi]
        except KeyError:
            update = SliceUpdate(self.optimizer, self._groups[i], self.pieces[i], self._spans[i], lo, hi)
            update.load(self._saved_state)
            self._updates[i, lo, hi] = update
            return update

    def norm(self, bounds: Sequence[tuple[int, int]]) -> Tensor:
        """See `contract.Replica.norm`."""
        if self._l2 and not self._decayed:  # the norm is that of the whole objective's gradient
            for piece, (lo, hi) in zip(self.pieces, bounds, strict=True):
                piece.grad[lo:hi].add_(piece.flat[lo:hi], alpha=self._l2)
            self._decayed = True
        parts: dict[int, Tensor] = {}
        for piece, spans, (lo, hi) in zip(self.pieces, self._spans, bounds, strict=True):
            for s in spans:
                start, stop = s.within(lo, hi)
                # torch leaves out what has no gradient; one zero more would round the sum of squares otherwise.
                if start < stop and not (s.unused and not bool(piece.grad[start:stop].any())):
                    whole = s.parameter.grad if (start, stop) == (s.start, s.stop) else None
                    parts[id(s.parameter)] = piece.grad[start:stop] if whole is None else whole
        ordered = [parts[id(p)] for p in self.model.parameters() if id(p) in parts]
        return torch.nn.utils.get_total_norm(ordered) if ordered else torch.zeros(())

    def optimizer_state(self) -> list[StateSlice]:
        """See `contract.Replica.optimizer_state`."""
        return [x for update in self._updates.values() for x in update.state()]

    def load_optimizer_state(self, state: Sequence[StateSlice]) -> None:
        """See `contract.Replica.load_optimizer_state`."""
        self._saved_state = tuple(state)
        self._updates.clear()
        if state:
            self._all_in_use = False
            self._in_use = {s.parameter for s in state}

    # -- the model, for evaluation and export ----------------------------------------------------------------------

    @contextlib.contextmanager
    def using(self, parameters: Sequence[Tensor], buffers: Sequence[Tensor] = ()) -> Any:
        """The model with other parameters (a consensus) and buffers for a while; this worker's own come back."""
        pairs = [
            (mine, other)
            for mine, other in zip(
                [*(p.flat for p in self.pieces), *self.buffers], [*parameters, *(buffers or self.buffers)], strict=True
            )
            if mine.data_ptr() != other.data_ptr()
        ]
        kept = [mine.clone() for mine, _ in pairs]
        for mine, other in pairs:
            mine.copy_(other)
        try:
            yield self.model
        finally:
            for (mine, _), own in zip(pairs, kept, strict=True):
                mine.copy_(own)


def _nothing(loss: Tensor, count: float) -> None:
    return


def _rows(tree: Any, lo: int, hi: int) -> Any:
    return torch.utils._pytree.tree_map(lambda t: t[lo:hi] if isinstance(t, Tensor) else t, tree)
