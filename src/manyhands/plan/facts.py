"""What a plan is checked against, and which words it may use."""

from __future__ import annotations

from dataclasses import dataclass

from manyhands.errors import Problem

BUFFER_POLICIES = ("average", "rank0", "local")
PRECISIONS = ("float32", "bfloat16", "flexpoint")
DEVICES = ("auto", "cpu", "cuda")
ALLOCATORS = ("tuned", "plain")
#: The transports whose class says ``shares_memory``; asking the classes would load torch.
SHARE_MEMORY = ("single", "threads", "shared", "simulated")
#: Those whose class says ``one_sided``.
ONE_SIDED = ("mpi",)
#: Where a parameter server is memory and takes no rank; see `Setting.servers_in_memory`.
SERVERS_IN_MEMORY = (*SHARE_MEMORY, *ONE_SIDED)

#: What a forked worker adds to memory, measured with torch 2.13: its own pages of the interpreter and of torch.
WORKER_B = 30_000_000


@dataclass(frozen=True)
class Facts:
    """What a plan is checked against: the machine, the optimizer and the loss."""

    cores: int
    gpus: int = 0
    shared_memory: bool = True  # the shared transport works here
    launched: int | None = None  # ranks that a launcher has started, this process being one of them
    launcher: str | None = None  # "torchrun", "mpi" or "slurm"
    elementwise: bool = True
    stateless: bool = False
    optimizer_problem: Problem | None = None
    clip: bool = False
    served: bool = True  # a parameter server can apply the optimizer
    batch_size: int = 1
    memory_B: int | None = None  # of the machine, where that is known
    nodes: int | None = None  # of the cluster on which it is simulated; None: it is for real workers
