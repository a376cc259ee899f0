"""Convolutions by images and dense layers by neurons on the same workers: equal to one worker, and what it sends."""

import functools
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import manyhands as mh
from manyhands.communication.transports.simulated import SimulatedWorld
from manyhands.contract import Batch
from manyhands.data.dataset import Arrays
from manyhands.errors import BadInput, InvalidPlan, NonFiniteLoss, UnknownName
from manyhands.models import losses
from manyhands.partition.data import DataReplica
from manyhands.partition.hybrid import (
    SCHEMES,
    HybridReplica,
    averaged_B,
    dense_layers,
    exchanged_B,
    one_weird_trick,
    passes,
)
from manyhands.partition.tensor.rehearsal import rehearsed
from manyhands.plan import strategy_from
from manyhands.training.evaluation import CHUNK, evaluate
from manyhands.verbs import outlined
from tests.matrices import halved

EXACT = {"rtol": 1e-12, "atol": 1e-12}
WIDTHS = [48, 13, 11, 5]  # of the features and of each dense layer
STEPS = 3

counts_of_workers = st.lists(st.integers(0, 9), min_size=2, max_size=5)


def built():
    torch.manual_seed(3)
    return nn.Sequential(
        *(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Flatten()),
        *(nn.Linear(WIDTHS[0], WIDTHS[1]), nn.Tanh(), nn.Linear(WIDTHS[1], WIDTHS[2]), nn.ReLU()),
        nn.Linear(WIDTHS[2], WIDTHS[3]),
    ).double()


def batch(step, samples):
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(samples, 2, 6, 6, dtype=torch.float64, generator=generator)
    return x, torch.randint(0, WIDTHS[-1], (samples,), generator=generator)


def trained(comm, how, counts, *, update="replicated", loss=F.cross_entropy, clip=None, poison=None):
    """Parameters after some steps, what part of the model's they are, and losses; shares have ``counts`` samples."""
    model, strategy = built(), strategy_from(f"synchronous(update='{update}')")
    cut = one_weird_trick(model, comm, None, **how)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    options = {"common": strategy.parameters == "common", "blocks": cut.blocks, "clip": clip}
    kind, more = (DataReplica, {}) if comm.size == 1 else (HybridReplica, {"cut": cut})
    worker = strategy.start(kind(model, optimizer, loss, comm, **options, **more), comm)
    lo, own, found = sum(counts[: comm.rank]), counts[comm.rank], []
    for step in range(STEPS):
        comm.step = step
        x, y = batch(step, sum(counts))
        if step == poison:
            x[0] = float("nan")
        x, y = (x[lo : lo + own], y[lo : lo + own]) if own else (None, None)  # what a share of no samples may be
        found.append(float(worker.step(Batch(x, y, own, sum(counts)))))
    return {n: v.clone() for n, v in model.state_dict().items()}, cut.blocks, found, comm.counters


def difference(how, counts, **options):
    """Between workers and one worker on the joined batch; and the workers' results."""
    run = functools.partial(trained, **options)
    ((whole, _, losses_, _),) = SimulatedWorld(1).run(run, {}, [sum(counts)])
    results = SimulatedWorld(len(counts)).run(run, how, counts)
    largest = 0.0
    for parameters, blocks, _, _ in results:
        for name, value in parameters.items():
            expected = blocks[name].take(whole[name]) if name in blocks else whole[name]
            largest = max(largest, float((value - expected).abs().max()))
    return largest, losses_, results


# -- equal to one worker -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("counts", "update", "scheme"),
    halved([[4, 6], [5, 0, 3, 2], [10, 0], [1, 0, 1]], ["replicated", "sharded"], SCHEMES),
    ids=str,
)
def test_workers_equal_one_on_the_joined_batch(scheme, update, counts):
    largest, expected, results = difference({"scheme": scheme}, counts, update=update)
    assert largest < 1e-12
    for _, blocks, found, _ in results:
        assert len(blocks) == 6, "weights and biases of three layers"
        assert found == pytest.approx(expected, rel=1e-12), "every worker knows the loss of all"


LOSSES = {
    "kept rows": losses.CrossEntropy(ignore_index=2),
    "a sum with L2": losses.SquaredError(l2=0.3),
    "marked as a sum": losses.build(nn.CrossEntropyLoss(reduction="sum")),
}


@pytest.mark.parametrize(("clip", "loss", "scheme"), halved([None, 0.2], LOSSES, SCHEMES))
def test_so_they_do_with_losses_that_count_for_themselves_and_sums(scheme, loss, clip):
    assert difference({"scheme": scheme}, [4, 0, 3], loss=LOSSES[loss], clip=clip)[0] < 1e-12


@pytest.mark.parametrize("scheme", ["b", "c"])
def test_dense_layers_that_are_updated_after_each_pass_differ_and_say_so(scheme):
    how = {"scheme": scheme, "updates": "each"}
    largest, _, results = difference(how, [4, 6])
    assert largest > 1e-3
    convolutions = [parameters["0.weight"] for parameters, *_ in results]
    assert torch.equal(*convolutions), "which are averaged all the same"
    said = f"one_weird_trick(scheme={scheme}, updates=each)"
    assert "not what one worker does" in str(rehearsed(built().float(), said, 2, torch.zeros(1, 2, 6, 6)))


def test_an_update_after_each_pass_is_plain_sgd_on_that_passs_rows():
    """Two workers under b: the dense layers take two steps, on the first share and then on the second."""

    def run(comm):
        model = built()
        cut = one_weird_trick(model, comm, None, "b", "each")
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        replica = HybridReplica(model, optimizer, F.cross_entropy, comm, cut=cut, common=False, blocks=cut.blocks)
        worker = strategy_from("synchronous(update='replicated')").start(replica, comm)
        x, y = batch(0, 5)
        lo, hi = [(0, 2), (2, 5)][comm.rank]
        worker.step(Batch(x[lo:hi], y[lo:hi], hi - lo, 5))
        return {n: v.clone() for n, v in model.state_dict().items()}, cut.blocks

    model = built()
    front, dense = model[:3], model[3:]
    x, y = batch(0, 5)
    features = front(x)
    leaf, gradients = features.detach(), []
    optimizer = torch.optim.SGD(dense.parameters(), lr=0.1)
    for lo, hi in ((0, 2), (2, 5)):
        part = leaf[lo:hi].requires_grad_()
        optimizer.zero_grad()
        F.cross_entropy(dense(part), y[lo:hi]).backward()
        gradients.append(part.grad * (hi - lo) / 5)
        optimizer.step()
    features.backward(torch.cat(gradients))
    torch.optim.SGD(front.parameters(), lr=0.1).step()
    for parameters, blocks in SimulatedWorld(2).run(run):
        for name, value in model.state_dict().items():
            torch.testing.assert_close(parameters[name], blocks[name].take(value) if name in blocks else value, **EXACT)


@pytest.mark.parametrize("update", ["replicated", "sharded"])
@pytest.mark.parametrize("how", [{"scheme": "a"}, {"scheme": "b", "updates": "each"}], ids=str)
def test_a_loss_that_is_not_finite_stops_every_worker_at_the_same_step(how, update):
    def run(comm):
        with pytest.raises(NonFiniteLoss):
            trained(comm, how, [2, 0, 3], update=update, poison=1)
        return comm.step

    assert SimulatedWorld(3).run(run) == [1, 1, 1]


def test_one_worker_is_left_whole():
    ((_, blocks, _, counters),) = SimulatedWorld(1).run(trained, {"scheme": "b"}, [4])
    assert not blocks
    assert counters.sent_B("cut") == 0


# -- passes ------------------------------------------------------------------------------------------------------------


@given(scheme=st.sampled_from(SCHEMES), counts=counts_of_workers)
def test_each_row_passes_exactly_once_and_no_pass_is_empty(scheme, counts):
    made = passes(scheme, counts)
    assert len(made) <= (1 if scheme == "a" else len(counts))
    assert all(sum(hi - lo for lo, hi in rows) for rows in made)
    for rank, n in enumerate(counts):
        bounds = [rows[rank] for rows in made if rows[rank][0] < rows[rank][1]]
        assert [0, *(hi for _, hi in bounds)] == [*(lo for lo, _ in bounds), n]
        assert all(a[1] == b[0] for a, b in pairwise(bounds))


def test_b_takes_a_worker_at_a_time_and_c_some_of_each():
    assert passes("b", [2, 1]) == [[(0, 2), (0, 0)], [(0, 0), (0, 1)]]
    assert passes("c", [4, 4]) == [[(0, 2), (0, 2)], [(2, 4), (2, 4)]]


# -- bytes -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("counts", [[4, 4], [5, 0, 3, 2], [7, 3], [1, 0]], ids=str)
def test_bytes_that_are_counted_are_those_of_the_closed_form(scheme, counts):
    for rank, (*_, counters) in enumerate(SimulatedWorld(len(counts)).run(trained, {"scheme": scheme}, counts)):
        assert counters.sent_B("cut") == STEPS * sum(exchanged_B(scheme, counts, WIDTHS, rank, itemsize=8))
        averaged = counters.tallies["step"]["all_reduce"].sent_B
        assert averaged == STEPS * averaged_B(2 * 3 * 9 + 3, len(counts), itemsize=8), "convolutions alone"


@given(size=st.integers(2, 8), each=st.integers(1, 5), widths=st.lists(st.integers(1, 5), min_size=3, max_size=5))
def test_all_schemes_send_the_same_where_shares_and_neurons_come_out_even(size, each, widths):
    widths, counts = [size * n for n in widths], [size * each] * size
    (sent,) = {exchanged_B(scheme, counts, widths, rank) for scheme in SCHEMES for rank in range(size)}
    once = 4 * sum(counts) * (size - 1) // size
    assert sent.boundary == 2 * once * widths[0]
    assert sent.hidden == 2 * once * sum(widths[1:-1])
    assert sent.outputs == 2 * once * widths[-1] // size


def test_on_eight_workers_alexnet_sends_a_third_of_what_data_parallelism_does():
    """Krizhevsky's net in the shape of arXiv:1404.5997, 128 images a worker, float32."""
    convolutions, whole = 2_469_696, 61_100_840
    sent = exchanged_B("a", [128] * 8, [9216, 4096, 4096, 1000])
    boundary = averaged_B(convolutions, 8) + sent.boundary
    assert averaged_B(whole, 8) / 1e6 == pytest.approx(427.7, abs=0.05)
    assert boundary / 1e6 == pytest.approx(83.3, abs=0.05)
    assert (boundary + sent.hidden) / 1e6 == pytest.approx(142.1, abs=0.05)
    assert averaged_B(whole, 8) / (boundary + sent.hidden) == pytest.approx(3.0, abs=0.05)
    assert sent.outputs / 1e6 == pytest.approx(0.9, abs=0.05)


# -- which layers ------------------------------------------------------------------------------------------------------


def test_the_dense_layers_at_the_end_are_found():
    model = nn.Sequential(
        nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 6), nn.Dropout(0.5), nn.Linear(6, 5), nn.LogSoftmax(1)
    )
    assert [path for path, _ in dense_layers(model, "", 2)] == ["2", "4"]
    assert [path for path, _ in dense_layers(model, "4", 2)] == ["4"]


class Named(nn.Module):
    """A forward of its own, as torchvision's AlexNet has it."""

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU())
        self.classifier = nn.Sequential(nn.Linear(48, 8), nn.ReLU(), nn.Linear(8, 5))

    def forward(self, x):
        return self.classifier(torch.flatten(self.features(x), 1))


def test_a_model_with_a_forward_of_its_own_names_them():
    said = "one_weird_trick(dense=classifier)"
    assert rehearsed(Named(), said, 2, torch.zeros(1, 2, 6, 6)).done == {
        "classifier.0": "neurons 8 → 4",
        "classifier.2": "neurons 5 → 3",
    }


@pytest.mark.parametrize(
    ("model", "said", "error", "says"),
    [
        (Named, "", BadInput, "one_weird_trick.dense=classifier"),
        (Named, "dense=middle", UnknownName, "middle"),
        (built, "dense='9'", UnknownName, "module with which"),
        (built, "dense='0', scheme=d", UnknownName, "scheme of one_weird_trick"),
        (built, "scheme=a, updates=each", BadInput, "there is one pass"),
        (built, "updates=never", UnknownName, "updates of one_weird_trick"),
        (lambda: nn.Sequential(nn.Conv2d(2, 3, 3)), "", BadInput, "no Linear layer"),
        (lambda: nn.Sequential(nn.Flatten(), nn.Linear(72, 5)), "", BadInput, "no gradient to average"),
        (lambda: nn.Sequential(nn.Conv2d(2, 3, 3), nn.Flatten(), nn.Linear(48, 1)), "", BadInput, "1 neurons"),
        (lambda: nn.Sequential(nn.Conv2d(2, 3, 3), nn.Linear(4, 5)), "", BadInput, "nn.Flatten before it"),
        (
            lambda: nn.Sequential(nn.Conv2d(2, 3, 3), nn.Flatten(), nn.Linear(48, 5), nn.LayerNorm(5), nn.Linear(5, 5)),
            "dense='2'",
            BadInput,
            "3 is a LayerNorm",
        ),
    ],
)
def test_what_cannot_be_cut_is_refused(model, said, error, says):
    with pytest.raises(error, match=says):
        rehearsed(model().float(), f"one_weird_trick({said})", 2, torch.zeros(1, 2, 6, 6))


# -- evaluation --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("samples", [1, 7, 2 * CHUNK + 1])
def test_workers_with_unlike_shares_of_a_test_set_answer_together(samples):
    """With one sample the second worker has none, with 2 · 500 + 1 the first has a chunk more."""
    x, y = batch(0, samples)

    def run(comm):
        model = built()
        if comm.size > 1:
            one_weird_trick(model, comm, None)
        return evaluate(model, F.cross_entropy, Arrays(x, y), comm)

    (expected,) = SimulatedWorld(1).run(run)
    for found in SimulatedWorld(2).run(run):
        assert found == pytest.approx(expected, rel=1e-12)


# -- from a user's side ------------------------------------------------------------------------------------------------

TRICK = "one_weird_trick(scheme=c)"


def run(mesh, transport="threads", *, out=None, resume=False, how=(), **changes):
    task = mh.Task(
        **{"model": "cnn", "data": "digits", "steps": 8, "batch_size": 20, "optimizer": "sgd(lr=0.1, momentum=0.9)"}
        | changes
    )
    plan = mh.Plan(mesh=mesh, transport=transport, threads=1, **dict(how))
    return mh.train(task, plan, out=out, resume=resume, progress=False, evaluate="end")


def close(a, b):
    for name, value in a.model.state_dict().items():
        torch.testing.assert_close(value, b.model.state_dict()[name], rtol=1e-4, atol=1e-5)  # float32


@pytest.mark.parametrize(("transport", "workers", "part"), [("threads", 3, 4), ("shared", 2, 5)])
def test_it_trains_as_one_worker_does(transport, workers, part):
    one, several = run("data=1"), run(f"data={workers}", transport, how={"tensor": TRICK})
    close(one, several)
    assert several.summary.test_accuracy == pytest.approx(one.summary.test_accuracy, abs=0.01)
    assert several.summary.train_loss == pytest.approx(one.summary.train_loss, rel=1e-4)
    assert several.summary.parameters == one.summary.parameters
    assert several.notes[-1] == f"cut among {workers} workers: output neurons 10 → {part}"


@pytest.mark.slow
@pytest.mark.parametrize(("transport", "scheme"), [("gloo", "a"), ("gloo", "b"), ("gloo", "c"), ("mpi", "b")])
def test_it_trains_as_one_worker_does_everywhere(transport, scheme):
    close(run("data=1"), run("data=3", transport, how={"tensor": f"one_weird_trick(scheme={scheme})"}))


@pytest.mark.parametrize(("first", "then", "update"), halved([(3, 2), (2, 1), (1, 2)], ["sharded", "replicated"]))
def test_a_run_goes_on_on_another_number_of_workers(tmp_path, first, then, update):
    how = {"tensor": TRICK, "strategy": f"synchronous(update={update})"}
    run(f"data={first}", out=tmp_path, steps=5, how=how)
    close(run("data=1"), run(f"data={then}", out=tmp_path, resume=True, how=how))


def test_the_outline_of_a_plan_tells_what_a_step_sends():
    """The same as is counted: of the cut, and of the mean over the convolutions' gradients."""
    how = {"tensor": TRICK, "strategy": "synchronous(update=replicated)"}
    counted = run("data=2", how=how).summary.sent_B_per_step
    task = mh.Task(model="cnn", data="digits", steps=8, batch_size=20)
    parts = outlined(task, mh.Plan(mesh="data=2", transport="threads", **how)).parts
    assert parts[0].sent_B + parts[0].cut_B == counted
    assert [part.parameters for part in parts] == [416 + 12_832 + 5 * (32 * 4 + 1)] * 2


def test_a_resume_on_as_many_workers_is_exact(tmp_path):
    how = {"tensor": "one_weird_trick(scheme=b, updates=each)"}
    once = run("data=2", how=how).model.state_dict()
    run("data=2", how=how, out=tmp_path, steps=5)
    again = run("data=2", how=how, out=tmp_path, resume=True).model.state_dict()
    assert all(torch.equal(value, again[name]) for name, value in once.items())


@pytest.mark.parametrize(
    ("plan", "task", "says"),
    [
        ({"mesh": "data=2,tensor=2"}, {}, "Use mesh data alone, e.g. mesh=data=4"),
        ({"mesh": "data=2", "strategy": "local"}, {}, "Use synchronous"),
        ({"mesh": "data=2", "strategy": "synchronous(aggregate=median)"}, {}, "Use synchronous"),
        ({"mesh": "data=2", "micro_batches": 2}, {}, "Leave micro_batches out"),
        ({"mesh": "data=2", "tensor": "one_weird_trick(scheme=b, updates=each)"}, {"clip": 1.0}, "Leave clip out"),
    ],
)
def test_a_plan_that_cannot_be_is_refused(plan, task, says):
    with pytest.raises(InvalidPlan, match=says):
        mh.train(
            mh.Task(model="cnn", data="digits", steps=2, **task),
            mh.Plan(**{"tensor": TRICK} | plan, transport="threads"),
        )
