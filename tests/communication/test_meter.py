"""What compressing costs and keeps is told as it is defined, and looked at now and then."""

import pytest
import torch

from manyhands.communication.communicator import Communicator
from manyhands.communication.compression.compressor import compressor_from
from manyhands.communication.compression.layout import Layout
from manyhands.communication.compression.meter import EVERY, FIRST, Meter
from manyhands.testing import run_ranks
from tests.communication.compressing import vector

N = 400


def exchanges(comm: Communicator, text: str, steps: int) -> dict:
    """Some exchanges; what the meter says, and what it should say of the one exchange that is looked at."""
    compressor, layout = compressor_from(text), Layout(((20, 20),), torch.float64)
    state, told = compressor.start(layout, comm.rank, comm.size), {}
    for step in range(steps):
        before = state.tensors["residual"].clone() if compressor.feedback else torch.zeros(N, dtype=torch.float64)
        x = vector(N, 10 * step + comm.rank)
        given = before + x
        compressor.aggregate(x, comm, state)
        if step == FIRST and compressor.feedback:
            left = state.tensors["residual"]
            told = {
                "error": float(left.norm() / given.norm()),
                "kept": float((given - left).norm() ** 2 / given.norm() ** 2),
            }
    meter = comm.counters.compression
    return {
        "told": told,
        "error": meter.error,
        "kept": meter.kept,
        "ratio": meter.ratio,
        "coding_s": meter.coding_s,
        "sent_B": meter.sent_B - comm.counters.sent_B(),
        "in_state": "exchanges" in state.state_dict(),
    }


@pytest.mark.parametrize("text", ["top_k(ratio=0.1)", "one_bit", "powersgd(rank=2)"])
def test_error_and_kept_mass_are_those_of_the_exchange_that_was_looked_at(text):
    for found in run_ranks(exchanges, 2, on="simulated", args=(text, FIRST + 3)):
        assert found["error"] == pytest.approx(found["told"]["error"], rel=1e-12)
        assert found["kept"] == pytest.approx(found["told"]["kept"], rel=1e-9)
        assert found["sent_B"] == 0
        assert not found["in_state"]


def test_what_keeps_no_residual_is_looked_at_all_the_same():
    for text, bound in (("bfloat16", 2**-8), ("random_k(ratio=0.5, feedback=False)", 1.5), ("none", 0.0)):
        for found in run_ranks(exchanges, 2, on="simulated", args=(text, FIRST + 1)):
            assert found["error"] is not None
            assert found["error"] <= bound
            assert found["kept"] == pytest.approx(1, abs=1.5 * bound)


def test_a_vote_has_no_error_and_the_first_exchanges_have_none_yet():
    for text, steps in (("sign_sgd", FIRST + 1), ("top_k", FIRST)):
        for found in run_ranks(exchanges, 2, on="simulated", args=(text, steps)):
            assert found["error"] is None
            assert found["kept"] is None


def test_the_ratio_is_dense_bytes_over_sent_ones():
    for found in run_ranks(exchanges, 2, on="simulated", args=("top_k(ratio=0.1)", 2)):
        assert found["ratio"] == (8 * N) / (12 * N // 10)


def test_differences_are_those_of_the_time_between():
    meter = Meter(dense_B=8, sent_B=2, given=4.0, left=1.0, kept_of=3.0)
    before = meter.copy()
    meter.looked(torch.tensor([3.0, 4.0]), torch.tensor([3.0, 0.0]))
    since = meter - before
    assert (since.error, since.kept) == (pytest.approx(0.6), pytest.approx(16 / 25))
    assert since.ratio is None
    assert not since.used
    assert before.given == 4.0


def test_one_exchange_in_so_many_is_looked_at():
    state = compressor_from("top_k").start(Layout(((4,),)), 0, 2)
    looked = [i for i in range(3 * EVERY) if state.is_looked_at()]
    assert looked == [FIRST, FIRST + EVERY, FIRST + 2 * EVERY]
