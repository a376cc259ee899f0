"""Checkpoints that are whole or absent, and that notice when they no longer hold what was written.

    checkpoints/step-00000123/model.safetensors   the user's state_dict; tied tensors once
                              state.safetensors   every tensor of the training state, by path
                              state.json          the structure of that state, its numbers, the model's names
                              manifest.json       size and SHA-256 of the other three

`save` writes into a hidden sibling folder, forces it to disk, reads it back against the manifest, and only then renames
it into place: after a crash at any point there is the old set or the new one (guarantee, on a file system that keeps
renames in order). `load_newest` checks the manifest before anything is parsed and takes the newest checkpoint that
passes. safetensors, flipped bits and all, would load silently otherwise.

The manifest guards against accidents. It is no signature: whoever can write the folder can write a matching manifest,
and gets to choose numbers, but no code, since nothing here unpickles. The read-back comes from the page cache as a
rule: it catches short writes and software, not a disk that loses data later; that is what ``keep`` is for.

One process writes a folder at a time (rank 0). Cost of a save: the bytes once to disk, hashed twice (about 1.4 GB/s on
one core), and room for one checkpoint more than ``keep``.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import shutil
import stat
import uuid
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from manyhands.errors import BadInput, DamagedFile, ManyhandsError
from manyhands.training.state_tree import RESERVED, decode, encode
from manyhands.training.tensor_file import FileSum, check_storable, read_sum, write_bytes, write_tensors

logger = logging.getLogger(__name__)

MODEL, STATE, STRUCTURE, MANIFEST = "model.safetensors", "state.safetensors", "state.json", "manifest.json"
FORMAT, VERSION = "manyhands checkpoint", 1

#: ``.replaced`` stands only between the two renames that put a new checkpoint in an old one's place.
_CANDIDATE = re.compile(r"step-(\d{8,})(\.replaced)?")
_LEFTOVER = re.compile(r"\.(writing|removing)-.*")
_PLAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")
#: Far beyond any manifest of ours (under 1 kB), far below what would hurt to read.
_MANIFEST_LIMIT_B = 1 << 20


class CheckpointNotWritten(ManyhandsError):
    """A checkpoint could not be written (disk full, read-only …). Older ones are as they were; training may go on."""


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint, on the CPU. Names come in the order they were given; tied ones hold the same tensor."""

    step: int
    model: dict[str, Tensor]
    state: Any
    path: Path
    skipped: tuple[tuple[Path, str], ...] = ()  # newer ones that are damaged, and why


def save(
    folder: Path, step: int, *, model: Mapping[str, Tensor], state: Mapping[str, Any], keep: int | None = 3
) -> Path:
    """Write ``folder/step-…``, then remove all but the newest ``keep`` checkpoints up to this step (None: keep all).

    ``state`` is nested dicts, lists and tuples of tensors, numbers, text and None, and comes back with the same types.
    Tensors are copied as they are written; memory formats are not kept. Raises `BadInput` for what cannot be stored
    and `CheckpointNotWritten` for what could not be written; in both cases nothing is left behind.
    """
    if step < 0 or (keep is not None and keep < 1):
        raise BadInput(f"Checkpoint at step={step} with keep={keep}: steps count from 0, at least 1 is kept.")
    folder = Path(folder)
    stored, aliases = _tied_once(model)
    structure, tensors = encode(state)
    check_storable(stored)
    check_storable(tensors)
    document = _json({"names": list(model), "aliases": aliases, "state": structure})
    target = folder / _name(step)
    writing = folder / f".writing-{target.name}-{uuid.uuid4().hex[:8]}"
    try:
        _make(folder)
        _remove_leftovers(folder)
        writing.mkdir()
        files = {
            MODEL: write_tensors(writing / MODEL, stored),
            STATE: write_tensors(writing / STATE, tensors),
            STRUCTURE: write_bytes(writing / STRUCTURE, [memoryview(document)]),
        }
        write_bytes(writing / MANIFEST, [memoryview(_manifest(step, files))])
        _sync(writing)
        _verify(writing, step)
        _put_in_place(writing, target)
    except (OSError, DamagedFile) as e:
        reason = (e.strerror or str(e)) if isinstance(e, OSError) else f"reading it back failed: {e}"
        raise CheckpointNotWritten(
            f"The checkpoint of step {step} was not written to {folder}: {reason}. Older checkpoints are untouched. "
            "Free some space, or choose another folder with --out."
        ) from e
    finally:
        shutil.rmtree(writing, ignore_errors=True)
    if keep is not None:
        _prune(folder, step, keep)
    return target


def load_newest(folder: Path) -> Checkpoint:
    """The newest checkpoint in ``folder`` that its manifest confirms; damaged ones are passed over and named."""
    folder = Path(folder)
    skipped: list[tuple[Path, str]] = []
    for _, path in _candidates(folder):
        try:
            found = load(path)
        except DamagedFile as e:
            logger.warning("%s: passed over", e)
            skipped.append((path, str(e)))
        else:
            return Checkpoint(found.step, found.model, found.state, path, tuple(skipped))
    if skipped:
        reasons = "\n".join(f"  {reason}" for _, reason in skipped)
        raise DamagedFile(f"No checkpoint in {folder} is whole, so there is nothing to resume from:\n{reasons}")
    raise BadInput(
        f"There is no checkpoint in {folder} to resume from: it holds no folder step-00000000 or the like. "
        "Start without --resume, or name the folder of the run that is to be continued."
    )


def manifest_sum(path: Path) -> str:
    """SHA-256 of a checkpoint's manifest, which names the sums of all else: equal ones are one checkpoint."""
    try:
        return read_sum(path / MANIFEST).sha256
    except OSError as e:
        raise DamagedFile(f"{path}: cannot be read: {e.strerror or e}") from e


def load_same(path: Path, manifest: str) -> Checkpoint:
    """The checkpoint in ``path`` if it is the one that another rank has found there, by its `manifest_sum`."""
    if manifest_sum(path) != manifest:
        raise DamagedFile(f"{path}: is not what rank 0 sees under this name. The folder has to be one for all ranks")
    return load(path)


def load(path: Path) -> Checkpoint:
    """The checkpoint in the folder ``path``, verified first; `DamagedFile` says what is wrong with it."""
    match = _CANDIDATE.fullmatch(path.name)
    if match is None:
        raise BadInput(f"{path} is no checkpoint: those are folders named step-00000123.")
    step = int(match[1])
    try:
        _verify(path, step)
        document = json.loads((path / STRUCTURE).read_bytes())
        # The library maps the file; a copy stays what was verified, whatever happens to the file afterwards.
        stored = {name: tensor.clone() for name, tensor in load_file(path / MODEL).items()}
        tensors = {name: tensor.clone() for name, tensor in load_file(path / STATE).items()}
        aliases = document["aliases"]
        model = {name: stored[aliases.get(name, name)] for name in document["names"]}
        return Checkpoint(step, model, decode(document["state"], tensors), path)
    except OSError as e:
        raise DamagedFile(f"{path}: cannot be read: {e.strerror or e}") from e
    except (SafetensorError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as e:
        raise DamagedFile(f"{path}: is not of the form of a checkpoint: {type(e).__name__}: {e}") from e


def _tied_once(model: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """What to store, and for every further name of the same memory the name it is stored under."""
    stored: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    seen: dict[Any, str] = {}
    for name, tensor in model.items():
        if not isinstance(tensor, Tensor) or name == RESERVED:
            raise BadInput(
                f"Model entry {name!r} is a {type(tensor).__name__}: a model is stored as named tensors. Extra state "
                "belongs with the training state."
            )
        place = (
            (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, tensor.device) if _dense(tensor) else name
        )
        if seen.setdefault(place, name) == name:
            stored[name] = tensor
        else:
            aliases[name] = seen[place]
    return stored, aliases


def _dense(tensor: Tensor) -> bool:
    """Has an address that tells it from others; what has none is either empty or refused later."""
    return tensor.layout is torch.strided and not tensor.is_meta and tensor.numel() > 0


def _name(step: int) -> str:
    return f"step-{step:08d}"


def _json(value: Any) -> bytes:
    try:
        return json.dumps(value, allow_nan=False, indent=1).encode()
    except (ValueError, RecursionError) as e:
        raise BadInput(f"The state cannot be written as JSON: {e}") from e


def _manifest(step: int, files: Mapping[str, FileSum]) -> bytes:
    sums = {name: asdict(files[name]) for name in sorted(files)}
    return _json({"format": FORMAT, "version": VERSION, "step": step, "files": sums})


def _verify(path: Path, step: int) -> None:
    """Check every file of the checkpoint folder ``path`` against its manifest; raises `DamagedFile`, or OSError."""
    if not stat.S_ISDIR(path.lstat().st_mode):
        raise DamagedFile(f"{path}: is a link or a file, not a folder")
    for name, promised in _read_manifest(path, step).items():
        size_B = _regular_size(path, name)
        if size_B != promised.size_B:
            raise DamagedFile(f"{path}: {name} holds {size_B} bytes, its manifest promises {promised.size_B}")
        if read_sum(path / name) != promised:
            raise DamagedFile(f"{path}: {name} does not match the SHA-256 in its manifest")


def _read_manifest(path: Path, step: int) -> dict[str, FileSum]:
    """The files a manifest names. It has to be, byte for byte, what we would write: so no bit of it can flip."""
    if _regular_size(path, MANIFEST) > _MANIFEST_LIMIT_B:
        raise DamagedFile(f"{path}: {MANIFEST} is too large to be one")
    raw = (path / MANIFEST).read_bytes()
    try:
        content = json.loads(raw)
        files = {name: FileSum(**entry) for name, entry in content["files"].items()}
        written_at, version = content["step"], content["version"]
        canonical = _manifest(written_at, files) == raw
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError, BadInput) as e:
        raise DamagedFile(f"{path}: {MANIFEST} cannot be read") from e
    if isinstance(version, int) and version > VERSION:
        raise DamagedFile(f"{path}: has version {version}; this manyhands reads up to {VERSION}, a newer one is needed")
    if not canonical:
        raise DamagedFile(f"{path}: {MANIFEST} is not as it was written")
    if written_at != step:
        raise DamagedFile(f"{path}: {MANIFEST} belongs to step {written_at}")
    for name in files:
        if not _PLAIN_NAME.fullmatch(name):
            raise DamagedFile(f"{path}: {MANIFEST} names {name!r}, which is not a plain file name")
    if absent := {MODEL, STATE, STRUCTURE} - files.keys():
        raise DamagedFile(f"{path}: {MANIFEST} does not name {', '.join(sorted(absent))}")
    return files


def _regular_size(path: Path, name: str) -> int:
    try:
        found = (path / name).lstat()
    except FileNotFoundError:
        raise DamagedFile(f"{path}: {name} is missing") from None
    if not stat.S_ISREG(found.st_mode):
        raise DamagedFile(f"{path}: {name} is a link or something else that is not a plain file")
    return found.st_size


def _candidates(folder: Path) -> list[tuple[int, Path]]:
    """Checkpoints by step, newest first; of the same step, the one in place before the one being replaced."""
    found = []
    for path in folder.iterdir() if folder.is_dir() else ():
        match = _CANDIDATE.fullmatch(path.name)
        if match and path.name.startswith(_name(int(match[1]))):
            found.append((int(match[1]), match[2] is None, path))
    return [(step, path) for step, _, path in sorted(found, reverse=True)]


def _put_in_place(writing: Path, target: Path) -> None:
    if not os.path.lexists(target):
        writing.rename(target)
        _sync(target.parent)
        return
    # A folder cannot be renamed onto a full one. Between the two renames the old one still counts as a checkpoint.
    replaced = target.with_name(target.name + ".replaced")
    _discard(replaced)
    target.rename(replaced)
    writing.rename(target)
    _sync(target.parent)
    _discard(replaced)


def _prune(folder: Path, step: int, keep: int) -> None:
    """Remove all but the newest ``keep`` up to ``step``; later ones belong to another attempt and are left alone."""
    done = [path for at, path in _candidates(folder) if at <= step]
    for path in done[keep:]:
        try:
            _discard(path)
        except OSError as e:
            logger.warning("The old checkpoint %s could not be removed: %s", path, e.strerror or e)


def _remove_leftovers(folder: Path) -> None:
    """What a crashed run of ours was writing or removing."""
    for path in folder.iterdir():
        if _LEFTOVER.fullmatch(path.name):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()


def _discard(path: Path) -> None:
    """Remove a checkpoint; out of sight first, so that a crash leaves no half of one."""
    if not os.path.lexists(path):
        return
    if path.is_symlink() or not path.is_dir():
        path.unlink()
        return
    removing = path.with_name(f".removing-{path.name}-{uuid.uuid4().hex[:8]}")
    path.rename(removing)
    shutil.rmtree(removing)


def _make(folder: Path) -> None:
    if not folder.is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        _sync(folder.parent)


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as e:
        # Some network file systems cannot force a folder; they order renames themselves.
        if e.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)
