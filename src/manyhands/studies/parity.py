"""Parity: is training with many workers under each strategy what one process does, on this machine?

A small float64 model learns from batches that no number of workers divides evenly: once by torch alone (`plain`), and
once by every worker through the strategy. Three promises of the contract are then looked at:

    exact       parameters equal the plain ones to 1e-12; with one worker bit for bit
    identical   all replicas hold the same bits, where the strategy says so
    bytes       what was counted is what `Strategy.traffic` declares

A strategy that promises only an approximation shows how far off it is, and passes.
"""

from __future__ import annotations

import dataclasses
import itertools
import typing
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from manyhands import verbs
from manyhands.checks import is_whole
from manyhands.communication.communicator import Communicator
from manyhands.communication.topology import shares
from manyhands.communication.transports import transports as known_transports
from manyhands.consistency import strategies as known_strategies
from manyhands.consistency.parameter_server.server import serving
from manyhands.contract import Batch, Setting, Strategy
from manyhands.errors import BadInput, ManyhandsError, UnknownName
from manyhands.models import optimizers
from manyhands.models.update_rules import served
from manyhands.partition.data import DataReplica
from manyhands.plan import SERVERS_IN_MEMORY, SHARE_MEMORY, Plan, strategy_from
from manyhands.task import Task
from manyhands.training import environment
from manyhands.training.member import Member
from manyhands.training.team import team

STEPS, BATCH = 6, 13
#: Float64 rounds at 1e-16, and six steps of sums in another order add up to far less than this.
TOLERANCE = 1e-12
#: A job of milliseconds; more means that something hangs.
DEADLINE_S = 60.0


@dataclass(frozen=True)
class Row:
    """What one strategy did on one transport."""

    strategy: str
    transport: str
    workers: int
    promise: str = ""  # "exact", "approximate", "refused here" or, where nothing ran, ""
    difference: float = 0.0  # the largest of any parameter on any rank
    identical: bool | None = None  # None: not promised
    counted_B: float = 0.0  # per step, rank 0
    declared_B: float = 0.0
    sends_at_most: bool = False  # what is declared is a bound
    problem: str = ""

    @property
    def passed(self) -> bool:
        """Whether every promise was kept."""
        return not self.problem


@dataclass(frozen=True)
class Verdict:
    """All rows, and whether everything passed."""

    optimizer: str
    rows: tuple[Row, ...]

    @property
    def passed(self) -> bool:
        """Whether every row passed."""
        return bool(self.rows) and all(r.passed for r in self.rows)

    def as_dict(self) -> dict[str, Any]:
        """Plain values only."""
        rows = [{**dataclasses.asdict(r), "passed": r.passed} for r in self.rows]
        return {"passed": self.passed, "optimizer": self.optimizer, "tolerance": TOLERANCE, "rows": rows}

    def lines(self) -> list[str]:
        """A table."""
        width = max((len(r.strategy) for r in self.rows), default=8)
        said = [
            f"{STEPS} steps of {self.optimizer} on batches of {BATCH} in float64, against plain torch:",
            "",
            f"{'strategy':<{width}}  {'transport':<9}  {'workers':>7}  {'promise':<12}  {'difference':>10}  replicas   "
            "bytes a step  result",
        ]
        for r in self.rows:
            same = {True: "identical", False: "DIFFER", None: "-"}[r.identical]
            said.append(
                f"{r.strategy:<{width}}  {r.transport:<9}  {r.workers:>7}  {r.promise or '-':<12}  {_figure(r):>10}  "
                f"{same:<9}  {r.counted_B:>12,.0f}  {'ok' if r.passed else 'FAILED: ' + r.problem}"
            )
        failed = sum(not r.passed for r in self.rows)
        said += [
            "",
            f"{failed} of {len(self.rows)} failed." if failed else f"All {len(self.rows)} kept their promises.",
        ]
        return said


def verify(
    *,
    workers: int | None = None,
    transports: Sequence[str] | None = None,
    strategies: Sequence[str] | None = None,
    optimizer: str = "sgd(lr=0.1)",
) -> Verdict | None:
    """Check ``strategies`` (text; default: all, in every variant) on ``transports``; None on ranks other than 0.

    Under torchrun, mpirun or srun the ranks they started are the workers.
    """
    texts = [str(strategy_from(s)) for s in strategies] if strategies else [str(s) for s in variants()]
    optimizers.trial(optimizer)
    if workers is not None and not is_whole(workers, 1):
        raise BadInput(f"workers={workers}: it is a whole number from 1, e.g. --workers 2.")
    if environment.launched() is not None:
        wanted = (transports or ["auto"])[0]
        return _joined(verbs.resolved(Task(), Plan(transport=wanted, workers=workers)).plan, texts, optimizer)
    for name in transports or ():
        if name not in known_transports:
            raise UnknownName("transport", name, known_transports)
    rows: list[Row] = []
    for name in transports or at_hand():
        rows += _on(name, 1 if name == "single" else workers or 3, texts, optimizer)
    return Verdict(optimizer, tuple(rows))


def at_hand() -> list[str]:
    """The transports that need nothing but this machine's processors."""
    shared = ["shared"] if environment.shared_memory_works() else []
    gloo = ["gloo"] if torch.distributed.is_available() and torch.distributed.is_gloo_available() else []
    return ["single", "threads", *shared, *gloo]


def variants(names: Iterable[str] = known_strategies) -> Iterator[Strategy]:
    """Strategies of the catalogue with every combination of their options that are a choice of words."""
    for name in names:
        cls = known_strategies.load(name)
        hints = typing.get_type_hints(cls)
        choices = {
            f.name: [v for v in typing.get_args(hints[f.name]) if v != "auto"]
            for f in dataclasses.fields(cls)
            if typing.get_origin(hints[f.name]) is Literal
        }
        for values in itertools.product(*choices.values()):
            yield cls(**dict(zip(choices, values, strict=True)))


def _on(transport: str, workers: int, texts: Sequence[str], optimizer: str) -> list[Row]:
    try:
        apart = [strategy_from(t).server_ranks(in_memory=transport in SERVERS_IN_MEMORY) for t in texts]
        servers = max(apart, default=0)
        with team(transport, workers + servers, threads=1, timeout_s=DEADLINE_S / 2, allocator="plain") as crew:
            found = crew.run(f"{__name__}:job", list(texts), optimizer, servers, deadline_s=DEADLINE_S)[0]
    except BadInput:
        raise
    except ManyhandsError as e:  # a transport that does not work is a finding, and the next one is still looked at
        return [Row("all of them", transport, workers, problem=str(e))]
    return [Row(**r) for r in found]


def _joined(plan: Plan, texts: Sequence[str], optimizer: str) -> Verdict | None:
    if plan.transport == "single":
        return Verdict(optimizer, tuple(_on("single", 1, texts, optimizer)))
    comm = verbs.join_launcher(plan)
    try:
        rows = [check(comm, strategy_from(text), optimizer) for text in texts]
    except BaseException:
        comm.fail()
        raise
    finally:
        comm.close()
    return Verdict(optimizer, tuple(rows)) if comm.rank == 0 else None


def job(member: Member, texts: list[str], optimizer: str, servers: int) -> list[dict[str, Any]]:
    """What every worker does: all strategies, one after the other."""
    with serving(member.comm, servers) as comm:
        if comm is None:
            return []
        return [dataclasses.asdict(check(comm, strategy_from(text), optimizer)) for text in texts]


def check(comm: Communicator, strategy: Strategy, optimizer: str) -> Row:
    """One strategy against `plain`. Collective; every rank gets the row, the bytes being its own."""
    trial = optimizers.trial(optimizer)
    setting = Setting(
        workers=comm.size,
        transport=comm.transport,
        shares_memory=comm.transport in SHARE_MEMORY,
        elementwise=optimizers.is_elementwise(trial),
        stateless=optimizers.is_stateless(trial),
        served=served(trial),
        one_sided=comm.one_sided,
    )
    row = Row(str(strategy), comm.transport, comm.size)
    apart = strategy.server_ranks(in_memory=setting.servers_in_memory)
    if strategy.problems(setting) or (apart and comm.servers is None):  # `train` refuses it, too, and says why
        return dataclasses.replace(row, promise="refused here")
    decided = strategy.resolve(setting)
    model = small_model()
    replica = DataReplica(
        model,
        optimizers.build(optimizer, model.parameters()),
        F.cross_entropy,
        comm,
        common=decided.parameters == "common",
    )
    with comm.counting("control"):
        worker = decided.start(replica, comm)
    before_B = comm.counters.sent_B("step")
    inputs, target = samples()
    for step, batch in enumerate(batches()):
        comm.step = step
        lo, hi = (0, BATCH) if decided.whole_batch else shares(BATCH, comm.size)[comm.rank]
        mine = slice(batch.start + lo, batch.start + hi)
        worker.step(Batch(inputs[mine], target[mine], hi - lo, BATCH))
    counted_B = (comm.counters.sent_B("step") - before_B) / STEPS
    declared = [
        decided.traffic_of(p.shapes, comm.over(p.replicated_over).size, p.flat.element_size()) for p in replica.pieces
    ]
    declared_B = sum(traffic.sent_B_in(STEPS) for traffic in declared) / STEPS
    worker.meet()
    replicas = everybodys(model, comm)
    same = all(torch.equal(replicas[0], r) for r in replicas) if decided.identical else None
    with comm.counting("consensus"):
        worker.finish()
    exact = decided.exact(setting)
    difference = float((everybodys(model, comm) - flat(plain(optimizer))).abs().max())
    comm.step = None
    row = dataclasses.replace(
        row,
        promise="exact" if exact else "approximate",
        difference=difference,
        identical=same,
        counted_B=counted_B,
        declared_B=declared_B,
        sends_at_most=decided.sends_at_most,
    )
    return dataclasses.replace(row, problem=_problem(row))


def _figure(row: Row) -> str:
    return f"{row.difference:.1e}" if row.promise in ("exact", "approximate") else "-"


def _problem(row: Row) -> str:
    found = []
    limit = TOLERANCE if row.workers > 1 else 0.0
    if row.promise == "exact" and not row.difference <= limit:  # not >: a NaN is a failure
        found.append(f"differs from one process by {row.difference:.1e}, {limit:.0e} is allowed")
    if row.identical is False:
        found.append("the workers' replicas differ")
    if row.counted_B > row.declared_B or (row.counted_B < row.declared_B and not row.sends_at_most):
        found.append(f"sent {row.counted_B:,.0f} B a step and declares {row.declared_B:,.0f}")
    return "; ".join(found)


def plain(optimizer: str) -> nn.Module:
    """The yardstick: what a user without this library writes."""
    inputs, target = samples()
    model = small_model()
    update = optimizers.build(optimizer, model.parameters())
    for batch in batches():

        def gradients(batch: slice = batch) -> float:
            update.zero_grad()
            loss = F.cross_entropy(model(inputs[batch]), target[batch])
            torch.autograd.backward(loss)
            return loss.item()

        update.step(gradients)
    return model


def small_model() -> nn.Module:
    """99 parameters, the same everywhere; torch's own generator, which threads share, is left alone."""
    model = nn.Sequential(nn.Linear(7, 9), nn.Tanh(), nn.Linear(9, 3, bias=False)).double()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=p.dtype) * 0.3)
    return model


def samples() -> tuple[Tensor, Tensor]:
    """Inputs and labels of all steps."""
    generator = torch.Generator().manual_seed(2)
    inputs = torch.randn(STEPS * BATCH, 7, generator=generator, dtype=torch.float64)
    return inputs, torch.randint(3, (STEPS * BATCH,), generator=generator)


def batches() -> list[slice]:
    """The joined batch of each step."""
    return [slice(i * BATCH, (i + 1) * BATCH) for i in range(STEPS)]


def flat(model: nn.Module) -> Tensor:
    """All parameters, end to end."""
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


def everybodys(model: nn.Module, comm: Communicator) -> Tensor:
    """The parameters of all ranks, a row each. Collective, counted as ``consensus``."""
    mine = flat(model)
    n = mine.numel()
    rows = torch.zeros(comm.size, n, dtype=mine.dtype)
    rows[comm.rank] = mine
    with comm.counting("consensus"):
        comm.all_gather(rows, [(p * n, (p + 1) * n) for p in range(comm.size)]).wait()
    return rows
