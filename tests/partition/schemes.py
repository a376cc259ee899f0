"""A network cut by a scheme beside the whole one: what both answer, what is sent, and what some steps make of them."""

import copy
import functools
from itertools import pairwise

import torch
from torch import nn

from manyhands.communication.topology import Mesh, shares
from manyhands.communication.transports.simulated import SimulatedWorld
from manyhands.contract import Batch
from manyhands.partition.data import DataReplica
from manyhands.partition.tensor.rehearsal import rehearsed
from manyhands.plan import strategy_from

EXACT = {"rtol": 1e-12, "atol": 1e-12}


def perceptron(*sizes, activation=nn.Tanh):
    """As `models.perceptron`, in float64."""
    torch.manual_seed(3)
    modules = [nn.Flatten()]
    for n_in, n_out in pairwise(sizes):
        modules += [nn.Linear(n_in, n_out), activation()]
    return nn.Sequential(*modules[:-1]).double()


def samples(rows, *shape):
    return torch.randn(rows, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(rows))


def answered(model, x, wants_x=True):
    """Output, gradients of the input and of each parameter, and buffers."""
    x = x.clone().requires_grad_(wants_x)
    y = model(x)
    (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)).sum().backward()
    return y.detach(), x.grad, {n: p.grad for n, p in model.named_parameters()}, dict(model.named_buffers())


def agree(whole, x, text, size):
    """The model cut on so many ranks answers and learns as the whole one; by rank its blocks and its model."""
    how = rehearsed(whole, text, size, x[:1])
    y, grad_x, grads, buffers = answered(copy.deepcopy(whole), x)

    def run(comm):
        mine = copy.deepcopy(whole)
        done = how.cut(mine, comm)
        return *answered(mine, x), done.blocks, mine

    found = SimulatedWorld(size).run(run)
    for own_y, own_grad_x, own_grads, own_buffers, blocks, _ in found:
        torch.testing.assert_close(own_y, y, **EXACT)
        torch.testing.assert_close(own_grad_x, grad_x, **EXACT)
        assert own_grads.keys() == grads.keys(), "parameters keep the user's names"
        for key, grad in own_grads.items():
            torch.testing.assert_close(grad, blocks[key].take(grads[key]) if key in blocks else grads[key], **EXACT)
        for key, value in own_buffers.items():
            torch.testing.assert_close(value, buffers[key], **EXACT)
    return [(blocks, mine) for *_, blocks, mine in found]


def sent(whole, x, text, size):
    """By rank the bytes of a forward and of a backward by operation, where nobody wants the gradient of the samples."""
    how = rehearsed(whole, text, size, x[:1])

    def tally(comm):
        return {name: t.sent_B for name, t in comm.counters.tallies["cut"].items()}

    def run(comm):
        mine = copy.deepcopy(whole)
        how.cut(mine, comm)
        y = mine(x)
        forward = tally(comm)
        y.sum().backward()
        both = tally(comm)
        assert comm.counters.sent_B("step") == 0
        return forward, {name: n - forward.get(name, 0) for name, n in both.items()}

    return SimulatedWorld(size).run(run)


def trained(comm, mesh, text, whole, x, y, *, clip=None, strategy="synchronous(update='sharded')", steps=4):
    """Parameters, and blocks, after some steps on the batch ``x``, ``y``."""
    comm.mesh = mesh
    model, made = copy.deepcopy(whole), strategy_from(strategy)
    group = comm.over(frozenset({"tensor"}))
    blocks = {} if group.size == 1 else rehearsed(model, text, group.size, x[:1]).cut(model, group).blocks
    # Adam forgets the scale of a gradient, so it would not notice a wrong norm.
    optimizer = (
        torch.optim.Adam(model.parameters(), lr=0.02)
        if clip is None
        else torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9, weight_decay=0.01)
    )
    replica = DataReplica(
        model, optimizer, nn.functional.mse_loss, comm, common=made.parameters == "common", clip=clip, blocks=blocks
    )
    worker = made.start(replica, comm)
    data = comm.over(frozenset({"data"}))
    lo, hi = shares(len(x), data.size)[data.rank]
    for step in range(steps):
        comm.step = step
        worker.step(Batch(x[lo:hi], y[lo:hi], hi - lo, len(x)))
    worker.finish()
    return {n: p.detach().clone() for n, p in model.named_parameters()}, blocks


def trains_alike(text, whole, x, y, *, data=1, tensor=2, **how):
    """Some steps on a mesh end where those of one worker end; by rank parameters and blocks."""
    ((expected, _),) = SimulatedWorld(1).run(functools.partial(trained, **how), Mesh(data=1), text, whole, x, y)
    mesh = Mesh(data=data, tensor=tensor)
    found = SimulatedWorld(mesh.size).run(functools.partial(trained, **how), mesh, text, whole, x, y)
    for parameters, blocks in found:
        assert parameters.keys() == expected.keys()
        for name, value in parameters.items():
            part = blocks[name].take(expected[name]) if name in blocks else expected[name]
            torch.testing.assert_close(value, part, **EXACT)
    return found
