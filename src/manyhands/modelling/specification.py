"""The time of an operator from a device's specification alone: a roofline for each, and the best known algorithm.

    T = max(FLOPs/peak, bytes/B, dispatch)

- A matrix product is done in tiles: rows and columns of its result count up to the next multiple of 64 (the smallest
  tile in NVIDIA's "Matrix Multiplication Background User's Guide", tile quantization), on a processor as they are.
- A convolution takes the quickest of what a library has to choose from: a matrix product, or Winograd's algorithm,
  whose transforms are passes of their own over memory (`manyhands.modelling.published.winograd`), for unit stride and
  3×3 or 5×5. Its backward is two convolutions, of the inputs and of the weights, each with a choice of its own.
- A normalisation over the batch has to read its operand twice: nothing is normalised before the statistics are known.

This is the last resort where nothing can be measured: what fraction of these figures a program reaches is not in a
specification. One number for device and program, fitted or given (``efficiency``), is all that is added.
"""

from __future__ import annotations

import math

import torch

from manyhands.cluster import Device
from manyhands.modelling.operations import Operation, Operations, Shape
from manyhands.modelling.published import roofline, winograd
from manyhands.modelling.published.winograd import Convolution

_WINOGRAD = 4  # F(4×4, r×r): the largest that float32 bears well (Lavin & Gray 2016, section 4.3)
_GPU_TILE = 64


def step_s(operations: Operations, device: Device) -> float:
    """Seconds of one device, its operators one after another."""
    return math.fsum(operator_s(x, device) for x in operations)


def operator_s(operation: Operation, device: Device) -> float:
    """The least that ``operation`` takes on ``device``, by its specification."""
    if operation.name in ("convolution", "convolution_backward") and len(operation.operands[1]) in (3, 4, 5):
        least_s = _convolution_s(operation, device)
    else:
        least_s = _roof_s(_tiled(operation, device), _streamed_B(operation), operation.dtype, device)
    return max(device.dispatch.si if device.dispatch is not None else 0.0, least_s)


def _roof_s(flops: float, moved_B: float, dtype: str, device: Device) -> float:
    peak = device.peak_of(dtype) if dtype in device.peak else max(f.si for f in device.peak.values())
    efficiency = 1.0 if device.efficiency is None else device.efficiency.si
    streamed = 1.0 if device.memory_efficiency is None else device.memory_efficiency.si
    return roofline.seconds(
        flops, moved_B, peak_flops_per_s=peak * efficiency, memory_Bps=device.memory_bandwidth.si * streamed
    )


def _streamed_B(operation: Operation) -> float:
    again = operation.name.startswith(("native_batch_norm", "_native_batch_norm", "cudnn_batch_norm"))
    if not again:
        return operation.moved_B
    itemsize: int = getattr(torch, operation.dtype).itemsize
    largest_B = itemsize * max(math.prod(shape) for shape in operation.operands)
    return operation.moved_B + largest_B * (2 if "backward" in operation.name else 1)  # the gradient, too


# -- products in tiles -------------------------------------------------------------------------------------------------


def _tiled(operation: Operation, device: Device) -> float:
    """Operations, with those of the tiles that stick out, of a matrix product; of all else as they are."""
    if operation.name not in ("mm", "addmm", "bmm", "baddbmm") or not operation.results[0]:
        return operation.flops
    *_, rows, columns = operation.results[0]
    return operation.flops * _filled(rows, device) * _filled(columns, device)


def _filled(n: int, device: Device) -> float:
    tile = _GPU_TILE if device.kind == "cuda" else 1
    return math.ceil(n / tile) * tile / n


# -- convolutions ------------------------------------------------------------------------------------------------------


def _convolution_s(operation: Operation, device: Device) -> float:
    """Forward one convolution; backward one of the weights, and one of the inputs if they want a gradient."""
    if operation.name == "convolution":
        x, w, y = operation.operands[0], operation.operands[1], operation.results[0]
        return _one_s(operation, x, w, y, "output", device)
    y, x, w = operation.operands[:3]
    wanted = ["weights"] + ["inputs"] * (sum(len(shape) == len(w) for shape in operation.results) == 2)
    return math.fsum(_one_s(operation, x, w, y, part, device) for part in wanted)


def _one_s(operation: Operation, x: Shape, w: Shape, y: Shape, made: str, device: Device) -> float:
    """The convolution that makes the ``output``, the gradient of the ``weights`` or that of the ``inputs``."""
    dtype = operation.dtype
    flops = 2 * math.prod(y) * math.prod(w[1:])
    taps, pixels = math.prod(w[1:]), y[0] * math.prod(y[2:])
    rows, columns = {"output": (pixels, w[0]), "weights": (taps, w[0]), "inputs": (pixels, x[1])}[made]
    size_B = getattr(torch, dtype).itemsize * (math.prod(x) + math.prod(w) + math.prod(y))
    direct_s = _roof_s(flops * _filled(rows, device) * _filled(columns, device), size_B, dtype, device)
    conv = _unit_stride(operation, x, w, y)
    return direct_s if conv is None else min(direct_s, _winograd_s(conv, made, size_B, dtype, device))


def _winograd_s(conv: Convolution, made: str, size_B: float, dtype: str, device: Device) -> float:
    """Two operands are transformed, multiplied point by point of a tile, and the product transformed back."""
    elements = winograd.transformed(conv, _WINOGRAD)
    made_B = getattr(torch, dtype).itemsize * sum(elements)
    tiles = elements[0] // (conv.c_in * (_WINOGRAD + conv.kernel - 1) ** 2)
    rows, columns = {
        "output": (tiles, conv.c_out), "weights": (conv.c_in, conv.c_out), "inputs": (tiles, conv.c_in)
    }[made]  # fmt: skip
    products = 2 * winograd.multiplications(conv, _WINOGRAD) * _filled(rows, device) * _filled(columns, device)
    return _roof_s(0, size_B + made_B, dtype, device) + _roof_s(products, made_B, dtype, device)


def _unit_stride(operation: Operation, x: Shape, w: Shape, y: Shape) -> Convolution | None:
    """The convolution, if Winograd's algorithm is for it."""
    options = operation.options[-6:] if operation.name == "convolution" else operation.options[-7:-1]
    stride, _, dilation, transposed, _, groups = options
    plain = set(stride) == set(dilation) == {1} and groups == 1 and not transposed
    if len(w) != 4 or w[2] != w[3] or w[2] not in (3, 5) or not plain:
        return None
    return Convolution(x[0], x[1], w[0], y[2], y[3], w[2])
