"""Images in tiles: what neighbours send of their rows is all that a convolution needs of them."""

import copy

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import nn

from manyhands.communication.communicator import reference_B
from manyhands.communication.transports.simulated import SimulatedWorld
from manyhands.errors import BadInput, WorkerFailed
from manyhands.models.cnn import cnn
from manyhands.partition.spatial import Window, halo_B, tiles, window_of
from manyhands.partition.tensor.rehearsal import rehearsed
from tests.partition.schemes import agree, samples, sent, trains_alike

windows = st.builds(
    lambda reach, stride, padding: Window(reach, stride, min(padding, reach - 1)),
    st.integers(1, 5),
    st.integers(1, 3),
    st.integers(0, 2),
)


@given(height=st.integers(4, 60), chain=st.lists(windows, min_size=1, max_size=4), size=st.integers(1, 4))
def test_a_tile_with_its_halo_is_all_that_its_outputs_come_from(height, chain, size):
    try:
        bounds = tiles(height, chain, size)
    except ValueError:
        assume(False)
    for window, inputs, outputs in zip(chain, bounds, bounds[1:], strict=False):
        assert [lo for lo, _ in inputs] == [0, *(hi for _, hi in inputs[:-1])], "tiles lie side by side"
        h = inputs[-1][1]
        assert outputs[-1][1] == window.outputs(h)
        for rank, ((lo, hi), (first, last)) in enumerate(zip(inputs, outputs, strict=True)):
            top, bottom = rank == 0, rank == size - 1
            start = lo - (window.padding if top else window.above)
            stop = hi + (window.padding if bottom else window.below)
            assert start == first * window.stride - window.padding
            assert (stop - start - window.reach) // window.stride + 1 == last - first
            assert (last - 1) * window.stride - window.padding + window.reach <= stop
            if not bottom:
                assert inputs[rank + 1][1] - inputs[rank + 1][0] >= window.below


@given(halo=st.integers(0, 3), row=st.integers(1, 50), size=st.integers(1, 6))
def test_a_cut_between_tiles_costs_the_references_bytes_in_each_direction(halo, row, size):
    window = Window(2 * halo + 1, 1, halo)
    forward, backward = (
        sum(part) for part in zip(*(halo_B(window, row, r, size, 8) for r in range(size)), strict=True)
    )
    assert forward == backward == (size - 1) * 2 * halo * row * 8


def sequence(*modules):
    torch.manual_seed(2)
    return nn.Sequential(*modules).double()


CHAINS = {
    "plain": (
        lambda: sequence(
            nn.Conv2d(2, 3, 3, padding=1), nn.ReLU(inplace=True), nn.Conv2d(3, 4, 5, padding=2), nn.Tanh(),
            nn.Flatten(), nn.Linear(4 * 13 * 9, 3),
        ),
        (2, 13, 9),
    ),
    "strides, poolings and norms": (
        lambda: sequence(
            nn.Conv2d(2, 3, 3, stride=2, padding=1), nn.BatchNorm2d(3), nn.Tanh(), nn.AvgPool2d(2), nn.Conv2d(3, 4, 3),
            nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 9 * 3, 3),
        ),
        (2, 45, 20),
    ),
    "dilated, overlapping, depthwise": (
        lambda: sequence(
            nn.Conv2d(2, 3, 4, dilation=2, padding=2), nn.MaxPool2d(3, 2, 1), nn.BatchNorm2d(3, momentum=None),
            nn.Conv2d(3, 3, 1, stride=2, groups=3, bias=False), nn.BatchNorm2d(3, affine=False), nn.ReLU(),
            nn.Conv2d(3, 2, 3, padding="same"), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(8, 3),
        ),
        (2, 45, 20),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CHAINS)
@pytest.mark.parametrize("size", [2, 3, 4])
def test_tiles_equal_the_whole_images(name, size):
    build, shape = CHAINS[name]
    whole, x = build(), samples(3, *shape)
    found = agree(whole, x, "spatial", size)
    assert not any(blocks for blocks, _ in found), "weights are whole"
    for _, mine in found[1:]:
        for (key, a), b in zip(found[0][1].named_parameters(), mine.parameters(), strict=True):
            assert torch.equal(a.grad, b.grad), f"{key}: all ranks sum to the same bits"
    first, *others = [mine.state_dict() for _, mine in found]  # with the statistics
    assert all(torch.equal(state[key], value) for state in others for key, value in first.items())


def test_our_own_network_is_cut_with_its_memory_layout():
    found = agree(cnn((1, 28, 28), 10).double(), samples(2, 1, 28, 28), "spatial", 2)
    assert type(found[0][1].conv2).__name__ == "TiledConvolution"


@pytest.mark.parametrize("size", [2, 3])
def test_bytes_are_those_of_the_closed_form(size):
    whole, n = sequence(nn.Conv2d(2, 3, 3, padding=1), nn.Tanh(), nn.Conv2d(3, 4, 5, padding=2), nn.Flatten()), 2
    weights = sum(p.numel() for p in whole.parameters())
    for rank, (forward, backward) in enumerate(sent(whole, samples(n, 2, 12, 9), "spatial", size)):
        up, down = halo_B(Window(5, 1, 2), 9 * 3 * n, rank, size, 8)
        assert forward == {"send": up, "all_gather": reference_B("all_gather", n * 4 * 12 * 9 * 8, size)}
        assert backward["send"] == down
        # one all-reduce a tensor, each rounded down
        assert 0 <= reference_B("all_reduce", weights * 8, size) - backward["all_reduce"] < 4
        assert backward["all_gather"] == 0


@pytest.mark.parametrize(("data", "tensor"), [(1, 3), (2, 2)])
@pytest.mark.parametrize("clip", [None, 0.05])
def test_some_steps_end_where_those_of_one_worker_do(data, tensor, clip):
    whole = sequence(
        nn.Conv2d(1, 3, 3, padding=1), nn.Tanh(), nn.MaxPool2d(2), nn.Conv2d(3, 2, 3, padding=1), nn.Flatten(),
        nn.Linear(2 * 6 * 3, 3),
    )  # fmt: skip
    trains_alike("spatial", whole, samples(6, 1, 12, 6), samples(6, 3), data=data, tensor=tensor, clip=clip)


def test_a_dropout_draws_for_each_row_alone_and_one_of_channels_ends_the_chain():
    model = sequence(nn.Conv2d(1, 2, 3, padding=1), nn.Dropout(0.5), nn.Conv2d(2, 2, 3, padding=1), nn.Dropout2d(0.5))
    assert rehearsed(model, "spatial", 2, samples(1, 1, 8, 8)).parts == ["1"]


@pytest.mark.parametrize(
    ("modules", "says"),
    [
        ([nn.Conv2d(1, 2, 3), nn.GroupNorm(1, 2), nn.Conv2d(2, 2, 3)], "1 is a GroupNorm.* 2 is a convolution"),
        ([nn.Conv2d(1, 2, 3), nn.Dropout2d(0.5), nn.Conv2d(2, 2, 3)], "1 is a Dropout2d"),
        ([nn.Conv2d(1, 2, 3, padding=1, padding_mode="circular")], "padding_mode='circular'"),
        ([nn.Conv2d(1, 2, 3, padding=3)], "pads 3 rows and sees 3"),
        ([nn.MaxPool2d(2, ceil_mode=True), nn.Conv2d(1, 2, 3)], "ceil_mode"),
        ([nn.AvgPool2d(2, padding=1), nn.Conv2d(1, 2, 3)], "average over padding"),
        ([nn.Conv2d(1, 2, 3), nn.MaxPool2d(7)], "of 15 rows 1 are left"),
        ([nn.Tanh()], "no Conv2d"),
    ],
)
def test_what_cannot_be_tiled_is_refused_with_the_module_and_the_reason(modules, says):
    with pytest.raises(BadInput, match=says):
        rehearsed(sequence(*modules), "spatial", 2, samples(1, 1, 15, 15))


def test_samples_that_are_no_images_are_refused():
    with pytest.raises(BadInput, match="samples are images"):
        rehearsed(sequence(nn.Conv2d(1, 2, 3, padding=1)), "spatial", 2, samples(1, 8, 8))


def test_an_image_of_another_height_is_refused():
    model = sequence(nn.Conv2d(1, 2, 3, padding=1), nn.Conv2d(2, 2, 3, padding=1))
    how = rehearsed(model, "spatial", 2, samples(1, 1, 8, 8))

    def run(comm):
        mine = copy.deepcopy(model)
        how.cut(mine, comm)
        mine(samples(1, 1, 10, 8))

    with pytest.raises(WorkerFailed, match="an image of 10 rows, and the model is cut for 8"):
        SimulatedWorld(2).run(run)


def test_padding_is_told_in_numbers():
    assert window_of(nn.Conv2d(1, 2, 5, padding="same", dilation=2)) == Window(9, 1, 4)
    assert window_of(nn.Conv2d(1, 2, 5, padding="valid", stride=2)) == Window(5, 2, 0)
    with pytest.raises(ValueError, match="more on one side"):
        window_of(nn.Conv2d(1, 2, 2, padding="same"))


def test_a_tile_thinner_than_its_neighbours_halo_is_refused():
    with pytest.raises(ValueError, match="a tile of 5 of 15 rows, of which a neighbour needs 6"):
        tiles(15, [Window(12, 1, 5)], 3)
