"""What N workers hold in memory: parameters and optimizer state are there once in all on `shared`, not N times.

perceptron(hidden=20000), 15.9 million parameters, Adam (two numbers of state a parameter). Each worker's proportional
set size (Pss: private pages, plus its fair share of pages mapped by several) is read from /proc/self/smaps_rollup
before the replica is built and after two steps on a few samples; growths are added over the workers. glibc first hands
free heap back to the kernel (malloc_trim), so that what counts is what is held, and not what was once.

    copies = (growth − N gradients) / (parameters + optimizer state)

Gradients are each worker's own by design. Beside it, for comparison, the same over gloo, where every worker has all.

    python benchmarks/memory.py [--quick] [--json FILE]
"""

from __future__ import annotations

import ctypes
from pathlib import Path

import _measure as measure
import torch
from _measure import Report, Spread, Target

from manyhands import models
from manyhands.consistency.synchronous import Synchronous
from manyhands.contract import Batch
from manyhands.models import losses
from manyhands.partition.data import DataReplica
from manyhands.training.member import Member
from manyhands.training.team import team

SAMPLES = 4  # per worker: activations are not what is measured
#: Kernels' work space and the heap's own book-keeping come to some megabytes a worker.
TARGET = 1.1


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
    """Two and four workers on shared memory, two over gloo."""
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
    report.finish(options.json)


if __name__ == "__main__":
    main()
