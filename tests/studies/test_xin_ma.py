"""The experiments of 2018: which runs are made, and what is concluded from made-up ones."""

import dataclasses
import math

import pytest

from manyhands.contract import StepParts
from manyhands.studies import studies
from manyhands.studies.grid import parse
from manyhands.studies.summary import summarize
from manyhands.studies.xin_ma import ANN_50, ANN_50_CE, BATCHES, CNN, PUBLISHED_S, VARIANTS, design
from manyhands.studies.xin_ma.conclusions import Finding, both, combined, conclusions
from manyhands.studies.xin_ma.design import QUICK, xin_ma
from manyhands.studies.xin_ma.figures import figures
from manyhands.studies.xin_ma.reading import ratio_of, trials
from manyhands.studies.xin_ma.report import analyse
from tests.studies.made import measurement, row


@pytest.mark.parametrize("quick", [True, False])
def test_every_cell_can_be_made_and_reads_back(quick):
    study = xin_ma(quick=quick)
    assert parse(study.to_toml()) == study
    for cell in study.cells():
        task, plan = cell.make()
        assert plan.workers in (1, 2, 4, 8)
        assert plan.threads == 1
        assert task.batch_size in {b * n for b in BATCHES for n in (1, 2, 4, 8)}


def test_the_design_is_not_the_product_of_all_factors():
    cells = xin_ma().cells()
    assert len(cells) < 450  # of some 3,000
    assert {c.plan["strategy"] for c in cells} == {v.strategy for v in VARIANTS} | {"synchronous"}
    assert {c.plan.get("transport") for c in cells} == {None, "gloo", "mpi"}
    assert all(c.plan["workers"] <= 2 for c in cells if {design.TIME_NODES, design.TIME_BATCH} & set(c.grids))


def test_it_is_found_by_name_and_has_at_most_so_many_nodes():
    assert studies.load("xin-ma") is xin_ma
    assert {c.plan["workers"] for c in xin_ma(2, quick=True).cells()} == {1, 2}


def test_the_mean_over_nodes_of_a_sum_is_a_smaller_rate_and_a_larger_lambda():
    assert ANN_50.task(4, own_batch=True) == {
        "model": "perceptron(hidden=50)",
        "loss": "squared_error(l2=20.0)",
        "optimizer": "sgd(lr=7.5e-05)",
    }
    assert ANN_50.task(4, own_batch=False)["loss"] == "squared_error(l2=5.0)"
    assert ANN_50_CE.task(4, own_batch=True)["optimizer"] == "sgd(lr=0.1)"


def accuracy(setting, nodes, batch, seed):
    """A made-up world in which (a) holds for the slides' loss only, (b) and (c) hold, and seeds differ a little."""
    rising = 0.02 if setting.squared else -0.02
    gain = 0.01 if batch == design.SMALL else 0.0
    return 0.8 + rising * math.log2(batch / 50) + gain * math.log2(nodes) + 0.0004 * seed


def made_rows(study, *, accuracy=accuracy, exponent=-1.0, overhead=lambda batch: 5 / batch):
    settings = {(s.model, s.squared): s for s in design.QUICK.batch_settings}
    rows = []
    for cell in study.cells():
        task = cell.task
        batch = task.get("batch_per_worker", task.get("batch_size"))
        nodes, seed = cell.plan["workers"], task.get("seed", 0)
        setting = settings[task["model"], task["loss"].startswith("squared")]
        for repeat in range(1, cell.repeats + 1):
            if cell.measure == "noise":
                variance = 8.0 * nodes**exponent
                noise = {"batch": batch * nodes, "mean_square": 1 + variance, "variance": variance}
                rows.append(dataclasses.replace(row(cell, repeat), noise=noise, measurement=None))
                continue
            share = overhead(batch) * (1 + 0.01 * repeat)
            found = measurement(
                nodes,
                1e-4 * batch,
                test_accuracy=accuracy(setting, nodes, batch, seed),
                step_parts_s=StepParts(1 - share, share / 2, share / 2, 0.0),
            )
            rows.append(row(cell, repeat, found))
    return rows


def judged(**world):
    study = xin_ma(quick=True)
    return {j.verdict.claim[:3]: j.verdict for j in conclusions(trials(study, made_rows(study, **world)))}


def test_each_conclusion_is_judged_by_its_rule():
    verdicts = judged()
    assert [verdicts[k].outcome for k in ("(a)", "(b)", "(c)", "(d)")] == ["undecided", *3 * ["supported"]]
    assert "ANN 50, squared loss: +2.00 points" in verdicts["(a)"].why
    assert "ANN 50, cross-entropy: −2.00 points" in verdicts["(a)"].why
    assert all(v.test and v.why for v in verdicts.values())


def test_the_opposite_world_contradicts_each():
    verdicts = judged(
        accuracy=lambda s, nodes, batch, seed: (
            0.9
            - accuracy(s, nodes, 50, seed) / 10
            - 0.01 * math.log2(batch)
            + (0.02 * math.log2(nodes) if batch == design.LARGE else -0.02 * math.log2(nodes))
        ),
        exponent=0.0,
        overhead=lambda batch: batch / 1000,
    )
    assert {v.outcome for v in verdicts.values()} == {"not supported"}


def test_a_world_without_differences_supports_little_and_decides_nothing_else():
    verdicts = judged(accuracy=lambda s, nodes, batch, seed: 0.9 + 0.001 * (seed % 2), overhead=lambda batch: 0.2)
    assert verdicts["(a)"].outcome == "undecided"
    assert verdicts["(b)"].outcome == "supported"
    assert verdicts["(c)"].outcome == "undecided"


def test_without_rows_nothing_is_decided_and_nothing_breaks():
    study = xin_ma(quick=True)
    found = analyse(study, [], [])
    assert {v.outcome for v in found.verdicts} == {"undecided"}
    assert found.charts == ()
    assert len(found.sentences) == 5


@pytest.mark.parametrize(
    ("outcomes", "one"),
    [
        (["supported", "supported"], "supported"),
        (["supported", "undecided"], "undecided"),
        (["supported", "not supported"], "undecided"),
        (["undecided", "not supported"], "not supported"),
        ([], "undecided"),
    ],
)
def test_networks_that_differ_decide_nothing(outcomes, one):
    assert combined(Finding("", o, "") for o in outcomes) == one


def test_the_report_draws_the_slides_plots_beside_the_published_times():
    study = xin_ma(quick=True)
    rows = made_rows(study)
    found = analyse(study, rows, summarize(study.cells(), rows))
    names = [chart.name for chart in found.charts]
    assert len(set(names)) == len(names)
    for start in (
        "time-against-nodes",
        "time-against-batch",
        "accuracy-against-batch",
        "accuracy-against-nodes",
        "noise",
    ):
        assert any(name.startswith(start) for name in names), start
    shape = next(c for c in found.charts if c.name == "time-against-batch")
    published = next(s for s in shape.series if s.role == "published")
    assert [p.y for p in published.points] == pytest.approx([1.0, 1.3018, 1.4159, 1.2737], abs=1e-4)
    assert [p.x for p in published.points] == list(PUBLISHED_S)
    assert found.sentences[0].startswith("Of the slides' 4 conclusions")


def test_oversubscribed_runs_say_nothing_about_time():
    study = xin_ma(quick=True)
    rows = [r if r.plan["workers"] == 1 else row_on_one_core(r) for r in made_rows(study)]
    assert not [c for c in figures(trials(study, rows)) if c.name.startswith("time-against-nodes")]


def row_on_one_core(one):
    return dataclasses.replace(one, cores=1)


def test_sizes_name_the_networks_they_need():
    for size in (QUICK, design.FULL):
        for setting in (*size.batch_settings, *size.node_settings, *size.noise_settings):
            assert setting.model in size.updates
        assert CNN.model in size.timed_steps


def test_a_claim_of_two_halves_needs_both_and_falls_with_one():
    assert both("supported", "supported") == "supported"
    assert both("supported", "not supported") == "not supported"
    assert both("undecided", "supported") == "undecided"


def test_two_repeats_decide_nothing_about_time():
    assert ratio_of([(2.0, 1.0), (2.1, 1.0)]).low is None
    three = ratio_of([(2.0, 1.0), (2.1, 1.0), (1.9, 1.0)])
    assert 1.7 < three.low < 2 < three.high < 2.3


def test_help_without_overhead_is_no_support():
    verdicts = judged(overhead=lambda batch: batch / 1000)
    assert verdicts["(c)"].outcome == "not supported"


def test_overhead_measured_beside_other_work_decides_nothing():
    study = xin_ma(quick=True)
    rows = [dataclasses.replace(r, noisy=True) for r in made_rows(study, overhead=lambda batch: batch / 1000)]
    (verdict,) = [j.verdict for j in conclusions(trials(study, rows)) if j.verdict.claim.startswith("(c)")]
    assert verdict.outcome == "undecided"
    assert "from runs that were disturbed" in verdict.why
