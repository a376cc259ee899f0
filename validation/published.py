"""Predictions from specifications alone against published tables: ``python -m validation.published [FOLDER]``.

    step = timeline of (operators at their roof / constant) and (bytes / links)

What a device, a link and a network are comes from cluster files and traced models; what is fitted is one efficiency
constant for each (device, program), from rows of a single device. Rows of several devices are held out. The constants
are printed, with a digest of them and of the code, before any held-out row is predicted. Beside it, on the same rows:
no constant at all, a constant from the literature, and the baselines.

``--write`` puts the report into docs/validation.md, between its marks.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import math
import os
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from torch.nn import functional as F

from manyhands.cluster import Cluster, load
from manyhands.modelling import operations, specification
from manyhands.modelling.operations import Operations
from manyhands.modelling.published import megatron, paleo, pipeline, roofline, thakur, wait_free
from validation import exchange, limits, networks, page, scores, tables
from validation.limits import Limit
from validation.tables import Row

#: What Paleo's published scripts fitted to its platforms: the median of 0.62, 0.62, 0.49, 0.46 and 0.21.
LITERATURE = 0.49
HEAD = ("prediction", "mean %", "median %", "p90 %", "max %", "bias %", "rows", "failures")

Constants = Mapping[tuple[str, str], float]


# -- predictions -------------------------------------------------------------------------------------------------------


@functools.cache
def step(program: str, model: str, batch: int) -> Operations:
    """A training step of a network of the tables, traced without its memory."""
    return operations.count(networks.build(program, model), *networks.batch(program, model, batch), F.cross_entropy)


@functools.cache
def timeline(
    program: str, model: str, batch: int, cluster: str, limit: Limit = Limit.PEAK
) -> tuple[list[tuple[float, str]], ...]:
    """Forward and backward: seconds of each operator at its roof, and the parameters that travel before or after it."""
    traced, device = step(program, model, batch), limits.limited(load(cluster).device, limit)
    phases: list[list[tuple[float, str]]] = []
    for phase in ("forward", "backward"):
        ops = [x for x in traced if x.phase == phase]
        order = range(len(ops)) if phase == "forward" else reversed(range(len(ops)))
        # A parameter is needed before the first operator that reads it; its gradient is whole after the last one.
        at: dict[str, int] = {}
        for i in order:
            for name in ops[i].parameters:
                at.setdefault(name, i)
        for i, x in enumerate(ops):
            travels = " ".join(name for name in dict.fromkeys(x.parameters) if at[name] == i)
            phases.append([]) if i == 0 else None
            phases[-1].append((specification.operator_s(x, device), travels))
    return tuple(phases)


def predicted_s(row: Row, constant: float, limit: Limit = Limit.PEAK) -> float:
    """Seconds of a step: operators take their roof's time over ``constant``, links what they take."""
    name = tables.CLUSTERS[row.platform]
    cluster = load(name)
    sizes = step(row.program, row.model, row.batch).parameter_B
    way = exchange.of(row.way, cluster, row.devices, sizes, row.servers)
    forward, backward = timeline(row.program, row.model, row.batch, name, limit)
    alone = row.devices == 1 and row.way != "parameter_server/cpu"

    def timed(phase: list[tuple[float, str]], s_per_B: float) -> list[tuple[float, float, float]]:
        found = []
        for compute_s, names in phase:
            travels_B = sum(sizes[n] for n in names.split())
            travel_s = 0.0 if alone or not s_per_B else travels_B * s_per_B + len(names.split()) * way.message_s
            found.append((compute_s / constant, travel_s, travels_B * way.add_s_per_B))
        return found

    pulled = [(compute_s, travel_s) for compute_s, travel_s, _ in timed(forward, way.pull_s_per_B)]
    computed = wait_free.forward_s(pulled) + wait_free.backward_s(timed(backward, way.push_s_per_B))
    updated = 0.0
    if row.way != "parameter_server/cpu":  # there the host updates, while gradients arrive
        device = limits.limited(cluster.device, limit)
        updated = specification.operator_s(operations.update(sizes), device) / constant
    return computed + updated + way.after_s


def constants(rows: Sequence[Row], limit: Limit = Limit.PEAK) -> dict[tuple[str, str], float]:
    """One for each (device, program): the geometric mean of those that make each row of a single device exact."""
    found: dict[tuple[str, str], list[float]] = {}
    for row in rows:
        if row.devices == 1:
            found.setdefault(row.constant, []).append(_exact(row, limit))
    return {key: statistics.geometric_mean(each) for key, each in found.items()}


def _exact(row: Row, limit: Limit) -> float:
    """The constant with which a row is predicted exactly, by bisection: a step is the shorter the larger it is."""
    low, high = 1e-3, 10.0
    for _ in range(60):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if predicted_s(row, middle, limit) > row.step_s else (low, middle)
    return math.sqrt(low * high)


# -- baselines ---------------------------------------------------------------------------------------------------------


def roofline_s(row: Row) -> float:
    """Each operator at its roof, every gradient over the slowest link, one after the other; no more is known."""
    device = load(tables.CLUSTERS[row.platform]).device
    peak, memory = device.peak_of("float32"), device.memory_bandwidth.si
    traced = step(row.program, row.model, row.batch)
    computed = sum(roofline.seconds(x.flops, x.moved_B, peak_flops_per_s=peak, memory_Bps=memory) for x in traced)
    workers, link_Bps = _slowest(row)
    moved_B = 2 * (workers - 1) / workers * sum(traced.parameter_B.values())
    return computed + moved_B / link_Bps


def paleo_s(row: Row, percent: float) -> float:
    """Paleo with one percent of peak: a layer reads, computes and writes in turn; a tree over the slowest link."""
    workers, link_Bps = _slowest(row)
    device = load(tables.CLUSTERS[row.platform]).device
    platform = paleo.Platform(device.peak_of("float32"), device.memory_bandwidth.si, link_Bps, percent)
    traced = step(row.program, row.model, row.batch)
    layers = [paleo.Layer(x.flops, x.read_B, x.written_B) for x in traced]
    return paleo.step_s(layers, sum(traced.parameter_B.values()), workers, platform, scheme="tree")


def _slowest(row: Row) -> tuple[int, float]:
    """Between nodes, if there are several: how many, and a port. Else between the devices of one."""
    cluster = load(tables.CLUSTERS[row.platform])
    nodes = cluster.nodes_for(row.devices)
    if nodes > 1:
        return nodes, cluster.link("between").bandwidth_Bps(1)
    level = "host" if row.way == "parameter_server/cpu" else "within"
    return row.devices, cluster.link(level).bandwidth_Bps(row.devices)


def paleo_percents(rows: Sequence[Row]) -> dict[tuple[str, str], float]:
    """Paleo's constant for each (device, program), from the same rows of a single device."""
    pairs: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for row in rows:
        if row.devices == 1:
            pairs.setdefault(row.constant, []).append((paleo_s(row, 1.0), row.step_s))
    return {key: paleo.percent_of_peak(each) for key, each in pairs.items()}


def last_known_s(row: Row, rows: Sequence[Row]) -> float | None:
    """The measured step of the same series on the next fewer devices: it has seen what the others have not."""
    fewer = [r for r in rows if r.series == row.series and r.devices < row.devices]
    return max(fewer, key=lambda r: r.devices).step_s if fewer else None


# -- the other tables --------------------------------------------------------------------------------------------------

TRANSFORMERS = {
    "megatron-22B": megatron.Transformer(48, 6144, 64),
    "gpt3-175B": megatron.Transformer(96, 12288, 96),
    "turing-530B": megatron.Transformer(105, 20480, 128),
    "megatron-1T": megatron.Transformer(128, 25600, 160),
}


def language_s(row: tables.Language, cluster: Cluster, constant: float = 1.0) -> float:
    """Operations at the peak over ``constant``, tensor traffic within the node, the pipeline's bubble; no overlap."""
    model, micro_batches = TRANSFORMERS[row.model], row.batch // row.micro_batch
    stages, link = row.pipeline, cluster.link("within")
    hop = thakur.Hop(link.latency.si, 1 / link.bandwidth_Bps(row.tensor))
    peak = cluster.device.peak_of("bfloat16") * constant
    sbh_B = 2.0 * row.micro_batch * model.length * model.width
    reduced_s = thakur.ring_all_reduce_s(sbh_B, row.tensor, hop)
    count = megatron.tensor_traffic_B(model, row.micro_batch, recompute=row.recompute) / sbh_B  # type: ignore[arg-type]
    flops = megatron.flops_per_step(model, row.batch, recompute=row.recompute)  # type: ignore[arg-type]
    stage_s = flops / row.devices / peak / micro_batches + count * reduced_s * model.layers / stages
    hand_over_s = cluster.link("between").seconds(sbh_B / (row.tensor if row.sequence_parallel else 1))
    handed_s = hand_over_s if stages > 1 else 0.0
    return pipeline.step_s(stage_s / 3, 2 * stage_s / 3, stages, micro_batches, chunks=row.chunks, hand_over_s=handed_s)


def reduction_s(row: tables.Reduction) -> float:
    """A ring over NVLink at what the cluster file says of it."""
    link = load({"A100": "dgx_a100", "V100": "dgx1_v100"}[row.device]).link("within")
    hop = thakur.Hop(link.latency.si, 1 / link.bandwidth_Bps(row.devices))
    return thakur.ring_all_reduce_s(row.size_B, row.devices, hop)


# -- report ------------------------------------------------------------------------------------------------------------


def digest(fitted: Constants, percents: Constants) -> str:
    """Of the constants and of all code that turns them into predictions."""
    package = Path(specification.__file__).parent
    files = [*sorted(package.rglob("*.py")), *sorted((package.parent / "cluster").rglob("*.*[lyp]"))]
    files += [Path(m.__file__) for m in (networks, exchange, limits, tables)] + [Path(__file__)]  # type: ignore[arg-type]
    text = repr(sorted(fitted.items())) + repr(sorted(percents.items()))
    return hashlib.sha256(b"".join([text.encode(), *(f.read_bytes() for f in files if f.is_file())])).hexdigest()[:16]


def report(folder: Path) -> list[str]:
    """The page's lines; calibration is over before a held-out row is predicted."""
    rows = tables.images(folder)
    single, held_out = [r for r in rows if r.devices == 1], [r for r in rows if r.devices > 1]
    said = ["### Audit of the tables", "", *(f"- {x}" for x in tables.audit(folder)), ""]
    fitted, percents = constants(single), paleo_percents(single)

    def of(key: tuple[str, str]) -> list[Row]:
        return [r for r in single if r.constant == key]

    said += ["### Constants, from rows of one device alone", ""]
    said += scores.table(
        ("device, program", "rows of one device", "our constant", "error on those rows %", "Paleo's percent of peak"),
        [
            (
                f"{device}, {program}",
                str(len(of((device, program)))),
                f"{e:.3f}",
                f"{100 * Score([(predicted_s(r, e), r.step_s) for r in of((device, program))]).mean:.1f}",
                f"{percents[device, program]:.3f}",
            )
            for (device, program), e in fitted.items()
        ],
    )
    said += ["", f"Digest of constants and code: `{digest(fitted, percents)}`", ""]
    methods: dict[str, Callable[[Row], float | None]] = {
        "**one constant for device and program**": lambda r: predicted_s(r, fitted[r.constant]),
        "no constant: peaks as specified": lambda r: predicted_s(r, 1.0),
        "no constant: base clocks, error correction": lambda r: predicted_s(r, 1.0, Limit.ECC),
        f"the literature's constant ({LITERATURE})": lambda r: predicted_s(r, LITERATURE),
        "baseline: roofline only": roofline_s,
        "baseline: Paleo, one percent of peak": lambda r: paleo_s(r, percents[r.constant]),
        "baseline: last known configuration": lambda r: last_known_s(r, rows),
    }
    found = {name: [(f(r), r.step_s) for r in held_out] for name, f in methods.items()}
    ours = found["**one constant for device and program**"]
    said += [f"### Held out: {len(held_out)} rows of several devices", ""]
    said += scores.table(
        (*HEAD, "rank, images/s", "rank, step"),
        [(name, *Score(pairs).cells(), *_ranks(held_out, pairs)) for name, pairs in found.items()],
    )
    said += ["", "By platform and by network, one constant:", ""]
    groups: dict[str, Callable[[Row], str]] = {
        "platform": lambda r: r.platform,
        "network": lambda r: r.model,
        "devices": lambda r: str(r.devices),
    }
    parts = []
    for kind, key in groups.items():
        for name in dict.fromkeys(key(r) for r in sorted(held_out, key=lambda r: (r.program, r.devices))):
            pairs = [p for p, r in zip(ours, held_out, strict=True) if key(r) == name]
            parts.append((f"{kind} {name}", *Score(pairs).cells()))
    said += scores.table(HEAD, parts)
    said += ["", "The ten worst:", ""]
    worst = sorted(zip(ours, held_out, strict=True), key=lambda x: -abs((x[0][0] or 0) / x[0][1] - 1))[:10]
    said += scores.table(
        ("row", "measured ms", "predicted ms", "error %"),
        [
            (
                f"{r.platform}, {r.model}, {r.batch} × {r.devices}, {r.data}, {r.way}",
                f"{1e3 * m:.0f}",
                f"{1e3 * (p or 0):.0f}",
                f"{100 * ((p or 0) / m - 1):+.0f}",
            )
            for (p, m), r in worst
        ],
    )
    said += ["", *_made_of(single, held_out), "", *_others(folder)]
    return said


def _made_of(single: Sequence[Row], held_out: Sequence[Row]) -> list[str]:
    """How much of a constant documents explain, limit by limit."""
    kinds = list(dict.fromkeys(r.constant for r in single))
    rows = []
    for limit in Limit:
        left = constants(single, limit)
        pairs = [(predicted_s(r, 1.0, limit), r.step_s) for r in held_out]
        rows.append((limits.SAID[limit], *(f"{left[k]:.3f}" for k in kinds), f"{100 * Score(pairs).mean:.1f}"))
    head = ("limits taken in", *(f"left to fit: {device}, {program}" for device, program in kinds))
    return ["### What of a constant documents explain", "", *scores.table((*head, "no constant: mean %"), rows)]


Score = scores.Score.of


def _ranks(rows: Sequence[Row], pairs: Sequence[tuple[float | None, float]]) -> tuple[str, str]:
    """Median rank correlation within model × platform: of images a second, and of the time of a step."""
    said = [(r, p, m) for r, (p, m) in zip(rows, pairs, strict=True) if p is not None]
    speed, n = scores.within_groups([(r.group, r.batch * r.devices / p, r.batch * r.devices / m) for r, p, m in said])
    times, _ = scores.within_groups([(r.group, p, m) for r, p, m in said])
    return f"{speed:.3f} ({n} groups)", f"{times:.3f}"


def _others(folder: Path) -> list[str]:
    a100 = load("dgx_a100")
    languages, reductions = tables.languages(folder), tables.reductions(folder)
    rows = [
        ("Megatron on A100, no constant", *Score([(language_s(r, a100), r.step_s) for r in languages]).cells()),
        (
            f"Megatron on A100, the literature's constant ({LITERATURE})",
            *Score([(language_s(r, a100, LITERATURE), r.step_s) for r in languages]).cells(),
        ),
    ]
    for device in ("A100", "V100"):
        of = [r for r in reductions if r.device == device]
        for what, some in (
            ("up to 16 MiB", [r for r in of if r.size_B <= 2**24]),
            ("above 16 MiB", [r for r in of if r.size_B > 2**24]),
        ):
            pairs = [(reduction_s(r), r.seconds) for r in some]
            rows.append((f"NCCL all-reduce on NVLink, {device}, {what}", *Score(pairs).cells()))
    return ["### Other tables, nothing fitted", "", *scores.table(HEAD, rows)]


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the report; with ``--write`` also into the page."""
    parser = argparse.ArgumentParser(prog="python -m validation.published", description=__doc__)
    parser.add_argument("folder", nargs="?", default=os.environ.get("MANYHANDS_MEASURED"), help="of the tables")
    parser.add_argument("--write", action="store_true", help="put the report into docs/validation.md")
    said = parser.parse_args(arguments)
    if not said.folder or not (Path(said.folder) / tables.TENSORFLOW).is_file():
        print(f"no tables in {said.folder!r}: name their folder, or set MANYHANDS_MEASURED", file=sys.stderr)
        return 2
    lines = report(Path(said.folder))
    print("\n".join(lines))
    if said.write:
        page.write("published tables", lines)
    return 0


if __name__ == "__main__":
    sys.exit(main())
