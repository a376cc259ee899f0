"""How the work is split: everything but task and hardware, checked against both before a process starts.

The three descriptions meet here: a `Strategy` from ``consistency``, a cut from ``partition`` and a transport from
``communication``, which do not know each other.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from manyhands.calling import call
from manyhands.catalogue import Catalogue, import_object
from manyhands.checks import is_positive, is_whole
from manyhands.communication import transports
from manyhands.communication.topology import Mesh, parse_mesh
from manyhands.consistency import strategies
from manyhands.contract import Setting, Strategy
from manyhands.errors import BadInput, InvalidPlan, Problem, UnknownName
from manyhands.grammar import parse_call
from manyhands.partition import cut_strategies, partitions
from manyhands.partition.pipeline.description import MICRO_BATCHES
from manyhands.partition.pipeline.description import parse as parse_pipeline
from manyhands.partition.tensor import axis_of, check_known, scheme_of

BUFFER_POLICIES = ("average", "rank0", "local")
PRECISIONS = ("float32", "bfloat16")
DEVICES = ("auto", "cpu", "cuda")
ALLOCATORS = ("tuned", "plain")
#: The transports whose class says ``shares_memory``; asking the classes would load torch.
SHARE_MEMORY = ("single", "threads", "shared", "simulated")
#: Those whose class says ``one_sided``.
ONE_SIDED = ("mpi",)
#: Where a parameter server is memory and takes no rank; see `Setting.servers_in_memory`.
SERVERS_IN_MEMORY = (*SHARE_MEMORY, *ONE_SIDED)


def strategy_from(value: str | Strategy) -> Strategy:
    """A strategy from its text; `str` of the result reads back to an equal one."""
    if isinstance(value, Strategy):
        return value
    if not isinstance(value, str):
        raise BadInput(
            f"strategy {value!r} is a {type(value).__name__}; it is text such as 'synchronous' or a Strategy."
        )
    said = parse_call(value, kind="strategy")
    cls = Catalogue("strategy", {**strategies, **cut_strategies}).load(said.name)
    if not (isinstance(cls, type) and issubclass(cls, Strategy)):
        raise BadInput(
            f"strategy {said.name} is a {type(cls).__name__}; the rule is: a subclass of manyhands' Strategy."
        )
    try:
        made = call("strategy", said.name, cls, said.args, said.kwargs)
    except ValueError as e:
        raise BadInput(f"strategy {value}: {e}.") from None
    assert isinstance(made, Strategy)
    return made


def _mesh_from(text: str) -> Mesh:
    try:
        return parse_mesh(text)
    except ValueError:
        raise BadInput(f"mesh {text!r}: the form is axis=extent,axis=extent, e.g. data=2.") from None


@dataclass(frozen=True)
class Plan:
    """How the work is split.

    ``workers=None``: as many as the launcher started, else one per core; never counted are the ranks that some
    strategies want beside them as servers where no memory is shared. ``micro_batches`` cuts each worker's share
    into passes whose gradients add up (gradient accumulation, bunch mode); by default one, in a pipeline four a stage.
    ``shard=1`` shares optimizer state over workers (ZeRO stage 1). ``threads`` are per worker, 0 = cores / workers.
    ``allocator='plain'`` leaves glibc's malloc as it is. ``tensor`` says which modules are cut along the mesh's tensor
    axis (see `partition.tensor.rules`; default auto) or which scheme cuts the network (`partition.tensor.schemes`),
    ``pipeline`` the schedule of its pipeline axis and where stages begin (`partition.pipeline.description`), and
    ``recompute`` that a stage computes activations anew before a backward. ``compress`` is not built yet and refused.

        Plan(strategy="synchronous", workers=2)
    """

    strategy: Strategy | str = "synchronous"
    mesh: Mesh | str | None = None
    compress: str | None = None
    tensor: str | None = None
    pipeline: str | None = None
    shard: int | None = None
    micro_batches: int | None = None
    recompute: bool = False
    buffers: str = "average"
    precision: str = "float32"
    workers: int | None = None
    threads: int = 0
    transport: str = "auto"
    device: str = "auto"
    allocator: str = "tuned"
    timeout_s: float = 60.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "strategy", strategy_from(self.strategy))
        if isinstance(self.mesh, str):
            object.__setattr__(self, "mesh", _mesh_from(self.mesh))
        elif self.mesh is not None and not isinstance(self.mesh, Mesh):
            raise BadInput(
                f"mesh {self.mesh!r} is a {type(self.mesh).__name__}; it is text such as 'data=2' or a Mesh, "
                "e.g. Mesh(data=2)."
            )

    def __str__(self) -> str:
        changed = [
            f"{f.name}={getattr(self, f.name)}" for f in dataclasses.fields(self) if getattr(self, f.name) != f.default
        ]
        return f"plan({', '.join(changed)})"

    def as_table(self) -> dict[str, Any]:
        """The fields as TOML can hold them, strategy and mesh as text."""
        table = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        table["strategy"] = str(self.strategy)
        if self.mesh is not None:
            assert isinstance(self.mesh, Mesh)
            table["mesh"] = ",".join(f"{a}={n}" for a, n in self.mesh.axes)
        return {k: v for k, v in table.items() if v is not None}


#: What a forked worker adds to memory, measured with torch 2.13: its own pages of the interpreter and of torch.
WORKER_B = 30_000_000


@dataclass(frozen=True)
class Facts:
    """What a plan is checked against: the machine, the optimizer and the loss."""

    cores: int
    gpus: int = 0
    shared_memory: bool = True  # the shared transport works here
    launched: int | None = None  # ranks that a launcher has started, this process being one of them
    launcher: str | None = None  # "torchrun", "mpi" or "slurm"
    elementwise: bool = True
    stateless: bool = False
    optimizer_problem: Problem | None = None
    clip: bool = False
    served: bool = True  # a parameter server can apply the optimizer
    batch_size: int = 1
    memory_B: int | None = None  # of the machine, where that is known


@dataclass(frozen=True)
class Resolved:
    """A plan with every ``auto`` decided, and what the user should know about it (each said once)."""

    plan: Plan
    setting: Setting
    notes: tuple[str, ...] = field(default=())


def resolve(plan: Plan, facts: Facts) -> Resolved:
    """Decide every ``auto`` and raise `InvalidPlan` with *all* problems (`UnknownName` if the only one is a name)."""
    found: list[Problem] = []
    notes: list[str] = []
    workers = _workers(plan, facts, found)
    unknown = _unknown_names(plan, found)
    device = _device(plan, facts, workers, found, notes)
    transport = _transport(plan, facts, workers, device, found, notes)
    mesh = _mesh(plan, workers, found)
    _numbers(plan, found)
    _not_built(plan, found)
    if facts.optimizer_problem is not None:
        found.append(facts.optimizer_problem)
    replicas = mesh["data"]
    setting = Setting(
        workers=replicas,
        transport=transport,
        shares_memory=transport in SHARE_MEMORY,
        elementwise=facts.elementwise,
        stateless=facts.stateless,
        clip=facts.clip,
        served=facts.served,
        one_sided=transport in ONE_SIDED,
    )
    strategy = _sharded(plan, found)
    found.extend(strategy.problems(setting))
    _cuts(plan, mesh, facts, strategy, found)
    if len(found) == len(unknown) == 1:
        raise unknown[0]
    if found:
        raise InvalidPlan(found)
    decided = strategy.resolve(setting)
    if not facts.elementwise and workers > 1:
        notes.append(
            "the optimizer looks at whole tensors, so every worker updates all parameters (no sharing of its state)"
        )
    of_whom = "workers" if replicas == workers else "replicas of the model"
    if facts.batch_size < replicas and not strategy.whole_batch:
        notes.append(
            f"a batch of {facts.batch_size} over {replicas} {of_whom} leaves {replicas - facts.batch_size} of them "
            "idle in every step"
        )
    elif facts.batch_size % replicas and not strategy.whole_batch:
        notes.append(
            f"a batch of {facts.batch_size} does not divide by {replicas} {of_whom}: shares differ by one sample and "
            "are weighted"
        )
    threads = plan.threads or max(1, facts.cores // workers)
    if workers * threads > facts.cores and facts.launched is None:
        notes.append(f"{workers} workers × {threads} threads on {facts.cores} cores: right, but not faster")
    if transport == "threads" and workers > 1:
        notes.append(
            "threads share one random number generator and one interpreter lock: results repeat only for models that "
            "draw no random numbers (no dropout), and Python's share of a step is not parallel"
        )
    made = dataclasses.replace(
        plan,
        strategy=decided,
        mesh=mesh,
        workers=workers,
        threads=threads,
        transport=transport,
        device=device,
        micro_batches=micro_batches(plan, mesh),
    )
    return Resolved(made, setting, tuple(notes))


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


def _workers(plan: Plan, facts: Facts, found: list[Problem]) -> int:
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


def _unknown_names(plan: Plan, found: list[Problem]) -> list[UnknownName]:
    unknown = []
    for kind, name, choices in (
        ("device", plan.device, DEVICES),
        ("transport", plan.transport, (*transports, "auto")),
    ):
        if name not in choices:
            unknown.append(UnknownName(kind, str(name), choices))
            found.append(Problem(f"{kind}={name!r}", str(unknown[-1]), f"E.g. {kind}=auto."))
    return unknown


def _device(plan: Plan, facts: Facts, workers: int, found: list[Problem], notes: list[str]) -> str:
    """NCCL, with a GPU for every worker, and a worker that is alone compute on GPUs unasked; others when told to."""
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


def _transport(plan: Plan, facts: Facts, workers: int, device: str, found: list[Problem], notes: list[str]) -> str:
    asked = plan.transport
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


def _mesh(plan: Plan, workers: int, found: list[Problem]) -> Mesh:
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
                f"Meshes that fit {workers}: data={workers}.",
            )
        )
    return mesh


def _numbers(plan: Plan, found: list[Problem]) -> None:
    for name, at_least in (("micro_batches", 1), ("threads", 0)):
        value = getattr(plan, name)
        if value is not None and not is_whole(value, at_least):
            found.append(
                Problem(
                    f"{name}={value!r}", f"{name} is a whole number from {at_least}.", f"E.g. {name}={at_least + 1}."
                )
            )
    if not is_positive(plan.timeout_s):
        found.append(
            Problem(
                f"timeout_s={plan.timeout_s!r}", "a deadline is a positive number of seconds.", "E.g. timeout_s=60."
            )
        )
    for name, choices in (("buffers", BUFFER_POLICIES), ("precision", PRECISIONS), ("allocator", ALLOCATORS)):
        value = getattr(plan, name)
        if value not in choices:
            found.append(
                Problem(f"{name}={value!r}", f"{name} is one of {', '.join(choices)}.", f"E.g. {name}={choices[0]!r}.")
            )


def micro_batches(plan: Plan, mesh: Mesh) -> int:
    """As the plan says, else one, or enough to fill a pipeline."""
    assert isinstance(plan.strategy, Strategy)
    if plan.micro_batches is not None:
        return plan.micro_batches
    if plan.strategy.name in cut_strategies:
        return 1
    return MICRO_BATCHES * mesh["pipeline"] if mesh["pipeline"] > 1 else 1


def _cuts(plan: Plan, mesh: Mesh, facts: Facts, strategy: Strategy, found: list[Problem]) -> None:
    """What does not go with a model that is cut."""
    cut = {axis: mesh[axis] for axis in mesh if axis != "data" and mesh[axis] > 1}
    if axis_of(plan.tensor) == "data":
        _hybrid(plan, mesh, facts, strategy, cut, found)
    elif plan.tensor is not None and "tensor" not in cut:
        found.append(
            Problem(
                f"tensor={plan.tensor!r} on {mesh}",
                "what is cut is divided among the ranks of the mesh's tensor axis.",
                "Say so, e.g. mesh=tensor=2 (--mesh tensor=2), or leave tensor out.",
            )
        )
    for name, value in (("pipeline", plan.pipeline), ("recompute", plan.recompute)):
        if value and "pipeline" not in cut:
            found.append(
                Problem(
                    f"{name}={value!r} on {mesh}",
                    "stages lie on the ranks of the mesh's pipeline axis.",
                    f"Say so, e.g. mesh=pipeline=2 (--mesh pipeline=2), or leave {name} out.",
                )
            )
    if strategy.name in cut_strategies:
        _cuts_itself(plan, cut, strategy, found)
    if not cut:
        return
    scheme = scheme_of(plan.tensor)
    try:
        check_known(scheme)
    except UnknownName as e:
        found.append(Problem(f"tensor={plan.tensor!r}", str(e), "E.g. tensor=auto."))
    if scheme is not None and "pipeline" in cut:
        found.append(
            Problem(
                f"tensor={plan.tensor!r} on {mesh}",
                "a scheme cuts a whole network, and a stage is only some of one.",
                "Leave the pipeline axis out, or cut stages by rules, e.g. tensor=auto.",
            )
        )
    if "pipeline" in cut:
        parse_pipeline(plan.pipeline).made(mesh["pipeline"], micro_batches(plan, mesh))
    by_stage = strategy.bears_stages and set(cut) == {"pipeline"} and plan.transport not in ("gloo", "nccl")
    if not (strategy.bears_cuts or by_stage):
        found.append(
            Problem(
                f"{strategy} on {mesh}",
                f"{strategy.name} wants the whole model on every worker.",
                "Use synchronous, local, diloco, elastic or gossip; or mesh data alone.",
            )
        )
    if not facts.elementwise:
        found.append(_of_whole_tensors(str(mesh)))


def _cuts_itself(plan: Plan, cut: dict[str, int], strategy: Strategy, found: list[Problem]) -> None:
    """What has no meaning where instances pass from node to node as they come."""
    for name, value in (
        ("pipeline", plan.pipeline),
        ("recompute", plan.recompute),
        ("micro_batches", plan.micro_batches),
    ):
        if value:
            found.append(
                Problem(
                    f"{name}={value!r} with {strategy}",
                    "messages go as they come: there is no schedule of micro-batches.",
                    f"Leave {name} out; samples= of {strategy.name} says how many samples go together.",
                )
            )
    if "tensor" in cut:
        found.append(
            Problem(
                f"tensor={cut['tensor']} with {strategy}",
                "a node lies on one rank.",
                f"Say mesh=pipeline={cut['tensor']} (--mesh pipeline={cut['tensor']}).",
            )
        )


def _hybrid(
    plan: Plan, mesh: Mesh, facts: Facts, strategy: Strategy, cut: Mapping[str, int], found: list[Problem]
) -> None:
    """What does not go with dense layers that are cut along the data axis."""
    said = f"tensor={plan.tensor}"
    if cut:
        found.append(
            Problem(
                f"{said} on {mesh}",
                "the workers that divide the batch divide the dense layers, too.",
                f"Use mesh data alone, e.g. mesh=data={mesh.size} (--mesh data={mesh.size}).",
            )
        )
    if not (strategy.name == "synchronous" and strategy.bears_cuts):
        found.append(
            Problem(
                f"{said} with {strategy}",
                "all workers pass through the dense layers together, in every step, and average all else.",
                "Use synchronous.",
            )
        )
    if plan.micro_batches not in (None, 1):
        found.append(
            Problem(
                f"{said} with micro_batches={plan.micro_batches}",
                "a share goes through the convolutions at once; the dense layers have the passes of their scheme.",
                "Leave micro_batches out, or use scheme=b or c for smaller passes.",
            )
        )
    if not facts.elementwise and mesh["data"] > 1:
        found.append(_of_whole_tensors(said))
    scheme = scheme_of(plan.tensor)
    if facts.clip and scheme is not None and str(scheme.kwargs.get("updates", "step")) == "each":
        found.append(
            Problem(
                f"{said} with clip",
                "the norm of all gradients is known after the last pass, and dense layers are updated before.",
                "Leave clip out, or use updates=step.",
            )
        )


def _of_whole_tensors(what: str) -> Problem:
    return Problem(
        f"{what} with an optimizer that looks at whole tensors",
        "of a model that is cut a worker updates parts of tensors.",
        "Use an optimizer such as sgd, adam, adamw, adagrad or rmsprop.",
    )


def _not_built(plan: Plan, found: list[Problem]) -> None:
    for name in ("compress",):
        value = getattr(plan, name)
        if value:
            found.append(Problem(f"{name}={value!r}", f"{name} is not part of this release.", f"Leave {name} out."))


def _sharded(plan: Plan, found: list[Problem]) -> Strategy:
    strategy = plan.strategy
    assert isinstance(strategy, Strategy)
    if plan.shard is None:
        return strategy
    if not is_whole(plan.shard, 0) or plan.shard > 1:
        found.append(
            Problem(f"shard={plan.shard!r}", "0 (nothing shared) and 1 (optimizer state shared) exist.", "Use shard=1.")
        )
        return strategy
    if isinstance(strategy, import_object(strategies["synchronous"])):
        update = "sharded" if plan.shard else "replicated"
        if strategy.update not in ("auto", update):
            found.append(
                Problem(f"shard={plan.shard} with {strategy}", "they contradict each other.", "Say one of them.")
            )
        made: Strategy = dataclasses.replace(strategy, update=update)
        return made
    if strategy.parameters == "common":
        rule = f"every worker of {strategy.name} updates a slice, so optimizer state is always shared."
        found.append(Problem(f"shard={plan.shard} with {strategy}", rule, "Leave shard out."))
    elif plan.shard:
        found.append(
            Problem(
                f"shard=1 with {strategy}",
                "sharing optimizer state is part of synchronous.",
                "Use strategy=synchronous.",
            )
        )
    return strategy
