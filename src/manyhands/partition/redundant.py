"""Redundant neurons: each rank has twice the neurons or the weights, so that less is sent (survey §V-B).

The survey's account leaves two readings, and both are here.

    halo   P even, every layer in P blocks; rank p computes the blocks p and p+1 (mod P), so the even ranks cover each
           layer and so do the odd ones. a ← all of a, and ∂a_p ← Σ δW, within the ranks of one's own parity.
           Payload per rank: forward and backward (P−2)/P · n for n activations of a layer instead of (P−1)/P · n;
           with two ranks nothing at all. Twice the multiplications and the memory of weights.
    dual   Rank p computes block p. Of each layer but the first it has the rows W[p, :] (*receptive*: z_p = W[p, :] a)
           and the columns W[:, p] (*projective*: ∂a_p = W[:, p]ᵀ δ), so that backward gathers δ and sums nothing.
           Payload per rank: forward (P−1)/P · inputs, backward (P−1)/P · outputs. Against partial sums gathered in full
           width this saves a factor P, against a reduce-scatter of them, (P−1)/P · inputs, no byte.

Samples are on every rank, so the first layer sends nothing; the last layer's outputs are joined.

U. A. Müller & A. Gunzinger (1994), "Neural net simulation on parallel computers", IEEE International Conference on
Neural Networks, 3961–3966, as reported by Ben-Nun & Hoefler 2019 (arXiv:1802.09941) and the survey.

Guarantee: equal to the whole network, up to the order of summation. *dual*: a weight's two copies get the same gradient
bit for bit, as both ranks multiply the same blocks, and the same update, as optimizers of cut models work element by
element; nobody has to tell anybody. (Three replicas or more over gloo: up to the order of summation.) *halo*: the even
ranks and the odd ones train the network twice and hear nothing of each other; their sums have other summands, so with
more than two ranks they drift apart as two runs with another order of summation do. What counts in a norm, is saved and
is answered with is the even ranks'.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from manyhands.catalogue import Reference
from manyhands.communication.communicator import Communicator
from manyhands.communication.topology import Mesh, shares
from manyhands.contract import Block
from manyhands.errors import BadInput, UnknownName
from manyhands.partition.conjugate import copied, gathered, join, joined
from manyhands.partition.tensor.chain import parts, perceptron, replace
from manyhands.partition.tensor.cut import Cut
from manyhands.partition.tensor.layers import ColumnLinear, as_autocast

COPIES = ("halo", "dual")

Ranges = tuple[tuple[int, int], ...]
Ranged = tuple[tuple[int, Ranges], ...]


def of_halo(count: int, rank: int, size: int) -> Ranges:
    """The neurons of a rank: two blocks of `shares`, the one after the last being the first."""
    blocks = shares(count, size)
    return blocks[rank], blocks[(rank + 1) % size]


def halo_B(count: int, rank: int, size: int, rows: int, itemsize: int) -> tuple[int, int]:
    """Bytes that a rank sends for a layer of ``count`` inputs, but the first layer: forward and backward.

    Of blocks alike each is (P−2)/P · rows · count. Forward goes by the mean of what a gather sends.
    """
    half = size // 2
    whole, own = rows * count * itemsize, sum(hi - lo for lo, hi in of_halo(count, rank, size))
    return (half - 1) * whole // half, rows * (count - own) * itemsize


def dual_B(inputs: int, outputs: int, size: int, rows: int, itemsize: int) -> tuple[int, int]:
    """Bytes that a rank sends for a layer, but the first: activations forward and deltas backward."""
    sent = [(size - 1) * rows * count * itemsize // size for count in (inputs, outputs)]
    return sent[0], sent[1]


def redundant(model: nn.Module, group: Communicator, inputs: Any, copies: str = "halo") -> Cut:
    """Neurons computed on two ranks (halo), or weights stored on two (dual), to save communication. For perceptrons."""
    if copies not in COPIES:
        raise UnknownName("kind of redundant(copies=)", copies, COPIES)
    scheme, size = f"redundant(copies={copies})", group.size
    if copies == "halo" and size % 2:
        if size == 1:
            return Cut()
        raise BadInput(
            f"tensor={scheme} on {size} ranks: even and odd ranks cover the layers, so their number is even. "
            f"tensor={size - 1} or tensor={size + 1} would do, or redundant(copies=dual)."
        )
    layers = perceptron(model, scheme, size, draws=copies == "dual")
    if size == 1:
        return Cut()
    return _halo(model, group, layers) if copies == "halo" else _dual(model, group, layers)


# -- halo ----------------------------------------------------------------------------------------------------------


class _Halves:
    """How the neurons of a layer lie on the ranks of one parity."""

    def __init__(self, count: int, rank: int, size: int) -> None:
        halves = [of_halo(count, r, size) for r in range(rank % 2, size, 2)]
        self.lengths = [sum(hi - lo for lo, hi in blocks) for blocks in halves]
        self._first = halves[0][0][0]

    def in_order(self, x: Tensor) -> Tensor:
        """What was joined in the order of ranks in that of neurons: on odd ranks block 0 is the last."""
        return x.roll(self._first, -1) if self._first else x


class HaloLinear(nn.Module):
    """Two blocks of the outputs of a linear layer, of whose inputs each rank has two.

    ``inputs`` is None where each has all, ``outputs`` where two blocks of them are what is wanted.
    """

    def __init__(
        self, weight: Tensor, bias: Tensor | None, alike: Communicator, inputs: _Halves | None, outputs: _Halves | None
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.bias = None if bias is None else nn.Parameter(bias)
        self.out_features, self.in_features = weight.shape
        self._alike, self._inputs, self._outputs = alike, inputs, outputs

    def forward(self, x: Tensor) -> Tensor:
        """``(…, two blocks of inputs) → (…, two blocks of outputs)``, or all of them."""
        if self._inputs is None:
            x = copied(x, self._alike)
        else:
            x = self._inputs.in_order(gathered(x, self._alike, -1, self._inputs.lengths))
        y = F.linear(x, self.weight, self.bias)
        if self._outputs is None:
            return y
        return self._outputs.in_order(joined(y, self._alike, -1, self._outputs.lengths))


def _halo(model: nn.Module, group: Communicator, layers: Sequence[tuple[str, nn.Linear]]) -> Cut:
    rank, size, result = group.rank, group.size, Cut()
    alike = group.arranged(Mesh(pair=size // 2, parity=2)).over(frozenset({"pair"}))
    for path, linear in layers:
        count = linear.out_features
        here: Ranged = ((0, of_halo(count, rank, size)),)
        ranges, copies = (here, ()) if rank % 2 == 0 else (((0, ()),), here)
        shape = tuple(linear.weight.shape)
        weight, bias, blocks = parts(linear, Block(shape, ranges, copies), Block((count,), ranges, copies))
        made = HaloLinear(
            weight,
            bias,
            alike,
            None if path == layers[0][0] else _Halves(linear.in_features, rank, size),
            _Halves(count, rank, size) if path == layers[-1][0] else None,
        )
        replace(model, path, made, blocks, f"rows {count} → {len(weight)}, each on two ranks", result)
    return result


# -- dual ----------------------------------------------------------------------------------------------------------


class _Dual(torch.autograd.Function):
    """``z_p = W[p, :] a`` whose backward goes through ``W[:, p]``; ``weight`` is both, end to end."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        group: Communicator,
        inputs: Sequence[int],
        outputs: Sequence[int],
    ) -> Tensor:
        ctx.group, ctx.inputs, ctx.outputs = group, inputs, outputs
        whole = join(x, group, 1, inputs)
        ctx.save_for_backward(whole, weight)
        receptive = weight[: outputs[group.rank] * sum(inputs)].view(-1, sum(inputs))
        return F.linear(whole, receptive, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        whole, weight = ctx.saved_tensors
        group, inputs, outputs = ctx.group, ctx.inputs, ctx.outputs
        rank, own = group.rank, outputs[group.rank] * sum(inputs)
        deltas = join(grad, group, 1, outputs)
        grad_x = deltas @ weight[own:].view(sum(outputs), -1)
        # Block by block, and each from operands of its own: the rank that has the other copy multiplies the very same.
        a = [part.contiguous() for part in torch.split(whole, inputs, 1)]
        d = [part.contiguous() for part in torch.split(deltas, outputs, 1)]
        grad_weight = torch.empty_like(weight)
        receptive, projective = grad_weight[:own].view(-1, sum(inputs)), grad_weight[own:].view(sum(outputs), -1)
        for part, place in zip(a, torch.split(receptive, inputs, 1), strict=True):
            place.copy_(d[rank].t() @ part)
        for part, place in zip(d, torch.split(projective, outputs, 0), strict=True):
            place.copy_(part.t() @ a[rank])
        return grad_x, grad_weight, grad.sum(0) if ctx.needs_input_grad[2] else None, None, None, None


class DualLinear(nn.Module):
    """This rank's outputs of a linear layer of whose inputs each rank has some, with receptive and projective weights.

    ``weight`` is flat: ``own outputs × in`` and then ``out × own inputs``.
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        group: Communicator,
        sizes: tuple[Sequence[int], Sequence[int]],
        *,
        last: bool,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.bias = None if bias is None else nn.Parameter(bias)
        self._group, self._last = group, last
        self._inputs, self._outputs = sizes

    def forward(self, x: Tensor) -> Tensor:
        """``(…, own inputs) → (…, own outputs)``, or ``(…, out)``."""
        rows, weight, bias = as_autocast(x.reshape(-1, x.shape[-1]), self.weight, self.bias)
        y: Tensor = _Dual.apply(rows, weight, bias, self._group, self._inputs, self._outputs)  # type: ignore[no-untyped-call]
        y = y.view(*x.shape[:-1], y.shape[-1])
        return joined(y, self._group, -1, self._outputs) if self._last else y


def _dual(model: nn.Module, group: Communicator, layers: Sequence[tuple[str, nn.Linear]]) -> Cut:
    result, before = Cut(), shares(layers[0][1].in_features, group.size)
    for path, linear in layers:
        first, last = path == layers[0][0], path == layers[-1][0]
        bounds = shares(linear.out_features, group.size)
        rows: Ranged = ((0, (bounds[group.rank],)),)
        columns: Ranged = () if first else ((1, (before[group.rank],)),)
        lengths = [hi - lo for lo, hi in bounds]
        weight, bias, blocks = parts(
            linear, Block(tuple(linear.weight.shape), rows, columns), Block((linear.out_features,), rows)
        )
        made = (
            ColumnLinear(weight, bias, group, lengths if last else None)
            if first
            else DualLinear(weight, bias, group, ([hi - lo for lo, hi in before], lengths), last=last)
        )
        said = f"rows {linear.out_features} → {lengths[group.rank]}"
        if not first:
            said += f" and columns {linear.in_features} → {before[group.rank][1] - before[group.rank][0]}"
        replace(model, path, made, blocks, said, result)
        before = bounds
    return result


vars(redundant)["paper"] = Reference(
    "U. A. Müller & A. Gunzinger",
    "Neural net simulation on parallel computers",
    1994,
    "IEEE International Conference on Neural Networks, 3961-3966",
    survey="V-B",
)
