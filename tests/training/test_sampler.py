"""The order of samples: one permutation of (seed, epoch), whoever reads it."""

import itertools
import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from manyhands.errors import BadInput
from manyhands.training.sampler import (
    START,
    Cursor,
    Sampler,
    evaluation_shares,
    order,
    shares,
    steps_per_epoch,
    worker_seed,
)

sizes = st.integers(1, 400)
batch_sizes = st.integers(1, 450)
worker_counts = st.integers(1, 9)
seeds = st.integers(-(2**70), 2**70)


def batches(n, batch_size, workers, rank, seed, cursor=START, **length):
    return Sampler(n, batch_size=batch_size, workers=workers, rank=rank, seed=seed).batches(cursor, **length)


def global_batches(n, batch_size, workers, seed, cursor=START, **length):
    """(cursor after, the step's samples in rank order) as all workers see it, checked to agree between them."""
    each = [list(batches(n, batch_size, workers, rank, seed, cursor, **length)) for rank in range(workers)]
    steps = []
    for of_step in zip(*each, strict=True):
        assert len({(share.before, share.after, share.global_count) for share in of_step}) == 1
        samples = torch.cat([share.indices for share in of_step]).tolist()
        assert len(samples) == of_step[0].global_count
        steps.append((of_step[0].after, samples))
    return steps


@given(st.integers(0, 1000), st.integers(1, 40))
def test_shares_are_contiguous_and_differ_by_at_most_one(count, workers):
    found = shares(count, workers)
    assert len(found) == workers
    assert found[0][0] == 0
    assert found[-1][1] == count
    assert all(a[1] == b[0] for a, b in itertools.pairwise(found))
    lengths = [hi - lo for lo, hi in found]
    assert max(lengths) - min(lengths) <= 1
    assert evaluation_shares(count, workers) == found


@given(sizes, batch_sizes, worker_counts, seeds)
def test_each_sample_once_per_epoch(n, batch_size, workers, seed):
    steps = global_batches(n, batch_size, workers, seed, epochs=2)
    seen = [sample for _, samples in steps for sample in samples]
    assert sorted(seen[:n]) == sorted(seen[n:]) == list(range(n))
    assert len(steps) == 2 * steps_per_epoch(n, batch_size)
    assert steps[-1][0] == Cursor(2, 0, len(steps))
    assert {len(samples) for _, samples in steps[: n // batch_size]} <= {batch_size}


@given(sizes, batch_sizes, worker_counts, seeds)
def test_the_worker_count_cuts_a_batch_and_never_changes_it(n, batch_size, workers, seed):
    assert global_batches(n, batch_size, workers, seed, epochs=2) == global_batches(n, batch_size, 1, seed, epochs=2)


@given(sizes, batch_sizes, worker_counts, seeds)
def test_shares_of_a_step_differ_by_at_most_one(n, batch_size, workers, seed):
    each = [list(batches(n, batch_size, workers, rank, seed, epochs=1)) for rank in range(workers)]
    for of_step in zip(*each, strict=True):
        lengths = [len(share.indices) for share in of_step]
        assert max(lengths) - min(lengths) <= 1
        assert all(share.indices.dtype == torch.int64 for share in of_step)


@given(sizes, st.lists(st.tuples(batch_sizes, worker_counts, st.integers(0, 30)), min_size=1, max_size=5), seeds)
def test_each_sample_once_although_the_run_resumes_on_other_worker_counts_and_batch_sizes(n, lives, seed):
    cursor, seen = START, []
    for batch_size, workers, more_steps in [*lives, (7, 2, None)]:
        length = {"epochs": 20} if more_steps is None else {"steps": cursor.step + more_steps}
        for after, samples in global_batches(n, batch_size, workers, seed, cursor, **length):
            assert after.step == cursor.step + 1
            cursor = after
            seen += samples
            if cursor.epoch == 20:
                break
        if cursor.epoch >= 20:
            break
    expected = [sample for epoch in range(cursor.epoch) for sample in order(n, seed, epoch).tolist()]
    assert seen[: 20 * n] == expected[: 20 * n]


@given(sizes, batch_sizes, worker_counts, seeds, st.integers(0, 60))
def test_resuming_continues_as_if_nothing_had_happened(n, batch_size, workers, seed, stop):
    whole = global_batches(n, batch_size, workers, seed, steps=60)
    cursor = whole[stop - 1][0] if stop else START
    assert whole[stop:] == global_batches(n, batch_size, workers, seed, cursor, steps=60)


def test_the_order_of_version_one():
    """Golden: a checkpoint's cursor means these samples. Should torch ever shuffle otherwise, we hear of it here."""
    assert order(10, 0, 0).tolist() == [8, 9, 4, 5, 0, 1, 6, 3, 7, 2]
    assert order(10, 0, 1).tolist() == [6, 7, 2, 4, 5, 0, 3, 1, 9, 8]
    assert order(10, 1, 0).tolist() == [9, 2, 7, 0, 6, 3, 4, 5, 8, 1]
    assert worker_seed(0, 0, 0) == 8075438487320854187


def test_seeds_that_share_their_low_32_bits_shuffle_differently():
    assert order(100, 5, 0).tolist() != order(100, 5 + 2**32, 0).tolist()


def test_the_next_seed_does_not_repeat_the_next_epoch():
    assert order(100, 0, 1).tolist() != order(100, 1, 0).tolist()


def test_the_global_generator_is_left_alone():
    torch.manual_seed(3)
    state = torch.get_rng_state()
    list(batches(50, 7, 2, 1, 0, epochs=3))
    worker_seed(0, 1, 2)
    assert torch.equal(state, torch.get_rng_state())


@given(seeds, st.integers(0, 1000))
def test_workers_of_an_epoch_draw_different_numbers(seed, epoch):
    low = {worker_seed(seed, rank, epoch) % 2**32 for rank in range(64)}
    assert len(low) == 64
    assert all(0 <= worker_seed(seed, rank, epoch) < 2**63 for rank in range(4))
    assert worker_seed(seed, 0, epoch) != worker_seed(seed, 0, epoch + 1)


def test_a_batch_larger_than_the_data_set_is_one_step_an_epoch():
    assert [share.global_count for share in batches(10, 10**15, 3, 0, 0, epochs=2)] == [10, 10]


def test_more_workers_than_samples_leaves_empty_shares():
    steps = list(batches(3, 2, 4, 3, 0, epochs=1))
    assert [len(share.indices) for share in steps] == [0, 0]
    assert [share.global_count for share in steps] == [2, 1]


def test_no_steps_left_gives_nothing():
    assert list(batches(10, 5, 1, 0, 0, Cursor(2, 0, 4), epochs=2)) == []
    assert list(batches(10, 5, 1, 0, 0, Cursor(2, 0, 4), steps=4)) == []


@pytest.mark.parametrize(
    ("arguments", "length", "message"),
    [
        ((0, 5, 1, 0, 0), {"epochs": 1}, "empty"),
        ((10, 0, 1, 0, 0), {"epochs": 1}, "batch_size=0"),
        ((10, 5, 2, 2, 0), {"epochs": 1}, "rank 2 of 2"),
        ((10, 5, 1, 0, 0), {}, "exactly one"),
        ((10, 5, 1, 0, 0), {"epochs": 1, "steps": 1}, "exactly one"),
        ((10, 5, 1, 0, 0, Cursor(1, 20, 9)), {"epochs": 3}, "another data set"),
        ((10, 5, 1, 0, 0, Cursor(0, -1, 0)), {"epochs": 3}, "negative"),
    ],
)
def test_what_cannot_work_is_refused_at_once(arguments, length, message):
    with pytest.raises(BadInput, match=message):
        batches(*arguments, **length)


def test_a_step_costs_microseconds():
    """About 1.3 µs on an idle core, half of it the slice; the bound allows for a busy machine."""
    sampler = Sampler(100_000, batch_size=50, workers=2, rank=1, seed=0)
    next(sampler.batches(epochs=1))
    fastest = min(_seconds(sampler) for _ in range(5))
    assert fastest / 2000 < 30e-6


def _seconds(sampler):
    began = time.perf_counter()
    for _ in sampler.batches(epochs=1):
        pass
    return time.perf_counter() - began
