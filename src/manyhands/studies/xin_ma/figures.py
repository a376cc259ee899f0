"""The slides' four plots, and two that say why they look so: the noise of an update, and the bytes."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

from manyhands.studies.analysis import Chart, Point, Series
from manyhands.studies.charting import slug
from manyhands.studies.fits import Estimate, noise_scale
from manyhands.studies.xin_ma import PUBLISHED_S, VARIANTS, design
from manyhands.studies.xin_ma.conclusions import variance_law, variances
from manyhands.studies.xin_ma.design import CENTRE_BATCH, LARGE, LEARNING_OPTIMIZER, SMALL
from manyhands.studies.xin_ma.reading import Trial, median, of, per_doubling, settings, with_accuracy

_REPEATS = "Points are medians over repeats with 95 % bootstrap intervals."
_SEEDS = "Points are means over seeds, with the lowest and the highest."


def figures(found: Sequence[Trial]) -> tuple[Chart, ...]:
    """Those that the rows can carry."""
    charts: list[Chart | None] = [
        *(time_against_nodes(found, setting) for setting in settings(found, design.TIME_NODES)),
        time_against_batch(found),
        accuracy_against_batch(found),
        *(accuracy_against_nodes(found, setting) for setting in settings(found, design.ACCURACY_NODES)),
        *(noise(found, setting) for setting in settings(found, design.NOISE)),
        bytes_per_step(found),
        learning(found),
    ]
    return tuple(chart for chart in charts if chart is not None and any(s.points for s in chart.series))


def time_against_nodes(found: Sequence[Trial], setting: str) -> Chart | None:
    """Experiment 1: a bar a variant and transport, one and two nodes."""
    cells = [t for t in of(found, design.TIME_NODES, setting=setting) if not t.oversubscribed]
    one = [t.step_s for t in cells if t.nodes == 1]
    names = dict.fromkeys((t.variant, t.transport) for t in cells if t.nodes == 2)
    if not one or not names:
        return None
    alone = median(one)
    bars = {"one node": _bar("one node", alone, 1e3)}
    for variant, transport in names:
        steps = [t.step_s for t in cells if (t.variant, t.transport, t.nodes) == (variant, transport, 2)]
        label = variant if transport == "shared" else f"{variant} on {transport}"
        bars[label] = _bar(label, median(steps), 1e3)
    twice = {v.name: bars[v.name].y / bars["one node"].y for v in VARIANTS if v.own_batch and v.name in bars}
    told = f"two nodes do twice the work of one in {_named_range(twice)} its time" if twice else "one node beside two"
    return Chart(
        f"time-against-nodes-{slug(setting)}",
        f"{setting}: {told}",
        "update variant, two nodes",
        "time per step, ms",
        (Series("median step", tuple(bars.values())),),
        kind="bars",
        note=f"Batch {CENTRE_BATCH}: a node's own under U1, U2b and sharded, so that two nodes do twice the work in a "
        f"step; the one batch of all under U1s and U2. {_REPEATS}",
    )


def time_against_batch(found: Sequence[Trial]) -> Chart | None:
    """Experiment 2: an epoch's time over that at batch 50, beside the slides'."""
    series = []
    for setting in settings(found, design.TIME_BATCH):
        for nodes in design.NODES_FOR_TIME:
            cells = [t for t in of(found, design.TIME_BATCH, setting=setting, nodes=nodes) if not t.oversubscribed]
            base = median([t.step_s / t.batch for t in cells if t.batch == SMALL] or [0.0]).value
            if not base:
                continue
            per_sample = {
                batch: median([t.step_s / batch / base for t in cells if t.batch == batch])
                for batch in sorted({t.batch for t in cells})
            }
            label = f"{setting.partition(',')[0]}, {nodes} node{'' if nodes == 1 else 's'}"
            series.append(Series(label, tuple(_point(b, e) for b, e in per_sample.items())))
    if not series:
        return None
    shape = {batch: s / PUBLISHED_S[SMALL] for batch, s in PUBLISHED_S.items()}
    series.append(Series("slides, 2018", tuple(Point(b, y) for b, y in shape.items()), "published"))
    at_large = [p.y for s in series[:-1] for p in s.points if p.x == LARGE]
    told = f"An epoch at batch {LARGE} takes {_from_to(at_large)} of its time at batch {SMALL}; on the slides it took "
    return Chart(
        "time-against-batch",
        f"{told}{shape[LARGE]:.2f}" if at_large else "Time for an epoch against the batch size",
        "batch size of a node",
        f"time per epoch, over that at batch {SMALL}",
        tuple(series),
        note="The slides give 9.18, 11.95, 12.99 and 11.69 s an iteration, taken to be an epoch, without the number of "
        f"nodes or the machine: only their shape compares. {_REPEATS}",
    )


def accuracy_against_batch(found: Sequence[Trial]) -> Chart | None:
    """Experiment 3, after as many samples."""
    series = []
    for setting in settings(found, design.SAMPLES):
        series.append(Series(setting, _accuracies(of(found, design.SAMPLES, setting=setting), "batch")))
    series = [s for s in series if s.points]
    if not series:
        return None
    signs: dict[str, list[str]] = {"raises": [], "lowers": [], "does not clearly move": []}
    for s in series:
        fit = per_doubling((t.batch, y) for t, y in with_accuracy(of(found, design.SAMPLES, setting=s.name)))
        if fit is None or fit.slope.contains(0.0):
            signs["does not clearly move"].append(s.name)
        else:
            signs["raises" if fit.slope.value > 0 else "lowers"].append(s.name)
    said = "; ".join(f"{verb} {' and '.join(f'“{n}”' for n in names)}" for verb, names in signs.items() if names)
    return Chart(
        "accuracy-against-batch",
        f"After as many epochs, a larger batch {said}",
        "batch size",
        "test accuracy, %",
        tuple(series),
        note="One node. The slides' loss is a sum over the batch beside a fixed λ, so a larger batch weighs the data "
        f"more against λ and makes larger steps; under cross-entropy it only makes fewer. {_SEEDS}",
    )


def accuracy_against_nodes(found: Sequence[Trial], setting: str) -> Chart | None:
    """Experiment 4, after as many updates."""
    cells = of(found, design.ACCURACY_NODES, setting=setting)
    series = tuple(
        Series(f"batch {batch} a node", _accuracies([t for t in cells if t.batch == batch], "nodes"))
        for batch in (SMALL, LARGE)
    )
    if not all(s.points for s in series):
        return None
    gains = [f"{s.points[-1].y - s.points[0].y:+.1f}".replace("-", "−") for s in series]
    least, most = series[0].points[0].x, series[0].points[-1].x
    return Chart(
        f"accuracy-against-nodes-{slug(setting)}",
        f"{setting}: {most} nodes instead of {least} change accuracy by {gains[0]} points at batch {SMALL} and by "
        f"{gains[1]} at batch {LARGE}",
        "nodes",
        "test accuracy, %",
        series,
        log_x=True,
        note=f"U1, as many updates for each; more nodes see more samples. {_SEEDS}",
    )


def noise(found: Sequence[Trial], setting: str) -> Chart | None:
    """Conclusion (d): the variance of an update against nodes, under each variant."""
    series = []
    for variant in VARIANTS:
        points = variances(found, setting, variant.name)
        if len(points) > 1:
            series.append(Series(variant.name, _by_nodes(points)))
    if not series:
        return None
    alone = [v for p, v in variances(found, setting, "U1") if p == 1]
    counts = sorted({p.x for s in series for p in s.points if not isinstance(p.x, str)})
    if alone:
        series.append(Series("1/P", tuple(Point(p, statistics.fmean(alone) / p) for p in counts), "ideal"))
    law = variance_law(found, setting, "U1")
    fell = f"falls as nodes to the power of {law.exponent}" if law else "is drawn against nodes"
    return Chart(
        f"noise-{slug(setting)}",
        f"{setting}: the variance of U1's update {fell.replace('-', '−')}",
        "nodes",
        "variance of an update (trace of its covariance)",
        tuple(series),
        log_x=True,
        log_y=True,
        note="64 updates after each of three trainings: their mean, the lowest and the highest. Batch "
        f"{SMALL} a node (U1, U2b, sharded) or in all (U1s, U2). U2b averages nothing: each slice has the noise of one "
        "node's batch.",
    )


def bytes_per_step(found: Sequence[Trial]) -> Chart | None:
    """What each variant sends, as counted."""
    cells = of(found, design.TIME_NODES, nodes=2, transport="shared")
    names = settings(cells, design.TIME_NODES)
    series = []
    for setting in names:
        sent = {
            t.variant: t.row.measurement.sent_B_per_step / 1e3
            for t in cells
            if t.setting == setting and t.row.measurement
        }
        series.append(Series(setting, tuple(Point(v.name, sent[v.name]) for v in VARIANTS if v.name in sent)))
    if not series or not series[0].points:
        return None
    least = min(series[0].points, key=lambda p: p.y)
    return Chart(
        "bytes-per-step",
        f"{least.x} sends least, {least.y:,.0f} kB a step of each of two nodes ({series[0].name})",
        "update variant",
        "payload per node and step, kB",
        tuple(series),
        kind="bars",
        note="U1 and U1s send the whole gradient P − 1 times, U2 and U2b a slice of the parameters, sharded "
        "a slice of each.",
    )


def learning(found: Sequence[Trial]) -> Chart | None:
    """The CNN trained out."""
    runs: dict[str, dict[float, list[float]]] = {}
    for t in of(found, design.LEARNING):
        for record in t.row.history:
            if record["test_accuracy"] is not None and t.row.measurement is not None:
                epochs = round(t.row.measurement.epochs * record["step"] / t.row.measurement.steps, 3)
                runs.setdefault(t.variant, {}).setdefault(epochs, []).append(100 * record["test_accuracy"])
    if not runs:
        return None
    series = tuple(
        Series(name, tuple(_point(e, _within(values)) for e, values in sorted(curve.items())))
        for name, curve in runs.items()
    )
    ends = ", ".join(f"{s.points[-1].y:.2f} % under {s.name}" for s in series)
    return Chart(
        "learning",
        f"Trained out, the CNN gets {ends} of the test images right",
        "epochs",
        "test accuracy, %",
        series,
        note=f"Two nodes, batch {CENTRE_BATCH}, {LEARNING_OPTIMIZER}, the rate falling along a cosine. Means of "
        "seeds, from the lowest to the highest.",
    )


def scale_sentence(found: Sequence[Trial], setting: str) -> str:
    """The gradient noise scale from U1's cells: up to which batch a step gets better."""
    cells = [t for t in of(found, design.NOISE, setting=setting, variant="U1") if t.row.noise is not None]
    fit = noise_scale([(t.row.noise["batch"], t.row.noise["mean_square"]) for t in cells if t.row.noise])
    return f"{setting}: {fit.sentence()}"


def _accuracies(cells: Sequence[Trial], over: str) -> tuple[Point, ...]:
    values: dict[int, list[float]] = {}
    for t, accuracy in with_accuracy(cells):
        values.setdefault(getattr(t, over), []).append(100 * accuracy)
    return tuple(_point(x, _within(ys)) for x, ys in sorted(values.items()))


def _by_nodes(points: Sequence[tuple[int, float]]) -> tuple[Point, ...]:
    values: dict[int, list[float]] = {}
    for nodes, value in points:
        values.setdefault(nodes, []).append(value)
    return tuple(_point(nodes, _within(found)) for nodes, found in sorted(values.items()))


def _named_range(values: Mapping[str, float]) -> str:
    """The least and the most, with their names."""
    least, most = min(values, key=values.__getitem__), max(values, key=values.__getitem__)
    one = f"{values[least]:.2f} ({least})"
    return one if least == most else f"{one} to {values[most]:.2f} ({most}) times"


def _within(values: Sequence[float]) -> Estimate:
    return Estimate(sum(values) / len(values), min(values), max(values))


def _point(x: float, estimate: Estimate) -> Point:
    return Point(x, estimate.value, estimate.low, estimate.high)


def _bar(label: str, estimate: Estimate, times: float) -> Point:
    low, high = (None if end is None else end * times for end in (estimate.low, estimate.high))
    return Point(label, estimate.value * times, low, high)


def _from_to(values: Sequence[float]) -> str:
    low, high = min(values, default=0.0), max(values, default=0.0)
    return f"{low:.2f}" if f"{low:.2f}" == f"{high:.2f}" else f"{low:.2f} to {high:.2f}"
