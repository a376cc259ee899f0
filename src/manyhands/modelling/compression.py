"""Which compressor pays, for ``compress=auto``: the time of one exchange under each, and whether any beats a dense one.

    T(C) = coding(C) + Σ link(operation, bytes)      over the operations of C's exchange
    dense: link(all_reduce, 4n)

coding is measured here (`coding.exchange_s`): exchanges of the model's own shapes that move nothing, for a quarter of
a second over all candidates. link is what a cluster's prices say or, on this machine, what a `probe` of the transport
has measured, as a line in the logarithms between its sizes.

Candidates are schemes that need no threshold and no learning rate of their own, at their defaults. An approximation has
to earn something: one that saves less than `WORTH` of the exchange is not taken.

Approximation: all is taken to be exchanged after backward; where buckets go on beside it (gloo), dense is a little
better than told. Strategies whose workers meet in another way than by a mean over all are judged by that mean.
"""

from __future__ import annotations

import dataclasses
import math
import time
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from manyhands.cluster import Cluster
from manyhands.cluster.measured import Curve
from manyhands.communication.communicator import Communicator
from manyhands.communication.compression.compressor import Compressor, Cost, compressor_from
from manyhands.communication.compression.layout import Layout, Shape
from manyhands.communication.transports.events import Operation
from manyhands.errors import BadInput
from manyhands.plan import Resolved
from manyhands.simulation.coding import exchange_s
from manyhands.simulation.prices import Prices
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
JOB = "manyhands.modelling.compression:probe"

#: Seconds of ``(operation, bytes of a rank's tensor)``.
Price = Callable[[str, int], float]


@dataclass(frozen=True)
class Option:
    """One exchange under one scheme."""

    compress: str
    coding_s: float
    link_s: float
    cost: Cost

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


def choose(shapes: Sequence[Shape], size: int, price: Price, where: str, among: Sequence[str] = CANDIDATES) -> Choice:
    """For a model of tensors of these ``shapes`` on ``size`` workers; ``where`` names the link in the note."""
    layout = Layout(shapes)
    dense = _option(compressor_from("none"), layout, size, price, 0.0)
    if size == 1:
        return Choice("none", "compress=auto takes none: a worker that is alone sends nothing", dense, ())
    if not among:
        return Choice("none", "compress=auto takes none: no scheme goes with this plan", dense, ())
    each_s = BUDGET_S / len(among)
    found = [
        _option(made, layout, size, price, exchange_s(made, layout, size, each_s))
        for made in map(compressor_from, among)
    ]
    found.sort(key=lambda option: option.seconds)
    best = found[0]
    if best.seconds > (1 - WORTH) * dense.seconds:
        return Choice("none", _why_none(best, dense, where), dense, tuple(found))
    return Choice(best.compress, _why(best, dense, found[1:2], where), dense, tuple(found))


def _option(made: Compressor, layout: Layout, size: int, price: Price, coding: float) -> Option:
    link_s = sum(price(name, n_B) for name, n_B in made.rounds(layout, size, made.payload_B(layout)))
    return Option(str(made), coding, link_s, made.cost(layout, size))


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
        f"{best.cost.sent_B:,} bytes instead of {dense.cost.sent_B:,} (payloads: {best.cost.route})"
    )


def _said(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds >= 1 else f"{1e3 * seconds:.3g} ms"


# -- what links take ---------------------------------------------------------------------------------------------------


def priced(cluster: Cluster, workers: int) -> Price:
    """By a cluster's links."""
    prices, ranks = Prices(cluster, workers), tuple(range(workers))
    prices.begin()
    return lambda name, n_B: prices(Operation(name, n_B, workers, ranks))


def probed(transport: str, size: int, threads: int, n_B: int, timeout_s: float) -> Price:
    """By what a transport of this machine takes, tried for a moment with ``size`` workers of it."""
    with team(transport, size, threads=threads, timeout_s=timeout_s) as crew:
        found = crew.run(JOB, n_B)[0]
    return from_probe(found)


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
    return lambda name, n_B: curves[name].at(n_B)


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
