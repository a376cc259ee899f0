"""One weird trick: the same workers divide the images in the convolutions and the neurons in the dense layers (survey
§V-D, hybrid parallelism).

Convolutions have few parameters and much to compute, so each of K workers takes its own images through them and their
gradients are averaged; dense layers have most of the parameters, so each worker has some neurons of every one of them,
all images pass through, and their gradients never travel. In between, activations do. With N images, n_p of them on
worker p, h the features that enter the dense layers and W[p, :] the rows of weights of p's neurons:

    a    all workers gather all N rows of h; one pass of the dense layers
    b    each worker in turn broadcasts its rows; K passes of n_k rows
    c    each worker's rows are cut into K parts; pass k takes the k-th part of all, K passes of N/K rows

    forward   z_p = W[p, :] x           x is gathered between dense layers; outputs go to the owners of the images
    backward  ∂x = Σ_p W[p, :]ᵀ ∂z_p    of which each worker is sent its own rows (of h) or neurons (of x)

A pass is forward and backward, so in b and c the dense layers keep activations of a K-th of the rows at a time.

A. Krizhevsky (2014), "One weird trick for parallelizing convolutional neural networks", arXiv:1404.5997, §4.

Payload per rank: `exchanged_B`; the same for a, b and c, 2(K−1)/K · N · width elements for h and likewise between any
two dense layers, where shares and parts come out even. Beside it the numbers of rows and losses, as ``control``.
Guarantee: loss and gradients are those of one worker on the N images, up to the order of summation, for shares of any
sizes. ``updates=each`` is an approximation, the paper's variant: dense layers are updated after every pass, on the mean
over its rows, so that they see K small batches where the convolutions see one large batch. A loss that is not finite
then leaves the updates of the passes before it done.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from manyhands.catalogue import Reference
from manyhands.communication.communicator import Communicator, reference_B
from manyhands.communication.topology import shares
from manyhands.contract import Batch, Block, Piece, rows_of
from manyhands.errors import BadInput, UnknownName
from manyhands.partition.backward import backward
from manyhands.partition.conjugate import TAG, gathered, join, sum_part, told
from manyhands.partition.data import DataReplica, LastPass
from manyhands.partition.pipeline.cut import cut as cut_into_stages
from manyhands.partition.tensor.chain import elementwise, sequence
from manyhands.partition.tensor.cut import Cut, tied_parameters

SCHEMES = ("a", "b", "c")
UPDATES = ("step", "each")

#: The axis of the mesh along which the dense layers are cut: the one that divides the images.
AXIS = "data"

Bounds = tuple[int, int]

_SAID = "tensor=one_weird_trick"


# -- pure: which rows pass when, and how many bytes that is ------------------------------------------------------------


def passes(scheme: str, counts: Sequence[int]) -> list[list[Bounds]]:
    """By pass and rank the bounds of that rank's rows, of which it has ``counts[rank]``. No pass is without rows.

    >>> passes("b", [3, 2])
    [[(0, 3), (0, 0)], [(0, 0), (0, 2)]]
    >>> passes("c", [3, 2])
    [[(0, 2), (0, 1)], [(2, 3), (1, 2)]]
    """
    size = len(counts)
    if scheme == "a":
        made = [[(0, n) for n in counts]]
    elif scheme == "b":
        made = [[(0, n) if p == k else (0, 0) for p, n in enumerate(counts)] for k in range(size)]
    else:
        made = [[shares(n, size)[k] for n in counts] for k in range(size)]
    return [rows for rows in made if any(lo < hi for lo, hi in rows)]


class Exchanged(NamedTuple):
    """Bytes that a rank sends in a step because the dense layers are cut, forward and backward together."""

    boundary: int  # between the convolutions and the first dense layer
    hidden: int  # between dense layers
    outputs: int  # of the last one, to the owners of the images, and their gradients back


def exchanged_B(
    scheme: str, counts: Sequence[int], widths: Sequence[int], rank: int = 0, *, itemsize: int = 4
) -> Exchanged:
    """What ``rank`` sends, the ranks having ``counts`` images; ``widths`` are of the features and of each dense layer.

    For what is gathered it is the mean over the ranks, as `reference_B` has it; for messages it is exact.
    """
    size, total, own = len(counts), sum(counts), counts[rank]
    if size == 1:
        return Exchanged(0, 0, 0)
    features, *hidden, outputs = (width * itemsize for width in widths)
    parts = [hi - lo for lo, hi in shares(widths[-1], size)]
    boundary, between = (total - own) * features, 0
    for rows in passes(scheme, counts):
        lengths = [hi - lo for lo, hi in rows]
        root = _only(lengths)
        if root is None:
            boundary += reference_B("all_gather", sum(lengths) * features, size)
        else:
            boundary += reference_B("broadcast", sum(lengths) * features, size, rank=rank, root=root)
        between += sum(reference_B("all_gather", sum(lengths) * width, size) for width in hidden)
    for width in widths[1:-1]:
        lo, hi = shares(width, size)[rank]
        between += total * (width - (hi - lo)) * itemsize
    answered = (total - own) * parts[rank] * itemsize + own * (outputs - parts[rank] * itemsize)
    return Exchanged(boundary, between, answered)


def averaged_B(parameters: int, size: int, *, itemsize: int = 4) -> int:
    """What a rank sends to have the mean of so many gradients: of all in data parallelism, of the convolutions here."""
    return reference_B("all_reduce", parameters * itemsize, size)


def _only(lengths: Sequence[int]) -> int | None:
    """The one rank that has rows, if it is only one."""
    having = [p for p, n in enumerate(lengths) if n]
    return having[0] if len(having) == 1 else None


# -- exchanges that autograd passes through ----------------------------------------------------------------------------


class _Brought(torch.autograd.Function):
    """All ranks' rows; the gradient of a row is summed on its owner."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Communicator, lengths: Sequence[int]) -> Tensor:
        ctx.group, ctx.lengths = group, lengths
        root = _only(lengths)
        if root is None:
            return join(x, group, 0, lengths)
        rows = x.new_empty(lengths[root], x.shape[1])
        if root == group.rank:
            rows.copy_(x)
        with group.counting("cut"):
            group.broadcast(rows, root).wait()
        return rows

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return sum_part(grad, ctx.group, 0, ctx.lengths), None, None


class _Answered(torch.autograd.Function):
    """From some columns of all rows to all columns of one's own rows; backward the other way."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, group: Communicator, rows: Sequence[int], columns: Sequence[int]) -> Tensor:
        ctx.group, ctx.rows, ctx.columns = group, rows, columns
        return _turned(y, group, 0, rows, columns)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return _turned(grad, ctx.group, 1, ctx.columns, ctx.rows), None, None, None


def _turned(x: Tensor, group: Communicator, dim: int, lengths: Sequence[int], others: Sequence[int]) -> Tensor:
    """Rank p is sent its ``lengths[p]`` along ``dim`` and joins what comes along the other, ``others[q]`` of rank q."""
    rank, size = group.rank, group.size
    parts = [part.contiguous() for part in x.split(list(lengths), dim)]  # type: ignore[no-untyped-call]
    shape = [lengths[rank], lengths[rank]]
    got = [parts[rank]] * size
    with group.counting("cut"):
        for shift in range(1, size):
            to, frm = (rank + shift) % size, (rank - shift) % size
            shape[1 - dim] = others[frm]
            work = group.send(parts[to], to, TAG) if parts[to].numel() else None
            got[frm] = x.new_empty(shape)
            if got[frm].numel():
                group.recv(got[frm], frm, TAG)
            if work is not None:
                work.wait()
    return torch.cat(got, 1 - dim)


class Rows:
    """How many rows each rank has in the pass at hand. Where nobody has said, ranks tell each other: in evaluation."""

    def __init__(self, group: Communicator) -> None:
        self.group = group
        self.lengths: list[int] = []
        self._said = False

    @contextlib.contextmanager
    def being(self, lengths: list[int]) -> Iterator[None]:
        """Known inside, so that nobody asks."""
        self.lengths, self._said = lengths, True
        try:
            yield
        finally:
            self._said = False

    def enter(self, x: Tensor) -> Tensor:
        """All ranks' rows; collective."""
        if x.dim() != 2:
            raise BadInput(
                f"{_SAID}: the first dense layer is given {x.dim()} dims; it takes (images, features). "
                "Put an nn.Flatten before it."
            )
        if not self._said:
            self.lengths = [int(n) for n in told([len(x)], self.group)[:, 0]]
        return _Brought.apply(x, self.group, self.lengths)  # type: ignore[no-untyped-call, no-any-return]

    def leave(self, y: Tensor, columns: Sequence[int]) -> Tensor:
        """One's own rows of all neurons; collective."""
        return _Answered.apply(y, self.group, self.lengths, columns)  # type: ignore[no-untyped-call, no-any-return]


# -- the cut -----------------------------------------------------------------------------------------------------------


@dataclass
class HybridCut(Cut):
    """The model as convolutions and dense layers, of which some neurons are here."""

    convolutions: nn.Module = field(default_factory=nn.Identity)  # what comes before the first dense layer
    dense: nn.Module = field(default_factory=nn.Identity)  # and the rest
    widths: tuple[int, ...] = ()  # of the features and of each dense layer
    rows: Rows | None = None
    scheme: str = "a"
    updates: str = "step"

    def sent_B(self, counts: Sequence[int], rank: int) -> int:
        """Payload of ``rank`` in a step of so many images a rank; in full precision."""
        itemsize = next(self.dense.parameters()).element_size()
        return sum(exchanged_B(self.scheme, counts, self.widths, rank, itemsize=itemsize))


def one_weird_trick(
    model: nn.Module, group: Communicator, inputs: Any, scheme: str = "a", updates: str = "step", dense: str = ""
) -> Cut:
    """Convolutions by images and dense layers by neurons, on the same workers: those of the data axis.

    ``dense`` names the module with which the dense layers begin; by default they are the Linear layers at the end of a
    `nn.Sequential` with only functions of single elements between them.
    """
    for what, value, choices in (("scheme", scheme, SCHEMES), ("updates", updates, UPDATES)):
        if value not in choices:
            raise UnknownName(f"{what} of one_weird_trick", value, choices)
    if updates == "each" and scheme == "a":
        raise BadInput(f"{_SAID}(scheme=a, updates=each): in a there is one pass. Use scheme=b or c.")
    layers = dense_layers(model, dense, group.size)
    stages = cut_into_stages(model, [layers[0][0]]).stages
    if not any(p.requires_grad for p in stages[0].parameters()):
        raise BadInput(
            f"{_SAID}: nothing before {layers[0][0]} is trained, so there is no gradient to average. "
            "Where all layers are dense, use mesh tensor instead, e.g. --mesh tensor=2."
        )
    if group.size == 1:
        return Cut()
    rows = Rows(group)
    result = HybridCut(
        convolutions=stages[0],
        dense=stages[1],
        widths=(layers[0][1].in_features, *(layer.out_features for _, layer in layers)),
        rows=rows,
        scheme=scheme,
        updates=updates,
    )
    before: list[int] | None = None
    for path, linear in layers:
        whole = linear.out_features
        _gather_before(linear, rows, before)
        before = [hi - lo for lo, hi in shares(whole, group.size)]
        result.blocks |= {f"{path}.{name}": block for name, block in _keep_own_(linear, group).items()}
        result.done[path] = f"neurons {whole} → {linear.out_features}"
    layers[-1][1].register_forward_hook(lambda _, __, y: rows.leave(y, before))  # type: ignore[arg-type]
    if updates == "each":
        result.done[layers[0][0]] += ", updated after each pass: not what one worker does"
    return result


vars(one_weird_trick)["paper"] = Reference(
    "A. Krizhevsky",
    "One weird trick for parallelizing convolutional neural networks",
    2014,
    "arXiv:1404.5997",
    survey="V-D",
)


def dense_layers(model: nn.Module, dense: str, size: int) -> list[tuple[str, nn.Linear]]:
    """Paths and layers that are going to be cut, in the order of the forward pass; raises `BadInput`."""
    chain = _chain(model, dense)
    linear = [k for k, (_, module) in enumerate(chain) if type(module) is nn.Linear]
    if not linear:
        raise BadInput(f"{_SAID}: there is no Linear layer {f'from {dense} on' if dense else 'in the model'}.")
    start = linear[-1]
    while start > 0 and (type(chain[start - 1][1]) is nn.Linear or elementwise(chain[start - 1][1])):
        start -= 1
    if dense and start > linear[0]:
        path, module = chain[start - 1]
        raise BadInput(
            f"{_SAID}: {path} is a {type(module).__name__}, and between dense layers there are only functions of "
            "single elements, as each worker has some of the neurons. Name a module behind it as dense=."
        )
    found = [(path, module) for path, module in chain[start:] if isinstance(module, nn.Linear)]
    tied = {name.rpartition(".")[0] for name in tied_parameters(model)}
    for path, layer in found:
        if layer.out_features < size or path in tied:
            why = "shares a parameter with another" if path in tied else f"has {layer.out_features} neurons"
            raise BadInput(
                f"{_SAID}: {path} {why}, and each of {size} workers is to have some of its own. Use fewer workers, or "
                "name a module behind it as dense=."
            )
    return found


def _chain(model: nn.Module, dense: str) -> list[tuple[str, nn.Module]]:
    """The modules among which the dense layers are: from ``dense`` on in a sequence, else those in ``dense``."""
    if type(model) is nn.Sequential:
        chain = sequence(model, "one_weird_trick")
        starts = [k for k, (path, _) in enumerate(chain) if not dense or f"{path}.".startswith(f"{dense}.")]
        if not starts:
            raise UnknownName("module with which the dense layers begin", dense, [path for path, _ in chain])
        return chain[starts[0] :]
    if not dense:
        raise BadInput(
            f"{_SAID}: {type(model).__name__} is no nn.Sequential, in which the dense layers would be the last. Name "
            "the nn.Sequential that they are, e.g. one_weird_trick(dense=classifier)."
        )
    modules = dict(model.named_modules())
    if dense not in modules:
        raise UnknownName("module that is the dense layers", dense, [path for path in modules if path])
    named = modules[dense]
    if type(named) is nn.Linear:
        return [(dense, named)]
    return [(f"{dense}.{path}", module) for path, module in sequence(named, "one_weird_trick")]


def _keep_own_(linear: nn.Linear, group: Communicator) -> Mapping[str, Block]:
    """The layer becomes one of this rank's neurons: it stays what it is, with less in it."""
    lo, hi = shares(linear.out_features, group.size)[group.rank]
    blocks = {}
    for name, tensor in list(linear.named_parameters(recurse=False)):
        blocks[name] = dataclasses.replace(Block.of(tensor, 0, [(lo, hi)]), axis=AXIS)
        own = nn.Parameter(blocks[name].take(tensor.detach()), requires_grad=tensor.requires_grad)
        linear.register_parameter(name, own)
    linear.out_features = hi - lo
    return blocks


def _gather_before(linear: nn.Linear, rows: Rows, lengths: Sequence[int] | None) -> None:
    """What comes into ``linear`` is gathered: all ranks' rows of features, or all neurons of the layer before."""
    if lengths is None:
        linear.register_forward_pre_hook(lambda _, x: (rows.enter(x[0]),))
    else:
        linear.register_forward_pre_hook(lambda _, x: (gathered(x[0], rows.group, -1, lengths),))


# -- the replica -------------------------------------------------------------------------------------------------------


class HybridReplica(DataReplica):
    """`DataReplica` of a model that `one_weird_trick` has cut; a step is the passes of its scheme.

    The dense layers' pieces lie on this rank alone and have the gradient of all workers' images. Of the convolutions'
    the strategy takes the mean, so it wants all workers in every step. Every worker returns the loss of all.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        loss: Any,
        comm: Communicator,
        *,
        cut: HybridCut,
        **options: Any,
    ) -> None:
        assert cut.rows is not None
        super().__init__(model, optimizer, loss, comm, **options)
        self._cut, self._rows, self._group = cut, cut.rows, cut.rows.group
        self._dense = [piece for piece in self.pieces if AXIS not in piece.replicated_over]
        weight = next(p for p in cut.dense.parameters())
        bfloat16 = options.get("precision") == "bfloat16"
        self._nothing = weight.new_empty(0, cut.widths[0], dtype=torch.bfloat16 if bfloat16 else weight.dtype)
        self._learns = any(p.requires_grad for p in cut.convolutions.parameters())
        self._each = cut.updates == "each"
        self._updating = False

    def _passes(self, batch: Batch, last_pass: LastPass) -> tuple[Tensor, float]:
        features, rank = self._nothing, self._group.rank
        if batch.count:
            with self._autocast():
                features = self._cut.convolutions(batch.inputs).to(features.dtype)
        counts = [int(n) for n in told([batch.count], self._group)[:, 0]]
        mine, grads = torch.zeros(2, dtype=torch.float64), [self._nothing]
        for rows in passes(self._cut.scheme, counts):
            lo, hi = rows[rank]
            part = features.detach()[lo:hi].requires_grad_(self._learns)
            found = self._pass(part, rows_of(batch.target, lo, hi), [b - a for a, b in rows])
            mine += found
            if part.grad is not None:
                grads.append(part.grad)
            if self._each and not self._update_dense(found):
                break
        total, counted = told(mine.tolist(), self._group).sum(0).tolist()
        sums, own = self._sums(), float(mine[1])
        # A mean over workers comes of all this, and a sum is to be the sum of them.
        count, weight = (1.0, 1.0 / self._group.size) if sums else (own, own or 1.0)
        loss = torch.tensor(total / (self._group.size if sums else counted or 1.0), dtype=torch.float64)
        if not math.isfinite(total):
            return loss, count
        if not sums:
            for piece in self._dense:
                piece.grad.div_(counted or 1.0)
        last_pass(loss, count)
        if features.requires_grad:
            torch.autograd.backward(features, torch.cat(grads).div_(weight))
        return loss, count

    def _pass(self, part: Tensor, target: Any, lengths: list[int]) -> Tensor:
        """Forward and backward of the dense layers; this rank's total of the loss and what it counted."""
        with self._rows.being(lengths):
            with self._autocast():
                outputs = self._cut.dense(part)
                # Nobody here has an image in this pass: backward is taken part in all the same.
                total, counted = self._total(outputs, target, len(part)) if len(part) else (outputs.sum(), 0.0)
            backward(total)
        return torch.tensor([float(total.detach()), counted], dtype=torch.float64)

    def _total(self, outputs: Tensor, target: Any, rows: int) -> tuple[Tensor, float]:
        assert self.loss is not None
        result = self.loss(outputs, target)
        if isinstance(result, Tensor):
            return result * rows, float(rows)
        total, counted = result
        if counted is None:
            self._summed(total)  # refuses a sum that does not say so
        return total, float(rows if counted is None else counted)

    def _update_dense(self, found: Tensor) -> bool:
        """Update the dense layers on the mean over a pass; False, and nothing, if its loss is not finite."""
        total, counted = told(found.tolist(), self._group).sum(0).tolist()
        if not math.isfinite(total):
            return False
        before, self._updating = self.update_s, True
        for piece in self._dense:
            if not self._sums():
                piece.grad.div_(counted or 1.0)
            self.apply(piece, 0, piece.flat.numel())
            piece.grad.zero_()
        self._updating = False
        self.compute_s -= self.update_s - before
        return True

    def apply(self, piece: Piece, lo: int, hi: int) -> None:
        """See `contract.Replica.apply`; with ``updates=each`` dense layers have had theirs."""
        if self._updating or not self._each or AXIS in piece.replicated_over:
            super().apply(piece, lo, hi)
