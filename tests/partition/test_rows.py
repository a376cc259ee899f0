"""Sparse tables: only the rows that a batch touches travel and change, and the numbers are torch's."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from manyhands.communication.communicator import Communicator
from manyhands.contract import Batch
from manyhands.errors import BadInput, WorkerFailed
from manyhands.partition.data import DataReplica
from manyhands.plan import strategy_from
from manyhands.testing import run_ranks
from tests.consistency import jobs

ROWS, WIDTH = 40, 3
OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.3),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.3, lr_decay=0.1, initial_accumulator_value=0.1),
}


class Words(nn.Module):
    """Mean of word vectors, and a dense layer on top."""

    def __init__(self, *, sparse: bool = True, twice: bool = False) -> None:
        super().__init__()
        self.words = nn.EmbeddingBag(ROWS, WIDTH, mode="mean", sparse=sparse)
        self.last = nn.Linear(WIDTH, 2)
        self.twice = twice
        generator = torch.Generator().manual_seed(4)
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(torch.randn(p.shape, generator=generator))
        self.double()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.words(x)
        return self.last(h + self.words(x.flip(1) // 2) if self.twice else h)


def batches(steps: int, lo: int = 0, hi: int = ROWS) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(8)
    return [
        (torch.randint(lo, hi, (6, 4), generator=generator), torch.randint(2, (6,), generator=generator))
        for _ in range(steps)
    ]


def plain(optimizer: str, steps: int, **how) -> torch.Tensor:
    """torch alone, on a dense table."""
    with jobs.one_thread():
        model = Words(sparse=False, **how)
        opt = OPTIMIZERS[optimizer](model.parameters())
        for x, target in batches(steps):
            opt.zero_grad()
            F.cross_entropy(model(x), target).backward()
            opt.step()
    return jobs.vector(model.parameters())


def started(comm: Communicator, text: str, optimizer: str, **how):
    strategy = strategy_from(text)
    model = Words(**how)
    common = strategy.parameters == "common"
    opt = OPTIMIZERS[optimizer](model.parameters())
    replica = DataReplica(model, opt, F.cross_entropy, comm, common=common, sparse=strategy.sparse)
    return strategy.start(replica, comm)


def alone(comm: Communicator, text: str, optimizer: str, twice: bool) -> torch.Tensor:
    worker = started(comm, text, optimizer, twice=twice)
    widths = sorted(p.width for p in worker.replica.pieces)
    assert widths == ([0, WIDTH] if strategy_from(text).sparse else [0])
    for x, target in batches(12):
        worker.step(Batch(x, target, len(target), len(target)))
    worker.meet()
    worker.finish()
    return jobs.vector(worker.replica.model.parameters())


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize(
    "text",
    [
        "hogwild",
        "hogwild(lock='coordinate')",
        "asynchronous",
        "asynchronous(servers=3)",
        "synchronous",
        "ssp",
        "synchronous(compress=top_k)",
    ],
)
def test_a_worker_with_a_sparse_table_is_torch_with_a_dense_one(text, optimizer):
    """1e-12: coalescing adds a row's contributions in another order."""
    (mine,) = run_ranks(alone, 1, on="single", args=(text, optimizer, False))
    assert (mine - plain(optimizer, 12)).abs().max() < 1e-12


@pytest.mark.parametrize("text", ["hogwild", "asynchronous(servers=2)"])
def test_a_table_that_is_looked_up_twice_gets_both_gradients(text):
    (mine,) = run_ranks(alone, 1, on="single", args=(text, "sgd", True))
    assert (mine - plain("sgd", 12, twice=True)).abs().max() < 1e-12


def test_locks_for_rows_refuse_a_second_lookup_in_a_step():
    with pytest.raises((BadInput, WorkerFailed), match="two lookups"):
        run_ranks(alone, 1, on="single", args=("hogwild(lock='coordinate')", "sgd", True))


def momentum(comm: Communicator) -> list[int]:
    model = Words()
    made = []
    for opt in (
        torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
        torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.1),
        torch.optim.Adam(model.parameters()),
    ):
        made.append([p.width for p in DataReplica(model, opt, None, comm, common=False, sparse=True).pieces])
    return made


def test_an_optimizer_that_moves_untouched_rows_gets_a_dense_table():
    assert run_ranks(momentum, 1, on="single")[0] == [[0]] * 3


def touched(comm: Communicator, text: str) -> dict:
    worker = started(comm, text, "sgd")
    start = worker.replica.model.words.weight.detach().clone()
    comm.barrier()
    x = torch.tensor([[2, 5, 5, 7], [30 + comm.rank, 2, 7, 7]])
    before = comm.counters.sent_B()
    worker.step(Batch(x, torch.tensor([0, 1]), 2, 2 * comm.size))
    sent_B = comm.counters.sent_B() - before
    worker.meet()
    worker.finish()
    moved = (worker.replica.model.words.weight.detach() - start).abs().sum(1).nonzero().flatten()
    comm.barrier()
    return {"moved": moved.tolist(), "sent_B": sent_B}


@pytest.mark.parametrize("on", ["threads", "shared", "simulated"])
@pytest.mark.parametrize("text", ["hogwild", "hogwild(lock='coordinate')", "asynchronous(servers=2)"])
def test_only_touched_rows_change_and_only_they_travel(text, on):
    results = run_ranks(touched, 2, on=on, args=(text,))
    for result in results:
        assert result["moved"] == [2, 5, 7, 30, 31]
        dense_B = (WIDTH * 2 + 2) * 8  # of the last layer
        rows_B = 4 * (8 + WIDTH * 8)  # four rows, each with its number
        assert result["sent_B"] == (2 * (dense_B + rows_B) if text.startswith("asynchronous") else 0)


def apart(comm: Communicator, text: str) -> torch.Tensor:
    """Each worker has rows of its own, and there is nothing dense."""
    table = nn.EmbeddingBag(24, 8, mode="sum", sparse=True).double()
    with torch.no_grad():
        table.weight.copy_(torch.arange(24.0 * 8).view(24, 8) / 100)
    opt = torch.optim.SGD(table.parameters(), lr=0.5)
    replica = DataReplica(table, opt, F.mse_loss, comm, common=True, sparse=True)
    worker = strategy_from(text).start(replica, comm)
    comm.barrier()
    per = 24 // comm.size
    for step in range(60):
        row = torch.tensor([[comm.rank * per + step % per]])
        worker.step(Batch(row, torch.full((1, 8), float(step), dtype=torch.float64), 1, comm.size))
    worker.meet()
    worker.finish()
    result = table.weight.detach().clone()
    comm.barrier()
    return result


@pytest.mark.parametrize("on", ["threads", "shared", "simulated"])
@pytest.mark.parametrize("lock", ["none", "one", "coordinate", "round_robin"])
def test_hogwild_on_disjoint_supports_is_serial_sgd_bit_for_bit(on, lock):
    with jobs.one_thread():
        table = nn.EmbeddingBag(24, 8, mode="sum").double()
        with torch.no_grad():
            table.weight.copy_(torch.arange(24.0 * 8).view(24, 8) / 100)
        opt = torch.optim.SGD(table.parameters(), lr=0.5)
        for rank in range(3):
            for step in range(60):
                opt.zero_grad()
                target = torch.full((1, 8), float(step), dtype=torch.float64)
                F.mse_loss(table(torch.tensor([[rank * 8 + step % 8]])), target).backward()
                opt.step()
    for result in run_ranks(apart, 3, on=on, args=(f"hogwild(lock={lock!r})",)):
        assert torch.equal(result, table.weight)


def together(comm: Communicator, text: str, optimizer: str) -> tuple[torch.Tensor, list[int]]:
    worker = started(comm, text, optimizer)
    sent_B = []
    for x, target in batches(12):
        lo, hi = jobs.cut(len(target), comm.size, "uneven")[comm.rank]
        before = comm.counters.sent_B("step")
        worker.step(Batch(x[lo:hi], target[lo:hi], hi - lo, len(target)))
        sent_B.append(comm.counters.sent_B("step") - before)
    return jobs.vector(worker.replica.model.parameters()), sent_B


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("on", ["simulated", "shared"])
def test_rows_that_anybody_has_looked_up_are_averaged_whole_under_a_compressor(on, optimizer):
    """The dense layer is sent without loss; the table as the rows of all three workers, each with its number."""
    results = run_ranks(together, 3, on=on, args=("synchronous(compress=entropy(of='none'))", optimizer))
    assert (results[0][0] - plain(optimizer, 12)).abs().max() < 1e-12
    assert all(torch.equal(mine, results[0][0]) for mine, _ in results)
    dense_B = 4 * 8 * 8 + 64  # at most: 8 values gathered from three workers, with what the code adds
    rows_B = 2 * 6 * 4 * (4 + WIDTH * 8)  # at most: 24 rows are looked up, nobody twice
    assert all(0 < sent_B <= dense_B + rows_B for _, sent in results for sent_B in sent)
