"""Resume: a run that stopped anywhere goes on as if it had not, bit for bit on as many workers."""

import functools
import logging

import pytest
import torch

import manyhands as mh
from manyhands.consistency import strategies
from manyhands.errors import BadInput, DamagedFile
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
    plan = {k: options.pop(k) for k in ("strategy", "transport", "buffers", "micro_batches") if k in options}
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
@pytest.mark.parametrize("update", ["sharded", "replicated"])
@pytest.mark.parametrize("stop", [3, 10])
def test_a_resume_in_mid_epoch_is_exact(tmp_path, changed, update, stop):
    strategy = f"synchronous(update={update!r})"
    whole = train(task(**changed), strategy=strategy)
    train(task(**{**changed, "steps": stop}), strategy=strategy, out=tmp_path)
    resumed = train(task(**changed), strategy=strategy, out=tmp_path, resume=True)
    assert same_bits(resumed, whole)
    assert resumed.summary.steps == STEPS


@pytest.mark.parametrize("transport", ["single", "threads", "gloo"])
@pytest.mark.parametrize("name", strategies)
def test_every_strategy_resumes_exactly_on_every_transport(tmp_path, name, transport):
    workers = 1 if transport == "single" else 2
    run = functools.partial(train, workers=workers, strategy=name, transport=transport)
    whole = run(task())
    run(task(steps=10), out=tmp_path)
    assert same_bits(run(task(), out=tmp_path, resume=True), whole)


@pytest.mark.parametrize("policy", ["average", "rank0", "local"])
def test_buffers_resume_exactly_under_every_policy(tmp_path, policy):
    what = NORMED
    whole = train(task(**what), buffers=policy)
    train(task(steps=10, **what), buffers=policy, out=tmp_path)
    assert same_bits(train(task(**what), buffers=policy, out=tmp_path, resume=True), whole)


def test_stopping_at_every_few_steps_changes_nothing(tmp_path):
    whole = train(task(model=f"{HERE}:dropout"))
    for stop in (1, 2, 7, 8, 14, 20, STEPS):
        result = train(task(model=f"{HERE}:dropout", steps=stop), out=tmp_path, resume=stop > 1)
        assert result.summary.steps == stop
    assert same_bits(result, whole)


def test_looking_and_writing_change_nothing(tmp_path):
    """Checkpoints and evaluations on the way draw no random numbers and touch no state."""
    what = {**NORMED, "epochs": 3, "steps": None}
    quiet = train(task(**what), evaluate="never")
    watched = train(task(**what), evaluate="epoch", out=tmp_path, checkpoint_steps=2)
    assert same_bits(quiet, watched)


def test_the_history_goes_on_where_it_was(tmp_path):
    whole = train(task(steps=None, epochs=3))
    train(task(steps=None, epochs=2), out=tmp_path)
    resumed = train(task(steps=None, epochs=3), out=tmp_path, resume=True)
    assert untimed(resumed.history) == untimed(whole.history)


def test_a_finished_run_resumes_to_itself(tmp_path):
    done = train(task(), out=tmp_path)
    again = train(task(), out=tmp_path, resume=True)
    assert same_bits(done, again)
    assert again.summary.steps == STEPS


# -- on another number of workers --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1), (2, 3), (4, 2)])
@pytest.mark.parametrize("optimizer", [f"{HERE}:momentum", "adam(lr=0.01)"])
@pytest.mark.parametrize("update", ["sharded", "replicated"])
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
    train(task(steps=10), workers=1, out=tmp_path, checkpoint_steps=4)
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


def test_other_data_is_refused_where_the_cursor_does_not_fit(tmp_path):
    train(task(steps=6), out=tmp_path)  # at sample 48 of 50
    with pytest.raises(BadInput, match="data set"):
        train(task(data=f"{HERE}:data(n=40)"), out=tmp_path, resume=True)


def test_a_tied_model_is_stored_once_and_resumes_exactly(tmp_path):
    from safetensors.torch import load_file

    what = {"model": f"{HERE}:tied"}
    whole = train(task(**what))
    train(task(steps=10, **what), out=tmp_path)
    stored = load_file(tmp_path / "checkpoints" / "step-00000010" / "model.safetensors")
    assert len(stored) == len(whole.state) - 1
    assert same_bits(train(task(**what), out=tmp_path, resume=True), whole)
