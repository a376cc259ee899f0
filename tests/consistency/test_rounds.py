"""Backup workers: what a round is made of, whoever decides it, and what a robust rule makes of it."""

import logging
import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import manyhands as mh
from manyhands.communication.communicator import Communicator
from manyhands.consistency.backup_workers import BackupWorkers
from manyhands.consistency.parameter_server.rounds import Outcome, Round
from manyhands.consistency.parameter_server.server import serving
from manyhands.consistency.robust.aggregation import aggregation_from
from manyhands.contract import Piece, Setting
from manyhands.errors import BadInput, DeadlineExceeded, NonFiniteLoss, UnknownName
from manyhands.plan import strategy_from
from manyhands.testing import check_strategy, run_ranks
from manyhands.training.team import team
from tests.consistency import jobs
from tests.consistency.jobs import problem
from tests.consistency.test_contract import TOGETHER, plain
from tests.consistency.test_robust import digits, spoil
from tests.consistency.test_served import shares, started
from tests.training import factories

HERE = "tests.consistency.test_rounds"
IN_WINDOWS = pytest.param("mpi", marks=pytest.mark.slow)


def ranks(fn, n: int, *args, on: str) -> list:
    return run_ranks(fn, n, on=on, args=args, servers=int(on == "gloo"), timeout_s=40)


# -- the arithmetic of a round -----------------------------------------------------------------------------------------


def made(needed: int, workers: int, rule: str, numel: int = 3) -> Round:
    x = torch.zeros(numel, dtype=torch.float64)
    allocate = lambda n, dtype: torch.zeros(n, dtype=dtype)  # noqa: E731
    return Round([Piece(x, x, frozenset())], needed, workers, aggregation_from(rule), allocate=allocate)


def vectors(n: int, seed: int) -> torch.Tensor:
    return torch.randn(n, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@given(weights=st.lists(st.integers(0, 9), min_size=1, max_size=6), seed=st.integers(0, 2**31))
def test_a_mean_is_weighted_and_the_next_round_begins_with_nothing(weights, seed):
    under_way = made(len(weights), 6, "mean")
    for number in range(2):
        x = vectors(len(weights), seed + number)
        for i, weight in enumerate(weights):
            assert not under_way.complete
            under_way.take([x[i]], float(weight), votes=True)
        assert under_way.complete
        result = under_way.end(number)
        if not sum(weights):
            assert result is None
        else:
            expected = (torch.tensor(weights, dtype=torch.float64) @ x) / sum(weights)
            assert (result[0] - expected).abs().max() < 1e-12
        assert under_way.outcome(number) is Outcome.APPLIED


@given(votes=st.integers(0, 7), idle=st.integers(0, 2), without=st.integers(0, 2), seed=st.integers(0, 2**31))
@pytest.mark.parametrize("rule", ["median", "trimmed_mean", "krum(f=1)"])
def test_a_rule_has_the_votes_alone_and_sums_over_no_samples_are_averaged_in(rule, votes, idle, without, seed):
    came = votes + idle + without
    if not came:
        return
    x, under_way = vectors(came, seed), made(came, came, rule)
    for i in range(came):
        under_way.take([x[i]], 1.0 if i < votes + idle else 0.0, votes=i < votes)
    result, its = under_way.end(4), aggregation_from(rule)
    few = votes + idle > 0 and votes < its.fewest
    assert (under_way.outcome(4) is Outcome.FEW) == few
    if result is None:
        assert few or votes + idle == 0
    else:
        (combined,) = its.combine([x[:votes]])
        expected = (combined * votes + x[votes : votes + idle].sum(0)) / (votes + idle)
        assert (result[0] - expected).abs().max() < 1e-12


@pytest.mark.parametrize(("broken", "outcome"), [(1, Outcome.APPLIED), (2, Outcome.SPOILT)])
def test_vectors_that_are_not_finite_are_left_out_as_far_as_the_rule_bears_them(broken, outcome):
    x, under_way = vectors(5, 3), made(5, 5, "krum(f=1)")
    x[:broken, 1] = torch.inf
    for row in x:
        under_way.take([row], 1.0, votes=True)
    result = under_way.end(0)
    assert under_way.outcome(0) is outcome
    if outcome is Outcome.APPLIED:
        assert torch.equal(result[0], aggregation_from("krum(f=0)").combine([x[1:]])[0])
    else:
        assert result is None


def test_workers_that_are_aside_are_not_waited_for():
    under_way = made(3, 3, "mean")
    under_way.aside(1)
    assert not under_way.complete  # of nobody there is no round
    under_way.take([torch.ones(3, dtype=torch.float64)], 1.0, votes=True)
    assert not under_way.complete
    under_way.aside(1)
    assert under_way.complete


# -- rounds on ranks ---------------------------------------------------------------------------------------------------


def rounds(comm: Communicator, backups: int, steps: int, seed: int) -> dict:
    """What each worker brought to which round, and what parameters it had at which version."""
    spec = problem()
    worker = started(comm, f"backup_workers(backups={backups})", spec)
    pieces, store = worker.replica.pieces, worker.store
    brought, seen = [], [[store.read[0], jobs.vector(p.flat for p in pieces)]]
    bring = worker.rounds.bring

    def noted(gradients, weight, *, votes):
        of = store.read[0]
        late, outcome = bring(gradients, weight, votes=votes)
        brought.append([of, jobs.vector(gradients), weight, late])
        seen.append([store.read[0], jobs.vector(p.flat for p in pieces)])
        assert len(set(store.read)) == 1
        return late, outcome

    worker.rounds.bring = noted
    generator = torch.Generator().manual_seed(seed + comm.rank)
    gradients = worker.replica.gradients

    def slow(*args):
        comm.elapse(float(torch.rand((), generator=generator)) ** 4)
        return gradients(*args)

    if comm.transport == "simulated":
        worker.replica.gradients = slow
    else:
        jobs.slow_down(worker.replica, seed, comm.rank)
    for step, batch in enumerate(shares(comm, spec, steps=steps)):
        comm.step = step
        worker.step(batch)
    worker.meet()
    comm.barrier()
    return {"brought": brought, "seen": seen, "in_time": worker.in_time, "late": worker.late}


@pytest.mark.parametrize(
    ("on", "backups"),
    [
        *((on, backups) for on in ("simulated", "shared") for backups in (0, 1, 2)),
        *(("threads", 1), ("gloo", 1)),
        *(pytest.param(on, backups, marks=pytest.mark.slow) for on in ("threads", "gloo") for backups in (0, 2)),
        *(pytest.param("mpi", backups, marks=pytest.mark.slow) for backups in (0, 1, 2)),
    ],
)
def test_a_round_is_the_mean_of_the_first_n_distinct_workers_and_late_gradients_are_dropped(on, backups):
    results = ranks(rounds, 4, backups, 15, 3, on=on)
    at: dict[int, torch.Tensor] = {}
    for number, parameters in (pair for r in results for pair in r["seen"]):
        assert torch.equal(at.setdefault(number, parameters), parameters)  # no gradient is of anything in between
    brought = [[of, rank, g, w] for rank, r in enumerate(results) for of, g, w, late in r["brought"] if not late]
    compared = 0
    for number in sorted(at):
        those = [(rank, g, w) for of, rank, g, w in brought if of == number]
        if number + 1 not in at or not those:
            continue
        assert len({rank for rank, *_ in those}) == len(those)
        if number < 15 - 1:  # nobody can have left yet
            assert len(those) == 4 - backups
        mean = sum(w * g for _, g, w in those) / sum(w for *_, w in those)
        assert (at[number + 1] - at[number] + 0.1 * mean).abs().max() < 1e-12
        compared += 1
    assert compared >= 14
    assert all(r["in_time"] + r["late"] == 15 for r in results)
    assert sum(r["in_time"] for r in results) == len(brought)
    assert any(r["late"] for r in results) == bool(backups)


JOINED = ("adam", "sum and l2, fewer samples", "used by one worker", "first batch smaller than the workers", "uneven")


@pytest.mark.parametrize("on", ["shared", "simulated", "gloo", IN_WINDOWS])
@pytest.mark.parametrize("name", JOINED)
def test_without_backups_all_workers_are_one_on_the_joined_batch(name, on):
    spec = TOGETHER[name]
    for result in ranks(jobs.train, 3, "backup_workers(backups=0)", spec, on=on):
        for mine, theirs in zip(result["parameters"][1:], plain(spec)["parameters"], strict=True):
            assert (mine - theirs).abs().max() <= 1e-12
        steps = zip(*result["traffic"], strict=True)
        declared = [[sum(column) for column in zip(*of_piece, strict=True)] for of_piece in steps]
        sent = list(zip(result["sent_B"], result["messages"], strict=True))
        assert all(b <= d[0] and m <= d[1] for (b, m), d in zip(sent, declared, strict=True))
        assert list(sent[0]) == declared[0] or "fewer" in name or "smaller" in name


@pytest.mark.parametrize("optimizer", ["nesterov", "adamw", "adagrad"])
def test_one_worker_and_a_server_are_plain_torch_bit_for_bit(optimizer):
    spec = problem(optimizer=optimizer, dtype="float32", schedule=True)
    (mine,) = ranks(jobs.train, 1, "backup_workers(aggregate=median)", spec, on="gloo")
    for a, b in zip(mine["parameters"][1:], plain(spec)["parameters"], strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("on", ["shared", "gloo", IN_WINDOWS])
def test_a_worker_that_ends_early_is_not_waited_for(on):
    for steps in ranks(ends_early, 3, on=on):
        assert steps == (5, 10, 10)


def ends_early(comm: Communicator) -> tuple[int, ...]:
    worker = started(comm, "backup_workers(backups=0)", problem())
    steps = (5, 10, 10)
    for step, batch in enumerate(shares(comm, problem(), steps=steps[comm.rank])):
        comm.step = step
        worker.step(batch)
    worker.meet()
    comm.barrier()
    assert worker.in_time == steps[comm.rank]
    return steps


@pytest.mark.parametrize("text", ["backup_workers", "backup_workers(backups=0, aggregate=median)"])
def test_over_gloo_a_loss_that_is_not_finite_stops_all_or_is_left_out(text):
    robust = "median" in text
    for result in ranks(jobs.train, 3, text, problem(poison=(1, 1)), on="gloo"):
        assert result["final"].isfinite().all()
        assert (result["raised"] is None) == robust
        if not robust:
            assert "worker 1 is not finite at step 1" in result["raised"][1]


def absent(member, servers: int) -> None:
    """The last worker brings nothing to the second round."""
    with serving(member.comm, servers) as comm:
        if comm is None:
            return
        worker = started(comm, "backup_workers(backups=0)", problem())
        for step, batch in enumerate(shares(comm, problem(), steps=2)):
            comm.step = step
            if (comm.rank, step) == (comm.size - 1, 1):
                time.sleep(4)
            worker.step(batch)


@pytest.mark.parametrize(
    ("on", "late"),
    [
        pytest.param("gloo", 1, marks=pytest.mark.slow),
        ("shared", 2),
        pytest.param("threads", 2, marks=pytest.mark.slow),
    ],
)
def test_waiting_in_vain_for_a_round_says_for_whom_and_in_which_step(on, late):
    """Over gloo two workers and a server, elsewhere three workers, of which the second has come."""
    with team(on, 3, threads=1, timeout_s=1.0, allocator="plain") as crew, pytest.raises(DeadlineExceeded) as e:
        crew.run(f"{HERE}:absent", int(on == "gloo"))
    assert f"for rank {late};" in str(e.value)
    assert "end of the round" in str(e.value)
    assert e.value.step == 1


def absent_over_mpi(comm: Communicator) -> list[str]:
    """As `absent`; everybody comes to the round in the end, and to its end. What those who waited are told."""
    worker, before = started(comm, "backup_workers(backups=0)", problem()), comm.timeout_s
    said: list[str] = []
    for step, batch in enumerate(shares(comm, problem(), steps=2)):
        comm.step = step
        if step == 1:
            comm.timeout_s = 0.5 if comm.rank < 2 else before
            if comm.rank == 2:
                time.sleep(1.5)
        try:
            worker.step(batch)
        except DeadlineExceeded as e:
            said.append(str(e))
    comm.timeout_s = before
    comm.barrier()
    return said


@pytest.mark.slow
def test_waiting_in_vain_for_a_round_over_mpi_says_for_whom_and_in_which_step():
    first, second, third = run_ranks(absent_over_mpi, 3, on="mpi", timeout_s=40)
    for (said,) in (first, second):
        assert "end of the round at step 1 for rank 2;" in said
    assert not third


def absent_beside_one_aside(member, servers: int) -> None:
    """Of three workers the first is done, the second brings a gradient, and the third does not."""
    with serving(member.comm, servers) as comm:
        if comm is None:
            return
        worker, (batch,) = started(comm, "backup_workers(backups=0)", problem()), shares(comm, problem(), steps=1)
        if comm.rank == 0:
            worker.rounds.aside(1)
        comm.barrier()
        if comm.rank != 1:
            time.sleep(3)
        worker.step(batch)


@pytest.mark.slow
@pytest.mark.parametrize("on", ["shared", "gloo"])
def test_a_worker_that_is_done_is_not_said_to_be_late(on):
    servers = int(on == "gloo")
    crew = team(on, 3 + servers, threads=1, timeout_s=1.0, allocator="plain")
    with crew, pytest.raises(DeadlineExceeded) as e:
        crew.run(f"{HERE}:absent_beside_one_aside", servers)
    assert "end of the round for rank 2;" in str(e.value)


def test_a_resume_takes_up_what_the_server_of_rounds_held(tmp_path):
    said = {"model": f"{factories.HERE}:model", "data": f"{factories.HERE}:data", "batch_size": 8}
    plan = mh.Plan(strategy="backup_workers(backups=0)", workers=2, threads=1, transport="gloo", timeout_s=20)
    task = mh.Task(**said, optimizer="adam(lr=0.01)", steps=12)
    whole = mh.train(task, plan, progress=False)
    half = mh.Task(**said, optimizer="adam(lr=0.01)", steps=6)
    mh.train(half, plan, progress=False, out=tmp_path)
    resumed = mh.train(task, plan, progress=False, out=tmp_path, resume=True)
    # The order in which two gradients come rounds their mean; Adam divides by it.
    assert all((resumed.state[k] - whole.state[k]).abs().max() < 1e-5 for k in whole.state)


# -- robust rules ------------------------------------------------------------------------------------------------------


def text_of(rule: str, backups: int = 0) -> str:
    return f"backup_workers(backups={backups}, aggregate={rule})"


@pytest.mark.parametrize("on", ["shared", "gloo", IN_WINDOWS])
@pytest.mark.parametrize("name", ["uneven", "sum and l2, fewer samples"])
@pytest.mark.parametrize("rule", ["median", "trimmed_mean(f=1)", "multi_krum(f=0, m=2)"])
def test_without_backups_a_rule_is_what_synchronous_makes_of_it(rule, name, on):
    spec = TOGETHER[name]
    mine = ranks(jobs.train, 3, text_of(rule), spec, on=on)
    theirs = run_ranks(jobs.train, 3, on="simulated", args=(f"synchronous(aggregate={rule})", spec))
    assert (mine[0]["consensus"] - theirs[0]["final"]).abs().max() < 1e-12
    n_B = 8 * len(mine[0]["final"])
    assert max(mine[0]["sent_B"]) == 2 * n_B  # all gradients are at the server anyway


@pytest.mark.parametrize("on", ["simulated", pytest.param("gloo", marks=pytest.mark.slow)])
def test_one_worker_that_sends_garbage_ruins_the_mean_and_no_robust_rule(on):
    assert ranks(digits, 5, "backup_workers(backups=0)", 2, on=on)[0]["accuracy"] < 0.5
    rules = ("median", "trimmed_mean(f=1)", "krum(f=1)", "multi_krum(f=1)") if on == "simulated" else ("krum(f=1)",)
    for rule in rules:
        assert ranks(digits, 5, text_of(rule), 2, on=on)[0]["accuracy"] > 0.8, rule


@pytest.mark.parametrize("on", ["shared", "gloo", IN_WINDOWS])
def test_a_rule_and_a_backup_bear_a_liar_and_somebody_slow(on):
    results = ranks(digits, 5, text_of("median", backups=1), 2, 7, on=on)
    assert all(r["accuracy"] > 0.8 for r in results)
    assert all(torch.equal(r["parameters"], results[0]["parameters"]) for r in results)


@pytest.mark.parametrize("on", ["threads", "gloo", IN_WINDOWS])
@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_more_that_are_not_finite_than_a_rule_bears_stop_all_and_nothing_is_applied(what, on):
    for said in ranks(spoilt, 5, what, on=on):
        assert said["step"] == 2
        assert what in said["words"]
        assert said["finite"]


def spoilt(comm: Communicator, what: str) -> dict:
    """Ranks 1 and 3 fail in the third step."""
    worker = started(comm, text_of("krum(f=1)"), problem())
    for step, batch in enumerate(shares(comm, problem(batches=(10,)), steps=5)):
        comm.step = step
        if step == 2 and comm.rank in (1, 3):
            spoil(worker.replica, lambda piece: piece.grad.fill_(torch.nan), what)
        try:
            worker.step(batch)
        except NonFiniteLoss as e:
            comm.barrier()
            finite = all(bool(x.isfinite().all()) for x in worker.consensus())
            comm.barrier()
            return {"step": e.step, "words": str(e), "finite": finite}
    return {}


def test_who_is_left_out_and_that_a_round_had_too_few_is_said_once(caplog):
    with caplog.at_level(logging.WARNING, logger="manyhands"):
        ranks(jobs.train, 3, text_of("trimmed_mean"), problem(batches=(8, 2, 8, 2)), on="threads")
        ranks(jobs.train, 3, text_of("median"), problem(poison=(1, 1)), on="threads")
    said = [r.getMessage() for r in caplog.records if "backup_workers" in r.name]
    few = "too few workers were left in a round, or had samples, for trimmed_mean: it changed nothing"
    assert said == [
        f"step 1: {few} (said once)",
        "step 1: worker 1 has no finite loss and is left out of median (said once)",
    ]


def test_the_public_harness_accepts_rounds_over_gloo():
    check_strategy("backup_workers(backups=0)", workers=3, on="gloo")
    check_strategy(text_of("median"), workers=3, on="gloo")


# -- plans -------------------------------------------------------------------------------------------------------------


def setting(workers: int, transport: str = "shared") -> Setting:
    shares = transport == "shared"
    return Setting(workers, transport, shares, elementwise=True, stateless=True, one_sided=transport == "mpi")


def test_backup_workers_must_leave_somebody_to_wait_for():
    (refused,) = strategy_from("backup_workers(backups=2)").problems(setting(2))
    assert "backups=1" in refused.cure
    with pytest.raises(BadInput, match="from 0"):
        strategy_from("backup_workers(backups=-1)")


def test_a_rank_serves_rounds_over_gloo_and_memory_elsewhere():
    strategy = strategy_from("backup_workers")
    assert strategy.problems(setting(2, "gloo")) == strategy.problems(setting(2, "mpi")) == []
    assert (strategy.server_ranks(in_memory=False), strategy.server_ranks(in_memory=True)) == (1, 0)
    (refused,) = strategy.problems(setting(2, "nccl"))
    assert "gloo" in refused.cure


@pytest.mark.parametrize(("rule", "enough"), [("median", 1), ("trimmed_mean", 3), ("krum", 5), ("multi_krum(m=8)", 9)])
def test_a_rule_counts_only_those_who_are_waited_for(rule, enough):
    strategy = strategy_from(text_of(rule, backups=2))
    assert strategy.problems(setting(enough + 2)) == []
    for workers in range(3, enough + 2):
        (found,) = strategy.problems(setting(workers))
        assert f"{workers - 2} of {workers} workers waited for" in found.asked
        assert found.rule.endswith(f"so {enough} here.")
        assert f"workers={enough + 2}" in found.cure
        assert "fewer backups" in found.cure


def test_a_rule_is_nested_or_text_and_prints_one_way():
    strategy = strategy_from("backup_workers(aggregate=krum( 2 ))")
    assert strategy == BackupWorkers(aggregate="krum(f=2)")
    assert str(strategy) == "backup_workers(aggregate='krum(f=2)')"
    assert strategy_from(str(strategy)) == strategy
    assert not strategy.exact(setting(7))
    with pytest.raises((BadInput, UnknownName), match="Did you mean 'krum'"):
        strategy_from("backup_workers(aggregate=krumm)")
