"""The data that needs no file: it is what it says, and it can be learned."""

import gc
import hashlib
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

import manyhands.data.digits as module
from manyhands.catalogue import Reference
from manyhands.data import datasets, load
from manyhands.data.dataset import Arrays, Splits
from manyhands.errors import BadInput
from manyhands.grammar import parse_call

FILE = Path(module.__file__).with_name("digits.npz")


def test_more_samples_than_memory_holds_are_refused():
    with pytest.raises(BadInput, match="do not fit into memory"):
        load("synthetic(samples=3000000000000)")


def test_threads_may_read_descriptions_and_data_at_once():
    """Building a syntax tree in two threads at once raises SystemError in some releases of CPython (gh-106905)."""
    before = sys.getswitchinterval(), gc.get_threshold()

    def turn(phase: str, info: dict[str, int]) -> None:  # Python in the middle of a tree: another thread's turn
        sum(range(20))

    def read(data: bool) -> None:
        for _ in range(20):
            load("digits(limit=10)") if data else parse_call("one(of=[1, 2, 3])")

    try:
        sys.setswitchinterval(1e-6)
        gc.set_threshold(3)
        gc.callbacks.append(turn)
        with ThreadPoolExecutor(4) as threads:
            for reading in [threads.submit(read, data=i % 2 == 0) for i in range(4)]:
                reading.result()
    finally:
        gc.callbacks.remove(turn)
        gc.set_threshold(*before[1])
        sys.setswitchinterval(before[0])


def nearest_mean_accuracy(splits: Splits) -> float:
    """Of the simplest classifier there is: the class whose training mean is nearest."""
    assert isinstance(splits.train, Arrays)
    assert isinstance(splits.test, Arrays)
    x, y = splits.train.inputs.flatten(1), splits.train.target
    means = torch.stack([x[y == k].mean(0) for k in range(splits.classes or 0)])
    guess = torch.cdist(splits.test.inputs.flatten(1), means).argmin(1)
    return float((guess == splits.test.target).double().mean())


def test_the_embedded_file_is_the_one_that_was_checked_against_its_source():
    assert hashlib.sha256(FILE.read_bytes()).hexdigest() == (
        "b2dab7b501728c22e9119ad76740b2e17c77a231e42d1e592380d90886f1a05e"
    )
    with np.load(FILE, allow_pickle=False) as stored:  # of images and labels as bytes, whatever the container
        content = stored["images"].tobytes() + stored["labels"].tobytes()
    assert hashlib.sha256(content).hexdigest() == "87ff0c9e40dc7e2c0e34e7257799c2e3f3aec1a016363bb11cad869ec428a826"


def test_the_attribution_travels_with_the_file():
    for text in (FILE.with_name("NOTICE").read_text(), module.__doc__ or ""):
        assert "CC BY 4.0" in text
        assert "Alpaydin" in text


def test_digits_are_1437_and_360_scans_of_8_by_8():
    splits = load("digits")
    assert isinstance(splits.train, Arrays)
    x, y = splits.train.inputs, splits.train.target
    assert (x.shape, x.dtype, x.is_contiguous(), y.dtype) == ((1437, 1, 8, 8), torch.float32, True, torch.int64)
    assert (len(splits.test or ()), splits.inputs, splits.classes) == (360, (1, 8, 8), 10)
    assert (float(x.min()), float(x.max())) == (0.0, 1.0)
    assert y[:10].tolist() == list(range(10))


def test_digits_and_clusters_can_be_learned():
    assert nearest_mean_accuracy(load("digits")) > 0.8
    assert nearest_mean_accuracy(load("synthetic(samples=5000)")) > 0.95
    assert nearest_mean_accuracy(load("synthetic(samples=5000, noise=5.0)")) < 0.5


def test_synthetic_data_has_the_shape_asked_for_and_equal_classes():
    splits = load("synthetic(samples=90, inputs=(3, 5, 4), classes=6, test=12)")
    assert isinstance(splits.train, Arrays)
    assert splits.train.inputs.shape == (90, 3, 5, 4)
    assert splits.train.target.bincount().tolist() == [15] * 6
    assert (len(splits.test or ()), splits.inputs, splits.classes) == (12, (3, 5, 4), 6)


def test_more_classes_than_samples_need_no_centres_of_their_own():
    splits = load("synthetic(samples=6, inputs=(1000, 1000), classes=1000000, test=2)")  # 4 TB, had each class one
    assert isinstance(splits.train, Arrays)
    assert sorted(splits.train.target.tolist()) == list(range(6))
    assert splits.classes == 1_000_000


def test_synthetic_data_follows_its_seed_alone():
    state = torch.random.get_rng_state()
    one, same, other = (load(f"synthetic(samples=50, seed={s})").train for s in (1, 1, 2))
    assert torch.equal(torch.random.get_rng_state(), state)
    numbers = torch.arange(50)
    assert torch.equal(one.rows(numbers)[0], same.rows(numbers)[0])
    assert not torch.equal(one.rows(numbers)[0], other.rows(numbers)[0])


def test_limit_keeps_the_first_training_samples():
    few, whole = load("digits(limit=20)"), load("digits")
    assert len(few.train) == 20
    assert len(few.test or ()) == 360
    numbers = torch.arange(20)
    assert torch.equal(few.train.rows(numbers)[0], whole.train.rows(numbers)[0])


@pytest.mark.parametrize("name", datasets)
def test_every_data_set_says_where_it_was_published(name: str):
    paper = getattr(datasets.load(name), "paper", None)
    assert isinstance(paper, Reference) or name in ("synthetic", "boolean_trees")  # made up here


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("digits(limit=0)", "limit=0"),
        ("digits(limit=5000)", "from 1 to 1,437"),
        ("digits(limt=5)", "Did you mean 'limit'"),
        ("synthetic(samples=0)", "samples=0"),
        ("synthetic(samples='many')", "samples='many'"),
        ("synthetic(inputs=(3, 0))", "inputs[1]=0"),
        ("synthetic(inputs=7)", "inputs=7"),
        ("synthetic(noise=-1)", "noise=-1"),
        ("synthetic(noise=loud)", "noise="),
        ("synthetic(seed=-1)", "seed=-1"),
    ],
)
def test_an_option_that_cannot_work_is_refused_in_words(spec: str, said: str):
    with pytest.raises(BadInput) as e:
        load(spec)
    assert said in str(e.value)
