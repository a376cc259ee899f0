"""What a plan is: how the work is split, everything but task and hardware. Text in, text out; checked elsewhere.

The three descriptions meet here: a `Strategy` from ``consistency``, a cut from ``partition`` and a transport from
``communication``, which do not know each other.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from manyhands.calling import described
from manyhands.catalogue import Catalogue
from manyhands.communication.compression.compressor import compressor_from
from manyhands.communication.topology import Mesh, parse_mesh
from manyhands.consistency import strategies
from manyhands.contract import Strategy
from manyhands.errors import BadInput
from manyhands.partition import cut_strategies


def strategy_from(value: str | Strategy) -> Strategy:
    """A strategy from its text; `str` of the result reads back to an equal one."""
    every = Catalogue("strategy", {**strategies, **cut_strategies})
    return described("strategy", value, every, Strategy, "synchronous")  # type: ignore[type-abstract]


def _mesh_from(text: str) -> Mesh:
    try:
        return parse_mesh(text)
    except ValueError:
        raise BadInput(f"mesh {text!r}: the form is axis=extent,axis=extent, e.g. data=2.") from None


@dataclass(frozen=True)
class Plan:
    """How the work is split.

    ``workers=None``: as many as the launcher started, else one per core; never counted are the ranks that some
    strategies want beside them as servers where no memory is shared. ``micro_batches`` cuts each worker's share
    into passes whose gradients add up (gradient accumulation, bunch mode); by default one, in a pipeline four a stage.
    ``shard=1`` shares optimizer state over workers (ZeRO stage 1), 2 gradients too and 3 parameters too, see
    `partition.sharded`. ``threads`` are per worker, 0 = cores / workers.
    ``allocator='plain'`` leaves glibc's malloc as it is. ``tensor`` says which modules are cut along the mesh's tensor
    axis (see `partition.tensor.rules`; default auto) or which scheme cuts the network (`partition.tensor.schemes`),
    ``pipeline`` the schedule of its pipeline axis and where stages begin (`partition.pipeline.description`), and
    ``recompute`` that a stage computes activations anew before a backward. ``compress`` names what is sent instead of
    dense vectors (`communication.compression`); it is an option of the strategy, said here for whichever has it.

        Plan(strategy="synchronous", workers=2)
    """

    strategy: Strategy | str = "synchronous"
    mesh: Mesh | str | None = None
    compress: str | None = None
    tensor: str | None = None
    pipeline: str | None = None
    shard: int | None = None
    micro_batches: int | None = None
    recompute: bool = False
    buffers: str = "average"
    precision: str = "float32"
    workers: int | None = None
    threads: int = 0
    transport: str = "auto"
    device: str = "auto"
    allocator: str = "tuned"
    timeout_s: float = 60.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "strategy", strategy_from(self.strategy))
        if self.compress is not None and self.compress != "auto":
            object.__setattr__(self, "compress", str(compressor_from(self.compress)))
        if isinstance(self.mesh, str):
            object.__setattr__(self, "mesh", _mesh_from(self.mesh))
        elif self.mesh is not None and not isinstance(self.mesh, Mesh):
            raise BadInput(
                f"mesh {self.mesh!r} is a {type(self.mesh).__name__}; it is text such as 'data=2' or a Mesh, "
                "e.g. Mesh(data=2)."
            )

    def __str__(self) -> str:
        changed = [
            f"{f.name}={getattr(self, f.name)}" for f in dataclasses.fields(self) if getattr(self, f.name) != f.default
        ]
        return f"plan({', '.join(changed)})"

    def as_table(self) -> dict[str, Any]:
        """The fields as TOML can hold them, strategy and mesh as text."""
        table = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        table["strategy"] = str(self.strategy)
        if self.mesh is not None:
            assert isinstance(self.mesh, Mesh)
            table["mesh"] = ",".join(f"{a}={n}" for a, n in self.mesh.axes)
        return {k: v for k, v in table.items() if v is not None}
