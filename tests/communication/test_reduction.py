"""Reduction in rank order, and meshes: what mathematics promises, exactly."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from manyhands.communication.reduction import SLICE_QUANTUM, coefficients, reduce_into, slices
from manyhands.communication.topology import Mesh, parse_mesh
from manyhands.errors import BadInput, Vetoed

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
numels = st.integers(0, 2000)
sizes = st.integers(1, 9)
weights = st.floats(0, 1e6, allow_subnormal=False)


def parts_of(seed, size, numel, dtype):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(numel, generator=generator, dtype=torch.float64).to(dtype) for _ in range(size)]


def reduced(parts, factors):
    out = torch.empty_like(parts[0])
    reduce_into(out, parts, factors)
    return out


# Strategies give plain numbers and tests build objects from them: under pytest our functions are checked by beartype,
# which draws from `random`, and Hypothesis forbids that inside a strategy.
problems = st.tuples(
    st.integers(0, 1000),
    st.integers(0, 700),
    st.sampled_from(FLOATS),
    st.lists(st.integers(0, 3), min_size=1, max_size=6),
)


def build(problem):
    """Parts of one dtype, and factors; an odd seed stands for a plain sum."""
    seed, numel, dtype, given_weights = problem
    parts = parts_of(seed, len(given_weights), numel, dtype)
    return parts, None if seed % 2 else coefficients([float(w) for w in given_weights])


# -- slices ------------------------------------------------------------------------------------------------------------


@given(numels, sizes)
def test_slices_are_a_partition_in_rank_order(numel, size):
    bounds = slices(numel, size)
    assert len(bounds) == size
    assert [i for lo, hi in bounds for i in range(lo, hi)] == list(range(numel))


@given(numels, sizes)
def test_slices_begin_on_the_quantum_and_only_the_last_are_short(numel, size):
    bounds = slices(numel, size)
    assert all(lo % SLICE_QUANTUM == 0 or lo == numel for lo, _ in bounds)
    lengths = [hi - lo for lo, hi in bounds]
    assert lengths == sorted(lengths, reverse=True)
    assert lengths[0] - numel / size <= SLICE_QUANTUM


# -- coefficients ------------------------------------------------------------------------------------------------------


@given(st.lists(weights, min_size=1, max_size=9))
def test_coefficients_are_a_mean_or_nothing(given_weights):
    factors = coefficients(given_weights)
    assert [f == 0 for f in factors] == [w == 0 for w in given_weights] or min(w for w in given_weights if w) < 1e-300
    assert math.isclose(sum(factors), 1.0 if any(given_weights) else 0.0)


@given(st.lists(st.none(), min_size=1, max_size=9))
def test_no_weights_mean_a_plain_sum(given_weights):
    assert coefficients(given_weights) is None


@given(st.lists(weights, min_size=1, max_size=5), st.integers(0, 4), st.sampled_from([math.inf, -math.inf, math.nan]))
def test_a_weight_that_is_not_finite_vetoes_and_names_its_rank(given_weights, rank, bad):
    rank %= len(given_weights)
    given_weights[rank] = bad
    with pytest.raises(Vetoed) as caught:
        coefficients(given_weights)
    assert caught.value.rank == rank


# -- reduce_into -------------------------------------------------------------------------------------------------------


@given(problems)
def test_the_sum_is_right_to_rounding(problem):
    parts, factors = build(problem)
    pairs = list(zip([p.double() for p in parts], factors or [1.0] * len(parts), strict=True))
    true = sum(p * f for p, f in pairs)
    bound = (len(parts) + 2) * torch.finfo(parts[0].dtype).eps * sum(p.abs() * f for p, f in pairs)
    assert bool(((reduced(parts, factors).double() - true).abs() <= bound).all())


@given(problems)
def test_half_precision_is_rounded_once(problem):
    parts, factors = build(problem)
    if parts[0].dtype in (torch.float16, torch.bfloat16):
        wide = reduced([p.float() for p in parts], factors)
        assert torch.equal(reduced(parts, factors), wide.to(parts[0].dtype))


@given(problems)
def test_the_result_does_not_depend_on_which_part_it_is_written_to(problem):
    parts, factors = build(problem)
    expected = reduced(parts, factors)
    for i in range(len(parts)):
        own = [p.clone() for p in parts]
        reduce_into(own[i], own, factors)
        assert torch.equal(own[i], expected)
        assert all(torch.equal(p, q) for j, (p, q) in enumerate(zip(own, parts, strict=True)) if j != i)


@given(problems, sizes)
def test_reducing_slice_by_slice_gives_the_bits_of_reducing_whole(problem, size):
    parts, factors = build(problem)
    expected = reduced(parts, factors)
    out = torch.empty_like(parts[0])
    for lo, hi in slices(out.numel(), size):
        reduce_into(out[lo:hi], [p[lo:hi] for p in parts], factors)
    assert torch.equal(out, expected)


@pytest.mark.parametrize("dtype", FLOATS)
def test_the_bits_do_not_depend_on_torchs_threads(dtype):
    """Above torch's grain of 32,768 elements its threads cut where they like, not on our quantum."""
    parts, factors = parts_of(0, 3, 100_003, dtype), coefficients([1.0, 2.0, 4.0])
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(reduced(parts, factors))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@given(problems, st.integers(0, 5))
def test_a_part_of_factor_zero_is_not_read(problem, index):
    parts, factors = build(problem)
    if factors is not None and factors[index % len(parts)] == 0:
        expected = reduced(parts, factors)
        parts[index % len(parts)].fill_(torch.nan)
        assert torch.equal(reduced(parts, factors), expected)


@pytest.mark.parametrize("dtype", FLOATS)
def test_one_part_alone_keeps_its_bits(dtype):
    x = torch.tensor([-0.0, torch.nan, torch.inf, 1e-30], dtype=dtype)
    for factors in (None, [1.0]):
        assert torch.equal(reduced([x], factors).view(torch.uint8), x.view(torch.uint8))


@given(st.lists(st.integers(-(2**60), 2**60), min_size=1, max_size=6))
def test_integers_are_summed_exactly(values):
    parts = [torch.tensor([v]) for v in values]
    total = (sum(values) + 2**63) % 2**64 - 2**63  # as 64-bit integers wrap
    assert reduced(parts, None).item() == total


# -- meshes ------------------------------------------------------------------------------------------------------------

AXES = ("data", "tensor", "pipeline", "expert")
extents = st.lists(st.integers(1, 4), min_size=1, max_size=4)


def mesh_of(extents):
    return Mesh(zip(AXES, extents, strict=False))


@given(extents)
def test_coordinates_are_row_major(extents):
    mesh = mesh_of(extents)
    grid = torch.arange(mesh.size).view([mesh[a] for a in mesh])
    for rank in range(mesh.size):
        assert grid[tuple(mesh.coordinates(rank)[a] for a in mesh)].item() == rank


@given(extents, st.sets(st.sampled_from(AXES)))
def test_groups_are_the_ranks_that_differ_only_along_the_axes(extents, over):
    mesh = mesh_of(extents)
    groups = mesh.groups(frozenset(over))
    assert sorted(itertools.chain.from_iterable(groups)) == list(range(mesh.size))
    for group in groups:
        assert len(group) == math.prod(mesh[a] for a in mesh if a in over)
        fixed = [{a: c for a, c in mesh.coordinates(r).items() if a not in over} for r in group]
        assert all(f == fixed[0] for f in fixed)
        assert len({mesh.color(r, frozenset(over)) for r in group}) == 1
        assert group == sorted(group)


@given(extents)
def test_what_a_mesh_prints_parses(extents):
    mesh = mesh_of(extents)
    assert parse_mesh(str(mesh)) == mesh


@pytest.mark.parametrize("text", ["", "data", "data=", "data=x", "data=0", "data=2,data=2", "1=2", "data=-1"])
def test_a_bad_mesh_is_refused_with_the_rule(text):
    with pytest.raises(BadInput, match="mesh"):
        parse_mesh(text)
