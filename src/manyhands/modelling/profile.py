"""The cost of a worker's step, measured: the user's own training step, for a quarter of a second, on this machine.

As many processes as the plan has workers (and this host takes) each run a rank's own code (the model or its part, the
optimizer, the strategy's arithmetic) side by side on a `MirrorCommunicator`, so that they press on each other's caches
and memory as they will, and no exchange takes part. What they compute is what is missing from the prices of
communication to make a step.

    compute, update, rest   medians of a step of one worker, seconds
    factors                 step by step, by how much each was above or below; of all workers at the same moments
    exchanges               operations of a step that the prices are asked for
    curves                  and what they take in these workers, at their sizes, where all of the plan's are here; of
                            servers that are memory, what is done under a lock (`visits`)

Cost: starting the workers, ``seconds``, and a tenth of a second for each kind of exchange (`exchanges`); once a day,
see `keeping`.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from manyhands.cluster import Cluster
from manyhands.cluster.measured import Curve
from manyhands.communication import futex
from manyhands.communication.communicator import Communicator
from manyhands.communication.topology import Mesh
from manyhands.communication.transports.events import Operation
from manyhands.communication.transports.single import SingleCommunicator
from manyhands.consistency.synchronous import Synchronous
from manyhands.contract import Batch, Piece, Strategy
from manyhands.modelling import keeping, visits
from manyhands.modelling.calibration.measuring import MEASURED, not_here
from manyhands.modelling.exchanges import curves_here
from manyhands.modelling.fed import Actions, feed
from manyhands.modelling.keeping import Profile, operation
from manyhands.modelling.visits import Visits
from manyhands.partition.pipeline import description as pipeline
from manyhands.partition.pipeline.cut import cut as cut_into_stages
from manyhands.partition.pipeline.replica import PipelineReplica
from manyhands.plan import Plan
from manyhands.plan.facts import SHARE_MEMORY
from manyhands.simulation.folded import NotAlike
from manyhands.simulation.mirror import MirrorCommunicator
from manyhands.simulation.prices import Prices
from manyhands.task import Task
from manyhands.training import environment
from manyhands.training.loop import advance
from manyhands.training.member import Member
from manyhands.training.preparation import build_model, prepare
from manyhands.training.run import Options, Run, replicas
from manyhands.training.team import Team, team

JOB, JOBS = f"{__name__}:job", f"{__name__}:jobs"
#: As long is measured, and half of it goes before: allocators, caches and the kernel's page tables settle.
SECONDS = 0.25
FEWEST_STEPS = 8
#: More steps than this are not kept; a median does not need them.
MOST_STEPS = 1000
#: A gap in the deadline for building model and data in every worker.
DEADLINE_S = 120.0


def profile(
    task: Task,
    plan: Plan,
    cluster: Cluster | None = None,
    *,
    data_dir: str | None = None,
    seconds: float = SECONDS,
    fresh: bool = False,
    asked: Callable[[], Sequence[Operation]] = tuple,
) -> Profile:
    """Measured, or as it was measured within the last day. ``plan`` is decided.

    Strategies whose ranks are not alike in what they exchange are measured as plain synchronous ones: gradients, and an
    update of everything; what those exchange ``asked`` knows.
    """
    found = None if fresh else keeping.kept(task, plan)
    if found is None:
        try:
            found = _measured(task, plan, cluster, data_dir, seconds)
        except NotAlike:
            plain = dataclasses.replace(plan, strategy=Synchronous(update="replicated"))
            found = dataclasses.replace(_measured(task, plain, cluster, data_dir, seconds, asked), plain=True)
        keeping.keep(task, plan, found)
    return found


def profiles(
    task: Task,
    plan: Plan,
    batches: Sequence[int],
    cluster: Cluster | None = None,
    *,
    data_dir: str | None = None,
    seconds: float = SECONDS,
    fresh: bool = False,
) -> dict[int, Profile]:
    """`profile` at several global batches, by one team of workers, which is most of what a single one costs.

    ``plan``: one that meets in collectives alone.
    """
    tasks = {n: dataclasses.replace(task, batch_size=n) for n in batches}
    found = {n: None if fresh else keeping.kept(each, plan) for n, each in tasks.items()}
    missing = [n for n, kept in found.items() if kept is None]
    if missing:
        with _crew(task, plan, cluster) as crew:
            told = crew.run(JOBS, missing, seconds, data_dir, deadline_s=DEADLINE_S + 2 * seconds * len(missing))
            made = [joined([one[i] for one in told]) for i in range(len(missing))]
            curves = _curves(
                crew, plan, operations_of(made[0]), made[0].compute_s
            )  # what is exchanged does not depend on the batch
        for n, each in zip(missing, made, strict=True):
            found[n] = whole = dataclasses.replace(each, curves=curves)
            keeping.keep(tasks[n], plan, whole)
    return {n: kept for n, kept in found.items() if kept is not None}


def co_runners(plan: Plan) -> int:
    """How many of the plan's workers are measured side by side: all, as far as this host has cores; 2 at least.

    Of a pipeline all: every stage is another.
    """
    assert plan.workers is not None
    assert isinstance(plan.mesh, Mesh)
    if plan.mesh["pipeline"] > 1:
        return plan.workers
    return min(plan.workers, max(futex.cores() // max(plan.threads, 1), 2))


# -- in the workers ----------------------------------------------------------------------------------------------------


def job(member: Member, seconds: float, data_dir: str | None) -> dict[str, Any]:
    """What a worker does: its rank's steps on a mirror, beside the others."""
    task, plan, cluster = member.live
    try:
        steps = mirrored(member, task, plan, cluster, data_dir)
        member.comm.barrier()
        steps.take(seconds / 2)
        steps.begin()
        member.comm.barrier()
        steps.take(seconds)
    except NotAlike as e:
        return {"not_alike": str(e)}
    member.comm.barrier()
    told, servers = steps.told(), steps.visits(member.comm)
    return told if servers is None else told | {"visits": servers.take(steps.median_s)}


def mirrored(member: Member, task: Task, plan: Plan, cluster: Cluster | None, data_dir: str | None) -> Steps:
    """This rank's run among mirrors, ready for its first step. Collective; raises `NotAlike` in it or at the first."""
    assert plan.workers is not None
    assert isinstance(plan.mesh, Mesh)
    assert isinstance(plan.strategy, Strategy)
    prices = Prices(cluster, plan.workers, plan.transport if cluster is not None and cluster.measured else None)
    prices.begin()
    piped = plan.mesh["pipeline"] > 1
    mirror = MirrorCommunicator(
        member.comm.rank if piped else 0,  # whose share is the largest; the others' parts are as large or smaller
        plan.workers,
        transport=plan.transport,
        shares_memory=plan.transport in SHARE_MEMORY,
        price=prices,
        really=member.comm if piped else None,
        messages=plan.strategy.alike,
        served=_is_served(plan),
    )
    run = prepare(Member(mirror, (task, plan), allocator=member.allocator), task, plan, Options(data_dir=data_dir))
    mirror.really = None
    if _is_served(plan) and any(piece.width for piece in run.replica.pieces):
        raise NotAlike("rows of a table")  # which ones a batch touches; the simulation asks for whole tables
    return Steps(run, mirror, _fed(run, mirror) if piped else None)


def _is_served(plan: Plan) -> bool:
    """Whether a rank's steps can be measured by themselves though it has servers, in memory that is common.

    Where those do more than add, what they do has to be measured, too.
    """
    strategy = plan.strategy
    assert isinstance(strategy, Strategy)
    if plan.transport not in SHARE_MEMORY or not strategy.by_itself:
        return False
    return strategy.servers_add or _visits_are_measured(plan)


def _visits_are_measured(plan: Plan) -> bool:
    """Whether the workers here are all of the plan's, with the whole model each."""
    assert isinstance(plan.mesh, Mesh)
    return plan.mesh["data"] == plan.workers and exchanges_here(plan)


def _fed(run: Run, mirror: MirrorCommunicator) -> Actions:
    """The run's pipeline without its neighbours."""
    replica = run.replica
    assert isinstance(replica, PipelineReplica)
    with torch.random.fork_rng(devices=[]):
        whole = build_model(run.task, run.splits, SingleCommunicator(), cut=True)
        said = pipeline.parse(run.plan.pipeline, run.plan.strategy)
        assert said.cut is not None
        count = run.task.batch_size // replicas(run.comm).size
        inputs, _ = run.splits.train.rows(torch.arange(min(count, len(run.splits.train))))
        return feed(replica, cut_into_stages(whole, said.cut).stages, inputs, count, mirrored=mirror.spent_cut)


def jobs(member: Member, batches: Sequence[int], seconds: float, data_dir: str | None) -> list[dict[str, Any]]:
    """`job` at one global batch after the other."""
    task, plan, cluster = member.live
    each = [(dataclasses.replace(task, batch_size=n), plan, cluster) for n in batches]
    return [job(dataclasses.replace(member, live=live), seconds, data_dir) for live in each]


class Steps:
    """Steps as the training loop does them, each with its parts."""

    def __init__(self, run: Run, mirror: MirrorCommunicator, actions: Actions | None) -> None:
        self._run, self._mirror, self._actions = run, mirror, actions
        self._shares = run.sampler.batches(epochs=10**9, steps=None)
        self._elements = self._taken = 0
        self._apply = run.replica.apply
        run.replica.apply = self._counted  # type: ignore[method-assign]
        self.begin()

    def begin(self) -> None:
        """Forget the steps so far."""
        self._rows: list[tuple[float, float, float, float]] = []
        self._elements = self._samples = self._taken = 0
        self._mirror.exchanges.clear()
        if self._actions is not None:
            self._actions.clear()

    def _counted(self, piece: Piece, lo: int, hi: int) -> None:
        self._elements += max(hi - lo, 0)
        self._apply(piece, lo, hi)

    def take(self, seconds: float, *, skipped: int = 0) -> None:
        """So long, but `FEWEST_STEPS` more, of which the first ``skipped`` are not kept."""
        run, replica, cut, spent = self._run, self._run.replica, self._mirror.spent_cut, self._mirror.spent
        clock, rows = time.perf_counter, self._run.splits.train.rows
        assert isinstance(run.plan.strategy, Strategy)
        apart = not run.plan.strategy.updates_within  # else it is in the actions
        until, before_now, taken = clock() + seconds, len(self._rows), 0
        while taken < FEWEST_STEPS or (clock() < until and taken < MOST_STEPS):
            taken += 1
            share = next(self._shares)
            run.comm.step = share.before.step
            before = self._computed_s, replica.update_s, cut.priced_s, cut.here_s + spent.here_s
            t0 = clock()
            inputs, target = rows(share.indices)
            run.worker.step(Batch(inputs, target, len(share.indices), share.global_count))
            if run.schedule is not None:
                advance(run.schedule)
            whole_s = clock() - t0
            compute_s, update_s = self._computed_s - before[0], replica.update_s - before[1] if apart else 0.0
            mirrored_s = cut.here_s + spent.here_s - before[3]
            rest_s = max(whole_s - compute_s - update_s - mirrored_s, 0.0)
            self._rows.append((compute_s, update_s, rest_s, cut.priced_s - before[2]))
            self._samples = max(self._samples, len(share.indices))
        self._taken += taken
        del self._rows[before_now : before_now + skipped]

    @property
    def _computed_s(self) -> float:
        """So far, without what mirrors took; of a pipeline its actions, with what they hand over."""
        if self._actions is not None:
            return self._actions.spent_s
        return self._run.replica.compute_s - self._mirror.spent_cut.here_s

    @property
    def median_s(self) -> float:
        """What a step computes."""
        return float(np.median([row[0] for row in self._rows]))

    def visits(self, comm: Communicator) -> Visits | None:
        """To the servers of a strategy on ``comm``, whose ranks are all of the plan's; None if there are none."""
        kinds, plan = self._mirror.spent.visits, self._run.plan
        if not kinds or not _visits_are_measured(plan):
            return None
        assert isinstance(plan.strategy, Strategy)
        return Visits(plan.strategy, self._run.replica, comm, sorted(kinds))

    def told(self) -> dict[str, Any]:
        """As it travels."""
        n = self._taken  # those whose times are not kept have exchanged, too
        return {
            "rows": torch.tensor(self._rows, dtype=torch.float64),
            "samples": self._samples,
            "elements": self._elements / n,
            "exchanges": [[*operation, times / n] for operation, times in self._mirror.exchanges.items()],
            "actions": [] if self._actions is None else self._actions.told(),
            "hops": [] if self._actions is None else [list(x) for x in self._actions.sent_B().items()],
        }


# -- in the launcher ---------------------------------------------------------------------------------------------------


def _measured(
    task: Task,
    plan: Plan,
    cluster: Cluster | None,
    data_dir: str | None,
    seconds: float,
    asked: Callable[[], Sequence[Operation]] | None = None,
) -> Profile:
    with _crew(task, plan, cluster) as crew:
        told = crew.run(JOB, seconds, data_dir, deadline_s=DEADLINE_S + seconds)
        if any("not_alike" in one for one in told):
            raise NotAlike(next(one["not_alike"] for one in told if "not_alike" in one))
        found = joined(told)
        operations = operations_of(found) if asked is None else asked()
        assert plan.workers is not None
        visited = visits.curves([one.get("visits", ()) for one in told], plan.transport, plan.workers)
        curves = _curves(crew, plan, operations, found.compute_s, visited=bool(visited))
        return dataclasses.replace(found, curves=(*curves, *visited))


def _curves(
    crew: Team, plan: Plan, operations: Sequence[Operation], compute_s: float, *, visited: bool = False
) -> tuple[Curve, ...]:
    """Of the plan's exchanges, by ``crew``; those under mpiexec take no live objects and are a crew of their own."""
    if not exchanges_here(plan):
        return ()
    assert plan.workers is not None
    if plan.transport != "mpi":
        return curves_here(crew, plan.transport, plan.workers, operations, compute_s, visited=visited)
    with team(plan.transport, plan.workers, threads=plan.threads) as others:
        return curves_here(others, plan.transport, plan.workers, operations, compute_s)


def exchanges_here(plan: Plan) -> bool:
    """Whether the workers that are profiled are all of the plan's, on a transport that there is here."""
    alone = plan.workers is None or plan.workers == 1 or plan.workers != co_runners(plan)
    return not alone and plan.transport in MEASURED and not_here(plan.transport) is None


def operations_of(found: Profile) -> list[Operation]:
    """What a step asks of the transport; of a pipeline its hand-overs, too."""
    hops = [Operation("send", n, 2, (0, 1), 0, 1, False, "cut") for _, n in found.hops]
    return [*(x for x, _ in found.exchanges), *hops]


def _crew(task: Task, plan: Plan, cluster: Cluster | None) -> Team:
    """Workers on the plan's own transport where all of them are here, which is then measured, too."""
    here = "shared" if environment.shared_memory_works() else "gloo"
    same = plan.transport == "threads" or (plan.transport != "mpi" and exchanges_here(plan))
    engine = plan.transport if same else here
    live = (task, plan, cluster)
    return team(engine, co_runners(plan), threads=plan.threads, allocator=plan.allocator, live=live)  # type: ignore[arg-type]


def joined(told: Sequence[dict[str, Any]]) -> Profile:
    """Of all ranks, over the steps that all have done."""
    steps = min(len(one["rows"]) for one in told)
    rows = np.stack([one["rows"][:steps].numpy() for one in told], axis=1)  # (step, rank, part)
    medians = np.median(rows, axis=(0, 1))
    cut_s = float(medians[3])
    computing = rows[:, :, 0] + rows[:, :, 2]
    middle = float(np.median(computing))
    halves = [float(np.median(part)) for part in (computing[: steps // 2], computing[steps // 2 :])]
    return Profile(
        compute_s=float(medians[0]) + cut_s,
        update_s=float(medians[1]),
        rest_s=float(medians[2]),
        cut_s=cut_s,
        samples=float(max(one["samples"] for one in told)),
        elements=float(told[0]["elements"]),
        steps=steps,
        factors=computing / middle,
        spread=abs(halves[0] - halves[1]) / middle,
        exchanges=tuple((operation(said), times) for *said, times in told[0]["exchanges"]),
        when=time.time(),
        actions=tuple((kind, int(stage), float(s)) for one in told for kind, stage, s in one["actions"]),
        hops=tuple((int(boundary), int(n)) for one in told for boundary, n in one["hops"]),
    )
