"""``compress=auto``: what pays is taken, what does not is left out, and the note says by how much."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import manyhands as mh
from manyhands.communication.communicator import Communicator
from manyhands.communication.compression.compressor import compressor_from
from manyhands.communication.compression.layout import Layout
from manyhands.communication.transports.events import Operation
from manyhands.errors import BadInput
from manyhands.modelling import compression
from manyhands.modelling.compression import CANDIDATES, choose, from_probe, kept, spiky
from manyhands.plan import strategy_from
from manyhands.simulation.coding import SAMPLE, exchange_s, part_of
from manyhands.testing import run_ranks

SHAPES = [(256, 784), (256,), (10, 256)]
N = sum(torch.Size(shape).numel() for shape in SHAPES)


def link(Bps: float):
    return lambda operation: 1e-5 + operation.payload_B / Bps


def test_on_common_memory_none_is_taken_and_how_much_would_be_lost_is_said():
    choice = choose(SHAPES, 2, link(50e9), "on shared")
    assert choice.compress == "none"
    assert choice.note.startswith("compress=auto takes none: on shared an exchange takes ")
    ratio = choice.options[0].seconds / choice.dense.seconds
    assert ratio > 1
    assert f"{ratio:.2g} times as long" in choice.note
    assert choice.options[0].compress in choice.note


def test_on_a_slow_link_the_quickest_is_taken_with_its_bytes_and_its_route():
    choice = choose(SHAPES, 2, link(1e5), "on a modem")
    cost = compressor_from(choice.compress).cost(Layout(SHAPES), 2)
    assert choice.compress != "none"
    assert choice.options[0].compress == choice.compress
    assert [o.seconds for o in choice.options] == sorted(o.seconds for o in choice.options)
    assert f"{cost.sent_B:,} bytes instead of {4 * N:,} (payloads: {cost.route})" in choice.note


def test_the_link_is_priced_by_the_operations_of_an_exchange():
    asked = []
    choose(
        [(64, 64)], 4, lambda x: asked.append((x.name, x.payload_B)) or 1.0, "here", ["top_k", "one_bit", "powersgd"]
    )
    assert asked[0] == ("all_reduce", 4 * 64 * 64)
    rounds = [
        r
        for text in ("top_k", "one_bit", "powersgd")
        for r in compressor_from(text).rounds(
            Layout(((64, 64),)), 4, compressor_from(text).payload_B(Layout(((64, 64),)))
        )
    ]
    assert asked[1:] == rounds
    assert {name for name, _ in rounds} == {"all_gather", "all_to_all", "all_reduce"}


def test_what_is_alone_or_cannot_compress_takes_none():
    assert "alone sends nothing" in choose(SHAPES, 1, link(1e3), "").note
    assert "no scheme goes with this plan" in choose(SHAPES, 2, link(1e3), "", among=()).note


@pytest.mark.parametrize("text", CANDIDATES)
@pytest.mark.parametrize("size", [2, 3])
def test_coding_is_measured_of_every_candidate(text, size):
    assert 0 < exchange_s(compressor_from(text), Layout(((50, 40), (50,))), size, 0.0) < 10


@given(st.lists(st.lists(st.integers(0, 2000), max_size=3).map(tuple), min_size=1, max_size=5))
def test_a_part_of_a_model_is_no_larger_than_asked_nor_than_the_model(shapes):
    part, whole = part_of(Layout(shapes)), Layout(shapes)
    assert part.numel <= min(SAMPLE, whole.numel)
    assert (part.numel == 0) == (whole.numel == 0)
    assert whole.numel > SAMPLE or part.numel == whole.numel


def probing(comm: Communicator) -> dict:
    return compression.measured(comm, 100_000)


def test_a_probe_goes_through_sizes_and_all_agree_on_it():
    first, second = run_ranks(probing, 2, on="threads")
    assert first == second
    for points in first.values():
        sizes = [n for n, _ in points]
        assert sizes == sorted(set(sizes))
        assert sizes[-1] >= 100_000 or max(p[-1][1] for p in first.values()) >= compression.LONG_S
        assert all(s > 0 for _, s in points)
    price = from_probe({"all_reduce": [[1000.0, 1.0], [2000.0, 2.0]]})
    assert price(Operation("all_reduce", 1000, 2, (0, 1))) == 1.0
    assert price(Operation("all_reduce", 4000, 2, (0, 1))) == pytest.approx(4.0)


# -- where payloads go one by one, and beside Adam ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "pushed", "pulled"), [("gossip(graph='ring')", 2, 0), ("asynchronous(servers=2)", 1, 1), ("ssp", 1, None)]
)
def test_parcels_are_priced_by_what_the_strategy_sends(text, pushed, pulled):
    asked = []
    price = lambda x: asked.append(x) or x.payload_B / 1e9  # noqa: E731
    choice = choose(SHAPES, 4, price, "here", ["bfloat16"], strategy=strategy_from(text))
    assert {x.name for x in asked} == ({"send"} if pulled == 0 else {"push", "pull"})
    (option,) = choice.options
    if pulled is None:  # how often it pulls is decided by who is late
        assert option.link_s < choice.dense.link_s
    else:  # neighbours tell each other a word besides
        assert choice.dense.link_s == pytest.approx((pushed + pulled) * 4 * N / 1e9, rel=1e-4)
        assert option.link_s == pytest.approx((pushed / 2 + pulled) * 4 * N / 1e9, rel=1e-4)
        assert option.sent_B == pytest.approx((pushed / 2 + pulled) * 4 * N, rel=1e-4)
    assert option.coding_s > 0


def test_a_dense_pull_leaves_less_to_save_than_a_mean():
    slow = link(1e5)
    mean = choose(SHAPES, 4, slow, "far", ["top_k"])
    served = choose(SHAPES, 4, slow, "far", ["top_k"], strategy=strategy_from("asynchronous(servers=1)"))
    assert mean.options[0].seconds < 0.1 * mean.dense.seconds
    assert 0.5 < served.options[0].seconds / served.dense.seconds < 0.6
    assert served.note.endswith("(payloads: server)")


def test_beside_adam_no_scheme_is_taken_that_leaves_most_for_later():
    assert {text for text in CANDIDATES if spiky(compressor_from(text), N)} == {"one_bit", "top_k", "powersgd"}
    choice = choose(SHAPES, 2, link(1e5), "on a modem", adaptive="AdamW")
    assert {option.compress for option in choice.options} == {"bfloat16", "int8", "qsgd"}
    assert "Not beside AdamW: one_bit, top_k, powersgd;" in choice.note
    assert "Not beside" not in choose(SHAPES, 2, link(1e5), "on a modem").note
    alone = choose(SHAPES, 2, link(1e5), "", ["top_k"], adaptive="Adam")
    assert alone.compress == "none"
    assert "Not beside Adam: top_k;" in alone.note


@pytest.mark.parametrize(
    ("optimizer", "strategy", "named"),
    [
        ("adam(lr=0.001)", "synchronous", "Adam"),
        ("rmsprop(lr=0.001)", "asynchronous", "RMSprop"),
        ("adagrad(lr=0.01)", "synchronous", "Adagrad"),
        ("sgd(lr=0.1, momentum=0.9)", "synchronous", ""),
        ("adam(lr=0.001)", "local", ""),  # parameters move, and Adam has seen whole gradients
        ("adam(lr=0.001)", "downpour(server='sgd(lr=0.1)')", ""),
        ("sgd(lr=0.1)", "downpour(server='adagrad(lr=0.1)')", "Adagrad"),
    ],
)
def test_who_scales_steps_by_what_was_compressed_is_told(optimizer, strategy, named):
    task = mh.Task(model="logistic", data="digits", optimizer=optimizer)
    assert compression.adaptive(task, strategy_from(strategy)) == named


def trying(comm: Communicator) -> list:
    price = compression.tried(comm, 0, [Operation("push", 4096, 2, (0,)), Operation("send", 4096, 2, (0, 1), 0, 1)])
    return [price(Operation(name, 4096, 2, (0, 1), 0, 1)) for name in ("push", "send")]


@pytest.mark.slow
def test_ranks_try_what_a_strategy_sends():
    first, second = run_ranks(trying, 2, on="threads")
    assert first == second
    assert all(0 < s < 1 for s in first)


# -- in plans ----------------------------------------------------------------------------------------------------------

TASK = mh.Task(model="perceptron(hidden=12)", data="digits", steps=4, batch_size=32)


def test_a_run_says_what_it_took_and_a_resume_goes_on_with_it(tmp_path):
    plan = mh.Plan(workers=2, transport="threads", threads=1, compress="auto")
    first = mh.train(TASK, plan, progress=False, evaluate="never", out=tmp_path)
    (note,) = [n for n in first.notes if n.startswith("compress=auto takes ")]
    assert note.startswith(f"compress=auto takes {first.plan.compress}: on threads ")
    assert kept(tmp_path) == first.plan.compress
    longer = mh.Task(model="perceptron(hidden=12)", data="digits", steps=6, batch_size=32)
    again = mh.train(longer, plan, progress=False, evaluate="never", out=tmp_path, resume=True)
    assert again.plan.strategy == first.plan.strategy
    assert f"compress=auto: {first.plan.compress}, with which this run began" in again.notes


def test_a_cluster_is_asked_for_its_links():
    task = mh.Task(model="perceptron(hidden=5000)", data="digits", steps=2, batch_size=160)
    near = mh.simulate(task, mh.Plan(workers=2, compress="auto"), "wan", compute_s=0.01, sizes=True)
    far = mh.simulate(task, mh.Plan(workers=16, compress="auto"), "wan", compute_s=0.01, sizes=True)
    assert "compress" not in near.summary.strategy
    assert "compress" in far.summary.strategy


def test_what_contradicts_auto_is_refused():
    with pytest.raises(BadInput, match="contradict"):
        mh.train(TASK, mh.Plan(workers=2, strategy="synchronous(compress=int8)", compress="auto"), progress=False)


def test_kept_is_nothing_where_there_is_no_run(tmp_path):
    assert kept(tmp_path) is None
    (tmp_path / "plan.toml").write_text("[plan]\nworkers = 2\n")
    assert kept(tmp_path) == "none"
