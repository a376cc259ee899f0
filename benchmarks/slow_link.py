"""A step of a 15-million-parameter perceptron on two workers with a slow link between them: ours and DDP, over gloo.

The link is real: two network namespaces joined by a veth pair, each end's sending limited by ``tc tbf``. Each namespace
holds one worker, a process of one thread. A candidate's figure is the median step of the slower worker; dense steps are
few because they are long. Needs root (namespaces and tc); without it, it says so and does nothing.

    python benchmarks/slow_link.py [--quick] [--json FILE] [--mbit 100]
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import _measure as measure

HIDDEN = (3072, 4096)
BATCH = 64
ADDRESSES = ("10.77.0.1", "10.77.0.2")
PORT = 29_571
#: What a step takes at most before a candidate is given up.
TIMEOUT_S = 120
NOTHING = "nothing is sent"

DDP = (
    "DDP dense",
    "DDP fp16 hook",
    "DDP PowerSGD hook, rank 1",
    "DDP PowerSGD hook, rank 2",
    "DDP PowerSGD hook, rank 4",
)
OURS = (
    *("none", "bfloat16", "int8", "one_bit", "two_bit(threshold=0.001)", "top_k(ratio=0.01)", "top_k(ratio=0.001)"),
    *("strom(threshold=0.001)", "entropy(of='strom(threshold=0.001)')", "dgc(ratio=0.001, momentum=0.0)", "random_k"),
    *("powersgd(rank=1)", "powersgd(rank=2)", "powersgd(rank=4)"),
)
QUICK = ("top_k(ratio=0.001)", "dgc(ratio=0.001, momentum=0.0)", "random_k", "powersgd(rank=1)")


# -- in a namespace ----------------------------------------------------------------------------------------------------


def worker(candidate: str, steps: int) -> None:
    """One rank: environment variables are those of torchrun. Prints the seconds of each step and bytes."""
    import torch

    from manyhands.training.allocator import tune

    tune()
    torch.set_num_threads(1)
    step, sent_B = (ddp(candidate) if candidate.startswith("DDP") else ours(candidate))()
    step()
    step()
    before, stamps = sent_B(), [time.perf_counter()]
    for _ in range(steps):
        step()
        stamps.append(time.perf_counter())
    each = [b - a for a, b in itertools.pairwise(stamps)]
    print(json.dumps({"each": each, "sent_B": (sent_B() - before) / steps}), flush=True)
    os._exit(0)  # a process group that is left at different times complains


Made = Callable[[], tuple[Callable[[], object], Callable[[], float]]]


def data_and_model() -> tuple[object, object, object]:
    """This rank's share of a batch, which is drawn once, and the model."""
    import torch

    from manyhands.models.perceptron import perceptron

    torch.manual_seed(1)
    model = perceptron((784,), 10, hidden=HIDDEN)
    torch.manual_seed(int(os.environ["RANK"]))
    rows = BATCH // 2
    return model, torch.rand(rows, 784), torch.randint(0, 10, (rows,))


def ours(compress: str) -> Made:
    """`synchronous` with a compressor, as `train` steps it."""

    def make() -> tuple[Callable[[], object], Callable[[], float]]:
        import torch

        from manyhands.communication.topology import Mesh
        from manyhands.communication.transports.single import SingleCommunicator
        from manyhands.communication.transports.torch_distributed import GlooCommunicator
        from manyhands.contract import Batch
        from manyhands.partition.data import DataReplica
        from manyhands.plan import strategy_from

        model, x, y = data_and_model()
        alone = compress == NOTHING
        comm = SingleCommunicator() if alone else GlooCommunicator.join_launcher(timeout_s=TIMEOUT_S)
        comm.mesh = Mesh(data=comm.size)
        said = "" if alone or compress == "none" else f", compress={compress}"
        strategy = strategy_from(f"synchronous(update='replicated'{said})")
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        replica = DataReplica(model, optimizer, torch.nn.functional.cross_entropy, comm, common=False)
        live = strategy.start(replica, comm)
        batch = Batch(x, y, len(y), BATCH)
        return lambda: live.step(batch), lambda: comm.counters.sent_B("step")

    return make


def ddp(candidate: str) -> Made:
    """DistributedDataParallel as the tutorial writes it, with a communication hook if the candidate names one."""

    def make() -> tuple[Callable[[], object], Callable[[], float]]:
        import torch
        import torch.distributed as dist
        from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook

        dist.init_process_group("gloo")
        model, x, y = data_and_model()
        # PowerSGD's hook goes wrong over gloo with several buckets; one large one holds everything.
        large = {"bucket_cap_mb": 1000} if "PowerSGD" in candidate else {}
        wrapped = torch.nn.parallel.DistributedDataParallel(model, **large)
        if "fp16" in candidate:
            wrapped.register_comm_hook(None, default_hooks.fp16_compress_hook)
        elif "PowerSGD" in candidate:
            rank = int(candidate.rpartition(" ")[2])
            state = powerSGD_hook.PowerSGDState(None, matrix_approximation_rank=rank, start_powerSGD_iter=2)
            wrapped.register_comm_hook(state, powerSGD_hook.powerSGD_hook)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)

        def step() -> None:
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(wrapped(x), y).backward()
            optimizer.step()

        return step, lambda: 0.0

    return make


# -- the link ----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def link(mbit: float) -> Iterator[list[str]]:
    """Names of two namespaces joined by a veth pair of so many Mbit/s each way; gone afterwards."""
    names = [f"mh{os.getpid()}{side}" for side in "ab"]
    ends = [f"mhv{os.getpid() % 10_000}{side}" for side in "ab"]
    try:
        for name in names:
            ip("netns", "add", name)
        ip("link", "add", ends[0], "netns", names[0], "type", "veth", "peer", "name", ends[1], "netns", names[1])
        for name, end, address in zip(names, ends, ADDRESSES, strict=True):
            inside = ["netns", "exec", name]
            ip(*inside, "ip", "addr", "add", f"{address}/24", "dev", end)
            ip(*inside, "ip", "link", "set", end, "up")
            ip(*inside, "ip", "link", "set", "lo", "up")
            shape = ["rate", f"{mbit}mbit", "burst", f"{max(32, int(mbit))}kb", "latency", "200ms"]
            ip(*inside, "tc", "qdisc", "add", "dev", end, "root", "tbf", *shape)
        yield [f"{name} {end}" for name, end in zip(names, ends, strict=True)]
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


def ip(*arguments: str) -> None:
    """Run ``ip``; its own message is the error's."""
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"ip {' '.join(arguments)}: {done.stderr.strip()}")


def run(candidate: str, sides: list[str], steps: int) -> tuple[float, float] | None:
    """Seconds of a step, the slower worker's median, and bytes; None if it failed."""
    processes = []
    for rank, side in enumerate(sides):
        name, end = side.split()
        environment = {
            **os.environ,
            **{"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"},
            **{
                "MASTER_ADDR": ADDRESSES[0],
                "MASTER_PORT": str(PORT),
                "GLOO_SOCKET_IFNAME": end,
                "OMP_NUM_THREADS": "1",
            },
        }
        command = ["ip", "netns", "exec", name, sys.executable, __file__, "--worker", candidate, "--steps", str(steps)]
        processes.append(
            subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        )
    answers = []
    try:
        for process in processes:
            out, err = process.communicate(timeout=TIMEOUT_S * 2)
            lines = out.strip().splitlines()
            if process.returncode or not lines:
                print(f"  {candidate}: failed: {(err.strip().splitlines() or ['no message'])[-1][:200]}")
                return None
            answers.append(json.loads(lines[-1]))
    except subprocess.TimeoutExpired:
        print(f"  {candidate}: no answer in {TIMEOUT_S * 2} s")
        return None
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return max(statistics.median(a["each"]) for a in answers), answers[0]["sent_B"]


# -- all of it ---------------------------------------------------------------------------------------------------------


def main() -> None:
    """All candidates, one after the other: a link is not shared."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--quick", action="store_true", help="fewer candidates and steps")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--mbit", type=float, default=100.0, help="of the link, each way")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--steps", type=int, default=0, help="of each candidate; default: a few of long ones")
    said = parser.parse_args()
    if said.worker:
        worker(said.worker, said.steps)
        return
    if os.geteuid() != 0 or not shutil.which("ip") or not shutil.which("tc"):
        print("slow_link: skipped: network namespaces and tc need root and iproute2")
        return
    facts = measure.machine()
    print(f"{facts['processor']}, {facts['cores']} cores, {facts['system']}; load {facts['load']}")
    print(f"perceptron(hidden={HIDDEN}), batch {BATCH}, 2 workers, {said.mbit:g} Mbit/s each way")
    found: dict[str, tuple[float, float]] = {}
    names = [*(DDP[:3] if said.quick else DDP), NOTHING, *(QUICK if said.quick else OURS)]
    with link(said.mbit) as sides:
        for name in names:
            slow = name in ("DDP dense", "DDP fp16 hook", "none", "bfloat16", "int8")
            result = run(name, sides, said.steps or (2 if said.quick else 3 if slow else 12))
            if result is not None:
                found[name] = result
                sent = f"{result[1] / 1e6:>9.3f} MB" if result[1] else ""
                print(f"  {name:<42}{result[0] * 1e3:>10.1f} ms {sent}", flush=True)
    mine = [n for n in found if n in (*OURS, *QUICK)]
    if "DDP dense" in found and mine and NOTHING in found:
        best = min(mine, key=lambda n: found[n][0])
        print(f"best of ours: {best}")
        theirs = [found[n][0] for n in found if "PowerSGD" in n]
        for what, over, target in (
            ("DDP dense / ours", found["DDP dense"][0], 30),
            ("DDP fp16 hook / ours", found["DDP fp16 hook"][0], 15),
            *([("DDP's best PowerSGD hook / ours", min(theirs), 1.0)] if theirs else []),
        ):
            ratio = over / found[best][0]
            print(f"  {what:<42}{ratio:>8.1f}   target ≥ {target}  {'pass' if ratio >= target else 'MISS'}")
        ratio = found[best][0] / found[NOTHING][0]
        verdict = "pass" if ratio <= 2 else "MISS"
        print(f"  {'ours / the step that sends nothing':<42}{ratio:>8.2f}   target ≤ 2  {verdict}")
    if said.json:
        said.json.write_text(json.dumps({"machine": facts, "mbit": said.mbit, "steps": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
