"""Images in tiles along their height, with a halo of the neighbours' rows (survey §V-B, network parallelism).

    y[lo, hi) = f(x[s·lo − p, s·(hi − 1) − p + r))        r rows seen at once, stride s, padding p

Each rank has some rows of every activation of a chain of convolutions and poolings. Of a layer's input it needs p rows
more above its own and r − p − s below; neighbours send them forward, and their gradients go back the same way. For a
convolution of K × K with p = (K−1)/2 and stride 1 these are (K−1)/2 rows on each side. Tiles are those of the last
layer's rows, taken back through the strides, so that they begin where a stride begins and no size has to divide.

A. Coates, B. Huval, T. Wang, D. J. Wu, A. Y. Ng & B. Catanzaro (2013), "Deep learning with COTS HPC systems", ICML
(there in two dims, with a filter of its own for every place; here convolutions).

Payload per cut between two tiles, layer and direction: (r − s) · W · C · n elements for n images of C channels and W
columns, which is 2 · halo · W · C · n at stride 1: `halo_B`. The images themselves are on every rank, so the first
layer sends nothing. What the last layer of the chain makes is joined, (P−1)/P · n elements.
Weights are whole on all ranks, each of which has the gradient of its tile: they are summed, 2(P−1)/P · n elements of
weights for each micro-batch. BatchNorm takes its statistics over all tiles: two sums of a number per channel forward
and two backward.
Guarantee: equal to the whole network, up to the order of summation; parameters, gradients and statistics are
bit-identical on the ranks. Activations take 1/P of the memory and a halo, weights what they took.

Refused: convolutions behind what does not work on tiles (other norms, global pooling), padding modes other than zeros,
ceil_mode, padded average pooling, and tiles thinner than a halo.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from manyhands.catalogue import Reference
from manyhands.communication.communicator import Communicator
from manyhands.communication.topology import shares
from manyhands.errors import BadInput
from manyhands.models.cnn import ChannelsLast
from manyhands.partition.conjugate import TAG, copied, joined, summed
from manyhands.partition.tensor.chain import elementwise, replace, sequence
from manyhands.partition.tensor.cut import Cut

Bounds = list[tuple[int, int]]


@dataclass(frozen=True)
class Window:
    """How a layer sees rows: ``reach`` at once, each ``stride``, with ``padding`` at both ends of the image."""

    reach: int
    stride: int = 1
    padding: int = 0

    @property
    def above(self) -> int:
        """Rows of the tile above that a tile needs."""
        return self.padding

    @property
    def below(self) -> int:
        """Rows of the tile below."""
        return max(0, self.reach - self.padding - self.stride)

    def outputs(self, height: int) -> int:
        """Rows that it makes of so many."""
        return (height + 2 * self.padding - self.reach) // self.stride + 1


def tiles(height: int, windows: Sequence[Window], size: int) -> list[Bounds]:
    """Of each layer's input, and of the last one's output, the rows ``[lo, hi)`` of each rank.

    Raises `ValueError` if a tile would be thinner than what its neighbour needs of it.
    """
    heights = list(itertools.accumulate(windows, lambda h, window: window.outputs(h), initial=height))
    if heights[-1] < size:
        raise ValueError(f"of {height} rows {max(heights[-1], 0)} are left at the end of the chain, for {size} ranks")
    found = [shares(heights[-1], size)]
    for h, window in zip(reversed(heights[:-1]), reversed(windows), strict=True):
        starts = [lo * window.stride for lo, _ in found[0]]
        bounds = list(zip(starts, [*starts[1:], h], strict=True))
        for rank, (lo, hi) in enumerate(bounds):
            least = max(1, window.below if rank else 0, window.above if rank < size - 1 else 0)
            if hi - lo < least:
                raise ValueError(f"a tile of {max(hi - lo, 0)} of {h} rows, of which a neighbour needs {least}")
        found.insert(0, bounds)
    return found


def halo_B(window: Window, row: int, rank: int, size: int, itemsize: int) -> tuple[int, int]:
    """Bytes that a rank sends for a layer, but the first: rows forward, and their gradients backward.

    ``row`` is the number of elements of one row of all images: width × channels × images.
    """
    upwards, downwards = rank > 0, rank < size - 1
    forward = window.below * upwards + window.above * downwards
    backward = window.above * upwards + window.below * downwards
    return forward * row * itemsize, backward * row * itemsize


class _Extended(torch.autograd.Function):
    """A tile and the neighbours' rows at its sides; their gradients go back and are added there."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Communicator, above: int, below: int) -> Tensor:
        ctx.group, ctx.halo = group, (above, below)
        top, bottom = _exchanged(x, group, (below, above), (above, below))
        return torch.cat([t for t in (top, x, bottom) if t is not None], 2)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        group, (above, below) = ctx.group, ctx.halo
        first, last = group.rank == 0, group.rank == group.size - 1
        top, bottom = _exchanged(grad, group, (above, below), (below, above))
        start, stop = 0 if first else above, grad.shape[2] - (0 if last else below)
        own = grad[:, :, start:stop].clone()
        if top is not None:
            own[:, :, :below] += top
        if bottom is not None:
            own[:, :, own.shape[2] - above :] += bottom
        return own, None, None, None


def _exchanged(
    x: Tensor, group: Communicator, sent: tuple[int, int], wanted: tuple[int, int]
) -> tuple[Tensor | None, Tensor | None]:
    """So many of the first and last rows go to the neighbours; what comes from the one above and the one below."""
    sides = ((group.rank - 1, slice(None, sent[0])), (group.rank + 1, slice(x.shape[2] - sent[1], None)))
    works, got = [], list[Tensor | None]()
    with group.counting("cut"):
        for (rank, rows), count in zip(sides, sent, strict=True):
            if count and 0 <= rank < group.size:
                works.append(group.send(x[:, :, rows].contiguous(), rank, TAG))
        for (rank, _), count in zip(sides, wanted, strict=True):
            there = count > 0 and 0 <= rank < group.size
            like = x.new_empty(*x.shape[:2], count, x.shape[3]) if there else None
            got.append(None if like is None else group.recv(like, rank, TAG).tensor)
        for work in works:
            work.wait()
    return got[0], got[1]


@dataclass(frozen=True)
class Tiling:
    """Where a layer stands: its window, the tiles of its input and of its output, and if it is at an end."""

    group: Communicator
    window: Window
    inputs: Bounds
    outputs: Bounds
    first: bool
    last: bool

    def extended(self, x: Tensor, edge: float = 0.0) -> Tensor:
        """The rows that this rank's outputs come from; beyond the image there is ``edge``."""
        group, window = self.group, self.window
        top, bottom = group.rank == 0, group.rank == group.size - 1
        if self.first:
            if x.shape[2] != self.inputs[-1][1]:
                raise BadInput(
                    f"tensor=spatial: an image of {x.shape[2]} rows, and the model is cut for {self.inputs[-1][1]}."
                )
            lo, hi = self.inputs[group.rank]
            lo, hi = lo if top else lo - window.above, hi if bottom else hi + window.below
            x = copied(x, group)[:, :, lo:hi]
        else:
            x = _Extended.apply(x, group, window.above, window.below)  # type: ignore[no-untyped-call]
        if window.padding and (top or bottom):
            x = F.pad(x, (0, 0, window.padding * top, window.padding * bottom), value=edge)
        return x

    def told(self, y: Tensor) -> Tensor:
        """All rows of the output, at the end of the chain."""
        return joined(y, self.group, 2, [hi - lo for lo, hi in self.outputs]) if self.last else y


class TiledConvolution(nn.Module):
    """A `nn.Conv2d` on tiles."""

    def __init__(self, conv: nn.Conv2d, tiling: Tiling) -> None:
        super().__init__()
        self.weight, self.bias = conv.weight, conv.bias
        self._tiling, self._padding = tiling, (0, _padding(conv)[1])
        self._how: dict[str, Any] = {"stride": conv.stride, "dilation": conv.dilation, "groups": conv.groups}

    def forward(self, x: Tensor) -> Tensor:
        """``(n, in, own rows, width) → (n, out, own rows, width)``; the first takes all rows and the last gives all."""
        weight = copied(self.weight, self._tiling.group)
        bias = None if self.bias is None else copied(self.bias, self._tiling.group)
        y = F.conv2d(self._tiling.extended(x), weight, bias, padding=self._padding, **self._how)
        return self._tiling.told(y)


class TiledPooling(nn.Module):
    """A `nn.MaxPool2d` or `nn.AvgPool2d` on tiles."""

    def __init__(self, pool: nn.MaxPool2d | nn.AvgPool2d, tiling: Tiling) -> None:
        super().__init__()
        self._tiling = tiling
        kernel, stride = _pair(pool.kernel_size), _pair(pool.stride)
        self._pool: Callable[[Tensor], Tensor]
        if isinstance(pool, nn.MaxPool2d):
            self._edge = float("-inf")
            self._pool = nn.MaxPool2d(kernel, stride, (0, _pair(pool.padding)[1]), _pair(pool.dilation))
        else:
            self._edge = 0.0
            self._pool = nn.AvgPool2d(kernel, stride, divisor_override=pool.divisor_override)

    def forward(self, x: Tensor) -> Tensor:
        """``(n, channels, own rows, width)``; the first takes all rows and the last gives all."""
        return self._tiling.told(self._pool(self._tiling.extended(x, self._edge)))


class TiledBatchNorm(nn.BatchNorm2d):
    """A `nn.BatchNorm2d` whose statistics are those of all tiles."""

    def __init__(self, norm: nn.BatchNorm2d, group: Communicator, height: int) -> None:
        super().__init__(norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats)
        self._parameters, self._buffers = norm._parameters, norm._buffers
        self._group, self._height = group, height

    def forward(self, x: Tensor) -> Tensor:
        """``(n, channels, own rows, width)``."""
        group = self._group
        weight = copied(self.weight, group) if self.affine else None
        bias = copied(self.bias, group) if self.affine else None
        if not self.training and self.running_mean is not None:
            return F.batch_norm(x, self.running_mean, self.running_var, weight, bias, False, 0.0, self.eps)
        values = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        count = x.shape[0] * self._height * x.shape[3]
        mean = self._over_all(values) / count
        centred = values - mean.view(1, -1, 1, 1)
        variance = self._over_all(centred.square()) / count
        self._track(mean.detach(), variance.detach() * (count / max(count - 1, 1)))
        y = centred * (variance + self.eps).rsqrt().view(1, -1, 1, 1)
        if weight is not None and bias is not None:
            y = y * weight.view(1, -1, 1, 1) + bias.view(1, -1, 1, 1)
        return y.to(x.dtype)

    def _over_all(self, x: Tensor) -> Tensor:
        """The sum of each channel over all tiles, from which every rank goes on with its own."""
        return copied(summed(x.sum((0, 2, 3)), self._group), self._group)

    def _track(self, mean: Tensor, variance: Tensor) -> None:
        if not self.training or self.running_mean is None or self.running_var is None:
            return
        with torch.no_grad():
            assert self.num_batches_tracked is not None
            self.num_batches_tracked.add_(1)
            new = 1.0 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
            self.running_mean.lerp_(mean.to(self.running_mean.dtype), new)
            self.running_var.lerp_(variance.to(self.running_var.dtype), new)


def _pair(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[1])


def _padding(conv: nn.Conv2d) -> tuple[int, int]:
    """In numbers; raises `ValueError` where the two sides differ."""
    if conv.padding == "valid":
        return 0, 0
    if conv.padding == "same":
        total = [d * (k - 1) for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
        if any(n % 2 for n in total):
            raise ValueError("pads more on one side than on the other (padding='same' with an even kernel)")
        return total[0] // 2, total[1] // 2
    return _pair(conv.padding)


def window_of(module: nn.Module) -> Window:
    """How a convolution or a pooling sees rows; raises `ValueError` if it cannot work on tiles."""
    dilation = 1
    if type(module) is nn.Conv2d:
        if module.padding_mode != "zeros":
            raise ValueError(f"pads by padding_mode={module.padding_mode!r}, and only zeros are known beside a tile")
        padding, dilation = _padding(module)[0], module.dilation[0]
    elif type(module) in (nn.MaxPool2d, nn.AvgPool2d):
        padding = _pair(module.padding)[0]
        if module.ceil_mode:
            raise ValueError("has ceil_mode, whose last window is not as the others")
        if type(module) is nn.AvgPool2d and max(_pair(module.padding)):
            raise ValueError("is an average over padding, which counts unlike at the ends")
        if getattr(module, "return_indices", False):
            raise ValueError("returns indices, which would be those within a tile")
        dilation = _pair(getattr(module, "dilation", 1))[0]
    else:
        raise ValueError(f"is a {type(module).__name__}, which does not work on tiles")
    window = Window(
        dilation * (_pair(module.kernel_size)[0] - 1) + 1,
        _pair(module.stride)[0],
        padding,
    )
    if window.padding >= window.reach:
        raise ValueError(f"pads {window.padding} rows and sees {window.reach} at once")
    return window


def _keeps_rows(module: nn.Module) -> bool:
    return elementwise(module) or type(module) in (nn.BatchNorm2d, ChannelsLast)


def _chain(model: nn.Module) -> tuple[list[tuple[str, nn.Module]], dict[str, Window]]:
    """The modules from the first window to the last that are cut, and the windows among them."""
    modules = sequence(model, "spatial")
    found: list[tuple[str, nn.Module]] = []
    windows: dict[str, Window] = {}
    ended: str | None = None
    for path, module in modules:
        if ended is None:
            try:
                if not _keeps_rows(module):
                    windows[path] = window_of(module)
                if windows:
                    found.append((path, module))
            except ValueError as e:
                ended = f"{path} {e}"
        if ended is not None and isinstance(module, nn.Conv2d):
            raise BadInput(
                f"tensor=spatial: {ended}, and {path} is a convolution that would come after it or be it. A chain of "
                "Conv2d, MaxPool2d, AvgPool2d, BatchNorm2d and functions of single elements is cut, up to Flatten or "
                "Linear, such as cnn; other models are cut by rules or auto (by channels)."
            )
    if not any(isinstance(module, nn.Conv2d) for _, module in found):
        raise BadInput(
            "tensor=spatial: the model has no Conv2d, and tiles are of images. Use rotate, redundant or cannon for "
            "perceptrons, or rules."
        )
    last = max(i for i, (path, _) in enumerate(found) if path in windows)
    return found[: last + 1], windows


def spatial(model: nn.Module, group: Communicator, inputs: Any) -> Cut:
    """Images in tiles along their height, halo rows sent between neighbours. For chains of convolutions."""
    result = Cut()
    modules, windows = _chain(model)
    if not isinstance(inputs, Tensor) or inputs.dim() != 4:
        raise BadInput("tensor=spatial: samples are images (channels, height, width), and the data has others.")
    if group.size == 1:
        return result
    try:
        bounds = tiles(inputs.shape[2], list(windows.values()), group.size)
    except ValueError as e:
        raise BadInput(
            f"tensor=spatial on {group.size} ranks: {e}. Use fewer ranks or larger images; auto cuts by channels."
        ) from None
    at = 0
    for path, module in modules:
        rows = bounds[at]
        if path in windows:
            tiling = Tiling(group, windows[path], rows, bounds[at + 1], at == 0, at == len(windows) - 1)
            made: nn.Module
            if isinstance(module, nn.Conv2d):
                made = TiledConvolution(module, tiling)
            else:
                assert isinstance(module, nn.MaxPool2d | nn.AvgPool2d), "no other has a window"
                made = TiledPooling(module, tiling)
            at += 1
            lo, hi = bounds[at][group.rank]
            replace(model, path, made, {}, f"rows {bounds[at][-1][1]} → {hi - lo}", result)
        elif type(module) is nn.BatchNorm2d:
            replace(model, path, TiledBatchNorm(module, group, rows[-1][1]), {}, "over all tiles", result)
    return result


vars(spatial)["paper"] = Reference(
    "A. Coates, B. Huval, T. Wang, D. J. Wu, A. Y. Ng & B. Catanzaro",
    "Deep learning with COTS HPC systems",
    2013,
    "ICML 2013",
    survey="V-B",
)
