"""Bring every rank's value to rank 0, or rank 0's to every rank, through the communicator's own messages."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from manyhands.communication.communicator import Communicator
from manyhands.errors import ManyhandsError
from manyhands.training.wire import decode, encode, family, rebuilt

#: Messages carry 64-bit words, which every transport moves.
_WORD_B = 8
_TAG = 7001


def gather(comm: Communicator, value: Any) -> list[Any] | None:
    """Everybody's ``value`` in rank order on rank 0, None elsewhere. Collective, counted as ``consensus``.

    Values are numbers, text, lists, tuples, dicts and tensors.
    """
    data = encode(value)
    length = torch.tensor([len(data)], dtype=torch.int64)
    if comm.size == 1:
        return [value]
    with comm.counting("consensus"):
        if comm.rank != 0:
            comm.send(length, 0, _TAG).wait()
            comm.send(_words(data), 0, _TAG).wait()
            return None
        result = [value]
        for source in range(1, comm.size):
            comm.recv(length, source, _TAG)
            n = int(length)
            words = torch.empty(-(-n // _WORD_B), dtype=torch.int64)
            comm.recv(words, source, _TAG)
            result.append(decode(words.numpy().tobytes()[:n]))
        return result


def from_first(comm: Communicator, value: Any) -> Any:
    """Rank 0's ``value`` on every rank; what the others give is not looked at. Collective, counted as ``control``."""
    if comm.size == 1:
        return value
    data = encode(value) if comm.rank == 0 else b""
    length = torch.tensor([len(data)], dtype=torch.int64)
    with comm.counting("control"):
        comm.broadcast(length).wait()
        n = int(length)
        words = _words(data) if comm.rank == 0 else torch.zeros(-(-n // _WORD_B), dtype=torch.int64)
        comm.broadcast(words).wait()
    return value if comm.rank == 0 else decode(words.numpy().tobytes()[:n])


def first_decides(comm: Communicator, decide: Callable[[], Any]) -> Any:
    """What ``decide`` returns on rank 0, on every rank; what it refuses there, all refuse in the same words."""
    verdict: Any = None
    refusal: ManyhandsError | None = None
    if comm.rank == 0:
        try:
            verdict = decide()
        except ManyhandsError as e:
            refusal = e
    kind = None if refusal is None else family(refusal)
    kind, said, verdict = from_first(comm, [kind, str(refusal), verdict])
    if refusal is not None:
        raise refusal
    if kind is not None:
        raise rebuilt(kind, said)
    return verdict


def _words(data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(data + bytes(-len(data) % _WORD_B)), dtype=torch.int64)
