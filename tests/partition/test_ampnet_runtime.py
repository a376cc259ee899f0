"""One active key is sequential SGD; more are stale by what is allowed at most; gradients are autograd's."""

import pytest
import torch

import manyhands as mh
from manyhands.communication.transports.single import SingleCommunicator
from manyhands.errors import BadInput, CommunicationError, Deadlock, InvalidPlan, WorkerFailed
from manyhands.partition.ampnet import Concat, Cond, Graph, Group, Isu, Loss, Phi, Source, Transform, Ungroup
from manyhands.partition.ampnet.chain import whole_input
from manyhands.partition.ampnet.nodes import Add, Begin, Broadcast
from manyhands.partition.ampnet.place import placed
from manyhands.partition.ampnet.runtime import Runtime
from manyhands.testing import run_ranks
from manyhands.training import checkpoint
from tests.partition import ampnets

slow = pytest.mark.slow
PLACES = [
    ("single", 1),
    ("simulated", 2),
    ("shared", 2),
    pytest.param("threads", 3, marks=pytest.mark.slow),
    pytest.param("simulated", 3, marks=slow),
    pytest.param("shared", 3, marks=slow),
    pytest.param("gloo", 2, marks=slow),
    pytest.param("gloo", 3, marks=slow),
    pytest.param("mpi", 2, marks=slow),
]
#: Autograd adds the visits of a node up in another order in a tree than they come back in.
ROUNDING = {"chain": 0.0, "list": 0.0, "tree": 1e-12}


@pytest.mark.parametrize(("on", "size"), PLACES)
@pytest.mark.parametrize("name", ampnets.MODELS)
@pytest.mark.parametrize("optimizer", ["sgd", pytest.param("momentum", marks=slow), pytest.param("adam", marks=slow)])
def test_one_active_key_is_sequential_sgd(name, on, size, optimizer):
    """Bit for bit where visits are added up in autograd's order."""
    for apart, loss in run_ranks(ampnets.sequential_difference, size, on=on, args=(name, 1, optimizer)):
        assert apart <= ROUNDING[name]
        assert loss <= 1e-12


def test_instances_of_several_samples_are_mini_batches():
    """Of 7 samples in threes the last has one."""
    assert run_ranks(ampnets.sequential_difference, 2, on="threads", args=("chain", 3, "momentum")) == [[0, 0]] * 2


@pytest.mark.parametrize(("on", "size"), PLACES)
@pytest.mark.parametrize("name", ampnets.MODELS)
def test_gradients_through_loops_and_branches_are_autograds(name, on, size):
    for apart in run_ranks(ampnets.gradient_difference, size, on=on, args=(name, 4)):
        assert apart <= 1e-12


@pytest.mark.parametrize(("on", "size"), PLACES)
@pytest.mark.parametrize(("name", "keys", "frequency"), [("chain", 4, 1), ("list", 3, 2), ("tree", 4, 1)])
def test_many_keys_at_once(name, keys, frequency, on, size):
    results = run_ranks(ampnets.relaxed, size, on=on, args=(name, keys, frequency))
    updates = [u for r in results for u in r["updates"]]
    assert updates
    assert all(gathered >= frequency and staleness <= keys for _, _, gathered, staleness in updates)
    assert results[0]["peak"] == keys
    assert all(not any(r["visits"]) for r in results)
    by_node = {node: sum(gathered for name, _, gathered, _ in updates if name == node) for node, *_ in updates}
    assert all(n <= 24 for n in by_node.values())  # gradients, of 24 instances
    if name == "chain":
        assert all(n + max(r["left"]) >= 24 for r in results for n in by_node.values()) or size > 1
    if size > 1:
        assert all(r["sent_B"] > 0 for r in results)
    assert all(r["step_B"] == 0 for r in results)  # as the strategy declares
    # What they answer is what the model, put together, says in one process.
    model = ampnets.build(name)
    model.load_state_dict(ampnets.put_together(results), strict=True)
    model.eval()
    with torch.no_grad():
        whole = model(ampnets.batch(name, 5, 9)[0])
    for r in results:
        torch.testing.assert_close(r["answers"], whole, rtol=1e-12, atol=1e-12)


def test_in_virtual_time_a_race_ends_the_same_way():
    first, second = (run_ranks(ampnets.relaxed, 2, on="simulated", args=("list", 3, 1)) for _ in range(2))
    assert [r["updates"] for r in first] == [r["updates"] for r in second]
    assert all(torch.equal(a, b) for x, y in zip(first, second, strict=True) for a, b in zip(
        x["parameters"].values(), y["parameters"].values(), strict=True
    ))  # fmt: skip


@pytest.mark.parametrize("on", ["threads", pytest.param("gloo", marks=slow)])
def test_a_loss_that_is_not_finite_stops_all_and_spoils_nothing(on):
    assert run_ranks(ampnets.not_finite, 2, on=on) == ["NonFiniteLoss"] * 2


def test_gathered_gradients_outlive_a_break():
    assert run_ranks(ampnets.resumed_difference, 2, on="threads") == [0.0, 0.0]


@pytest.mark.parametrize("on", ["shared", pytest.param("gloo", marks=slow)])
def test_a_deadline_names_rank_node_and_instance(on):
    try:
        said = run_ranks(ampnets.a_rank_does_not_come, 2, on=on, timeout_s=20)[0]
    except (CommunicationError, WorkerFailed) as e:
        said = str(e)
    assert "rank 0" in said
    assert "node part0 waits for the gradient of instance 0" in said


def runtime(graph):
    where = dict.fromkeys(graph.nodes, 0)
    return Runtime(graph, where, SingleCommunicator(), loss=torch.nn.functional.mse_loss, update=lambda name, n: None)


def test_a_join_that_never_completes_is_told_at_once():
    nodes = {
        "x": Source(whole_input),
        "both": Broadcast(2),
        "one": Isu(Begin("t", 0)),
        "two": Isu(Begin("t", 1)),
        "meet": Concat(2),
        "loss": Loss(),
    }
    edges = ["x -> both", "both.0 -> one", "both.1 -> two", "one -> meet.0", "two -> meet.1", "meet -> loss"]
    graph = Graph(nodes, edges, batched=True)
    with pytest.raises(Deadlock, match=r"node both waits for the gradient of instance 0"):
        runtime(graph).train(torch.ones(1, 2), torch.ones(1, 2), 1)
    with pytest.raises(BadInput, match="an instance does not come to the loss: meet has 1 messages of instance 0"):
        graph(torch.ones(1, 2))


def test_what_a_node_cannot_do_is_told_with_its_name():
    nodes = {"x": Source(whole_input), "count": Isu(Add("t")), "loss": Loss()}
    graph = Graph(nodes, ["x -> count", "count -> loss"], batched=True)
    with pytest.raises(KeyError, match="no counter 't'") as caught:
        runtime(graph).train(torch.ones(1, 2), torch.ones(1, 2), 1)
    assert "in node count of an ampnet graph, instance 0" in caught.value.__notes__
    nodes = {"x": Source(whole_input), "a": Transform(torch.nn.LSTM(2, 2)), "loss": Loss()}
    with pytest.raises(BadInput, match="node a: its module returned"):
        runtime(Graph(nodes, ["x -> a", "a -> loss"], batched=True)).train(torch.ones(1, 2), torch.ones(1, 2), 1)


class Two(torch.nn.Module):
    def forward(self, x):
        return x, x


def test_an_output_is_one_tensor():
    nodes = {"x": Source(whole_input), "a": Transform(Two()), "loss": Loss()}
    graph = Graph(nodes, ["x -> a", "a -> loss"], batched=True)
    with pytest.raises(BadInput, match="instance 0 brings 2 tensors to the loss"):
        placed(graph, 0, torch.ones(1, 2))
    with pytest.raises(BadInput, match="node loss: instance 0 brings 2 tensors to the loss"):
        runtime(graph).train(torch.ones(1, 2), torch.ones(1, 2), 1)


def first_sample(inputs):
    return (inputs[0],), {}


def by_row(state, payload):
    return [state.put(t=t) for t in range(len(payload[0]))]


def test_an_instance_comes_to_the_loss_once_whatever_its_data():
    nodes = {"x": Source(first_sample), "apart": Ungroup(by_row), "a": Transform(torch.nn.Linear(2, 1)), "loss": Loss()}
    graph, more = Graph(nodes, ["x -> apart", "apart -> a", "a -> loss"]), torch.ones(2, 2, 2)
    assert set(placed(graph, 1, torch.ones(1, 1, 2)).values()) == {0}
    with pytest.raises(BadInput, match="node loss: instance 0 comes here again"):
        runtime(graph).train(more, torch.ones(2, 1), 2)
    with pytest.raises(BadInput, match=r"through, but loss is still to take instance 0 \[t=1\]"):
        runtime(graph).answer(more[:1], 1)


def test_what_an_answer_leaves_in_a_join_is_told():
    nodes = {
        "x": Source(first_sample),
        "apart": Ungroup(by_row),
        "which": Cond(lambda state: int(state["t"] > 0)),
        "wait": Group(lambda state: state.put(t=9), lambda state: 0, lambda state: 2),
        "either": Phi(2),
        "loss": Loss(),
    }
    edges = ["x -> apart", "apart -> which", "which.0 -> either.0", "which.1 -> wait", "wait -> either.1"]
    at_work = runtime(Graph(nodes, [*edges, "either -> loss"]))
    with pytest.raises(BadInput, match="wait has 1 messages of instance 0"):
        at_work.answer(torch.ones(1, 2, 2), 1)


# -- as users train it -------------------------------------------------------------------------------------------------

LISTS = "list_reduction(samples=60, test=10)"


def trained(strategy, mesh, transport="threads", *, out=None, resume=False, **changes):
    said = {"model": "list_rnn(hidden=8)", "data": LISTS, "steps": 4, "batch_size": 20, "optimizer": "sgd(lr=0.05)"}
    plan = mh.Plan(strategy=strategy, mesh=mesh, transport=transport, threads=1)
    return mh.train(mh.Task(**said | changes), plan, out=out, resume=resume, progress=False, evaluate="end")


@pytest.mark.parametrize("transport", ["threads", "shared"])
def test_a_user_trains_a_graph_on_any_number_of_workers(transport):
    one = trained("ampnet(max_active_keys=1)", "pipeline=1", "single")
    two = trained("ampnet(max_active_keys=1)", "pipeline=2", transport)
    for name, value in one.model.state_dict().items():
        assert torch.equal(value, two.model.state_dict()[name])
    assert one.summary.test_accuracy == two.summary.test_accuracy
    assert two.summary.staleness_max == 0
    assert two.notes[-1].startswith("nodes of worker 0: list")
    many = trained("ampnet(max_active_keys=3)", "pipeline=2", transport)
    assert 0 < many.summary.staleness_max <= 3


def test_a_checkpoint_knows_no_mesh(tmp_path):
    said = "ampnet(max_active_keys=1)"
    whole = trained(said, "pipeline=1", "single", optimizer="adam(lr=0.01)")
    trained(said, "pipeline=2", out=tmp_path, steps=2, optimizer="adam(lr=0.01)")
    kept = checkpoint.load_newest(tmp_path / "checkpoints")
    assert list(kept.model) == list(whole.model.state_dict())
    on = trained(said, "pipeline=3", out=tmp_path, resume=True, optimizer="adam(lr=0.01)")
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, on.model.state_dict()[name])


def test_a_plain_sequential_is_its_own_graph():
    how = {"model": "perceptron(hidden=(12, 10))", "data": "digits", "batch_size": 24}
    serial = trained("synchronous", "data=1", "single", **how)
    graph = trained("ampnet(max_active_keys=1, samples=24)", "pipeline=2", **how)
    for name, value in serial.model.state_dict().items():
        assert torch.equal(value, graph.model.state_dict()[name])


@pytest.mark.parametrize("transport", [pytest.param("gloo", marks=slow), pytest.param("mpi", marks=slow), "threads"])
def test_trees_are_learned(transport):
    how = {"model": "tree_rnn(hidden=8)", "data": "boolean_trees(samples=60, test=10)"}
    result = trained("ampnet", "pipeline=2", transport, steps=6, **how)
    assert result.history[-1]["train_loss"] < 0.8  # knowing nothing it is 0.69; it has begun above 1 or near it


@pytest.mark.parametrize(
    ("strategy", "mesh", "how", "message"),
    [
        ("ampnet(max_active_keys=0)", "pipeline=2", {}, "max_active_keys is a whole number from 1"),
        ("ampnet(min_update_frequency=1.5)", "pipeline=2", {}, "min_update_frequency is a whole number from 1"),
        ("ampnet(samples=3)", "pipeline=2", {}, "each sample has a graph of its own"),
        ("ampnet", "data=2", {}, "its ranks own nodes of one model"),
        ("ampnet", "tensor=2", {}, "a node lies on one rank"),
        ("ampnet", "pipeline=5", {}, "has 4 nodes with parameters"),
        ("ampnet", "pipeline=2", {"clip": 1.0}, "nobody knows the norm of the whole gradient"),
        (
            "ampnet",
            "pipeline=2",
            {"model": "tests.partition.ampnets:no_chain", "data": "digits"},
            "neither an ampnet Graph nor a plain",
        ),
        ("ampnet", "pipeline=2", {"loss": None}, "outputs come to a loss node"),
        (
            "ampnet(samples=11)",
            "pipeline=2",
            # Of 1437 digits the last batch is of 45, so its last instance of 1.
            {"model": "tests.partition.ampnets:normed", "data": "digits", "batch_size": 48, "steps": None, "epochs": 1},
            "Use samples=12",
        ),
    ],
)
def test_what_cannot_work_is_refused_before_anything_starts(strategy, mesh, how, message):
    with pytest.raises(BadInput, match=message):
        trained(strategy, mesh, **how)


@pytest.mark.parametrize("how", [{"pipeline": "gpipe"}, {"recompute": True}, {"micro_batches": 4}])
def test_there_is_no_schedule_of_micro_batches(how):
    with pytest.raises(InvalidPlan, match="messages go as they come"):
        mh.train(mh.Task(model="perceptron", data="digits", steps=1), mh.Plan("ampnet", mesh="pipeline=2", **how))
