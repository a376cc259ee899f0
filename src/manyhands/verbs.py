"""The four verbs. Each decides every ``auto``, checks the plan against task and machine, and calls down.

`train` and `simulate` are here; `predict` and `search` follow the same form: they take the same task and plan.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from manyhands.checks import is_whole
from manyhands.communication import futex
from manyhands.communication.communicator import Communicator
from manyhands.communication.topology import Mesh
from manyhands.contract import Measurement, Spread, StepParts, Strategy
from manyhands.data import Splits
from manyhands.errors import BadInput, FactoryFailed, ManyhandsError, UnknownName, WorkerFailed
from manyhands.models import losses, optimizers, schedules
from manyhands.models.factory import settle
from manyhands.models.update_rules import served
from manyhands.plan import Facts, Plan, Resolved, resolve, server_ranks
from manyhands.plan.compressing import AUTO
from manyhands.task import Task, described
from manyhands.training import environment
from manyhands.training.checkpoint import CheckpointNotWritten
from manyhands.training.gather import first_decides
from manyhands.training.interruption import terminating
from manyhands.training.loop import work
from manyhands.training.member import Member, own_traceback
from manyhands.training.preparation import signature
from manyhands.training.rehearsal import rehearsed
from manyhands.training.run import Options
from manyhands.training.team import team
from manyhands.training.trace import check_writable

if TYPE_CHECKING:
    from manyhands.cluster import Cluster
    from manyhands.modelling.calibration import Calibration
    from manyhands.modelling.prediction import Prediction, Source
    from manyhands.modelling.search.engine import Samples
    from manyhands.modelling.search.ranking import Ranking
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
    found = resolve(plan, _facts(task, nodes=nodes))
    if plan.compress == AUTO:  # what the strategy decides depends on what is going to be chosen
        return dataclasses.replace(found, plan=dataclasses.replace(found.plan, strategy=plan.strategy))
    return found


def _facts(task: Task, *, nodes: int | None = None) -> Facts:
    """What any plan for ``task`` is checked against; raises for what is wrong with the task itself."""
    task.check()
    started = environment.launched() if nodes is None else None
    with _the_users("loss", task.loss):
        losses.build(task.loss)
    with _the_users("optimizer", task.optimizer):
        trial = optimizers.trial(task.optimizer)
    with _the_users("schedule", task.schedule):
        schedules.build(task.schedule, trial, steps=task.steps or 100)
    return Facts(
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
    trace: str | os.PathLike[str] | None = None,
) -> Result:
    """Train ``task`` by ``plan`` on real workers.

        result = mh.train(mh.Task(model="cnn", data="mnist", epochs=1), mh.Plan(workers=2), out="runs/first")
        result.summary.test_accuracy

    ``out`` keeps plan, metrics, summary and checkpoints in a folder; with ``resume`` the newest good checkpoint there
    is taken up exactly, in the middle of an epoch too, and also on another number of workers. A live model that was
    passed in holds the final parameters afterwards. ``evaluate``: at every ``epoch``, at the ``end``, ``never``, or a
    number of steps; ``checkpoint``: likewise, and always at the end, of which the newest ``keep`` stay. ``trace``: a
    file that tells, for Perfetto, what each worker did when (`training.recorder`). Under torchrun, mpirun or srun this
    joins the ranks they started.

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
    asked = plan or Plan()
    decided = resolved(task, asked)
    places = None if data_dir is None else Path(data_dir)
    model, splits = _built(task, places)
    started = environment.launched()
    joins = started is not None and started.size > 1
    folder = None if out is None else Path(out)
    resumed = folder if resume else None
    if asked.compress == AUTO and not joins:
        decided = _with_compressor(task, asked, decided, model, resumed=resumed)
    decided = rehearsed(decided, model, task, splits.train)
    if not joins:
        _take_places(folder, resume, trace)
    watched: dict[str, Any] = {"evaluate": evaluate, "checkpoint": checkpoint, "keep": keep}
    options = dataclasses.asdict(
        Options(
            out=None if folder is None else str(folder),
            resume=resume,
            data_dir=None if places is None else str(places),
            **watched,
            progress=progress,
            described="" if folder is None else _plan_file(task, asked, decided.plan, watched),
            data=signature(splits),
            trace=None if trace is None else os.path.abspath(trace),
        )
    )
    for note in decided.notes:
        log.warning("%s", note)
    if not joins:
        return _result(decided, folder, model, _launched_here(task, decided.plan, options))

    def settle(comm: Communicator) -> Plan:
        """What the launcher's ranks have to try together."""
        nonlocal decided
        if asked.compress == AUTO:
            decided = _with_compressor(task, asked, decided, model, resumed=resumed, comm=comm)
            log.warning("%s", decided.notes[-1])
            decided = rehearsed(decided, model, task, splits.train)
            if folder is not None:
                options["described"] = _plan_file(task, asked, decided.plan, watched)
        return decided.plan

    outcome = _joined(task, decided.plan, options, settle)
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
    decided = _resolved_on(on, task, asked)
    model, splits = _built(task, None if data_dir is None else Path(data_dir))
    if asked.compress == AUTO:
        decided = _with_compressor(task, asked, decided, model, on=on)
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


def predict(
    task: Task,
    plan: Plan | None = None,
    cluster: Cluster | str | os.PathLike[str] | None = None,
    *,
    compute: Source | None = None,
    memory: bool = True,
    fresh: bool = False,
    data_dir: str | os.PathLike[str] | None = None,
) -> Prediction:
    """What ``plan`` will cost on ``cluster``, before it is run: step time in parts, memory, bytes, with an error bar.

        guess = mh.predict(mh.Task(model="cnn", data="mnist"), mh.Plan(workers=2))
        guess.summary.step_s.median, guess.error

    Without ``cluster`` it is this machine, as `calibrate` has measured it. A ready cluster's name or a file predicts
    for machines that one need not have. ``compute`` says where the time of computing comes from: ``measured``, the
    task's own step here for a quarter of a second (kept for a day, unless ``fresh``), ``operators``, this machine's
    tables, or ``roofline``, the device's specification; left out, the best of them that there is. ``memory``: in parts,
    too; a plan that does not fit is predicted all the same, with a note of by how much and of what would fit.

    Raises `BadInput` before anything is measured.
    """
    from manyhands.cluster import Cluster, load
    from manyhands.modelling import prediction

    if compute is not None and compute not in prediction.SOURCES:
        raise UnknownName("source of computing", compute, prediction.SOURCES)
    asked, notes = plan or Plan(), list[str]()
    if cluster is None:
        on, notes = _this_machine()
    else:
        on = cluster if isinstance(cluster, Cluster) else load(cluster)
    here = cluster is None or on.measured is not None
    decided = resolved(task, asked) if here else _resolved_on(on, task, asked)
    model, splits = _built(task, None if data_dir is None else Path(data_dir))
    if asked.compress == AUTO:
        decided = _with_compressor(task, asked, decided, model, on=None if here else on)
    decided = rehearsed(decided, model, task, splits.train)
    folder = None if data_dir is None else os.fspath(data_dir)
    found = prediction.predicted(
        task,
        decided.plan,
        on,
        model,
        splits,
        here=here,
        compute=compute,
        fresh=fresh,
        data_dir=folder,
        notes=(*notes, *decided.notes),
    )
    return prediction.with_memory(found, task, on, model, splits, folder) if memory else found


def search(
    task: Task,
    cluster: Cluster | str | os.PathLike[str] | None = None,
    *,
    workers: Sequence[int] | None = None,
    strategies: Sequence[str | Strategy] | None = None,
    compressors: Sequence[str] | None = None,
    threads: Sequence[int] | None = None,
    meshes: Sequence[str] | None = None,
    micro_batches: Sequence[int] | None = None,
    recompute: Sequence[bool] | None = None,
    plan: Plan | None = None,
    measure: int = 0,
    limit: int = 1000,
    price_per_worker_hour: float | None = None,
    study: Samples | None = None,
    compute: Source | None = None,
    fresh: bool = False,
    data_dir: str | os.PathLike[str] | None = None,
) -> Ranking:
    """Which plans to take for ``task`` on ``cluster`` (default: this machine), and how many workers are worth it.

        found = mh.search(mh.Task(model="cnn", data="mnist"))
        found.choice.plan, found.ties, found.worth.knee.workers

    Looks at the product of the lists (`modelling.search.space`), each with a default; ``plan`` is what all have in
    common, ``limit`` the most plans. What cannot work or does not fit into memory is in ``refused`` with its reason.
    The others are ranked by the predicted time of an epoch; or, where ``study`` tells how many samples a strategy needs
    until the target (strategy → workers → samples, `studies.samples_to_target`), by the time that takes. ``measure``:
    the first so many are run for a few seconds each, on this machine, and put in the order of what they took. Some of
    the task's steps are measured here, a quarter of a second each, and kept for a day (but anew if ``fresh``).

    Raises `BadInput` before anything is measured; a single plan raises nothing.
    """
    from manyhands.cluster import Cluster, load
    from manyhands.modelling import prediction
    from manyhands.modelling.search import costs, engine, space

    if compute is not None and compute not in prediction.SOURCES:
        raise UnknownName("source of computing", compute, prediction.SOURCES)
    if environment.launched() is not None:
        raise BadInput("search under a launcher: it looks at any number of workers, from one process. Start it alone.")
    notes = list[str]()
    if cluster is None:
        on, notes = _this_machine()
    else:
        on = cluster if isinstance(cluster, Cluster) else load(cluster)
    here = cluster is None or on.measured is not None
    engine.check(measure=measure, limit=limit, price=price_per_worker_hour, here=here, cluster=on.name, study=study)
    said = space.check(
        workers=workers,
        threads=threads,
        strategies=strategies,
        meshes=meshes,
        compressors=compressors,
        micro_batches=micro_batches,
        recompute=recompute,
    )
    base = plan or Plan()
    plans = space.asked(said, on, here=here, cores=futex.cores(), most=task.batch_size, base=base, limit=limit)
    places = None if data_dir is None else Path(data_dir)
    facts = functools.lru_cache(maxsize=None)(lambda nodes: _facts(task, nodes=nodes))
    facts(None)
    model, splits = _built(task, places)

    def decide(each: Plan) -> Resolved:
        return resolve(each, facts(None if here else on.nodes_for(each.workers or 1)))

    given = None if places is None else str(places)
    pricer = costs.Costs(task, on, model, splits, here=here, compute=compute, fresh=fresh, data_dir=given)
    found = engine.search(
        plans,
        decide,
        pricer,
        rehearse=lambda made: rehearsed(made, model, task, splits.train),
        cluster=on.name,
        samples=study,
        price_per_worker_hour=price_per_worker_hour,
        notes=notes,
        here=here,
    )
    return engine.measured(found, functools.partial(_run_briefly, task, given), measure) if measure else found


#: Seconds of training that each round of a measured plan takes, and how many rounds go over all of them in turn.
BRIEF_S, ROUNDS = 0.7, 3


def _run_briefly(task: Task, data_dir: str | None, plans: Mapping[Plan, float]) -> dict[Plan, list[float]]:
    """Seconds of a step, means of short runs; by plan, given what a step is predicted to take."""
    taken: dict[Plan, list[float]] = {plan: [] for plan in plans}
    for _ in range(ROUNDS):
        for plan, step_s in plans.items():
            steps = max(20, min(round(BRIEF_S / step_s), 20_000))
            brief = dataclasses.replace(task, epochs=None, steps=steps, seconds=None, target_accuracy=None)
            try:
                said = train(brief, plan, evaluate="never", progress=False, data_dir=data_dir).summary
            except ManyhandsError as e:
                log.warning("%s could not be measured: %s", plan, e)
                continue
            if said is not None and said.samples_per_s:
                taken[plan].append(task.batch_size / said.samples_per_s)
    return {plan: times for plan, times in taken.items() if times}


def calibrate(
    *,
    out: str | os.PathLike[str] | None = None,
    quick: bool = False,
    transports: Sequence[str] | None = None,
    progress: bool = True,
) -> Calibration:
    """Measure this machine, in two minutes (``quick``: 20 s and less of it), into a cluster file with tables.

        verbs.calibrate().path

    Curves of what operations of each of ``transports`` take (default: all that work here), memory and arithmetic of
    the host, operators of torch. The file goes to the user's cache, where `predict` finds it, or to ``out``. Nothing is
    written before all is measured. Leave the machine alone meanwhile: noise is measured again, then widens the spreads.

    Raises `BadInput` before anything is measured.
    """
    from rich.console import Console

    from manyhands.modelling import calibration

    console = Console(stderr=True) if progress else None
    return calibration.calibrate(out=out, quick=quick, wanted=transports, console=console)


def outlined(task: Task, plan: Plan | None = None, *, data_dir: str | os.PathLike[str] | None = None) -> Outline:
    """The plan with everything decided, and what each worker would hold and send; nothing is started (but workers
    that try the transport for a moment, under ``compress=auto``).

    mh.verbs.outlined(mh.Task(model="cnn"), mh.Plan(mesh="pipeline=2")).parts[0].cut_B
    """
    from manyhands.training.outline import outline

    places = None if data_dir is None else Path(data_dir)
    asked = plan or Plan()
    decided = resolved(task, asked)
    model, splits = _built(task, places)
    if asked.compress == AUTO:
        decided = _with_compressor(task, asked, decided, model)
    decided = rehearsed(decided, model, task, splits.train)
    return outline(task, decided.plan, decided.notes, model, splits)


def _resolved_on(cluster: Cluster, task: Task, plan: Plan) -> Resolved:
    """As `resolved`, for as many nodes of ``cluster`` as the plan's workers fill."""
    alone = resolved(task, plan, nodes=1).plan
    assert alone.workers is not None
    return resolved(task, plan, nodes=cluster.nodes_for(alone.workers))


def _with_compressor(
    task: Task,
    asked: Plan,
    found: Resolved,
    model: torch.nn.Module,
    *,
    on: Cluster | None = None,
    resumed: Path | None = None,
    comm: Communicator | None = None,
) -> Resolved:
    """``compress=auto`` decided: by the links of a cluster, by the ranks of ``comm`` (collective), or by workers that
    try the plan's transport here for a moment. A run that is taken up goes on with what it has.
    """
    from manyhands.modelling import compression

    def settled(compress: str) -> Resolved:
        said = dataclasses.replace(asked, compress=compress)
        return resolved(task, said) if on is None else _resolved_on(on, task, said)

    def by_the_first(decide: Callable[[], Any]) -> Any:
        return decide() if comm is None else first_decides(comm, decide)

    kept = by_the_first(lambda: None if resumed is None else compression.kept(resumed))
    if kept is not None:
        return compression.with_note(settled(kept), f"compress=auto: {kept}, with which this run began")
    plan, shapes = found.plan, compression.shapes_of(model)
    assert isinstance(plan.mesh, Mesh)
    size, n_B = plan.mesh["data"], 4 * sum(map(math.prod, shapes))
    among = compression.allowed(settled) if size > 1 else []
    price: compression.Price = lambda name, n: 0.0  # noqa: E731
    if on is not None:
        price = compression.priced(on, size)
    elif comm is not None:
        price = compression.from_probe(compression.measured(comm, n_B))
    elif among:
        price = compression.probed(plan.transport, size, plan.threads, n_B, plan.timeout_s)
    where = f"on {plan.transport if on is None else on.name}"

    def chosen() -> list[str]:
        choice = compression.choose(shapes, size, price, where, among)
        return [choice.compress, choice.note]

    compress, note = by_the_first(chosen)
    return compression.with_note(settled(compress), note)


def _this_machine() -> tuple[Cluster, list[str]]:
    """As `calibrate` has measured it; else assumed figures, and a note that says so."""
    from manyhands.cluster import load
    from manyhands.modelling import calibration

    found = calibration.look()
    if found.cluster is not None:
        return found.cluster, []
    return load("laptop"), [f"communication is priced by assumed figures: {found.reason}"]


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


def _take_places(out: Path | None, resume: bool, trace: str | os.PathLike[str] | None) -> None:
    """Refuse what a run cannot be written to."""
    if out is not None:
        _take_folder(out, resume)
    if trace is not None:
        check_writable(Path(trace))


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


def _joined(task: Task, plan: Plan, options: dict[str, Any], settle: Callable[[Communicator], Plan]) -> dict[str, Any]:
    from manyhands.training.allocator import tune

    torch.set_num_threads(plan.threads)
    allocator = "tuned" if plan.allocator == "tuned" and tune() else "plain"
    comm = join_launcher(plan)
    try:
        if options["out"] is not None or options["trace"] is not None:
            # The folder of all is looked at by one, so that all take one verdict.
            folder = None if options["out"] is None else Path(options["out"])
            first_decides(comm, lambda: _take_places(folder, options["resume"], options["trace"]))
        return work(Member(comm, (task, settle(comm)), allocator=allocator), options, None)
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
    if outcome["untraced"]:
        log.warning("the run has no trace: %s", outcome["untraced"])
    if outcome["unsaved"]:
        raise LastCheckpointNotWritten(outcome["unsaved"], result)
    return result
