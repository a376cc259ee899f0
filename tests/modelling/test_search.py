"""Searching plans: the space, refusals, the order and its ties, how many workers are worth it; and one real search."""

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import manyhands as mh
from manyhands.cli import searching
from manyhands.cluster import load
from manyhands.contract import Measurement, Spread, StepParts
from manyhands.errors import BadInput, InvalidPlan, Problem
from manyhands.modelling.prediction import Prediction
from manyhands.modelling.search import costs, engine, ranking, space
from manyhands.modelling.search.ranking import Point, Ranked, Refused
from manyhands.plan import Facts, Plan, resolve

EPOCH = 1000
FACTS = Facts(cores=64, batch_size=100)


def prediction(plan, epoch_s, error):
    said = Measurement(
        strategy=str(plan.strategy),
        model="m",
        data="d",
        workers=plan.workers or 1,
        transport="shared",
        device="cpu",
        parameters=1,
        global_batch=100,
        steps=10,
        epochs=1.0,
        seed=0,
        train_loss=None,
        test_accuracy=None,
        samples_per_s=EPOCH / epoch_s,
        step_s=Spread(epoch_s / 10, epoch_s / 10, epoch_s / 10),
        step_parts_s=StepParts(0.7, 0.1, 0.1, 0.1),
        sent_B_per_step=0.0,
        moved_B_per_step=None,
        peak_memory_B=0,
        wall_s=epoch_s,
    )
    return Prediction(plan, "made", said, error, {"measured": 1.0}, {})


class Fake:
    """Prices by a function of the plan; every plan is asked for once."""

    def __init__(self, epoch_s, *, error=0.05, needs=None, there=100, effort=None, least=None):
        self.epoch_s, self.error, self.needs, self.there = epoch_s, error, needs or (lambda _: 1), there
        self.effort = effort or (lambda _: ("", 0.0))
        self.least_s = least or (lambda plan: 0.0)
        self.asked = []

    def begin(self, plans):
        self.begun = list(plans)

    def price(self, plan):
        self.asked.append(plan)
        found = self.epoch_s(plan)
        if found is None:
            raise BadInput("no price is known")
        return prediction(plan, found, self.error)

    def short(self, plan, margin):
        needed = self.needs(plan)
        over = needed - self.there * (1 - margin)
        return Problem(f"{needed} B", f"there are {self.there}: {over:g} too much.", "Take less.") if over > 0 else None

    def needed_B(self, plan):
        return self.needs(plan)


def decide(plan):
    return resolve(plan, FACTS)


def search(plans, pricer, **more):
    return engine.search(plans, decide, pricer, **more)


def some(*strategies, workers=(1, 2, 4)):
    return [Plan(strategy=s, workers=w, threads=1) for s in strategies for w in workers]


# -- the space ---------------------------------------------------------------------------------------------------------


def test_default_lists_multiply_without_what_cannot_differ():
    plans = list(space.Space(workers=(1, 2), cores=2).plans())
    assert len(plans) == len(set(plans))
    alone = [p for p in plans if p.workers == 1]
    assert {(p.threads, p.micro_batches) for p in alone} == {(t, m) for t in (1, 2) for m in (1, 2, 4)}
    assert {str(p.strategy) for p in alone} == {"synchronous"}
    assert {p.compress for p in alone} == {None}
    both = [p for p in plans if p.workers == 2]
    assert {p.threads for p in both} == {1}
    assert {p.mesh["tensor"] * 10 + p.mesh["pipeline"] for p in both if p.mesh is not None} == {21, 12}
    assert {p.compress for p in both} - {None} == {"bfloat16", "top_k", "powersgd"}
    assert all(str(p.strategy) == "synchronous" for p in both if p.compress or p.mesh or (p.micro_batches or 1) > 1)


@settings(max_examples=20)
@given(
    workers=st.lists(st.integers(1, 64), min_size=1, max_size=4, unique=True),
    threads=st.lists(st.integers(1, 8), min_size=1, max_size=3, unique=True) | st.none(),
    cores=st.integers(1, 64) | st.none(),
)
def test_threads_fit_unless_nothing_does(workers, threads, cores):
    said = space.Space(workers=tuple(workers), cores=cores, threads=None if threads is None else tuple(threads))
    plans = list(said.plans())
    assert {p.workers for p in plans} == set(workers)
    for plan in plans:
        least = 1 if threads is None else min(threads)
        assert cores is None or plan.workers * plan.threads <= cores or plan.threads == least


def test_lists_that_are_said_go_with_everything():
    said = space.check(workers=2, strategies=["local(every=8)"], compressors=["none", "top_k"], micro_batches=[2])
    plans = list(space.Space(**said, cores=2).plans())
    whole = [p for p in plans if p.mesh is None]
    assert {(str(p.strategy), p.compress, p.micro_batches) for p in whole} == {
        ("local(every=8)", None, 2),
        ("local(every=8)", "top_k", 2),
    }
    meshes = space.Space(**space.check(workers=[2, 4, 6], meshes=["pipeline=2", "data=1,tensor=4"]))
    found = [(p.workers, dict(p.mesh.axes)) for p in meshes.plans() if p.strategy.name == "local"]
    assert [w for w, _ in found] == [2, 4, 4, 6]
    assert (6, {"data": 3, "pipeline": 2}) in found


def test_every_problem_of_the_lists_is_told_at_once():
    with pytest.raises(InvalidPlan) as e:
        space.check(workers=[0], threads=[], strategies=["sincronous"], compressors=["zip"], meshes=["tensor"])
    assert len(e.value.problems) == 5
    assert "Did you mean 'synchronous'?" in str(e.value)


def test_what_a_search_cannot_be_told():
    with pytest.raises(InvalidPlan) as e:
        engine.check(measure=3, limit=0, price=-1.0, here=False, cluster="dgx_h100", study={})
    assert len(e.value.problems) == 4
    assert "measure=3 on cluster dgx_h100" in str(e.value)


def test_a_space_larger_than_its_limit_or_empty_is_refused_with_what_would_do():
    asked = {"here": False, "cores": 2, "most": 100, "base": Plan()}
    with pytest.raises(BadInput, match=r"this search has \d+ plans, and limit=10.*limit=\d+ \(--limit \d+\)"):
        space.asked({}, load("ethernet_10g"), **asked, limit=10)
    with pytest.raises(BadInput, match="no mesh has so many ranks"):
        space.asked({"meshes": ("tensor=3",), "workers": (2, 4)}, load("ethernet_10g"), **asked, limit=10)


@pytest.mark.parametrize("cluster", ["laptop", "dgx_h100", "ethernet_10g", "wan"])
def test_default_spaces_are_within_the_default_limit(cluster):
    plans = space.asked({}, load(cluster), here=False, cores=2, most=4096, base=Plan(), limit=1000)
    assert 10 < len(plans) <= 1000


# -- the order ---------------------------------------------------------------------------------------------------------


@settings(max_examples=20)
@given(st.dictionaries(st.integers(1, 64), st.floats(0.01, 100), min_size=1, max_size=8), st.floats(0, 0.4))
def test_ranked_by_predicted_epoch_with_ties_by_error_bars(times, error):
    found = search(some("synchronous", workers=times), Fake(lambda p: times[p.workers], error=error))
    epochs = [each.epoch_s for each in found.ranked]
    assert epochs == sorted(times.values())
    assert found.looked_at == len(times)
    first = found.choice
    assert list(found.ties) == [each for each in found.ranked[1:] if each.low_s <= first.high_s]


def test_of_equal_ones_fewer_cores_go_first():
    found = search(some("synchronous"), Fake(lambda _: 1.0))
    assert [each.plan.workers for each in found.ranked] == [1, 2, 4]
    assert len(found.ties) == 2


def test_what_learns_nobody_knows_how_stands_apart_however_fast():
    found = search(some("synchronous", "ssp", workers=(2,)), Fake(lambda p: 0.1 if p.strategy.name == "ssp" else 1.0))
    assert [each.plan.strategy.name for each in found.ranked] == ["synchronous"]
    assert [(each.plan.strategy.name, each.learning) for each in found.apart] == [("ssp", "unknown")]


def test_with_a_study_the_order_is_of_the_time_to_the_target():
    plans = some("synchronous", "local", "ssp", workers=(2, 4))
    time = {"synchronous": 1.0, "local": 0.5, "ssp": 0.4}
    samples = {"synchronous": {1: 3000.0}, "local": {2: 9000.0, 4: 4000.0}}
    found = search(plans, Fake(lambda p: time[p.strategy.name]), samples=samples)
    said = [(each.plan.strategy.name, each.plan.workers, round(each.target_s, 6)) for each in found.ranked]
    # ssp was not measured; synchronous learns alike on any number of workers.
    assert said == [("local", 4, 2.0), ("synchronous", 2, 3.0), ("synchronous", 4, 3.0), ("local", 2, 4.5)]
    assert {each.plan.strategy.name for each in found.apart} == {"ssp"}
    assert found.by == "target"


def test_plans_that_are_decided_alike_are_priced_once():
    pricer = Fake(lambda _: 1.0)
    found = search(some("synchronous", "synchronous(update='sharded')", workers=(2,)), pricer)
    assert (found.looked_at, len(pricer.asked)) == (2, 1)


# -- refusals ----------------------------------------------------------------------------------------------------------


def test_no_plan_ends_a_search_and_reasons_are_grouped_whatever_their_numbers():
    plans = [
        *some("synchronous", workers=(1, 2, 4)),
        Plan(strategy="synchronous", workers=2, mesh="data=3"),
        Plan(strategy="synchronous", workers=4, mesh="data=7"),
        Plan(strategy="ssp", workers=2, mesh="tensor=2"),
    ]
    found = search(plans, Fake(lambda p: None if p.workers == 4 else 1.0))
    groups = ranking.grouped(found.refused)
    assert sorted((same[0].why, len(same)) for same in groups) == [
        ("cannot work", 1),
        ("cannot work", 2),
        ("no price", 1),
    ]
    assert any("wants the whole model on every worker" in each.reason for each in found.refused)
    assert [each.plan.workers for each in found.ranked] == [1, 2]


def test_what_does_not_fit_is_told_by_how_much_and_what_would():
    pricer = Fake(lambda _: 1.0, needs=lambda p: 10**9 * (p.workers or 1), there=4 * 10**9)
    found = search(some("synchronous", workers=(1, 2, 4)), pricer)
    (refused,) = found.refused
    assert refused.why == "memory"
    assert refused.reason.startswith(
        "4000000000 B: there are 4000000000: 4e+08 too much. Take less. What fits, for one"
    )
    assert [each.plan.workers for each in found.ranked] == [1, 2]
    assert found.ranked[1].needed_B == 2 * 10**9
    nothing = search(some("synchronous"), Fake(lambda _: 1.0, needs=lambda _: 101))
    assert nothing.choice is None
    assert "No plan of this search fits" in nothing.refused[0].reason


def test_costly_prices_go_to_those_that_could_be_first_and_to_as_many_as_there_is_budget_for():
    def effort(plan):
        return ("4 steps", 0.4) if plan.strategy.name == "local" else ("", 0.0)

    least = {2: 0.5, 4: 0.6, 8: 0.7, 16: 3.0}
    pricer = Fake(lambda p: 1.0, effort=effort, least=lambda p: least[p.workers])
    found = search([*some("synchronous", workers=(1,)), *some("local", workers=(16, 8, 4, 2))], pricer)
    assert [p.workers for p in pricer.asked] == [1, 2, 4]
    assert {(each.plan.workers, each.why) for each in found.refused} == {(8, "not looked at"), (16, "slower")}


# -- how many workers --------------------------------------------------------------------------------------------------


def curve(times):
    plans = some("synchronous", workers=times)
    return search(plans, Fake(lambda p: times[p.workers]), price_per_worker_hour=0.9).worth


@settings(max_examples=20)
@given(st.integers(1, 7), st.floats(0.01, 100))
def test_perfect_scaling_has_its_knee_at_the_end_and_costs_the_same_everywhere(most, epoch_s):
    times = {2**n: epoch_s / 2**n for n in range(most + 1)}
    worth = curve(times)
    assert worth.knee.workers == worth.fastest.workers == 2**most
    assert all(p.gain == pytest.approx(2.0) for p in worth.points[1:])
    assert all(p.price == pytest.approx(epoch_s / 3600 * 0.9) for p in worth.points)


def test_the_knee_is_the_last_doubling_that_makes_it_half_as_fast_again():
    worth = curve({1: 1.0, 2: 0.6, 4: 0.45, 8: 0.2})
    assert worth.knee.workers == 2  # 1.67 a doubling, then 1.33; what comes after a bad step does not count
    assert worth.fastest.workers == 8
    assert worth.cheapest.workers == 1


@given(
    st.lists(st.tuples(st.integers(1, 10_000), st.floats(1e-6, 1e3)), min_size=1, max_size=9, unique_by=lambda x: x[0])
)
def test_the_knee_is_on_the_curve_and_all_up_to_it_gain_enough(points):
    made, before = [], None
    for workers, epoch_s in sorted(points):
        gain = None if before is None else (before / epoch_s)
        made.append(Point(workers, epoch_s, gain, Plan()))
        before = epoch_s
    knee = ranking.knee(made)
    reached = made[: made.index(knee) + 1]
    assert all(p.gain >= ranking.KNEE for p in reached[1:])
    assert knee is made[-1] or made[made.index(knee) + 1].gain < ranking.KNEE


# -- measured ----------------------------------------------------------------------------------------------------------


def test_the_first_are_run_and_put_in_the_order_of_what_they_took():
    times = {1: 1.0, 2: 1.1, 4: 1.2, 8: 5.0}
    found = search(some("synchronous", workers=times), Fake(lambda p: times[p.workers]))
    taken = {1: [0.13, 0.12, 0.11], 2: [0.1, 0.1, 0.1], 4: []}

    def run(plans):
        assert [round(s, 3) for s in plans.values()] == [0.1, 0.11, 0.12]  # ten steps an epoch
        return {plan: taken[plan.workers] for plan in plans}

    ranked = engine.measured(found, run, 3)
    assert [each.plan.workers for each in ranked.ranked] == [2, 1, 4, 8]
    assert ranked.ranked[0].timed.epoch_s == pytest.approx(1.0)
    assert ranked.ranked[1].timed.spread == pytest.approx(0.02 / 0.24)
    assert ranked.regret == pytest.approx(0.2)
    assert ranked.notes == ("1 of the first 3 plans could not be measured",)


# -- parts -------------------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(1, 10**6), min_size=1, max_size=40, unique=True), st.integers(2, 6))
def test_knots_are_among_the_shares_with_both_ends(shares, most):
    ordered = sorted(shares)
    found = costs.spread_out(ordered, most)
    assert len(found) <= max(most, 2)
    assert set(found) <= set(ordered)
    assert {ordered[0], ordered[-1]} <= set(found)


def test_how_a_strategy_is_simulated_is_found_by_trying():
    how = {name: costs._how(Plan(strategy=name).strategy, 2) for name in ("local", "gossip", "sandblaster")}
    assert how == {"local": "folded", "gossip": "ranks", "sandblaster": "numbers"}


@given(st.floats(0, 10), st.floats(0, 10), st.floats(0, 10), st.floats(0, 10))
def test_what_bounds_a_step_is_its_largest_part(compute, communicate, wait, update):
    name, share = ranking.bound(StepParts(compute, communicate, wait, update))
    assert name in ("computing", "communicating", "waiting")
    assert 1 / 3 - 1e-9 <= share <= 1


def test_a_ranking_is_plain_values():
    found = search(some("synchronous", "ssp"), Fake(lambda p: 1.0 / p.workers))
    table = found.as_dict()
    assert table["choice"]["workers"] == 4
    assert table["worth"]["knee"] == 4
    assert [each["learning"] for each in table["apart"]] == ["unknown", "unknown"]
    assert Refused(Plan(), "memory", "").why == "memory"
    assert isinstance(found.ranked[0], Ranked)


def test_a_person_is_told_the_best_what_ties_what_was_refused_and_how_many_workers():
    plans = [*some("synchronous", "ssp"), Plan(workers=2, mesh="data=3", threads=1)]
    found = search(plans, Fake(lambda p: 1.0 / p.workers, error=0.4), price_per_worker_hour=3.6)
    text = "\n".join(searching.lines(mh.Task(), found))
    for said in (
        "7 plans, 4 ranked, 2 apart, 1 refused",
        "1.  synchronous(update='sharded'), 4 workers × 1 thread  250 ms ± 40%",
        "computing 80%",
        "one other is within the error bars of the first: predictions do not tell them apart",
        "of these the fewest cores: synchronous(update='sharded'), 2 workers × 1 thread",
        "1 plan (cannot work): mesh(data=3) needs 3 ranks",
        "4 workers × 1: an epoch 250 ms, × 2.00 a doubling, 0.001 an epoch",
        "knee: 4 workers",
    ):
        assert said in text
    alone = search([], Fake(lambda _: 1.0))
    assert "no plan can be ranked" in "\n".join(searching.lines(mh.Task(), alone))


# -- for real ----------------------------------------------------------------------------------------------------------


def test_a_small_search_of_this_machine_prices_what_predict_prices():
    task = mh.Task(model="perceptron(hidden=8)", data="digits(limit=300)", batch_size=60)
    found = mh.search(
        task, workers=[1, 2], threads=[1], strategies=["synchronous", "gossip"], meshes=["data"],
        compressors=["none", "top_k"], micro_batches=[1], price_per_worker_hour=1.0,
    )  # fmt: skip
    assert {(each.plan.workers, each.plan.strategy.name) for each in found.ranked} == {
        (1, "synchronous"),
        (2, "synchronous"),
    }
    assert {str(each.plan.strategy) for each in found.apart} == {
        "gossip",
        "gossip(compress='top_k')",
        "synchronous(update='replicated', compress='top_k')",
    }
    assert not found.refused
    alone = next(each for each in found.ranked if each.plan.workers == 1)
    parts = alone.prediction.summary.step_parts_s
    assert alone.prediction.summary.step_s.median > 0
    assert (parts.communicate, parts.wait) == (0, 0)
    assert all(each.needed_B > 0 for each in found.ranked)
    assert all(each.prediction.summary.sent_B_per_step > 0 for each in found.apart)
    assert found.worth.points[0].price == pytest.approx(alone.epoch_s / 3600)
    again = dataclasses.replace(found, took_s=0.0)
    assert again.choice is found.choice
