"""PipeDream is the delayed rule of its paper, version by version, on every transport; what is stale is what is said."""

import pytest
import torch

import manyhands as mh
from manyhands.errors import BadInput
from manyhands.testing import run_ranks
from tests.partition import pipelines

slow = pytest.mark.slow
#: By steps: micro-batches of equal size, of unlike sizes, some without samples.
SAMPLES = [12, 12, 11, 3]
PLACES = [
    ("single", 1),
    ("threads", 2),
    ("simulated", 3),
    ("shared", 2),
    pytest.param("shared", 3, marks=slow),
    ("gloo", 2),
    pytest.param("gloo", 3, marks=slow),
    pytest.param("mpi", 2, marks=slow),
]


@pytest.mark.parametrize(("on", "size"), PLACES)
@pytest.mark.parametrize("vertical_sync", [False, True])
def test_parameters_are_those_of_the_delayed_rule(vertical_sync, on, size):
    options = {"vertical_sync": vertical_sync, "opt": "momentum"}
    results = run_ranks(pipelines.pipedream_is_the_delayed_rule, size, on=on, args=(6, SAMPLES, options))
    for stage, (steps, most) in enumerate(results):
        delay = size - 1 if vertical_sync else size - 1 - stage
        for step in steps:
            begun = step[0][4]
            for updates, (of, _, forward, backward, newest) in enumerate(step):
                assert of == stage
                assert forward == backward
                assert newest == begun + updates
                assert newest - backward == min(updates, delay)
        assert most == (min(size, 6) if vertical_sync and size > 1 else size - stage if stage < size - 1 else 0)


@pytest.mark.parametrize("options", [
    {"in_flight": 1},
    {"in_flight": 2},
    {"in_flight": 2, "vertical_sync": True},
    {"opt": "adam", "recompute": True},
    {"model": "pairs"},
    {"model": "tied", "vertical_sync": True},
    {"loss": "counted"},
], ids=str)  # fmt: skip
def test_options_models_and_losses(options):
    run_ranks(pipelines.pipedream_is_the_delayed_rule, 3, on="simulated", args=(5, [10, 7], options))


@pytest.mark.parametrize("on", ["simulated", pytest.param("shared", marks=slow), pytest.param("gloo", marks=slow)])
@pytest.mark.parametrize("loss", ["mean", "counted"])
def test_replicas_divide_each_micro_batch(loss, on):
    """Shares of unlike size, too, and micro-batches of which only some replicas have samples."""
    options = {"replicas": 2, "opt": "momentum", "loss": loss}
    run_ranks(pipelines.pipedream_is_the_delayed_rule, 4, on=on, args=(4, [16, 13, 5], options))


@pytest.mark.parametrize("on", ["threads", pytest.param("gloo", marks=slow)])
@pytest.mark.parametrize("replicas", [1, 2])
def test_a_loss_that_is_not_finite_stops_all_and_spoils_nothing(replicas, on):
    assert run_ranks(pipelines.pipedream_not_finite, 2 * replicas, on=on, args=(replicas,)) == [[True, True]] * (
        2 * replicas
    )


def test_a_break_between_steps_changes_nothing():
    assert run_ranks(pipelines.pipedream_resumed, 2, on="threads") == [0.0, 0.0]


# -- as users train it -------------------------------------------------------------------------------------------------


def trained(strategy, mesh, transport="threads", *, out=None, resume=False, how=(), **changes):
    said = {"model": "perceptron(hidden=(12, 10))", "data": "digits", "steps": 6, "batch_size": 24}
    plan = mh.Plan(strategy=strategy, mesh=mesh, transport=transport, threads=1, **dict(how))
    task = mh.Task(**said | {"optimizer": "adam(lr=0.01)"} | changes)
    return mh.train(task, plan, out=out, resume=resume, progress=False, evaluate="end")


def equal(a, b):
    return all(torch.equal(value, b.model.state_dict()[name]) for name, value in a.model.state_dict().items())


def test_one_stage_is_plain_sgd_bit_for_bit():
    plain, one = trained("synchronous", "data=1", "single"), trained("pipedream", "pipeline=1", "single")
    assert equal(plain, one)
    assert one.summary.train_loss == plain.summary.train_loss
    # Micro-batches are batches of their own, one after the other: so is a pipeline with one in flight.
    how = {"micro_batches": 4}
    four = trained("pipedream", "pipeline=1", "single", how=how)
    assert equal(four, trained("pipedream(in_flight=1)", "pipeline=2", "shared", how=how))
    assert four.summary.staleness_max == 0


@pytest.mark.parametrize("mesh", ["pipeline=2", pytest.param("data=2,tensor=2,pipeline=2", marks=slow)])
def test_a_user_trains_with_it(mesh):
    first, again = (trained("pipedream", mesh, t, how={"micro_batches": 6}) for t in ("threads", "shared"))
    assert equal(first, again), "no race decides anything"
    assert first.summary.staleness_max == 1
    assert first.summary.staleness_mean == pytest.approx(0.5 * 5 / 6)
    assert str(first.plan.strategy) == "pipedream"
    assert first.plan.pipeline.startswith("pipedream(cut=")


def test_a_resume_is_exact_and_on_another_mesh_learns_on(tmp_path):
    how = {"micro_batches": 4, "pipeline": "pipedream(cut='hidden2')"}
    once = trained("pipedream", "pipeline=2", how=how)
    trained("pipedream", "pipeline=2", out=tmp_path, steps=4, how=how)
    assert equal(once, trained("pipedream", "pipeline=2", out=tmp_path, resume=True, how=how))
    assert trained("synchronous", "tensor=2", out=tmp_path, resume=True, steps=8).summary.steps == 8


def test_the_plan_counts_what_training_sends():
    how = {"micro_batches": 4, "pipeline": "pipedream(cut='hidden2')"}
    task = mh.Task(model="perceptron(hidden=(12, 10))", data="digits", steps=2, batch_size=24)
    plan = mh.Plan(strategy="pipedream", mesh="data=2,pipeline=2", transport="threads", **how)
    said = mh.verbs.outlined(task, plan).parts[0]
    assert said.sent_B == 0
    assert said.cut_B == mh.train(task, plan, progress=False, evaluate="never").summary.sent_B_per_step


@pytest.mark.parametrize(
    ("strategy", "mesh", "how", "message"),
    [
        ("pipedream(in_flight=0)", "pipeline=2", {}, "in_flight=0: it must be a whole number of at least 1"),
        ("pipedream(in_flight=3)", "pipeline=2", {}, "Use in_flight=2 at most"),
        ("pipedream(in_flight=2)", "pipeline=1", {}, "Use in_flight=1 at most"),
        ("pipedream(vertical_sync=2)", "pipeline=2", {}, "it is True or False"),
        ("pipedream", "pipeline=2", {"clip": 1.0}, "nobody knows the norm of the whole gradient"),
        ("pipedream", "pipeline=2", {"pipeline": "gpipe"}, "its order is its own"),
        ("pipedream", "pipeline=2", {"pipeline": "pipedream(in_flight=2)"}, "is said of the strategy"),
        ("synchronous", "pipeline=2", {"pipeline": "pipedream"}, r"Say strategy=pipedream \(--strategy pipedream\)"),
        ("pipedream", "pipeline=2", {"loss": None}, "Give the loss to the task"),
        ("pipedream", "pipeline=2", {"shard": 1}, "is part of synchronous"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_starts(strategy, mesh, how, message):
    plan = {k: v for k, v in how.items() if k in ("pipeline", "shard")}
    with pytest.raises(BadInput, match=message):
        trained(strategy, mesh, how=plan, **{k: v for k, v in how.items() if k not in plan})
