"""Checkpoints under torture: whole or absent, and never silently wrong."""

import builtins
import errno
import json
import math
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from manyhands.errors import BadInput, DamagedFile
from manyhands.training import checkpoint, tensor_file
from manyhands.training.checkpoint import CheckpointNotWritten, load, load_newest, save
from manyhands.training.model_difference import check_same_model, difference_table
from manyhands.training.state_tree import decode, encode

FILES = ["model.safetensors", "state.safetensors", "state.json", "manifest.json"]


@pytest.fixture(autouse=True)
def disk_calls(monkeypatch):
    """No test waits for a disk; what would have been waited for is noted, by path."""
    calls = []
    rename = os.rename

    def noted_rename(source, target):
        calls.append(("rename", Path(target).name))
        rename(source, target)

    monkeypatch.setattr(os, "fsync", lambda fd: calls.append(("fsync", Path(os.readlink(f"/proc/self/fd/{fd}")).name)))
    monkeypatch.setattr(os, "rename", noted_rename)
    return calls


def some_model(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        "fc.weight": torch.randn(30, 20, generator=generator),
        "fc.bias": torch.randn(30, generator=generator),
        "norm.num_batches_tracked": torch.tensor(seed),
    }


def some_state(step):
    return {"cursor": {"epoch": 1, "position": 40, "step": step}, "momentum": {0: torch.full((30, 20), float(step))}}


def save_some(folder, *steps, keep=None):
    for step in steps:
        path = save(folder, step, model=some_model(step), state=some_state(step), keep=keep)
    return path


def assert_is(found, step):
    assert found.step == step
    assert same(found.model, some_model(step))
    assert same(found.state, some_state(step))


def same(a, b):
    """Equal in values, types and order, NaN being equal to itself."""
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor):
        # Bytes, since NaN is not equal to itself.
        as_bytes = [x.contiguous().reshape(-1).view(torch.uint8) for x in (a, b)]
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*as_bytes)
    if isinstance(a, dict):
        return list(map(repr, a)) == list(map(repr, b)) and all(map(same, a.values(), b.values()))
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return repr(a) == repr(b)


def flip_bit(path, bit):
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


# What comes back is what was given.

dtypes = st.sampled_from(list(tensor_file.DTYPES))
shapes = st.lists(st.integers(0, 4), max_size=3)


@st.composite
def tensors(draw):
    shape, dtype = draw(shapes), draw(dtypes)
    count_B = math.prod(shape) * torch.empty((), dtype=dtype).element_size()
    raw = draw(st.binary(min_size=count_B, max_size=count_B))
    if dtype == torch.bool:
        raw = bytes(x & 1 for x in raw)
    flat = torch.frombuffer(bytearray(raw), dtype=torch.uint8) if raw else torch.empty(0, dtype=torch.uint8)
    return flat.view(dtype).reshape(shape)


keys = st.one_of(st.text(max_size=6), st.integers(), st.sampled_from(["$tensor", "$dict", "a/b", "a", "__metadata__"]))
states = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8), tensors()),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.lists(inner, max_size=4).map(tuple),
        st.dictionaries(keys, inner, max_size=4),
    ),
    max_leaves=12,
)


@given(states)
def test_structure_and_tensors_round_trip_with_their_types(state):
    structure, found = encode(state)
    assert same(decode(json.loads(json.dumps(structure, allow_nan=False)), found), state)


@given(
    model=st.dictionaries(st.text(max_size=8), tensors(), max_size=4), state=st.dictionaries(keys, states, max_size=4)
)
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_checkpoint_round_trips(tmp_path, model, state):
    path = save(tmp_path, 5, model=model, state=state)
    found = load(path)
    assert same(found.model, model)
    assert same(found.state, state)


def test_paths_that_look_alike_stay_apart():
    state = {"a/b": torch.tensor(1), "a": {"b": torch.tensor(2)}, 0: torch.tensor(3), "0": torch.tensor(4)}
    structure, found = encode(state)
    assert len(found) == 4
    assert same(decode(structure, found), state)


def test_an_optimizer_and_a_schedule_round_trip(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))  # torch sets it when an optimizer is made
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([parameter], lr=torch.tensor(0.1), betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.MultiStepLR(torch.optim.SGD([parameter], lr=0.1), [1, 2])
    parameter.grad = torch.ones(3)
    optimizer.step()
    found = load(save(tmp_path, 1, model={}, state={"o": optimizer.state_dict(), "s": schedule.state_dict()})).state
    assert same(found["o"], optimizer.state_dict())
    other = torch.optim.AdamW([parameter], lr=0.1)
    other.load_state_dict(found["o"])
    assert other.param_groups[0]["betas"] == (0.9, 0.99)
    assert found["s"]["milestones"] == {1: 1, 2: 1}


def test_tied_tensors_are_stored_once_and_come_back_tied(tmp_path):
    table = torch.randn(50, 8)
    path = save(tmp_path, 1, model={"embed": table, "head": table, "mirror": table.t()}, state={})
    assert set(load_file(path / "model.safetensors")) == {"embed", "mirror"}
    assert json.loads((path / "state.json").read_text())["aliases"] == {"head": "embed"}
    found = load(path).model
    assert found["head"] is found["embed"]
    assert same(found, {"embed": table, "head": table, "mirror": table.t()})


def test_empty_tensors_are_not_taken_for_tied_ones(tmp_path):
    model = {"a": torch.empty(0, 3), "b": torch.empty(0, 3), "c": torch.empty(2, 0)}
    path = save(tmp_path, 1, model=model, state={})
    assert json.loads((path / "state.json").read_text())["aliases"] == {}
    assert same(load(path).model, model)


def test_overlapping_strided_and_channels_last_tensors_are_stored_as_they_read(tmp_path):
    base = torch.arange(24.0)
    model = {
        "all": base,
        "part": base[3:9],
        "strided": base[::2],
        "image": base.view(1, 2, 3, 4).to(memory_format=torch.channels_last),
        "expanded": torch.ones(1).expand(5),
        "conjugate": torch.tensor([1 + 2j]).conj(),
        "leaf": torch.nn.Parameter(base),
    }
    found = load(save(tmp_path, 1, model=model, state={})).model
    assert all(torch.equal(found[name], model[name]) for name in model)
    assert not any(tensor.requires_grad for tensor in found.values())


def test_loaded_tensors_outlive_the_files(tmp_path):
    found = load(save_some(tmp_path, 3))
    for name in ("model.safetensors", "state.safetensors"):
        (found.path / name).write_bytes(b"")
    assert_is(found, 3)


@pytest.mark.parametrize(
    ("model", "state", "message"),
    [
        ({"w": torch.zeros(2, dtype=torch.complex128)}, {}, "'w' is complex128"),
        ({"w": torch.zeros(2, device="meta")}, {}, "meta"),
        ({"w": torch.eye(3).to_sparse()}, {}, "sparse"),
        ({"w": 3}, {}, "'w' is a int"),
        ({"__metadata__": torch.zeros(1)}, {}, "__metadata__"),
        ({}, {"a": {"b": {1, 2}}}, "a/b is a builtins.set"),
        ({}, {"a": object()}, "builtins.object"),
        ({}, {"a": {(1, 2): 3}}, r"key \(1, 2\)"),
        ({}, {"a": 10**5000}, "JSON"),
    ],
)
def test_what_cannot_be_stored_is_refused_by_name_before_anything_is_written(tmp_path, model, state, message):
    with pytest.raises(BadInput, match=message):
        save(tmp_path / "checkpoints", 1, model=model, state=state)
    assert not (tmp_path / "checkpoints").exists()


def test_a_state_that_contains_itself_is_refused(tmp_path):
    state = {}
    state["self"] = state
    with pytest.raises(BadInput, match="contains itself"):
        save(tmp_path, 1, model={}, state=state)


# Keeping the last k.


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_the_newest_k_are_kept(tmp_path):
    save_some(tmp_path, 5, 10, 15, 20, keep=2)
    assert names(tmp_path) == ["step-00000015", "step-00000020"]
    assert_is(load_newest(tmp_path), 20)


def test_steps_beyond_eight_digits_sort_as_numbers(tmp_path):
    save_some(tmp_path, 99_999_999, 100_000_000, keep=1)
    assert names(tmp_path) == ["step-100000000"]
    assert load_newest(tmp_path).step == 100_000_000


def test_a_good_checkpoint_is_not_removed_for_a_later_damaged_one(tmp_path):
    damaged = save_some(tmp_path, 100)
    flip_bit(damaged / "model.safetensors", 2000)
    save_some(tmp_path, 90, keep=1)
    found = load_newest(tmp_path)
    assert_is(found, 90)
    assert [path for path, _ in found.skipped] == [damaged]


def test_a_step_written_again_replaces_the_old_one(tmp_path):
    flip_bit(save_some(tmp_path, 7) / "state.json", 50)
    save_some(tmp_path, 7)
    assert names(tmp_path) == ["step-00000007"]
    assert_is(load_newest(tmp_path), 7)


def test_an_old_checkpoint_that_cannot_be_removed_costs_a_warning(tmp_path, monkeypatch, caplog):
    save_some(tmp_path, 1)

    def refuse(*_, **__):
        raise PermissionError(errno.EPERM, "not allowed")

    monkeypatch.setattr(checkpoint, "_discard", refuse)
    save_some(tmp_path, 2, keep=1)
    assert "could not be removed" in caplog.text
    assert load_newest(tmp_path).step == 2


@pytest.mark.parametrize(("step", "keep"), [(-1, 3), (1, 0)])
def test_nonsense_is_refused(tmp_path, step, keep):
    with pytest.raises(BadInput):
        save(tmp_path, step, model={}, state={}, keep=keep)


# Damage (T9, T10).


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("percent", [0, 1, 50, 99])
def test_a_truncated_newest_checkpoint_falls_back_to_the_one_before(tmp_path, name, percent, caplog):
    newest = save_some(tmp_path, 1, 2)
    os.truncate(newest / name, (newest / name).stat().st_size * percent // 100)
    found = load_newest(tmp_path)
    assert_is(found, 1)
    assert found.skipped[0][0] == newest
    assert name in found.skipped[0][1]
    assert str(newest) in caplog.text


@pytest.mark.parametrize("name", FILES)
def test_every_flipped_bit_is_detected(tmp_path, name):
    path = save_some(tmp_path, 3)
    draw = random.Random(name)
    for _ in range(60):
        bit = draw.randrange(8 * (path / name).stat().st_size)
        flip_bit(path / name, bit)
        with pytest.raises(DamagedFile):
            load(path)
        flip_bit(path / name, bit)
    assert_is(load(path), 3)


@pytest.mark.slow
def test_every_single_bit_of_a_manifest_counts(tmp_path):
    path = save_some(tmp_path, 3)
    raw = (path / "manifest.json").read_bytes()
    for bit in range(8 * len(raw)):
        flip_bit(path / "manifest.json", bit)
        with pytest.raises(DamagedFile):
            load(path)
        (path / "manifest.json").write_bytes(raw)


@pytest.mark.parametrize("name", FILES)
def test_a_zero_filled_file_is_detected(tmp_path, name):
    path = save_some(tmp_path, 3)
    (path / name).write_bytes(bytes((path / name).stat().st_size))
    with pytest.raises(DamagedFile, match=name):
        load(path)


@pytest.mark.parametrize("name", FILES)
def test_a_deleted_file_is_named(tmp_path, name):
    newest = save_some(tmp_path, 1, 2)
    (newest / name).unlink()
    found = load_newest(tmp_path)
    assert_is(found, 1)
    assert f"{name} is missing" in found.skipped[0][1]


@pytest.mark.parametrize("name", FILES)
def test_files_swapped_between_checkpoints_are_detected(tmp_path, name):
    one, two = (save_some(tmp_path, step) / name for step in (1, 2))
    first = one.read_bytes()
    one.write_bytes(two.read_bytes())
    two.write_bytes(first)
    with pytest.raises(DamagedFile, match=r"(?s)step-00000002.*step-00000001"):
        load_newest(tmp_path)


def test_files_swapped_within_a_checkpoint_are_detected(tmp_path):
    path = save_some(tmp_path, 1)
    (path / "model.safetensors").rename(path / "x")
    (path / "state.safetensors").rename(path / "model.safetensors")
    (path / "x").rename(path / "state.safetensors")
    with pytest.raises(DamagedFile):
        load(path)


def test_a_checkpoint_renamed_to_another_step_is_detected(tmp_path):
    save_some(tmp_path, 1).rename(tmp_path / "step-00000009")
    with pytest.raises(DamagedFile, match="belongs to step 1"):
        load_newest(tmp_path)


def test_nothing_to_resume_from_is_said(tmp_path):
    for folder in (tmp_path, tmp_path / "absent"):
        with pytest.raises(BadInput, match="no checkpoint") as caught:
            load_newest(folder)
        assert not isinstance(caught.value, DamagedFile)
    with pytest.raises(BadInput, match="no checkpoint"):
        load(tmp_path)


def test_extra_files_do_no_harm(tmp_path):
    path = save_some(tmp_path, 4)
    (path / "notes.txt").write_text("mine")
    (tmp_path / "README").write_text("mine")
    (tmp_path / "step-4").mkdir()
    assert_is(load_newest(tmp_path), 4)


# Crashes (T11).


def test_leftovers_of_a_crash_are_ignored_and_then_cleaned(tmp_path):
    good = save_some(tmp_path, 1)
    shutil.copytree(good, tmp_path / ".writing-step-00000002-0a1b2c3d")
    shutil.copytree(good, tmp_path / ".removing-step-00000000-0a1b2c3d")
    (tmp_path / ".writing-link").symlink_to(good)
    assert_is(load_newest(tmp_path), 1)
    save_some(tmp_path, 3)
    assert names(tmp_path) == ["step-00000001", "step-00000003"]
    assert_is(load(good), 1)


CRASHING = """
import os, sys
from pathlib import Path
from tests.training.test_checkpoint import save_some
for call in ("rename", "fsync", "unlink"):
    for step in (1, 2):
        for when in ("before", "after"):
            for at in range(7):
                branch = os.fork()
                if branch == 0:
                    os.fsync = lambda descriptor: None
                    folder = Path(sys.argv[1], f"{call}-{step}-{when}-{at}")
                    save_some(folder, 1)
                    real, calls = getattr(os, call), [0]
                    def crash(*arguments, **options):
                        if calls[0] == at and when == "before":
                            os._exit(7)
                        result = real(*arguments, **options)
                        if calls[0] == at:
                            os._exit(7)
                        calls[0] += 1
                        return result
                    setattr(os, call, crash)
                    try:
                        save_some(folder, step, keep=1)
                    finally:
                        os._exit(0)
                os.waitpid(branch, 0)
"""


def test_all_is_forced_to_disk_before_the_rename_and_the_rename_after_it(tmp_path, disk_calls):
    path = save_some(tmp_path / "checkpoints", 1)
    made, *files, folder, rename, parent = disk_calls
    assert made == ("fsync", tmp_path.name)
    assert files == [("fsync", name) for name in FILES]
    assert folder[1].startswith(".writing-step-00000001")
    assert (rename, parent) == (("rename", path.name), ("fsync", "checkpoints"))


@pytest.mark.slow
def test_a_crash_at_any_system_call_leaves_the_old_or_the_new(tmp_path):
    """A process over step 1 saves step 1 or 2, and is gone at the n-th rename, fsync …, just before it or after."""
    subprocess.run([sys.executable, "-c", CRASHING, str(tmp_path)], check=True, cwd=Path(__file__).parents[2])
    tried = list(tmp_path.iterdir())
    assert len(tried) == 3 * 2 * 2 * 7
    outcomes = set()
    for folder in tried:
        found = load_newest(folder)
        assert_is(found, found.step)
        assert not found.skipped
        outcomes.add(found.step)
        save_some(folder, 5, keep=1)
        assert names(folder) == ["step-00000005"]
    assert outcomes == {1, 2}


# A disk that is full or refuses (T12).


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 1 MB; skipped where mounting is not permitted."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"mounting is not permitted: {mounted.stderr.decode().strip()}")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


def test_a_full_disk_keeps_the_old_checkpoints_and_leaves_nothing(small_disk):
    save_some(small_disk, 1)
    before = names(small_disk)
    with pytest.raises(CheckpointNotWritten, match="No space left on device"):
        save(small_disk, 2, model={"w": torch.ones(1_000_000)}, state={})
    assert names(small_disk) == before
    assert_is(load_newest(small_disk), 1)
    save_some(small_disk, 3, keep=1)
    assert_is(load_newest(small_disk), 3)


def test_a_disk_that_fills_up_run_by_run_is_never_left_with_less(small_disk):
    (small_disk / "ballast").write_bytes(bytes(900_000))
    newest = None
    for step in range(60):
        try:
            save_some(small_disk, step)
            newest = step
        except CheckpointNotWritten:
            break
    else:
        pytest.fail("the disk never filled up")
    assert_is(load_newest(small_disk), newest)
    assert not [name for name in names(small_disk) if name.startswith(".")]


def test_a_read_only_disk_is_reported(small_disk):
    save_some(small_disk, 1)
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(CheckpointNotWritten, match="Read-only file system"):
        save_some(small_disk, 2)
    assert_is(load_newest(small_disk), 1)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("fault", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_an_error_while_any_file_is_written_leaves_the_old_ones(tmp_path, monkeypatch, name, fault):
    save_some(tmp_path, 1)

    def failing_open(path, mode="r", *args, **kwargs):
        if "x" in mode and os.path.basename(path) == name:
            builtins.open(path, mode).close()
            raise OSError(fault, os.strerror(fault))
        return builtins.open(path, mode, *args, **kwargs)

    monkeypatch.setattr(tensor_file, "open", failing_open, raising=False)
    with pytest.raises(CheckpointNotWritten, match=os.strerror(fault)) as caught:
        save_some(tmp_path, 2)
    assert caught.value.exit_code == 1
    assert names(tmp_path) == ["step-00000001"]
    assert_is(load_newest(tmp_path), 1)


def test_a_write_that_lies_is_found_by_the_read_back(tmp_path, monkeypatch):
    save_some(tmp_path, 1)
    write = checkpoint.write_tensors

    def lie(path, tensors):
        promised = write(path, tensors)
        flip_bit(path, 8 * (promised.size_B - 1))
        return promised

    monkeypatch.setattr(checkpoint, "write_tensors", lie)
    with pytest.raises(CheckpointNotWritten, match="reading it back"):
        save_some(tmp_path, 2)
    assert names(tmp_path) == ["step-00000001"]


def test_an_interrupt_while_writing_leaves_nothing(tmp_path, monkeypatch):
    save_some(tmp_path, 1)

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "_verify", interrupt)
    with pytest.raises(KeyboardInterrupt):
        save_some(tmp_path, 2)
    assert names(tmp_path) == ["step-00000001"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder_is_reported(tmp_path):
    save_some(tmp_path, 1)
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(CheckpointNotWritten, match="Permission denied"):
            save_some(tmp_path, 2)
    finally:
        tmp_path.chmod(0o700)


def test_a_file_where_the_folder_should_be_is_reported(tmp_path):
    (tmp_path / "checkpoints").write_text("")
    with pytest.raises(CheckpointNotWritten):
        save_some(tmp_path / "checkpoints", 2)


# Malice (T13).


def rewrite_manifest(path, change):
    content = json.loads((path / "manifest.json").read_text())
    change(content)
    (path / "manifest.json").write_text(json.dumps(content, indent=1))


@pytest.mark.parametrize("name", ["../outside", "/etc/hostname", "..", "a/b", "a\\b", "", ".hidden", "x\0y", "x\n"])
def test_a_manifest_that_names_a_file_elsewhere_is_refused(tmp_path, name):
    path = save_some(tmp_path, 1)
    (tmp_path / "outside").write_bytes(b"")

    def add(content):
        content["files"][name] = {"size_B": 0, "sha256": "0" * 64}
        content["files"] = dict(sorted(content["files"].items()))

    rewrite_manifest(path, add)
    with pytest.raises(DamagedFile, match="not a plain file name"):
        load(path)


@pytest.mark.parametrize("name", FILES)
def test_a_symlink_in_a_checkpoint_is_refused(tmp_path, name):
    path = save_some(tmp_path, 1)
    (path / name).rename(tmp_path / "elsewhere")
    (path / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(DamagedFile, match="is a link"):
        load(path)


def test_a_symlink_to_a_checkpoint_is_refused_and_a_pipe_is_not_waited_for(tmp_path):
    path = save_some(tmp_path, 1)
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(DamagedFile, match="is a link"):
        load(path)
    path = save_some(tmp_path, 2)
    (path / "model.safetensors").unlink()
    os.mkfifo(path / "model.safetensors")
    with pytest.raises(DamagedFile, match="not a plain file"):
        load(path)


def test_the_folder_of_checkpoints_may_be_a_symlink(tmp_path):
    (tmp_path / "big").mkdir()
    (tmp_path / "checkpoints").symlink_to(tmp_path / "big")
    save_some(tmp_path / "checkpoints", 1, 2, keep=1)
    assert_is(load_newest(tmp_path / "checkpoints"), 2)


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"null",
        b"[]",
        b'"x"',
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"files": {"a": {"size_B": "1", "sha256": 2}}, "step": 1, "version": 1}',
        b'{"files": [1], "step": 1, "version": 1}',
        b'{"files": {"a": {"size_B": NaN, "sha256": ""}}, "step": 1, "version": 1}',
        b'{"files": {}, "step": {}, "version": null}',
        b" " * (2 << 20),
    ],
)
def test_a_manifest_that_is_none_is_refused(tmp_path, raw):
    path = save_some(tmp_path, 1)
    (path / "manifest.json").write_bytes(raw)
    with pytest.raises(DamagedFile):
        load(path)


def test_a_manifest_that_leaves_a_file_out_is_refused(tmp_path):
    path = save_some(tmp_path, 1)
    rewrite_manifest(path, lambda content: content["files"].pop("state.json"))
    with pytest.raises(DamagedFile, match=r"does not name state\.json"):
        load(path)


def test_a_checkpoint_of_a_later_version_says_so(tmp_path):
    path = save_some(tmp_path, 1)
    rewrite_manifest(path, lambda content: content.update(version=2))
    with pytest.raises(DamagedFile, match="newer one is needed"):
        load(path)


class Canary:
    """Unpickling it makes the file at ``path``."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (self.path, "w"))


def forged(path, name, data):
    """Put ``data`` in a file and make the manifest agree, as an attacker can."""
    (path / name).write_bytes(data)
    found = tensor_file.read_sum(path / name)
    rewrite_manifest(path, lambda c: c["files"][name].update(size_B=found.size_B, sha256=found.sha256))


@pytest.mark.parametrize("name", FILES[:3])
def test_a_pickle_under_a_matching_manifest_runs_nothing(tmp_path, name):
    path = save_some(tmp_path, 1)
    torch.save({"w": Canary(str(tmp_path / "canary"))}, tmp_path / "evil.pt")
    forged(path, name, (tmp_path / "evil.pt").read_bytes())
    with pytest.raises(DamagedFile):
        load(path)
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize(
    "document",
    [
        "[]",
        "{}",
        '{"names": ["a"], "aliases": {"a": "absent"}, "state": {}}',
        '{"names": ["a"], "aliases": {"a": ["fc.bias"]}, "state": {}}',
        '{"names": ["a"], "aliases": [], "state": {}}',
        '{"names": [], "aliases": {}, "state": {"x": {"$tensor": "absent"}}}',
        '{"names": [], "aliases": {}, "state": {"x": {"$tensor": ["a"]}}}',
        '{"names": [], "aliases": {}, "state": {"x": {"$dict": [1, 2]}}}',
        '{"names": [], "aliases": {}, "state": {"x": {"$dict": [[[], 2]]}}}',
        '{"names": [], "aliases": {}, "state": {"x": {"$tuple": 3}}}',
        '{"names": [], "aliases": {}, "state": {"x": {"$float": "much"}}}',
        '{"names": [], "aliases": {}, "state": ' + "[" * 900 + "]" * 900 + "}",
    ],
)
def test_a_forged_structure_is_refused(tmp_path, document):
    path = save_some(tmp_path, 1)
    forged(path, "state.json", document.encode())
    with pytest.raises(DamagedFile, match="not of the form"):
        load(path)


# Another model (T14).


def signatures(**shapes):
    return {name: (shape, torch.float32) for name, shape in shapes.items()}


def test_the_same_model_shows_no_difference():
    assert difference_table(some_model(1), some_model(2)) is None
    check_same_model(some_model(1), some_model(2), source="x")
    assert difference_table({"w": torch.zeros(2, 3)}, signatures(w=[2, 3])) is None


def test_missing_extra_and_different_tensors_are_listed():
    found = {**signatures(a=(2, 3), c=(4,)), "d": ((1,), torch.bfloat16)}
    table = difference_table(signatures(a=(2, 4), b=(), d=(1,)), found)
    assert table.splitlines() == [
        "tensor  this model      checkpoint",
        "a       float32 [2, 4]  float32 [2, 3]",
        "b       float32 []      -",
        "d       float32 [1]     bfloat16 [1]",
        "c       -               float32 [4]",
    ]
    with pytest.raises(BadInput, match=r"(?s)step-7 belongs to another model.*float32 \[2, 4\]"):
        check_same_model(signatures(a=(2, 4)), found, source="step-7")


def test_a_long_table_is_cut():
    table = difference_table({f"layer{i}." + "x" * 300: ((i,), torch.float32) for i in range(1000)}, {})
    lines = table.splitlines()
    assert len(lines) == 22
    assert lines[-1] == "… and 980 more"
    assert max(map(len, lines)) < 110


def test_the_file_is_safetensors_to_the_reference_reader(tmp_path):
    values = {"wide": torch.ones(3, dtype=torch.float64), "odd": torch.ones(3, dtype=torch.int8), "x": torch.ones(())}
    promised = tensor_file.write_tensors(tmp_path / "x.safetensors", values)
    assert promised == tensor_file.read_sum(tmp_path / "x.safetensors")
    assert same(dict(sorted(load_file(tmp_path / "x.safetensors").items())), dict(sorted(values.items())))
