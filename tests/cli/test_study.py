"""``study`` and ``report``: what can be said to them, and what they answer."""

import json
import re

import pytest

from manyhands import studies, verbs
from manyhands.errors import BadInput
from manyhands.studies import calibration, presets
from manyhands.studies.grid import Study
from tests.studies.made import measurement

FILE = """
[study]
repeats = 1

[task]
model = "logistic"
data = "digits(limit=200)"
batch_size = 50
epochs = 1

[plan]
threads = 1

[[grid]]
name = "speed"
plan.workers = [1, 2]

[[grid]]
name = "impossible"
plan.workers = 2
plan.transport = "single"
"""


@pytest.fixture
def file(tmp_path, monkeypatch):
    """A study of the user's, in the current folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.toml").write_text(FILE)
    return "mine.toml"


@pytest.fixture
def trained(monkeypatch):
    """Nothing is trained; the tasks that would have been are listed."""
    calls = []

    def train(task, plan, **_):
        calls.append(task)
        return verbs.Result(None, plan, measurement(plan.workers), [], None)

    def predict(task, plan, **_):
        raise BadInput("nothing is predicted here")

    monkeypatch.setattr(verbs, "train", train)
    monkeypatch.setattr(verbs, "predict", predict)
    monkeypatch.setattr(calibration, "loop_s", lambda: 1.0)
    return calls


def test_a_study_runs_goes_on_and_runs_again(run, file, trained, tmp_path):
    status, out, err = run("study", file, "--out", "there", "--json")
    said = json.loads(out)
    assert status == 0
    assert [row["status"] for row in said["rows"]] == ["refused", "done", "done"]
    assert "[2/2] synchronous with 2 workers on shared, repeat 1: 10 ms a step" in err
    assert len(trained) == 2
    run("study", file, "--out", "there", "-q")
    assert len(trained) == 2
    run("study", file, "--out", "there", "-q", "--again")
    assert len(trained) == 4
    run("study", file, "--out", "there", "-q", "--repeats", 2)
    assert len(trained) == 6
    assert len(json.loads(run("report", "there", "--json")[1])["rows"]) == 5


def test_what_is_said_of_the_task_goes_before_the_file(run, file, trained):
    run(
        "study", file, "--out", "there", "-q", "--model", "perceptron", "--steps", 3, "--batch-size", 20, "--workers", 1
    )
    (task,) = trained
    assert (task.model, task.data, task.batch_size, task.steps, task.epochs) == (
        "perceptron",
        "digits(limit=200)",
        20,
        3,
        None,
    )


def test_a_dry_run_starts_no_study(run, file, trained, tmp_path):
    status, out, _ = run("study", file, "--dry-run", "--out", "there")
    assert status == 0
    assert trained == []
    assert not (tmp_path / "there").exists()
    lines = out.splitlines()
    assert lines[0] == "Study mine: 3 cells"
    assert lines[lines.index("speed:") + 1].startswith("  synchronous with 1 worker ")
    assert "refused: transport=single with 2 workers" in lines[lines.index("impossible:") + 1]
    assert re.search(r"2 runs, (a few seconds|about [\d.]+ minutes) on this machine\.", out)  # as busy as it is


@pytest.mark.slow
def test_a_dry_run_is_data_and_knows_what_is_done(run, file, trained):
    said = json.loads(run("study", file, "--dry-run", "--json")[1])
    assert (said["runs"], said["done"], said["refused"]) == (2, 0, 1)
    assert [cell["grids"] for cell in said["cells"]] == [["speed"], ["speed"], ["impossible"]]
    more = json.loads(run("study", file, "--dry-run", "--simulate", "4..8", "--json")[1])["cells"]
    assert [cell["measure"] for cell in more] == ["train"] * 3 + ["simulate"] * 2
    run("study", file, "--out", "there", "-q")
    assert json.loads(run("study", file, "--out", "there", "--dry-run", "--json")[1])["done"] == 2
    assert json.loads(run("study", file, "--out", "there", "--dry-run", "--again", "--json")[1])["runs"] == 2


def test_the_short_form_of_a_built_in_study(run, trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    seen = []
    one = Study("default", {"data": "digits(limit=200)", "model": "logistic"}, {"workers": 1}, repeats=1)

    def default(most=None, *, quick=False):
        seen.append((most, quick))
        return one

    monkeypatch.setattr(presets, "default", default)
    assert run("study", "--quick", "--workers", 3, "--out", "there", "-q")[0] == 0
    assert seen == [(3, True)]
    assert presets.default(2, quick=True) is one


def test_every_short_form_is_shorter():
    full, short = presets.default(2), presets.default(2, quick=True)
    assert [cell.plan for cell in short.cells()] == [cell.plan for cell in full.cells()]
    assert short.repeats < full.repeats
    assert short.task["epochs"] < full.task["epochs"]


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        (("quick", "--quick"), "study quick has no short form"),
        (("mine.toml", "--quick"), "only built-in studies have a short form"),
        (("mine.toml", "--again"), "--again without --out"),
        (("mine.toml", "--epochs", "1", "--steps", "1"), "not allowed with argument"),
        (("mine.toml", "--batch-size", "1", "--batch-per-worker", "1"), "not allowed with argument"),
        (("xin-ma", "--model", "cnn"), "only data can be said"),
        (("mine.toml", "--workers", "0"), "workers=0"),
        (("mine.toml", "--repeats", "0"), "repeats=0"),
        (("mine.toml", "--simulate", "8"), "it is FIRST..LAST"),
        (("mine.toml", "--simulate", "2..8", "--cluster", "ethernet_1"), "ethernet_1"),
        (("mine.toml", "--cluster", "ethernet_1g"), "without simulate"),
        (("compare", "--simulate", "2..8"), "shows no simulated plans"),
        (("mine.toml", "--model", "cn", "--dry-run"), None),
        (("mine.toml", "--learning", "1"), "no option of manyhands study named '--learning'"),
    ],
)
def test_a_mistake_is_answered_in_one_message(run, file, trained, typed, message):
    status, out, err = run("study", *typed)
    assert status == 2
    if message is None:  # every cell is refused, each with its reason
        assert out.count("Did you mean 'cnn'?") >= 2
    else:
        assert message in err
        assert out == ""
    assert trained == []


def test_a_report_exports_the_rows(run, file, trained, tmp_path):
    run("study", file, "--out", "there", "-q")
    status, _, _ = run("report", "there", "--export", "rows.csv", "--export", "more.csv")
    assert status == 0
    assert (tmp_path / "rows.csv").read_text() == (tmp_path / "more.csv").read_text()
    assert len((tmp_path / "rows.csv").read_text().splitlines()) == 4
    status, _, err = run("report", "there", "--export", "rows.xls")
    assert status == 2
    assert "rows.xls" in err


def test_every_built_in_study_can_be_found():
    for name in studies.studies:
        assert studies.studies.load(name)(2).name == name


def test_all_that_makes_a_task_can_be_said(run, file, trained):
    said = ("--schedule", "cosine", "--clip", 1.5, "--batch-per-worker", 7, "--seconds", 9, "--seed", 3)
    assert run("study", file, "--out", "there", "-q", *said, "--target-accuracy", 0.5)[0] == 0
    one, two = trained
    assert (one.schedule, one.clip, one.seconds, one.seed, one.target_accuracy) == ("cosine", 1.5, 9.0, 3, 0.5)
    assert (one.batch_size, two.batch_size) == (7, 14)


def test_every_field_of_a_task_is_an_option():
    from manyhands.cli.options import STUDY_TASK
    from manyhands.studies.grid import TASK_KEYS

    assert set(STUDY_TASK) == set(TASK_KEYS)


def test_a_dry_run_counts_what_was_looked_at_too_seldom(run, file, trained, tmp_path):
    run("study", file, "--out", "there", "-q")
    (tmp_path / file).write_text(FILE.replace("repeats = 1", 'repeats = 1\nevaluate = "epoch"'))
    assert json.loads(run("study", file, "--out", "there", "--dry-run", "--json")[1])["done"] == 0
