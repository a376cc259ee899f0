"""Bring every rank's value to rank 0, through the communicator's own messages. Counted as ``consensus``."""

from __future__ import annotations

from typing import Any

import torch

from manyhands.communication.communicator import Communicator
from manyhands.training.wire import decode, encode

#: Messages carry 64-bit words, which every transport moves.
_WORD_B = 8
_TAG = 7001


def gather(comm: Communicator, value: Any) -> list[Any] | None:
    """Everybody's ``value`` in rank order on rank 0, None elsewhere. Collective.

    Values are numbers, text, lists, tuples, dicts and tensors.
    """
    data = encode(value)
    length = torch.tensor([len(data)], dtype=torch.int64)
    if comm.size == 1:
        return [value]
    with comm.counting("consensus"):
        if comm.rank != 0:
            comm.send(length, 0, _TAG).wait()
            padded = bytearray(data + bytes(-len(data) % _WORD_B))
            comm.send(torch.frombuffer(padded, dtype=torch.int64), 0, _TAG).wait()
            return None
        result = [value]
        for source in range(1, comm.size):
            comm.recv(length, source, _TAG)
            n = int(length)
            words = torch.empty(-(-n // _WORD_B), dtype=torch.int64)
            comm.recv(words, source, _TAG)
            result.append(decode(words.numpy().tobytes()[:n]))
        return result
