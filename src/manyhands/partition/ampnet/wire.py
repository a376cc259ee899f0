"""A message between ranks: an envelope, in which small tensors lie, and a message more for each tensor of another.

An envelope has the same length whatever lies in it, since a receive must know how long what comes is. It begins with
its text, JSON; no pickle is read. Messages of dynamic networks are mostly small, and a second one would cost as much as
the first.
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

_ENVELOPES, _TENSORS = 7201, 7202
#: Bytes of an envelope: room for the text, some 100, and 200 numbers of float32; less than fits into a packet.
ENVELOPE_B = 1024
#: What tells how long the text is.
_LENGTH_B = 8
_DTYPES = (
    *(torch.float32, torch.float64, torch.float16, torch.bfloat16),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
)
_CODES = {dtype: code for code, dtype in enumerate(_DTYPES)}
_text = json.JSONEncoder(separators=(",", ":")).encode


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
    """Start sending. Tensors must not be changed before all is sent.

    Tensors' bytes count as ``cut``, wherever they lie, envelopes as ``control``.
    """
    message = parcel.message
    forms = [x if x is None else _form(x) for x in message.payload]
    text = _text([parcel.kind, parcel.edge, message.state.key, message.state.counters, forms]).encode()
    if _LENGTH_B + len(text) > ENVELOPE_B:
        raise BadInput(f"a message of {message.state}: its counters and shapes take {len(text)} bytes as text.")
    tensors = [x.detach().contiguous().view(-1).view(torch.uint8) for x in message.payload if x is not None]
    sizes = [x.numel() for x in tensors]
    at = _aligned(_LENGTH_B + len(text))
    apart = at + sum(map(_aligned, sizes)) > ENVELOPE_B
    buffer = bytearray(ENVELOPE_B)
    buffer[:_LENGTH_B] = (len(text) << 1 | apart).to_bytes(_LENGTH_B, "little")
    buffer[_LENGTH_B : _LENGTH_B + len(text)] = text
    if not apart:
        for x, n_B in zip(tensors, sizes, strict=True):
            buffer[at : at + n_B] = x.numpy().data
            at += _aligned(n_B)
    with comm.counting("control"):
        works = [comm.send(torch.frombuffer(buffer, dtype=torch.uint8), to, _ENVELOPES)]
    if apart:
        with comm.counting("cut"):
            works += [comm.send(x, to, _TENSORS) for x in tensors]
    elif tensors:
        tally = comm.counters.tallies["cut"]["send"]
        tally.calls += 1
        tally.messages += 1
        tally.sent_B += sum(sizes)
    return works


def receive(comm: Communicator, frm: int | None = None) -> Parcel:
    """The next message from a rank, or from anyone."""
    buffer = bytearray(ENVELOPE_B)
    source = comm.recv(torch.frombuffer(buffer, dtype=torch.uint8), frm, _ENVELOPES).source
    length = int.from_bytes(buffer[:_LENGTH_B], "little")
    length, apart = length >> 1, length & 1
    kind, edge, key, counters, forms = json.loads(buffer[_LENGTH_B : _LENGTH_B + length])
    at = _aligned(_LENGTH_B + length)
    payload: list[Tensor | None] = []
    for form in forms:
        if form is None:
            payload.append(None)
            continue
        code, wanted, *shape = form
        dtype, numel = _DTYPES[code], math.prod(shape)
        if apart or not numel:
            x = torch.empty(shape, dtype=dtype)
            if apart:
                comm.recv(x.view(-1).view(torch.uint8), source, _TENSORS)
        else:
            x = torch.frombuffer(buffer, dtype=dtype, count=numel, offset=at).view(shape)
            at += _aligned(numel * dtype.itemsize)
        payload.append(x.requires_grad_() if wanted else x)
    return Parcel(Kind(kind), edge, Message(tuple(payload), State(key, tuple((n, v) for n, v in counters))))


def arrived(comm: Communicator) -> bool:
    """Whether a message is here to be received, as far as the transport can tell without waiting."""
    return comm.arrived(_ENVELOPES)


def _form(x: Tensor) -> list[int]:
    """Dtype, whether it wants a gradient, and shape."""
    if x.dtype not in _CODES or x.layout is not torch.strided:
        raise BadInput(f"a payload of {x.dtype} in {x.layout} layout, which no message carries.")
    return [_CODES[x.dtype], int(x.requires_grad), *x.shape]


def _aligned(n_B: int) -> int:
    """Where a number of any dtype may begin."""
    return -(-n_B // 8) * 8
