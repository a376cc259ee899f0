"""What has a size only has the sizes that torch would give."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from manyhands.simulation.sized import NoNumbers, Sized, zeros


def sizes(x):
    return tuple(x.shape), x.dtype, x.numel(), x.nbytes, x.dim(), x.element_size()


@given(n=st.integers(0, 20), lo=st.integers(-25, 25), hi=st.integers(-25, 25), step=st.integers(1, 4))
def test_slices_are_as_long(n, lo, hi, step):
    assert sizes(zeros(n, torch.float32)[lo:hi:step]) == sizes(torch.zeros(n)[lo:hi:step])


@given(n=st.integers(1, 6), m=st.integers(1, 6))
def test_views_and_rows_have_the_shape(n, m):
    mine, theirs = zeros(n * m, torch.float32), torch.zeros(n * m)
    assert sizes(mine.view(n, -1)) == sizes(theirs.view(n, -1))
    assert sizes(mine.view(n, m)[n - 1]) == sizes(theirs.view(n, m)[n - 1])
    assert sizes(mine.view(torch.uint8)) == sizes(theirs.view(torch.uint8))
    assert sizes(mine.to(torch.bfloat16)) == sizes(theirs.to(torch.bfloat16))


def test_arithmetic_keeps_the_size_in_place_and_beside():
    x = zeros(7, torch.float32)
    assert x.add_(x, alpha=2) is x
    assert x.addcdiv_(x, x) is x
    for y in (x - x, 2 * x, x.sqrt(), torch.add(x, x), torch.zeros(7).sub(x)):
        assert isinstance(y, Sized)
        assert y is not x
        assert sizes(y) == sizes(x)
    real = torch.ones(7)
    assert real.copy_(x) is real


def test_views_share_memory_and_copies_do_not():
    x = zeros(8, torch.float32)
    key = x.untyped_storage()._cdata
    assert x[2:4].view(1, 2).untyped_storage()._cdata == key
    assert x.clone().untyped_storage()._cdata != key


def test_counters_and_what_is_agreed_on_are_numbers():
    assert zeros(3, torch.int64).tolist() == [0, 0, 0]
    assert zeros(3, torch.float64).tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("ask", [float, bool, lambda x: x.item(), lambda x: x.tolist(), lambda x: x.norm().item()])
def test_a_number_is_not_to_be_had(ask):
    with pytest.raises(NoNumbers):
        ask(zeros(3, torch.float32))
