"""A message between ranks: a header that says how long the rest is, then what it is as JSON, then the tensors' bytes.

Lengths differ from message to message, and a receive must know them; no pickle is read.
"""

from __future__ import annotations

import json
import math
from enum import IntEnum
from typing import NamedTuple

import torch
from torch import Tensor

from manyhands.communication.communicator import Communicator, Work
from manyhands.errors import BadInput
from manyhands.partition.ampnet.message import Message, State

_HEADERS, _BODIES = 7201, 7202
_DTYPES = (
    *(torch.float32, torch.float64, torch.float16, torch.bfloat16),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
)


class Kind(IntEnum):
    """What a message between ranks says."""

    FORWARD = 0  # a payload has come along an edge
    BACKWARD = 1  # a gradient has come back along it
    ANSWERED = 2  # the output of an instance is there; only in evaluation
    OUTPUT = 3  # the outputs of all instances
    END = 4  # all instances are through


class Parcel(NamedTuple):
    """A message, by which edge it goes (−1: none), and of what kind."""

    kind: Kind
    edge: int
    message: Message


def send(comm: Communicator, to: int, parcel: Parcel) -> list[Work]:
    """Start sending; tensors are copied. Payload counts as ``cut``, headers as ``control``."""
    state, tensors = parcel.message.state, []
    forms: list[list[int] | None] = []
    for x in parcel.message.payload:
        if x is None:
            forms.append(None)
            continue
        if x.dtype not in _DTYPES or x.layout is not torch.strided:
            raise BadInput(f"a payload of {x.dtype} in {x.layout} layout, which no message carries.")
        forms.append([_DTYPES.index(x.dtype), int(x.requires_grad), *x.shape])
        tensors.append(x.detach().contiguous().view(-1).view(torch.uint8))
    text = json.dumps([parcel.kind, parcel.edge, state.key, state.counters, forms]).encode()
    body = torch.cat([torch.frombuffer(bytearray(text), dtype=torch.uint8), *tensors])
    with comm.counting("control"):
        header = comm.send(torch.tensor([len(text), body.numel()]), to, _HEADERS)
    with comm.counting("cut"):
        return [header, comm.send(body, to, _BODIES)]


def receive(comm: Communicator, frm: int | None = None) -> Parcel:
    """The next message from a rank, or from anyone."""
    header = comm.recv(torch.zeros(2, dtype=torch.int64), frm, _HEADERS)
    length, total = header.tensor.tolist()
    body = comm.recv(torch.empty(total, dtype=torch.uint8), header.source, _BODIES).tensor
    kind, edge, key, counters, forms = json.loads(body[:length].numpy().tobytes())
    payload: list[Tensor | None] = []
    for form in forms:
        if form is None:
            payload.append(None)
            continue
        dtype, wanted, *shape = form
        n_B = math.prod(shape) * _DTYPES[dtype].itemsize
        x = body[length : length + n_B].clone().view(_DTYPES[dtype]).view(shape)
        payload.append(x.requires_grad_() if wanted else x)
        length += n_B
    return Parcel(Kind(kind), edge, Message(tuple(payload), State(key, tuple((n, v) for n, v in counters))))


def arrived(comm: Communicator) -> bool:
    """Whether a message is here to be received, as far as the transport can tell without waiting."""
    return comm.arrived(_HEADERS)
