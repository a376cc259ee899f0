"""The ring: activations and partial sums go round, and every rank keeps its rows."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from manyhands.communication.topology import shares
from manyhands.communication.transports.simulated import SimulatedWorld
from manyhands.errors import BadInput
from manyhands.partition.rotate import at_hand, shifted_B
from manyhands.partition.tensor.rehearsal import rehearsed
from tests.partition.schemes import agree, perceptron, samples, sent, trains_alike


@given(size=st.integers(1, 9), rank=st.integers(0, 8))
def test_every_rank_has_had_everybodys_activations_after_a_round(size, rank):
    seen = [at_hand(rank % size, shift, size) for shift in range(size)]
    assert sorted(seen) == list(range(size))
    assert seen[0] == rank % size


@given(size=st.integers(1, 9), width=st.integers(1, 5), rows=st.integers(1, 9), extra=st.integers(0, 8))
def test_all_ranks_together_send_each_activation_over_all_links_but_one(size, width, rows, extra):
    widths = [hi - lo for lo, hi in shares(size * width + extra, size)]
    totals = [sum(products) for products in zip(*(shifted_B(widths, r, rows, 8) for r in range(size)), strict=True)]
    assert totals == [(size - 1) * sum(widths) * rows * 8] * 3


@pytest.mark.parametrize("size", [2, 3, 4, 9])
def test_a_ring_equals_the_whole_network(size):
    agree(perceptron(11, 13, 17, 9), samples(7, 11), "rotate", size)


def test_biases_may_be_missing_and_sequences_nested():
    torch.manual_seed(1)
    inner = nn.Sequential(nn.Linear(5, 6, bias=False), nn.ReLU(inplace=True), nn.Linear(6, 5, bias=False))
    whole = nn.Sequential(inner, nn.Sigmoid(), nn.Linear(5, 3)).double()
    agree(whole, samples(4, 2, 5), "rotate", 3)


@pytest.mark.parametrize("size", [2, 3, 4])
def test_bytes_are_those_of_the_closed_form(size):
    sizes, rows = (11, 13, 17, 9), 7
    found = sent(perceptron(*sizes), samples(rows, 11), "rotate", size)
    for rank, (forward, backward) in enumerate(found):
        products = [
            shifted_B([hi - lo for lo, hi in shares(count, size)], rank, rows, 8) for count in sizes[1:-1]
        ]  # of the layers but the first
        assert forward == {"send": sum(p[0] for p in products), "all_gather": (size - 1) * rows * 9 * 8 // size}
        assert backward == {"send": sum(p[1] + p[2] for p in products), "all_gather": 0}


def test_messages_go_to_the_right_neighbour_only():
    whole, x, size = perceptron(6, 8, 8, 8), samples(4, 6), 4
    how, seen = rehearsed(whole, "rotate", size, x[:1]), set()

    def run(comm):
        import copy

        mine = copy.deepcopy(whole)
        how.cut(mine, comm)
        send = comm.send
        comm.send = lambda t, to, tag=0: (seen.add((to - comm.rank) % size), send(t, to, tag))[1]
        mine(x).sum().backward()
        return comm.counters.tallies["cut"]["send"].calls

    layers, products = 2, 3
    assert SimulatedWorld(size).run(run) == [layers * products * (size - 1)] * size
    assert seen == {1}


@pytest.mark.parametrize(("data", "tensor"), [(1, 3), (2, 2)])
@pytest.mark.parametrize("clip", [None, 0.05])
def test_some_steps_end_where_those_of_one_worker_do(data, tensor, clip):
    trains_alike("rotate", perceptron(6, 7, 8, 5), samples(10, 6), samples(10, 5), data=data, tensor=tensor, clip=clip)


def test_a_dropout_draws_for_each_neuron_alone():
    whole = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 8), nn.Linear(8, 3))
    assert rehearsed(whole, "rotate", 2, torch.ones(1, 4)).parts == ["1"]


@pytest.mark.parametrize(
    ("model", "says"),
    [
        (nn.Sequential(nn.Conv1d(1, 2, 3), nn.Flatten(0), nn.Linear(4, 4)), "0 is a Conv1d"),
        (nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 4)), "1 is a LayerNorm"),
        (nn.Sequential(nn.Linear(4, 4), nn.Softmax(-1)), "1 is a Softmax"),
        (nn.Sequential(nn.Linear(4, 4), nn.Dropout1d(0.5)), "1 is a Dropout1d"),
        (nn.Sequential(nn.Linear(4, 2), nn.Linear(2, 4)), "0 has 2 outputs, to be cut into 3 parts"),
        (nn.Sequential(nn.Tanh()), "no Linear layer"),
        (nn.Linear(4, 4), "Linear is no nn.Sequential"),
    ],
)
def test_what_is_no_perceptron_is_refused_with_the_module(model, says):
    with pytest.raises(BadInput, match=says):
        rehearsed(model, "rotate", 3, torch.ones(1, 4))


def test_layers_that_share_a_weight_are_refused():
    model = perceptron(4, 4, 4)
    model[3].weight = model[1].weight
    with pytest.raises(BadInput, match=r"also 3.weight"):
        rehearsed(model, "rotate", 2, samples(1, 4))


@pytest.mark.parametrize("text", ["rotates", "rotate(speed=2)", "nowhere:scheme"])
def test_what_is_said_wrongly_is_refused(text):
    with pytest.raises(BadInput, match=r"rotate|nowhere"):
        rehearsed(perceptron(4, 4), text, 2, samples(1, 4))
