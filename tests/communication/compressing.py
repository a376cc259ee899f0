"""What the tests of compression run on ranks."""

import torch

from manyhands.communication.communicator import Communicator
from manyhands.communication.compression.compressor import compressor_from
from manyhands.communication.compression.layout import Layout
from manyhands.communication.compression.state import State


def vector(numel: int, seed: int, dtype: torch.dtype = torch.float64, scale: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(numel, generator=generator, dtype=torch.float64) * scale).to(dtype)


def residuals(state: State, size: int) -> torch.Tensor:
    """What a rank has not sent yet: of its own vector, and of the mean of its slice, which counts ``size`` times."""
    left = state.tensors["residual"].clone()
    if state.parts:
        own = state.parts[-1]
        lo = sum(part.layout.numel for part in state.parts[: state.rank])
        left[lo : lo + own.layout.numel] += size * own.tensors["residual"]
    return left


def aggregates(comm: Communicator, text: str, shapes: list, steps: int, scale: float, dtype: str) -> dict:
    """Some steps on gradients drawn by rank and step: what each came to, and what was sent for it."""
    kind = getattr(torch, dtype)
    compressor, layout = compressor_from(text), Layout([tuple(s) for s in shapes], kind)
    state = compressor.start(layout, comm.rank, comm.size)
    given, means, sent = [], [], []
    for step in range(steps):
        gradient = vector(layout.numel, 100 * step + comm.rank, kind, scale)
        given.append(gradient.clone())
        before = comm.counters.sent_B("step"), comm.counters.messages("step")
        means.append(compressor.aggregate(gradient, comm, state).clone())
        sent.append([comm.counters.sent_B("step") - before[0], comm.counters.messages("step") - before[1]])
    return {
        "given": torch.stack(given),
        "means": torch.stack(means),
        "sent": sent,
        "left": residuals(state, comm.size) if compressor.feedback and comm.size > 1 else torch.zeros(layout.numel),
        "numbers": state.numbers,
    }
