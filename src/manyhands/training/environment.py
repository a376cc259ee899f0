"""Where this process is: its cores and GPUs, and whether a launcher (torchrun, mpirun, srun) has started it as a rank.

Only the launchers' own variables are read.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from manyhands.communication import futex


@dataclass(frozen=True)
class Launched:
    """A rank that a launcher has started."""

    launcher: str  # "torchrun", "mpi" or "slurm"
    rank: int
    size: int
    local_rank: int


#: Rank, size and local rank, by launcher. Inside an allocation torchrun and mpirun may themselves run under srun, so
#: they are asked first.
_VARIABLES = (
    ("torchrun", "RANK", "WORLD_SIZE", "LOCAL_RANK"),
    ("mpi", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
    ("mpi", "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID"),
    ("slurm", "SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"),
)


def launched(environment: Mapping[str, str] | None = None) -> Launched | None:
    """What a launcher says of this process, or None when there is none."""
    env = os.environ if environment is None else environment
    for launcher, rank, size, local in _VARIABLES:
        if rank not in env or size not in env:
            continue
        if launcher == "torchrun" and "MASTER_ADDR" not in env:
            continue
        if launcher == "slurm" and ("SLURM_STEP_ID" not in env or env.get("SLURM_STEP_NUM_TASKS", env[size]) == "1"):
            # An allocation without srun, or a shell within one: nobody has started ranks.
            continue
        return Launched(launcher, int(env[rank]), int(env[size]), int(env.get(local, env[rank])))
    return None


def shared_memory_works() -> bool:
    """Whether the ``shared`` transport can run here."""
    return futex.AVAILABLE and hasattr(os, "memfd_create")


def memory_B() -> int | None:
    """The machine's memory, None where the system does not tell."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return None
