"""MNIST comes from the first place that has it, and never damaged."""

import gzip
import hashlib
import io
import time
import urllib.request
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from manyhands.data import download, load
from manyhands.data import mnist as module
from manyhands.data.dataset import Arrays
from manyhands.data.idx import IdxFile
from manyhands.errors import BadInput, DamagedFile
from tests.data.conftest import Unreachable
from tests.data.mnist_files import REAL, needs_mnist, small, small_mnist, write

pytestmark = pytest.mark.usefixtures("network")


@pytest.fixture
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> dict[IdxFile, bytes]:
    """MNIST with small files in place of the real ones."""
    files = small_mnist()
    monkeypatch.setattr(module, "FILES", tuple(files))
    return files


@needs_mnist
def test_the_real_files_give_60_000_and_10_000_scaled_images(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MANYHANDS_DATA", str(REAL))
    splits = load("mnist")
    assert isinstance(splits.train, Arrays)
    x, y = splits.train.inputs, splits.train.target
    assert (x.shape, x.dtype, x.is_contiguous()) == ((60000, 1, 28, 28), torch.float32, True)
    assert (y.shape, y.dtype) == ((60000,), torch.int64)
    assert (float(x.min()), float(x.max())) == (0.0, 1.0)
    assert y[:10].tolist() == [5, 0, 4, 1, 9, 2, 1, 3, 1, 4]
    assert float(x.mean()) == pytest.approx(module.MEAN, abs=5e-5)
    assert float(x.std()) == pytest.approx(module.DEVIATION, abs=5e-5)
    assert (len(splits.train), len(splits.test or ()), splits.inputs, splits.classes) == (60000, 10000, (1, 28, 28), 10)
    assert str(REAL) in splits.source


@needs_mnist
def test_the_pinned_sums_are_those_of_the_files_with_the_published_md5():
    assert REAL is not None
    images = gzip.decompress((REAL / "mnist" / "train-images-idx3-ubyte.gz").read_bytes())
    assert hashlib.md5(images, usedforsecurity=False).hexdigest() == "6bbc9ace898e44ae57da46a324031adb"
    assert hashlib.sha256(images).hexdigest() == module.FILES[0].sha256
    assert len(images) == module.FILES[0].content_B


@needs_mnist
def test_auto_takes_mnist_when_it_is_at_hand():
    assert load("auto(limit=100)", folder=REAL).name == "mnist"


def test_auto_takes_the_digits_otherwise_and_says_so(network: Unreachable):
    splits = load("auto")
    assert splits.name == "digits"
    assert "because MNIST is not at hand" in splits.source
    assert not network.asked, "auto never downloads"


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("place", ["folder", "folder/mnist", "stated", "stated/mnist", "home/.cache/manyhands/mnist"])
def test_each_place_is_searched_for_plain_and_packed_files(
    stand_ins: dict[IdxFile, bytes], place: str, packed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "folder").mkdir()
    monkeypatch.setenv("MANYHANDS_DATA", str(tmp_path / "stated"))
    write(tmp_path / place, stand_ins, packed=packed)
    splits = load("mnist", folder=tmp_path / "folder")
    assert (len(splits.train), len(splits.test or ())) == (30, 10)
    assert splits.source.endswith(str(tmp_path / place))


def test_the_folder_given_comes_before_the_environment(
    stand_ins: dict[IdxFile, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("MANYHANDS_DATA", str(tmp_path / "stated"))
    for place in ("folder", "stated"):
        write(tmp_path / place, stand_ins)
    assert str(tmp_path / "folder") in load("mnist", folder=tmp_path / "folder").source
    assert str(tmp_path / "stated") in load("mnist").source


def test_limit_keeps_the_first_training_samples(stand_ins: dict[IdxFile, bytes], tmp_path: Path):
    write(tmp_path, stand_ins)
    whole, few = load("mnist", folder=tmp_path), load("mnist(limit=7)", folder=tmp_path)
    assert isinstance(whole.train, Arrays)
    assert isinstance(few.train, Arrays)
    assert torch.equal(few.train.inputs, whole.train.inputs[:7])
    assert (len(few.train), len(few.test or ())) == (7, 10)


def test_normalize_subtracts_the_mean_and_divides_by_the_deviation(stand_ins: dict[IdxFile, bytes], tmp_path: Path):
    write(tmp_path, stand_ins)
    plain, scaled = load("mnist", folder=tmp_path), load("mnist(normalize=True)", folder=tmp_path)
    torch.testing.assert_close(scaled.train[3][0], (plain.train[3][0] - 0.1307) / 0.3081)


def flip(content: bytes) -> bytes:
    return content[:400] + bytes([content[400] ^ 1]) + content[401:]


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "packed, cut short": lambda c: gzip.compress(c)[:-200],
    "packed, a byte flipped": lambda c: flip(gzip.compress(c)),
    "content, a byte flipped": lambda c: gzip.compress(flip(c)),
    "plain, a byte flipped": flip,
    "plain, cut short": lambda c: c[:-1],
    "plain, too long": lambda c: c + b"\0",
    "wrong magic": lambda c: b"\x00\x00\x08\x01" + c[4:],
    "another file": lambda c: b"<html>moved</html>",
    "empty": lambda c: b"",
    "gzip bomb": lambda c: gzip.compress(c + bytes(10**7)),
    "endless": lambda c: c + bytes(10**6),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", ["mnist", "auto"])
def test_a_damaged_file_is_named_with_both_sums_and_the_cure(
    stand_ins: dict[IdxFile, bytes], tmp_path: Path, damage: str, name: str
):
    write(tmp_path, stand_ins)
    file, content = next(iter(stand_ins.items()))
    path = tmp_path / f"{file.name}.gz"
    path.write_bytes(DAMAGES[damage](content))
    with pytest.raises(DamagedFile) as e:
        load(name, folder=tmp_path)
    said = str(e.value)
    assert str(path) in said
    assert f"expected {file.sha256}" in said
    assert "found " in said
    assert "Delete the file" in said


def test_a_bomb_is_unpacked_no_further_than_one_byte_too_many(monkeypatch: pytest.MonkeyPatch):
    file, content = small("x", (50,), 0)
    produced: list[int] = []
    real = zlib.decompressobj

    class Watched:
        def __init__(self, **kwargs: Any) -> None:
            self.inner = real(**kwargs)

        def decompress(self, data: bytes, most: int) -> bytes:
            out = self.inner.decompress(data, most)
            produced.append(len(out))
            return out

    monkeypatch.setattr(zlib, "decompressobj", Watched)
    with pytest.raises(DamagedFile, match="goes on after"):
        file.decode(gzip.compress(content + bytes(10**6)), "x")
    assert produced == [file.content_B + 1]


def test_without_files_and_network_the_message_says_what_to_do_and_soon(network: Unreachable):
    begun = time.monotonic()
    with pytest.raises(BadInput) as e:
        load("mnist")
    assert time.monotonic() - begun < 5
    for part in ("no network in tests", "train-images-idx3-ubyte.gz", "MANYHANDS_DATA", "--data-dir", "--data digits"):
        assert part in str(e.value)
    assert len(network.asked) == len(module.MIRRORS), "one try a mirror, not one a file"


def test_a_folder_that_does_not_exist_is_refused(tmp_path: Path):
    with pytest.raises(BadInput, match="does not exist"):
        load("mnist", folder=tmp_path / "nowhere")


class Mirror:
    """Answers with the files, or with what ``spoil`` makes of them."""

    def __init__(self, files: dict[IdxFile, bytes], spoil: Callable[[bytes], bytes] = lambda raw: raw) -> None:
        self.files = {f"{f.name}.gz": gzip.compress(c) for f, c in files.items()}
        self.spoil = spoil

    def __call__(self, url: str, timeout_s: float) -> io.BytesIO:
        return io.BytesIO(self.spoil(self.files[url.rsplit("/", 1)[1]]))


def test_a_download_is_kept_and_used_again(
    stand_ins: dict[IdxFile, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, network: Unreachable
):
    monkeypatch.setattr(download, "_open", Mirror(stand_ins))
    assert len(load("mnist").train) == 30
    kept = sorted(p.name for p in (tmp_path / "home/.cache/manyhands/mnist").iterdir())
    assert kept == sorted(f"{f.name}.gz" for f in stand_ins)
    monkeypatch.setattr(download, "_open", network)
    assert len(load("mnist").train) == 30
    assert not network.asked


@pytest.mark.parametrize("spoil", [flip, lambda raw: raw[:-50], lambda raw: b"<html>", lambda raw: raw + bytes(10**6)])
def test_a_damaged_download_leaves_nothing_behind(
    stand_ins: dict[IdxFile, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spoil: Callable[[bytes], bytes]
):
    monkeypatch.setattr(download, "_open", Mirror(stand_ins, spoil))
    with pytest.raises(BadInput, match="could not be downloaded"):
        load("mnist")
    assert not [p for p in (tmp_path / "home").rglob("*") if p.is_file()]


def test_only_https_is_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.undo()  # the real opener: it refuses before any connection
    with pytest.raises(OSError, match="is not HTTPS"):
        download.fetch("http://localhost/x", tmp_path / "x", cap_B=1, check=len)
    redirect = download._StayOnHttps().redirect_request
    with pytest.raises(OSError, match="away from HTTPS"):
        redirect(urllib.request.Request("https://a/x"), io.BytesIO(), 302, "Found", {}, "http://b/x")
