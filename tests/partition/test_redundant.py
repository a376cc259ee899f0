"""Neurons or weights that two ranks have, so that less is sent."""

import functools
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from manyhands.communication.communicator import reference_B
from manyhands.communication.topology import Mesh, shares
from manyhands.communication.transports.simulated import SimulatedWorld
from manyhands.contract import Block
from manyhands.errors import BadInput, UnknownName
from manyhands.partition.redundant import dual_B, halo_B, of_halo
from manyhands.partition.tensor.rehearsal import rehearsed
from tests.partition.schemes import agree, perceptron, samples, sent, trained, trains_alike

DUAL = "redundant(copies=dual)"


@given(half=st.integers(1, 5), count=st.integers(10, 40), parity=st.integers(0, 1))
def test_the_ranks_of_one_parity_have_every_neuron_once(half, count, parity):
    size = 2 * half
    neurons = [n for r in range(parity, size, 2) for lo, hi in of_halo(count, r, size) for n in range(lo, hi)]
    assert sorted(neurons) == list(range(count))


@given(half=st.integers(1, 5), width=st.integers(1, 4), rows=st.integers(1, 5))
def test_a_halo_sends_the_papers_part_and_nothing_between_two(half, width, rows):
    size = 2 * half
    whole = rows * width * size * 8
    for rank in range(size):
        assert halo_B(width * size, rank, size, rows, 8) == ((size - 2) * whole // size,) * 2
    assert halo_B(7, 0, 2, rows, 8) == (0, 0)


@given(size=st.integers(1, 9), inputs=st.integers(1, 30), outputs=st.integers(1, 30))
def test_dual_copies_save_no_byte_against_a_reduce_scatter(size, inputs, outputs):
    forward, backward = dual_B(inputs, outputs, size, 4, 8)
    assert forward == reference_B("reduce_scatter", 4 * inputs * 8, size)
    assert backward == reference_B("all_gather", 4 * outputs * 8, size)


def test_copies_are_taken_and_neither_put_nor_counted():
    whole = torch.arange(12.0).view(3, 4)
    block = Block((3, 4), ((0, ((1, 2),)),), ((1, ((0, 1),)),))
    part = block.take(whole)
    assert part.tolist() == [4, 5, 6, 7, 0, 4, 8]
    assert (block.own, block.numel) == (4, 7)
    assert torch.equal(whole.view(-1)[block.places()], part)
    again = torch.zeros(3, 4)
    block.put(part, again)
    assert again.tolist() == [[0, 0, 0, 0], [4, 5, 6, 7], [0, 0, 0, 0]]
    nothing_own = Block((3, 4), ((0, ()),), ((0, ((0, 2),)),))
    assert nothing_own.own == 0
    assert nothing_own.take(whole).shape == (2, 4)
    nothing_own.put(nothing_own.take(whole) + 1, again)
    assert again[0].tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize("size", [2, 4, 6])
def test_a_halo_equals_the_whole_network_with_twice_the_weights(size):
    whole = perceptron(11, 13, 17, 9)
    found = agree(whole, samples(7, 11), "redundant", size)
    assert sum(b.numel for blocks, _ in found for b in blocks.values()) == 2 * sum(
        p.numel() for p in whole.parameters()
    )
    assert sum(b.own for blocks, _ in found for b in blocks.values()) == sum(p.numel() for p in whole.parameters())


@pytest.mark.parametrize("size", [2, 3, 4, 9])
def test_dual_copies_equal_the_whole_network_with_twice_the_weights_but_the_first_layers(size):
    whole = perceptron(11, 13, 17, 9)
    found = agree(whole, samples(7, 11), DUAL, size)
    twice = sum(whole[i].weight.numel() for i in (3, 5))
    assert sum(b.numel for blocks, _ in found for b in blocks.values()) == twice + sum(
        p.numel() for p in whole.parameters()
    )


@pytest.mark.parametrize("size", [2, 4])
def test_a_halos_bytes_are_those_of_the_closed_form(size):
    sizes, rows = (11, 12, 16, 9), 5
    for rank, (forward, backward) in enumerate(sent(perceptron(*sizes), samples(rows, 11), "redundant", size)):
        layers = [halo_B(count, rank, size, rows, 8) for count in sizes[1:-1]]
        end = reference_B("all_gather", rows * 9 * 8, size // 2)
        assert sum(forward.values()) == sum(f for f, _ in layers) + end
        assert sum(backward.values()) == sum(b for _, b in layers)
        if size == 2:
            assert not sum(forward.values()) + sum(backward.values())


@pytest.mark.parametrize("size", [2, 3])
def test_bytes_of_dual_copies_are_those_of_the_closed_form(size):
    sizes, rows = (11, 12, 18, 9), 6
    for forward, backward in sent(perceptron(*sizes), samples(rows, 11), DUAL, size):
        layers = [dual_B(n_in, n_out, size, rows, 8) for n_in, n_out in pairwise(sizes[1:])]
        assert sum(forward.values()) == sum(f for f, _ in layers) + reference_B("all_gather", rows * 9 * 8, size)
        assert sum(backward.values()) == sum(b for _, b in layers)


@pytest.mark.parametrize(
    ("text", "data", "tensor"), [("redundant", 1, 4), ("redundant", 2, 2), (DUAL, 1, 3), (DUAL, 2, 2)]
)
@pytest.mark.parametrize("clip", [None, 0.05])
def test_some_steps_end_where_those_of_one_worker_do(text, data, tensor, clip):
    found = trains_alike(
        text, perceptron(6, 7, 8, 5), samples(10, 6), samples(10, 5), data=data, tensor=tensor, clip=clip
    )
    if text == DUAL:
        both_copies_are_equal(found, tensor)


@pytest.mark.parametrize("strategy", ["synchronous(update='replicated')", "local(every=2)"])
def test_the_two_copies_of_a_weight_stay_bit_equal_under_other_strategies(strategy):
    x, y = samples(10, 6), samples(10, 5)
    run = functools.partial(trained, strategy=strategy, steps=20)
    found = SimulatedWorld(6).run(run, Mesh(data=2, tensor=3), DUAL, perceptron(6, 7, 8, 5), x, y)
    both_copies_are_equal(found, 3)


def both_copies_are_equal(found, tensor):
    for first in range(0, len(found), tensor):
        for name in ("3.weight", "5.weight"):
            whole = torch.full(found[0][1][name].shape, float("nan"), dtype=torch.float64)
            for parameters, blocks in found[first : first + tensor]:
                blocks[name].put(parameters[name], whole)
            for parameters, blocks in found[first : first + tensor]:
                assert torch.equal(parameters[name], blocks[name].take(whole)), "bit for bit"


@pytest.mark.parametrize(
    ("text", "size", "error", "says"),
    [
        ("redundant", 3, BadInput, "tensor=2 or tensor=4 would do"),
        ("redundant(copies=halos)", 2, UnknownName, "'halo'"),
        ("redundant(copy=halo)", 2, UnknownName, "copies"),
    ],
)
def test_what_cannot_be_is_refused(text, size, error, says):
    with pytest.raises(error, match=says):
        rehearsed(perceptron(6, 8, 4), text, size, samples(1, 6))


def test_a_dropout_on_neurons_that_two_ranks_compute_is_refused():
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 4))
    with pytest.raises(BadInput, match="1 draws random numbers"):
        rehearsed(model, "redundant", 2, torch.ones(1, 4))
    assert rehearsed(model, DUAL, 2, torch.ones(1, 4)).parts == ["1"]
    model = nn.Sequential(nn.Dropout(0.5), nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 4), nn.Dropout(0.5))
    assert rehearsed(model, "redundant", 2, torch.ones(1, 4)).parts == [], "what is whole is drawn alike on all ranks"


def test_parts_of_unlike_length_are_of_the_same_neurons():
    assert [of_halo(5, rank, 4) for rank in (0, 3)] == [((0, 2), (2, 3)), ((4, 5), (0, 2))]
    assert shares(5, 4)[0] == (0, 2)
