"""One weird trick against data parallelism: what a worker sends in a step, counted and by the closed form.

    data parallelism   all gradients are averaged
    one weird trick    those of the convolutions are; activations pass between the dense layers, of which each worker
                       has some neurons (Krizhevsky 2014, arXiv:1404.5997)

Bytes are counted by the communicator in a step of a small alexnet on eight workers in virtual time, in which real
numbers are exchanged, and there the closed form has to give the same to the byte. At the size of the paper's net, 61.1
million parameters and 128 images a worker, the closed form is evaluated alone: eight such workers are more than a
machine like ours has room for. No times: bytes are the claim.

    python benchmarks/hybrid.py [--quick] [--json FILE]
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import NamedTuple

import _measure as measure
import torch

from manyhands import models
from manyhands.communication.communicator import Communicator
from manyhands.communication.transports.simulated import SimulatedWorld
from manyhands.consistency.synchronous import Synchronous
from manyhands.contract import Batch
from manyhands.models import losses
from manyhands.partition.data import DataReplica
from manyhands.partition.hybrid import (
    SCHEMES,
    HybridCut,
    HybridReplica,
    averaged_B,
    dense_layers,
    exchanged_B,
    one_weird_trick,
)

WORKERS = 8


class Net(NamedTuple):
    """An alexnet and a batch."""

    name: str
    inputs: tuple[int, int, int]
    classes: int
    scale: float
    images: int  # a worker's


SMALL = Net("scaled by 1/16, 64×64 pixels", (3, 64, 64), 64, 1 / 16, 8)
WHOLE = Net("AlexNet, 224×224 pixels", (3, 224, 224), 1000, 1.0, 128)


def built(net: Net) -> torch.nn.Module:
    """The same everywhere."""
    torch.manual_seed(0)
    return models.build(f"alexnet(scale={net.scale})", inputs=net.inputs, classes=net.classes)


def sizes(net: Net) -> tuple[int, int, list[int]]:
    """Parameters, those of the convolutions, and the widths of the features and of each dense layer."""
    with torch.device("meta"):
        model = built(net)
    layers = [layer for _, layer in dense_layers(model, "", WORKERS)]
    dense = sum(p.numel() for layer in layers for p in layer.parameters())
    every = sum(p.numel() for p in model.parameters())
    return every, every - dense, [layers[0].in_features, *(layer.out_features for layer in layers)]


def stepped(comm: Communicator, net: Net, scheme: str | None) -> int:
    """One step; bytes sent, of the strategy and of the cut."""
    model, loss = built(net), losses.build("cross_entropy")
    strategy = Synchronous(update="replicated")
    replica = None
    if scheme is not None:
        cut = one_weird_trick(model, comm, None, scheme)
        assert isinstance(cut, HybridCut)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        replica = HybridReplica(model, optimizer, loss, comm, cut=cut, common=False, blocks=cut.blocks)
    else:
        replica = DataReplica(model, torch.optim.SGD(model.parameters(), lr=0.01), loss, comm, common=False)
    worker = strategy.start(replica, comm)
    before = comm.counters.sent_B() + comm.counters.sent_B("cut")
    target = torch.arange(net.images) % net.classes
    worker.step(Batch(torch.randn(net.images, *net.inputs), target, net.images, WORKERS * net.images))
    return comm.counters.sent_B() + comm.counters.sent_B("cut") - before


def counted(net: Net, scheme: str | None) -> int:
    """What rank 0 of the workers sends."""
    found: Sequence[int] = SimulatedWorld(WORKERS).run(stepped, net, scheme)
    return found[0]


def main() -> None:
    """Run the benchmark."""
    options = measure.arguments(__doc__)
    rows = []
    for net in (SMALL, WHOLE):
        every, convolutions, widths = sizes(net)
        counts = [net.images] * WORKERS
        sent = exchanged_B("a", counts, widths)
        print(f"\n{net.name}: {every:,} parameters, {convolutions:,} of convolutions; {WORKERS} × {net.images} images")
        print(f"{'MB a worker and step':48} {'formula':>10} {'counted':>10}")
        parallel, mean = averaged_B(every, WORKERS), averaged_B(convolutions, WORKERS)
        lines: list[tuple[str, int, int | None]] = [
            ("data parallelism", parallel, counted(net, None) if net is SMALL else None),
            ("  convolutions' gradients", mean, None),
            ("  + convolutions to dense layers", mean + sent.boundary, None),
            ("  + between dense layers", mean + sent.boundary + sent.hidden, None),
        ]
        for scheme in SCHEMES:
            total = mean + sum(exchanged_B(scheme, counts, widths))
            name = f"  + outputs = one weird trick, scheme {scheme}"
            lines.append((name, total, counted(net, scheme) if net is SMALL else None))
        for name, formula, measured in lines:
            print(f"{name:48} {formula / 1e6:10.3f} {'' if measured is None else f'{measured / 1e6:10.3f}'}")
            if measured is not None and measured != formula:
                raise SystemExit(f"{name}: counted {measured} B, and the closed form says {formula} B")
            rows.append({"net": net.name, "what": name.strip(), "formula_B": formula, "counted_B": measured})
        without = mean + sent.boundary + sent.hidden
        print(f"{'data parallelism / one weird trick, no outputs':48} {parallel / without:10.2f}")
    if options.json is not None:
        file = options.json / "hybrid.json" if options.json.is_dir() else options.json
        file.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
