"""A model as a row of parts, between any two of which a pipeline may cut it.

A stage is a run of parts. Each parameter belongs to one stage: where two parts use one (tied weights), its gradient
would be in two places, so no cut lies between them.
"""

from __future__ import annotations

import functools
import itertools
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from manyhands.errors import BadInput


@dataclass(frozen=True)
class Tied:
    """A parameter that several parts use, from the first of them to the last."""

    names: tuple[str, ...]
    first: int
    last: int


class Parts(ABC):
    """A model as a row of parts, between any two of which it can be cut."""

    model: nn.Module
    names: list[str]  # of what each part begins with
    starts: dict[str, int]  # every module that begins a part, also those that contain the first one
    closed: Mapping[str, str] = {}  # modules that are parts as they are, and why torch.fx does not trace them

    def __len__(self) -> int:
        return len(self.names)

    @abstractmethod
    def module(self, lo: int, hi: int) -> nn.Module:
        """Parts ``[lo, hi)`` as one module, a tensor or tuple in and out."""

    @functools.cached_property
    def parameters(self) -> list[list[nn.Parameter]]:
        """Of each part."""
        return [list(self.module(k, k + 1).parameters()) for k in range(len(self))]

    def why_one_part(self, name: str) -> str:
        """What to know of a module that has others and cannot be opened, and what would work."""
        kind = type(self.model.get_submodule(name)).__name__
        if name not in self.closed:
            return f"{name} ({kind}) is one part. Cut before it, or before what comes after it."
        return (
            f"{name} ({kind}) is one part: torch.fx cannot trace its forward ({self.closed[name]}). To cut there, make "
            "what it cannot trace a module of its own."
        )

    def refuse_inside(self, name: str) -> None:
        """Raise `BadInput` if the model has a module called so that lies within a part."""
        parents = list(itertools.accumulate(name.split("."), lambda a, b: f"{a}.{b}"))[:-1]
        around = [p for p in parents if p in self.names]
        if around and any(name == own for own, _ in self.model.named_modules()):
            raise BadInput(f"Cannot cut before {name}, which lies in {around[-1]}. {self.why_one_part(around[-1])}")

    def trains(self) -> list[bool]:
        """Which parts have trainable parameters."""
        return [any(p.requires_grad for p in its) for its in self.parameters]

    def forbidden(self) -> set[int]:
        """Parts that no stage may begin with, since the two would share parameters."""
        return {b for t in self.tied() for b in range(t.first + 1, t.last + 1)}

    def most_stages(self) -> int:
        """Into how many stages it can be cut, each with something to train."""
        forbidden, trains = self.forbidden(), self.trains()
        bounds = [*(b for b in range(len(self)) if b not in forbidden), len(self)]
        return sum(any(trains[lo:hi]) for lo, hi in itertools.pairwise(bounds))

    def tied(self) -> list[Tied]:
        """Parameters that more than one part uses."""
        users: dict[int, list[int]] = {}
        for k in range(len(self)):
            for p in self.parameters[k]:
                users.setdefault(id(p), []).append(k)
        called: dict[int, list[str]] = {}
        for name, p in self.model.named_parameters(remove_duplicate=False):
            called.setdefault(id(p), []).append(name)
        return [Tied(tuple(called[p]), min(at), max(at)) for p, at in users.items() if len(at) > 1]


def refuse_tied(model: nn.Module, tied: Sequence[Tied]) -> None:
    """Raise `BadInput`, naming what two stages would share."""
    said = "; ".join(" = ".join(t.names) for t in tied)
    raise BadInput(
        f"{type(model).__name__} cannot be cut there: two stages would share parameters ({said}). Each parameter "
        "belongs to one stage. Cut so that all that use it are in one stage, or untie the weights."
    )


def in_mode(stage: nn.Module, model: nn.Module) -> nn.Module:
    """What is new about a stage is in the model's mode; its own modules stay in theirs."""
    own = {id(m) for m in model.modules()}
    for m in stage.modules():
        if id(m) not in own:
            m.training = model.training
    return stage
