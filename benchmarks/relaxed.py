"""What relaxed strategies are for, each against its strict counterpart; two workers.

    server   updates of a 1 MB model per second on the parameter server: over shared memory, where whoever pushes does
             the server's work, and over gloo, where a third rank is the server. An update is a push and a pull by
             `asynchronous`; the gradient lies there already
    step     one step of the cnn at a global batch of 100: asynchronous against synchronous, over shared memory
    slow     a perceptron learns MNIST while workers are slowed down at random: in each step with probability 0.3 a
             worker sleeps 8 ms before its gradient, which takes 0.3 ms. Time to a training loss, by staleness;
             ssp(staleness=0) is lock-step (BSP). All candidates of a round meet the same delays and batches
    local    bytes and accuracy of local(every=16) against synchronous: the cnn on MNIST, equal epochs

In ``slow`` all have momentum, and a step moves the servers' parameters as far under every candidate: ssp adds each
worker's change by its part of the batch, 1/2, and asynchronous, whose pushes are whole updates, has half the learning
rate. The loss is that of what the servers hold, copied every few steps and evaluated after the run. What can be gained
by not waiting is at most 2 − 0.3 with two workers. Momentum and delays were chosen so that both sides of the trade
show: in a trial with plain SGD at a rate of 0.2, and rarer delays, the largest staleness was the fastest.

    python benchmarks/relaxed.py [--quick] [--json FILE] [--rounds N] [--only server|step|slow|local]
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import _measure as measure
import torch
from _measure import Burst, CpuTime, PingPong, Report, Round, Rounds, Spread, Target
from null_step import D1, null_worker
from step import build, share_of_batches
from torch import Tensor
from torch.nn import functional as F

import manyhands as mh
from manyhands.communication.communicator import Communicator
from manyhands.consistency.parameter_server.server import serving
from manyhands.contract import Batch, Worker
from manyhands.data.mnist import mnist
from manyhands.errors import ManyhandsError
from manyhands.models import losses, optimizers
from manyhands.partition.data import DataReplica
from manyhands.plan import strategy_from
from manyhands.training.member import Member
from manyhands.training.team import Team, team

WORKERS = 2
SHARED, GLOO = "asynchronous on shared", "asynchronous on gloo, a rank serves"
SYNCHRONOUS, ASYNCHRONOUS = "synchronous", "asynchronous"

BATCH = 100  # of ``step`` and ``local``

#: Of ``slow``.
MODEL, IMAGES, SLOW_BATCH = "perceptron(hidden=50)", 4_000, 200
LR, MOMENTUM = 0.1, 0.9
STALENESS, SMALL = (0, 1, 2, 4, 8), 4
SLOW_S, PROBABILITY = 0.008, 0.3
TARGET_LOSS, STEPS = 0.15, 300
QUICK_LOSS, QUICK_STEPS = 0.5, 100
FIRST_SEED = 100  # none of those with which the settings above were tried
EVERY = 5  # steps between two copies

# -- in the workers ----------------------------------------------------------------------------------------------------


def started(comm: Communicator, text: str, module: torch.nn.Module, optimizer: str) -> tuple[DataReplica, Worker]:
    """This rank's worker under a strategy, as `manyhands.training.loop` makes it."""
    strategy = strategy_from(text)
    replica = DataReplica(
        module,
        optimizers.build(optimizer, module.parameters()),
        losses.build("cross_entropy"),
        comm,
        common=strategy.parameters == "common",
        sparse=strategy.sparse,
    )
    return replica, strategy.start(replica, comm)


def server_burst(member: Member, servers: int, steps: int, warm: int) -> list[float]:
    """A job: one burst of updates on a fresh server; nothing on a rank that is one."""
    mark, measured = member.comm.mark(), []
    with serving(member.comm, servers) as comm:
        if comm is not None:
            measured = _burst_of_updates(comm, steps, warm)
    member.comm.release(mark)
    return measured


def _burst_of_updates(comm: Communicator, steps: int, warm: int) -> list[float]:
    worker, (batch,) = null_worker(comm, D1, 1 if comm.servers else comm.size)  # as a plan decides
    comm.barrier()
    return list(measure.burst(lambda: worker.step(batch), steps, warm, 0.0))


_steps: dict[str, Callable[[], object]] = {}


def prepare(member: Member, text: str, model: str, batch: int) -> None:
    """A job of the standing team: make the step and keep it."""
    comm = member.comm
    _, worker = started(comm, text, build(model), "sgd(lr=0.01)")
    shares = share_of_batches(batch, comm.rank, comm.size)
    batches, numbers = itertools.cycle([Batch(x, y, len(y), batch) for x, y in shares]), itertools.count()

    def step() -> object:
        comm.step = next(numbers)
        return worker.step(next(batches))

    _steps[text] = step


def step_burst(member: Member, text: str, steps: int, warm: int, start_at: float) -> list[float]:
    """A job of the standing team: one burst."""
    return list(measure.burst(_steps[text], steps, warm, start_at))


@functools.lru_cache(maxsize=1)
def images() -> tuple[Tensor, Tensor]:
    """The first of MNIST."""
    train = mnist(limit=IMAGES).train
    return train.rows(torch.arange(IMAGES))


def learn(member: Member, text: str, optimizer: str, seed: int, steps: int) -> list[list[float]]:
    """A job of the standing team: the training loss of what the servers hold, by seconds; on rank 0 only."""
    comm, (inputs, labels) = member.comm, images()
    mark = comm.mark()
    torch.manual_seed(seed)
    module = mh.models.build(MODEL, inputs=(1, 28, 28), classes=10)
    replica, worker = started(comm, text, module, optimizer)
    servers = vars(worker).get("store") or vars(worker)["_store"]  # ssp keeps it to itself
    batches = [
        Batch(inputs[own], labels[own], len(own), SLOW_BATCH)
        for own in (order[comm.rank :: comm.size] for order in orders(seed, steps))
    ]
    slow_down(replica, seed, comm.rank, steps)
    copies, times = [[flat.clone() for flat in servers.flats]], [0.0]
    comm.barrier()
    begin = time.perf_counter()
    for number, batch in enumerate(batches, 1):
        comm.step = number
        worker.step(batch)
        if comm.rank == 0 and number % EVERY == 0:
            copies.append([flat.clone() for flat in servers.flats])
            times.append(time.perf_counter() - begin)
    worker.meet()
    result = []
    if comm.rank == 0:
        for seconds, copy in zip(times, copies, strict=True):
            with replica.using(copy) as model, torch.no_grad():
                result.append([seconds, float(F.cross_entropy(model(inputs), labels))])
    comm.barrier()
    del replica, worker, module, servers
    comm.release(mark)
    return result


def orders(seed: int, steps: int) -> list[Tensor]:
    """Which samples each step takes."""
    generator = torch.Generator().manual_seed(seed)
    epochs = -(-steps * SLOW_BATCH // IMAGES)
    order = torch.cat([torch.randperm(IMAGES, generator=generator) for _ in range(epochs)])
    return list(order.split(SLOW_BATCH))[:steps]


def slow_down(replica: DataReplica, seed: int, rank: int, steps: int) -> None:
    """Sleep before some gradients: the same for whatever strategy."""
    generator = torch.Generator().manual_seed(1000 * (seed + 1) + rank)
    slow = iter((torch.rand(steps, generator=generator) < PROBABILITY).tolist())
    gradients = replica.gradients

    def slowed(*args: Any, **kwargs: Any) -> Any:
        if next(slow):
            time.sleep(SLOW_S)
        return gradients(*args, **kwargs)

    replica.gradients = slowed  # type: ignore[method-assign]


# -- in this process ---------------------------------------------------------------------------------------------------


class Updates:
    """Updates of a server as a candidate; every burst has a server of its own."""

    def __init__(self, crew: Team, servers: int) -> None:
        self._crew, self._servers = crew, servers

    def __call__(self, steps: int, warm: int) -> list[Burst]:
        """One burst."""
        answers = self._crew.run("relaxed:server_burst", self._servers, steps, warm, deadline_s=60.0)
        return [Burst(*b) for b in answers if b]


class Steps:
    """Steps of a strategy as a candidate."""

    def __init__(self, crew: Team, text: str) -> None:
        self._crew, self._text = crew, text
        crew.run("relaxed:prepare", text, "cnn", BATCH)

    def __call__(self, steps: int, warm: int) -> list[Burst]:
        """One burst."""
        start_at = time.perf_counter() + 0.002
        return [Burst(*b) for b in self._crew.run("relaxed:step_burst", self._text, steps, warm, start_at)]


def of_an_update(ranks: Sequence[Burst]) -> float:
    """Seconds for each update that any of the workers has made."""
    return measure.slowest_mean(ranks) / len(ranks)


def server(report: Report, probe: PingPong, *, rounds: int, quick: bool) -> None:
    """Shared memory against messages."""
    with ExitStack() as stack:
        candidates = {SHARED: Updates(stack.enter_context(team("shared", WORKERS, threads=1)), 0)}
        try:
            over_gloo = Updates(stack.enter_context(team("gloo", WORKERS + 1, threads=1)), 1)
            over_gloo(3, 1)
            candidates[GLOO] = over_gloo
        except (ManyhandsError, OSError) as e:
            report.note(f"gloo is left out, and with it the target: {e}")
        counts = dict.fromkeys(candidates, of_an_update)
        burst_s = 0.05 if quick else 0.2
        measured = measure.alternate(candidates, probe, rounds=rounds, burst_s=burst_s, counts=counts)
    targets = []
    if GLOO in candidates:
        targets.append(Target("gloo / shared", measured.ratio(GLOO, SHARED), "≥", 10))
    report.row(f"an update of a 1 MB model, {WORKERS} workers", measured, targets)
    rates = [f"{name} {1 / measured.seconds(name).median:,.0f}" for name in candidates]
    report.note(f"updates per second of all workers: {', '.join(rates)}")


def step(report: Report, probe: PingPong, *, rounds: int, quick: bool) -> None:
    """What a worker of the server pays for not waiting."""
    with team("shared", WORKERS, threads=1) as crew:
        candidates = {text: Steps(crew, text) for text in (SYNCHRONOUS, ASYNCHRONOUS)}
        measured = measure.alternate(candidates, probe, rounds=rounds, burst_s=0.05 if quick else 0.3)
    ratio = measured.ratio(ASYNCHRONOUS, SYNCHRONOUS)
    target = Target("asynchronous / synchronous", ratio, "≤", 1.05)
    report.row(f"a step of the cnn, global batch {BATCH}, {WORKERS} workers", measured, [target])


def reached(curve: list[list[float]], loss: float) -> float:
    """Seconds until the loss is so small, between two copies by their distance from it; infinite: it never is."""
    for (t0, before), (t1, after) in itertools.pairwise(curve):
        if after <= loss:
            return t0 + (t1 - t0) * (before - loss) / (before - after)
    return math.inf


def slow(report: Report, probe: PingPong, *, rounds: int, quick: bool) -> None:
    """Time to a loss by staleness."""
    steps, loss = (QUICK_STEPS, QUICK_LOSS) if quick else (STEPS, TARGET_LOSS)
    ssp = {f"ssp(staleness={s})": f"sgd(lr={LR}, momentum={MOMENTUM})" for s in STALENESS}
    optimizer = ssp | {ASYNCHRONOUS: f"sgd(lr={LR / WORKERS}, momentum={MOMENTUM})"}
    names, every, missed = list(optimizer), [], 0
    with team("shared", WORKERS, threads=1) as crew:
        for r in range(rounds):
            seconds = {}
            used, before = CpuTime.now(), probe()
            for name in names[r % len(names) :] + names[: r % len(names)]:
                curve = crew.run("relaxed:learn", name, optimizer[name], FIRST_SEED + r, steps)[0]
                seconds[name] = reached(curve, loss)
                if math.isinf(seconds[name]):
                    seconds[name], missed = curve[-1][0], missed + 1
            every.append(Round(seconds, (before, probe()), measure.others(used, CpuTime.now())))
    measured = Rounds(every)
    lockstep, best = names[0], measured.fastest(list(ssp))
    least = float(STALENESS[list(ssp).index(best)])
    targets = [
        Target(f"lock-step / {best}", measured.ratio(lockstep, best), "≥", 1.3),
        Target(f"the best staleness of {', '.join(map(str, STALENESS))}", Spread(least, least, least), "≤", SMALL),
    ]
    report.row(f"time to a training loss of {loss}, {WORKERS} workers slowed down at random", measured, targets)
    if missed:
        report.note(f"{missed} of {rounds * len(names)} runs did not reach the loss; they count with their whole time")


def local(report: Report, *, seeds: int, quick: bool) -> None:
    """Bytes and accuracy."""
    model, epochs = ("perceptron", 1) if quick else ("cnn", 2)
    data = "mnist(limit=1600)" if quick else "mnist"
    texts = (SYNCHRONOUS, "local(every=16)")
    sent: dict[str, list[float]] = {text: [] for text in texts}
    accuracy: dict[str, list[float]] = {text: [] for text in texts}
    for seed, text in itertools.product(range(seeds), texts):
        task = mh.Task(model=model, data=data, optimizer="sgd(lr=0.1)", batch_size=BATCH, epochs=epochs, seed=seed)
        plan = mh.Plan(strategy=text, workers=WORKERS, transport="shared", threads=1)
        said = mh.train(task, plan, evaluate="end", progress=False).summary
        assert said is not None
        assert said.test_accuracy is not None
        sent[text].append(said.sent_B_per_step / said.global_batch)
        accuracy[text].append(100 * said.test_accuracy)
    title = f"{model} on {data}, {epochs} {'epoch' if epochs == 1 else 'epochs'}, {seeds} seeds"
    report.heading(title)
    for text in texts:
        middle = Spread.of(accuracy[text])
        print(f"  {text:<52}{sent[text][0]:>10,.1f} B a sample, accuracy {middle.median:.2f} %")
    report.rows.append({"row": title, "bytes_per_sample": sent, "accuracy": accuracy})
    strict, relaxed = texts
    ratio = Spread.of([a / b for a, b in zip(sent[strict], sent[relaxed], strict=True)])
    apart = Spread.of([abs(a - b) for a, b in zip(accuracy[strict], accuracy[relaxed], strict=True)])
    report.ask(
        title,
        [
            Target("bytes per sample, synchronous / local", ratio, "≥", 16),
            Target("bytes per sample, synchronous / local", ratio, "≤", 16),
            Target("accuracies apart", apart, "≤", 0.3, "points"),
        ],
    )


def main() -> None:
    """Every part, or one."""
    options = measure.arguments(__doc__ or "", only="one part: server, step, slow or local")
    report = Report("relaxed")
    wanted = [part for part in ("server", "step", "slow", "local") if options.only in (None, part)]
    probe, quick = PingPong(), options.quick
    with contextlib.closing(probe):
        if "server" in wanted:
            server(report, probe, rounds=options.rounds or (3 if quick else 15), quick=quick)
        if "step" in wanted:
            step(report, probe, rounds=options.rounds or (3 if quick else 20), quick=quick)
        if "slow" in wanted:
            slow(report, probe, rounds=options.rounds or (1 if quick else 7), quick=quick)
    if "local" in wanted:
        local(report, seeds=1 if quick else 3, quick=quick)
    report.finish(options.json)


if __name__ == "__main__":
    main()
