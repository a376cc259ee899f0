"""Strategies on a mesh on which the model is cut: every one that bears cuts, on data × tensor."""

import pytest
import torch
from torch import nn

from manyhands.communication.topology import Mesh, shares
from manyhands.communication.transports.simulated import SimulatedWorld
from manyhands.consistency import strategies
from manyhands.contract import Batch
from manyhands.partition.data import DataReplica
from manyhands.partition.pipeline.cut import cut as cut_into_stages
from manyhands.partition.pipeline.one_f_one_b import one_f_one_b
from manyhands.partition.pipeline.replica import PipelineReplica, keep_stages
from manyhands.partition.tensor.cut import cut
from manyhands.partition.tensor.rules import found
from manyhands.plan import strategy_from
from tests.matrices import halved

EXACT = {"rtol": 1e-12, "atol": 1e-12}
SAMPLES, STEPS = 10, 5
#: With options under which they exchange within so few steps.
BEAR = {
    "synchronous": "synchronous(update='sharded')",
    "local": "local(every=2)",
    "diloco": "diloco(inner=2)",
    "elastic": "elastic(every=2)",
    "gossip": "gossip(graph='complete')",
}
BEARERS = [BEAR.get(name, name) for name in strategies if strategies.load(name).bears_cuts]


def data(step):
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(SAMPLES, 6, generator=generator, dtype=torch.float64)
    return x, torch.randn(SAMPLES, 3, generator=generator, dtype=torch.float64)


def built():
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 7), nn.LayerNorm(7), nn.Linear(7, 9), nn.Tanh(), nn.Linear(9, 3)
    ).double()


def trained(comm, mesh, text, optimizer, clip):
    """Parameters after some steps: of the whole model, and those of the pieces that all ranks of a replica hold."""
    comm.mesh = mesh
    strategy, model = strategy_from(text), built()
    blocks = cut(model, found(model, mesh["tensor"]), comm.over(frozenset({"tensor"}))).blocks
    common = {"common": strategy.parameters == "common", "clip": clip, "blocks": blocks}
    if mesh["pipeline"] > 1:
        schedule = one_f_one_b(mesh["pipeline"], 3)
        rank = comm.over(frozenset({"pipeline"})).rank
        stages = {rank: cut_into_stages(model, ["3", "6"][: mesh["pipeline"] - 1]).stages[rank]}
        keep_stages(model, stages)
        common |= {"stages": stages, "schedule": schedule}
    kind = PipelineReplica if mesh["pipeline"] > 1 else DataReplica
    replica = kind(model, optimizer(model.parameters()), nn.functional.mse_loss, comm, **common)
    worker = strategy.start(replica, comm.over(frozenset({"data"})) if strategy.bears_stages else comm)
    group, alike = comm.over(frozenset({"data"})), []
    for step in range(STEPS):
        comm.step = step
        (x, y), (lo, hi) = data(step), shares(SAMPLES, group.size)[group.rank]
        if strategy.whole_batch:
            lo, hi = 0, SAMPLES
        worker.step(Batch(x[lo:hi], y[lo:hi], hi - lo, SAMPLES))
        alike.append([p.flat.clone() for p in replica.pieces if "tensor" in p.replicated_over])
    worker.meet()
    worker.finish()
    return {n: p.detach().clone() for n, p in model.named_parameters()}, blocks, alike


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.01),
    "adam": lambda p: torch.optim.Adam(p, lr=0.05),
}


@pytest.mark.parametrize(("text", "optimizer", "axis"), halved(BEARERS, OPTIMIZERS, ["tensor", "pipeline"]))
def test_a_cut_model_trains_as_the_whole_one_does_on_as_many_replicas(text, optimizer, axis):
    arguments = text, OPTIMIZERS[optimizer], 0.5 if text.startswith("synchronous") else None
    whole = SimulatedWorld(2).run(trained, Mesh(data=2), *arguments)
    found_on = SimulatedWorld(4).run(trained, Mesh({"data": 2, axis: 2}), *arguments)
    assert {name for parameters, _, _ in found_on for name in parameters} == whole[0][0].keys()
    for rank, (parameters, blocks, alike) in enumerate(found_on):
        expected = whole[rank // 2][0]
        assert bool(blocks) == (axis == "tensor")
        for name, value in parameters.items():
            torch.testing.assert_close(
                value, blocks[name].take(expected[name]) if name in blocks else expected[name], **EXACT
            )
        for mine, others in zip(alike, found_on[rank ^ 1][2], strict=True):
            assert bool(mine) == (axis == "tensor"), "the norm is on both"
            assert all(torch.equal(a, b) for a, b in zip(mine, others, strict=True)), "bit for bit"


MESHES = [
    Mesh(data=1, tensor=2),
    Mesh(tensor=3),
    Mesh(data=3, tensor=2),
    Mesh(pipeline=3),
    Mesh(data=2, tensor=2, pipeline=2),
]


@pytest.mark.parametrize(("update", "mesh"), halved(["sharded", "replicated"], MESHES), ids=str)
def test_synchronous_on_any_mesh_equals_one_worker(mesh, update):
    arguments = f"synchronous(update='{update}')", OPTIMIZERS["adam"], 0.5
    ((expected, _, _),) = SimulatedWorld(1).run(trained, Mesh(data=1), *arguments)
    for parameters, blocks, _ in SimulatedWorld(mesh.size).run(trained, mesh, *arguments):
        for name, value in parameters.items():
            torch.testing.assert_close(
                value, blocks[name].take(expected[name]) if name in blocks else expected[name], **EXACT
            )


CLIPPED = [text for text in BEARERS if not strategies.load(strategy_from(text).name).whole_batch]


@pytest.mark.parametrize(("text", "axis"), halved(CLIPPED, ["tensor", "pipeline"]))
def test_gradients_are_clipped_by_the_norm_of_the_whole_replica(text, axis):
    arguments = text, OPTIMIZERS["sgd"], 0.05
    whole = SimulatedWorld(2).run(trained, Mesh(data=2), *arguments)
    for rank, (parameters, blocks, _) in enumerate(
        SimulatedWorld(4).run(trained, Mesh({"data": 2, axis: 2}), *arguments)
    ):
        expected = whole[rank // 2][0]
        for name, value in parameters.items():
            theirs = blocks[name].take(expected[name]) if name in blocks else expected[name]
            torch.testing.assert_close(value, theirs, **EXACT)


@pytest.mark.parametrize("text", ["asynchronous", "downpour(fetch=2, push=3)", "ssp(staleness=1)"])
def test_split_replicas_under_a_parameter_server_are_distbelief(text):
    """One replica on two stages is what it is on one worker; several end alike and near."""
    ((expected, _, _),) = SimulatedWorld(1).run(trained, Mesh(data=1), text, OPTIMIZERS["sgd"], 0.5)
    found_on = SimulatedWorld(2).run(trained, Mesh(pipeline=2), text, OPTIMIZERS["sgd"], 0.5)
    assert {name for parameters, _, _ in found_on for name in parameters} == expected.keys()
    for parameters, _, _ in found_on:
        for name, value in parameters.items():
            torch.testing.assert_close(value, expected[name], **EXACT)
    split = SimulatedWorld(4).run(trained, Mesh(data=2, pipeline=2), text, OPTIMIZERS["sgd"], 0.5)
    for stage in (0, 1):
        one, other = split[stage][0], split[2 + stage][0]
        assert one.keys() == other.keys()
        assert all(torch.equal(value, other[name]) for name, value in one.items()), "the servers' at the end"
        assert all(value.isfinite().all() for value in one.values())
