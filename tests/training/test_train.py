"""`mh.train` from Python: plain torch for one worker, the same for any number, and what a run leaves on disk."""

import contextlib
import functools
import json
import subprocess
import sys
import textwrap
import time
import tomllib
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

import manyhands as mh
from manyhands.errors import BadInput, InvalidPlan, UnknownName
from manyhands.plan import Plan
from manyhands.task import Task, from_table
from manyhands.training.sampler import order
from tests.matrices import halved
from tests.training import factories
from tests.training.factories import HERE

ROOT = Path(__file__).parent.parent.parent
STRATEGIES = ("synchronous(update='sharded')", "synchronous(update='replicated')", "replica_average", "slice_update")


def task(**changed: object) -> Task:
    return Task(
        **{
            "model": f"{HERE}:model",
            "data": f"{HERE}:data",
            "optimizer": "sgd(lr=0.1, momentum=0.9)",
            "batch_size": 8,  # 50 samples: six full steps and one of two
            "epochs": 3,
            **changed,
        }
    )


def train(what: Task, *, workers: int = 1, **options: object) -> mh.Result:
    plan = {k: options.pop(k) for k in ("strategy", "transport", "buffers", "micro_batches") if k in options}
    return mh.train(what, Plan(workers=workers, threads=1, **plan), progress=False, **options)


def vector(state: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([v.double().reshape(-1) for v in state.values()])


@contextlib.contextmanager
def as_alone(seed: int):
    """The generator and the threads of a single process that begins with this seed."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            yield
    finally:
        torch.set_num_threads(threads)


def plain(
    make, optimizer, *, epochs=3, batch_size=8, seed=0, schedule=None, clip=None
) -> tuple[nn.Module, list[float]]:
    """The loop that anybody would write; the order of samples is the one published thing it takes from us."""
    splits, history = factories.data(), []
    with as_alone(seed):
        model = make(splits.inputs, splits.classes)
        opt = optimizer(model.parameters())
        scheduler = schedule(opt) if schedule else None
        for epoch in range(epochs):
            total = 0.0
            for indices in order(len(splits.train), seed, epoch).split(batch_size):
                x, target = splits.train.rows(indices)
                opt.zero_grad()
                loss = F.cross_entropy(model(x), target)
                loss.backward()
                if clip:
                    nn.utils.clip_grad_norm_(model.parameters(), clip)
                opt.step()
                if scheduler:
                    scheduler.step()
                total += loss.item() * len(indices)
            history.append(total / len(splits.train))
    return model, history


# -- one worker --------------------------------------------------------------------------------------------------------

SGD = functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9)


@pytest.mark.parametrize(
    ("make", "text", "optimizer", "options"),
    [
        ("model", "sgd(lr=0.1, momentum=0.9)", SGD, {}),
        ("model", "adam(lr=0.01)", functools.partial(torch.optim.Adam, lr=0.01), {"seed": 3}),
        ("dropout", "sgd(lr=0.1, momentum=0.9)", SGD, {"seed": 1}),
        ("normed", "sgd(lr=0.1, momentum=0.9)", SGD, {}),
        ("model", "sgd(lr=0.1, momentum=0.9)", SGD, {"clip": 0.3}),
        ("model", "sgd(lr=0.1, momentum=0.9)", SGD, {"schedule": True}),
    ],
    ids=["momentum", "adam", "dropout", "norm and dropout", "clip", "schedule"],
)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_one_worker_is_the_plain_loop_bit_for_bit_order_and_random_numbers_included(
    make, text, optimizer, options, strategy
):
    schedule = functools.partial(torch.optim.lr_scheduler.StepLR, step_size=4, gamma=0.5)
    ours = {**options, "schedule": "step(step_size=4, gamma=0.5)"} if "schedule" in options else options
    theirs = {**options, "schedule": schedule} if "schedule" in options else options
    result = train(task(model=f"{HERE}:{make}", optimizer=text, **ours), strategy=strategy)
    model, history = plain(getattr(factories, make), optimizer, **theirs)
    for name, value in model.state_dict().items():
        assert torch.equal(result.state[name], value), name
    assert [h["train_loss"] for h in result.history] == pytest.approx(history, abs=1e-14)  # summed in another order


def test_training_leaves_the_callers_generator_and_threads_alone():
    threads = torch.get_num_threads()
    for workers, transport in ((1, "single"), (2, "threads"), (2, "shared")):
        torch.manual_seed(99)
        before = torch.get_rng_state()
        train(task(epochs=1), workers=workers, transport=transport)
        assert torch.equal(torch.get_rng_state(), before)
        assert torch.get_num_threads() == threads


def test_the_same_seed_gives_the_same_bits_and_another_one_others():
    a, b, c = (vector(train(task(seed=s, epochs=1), workers=2).state) for s in (5, 5, 6))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


# -- several workers ---------------------------------------------------------------------------------------------------


@functools.lru_cache
def trained(workers: int, strategy: str = "synchronous", transport: str = "auto", **changed: object) -> mh.Result:
    return train(task(**changed), workers=workers, strategy=strategy, transport=transport)


@pytest.mark.parametrize(("strategy", "workers"), halved(STRATEGIES, [2, 4]))
def test_the_history_is_the_same_for_any_number_of_workers(strategy, workers):
    """To the rounding of float64 sums in another order, over 21 steps."""
    alone, together = trained(1), trained(workers, strategy)
    assert (vector(alone.state) - vector(together.state)).abs().max() <= 1e-12
    assert len(alone.history) == len(together.history) == 3
    for a, b in zip(alone.history, together.history, strict=True):
        assert (a["epoch"], a["step"]) == (b["epoch"], b["step"])
        assert a["test_accuracy"] == b["test_accuracy"]
        assert b["train_loss"] == pytest.approx(a["train_loss"], abs=1e-12)
        assert b["test_loss"] == pytest.approx(a["test_loss"], abs=1e-12)
    assert together.summary.steps == 21
    assert together.summary.epochs == 3


@pytest.mark.parametrize("transport", ["threads", "gloo", pytest.param("mpi", marks=pytest.mark.slow)])
def test_the_history_is_the_same_on_any_transport(transport):
    alone, together = trained(1), trained(2, "synchronous", transport)
    assert (vector(alone.state) - vector(together.state)).abs().max() <= 1e-12
    assert [h["test_accuracy"] for h in together.history] == [h["test_accuracy"] for h in alone.history]
    assert together.summary.transport == transport


def test_a_schedule_counts_steps_whatever_the_workers():
    spec = {"schedule": "step(step_size=4, gamma=0.5)"}
    assert (vector(trained(1, **spec).state) - vector(trained(3, **spec).state)).abs().max() <= 1e-12


def test_cosine_falls_over_the_whole_run_whatever_the_workers():
    spec = {"schedule": "cosine"}
    assert (vector(trained(1, **spec).state) - vector(trained(2, **spec).state)).abs().max() <= 1e-12
    assert not torch.equal(vector(trained(1, **spec).state), vector(trained(1).state))


@pytest.mark.parametrize("workers", [2, 3])
def test_the_loss_of_a_sum_is_the_same_for_any_number_of_workers(workers):
    spec = {"data": f"{HERE}:regression", "loss": "squared_error(l2=0.01)", "optimizer": "sgd(lr=0.01)"}
    alone, together = trained(1, **spec), trained(workers, **spec)
    assert (vector(alone.state) - vector(together.state)).abs().max() <= 1e-12
    for a, b in zip(alone.history, together.history, strict=True):
        assert b["test_loss"] == pytest.approx(a["test_loss"], abs=1e-12)
        assert b["train_loss"] == pytest.approx(a["train_loss"], abs=1e-12)


def test_strategies_of_the_whole_batch_draw_one_processs_random_numbers():
    """`slice_update` promises one worker's result bit for bit, so its workers must drop the same neurons."""
    alone, together = (train(task(model=f"{HERE}:dropout"), workers=n, strategy="slice_update") for n in (1, 2))
    assert torch.equal(vector(alone.state), vector(together.state))


def test_more_workers_than_samples_is_right_and_said():
    result = train(task(batch_size=2, epochs=1), workers=4)
    assert (vector(result.state) - vector(train(task(batch_size=2, epochs=1)).state)).abs().max() <= 1e-12
    assert any("idle" in note for note in result.notes)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_bytes_a_step_are_the_declared_ones(strategy):
    from manyhands.plan import strategy_from

    summary = trained(4, strategy).summary
    declared = strategy_from(summary.strategy).traffic(summary.parameters, 4, 8).sent_B_per_step
    assert summary.sent_B_per_step == declared


def test_lbfgs_falls_back_to_the_replicated_update_and_says_so():
    result = train(task(optimizer="lbfgs(lr=0.1, max_iter=1)", epochs=1), workers=2)
    assert result.summary.strategy == "synchronous(update='replicated')"
    assert any("whole tensors" in note for note in result.notes)
    alone = train(task(optimizer="lbfgs(lr=0.1, max_iter=1)", epochs=1))
    # LBFGS divides by products of differences, which magnifies rounding.
    assert (vector(result.state) - vector(alone.state)).abs().max() <= 1e-8


# -- what is handed over -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [1, 2])
def test_a_live_model_holds_the_final_parameters(workers):
    with as_alone(0):
        model = factories.model((factories.INPUTS,), factories.CLASSES)
    result = train(task(model=model), workers=workers)
    assert result.model is model
    assert torch.equal(vector(model.state_dict()), vector(result.state))
    assert (vector(model.state_dict()) - vector(trained(1).state)).abs().max() <= 1e-12


@pytest.mark.parametrize("workers", [1, 2])
def test_factories_and_live_data_are_taken_as_they_are(workers):
    splits = factories.data()
    what = task(model=factories.model, data=splits, optimizer=SGD, loss=F.cross_entropy)
    result = train(what, workers=workers)
    assert (vector(result.state) - vector(trained(1).state)).abs().max() <= 1e-12
    assert torch.equal(vector(result.model.state_dict()), vector(result.state))


@pytest.mark.parametrize("part", ["model", "data", "optimizer", "loss"])
def test_what_cannot_be_imported_is_refused_naming_the_cure(part):
    local = {
        "model": lambda inputs, classes: factories.model(inputs, classes),
        "data": lambda: factories.data(),
        "optimizer": lambda params: torch.optim.SGD(params, lr=0.1),
        "loss": lambda outputs, target: F.cross_entropy(outputs, target),
    }[part]
    with pytest.raises(BadInput) as e:
        train(task(**{part: local}), workers=2)
    assert "my_module:factory" in str(e.value)
    assert "transport='threads'" in str(e.value)


@pytest.mark.parametrize("part", ["model", "data", "optimizer", "loss"])
def test_threads_take_what_cannot_be_imported(part):
    local = {
        "model": lambda inputs, classes: factories.model(inputs, classes),
        "data": lambda: factories.data(),
        "optimizer": lambda params: SGD(params),
        "loss": lambda outputs, target: F.cross_entropy(outputs, target),
    }[part]
    result = train(task(**{part: local}), workers=2, transport="threads")
    assert (vector(result.state) - vector(trained(1).state)).abs().max() <= 1e-12


def test_a_live_model_on_threads_is_not_shared_between_the_workers():
    with as_alone(0):
        model = factories.model((factories.INPUTS,), factories.CLASSES)
    result = train(task(model=model), workers=2, transport="threads", strategy="synchronous(update='replicated')")
    assert result.model is model
    assert (vector(model.state_dict()) - vector(trained(1).state)).abs().max() <= 1e-12


def test_a_live_model_is_refused_under_mpi():
    with pytest.raises(BadInput, match="model"):
        train(task(model=factories.model((6,), 3)), workers=2, transport="mpi")


# -- bad input: found before a process starts --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "error", "said"),
    [
        ({"model": "perceptorn"}, UnknownName, "perceptron"),
        ({"data": "digts"}, UnknownName, "digits"),
        ({"optimizer": "adm"}, UnknownName, "adam"),
        ({"loss": "cross_entrop"}, UnknownName, "cross_entropy"),
        ({"schedule": "cosin"}, UnknownName, "cosine"),
        ({"model": f"{HERE}:no_such"}, BadInput, "no_such"),
        ({"model": "no_such_module:factory"}, BadInput, "no_such_module"),
        ({"model": "math:pi"}, BadInput, "Module"),
        ({"data": "math:pi"}, BadInput, "data"),
        ({"optimizer": "sgd(lr=-1)"}, BadInput, "-1"),
        ({"optimizer": torch.optim.SGD([torch.zeros(1)], lr=0.5)}, BadInput, "functools.partial"),
        ({"batch_size": 0}, InvalidPlan, "batch_size"),
        ({"epochs": 1, "steps": 1}, InvalidPlan, "length"),
        ({"optimizer": "lbfgs"}, InvalidPlan, "max_iter=1"),
    ],
)
def test_bad_input_is_said_before_anything_is_written(changed, error, said, tmp_path):
    with pytest.raises(error, match=said) as e:
        train(task(**changed), workers=2, out=tmp_path / "out")
    assert e.value.exit_code == 2
    assert not (tmp_path / "out").exists()


def test_an_out_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(BadInput, match="out="):
        train(task(), out=tmp_path / "file" / "out")


def test_a_folder_that_holds_a_run_is_not_overwritten(tmp_path):
    train(task(epochs=1), out=tmp_path)
    before = (tmp_path / "summary.json").read_text()
    with pytest.raises(BadInput, match="resume=True"):
        train(task(epochs=1), out=tmp_path)
    assert (tmp_path / "summary.json").read_text() == before


@pytest.mark.parametrize("said", [{"checkpoint": "5"}, {"checkpoint": True}, {"keep": 1.5}, {"keep": 0}])
def test_what_is_no_whole_number_is_refused(said):
    with pytest.raises(BadInput, match="whole number"):
        train(task(), **said)


def test_a_model_whose_extra_state_is_no_tensor_is_refused_before_work(tmp_path):
    with pytest.raises(BadInput, match=r"_extra_state.*dict.*get_extra_state"):
        train(task(model=f"{HERE}:Extra(plain=True)"), workers=2, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("workers", [1, 2])
def test_lazy_modules_take_their_shapes_from_the_data(workers):
    result = train(task(model=f"{HERE}:lazy", data=f"{HERE}:data(n=52)"), workers=workers)
    assert result.state["0.weight"].shape == (20, factories.INPUTS)
    assert result.summary.parameters == sum(p.numel() for p in result.model.parameters())


def test_workers_see_todays_environment(monkeypatch):
    """The fork server was started before, with another one."""
    train(task(epochs=1), workers=2)
    monkeypatch.setenv("SAMPLES", "40")
    assert train(task(data=f"{HERE}:from_environment", epochs=1), workers=2).summary.steps == 5
    monkeypatch.delenv("SAMPLES")
    assert train(task(data=f"{HERE}:from_environment", epochs=1), workers=2).summary.steps == 7


@pytest.mark.parametrize("workers", [1, 2])
def test_a_worker_that_sees_other_data_is_refused(workers):
    if workers == 1:  # this process is the worker, and sees what it saw
        train(task(data=f"{HERE}:of_any_size", epochs=1))
        return
    with pytest.raises(BadInput, match=r"sees other data .*5[01] \+ 23 samples.*49 \+ 23 samples"):
        train(task(data=f"{HERE}:of_any_size"), workers=2)


def test_samples_per_second_do_not_count_evaluation(monkeypatch, tmp_path):
    from manyhands.training import conclusion

    evaluate = conclusion.evaluate

    def slow(*arguments, **options):
        time.sleep(0.5)
        return evaluate(*arguments, **options)

    monkeypatch.setattr(conclusion, "evaluate", slow)
    summary = train(task(), out=tmp_path).summary
    assert summary.wall_s > 1.5
    assert summary.samples_per_s > 150 / 1.0  # three epochs of 50 samples
    rates = [json.loads(line)["samples_per_s"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert min(rates) > 150 / 1.0


# -- what is on disk ---------------------------------------------------------------------------------------------------

SUMMARY = {
    *("strategy", "model", "data", "workers", "transport", "device", "parameters", "global_batch", "steps", "epochs"),
    *("seed", "train_loss", "test_accuracy", "samples_per_s", "step_s", "step_parts_s", "sent_B_per_step"),
    "moved_B_per_step",
    *("peak_memory_B", "wall_s", "versions", "wait_s_by_worker", "staleness_mean", "staleness_max"),
    *("bubble_by_worker", "bubble_of_schedule", "bubble_of_flush"),
    *("compression_ratio", "compression_error", "compression_kept", "compression_s"),
}


@pytest.mark.parametrize("workers", [1, 2])
def test_a_runs_folder_holds_what_the_design_says(tmp_path, workers):
    result = train(task(), workers=workers, out=tmp_path / "out", checkpoint=5, keep=2)
    out = tmp_path / "out"
    names = {p.name for p in out.iterdir()} - {"tensorboard"}  # no half-written files either
    assert names == {"plan.toml", "metrics.jsonl", "summary.json", "events.jsonl", "checkpoints"}

    summary = json.loads((out / "summary.json").read_text())
    assert set(summary) == SUMMARY
    assert set(summary["step_s"]) == {"median", "p10", "p90"}
    assert set(summary["step_parts_s"]) == {"compute", "communicate", "wait", "update"}
    assert summary == json.loads(json.dumps(result.summary.as_dict()))
    assert summary["steps"] == 21
    assert summary["workers"] == workers
    assert summary["global_batch"] == 8
    assert summary["parameters"] == 303

    table = tomllib.loads((out / "plan.toml").read_text())
    assert set(table) == {"task", "plan", "asked", "run", "machine"}
    assert table["run"] == {"evaluate": "epoch", "checkpoint": 5, "keep": 2}
    assert from_table(Task, table["task"], "[task]").as_table() == task().as_table()
    assert from_table(Plan, table["plan"], "[plan]") == result.plan

    assert sorted(p.name for p in (out / "checkpoints").iterdir()) == ["step-00000020", "step-00000021"]
    last = out / "checkpoints" / "step-00000021"
    assert {p.name for p in last.iterdir()} == {
        *("model.safetensors", "state.safetensors", "state.json", "manifest.json"),
    }
    stored = load_file(last / "model.safetensors")
    assert stored.keys() == result.state.keys()
    assert all(torch.equal(stored[k], v) for k, v in result.state.items())

    events = [json.loads(line) for line in (out / "events.jsonl").read_text().splitlines()]
    assert [e["step"] for e in events if e["event"] == "epoch"] == [7, 14, 21]
    assert [e["step"] for e in events if e["event"] == "checkpoint"] == [5, 10, 15, 20, 21]
    for line in (out / "metrics.jsonl").read_text().splitlines():
        assert {"step", "loss", "lr"} <= json.loads(line).keys()


def test_without_out_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(ROOT))
    train(task(epochs=1), workers=2)
    assert list(tmp_path.iterdir()) == []


def test_evaluation_can_wait_for_the_end_or_be_left_out():
    every, end, never = (train(task(), evaluate=when) for when in ("epoch", "end", "never"))
    assert all(h["test_accuracy"] is not None for h in every.history)
    assert all(h["test_accuracy"] is None for h in end.history)
    assert end.summary.test_accuracy == every.summary.test_accuracy
    assert never.summary.test_accuracy is None


# -- from a script -----------------------------------------------------------------------------------------------------


def script(tmp_path: Path, text: str) -> dict:
    (tmp_path / "script.py").write_text(textwrap.dedent(text))
    done = subprocess.run(
        [sys.executable, "script.py"], cwd=tmp_path, capture_output=True, text=True, timeout=50, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
def test_a_plain_script_needs_no_main_guard(tmp_path):
    """And its top level runs once, not once for each worker."""
    said = script(
        tmp_path,
        """
        import json, pathlib
        import manyhands as mh
        with pathlib.Path("ran").open("a") as file:
            file.write("x")
        task = mh.Task(model="perceptron(hidden=8)", data="synthetic(samples=64, inputs=(4, 4))", batch_size=16)
        result = mh.train(task, mh.Plan(workers=2), progress=False)
        print(json.dumps([result.summary.steps, result.summary.transport]))
        """,
    )
    assert said == [4, "shared"]
    assert (tmp_path / "ran").read_text() == "x"


@pytest.mark.slow
def test_functions_of_the_script_itself_are_factories_where_it_has_a_main_guard(tmp_path):
    said = script(
        tmp_path,
        """
        import json
        import torch
        import manyhands as mh

        def model(inputs, classes):
            return torch.nn.Linear(inputs[0], classes)

        def data():
            generator = torch.Generator().manual_seed(0)
            x = torch.randn(40, 3, generator=generator)
            return x, (x[:, 0] > 0).long()

        def loss(outputs, target):
            return torch.nn.functional.cross_entropy(outputs, target)

        if __name__ == "__main__":
            task = mh.Task(model=model, data=data, loss=loss, batch_size=10)
            one, two = (mh.train(task, mh.Plan(workers=n), progress=False).state for n in (1, 2))
            print(json.dumps([list(one), max(float((one[k] - two[k]).abs().max()) for k in one)]))
        """,
    )
    assert said[0] == ["weight", "bias"]
    assert said[1] <= 1e-6  # float32


OWN = """
import torch
import manyhands as mh

def model(inputs, classes):
    return torch.nn.Linear(inputs[0], classes)

def data():
    x = torch.arange(120.0).view(40, 3)
    return x, (x[:, 0] > 60).long()

mh.train(mh.Task(model=model, data=data, batch_size=10), mh.Plan(workers=2{more}), progress=False)
"""


@pytest.mark.parametrize(
    ("arguments", "typed", "said"),
    [
        pytest.param(["own.py"], False, '__name__ == "__main__"', marks=pytest.mark.slow, id="without a main guard"),
        pytest.param(["-"], True, "transport='threads'", marks=pytest.mark.slow, id="on standard input"),
    ],
)
def test_what_workers_cannot_import_is_refused_naming_the_cure(tmp_path, arguments, typed, said):
    text = OWN.format(more="")
    (tmp_path / "own.py").write_text(text)
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=tmp_path,
        input=text if typed else None,
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
    )
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("manyhands.errors.BadInput: ")
    assert said in last
    assert "my_module:factory" in last
    assert done.stderr.count("Traceback") == 1  # the launcher's; workers say nothing


def test_what_is_typed_trains_on_threads(tmp_path):
    done = subprocess.run(
        [sys.executable, "-"],
        cwd=tmp_path,
        input=OWN.format(more=", transport='threads'"),
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_the_parts_of_a_step_leave_out_warm_up_evaluation_and_checkpoints(tmp_path):
    """What is told of a step's parts is no more than what is told of a step."""
    result = train(task(epochs=12), workers=2, evaluate="epoch", out=tmp_path)
    parts = result.summary.step_parts_s
    total = parts.compute + parts.communicate + parts.wait + parts.update
    assert parts.compute > 0
    assert total <= result.summary.wall_s / result.summary.steps


def of_tokens(outputs, target):
    """Class 0 is ignored: shares keep different numbers."""
    kept = target != 0
    total = torch.nn.functional.cross_entropy(outputs, target, reduction="none")[kept].sum()
    return total, kept.sum()


def undeclared(outputs, target):
    return torch.nn.functional.cross_entropy(outputs, target, reduction="sum"), None


def test_the_training_loss_is_a_mean_over_what_the_loss_counted():
    """So that it does not depend on how a batch was shared; a rate of nearly nothing keeps the model as it is."""
    what = {"loss": "tests.training.test_train:of_tokens", "optimizer": "sgd(lr=1e-12)"}
    alone, *together = (train(task(**what), workers=n, transport=on).history for n, on in [(1, "auto"), (3, "threads")])
    for a, b in zip(alone, together[0], strict=True):
        assert a["train_loss"] == pytest.approx(b["train_loss"], rel=1e-9)


def test_a_sum_that_does_not_say_so_is_refused():
    with pytest.raises(BadInput, match="no reduction='sum'"):
        train(task(loss="tests.training.test_train:undeclared"))
