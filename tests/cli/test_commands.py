"""``list``, ``verify``, ``doctor`` and the help, in this process."""

import dataclasses
import json
import re

import pytest

from manyhands import verbs
from manyhands.cli import options
from manyhands.cli.summary import in_parts, seconds, size
from manyhands.communication.quota import cpu_quota
from manyhands.consistency import strategies
from manyhands.contract import StepParts
from manyhands.errors import BadInput
from manyhands.plan import Plan
from manyhands.studies import doctor, listing, parity
from manyhands.task import Task


@pytest.mark.parametrize("command", ["predict", "search"])
def test_fresh_is_for_predictions_and_searches_alike(run, monkeypatch, command):
    def verb(*_, fresh=False, **__):
        raise BadInput(f"fresh: {fresh}")

    monkeypatch.setattr(verbs, command, verb)
    assert "fresh: True" in run(command, "--data", "digits", "--fresh")[2]
    assert "fresh: False" in run(command, "--data", "digits")[2]


def test_every_part_of_a_task_and_a_plan_has_an_option():
    said = {action.dest for action in options.declare()[1]["train"]._actions}
    named = {f.name for kind in (Task, Plan) for f in dataclasses.fields(kind)}
    assert named <= said


def test_the_help_tells_the_defaults_that_hold():
    helps = {action.dest: action.help for action in options.declare()[1]["train"]._actions}
    for field in [*dataclasses.fields(Task), *dataclasses.fields(Plan)]:
        if field.default not in (None, dataclasses.MISSING):
            told = re.search(r"\(default: (.*)\)$", helps[field.name])
            assert told, field.name
            assert told.group(1).split(",")[0] == str(field.default)


def test_the_kinds_of_the_help_are_those_of_the_catalogue():
    assert tuple(listing.KINDS) == options.KINDS


def test_durations_and_sizes_have_three_digits():
    assert [seconds(s) for s in (0, 5e-7, 0.00021, 0.0042, 12.34, 4321)] == [
        "0 s",
        "under 1 µs",
        "210 µs",
        "4.2 ms",
        "12.3 s",
        "4,321 s",
    ]
    assert [size(b) for b in (0, 999, 15040, 270082048, 3e9)] == ["0 B", "999 B", "15 kB", "270 MB", "3 GB"]


# -- list --------------------------------------------------------------------------------------------------------------


def test_list_names_everything(run):
    status, out, _ = run("list", "--json")
    assert status == 0
    assert json.loads(out) == {kind: list(catalogue) for kind, catalogue in listing.KINDS.items()}
    assert "synchronous" in run("list")[1]


@pytest.mark.parametrize("kind", listing.KINDS)
def test_each_kind_is_listed_in_full(run, kind):
    status, out, _ = run("list", kind, "--json")
    entries = json.loads(out)[kind]
    assert status == 0
    assert [e["name"] for e in entries] == list(listing.KINDS[kind])
    assert all(e["about"] for e in entries)
    text = run("list", kind)[1]
    assert all(e["about"] in text for e in entries)


def test_a_strategy_is_listed_with_guarantee_paper_and_survey(run):
    entries = {e["name"]: e for e in json.loads(run("list", "strategies", "--json")[1])["strategies"]}
    assert entries["synchronous"]["parameters"] == [
        {"name": "update", "default": "auto"},
        {"name": "aggregate", "default": "mean"},
        {"name": "compress", "default": "none"},
    ]
    assert entries["synchronous"]["facts"]["guarantee"].startswith("exact")
    assert entries["slice_own_batch"]["facts"]["guarantee"] == "an approximation"
    assert "plain SGD" in entries["replica_average"]["facts"]["guarantee of replica_average(what='parameters')"]
    assert all(e["paper"] and e["survey"] for e in entries.values())


def test_a_strategy_says_what_it_sends_and_whether_its_results_repeat(run):
    facts = {e["name"]: e["facts"] for e in json.loads(run("list", "strategies", "--json")[1])["strategies"]}
    assert facts["synchronous"]["sends"] == "1 n a step with 2 workers, 1.75 n with 8"
    assert facts["local"]["sends"] == "0.0625 n a step with 2 workers, 0.109 n with 8"
    assert facts["ssp"]["sends"] == "at most 2 n a step"
    assert facts["hogwild"]["sends"] == "nothing in a step"
    assert facts["gossip"]["results"] == "repeat bit for bit"
    assert facts["hogwild"]["results"] == "differ from run to run"


def test_an_aggregation_says_how_many_it_bears_and_needs(run):
    facts = {e["name"]: e["facts"] for e in json.loads(run("list", "aggregations", "--json")[1])["aggregations"]}
    assert facts["mean"]["bears"] == "0 of 5 workers by default"
    assert facts["median"]["bears"] == "2 of 5 workers by default"
    assert facts["krum"] == {"needs": "n ≥ 2f + 3", "bears": "1 of 5 workers by default"}


def test_a_name_in_a_sentence_is_told_from_its_words(run):
    entries = {e["name"]: e["about"] for e in json.loads(run("list", "strategies", "--json")[1])["strategies"]}
    assert "for `every` steps" in entries["local"]


def test_optimizers_say_whether_they_work_element_by_element(run):
    entries = {e["name"]: e["facts"] for e in json.loads(run("list", "optimizers", "--json")[1])["optimizers"]}
    assert entries["adam"]["element by element"] == "yes"
    assert entries["lbfgs"]["element by element"] == "no, never sharded"


# -- verify ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "transports",
    [
        ("single", "shared"),
        pytest.param(("single", "threads", "shared", "gloo"), marks=[pytest.mark.slow, pytest.mark.timeout(200)]),
    ],
)
def test_verify_finds_every_strategy_right_on_every_transport_at_hand(run, transports):
    said_to = () if "gloo" in transports else ("--transport", ",".join(transports))
    status, out, _ = run("verify", "--json", *said_to)
    said = json.loads(out)
    assert status == 0, out
    assert said["passed"]
    assert {r["transport"] for r in said["rows"]} == set(transports)
    assert len(said["rows"]) == len(transports) * len(list(parity.variants()))
    assert {r["strategy"].partition("(")[0] for r in said["rows"]} == set(strategies)
    for r in said["rows"]:
        assert r["counted_B"] == r["declared_B"] or (r["sends_at_most"] and r["counted_B"] < r["declared_B"])
        assert r["difference"] <= (0 if r["workers"] == 1 else 1e-12) or r["promise"] == "approximate"
    exact = {r["strategy"].partition("(")[0] for r in said["rows"] if r["promise"] == "exact" and r["workers"] > 1}
    assert exact == {"synchronous", "replica_average", "slice_update"}


def test_verify_with_a_whole_tensor_optimizer_passes_over_what_is_refused(run):
    status, out, _ = run("verify", "--transport", "threads", "--optimizer", "lbfgs(max_iter=1)", "--json")
    promises = {r["strategy"]: r["promise"] for r in json.loads(out)["rows"]}
    assert status == 0
    assert promises["synchronous(update='sharded')"] == "refused here"
    assert promises["synchronous(update='replicated')"] == "exact"


LIARS = """
    from dataclasses import dataclass
    from typing import ClassVar
    from manyhands.consistency.slice_own_batch import SliceOwnBatch
    from manyhands.contract import Strategy, Traffic, Worker

    @dataclass(frozen=True)
    class Exact(SliceOwnBatch):
        name: ClassVar[str] = "exact"
        def __str__(self): return __name__ + ":Exact"
        def exact(self, setting): return True
        def traffic(self, numel, size, itemsize=4): return Traffic(1, 1)

    @dataclass(frozen=True)
    class Alone(Strategy):
        name: ClassVar[str] = "alone"
        paper = SliceOwnBatch.paper
        identical: ClassVar[bool] = True
        def __str__(self): return __name__ + ":Alone"
        def traffic(self, numel, size, itemsize=4): return Traffic(0, 0)
        def start(self, replica, comm): return AloneWorker(replica, comm)

    class AloneWorker(Worker):
        def step(self, batch):
            loss, _ = self.replica.gradients(batch)
            for piece in self.replica.pieces:
                self.replica.apply(piece, 0, piece.flat.numel())
            return loss

    @dataclass(frozen=True)
    class Broken(Alone):
        name: ClassVar[str] = "broken"
        def __str__(self): return __name__ + ":Broken"
        def start(self, replica, comm): raise RuntimeError("no start")
"""


@pytest.mark.parametrize(
    ("strategy", "problem"),
    [
        ("Exact", "differs from one process"),
        ("Exact", "and declares 1"),
        ("Alone", "the workers' replicas differ"),
        ("Broken", "RuntimeError: no start"),
    ],
)
def test_verify_finds_a_strategy_that_does_not_keep_its_word(run, module, strategy, problem):
    name = module(LIARS)
    status, out, _ = run("verify", "--strategy", f"{name}:{strategy}", "--transport", "threads", "--workers", 2)
    assert status == 1
    assert "FAILED" in out
    assert problem in out


# -- doctor ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_doctor_tries_every_transport(run):
    status, out, _ = run("doctor", "--json")
    said = json.loads(out)
    assert status == 0, out
    assert said["works"]
    assert said["default_transport"] == "shared"
    transports = {f["name"]: f for f in said["transports"]}
    assert list(transports) == list(listing.KINDS["transports"])
    for name in ("single", "threads", "shared", "gloo", "simulated"):
        assert transports[name]["ok"] is True, transports[name]
    assert "torch" in {f["name"] for f in said["versions"]}
    assert "cores" in {f["name"] for f in said["machine"]}


def test_a_quick_doctor_starts_no_workers(run, monkeypatch):
    def team(*_, **__):
        raise AssertionError("a worker was started")

    monkeypatch.setattr(doctor, "team", team)
    status, out, _ = run("doctor", "--quick")
    assert status == 0
    assert "not tried (--quick)" in out


def test_doctor_fails_when_the_default_transport_does(run, monkeypatch):
    make = doctor.team

    def team(transport, *rest, **settings):
        if transport == "shared":
            raise doctor.BadInput("no room in memory")
        return make("threads", *rest, **settings)

    monkeypatch.setattr(doctor, "team", team)
    status, out, _ = run("doctor")
    assert status == 1
    assert "- shared" in out
    assert "does not work: no room in memory" in out
    assert "→ --transport gloo" in out
    assert "shared, does NOT work" in out


def test_doctor_says_how_to_get_what_is_missing(run, monkeypatch, tmp_path):
    find = doctor.importlib.util.find_spec
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda n: None if n in doctor.EXTRAS else find(n))
    monkeypatch.setenv("MANYHANDS_DATA", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path))
    _, out, _ = run("doctor", "--quick")
    assert "pip install 'manyhands[mpi]'" in out
    assert "pip install 'manyhands[tensorboard]'" in out
    assert "--data mnist downloads it" in out


@pytest.mark.parametrize(
    ("files", "groups", "quota"),
    [
        ({"cpu.max": "max 100000"}, "0::/\n", None),
        ({"cpu.max": "150000 100000"}, "0::/\n", 1.5),
        ({"box/cpu.max": "50000 100000", "cpu.max": "max 100000"}, "0::/box\n", 0.5),
        ({"cpu/cpu.cfs_quota_us": "200000", "cpu/cpu.cfs_period_us": "100000"}, "1:cpu,cpuacct:/\n", 2.0),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, "1:cpu:/\n", None),
        ({"cpu/a/cpu.cfs_quota_us": "5000", "cpu/a/cpu.cfs_period_us": "10000"}, "1:cpu:/a\n0::/\n", 0.5),
        ({"cpu.max": "of another kind"}, "0::/\n", None),
        ({"cpu.max": "1 0"}, "0::/\n", None),
        ({}, "", None),
    ],
)
def test_the_control_groups_quota_is_read(tmp_path, files, groups, quota):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text + "\n")
    (tmp_path / "own").write_text(groups)
    assert cpu_quota(tmp_path, tmp_path / "own") == quota


def test_a_drawing_says_where_it_is_and_ampnets_workers_have_no_replicas(run, tmp_path):
    picture = tmp_path / "p.svg"
    status, _, err = run("plan", "--data", "digits", "--mesh", "pipeline=2", "--draw", picture)
    assert status == 0
    assert f"drawn: {picture}" in err
    assert picture.is_file()
    told = {e.name: e.facts["replicas"] for e in listing.details("strategies")}
    assert told["ampnet"].startswith("none")
    assert told["pipedream"] == "bit-identical"


def test_a_steps_parts_are_told_with_their_sum():
    said = in_parts(StepParts(compute=0.5, communicate=0.25, wait=0.125, update=0.125))
    assert said == "compute 500 ms + communicate 250 ms + wait 125 ms + update 125 ms = 1 s (means of worker 0)"
