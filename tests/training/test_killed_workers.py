"""A worker is killed in mid-run: strategies that wait for nobody go on without it, all others end at once."""

import json
import multiprocessing
import os
import signal
import time

import pytest
import torch
from torch import nn

import manyhands as mh
from manyhands.errors import NonFiniteLoss, WorkerFailed
from manyhands.training import checkpoint
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


def train(strategy: str, out, *, model: str = "doomed", workers: int = 3, epochs: int = 6) -> Result:
    return mh.train(
        mh.Task(f"{HERE}:{model}", data="digits", optimizer="sgd(lr=0.05)", batch_size=60, epochs=epochs),
        mh.Plan(strategy=strategy, workers=workers, transport="shared"),
        out=out,
        progress=False,
    )


def events(out, kind: str) -> list[dict]:
    return [e for e in map(json.loads, (out / "events.jsonl").read_text().splitlines()) if e["event"] == kind]


@pytest.mark.parametrize("strategy", GO_ON)
def test_the_others_go_on_and_it_is_logged_who_was_lost(tmp_path, strategy, caplog):
    result = train(strategy, tmp_path)
    assert result.summary.epochs == 6
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


def test_what_is_left_can_be_resumed_by_the_full_number(tmp_path):
    train("asynchronous", tmp_path)
    result = mh.train(
        mh.Task(f"{HERE}:doomed(at=-1)", data="digits", optimizer="sgd(lr=0.05)", batch_size=60, epochs=8),
        mh.Plan(strategy="asynchronous", workers=3, transport="shared"),
        out=tmp_path,
        resume=True,
        progress=False,
    )
    assert result.summary.epochs == 8


@pytest.mark.parametrize(
    ("strategy", "model"), [("synchronous", "doomed"), ("local", "doomed"), ("hogwild", "doomed(rank=0)")]
)
def test_where_the_others_cannot_go_on_the_run_ends_within_seconds_and_names_the_worker(tmp_path, strategy, model):
    began = time.monotonic()
    with pytest.raises(WorkerFailed, match=r"worker \d at step \d+ failed: its process was killed by SIGKILL"):
        train(strategy, tmp_path, model=model)
    assert time.monotonic() - began < 20  # the start is part of it; no deadline of 60 s was waited for


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


@pytest.mark.parametrize("strategy", [*GO_ON, "local", "gossip"])
def test_who_has_to_stop_meets_those_who_wait_at_the_end_of_the_epoch(tmp_path, strategy):
    with pytest.raises(NonFiniteLoss, match="of worker 1 is not finite at step 23"):
        train(strategy, tmp_path, model="diverging", epochs=2)
