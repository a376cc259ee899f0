"""When a parameterised node updates, by itself and without a barrier, and how stale its gradients are.

    gathered ≥ min_update_frequency  ⇒  θ ← u(θ, mean of the gathered gradients)

An instance's gradient at a node is gathered when all its visits there are back (a loop visits a node many times): it is
the sum over the visits. Visits of other instances that are back by then go along in the same update; each is applied
once. The *staleness* of a visit is by how many updates the node is ahead of the parameters with which that
visit went forward; nothing is kept of those, so the backward uses the parameters as they are by then.

*Guarantee*: no staleness exceeds ``max_active_keys``. In a graph that is the same for all instances that follows from
how many are admitted; where some instances take many times as long as others it does not, so an update that would make
a visit still on its way older than that waits, and gathers further gradients, until the visit is back.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import NamedTuple

from manyhands.partition.ampnet.message import State


class Update(NamedTuple):
    """What is logged of an update: the node, how many it has had with this one, gradients in it, the stalest visit."""

    node: str
    number: int
    gathered: int
    staleness: int


@dataclass
class Learning:
    """One parameterised node's count of visits, gradients and updates."""

    name: str
    max_active_keys: int
    min_update_frequency: int
    updates: int = 0
    gathered: int = 0  # gradients since the last update
    stalest: int = 0  # of their visits
    visits: dict[State, int] = field(default_factory=dict)  # on their way: after how many updates they went forward
    of_instance: Counter[int] = field(default_factory=Counter)  # visits on their way
    wanted: set[int] = field(default_factory=set)  # instances of which some visit has brought a gradient

    def went(self, state: State) -> None:
        """A visit has gone forward."""
        self.visits[state] = self.updates
        self.of_instance[state.key] += 1

    def came_back(self, state: State, *, gradient: bool) -> Update | None:
        """A visit is back, with a gradient or without; the update that is due now, if one is."""
        staleness = self.updates - self.visits.pop(state)
        if gradient:
            self.stalest = max(self.stalest, staleness)
            self.wanted.add(state.key)
        self.of_instance[state.key] -= 1
        if self.of_instance[state.key] == 0:
            del self.of_instance[state.key]
            if state.key in self.wanted:
                self.wanted.remove(state.key)
                self.gathered += 1
        return self._due()

    def _due(self) -> Update | None:
        if self.gathered < self.min_update_frequency:
            return None
        oldest = min(self.visits.values(), default=self.updates)
        if self.updates + 1 - oldest > self.max_active_keys:
            return None
        self.updates += 1
        update = Update(self.name, self.updates, self.gathered, self.stalest)
        self.gathered = self.stalest = 0
        return update
