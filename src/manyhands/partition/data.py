"""A worker's model, the whole one (survey §V-A, data or pattern parallelism) or one with cut layers (§V-B).

Parameters of one group and dtype that the same workers hold are laid end to end in one flat vector, and so are their
gradients; the model's parameters become views, so backward writes each gradient where the exchange needs it. Views keep
the strides of the parameters: a convolution in channels-last memory stays so.

Cost beyond the model: nothing; parameters in common memory exist once for all workers.

A gradient that something puts in the place of its view would be computed and never used, so it is refused: at once in
the first steps, which are watched, later within as many steps as there are parameters.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from manyhands.communication.communicator import Communicator
from manyhands.communication.compression.compressor import Compressor
from manyhands.communication.compression.layout import Layout
from manyhands.contract import BUCKET_B, Batch, Block, Piece, Ready, StateSlice, carried, put_down, rows_of
from manyhands.errors import BadInput
from manyhands.partition.backward import backward
from manyhands.partition.buckets import Announcer, runs
from manyhands.partition.carving import Updates
from manyhands.partition.flexpoint import Flex16
from manyhands.partition.rows import RowUpdate, before_lookup, tables, take_gradient, updates_rows_alone
from manyhands.partition.update import Span, strides_of

log = logging.getLogger(__name__)

#: Called before the backward that makes gradients final, with the loss and count it belongs to.
LastPass = Callable[[Tensor, float], None]

#: The buffer of a module that draws from a stream of its rank's own; the last part of its name.
OWN_STREAM = "random_state_of_rank"

_NOTHING = contextlib.nullcontext()


class DataReplica:
    """A whole model with its optimizer, its parameters in ``comm``'s symmetric memory.

    ``common=True``: one copy of the parameters may serve all workers (the strategy keeps them equal). Collective:
    every worker starts with rank 0's parameters and buffers. ``shares``: into how many a batch is divided (default: the
    mesh's data axis), by which a sum over samples is scaled. ``sparse``: tables with sparse gradients become pieces of
    their own, where the optimizer allows it (see `rows`).

    ``blocks``: of the model's tensors those that are cut along an axis of the mesh, see `tensor`; layers that exchange
    in their own forward and backward need nothing else here. Along the axes ``divided`` ranks have no parameter in
    common.

    Trainable parameters that the optimizer does not have stay as they are, and their gradients are dropped. A buffer
    whose elements share memory (``expand``) becomes a copy of its own, since nobody can write to it.
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
        sparse: bool = False,
        blocks: Mapping[str, Block] | None = None,
        divided: frozenset[str] = frozenset(),
        bucket_B: int = BUCKET_B,
    ) -> None:
        self.model, self.optimizer, self.loss = model, optimizer, loss
        self.blocks = dict(blocks or {})
        #: What answers for the whole model, where all ranks of a replica call it with the same.
        self.answering: nn.Module = model
        self._divided = divided
        self.clip = clip
        self.compute_s = self.update_s = 0.0
        self.count = 0.0
        self.pieces: list[Piece] = []
        self.watching = True
        self._comm = comm
        self._shares = comm.mesh["data"] if shares is None else shares
        self._micro_batches = micro_batches
        self._l2 = float(getattr(loss, "l2", 0.0))
        self._decayed = False  # this step's gradients hold the L2 term already
        self._spans: list[list[Span]] = []
        self._updates = Updates(optimizer, self.pieces, self._spans)
        self._tables: dict[int, nn.Module] = {}  # by sparse piece: what looks rows up in it
        self._index: dict[int, int] = {}
        self._in_use: set[str] = set()  # parameters that a backward has reached, here or (once settled) anywhere
        self._unsettled: set[int] = set()  # pieces in which there may be others
        self._warned = False
        self._left_out: list[torch.nn.Parameter] = []
        self._bucket_B = bucket_B
        self._announcer: Announcer | None = None
        self._autocast: Callable[[], Any] = lambda: _NOTHING
        if precision == "bfloat16":
            device = next((p.device.type for p in model.parameters()), "cpu")
            self._autocast = lambda: torch.autocast(device, dtype=torch.bfloat16)
        self._format = Flex16(model) if precision == "flexpoint" else None
        _separate_elements(model)
        self._buffers = _places_of_buffers(model)
        # Whoever rounds weights where others read them would hide overflows from them.
        self._lay_out(common and self._format is None, tables(model) if sparse and not self._l2 else {})
        self._start_alike()
        if not self.pieces:
            raise BadInput("The optimizer has no trainable parameter; there is nothing to learn.")
        self._views = [(s.parameter, s.parameter.grad) for group in self._spans for s in group]
        self._turns = itertools.cycle(self._views)

    @property
    def buffers(self) -> list[Tensor]:
        """See `contract.Replica.buffers`: a forward may have put other tensors in their places."""
        if not self._buffers:
            return []
        return [b for place, name in self._buffers if (b := place.get(name)) is not None]

    def _lay_out(self, common: bool, sparse: Mapping[int, nn.Module]) -> None:
        names = {id(p): name for name, p in self.model.named_parameters()}
        chunks: dict[tuple[int, torch.dtype, torch.device, frozenset[str], int], list[torch.nn.Parameter]] = {}
        for g, group in enumerate(self.optimizer.param_groups):
            by_rows = updates_rows_alone(self.optimizer, g)
            for p in group["params"]:
                if p.requires_grad:
                    table = id(p) if by_rows and id(p) in sparse else 0
                    axes = self._axes(names.get(id(p), ""))
                    chunks.setdefault((g, p.dtype, p.device, axes, table), []).append(p)
        for (g, dtype, device, axes, table), parameters in chunks.items():
            numel = sum(p.numel() for p in parameters)
            holders = self._comm.over(axes)
            flat = self._allocate(holders, numel, dtype, device, common=common)
            grad = flat.new_empty(0) if table else self._allocate(holders, numel, dtype, device, common=False)
            spans: list[Span] = []
            at = 0
            writes = holders.rank == 0 or not holders.is_common(flat)
            for p in parameters:
                shape, strides = p.shape, strides_of(p)
                view = flat[at : at + p.numel()].as_strided(shape, strides, at + flat.storage_offset())
                if writes:
                    view.copy_(p.data)
                p.data = view
                if not table:
                    p.grad = grad[at : at + p.numel()].as_strided(shape, strides, at + grad.storage_offset())
                spans.append(Span(names.get(id(p), f"group{g}.{len(spans)}"), p, at, at + p.numel()))
                at += p.numel()
            holders.broadcast(flat).wait()
            self._index[id(flat)] = len(self.pieces)
            self._unsettled.add(len(self.pieces))
            name, bounds = f"group{g}.{str(dtype)[6:]}", [(s.start, s.stop) for s in spans]
            shapes = [tuple(p.shape) for p in parameters]
            piece = Piece(flat, grad, axes, name=name, group=g, spans=bounds, shapes=shapes)
            if table:
                piece.width = parameters[0].shape[1]
                self._tables[len(self.pieces)] = sparse[table]
                self._updates.rows[len(self.pieces)] = RowUpdate(self.optimizer, piece, spans[0].name)
            self.pieces.append(piece)
            self._spans.append(spans)

    def _axes(self, name: str) -> frozenset[str]:
        """Along which axes of the mesh the workers hold the same of a tensor."""
        cut = self._divided | ({self.blocks[name].axis} if name in self.blocks else set())
        return frozenset(a for a in self._comm.mesh if a not in cut)

    def _allocate(
        self, holders: Communicator, numel: int, dtype: torch.dtype, device: torch.device, *, common: bool
    ) -> Tensor:
        """Memory that collectives work on, where the model is."""
        memory = holders.allocate(numel, dtype, common=common)
        if memory.device == device:
            return memory
        if self._comm.size > 1 and self._comm.transport != "gloo":  # which carries it through the host's memory
            raise BadInput(
                f"A model on {device} with transport={self._comm.transport}: its workers exchange what lies on "
                f"{memory.device}. Use device=cpu, or transport=nccl for CUDA devices."
            )
        return torch.zeros(numel, dtype=dtype, device=device)

    def _start_alike(self) -> None:
        """What lies in no piece becomes rank 0's, too: frozen parameters, those nobody updates, and buffers."""
        laid = {id(s.parameter) for group in self._spans for s in group}
        others = [(name, p) for name, p in self.model.named_parameters() if id(p) not in laid]
        self._left_out = [p for _, p in others if p.requires_grad]
        if self._left_out and self._comm.rank == 0:
            names = ", ".join(name for name, p in others if p.requires_grad)
            log.warning("trainable parameters that the optimizer does not have stay as they are: %s", names)
        if self._comm.size == 1:
            return
        for name, tensor in itertools.chain(others, self.model.named_buffers()):
            if name.endswith(OWN_STREAM):  # what a rank draws for its part alone
                continue
            shared = carried(tensor, f"{type(self.model).__name__}'s {name}")
            self._comm.over(self._axes(name)).broadcast(shared).wait()
            tensor.data.copy_(put_down(shared, tensor))

    # -- gradients -------------------------------------------------------------------------------------------------

    @property
    def runs(self) -> int:
        """See `contract.Replica.runs`."""
        return runs(self.pieces, self._spans, self._bucket_B)

    def gradients(self, batch: Batch, ready: Ready | None = None) -> tuple[Tensor, float]:
        """See `contract.Replica.gradients`."""
        t0 = time.perf_counter()
        for piece in self.pieces:
            if not piece.width:
                _clear(piece)
        self._decayed = False
        parameter, grad = next(self._turns)
        if parameter.grad is not grad:
            self._refuse_replaced(parameter)
        if self._left_out:
            for parameter in self._left_out:
                parameter.grad = None
        announcer = None
        if ready is not None:
            announcer = self._announcer = self._announcer or Announcer(self.pieces, self._spans, self._bucket_B)
            announcer.begin(ready)
        watching = self._watch() if self.watching else _NOTHING
        with watching, _NOTHING if self._format is None else self._format.training():
            loss, count = self._passes(batch, _nothing if announcer is None else announcer.last_pass)
            if announcer is not None:
                announcer.finish(loss, count)
        for i in self._tables:
            take_gradient(self.pieces[i], self._spans[i][0].parameter)
        self.compute_s += time.perf_counter() - t0
        self.count = count
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
            result = self._forward(rows_of(batch.inputs, lo, hi), rows_of(batch.target, lo, hi))
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
            for i, piece in enumerate(self.pieces):
                grad = self._spans[i][0].parameter.grad if piece.width else piece.grad
                if grad is not None:  # no row of a table need have been touched
                    grad.div_(count or 1.0)
            loss = loss / (count or 1.0)
        return loss, count

    def _forward(self, inputs: Any, target: Any) -> Any:
        with self._autocast():
            if self.loss is not None:
                return self.loss(self.model(inputs), target)
            outputs = self.model(*arguments(inputs, target, self.loss))
            return getattr(outputs, "loss", outputs)

    def _sums(self) -> bool:
        return getattr(self.loss, "reduction", "mean") == "sum"

    def regroup(self, comm: Communicator) -> None:
        """See `contract.Replica.regroup`."""
        self._comm, self._shares = comm, comm.size

    def before_lookup(self, piece: int, tell: Callable[[Tensor], None]) -> None:
        """See `contract.Replica.before_lookup`."""
        before_lookup(self._tables[piece], tell)

    def share(self, batch: Batch) -> float:
        """See `contract.Replica.share`."""
        if self._sums() or batch.total is None:
            return 1 / self._shares
        return batch.count / batch.total

    def _summed(self, total: Tensor) -> Tensor:
        """A sum over a share, scaled so that the mean over shares is the sum over the batch.

        A sum says so beforehand: a worker whose share is empty calls no loss and must know how it counts.
        """
        if not self._sums():
            raise BadInput(
                "the loss returned (total, None), a sum over samples, but it has no reduction='sum'. Give it that "
                "attribute (my_loss.reduction = 'sum'), or return a mean or (total, count)."
            )
        return total * self._shares if self._shares > 1 else total

    @contextlib.contextmanager
    def _watch(self) -> Iterator[None]:
        """Find the parameters that no backward has reached so far, and gradients that lie where no exchange finds them.

        In every step while there are unused parameters.
        """
        watch: Callable[[Span], Any] = lambda s: s.parameter.register_post_accumulate_grad_hook(  # type: ignore[no-untyped-call]  # noqa: E731
            lambda _: self._in_use.add(s.name)
        )
        spans = [s for group in self._spans for s in group]
        hooks = [watch(s) for s in spans]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
        for s, (parameter, view) in zip(spans, self._views, strict=True):
            if parameter.grad is not view and view is not None:
                self._refuse_replaced(parameter)
            s.unused = s.name not in self._in_use
        self._buffers = _places_of_buffers(self.model)  # a first forward may have made some

    def _refuse_replaced(self, parameter: Tensor) -> None:
        name = next(s.name for group in self._spans for s in group if s.parameter is parameter)
        raise BadInput(
            f"Parameter {name} has another gradient than the view it was given: something replaced its .grad, "
            "such as zero_grad() in a forward or a hook that sets it to None. Gradients are added into one vector, "
            "which every step sets to zero by itself. Leave .grad in place."
        )

    def reached(self) -> dict[int, Tensor]:
        """See `contract.Replica.reached`."""
        return {
            i: torch.tensor([float(s.name in self._in_use) for s in self._spans[i]]) for i in sorted(self._unsettled)
        }

    def settle(self, reached: Mapping[int, Tensor]) -> None:
        """See `contract.Replica.settle`."""
        unused = []
        for i, seen in reached.items():
            for s, workers in zip(self._spans[i], seen.tolist(), strict=True):
                s.unused = workers == 0
            self._in_use.update(s.name for s in self._spans[i] if not s.unused)
            names = [s.name for s in self._spans[i] if s.unused]
            if not names:
                self._unsettled.discard(i)
            unused += names
        self.watching = bool(self._unsettled)
        if unused and not self._warned and self._comm.rank == 0:
            log.warning("parameters that no worker's loss depends on stay as they are: %s", ", ".join(unused))
        self._warned = True

    # -- update ----------------------------------------------------------------------------------------------------

    def apply(self, piece: Piece, lo: int, hi: int) -> None:
        """See `contract.Replica.apply`."""
        if lo >= hi:
            return
        t0 = time.perf_counter()
        i = self._index[id(piece.flat)]
        if self._l2 and not self._decayed:
            self._add_l2(i, lo, hi)
        self._updates(i, lo, hi)
        self.update_s += time.perf_counter() - t0

    def add_l2(self, bounds: Sequence[tuple[int, int]]) -> None:
        """See `contract.Replica.add_l2`."""
        if self._l2 and not self._decayed:
            for i, (lo, hi) in enumerate(bounds):
                self._add_l2(i, lo, hi)
            self._decayed = True

    def _add_l2(self, i: int, lo: int, hi: int) -> None:
        piece = self.pieces[i]
        # What no update touches has no part in the norm either.
        runs = [s.within(lo, hi) for s in self._spans[i] if not s.unused] if self.watching else [(lo, hi)]
        for start, stop in runs:
            if start < stop:
                piece.grad[start:stop].add_(piece.flat[start:stop], alpha=self._l2)
                piece.entries = None

    def norm(self, bounds: Sequence[tuple[int, int]]) -> Tensor:
        """See `contract.Replica.norm`."""
        parts: dict[int, Tensor] = {}
        for piece, spans, (lo, hi) in zip(self.pieces, self._spans, bounds, strict=True):
            for s in spans:
                start, stop = s.within(lo, hi)
                if s.name in self.blocks:  # copies of elements count where those are
                    stop = min(stop, s.start + self.blocks[s.name].own)
                # torch leaves out what has no gradient; one zero more would round the sum of squares otherwise.
                if start < stop and not s.unused:
                    whole = s.parameter.grad if (start, stop) == (s.start, s.stop) else None
                    own = piece.grad if piece.width else piece.grad[start:stop]
                    parts[id(s.parameter)] = own if whole is None else whole
        ordered = [parts.pop(id(p)) for p in self.model.parameters() if id(p) in parts]
        ordered += parts.values()  # of the optimizer's parameters those that are not the model's, such as a loss's
        nothing = torch.zeros((), dtype=self.pieces[0].flat.dtype)
        return torch.nn.utils.get_total_norm(ordered) if ordered else nothing

    def _inner(self) -> Communicator:
        """The ranks that hold parts of this replica."""
        return self._comm.over(frozenset(self._comm.mesh) - {"data"})

    def own_norm(self) -> Tensor:
        """See `contract.Replica.own_norm`."""
        bounds = [(0, piece.flat.numel()) for piece in self.pieces]
        group, mesh = self._inner(), self._comm.mesh
        if group.size == 1:
            return self.norm(bounds)
        square = torch.zeros(1, dtype=torch.float64)
        for i, piece in enumerate(self.pieces):
            holders = math.prod(mesh[a] for a in mesh if a in piece.replicated_over and a != "data")
            alone = [bound if k == i else (0, 0) for k, bound in enumerate(bounds)]
            square += self.norm(alone).to(torch.float64).square() / holders
        with group.counting("control"):
            group.all_reduce(square).wait()
        return square.sqrt()[0]

    def coded(self, compressor: Compressor, layout: Layout, encoded: float, decoded: float) -> None:
        """See `contract.Replica.coded`: here time passes by itself."""

    def any_of_us(self, flag: bool) -> bool:
        """See `contract.Replica.any_of_us`."""
        group = self._inner()
        if group.size == 1:
            return flag
        said = torch.tensor([float(flag)])
        with group.counting("control"):
            group.all_reduce(said).wait()
        return bool(said.item())

    def optimizer_state(self) -> list[StateSlice]:
        """See `contract.Replica.optimizer_state`."""
        return self._updates.state()

    def load_optimizer_state(self, state: Sequence[StateSlice]) -> None:
        """See `contract.Replica.load_optimizer_state`."""
        self._updates.load(state)
        if state:
            self.watching, self._unsettled = True, set(range(len(self.pieces)))
            self._in_use = {s.parameter for s in state}

    def format_state(self) -> dict[str, Any]:
        """See `contract.Replica.format_state`."""
        return {} if self._format is None else self._format.state_dict()

    def load_format_state(self, state: Mapping[str, Any]) -> None:
        """See `contract.Replica.load_format_state`."""
        if self._format is not None:
            self._format.load_state_dict(state)

    # -- the model, for evaluation and export ----------------------------------------------------------------------

    @contextlib.contextmanager
    def using(self, parameters: Sequence[Tensor], buffers: Sequence[Tensor] = ()) -> Any:
        """The model with other parameters (a consensus) and buffers for a while; this worker's own come back."""
        mine = self.buffers
        places = [(place, name, place.get(name)) for place, name in self._buffers]
        pairs = [
            (own, other)
            for own, other in zip(
                [*(p.flat for p in self.pieces), *mine], [*parameters, *(buffers or mine)], strict=True
            )
            if own.data_ptr() != other.data_ptr()
        ]
        kept = [own.detach().clone() for own, _ in pairs]
        with torch.no_grad():
            for own, other in pairs:
                own.copy_(other)
        try:
            yield self.model
        finally:
            for place, name, tensor in places:
                place[name] = tensor
            with torch.no_grad():
                for (own, _), value in zip(pairs, kept, strict=True):
                    own.copy_(value)


def _places_of_buffers(model: torch.nn.Module) -> list[tuple[dict[str, Any], str]]:
    """Where the model's buffers are found, in ``named_buffers``' order."""
    seen: set[int] = set()
    result = []
    for module in model.modules():
        for name, b in module._buffers.items():
            if b is not None and id(b) not in seen:
                seen.add(id(b))
                result.append((module._buffers, name))
    return result


def _separate_elements(model: torch.nn.Module) -> None:
    """Buffers made by ``expand`` become contiguous copies: nothing could be written to them, average or restored."""
    made: dict[int, Tensor] = {}
    for module in model.modules():
        for name, b in module._buffers.items():
            if b is None or b.layout is not torch.strided:
                continue
            if any(st == 0 and n > 1 for st, n in zip(b.stride(), b.shape, strict=True)):
                module._buffers[name] = made.setdefault(id(b), b.contiguous())


def _clear(piece: Piece) -> None:
    """Set the gradient to zero: where it is not, if that is known."""
    if piece.entries is None:
        piece.grad.zero_()
    else:
        piece.grad[piece.entries] = 0
        piece.entries = None


def _nothing(loss: Tensor, count: float) -> None:
    return


def arguments(inputs: Any, target: Any, loss: object) -> tuple[Any, ...]:
    """With what a model is called: one without a loss of the task's computes its own, from the target, too."""
    return (inputs,) if loss is not None or target is None else (inputs, target)
