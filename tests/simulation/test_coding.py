"""Compressed plans without numbers: the same bytes as with them, and payloads take time to make and to read."""

import pytest

import manyhands as mh
from manyhands.communication.communicator import reference_B
from manyhands.communication.compression import compressors
from manyhands.communication.compression.compressor import compressor_from
from manyhands.communication.compression.layout import Layout
from manyhands.communication.compression.rehearsal import codings, takes_sums, typical_B
from manyhands.simulation import coding, sizes
from manyhands.simulation.coding import Coding
from tests.simulation.runs import COMPUTE_S, UPDATE_S, Flat, sized

NUMEL = 64 * 16
LAYOUT = Layout(((20, 12), (20,), (7, 20)))
RELAXED = ("local(every=2, ", "diloco(inner=2, ", "elastic(every=2, ", "gossip(", "asynchronous(", "downpour(", "ssp(")


@pytest.fixture
def given(monkeypatch):
    """A microsecond a value to encode, a quarter of one to decode."""
    monkeypatch.setattr(coding, "measured", lambda compressor: (1e-6, 0.25e-6))


@pytest.mark.parametrize("size", [1, 2, 3, 8])
@pytest.mark.parametrize("name", compressors)
def test_the_rounds_of_an_exchange_send_what_it_costs(name, size):
    compressor = compressor_from(name)
    rounds = compressor.rounds(LAYOUT, size, compressor.payload_B(LAYOUT))
    sent_B = sum(reference_B(operation, n_B, size) for operation, n_B in rounds)
    assert sent_B == compressor.cost(LAYOUT, size).sent_B


@pytest.mark.usefixtures("given")
@pytest.mark.parametrize("name", compressors)
def test_every_compressor_runs_without_numbers_and_sends_as_many_bytes(name):
    what = sized(f"synchronous(compress={name})", 4, steps=3)
    found = sizes.run(what, lambda: Flat(0.001))
    declared = what.strategy.traffic(NUMEL, 4)
    assert found.how == "folded"
    assert 0 < found.clocks.sent_B <= declared.sent_B_in(3)
    if not what.strategy.sends_at_most:
        assert found.clocks.sent_B == declared.sent_B_in(3)


@pytest.mark.usefixtures("given")
@pytest.mark.parametrize("strategy", RELAXED)
@pytest.mark.parametrize("name", ["top_k", "strom", "int8"])
def test_so_do_strategies_that_relax_the_step(strategy, name):
    what = sized(f"{strategy}compress={name})", 4, late=("lognormal",), steps=4)
    found = sizes.run(what, lambda: Flat(0.001))
    declared = what.strategy.traffic(NUMEL, 4)
    assert 0 < found.clocks.sent_B <= declared.sent_B_in(4)
    if not what.strategy.sends_at_most:
        assert found.clocks.sent_B == declared.sent_B_in(4)


@pytest.mark.usefixtures("given")
@pytest.mark.parametrize(
    ("text", "encoded", "decoded"),
    [
        ("synchronous(compress=top_k)", 1, 4 + 1),  # everybody's, and what feedback takes off
        ("synchronous(compress=int8)", 1 + 1 / 4, 2 + 1 + 1 / 4),  # slices, and the mean of one's own
        ("synchronous(compress=bfloat16)", 1, 0),  # a sum is taken over as part of it
        ("asynchronous(servers=1, compress=bfloat16)", 1, 1),
        ("gossip(compress=int8)", 1, 1 + 2),  # one's own, and those of two neighbours
        ("asynchronous(servers=1, compress=top_k)", 1, 1),
    ],
)
def test_a_step_takes_what_computing_and_coding_take(text, encoded, decoded):
    found = sizes.run(sized(text, 4, steps=2), lambda: Flat(0.0))
    update_s = 0.0 if "asynchronous" in text else UPDATE_S  # by whoever pushes, in memory that stands for a server
    coded_s = NUMEL * (1e-6 * encoded + 0.25e-6 * decoded)
    assert found.clocks.ends[-1] == pytest.approx(2 * (COMPUTE_S + update_s + coded_s), rel=1e-9)


def test_who_says_what_coding_takes_is_believed():
    compressor = compressor_from("top_k")
    assert Coding(encode_s=2.0, decode_s=1.0).seconds(compressor, 10, 1, 3) == 50.0
    assert Coding().seconds(compressor, 10, 0, 0) == 0.0


@pytest.mark.parametrize("name", ["top_k", "powersgd"])
def test_else_it_is_measured_once(name):
    first = coding.measured(compressor_from(name))
    assert all(0 < s < 1e-3 for s in first)
    assert coding.measured(compressor_from(name)) is first


def test_of_halves_it_is_told_whether_a_sum_is_taken_over_or_a_payload_read():
    layout = Layout(((64, 64),))
    halves = [compressor_from(name) for name in ("bfloat16", "float16")]
    assert all(takes_sums(half, layout) and codings(half, layout, 8) == (1.0, 0.0) for half in halves)
    others = [compressor_from(name) for name in compressors if name not in ("bfloat16", "float16", "none", "entropy")]
    assert not any(takes_sums(other, layout) for other in others)
    assert all(0 < s < 1e-6 for s in coding.measured(halves[0]))


def test_coding_takes_time_with_numbers_too(monkeypatch):
    def seconds(a_value_s: float) -> float:
        monkeypatch.setattr(coding, "measured", lambda compressor: (a_value_s, a_value_s / 4))
        task = mh.Task(model="logistic", data="digits", optimizer="sgd(lr=0.1)", steps=2, batch_size=32)
        plan = mh.Plan(workers=4, compress="top_k", strategy="local(every=1)")
        return mh.simulate(task, plan, "ethernet_10g", compute_s=0.01, evaluate="never").summary.wall_s

    encoded, decoded = codings(compressor_from("top_k"), Layout(((650,),)), 4)
    assert seconds(2e-6) - seconds(1e-6) == pytest.approx(2 * 650e-6 * (encoded + decoded / 4), rel=1e-6)


def test_a_payload_that_depends_on_values_is_that_of_a_normal_vector_of_which_one_in_a_hundred_passes():
    layout = Layout(((400, 400),))
    assert typical_B(compressor_from("strom(threshold=3.0)"), layout) == pytest.approx(4 * 1600, rel=0.15)
    assert typical_B(compressor_from("top_k"), layout) == 8 * 1600
    coded = typical_B(compressor_from("entropy(of='strom')"), layout)
    assert coded == pytest.approx(9.1 / 8 * 1600, rel=0.2)  # log₂ 100 + 1.44 bits an index, and a sign
