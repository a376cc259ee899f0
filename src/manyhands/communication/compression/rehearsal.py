"""What an exchange of compressed vectors does where there are no numbers: the same operations, of the same lengths.

A payload whose length depends on the values is taken to be as long as that of a normally distributed vector, of which
thresholds let one value in a hundred pass.
"""

from __future__ import annotations

import functools

import numpy as np
import torch
from torch import Tensor

from manyhands.communication.communicator import Communicator
from manyhands.communication.compression.compressor import Compressor, compressor_from
from manyhands.communication.compression.layout import Layout
from manyhands.communication.compression.one_shot import OneShot

#: Values of the vector that is encoded to see how long its payload is.
SAMPLE = 1 << 14
#: A normal variable is beyond so many standard deviations once in a hundred times.
ONE_IN_A_HUNDRED = 2.576


def sample(compressor: Compressor, numel: int) -> Tensor:
    """A normally distributed vector, such that one value in a hundred is beyond the scheme's threshold, if any."""
    inner = compressor_from(getattr(compressor, "of", compressor))
    deviation = getattr(inner, "threshold", 1e-3 * ONE_IN_A_HUNDRED) / ONE_IN_A_HUNDRED
    return torch.from_numpy(np.random.Generator(np.random.SFC64(0)).normal(0, deviation, numel).astype(np.float32))


def typical_B(compressor: Compressor, layout: Layout) -> int:
    """Bytes of a payload; of schemes where it is `variable`, of a `sample`'s."""
    if not compressor.variable or not layout.numel:
        return compressor.payload_B(layout)
    assert isinstance(compressor, OneShot)
    return min(compressor.payload_B(layout), round(layout.numel * _bytes_a_value(compressor)))


@functools.lru_cache(maxsize=64)
def _bytes_a_value(compressor: OneShot) -> float:
    state = Compressor.start(compressor, Layout(((SAMPLE,),)), 0, 2)
    return compressor.encode(sample(compressor, SAMPLE), state).numel() / SAMPLE


def rehearse(x: Tensor, compressor: Compressor, comm: Communicator, layout: Layout) -> None:
    """What `Compressor.aggregate` asks of ``comm``, with tensors like ``x``, which has a size only."""
    counted = comm.counters.compression
    before_B = comm.counters.sent_B(comm.context.purpose)
    for operation, n_B in compressor.rounds(layout, comm.size, typical_B(compressor, layout)):
        if operation == "all_reduce":
            comm.all_reduce(x.new_empty(n_B // 2, dtype=torch.float16)).wait()  # nothing is added, only moved
        elif operation == "all_gather":
            own_B = n_B // comm.size
            whole = x.new_empty(n_B, dtype=torch.uint8)
            comm.all_gather(whole, [(p * own_B, (p + 1) * own_B) for p in range(comm.size)]).wait()
        else:
            comm.all_to_all(x.new_empty(n_B, dtype=torch.uint8))
    counted.dense_B += 2 * (comm.size - 1) * x.nbytes // comm.size
    counted.sent_B += comm.counters.sent_B(comm.context.purpose) - before_B


def takes_sums(compressor: Compressor, layout: Layout) -> bool:
    """Whether payloads are made by each worker for itself, and in a mean only ever added up: halves."""
    return isinstance(compressor, OneShot) and compressor.cost(layout, 2).route == "sum"


def codings(compressor: Compressor, layout: Layout, size: int) -> tuple[float, float]:
    """How many whole vectors a rank of ``size`` encodes and decodes in an exchange, feedback's subtraction included."""
    operations = [name for name, _ in compressor.rounds(layout, size, typical_B(compressor, layout))]
    back = float(compressor.feedback)
    if not operations:
        return 0.0, 0.0
    if not isinstance(compressor, OneShot):
        return 1.0, 1.0  # what it subtracts is there
    if takes_sums(compressor, layout):
        return 1.0, back  # what comes back as a sum is no payload
    if "all_to_all" in operations:
        return 1 + 1 / size, 2 + back * (1 + 1 / size)
    return (1.0, size + back) if operations == ["all_gather"] else (1.0, 1 + back)
