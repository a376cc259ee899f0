"""Where workers are: how many, on which device, reached by which transport, and laid out on which mesh."""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Iterator

from manyhands.checks import is_whole
from manyhands.communication import transports
from manyhands.communication.topology import Mesh
from manyhands.contract import Strategy
from manyhands.errors import Problem
from manyhands.partition import partitions
from manyhands.plan.description import Plan
from manyhands.plan.facts import DEVICES, SERVERS_IN_MEMORY, WORKER_B, Facts

#: Of meshes that would fit, so many are listed.
SHOWN = 6


def _check_room(plan: Plan, workers: int, facts: Facts, found: list[Problem]) -> None:
    """Whether so many processes can exist here at all; the model and the data come on top."""
    if facts.memory_B is None or plan.transport in ("threads", "simulated") or workers * WORKER_B <= facts.memory_B:
        return
    found.append(
        Problem(
            f"workers={workers}",
            f"a worker that is a process takes {WORKER_B // 10**6} MB before it holds any model, and this machine has "
            f"{facts.memory_B / 1e9:.0f} GB.",
            f"At most workers={facts.memory_B // WORKER_B}; one a core ({facts.cores}) is what pays.",
        )
    )


def workers_for(plan: Plan, facts: Facts, found: list[Problem]) -> int:
    """As the plan, the launcher or the mesh says, else one a core."""
    if plan.workers is not None and not is_whole(plan.workers, 1):
        found.append(
            Problem(f"workers={plan.workers!r}", "the number of workers is a whole number from 1.", "E.g. workers=2.")
        )
        return 1
    if facts.launched is not None:
        return _launched_workers(plan, facts.launched, str(facts.launcher), found)
    if plan.workers is not None:
        _check_room(plan, plan.workers, facts, found)
        return plan.workers
    if isinstance(plan.mesh, Mesh):
        return plan.mesh.size
    return 1 if plan.transport == "single" else facts.cores


def _launched_workers(plan: Plan, launched: int, launcher: str, found: list[Problem]) -> int:
    """The ranks that a launcher has started, without those that serve."""
    assert isinstance(plan.strategy, Strategy)
    servers = plan.strategy.server_ranks(in_memory=launcher == "mpi") if launched > 1 else 0
    rule = "under a launcher every rank is one worker."
    if servers:
        rule = f"under a launcher every rank is one worker, but for the last {servers}, which serve."
    if servers >= launched:
        found.append(
            Problem(
                f"{plan.strategy} under {launcher}, which started {launched} ranks",
                rule,
                f"Start {(plan.workers or 1) + servers} ranks or more.",
            )
        )
        return 1
    if plan.workers is not None and plan.workers + servers != launched:
        found.append(
            Problem(
                f"workers={plan.workers} under {launcher}, which started {launched}",
                rule,
                f"Leave workers out, or start {plan.workers + servers} ranks.",
            )
        )
    return launched - servers


def server_ranks(plan: Plan) -> int:
    """How many ranks a plan that is decided has beyond its workers."""
    assert isinstance(plan.strategy, Strategy)
    return plan.strategy.server_ranks(in_memory=plan.transport in SERVERS_IN_MEMORY)


def device_for(plan: Plan, facts: Facts, workers: int, found: list[Problem], notes: list[str]) -> str:
    """NCCL, with a GPU for every worker, and a worker that is alone compute on GPUs unasked; others when told to."""
    if facts.nodes is not None:  # numbers of a simulation are computed where memory is
        return "cpu"
    if plan.device == "cuda" and not facts.gpus:
        found.append(
            Problem(
                "device=cuda",
                "torch sees no CUDA device here.",
                "Use device=cpu; `manyhands doctor` shows what torch sees.",
            )
        )
    if not facts.gpus or plan.device not in DEVICES:
        return "cpu"
    if plan.device != "auto":
        return plan.device
    if plan.transport in ("single", "nccl"):
        return "cuda"
    enough = facts.launcher != "mpi" if facts.launched is not None else workers <= facts.gpus
    if plan.transport == "auto" and (workers == 1 or enough):
        return "cuda"
    notes.append(
        f"{workers} workers on {facts.gpus} GPUs train on the CPU: GPUs are used by transport=nccl, which wants one "
        "for every worker, and by a worker that is alone"
    )
    return "cpu"


def transport_for(plan: Plan, facts: Facts, workers: int, device: str, found: list[Problem], notes: list[str]) -> str:
    """The fastest that works here, or what was asked for if it does."""
    asked = plan.transport
    if facts.nodes is not None:
        if asked not in ("auto", "simulated"):
            found.append(
                Problem(
                    f"transport={asked} in a simulation",
                    "what moves there are prices, by the links of the cluster.",
                    "Leave transport out, and choose a cluster.",
                )
            )
        return "simulated"
    if asked == "simulated":
        found.append(
            Problem(
                "transport=simulated",
                "virtual time is not for training.",
                "Use auto; simulated is what `simulate` and the tests run on.",
            )
        )
    transport = (
        _chosen_transport(asked, facts, workers, device, found, notes)
        if facts.launched is None
        else _launched_transport(asked, facts, device, found)
    )
    _check_place(transport, plan, device, found, notes)
    return transport


def _check_place(transport: str, plan: Plan, device: str, found: list[Problem], notes: list[str]) -> None:
    """Whether the transport moves what lies on the device."""
    if device == "cuda" and transport in ("shared", "threads", "mpi"):
        found.append(
            Problem(
                f"transport={transport} on cuda",
                "its memory is the host's.",
                "Use device=cpu, or transport=nccl with a GPU for every worker.",
            )
        )
    if device == "cuda" and transport == "gloo":
        notes.append("gloo carries what lies on GPUs through the host's memory; that has not been tested on GPUs yet")
    if plan.device == "cpu" and transport == "nccl":
        found.append(
            Problem("transport=nccl on cpu", "NCCL exchanges what lies on GPUs.", "Use device=cuda, or transport=auto.")
        )


def _chosen_transport(
    asked: str, facts: Facts, workers: int, device: str, found: list[Problem], notes: list[str]
) -> str:
    if asked == "auto":
        if workers == 1:
            return "single"
        if device == "cuda":
            return "nccl" if workers <= facts.gpus else "gloo"
        if facts.shared_memory:
            return "shared"
        notes.append("shared memory is for Linux on x86-64; this machine gets gloo")
        return "gloo"
    if asked == "single" and workers > 1:
        found.append(
            Problem(
                f"transport=single with {workers} workers", "single is one worker.", "Use workers=1, or transport=auto."
            )
        )
    if asked == "shared" and not facts.shared_memory:
        found.append(Problem("transport=shared", "it needs Linux on x86-64.", "Use transport=gloo."))
    if asked == "nccl" and workers > facts.gpus:
        found.append(
            Problem(
                f"transport=nccl with {workers} workers on {facts.gpus} GPUs",
                "NCCL wants a GPU for every worker.",
                "Use fewer workers, or device=cpu and transport=auto.",
            )
        )
    if asked == "mpi":
        notes.append("MPI's launcher opens listeners on all interfaces of this machine while it runs")
    return asked


def _launched_transport(asked: str, facts: Facts, device: str, found: list[Problem]) -> str:
    natural = "mpi" if facts.launcher == "mpi" else "nccl" if device == "cuda" else "gloo"
    if asked == "auto":
        return natural if facts.launched != 1 else "single"
    works = ("mpi",) if facts.launcher == "mpi" else ("gloo", "nccl")
    if asked in transports and asked not in works and not (asked == "single" and facts.launched == 1):
        found.append(
            Problem(
                f"transport={asked} under {facts.launcher}",
                "a launcher's ranks meet the way it provides.",
                f"Use transport={' or '.join(works)}, or start without a launcher.",
            )
        )
    return asked


def mesh_for(plan: Plan, workers: int, found: list[Problem]) -> Mesh:
    """The plan's, what it does not divide being replicas."""
    mesh = plan.mesh if isinstance(plan.mesh, Mesh) else Mesh(data=workers)
    if "data" not in mesh and workers % mesh.size == 0:  # what is not said are replicas
        mesh = Mesh([("data", workers // mesh.size), *mesh.axes])
    unknown = [a for a in mesh if a not in partitions and mesh[a] > 1]
    if unknown:
        near = difflib.get_close_matches(unknown[0], partitions, n=1)
        found.append(
            Problem(
                f"{mesh} cuts along {', '.join(unknown)}",
                f"the axes that exist are {', '.join(partitions)}.",
                f"Did you mean {near[0]}={mesh[unknown[0]]}?" if near else f"Use data={workers}.",
            )
        )
    if mesh.size != workers:
        found.append(
            Problem(
                f"{mesh} needs {mesh.size} ranks; there are {workers}",
                "the extents of a mesh multiply to the number of workers.",
                f"Meshes that fit {workers}: {'; '.join(_fitting(mesh, workers))}.",
            )
        )
    return mesh


def _fitting(asked: Mesh, workers: int) -> list[str]:
    """Meshes of so many workers over the axes asked for and data, as text; the first few.

    >>> _fitting(Mesh(pipeline=3), 4), _fitting(Mesh(data=3, tensor=2), 2)
    (['pipeline=4', 'data=2,pipeline=2', 'data=4'], ['data=2', 'tensor=2'])
    """
    axes = list(dict.fromkeys([*(a for a in asked if a in partitions), "data"]))
    said = [axis for axis in asked if axis in axes] if "data" in asked else ["data", *axes[:-1]]

    def extents(left: int, axes: int) -> Iterator[tuple[int, ...]]:
        if axes == 1:
            yield (left,)
            return
        for n in range(left, 0, -1):
            if left % n == 0:
                yield from ((n, *rest) for rest in extents(left // n, axes - 1))

    found = []
    for each in itertools.islice(extents(workers, len(axes)), SHOWN):
        extent = dict(zip(axes, each, strict=True))
        text = ",".join(f"{axis}={extent[axis]}" for axis in said if extent[axis] > 1)
        found.append(text or "data=1")
    return found
