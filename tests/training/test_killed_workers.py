"""A worker is killed in mid-run: strategies that can do without it go on, all others end at once."""

import json
import multiprocessing
import os
import signal
import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import manyhands as mh
from manyhands.communication import graphs
from manyhands.communication.mailbox import Mailbox
from manyhands.communication.transports.shared import SharedCommunicator
from manyhands.communication.transports.torch_distributed import GlooCommunicator
from manyhands.consistency.gossip import Gossip, left_of
from manyhands.consistency.parameter_server.requests import PAYLOAD
from manyhands.consistency.push_sum import PushSum, kept
from manyhands.errors import DeadlineExceeded, NonFiniteLoss, PeerLost, WorkerFailed
from manyhands.training import checkpoint
from manyhands.training.team import team
from manyhands.verbs import Result

HERE = "tests.training.test_killed_workers"
GO_ON = [
    "hogwild",
    "asynchronous",
    "asynchronous(servers=2)",
    "downpour(fetch=2, push=3)",
    "ssp(staleness=2)",
    "asynchronous_gossip",
]
#: Whose servers are those of "asynchronous", where the others meet them in the same way.
SERVED_ALIKE = ("asynchronous(servers=2)", "downpour(fetch=2, push=3)", "ssp(staleness=2)")
#: What other tests of this file run to its end on shared memory without a worker.
LOST_ELSEWHERE = ("asynchronous", "gossip")
CASES = [
    *(
        pytest.param(s, "shared", marks=[pytest.mark.slow] if s in (*SERVED_ALIKE, *LOST_ELSEWHERE) else [])
        for s in (*GO_ON, "gossip")
    ),
    pytest.param("ssp(staleness=2)", "gloo"),
    pytest.param("push_sum", "gloo"),
    *(
        pytest.param(strategy, transport, marks=pytest.mark.slow)
        for transport, strategies in {
            "shared": ["push_sum", "asynchronous_gossip(graph=random_regular)"],
            "gloo": ["gossip", "asynchronous", "asynchronous(servers=2)", "downpour(fetch=2, push=3)"],
        }.items()
        for strategy in [
            *strategies,
            "gossip(graph=complete)",
            "gossip(graph=exponential)",
            "gossip(graph=one_peer, every=2)",
            "gossip(graph=random_regular)",
            "push_sum(graph=exponential)",
            "push_sum(graph=directed_ring)",
            "push_sum(graph=random_directed)",
        ]
    ),
]


class Doomed(nn.Module):
    """In the processes of some workers it kills its own in a forward pass, as ``kill -9`` would."""

    def __init__(self, ranks: tuple[int, ...] = (1,), at: int = 30) -> None:
        super().__init__()
        self.layer = nn.Linear(64, 10)
        name = multiprocessing.current_process().name
        self.left = at if any(name == f"manyhands-worker-{rank}" for rank in ranks) else -1

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.left -= 1 if self.training else 0
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return self.layer(x.flatten(1))


def doomed(rank: int = 1, at: int = 30) -> Doomed:
    return Doomed((rank,), at)


def two_doomed(at: int = 30) -> Doomed:
    return Doomed((1, 2), at)


def one_after_the_other() -> Doomed:
    second = multiprocessing.current_process().name == "manyhands-worker-2"
    return Doomed((1, 2), 70 if second else 30)


def doomed_at_send() -> Doomed:
    return DoomedAtSend()


class DoomedAtSend(Doomed):
    """It dies with the first half of a message under way: a gradient's announcement, or a piece of its parameters."""

    def __init__(self) -> None:
        super().__init__(at=-1)
        self.left = 30 if multiprocessing.current_process().name == "manyhands-worker-1" else -1

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.left -= 1
        if self.left == 0:
            GlooCommunicator._send = half_a_request(GlooCommunicator._send)
            Mailbox._push = half_a_message(Mailbox._push)
        return self.layer(x.flatten(1))


def half_a_request(send):
    def sending(comm, x, to, tag):
        if tag == PAYLOAD:
            os.kill(os.getpid(), signal.SIGKILL)
        return send(comm, x, to, tag)

    return sending


def half_a_message(push):
    def pushing(mailbox, to, queue):
        queue[0].body = queue[0].body[: len(queue[0].body) // 2]
        push(mailbox, to, queue)
        os.kill(os.getpid(), signal.SIGKILL)

    return pushing


def train(
    strategy: str,
    out,
    *,
    model: str = "doomed",
    workers: int = 3,
    epochs: int = 6,
    transport: str = "shared",
    resume: bool = False,
    timeout_s: float = 60.0,
) -> Result:
    return mh.train(
        mh.Task(f"{HERE}:{model}", data="digits", optimizer="sgd(lr=0.05)", batch_size=60, epochs=epochs),
        mh.Plan(strategy=strategy, workers=workers, transport=transport, timeout_s=timeout_s),
        out=out,
        progress=False,
        resume=resume,
    )


def events(out, kind: str) -> list[dict]:
    return [e for e in map(json.loads, (out / "events.jsonl").read_text().splitlines()) if e["event"] == kind]


@pytest.mark.parametrize(("strategy", "transport"), CASES)
def test_the_others_go_on_and_it_is_logged_who_was_lost(tmp_path, strategy, transport, caplog):
    result = train(strategy, tmp_path, transport=transport)
    assert result.summary.epochs == len(result.history) == 6
    assert result.summary.test_accuracy > 0.8
    (lost,) = events(tmp_path, "workers_lost")
    assert (lost["ranks"], lost["left"]) == ([1], [0, 2])
    assert "worker 1 is lost (its process was killed by SIGKILL); the others go on" in caplog.text
    assert len(result.summary.wait_s_by_worker) == 2
    stored = checkpoint.load_newest(tmp_path / "checkpoints")
    for name, value in result.model.state_dict().items():
        assert torch.equal(value, stored.model[name])


def test_all_but_the_first_may_be_lost(tmp_path):
    result = train("hogwild", tmp_path, model="two_doomed")
    assert result.summary.epochs == 6
    assert sorted(r for e in events(tmp_path, "workers_lost") for r in e["ranks"]) == [1, 2]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("strategy", "transport"), [("gossip", "shared"), ("push_sum", "gloo"), ("ssp", "gloo"), ("hogwild", "shared")]
)
def test_one_after_the_other_may_be_lost_until_worker_0_is_alone(tmp_path, strategy, transport):
    result = train(strategy, tmp_path, model="one_after_the_other", transport=transport)
    assert result.summary.epochs == 6
    assert [(e["ranks"], e["left"]) for e in events(tmp_path, "workers_lost")] == [([1], [0, 2]), ([2], [0])]


@pytest.mark.parametrize(
    ("strategy", "transport"),
    [
        ("gossip", "shared"),
        pytest.param("asynchronous", "gloo", marks=pytest.mark.slow),
        pytest.param("ssp(cached=false)", "gloo", marks=pytest.mark.slow),
    ],
)
def test_what_was_sent_by_half_is_not_received(tmp_path, strategy, transport):
    result = train(strategy, tmp_path, model="doomed_at_send", transport=transport)
    assert result.summary.test_accuracy > 0.8
    (lost,) = events(tmp_path, "workers_lost")
    assert lost["ranks"] == [1]


@pytest.mark.parametrize(
    ("strategy", "transport", "workers"),
    [
        ("asynchronous", "shared", 3),
        *(
            pytest.param(strategy, transport, workers, marks=pytest.mark.slow)
            for strategy, transport in [
                ("downpour", "gloo"),
                ("ssp", "gloo"),
                ("gossip", "gloo"),
                ("push_sum", "shared"),
            ]
            for workers in (2, 3)
        ),
    ],
)
def test_what_is_left_can_be_resumed_by_as_many_and_by_the_full_number(tmp_path, strategy, transport, workers):
    train(strategy, tmp_path, transport=transport)
    result = train(
        strategy, tmp_path, model="doomed(at=-1)", epochs=8, workers=workers, transport=transport, resume=True
    )
    assert result.summary.epochs == 8
    assert len(result.summary.wait_s_by_worker) == workers


@pytest.mark.parametrize(
    ("strategy", "model", "transport"),
    [
        ("synchronous", "doomed", "shared"),
        pytest.param("local", "doomed", "shared", marks=pytest.mark.slow),
        ("hogwild", "doomed(rank=0)", "shared"),
        ("local", "doomed", "gloo"),
        *(
            pytest.param(strategy, model, transport, marks=pytest.mark.slow)
            for transport in ("shared", "gloo")
            for strategy, model in [
                ("gossip(graph=random_regular, degree=2)", "doomed"),
                ("push_sum", "doomed(rank=0)"),
                ("synchronous", "doomed(rank=2)"),
                ("ssp", "doomed(rank=0)"),
            ]
        ),
    ],
)
def test_where_the_others_cannot_go_on_the_run_ends_within_seconds_and_names_the_worker(
    tmp_path, strategy, model, transport
):
    began = time.monotonic()
    with pytest.raises(WorkerFailed, match=r"worker \d at step \d+ failed: its process was killed by SIGKILL"):
        train(strategy, tmp_path, model=model, transport=transport)
    assert time.monotonic() - began < 20  # the start is part of it; no deadline of 60 s was waited for


class DoomedBesideDiverging(Doomed):
    """Worker 1 dies in step 9, and the loss of worker 2 is not finite in a later one."""

    def __init__(self, step: int) -> None:
        super().__init__(at=10)
        self.diverges = multiprocessing.current_process().name == "manyhands-worker-2"
        self.step, self.passes = step, 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.passes += 1 if self.training else 0
        return super().forward(x) * (float("nan") if self.diverges and self.passes == self.step + 1 else 1.0)


def doomed_beside_diverging(step: int) -> Doomed:
    return DoomedBesideDiverging(step)


@pytest.mark.slow
@pytest.mark.parametrize("transport", ["shared", "gloo"])
@pytest.mark.parametrize(
    ("strategy", "step"),  # an epoch is 24 steps; asynchronous workers may be some steps apart
    [*((s, step) for s in ("gossip", "push_sum") for step in (12, 30)), ("asynchronous", 30), ("ssp", 30)],
)
def test_a_loss_that_is_not_finite_still_stops_those_who_are_left(tmp_path, strategy, transport, step):
    with pytest.raises(NonFiniteLoss, match=f"is not finite at step {step}"):
        train(
            strategy, tmp_path, model=f"doomed_beside_diverging(step={step})", workers=5, transport=transport, epochs=2
        )
    assert [e["ranks"] for e in events(tmp_path, "workers_lost")] == [[1]]


@pytest.mark.slow
@pytest.mark.parametrize("transport", ["shared", "gloo"])
@pytest.mark.parametrize("strategy", ["gossip", "push_sum"])
def test_where_the_news_cross_a_loss_the_run_ends_by_the_deadline(tmp_path, strategy, transport):
    """The gap of docs/strategies.md: worker 1 dies in the step in which worker 2's loss is not finite."""
    with pytest.raises((NonFiniteLoss, DeadlineExceeded), match=r"at step|waited"):
        train(
            strategy, tmp_path, model="doomed_beside_diverging(step=9)", workers=5, transport=transport, timeout_s=5.0
        )


# -- the group, without a strategy -------------------------------------------------------------------------------------


def a_loss_in_the_group(member, *, again: bool = False):
    """Rank 1 dies, and the others find each other without it; ``again``: rank 2, too, before they have."""
    comm = member.comm
    if comm.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    x = torch.ones(3)
    with pytest.raises(PeerLost):
        comm.recv(x, 1)
    assert comm.goes_on_without(1)
    assert not comm.goes_on_without(comm.rank)
    lost = comm.agree_on_lost()
    if again and comm.rank == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    group = comm.without(lost)
    assert again or group.agree_on_lost() == []
    group.all_reduce(x).wait()
    return [lost, group.rank, group.size, x.tolist()]


@pytest.mark.parametrize("transport", [pytest.param("shared", marks=pytest.mark.slow), "gloo"])
def test_those_who_are_left_are_a_group_of_their_own(transport):
    with team(transport, 4) as crew:
        results = crew.run(f"{HERE}:a_loss_in_the_group", may_lose=range(1, 4))
    assert results == [[[1], rank, 3, [3.0] * 3] if rank is not None else None for rank in (0, None, 1, 2)]


def a_second_loss(member):
    return a_loss_in_the_group(member, again=True)


def a_loss_while_they_agree(member):
    """Rank 2 is there when the others begin to agree, and dies before they have."""
    comm = member.comm
    if comm.rank == 2:
        SharedCommunicator._said_to_be = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
        GlooCommunicator._message = dies_before("recv", GlooCommunicator._message)
    comm.agree_on_lost()
    ranks = torch.full((comm.size,), comm.rank)
    comm.all_gather(ranks, [(p, p + 1) for p in range(comm.size)]).wait()
    return ranks.tolist()


def dies_before(doing, message):
    def passing(comm, what, *args, **kwargs):
        if what == doing:
            os.kill(os.getpid(), signal.SIGKILL)
        message(comm, what, *args, **kwargs)

    return passing


@pytest.mark.parametrize(
    ("job", "transport"),
    [
        ("a_loss_while_they_agree", "shared"),
        pytest.param("a_loss_while_they_agree", "gloo", marks=pytest.mark.slow),
        pytest.param("a_second_loss", "shared", marks=pytest.mark.slow),
        pytest.param("a_second_loss", "gloo", marks=pytest.mark.slow),
    ],
)
def test_who_dies_while_the_others_meet_ends_them_at_once(job, transport):
    began = time.monotonic()
    with team(transport, 4) as crew, pytest.raises(WorkerFailed, match="killed by SIGKILL"):
        crew.run(f"{HERE}:{job}", may_lose=range(1, 4))
    assert time.monotonic() - began < 20


# -- what becomes of the shares ----------------------------------------------------------------------------------------

BOTH_WAYS = ["ring", "complete", "random_regular", "torus", "matching"]
ONE_WAY = ["one_peer", "exponential", "directed_ring", "random_directed"]


@st.composite
def losses(draw, names):
    """A graph over so many, its seed, a round of it, and some of its ranks."""
    name, size = draw(st.sampled_from(names)), draw(st.integers(2, 13))
    if graphs.objection(name, size) is not None:
        size = 12
    lost = draw(st.sets(st.integers(0, size - 1), max_size=size - 1))
    return name, size, draw(st.integers(0, 5)), draw(st.integers(0, 11)), lost


def round_of(name, size, seed, turn, lost):
    rounds = graphs.build(name, size, seed=seed)
    return rounds[turn % len(rounds)], lost


def rows_left(mixing, lost):
    left = [p for p in range(mixing.size) if p not in lost]
    w = torch.zeros(mixing.size, mixing.size, dtype=torch.float64)
    for q in left:
        for p, share in left_of(mixing.taken(q), q, lost).items():
            w[q, p] = share
    return w[left][:, left]


@given(losses(BOTH_WAYS))
def test_what_is_left_of_a_graph_that_goes_both_ways_is_doubly_stochastic(case):
    w = rows_left(*round_of(*case))
    ones = torch.ones(len(w), dtype=torch.float64)
    assert (w >= 0).all()
    assert torch.equal(w, w.T)
    torch.testing.assert_close(w.sum(0), ones, rtol=0, atol=1e-12)
    torch.testing.assert_close(w.sum(1), ones, rtol=0, atol=1e-12)


@given(losses(BOTH_WAYS + ONE_WAY[:3]))
def test_what_a_worker_is_left_with_in_gossip_is_a_mean(case):
    w = rows_left(*round_of(*case))
    assert (w >= 0).all()
    torch.testing.assert_close(w.sum(1), torch.ones(len(w), dtype=torch.float64), rtol=0, atol=1e-12)


@given(losses(ONE_WAY))
def test_push_sum_keeps_what_it_cannot_send(case):
    mixing, lost = round_of(*case)
    for p in set(range(mixing.size)) - lost:
        share = mixing.shares[p][p]
        there = sum(q not in lost for q in mixing.receivers(p))
        assert share * (kept(mixing, p, lost) + there) == pytest.approx(1.0, abs=1e-12)


@given(st.sampled_from([Gossip, PushSum]), st.data(), st.integers(1, 13))
def test_who_says_that_it_goes_on_has_a_graph_for_fewer(kind, data, size):
    strategy = kind(graph=data.draw(st.sampled_from(kind.choices)))
    assert not strategy.survives or strategy.rounds(size)[0].size == size


class Diverging(nn.Module):
    """Worker 1 is late, and its loss is not finite in the last step of an epoch, when the others wait at its end."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(64, 10)
        self.late = multiprocessing.current_process().name == "manyhands-worker-1"
        self.passes = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.passes += 1
        if self.late and self.passes == 24:  # 1,437 samples in batches of 60
            time.sleep(0.3)
            return self.layer(x.flatten(1)) * float("nan")
        return self.layer(x.flatten(1))


def diverging() -> Diverging:
    return Diverging()


#: One of each family: common memory, servers, single peers, all together.
WAITING = ("hogwild", "ssp(staleness=2)", "asynchronous_gossip", "local")


@pytest.mark.parametrize(
    "strategy",
    [s if s in WAITING else pytest.param(s, marks=pytest.mark.slow) for s in (*GO_ON, "local", "gossip")],
)
def test_who_has_to_stop_meets_those_who_wait_at_the_end_of_the_epoch(tmp_path, strategy):
    with pytest.raises(NonFiniteLoss, match="of worker 1 is not finite at step 23"):
        train(strategy, tmp_path, model="diverging", epochs=2)
