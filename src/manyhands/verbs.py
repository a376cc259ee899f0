"""The four verbs. Each decides every ``auto``, checks the plan against task and machine, and calls down.

`train` and `simulate` are here; `predict` and `search` follow the same form: they take the same task and plan.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from manyhands.checks import is_whole
from manyhands.communication import futex
from manyhands.communication.communicator import Communicator
from manyhands.communication.topology import Mesh
from manyhands.contract import Measurement, Spread, StepParts, Strategy
from manyhands.data import Dataset, Splits
from manyhands.errors import BadInput, FactoryFailed, ManyhandsError, WorkerFailed
from manyhands.models import losses, optimizers, schedules
from manyhands.models.factory import settle
from manyhands.models.update_rules import served
from manyhands.partition.ampnet.graph import check_norms
from manyhands.partition.ampnet.place import fitted
from manyhands.partition.ampnet.strategy import AMPNet
from manyhands.partition.pipeline.strategy import PipeDream
from manyhands.plan import Facts, Plan, Resolved, resolve, server_ranks
from manyhands.task import Task, described
from manyhands.training import environment
from manyhands.training.checkpoint import CheckpointNotWritten
from manyhands.training.gather import first_decides
from manyhands.training.interruption import terminating
from manyhands.training.loop import work
from manyhands.training.member import Member, own_traceback
from manyhands.training.preparation import signature
from manyhands.training.run import Options
from manyhands.training.sampler import batch_sizes
from manyhands.training.team import team

if TYPE_CHECKING:
    from manyhands.cluster import Cluster
    from manyhands.simulation.failures import Failures
    from manyhands.simulation.running import Simulation
    from manyhands.simulation.stragglers import Stragglers
    from manyhands.training.outline import Outline

log = logging.getLogger(__name__)

JOB = "manyhands.training.loop:work"
#: What is simulated on when nobody says: servers of 16 cores, as many as one asks for.
DEFAULT_CLUSTER = "ethernet_10g"


@dataclass(frozen=True)
class Result:
    """What `train` gives back. Beside rank 0, the ranks of a launched run have ``plan``, ``out`` and ``notes`` only."""

    model: torch.nn.Module | None
    plan: Plan
    summary: Measurement | None
    history: list[dict[str, Any]]
    out: Path | None
    notes: tuple[str, ...] = ()
    state: Mapping[str, Any] = field(default_factory=dict, repr=False)  # the final state_dict


class LastCheckpointNotWritten(CheckpointNotWritten):
    """Training is done, but its last checkpoint could not be written: the folder does not hold what was learned.

    Raised at the very end, because whoever gave ``out`` counts on finding the model there, and an exit status of 0
    would tell a job scheduler so. Nothing is lost to a script: ``result`` is what `train` would have returned, with
    model and history; ``summary.json`` has been written if there was room for it.
    """

    def __init__(self, reason: str, result: Result) -> None:
        self.result = result
        said = result.summary
        assert said is not None
        found = [f"{said.steps} steps"]
        if said.train_loss is not None:
            found.append(f"training loss {said.train_loss:.4g}")
        if said.test_accuracy is not None:
            found.append(f"test accuracy {said.test_accuracy:.2%}")
        super().__init__(
            f"Training is done ({', '.join(found)}), but {result.out} does not hold what was learned. {reason} "
            "In Python the result is this error's .result; from the command line, --resume does the steps since the "
            "last checkpoint again."
        )


@contextlib.contextmanager
def _the_users(what: str, spec: object) -> Iterator[None]:
    """Inside, an exception that is none of ours comes from what the user described as ``spec``."""
    try:
        yield
    except ManyhandsError:
        raise
    except Exception as e:
        raise FactoryFailed(f"{what} {described(spec)}", f"{type(e).__name__}: {e}", own_traceback(e)) from e


def resolved(task: Task, plan: Plan, *, nodes: int | None = None) -> Resolved:
    """The plan with every ``auto`` decided for this machine; raises `InvalidPlan` with all problems of both.

    ``nodes``: for a simulated cluster of so many instead.
    """
    task.check()
    started = environment.launched() if nodes is None else None
    with _the_users("loss", task.loss):
        losses.build(task.loss)
    with _the_users("optimizer", task.optimizer):
        trial = optimizers.trial(task.optimizer)
    with _the_users("schedule", task.schedule):
        schedules.build(task.schedule, trial, steps=task.steps or 100)
    facts = Facts(
        cores=futex.cores(),
        gpus=torch.cuda.device_count() if torch.cuda.is_available() else 0,
        shared_memory=environment.shared_memory_works(),
        launched=started.size if started else None,
        launcher=started.launcher if started else None,
        elementwise=optimizers.is_elementwise(trial),
        stateless=optimizers.is_stateless(trial),
        optimizer_problem=optimizers.gradients_problem(trial),
        clip=task.clip is not None,
        served=served(trial),
        batch_size=task.batch_size,
        memory_B=environment.memory_B() if nodes is None else None,
        nodes=nodes,
    )
    return resolve(plan, facts)


def train(
    task: Task,
    plan: Plan | None = None,
    *,
    out: str | os.PathLike[str] | None = None,
    resume: bool = False,
    data_dir: str | os.PathLike[str] | None = None,
    evaluate: str | int = "epoch",
    checkpoint: str | int = "epoch",
    keep: int = 3,
    progress: bool = True,
) -> Result:
    """Train ``task`` by ``plan`` on real workers.

        result = mh.train(mh.Task(model="cnn", data="mnist", epochs=1), mh.Plan(workers=2), out="runs/first")
        result.summary.test_accuracy

    ``out`` keeps plan, metrics, summary and checkpoints in a folder; with ``resume`` the newest good checkpoint there
    is taken up exactly, in the middle of an epoch too, and also on another number of workers. A live model that was
    passed in holds the final parameters afterwards. ``evaluate``: at every ``epoch``, at the ``end``, ``never``, or a
    number of steps; ``checkpoint``: likewise, and always at the end, of which the newest ``keep`` stay. Under torchrun,
    mpirun or srun this joins the ranks they started.

    Raises `BadInput` (the request cannot work: found before anything is started or, of a resume and of data that
    differs between workers, before the first step; no file is changed), `WorkerFailed` with the worker's own traceback
    (`FactoryFailed` with that of a factory), `NonFiniteLoss`, a `CommunicationError` such as `DeadlineExceeded`, or
    `LastCheckpointNotWritten`, which carries the result.
    """
    _check_evaluation(evaluate, task)
    if resume and out is None:
        raise BadInput("resume without out: say which run's folder to take up, e.g. out='runs/first' (--out).")
    if checkpoint not in ("epoch", "end") and not is_whole(checkpoint, 1):
        raise BadInput(f"checkpoint={checkpoint!r}: it is epoch, end, or a whole number of steps from 1.")
    if not is_whole(keep, 1):
        raise BadInput(f"keep={keep!r}: how many checkpoints to keep is a whole number from 1.")
    decided = resolved(task, plan or Plan())
    places = None if data_dir is None else Path(data_dir)
    model, splits = _built(task, places)
    decided = _rehearsed(decided, model, task, splits.train)
    started = environment.launched()
    joins = started is not None and started.size > 1
    folder = None if out is None else Path(out)
    if folder is not None and not joins:
        _take_folder(folder, resume)
    watched: dict[str, Any] = {"evaluate": evaluate, "checkpoint": checkpoint, "keep": keep}
    options = dataclasses.asdict(
        Options(
            out=None if folder is None else str(folder),
            resume=resume,
            data_dir=None if places is None else str(places),
            **watched,
            progress=progress,
            described="" if folder is None else _plan_file(task, plan or Plan(), decided.plan, watched),
            data=signature(splits),
        )
    )
    for note in decided.notes:
        log.warning("%s", note)
    outcome = (_joined if joins else _launched_here)(task, decided.plan, options)
    return _result(decided, folder, model, outcome)


def simulate(
    task: Task,
    plan: Plan | None = None,
    cluster: Cluster | str | os.PathLike[str] = DEFAULT_CLUSTER,
    *,
    stragglers: Sequence[Stragglers | str] | Stragglers | str | None = None,
    failures: Failures | str | None = None,
    compute_s: float | None = None,
    update_s: float | None = None,
    sizes: bool = False,
    evaluate: str | int = "epoch",
    trace: str | os.PathLike[str] | None = None,
    data_dir: str | os.PathLike[str] | None = None,
) -> Simulation:
    """Train ``task`` by ``plan`` in virtual time, in this process, on a cluster one need not have.

        trace = mh.simulate(mh.Task(data="digits"), mh.Plan(strategy="ssp", workers=64), "ethernet_1g",
                            stragglers="lognormal(sigma=0.3)")
        trace.summary.step_s.median, trace.history[-1]["test_accuracy"]

    The strategy's own code runs, on real gradients; or, with ``sizes``, on replicas that have no numbers, which is for
    thousands of workers and tells times and traffic only. ``cluster`` is a ready one's name, a file or a `Cluster`.
    A step of a worker takes ``compute_s`` and its optimizer ``update_s``, else what it takes here, measured for a
    quarter of a second. ``stragglers`` stretch that (`simulation.stragglers`), ``failures`` interrupt it
    (`simulation.failures`). ``trace`` writes who did what when, for Perfetto. Deterministic: the same seed and the same
    given costs, the same result bit for bit.

    Raises `BadInput` before anything is computed, and what training raises.
    """
    from manyhands.cluster import Cluster, load
    from manyhands.simulation import running
    from manyhands.simulation.failures import failures_from

    options = running.Options(
        running.kinds(stragglers),
        None if failures is None else failures_from(failures),
        compute_s,
        update_s,
        sizes,
        evaluate,
        trace is not None,
    )
    options.check()
    on = cluster if isinstance(cluster, Cluster) else load(cluster)
    asked = plan or Plan()
    alone = resolved(task, asked, nodes=1).plan
    assert alone.workers is not None
    decided = resolved(task, asked, nodes=on.nodes_for(alone.workers))
    model, splits = _built(task, None if data_dir is None else Path(data_dir))
    for note in decided.notes:
        log.warning("%s", note)
    if sizes and (task.seconds is not None or task.target_accuracy is not None):
        raise BadInput(
            "sizes only with seconds or target_accuracy: without numbers a run has the length that it is given. Say "
            "steps or epochs."
        )
    done = running.simulated(task, decided.plan, on, options, model, splits)
    if trace is not None:
        assert done.trace is not None
        done.trace.write(Path(trace))
    return done


def outlined(task: Task, plan: Plan | None = None, *, data_dir: str | os.PathLike[str] | None = None) -> Outline:
    """The plan with everything decided, and what each worker would hold and send; nothing is started.

    mh.verbs.outlined(mh.Task(model="cnn"), mh.Plan(mesh="pipeline=2")).parts[0].cut_B
    """
    from manyhands.training.outline import outline

    places = None if data_dir is None else Path(data_dir)
    decided = resolved(task, plan or Plan())
    model, splits = _built(task, places)
    decided = _rehearsed(decided, model, task, splits.train)
    return outline(task, decided.plan, decided.notes, model, splits)


def _check_evaluation(evaluate: str | int, task: Task) -> None:
    if evaluate not in ("epoch", "end", "never") and not is_whole(evaluate, 1):
        raise BadInput(f"evaluate={evaluate!r}: it is epoch, end, never, or a whole number of steps from 1.")
    if task.target_accuracy is not None and evaluate in ("end", "never"):
        raise BadInput(
            f"target_accuracy={task.target_accuracy} with evaluate={evaluate}: a run ends at its target only if it is "
            "evaluated on the way. Say evaluate='epoch', or every how many steps, e.g. evaluate=100."
        )


def _built(task: Task, data_dir: Path | None) -> tuple[torch.nn.Module, Splits]:
    """The model and the data, here: bad data or a bad factory is found before anything is written or
    started. The model will hold the result; torch's generator stays where it was.
    """
    from manyhands import data, models

    generator = torch.get_rng_state()
    try:
        with _the_users("data", task.data):
            splits = data.load(task.data, folder=data_dir)
        with _the_users("model", task.model):
            model = models.build(task.model, inputs=splits.inputs, classes=splits.classes)
            settle(model, lambda: splits.train.rows(torch.tensor([0])), name=described(task.model))
        return model, splits
    finally:
        torch.set_rng_state(generator)


def _rehearsed(decided: Resolved, model: torch.nn.Module, task: Task, train: Dataset) -> Resolved:
    """Refuse a cut that does not fit the model, before anything is started; with a note of what is cut and how."""
    from manyhands.partition.data import arguments
    from manyhands.partition.pipeline import cut as stages
    from manyhands.partition.pipeline import description as pipeline
    from manyhands.partition.pipeline.description import MICRO_BATCHES
    from manyhands.partition.pipeline.rehearsal import rehearse
    from manyhands.partition.sharded.units import units_of
    from manyhands.partition.tensor import axis_of
    from manyhands.partition.tensor.rehearsal import rehearsed

    plan = decided.plan
    assert isinstance(plan.mesh, Mesh)
    assert plan.micro_batches is not None
    mesh, micro_batches = plan.mesh, plan.micro_batches
    tensor, ranks, notes = mesh["tensor"], mesh["pipeline"], list(decided.notes)
    if isinstance(plan.strategy, AMPNet):
        if task.loss is None:
            raise BadInput("ampnet with loss=None: outputs come to a loss node. Give the loss to the task.")
        graph, place = fitted(model, plan.strategy, ranks, train.rows(torch.tensor([0]))[0])
        check_norms(graph, plan.strategy.samples, batch_sizes(len(train), task.batch_size, task.steps))
        each = [", ".join(name for name, at in place.items() if at == rank) for rank in range(ranks)]
        notes.append("; ".join(f"nodes of worker {rank}: {names}" for rank, names in enumerate(each)))
        return dataclasses.replace(decided, notes=tuple(notes))
    if task.loss is None and (ranks > 1 or isinstance(plan.strategy, PipeDream)):
        raise BadInput(
            f"{plan.strategy} on {mesh} with loss=None: the last stage hands outputs to a loss. Give the loss to the "
            "task and let the model return outputs."
        )
    if axis_of(plan.tensor) == "data":
        if task.loss is None:
            raise BadInput(
                f"tensor={plan.tensor}: the outputs go to a loss of the task's, and loss=None leaves it to the model."
            )
        tensor = mesh["data"]
    if (plan.shard or 0) > 1 and mesh["data"] > 1:
        notes.append(f"shard={plan.shard}: {units_of(model, arguments(*train.rows(torch.tensor([0])), task.loss))}")
    if tensor > 1:
        sample, _ = train.rows(torch.tensor([0]))
        how = rehearsed(model, plan.tensor, tensor, sample, checked=True)
        notes.append(f"cut among {tensor} workers: {how}")
        if how.left:
            plan = dataclasses.replace(plan, tensor=how.said)
    if isinstance(plan.strategy, PipeDream) and ranks == 1:
        notes.append(
            "pipedream without a pipeline axis: one stage has nothing to stash, so this is plain synchronous training "
            "with an update for every micro-batch. Say e.g. mesh=pipeline=2 (--mesh pipeline=2) for a pipeline"
        )
    if ranks > 1:
        notes += _of_micro_batches(task, plan, model, len(train))
        said = pipeline.parse(plan.pipeline, plan.strategy)
        schedule = said.made(ranks, micro_batches)
        if micro_batches < ranks:
            notes.append(
                f"micro_batches={micro_batches} on {ranks} workers never keeps all of them busy; "
                f"a plan takes {MICRO_BATCHES * ranks} by itself (--micro-batches)"
            )
        if said.cut is None:
            rows = min(len(train), -(-task.batch_size // (mesh["data"] * micro_batches)))
            said = said.at(stages.cut_points(model, schedule.stages, train.rows(torch.arange(rows))[0]))
        into = stages.cut(model, said.cut or ())
        if len(into.stages) != schedule.stages:
            raise BadInput(
                f"pipeline={said}: {schedule.stages} stages on {ranks} ranks want {schedule.stages - 1} modules to cut "
                f"before, and {len(into.stages) - 1} are named."
            )
        few = train.rows(torch.arange(min(len(train), task.batch_size, 4)))[0]
        rehearse(model, into, schedule, few)
        notes.append(f"cut into {len(into.stages)} stages: {'; '.join(str(into).splitlines())}")
        plan = dataclasses.replace(plan, pipeline=str(said))
    return dataclasses.replace(decided, plan=plan, notes=tuple(notes))


def _of_micro_batches(task: Task, plan: Plan, model: torch.nn.Module, samples: int) -> list[str]:
    """What is to be known of micro-batches so small; raises where BatchNorm could not do with them."""
    assert isinstance(plan.mesh, Mesh)
    assert plan.micro_batches is not None
    share = min(task.batch_size, samples) // plan.mesh["data"]
    fewest = share // plan.micro_batches
    if any(isinstance(m, torch.nn.modules.batchnorm._BatchNorm) for m in model.modules()):
        if fewest < 2:
            raise BadInput(
                f"a batch of {task.batch_size} as {plan.micro_batches} micro-batches on each of {plan.mesh['data']} "
                f"replicas: BatchNorm normalises within a micro-batch, and {fewest} samples have no variance. Use a "
                f"larger batch, or at most micro_batches={max(share // 2, 1)} (--micro-batches)."
            )
        return [f"BatchNorm normalises within a micro-batch, of {fewest} samples here"]
    if fewest < 1:
        return [f"{share} samples a replica in {plan.micro_batches} micro-batches: some of them are empty"]
    return []


def _take_folder(out: Path, resume: bool) -> None:
    """Refuse a folder that holds a run, unless it is to go on, or that cannot be written."""
    held = sorted(out.glob("checkpoints/step-*")) if out.is_dir() else []
    if held and not resume:
        raise BadInput(
            f"{out} holds a run already ({held[-1].name}). Go on with it by resume=True (--resume), or choose another "
            "folder with out= (--out)."
        )
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise BadInput(f"{out} cannot be written ({e.strerror or e}). Choose another folder with out= (--out).") from e


def _plan_file(task: Task, asked: Plan, plan: Plan, watched: Mapping[str, Any]) -> str:
    """``plan.toml``: the plan as it was decided, and of ``asked`` what was said, by which a resume is bound."""
    import tomli_w

    unsaid = Plan().as_table()
    tables = {
        "task": task.as_table(),
        "plan": plan.as_table(),
        "asked": {k: v for k, v in asked.as_table().items() if v != unsaid.get(k)},
        "run": dict(watched),
        "machine": machine(),
    }
    return tomli_w.dumps(tables)


def machine() -> dict[str, Any]:
    """``[machine]`` of a run: where it ran."""
    import platform

    return {
        "cores": futex.cores(),
        "processor": platform.machine(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def _launched_here(task: Task, plan: Plan, options: dict[str, Any]) -> dict[str, Any]:
    assert plan.workers is not None
    tables = None
    if plan.transport == "mpi":
        tables = {"task": task.as_table(), "plan": plan.as_table()}
        live = [
            k
            for k in ("model", "data", "optimizer", "loss", "schedule")
            if str(tables["task"].get(k, "")).startswith("<")
        ]
        if live:
            raise BadInput(
                f"transport mpi with a live {' and '.join(live)}: mpiexec starts processes that know only text. Name "
                "them as my_pkg.module:factory, or use transport=shared or gloo."
            )
    with (
        terminating(),
        team(
            plan.transport,
            plan.workers + server_ranks(plan),
            threads=plan.threads,
            timeout_s=plan.timeout_s,
            allocator=plan.allocator,  # type: ignore[arg-type]
            live=None if tables else (task, plan),
        ) as crew,
    ):
        # Worker 0 keeps the folder. Where the model is cut, a worker may be the only one that holds its pieces.
        whole = isinstance(plan.mesh, Mesh) and plan.mesh["data"] == plan.workers
        survives = isinstance(plan.strategy, Strategy) and plan.strategy.survives and whole
        may_lose = range(1, plan.workers) if survives else ()
        try:
            outcome: dict[str, Any] = crew.run(JOB, options, tables, may_lose=may_lose)[0]
        except WorkerFailed as e:
            if e.rank >= plan.workers:
                e.args = (f"server {e.rank - plan.workers} (rank {e.rank}) failed: {e.reason}",)
            raise
        return outcome


def _joined(task: Task, plan: Plan, options: dict[str, Any]) -> dict[str, Any]:
    from manyhands.training.allocator import tune

    torch.set_num_threads(plan.threads)
    allocator = "tuned" if plan.allocator == "tuned" and tune() else "plain"
    comm = join_launcher(plan)
    try:
        if options["out"] is not None:  # the folder of all is looked at by one, so that all take one verdict
            first_decides(comm, lambda: _take_folder(Path(options["out"]), options["resume"]))
        return work(Member(comm, (task, plan), allocator=allocator), options, None)
    except BaseException:
        comm.fail()
        raise
    finally:
        comm.close()


def join_launcher(plan: Plan) -> Communicator:
    """This rank's communicator in the group that a launcher started."""
    if plan.transport == "mpi":
        from manyhands.communication.transports.mpi import MpiCommunicator

        return MpiCommunicator.join(timeout_s=plan.timeout_s)
    from manyhands.communication.transports import torch_distributed

    kind = torch_distributed.NcclCommunicator if plan.transport == "nccl" else torch_distributed.GlooCommunicator
    return kind.join_launcher(timeout_s=plan.timeout_s)


def _result(decided: Resolved, folder: Path | None, model: torch.nn.Module, outcome: dict[str, Any]) -> Result:
    if not outcome:
        return Result(None, decided.plan, None, [], folder, decided.notes)
    summary = dict(outcome["summary"])
    summary["step_s"], summary["step_parts_s"] = Spread(**summary["step_s"]), StepParts(**summary["step_parts_s"])
    values = outcome["model"]
    model.load_state_dict(values)
    result = Result(model, decided.plan, Measurement(**summary), outcome["history"], folder, decided.notes, values)
    if outcome["found_finished"]:
        log.warning(
            "the run in %s was at its end (step %d): nothing was left to do. More epochs= (--epochs) or steps= "
            "(--steps) would take it further",
            folder,
            summary["steps"],
        )
    if outcome["unsaved"]:
        raise LastCheckpointNotWritten(outcome["unsaved"], result)
    return result
