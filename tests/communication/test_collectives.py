"""Collectives over send and receive: proved on sets without a process, then run against an engine's own."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from manyhands.communication import collectives
from manyhands.communication.collectives import ALGORITHMS, binomial_broadcast, binomial_reduce, even
from manyhands.communication.communicator import Communicator, reference_B
from manyhands.communication.reduction import slices
from manyhands.communication.schedule import BadSchedule, Receive, Round, Send, grid, run, sent_elements, validate
from manyhands.testing import run_ranks

SIZES = st.integers(1, 17)
NUMELS = st.integers(0, 200)
every_algorithm = pytest.mark.parametrize("name", ALGORITHMS)
FEW_EACH = settings(max_examples=25)  # of each algorithm


@st.composite
def uneven_bounds(draw):
    """Any cut of up to 200 elements over up to 17 ranks, empty slices too."""
    size = draw(SIZES)
    numel = draw(NUMELS)
    cuts = sorted(draw(st.lists(st.integers(0, numel), min_size=size - 1, max_size=size - 1)))
    return list(zip([0, *cuts], [*cuts, numel], strict=True))


# -- proofs on the schedules alone -------------------------------------------------------------------------------------


@every_algorithm
@FEW_EACH
@given(bounds=uneven_bounds())
def test_every_contribution_arrives_exactly_once(name, bounds):
    algorithm = ALGORITHMS[name]
    validate([algorithm.schedule(r, bounds) for r in range(len(bounds))], algorithm.operation, bounds)


@every_algorithm
@FEW_EACH
@given(bounds=uneven_bounds())
def test_rounds_and_elements_sent_are_the_closed_form(name, bounds):
    algorithm = ALGORITHMS[name]
    for rank in range(len(bounds)):
        schedule = algorithm.schedule(rank, bounds)
        assert (len(schedule), sent_elements(schedule)) == algorithm.cost(rank, bounds)


@pytest.mark.parametrize("size", [1, 2, 4, 8, 16])
def test_closed_forms_are_the_textbook_ones_for_powers_of_two(size):
    n, depth = 16 * 10, size.bit_length() - 1
    textbook = {
        "ring_all_reduce": (2 * (size - 1), 2 * (size - 1) * n // size),
        "recursive_doubling_all_reduce": (depth, depth * n),
        "rabenseifner_all_reduce": (2 * depth, 2 * (size - 1) * n // size),
        "ring_reduce_scatter": (size - 1, (size - 1) * n // size),
        "recursive_halving_reduce_scatter": (depth, (size - 1) * n // size),
        "ring_all_gather": (size - 1, (size - 1) * n // size),
        "recursive_doubling_all_gather": (depth, (size - 1) * n // size),
    }
    for name, expected in textbook.items():
        assert {ALGORITHMS[name].cost(r, even(n, size)) for r in range(size)} == {expected}, name


@given(size=SIZES, multiple=st.integers(0, 12))
def test_ring_sends_what_the_communicator_declares(size, multiple):
    n = size * multiple
    for rank in range(size):
        for operation in ("all_reduce", "reduce_scatter", "all_gather"):
            cost = ALGORITHMS[f"ring_{operation}"].cost(rank, even(n, size))
            assert 4 * cost.elements == reference_B(operation, 4 * n, size)


@pytest.mark.parametrize("size", range(1, 18))
def test_a_tree_sends_the_vector_once_to_everyone_but_the_root(size):
    for name in ("binomial_reduce", "binomial_broadcast"):
        assert sum(ALGORITHMS[name].cost(r, even(5, size)).elements for r in range(size)) == 5 * (size - 1)


@given(size=SIZES, numel=NUMELS, data=st.data())
def test_trees_work_from_any_root(size, numel, data):
    root, bounds = data.draw(st.integers(0, size - 1)), even(numel, size)
    validate([binomial_reduce(r, bounds, root) for r in range(size)], "reduce", bounds, root)
    validate([binomial_broadcast(r, bounds, root) for r in range(size)], "broadcast", bounds, root)


@given(size=SIZES, numel=st.integers(0, 5000))
def test_an_even_cut_covers_everything_and_differs_by_one(size, numel):
    bounds = even(numel, size)
    lengths = [hi - lo for lo, hi in bounds]
    assert bounds[0][0] == 0
    assert bounds[-1][1] == numel
    assert all(a[1] == b[0] for a, b in itertools.pairwise(bounds))
    assert max(lengths) - min(lengths) <= 1


# -- the validator itself ----------------------------------------------------------------------------------------------


def ring(size=3, numel=6):
    bounds = even(numel, size)
    return [collectives.ring_all_reduce(r, bounds) for r in range(size)], bounds


def faulty(schedules, rank, k, **changes):
    """The same schedules, but for one round of one rank."""
    rounds = list(schedules[rank])
    rounds[k] = rounds[k]._replace(**changes)
    return [tuple(rounds) if r == rank else s for r, s in enumerate(schedules)]


def test_a_slice_added_where_it_should_be_copied_is_found():
    schedules, bounds = ring()
    wrong = tuple(r._replace(then="add") for r in schedules[1][-1].receives)
    with pytest.raises(BadSchedule, match=r"rank 1 ends with the contributions \[\d, \d, \d\]"):
        validate(faulty(schedules, 1, -1, receives=wrong), "all_reduce", bounds)


def test_a_contribution_copied_over_is_found():
    schedules, bounds = ring()
    wrong = tuple(r._replace(then="copy") for r in schedules[2][0].receives)
    with pytest.raises(BadSchedule, match="instead of"):
        validate(faulty(schedules, 2, 0, receives=wrong), "all_reduce", bounds)


def test_a_message_nobody_expects_is_found_and_pointed_at():
    schedules, bounds = ring()
    with pytest.raises(BadSchedule) as found:
        validate(faulty(schedules, 2, 1, receives=()), "all_reduce", bounds)
    message = str(found.value)
    assert message.startswith("round 1: rank 1 sends [(")
    arrow = next(line for line in message.splitlines() if "⇒" in line)
    assert arrow.startswith("1 ")


def test_a_message_never_sent_or_to_nobody_is_found():
    schedules, bounds = ring()
    with pytest.raises(BadSchedule, match="round 0"):
        validate(faulty(schedules, 0, 0, sends=()), "all_reduce", bounds)
    with pytest.raises(BadSchedule, match="no such peers"):
        validate(faulty(schedules, 0, 0, sends=(Send(3, 0, 2),)), "all_reduce", bounds)


def test_a_missing_round_and_a_slice_outside_are_found():
    schedules, bounds = ring()
    with pytest.raises(BadSchedule, match="rank 1 has 3 rounds, rank 0 has 4"):
        validate([s[:-1] if r == 1 else s for r, s in enumerate(schedules)], "all_reduce", bounds)
    with pytest.raises(BadSchedule, match="outside"):
        validate(faulty(schedules, 0, 0, sends=(Send(1, 4, 7),)), "all_reduce", bounds)


def test_an_operation_that_delivers_too_little_is_found():
    bounds = even(6, 3)
    with pytest.raises(BadSchedule, match="all_reduce: rank 0"):
        validate([collectives.ring_reduce_scatter(r, bounds) for r in range(3)], "all_reduce", bounds)


def test_a_schedule_prints_as_a_grid():
    bounds = even(4, 2)
    schedules = [collectives.ring_reduce_scatter(r, bounds) for r in range(2)]
    assert grid(schedules).splitlines() == [
        "round  rank 0            rank 1",
        "0      →1[2:4] ←1+[0:2]  →0[0:2] ←0+[2:4]",
    ]
    assert str(Round()) == "·"
    assert str(Receive(1, 0, 2, "copy")) == "←1[0:2]"


# -- against an engine -------------------------------------------------------------------------------------------------


def check_against_engine(comm: Communicator) -> None:
    """Every algorithm, run over ``comm``'s send and receive, gives what ``comm``'s own operation gives.

    Called by all ranks; a row of the contract test. Values are small whole numbers, so that every order of summation
    gives the same bits.
    """
    lengths = {torch.float32: (0, 1, comm.size, 2 * comm.size + 1, 1000), torch.float64: (65,), torch.int64: (65,)}
    for dtype, numels in lengths.items():
        for numel in numels:
            mine = _contribution(comm.rank, numel, dtype)
            for bounds in (even(numel, comm.size), slices(numel, comm.size)):
                for name, algorithm in ALGORITHMS.items():
                    x = mine.clone()
                    before = comm.counters.sent_B()
                    run(algorithm.schedule(comm.rank, bounds), x, comm)
                    sent_B = comm.counters.sent_B() - before
                    where = f"{name}, {numel} × {dtype}, rank {comm.rank} of {comm.size}"
                    assert sent_B == algorithm.cost(comm.rank, bounds).elements * x.element_size(), where
                    theirs = _by_engine(algorithm.operation, mine, bounds, comm)
                    lo, hi = _defined(algorithm.operation, comm.rank, bounds)
                    assert torch.equal(x[lo:hi], theirs[lo:hi]), where


def _contribution(rank: int, numel: int, dtype: torch.dtype) -> Tensor:
    return (torch.arange(numel) * (rank + 3) % 17 + rank).to(dtype)


def _defined(operation: str, rank: int, bounds: collectives.Bounds) -> tuple[int, int]:
    """The slice of the result that is defined on this rank."""
    if operation == "reduce_scatter":
        return bounds[rank]
    return (0, 0) if operation == "reduce" and rank else (0, bounds[-1][1])


def _by_engine(operation: str, mine: Tensor, bounds: collectives.Bounds, comm: Communicator) -> Tensor:
    x = mine.clone()
    if operation == "all_gather":
        comm.all_gather(x, bounds).wait()
    elif operation == "broadcast":
        comm.broadcast(x).wait()
    else:  # a reduce is an all-reduce of which only the root looks at the result
        comm.all_reduce(x).wait()
    return x


@pytest.mark.parametrize(
    ("on", "size"),
    [
        *itertools.product(["threads", "simulated", "shared"], [1, 2, 3, 5]),
        *(pytest.param(on, 8, marks=pytest.mark.slow) for on in ("threads", "simulated", "shared")),
        pytest.param("gloo", 3, marks=pytest.mark.slow),
        pytest.param("mpi", 3, marks=pytest.mark.slow),
    ],
)
def test_algorithms_equal_the_engine(on, size):
    run_ranks(check_against_engine, size, on=on)


def every_all_reduce(comm: Communicator) -> list[Tensor]:
    """Random numbers summed by each all-reduce in turn."""
    results = []
    for algorithm in ALGORITHMS.values():
        if algorithm.operation == "all_reduce":
            x = torch.randn(100, generator=torch.Generator().manual_seed(comm.rank))
            run(algorithm.schedule(comm.rank, even(100, comm.size)), x, comm)
            results.append(x)
    return results


@pytest.mark.parametrize("size", [4, 7])
def test_an_all_reduce_leaves_the_same_bits_everywhere(size):
    first, *others = run_ranks(every_all_reduce, size, on="simulated")
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))
