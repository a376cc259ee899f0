"""An operator's time by specification is a bound with known corners."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from manyhands.cluster import Figure, load
from manyhands.modelling import operations, specification
from manyhands.modelling.operations import Operation
from manyhands.modelling.published import wait_free
from manyhands.modelling.specification import operator_s

GPU = replace(load("dgx1_p100").device, dispatch=None)
CORE = replace(load("laptop").device, dispatch=None)


def convolution(c_in, c_out, size, kernel, *, stride=1, backward=False):
    with torch.device("meta"):
        layer = nn.Sequential(nn.Conv2d(3, c_in, 1), nn.Conv2d(c_in, c_out, kernel, stride, kernel // 2))
        x, target = torch.empty(4, 3, size, size), torch.empty(0)
    name = "convolution_backward" if backward else "convolution"
    step = operations.count(layer, x, target, lambda y, t: y.sum())
    return next(x for x in step if x.name == name and x.module == "1")


def roof(op, device):
    return max(op.flops / device.peak_of("float32"), op.moved_B / device.memory_bandwidth.si)


def test_an_elementwise_operator_is_as_slow_as_memory():
    op = Operation("relu", "forward", "", ((1000, 1000),), ((1000, 1000),), "float32", 10**6, 4 * 10**6, 4 * 10**6)
    assert operator_s(op, GPU) == 8e6 / 732e9


def test_a_convolution_without_a_quicker_algorithm_is_at_its_roof():
    op = convolution(64, 128, 32, 1)
    assert operator_s(op, GPU) == pytest.approx(roof(op, GPU), rel=0.01)  # bias apart
    strided = convolution(64, 128, 32, 3, stride=2)
    assert operator_s(strided, GPU) >= roof(strided, GPU) * 0.99


@pytest.mark.parametrize("backward", [False, True])
def test_winograd_is_taken_where_it_is_quicker_and_saves_at_most_four_times(backward):
    op = convolution(512, 512, 32, 3, backward=backward)
    assert roof(op, GPU) / 4 < operator_s(op, GPU) < roof(op, GPU) / 1.5


def test_narrow_layers_gain_nothing_from_it():
    op = convolution(64, 3, 32, 3)
    assert operator_s(op, CORE) <= roof(op, CORE)


def test_a_gpu_pays_for_tiles_that_stick_out_and_a_core_does_not():
    whole, more = convolution(64, 128, 32, 1), convolution(64, 129, 32, 1)
    fast = replace(GPU, memory_bandwidth=Figure(90, "TB/s", "made up"))
    assert operator_s(more, fast) / operator_s(whole, fast) == pytest.approx(192 / 128, rel=1e-9)
    stream = replace(CORE, memory_bandwidth=Figure(90, "TB/s", "made up"))
    assert operator_s(more, stream) / operator_s(whole, stream) == pytest.approx(129 / 128, rel=1e-9)


def test_a_normalisation_reads_its_operand_twice():
    with torch.device("meta"):
        step = operations.count(nn.BatchNorm2d(64), torch.empty(8, 64, 32, 32), torch.empty(0), lambda y, t: y.sum())
    forward = next(x for x in step if x.phase == "forward" and "batch_norm" in x.name)
    image_B = 4 * 8 * 64 * 32 * 32
    assert operator_s(forward, GPU) == pytest.approx(3 * image_B / 732e9, rel=0.01)


def test_nothing_starts_sooner_than_it_is_dispatched():
    op = Operation("relu", "forward", "", ((10,),), ((10,),), "float32", 10, 40, 40)
    assert operator_s(op, load("dgx1_p100").device) == pytest.approx(5e-6, rel=1e-12)


@given(st.floats(0.05, 1.0), st.floats(0.05, 1.0))
def test_efficiencies_lift_the_roof_they_are_of(compute, memory):
    device = replace(
        GPU, efficiency=Figure(compute, "ratio", "made up"), memory_efficiency=Figure(memory, "ratio", "made up")
    )
    moving = Operation("relu", "forward", "", ((1000, 1000),), ((1000, 1000),), "float32", 0, 4 * 10**6, 4 * 10**6)
    product = Operation("mm", "forward", "", ((64, 64),) * 2, ((64, 64),), "float32", 10**12, 1, 1)
    assert operator_s(moving, device) == pytest.approx(operator_s(moving, GPU) / memory, rel=1e-12)
    assert operator_s(product, device) == pytest.approx(operator_s(product, GPU) / compute, rel=1e-12)


def test_a_step_is_the_sum_of_its_operators():
    step = operations.count(nn.Linear(30, 20), torch.zeros(7, 30), torch.zeros(7, dtype=torch.long), F.cross_entropy)
    assert specification.step_s(step, GPU) == math.fsum(operator_s(x, GPU) for x in step)


# -- wait-free back-propagation ----------------------------------------------------------------------------------------

layers = st.lists(st.tuples(st.floats(0, 10), st.floats(0, 10)), max_size=12)


@given(layers)
def test_overlap_lies_between_the_longer_of_both_and_their_sum(timed):
    compute, travel = (math.fsum(x) for x in zip(*timed, strict=True)) if timed else (0.0, 0.0)
    for took in (wait_free.backward_s(timed), wait_free.forward_s(timed)):
        assert max(compute, travel) <= took * (1 + 1e-12)
        assert took <= (compute + travel) * (1 + 1e-12) + 1e-12


@given(layers)
def test_forward_is_backward_the_other_way_round(timed):
    """Time reversed, parameters that must be there before a layer are gradients that leave after it."""
    assert wait_free.forward_s(timed) == pytest.approx(wait_free.backward_s(timed[::-1]), rel=1e-9, abs=1e-9)


def test_the_last_layers_gradients_are_hidden_and_the_firsts_are_not():
    assert wait_free.backward_s([(1, 1), (1, 0), (1, 0)]) == 3
    assert wait_free.backward_s([(1, 0), (1, 0), (1, 1)]) == 4
    assert wait_free.backward_s([(1, 1, 2), (1, 1, 2)]) == 6  # the second station ends at 4, then takes the next
    assert wait_free.backward_s([(1, 1, 0), (1, 1, 2)]) == 5
    assert wait_free.forward_s([(1, 1), (1, 0)]) == 3
    assert wait_free.forward_s([(1, 0), (1, 1)]) == 2
