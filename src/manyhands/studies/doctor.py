"""What this machine has for parallel training: versions, cores, memory, transports, data; what is missing, the cure.

A transport is not asked whether it would work: two workers are started and sum a vector.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
import os
import platform
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from manyhands.communication import futex
from manyhands.communication.quota import cpu_quota
from manyhands.communication.transports import transports
from manyhands.data import mnist
from manyhands.errors import BadInput, ManyhandsError
from manyhands.training import environment
from manyhands.training.member import Member
from manyhands.training.team import team
from manyhands.training.team.mpiexec import mpiexec

#: A sum takes microseconds; a transport that needs longer than this is broken.
DEADLINE_S = 20.0
#: Descriptors: of each worker a pipe, a sentinel and what torch opens; below this many, a full host runs out of them.
DESCRIPTORS = 1024

EXTRAS = {
    "mpi4py": ("mpi", "the mpi transport"),
    "tensorboard": ("tensorboard", "event files for TensorBoard in a run's folder"),
}


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at. ``ok`` is None where it is neither good nor bad."""

    name: str
    value: str
    ok: bool | None = None
    cure: str = ""


@dataclass(frozen=True)
class Diagnosis:
    """Everything, by section."""

    sections: dict[str, list[Finding]]
    default_transport: str

    @property
    def works(self) -> bool:
        """Whether the transport that is used when nothing is said works."""
        return all(f.ok is not False for f in self.sections["transports"] if f.name == self.default_transport)

    def as_dict(self) -> dict[str, Any]:
        """Plain values only."""
        sections = {k: [dataclasses.asdict(f) for f in found] for k, found in self.sections.items()}
        return {"works": self.works, "default_transport": self.default_transport, **sections}

    def lines(self) -> list[str]:
        """For people: a mark, a name, what was found, and beneath it what to do."""
        width = max(len(f.name) for found in self.sections.values() for f in found)
        said = []
        for section, found in self.sections.items():
            said.append(section)
            for f in found:
                mark = {True: "+", False: "-", None: " "}[f.ok]
                said.append(f"  {mark} {f.name:<{width}}  {f.value}")
                if f.cure:
                    said.append(f"    {'':<{width}}  → {f.cure}")
            said.append("")
        verdict = "works" if self.works else "does NOT work"
        return [*said, f"The default transport on this machine, {self.default_transport}, {verdict}."]


def examine(*, quick: bool = False, data_dir: Path | None = None) -> Diagnosis:
    """Look at everything; with ``quick`` no workers are started."""
    default = "shared" if environment.shared_memory_works() else "gloo"
    return Diagnosis(
        {
            "versions": list(_versions()),
            "machine": list(_machine()),
            "transports": [_transport(name, quick=quick) for name in transports],
            "data": list(_data(data_dir)),
        },
        default,
    )


# -- versions ----------------------------------------------------------------------------------------------------------


def _versions() -> Iterator[Finding]:
    locked = getattr(sys, "_is_gil_enabled", lambda: True)()
    yield Finding("manyhands", importlib.metadata.version("manyhands"))
    yield Finding("Python", platform.python_version() + ("" if locked else ", free-threaded"))
    yield Finding("torch", torch.__version__)
    yield Finding("numpy", importlib.metadata.version("numpy"))
    for package, (extra, what) in EXTRAS.items():
        if importlib.util.find_spec(package) is None:
            yield Finding(package, f"not installed: no {what}", cure=f"pip install 'manyhands[{extra}]'")
        else:
            yield Finding(package, importlib.metadata.version(package))
    yield _mpi()


def _mpi() -> Finding:
    try:
        program = mpiexec(1)[0]
    except BadInput:
        return Finding("mpiexec", "none found", cure="pip install 'manyhands[mpi]'")
    try:
        asked = subprocess.run([program, "--version"], capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired) as e:
        return Finding("mpiexec", f"{program} does not answer: {e}", ok=False, cure="pip install 'manyhands[mpi]'")
    said = asked.stdout.strip().splitlines() or ["of no known version"]
    if said[0].startswith("HYDRA"):
        version = next((x.split(":")[1].strip() for x in said if "Version:" in x), "of no known version")
        return Finding("mpiexec", f"MPICH {version}: {program}")
    return Finding("mpiexec", f"{said[0]}: {program}")


# -- machine -----------------------------------------------------------------------------------------------------------


def _machine() -> Iterator[Finding]:
    cores, all_cores = futex.affinity(), os.cpu_count() or 1
    rest = f" of {all_cores}" if cores != all_cores else ""
    yield Finding("cores", f"{cores}{rest} for this process ({platform.machine()})")
    quota = cpu_quota()
    if quota is not None:
        short = quota < cores
        yield Finding(
            "CPU quota",
            f"{quota:.3g} cores by the control group",
            ok=not short,
            cure=f"--workers {max(1, int(quota))}: more share that much time between them" if short else "",
        )
    total_B, free_B = memory()
    if total_B:
        yield Finding("memory", f"{_gb(free_B)} free of {_gb(total_B)}")
    if Path("/dev/shm").is_dir():
        room = os.statvfs("/dev/shm")
        yield Finding("/dev/shm", f"{_gb(room.f_bavail * room.f_frsize)} free (not used by manyhands itself)")
    yield _memfd()
    yield Finding(
        "futex",
        "available" if futex.AVAILABLE else f"not used on {sys.platform} {platform.machine()}",
        ok=futex.AVAILABLE,
        cure="" if futex.AVAILABLE else "the shared transport is for Linux on x86-64; gloo is taken instead",
    )
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    few = soft != resource.RLIM_INFINITY and soft < DESCRIPTORS
    yield Finding(
        "open files",
        "no limit" if soft == resource.RLIM_INFINITY else f"at most {soft}",
        ok=not few,
        cure=f"ulimit -n {DESCRIPTORS}" if few else "",
    )
    gpus = (
        [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    )
    yield Finding("GPUs", ", ".join(gpus) if gpus else "none that torch sees")


def _memfd() -> Finding:
    try:
        os.close(os.memfd_create("manyhands-doctor"))
    except (AttributeError, OSError) as e:
        return Finding("memfd", f"not available ({e})", ok=False, cure="--transport gloo needs no shared memory")
    return Finding("memfd", "available", ok=True)


def memory() -> tuple[int, int]:
    """Total and free bytes; zeros where the system does not tell."""
    try:
        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        return int(lines["MemTotal"].split()[0]) * 1024, int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return 0, 0


def _gb(value: float) -> str:
    return f"{value / 1e9:.3g} GB"


# -- transports --------------------------------------------------------------------------------------------------------


def _transport(name: str, *, quick: bool) -> Finding:
    missing = _missing(name)
    if missing is not None:
        return missing
    if quick:
        return Finding(name, "looks as if it works; not tried (--quick)")
    workers = {"single": 1, "nccl": min(2, torch.cuda.device_count())}.get(name, 2)
    began = time.perf_counter()
    try:
        with team(name, workers, threads=1, timeout_s=DEADLINE_S / 2, allocator="plain") as crew:
            sums = crew.run(f"{__name__}:add", deadline_s=DEADLINE_S)
    except ManyhandsError as e:
        reason = str(e).splitlines()[0]
        return Finding(name, f"does not work: {reason}", ok=False, cure=_other(name))
    right = sums == [workers * (workers + 1) / 2] * workers
    took = f"{workers} worker{'s' * (workers > 1)} started and summed a vector in {time.perf_counter() - began:.1f} s"
    return Finding(name, took if right else f"sums wrongly: {sums}", ok=right, cure="" if right else _other(name))


def _missing(name: str) -> Finding | None:
    if name == "shared" and not environment.shared_memory_works():
        return Finding(name, "not on this machine", cure="it is for Linux on x86-64; gloo is taken instead")
    if name == "gloo" and not (torch.distributed.is_available() and torch.distributed.is_gloo_available()):
        return Finding(name, "this torch is built without it", ok=False, cure="install torch from PyPI or pytorch.org")
    if name == "nccl":
        if not torch.cuda.is_available():
            return Finding(name, "torch sees no CUDA device here")
        if not torch.distributed.is_nccl_available():
            return Finding(name, "this torch is built without it", cure="install torch with CUDA from pytorch.org")
    if name == "mpi" and (importlib.util.find_spec("mpi4py") is None or not _has_mpiexec()):
        return Finding(name, "not installed", cure="pip install 'manyhands[mpi]': an MPI from a wheel")
    return None


def _has_mpiexec() -> bool:
    return Path(sys.executable).with_name("mpiexec").exists() or shutil.which("mpiexec") is not None


def _other(name: str) -> str:
    return "--transport shared" if name == "gloo" else "--transport gloo"


def add(member: Member) -> float:
    """What every worker does: rank + 1, summed over the ranks."""
    comm = member.comm
    device = f"cuda:{comm.rank}" if comm.transport == "nccl" else "cpu"
    x = torch.full((1000,), comm.rank + 1.0, device=device)
    comm.all_reduce(x).wait()
    return float(x[-1])


# -- data --------------------------------------------------------------------------------------------------------------


def _data(data_dir: Path | None) -> Iterator[Finding]:
    place = mnist.at_hand(data_dir)
    if place is not None:
        yield Finding("mnist", f"in {place}", ok=True)
    else:
        looked = ", ".join(map(str, mnist.places(data_dir)))
        yield Finding(
            "mnist",
            f"not at hand (looked in {looked})",
            cure="--data mnist downloads it; or name its folder by --data-dir or MANYHANDS_DATA",
        )
    yield Finding("digits", "1,797 scans of 8×8 pixels come with manyhands", ok=True)
