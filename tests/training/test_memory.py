"""The peak of memory is that of a run, and not of all that went before in this process; nor that of its evaluations."""

import pytest
import torch

from manyhands.communication.transports.single import SingleCommunicator
from manyhands.data.dataset import Arrays
from manyhands.training import memory
from manyhands.training.evaluation import chunk_of, evaluate
from manyhands.training.sampler import Sampler


def test_a_peak_is_forgotten():
    before = memory.peak_B()
    held = torch.ones(30_000_000)
    assert memory.peak_B() >= before + 60_000_000
    del held
    memory.forget_peak()
    after = memory.peak_B()
    if after > before + 60_000_000:
        pytest.skip("this system does not let a process forget its peak, or the allocator keeps what it has freed")
    assert after < before + 60_000_000


def test_without_proc_the_system_is_asked(monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "_PROCESS", tmp_path / "none")
    memory.forget_peak()
    assert memory.peak_B() > 10_000_000


def test_an_evaluation_takes_as_many_samples_at_once_as_a_step_but_not_few():
    assert [chunk_of(samples) for samples in (1, 64, 200, 5000)] == [64, 64, 200, 500]
    assert [Sampler(100, batch_size=n, workers=3).largest for n in (9, 10, 1000)] == [3, 4, 34]


@pytest.mark.parametrize("chunk", [1, 7, 29, 500])
def test_how_many_at_once_changes_no_figure(chunk):
    torch.manual_seed(0)
    model = torch.nn.Linear(6, 4).double()
    data = Arrays(torch.randn(29, 6, dtype=torch.float64), torch.randint(4, (29,)))
    loss, comm = torch.nn.functional.cross_entropy, SingleCommunicator()
    expected = evaluate(model, loss, data, comm)
    assert evaluate(model, loss, data, comm, chunk=chunk) == pytest.approx(expected, rel=1e-12)
