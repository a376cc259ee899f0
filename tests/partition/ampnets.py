"""What ranks of AMPNet tests do, and the same models in plain torch; a file of its own because workers import it."""

import copy
import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from manyhands.communication.communicator import Communicator
from manyhands.communication.topology import Mesh
from manyhands.contract import Batch, rows_of
from manyhands.data.boolean_trees import boolean_trees
from manyhands.data.list_reduction import list_reduction
from manyhands.errors import ManyhandsError
from manyhands.partition.ampnet.chain import graph_of
from manyhands.partition.ampnet.graph import Graph
from manyhands.partition.ampnet.list_reduction import list_rnn
from manyhands.partition.ampnet.place import placed
from manyhands.partition.ampnet.replica import GraphReplica, keep_nodes
from manyhands.partition.ampnet.strategy import AMPNet
from manyhands.partition.ampnet.tree import tree_rnn


def chain() -> nn.Sequential:
    inner = nn.Sequential(nn.Linear(8, 8), nn.ReLU(inplace=True))
    return nn.Sequential(nn.Flatten(), nn.Linear(6, 8), nn.Tanh(), inner, nn.Dropout(0.0), nn.Linear(8, 3))


def normed(classes: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, classes))


def no_chain(classes: int) -> nn.Module:
    return nn.Linear(8, classes)


def plain_list(model: Graph, inputs: dict[str, Tensor]) -> Tensor:
    """The recurrence as one would write it, for one list."""
    linear = model.cell[0]
    h = model.start.state
    for t in range(int(inputs["length"][0])):
        x = F.embedding(inputs["token"][:, t], model.embed.weight)
        h = torch.tanh(F.linear(torch.cat([x, h], -1), linear.weight, linear.bias))
    return F.linear(h, model.head.weight, model.head.bias)


def plain_tree(model: Graph, inputs: dict[str, Tensor]) -> Tensor:
    """The recursion as one would write it, for one tree."""
    tokens = {p: t for p, t in zip(inputs["place"][0].tolist(), inputs["token"][0], strict=True) if p}
    linear = model.cell.linear

    def at(place: int) -> Tensor:
        token = tokens[place][None]
        if 2 * place not in tokens:
            return F.embedding(token, model.leaf.table.weight)
        operator = F.embedding(token - 2, model.operator.table.weight)
        return torch.tanh(
            F.linear(torch.cat([operator, at(2 * place), at(2 * place + 1)], -1), linear.weight, linear.bias)
        )

    return F.linear(at(1), model.head.weight, model.head.bias)


#: The model, the same in plain torch for an instance, and its samples.
MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[Any, Any], Tensor]]] = {
    "chain": (chain, lambda model, inputs: model(inputs)),
    "list": (lambda: list_rnn(10, hidden=6, embedding=4), plain_list),
    "tree": (lambda: tree_rnn(2, hidden=5), plain_tree),
}


def batch(model: str, n: int, seed: int = 0) -> tuple[Any, Tensor]:
    if model == "chain":
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(n, 6, generator=generator, dtype=torch.float64), torch.arange(n) % 3
    make = {"list": list_reduction, "tree": boolean_trees}[model]
    return make(samples=n, test=1, seed=seed).train.rows(torch.arange(n))


def build(model: str) -> nn.Module:
    """The same everywhere; from a generator, since ranks that are threads share the global one."""
    made = MODELS[model][0]().double()
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for p in made.parameters():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64) / 2)
    return made


def optimizer(name: str, parameters: Any) -> torch.optim.Optimizer:
    if name == "adam":
        return torch.optim.Adam(parameters, lr=0.01)
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9 if name == "momentum" else 0.0)


def replica_of(
    comm: Communicator, model: nn.Module, strategy: AMPNet, sample: Any, loss: Any = F.cross_entropy, opt: str = "sgd"
) -> GraphReplica:
    """As the training loop makes it."""
    comm.mesh = Mesh(pipeline=comm.size)
    graph = graph_of(model)
    place = placed(graph, comm.size, sample)
    keep_nodes(model, graph, place, comm.rank)
    made = optimizer(opt, model.parameters())
    return GraphReplica(model, made, loss, comm, graph=graph, place=place, strategy=strategy, common=False)


def instances(x: Any, y: Tensor, samples: int) -> list[tuple[Any, Tensor]]:
    return [(rows_of(x, lo, lo + samples), y[lo : lo + samples]) for lo in range(0, len(y), samples)]


def differences(model: nn.Module, other: nn.Module) -> float:
    """The largest difference of any parameter that is here."""
    theirs = dict(other.named_parameters())
    return max(float((p - theirs[name]).detach().abs().max()) for name, p in model.named_parameters())


def sequential_difference(comm: Communicator, name: str, samples: int, opt: str) -> list[float]:
    """With one active key, against torch: instance after instance. The largest difference, and of the loss."""
    model = build(name)
    plain, forward = copy.deepcopy(model), MODELS[name][1]
    theirs = optimizer(opt, plain.parameters())
    first, _ = batch(name, 1)
    strategy = AMPNet(max_active_keys=1, samples=samples)
    replica = replica_of(comm, model, strategy, first, opt=opt)
    worker = strategy.start(replica, comm)
    apart = 0.0
    for seed in range(2):
        x, y = batch(name, 7, seed)
        loss = worker.step(Batch(x, y, 7))
        total = 0.0
        for inputs, target in instances(x, y, samples):
            theirs.zero_grad()
            found = F.cross_entropy(forward(plain, inputs), target)
            found.backward()
            theirs.step()
            total += found.item() * len(target)
        apart = max(apart, abs(float(loss) - total / 7))
        assert set(replica.runtime.staleness) <= {0}
    assert replica.runtime.peak_active == (1 if comm.rank == 0 else 0)
    return [differences(model, plain), apart]


def gradient_difference(comm: Communicator, name: str, max_active_keys: int) -> float:
    """Gathered over a batch without an update, against autograd on the same model in plain torch."""
    model = build(name)
    plain, forward = copy.deepcopy(model), MODELS[name][1]
    first, _ = batch(name, 1)
    strategy = AMPNet(max_active_keys=max_active_keys, min_update_frequency=1000)
    replica = replica_of(comm, model, strategy, first)
    x, y = batch(name, 9, 3)
    replica.gradients(Batch(x, y, 9))
    for inputs, target in instances(x, y, 1):
        F.cross_entropy(forward(plain, inputs), target).backward()
    theirs = dict(plain.named_parameters())
    assert not replica.runtime.updates
    if comm.rank == 0:
        assert replica.runtime.peak_active == min(9, max_active_keys)
    return max(float((p.grad - theirs[n].grad).abs().max()) for n, p in model.named_parameters())


def relaxed(comm: Communicator, name: str, max_active_keys: int, frequency: int) -> dict[str, Any]:
    """Some steps with many keys: what is logged, and how far the answers are from the model put together."""
    model = build(name)
    before = {purpose: comm.counters.sent_B(purpose) for purpose in ("cut", "step")}  # of tests before this one
    first, _ = batch(name, 1)
    strategy = AMPNet(max_active_keys, frequency)
    replica = replica_of(comm, model, strategy, first)
    worker = strategy.start(replica, comm)
    for seed in range(2):
        x, y = batch(name, 12, seed)
        worker.step(Batch(x, y, 12))
    runtime = replica.runtime
    assert all(store.empty for store in runtime._stores.values())
    x, _ = batch(name, 5, 9)
    model.eval()
    with torch.no_grad():
        answers = replica.answering(x)
    return {
        "updates": [list(u) for u in runtime.updates],
        "left": [n.gathered for n in runtime.learning.values()],
        "visits": [len(n.visits) for n in runtime.learning.values()],
        "peak": runtime.peak_active,
        "answers": answers,
        "parameters": {n: p.detach().clone() for n, p in model.named_parameters()},
        "sent_B": comm.counters.sent_B("cut") - before["cut"],
        "step_B": comm.counters.sent_B("step") - before["step"],
    }


def not_finite(comm: Communicator) -> str:
    """One instance's loss is not finite: all ranks say so, and no parameter is spoilt."""
    model = build("chain")
    x, y = batch("chain", 8)
    x[3] = float("inf")
    replica = replica_of(comm, model, AMPNet(2), x[:1])
    try:
        replica.gradients(Batch(x, y, 8))
    except ManyhandsError as e:
        assert all(bool(p.isfinite().all()) for p in model.parameters())
        return type(e).__name__
    return "nothing"


def a_rank_does_not_come(comm: Communicator) -> str:
    """Rank 1 takes no part in the second batch."""
    model = build("chain")
    x, y = batch("chain", 4)
    replica = replica_of(comm, model, AMPNet(2), x[:1])
    replica.gradients(Batch(x, y, 4))
    if comm.rank == 1:
        return ""
    comm.timeout_s = 0.3
    for mail in (getattr(comm, "_mailbox", None), getattr(comm, "_enter", None)):
        if hasattr(mail, "timeout_s"):
            mail.timeout_s = 0.3
    try:
        replica.gradients(Batch(x, y, 4))
    except Exception as e:
        return f"{type(e).__name__}: {e}"
    return "nothing"


def resumed_difference(comm: Communicator) -> float:
    """Half of a run, its state, the other half in a new worker: as without the break, gathered gradients included."""
    ends = []
    for breaks in (False, True):
        model = build("list")
        first, _ = batch("list", 1)
        strategy = AMPNet(max_active_keys=1, min_update_frequency=4)
        replica = replica_of(comm, model, strategy, first, opt="momentum")
        worker = strategy.start(replica, comm)
        worker.step(Batch(*batch("list", 7, 0), 7))
        if breaks:
            state, moments = worker.state_dict(), replica.optimizer_state()
            assert any(gathered for _, gathered, _ in state["gathered"].values())
            kept = {n: p.detach().clone() for n, p in model.named_parameters()}
            model = build("list")
            replica = replica_of(comm, model, strategy, first, opt="momentum")
            worker = strategy.start(replica, comm)
            with torch.no_grad():
                for n, p in model.named_parameters():
                    p.copy_(kept[n])
            replica.load_optimizer_state(moments)
            worker.load_state_dict(state)
        worker.step(Batch(*batch("list", 7, 1), 7))
        ends.append(model)
    return differences(*ends)


def put_together(results: list[dict[str, Any]]) -> dict[str, Tensor]:
    return dict(itertools.chain.from_iterable(r["parameters"].items() for r in results))
