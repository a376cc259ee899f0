"""``simulate`` on the command line, in this process."""

import json
import shlex
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
SMALL = ("simulate", "--data", "digits(limit=300)", "--model", "perceptron(hidden=8)", "--compute-s", "0.01")


def test_the_document_is_a_summary_in_virtual_time_and_what_is_said_beside(run, tmp_path):
    trace = tmp_path / "trace.json"
    status, out, _ = run(
        *(*SMALL, "--workers", "4", "--batch-per-worker", "10", "--strategy", "ssp", "--epochs", "2", "--json"),
        *("--stragglers", "lognormal(sigma=0.3)", "--stragglers", "slow(workers=1, factor=3)", "--trace", trace),
        *("--cluster", "ethernet_1g", "--failures", "failures(mtbf_s=5, checkpoint_s=0.01, restart_s=0.1)"),
    )
    found = json.loads(out)
    assert status == 0
    assert (found["workers"], found["global_batch"], found["transport"]) == (4, 40, "simulated")
    assert (found["cluster"], found["how"]) == ("ethernet_1g", "values")
    assert [record["epoch"] for record in found["history"]] == [0, 1]
    assert found["failures"]["wall_s"] == found["wall_s"] >= found["history"][-1]["train_s"]
    assert len(found["wait_s_by_worker"]) == 4
    assert json.loads(trace.read_text())["traceEvents"]


def test_thousands_of_workers_without_numbers(run):
    status, out, _ = run(*SMALL, "--sizes", "--workers", "3000", "--batch-per-worker", "2", "--steps", "5", "--json")
    found = json.loads(out)
    assert status == 0
    assert (found["how"], found["history"], found["train_loss"]) == ("folded", [], None)
    assert found["step_s"]["median"] > 0


def test_a_person_is_told_what_came_of_it(run):
    _, out, _ = run(*SMALL, "--workers", "3", "--steps", "4", "--stragglers", "exponential")
    for said in ("3 workers on ethernet_10g", "test accuracy", "of virtual time", "parts", "real gradients"):
        assert said in out


def commands():
    """What the README and docs/simulation.md show of it."""
    text = "\n".join((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "docs/simulation.md"))
    lines = text.replace("\\\n", " ").splitlines()
    return sorted({line.partition("   #")[0] for line in lines if line.startswith("manyhands simulate ")})


@pytest.mark.slow
@pytest.mark.parametrize("command", commands())
def test_the_documentations_commands_run(run, command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run(*shlex.split(command)[1:], "--json")[0] == 0


def test_the_documentation_shows_it():
    assert len(commands()) >= 4
