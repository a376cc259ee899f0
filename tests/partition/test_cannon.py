"""Cannon's algorithm: blocks meet where they are multiplied, for a layer's three products."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from manyhands.communication.communicator import reference_B
from manyhands.communication.transports.simulated import SimulatedWorld
from manyhands.errors import BadInput
from manyhands.partition.cannon import Grid, cannon_B, skew_left, skew_right
from manyhands.partition.tensor.rehearsal import rehearsed
from tests.partition.schemes import EXACT, agree, perceptron, samples, sent, trains_alike

grids = st.integers(1, 5).flatmap(lambda q: st.tuples(st.just(q), st.integers(0, q - 1), st.integers(0, q - 1)))


@given(grid=grids, transposed=st.booleans())
@pytest.mark.parametrize("skew", [skew_left, skew_right])
def test_what_goes_somewhere_is_what_that_rank_waits_for(skew, grid, transposed):
    q, i, j = grid
    to, frm = skew(i, j, q, transposed=transposed)
    assert skew(*to, q, transposed=transposed).frm == (i, j)
    assert skew(*frm, q, transposed=transposed).to == (i, j)


@given(grid=grids)
def test_the_blocks_that_meet_first_have_their_inner_index_in_common(grid):
    q, i, j = grid
    inner = (i + j) % q
    assert skew_left(i, j, q).frm == (i, inner)
    assert skew_right(i, j, q).frm == (inner, j)
    assert skew_left(i, j, q, transposed=True).frm == (inner, i), "L(i, inner) is stored where its transpose would be"
    assert skew_right(i, j, q, transposed=True).frm == (j, inner)


@given(q=st.integers(1, 5), m=st.integers(1, 20), k=st.integers(1, 20), n=st.integers(1, 20))
def test_only_the_first_row_and_column_stay_in_a_skew(q, m, k, n):
    left, right = -(-m // q) * -(-k // q), -(-k // q) * -(-n // q)
    total = sum(cannon_B((m, k, n), divmod(rank, q), q, 8) for rank in range(q * q))
    assert total == (q * q * (q - 1) * (left + right) + q * (q - 1) * (left + right)) * 8
    assert cannon_B((m, k, n), (0, 0), 1, 8) == 0


@pytest.mark.parametrize("sizes", [(6, 6, 6), (7, 5, 4), (3, 8, 2)])
@pytest.mark.parametrize("q", [2, 3])
@pytest.mark.parametrize("transposed", [(False, False), (True, False), (False, True), (True, True)])
def test_a_product_equals_the_dense_one_and_sends_what_the_closed_form_says(sizes, q, transposed):
    m, k, n = sizes
    left, right = samples(m, k), samples(k, n)

    def run(comm):
        grid = Grid(comm, q)

        def stored(whole, is_transposed):  # as the rank has it, filled up, and then turned
            whole = whole.t() if is_transposed else whole
            rows, columns = (-(-size // q) for size in whole.shape)
            i, j = grid.place
            part = whole[i * rows : (i + 1) * rows, j * columns : (j + 1) * columns]
            block = grid.filled(part, *whole.shape)
            return block.t().contiguous() if is_transposed else block

        got = grid.multiplied(stored(left, transposed[0]), stored(right, transposed[1]), transposed=transposed)
        return grid.place, got, comm.counters.sent_B("cut")

    rows, columns = -(-m // q), -(-n // q)
    for (i, j), block, sent_B in SimulatedWorld(q * q).run(run):
        expected = (left @ right)[i * rows : (i + 1) * rows, j * columns : (j + 1) * columns]
        torch.testing.assert_close(block[: expected.shape[0], : expected.shape[1]], expected, **EXACT)
        assert sent_B == cannon_B(sizes, (i, j), q, 8, left=transposed[0], right=transposed[1])


@pytest.mark.parametrize("size", [4, 9])
@pytest.mark.parametrize("rows", [2, 7])
def test_a_grid_equals_the_whole_network(size, rows):
    agree(perceptron(11, 13, 17, 9), samples(rows, 11), "cannon", size)


def test_each_rank_has_a_block_of_each_weight():
    found = agree(perceptron(6, 8, 4), samples(4, 6), "cannon", 4)
    assert [tuple(mine[1].weight.shape) for _, mine in found] == [(4, 3)] * 4
    assert all(blocks.keys() == {"1.weight", "3.weight"} for blocks, _ in found), "biases are whole"


@pytest.mark.parametrize("size", [4, 9])
def test_bytes_are_those_of_the_closed_form(size):
    sizes, rows, q = (11, 13, 9), 7, {4: 2, 9: 3}[size]
    for rank, (forward, backward) in enumerate(sent(perceptron(*sizes), samples(rows, 11), "cannon", size)):
        place = divmod(rank, q)
        z, delta_a, grad_w = 0, 0, 0
        for n_in, n_out in ((11, 13), (13, 9)):
            z += cannon_B((n_out, n_in, rows), place, q, 8)
            delta_a += cannon_B((n_in, n_out, rows), place, q, 8, left=True) if n_in != 11 else 0
            grad_w += cannon_B((n_out, rows, n_in), place, q, 8, right=True)
        assert forward["send"] == z
        assert backward["send"] == delta_a + grad_w
        assert backward["all_reduce"] == sum(reference_B("all_reduce", n * 8, size) for n in sizes[1:]), "of biases"


@pytest.mark.parametrize(("data", "tensor"), [(1, 4), (2, 4)])
@pytest.mark.parametrize("clip", [None, 0.05])
def test_some_steps_end_where_those_of_one_worker_do(data, tensor, clip):
    trains_alike("cannon", perceptron(6, 7, 8, 5), samples(10, 6), samples(10, 5), data=data, tensor=tensor, clip=clip)


@pytest.mark.parametrize(("size", "fits"), [(2, "tensor=1 or tensor=4"), (6, "tensor=4 or tensor=9")])
def test_ranks_that_are_no_square_are_refused_with_what_would_fit(size, fits):
    with pytest.raises(BadInput, match=fits):
        rehearsed(perceptron(6, 8, 4), "cannon", size, samples(1, 6))


def test_layers_narrower_than_the_grid_are_refused():
    with pytest.raises(BadInput, match="1 has 2 inputs"):
        rehearsed(perceptron(2, 8, 4), "cannon", 9, samples(1, 2))
