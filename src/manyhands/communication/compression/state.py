"""What a worker keeps for one vector that is compressed from step to step, and the random numbers it draws for it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from manyhands.communication.compression import meter
from manyhands.communication.compression.layout import Layout


@dataclass
class State:
    """What a worker keeps for one vector from step to step; all of it is needed for an exact resume."""

    layout: Layout
    rank: int = 0
    size: int = 1
    index: int = 0  # which of the worker's vectors this is: each draws random numbers of its own
    tensors: dict[str, Tensor] = field(default_factory=dict)
    numbers: dict[str, float] = field(default_factory=dict)
    #: Of the slices, then of this rank's own slice when it is encoded again; see the scatter route.
    parts: list[State] = field(default_factory=list)
    exchanges: int = 0  # of this process; no part of a checkpoint
    #: Where alone the last mean is not zero, ascending, if that is few places; None: anywhere. No part of one either.
    touched: Tensor | None = None

    def is_looked_at(self) -> bool:
        """Whether the exchange that begins is one whose error is told (see `meter`)."""
        self.exchanges += 1
        return meter.is_looked_at(self.exchanges - 1)

    def count(self, name: str = "step") -> int:
        """How often this has been called before."""
        value = int(self.numbers.get(name, 0))
        self.numbers[name] = value + 1
        return value

    def random(self, seed: int, *, alike: bool = False) -> np.random.Generator:
        """Numbers of this step; on all ranks ``alike``, else each rank's own. They repeat with the run."""
        who = 0 if alike else self.rank + 1
        return np.random.Generator(np.random.SFC64([seed, self.index, self.count("draws"), who]))

    def uniform(self, seed: int) -> Callable[[int], NDArray[Any]]:
        """What draws so many numbers from [0, 1), in the vector's dtype; they are this step's and each rank's own."""
        random = self.random(seed)
        if self.layout.itemsize == 8:
            return random.random
        bits = random.bit_generator

        def draw(count: int) -> NDArray[Any]:
            # Twice as fast: 23 random bits as the mantissa of a float32 from [1, 2).
            words: NDArray[Any] = bits.random_raw((count + 1) // 2).view(np.uint32)[:count]
            words >>= np.uint32(9)
            words |= np.float32(1).view(np.uint32)
            numbers = words.view(np.float32)
            numbers -= 1
            return numbers

        return draw

    def state_dict(self) -> dict[str, Any]:
        """Tensors and numbers."""
        parts = [part.state_dict() for part in self.parts]
        return {"tensors": dict(self.tensors), "numbers": dict(self.numbers), "parts": parts}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up a `state_dict` of the same rank."""
        for name, kept in state["tensors"].items():
            self.tensors[name] = kept.clone()
        self.numbers = dict(state["numbers"])
        for part, kept in zip(self.parts, state["parts"], strict=True):
            part.load_state_dict(kept)
