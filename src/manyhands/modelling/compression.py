"""Which compressor pays, for ``compress=auto``: the time of one exchange under each, and whether any beats a dense one.

    T(C) = coding(C) + Σ link(operation, bytes)      over the operations of C's exchange

The exchange is that of the plan's strategy. Where workers meet in a mean it is what C's mean asks for, against an
all-reduce of 4n bytes. Where a server or a neighbour gets each payload by itself it is what the strategy's own code
asks for in a few steps without numbers (`simulation.sizes`): payloads to every neighbour, or a push and a dense pull.
coding is measured here (`simulation.coding`): exchanges or payloads of the model's own shapes that move nothing, for a
quarter of a second over all candidates. link is what a cluster's prices say or, on this machine, what workers of the
transport have measured: a `probe` of collectives, or the strategy's own messages at their sizes (`exchanges`).

Candidates are schemes that need no threshold and no learning rate of their own, at their defaults. An approximation has
to earn something: one that saves less than `WORTH` of the exchange is not taken. Beside an optimizer that scales steps
by past gradients, schemes with feedback that leave most of a gradient for later are left out (`spiky`).

Approximation: all is taken to be exchanged after backward; where buckets go on beside it (gloo), dense is a little
better than told. Nobody waits for others at a server.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import time
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from manyhands.cluster import Cluster, load
from manyhands.cluster.measured import Curve
from manyhands.communication.communicator import ASIDE, Communicator
from manyhands.communication.compression.compressor import Compressor, compressor_from
from manyhands.communication.compression.layout import Layout, Shape
from manyhands.communication.transports.events import Operation
from manyhands.contract import Strategy
from manyhands.errors import BadInput
from manyhands.modelling import exchanges
from manyhands.models import optimizers
from manyhands.plan import Resolved
from manyhands.simulation import sizes
from manyhands.simulation.coding import Coding, exchange_s, payload_s
from manyhands.simulation.outcome import Outcome
from manyhands.simulation.pace import StepCost
from manyhands.simulation.prices import Prices
from manyhands.simulation.replica import Sizes
from manyhands.simulation.stragglers import Delays
from manyhands.task import Task
from manyhands.training.member import Member
from manyhands.training.team import team

AUTO = "auto"
CANDIDATES = ("bfloat16", "int8", "one_bit", "qsgd", "top_k", "powersgd")
#: Of a dense exchange, that a compressed one has to save.
WORTH = 0.25
#: Seconds in all that candidates are measured for.
BUDGET_S = 0.25
#: A probe begins with so many bytes, goes on to eight times as many until an operation takes so long or the model's
#: size is passed (a line goes on from there), and takes the quickest of so many times.
SMALLEST_B, LONG_S, REPEATS = 1 << 10, 0.01, 5
#: Steps of a strategy whose workers do not meet, and of how many of them: neighbours and servers are as many anyway.
STEPS, WORKERS = 12, 64
#: A contraction under this leaves more for later than it sends.
MOST_LEFT = 0.5
JOB = "manyhands.modelling.compression:probe"

#: Seconds of an operation.
Price = Callable[[Operation], float]


@dataclass(frozen=True)
class Option:
    """One exchange under one scheme; ``route``: how its payloads get to whom."""

    compress: str
    coding_s: float
    link_s: float
    sent_B: int
    route: str

    @property
    def seconds(self) -> float:
        """All of it."""
        return self.coding_s + self.link_s


@dataclass(frozen=True)
class Choice:
    """What to take, and why; ``options`` with the quickest first."""

    compress: str
    note: str
    dense: Option
    options: tuple[Option, ...]


def choose(
    shapes: Sequence[Shape],
    size: int,
    price: Price,
    where: str,
    among: Sequence[str] = CANDIDATES,
    *,
    strategy: Strategy | None = None,
    adaptive: str = "",
) -> Choice:
    """For a model of tensors of these ``shapes`` on ``size`` workers; ``where`` names the link in the note.

    ``strategy``: whose exchange it is, a mean if None. ``adaptive``: the optimizer that gets what was compressed, if it
    scales steps by past gradients.
    """
    layout = Layout(shapes)
    option: Callable[[Compressor, float], Option]
    alone: str = getattr(strategy, "alone", "")
    if strategy is not None and alone and size > 1:
        option = functools.partial(_of_parcels, strategy, layout, size, price)
    else:
        option = functools.partial(_of_a_mean, layout, size, price)
    dense = option(compressor_from("none"), 0.0)
    if size == 1:
        return Choice("none", "compress=auto takes none: a worker that is alone sends nothing", dense, ())
    made = [compressor_from(text) for text in among]
    left_out = [each for each in made if adaptive and spiky(each, layout.numel)]
    made = [each for each in made if each not in left_out]
    beside = _why_left_out(left_out, adaptive) if left_out else ""
    if not made:
        return Choice("none", f"compress=auto takes none: no scheme goes with this plan{beside}", dense, ())
    found = sorted((option(each, BUDGET_S / len(made)) for each in made), key=lambda option: option.seconds)
    best = found[0]
    if best.seconds > (1 - WORTH) * dense.seconds:
        return Choice("none", _why_none(best, dense, where) + beside, dense, tuple(found))
    return Choice(best.compress, _why(best, dense, found[1:2], where) + beside, dense, tuple(found))


def spiky(compressor: Compressor, numel: int) -> bool:
    """Whether most of a gradient may come steps later and at once: feedback, and a weak contraction.

    A mean square of such values is another one than of gradients, so Adam's steps have wrong sizes: 3 to 16 % more loss
    in docs/compression.md, where int8, whose feedback is of roundings, costs nothing.
    """
    return compressor.feedback and compressor.contraction(numel) < MOST_LEFT


def _of_a_mean(layout: Layout, size: int, price: Price, made: Compressor, budget_s: float) -> Option:
    """Whose operations all workers take part in."""
    everybody = tuple(range(size))
    rounds = made.rounds(layout, size, made.payload_B(layout))
    link_s = sum(price(Operation(name, n_B, size, everybody)) for name, n_B in rounds)
    cost = made.cost(layout, size)
    coding_s = exchange_s(made, layout, size, budget_s) if budget_s else 0.0
    return Option(str(made), coding_s, link_s, cost.sent_B, cost.route)


def _of_parcels(
    strategy: Strategy, layout: Layout, size: int, price: Price, made: Compressor, budget_s: float
) -> Option:
    """What a step of a strategy asks for on the average whose workers send each other, or a server, parcels."""
    coding = _Noted(*(payload_s(made, layout, budget_s) if budget_s else (0.0, 0.0)))
    workers = min(size, WORKERS)
    outcome = _run(strategy, layout, workers, price, made, coding)
    of_all, steps = workers * outcome.steps, outcome.steps
    clocks = outcome.clocks
    who = getattr(strategy, "alone", "").removeprefix("a ")
    return Option(str(made), coding.seconds_in_all / of_all, clocks.communicate_s / steps, clocks.sent_B // steps, who)


def _run(strategy: Strategy, layout: Layout, workers: int, price: Price, made: Compressor, coding: Coding) -> Outcome:
    ends = torch.tensor([math.prod(shape) for shape in layout.shapes]).cumsum(0).tolist()
    spans = tuple(zip([0, *ends[:-1]], ends, strict=True))
    what = sizes.Sized(
        dataclasses.replace(strategy, **{"compress": str(made)}),
        workers,
        [Sizes("all", 0, layout.numel, layout.dtype, spans, layout.shapes)],
        torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.0),
        workers * STEPS,
        workers,
        {"epochs": None, "steps": STEPS},
        StepCost(0.0, 0.0, 1.0, max(layout.numel, 1), coding=coding),
        Delays((), workers, 0),
        True,
    )
    return sizes.run(what, lambda: _Alone(price))


def messages(strategy: Strategy | None, shapes: Sequence[Shape], size: int, among: Sequence[str]) -> list[Operation]:
    """What a strategy whose workers do not meet asks of its transport, dense and under each scheme; else nothing."""
    if not getattr(strategy, "alone", ""):
        return []
    assert strategy is not None
    asked: dict[Operation, None] = {}

    def note(operation: Operation) -> float:
        asked[operation] = None
        return 0.0

    for text in ("none", *among):
        _run(strategy, Layout(shapes), min(size, WORKERS), note, compressor_from(text), Coding(0.0, 0.0))
    return list(asked)


class _Alone(Prices):
    """What a worker's own exchange takes; where it waits for others is not in it."""

    def __init__(self, price: Price) -> None:
        super().__init__(None, 1)
        self._price_of = price

    def __call__(self, operation: Operation) -> float:
        return self._price_of(operation) if self._begun and operation.purpose not in ASIDE else 0.0


@dataclass(frozen=True)
class _Noted(Coding):
    """Lets no time pass, and adds it up."""

    passed_s: list[float] = field(default_factory=list)

    def seconds(self, compressor: Compressor, numel: int, encoded: float, decoded: float) -> float:
        self.passed_s.append(super().seconds(compressor, numel, encoded, decoded))
        return 0.0

    @property
    def seconds_in_all(self) -> float:
        return sum(self.passed_s)


def _why_left_out(left_out: Sequence[Compressor], adaptive: str) -> str:
    names = ", ".join(map(str, left_out))
    return (
        f". Not beside {adaptive}: {names}; what their feedback sends late, and at once, its mean of past squares "
        "takes for large gradients, which costs accuracy (docs/compression.md). Ask for one by its name if you want it"
    )


def _why_none(best: Option, dense: Option, where: str) -> str:
    ratio = best.seconds / dense.seconds if dense.seconds else math.inf
    verdict = f"{ratio:.2g} times as long" if ratio > 1 else f"less than {WORTH:.0%} of it saved"
    return (
        f"compress=auto takes none: {where} an exchange takes {_said(dense.seconds)} dense and {_said(best.seconds)} "
        f"with {best.compress}, the best of the others, {_said(best.coding_s)} of it making and reading payloads: "
        f"{verdict}"
    )


def _why(best: Option, dense: Option, others: Sequence[Option], where: str) -> str:
    second = "".join(f"; {o.compress} {_said(o.seconds)}" for o in others)
    return (
        f"compress=auto takes {best.compress}: {where} an exchange takes {_said(dense.seconds)} dense and "
        f"{_said(best.seconds)} so, {_said(best.coding_s)} of it making and reading payloads{second}. A worker sends "
        f"{best.sent_B:,} bytes instead of {dense.sent_B:,} (payloads: {best.route})"
    )


def _said(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds >= 1 else f"{1e3 * seconds:.3g} ms"


# -- what links take ---------------------------------------------------------------------------------------------------


def priced(cluster: Cluster, workers: int, curves: Sequence[Curve] = ()) -> Prices:
    """By a cluster's links; by ``curves``, where there are some."""
    prices = Prices(cluster, workers, here=curves)
    prices.begin()
    return prices


def probed(transport: str, size: int, threads: int, n_B: int, timeout_s: float, asked: Sequence[Operation]) -> Price:
    """By what a transport of this machine takes, tried for a moment with ``size`` workers of it.

    ``asked``: operations that are to be tried at their sizes; of none, the collectives up to ``n_B``.
    """
    with team(transport, size, threads=threads, timeout_s=timeout_s) as crew:
        if asked:
            return priced(load("laptop"), size, exchanges.curves_here(crew, transport, size, asked, 0.0))
        return from_probe(crew.run(JOB, n_B)[0])


def from_probe(found: Mapping[str, Sequence[Sequence[float]]]) -> Price:
    """From what `probe` gives."""
    curves = {
        name: Curve(
            transport="",
            operation=name,
            ranks=2,
            sizes_B=tuple(int(n) for n, _ in points),
            seconds=tuple(s for _, s in points),
            spread=(0.0,) * len(points),
        )
        for name, points in found.items()
    }
    return lambda operation: curves[operation.name].at(operation.payload_B)


def tried(comm: Communicator, n_B: int, asked: Sequence[Operation]) -> Price:
    """As `probed`, by ranks that there are. Collective."""
    if asked:
        return priced(load("laptop"), comm.size, exchanges.curves_by(comm, asked, 0.0))
    return from_probe(measured(comm, n_B))


def probe(member: Member, n_B: int) -> dict[str, list[list[float]]]:
    """What the collectives that compressors use take, by size; a job of all workers, who agree on the slowest."""
    return measured(member.comm, n_B)


def measured(comm: Communicator, n_B: int) -> dict[str, list[list[float]]]:
    """See `probe`. Collective."""
    calls: dict[str, Callable[[Tensor], Any]] = {
        "all_reduce": lambda x: comm.all_reduce(x).wait(),
        "all_gather": lambda x: comm.all_gather(x).wait(),
        "all_to_all": comm.all_to_all,
    }
    found: dict[str, list[list[float]]] = {name: [] for name in calls}
    size_B, longest_s = SMALLEST_B, 0.0
    while longest_s < LONG_S:
        x = torch.zeros(-(-size_B // (4 * comm.size)) * comm.size)
        for name, call in calls.items():
            call(x)
            times = []
            for _ in range(REPEATS):
                began = time.perf_counter()
                call(x)
                times.append(time.perf_counter() - began)
            found[name].append([float(x.nbytes), _slowest(comm, min(times))])
        longest_s = max(points[-1][1] for points in found.values())
        if size_B >= n_B:
            break
        size_B *= 8
    return found


def _slowest(comm: Communicator, mine: float) -> float:
    everybodys = torch.zeros(comm.size, dtype=torch.float64)
    everybodys[comm.rank] = mine
    with comm.counting("control"):
        comm.all_gather(everybodys, [(p, p + 1) for p in range(comm.size)]).wait()
    return float(everybodys.max())


# -- plans -------------------------------------------------------------------------------------------------------------


def shapes_of(model: nn.Module) -> list[Shape]:
    """Of what is learned."""
    return [tuple(p.shape) for p in model.parameters() if p.requires_grad]


def adaptive(task: Task, strategy: Strategy | None) -> str:
    """The optimizer that gets gradients as they were compressed, if it scales steps by past ones; else nothing."""
    if getattr(strategy, "moves", ""):
        return ""
    text = getattr(strategy, "server", "") or task.optimizer
    trial = optimizers.trial(text)
    return type(trial).__name__ if optimizers.is_adaptive(trial) else ""


def allowed(resolve: Callable[[str], Resolved]) -> list[str]:
    """The candidates that go with a plan; ``resolve`` decides it with one of them."""
    found = []
    for compress in CANDIDATES:
        try:
            resolve(compress)
        except BadInput:
            continue
        found.append(compress)
    return found


def kept(folder: Path) -> str | None:
    """What the run in ``folder`` compresses by, None where there is none: a resume goes on as it began."""
    try:
        table = tomllib.loads((folder / "plan.toml").read_text(encoding="utf-8"))["plan"]
    except (OSError, ValueError, KeyError):
        return None
    found = table.get("compress", "none")
    return found if isinstance(found, str) else None


def with_note(found: Resolved, note: str) -> Resolved:
    """The same, with one note more."""
    return dataclasses.replace(found, notes=(*found.notes, note))
