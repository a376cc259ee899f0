"""The catalogue for people: what there is by name, and each kind in full, read off the classes themselves.

Names come from the tables of contents and cost no torch import; details import what they describe.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from manyhands.catalogue import Catalogue
from manyhands.cluster import Cluster, clusters
from manyhands.communication.compression import compressors
from manyhands.communication.transports import transports
from manyhands.consistency import strategies
from manyhands.consistency.robust import aggregations
from manyhands.data import datasets
from manyhands.errors import UnknownName
from manyhands.grammar import format_value
from manyhands.modelling.published import formulas
from manyhands.models import loss_functions, models, optimizer_classes, schedule_classes
from manyhands.partition import cut_strategies, partitions
from manyhands.partition.pipeline import schedules as pipelines
from manyhands.partition.tensor import schemes
from manyhands.simulation.disturbances import failures, stragglers

KINDS: Mapping[str, Catalogue] = {
    "strategies": Catalogue("strategy", {**strategies, **cut_strategies}),
    "aggregations": aggregations,
    "compressors": compressors,
    "transports": transports,
    "models": models,
    "data": datasets,
    "losses": loss_functions,
    "optimizers": optimizer_classes,
    "schedules": schedule_classes,
    "partitions": partitions,
    "schemes": schemes,
    "pipelines": pipelines,
    "clusters": clusters,
    "formulas": formulas,
    "stragglers": stragglers,
    "failures": failures,
}

#: Parameters that are filled in and that nobody writes: from the data set, the run or the command line.
FILLED = ("params", "optimizer", "folder", "last_epoch", "model", "group", "ranks", "micro_batches")
NOTES = {
    "strategies": "n: the number of parameters. What is sent is the payload of one worker, a mean over many steps.",
    "compressors": "What --compress sends, e.g. --compress 'top_k(ratio=0.01)', an option of synchronous. n: the "
    "number of parameters; what is sent is told for one layer of 1024 × 1024 in float32, as the payload of one worker. "
    "Recommended: what loses least in docs/compression.md; a threshold is the task's, and so is a rate.",
    "aggregations": "An option of synchronous and backup_workers, e.g. aggregate=krum(f=1). n: workers waited for.",
    "partitions": "The axes of --mesh, e.g. --mesh data=2,tensor=2; docs/partitioning.md draws them.",
    "pipelines": "The order of micro-batches, e.g. --mesh pipeline=2 --pipeline \"gpipe(cut='block2')\"; each takes "
    "cut=, the modules with which stages begin. pipedream goes with --strategy pipedream.",
    "schemes": "How a network is cut along the mesh's tensor axis, e.g. --mesh tensor=4 --tensor cannon; "
    "one_weird_trick: along its data axis.",
    "clusters": "Bandwidths are of one direction and a device, all of a node sending at once. Your own is a TOML file.",
    "formulas": "What published models say of a plan, as functions in SI units: manyhands.modelling.published.",
    "stragglers": "What --stragglers says to simulate, e.g. --stragglers 'lognormal(sigma=0.3)'; several multiply.",
    "failures": "What --failures says to simulate, e.g. --failures 'failures(mtbf_s=2.6e6, checkpoint_s=30)'.",
    "schedules": "These move at every step: where torch's text says epoch, read step.",
}


#: For which numbers of them a compressor's route is told.
WORKERS = (2, 3, 4, 6, 8, 16, 32, 64, 128, 256)


@dataclass(frozen=True)
class Entry:
    """One line of the catalogue, in full."""

    name: str
    about: str
    parameters: dict[str, Any] = field(default_factory=dict)  # with their defaults; … = must be given
    facts: dict[str, Any] = field(default_factory=dict)
    paper: str = ""
    survey: str = ""

    def as_dict(self) -> dict[str, Any]:
        """Plain values only; a parameter that must be given has no ``default``."""
        parameters = [
            {"name": name, "default": default} if default is not ... else {"name": name}
            for name, default in self.parameters.items()
        ]
        return {**dataclasses.asdict(self), "parameters": parameters}


def names() -> dict[str, list[str]]:
    """Every kind with the names of its entries."""
    return {kind: list(catalogue) for kind, catalogue in KINDS.items()}


def name_lines(found: Mapping[str, Sequence[str]]) -> list[str]:
    """`names` for people."""
    width = max(map(len, found))
    said = [f"{kind:<{width}}  {', '.join(entries)}" for kind, entries in found.items()]
    return [*said, "", "In full: manyhands list KIND. Your own is reached as my_pkg.module:name."]


def details(kind: str) -> list[Entry]:
    """All entries of one kind, in the catalogue's order."""
    if kind not in KINDS:
        raise UnknownName("kind of entry", kind, KINDS)
    return [_entry(kind, name, KINDS[kind].load(name)) for name in KINDS[kind]]


def detail_lines(kind: str, entries: Sequence[Entry]) -> list[str]:
    """`details` for people."""
    said = []
    for e in entries:
        said.append(_call(e))
        said.append(f"    {e.about}")
        said.extend(f"    {name}: {value}" for name, value in e.facts.items())
        if e.paper:
            said.append(f"    {e.paper}" + (f" (survey §{e.survey})" if e.survey else ""))
        said.append("")
    return [*said, NOTES[kind]] if kind in NOTES else said[:-1]


def _call(entry: Entry) -> str:
    inner = [
        name if default is ... else f"{name}={format_value(default)}" for name, default in entry.parameters.items()
    ]
    return f"{entry.name}({', '.join(inner)})" if inner else entry.name


def _entry(kind: str, name: str, made: Any) -> Entry:
    paper = getattr(made, "paper", None)
    return Entry(
        name,
        _about(kind, name, made),
        {} if kind in ("transports", "partitions", "formulas") else _parameters(made),
        _facts(kind, name, made),
        str(paper) if paper is not None else "",
        paper.survey if paper is not None else "",
    )


def _about(kind: str, name: str, made: Any) -> str:
    # A transport's file says what its workers are; its class, what one end of it is. Two engines share a file. A
    # partition's file says what is cut, its class what a strategy sees; a schedule's file says what it is for.
    own_file = kind in ("partitions", "pipelines") or (
        kind in ("transports", "formulas") and made.__module__.rpartition(".")[2] == name
    )
    text = inspect.getdoc(inspect.getmodule(made) if own_file else made) or ""
    return " ".join(text.split("\n\n")[0].split()).replace("``", "`")


def _parameters(made: Any) -> dict[str, Any]:
    found = {}
    for p in inspect.signature(made).parameters.values():
        filled = p.name in FILLED or (p.name in ("inputs", "classes") and p.default is p.empty)
        if not filled and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD):
            found[p.name] = ... if p.default is p.empty else p.default
    return found


def _facts(kind: str, name: str, made: Any) -> dict[str, Any]:
    if kind == "strategies":
        return {
            **_guarantees(made),
            "replicas": "none: its workers own parts of one model"
            if not made.scheduled
            else "bit-identical"
            if made.identical
            else "may differ",
            "results": "repeat bit for bit" if made.deterministic else "differ from run to run",
            "sends": "what passes between its nodes or stages" if made.updates_within else _sends(made()),
        }
    if kind == "pipelines":
        return _of_pipeline(name, made)
    if kind == "aggregations":
        rule = made()
        return {"needs": rule.needs, "bears": f"{rule.bears(5)} of 5 workers by default"}
    if kind == "compressors":
        return _compression(name, made())
    if kind == "transports":
        return {
            "shares memory": _yes(made.shares_memory),
            "one-sided memory": _yes(made.one_sided),  # where parameters lie that servers hold elsewhere
            "communicates beside compute": _yes(made.overlaps),
        }
    if kind == "optimizers":
        from manyhands.models.optimizers import ELEMENTWISE

        return {"element by element": _yes(made in ELEMENTWISE) + ("" if made in ELEMENTWISE else ", never sharded")}
    if kind == "clusters":
        return _hardware(made())
    if kind == "losses":
        return {"over workers": "added" if made.reduction == "sum" else "averaged"}
    return {}


def _compression(name: str, made: Any) -> dict[str, Any]:
    from manyhands.communication.compression.layout import Layout
    from manyhands.studies.compression.settings import recommended

    n = 2**20
    layout = Layout(((1024, 1024),))
    sent = []
    for workers in (2, 8):
        cost = made.cost(layout, workers)
        sent.append(f"{cost.sent_B / n:.3g} n bytes with {workers} workers ({cost.route})")
    routes: dict[str, int] = {}
    for workers in () if made.variable else WORKERS:
        routes.setdefault(made.cost(layout, workers).route, workers)
    first, *others = routes.items() or [("gather, or dense where that is shorter, as lengths are in each step", 2)]
    kept, varies = made.contraction(n), made.variance(n)
    promises = [
        "lossless" if made.lossless else "",
        "unbiased" if made.unbiased and not made.lossless and not made.feedback else "",
        f"‖x − C(x)‖² ≤ {1 - kept:.3g} ‖x‖²" if 1e-3 < kept < 1 else "",
        f"E ‖x − C(x)‖² ≤ {varies:.3g} ‖x‖²" if 0 < varies < math.inf else "",
        "sent and residual add up to the gradients" if made.feedback else "",
    ]
    return {
        "sends": ("at most " if made.variable else "") + ", ".join(sent) + "; dense 4 n, 7 n",
        "payloads": "added by an all-reduce" if made.summable else "decoded by everybody",
        "route": ", ".join([first[0], *(f"{route} from {workers} workers" for route, workers in others)]),
        "promises": "; ".join(filter(None, promises)) or "none of a single step",
        "recommended": "; ".join(f"{said.compress} with {said.optimizer} on {at}" for at, said in recommended(name)),
    }


def _hardware(cluster: Cluster) -> dict[str, Any]:
    device, users = cluster.device, cluster.devices_per_node
    peaks = ", ".join(f"{dtype} {peak}" for dtype, peak in device.peak.items())
    links = {
        f"link {level}": f"{link.kind}, {link.bandwidth_Bps(users) / 1e9:.3g} GB/s, {link.latency}"
        for level, link in cluster.links.items()
    }
    return {
        "a node": f"{users} × {device.name}, {device.memory}, {device.memory_bandwidth}",
        "peak": peaks,
        **links,
    }


def _of_pipeline(name: str, made: Any) -> dict[str, Any]:
    """For four ranks and eight micro-batches, with stages of equal cost."""
    from manyhands.partition.pipeline.schedule import bubble, in_flight

    if name == "written":
        return {}
    order = made(4, 8)
    return {
        "bubble": f"{bubble(order):.3f} with 4 ranks and 8 micro-batches",
        "in flight": f"{', '.join(map(str, in_flight(order)))} there, by rank",
    }


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def _sends(strategy: Any) -> str:
    """Among a few workers and among more."""
    n = 2**20
    few, more = (strategy.traffic(n, workers, 1).sent_B_per_step / n for workers in (2, 8))
    if not more:
        return "nothing in a step"
    with_more = f" with 2 workers, {more:.3g} n with 8" if more != few else ""
    return f"{'at most ' if strategy.sends_at_most else ''}{few:.3g} n a step{with_more}"


def _guarantees(cls: Any) -> dict[str, str]:
    from manyhands.studies.parity import variants

    each = {str(s): guarantee(s) for s in ([cls()] if cls.updates_within else variants([cls.name]))}
    first, *others = dict.fromkeys(each.values())
    return {f"guarantee of {text}": said for text, said in each.items()} if others else {"guarantee": first}


def guarantee(strategy: Any) -> str:
    """What N workers promise against one on the joined batch."""
    from manyhands.contract import Setting

    setting = Setting(workers=2, transport="shared", shares_memory=True, elementwise=True, stateless=True)
    if strategy.exact(dataclasses.replace(setting, stateless=False)):
        return "exact: N workers equal one on the joined batch, up to summation order"
    if strategy.exact(setting):
        return "exact with an optimizer that keeps no state (plain SGD), else an approximation"
    return "an approximation"
