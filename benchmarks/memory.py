"""What N workers hold in memory: parameters and optimizer state are there once in all on `shared`, not N times.

perceptron(hidden=20000), 15.9 million parameters, Adam (two numbers of state a parameter). Each worker's proportional
set size (Pss: private pages, plus its fair share of pages mapped by several) is read from /proc/self/smaps_rollup
before the replica is built and after two steps on a few samples; growths are added over the workers. glibc first hands
free heap back to the kernel (malloc_trim), so that what counts is what is held, and not what was once.

    copies = (growth − N gradients) / (parameters + optimizer state)

Gradients are each worker's own by design. Beside it, for comparison, the same over gloo, where every worker has all.

And what the largest worker holds at most while it trains a model that is cut in two, against one worker: its resident
set at the peak, from before the model is built to the end of two steps, less what the process had. gpt with 59 million
parameters, 4 samples of 32 characters, Adam. Buffers that go with a cut are stated and allowed for: of sharding three
units (one gathered, two of gradients), of which the largest is a 16th of the model.

    python benchmarks/memory.py [--quick] [--json FILE]
"""

from __future__ import annotations

import ctypes
import gc
from pathlib import Path
from typing import Any

import _measure as measure
import torch
from _measure import Report, Spread, Target

import manyhands as mh
from manyhands import models, verbs
from manyhands.consistency.synchronous import Synchronous
from manyhands.contract import Batch
from manyhands.models import losses
from manyhands.partition.buckets import BUCKET_B
from manyhands.partition.data import DataReplica
from manyhands.partition.sharded.units import PARTS
from manyhands.plan import Plan
from manyhands.task import Task, from_table
from manyhands.training import memory
from manyhands.training.member import Member
from manyhands.training.preparation import prepare
from manyhands.training.run import Options
from manyhands.training.team import team

SAMPLES = 4  # per worker: activations are not what is measured
#: Kernels' work space and the heap's own book-keeping come to some megabytes a worker.
TARGET = 1.1

#: A plan of two workers by whom the model is cut, and of how much more than half a worker's peak may be.
CUTS: dict[str, dict[str, Any]] = {
    "tensor=2": {"mesh": "tensor=2", "transport": "shared"},
    "pipeline=2": {"mesh": "pipeline=2", "pipeline": "one_f_one_b(cut='block7')", "transport": "shared"},
    "data=2, shard=3": {"mesh": "data=2", "shard": 3, "transport": "gloo"},
}
HALF = 0.55


def held(member: Member, hidden: int, update: str) -> dict[str, int]:
    """A job: what this worker's replica adds to its memory, in bytes, and the sizes it is made of."""
    _trained(member, 10, update)  # whatever Python and torch load at first use is loaded now …
    _once(hidden)  # … and work space that kernels keep for products of this size is there
    member.comm.barrier()
    before = _pss()
    replica = _trained(member, hidden, update)
    member.comm.barrier()
    after = _pss()
    member.comm.barrier()
    state_B = sum(s.values.nbytes for s in replica.optimizer_state())
    parameters_B = sum(piece.flat.nbytes for piece in replica.pieces)
    growth = {f"{key}_B": after[key] - before[key] for key in after}
    return growth | {"parameters_B": parameters_B, "state_B": state_B}


def _trained(member: Member, hidden: int, update: str) -> DataReplica:
    torch.manual_seed(0)
    module = models.build(f"perceptron(hidden={hidden})", inputs=(1, 28, 28), classes=10)
    strategy = Synchronous(update=update)  # type: ignore[arg-type]
    optimizer, loss = torch.optim.Adam(module.parameters()), losses.build("cross_entropy")
    replica = DataReplica(module, optimizer, loss, member.comm, common=strategy.parameters == "common")
    worker = strategy.start(replica, member.comm)
    for _ in range(2):
        worker.step(Batch(torch.rand(SAMPLES, 1, 28, 28), torch.randint(0, 10, (SAMPLES,)), SAMPLES))
    return replica


def peak(member: Member, tasks: list[dict[str, Any]], plan: dict[str, Any]) -> dict[str, int]:
    """A job: the most that this worker holds of the last of ``tasks``; those before load what is used once."""
    found = {}
    for task in tasks:
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        member.comm.barrier()
        before_B = _resident()
        run = prepare(member, from_table(Task, task, "[task]"), from_table(Plan, plan, "[plan]"), Options())
        built_B = memory.peak_B()
        shares = run.sampler.batches(run.cursor, epochs=1)
        for _ in range(2):
            share = next(shares)
            inputs, target = run.splits.train.rows(share.indices)
            run.worker.step(Batch(inputs, target, len(share.indices), share.global_count))
        found = {"built_B": built_B - before_B, "peak_B": memory.peak_B() - before_B, "parameters": run.parameters}
        del run
        member.comm.barrier()
    return found


def _resident() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(x.split()[1]) * 1024 for x in lines if x.startswith("VmRSS:"))


def of_cuts(report: Report, width: int) -> None:
    """One worker, and the largest of two that divide the model."""
    tasks = [
        mh.Task(model=f"gpt(layers=12, width={w}, heads=4)", data="markov(length=32)", batch_size=4, optimizer="adam")
        for w in (12, width)
    ]
    report.heading(f"gpt(layers=12, width={width}) with adam: most memory that the largest worker adds, MB")
    print(f"  {'plan':<18}{'built':>8}{'peak':>8}{'of one':>8}")
    whole_B = 0
    for name, how in {"one worker": {"mesh": "data=1", "transport": "single"}, **CUTS}.items():
        plan = verbs.outlined(tasks[1], mh.Plan(threads=1, **how)).plan
        assert plan.workers is not None
        with team("gloo" if plan.workers == 1 else plan.transport, plan.workers, threads=1) as crew:
            ranks = crew.run("memory:peak", [task.as_table() for task in tasks], plan.as_table(), deadline_s=600.0)
        most = max(ranks, key=lambda r: r["peak_B"])
        whole_B = whole_B or most["peak_B"]
        ratio = most["peak_B"] / whole_B
        print(f"  {name:<18}{most['built_B'] / 1e6:>8.0f}{most['peak_B'] / 1e6:>8.0f}{ratio:>8.2f}")
        report.rows.append({"plan": name, "ratio": ratio, "ranks": ranks})
        if plan.workers > 1:
            buffers_B = 3 * max(BUCKET_B, 4 * most["parameters"] // PARTS) if plan.shard else 0
            allowed = round(HALF + buffers_B / whole_B, 2)
            report.ask(name, [Target(f"{name}: of one worker's peak", Spread(ratio, ratio, ratio), "≤", allowed)])


def _once(hidden: int) -> None:
    module = models.build(f"perceptron(hidden={hidden})", inputs=(1, 28, 28), classes=10)
    module(torch.rand(SAMPLES, 1, 28, 28)).sum().backward()


def _pss() -> dict[str, int]:
    ctypes.CDLL(None).malloc_trim(0)
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return {
        key: next(int(x.split()[1]) * 1024 for x in lines if x.startswith(name))
        for key, name in (("anonymous", "Pss_Anon:"), ("shared", "Pss_Shmem:"))
    }


def main() -> None:
    """Copies held by two and four workers on shared memory and two over gloo; peaks where the model is cut."""
    options = measure.arguments(__doc__ or "")
    report = Report("memory")
    hidden = 2_000 if options.quick else 20_000
    cases = [("shared", 2, "sharded"), ("shared", 4, "sharded"), ("gloo", 2, "replicated")]
    report.heading(f"perceptron(hidden={hidden}) with adam: memory that the replicas of all workers add, MB")
    columns = f"{'workers':>8}{'private':>10}{'shared':>10}{'gradients':>11}{'copies':>8}"
    print(f"  {'transport':<12}{columns}  of parameters + state")
    for transport, workers, update in cases:
        with team(transport, workers, threads=1) as crew:
            ranks = crew.run("memory:held", hidden, update, deadline_s=300.0)
        parameters_B = ranks[0]["parameters_B"]
        private_B, shared_B = sum(r["anonymous_B"] for r in ranks), sum(r["shared_B"] for r in ranks)
        gradients_B = workers * parameters_B
        one_copy_B = 3 * parameters_B  # Adam: two moments
        copies = (private_B + shared_B - gradients_B) / one_copy_B
        figures = "".join(f"{x / 1e6:>10.0f}" for x in (private_B, shared_B, gradients_B))
        print(f"  {transport:<12}{workers:>8}{figures} {copies:>8.2f}")
        report.rows.append(
            {"transport": transport, "workers": workers, "update": update, "copies": copies, "ranks": ranks}
        )
        if transport == "shared":
            once = Spread(copies, copies, copies)
            report.ask(f"{workers} workers", [Target(f"{workers} shared workers: copies held", once, "≤", TARGET)])
    of_cuts(report, 256 if options.quick else 640)
    report.finish(options.json)


if __name__ == "__main__":
    main()
