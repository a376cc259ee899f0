"""Robust aggregation: each rule is its naive numpy form, bears what it says, and protects a real training."""

import dataclasses
import itertools
import logging
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from manyhands.communication.topology import Mesh
from manyhands.consistency.robust import aggregations
from manyhands.consistency.robust.aggregation import aggregation_from
from manyhands.consistency.robust.krum import Krum, MultiKrum, scores, squared_distances
from manyhands.consistency.robust.median import Median
from manyhands.consistency.robust.ordering import FEW, ordered
from manyhands.consistency.robust.trimmed_mean import TrimmedMean
from manyhands.consistency.synchronous import Synchronous
from manyhands.contract import Batch, Setting
from manyhands.data import load
from manyhands.errors import BadInput, NonFiniteLoss, UnknownName
from manyhands.models.losses import CrossEntropy
from manyhands.partition.data import DataReplica
from manyhands.plan import Plan, strategy_from
from manyhands.testing import check_strategy, run_ranks
from tests.consistency import jobs
from tests.consistency.jobs import problem
from tests.matrices import halved

#: Rounding of a mean of at most nine numbers up to 10 in float64.
CLOSE = 1e-12
#: Examples for each of a dozen rules.
FEW_EACH = settings(max_examples=30)

# -- deliberately naive versions, by numpy -----------------------------------------------------------------------------


def naive_scores(x: np.ndarray, f: int) -> list[float]:
    n = len(x)
    found = []
    for p in range(n):
        distances = sorted(float(((x[p] - x[q]) ** 2).sum()) for q in range(n) if q != p)
        found.append(sum(distances[: n - f - 2]))
    return found


def naive(text: str, x: np.ndarray) -> np.ndarray:
    rule, n = aggregation_from(text), len(x)
    if rule.name == "mean":
        return x.mean(0)
    if rule.name == "median":
        return np.median(x, axis=0)
    if rule.name == "trimmed_mean":
        return np.array([np.mean(sorted(column)[rule.f : n - rule.f]) for column in x.T])
    order = sorted(range(n), key=lambda p: (naive_scores(x, rule.f)[p], p))
    m = 1 if rule.name == "krum" else rule.m or n - rule.f
    return x[order[:m]].mean(0)


RULES = (
    *("mean", "median", "trimmed_mean(f=0)", "trimmed_mean", "trimmed_mean(f=2)"),
    *("krum(f=0)", "krum", "krum(f=2)", "multi_krum(f=0)", "multi_krum", "multi_krum(f=1, m=2)", "multi_krum(f=2)"),
)


def one(text: str, x: np.ndarray) -> np.ndarray:
    (combined,) = aggregation_from(text).combine([torch.from_numpy(x)])
    return combined.numpy()


@st.composite
def matrices(draw: st.DrawFn, least: int = 1) -> np.ndarray:
    """Normal numbers, so that Krum's scores hardly ever come near each other."""
    n, numel = draw(st.integers(least, 9)), draw(st.integers(1, 7))
    return np.random.default_rng(draw(st.integers(0, 2**32))).standard_normal((n, numel))


@pytest.mark.parametrize("text", RULES)
@FEW_EACH
@given(st.data())
def test_a_rule_is_its_naive_form(text: str, data: st.DataObject):
    x = data.draw(matrices(aggregation_from(text).fewest))
    assert np.abs(one(text, x) - naive(text, x)).max() <= CLOSE


@pytest.mark.parametrize("text", RULES)
@FEW_EACH
@given(st.data())
def test_the_order_of_the_workers_does_not_matter(text: str, data: st.DataObject):
    x = data.draw(matrices(max(4, aggregation_from(text).fewest)))  # of three, the nearest two tie: see below
    rule = aggregation_from(text)
    if rule.name in ("krum", "multi_krum"):
        ordered = sorted(naive_scores(x, rule.f))
        if min(b - a for a, b in itertools.pairwise(ordered)) < 1e-9:  # a tie goes to the lower rank
            return
    mixed = x[data.draw(st.permutations(range(len(x))))]
    assert np.abs(one(text, mixed) - one(text, x)).max() <= CLOSE
    if text != "mean":  # which adds in rank order
        assert np.array_equal(one(text, mixed), one(text, x))


@pytest.mark.parametrize("text", RULES)
@FEW_EACH
@given(st.data())
def test_parts_are_one_vector(text: str, data: st.DataObject):
    x = data.draw(matrices(aggregation_from(text).fewest))
    cut = data.draw(st.integers(0, x.shape[1]))
    parts = aggregation_from(text).combine([torch.from_numpy(x[:, :cut].copy()), torch.from_numpy(x[:, cut:].copy())])
    assert np.abs(torch.cat(parts).numpy() - one(text, x)).max() <= CLOSE


ARBITRARY = st.one_of(st.floats(-10, 10), st.sampled_from([0.0, 1e9, -1e30, 1e155, -1.7e308]))


@pytest.mark.parametrize("text", [t for t in RULES if aggregation_from(t).bears(9)])
@FEW_EACH
@given(st.data())
def test_arbitrary_vectors_within_what_a_rule_bears_cannot_carry_it_away(text: str, data: st.DataObject):
    x = data.draw(matrices(max(3, aggregation_from(text).fewest)))
    rule, n = aggregation_from(text), len(x)
    f = rule.bears(n)
    honest = x[f:].copy()
    x[:f] = np.array(data.draw(st.lists(ARBITRARY, min_size=f * x.shape[1], max_size=f * x.shape[1]))).reshape(f, -1)
    if data.draw(st.booleans()):
        x[:f] = x[0]  # they conspire
    with np.errstate(over="ignore"):
        result = one(text, x[data.draw(st.permutations(range(n)))])
    if rule.name in ("median", "trimmed_mean"):
        assert (result >= honest.min(0) - CLOSE).all()
        assert (result <= honest.max(0) + CLOSE).all()
    else:
        # A chosen vector's score is at most an honest one's, (n−f−2)·D², and counts some honest vector: within
        # √(n−f−2)·D of that one, which is within D of every other; so is a mean of such.
        diameter = max(float(np.linalg.norm(a - b)) for a in honest for b in honest)
        assert np.linalg.norm(result - honest[0]) <= (math.sqrt(n - f - 2) + 1) * diameter + CLOSE


@pytest.mark.parametrize("n", [1, 2, 5, 8, FEW, FEW + 1])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_coordinates_are_put_in_order_each_for_itself(n, dtype):
    x = torch.randn(n, 40, generator=torch.Generator().manual_seed(n)).to(dtype)
    assert torch.equal(torch.stack(ordered(x)), x.sort(dim=0).values)


@given(matrices(3), st.floats(-1e6, 1e6))
def test_one_arbitrary_vector_carries_the_mean_anywhere(x: np.ndarray, target: float):
    x[0] = len(x) * target - x[1:].sum(0)
    assert np.abs(one("mean", x) - target).max() <= 1e-8  # nine numbers up to 1e7 round at 1e-9 each


@given(matrices(3))
def test_without_arbitrary_vectors_to_expect_the_rules_are_means(x: np.ndarray):
    assert np.abs(one("trimmed_mean(f=0)", x) - x.mean(0)).max() <= CLOSE
    assert np.abs(one(f"multi_krum(f=0, m={len(x)})", x) - x.mean(0)).max() <= CLOSE
    assert np.abs(one("multi_krum(f=0)", x) - x.mean(0)).max() <= CLOSE
    assert np.array_equal(one("multi_krum(f=0, m=1)", x), one("krum(f=0)", x))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("text", ["median", "krum", "krum(f=2)"])
@pytest.mark.parametrize("n", [7, 8])
def test_of_identical_vectors_the_result_is_that_vector_bit_for_bit(text, n, dtype):
    vector = torch.randn(50, generator=torch.Generator().manual_seed(3)).to(dtype)
    (result,) = aggregation_from(text).combine([vector.repeat(n, 1)])
    assert result.dtype == dtype
    assert torch.equal(result, vector)


def test_of_equal_scores_the_lower_ranks_win():
    pairs = torch.tensor([[0.0], [1.0], [10.0], [11.0], [100.0]])
    assert scores(squared_distances([pairs]), 2).tolist() == [1.0, 1.0, 1.0, 1.0, 89.0**2]
    assert Krum(f=2).combine([pairs])[0].item() == 0.0
    assert MultiKrum(f=2, m=3).combine([pairs])[0].item() == pytest.approx(11 / 3)
    three = torch.tensor([[5.0], [2.0], [1.0]])
    assert Krum(f=0).combine([three])[0].item() == 2.0  # 2 and 1 are each other's nearest


def test_beside_one_huge_vector_the_others_are_told_apart():
    x = torch.tensor([[1e30], [1.0], [1.1], [1.2], [5.0]])
    assert Krum(f=1).combine([x])[0].item() == pytest.approx(1.1)


@pytest.mark.parametrize(
    ("text", "fewest", "bears"),
    [
        ("mean", 1, 0),
        ("median", 1, 4),
        ("trimmed_mean(f=2)", 5, 2),
        ("krum(f=2)", 7, 2),
        ("multi_krum(f=1, m=7)", 8, 1),
    ],
)
def test_a_rule_says_what_it_needs_and_bears(text, fewest, bears):
    assert (aggregation_from(text).fewest, aggregation_from(text).bears(9)) == (fewest, bears)
    assert [Median().bears(n) for n in range(6)] == [0, 0, 0, 1, 1, 2]


@pytest.mark.parametrize("text", [t for t in RULES if aggregation_from(t).bears(9)])
def test_with_known_faults_left_out_a_rule_stays_possible_and_bears_the_rest(text):
    rule = aggregation_from(text)
    for n, failed in itertools.product(range(rule.fewest, 12), range(3)):
        if failed <= rule.bears(n):
            rest = rule.without(failed)
            assert rest.fewest <= n - failed
            assert rest.bears(n - failed) >= rule.bears(n) - failed


# -- description -------------------------------------------------------------------------------------------------------


def test_every_rule_reads_back_from_what_it_prints():
    for name in aggregations:
        rule = aggregation_from(name)
        assert str(rule) == name
        assert rule.paper.year
        assert aggregation_from(rule) is rule
    for text in ("trimmed_mean(f=3)", "krum(f=0)", "multi_krum(f=2, m=4)", "multi_krum(m=3)"):
        assert str(aggregation_from(text)) == text
        assert aggregation_from(text) == aggregation_from(str(aggregation_from(text)))


@pytest.mark.parametrize(
    "said",
    ["aggregate=krum(f=2)", "aggregate='krum(f=2)'", "aggregate='krum( 2 )'", "'auto', krum(2)"],
)
def test_a_rule_is_nested_or_text_and_prints_one_way(said):
    strategy = strategy_from(f"synchronous({said})")
    assert strategy == Synchronous(aggregate="krum(f=2)") == Synchronous(aggregate=Krum(2))
    assert str(strategy) == "synchronous(aggregate='krum(f=2)')"
    assert strategy_from(str(strategy)) == strategy
    assert Plan(strategy=strategy).as_table()["strategy"] == str(strategy)


def test_the_default_is_the_mean_and_is_not_written():
    assert str(Synchronous(aggregate="mean")) == "synchronous"
    assert Synchronous(aggregate="mean()") == Synchronous()


@pytest.mark.parametrize(
    ("said", "answer"),
    [
        ("krumm", "Did you mean 'krum'"),
        ("krum(g=1)", "Did you mean 'f'|option of aggregation krum"),
        ("krum(f=-1)", "whole number from 0"),
        ("trimmed_mean(f=0.1)", "whole number from 0"),
        ("trimmed_mean(f=True)", "whole number from 0"),
        ("multi_krum(m=0)", "whole number from 1"),
        ("krum(", "cannot be read"),
        (7, "is a int"),
        ("torch.nn:Linear", "subclass of manyhands' Aggregation"),
    ],
)
def test_a_rule_that_cannot_be_is_refused_in_words(said, answer):
    with pytest.raises((BadInput, UnknownName), match=answer):
        Synchronous(aggregate=said)


def setting(workers: int) -> Setting:
    return Setting(workers, "shared", shares_memory=True, elementwise=True, stateless=True)


@pytest.mark.parametrize(
    ("said", "enough"),
    [("median", 1), ("trimmed_mean", 3), ("krum", 5), ("krum(f=2)", 7), ("multi_krum(m=8)", 9)],
)
def test_too_few_workers_are_refused_when_the_plan_is_made(said, enough):
    strategy = Synchronous(aggregate=said)
    assert strategy.problems(setting(enough)) == []
    for workers in range(1, enough):
        (found,) = strategy.problems(setting(workers))
        assert said in found.asked
        assert found.rule.endswith(f"so {enough} here.")
        assert f"workers={enough}" in found.cure


def test_a_sharded_update_under_a_rule_is_refused_and_auto_is_replicated():
    (found,) = Synchronous(update="sharded", aggregate="median").problems(setting(3))
    assert "lie" in found.rule
    assert Synchronous(aggregate="median").resolve(setting(3)).update == "replicated"
    assert Synchronous(aggregate="median").parameters == "own"
    assert Synchronous().resolve(setting(3)).update == "sharded"


def test_a_rule_compares_whole_vectors_so_no_mesh_may_cut_them():
    with pytest.raises(Exception, match="compares workers' whole vectors"):
        run_ranks(start_cut, 4, on="simulated")


def start_cut(comm):
    comm.mesh = Mesh(data=2, tensor=2)
    model, opt = jobs.build(problem())
    replica = DataReplica(model, opt, CrossEntropy(), comm, common=False)
    replica.pieces[0].replicated_over = frozenset({"data"})
    Synchronous(aggregate="median").start(replica, comm)


# -- on ranks ----------------------------------------------------------------------------------------------------------

TRANSPORTS = ("simulated", "shared")
ON = (*TRANSPORTS, "threads", "gloo", "mpi")
OF_THREE = ("median", "trimmed_mean(f=1)", "krum(f=0)", "multi_krum(f=0, m=2)")
OF_FIVE = ("median", "trimmed_mean(f=2)", "krum(f=1)", "multi_krum(f=1)")


def text_of(rule: str) -> str:
    return f"synchronous(aggregate={rule})"


def by_hand(spec: dict, size: int, rule: str) -> list[torch.Tensor]:
    """One model: each step's gradients share by share, joined by numpy, given to torch's optimizer."""
    model, opt = jobs.build(spec)
    loss_function = jobs.LOSSES[spec["loss"]]
    sums, after = spec["loss"].startswith("sum"), []
    for x, target in jobs.batches(spec):
        rows, idle = [], 0
        for lo, hi in jobs.cut(len(target), size, spec["shares"]):
            if lo == hi:
                idle += sums
                continue
            opt.zero_grad(set_to_none=False)
            result = loss_function(model(x[lo:hi]), target[lo:hi])
            if not isinstance(result, torch.Tensor):
                if result[1] == 0:
                    continue
                result = result[0] * size if sums else result[0] / result[1]
            result.backward()
            rows.append(jobs.vector(p.grad for p in model.parameters()).numpy())
        if len(rows) >= aggregation_from(rule).fewest:
            joined = torch.from_numpy(naive(rule, np.stack(rows))) * len(rows) / (len(rows) + idle)
            opt.zero_grad(set_to_none=False)
            torch.nn.utils.vector_to_parameters(joined, [p.grad for p in model.parameters()])
            for p in model.parameters():
                p.grad.add_(p.detach(), alpha=getattr(loss_function, "l2", 0.0))
            if spec["clip"] is not None:
                torch.nn.utils.clip_grad_norm_(model.parameters(), spec["clip"])
            opt.step()
        after.append(jobs.vector(model.parameters()))
    return after


SPECS = {
    "momentum": problem(optimizer="momentum"),
    "adam": problem(optimizer="adam"),
    "clip": problem(optimizer="momentum", clip=0.05),
    "uneven": problem(shares="uneven"),
    "few samples": problem(optimizer="momentum", batches=(8, 2, 1, 8)),
    "tokens": problem(loss="tokens", shares="uneven"),
    "sum and l2": problem("regression", "small_sgd", "sum_l2"),
    "sum and l2, few samples": problem("regression", "small_sgd", "sum_l2", batches=(8, 2, 1, 8)),
}


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
@pytest.mark.parametrize("rule", OF_THREE)
def test_three_workers_are_the_naive_loop(rule, spec):
    assert_by_hand(rule, spec, 3, "simulated")


@pytest.mark.parametrize("rule", OF_FIVE)
@pytest.mark.parametrize("spec", [SPECS["uneven"], SPECS["few samples"]], ids=["uneven", "few samples"])
def test_five_workers_are_the_naive_loop(rule, spec):
    assert_by_hand(rule, spec, 5, "shared")


@pytest.mark.parametrize(
    ("rule", "on"),
    [
        pytest.param(rule, on, marks=[pytest.mark.slow] if on not in TRANSPORTS and rule != "median" else [])
        for rule in OF_THREE
        for on in ON
    ],
)
def test_on_every_transport_bytes_are_as_declared_and_replicas_identical(rule, on):
    for spec in (SPECS["few samples"], problem("tied", "nesterov")):  # the latter in two pieces
        results = run_ranks(jobs.train, 3, on=on, args=(text_of(rule), spec))
        assert_identical_as_declared(results)
        assert results[0]["sent_B"][0] == 2 * 8 * len(results[0]["final"])  # (P−1)·n, also where nothing is applied


def assert_identical_as_declared(results: list[dict]) -> None:
    for r in results:
        assert all(torch.equal(a, b) for a, b in zip(r["parameters"], results[0]["parameters"], strict=True))
        declared = [[sum(part) for part in zip(*step, strict=True)] for step in zip(*r["traffic"], strict=True)]
        assert declared == [list(counted) for counted in zip(r["sent_B"], r["messages"], strict=True)]


def assert_by_hand(rule: str, spec: dict, size: int, on: str) -> None:
    results = run_ranks(jobs.train, size, on=on, args=(text_of(rule), spec))
    assert_identical_as_declared(results)
    with jobs.one_thread():
        expected = by_hand(spec, size, rule)
    for mine, theirs in zip(results[0]["parameters"][1:], expected, strict=True):
        assert (mine - theirs).abs().max() <= CLOSE


@pytest.mark.parametrize("text", ["median", "trimmed_mean(f=0)"])
@pytest.mark.parametrize("optimizer", ["nesterov", "adamw"])
def test_a_rule_of_one_vector_is_plain_torch_bit_for_bit(text, optimizer):
    spec = problem(optimizer=optimizer, dtype="float32")
    (mine,) = run_ranks(jobs.train, 1, on="single", args=(text_of(text), spec))
    with jobs.one_thread():
        theirs = jobs.plain(spec)
    for a, b in zip(mine["parameters"][1:], theirs["parameters"], strict=True):
        assert torch.equal(a, b)


def test_the_public_harness_accepts_a_rule():
    check_strategy(text_of("median"), workers=3, on="simulated")


# -- what is not finite ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rule", "what", "on"),
    [
        *halved(OF_FIVE, ("loss", "gradient"), ["shared"]),
        *(("median", what, on) for what in ("loss", "gradient") for on in ("simulated", "gloo")),
        *(
            pytest.param(rule, what, on, marks=pytest.mark.slow)
            for rule in OF_FIVE[1:]
            for what in ("loss", "gradient")
            for on in ("simulated", "gloo")
        ),
    ],
)
def test_a_worker_without_finite_loss_or_gradient_is_left_out_and_the_rest_goes_on_as_if_it_were_not_there(
    rule, what, on
):
    results = run_ranks(with_faults, 5, on=on, args=(text_of(rule), [3], what))
    assert all(torch.equal(r["parameters"], results[0]["parameters"]) for r in results)
    rest = aggregation_from(rule).without(1)
    alone = run_ranks(with_faults, 4, on="simulated", args=(text_of(str(rest)), [], what))
    assert (results[0]["parameters"] - alone[0]["parameters"]).abs().max() <= CLOSE
    assert results[3]["losses"] == [0.0] * 3
    assert results[3]["counted"] == [0.0] * 3
    assert all(math.isfinite(x) for r in results for x in r["losses"])


@pytest.mark.parametrize("what", ["loss", "gradient"])
@pytest.mark.parametrize(("rule", "faulty"), [("median", [0, 2, 4]), ("krum(f=1)", [1, 2]), ("trimmed_mean(f=0)", [4])])
def test_more_of_them_than_the_rule_bears_stop_all_at_that_step_with_the_parameters_untouched(rule, faulty, what):
    for result in run_ranks(with_faults, 5, on="shared", args=(text_of(rule), faulty, what)):
        assert result["raised"] == 0
        assert torch.equal(result["parameters"], result["start"])


def with_faults(comm, text, faulty, what):
    """Three steps of four samples a worker; those of the good ones are the same whether there are others or not."""
    comm.mesh = Mesh(data=comm.size)
    model, opt = jobs.build(problem(optimizer="momentum"))
    replica = DataReplica(model, opt, CrossEntropy(), comm, common=False)
    start = jobs.vector(model.parameters())
    with comm.counting("control"):
        worker = strategy_from(text).start(replica, comm)
    if comm.rank in faulty:
        spoil(replica, lambda piece: piece.grad[3:5].fill_(math.inf if comm.rank % 2 else math.nan), what)
    who = comm.rank - sum(p < comm.rank for p in faulty)  # its number among the good ones
    losses, counted, raised = [], [], None
    for step in range(3):
        comm.step = step
        generator = torch.Generator().manual_seed(10 * step + who)
        x = torch.randn(4, jobs.INPUTS, generator=generator, dtype=torch.float64)
        try:
            loss = worker.step(Batch(x, torch.randint(0, jobs.CLASSES, (4,), generator=generator), 4))
        except NonFiniteLoss as e:
            raised = e.step
            break
        losses.append(float(loss))
        counted.append(replica.count)
    comm.barrier()
    parameters = jobs.vector(model.parameters())
    return {"parameters": parameters, "start": start, "losses": losses, "counted": counted, "raised": raised}


def spoil(replica, change, what="gradient"):
    """Every gradient is changed before the strategy sees it; or only the loss becomes NaN."""
    gradients = replica.gradients

    def spoilt(batch, ready=None):
        loss, count = gradients(batch)
        if what == "loss":
            return loss * math.nan, count
        for i, piece in enumerate(replica.pieces):
            change(piece)
            if ready is not None:
                ready(i, 0, piece.grad.numel(), loss, count)
        return loss, count

    replica.gradients = spoilt


def test_who_is_left_out_and_which_steps_are_is_said_once(caplog):
    with caplog.at_level(logging.WARNING, logger="manyhands"):
        run_ranks(with_faults, 5, on="threads", args=(text_of("krum"), [3], "loss"))
        run_ranks(jobs.train, 3, on="threads", args=(text_of("trimmed_mean"), SPECS["few samples"]))
    said = [r.getMessage() for r in caplog.records if "robust" in r.name]
    assert said == [
        "step 0: worker 3 has no finite loss and gradient and is left out of krum (said once)",
        "step 1: only 2 workers have samples; trimmed_mean needs 3 (said once)",
    ]


# -- a training that one worker tries to ruin --------------------------------------------------------------------------


@pytest.mark.parametrize("on", ["shared", *(pytest.param(on, marks=pytest.mark.slow) for on in ("simulated", "gloo"))])
def test_one_worker_that_sends_garbage_ruins_the_mean_and_no_robust_rule(on):
    ruined = run_ranks(digits, 5, on=on, args=("synchronous(update='replicated')", 2))
    assert ruined[0]["accuracy"] < 0.5
    for rule in ("median", "trimmed_mean(f=1)", "krum(f=1)", "multi_krum(f=1)"):
        results = run_ranks(digits, 5, on=on, args=(text_of(rule), 2))
        assert results[0]["accuracy"] > 0.8, rule
        assert all(torch.equal(r["parameters"], results[0]["parameters"]) for r in results)


def digits(comm, text, liar, dawdle=None):
    """Logistic regression for three epochs; rank ``liar`` sends −1000 times its gradient. ``dawdle``: a seed."""
    comm.mesh = Mesh(data=comm.size)
    splits = load("digits")
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))
    torch.nn.init.zeros_(model[1].weight)
    torch.nn.init.zeros_(model[1].bias)
    replica = DataReplica(model, torch.optim.SGD(model.parameters(), lr=0.5), CrossEntropy(), comm, common=False)
    with comm.counting("control"):
        worker = strategy_from(text).start(replica, comm)
    if comm.rank == liar:
        spoil(replica, lambda piece: piece.grad.mul_(-1000))
    if dawdle is not None:
        jobs.slow_down(replica, dawdle, comm.rank)
    order = torch.cat([torch.randperm(1437, generator=torch.Generator().manual_seed(e)) for e in range(3)])
    for step, indices in enumerate(order.split(100)[:-1]):
        comm.step = step
        lo, hi = jobs.cut(len(indices), comm.size, "even")[comm.rank]
        worker.step(Batch(*splits.train.rows(indices[lo:hi]), hi - lo))
    worker.meet()
    worker.finish()
    inputs, target = splits.test.rows(torch.arange(len(splits.test)))
    with torch.no_grad():
        right = (model(inputs).argmax(1) == target).double().mean()
    return {"accuracy": float(right), "parameters": jobs.vector(model.parameters())}


def test_rules_are_values():
    assert hash(TrimmedMean(2)) == hash(TrimmedMean(2))
    with pytest.raises(dataclasses.FrozenInstanceError):
        Krum().f = 2
