"""Text is cut into windows that lose nothing, comes from where it should, and is as predictable as is said of it."""

import hashlib
import io
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from manyhands.data import download, load
from manyhands.data import tinyshakespeare as module
from manyhands.data.dataset import Arrays
from manyhands.data.markov import markov
from manyhands.data.text import split, windows
from manyhands.errors import BadInput, DamagedFile
from tests.data.conftest import Unreachable
from tests.data.mnist_files import PLACES

REAL = next((p for p in PLACES if (p / "tinyshakespeare" / "input.txt").is_file()), None)
needs_text = pytest.mark.skipif(
    REAL is None, reason="Tiny Shakespeare is neither in $MANYHANDS_DATA nor ../shared/data"
)
TEXT = b"To be, or not to be: that is the question.\n" * 20


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> bytes:
    """A small text in place of the real one."""
    monkeypatch.setattr(module, "LENGTH_B", len(TEXT))
    monkeypatch.setattr(module, "SHA256", hashlib.sha256(TEXT).hexdigest())
    return TEXT


def arrays(found: Any) -> Arrays:
    assert isinstance(found, Arrays)
    return found


@given(st.integers(1, 300), st.integers(1, 40))
def test_windows_predict_every_character_once_but_the_first_and_the_last_few(n: int, length: int):
    text = torch.arange(n)
    cut = windows(text, length)
    assert len(cut) == (n - 1) // length
    assert torch.equal(cut.target.flatten(), text[1 : 1 + len(cut) * length])
    assert n - 1 - cut.target.numel() == (n - 1) % length
    assert torch.equal(cut.inputs, cut.target - 1)  # the character before each


@given(st.integers(20, 500), st.integers(1, 60))
def test_no_character_is_both_trained_and_tested_on(n: int, length: int):
    text = torch.arange(n)
    if length >= n - n * 9 // 10:
        with pytest.raises(BadInput, match="to test on"):
            split("made up", text, length=length)
        return
    train, test = split("made up", text, length=length)
    assert len(train) > 0
    assert len(test) > 0
    assert int(train.target.max()) < n * 9 // 10 <= int(test.inputs.min())


@needs_text
def test_the_real_text_is_15_685_and_1_742_windows_of_64_out_of_65_characters():
    splits = load("tinyshakespeare", folder=REAL)
    x, y = arrays(splits.train).inputs, arrays(splits.train).target
    assert (x.shape, y.shape, x.dtype, y.dtype) == ((15_685, 64), (15_685, 64), torch.int64, torch.int64)
    assert (len(splits.test or ()), splits.inputs, splits.classes) == (1742, (64,), 65)
    assert str(REAL) in splits.source
    assert REAL is not None
    raw = (REAL / "tinyshakespeare" / "input.txt").read_text()
    vocabulary = sorted(set(raw))
    assert "".join(vocabulary[i] for i in x[0]) == raw[:64]
    assert "".join(vocabulary[i] for i in y[1]) == raw[65:129]
    assert "".join(vocabulary[i] for i in arrays(splits.test).inputs[0]) == raw[1_003_854 : 1_003_854 + 64]


@pytest.mark.usefixtures("network")
@pytest.mark.parametrize("place", ["folder", "stated/tinyshakespeare", "home/.cache/manyhands/tinyshakespeare"])
def test_each_place_is_searched(stand_in: bytes, place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "folder").mkdir()
    monkeypatch.setenv("MANYHANDS_DATA", str(tmp_path / "stated"))
    (tmp_path / place).mkdir(parents=True, exist_ok=True)
    (tmp_path / place / "input.txt").write_bytes(stand_in)
    splits = load("tinyshakespeare(length=8)", folder=tmp_path / "folder")
    assert splits.source.endswith(str(tmp_path / place))
    assert splits.classes == len(set(stand_in))
    few = load("tinyshakespeare(length=8, limit=3)", folder=tmp_path / "folder")
    assert torch.equal(arrays(few.train).inputs, arrays(splits.train).inputs[:3])
    assert len(few.test or ()) == len(splits.test or ())


@pytest.mark.usefixtures("network")
@pytest.mark.parametrize("damage", [TEXT[:-1], TEXT + b"!", b"", b"X" + TEXT[1:], TEXT * 100])
def test_another_text_is_named_with_both_sums_and_the_cure(stand_in: bytes, damage: bytes, tmp_path: Path):
    path = tmp_path / "input.txt"
    path.write_bytes(damage)
    with pytest.raises(DamagedFile) as e:
        load("tinyshakespeare", folder=tmp_path)
    for part in (str(path), f"expected {hashlib.sha256(stand_in).hexdigest()}", "found ", "Delete the file"):
        assert part in str(e.value)


def test_without_file_and_network_the_message_says_what_to_do(network: Unreachable):
    with pytest.raises(BadInput) as e:
        load("tinyshakespeare")
    for part in ("no network in tests", "input.txt", "MANYHANDS_DATA", "--data-dir", "--data markov"):
        assert part in str(e.value)
    assert len(network.asked) == len(module.MIRRORS)


def test_a_download_is_kept_and_used_again(
    stand_in: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, network: Unreachable
):
    monkeypatch.setattr(download, "_open", lambda url, timeout_s: io.BytesIO(stand_in))
    first = load("tinyshakespeare(length=8)")
    assert [p.name for p in (tmp_path / "home/.cache/manyhands/tinyshakespeare").iterdir()] == ["input.txt"]
    monkeypatch.setattr(download, "_open", network)
    assert load("tinyshakespeare(length=8)").source == first.source
    assert not network.asked


@pytest.mark.usefixtures("network")
@pytest.mark.parametrize("sent", [TEXT[:-5], b"<html>", TEXT + b"more"])
def test_a_damaged_download_leaves_nothing_behind(
    stand_in: bytes, sent: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(download, "_open", lambda url, timeout_s: io.BytesIO(sent))
    with pytest.raises(BadInput, match="could not be downloaded"):
        load("tinyshakespeare")
    assert not [p for p in (tmp_path / "home").rglob("*") if p.is_file()]


def test_made_up_text_follows_its_seed_alone():
    state = torch.random.get_rng_state()
    one, same, other = (arrays(markov(characters=500, length=10, seed=s).train).inputs for s in (1, 1, 2))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_made_up_text_is_as_predictable_as_its_source_says():
    """The entropy of a character given the two before it, estimated by counting: 64 of them, 180,000 characters."""
    splits = markov(characters=200_000, length=100, classes=4)
    x, y = arrays(splits.train).inputs.numpy(), arrays(splits.train).target.numpy()
    counts = np.zeros((4, 4, 4))
    np.add.at(counts, (x[:, :-1], x[:, 1:], y[:, 1:]), 1)
    shares = counts / counts.sum(axis=2, keepdims=True)
    found = -(counts * np.log(np.where(counts > 0, shares, 1))).sum() / counts.sum()
    said = float(splits.source.rsplit(" ", 1)[1])
    assert found == pytest.approx(said, abs=0.01)  # a mean of 180,000 numbers of deviation below 1: 0.0024, four times
    assert said < math.log(4)


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("markov(characters=19)", "characters=19"),
        ("markov(characters=100)", "E.g. length=9"),
        ("markov(classes=1)", "classes=1"),
        ("markov(classes=100000)", "do not fit into memory"),
        ("markov(seed=-1)", "seed=-1"),
        ("markov(length=0)", "length=0"),
        ("markov(limit=0)", "limit=0"),
        ("markov(limit=5000)", "from 1 to 1,406"),
    ],
)
def test_an_option_that_cannot_work_is_refused_in_words(spec: str, said: str):
    with pytest.raises(BadInput) as e:
        load(spec)
    assert said in str(e.value)
