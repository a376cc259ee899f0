"""The study of compressors: which runs it makes, and what it makes of their rows."""

import dataclasses
import math

import pytest

from manyhands.communication.compression import compressors
from manyhands.communication.compression.compressor import compressor_from
from manyhands.contract import StepParts
from manyhands.studies.compression import report
from manyhands.studies.compression.design import compression
from manyhands.studies.compression.settings import SETTINGS, recommended
from manyhands.studies.finding import find
from manyhands.studies.listing import details
from manyhands.studies.summary import summarize
from manyhands.studies.table import COMPRESSION, table
from tests.studies.made import measurement, row

N = 28_938


def rows_of(cells):
    """Every run ends at 98 % but those of `two_bit`, which learn less."""
    for cell in cells:
        compress = cell.plan["compress"]
        none, text = compress == "none", cell.task["model"] != "cnn"
        sent_B = 4 * N if none else 1000.0
        end = 0.90 if "two_bit" in compress else 0.98
        history = [
            {
                "step": s,
                "samples": s * 100,
                "train_s": 0.01 * s,
                "test_accuracy": end - math.exp(-s / 50),
                "test_loss": 2,
            }
            for s in (100, 300, 600)
        ]
        found = measurement(
            2,
            parameters=N,
            model=str(cell.task["model"]),
            data="text" if text else "mnist",
            sent_B_per_step=sent_B,
            step_parts_s=StepParts(0.004, 0.1, 0.2, 0.001),
            compression_ratio=None if none else 4 * N / sent_B,
            compression_error=None if none else 0.5,
            compression_kept=None if none else 0.25,
            compression_s=None if none else 0.002,
        )
        yield dataclasses.replace(row(cell, measured=found), history=history)


@pytest.fixture(scope="module")
def analysis():
    study = compression(quick=True)
    rows = list(rows_of(study.cells()))
    return report.analyse(study, rows, summarize(study.cells(), rows))


@pytest.mark.parametrize("task", SETTINGS)
def test_every_compressor_has_one_recommended_setting_and_a_dense_run_to_be_held_against(task):
    of = SETTINGS[task]
    assert sorted(compressor_from(setting.compress).name for setting in of.schemes) == sorted({*compressors} - {"none"})
    assert {setting.base for setting in of.schemes} <= {setting.optimizer for setting in of.dense}


def test_what_is_recommended_is_listed():
    entry = next(e for e in details("compressors") if e.name == "top_k")
    said = [f"{setting.compress} with {setting.optimizer} on {task}" for task, setting in recommended("top_k")]
    assert entry.facts["recommended"] == "; ".join(said)
    assert len(said) == len(SETTINGS)


def test_every_run_can_be_planned():
    study = find("compression")
    for cell in study.cells():
        cell.make()


def test_the_short_form_has_the_images_only():
    assert {cell.task["model"] for cell in find("compression", quick=True).cells()} == {"cnn"}
    assert {cell.grids for cell in find("compression").cells()} == {("image",), ("text",)}


def test_it_says_who_is_as_good_as_dense_and_who_sends_least(analysis):
    schemes = len(SETTINGS["cnn"].schemes)
    assert f"{schemes - 1} of {schemes} schemes end within 0.5 points of dense exchange" in analysis.sentences[0]
    assert f"{4 * N / 1000:,.3g} times fewer bytes" in analysis.sentences[1]
    (listing,) = analysis.tables
    verdict = {cells[0]: cells[2] for cells in listing.body}
    assert [name for name, text in verdict.items() if "beyond" in text] == [n for n in verdict if "two_bit" in n]


def test_a_step_on_the_link_is_what_was_measured_plus_rounds_and_bytes(analysis):
    chart = next(c for c in analysis.charts if c.name.startswith("by-link-sparsifiers"))
    assert {series.role for series in chart.series} == {"computed"}
    top_k = next(s for s in chart.series if s.name.startswith("top_k"))
    step_s = 0.004 + 0.001 + 0.002 + 2 * 50e-6 + 1000 / (100e6 / 8)
    assert [p.x for p in top_k.points] == pytest.approx([step_s * s for s in (100, 300, 600)])
    dense = next(s for s in chart.series if s.name == "none")
    assert dense.points[0].x == pytest.approx(100 * (0.005 + 50e-6 + 4 * N / (100e6 / 8)))


def test_bytes_are_drawn_as_measured_in_every_family(analysis):
    charts = [c for c in analysis.charts if c.name.startswith("by-bytes")]
    assert len(charts) == len(report.FAMILIES)
    drawn = {series.name for chart in charts for series in chart.series}
    assert drawn == {setting.compress for setting in SETTINGS["cnn"].settings}
    for chart in charts:
        assert {series.role for series in chart.series} == {"measured"}
        assert [p.x for p in chart.series[0].points] == pytest.approx([4e-6 * N * s for s in (100, 300, 600)])


def test_the_table_of_cells_has_columns_for_it_where_something_was_compressed():
    study = compression(quick=True)
    rows = list(rows_of(study.cells()))
    lines = summarize(study.cells(), rows)
    head, body = table(lines).head, table(lines).body
    at = head.index(COMPRESSION[0])
    assert head[at : at + 4] == COMPRESSION
    told = {row[at : at + 4] for row in body}
    assert told == {("–", "–", "–", "–"), ("115.8×", "0.5", "0.25", "2.00")}
    dense = [line for line in lines if line.cell.plan["compress"] == "none"]
    assert not set(COMPRESSION) & set(table(dense).head)
