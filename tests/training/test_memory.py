"""The peak of memory is that of a run, and not of all that went before in this process."""

import pytest
import torch

from manyhands.training import memory


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
