"""docs/strategies.md: no strategy is missing on the page, in its picture or in its table, and what is drawn is true."""

import importlib.util
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

from manyhands.consistency import strategies
from manyhands.consistency.robust import aggregations
from manyhands.plan import strategy_from
from manyhands.studies import presets
from tests.studies.made import measurement, row

DOCS = Path(__file__).parents[2] / "docs"
pytestmark = pytest.mark.skipif(not DOCS.is_dir(), reason="the documentation is not here")


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("strategies_page", DOCS / "strategies.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def rows():
    """Of every cell of `spectrum`, each worker sending two parameters' bytes."""
    found = []
    for cell in presets.spectrum(2).cells():
        step_s = 0.001 if cell.plan["workers"] == 1 else 0.0005
        done = measurement(cell.plan["workers"], step_s, wait_s_by_worker=[0.0, 0.0001], staleness_mean=1.0)
        found.append(row(cell, measured=done))
    return found


def words(svg):
    return {e.text for e in ElementTree.fromstring(svg).iter() if e.tag.endswith("text")}


def test_the_page_has_a_paragraph_on_every_strategy_and_a_line_on_every_rule():
    page = (DOCS / "strategies.md").read_text(encoding="utf-8")
    begun = set(re.findall(r"^\*\*`(\w+)", page, re.MULTILINE))
    assert begun == set(strategies)
    assert set(re.findall(r"^\| `(\w+)[^`]*` \|.* f?", page, re.MULTILINE)) >= set(aggregations) - {"mean"}


def test_the_table_of_the_page_has_a_row_for_each_strategy_of_spectrum():
    page = (DOCS / "strategies.md").read_text(encoding="utf-8")
    shown = {c.plan["strategy"] for c in presets.spectrum(2).cells() if c.plan["workers"] > 1}
    for text in shown:
        assert f"\n| `{text}` |" in page, text


def test_the_picture_has_every_strategy_and_is_the_one_that_the_script_draws(script):
    placed = [name for _, _, names in script.PLACES for name in names]
    assert {strategy_from(name).name for name in placed} == set(strategies)
    assert len(placed) == len(set(placed))
    drawn = words(script.draw())
    assert {script.CALLED.get(name, name) for name in placed} <= drawn
    assert words(script.PICTURE.read_text(encoding="utf-8")) == drawn


def test_what_is_drawn_is_what_is_declared(script):
    places = {
        name: sent for _, _, names in script.PLACES for sent, all_ in script.places(names).items() for name in all_
    }
    assert places["synchronous"] == (1.0, 1.75, 2 * 63 / 64)
    assert places["replica_average"] == places["synchronous(aggregate=median)"] == (1.0, 7.0, 63.0)
    assert places["local"] == (1 / 16, 1.75 / 16, 2 * 63 / 64 / 16)
    assert places["gossip"] == (1.0, 2.0, 2.0)
    assert places["ssp"] == (1.25, 2.0, 2.0)
    assert places["hogwild"] == (0.0, 0.0, 0.0)


def test_a_promise_is_the_strategys_own(script):
    assert script.promise(strategy_from("slice_update")) is script.EXACT
    assert script.promise(strategy_from("gossip")) is script.REPEATS
    assert script.promise(strategy_from("ssp(staleness=0)")) is script.EXACT
    assert script.promise(strategy_from("hogwild")) is script.RACES


def test_the_table_has_a_line_a_strategy_and_one_for_one_process(script, rows):
    lines = [line for line in script.table(rows).splitlines() if line.startswith("|")]
    shown = {r.plan["strategy"] for r in rows if r.workers > 1}
    assert len(lines) == 2 + 1 + len(shown)
    (one,) = (line for line in lines if line.startswith("| one process"))
    (local,) = (line for line in lines if line.startswith("| `local`"))
    assert [cell.strip() for cell in one.split("|")[5:7]] == ["1000 µs", "1"]
    assert [cell.strip() for cell in local.split("|")[2:3]] == ["repeats"]
    assert [cell.strip() for cell in local.split("|")[4:7]] == ["1 n", "500 µs", "2.00"]


def test_the_page_is_written_between_its_markers_and_nowhere_else(script, rows, tmp_path, monkeypatch):
    page = tmp_path / "page.md"
    page.write_text(f"before\n\n{script.BEGIN}\nold\n{script.END}\nafter\n", encoding="utf-8")
    monkeypatch.setattr(script, "PAGE", page)
    monkeypatch.setattr(script, "read", lambda folder: rows)
    script.write(tmp_path)
    text = page.read_text(encoding="utf-8")
    assert text.startswith(f"before\n\n{script.BEGIN}\n\n| strategy |")
    assert text.endswith(f"{script.END}\nafter\n")
    assert "old" not in text
    script.write(tmp_path)
    assert page.read_text(encoding="utf-8") == text
