"""What the ranks of pipeline tests do; a file of its own because worker processes import it by name."""

import itertools

import torch
from torch import Tensor, nn

from manyhands.communication.communicator import Communicator
from manyhands.communication.topology import Mesh
from manyhands.contract import Batch
from manyhands.errors import BadInput, NonFiniteLoss
from manyhands.partition.pipeline import schedules
from manyhands.partition.pipeline.replica import keep_stages
from manyhands.partition.pipeline.runtime import Pipeline
from manyhands.partition.pipeline.schedule import Schedule, parse
from manyhands.partition.pipeline.stashing import StashingReplica
from manyhands.partition.pipeline.strategy import PipeDream, PipeDreamWorker

WIDTH = 6


class Pair(nn.Module):
    """Hands over a tuple: numbers that flow on, whole numbers without a gradient, and what it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor | tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        first, order, passed = x if isinstance(x, tuple) else (x, x.argsort(1), x)
        return torch.tanh(self.a(first)) + passed.gather(1, order), order.flip(1), self.b(passed) + first


class Single(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.c = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor | tuple[Tensor, Tensor, Tensor]) -> Tensor:
        first, order, passed = x if isinstance(x, tuple) else (x, x.argsort(1), x)
        return self.c(first) * passed + order


def tied() -> nn.Module:
    """One weight twice within a stage."""
    made = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH), nn.Tanh())
    made[2].weight = made[0].weight
    return made


def plain() -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH))


def overwriting() -> nn.Module:
    return nn.Sequential(nn.ReLU(inplace=True), nn.Linear(WIDTH, WIDTH))


def frozen() -> nn.Module:
    return plain().requires_grad_(False)


#: A model by what its stages are: the i-th of them, and how many there are in all.
MODELS = {
    "plain": lambda i, n: plain(),
    "pairs": lambda i, n: Single() if i == n - 1 else Pair(),
    "tied": lambda i, n: tied(),
    "overwriting": lambda i, n: overwriting(),
    "frozen first": lambda i, n: frozen() if i == 0 else plain(),
    "batchnorm": lambda i, n: nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH)),
    "dropout": lambda i, n: nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Dropout(0.5), nn.Tanh()),
}


def build(model: str, stages: int) -> list[nn.Module]:
    """The same everywhere; from a generator, since ranks that are threads share the global one."""
    generator = torch.Generator().manual_seed(stages)
    made = [MODELS[model](i, stages).double() for i in range(stages)]
    with torch.no_grad():
        for p in itertools.chain(*(m.parameters() for m in made)):
            p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64) / 2)
    return made


def batch(n: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(100 * n + seed)
    x, y = torch.randn(2, n, WIDTH, generator=generator, dtype=torch.float64)
    return x, y


def mean(outputs: Tensor, target: Tensor) -> Tensor:
    return nn.functional.mse_loss(outputs, target)


def counted(outputs: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Of the rows that count, which are more in some micro-batches."""
    kept = target[:, 0] > -0.7
    return (outputs - target)[kept].square().sum(), kept.sum()


def summed(outputs: Tensor, target: Tensor) -> tuple[Tensor, None]:
    return nn.functional.mse_loss(outputs, target, reduction="sum"), None


vars(summed)["reduction"] = "sum"
LOSSES = {"mean": mean, "counted": counted, "summed": summed}


def reference(
    model: str, stages: int, loss: str, n: int, seed: int, shares: int
) -> tuple[list[nn.Module], float, float]:
    """The whole model on the whole batch, in one process: gradients, loss and count."""
    made = build(model, stages)
    x, y = batch(n, seed)
    for m in made:
        x = m(x)
    result = LOSSES[loss](x, y)
    value, count = (result, n) if isinstance(result, Tensor) else result
    objective = value * shares if count is None else value / count if loss == "counted" else value
    objective.backward()
    return made, objective.item(), 1.0 if count is None else float(count)


def written_order(comm: Communicator, rows: str, samples: list[int]) -> list[int]:
    """The same as below, of a schedule written by hand."""
    return gradients_are_the_single_process(comm, parse(rows), 0, samples, {})


def gradients_are_the_single_process(
    comm: Communicator,
    schedule: str | Schedule,
    micro_batches: int,
    samples: list[int],
    options: dict,
) -> list[int]:
    """Over batches of these sizes; returns the most that was in flight, and payload bytes of the last batch."""
    model, loss = options.get("model", "plain"), options.get("loss", "mean")
    made = schedules.load(schedule)(comm.size, micro_batches) if isinstance(schedule, str) else schedule
    stages = {s: m for s, m in enumerate(build(model, made.stages)) if s in made.stages_of(comm.rank)}
    shares = options.get("shares", 1)
    is_last = made.stages - 1 in stages
    pipeline = Pipeline(
        stages, made, comm, LOSSES[loss] if is_last else None, recompute=options.get("recompute", False), shares=shares
    )
    sent = 0
    for seed, n in enumerate(samples):
        for m in stages.values():
            for p in m.parameters():
                p.grad = torch.zeros_like(p) if p.requires_grad and options.get("views", True) else None
        views = {p: p.grad for m in stages.values() for p in m.parameters()}
        x, y = batch(n, seed)
        before = comm.counters.sent_B()
        outcome = pipeline.run(x if comm.rank == 0 else None, y if is_last else None, n)
        sent = comm.counters.sent_B() - before
        if n == 0:
            assert outcome is None or (outcome.loss.item(), outcome.count, outcome.divisor) == (0.0, 0.0, 1.0)
            continue
        whole, value, count = reference(model, made.stages, loss, n, seed, shares)
        # Only the last stage knows by how much; a replica would tell the others.
        divisor = count if loss == "counted" else 1.0
        for s, m in stages.items():
            for ours, theirs in zip(m.parameters(), whole[s].parameters(), strict=True):
                if views[ours] is not None:
                    assert ours.grad is views[ours]
                if theirs.grad is not None:
                    torch.testing.assert_close(ours.grad / divisor, theirs.grad, rtol=1e-12, atol=1e-12)
                elif ours.grad is not None:
                    assert not ours.grad.any()
        assert (outcome is not None) == is_last
        if outcome is not None:
            assert outcome.count == count
            assert outcome.divisor == divisor
            assert abs(outcome.loss.item() - value) <= 1e-12 * max(1.0, abs(value))
            assert not outcome.loss.requires_grad
        times = pipeline.times
        assert 0 < times.compute_s <= times.batch_s
        assert times.wait_s >= 0
    return [pipeline.peak_in_flight, sent]


def two_ways(comm: Communicator, schedule: str, micro_batches: int, model: str) -> bool:
    """With recomputation and without, the same seed: gradients, loss and buffers are equal bit for bit."""
    found = []
    for recompute in (False, True):
        made = schedules.load(schedule)(comm.size, micro_batches)
        stages = {s: m for s, m in enumerate(build(model, made.stages)) if s in made.stages_of(comm.rank)}
        pipeline = Pipeline(stages, made, comm, mean, recompute=recompute)
        torch.manual_seed(comm.rank)
        results = []
        for seed in range(3):
            x, y = batch(7, seed)
            outcome = pipeline.run(x, y, 7)
            results += [] if outcome is None else [outcome.loss]
        results += [p.grad for m in stages.values() for p in m.parameters()]
        results += [b for m in stages.values() for b in m.buffers()]
        found.append([*results, torch.get_rng_state()])
    return len(found[0]) == len(found[1]) and all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def batchnorm_once(comm: Communicator, schedule: str) -> None:
    """Running statistics see each micro-batch once, and gradients are those of micro-batches one after the other."""
    made = schedules.load(schedule)(comm.size, 2)
    stages = {s: m for s, m in enumerate(build("batchnorm", made.stages)) if s in made.stages_of(comm.rank)}
    Pipeline(stages, made, comm, mean, recompute=True).run(*batch(8), 8)
    whole = build("batchnorm", made.stages)
    x, y = batch(8)
    for part, target in zip(x.chunk(2), y.chunk(2), strict=True):
        for m in whole:
            part = m(part)
        (mean(part, target) / 2).backward()
    for s, m in stages.items():
        for ours, theirs in zip(m.state_dict().values(), whole[s].state_dict().values(), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
        for ours, theirs in zip(m.parameters(), whole[s].parameters(), strict=True):
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-12, atol=1e-12)


class Elapsing(nn.Module):
    """Takes a second of virtual time forward and two backward."""

    def __init__(self, comm) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones((), dtype=torch.float64))
        self._comm = comm

    def forward(self, x: Tensor) -> Tensor:
        self._comm.elapse(1.0)
        y = x * self.weight
        y.register_hook(lambda _: self._comm.elapse(2.0))
        return y


def virtual_bubble(comm, schedule: str, micro_batches: int) -> list[float]:
    """How long a batch takes in virtual time, and how much of it this rank waited."""
    made = schedules.load(schedule)(comm.size, micro_batches)
    stages = {s: Elapsing(comm) for s in made.stages_of(comm.rank)}
    pipeline = Pipeline(stages, made, comm, mean)
    x, y = batch(4 * micro_batches)
    for _ in range(2):
        comm.barrier()
        start, waited = comm.now, comm.counters.wait_s
        pipeline.run(x, y, len(x))
        comm.barrier()
        took, waited = comm.now - start, comm.counters.wait_s - waited
    return [took, waited]


def refused(comm: Communicator, case: str, batches: int = 2) -> str:
    """The message that a wrong request gets; without batches a rank that is not refused waits for nobody."""
    made = schedules.load("gpipe")(comm.size, 2)
    stages: dict[int, nn.Module] = {comm.rank: plain().double()}
    loss = mean
    x, y = batch(4)
    if case == "schedule":
        made = parse("F0 B0 F1 B1 \n F1 F0 B0 B1")
    elif case == "ranks":
        made = schedules.load("gpipe")(comm.size + 1, 2)
    elif case == "stages":
        stages = {1 - comm.rank: plain()}
    elif case == "loss" and comm.rank == 1:
        loss = None
    elif case == "sum":
        loss = lambda outputs, target: (outputs.sum(), None)  # noqa: E731
    elif case == "handed over" and comm.rank == 0:
        stages[0].register_forward_hook(lambda m, args, out: {"out": out})
    elif case == "shape" and comm.rank == 0:
        once = iter([False, False, True])
        stages[0].register_forward_hook(lambda m, args, out: out[:, :3] if next(once) else out)
    elif case == "dtype" and comm.rank == 0:
        stages[0].register_forward_hook(lambda m, args, out: out.to(torch.float8_e5m2))
    try:
        pipeline = Pipeline(stages, made, comm, loss)
        for _ in range(batches):
            pipeline.run(x, y, 4)
    except BadInput as e:
        return str(e)
    return ""


class Failing(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        raise RuntimeError("this stage breaks")


def a_stage_breaks(comm: Communicator) -> None:
    made = schedules.load("one_f_one_b")(comm.size, 4)
    stage = Failing() if comm.rank == 1 else plain().double()
    Pipeline({comm.rank: stage}, made, comm, mean).run(*batch(8), 8)


def a_stage_does_not_come(comm: Communicator) -> str:
    made = schedules.load("one_f_one_b")(comm.size, 4)
    pipeline = Pipeline({comm.rank: plain().double()}, made, comm, mean)
    pipeline.run(*batch(8), 8)
    if comm.rank == 1:
        return ""
    comm.timeout_s = 0.3
    if hasattr(pipeline._handover._board, "_timeout_s"):
        pipeline._handover._board._timeout_s = 0.3
    try:
        pipeline.run(*batch(8), 8)
    except Exception as e:
        return f"{type(e).__name__}: {e}"
    return "nothing"


# -- PipeDream ---------------------------------------------------------------------------------------------------------

OPTIMIZERS = {
    "sgd": lambda params: torch.optim.SGD(params, lr=0.05),
    "momentum": lambda params: torch.optim.SGD(params, lr=0.05, momentum=0.9, weight_decay=0.01),
    "adam": lambda params: torch.optim.Adam(params, lr=0.01),
}


def pipedream(
    comm: Communicator, micro_batches: int, strategy: PipeDream, *, model="plain", opt="sgd", loss="mean", **options
) -> tuple[nn.Sequential, PipeDreamWorker]:
    """This rank's stage of as many as the mesh's pipeline axis is long."""
    group = comm.over(frozenset({"pipeline"}))
    whole = nn.Sequential(*build(model, group.size))
    stages = {group.rank: whole[group.rank]}
    keep_stages(whole, stages)
    order = schedules.load("pipedream")(group.size, micro_batches, in_flight=strategy.in_flight)
    optimizer = OPTIMIZERS[opt](whole.parameters())
    replica = StashingReplica(
        *(whole, optimizer, LOSSES[loss], comm),
        common=False,
        stages=stages,
        schedule=order,
        strategy=strategy,
        **options,
    )
    return whole, strategy.start(replica, comm)


def one_micro_batch(stages: list[nn.Module], weights: list[dict[str, Tensor]], batches: list, loss: str) -> list:
    """The gradients of all stages at these weights, of the joined micro-batch of all replicas; and the loss."""
    total, counts = 0.0, 0.0
    for x, y in batches:
        if not len(x):
            continue
        for m, w in zip(stages, weights, strict=True):
            x = torch.func.functional_call(m, w, (x,))
        result = LOSSES[loss](x, y)
        value, count = (result * len(y), len(y)) if isinstance(result, Tensor) else result
        total, counts = total + value, counts + (float(count) if count is not None else 0.0)
    objective = total / (counts or 1.0)
    flat = [t for w in weights for t in w.values()]
    return list(torch.autograd.grad(objective, flat)), objective.item()


def delayed_rule(
    model: str, p: int, m: int, delays: list[int], steps: list[int], replicas: int, opt: str, loss: str
) -> tuple[list[dict[str, Tensor]], list[float]]:
    """PipeDream's rule step by step in one process: every version of every stage is kept, and used when it is due."""
    stages = build(model, p)
    optimizers = [OPTIMIZERS[opt](s.parameters()) for s in stages]
    losses = []
    for seed, n in enumerate(steps):
        x, y = batch(n, seed)
        shares = [(r * n // replicas, (r + 1) * n // replicas) for r in range(replicas)]
        divided = [
            [(lo + i * (hi - lo) // m, lo + (i + 1) * (hi - lo) // m) for lo, hi in shares] for i in range(m)
        ]  # by micro-batch: what each replica has of it
        divided = [parts for parts in divided if any(lo < hi for lo, hi in parts)]
        history = [[{k: v.detach().clone() for k, v in s.named_parameters()}] for s in stages]
        found = []
        for i, parts in enumerate(divided):
            used = [
                {k: v.clone().requires_grad_() for k, v in of[max(0, i - d)].items()}
                for of, d in zip(history, delays, strict=True)
            ]
            gradients, value = one_micro_batch(stages, used, [(x[lo:hi], y[lo:hi]) for lo, hi in parts], loss)
            found.append(value)
            for stage, optimizer, of in zip(stages, optimizers, history, strict=True):
                for parameter in stage.parameters():
                    parameter.grad = gradients.pop(0)
                optimizer.step()
                of.append({k: v.detach().clone() for k, v in stage.named_parameters()})
        losses.append(found)
    return [dict(s.named_parameters()) for s in stages], losses


def pipedream_is_the_delayed_rule(comm: Communicator, m: int, steps: list[int], options: dict) -> list:
    """Parameters after these steps against the reference; what was logged; the versions that were kept at most."""
    replicas = options.get("replicas", 1)
    p = comm.size // replicas
    comm.mesh = Mesh(data=replicas, pipeline=p)
    said = {k: options[k] for k in ("in_flight", "vertical_sync") if k in options}
    how = {k: options[k] for k in ("model", "opt", "loss", "recompute") if k in options}
    whole, worker = pipedream(comm, m, PipeDream(**said), **how)
    at = comm.mesh.coordinates(comm.rank)
    stage, share = at.get("pipeline", 0), at.get("data", 0)
    d = options.get("in_flight") or p
    delays = [min(p - 1 if options.get("vertical_sync") else p - 1 - k, d - 1) for k in range(p)]
    wanted, losses = delayed_rule(
        options.get("model", "plain"),
        p,
        m,
        delays,
        steps,
        replicas,
        options.get("opt", "sgd"),
        options.get("loss", "mean"),
    )
    log, most = [], 0
    kept = worker.replica._stash._kept
    keep = worker.replica._stash.keep

    def counting() -> None:
        nonlocal most
        keep()
        most = max(most, len(kept))

    worker.replica._stash.keep = counting
    for seed, n in enumerate(steps):
        lo, hi = share * n // replicas, (share + 1) * n // replicas
        x, y = (t[lo:hi] for t in batch(n, seed))
        loss = worker.step(Batch(x, y, hi - lo, n))
        log.append([list(visit) for visit in worker.replica.log])
        if replicas == 1 and options.get("loss", "mean") == "mean" and n % m == 0:
            assert abs(float(loss) - sum(losses[seed]) / m) <= 1e-12
    for name, value in whole[stage].named_parameters():
        torch.testing.assert_close(value, wanted[stage][name], rtol=1e-12, atol=1e-12)
        assert value.data_ptr() >= worker.replica.pieces[0].flat.data_ptr()
    assert sum(worker.staleness.values()) == sum(map(len, log))
    assert not any(piece.grad.any() for piece in worker.replica.pieces)
    return [log, most]


def pipedream_not_finite(comm: Communicator, replicas: int) -> list[bool]:
    """One micro-batch of one replica has an infinite input: whether this rank stopped, and kept what it had."""
    comm.mesh = Mesh(data=replicas, pipeline=comm.size // replicas)
    whole, worker = pipedream(comm, 4, PipeDream(), opt="momentum")
    x, y = batch(8)
    if comm.rank < comm.size // replicas:
        x[3] = torch.inf
    try:
        worker.step(Batch(x, y, 8, 8 * replicas))
    except NonFiniteLoss:
        return [True, all(bool(p.isfinite().all()) for p in whole.parameters())]
    return [False, False]


def pipedream_resumed(comm: Communicator) -> float:
    """Two steps, and the second in a new worker: how far apart the parameters are."""
    comm.mesh = Mesh(pipeline=comm.size)
    whole, worker = pipedream(comm, 4, PipeDream(), opt="adam")
    worker.step(Batch(*batch(8, 0), 8))
    other, again = pipedream(comm, 4, PipeDream(), opt="adam")
    again.load_state_dict(worker.state_dict())
    again.replica.load_optimizer_state(worker.replica.optimizer_state())
    for mine, theirs in zip(again.replica.pieces, worker.replica.pieces, strict=True):
        mine.flat.copy_(theirs.flat)
    for each in (again, worker):  # what is loaded is read at the first update, before it goes on where it came from
        each.step(Batch(*batch(8, 1), 8))
    assert worker.replica.log == again.replica.log
    return max(float((a - b).detach().abs().max()) for a, b in zip(whole.parameters(), other.parameters(), strict=True))
