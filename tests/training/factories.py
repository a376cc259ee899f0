"""Models and data for whole runs, reached by workers as ``tests.training.factories:name``.

`fragile` meets with an accident at a chosen place: it is what a user's model would do if it were killed there.
"""

import errno
import multiprocessing
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from manyhands.data import Arrays, Splits
from tests import guards

HERE = "tests.training.factories"
INPUTS, CLASSES = 6, 3


def data(n: int = 50, test: int = 23) -> Splits:
    """Float64, so that worker counts can be compared to rounding."""
    generator = torch.Generator().manual_seed(2)

    def draw(count: int) -> Arrays:
        x = torch.randn(count, INPUTS, generator=generator, dtype=torch.float64)
        return Arrays(x, (x[:, 0] * 2 + x[:, 1]).round().long().clamp(-1, 1) + 1)

    return Splits(draw(n), draw(test), (INPUTS,), CLASSES, "made up", "made up")


def regression(n: int = 50) -> Splits:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(n, INPUTS, generator=generator, dtype=torch.float64)
    arrays = Arrays(x, x[:, :CLASSES].sin())
    return Splits(arrays, arrays, (INPUTS,), None, "regression", "regression")


def poisoned(n: int = 50, at: int = 17) -> Splits:
    made = data(n)
    made.train.inputs[at] = float("nan")
    return made


def model(inputs: Any, classes: int = CLASSES, *, hidden: int = 30) -> nn.Module:
    return nn.Sequential(nn.Linear(inputs[0], hidden), nn.Tanh(), nn.Linear(hidden, classes or CLASSES)).double()


def dropout(inputs: Any, classes: int) -> nn.Module:
    return nn.Sequential(nn.Linear(inputs[0], 30), nn.Dropout(0.4), nn.Tanh(), nn.Linear(30, classes)).double()


def normed(inputs: Any, classes: int) -> nn.Module:
    layers = nn.Linear(inputs[0], 30), nn.BatchNorm1d(30), nn.Dropout(0.2), nn.Tanh(), nn.Linear(30, classes)
    return nn.Sequential(*layers).double()


def batchnorm(inputs: Any, classes: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Linear(12, classes))


class Branching(nn.Module):
    """Does one thing or another, by the values it is given; torch.fx cannot follow that."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.up(x) if float(x.detach().sum()) > 0 else self.down(x)


class Skipping(nn.Module):
    """A forward of its own around modules that branch."""

    def __init__(self, inputs: Any, classes: int) -> None:
        super().__init__()
        self.first, self.middle = nn.Linear(64, 16), nn.ModuleList([Branching(16), Branching(16)])
        self.last = nn.Linear(16, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x.flatten(1))
        for block in self.middle:
            x = x + block(x)
        return self.last(x)


def branching(inputs: Any, classes: int) -> nn.Module:
    return Skipping(inputs, classes)


def tied(inputs: Any, classes: int) -> nn.Module:
    made = nn.Sequential(
        nn.Linear(inputs[0], 20), nn.Linear(20, 20), nn.Tanh(), nn.Linear(20, 20), nn.Linear(20, classes)
    )
    made[3].weight = made[1].weight
    return made.double()


def momentum(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01)


class Drawing(nn.Module):
    """Takes its noise from Python's and NumPy's generators, as a user's own augmentation does."""

    def __init__(self, inputs: Any, classes: int) -> None:
        super().__init__()
        self.last = nn.Linear(inputs[0], classes).double()
        if rank() >= 0:
            random.seed(rank())
            np.random.seed(rank())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            x = x + random.gauss(0, 0.1) + float(np.random.normal(0, 0.1))
        return self.last(x)


class Extra(nn.Module):
    """Keeps a number that is no parameter; ``plain`` says it as a dict, else as a tensor."""

    def __init__(self, inputs: Any, classes: int, *, plain: bool = False) -> None:
        super().__init__()
        self.last = nn.Linear(inputs[0], classes).double()
        self.plain, self.passes = plain, 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.passes += 1
        return self.last(x) * (1 + 0.01 * self.passes)

    def get_extra_state(self) -> Any:
        return {"passes": self.passes} if self.plain else torch.tensor(self.passes)

    def set_extra_state(self, state: Any) -> None:
        self.passes = state["passes"] if self.plain else int(state)


def lazy(inputs: Any, classes: int) -> nn.Module:
    return nn.Sequential(nn.LazyLinear(20), nn.LazyBatchNorm1d(), nn.Tanh(), nn.LazyLinear(classes)).double()


def from_environment() -> Splits:
    return data(int(os.environ.get("SAMPLES", "50")))


def of_any_size() -> Splits:
    """Each process sees another number of samples."""
    return data(50 + rank())


def breaks(inputs: Any, classes: int) -> nn.Module:
    raise LookupError("the factory's own words")


class BadInput(Exception):
    """Called like one of ours, and none of ours."""


class Confusing(nn.Linear):
    def __init__(self, inputs: Any, classes: int) -> None:
        super().__init__(inputs[0], classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise BadInput("not yours")


def rank() -> int:
    """Of this worker process; −1 in the launcher, which builds the model once to see whether it can."""
    name = multiprocessing.current_process().name
    return int(name.rpartition("-")[2]) if "worker" in name else int(os.environ.get("PMI_RANK", -1))


class Fragile(nn.Module):
    """A linear model that does ``how`` on one rank, in the pass of one step, forward or backward or in evaluation."""

    def __init__(self, inputs: Any, classes: int, how: str, on: int, step: int, where: str, folder: str) -> None:
        super().__init__()
        self.last = nn.Linear(inputs[0], classes)
        self.how, self.on, self.step, self.where, self.folder = how, on, step, where, Path(folder)
        self.passes = 0
        if rank() >= 0:
            (self.folder / f"pid-{rank()}").write_text(str(os.getpid()))
        if where == "start":
            self.accident()
        if where == "writing" and rank() == on:
            self.break_writing()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        outputs = self.last(x.float())
        if not self.training:
            if self.where == "evaluation":
                self.accident()
            return outputs
        if self.passes == self.step:
            if self.where == "forward":
                self.accident()
            if self.where == "backward":
                outputs.register_hook(lambda _: self.accident())
        self.passes += 1
        return outputs

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        if self.where == "checkpoint":
            self.accident()
        return super().state_dict(*args, **kwargs)

    def accident(self) -> None:
        if rank() != self.on:
            return
        (self.folder / "happened").write_text(f"{time.time()}")
        if self.how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif self.how == "exit":
            os._exit(3)
        elif self.how == "freeze":
            os.kill(os.getpid(), signal.SIGSTOP)
        elif self.how == "raise":
            raise ValueError("the user's own words")
        elif self.how == "kill the other":  # it waits for us in the exchange by now
            other = int((self.folder / f"pid-{1 - self.on}").read_text())
            wait_until_asleep(other)
            os.kill(other, signal.SIGKILL)
        elif self.how == "listen":
            found = guards._listening(guards.Snapshot.take().sockets)
            (self.folder / "happened").write_text("\n".join(found))
        elif self.how == "linger":
            time.sleep(60)

    def break_writing(self) -> None:
        from manyhands.training import checkpoint

        write, left = checkpoint.write_tensors, [self.step]

        def broken(path: Path, tensors: Any) -> Any:
            left[0] -= 1
            if left[0] >= 0 or (self.how == "fail once" and left[0] < -1):
                return write(path, tensors)
            path.write_bytes(b"half of it")
            self.accident()
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        checkpoint.write_tensors = broken


def wait_until_asleep(pid: int) -> None:
    """Until the process has slept through a few looks: it waits for somebody."""
    seen = 0
    while seen < 5:
        seen = seen + 1 if guards._status(pid)[0] == "S" else 0
        time.sleep(0.01)


def fragile(
    inputs: Any,
    classes: int,
    *,
    folder: str,
    how: str = "kill",
    on: int = 1,
    step: int = 0,
    where: str = "forward",
) -> nn.Module:
    return Fragile(inputs, classes, how, on, step, where, folder)


class LateBuffer(nn.Module):
    """Makes a buffer in its first forward, and outputs that are not finite in its third."""

    def __init__(self, inputs: Any, classes: int) -> None:
        super().__init__()
        self.linear = nn.Linear(inputs[0], classes).double()
        self.calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        if self.calls == 1:
            self.register_buffer("seen", torch.zeros(1))
        return self.linear(x) * (float("nan") if self.calls == 3 else 1.0)


class PartlyUsed(nn.Module):
    """Has a parameter and a layer that its forward never comes to."""

    def __init__(self, inputs: Any, classes: int) -> None:
        super().__init__()
        self.a, self.aside, self.b = nn.Linear(64, 12), nn.Linear(12, 3), nn.Linear(12, classes)
        self.never = nn.Parameter(torch.ones(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(self.a(x.flatten(1)).tanh())


def partly_used(inputs: Any, classes: int) -> nn.Module:
    return PartlyUsed(inputs, classes)
