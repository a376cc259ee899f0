"""What the descriptions of all strategies on servers have in common: where they can run, and in how many shards.

Where servers are memory, whoever pushes does their work himself under a shard's lock. Workers begin with different
shards, so with a shard a worker two of them meet at a lock only by chance. Where servers are ranks each costs a process
that could train, so there is one unless more are asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, Self

from manyhands.checks import is_whole
from manyhands.communication.compression.compressor import Compressor
from manyhands.communication.compression.layout import Shape
from manyhands.consistency.compressed import Compressing, problems_of
from manyhands.consistency.parameter_server import shards
from manyhands.contract import Setting, Strategy, Traffic
from manyhands.errors import Problem


@dataclass(frozen=True)
class OnServers(Strategy):
    """A strategy whose parameters lie on a server, and whose workers push to it and pull from it."""

    deterministic: ClassVar[bool] = False

    @property
    def shards(self) -> int:
        """Into how many shards the servers cut a piece."""
        return 1

    @property
    def servers_update(self) -> bool:
        """As a rule."""
        return True

    @property
    def lockstep(self) -> bool:
        """Never: workers that exchange with a server do not exchange with each other."""
        return False

    @property
    def sends_at_most(self) -> bool:
        """A worker whose share is empty has nothing to push."""
        return True

    def traffic(self, numel: int, size: int, itemsize: int = 4) -> Traffic:
        """A push and a pull."""
        both = shards.traffic(((numel,),), size, itemsize, self.shards)
        return both + both

    def exact(self, setting: Setting) -> bool:
        """Only alone."""
        return setting.workers == 1

    def problems(self, setting: Setting) -> list[Problem]:
        """It needs a server, and a server that is to apply the optimizer must know it."""
        found = []
        if not setting.servers_in_memory and setting.transport != "gloo":
            found.append(
                Problem(
                    f"{self.name} on transport={setting.transport}",
                    "its servers are memory that all workers reach, or ranks that anybody can send to.",
                    "Use transport=shared, threads, mpi or gloo.",
                )
            )
        if self.servers_update and not setting.served:
            found.append(
                Problem(
                    f"{self.name} with this optimizer",
                    "a server applies sgd, adagrad, adam or adamw (without maximize, amsgrad, fused or hooks).",
                    "Use one of these, or a strategy whose workers update for themselves, e.g. ssp or local.",
                )
            )
        return found

    def server_ranks(self, *, in_memory: bool) -> int:
        """One for each shard, where servers are not memory."""
        return 0 if in_memory else self.shards


@dataclass(frozen=True)
class OnShards(Compressing, OnServers):
    """… with as many servers as one likes.

    ``servers``: into how many shards parameters are cut, each with its own lock or rank. None: as many as there are
    workers where servers are memory, one where they are ranks. ``compress``: what is pushed instead of dense vectors;
    what it leaves out stays with its worker for the next push. Pulls are dense.
    """

    survives: ClassVar[bool] = True
    alone: ClassVar[str] = "a server"

    servers: int | None = field(default=None, kw_only=True)
    compress: str = field(default="none", kw_only=True)

    def __post_init__(self) -> None:
        self._read_compress()
        if self.servers is not None and not is_whole(self.servers, 1):
            raise ValueError(f"servers={self.servers!r}: the number of shards is a whole number from 1, or None")

    @property
    def shards(self) -> int:
        """``servers``; 1 as long as that is not decided."""
        return self.servers or 1

    @property
    def pushes(self) -> Compressor | None:
        """What makes payloads of what is pushed, if anything."""
        return self.compressor if self.compresses else None

    def pushed(self, shapes: Sequence[Shape], size: int, itemsize: int, *, every: int = 1) -> Traffic:
        """What pushes send of one piece."""
        return shards.traffic(shapes, size, itemsize, self.shards, every=every, compressor=self.pushes)

    def traffic(self, numel: int, size: int, itemsize: int = 4) -> Traffic:
        """A push, compressed or not, and a pull."""
        return self.traffic_of(((numel,),), size, itemsize)

    def traffic_of(self, shapes: Sequence[Shape], size: int, itemsize: int = 4) -> Traffic:
        """See `traffic`."""
        return shards.traffic(shapes, size, itemsize, self.shards) + self.pushed(shapes, size, itemsize)

    def problems(self, setting: Setting) -> list[Problem]:
        """See `OnServers.problems`; and what compressors cannot."""
        found, asked = super().problems(setting), f"compress={self.compress} with {self.name}"
        if self.compresses:
            found += problems_of(self.compressor, asked, setting, alone=self.alone, moves=self.moves)
        return found

    def resolve(self, setting: Setting) -> Self:
        """A shard a worker where that costs no rank."""
        if self.servers is not None:
            return self
        ranks = self.server_ranks(in_memory=setting.servers_in_memory)
        return replace(self, servers=ranks or setting.workers)
