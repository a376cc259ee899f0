"""Which plans a search looks at: a product of lists, without what cannot differ.

    workers × threads × mesh × strategy × compressor × micro-batches × recompute

One worker trains alone whatever the strategy is called, so it has one strategy and no compressor. A list that is left
out has a default: meshes that cut the model, compressors and micro-batches then go with the first strategy alone, one
of them at a time. A list that is said goes with everything, and what does not fit is refused plan by plan.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from manyhands.checks import is_whole
from manyhands.cluster import Cluster
from manyhands.communication.compression.compressor import compressor_from
from manyhands.communication.topology import Mesh, parse_mesh
from manyhands.contract import Strategy
from manyhands.errors import BadInput, InvalidPlan, Problem
from manyhands.plan import Plan
from manyhands.plan.description import strategy_from

#: Those that trained as well as plain SGD with their defaults (docs/strategies.md), by how much they wait for.
STRATEGIES = ("synchronous", "synchronous(update='replicated')", "local", "ssp", "gossip")
COMPRESSORS = ("none", "bfloat16", "top_k", "powersgd")
MICRO_BATCHES = (1, 2, 4)
#: Extents of the axes that cut the model.
CUTS = (2, 4, 8)
#: Of a cluster without an end so many nodes are looked at.
NODES = 8


@dataclass(frozen=True)
class Space:
    """The lists; None is the default, see above.

    ``cores``: of the machine that workers × threads have to fit in, None where a worker has a device of its own.
    ``base``: what all plans have in common.
    """

    workers: tuple[int, ...]
    cores: int | None = None
    threads: tuple[int, ...] | None = None
    strategies: tuple[str, ...] = STRATEGIES
    meshes: tuple[str, ...] | None = None
    compressors: tuple[str, ...] | None = None
    micro_batches: tuple[int, ...] | None = None
    recompute: tuple[bool, ...] = (False,)
    base: Plan = field(default_factory=Plan)

    def plans(self) -> Iterator[Plan]:
        """Every one, each once, as one would ask for it."""
        for workers in self.workers:
            for threads in self._threads(workers):
                for parts in self._parts(workers):
                    yield dataclasses.replace(self.base, workers=workers, threads=threads, **parts)

    def _threads(self, workers: int) -> Sequence[int]:
        """Of each worker: one, and as many as there are cores for; of those that were said what fits."""
        if self.cores is None:
            return self.threads or (1,)
        if self.threads is None:
            return sorted({1, max(self.cores // workers, 1)})
        return [n for n in self.threads if n * workers <= self.cores] or [min(self.threads)]

    def _parts(self, workers: int) -> Iterator[dict[str, Any]]:
        alone = workers == 1
        for i, strategy in enumerate(self.strategies[:1] if alone else self.strategies):
            for mesh in self._meshes(workers, first=i == 0):
                cut = mesh is not None and mesh["data"] != workers
                first = i == 0 and not cut
                for compress in ("none",) if alone else self.compressors or (COMPRESSORS if first else ("none",)):
                    plain = first and compress == "none"
                    for micro in self.micro_batches or (MICRO_BATCHES if plain else (None,)):
                        for recompute in self.recompute if mesh is not None and mesh["pipeline"] > 1 else (False,):
                            yield {
                                "strategy": strategy,
                                "mesh": mesh,
                                "compress": None if compress == "none" else compress,
                                "micro_batches": micro,
                                "recompute": recompute,
                            }

    def _meshes(self, workers: int, *, first: bool) -> list[Mesh | None]:
        """None is replicas alone."""
        if self.meshes is None:
            cuts = [(axis, n) for axis in ("tensor", "pipeline") for n in CUTS if workers % n == 0] if first else []
            return [None, *(Mesh([("data", workers // n), (axis, n)]) for axis, n in cuts)]
        said = [_mesh(text) for text in self.meshes]
        whole = [
            Mesh([("data", workers // mesh.size), *mesh.axes]) if "data" not in mesh else mesh
            for mesh in said
            if workers % mesh.size == 0
        ]
        return [mesh for mesh in whole if mesh.size == workers]


def check(
    *,
    workers: Sequence[int] | None = None,
    threads: Sequence[int] | None = None,
    strategies: Sequence[str | Strategy] | None = None,
    meshes: Sequence[str] | None = None,
    compressors: Sequence[str] | None = None,
    micro_batches: Sequence[int] | None = None,
    recompute: Sequence[bool] | None = None,
) -> dict[str, Any]:
    """The lists that were said, as `Space` takes them; raises `InvalidPlan` with every problem of all of them."""
    found: list[Problem] = []
    said: dict[str, Any] = {}
    for name, given in (("workers", workers), ("threads", threads), ("micro_batches", micro_batches)):
        if given is not None:
            said[name] = tuple(dict.fromkeys(_listed(name, given, found)))
            for value in said[name]:
                if not is_whole(value, 1):
                    found.append(Problem(f"{name}={value!r}", "it is a whole number from 1.", f"E.g. {name}=1,2."))
    readers: tuple[tuple[str, Any, Callable[[Any], Any], str], ...] = (
        ("strategies", strategies, strategy_from, "E.g. local(every=8)."),
        ("compressors", compressors, compressor_from, "E.g. top_k."),
        ("meshes", meshes, _mesh, "E.g. data, or tensor=2."),
    )
    for name, given, read, cure in readers:
        if given is not None:
            said[name] = tuple(dict.fromkeys(_read(value, read, found, cure) for value in _listed(name, given, found)))
    if recompute is not None:
        said["recompute"] = tuple(dict.fromkeys(map(bool, _listed("recompute", recompute, found))))
    if found:
        raise InvalidPlan(found)
    return said


def _listed(name: str, given: Any, found: list[Problem]) -> Sequence[Any]:
    """A list of one thing may be that thing."""
    values = list(given) if isinstance(given, list | tuple | set | range | frozenset) else [given]
    if not values:
        found.append(Problem(f"{name}=[]", "of nothing there is no plan.", f"Leave {name} out for the default."))
    return values


def _mesh(text: Any) -> Mesh:
    """What it does not say are replicas; ``data`` says replicas alone."""
    if text == "data":
        return Mesh()
    try:
        return text if isinstance(text, Mesh) else parse_mesh(text)
    except (ValueError, AttributeError):
        raise BadInput(f"mesh {text!r}: the form is axis=extent,axis=extent, e.g. tensor=2.") from None


def _read(value: Any, read: Callable[[Any], Any], found: list[Problem], cure: str) -> str:
    try:
        made = read(value)
    except BadInput as e:
        found.append(Problem(str(value), str(e), cure))
        return str(value)
    if isinstance(made, Mesh):
        return ",".join(f"{axis}={n}" for axis, n in made.axes) or "data"
    return str(made)


def powers_of_two(most: int) -> tuple[int, ...]:
    """1, 2, 4 … up to ``most``, which is among them.

    >>> powers_of_two(6)
    (1, 2, 4, 6)
    """
    return tuple(sorted({*(2**n for n in range(most.bit_length()) if 2**n <= most), most}))


def asked(
    said: dict[str, Any], cluster: Cluster, *, here: bool, cores: int, most: int, base: Plan, limit: int
) -> list[Plan]:
    """The plans of a search, at most ``limit``; on this machine or on as many devices as ``cluster`` has.

    By default as many workers as there are cores or devices (of a cluster without an end, on `NODES` nodes), and no
    more than ``most``, the samples of a batch.
    """
    there = cores if here else cluster.devices or NODES * cluster.devices_per_node
    said = {"workers": powers_of_two(max(min(there, most), 1))} | said
    space = Space(**said, cores=cores if here else None, base=base)
    found = list(itertools.islice(space.plans(), limit + 1))
    if not found:
        raise BadInput(
            f"a search of meshes {'; '.join(space.meshes or ())} with workers {_told(space.workers)}: no mesh has so "
            "many ranks. Say workers that are multiples of the meshes' sizes, or leave one of the two out."
        )
    if len(found) > limit:
        count = sum(1 for _ in space.plans())
        raise BadInput(
            f"this search has {count:,} plans, and limit={limit}: of workers {_told(space.workers)}. Say fewer "
            f"workers, strategies, compressors or meshes; or allow more, limit={count} (--limit {count})."
        )
    return found


def _told(values: Sequence[int]) -> str:
    return ",".join(map(str, values))
