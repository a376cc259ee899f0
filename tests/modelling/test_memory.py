"""Memory in parts: closed forms, schedules, and what a heap and a liveness replay promise whatever they are given."""

import dataclasses
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import manyhands as mh
from manyhands import verbs
from manyhands.cluster import load
from manyhands.modelling.memory.fitting import fits, would_fit
from manyhands.modelling.memory.footprint import footprint
from manyhands.modelling.memory.heap import Heap
from manyhands.modelling.memory.liveness import Pass, left_B, passes, peak_B
from manyhands.modelling.memory.parts import Memory
from manyhands.modelling.memory.process import Loaded, Process
from manyhands.modelling.memory.rehearsal import copies, update
from manyhands.modelling.memory.timeline import Held, replayed
from manyhands.partition.pipeline.gpipe import gpipe
from manyhands.partition.pipeline.one_f_one_b import one_f_one_b
from manyhands.plan.description import strategy_from
from manyhands.training.rehearsal import rehearsed

NO_PROCESS, NO_DATA = Process(0, {}), Loaded(0, 0)
#: 64 inputs, 50 hidden neurons, 10 classes.
PARAMETERS_B = 4 * (64 * 50 + 50 + 50 * 10 + 10)


def of(optimizer: str = "sgd(lr=0.1)", batch_size: int = 32, **plan: object) -> Memory:
    task = mh.Task(model="perceptron", data="digits", optimizer=optimizer, batch_size=batch_size)
    decided = verbs.resolved(task, mh.Plan(**plan))
    model, splits = verbs.built(task, None)
    decided = rehearsed(decided, model, task, splits.train)
    return footprint(task, decided.plan, model, splits, measured=NO_PROCESS, data=NO_DATA, evaluate="never")


def test_the_parts_of_a_perceptron_are_those_of_paper_and_pencil() -> None:
    alone = of("adam(lr=0.1)", workers=1, transport="shared").largest
    assert (alone.parameters_B, alone.gradients_B, alone.optimizer_B) == (PARAMETERS_B, PARAMETERS_B, 2 * PARAMETERS_B)
    assert of("sgd(lr=0.1,momentum=0.9)", workers=1, transport="shared").largest.optimizer_B == PARAMETERS_B
    assert of(workers=1, transport="shared").largest.optimizer_B == 0


def test_what_stands_between_forward_and_backward_is_what_backward_reads() -> None:
    n = 32
    model = nn.Sequential(nn.Linear(100, 50), nn.ReLU(), nn.Linear(50, 10))
    loss = nn.functional.cross_entropy
    (found,) = passes([model], torch.zeros(n, 100), torch.zeros(n, dtype=torch.int64), loss)
    # The hidden layer after its ReLU (its sum before is gone), log-softmax, the loss and what it divides by.
    assert found.kept_B == 4 * (n * 50 + n * 10 + 1 + 1)
    assert left_B((*found.forward, *found.backward)) == 0
    # At the most the gradient of the first weight is made, while the hidden layer's gradient is there.
    assert peak_B((*found.forward, *found.backward)) >= 4 * (100 * 50 + n * 50)
    assert {name for name, size in found.backward if size == 0} == {name for name, _ in model.named_parameters()}


def test_views_and_changes_in_place_are_no_blocks() -> None:
    class Views(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = x * 2.0
            return y.view(-1).relu_().unflatten(0, (4, 6)).transpose(0, 1)[1:]

    (found,) = passes([Views()], torch.zeros(4, 6), None, lambda y, _: y.sum(), learning=False)
    assert peak_B(found.forward) == 4 * 24 + 4


def test_a_model_that_cannot_be_traced_is_watched_while_it_runs() -> None:
    class Depends(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(x) if float(x.sum()) < 1 else x

    (found,) = passes([Depends()], torch.zeros(4, 8), torch.zeros(4, 8), nn.functional.mse_loss)
    assert left_B((*found.forward, *found.backward)) == 0
    assert found.kept_B >= 4 * 32


def test_shares_of_zero_add_up_to_the_whole() -> None:
    whole = of("adam(lr=0.1)", workers=1, transport="shared").largest
    for stage, names in ((2, ("gradients_B", "optimizer_B")), (3, ("parameters_B", "gradients_B", "optimizer_B"))):
        part = of("adam(lr=0.1)", workers=2, transport="gloo", shard=stage).largest
        for name in names:
            assert getattr(whole, name) <= 2 * getattr(part, name) <= 1.05 * getattr(whole, name), (stage, name)
    shared = of("adam(lr=0.1)", workers=2, transport="gloo", shard=1).largest
    assert shared.parameters_B == whole.parameters_B
    assert 2 * shared.optimizer_B == pytest.approx(whole.optimizer_B, rel=0.01)


@pytest.mark.parametrize(("schedule", "most"), [(one_f_one_b, (3, 2, 1)), (gpipe, (6, 6, 6))])
def test_a_stage_holds_as_many_activations_as_it_has_micro_batches_in_flight(schedule, most) -> None:  # type: ignore[no-untyped-def]
    kept = 1 << 20
    each = Pass(forward=(("a", kept),), backward=(("a", -kept),))
    made = schedule(3, 6)
    for rank, in_flight in enumerate(most):
        held = Held(0, list(made.rows[rank]), {rank: each}, {}, update("sgd(lr=0.1)"))
        assert replayed(held).live_B == in_flight * kept
        again = dataclasses.replace(held, recompute=True)
        assert replayed(again).live_B == kept


def test_a_larger_batch_takes_more() -> None:
    found = [of(batch_size=n, workers=1, transport="shared").largest.activations_B for n in (8, 64, 512)]
    assert found == sorted(found)
    assert found[0] < found[2]


def test_optimizers_and_strategies_are_asked_what_they_keep() -> None:
    assert update("sgd(lr=0.1)") == update("sgd(lr=0.2)")
    assert update("sgd(lr=0.1,momentum=0.9)").kept == 1
    assert (update("adam(lr=0.1)").kept, update("adam(lr=0.1)").one_by_one) == (2, True)
    assert copies(strategy_from("diloco(inner=2)"), 2).kept == 2  # the centre and its velocity
    assert copies(strategy_from("replica_average"), 4).kept == 4  # a row of each worker
    assert copies(strategy_from("hogwild"), 2).kept == 0


def test_what_does_not_fit_is_told_with_what_would() -> None:
    cluster = load("dgx_a100")
    task = mh.Task(model="perceptron", data="digits", optimizer="adam(lr=0.1)", batch_size=1024)
    decided = verbs.resolved(task, mh.Plan(workers=2, transport="gloo")).plan
    model, splits = verbs.built(task, None)
    known = {"measured": NO_PROCESS, "data": NO_DATA}
    memory = footprint(task, decided, model, splits, **known)  # type: ignore[arg-type]
    assert fits(memory, cluster, 2) is None
    room = dataclasses.replace(cluster.device.memory, value=memory.tensors_B / 1e9, unit="GB")
    small = dataclasses.replace(cluster, device=dataclasses.replace(cluster.device, memory=room))
    assert fits(memory, small, 2, margin=0.0) is None
    problem = fits(memory, small, 2)
    assert problem is not None
    assert "too much" in problem.rule
    cured = would_fit(task, decided, model, splits, small, **known)  # type: ignore[arg-type]
    assert cured is not None
    assert "batch_size=512" in cured.cure


def test_a_hole_is_too_small_for_its_like_until_the_threads_cache_is_full() -> None:
    size, heap, reached = 1 << 20, Heap(), list[int]()
    for k in range(60):  # a step: three blocks, of which the third could lie where the first was
        heap.take((k, 1), size)
        heap.take((k, 2), size)
        heap.give((k, 1))
        heap.take((k, 3), size)
        heap.give((k, 2))
        heap.give((k, 3))
        reached.append(heap.reached)
    assert reached[0] >= 3 * size
    assert reached[20] == reached[-1]


def test_an_evaluation_gathers_what_a_step_gathers_and_carries_what_is_agreed_on() -> None:
    chunk = (("a", 1 << 10), ("a", -(1 << 10)))
    held = Held(0, [], {}, {}, update("sgd(lr=0.1)"), answers=[chunk], chunk_B=1)
    assert replayed(held).live_B == (1 << 10) + 1
    assert replayed(dataclasses.replace(held, whole_B=1 << 20)).live_B == (1 << 20) + (1 << 10) + 1
    assert replayed(dataclasses.replace(held, agreed_B=1 << 20, carried_B=1 << 20)).live_B == 2 << 20


def test_loading_comes_before_most_of_the_code() -> None:
    started = Process(idle_B=100 << 20, kernels_B={}, started_B=80 << 20)
    task = mh.Task(model="perceptron", data="digits", batch_size=8)
    decided = verbs.resolved(task, mh.Plan(workers=1, transport="shared")).plan
    model, splits = verbs.built(task, None)
    loading = footprint(task, decided, model, splits, measured=started, data=Loaded(0, 90 << 20)).largest
    assert (loading.phase, loading.resident_B) == ("loading", 170 << 20)


# -- whatever they are given -------------------------------------------------------------------------------------------

orders = st.lists(st.tuples(st.integers(0, 9), st.integers(1, 200_000)), max_size=60)


def _events(order: list[tuple[int, int]]) -> list[tuple[object, int]]:
    """Blocks that come, and go when their number comes again."""
    there: dict[int, tuple[object, int]] = {}
    events = list[tuple[object, int]]()
    for i, (number, size) in enumerate(order):
        if number in there:
            block, of_it = there.pop(number)
            events.append((block, -of_it))
        else:
            there[number] = (number, i), size
            events.append(there[number])
    return events


@given(orders)
@settings(deadline=None)
def test_a_peak_is_no_less_than_any_moment(order: list[tuple[int, int]]) -> None:
    events = _events(order)
    moments = [left_B(events[: i + 1]) for i in range(len(events))]
    assert peak_B(events) == max(moments, default=0)


@given(orders, st.sets(st.integers(0, 59), max_size=3))
@settings(deadline=None)
def test_a_heap_never_overlaps_blocks_and_reaches_what_is_live(order: list[tuple[int, int]], ends: set[int]) -> None:
    heap, live = Heap(), dict[object, int]()
    for i, (block, size) in enumerate(_events(order)):
        if size > 0:
            heap.take(block, size)
            live[block] = size
        else:
            heap.give(block)
            del live[block]
        if i in ends:
            heap.settle()
        placed = sorted((at, at + room) for at, room in heap._blocks.values() if at >= 0)
        assert all(a[1] <= b[0] for a, b in itertools.pairwise(placed))
        assert sum(live.values()) <= heap.reached


@given(st.integers(1, 64), st.integers(1, 8))
@settings(deadline=None, max_examples=5)
def test_activations_of_a_batch_grow_in_proportion(width: int, times: int) -> None:
    model = nn.Sequential(nn.Linear(16, width), nn.Tanh(), nn.Linear(width, 4))
    kept = []
    for n in (8, 8 * times):
        (found,) = passes([model], torch.zeros(n, 16), torch.zeros(n, 4), lambda y, t: (y - t).abs().sum())
        kept.append(found.kept_B - 4)  # but for the loss
    assert kept[1] == times * kept[0]
