"""What a worker's process holds before it has a tensor of the task's: measured, once for each kind of process.

A fresh team does a few steps of a small perceptron on the embedded digits, as any training does, and its first worker
is looked at; then it meets, one after the other, the kernels that a perceptron has no use for: their code comes into
memory at their first call. Nothing of this depends on the machine being quiet. What loading a data set takes is
measured likewise, since it is the set's own business what it decodes on the way.

Results are kept in the user's cache, by versions.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
import json
import platform
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from manyhands import data as data_sets
from manyhands.data.places import cache
from manyhands.plan import Plan
from manyhands.task import Task
from manyhands.training import allocator, memory
from manyhands.training.loop import work
from manyhands.training.member import Member
from manyhands.training.run import Options
from manyhands.training.team import team

#: Kernels that bring code of their own, by the operators that call them.
KERNELS = {
    "convolution": ("convolution", "convolution_backward"),
    "normalisation": ("native_layer_norm", "native_batch_norm", "native_group_norm"),
    "attention": ("_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_attention_math"),
    "recurrence": ("mkldnn_rnn_layer", "lstm_cell", "gru_cell"),
    "embedding": ("embedding",),
}
_ADAPTIVE = "adaptive optimizer"
_PRODUCTS = "large products"
#: Bytes of activations from which on products of matrices have the buffers that the library keeps for them.
LARGE_B = 8 * 2**20
_JOB = "manyhands.modelling.memory.process:"


@dataclass(frozen=True)
class Process:
    """Resident bytes of a worker's process that holds nothing: itself, and what each kind of kernel adds."""

    idle_B: int
    kernels_B: Mapping[str, int]
    started_B: int = 0  # before it has built a model, when most code has not been called; 0: not known

    def running_B(self, operators: Iterable[str], *, adaptive: bool = False, large: bool = False) -> int:
        """With the code of those that run, an ``adaptive`` optimizer's, and buffers for ``large`` products."""
        called = set(operators)
        used = [kind for kind, names in KERNELS.items() if called.intersection(names)]
        used += [_ADAPTIVE] * adaptive + [_PRODUCTS] * large
        return self.idle_B + sum(self.kernels_B.get(kind, 0) for kind in used)


@dataclass(frozen=True)
class Loaded:
    """A data set in memory: what it comes to, and what stood at the most while it was loaded."""

    kept_B: int
    peak_B: int


def resident_B() -> int:
    """Of this process, now; 0 where the system does not say."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) * 1024
    return 0


def process(transport: str, workers: int) -> Process:
    """Of a worker on this machine; takes two seconds the first time."""
    if transport in ("single", "threads", "simulated"):  # this very process
        measured = process("shared", 1)
        return Process(resident_B(), measured.kernels_B, resident_B())
    size = 1 if transport == "shared" else min(workers, 2)
    found = _kept(f"process {transport} {size}", lambda: _on_team(transport, size, "idle"))
    return Process(found["idle_B"], found["kernels_B"], found["started_B"])


def loaded(data: str, folder: Path | None) -> Loaded:
    """A set that is described by text, as a worker loads it."""
    found = _kept(f"data {data} {folder or ''}", lambda: _on_team("shared", 1, "load", data, str(folder or "")))
    return Loaded(found["kept_B"], found["peak_B"])


def _on_team(transport: str, size: int, job: str, *arguments: Any) -> dict[str, Any]:
    with team(transport, size, threads=1) as crew:
        found: dict[str, Any] = crew.run(f"{_JOB}{job}", *arguments, deadline_s=120.0)[0]
        return found


def _kept(what: str, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """From the cache, else measured and put there."""
    return _kept_in(str(cache("memory") / "figures.json"), f"{what} | {_versions()}", measure)


_FOUND: dict[tuple[str, str], dict[str, Any]] = {}


def _kept_in(file: str, key: str, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    if (file, key) not in _FOUND:
        path = Path(file)
        read: Any = None
        with contextlib.suppress(OSError, ValueError):
            read = json.loads(path.read_text(encoding="utf-8"))
        held: dict[str, Any] = read if isinstance(read, dict) else {}
        if not isinstance(held.get(key), dict):
            held = {**held, key: measure()}
            with contextlib.suppress(OSError):  # a cache that cannot be written is no reason to fail
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(json.dumps(held, indent=1), encoding="utf-8")
        _FOUND[file, key] = held[key]
    return _FOUND[file, key]


@functools.cache
def _versions() -> str:
    return f"3, torch {torch.__version__}, python {platform.python_version()}, {platform.release()}"


# -- in a worker -------------------------------------------------------------------------------------------------------


def idle(member: Member) -> dict[str, Any]:
    """The job that is measured. Collective."""
    size = member.comm.size
    data_sets.load("digits")
    started_B = _now()
    task = Task(model="perceptron", data="digits", steps=3, batch_size=8 * size)
    plan = Plan(
        strategy="synchronous(update='replicated')",
        workers=size,
        mesh=f"data={size}",
        micro_batches=1,
        shard=0,
        transport=member.comm.transport,
        device="cpu",
        threads=1,
    )
    work(dataclasses.replace(member, live=(task, plan)), dataclasses.asdict(Options(progress=False)), None)
    before = idle_B = _now()
    kernels_B = {}
    for kind, step in _STEPS.items():
        for _ in range(2):
            step()
        now = _now()
        kernels_B[kind], before = max(now - before, 0), now
    return {"idle_B": idle_B, "kernels_B": kernels_B, "started_B": started_B}


def load(member: Member, data: str, folder: str) -> dict[str, Any]:
    """The job that loads a data set."""
    data_sets.load("digits")  # whose code is that of all sets, and counted as the process's own
    before = _now()
    memory.forget_peak()
    splits = data_sets.load(data, folder=Path(folder) if folder else None)
    peak_B = memory.peak_B() - before
    kept_B = _now() - before
    del splits
    return {"kept_B": max(kept_B, 0), "peak_B": max(peak_B, kept_B, 0)}


def _now() -> int:
    gc.collect()
    allocator.give_back()
    return resident_B()


def _learn(model: nn.Module, x: torch.Tensor) -> None:
    out = model(x)
    torch.autograd.backward((out[0] if isinstance(out, tuple) else out).sum())


def _attend() -> None:
    q = torch.randn(2, 2, 8, 8, requires_grad=True)
    torch.autograd.backward(F.gelu(F.scaled_dot_product_attention(q, q, q, is_causal=True), approximate="tanh").sum())


def _adapt() -> None:
    p = nn.Parameter(torch.zeros(64))
    p.grad = torch.ones(64)
    torch.optim.Adam([p]).step()


_STEPS: dict[str, Callable[[], None]] = {
    "convolution": lambda: _learn(
        nn.Sequential(nn.Conv2d(4, 16, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(16, 16, 3)),
        torch.randn(8, 4, 16, 16),
    ),
    "normalisation": lambda: _learn(nn.LayerNorm(16), torch.randn(8, 16)),
    "attention": _attend,
    "recurrence": lambda: _learn(nn.LSTM(8, 8, batch_first=True), torch.randn(4, 4, 8)),
    "embedding": lambda: _learn(nn.Embedding(10, 8), torch.zeros(4, 4, dtype=torch.int64)),
    _ADAPTIVE: _adapt,
    _PRODUCTS: lambda: _learn(nn.Linear(1024, 1024), torch.randn(512, 1024)),
}
