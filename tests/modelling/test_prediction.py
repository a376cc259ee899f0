"""A plan's cost before it runs: the strategy's own code, what is measured of a step, and how they are put together."""

import dataclasses
import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import manyhands as mh
from manyhands import verbs
from manyhands.cluster import load
from manyhands.cluster.description import Node
from manyhands.cluster.figure import Figure
from manyhands.cluster.measured import Curve, Measured
from manyhands.communication.communicator import reference_B
from manyhands.communication.topology import Mesh
from manyhands.communication.transports.events import Operation
from manyhands.contract import Batch
from manyhands.errors import BadInput
from manyhands.modelling import fed as alone
from manyhands.modelling import keeping
from manyhands.modelling import profile as profiles
from manyhands.modelling.fed import END, Actions, FedHandover, feed
from manyhands.modelling.keeping import Profile
from manyhands.modelling.prediction import computed
from manyhands.partition.data import DataReplica
from manyhands.partition.pipeline.cut import cut
from manyhands.partition.pipeline.description import parse
from manyhands.partition.pipeline.handover import Form
from manyhands.partition.pipeline.pipedream import pipedream
from manyhands.partition.pipeline.replica import PipelineReplica
from manyhands.partition.pipeline.schedule import Action, makespan
from manyhands.plan import strategy_from
from manyhands.simulation.folded import NotAlike
from manyhands.simulation.mirror import MirrorCommunicator, Spent
from manyhands.simulation.pace import StepCost
from manyhands.simulation.prices import Prices
from manyhands.simulation.stragglers import Recorded

HERE = dataclasses.replace(load("laptop"), measured=Measured(when="2026-01-01"))


def profile(rows=((1e-3, 1e-4, 5e-5, 0.0),) * 4, ranks=1, **more):
    told = {"rows": torch.tensor(rows, dtype=torch.float64), "samples": 50, "elements": 100.0, "exchanges": []}
    return profiles.joined([told | {"actions": [], "hops": []} | more for _ in range(ranks)])


# -- a rank among mirrors ----------------------------------------------------------------------------------------------


def mirrored(strategy, size=4, steps=3, **how):
    """What a strategy asks of a mirror in so many steps."""
    torch.manual_seed(0)
    model = torch.nn.Linear(6, 5)
    mirror = MirrorCommunicator(0, size, transport="shared", shares_memory=True, **how)
    made = strategy_from(strategy)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    common = made.parameters == "common"
    replica = DataReplica(model, optimizer, torch.nn.functional.mse_loss, mirror, common=common)
    worker = made.start(replica, mirror)
    mirror.exchanges.clear()
    batch = Batch(torch.ones(2, 6), torch.ones(2, 5), 2, 2 * size)
    for step in range(steps):
        mirror.step = step
        worker.step(batch)
    return mirror, model


@pytest.mark.parametrize(
    "strategy", ["synchronous(update='sharded')", "synchronous(update='replicated')", "synchronous(aggregate='median')"]
)
def test_a_mirrored_step_asks_for_what_the_strategy_declares(strategy):
    mirror, model = mirrored(strategy)
    numel = sum(p.numel() for p in model.parameters())
    asked = [(op, n) for op, n in mirror.exchanges.items() if op.purpose == "step"]
    sent = sum(reference_B(op.name, op.payload_B, op.size) * n for op, n in asked)
    assert sent == 3 * strategy_from(strategy).traffic(numel, 4).sent_B


def test_whoever_does_more_than_meet_is_not_mirrored():
    with pytest.raises(NotAlike):
        mirrored("gossip")
    with pytest.raises(NotAlike):
        mirrored("hogwild(lock='one')")


def test_ranks_that_are_alike_in_their_messages_are_mirrored():
    mirror, model = mirrored("gossip", size=2, messages=True)
    numel = sum(p.numel() for p in model.parameters())
    sent = sum(op.payload_B * n for op, n in mirror.exchanges.items() if op.name == "send")
    assert sent >= 3 * strategy_from("gossip").traffic(numel, 2).sent_B


def test_a_server_that_adds_is_mirrored_and_what_is_done_under_its_lock_is_nobodys_work():
    mirror, model = mirrored("ssp(staleness=0)", size=2, served=True)
    numel = sum(p.numel() for p in model.parameters())
    pushed = sum(op.payload_B * n for op, n in mirror.exchanges.items() if op.name == "push")
    assert pushed == 3 * 4 * numel
    assert (
        sum(n for op, n in mirror.exchanges.items() if op.name == "pull") == 2
    )  # the first step has what all began with
    assert mirror.spent.here_s > 0
    with pytest.raises(NotAlike):
        mirrored("ssp", size=2)


def test_a_server_that_updates_is_mirrored_and_its_visits_are_known_by_kind():
    mirror, _ = mirrored("asynchronous", size=2, served=True)
    assert mirror.spent.visits == {("push", "pull")}
    mirror, _ = mirrored("downpour(fetch=2)", size=2, served=True)
    assert mirror.spent.visits == {("push",), ("push", "pull")}
    mirror, _ = mirrored("ssp(staleness=0)", size=2, served=True)
    assert mirror.spent.visits == {("push",), ("pull",)}


@pytest.mark.parametrize(
    ("plan", "served"),
    [
        ({"strategy": "asynchronous"}, True),
        ({"strategy": "ssp"}, True),
        ({"strategy": "backup_workers"}, False),  # waits for what others push
        ({"strategy": "asynchronous", "transport": "gloo"}, False),  # whose servers are ranks
        ({"strategy": "asynchronous", "mesh": "data=2,pipeline=2"}, False),  # a stage's store is not everybody's
        ({"strategy": "ssp", "mesh": "data=2,pipeline=2"}, True),  # where servers only add, a price is enough
    ],
    ids=str,
)
def test_whose_steps_are_measured_by_themselves_though_they_have_servers(plan, served, monkeypatch):
    monkeypatch.setattr(profiles, "exchanges_here", lambda plan: True)
    size = {} if "mesh" in plan else {"workers": 2}
    task = mh.Task(model="perceptron(hidden=8)", data="digits", optimizer="sgd(lr=0.1)")
    decided = verbs.resolved(task, mh.Plan(**{"transport": "shared", "threads": 1} | size | plan)).plan
    assert profiles._is_served(decided) == served


def test_exchanges_inside_a_model_are_priced_and_no_others():
    mirror = MirrorCommunicator(1, 4, transport="gloo", shares_memory=False, price=lambda op: op.payload_B / 1e3)
    mirror.all_reduce(torch.zeros(10)).wait()
    with mirror.counting("cut"):
        mirror.all_reduce(torch.zeros(10)).wait()
    assert mirror.spent_cut.priced_s == 0.04
    assert [(op.purpose, n) for op, n in mirror.exchanges.items()] == [("step", 1), ("cut", 1)]


def test_groups_of_a_mesh_are_those_of_a_real_rank():
    mirror = MirrorCommunicator(5, 8, transport="gloo", shares_memory=False)
    mirror.mesh = Mesh(data=2, tensor=2, pipeline=2)
    group = mirror.over(frozenset({"tensor"}))
    at = mirror.mesh.coordinates(5)
    assert (group.size, group.rank) == (2, at["tensor"])
    both = mirror.over(frozenset({"data", "tensor"}))
    assert both.size == 4
    assert both.over(frozenset({"tensor"})).size == 2
    assert mirror.over(frozenset()).size == 1


def test_what_is_gathered_is_filled_with_this_ranks_part():
    mirror = MirrorCommunicator(1, 3, transport="gloo", shares_memory=False)
    x = torch.tensor([0.0, 7.0, 0.0])
    mirror.all_gather(x, [(0, 1), (1, 2), (2, 3)]).wait()
    assert x.tolist() == [7.0, 7.0, 7.0]


# -- what is measured --------------------------------------------------------------------------------------------------


def test_ranks_are_joined_step_by_step():
    quick = {"rows": torch.tensor([[1.0, 0.2, 0.0, 0.0]] * 6)}
    slow = {"rows": torch.tensor([[3.0, 0.2, 0.0, 0.5]] * 4)}
    common = {"samples": 8, "elements": 10.0, "exchanges": [], "actions": [], "hops": []}
    found = profiles.joined([common | quick, common | slow])
    assert found.steps == 4
    assert found.factors.shape == (4, 2)
    assert found.compute_s == 2.0 + 0.25  # the median of both, and half of what the cut of one of them would take
    assert np.allclose(found.factors[:, 1] / found.factors[:, 0], 3.0)
    assert found.spread == 0.0


def test_a_profile_is_kept_and_read_again(tmp_path, monkeypatch):
    monkeypatch.setattr(keeping, "cache", lambda name: tmp_path / name)
    monkeypatch.setattr(keeping, "_HERE", {})
    plan = mh.Plan(workers=2)
    exchanges = [["all_reduce", 40, 2, [0, 1], None, None, False, "step", 1.0]]
    found = profile(exchanges=exchanges, actions=[["F", 0, 1e-3]], hops=[[0, 64]])
    keeping.keep(TASK, plan, found)
    keeping._HERE.clear()
    again = keeping.kept(TASK, plan)
    assert isinstance(again, Profile)
    assert np.array_equal(again.factors, found.factors)
    assert dataclasses.replace(again, factors=0) == dataclasses.replace(found, factors=0)
    assert again.exchanges[0][0].ranks == (0, 1)
    assert keeping.kept(TASK, mh.Plan(workers=3)) is None
    with monkeypatch.context() as m:
        m.setattr(keeping, "FRESH_S", -1.0)
        assert keeping.kept(TASK, plan) is None
    (file,) = (tmp_path / "profiles").iterdir()
    file.write_text('{"half": ')
    assert keeping.kept(TASK, plan) is None


def test_a_factory_of_the_users_is_not_kept_on_disk():
    assert keeping._lasting(mh.Task(model="cnn"))
    assert not keeping._lasting(mh.Task(model="my_pkg:model"))
    assert not keeping._lasting(mh.Task(model=torch.nn.Linear(2, 2)))


@given(st.integers(1, 9), st.integers(1, 4), st.integers(2, 12))
def test_recorded_factors_are_the_same_by_worker_and_by_step(workers, width, steps):
    factors = np.random.default_rng(0).random((steps, width))
    delays = Recorded(factors, workers)
    rows = delays.rows()
    by_step = np.array([next(rows) for _ in range(steps + 3)])
    for rank in range(workers):
        draws = delays.of(rank)
        assert [next(draws) for _ in range(steps + 3)] == by_step[:, rank].tolist()


@given(st.lists(st.integers(1, 1000), min_size=2, max_size=6, unique=True), st.integers(0, 2000))
def test_a_step_between_measured_shares_lies_on_their_lines(shares, at):
    points = tuple((float(n), 1e-3 + 1e-5 * n + 1e-8 * n * n) for n in sorted(shares))
    cost = StepCost(points[-1][1], 0.0, points[-1][0], 1, points=points)
    for n, seconds in points:
        assert cost.compute(n) == pytest.approx(seconds, rel=1e-12)
    found = cost.compute(at)
    assert found >= 0
    assert cost.compute(0) == 0
    assert cost.compute(np.array([at, 0.0])).tolist() == [found, 0.0]
    inside = [(a, b) for a, b in itertools.pairwise(points) if a[0] <= at <= b[0]]
    for a, b in inside:
        assert min(a[1], b[1]) - 1e-15 <= found <= max(a[1], b[1]) + 1e-15


# -- pipelines ---------------------------------------------------------------------------------------------------------


def test_the_longest_path_of_equal_stages_is_the_closed_form():
    for name in ("gpipe", "one_f_one_b"):
        order = parse(name).made(4, 8)
        assert makespan(order, lambda a: 2.0 if a.kind == "B" else 1.0) == 3.0 * (8 + 4 - 1)


def test_a_hop_delays_what_needs_it():
    order = parse("gpipe").made(2, 1)
    assert makespan(order, lambda _: 1.0, lambda _, __: 0.5) == 4.0 + 2 * 0.5


def test_a_slow_stage_bounds_the_pipeline():
    order = parse("one_f_one_b").made(2, 50)
    slow = makespan(order, lambda a: 3.0 if a.stage == 1 else 1.0)
    assert 50 * 6.0 <= slow <= 50 * 6.0 + 2 * 1.0 + 1e-9


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_of_a_pipeline_works_without_its_neighbour(rank):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.Tanh(), torch.nn.Linear(6, 3))
    every = cut(model, ["2"]).stages
    mirror = MirrorCommunicator(rank, 2, transport="shared", shares_memory=True)
    mirror.mesh = Mesh(pipeline=2)
    mine = torch.nn.ModuleList([every[rank]])
    optimizer = torch.optim.SGD(mine.parameters(), lr=0.1)
    order = parse("zero_bubble").made(2, 4)
    loss = torch.nn.functional.mse_loss
    replica = PipelineReplica(mine, optimizer, loss, mirror, common=False, stages={rank: every[rank]}, schedule=order)
    inputs = torch.randn(8, 4)
    actions = feed(replica, every, inputs, 8, mirrored=mirror.spent_cut)
    replica.gradients(Batch(inputs, torch.randn(8, 3), 8, 8))
    assert {(kind, stage) for kind, stage, _ in actions.told()} == {(END, rank)} | {
        (a.kind, a.stage) for a in order.rows[rank]
    }
    assert actions.sent_B() == ({0: 2 * 6 * 4} if rank == 0 else {})
    assert float(replica.pieces[0].grad.abs().sum()) > 0


def test_steps_whose_times_are_not_kept_count_as_steps_that_exchange():
    mirror = MirrorCommunicator(0, 2, transport="gloo", shares_memory=False)
    share = SimpleNamespace(indices=torch.zeros(3), global_count=6, before=SimpleNamespace(step=0))
    rows = SimpleNamespace(rows=lambda _: (None, None))
    run = SimpleNamespace(
        comm=mirror,
        plan=SimpleNamespace(strategy=strategy_from("synchronous")),
        schedule=None,
        splits=SimpleNamespace(train=rows),
        sampler=SimpleNamespace(batches=lambda **_: itertools.repeat(share)),
        replica=SimpleNamespace(compute_s=0.0, update_s=0.0, apply=lambda *_: None),
        worker=SimpleNamespace(step=lambda _: mirror.all_reduce(torch.zeros(10)).wait()),
    )
    steps = profiles.Steps(run, mirror, None)
    steps.take(0.0, skipped=2)
    told = steps.told()
    assert len(told["rows"]) == profiles.FEWEST_STEPS - 2
    assert [times for *_, times in told["exchanges"]] == [1.0]


# -- put together ------------------------------------------------------------------------------------------------------


@pytest.fixture
def given_profile(monkeypatch):
    """Predictions of 1 ms of computing, 0.1 ms of updating and 0.05 ms of all else, whatever the task."""
    monkeypatch.setattr(
        computed,
        "profile",
        lambda task, plan, *_, **__: profile(
            ranks=plan.workers, elements=NUMEL / plan.workers, samples=task.batch_size // plan.workers
        ),
    )


TASK = mh.Task(data="digits", batch_size=100, steps=10)
NUMEL = 64 * 50 + 50 + 50 * 10 + 10


def test_one_worker_takes_the_sum_of_its_parts(given_profile):
    found = mh.predict(TASK, mh.Plan(workers=1, transport="single"), HERE)
    assert found.step_s == pytest.approx(1.15e-3, rel=1e-9)
    assert found.summary.sent_B_per_step == 0
    assert found.sources == {"measured": 1.0}
    assert found.summary.steps == 10
    assert found.summary.wall_s == pytest.approx(10 * 1.15e-3, rel=1e-9)


def test_two_workers_pay_for_their_exchanges(given_profile):
    found = mh.predict(TASK, mh.Plan(workers=2, transport="shared"), HERE)
    parts = found.summary.step_parts_s
    assert found.step_s == pytest.approx(parts.compute + parts.communicate + parts.wait + parts.update + 5e-5, rel=1e-6)
    assert parts.communicate > 0
    assert sum(found.sources.values()) == pytest.approx(1.0)
    numel = found.summary.parameters
    assert found.summary.sent_B_per_step == strategy_from("synchronous").traffic(numel, 2).sent_B
    assert found.link_B == {"within": found.summary.sent_B_per_step}


def test_a_device_that_is_not_here_is_priced_by_its_specification():
    found = mh.predict(TASK, mh.Plan(workers=16), "dgx_a100")
    assert set(found.sources) == {"roofline", "formula"}
    assert found.link_B.keys() == {"between"}
    assert found.error > 0.2
    alone = mh.predict(TASK, mh.Plan(workers=1), "dgx_a100")
    assert alone.summary.step_parts_s.communicate == 0
    assert found.step_s > 0 < alone.step_s


def test_what_cannot_be_predicted_is_refused():
    with pytest.raises(BadInput, match="ampnet"):
        mh.predict(TASK, mh.Plan(strategy="ampnet", mesh="pipeline=2"), HERE)
    with pytest.raises(BadInput, match="no source of computing"):
        mh.predict(TASK, compute="guesses")
    with pytest.raises(BadInput, match="are measured"):
        mh.predict(TASK, mh.Plan(mesh="tensor=2"), HERE, compute="roofline")


def test_a_real_step_is_predicted(tmp_path, monkeypatch):
    monkeypatch.setattr(keeping, "cache", lambda name: tmp_path / name)
    monkeypatch.setattr(profiles, "SECONDS", 0.02)
    plan = mh.Plan(workers=2, transport="shared", threads=1)
    found = verbs.predict(TASK, plan, HERE, fresh=True)
    assert found.summary.workers == 2
    assert 0 < found.summary.step_parts_s.compute < 1
    assert found.sources["measured"] > 0.1
    assert list((tmp_path / "profiles").iterdir())
    assert verbs.predict(TASK, plan, HERE).step_s == found.step_s  # nothing is measured again


@pytest.mark.slow
@pytest.mark.parametrize(
    "plan",
    [
        {"mesh": "tensor=2"},
        {"mesh": "pipeline=2", "pipeline": "one_f_one_b(cut='activation1')"},
        {"mesh": "pipeline=2", "strategy": "pipedream", "pipeline": "pipedream(cut='activation1')"},
        {"workers": 2, "shard": 3},
        {"workers": 2, "compress": "top_k(ratio=0.1)"},
        {"workers": 2, "strategy": "local(every=4)"},
        {"workers": 2, "strategy": "ssp"},
        {"workers": 2, "strategy": "gossip"},
        {"workers": 2, "strategy": "hogwild"},
    ],
    ids=str,
)
def test_every_kind_of_plan_is_predicted(plan, tmp_path, monkeypatch):
    monkeypatch.setattr(keeping, "cache", lambda name: tmp_path / name)
    task = mh.Task(model="perceptron(hidden=32)", data="digits", batch_size=64, steps=200)
    found = verbs.predict(task, mh.Plan(transport="shared", threads=1, **plan), HERE)
    assert found.step_s > 0
    assert found.summary.sent_B_per_step > 0 or "hogwild" in str(plan)
    if "ssp" in str(plan):  # how often a worker pulls is a matter of who is late
        return
    ran = mh.train(task, mh.Plan(transport="shared", threads=1, **plan), evaluate="never", progress=False)
    assert found.summary.sent_B_per_step == pytest.approx(ran.summary.sent_B_per_step, rel=0.05)


def test_costs_of_actions_are_asked_one_by_one():
    order = parse("one_f_one_b").made(2, 3)
    seen = set()

    def cost(action: Action) -> float:
        seen.add(action)
        return 1.0

    assert makespan(order, cost) == 8.0
    assert seen == {a for row in order.rows for a in row}


def fed(**options):
    """The second of two stages, without the first."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.Tanh(), torch.nn.Linear(6, 3))
    every = cut(model, ["2"]).stages
    mirror = MirrorCommunicator(1, 2, transport="shared", shares_memory=True)
    mirror.mesh = Mesh(pipeline=2)
    mine = torch.nn.ModuleList([every[1]])
    optimizer = torch.optim.SGD(mine.parameters(), lr=0.1)
    order = parse("gpipe").made(2, 2)
    loss = torch.nn.functional.mse_loss
    replica = PipelineReplica(
        mine, optimizer, loss, mirror, common=False, stages={1: every[1]}, schedule=order, **options
    )
    return replica, feed(replica, every, torch.randn(8, 4), 8, mirrored=mirror.spent_cut)


def test_a_short_batch_is_fed_the_first_rows_of_a_longer_one():
    replica, _ = fed()
    replica.gradients(Batch(None, torch.randn(5, 3), 5, 5))
    assert float(replica.pieces[0].grad.abs().sum()) > 0


def test_what_a_whole_batch_hands_over_is_told_also_after_a_short_one():
    handover = FedHandover(parse("gpipe").made(2, 2), {})
    for samples in (4, 2):
        handover.send(0, 0, samples, [torch.zeros(samples, 6)], Form(True, ()))
    assert handover.sent_B == {0: 4 * 6 * 4}


@pytest.mark.parametrize("recompute", [False, True])
def test_actions_take_all_of_a_batch_and_one_is_what_comes_after_the_one_before(monkeypatch, recompute):
    ticks = itertools.count()
    monkeypatch.setattr(alone, "time", SimpleNamespace(perf_counter=lambda: float(next(ticks))))
    replica, actions = fed(recompute=recompute)
    replica.gradients(Batch(None, torch.randn(8, 3), 8, 8))
    # The clock ticks once at the batch's beginning, once at each of its four actions' ends and once at its own; a
    # forward that is done again is no action of its own.
    assert actions.told() == [["F", 1, 1.0], ["B", 1, 1.0], [END, 1, 1.0]]
    assert actions.spent_s == 5.0
    assert actions.sent_B() == {}  # what goes back was counted going forward


def test_what_a_mirror_takes_in_an_action_is_not_the_actions(monkeypatch):
    ticks = itertools.count(step=10)
    monkeypatch.setattr(alone, "time", SimpleNamespace(perf_counter=lambda: float(next(ticks))))
    mirrored = Spent()
    handover = FedHandover(parse("gpipe").made(2, 2), {})
    actions = Actions(handover, mirrored)
    handover.begin(parse("gpipe").made(2, 2))
    for _ in range(2):
        mirrored.here_s += 3.0
        handover.did(1)
    assert actions.told() == [["F", 0, 7.0]]
    assert actions.spent_s == 14.0


@pytest.mark.parametrize("strategy", ["synchronous", "pipedream"])
def test_an_update_is_a_pipedreams_own_and_counted_once(strategy, tmp_path, monkeypatch):
    monkeypatch.setattr(keeping, "cache", lambda name: tmp_path / name)
    task = mh.Task(model="perceptron(hidden=32)", data="digits", batch_size=64)
    plan = mh.Plan(mesh="pipeline=2", strategy=strategy, micro_batches=4, transport="shared", threads=1)
    found = []
    monkeypatch.setattr(
        computed, "profile", lambda *given, **how: found.append(profiles.profile(*given, **how)) or found[0]
    )
    mh.predict(task, plan, HERE, memory=False)
    (found,) = found
    assert (found.update_s == 0) == (strategy == "pipedream")
    each = {(kind, stage): seconds for kind, stage, seconds in found.actions}
    assert {stage for kind, stage in each if kind == END} == {0, 1}
    assert 0 < found.rest_s < found.compute_s


def test_more_stages_than_can_run_side_by_side_are_refused():
    with pytest.raises(BadInput, match="more than 8"):
        mh.predict(TASK, mh.Plan(mesh="data=8,pipeline=2"), HERE)


def made(factors, *, exchanges=(), **more):
    """A profile of 1 ms of computing, no rest and 0.1 ms of updating, stretched by ``factors`` (steps × ranks)."""
    common = {"compute_s": 1e-3, "update_s": 1e-4, "rest_s": 0.0, "cut_s": 0.0, "samples": 50.0, "elements": 1.0}
    factors = np.array(factors, dtype=float)
    return Profile(
        **common | more, steps=len(factors), factors=factors, spread=0.0, exchanges=tuple(exchanges), when=0.0
    )


def test_in_lock_step_all_wait_for_the_slowest_of_every_step(monkeypatch):
    factors = [[1, 3], [2, 1], [1, 1]]
    exchange = Operation("all_reduce", 4000, 2, (0, 1), None, None, False, "step")
    monkeypatch.setattr(computed, "profile", lambda *_, **__: made(factors, exchanges=[(exchange, 1.0)]))
    found = mh.predict(TASK, mh.Plan(workers=2, transport="shared", shard=3), HERE, memory=False)
    prices = Prices(HERE, 2, "shared")
    prices.begin()
    each_s = sum(max(row) for row in factors) * 1e-3 / 3 + 1e-4 + prices(exchange)
    assert found.summary.wall_s / found.summary.steps == pytest.approx(each_s, rel=1e-9)
    assert found.summary.wait_s_by_worker == pytest.approx([2e-3 / 3, 1e-3 / 3], rel=1e-9)
    assert found.summary.sent_B_per_step == 4000


def test_who_meets_every_other_step_waits_as_often(monkeypatch):
    factors = [[1, 3], [3, 1], [1, 2], [1, 2]]
    exchange = Operation("all_reduce", 4000, 2, (0, 1), None, None, False, "step")
    monkeypatch.setattr(computed, "profile", lambda *_, **__: made(factors, exchanges=[(exchange, 0.5)], update_s=0))
    found = mh.predict(TASK, mh.Plan(workers=2, transport="shared", shard=3), HERE, memory=False)
    prices = Prices(HERE, 2, "shared")
    prices.begin()
    assert found.summary.wall_s / found.summary.steps == pytest.approx((8e-3 + 2 * prices(exchange)) / 4, rel=1e-9)


@pytest.mark.parametrize("strategy", ["asynchronous_gossip", "asynchronous(servers=1)"])
def test_a_step_has_one_update_be_it_the_workers_own_or_the_servers(monkeypatch, strategy):
    steps = []
    for update_s in (0.0, 1e-3):
        given = made([[1, 1]] * 4, plain=True, update_s=update_s, elements=NUMEL)
        monkeypatch.setattr(computed, "profile", lambda *_, given=given, **__: given)
        plan = mh.Plan(workers=2, strategy=strategy, transport="shared", threads=1)
        steps.append(mh.predict(TASK, plan, HERE, memory=False).step_s)
    assert steps[1] - steps[0] == pytest.approx(1e-3, rel=0.01)


def test_a_pipelines_step_is_its_longest_path(monkeypatch):
    actions = (("F", 0, 1e-3), ("B", 0, 2e-3), ("F", 1, 1e-3), ("B", 1, 2e-3))
    monkeypatch.setattr(computed, "profile", lambda *_, **__: made([[1, 1]], actions=actions, update_s=0.0))
    plan = mh.Plan(mesh="pipeline=2", pipeline="gpipe", micro_batches=4, transport="shared", threads=1)
    found = mh.predict(TASK, plan, HERE, memory=False)
    free = 3e-3 * (4 + 2 - 1)
    assert free < found.step_s < free * 1.05  # and a hop each way
    assert found.summary.bubble_by_worker == pytest.approx([1 - 12e-3 / found.step_s] * 2, rel=1e-6)


def test_a_stage_that_has_more_to_do_is_in_the_path_once(monkeypatch):
    actions = (("F", 0, 1e-3), ("B", 0, 2e-3), ("F", 1, 1e-3), ("B", 1, 2e-3))
    plan = mh.Plan(mesh="pipeline=2", pipeline="gpipe", micro_batches=4, transport="shared", threads=1)
    steps = []
    for factors in ([[1, 1]] * 4, [[1.5, 0.5]] * 4):
        given = made(factors, actions=actions, update_s=0.0)
        monkeypatch.setattr(computed, "profile", lambda *_, given=given, **__: given)
        steps.append(mh.predict(TASK, plan, HERE, memory=False).step_s)
    assert steps[0] == steps[1]


def test_a_stage_of_pipedream_updates_after_each_backward(monkeypatch):
    # Half a millisecond each, in the forward that comes after it; the last one comes before nothing.
    actions = (("F", 0, 1.5e-3), ("B", 0, 2e-3), ("F", 1, 1.5e-3), ("B", 1, 2e-3), (END, 0, 5e-4), (END, 1, 5e-4))
    given = made([[1, 1]], compute_s=4 * 3.5e-3, actions=actions, update_s=0.0)
    monkeypatch.setattr(computed, "profile", lambda *_, **__: given)
    plan = mh.Plan(mesh="pipeline=2", strategy="pipedream", micro_batches=4, transport="shared", threads=1)
    free = makespan(pipedream(2, 4), {"F": 1.5e-3, "B": 2e-3}) + 5e-4
    assert free < mh.predict(TASK, plan, HERE, memory=False).step_s < free * 1.05


def test_stages_that_are_cut_themselves_exchange_in_their_actions(monkeypatch):
    actions = tuple((kind, stage, s) for stage in (0, 1) for kind, s in (("F", 1e-3), ("B", 2e-3)))
    plan = mh.Plan(mesh="tensor=2,pipeline=2", pipeline="gpipe", micro_batches=4, transport="shared", threads=1)
    of_four = dataclasses.replace(HERE, node=Node(devices=Figure(4, "count", "made up")))
    steps = []
    for cut_s in (0.0, 3e-3):  # beside 12 ms: a quarter more
        given = made([[1] * 4], actions=actions, compute_s=12e-3 + cut_s, cut_s=cut_s, update_s=0.0)
        monkeypatch.setattr(computed, "profile", lambda *_, given=given, **__: given)
        steps.append(mh.predict(TASK, plan, of_four, memory=False).step_s)
    assert steps[1] - steps[0] == pytest.approx(0.25 * 3e-3 * (4 + 2 - 1))


def test_exchanges_inside_a_model_get_the_price_that_was_measured_just_now():
    exchange = Operation("all_reduce", 400, 2, (0, 1), None, None, False, "cut")
    here = Curve(transport="shared", operation="all_reduce", ranks=2, sizes_B=(400,), seconds=(2e-4,), spread=(0.0,))
    given = made([[1, 1]], compute_s=1.5e-3, cut_s=5e-4, exchanges=[(exchange, 3.0)])
    plan = mh.Plan(workers=2, transport="shared", strategy=mh.Synchronous())
    found = computed.cut_anew(computed.as_measured(plan, given), Prices(HERE, 2, "shared", [here]))
    assert found.measured.cut_s == pytest.approx(6e-4)
    assert found.cost.compute_s == pytest.approx(1.6e-3)


def test_what_a_servers_optimizer_takes_is_priced_with_each_push():
    push = Operation("push", 1000, 2, (1,), 1, 0, True, "step")
    prices, slower = Prices(load("laptop"), 2), Prices(load("laptop"), 2)
    slower.serving_s_per_B = 1e-6
    for each in (prices, slower):
        each.begin()
    assert slower(push) - prices(push) == pytest.approx(1e-3)
    assert slower(push._replace(name="pull")) == prices(push._replace(name="pull"))


def test_of_an_exchange_of_chunks_every_rank_gets_those_for_itself():
    mirror = MirrorCommunicator(1, 2, transport="gloo", shares_memory=False)
    assert mirror.all_to_all(torch.tensor([1.0, 2.0, 3.0, 4.0])).tolist() == [3.0, 4.0, 3.0, 4.0]
