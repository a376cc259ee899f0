"""Whatever the schedule and transport, gradients are the single process's; what is held is what the schedule says."""

import pytest
import torch
from torch import nn

from manyhands.errors import BadInput, CommunicationError, WorkerFailed
from manyhands.partition.pipeline import gpipe, schedules
from manyhands.partition.pipeline.handover import Described, Form
from manyhands.partition.pipeline.later import inputs_first
from manyhands.partition.pipeline.runtime import Times, measured_bubble
from manyhands.partition.pipeline.schedule import PRODUCTS, in_flight, makespan
from manyhands.testing import run_ranks
from tests.partition import pipelines

slow = pytest.mark.slow
PLACES = [
    *(("single", 1), ("threads", 4), ("simulated", 2), ("shared", 2)),
    *(("threads", 2), ("simulated", 3), ("shared", 3), ("gloo", 2), ("gloo", 3), ("mpi", 2)),
]
#: Where nothing is computed again per commit, and where all is.
PLAIN, RECOMPUTED = [("single", 1), ("simulated", 2)], [("single", 1), ("threads", 4), ("shared", 2)]
BUILT = [name for name in schedules if name != "written"]
#: The first batch tells shapes, later ones use slots; the last ones have micro-batches that are smaller, empty, larger.
SAMPLES = [8, 8, 7, 2, 0, 13, 8]


def ways():
    for recompute, quick in ((False, PLAIN), (True, RECOMPUTED)):
        yield from (pytest.param(recompute, *place, marks=() if place in quick else slow) for place in PLACES)


@pytest.mark.parametrize(("recompute", "on", "size"), list(ways()))
@pytest.mark.parametrize("schedule", BUILT)
def test_gradients_are_the_single_process(schedule, recompute, on, size):
    options = {"recompute": recompute}
    results = run_ranks(
        pipelines.gradients_are_the_single_process, size, on=on, args=(schedule, 4, SAMPLES, options), timeout_s=30
    )
    made = schedules.load(schedule)(size, 4)
    assert [held for held, _ in results] == in_flight(made)  # never more, and as much as it needs


@pytest.mark.parametrize("on", ["threads", "shared", pytest.param("gloo", marks=slow)])
@pytest.mark.parametrize("schedule", ["one_f_one_b", "zero_bubble"])
@pytest.mark.parametrize("options", [
    {"model": "pairs"},
    {"model": "pairs", "recompute": True},
    {"model": "tied"},
    {"model": "overwriting"},
    {"model": "overwriting", "recompute": True},
    {"model": "frozen first"},
    {"model": "frozen first", "recompute": True},
    {"loss": "counted"},
    {"loss": "counted", "recompute": True},
    {"loss": "summed", "shares": 3},
    {"views": False},
], ids=str)  # fmt: skip
def test_models_and_losses_of_all_kinds(options, schedule, on):
    run_ranks(pipelines.gradients_are_the_single_process, 2, on=on, args=(schedule, 3, [7, 7, 5], options))


@pytest.mark.parametrize("schedule", BUILT)
@pytest.mark.parametrize("model", ["dropout", "plain", "batchnorm"])
def test_recomputing_changes_no_bit(schedule, model):
    """Where ranks have generators of their own; those that are threads share one."""
    assert run_ranks(pipelines.two_ways, 2, on="shared", args=(schedule, 3, model)) == [True, True]
    assert run_ranks(pipelines.two_ways, 2, on="simulated", args=(schedule, 3, model)) == [True, True]


@pytest.mark.parametrize("schedule", BUILT)
def test_running_statistics_see_each_micro_batch_once(schedule):
    run_ranks(pipelines.batchnorm_once, 2, on="simulated", args=(schedule,))


@pytest.mark.parametrize("on", ["threads", "simulated", "shared", pytest.param("gloo", marks=slow)])
@pytest.mark.parametrize("schedule", BUILT)
def test_bytes_are_the_activations_and_their_gradients(schedule, on):
    results = run_ranks(pipelines.gradients_are_the_single_process, 2, on=on, args=(schedule, 4, [8, 8], {}))
    stages = schedules.load(schedule)(2, 4).stages
    each_way = 8 * pipelines.WIDTH * 8
    boundaries = [(s % 2, (s + 1) % 2) for s in range(stages - 1)]
    wanted = [each_way * sum((r in b) for b in boundaries) for r in range(2)]
    assert [sent for _, sent in results] == wanted


@pytest.mark.parametrize("schedule", ["gpipe", "one_f_one_b", "interleaved", "pipedream"])
@pytest.mark.parametrize(("size", "micro_batches"), [(2, 4), (2, 16), (4, 8)])
def test_a_batch_takes_as_long_as_its_schedule_says(schedule, size, micro_batches):
    """In virtual time, exactly: for two ranks and four micro-batches a fifth is bubble."""
    results = run_ranks(pipelines.virtual_bubble, size, on="simulated", args=(schedule, micro_batches))
    made = schedules.load(schedule)(size, micro_batches)
    took = makespan(made, {**PRODUCTS, "B": 2})
    assert [r[0] for r in results] == [pytest.approx(took, rel=1e-12)] * size
    if schedule in ("gpipe", "one_f_one_b"):
        waited = sum(w for _, w in results) / (size * took)
        assert waited == pytest.approx(gpipe.bubble(size, micro_batches), rel=1e-12)


def test_the_measured_bubble_is_what_was_not_computed():
    times = [Times(batch_s=10, compute_s=8), Times(batch_s=9, compute_s=8)]
    assert measured_bubble(times) == pytest.approx(0.2)
    assert measured_bubble([Times()]) == 0.0


# -- backward in two parts ---------------------------------------------------------------------------------------------


class Counting(torch.autograd.Function):
    """A product that notes which of its gradients were computed."""

    @staticmethod
    def forward(ctx, x, weight, done):
        ctx.save_for_backward(x, weight)
        ctx.done = done
        return x @ weight

    @staticmethod
    def backward(ctx, g):
        x, weight = ctx.saved_tensors
        ctx.done.append("both")
        return g @ weight.T, x.T @ g, None


def parts(model: nn.Module, n: int = 5) -> tuple[torch.Tensor, torch.Tensor, list[nn.Parameter]]:
    x = torch.randn(n, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(n)).requires_grad_()
    return x, model(x), list(model.parameters())


@pytest.mark.parametrize("make", [
    lambda: nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 6, bias=False), nn.LayerNorm(6)),
    lambda: nn.Sequential(nn.Unflatten(1, (1, 6)), nn.Conv1d(1, 3, 3), nn.BatchNorm1d(3), nn.Flatten()),
    lambda: nn.TransformerEncoderLayer(6, 2, 12, dropout=0.0, batch_first=True),
    pipelines.tied,
    lambda: nn.Sequential(nn.Linear(6, 6), nn.Softmax(1)),
])  # fmt: skip
def test_inputs_first_and_weights_later_is_backward(make):
    torch.manual_seed(0)
    model = make().double()
    x, y, weights = parts(model)
    g = torch.randn_like(y)
    y.backward(g)
    wanted, x_wanted = [p.grad for p in weights], x.grad
    model.zero_grad()
    x, y, _ = parts(model)
    (found,), later = inputs_first([y], [g], [x])
    torch.testing.assert_close(found, x_wanted, rtol=1e-12, atol=1e-12)
    assert x.grad is None
    later.accumulate()
    for p, w in zip(weights, wanted, strict=True):
        torch.testing.assert_close(p.grad, w, rtol=1e-12, atol=1e-12)


def test_weight_gradients_do_wait_and_are_added_in_place():
    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6)).double()
    x, y, weights = parts(model)
    for p in weights:
        p.grad = torch.ones_like(p)
    views = [p.grad for p in weights]
    _, later = inputs_first([y], [torch.ones_like(y)], [x])
    assert all(bool((v == 1).all()) for v in views)
    seen = []
    hooks = [p.register_post_accumulate_grad_hook(seen.append) for p in weights]
    later.accumulate()
    assert all(p.grad is v for p, v in zip(weights, views, strict=True))
    assert not any(bool((v == 1).all()) for v in views)
    assert len(seen) == len(weights)  # whoever watches gradients is told
    for h in hooks:
        h.remove()
    later.accumulate()  # nothing is left to do
    assert len(seen) == len(weights)


def test_nothing_is_computed_in_the_second_part_that_the_first_has_done():
    """The products of a chain are run through for the inputs once; later each is entered for its weights alone."""
    x = torch.ones(2, 3, dtype=torch.float64, requires_grad=True)
    weights = [torch.ones(3, 3, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    done: list[str] = []
    y = x
    for w in weights:
        y = Counting.apply(y, w, done)
    _, later = inputs_first([y], [torch.ones_like(y)], [x])
    assert len(done) == 3
    later.accumulate()
    assert len(done) == 6


def test_an_output_that_no_input_reaches_has_its_weights_done():
    weight = torch.ones(3, dtype=torch.float64, requires_grad=True)
    x = torch.ones(3, dtype=torch.float64, requires_grad=True)
    outputs = [x * 2, weight * 3]
    (found,), later = inputs_first(outputs, [torch.ones(3).double(), torch.ones(3).double()], [x])
    assert found.tolist() == [2.0] * 3
    later.accumulate()
    assert weight.grad.tolist() == [3.0] * 3


# -- what goes wrong ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("case", "ranks", "why"),
    [
        ("schedule", (0, 1), "⇒"),
        ("ranks", (0, 1), "a pipeline schedule for 3 ranks on 2"),
        ("stages", (0, 1), "it holds"),
        ("loss", (1,), "without a loss"),
    ],
)
def test_a_pipeline_that_cannot_run_is_refused_before_it_does(case, ranks, why):
    said = run_ranks(pipelines.refused, 2, on="threads", args=(case, 0))
    for rank in ranks:
        assert why in said[rank]


@pytest.mark.parametrize(
    ("case", "why"),
    [
        ("sum", "no reduction='sum'"),
        ("handed over", "returned a dict"),
        ("shape", r"hands over float64\[2, 3\] for 2 samples, where it was float64\[2, 6\] before"),
        ("dtype", "which no hand-over carries"),
    ],
)
def test_what_a_stage_may_not_do_is_said(case, why):
    with pytest.raises((WorkerFailed, BadInput), match=why):
        run_ranks(raises, 2, on="threads", args=(case,))


def raises(comm, case: str) -> None:
    said = pipelines.refused(comm, case)
    if said:
        raise BadInput(said)


@pytest.mark.parametrize("on", ["threads", "simulated", "shared"])
def test_a_stage_that_breaks_ends_the_others(on):
    with pytest.raises(WorkerFailed, match="this stage breaks") as caught:
        run_ranks(pipelines.a_stage_breaks, 3, on=on)
    assert "pipeline: in the forward of stage 1, micro-batch " in caught.value.traceback


def test_forms_that_differ_read_differently():
    one = Described(torch.float32, (2, 3), True)
    forms = [Form(True, (one,)), Form(False, (one,)), Form(True, (Described(torch.float32, (2, 3), False),))]
    assert [str(f) for f in forms] == ["float32[2, 3]", "(float32[2, 3])", "float32[2, 3] without a gradient"]


@pytest.mark.parametrize("on", ["threads", "shared"])
def test_a_stage_that_does_not_come_is_named_with_what_was_waited_for(on):
    said = run_ranks(pipelines.a_stage_does_not_come, 2, on=on)[0]
    assert said.startswith("DeadlineExceeded")
    assert "rank 1" in said
    assert "(pipeline: in the backward of stage 0, micro-batch 0)" in said


def test_a_deadlock_names_the_stage():
    with pytest.raises(CommunicationError, match="rank 0 waits"):
        run_ranks(one_comes_alone, 2, on="simulated")


def one_comes_alone(comm) -> None:
    made = schedules.load("gpipe")(2, 2)
    pipeline = pipelines.Pipeline({comm.rank: pipelines.plain().double()}, made, comm, pipelines.mean)
    if comm.rank == 0:
        pipeline.run(*pipelines.batch(4), 4)
