"""Resume: a run that stopped anywhere goes on as if it had not, bit for bit on as many workers."""

import functools
import itertools
import json
import logging
from pathlib import Path

import pytest
import torch

import manyhands as mh
from manyhands.consistency import strategies
from manyhands.errors import BadInput, DamagedFile, InvalidPlan
from manyhands.testing import run_ranks
from manyhands.training import checkpoint
from tests.training.factories import HERE

STEPS = 21  # three epochs of seven steps, the last of an epoch with 2 samples of 50


def task(**changed: object) -> mh.Task:
    return mh.Task(
        **{
            "model": f"{HERE}:model",
            "data": f"{HERE}:data",
            "optimizer": f"{HERE}:momentum",
            "schedule": "step(step_size=4, gamma=0.7)",
            "batch_size": 8,
            "steps": STEPS,
            "seed": 4,
            **changed,
        }
    )


def train(what: mh.Task, workers: int = 2, **options: object) -> mh.Result:
    """On threads unless a test says where: what is kept is the same, and no processes have to be started."""
    plan = {k: options.pop(k) for k in ("strategy", "transport", "buffers", "micro_batches") if k in options}
    plan.setdefault("transport", "threads" if workers > 1 else "single")
    return mh.train(what, mh.Plan(workers=workers, threads=1, **plan), progress=False, **options)


def same_bits(a: mh.Result, b: mh.Result) -> bool:
    return a.state.keys() == b.state.keys() and all(torch.equal(a.state[k], b.state[k]) for k in a.state)


def difference(a: mh.Result, b: mh.Result) -> float:
    return max(float((a.state[k].double() - b.state[k].double()).abs().max()) for k in a.state)


def untimed(history: list[dict]) -> list[dict]:
    return [{k: v for k, v in record.items() if k != "train_s"} for record in history]


def test_the_pieces_of_this_file_stop_in_the_middle_of_an_epoch(tmp_path):
    train(task(steps=10), out=tmp_path)
    assert checkpoint.load_newest(tmp_path / "checkpoints").state["cursor"] == [1, 24, 10]


#: 52 samples: the last batch of an epoch gives each worker two, and BatchNorm wants more than one.
NORMED = {"model": f"{HERE}:normed", "data": f"{HERE}:data(n=52)"}
#: Those that draw random numbers, which threads would share, and two more.
IN_PROCESSES = ({"model": f"{HERE}:dropout"}, {**NORMED, "optimizer": "adamw(lr=0.01)"}, {}, {"clip": 0.1})
CASES = {
    "momentum": {},
    "adam": {"optimizer": "adam(lr=0.01)"},
    "adagrad": {"optimizer": "adagrad(lr=0.01, initial_accumulator_value=0.1)"},
    "sgd, decay": {"optimizer": "sgd(lr=0.1, weight_decay=0.1)"},
    "dropout": {"model": f"{HERE}:dropout"},
    "norm and dropout": {**NORMED, "optimizer": "adamw(lr=0.01)"},
    "one cycle": {"schedule": "onecycle(max_lr=0.1, total_steps=21)"},
    "clip": {"clip": 0.1},
}


@pytest.mark.parametrize("changed", CASES.values(), ids=CASES)
@pytest.mark.parametrize("update", ["sharded", pytest.param("replicated", marks=pytest.mark.slow)])
@pytest.mark.parametrize("stop", [pytest.param(3, marks=pytest.mark.slow), 10])
def test_a_resume_in_mid_epoch_is_exact(tmp_path, changed, update, stop):
    strategy = f"synchronous(update={update!r})"
    run = functools.partial(train, strategy=strategy, transport="shared" if changed in IN_PROCESSES else "threads")
    whole = run(task(**changed))
    run(task(**{**changed, "steps": stop}), out=tmp_path)
    resumed = run(task(**changed), out=tmp_path, resume=True)
    assert same_bits(resumed, whole)
    assert resumed.summary.steps == STEPS


def everywhere():
    """A start of workers over gloo takes a second, and a resume three of them: per commit for one strategy.

    One worker alone is per commit where several cannot be compared.
    """
    for name, transport in itertools.product(strategies, ["single", "threads", "gloo"]):
        again = transport == "single" and strategies.load(name).deterministic
        slow = name != "synchronous" and (again or transport == "gloo")
        yield pytest.param(name, transport, marks=[pytest.mark.slow] if slow else [])


@pytest.mark.parametrize(("name", "transport"), list(everywhere()))
def test_every_strategy_resumes_exactly_on_every_transport(tmp_path, name, transport):
    workers = 1 if transport == "single" else 2
    if workers > 1 and not strategies.load(name).deterministic:
        pytest.skip("a race decides, and no run is like another")
    run = functools.partial(train, workers=workers, strategy=name, transport=transport)
    try:
        whole = run(task())
    except InvalidPlan as refused:
        pytest.skip(str(refused))
    run(task(steps=10), out=tmp_path)
    assert same_bits(run(task(), out=tmp_path, resume=True), whole)


@pytest.mark.parametrize("policy", ["average", "rank0", "local"])
def test_buffers_resume_exactly_under_every_policy(tmp_path, policy):
    what = NORMED
    run = functools.partial(train, buffers=policy, transport="shared")  # it draws random numbers
    whole = run(task(**what))
    run(task(steps=10, **what), out=tmp_path)
    assert same_bits(run(task(**what), out=tmp_path, resume=True), whole)


def test_stopping_at_every_few_steps_changes_nothing(tmp_path):
    run = functools.partial(train, transport="shared")  # threads would share their random numbers
    whole = run(task(model=f"{HERE}:dropout"))
    for stop in (1, 2, 7, 8, 14, 20, STEPS):
        result = run(task(model=f"{HERE}:dropout", steps=stop), out=tmp_path, resume=stop > 1)
        assert result.summary.steps == stop
    assert same_bits(result, whole)


def test_looking_and_writing_change_nothing(tmp_path):
    """Checkpoints and evaluations on the way draw no random numbers and touch no state."""
    what = {**NORMED, "epochs": 3, "steps": None}
    quiet = train(task(**what), evaluate="never", transport="shared")
    watched = train(task(**what), evaluate="epoch", out=tmp_path, checkpoint=2, transport="shared")
    assert same_bits(quiet, watched)


def test_the_history_goes_on_where_it_was(tmp_path):
    whole = train(task(steps=None, epochs=3))
    train(task(steps=None, epochs=2), out=tmp_path)
    resumed = train(task(steps=None, epochs=3), out=tmp_path, resume=True)
    assert untimed(resumed.history) == untimed(whole.history)


def test_a_finished_run_resumes_to_itself_and_says_so(tmp_path, caplog):
    done = train(task(), out=tmp_path)
    again = train(task(), out=tmp_path, resume=True)
    assert "nothing was left to do" in caplog.text
    assert same_bits(done, again)
    assert again.summary.steps == STEPS


def files(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file() and p.name != "events.jsonl"}


@pytest.mark.parametrize("length", [{}, {"steps": None, "epochs": 3}, {"target_accuracy": 0.01}], ids=str)
def test_a_finished_run_that_is_resumed_keeps_its_summary_and_plan(tmp_path, length):
    done = train(task(**length), out=tmp_path, evaluate=5)
    before = files(tmp_path)
    again = train(task(**length), workers=1, out=tmp_path, evaluate=5, resume=True)
    assert again.summary == done.summary
    assert again.summary.samples_per_s > 0
    assert again.history == done.history
    assert files(tmp_path) == before


def test_a_run_that_ended_in_mid_epoch_has_the_history_of_one_that_did_not(tmp_path):
    length = {"steps": None, "epochs": 3}
    whole = train(task(**length))
    for i, stop in enumerate((3, 10, 12)):
        train(task(steps=stop), out=tmp_path, resume=i > 0)
    resumed = train(task(**length), out=tmp_path, resume=True)
    assert untimed(resumed.history) == untimed(whole.history)
    assert resumed.history[-1]["train_s"] > resumed.history[0]["train_s"] > 0


def test_the_loss_of_a_resumed_epoch_is_of_all_of_it_on_another_number_of_workers_too(tmp_path):
    whole = train(task(), workers=1)
    train(task(steps=10), workers=3, out=tmp_path)
    resumed = train(task(), workers=2, out=tmp_path, resume=True)
    assert len(resumed.history) == len(whole.history)
    for a, b in zip(resumed.history, whole.history, strict=True):
        assert a["train_loss"] == pytest.approx(b["train_loss"], abs=1e-12)


@pytest.mark.parametrize("transport", ["shared", "gloo"])
def test_pythons_and_numpys_generators_go_on_where_they_were(tmp_path, transport):
    """In processes of their own: the type checker of this one (beartype) draws from ``random`` as it goes."""
    what = {"model": f"{HERE}:Drawing"}
    whole = train(task(**what), transport=transport)
    train(task(steps=10, **what), transport=transport, out=tmp_path)
    assert same_bits(train(task(**what), transport=transport, out=tmp_path, resume=True), whole)


@pytest.mark.parametrize("workers", [1, 2])
def test_extra_state_that_is_a_tensor_is_kept(tmp_path, workers):
    what = {"model": f"{HERE}:Extra"}
    whole = train(task(**what), workers)
    assert whole.state["_extra_state"] == STEPS
    train(task(steps=10, **what), workers, out=tmp_path)
    assert same_bits(train(task(**what), workers, out=tmp_path, resume=True), whole)


def test_which_checkpoint_was_taken_up_is_an_event(tmp_path):
    train(task(steps=10), out=tmp_path, checkpoint=4)
    damage(tmp_path / "checkpoints" / "step-00000010" / "model.safetensors")
    train(task(), out=tmp_path, resume=True)
    events = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    (resumed,) = [e for e in events if e["event"] == "resumed"]
    assert resumed["step"] == 8
    assert resumed["path"].endswith("step-00000008")
    (skipped,) = resumed["skipped"]
    assert "step-00000010" in skipped


def choosing(comm, folder):
    """What two ranks take that do not see the same files: rank 1 has a newer checkpoint, or another under the name."""
    from manyhands.training import checkpoint
    from manyhands.training.gather import first_decides

    place = Path(folder) / f"rank-{comm.rank}"

    def choose():
        found = checkpoint.load_newest(place)
        return [found.path.name, checkpoint.manifest_sum(found.path)]

    name, manifest = first_decides(comm, choose)
    try:
        return checkpoint.load_same(place / name, manifest).step
    except DamagedFile as e:
        return str(e)


@pytest.mark.parametrize(("other", "found"), [(1.0, [3, 3]), (2.0, [3, "rank 0"])])
def test_every_rank_takes_the_checkpoint_that_rank_0_chose(tmp_path, other, found):
    for rank, value in enumerate((1.0, other)):
        place = tmp_path / f"rank-{rank}"
        checkpoint.save(place, 3, model={"w": torch.tensor([value])}, state={})
    checkpoint.save(tmp_path / "rank-1", 5, model={"w": torch.tensor([0.0])}, state={})
    first, second = run_ranks(choosing, 2, args=(str(tmp_path),))
    assert first == found[0]
    assert second == found[1] or found[1] in second


def test_what_rank_0_refuses_all_refuse(tmp_path):
    assert run_ranks(refusing, 3) == [["DamagedFile", "spoilt"]] * 3


def refusing(comm):
    from manyhands.training.gather import first_decides

    def refuse():
        raise DamagedFile("spoilt")

    try:
        first_decides(comm, refuse)
    except BadInput as e:
        return [type(e).__name__, str(e)]


# -- on another number of workers --------------------------------------------------------------------------------------


#: Per commit: each change of their number, each optimizer, each update.
MOVED = [
    ("sharded", f"{HERE}:momentum", 2, 3),
    ("sharded", "adam(lr=0.01)", 4, 2),
    ("replicated", f"{HERE}:momentum", 2, 1),
    ("replicated", "adam(lr=0.01)", 1, 2),
]


def moves():
    for update, optimizer, (before, after) in itertools.product(
        ["sharded", "replicated"], [f"{HERE}:momentum", "adam(lr=0.01)"], [(1, 2), (2, 1), (2, 3), (4, 2)]
    ):
        case = update, optimizer, before, after
        yield pytest.param(*case, marks=[] if case in MOVED else [pytest.mark.slow])


@pytest.mark.parametrize(("update", "optimizer", "before", "after"), list(moves()))
def test_a_resume_on_another_number_of_workers_goes_on_to_rounding(tmp_path, before, after, optimizer, update):
    """Every sample is still seen once an epoch, or the results would differ by far more than 1e-12."""
    strategy = f"synchronous(update={update!r})"
    whole = train(task(optimizer=optimizer), workers=1)
    train(task(optimizer=optimizer, steps=10), workers=before, strategy=strategy, out=tmp_path)
    resumed = train(task(optimizer=optimizer), workers=after, strategy=strategy, out=tmp_path, resume=True)
    assert difference(resumed, whole) <= 1e-12


def test_a_resume_under_another_strategy_and_transport_goes_on_to_rounding(tmp_path):
    whole = train(task(), workers=1)
    stops = {5: ("synchronous(update='sharded')", 2, "shared"), 9: ("replica_average", 3, "threads")}
    for i, (stop, (strategy, workers, transport)) in enumerate(stops.items()):
        train(task(steps=stop), workers, strategy=strategy, transport=transport, out=tmp_path, resume=i > 0)
    resumed = train(task(), 2, strategy="slice_update", transport="gloo", out=tmp_path, resume=True)
    assert difference(resumed, whole) <= 1e-12


# -- what stands in the way --------------------------------------------------------------------------------------------


def test_a_resume_with_another_model_shows_a_table_of_differences(tmp_path):
    train(task(steps=3), out=tmp_path)
    with pytest.raises(BadInput) as e:
        train(task(model=f"{HERE}:model(hidden=31)"), out=tmp_path, resume=True)
    said = str(e.value)
    for name, here, there in (("0.weight", "31", "30"), ("0.bias", "31", "30"), ("2.weight", "31", "30")):
        (line,) = [line for line in said.splitlines() if name in line]
        assert here in line
        assert there in line
    assert "2.bias" not in said


def damage(path):
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)


def test_when_the_newest_checkpoint_is_damaged_the_one_before_is_used_and_it_is_said(tmp_path, caplog):
    whole = train(task(), workers=1)
    train(task(steps=10), workers=1, out=tmp_path, checkpoint=4)
    damage(tmp_path / "checkpoints" / "step-00000010" / "state.safetensors")
    with caplog.at_level(logging.WARNING, "manyhands"):
        resumed = train(task(), workers=1, out=tmp_path, resume=True)
    assert same_bits(resumed, whole)
    assert "step-00000010" in caplog.text
    assert "passed over" in caplog.text


def test_when_every_checkpoint_is_damaged_nothing_is_trained(tmp_path):
    train(task(steps=3), out=tmp_path)
    damage(tmp_path / "checkpoints" / "step-00000003" / "model.safetensors")
    with pytest.raises(DamagedFile, match="step-00000003"):
        train(task(), out=tmp_path, resume=True)


def test_there_must_be_something_to_resume(tmp_path):
    with pytest.raises(BadInput, match="no checkpoint"):
        train(task(), out=tmp_path, resume=True)
    with pytest.raises(BadInput, match="out"):
        train(task(), resume=True)


ADAM = {"optimizer": "adam(lr=0.01)"}
#: What the run began with, what it is to go on with, and both as the message names them. All at sample 24 of 50.
OTHER_RUNS = {
    "adam to sgd": (ADAM, {}, ["torch.optim.adam.Adam", "torch.optim.sgd.SGD"]),
    "sgd to adam": ({}, ADAM, ["torch.optim.sgd.SGD", "torch.optim.adam.Adam"]),
    "amsgrad": (ADAM, {"optimizer": "adam(lr=0.01, amsgrad=True)"}, ["Adam with amsgrad"]),
    "seed": ({}, {"seed": 5}, ["seed 4", "5"]),
    "fewer samples": ({}, {"data": f"{HERE}:data(n=40)"}, ["50", "40", "data set"]),
    "more samples": ({}, {"data": f"{HERE}:data(n=52)"}, ["50", "52", "data set"]),
    "data": ({}, {"data": f"{HERE}:regression"}, ["made up", "regression"]),
    "cosine over more steps": ({"schedule": "cosine"}, {"schedule": "cosine"}, ["10", "21"]),
    "one cycle over more steps": (
        {"schedule": "onecycle(max_lr=0.1)"},
        {"schedule": "onecycle(max_lr=0.1)"},
        ["10", "21"],
    ),
    "step to cosine": ({}, {"schedule": "cosine"}, ["step(step_size=4, gamma=0.7)", "cosine"]),
    "step to none": ({}, {"schedule": None}, ["step(step_size=4, gamma=0.7)", "None"]),
    "rate under a schedule": (
        {"optimizer": "sgd(lr=0.1)"},
        {"optimizer": "sgd(lr=0.5)"},
        ["0.1", "0.5", "--lr"],
    ),
}


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize(("before", "after", "said"), OTHER_RUNS.values(), ids=OTHER_RUNS)
def test_another_run_is_refused_naming_both_values_and_what_works(tmp_path, before, after, said, workers):
    train(task(**{"steps": 10, **before}), workers, out=tmp_path)
    kept = files(tmp_path)
    with pytest.raises(BadInput) as e:
        train(task(**after), workers, out=tmp_path, resume=True)
    for word in (*said, "Resume with" if "--lr" not in said else "Leave", "model.safetensors", "--out"):
        assert word in str(e.value)
    assert files(tmp_path) == kept  # plan.toml, metrics and summary are those of the run that was


def test_what_may_change_at_an_epochs_end_does(tmp_path):
    train(task(steps=7), out=tmp_path)
    assert train(task(seed=5), out=tmp_path, resume=True).summary.seed == 5


def test_without_a_schedule_a_resume_may_have_another_learning_rate(tmp_path):
    train(task(schedule=None, optimizer="sgd(lr=0.1)", steps=10), out=tmp_path)
    slow = train(task(schedule=None, optimizer="sgd(lr=0.01)"), out=tmp_path, resume=True)
    assert slow.summary.steps == STEPS


def test_a_tied_model_is_stored_once_and_resumes_exactly(tmp_path):
    from safetensors.torch import load_file

    what = {"model": f"{HERE}:tied"}
    whole = train(task(**what))
    train(task(steps=10, **what), out=tmp_path)
    stored = load_file(tmp_path / "checkpoints" / "step-00000010" / "model.safetensors")
    assert len(stored) == len(whole.state) - 1
    assert same_bits(train(task(**what), out=tmp_path, resume=True), whole)


# -- from the command line ---------------------------------------------------------------------------------------------


def test_a_resume_on_another_number_of_workers_decides_anew_how_they_meet(tmp_path):
    """``plan.toml`` says what was decided for one worker: transport=single, all cores' threads."""
    from manyhands.cli import options, request

    def asked(*typed):
        return request.requested(options.parse(["train", "--resume", "--out", str(tmp_path), *typed]))[1]

    (tmp_path / "plan.toml").write_text("[plan]\nworkers = 1\ntransport = 'single'\nthreads = 2\nmesh = 'data=1'")
    assert (asked("--workers", "2").transport, asked("--workers", "2").threads) == ("auto", 0)
    assert (asked("--workers", "1").transport, asked().transport) == ("single", "single")
    said = asked("--workers", "2", "--transport", "gloo", "--threads", "1")
    assert (said.transport, said.threads, said.mesh) == ("gloo", 1, None)


def test_a_module_that_does_not_import_is_named_with_the_line(tmp_path, monkeypatch):
    from manyhands.catalogue import import_object

    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "users_broken.py").write_text("import math\n\nmath.nothing\n")
    (tmp_path / "users_missing.py").write_text("\nimport no_such_package\n")
    with pytest.raises(BadInput, match=r"AttributeError: .*users_broken\.py, line 3\)"):
        import_object("users_broken:model")
    with pytest.raises(BadInput, match=r"no_such_package.*users_missing\.py, line 2\)"):
        import_object("users_missing:model")
