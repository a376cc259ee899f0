"""What the contract test runs on ranks, and the plain torch loop it is compared with.

A problem is a model, batches, a loss and an optimizer, all made from numbers that travel; `train` runs a strategy on
it, `plain` a loop as anybody would write it with torch alone. `plain` uses nothing of manyhands.
"""

import contextlib
import itertools
import math
import time
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from manyhands.communication.communicator import Communicator
from manyhands.communication.topology import Mesh
from manyhands.consistency import buffers as buffer_policy
from manyhands.contract import Batch
from manyhands.errors import NonFiniteLoss
from manyhands.models.losses import CrossEntropy, SquaredError
from manyhands.partition.data import DataReplica
from manyhands.plan import strategy_from

INPUTS, CLASSES = 12, 5
BATCHES = (8, 8, 8, 5)  # the last batch of an epoch is small

# -- models: more than 64 elements each, so that several ranks have a slice --------------------------------------------


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(INPUTS, 32), nn.Tanh(), nn.Linear(32, CLASSES))


def regression() -> nn.Module:
    return nn.Sequential(nn.Linear(INPUTS, 32), nn.Tanh(), nn.Linear(32, CLASSES))


class Tied(nn.Module):
    """The last layer is the first one's transpose: one tensor under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.encode = nn.Linear(INPUTS, 20)
        self.decode = nn.Linear(20, INPUTS)
        self.again = nn.Linear(20, INPUTS)
        self.again.weight = self.decode.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = torch.tanh(self.encode(x))
        return (self.decode(h) + self.again(h.square()))[:, :CLASSES]


def frozen() -> nn.Module:
    model = mlp()
    model[0].weight.requires_grad_(False)
    return model


class Unused(nn.Module):
    """``spare`` never enters the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(INPUTS, 16)
        self.spare = nn.Linear(16, CLASSES)
        self.last = nn.Linear(16, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(torch.tanh(self.first(x)))


class UsedLater(Unused):
    """``spare`` enters from the third pass on."""

    passes = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.passes += 1
        h = torch.tanh(self.first(x))
        late = self.spare(h) if self.passes > 2 else 0
        return self.last(h) + late


class Routed(Unused):
    """``spare`` enters only in a share that holds a sample with a large first element."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = torch.tanh(self.first(x))
        chosen = x[:, 0] > 0.9
        outputs = self.last(h)
        if chosen.any():
            outputs = outputs + self.spare(h) * chosen[:, None]
        return outputs


class UsedLaterInPart(nn.Module):
    """A table that enters from the third pass on, and then with its first rows only: most of its slices stay zero."""

    passes = 0

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(INPUTS, CLASSES)
        self.table = nn.Embedding(100, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.passes += 1
        outputs = self.first(x)
        return outputs + self.table((x[:, 0] > 0).long()) if self.passes > 2 else outputs


class RoutedTable(UsedLaterInPart):
    """A table of which only one share's samples take rows, and few: it is in use, also where slices stay zero."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        chosen, outputs = x[:, 0] > 0.9, self.first(x)
        return outputs + self.table(chosen.long()) * chosen[:, None] if chosen.any() else outputs


class Mixed(nn.Module):
    """The first layer in float32, the second in float64."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(INPUTS, 24)
        self.last = nn.Linear(24, CLASSES, dtype=torch.float64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(torch.tanh(self.first(x.float())).double())


class Convolution(nn.Module):
    """Convolutions whose weights lie in channels-last memory."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3)
        self.last = nn.Linear(8 * 4, CLASSES)
        self.to(memory_format=torch.channels_last)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        image = x.repeat(1, 4)[:, :48].view(-1, 3, 4, 4).contiguous(memory_format=torch.channels_last)
        return self.last(torch.tanh(self.first(image)).flatten(1))


class Normed(nn.Module):
    """BatchNorm straight on the inputs, so that its statistics depend on the data alone; and an integer buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(INPUTS, momentum=0.25)
        self.last = nn.Linear(INPUTS, CLASSES)
        self.last.register_buffer("passes", torch.zeros((), dtype=torch.int32))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.last.passes += 1
        return self.last(self.norm(x))


class OwnLoss(nn.Module):
    """Inputs are a dict; the model returns its own loss inside an object, as transformers do."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(INPUTS, CLASSES)

    def forward(self, inputs: dict[str, torch.Tensor], target: torch.Tensor) -> Any:
        return SimpleNamespace(loss=F.cross_entropy(self.last(inputs["x"] * inputs["scale"]), target))


MODELS: dict[str, Any] = {
    "mlp": mlp,
    "regression": regression,
    "tied": Tied,
    "frozen": frozen,
    "unused": Unused,
    "used_later": UsedLater,
    "routed": Routed,
    "used_later_in_part": UsedLaterInPart,
    "routed_table": RoutedTable,
    "mixed": Mixed,
    "conv": Convolution,
    "norm": Normed,
    "own_loss": OwnLoss,
}

# -- losses ------------------------------------------------------------------------------------------------------------


def tokens(outputs: torch.Tensor, target: torch.Tensor) -> Any:
    """A mean over the rows that are kept: class 0 counts for nothing."""
    kept = target != 0
    return F.cross_entropy(outputs[kept], target[kept], reduction="sum"), kept.sum()


def weighted(outputs: torch.Tensor, target: torch.Tensor) -> Any:
    """A weighted mean whose weights add up to less than one per share."""
    weights = (1 + target.double()) / 50
    return (F.cross_entropy(outputs, target, reduction="none") * weights).sum(), weights.sum()


LOSSES: dict[str, Any] = {
    "mean": CrossEntropy(),
    "tokens": tokens,
    "weighted": weighted,
    "sum": SquaredError(),
    "sum_l2": SquaredError(l2=0.03),
    "own": None,
}

# -- optimizers --------------------------------------------------------------------------------------------------------


def optimizer(name: str, model: nn.Module) -> torch.optim.Optimizer:
    parameters = list(model.parameters())
    if name == "sgd":
        return torch.optim.SGD(parameters, lr=0.1)
    if name == "decay":
        return torch.optim.SGD(parameters, lr=0.1, weight_decay=0.05)
    if name == "small_sgd":  # for losses that are sums
        return torch.optim.SGD(parameters, lr=0.01)
    if name == "nesterov":  # two groups
        groups = [{"params": parameters[::2]}, {"params": parameters[1::2], "lr": 0.02, "weight_decay": 0.1}]
        return torch.optim.SGD(groups, lr=0.05, momentum=0.9, nesterov=True)
    if name == "momentum":
        return torch.optim.SGD(parameters, lr=0.05, momentum=0.9, dampening=0.3, weight_decay=0.05)
    if name == "adam":
        return torch.optim.Adam(parameters, lr=1e-2)
    if name == "adamw":
        return torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.1)
    if name == "adagrad":
        return torch.optim.Adagrad(parameters, lr=1e-2, initial_accumulator_value=0.1)
    if name == "rmsprop":
        return torch.optim.RMSprop(parameters, lr=1e-3, momentum=0.5, centered=True)
    if name == "lbfgs":
        return torch.optim.LBFGS(parameters, lr=0.1, max_iter=1)
    raise KeyError(name)


STATELESS = ("sgd", "decay", "small_sgd")

# -- a problem ---------------------------------------------------------------------------------------------------------


def batches(spec: dict[str, Any]) -> list[tuple[Any, torch.Tensor]]:
    generator = torch.Generator().manual_seed(11)
    dtype = torch.float32 if spec["dtype"] == "float32" else torch.float64
    result = []
    for n in spec["batches"]:
        x = torch.randn(n, INPUTS, generator=generator, dtype=torch.float64).to(dtype)
        if spec["model"] == "regression":
            target = torch.randn(n, CLASSES, generator=generator, dtype=torch.float64).to(dtype)
        else:
            target = torch.randint(0, CLASSES, (n,), generator=generator)
            target[: n // 3] = 0  # the first ranks keep fewer rows, or none
        inputs = (
            {"x": x, "scale": torch.linspace(0.5, 1.5, n, dtype=dtype)[:, None]} if spec["model"] == "own_loss" else x
        )
        result.append((inputs, target))
    return result


def build(spec: dict[str, Any]) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = MODELS[spec["model"]]()
    if spec["dtype"] == "float64":
        model.double()
    generator = torch.Generator().manual_seed(5)  # ranks that are threads share torch's global one
    with torch.no_grad():
        for p in model.parameters():
            p.copy_((torch.rand(p.shape, generator=generator, dtype=torch.float64) - 0.5) * 0.6)
    return model.train(), optimizer(spec["optimizer"], model)


def problem(
    model: str = "mlp",
    optimizer: str = "sgd",
    loss: str = "mean",
    *,
    dtype: str = "float64",
    batches: tuple[int, ...] = BATCHES,
    shares: str = "even",
    micro_batches: int = 1,
    clip: float | None = None,
    schedule: bool = False,
    precision: str = "float32",
    delays: int | None = None,
    poison: tuple[int, int] | None = None,
    buffers: str = "average",
) -> dict[str, Any]:
    return locals()


def cut(n: int, size: int, how: str) -> list[tuple[int, int]]:
    """Shares of n samples: ``even`` differ by one, ``uneven`` halve from rank to rank, the last ones may be empty."""
    if how == "uneven":
        bounds = [n - n // 2**r for r in range(size)] + [n]
    else:
        bounds = [r * n // size for r in range(size + 1)]
    return list(itertools.pairwise(bounds))


def rows(tree: Any, lo: int, hi: int) -> Any:
    return {k: v[lo:hi] for k, v in tree.items()} if isinstance(tree, dict) else tree[lo:hi]


def vector(tensors: Any) -> torch.Tensor:
    """All values end to end; float64 holds every float32 and small integer exactly."""
    return torch.cat([t.detach().double().reshape(-1) for t in tensors])


# -- plain torch -------------------------------------------------------------------------------------------------------


def plain(spec: dict[str, Any]) -> dict[str, Any]:
    """The joined batches in one process, by torch alone."""
    model, opt = build(spec)
    scheduler = torch.optim.lr_scheduler.StepLR(opt, 2, 0.5) if spec["schedule"] else None
    loss_function = LOSSES[spec["loss"]]
    parameters, losses = [], []
    for inputs, target in batches(spec):
        # A parameter that has had a gradient once goes on with zero where a step does not reach it: see
        # `manyhands.partition.update`. One that never had is left alone, None as it is.
        opt.zero_grad(set_to_none=False)
        if loss_function is None:
            loss = model(inputs, target).loss
        else:
            result = loss_function(model(inputs), target)
            loss = result if isinstance(result, torch.Tensor) else result[0] / (1 if result[1] is None else result[1])
        loss.backward()
        if spec["clip"] is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), spec["clip"])
        for p in model.parameters():
            if p.grad is not None and getattr(loss_function, "l2", 0):
                p.grad.add_(p.detach(), alpha=loss_function.l2)
        opt.step(lambda value=loss: value) if spec["optimizer"] == "lbfgs" else opt.step()
        if scheduler is not None:
            scheduler.step()
        parameters.append(vector(model.parameters()))
        losses.append(loss.item())
    return {"parameters": parameters, "losses": losses, "buffers": [b.clone() for b in model.buffers()]}


# -- a strategy on ranks -----------------------------------------------------------------------------------------------


def train(comm: Communicator, strategy_text: str, spec: dict[str, Any]) -> dict[str, Any]:
    """Every batch once under the strategy; what this rank saw after every step."""
    comm.mesh = Mesh(data=comm.size)
    strategy = strategy_from(strategy_text)
    model, opt = build(spec)
    if comm.rank:  # rank 0's values count
        with torch.no_grad():
            for p in model.parameters():
                p.add_(comm.rank)
    scheduler = torch.optim.lr_scheduler.StepLR(opt, 2, 0.5) if spec["schedule"] else None
    replica = DataReplica(
        model,
        opt,
        LOSSES[spec["loss"]],
        comm,
        common=strategy.parameters == "common",
        micro_batches=spec["micro_batches"],
        clip=spec["clip"],
        precision=spec["precision"],
        shares=1 if strategy.whole_batch else comm.size,
        sparse=strategy.sparse,
    )
    with comm.counting("control"):
        worker = strategy.start(replica, comm)
    if spec["delays"] is not None:
        slow_down(replica, spec["delays"], comm.rank)
    result: dict[str, Any] = {
        "parameters": [vector(model.parameters())],
        "losses": [],
        "sent_B": [],
        "messages": [],
        "traffic": [],
        "raised": None,
    }
    comm.barrier()  # who shares parameters without locks would see the first steps of the others in his first look
    for step, (inputs, target) in enumerate(batches(spec)):
        comm.step = step
        lo, hi = (0, len(target)) if strategy.whole_batch else cut(len(target), comm.size, spec["shares"])[comm.rank]
        own = rows(inputs, lo, hi)
        if spec["poison"] == (comm.rank, step):
            own = own * math.nan
        sent_B, messages = comm.counters.sent_B("step"), comm.counters.messages("step")
        try:
            loss = worker.step(Batch(own, target[lo:hi], hi - lo, len(target)))
            if step == len(spec["batches"]) - 1:
                worker.meet()
        except NonFiniteLoss as e:
            comm.barrier()  # nobody writes any more
            result["raised"] = [e.step, str(e)]
            result["parameters"].append(vector(model.parameters()))
            break
        if scheduler is not None:
            # torch warns when a schedule moves before optimizer.step(), which slices do on clones
            opt._opt_called = True
            scheduler.step()
        result["sent_B"].append(comm.counters.sent_B("step") - sent_B)
        result["messages"].append(comm.counters.messages("step") - messages)
        result["losses"].append(float(loss))
        result["parameters"].append(vector(model.parameters()))
    consensus = worker.consensus()
    result["consensus"] = vector(consensus)
    worker.finish()
    result["final"] = vector(p.flat for p in replica.pieces)
    result["traffic"] = [
        [[t.sent_B_in(1, after=step), t.messages_in(1, after=step)] for step in range(len(result["sent_B"]))]
        for t in (strategy.traffic_of(p.shapes, comm.size, p.flat.element_size()) for p in replica.pieces)
    ]
    result["buffers"] = [b.clone() for b in model.buffers()]
    result["agreed"] = buffer_policy.agree(replica.buffers, comm, spec["buffers"])
    result["strides"] = [[list(p.stride()), list(p.grad.stride())] for p in model.parameters() if p.grad is not None]
    result["tied"] = len({p.data_ptr() for p in model.parameters()})
    result["state"] = sum(s.values.numel() for s in replica.optimizer_state() if s.lo >= 0)
    comm.barrier()  # nobody starts on common memory again while a peer still reads it
    return result


def slow_down(replica: DataReplica, seed: int, rank: int) -> None:
    """Workers dawdle at random before, within and after their passes and updates."""
    generator = torch.Generator().manual_seed(1000 * seed + rank)

    def dawdle() -> None:
        if torch.rand((), generator=generator) < 0.5:
            time.sleep(float(torch.rand((), generator=generator)) * 0.004)

    def slow(function: Any) -> Any:
        def slowed(*args: Any, **kwargs: Any) -> Any:
            dawdle()
            try:
                return function(*args, **kwargs)
            finally:
                dawdle()

        return slowed

    replica.gradients = slow(replica.gradients)  # type: ignore[method-assign]
    replica.apply = slow(replica.apply)  # type: ignore[method-assign]
    replica.model.register_forward_hook(lambda *_: dawdle())


# -- deliberately naive versions of the approximate strategies ---------------------------------------------------------


def naive_replicas(spec: dict[str, Any], size: int) -> list[tuple[nn.Module, torch.optim.Optimizer]]:
    return [build(spec) for _ in range(size)]


def gradients_of_share(model: nn.Module, inputs: Any, target: torch.Tensor, spec: dict[str, Any]) -> None:
    model.zero_grad(set_to_none=False)
    if len(target):
        LOSSES[spec["loss"]](model(inputs), target).backward()


def naive_parameter_average(spec: dict[str, Any], size: int) -> list[torch.Tensor]:
    """P models, each with its own optimizer, averaged by samples after every step."""
    replicas, result = naive_replicas(spec, size), []
    for inputs, target in batches(spec):
        n = len(target)
        shares = cut(n, size, spec["shares"])
        for (model, opt), (lo, hi) in zip(replicas, shares, strict=True):
            if lo < hi:
                gradients_of_share(model, rows(inputs, lo, hi), target[lo:hi], spec)
                opt.step()
        with torch.no_grad():
            for same in zip(*(model.parameters() for model, _ in replicas), strict=True):
                mean = sum(p * ((hi - lo) / n) for p, (lo, hi) in zip(same, shares, strict=True))
                for p in same:
                    p.copy_(mean)
        result.append(vector(replicas[0][0].parameters()))
    return result


def naive_own_slices(spec: dict[str, Any], size: int, slices: list[tuple[int, int]]) -> list[torch.Tensor]:
    """P models that each step on their own share; then everybody takes slice p from model p."""
    replicas, result = naive_replicas(spec, size), []
    for inputs, target in batches(spec):
        shares = cut(len(target), size, spec["shares"])
        before = vector(replicas[0][0].parameters())
        after = before.clone()
        for (model, opt), (lo, hi), (first, last) in zip(replicas, shares, slices, strict=True):
            if lo < hi:
                gradients_of_share(model, rows(inputs, lo, hi), target[lo:hi], spec)
                opt.step()
                after[first:last] = vector(model.parameters())[first:last]
        with torch.no_grad():
            for model, _ in replicas:
                nn.utils.vector_to_parameters(after.clone(), model.parameters())
        result.append(after)
    return result


@contextlib.contextmanager
def one_thread() -> Any:
    """Plain torch as the workers run it: sums over several threads round otherwise."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
