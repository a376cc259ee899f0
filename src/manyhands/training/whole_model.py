"""The user's whole model, put together from what the ranks hold of it, and taken apart again."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from manyhands.communication.communicator import Communicator
from manyhands.contract import Block
from manyhands.training.gather import gather
from manyhands.training.model_difference import Signature
from manyhands.training.run import replicas


def together(
    mine: Mapping[str, Tensor], blocks: Mapping[str, Block], whole: Mapping[str, Signature], comm: Communicator
) -> dict[str, Tensor] | None:
    """The ``state_dict`` of the whole model on rank 0, None elsewhere. Collective, counted as ``consensus``.

    ``mine`` is that of this rank's part, ``whole`` the names and shapes there are. Rank 0 needs room for two models.
    """
    if not blocks and all(comm.mesh[axis] == 1 for axis in comm.mesh if axis != "data"):
        return {name: value.detach().cpu() for name, value in mine.items()} if comm.rank == 0 else None
    first = replicas(comm).rank == 0
    told = {name: value.detach().cpu() for name, value in mine.items() if first or differs(name, blocks)}
    everybody = gather(comm, [told, {name: described(block) for name, block in blocks.items()}])
    if everybody is None:
        return None
    result: dict[str, Tensor] = {}
    for values, theirs in everybody:
        for name, value in values.items():
            if name not in theirs:
                result.setdefault(name, value)
                continue
            if name not in result:
                result[name] = torch.zeros(theirs[name][0], dtype=value.dtype)
            block_of(theirs[name]).put(value, result[name])
    # A parameter under several names has one block under all of them, and is one tensor again.
    first_of = {id(block): name for name, block in reversed(list(blocks.items()))}
    return {name: result[first_of[id(blocks[name])] if name in blocks else name] for name in whole}


def differs(name: str, blocks: Mapping[str, Block]) -> bool:
    """Whether workers that have batches of their own hold other parts of a tensor."""
    return name in blocks and blocks[name].axis == "data"


def part(whole: Tensor, name: str, blocks: Mapping[str, Block]) -> Tensor:
    """What is here of the user's tensor ``name``."""
    return blocks[name].take(whole) if name in blocks else whole


def described(block: Block) -> list[object]:
    """A block as plain values."""
    sides = (block.ranges, block.copies)
    told = ([[dim, [list(bounds) for bounds in ranges]] for dim, ranges in side] for side in sides)
    return [list(block.shape), list(block.order), *told]


def block_of(described: list[object]) -> Block:
    """What was `described`."""
    shape, order, *sides = described
    ranges = (tuple((dim, tuple((lo, hi) for lo, hi in bounds)) for dim, bounds in side) for side in sides)  # type: ignore[attr-defined]
    return Block(tuple(shape), *ranges, order=tuple(order))  # type: ignore[arg-type]
