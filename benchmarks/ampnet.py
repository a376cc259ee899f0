"""AMPNet on two workers: instances per second with four active keys against one, and against one sequential process.

    keys = K              2 workers on shared memory, a thread each, `Runtime` with max_active_keys = K
    sequential            the same layers in one process, one thread: forward, backward and update per instance

A perceptron of four layers of one width behind a narrow one (so that all four have a gradient to send back), float32,
an instance of some samples, plain SGD after each gradient. A step is a batch of instances pumped through. With k = 1
one worker waits while the other computes; from k = 2 both can compute. Where processes of others take time from one
worker, the other waits, too; so CPU time is told beside it: of the worker that spends most, without spinning.

    python benchmarks/ampnet.py [--quick] [--json FILE] [--rounds N]
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack

import _measure as measure
import torch
from _measure import Burst, Group, Report, Target
from torch import Tensor, nn
from torch.nn import functional as F

from manyhands.communication.topology import Mesh
from manyhands.contract import Batch
from manyhands.partition.ampnet.place import fitted
from manyhands.partition.ampnet.replica import GraphReplica, keep_nodes
from manyhands.partition.ampnet.strategy import AMPNet
from manyhands.training.allocator import tune
from manyhands.training.member import Member
from manyhands.training.team import Team, team

WORKERS, LAYERS, NARROW, WIDTH, SAMPLES, INSTANCES = 2, 4, 32, 1024, 32, 32
KEYS = (1, 2, 4)
ALONE = "sequential"


def model() -> nn.Sequential:
    """The same everywhere."""
    torch.manual_seed(0)
    widths = [NARROW, *[WIDTH] * (LAYERS + 1)]
    return nn.Sequential(*(m for n, k in itertools.pairwise(widths) for m in (nn.Linear(n, k), nn.Tanh())))


def batch() -> tuple[Tensor, Tensor]:
    """The same everywhere."""
    torch.manual_seed(1)
    return torch.randn(SAMPLES * INSTANCES, NARROW), torch.randn(SAMPLES * INSTANCES, WIDTH)


# -- in the workers ----------------------------------------------------------------------------------------------------

_replicas: dict[int, GraphReplica] = {}


def prepare(member: Member) -> None:
    """A job of the standing team: a replica for each number of keys."""
    comm = member.comm
    comm.mesh = Mesh(pipeline=comm.size)
    for keys in KEYS:
        strategy, made = AMPNet(max_active_keys=keys, samples=SAMPLES), model()
        graph, place = fitted(made, strategy, comm.size, batch()[0][:1])
        keep_nodes(made, graph, place, comm.rank)
        optimizer = torch.optim.SGD(made.parameters(), lr=1e-3)
        _replicas[keys] = GraphReplica(
            made, optimizer, F.mse_loss, comm, graph=graph, place=place, strategy=strategy, common=False
        )


def our_burst(member: Member, keys: int, steps: int, warm: int, start_at: float) -> list[float]:
    """A job of the standing team: one burst."""
    x, y = batch()
    share = Batch(x, y, len(x))
    return list(measure.burst(lambda: _replicas[keys].gradients(share), steps, warm, start_at))


def cpu_s(member: Member, keys: int) -> float:
    """A job of the standing team: CPU time of one step, in which a wait sleeps at once."""
    x, y = batch()
    mail = member.comm._mail  # type: ignore[attr-defined]
    spins, mail._spins = mail._spins, False
    try:
        before = time.process_time()
        _replicas[keys].gradients(Batch(x, y, len(x)))
        return time.process_time() - before
    finally:
        mail._spins = spins


def staleness(member: Member, keys: int) -> dict[str, int]:
    """A job of the standing team: how many updates had which staleness."""
    return {str(by): times for by, times in sorted(_replicas[keys].runtime.staleness.items())}


def alone_step(rank: int) -> Callable[[], object]:
    """One process and one thread."""
    tune()
    torch.set_num_threads(1)
    made = model()
    optimizer = torch.optim.SGD(made.parameters(), lr=1e-3)
    x, y = batch()
    parts = list(zip(x.split(SAMPLES), y.split(SAMPLES), strict=True))

    def step() -> None:
        for inputs, target in parts:
            optimizer.zero_grad()
            F.mse_loss(made(inputs), target).backward()  # type: ignore[no-untyped-call]
            optimizer.step()

    return step


def spent(step: Callable[[], object]) -> float:
    """CPU time of a step in this process."""
    before = time.process_time()
    step()
    return time.process_time() - before


# -- in this process ---------------------------------------------------------------------------------------------------


class Ours:
    """The standing team with one number of keys as a candidate."""

    def __init__(self, crew: Team, keys: int) -> None:
        self._crew, self._keys = crew, keys

    def __call__(self, steps: int, warm: int) -> list[Burst]:
        """One burst."""
        start_at = time.perf_counter() + 0.002
        return [Burst(*b) for b in self._crew.run("ampnet:our_burst", self._keys, steps, warm, start_at)]


def main() -> None:
    """Run the benchmark."""
    options = measure.arguments(__doc__)
    rounds = options.rounds or (2 if options.quick else 15)
    report, probe = Report("ampnet"), measure.PingPong()
    try:
        with ExitStack() as stack:
            crew = stack.enter_context(team("shared", WORKERS, threads=1))
            crew.run("ampnet:prepare")
            alone = Group(1, alone_step)
            stack.callback(alone.close)
            candidates: dict[str, measure.Candidate] = {f"keys = {k}": Ours(crew, k) for k in KEYS}
            candidates[ALONE] = alone
            found = measure.alternate(candidates, probe, rounds=rounds, burst_s=0.05 if options.quick else 0.6, least=1)
            each = statistics.median(max(crew.run("ampnet:cpu_s", KEYS[-1])) for _ in range(5))
            one = alone_step(0)
            one()
            own = statistics.median(spent(one) for _ in range(5))
            stale = {keys: crew.run("ampnet:staleness", keys) for keys in KEYS}
    finally:
        probe.close()
    node_s = found.seconds(ALONE).median / (INSTANCES * LAYERS)
    targets = [
        Target("instances/s, keys = 4 / keys = 1", found.ratio("keys = 1", "keys = 4"), "≥", 1.6),
        Target("instances/s, keys = 4 / sequential", found.ratio(ALONE, "keys = 4"), "≥", 1.3),
    ]
    title = f"{INSTANCES} instances of {SAMPLES} samples, {LAYERS} nodes of {node_s * 1e3:.2g} ms (all of a visit)"
    report.row(title, found, targets, node_s=node_s, staleness={str(k): v for k, v in stale.items()})
    report.note(
        f"CPU time an instance: sequential {own / INSTANCES * 1e3:.2f} ms, the busier worker "
        f"{each / INSTANCES * 1e3:.2f} ms, so at most {own / each:.2f} times as many instances per second"
    )
    for keys in KEYS:
        said = INSTANCES / found.seconds(f"keys = {keys}").median
        report.note(f"keys = {keys}: {said:,.0f} instances/s; updates by staleness, each worker's: {stale[keys]}")
    report.finish(options.json)


if __name__ == "__main__":
    main()
