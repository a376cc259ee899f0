"""Compressed exchanges of workers that go their own ways: local, diloco, elastic, gossip, and over servers."""

import math

import pytest
import torch

import manyhands as mh
from manyhands.communication.communicator import Communicator
from manyhands.communication.compression.compressor import compressor_from
from manyhands.communication.topology import Mesh
from manyhands.consistency.compressed import CompressedMean, Parcels, layout_of
from manyhands.consistency.gossip import approaches, gamma_for
from manyhands.errors import BadInput, InvalidPlan, NonFiniteLoss
from manyhands.partition.data import DataReplica
from manyhands.plan import Facts, Plan, resolve, strategy_from
from manyhands.testing import run_ranks
from tests.consistency import jobs
from tests.consistency.jobs import problem
from tests.consistency.test_contract import TOGETHER, assert_declared, assert_joined, plain, run
from tests.matrices import halved

HERE = "tests.consistency.test_compressed_relaxed"
#: All meet in a mean; each sends by itself. A sparsifier, a quantizer, and of those who meet a low rank.
MEAN = [f"{s}compress={c})" for s in ("local(every=2, ", "diloco(inner=2, ", "elastic(every=2, ") for c in
        ("top_k(ratio=0.1)", "int8", "powersgd")]  # fmt: skip
ALONE = [f"{s}compress={c})" for s in ("gossip(", "asynchronous(", "downpour(push=2, ", "ssp(") for c in
         ("top_k(ratio=0.1)", "int8")]  # fmt: skip
VARIABLE = ["local(compress=strom(threshold=1e-4))", "gossip(compress=strom(threshold=1e-4))", "ssp(compress=strom)"]
#: Two pieces, shares that differ, and steps in which some workers have no samples.
UNEVEN = problem(optimizer="nesterov", shares="uneven", batches=(8, 8, 2, 8))
CLOSE = 1e-12


@pytest.mark.parametrize(("text", "on"), halved([*MEAN, *ALONE, *VARIABLE], ["simulated", "shared"]))
def test_what_is_sent_is_what_is_declared(text, on):
    assert_joined(text, on, 3, UNEVEN)


@pytest.mark.slow
@pytest.mark.parametrize("on", ["threads", "gloo", "mpi"])
@pytest.mark.parametrize("text", [*MEAN, *ALONE, *VARIABLE])
def test_so_it_is_on_the_other_transports(text, on):
    assert_joined(text, on, 3, UNEVEN)


@pytest.mark.parametrize("text", [*MEAN[::3], "gossip(compress=top_k(ratio=0.1))", "gossip(compress=strom)"])
def test_results_on_shared_memory_are_those_in_virtual_time_bit_for_bit(text):
    a, b = (run(text, on, 3, UNEVEN) for on in ("simulated", "shared"))
    assert all(torch.equal(x, y) for x, y in zip(a[0]["parameters"], b[0]["parameters"], strict=True))


@pytest.mark.parametrize("text", [t for t in MEAN if "elastic" not in t])
def test_after_a_meeting_all_hold_the_same_bits(text):
    results = run(text, "simulated", 3, UNEVEN)
    for step in (2, 4):
        assert all(torch.equal(r["parameters"][step], results[0]["parameters"][step]) for r in results)
    assert not torch.equal(results[0]["parameters"][1], results[1]["parameters"][1])


def test_what_loses_nothing_is_one_worker_on_the_joined_batch():
    spec = TOGETHER["uneven, sgd"] | {"clip": None}
    assert_joined("local(every=1, compress=entropy(of='none'))", "simulated", 3, spec)
    (mine, *_) = run("ssp(staleness=0, compress=entropy(of='none'))", "simulated", 3, spec)
    assert (mine["consensus"] - plain(spec)["parameters"][-1]).abs().max() <= CLOSE


@pytest.mark.parametrize("text", ["gossip(graph='complete', {})", "elastic({})", "diloco(inner=2, {})"])
def test_what_loses_nothing_is_the_strategy_itself(text):
    gamma = ", gamma=1.0" if "gossip" in text else ""
    spec = problem(optimizer="nesterov")
    whole = run(text.format("every=2") if "inner" not in text else "diloco(inner=2)", "simulated", 3, spec)
    every = "" if "inner" in text else "every=2, "
    mine = run(text.format(f"{every}compress=entropy(of='none'){gamma}"), "simulated", 3, spec)
    for a, b in zip(whole[1]["parameters"], mine[1]["parameters"], strict=True):
        assert (a - b).abs().max() <= CLOSE


@pytest.mark.parametrize("text", ["local(compress=top_k)", "gossip(compress=int8)", "ssp(compress=top_k)"])
def test_one_worker_sends_nothing_and_is_plain_torch(text):
    spec = problem(optimizer="momentum", dtype="float32", clip=0.05)
    (mine,) = run(text, "shared", 1, spec)
    assert set(mine["sent_B"]) == {0}
    assert torch.equal(mine["parameters"][-1], plain(spec)["parameters"][-1])


@pytest.mark.parametrize("text", [MEAN[0], "elastic(compress=int8)", "gossip(compress=top_k)", "ssp(compress=int8)"])
def test_a_loss_that_is_not_finite_stops_all_and_gets_nowhere(text):
    for result in run(text, "simulated", 3, problem(optimizer="momentum", poison=(2, 1))):
        raised, message = result["raised"]
        assert raised == 1
        assert "of worker 2 is not finite at step 1" in message
        assert result["parameters"][-1].isfinite().all()


def overflow(comm: Communicator) -> str:
    worker = strategy_from("local(every=1, compress=int8)").start(replica_of(comm), comm)
    worker.steps = 5
    change = torch.full((4,), math.inf if comm.rank == 1 else 1.0)
    with pytest.raises(NonFiniteLoss) as e:
        worker.agreed_weights([change], 1.0)
    return str(e.value)


def test_parameters_that_have_overflowed_stop_all_before_they_get_into_a_residual():
    said = run_ranks(overflow, 3, on="simulated")
    assert set(said) == {said[0]}
    assert "change of the parameters of worker 1 is not finite at step 4" in said[0]


# -- what is not sent stays: conservation ------------------------------------------------------------------------------


def replica_of(comm: Communicator, seed: int = 0) -> DataReplica:
    """A perceptron in float64; each rank's of its own."""
    comm.mesh = Mesh(data=comm.size)
    model = jobs.mlp().double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    replica = DataReplica(model, optimizer, torch.nn.functional.cross_entropy, comm, common=False)
    generator = torch.Generator().manual_seed(seed + comm.rank)
    for piece in replica.pieces:
        piece.flat.copy_(torch.randn(piece.flat.numel(), generator=generator, dtype=torch.float64))
    return replica


def random_like(x: torch.Tensor, seed: int) -> torch.Tensor:
    return torch.randn(len(x), generator=torch.Generator().manual_seed(seed), dtype=x.dtype)


def meetings(comm: Communicator, text: str) -> list[torch.Tensor]:
    """Of five means: what this worker would have sent, what came of it, and what is left."""
    replica = replica_of(comm)
    mean = CompressedMean(replica, comm, compressor_from(text), [frozenset({"data"})])
    given = made = torch.zeros_like(replica.pieces[0].flat)
    for step in range(5):
        weights = [1.0, 3.0, float(step)]
        x = random_like(given, 10 * step + comm.rank)
        given = given + x * (comm.size * weights[comm.rank] / sum(weights))
        mean.average_([x], weights)
        made = made + x
    return [given, made, mean.state_dict()[0]["tensors"]["residual"]]


@pytest.mark.parametrize("text", ["top_k(ratio=0.1)", "strom(threshold=0.5)", "powersgd"])
def test_weighted_means_and_residuals_are_all_that_was_given(text):
    given, made, left = (sum(each) for each in zip(*run_ranks(meetings, 3, on="simulated", args=(text,)), strict=True))
    assert (made + left - given).abs().max() <= CLOSE * given.abs().max()
    assert left.abs().max() > 0.1


def parcels(comm: Communicator, text: str) -> list[torch.Tensor]:
    """The same of payloads for a server, with a resume half-way."""
    replica = replica_of(comm)
    layout = [layout_of(replica.pieces[0])]
    mine = Parcels(replica, comm, compressor_from(text), layout)
    given = told = torch.zeros_like(replica.pieces[0].flat)
    for step in range(6):
        if step == 3:
            kept, mine = mine.state_dict(), Parcels(replica, comm, compressor_from(text), layout)
            mine.load_state_dict(kept)
        x = random_like(given, step)
        given = given + x
        payload = mine.pack_(0, x)
        assert torch.equal(mine.read(0, payload), x)
        told = told + x
    return [given, told, mine.state_dict()[0]["tensors"]["residual"]]


@pytest.mark.parametrize("text", ["top_k(ratio=0.1)", "strom(threshold=0.5)", "one_bit", "bfloat16(feedback=True)"])
def test_payloads_and_residual_are_all_that_was_given_across_a_resume(text):
    ((given, told, left), _) = run_ranks(parcels, 2, on="simulated", args=(text,))
    assert (told + left - given).abs().max() <= CLOSE * given.abs().max()
    assert left.any()


def springs(comm: Communicator, text: str) -> list[torch.Tensor]:
    """What elastic averaging leaves as it is, before and after some pulls without gradients."""
    replica = replica_of(comm)
    worker = strategy_from(text).start(replica, comm)
    flats = [piece.flat for piece in replica.pieces]
    worker._centre = [random_like(flat, 99) for flat in flats]

    def total() -> torch.Tensor:
        left = worker.state_dict()["compression"][0]["tensors"]["residual"]
        return flats[0] + left + (worker._centre[0] if comm.rank == 0 else 0)

    before = total().clone()
    for _ in range(5):
        for flat, taken in zip(flats, worker._exchange(flats), strict=True):
            flat.sub_(taken)
    return [before, total(), worker._centre[0]]


def test_springs_conserve_workers_centre_and_residuals():
    before, after, centres = zip(
        *run_ranks(springs, 3, on="simulated", args=("elastic(compress=top_k(ratio=0.1))",)), strict=True
    )
    assert (sum(before) - sum(after)).abs().max() <= CLOSE * 10
    assert all(torch.equal(c, centres[0]) for c in centres)


def exchanges(comm: Communicator, text: str, count: int) -> list[torch.Tensor]:
    """Parameters before and after exchanges without gradients; nobody knows anything of anybody at first."""
    replica = replica_of(comm)
    worker = strategy_from(text).start(replica, comm)
    flat = replica.pieces[0].flat
    worker._known, worker._mean = [torch.zeros_like(flat)], [torch.zeros_like(flat)]
    before = flat.clone()
    for k in range(1, count + 1):
        worker._exchange(k)
    return [before, flat.clone()]


@pytest.mark.parametrize("graph", ["ring", pytest.param("exponential", marks=pytest.mark.slow)])
@pytest.mark.parametrize("compress", ["top_k(ratio=0.1)", "qsgd", "strom(threshold=0.1)"])
def test_an_exchange_with_neighbours_conserves_the_mean_and_draws_them_together(compress, graph):
    """Koloskova et al. 2019, Theorem 2: the mean is exact, and the distance from it shrinks by a factor a step."""
    text = f"gossip(graph={graph!r}, compress={compress})"
    befores, afters = zip(*run_ranks(exchanges, 5, on="simulated", args=(text, 80)), strict=True)
    mean = sum(befores) / 5
    assert (sum(afters) / 5 - mean).abs().max() <= CLOSE * 10
    apart = [sum((x - mean).square().sum() for x in xs) for xs in (befores, afters)]
    assert apart[1] < 0.03 * apart[0]


# -- resume ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("strategy", "compress"),
    [
        ("local(every=3)", "top_k(ratio=0.05)"),
        ("diloco(inner=3)", "powersgd"),
        ("elastic(every=2)", "strom_adaptive(threshold=0.01)"),
        ("gossip", "qsgd"),
    ],
)
def test_a_resume_in_mid_period_is_exact_with_all_that_was_not_sent_yet(strategy, compress, tmp_path):
    def train(steps: int, **options: object) -> mh.Result:
        task = mh.Task(
            model="perceptron(hidden=12)", data="digits", optimizer="sgd(lr=0.1)", steps=steps, batch_size=30
        )
        plan = mh.Plan(strategy=strategy, workers=3, transport="threads", threads=1, compress=compress)
        return mh.train(task, plan, progress=False, evaluate="never", **options)

    whole = train(8)
    train(5, out=tmp_path)
    resumed = train(8, out=tmp_path, resume=True)
    assert all(torch.equal(whole.state[k], resumed.state[k]) for k in whole.state)


def server_state(comm: Communicator, text: str) -> bool:
    """What a worker of a server takes up again is what it kept."""
    replica = replica_of(comm)
    worker = strategy_from(text).start(replica, comm)
    store = worker._store if hasattr(worker, "_store") else worker.store
    store.replica.watching = False
    (store.add if "ssp" in text else store.push)([random_like(p.flat, 7 + comm.rank) for p in replica.pieces])
    kept = worker.state_dict()
    left = kept["compression"] if "ssp" in text else kept["store"]["compression"]
    again = strategy_from(text).start(replica_of(comm), comm)
    again.load_state_dict(kept)
    now = again.state_dict()
    mine = now["compression"] if "ssp" in text else now["store"]["compression"]
    comm.barrier()
    return all(
        a["tensors"]["residual"].any() and torch.equal(a["tensors"]["residual"], b["tensors"]["residual"])
        for a, b in zip(left, mine, strict=True)
    )


@pytest.mark.parametrize("text", ["asynchronous(servers=2, compress=top_k)", "ssp(servers=2, compress=top_k)"])
def test_what_a_worker_has_not_pushed_is_kept_by_shard(text):
    assert all(run_ranks(server_state, 2, on="simulated", args=(text,)))


# -- plans -------------------------------------------------------------------------------------------------------------

REFUSED = {
    ("asynchronous", "powersgd"): "a server gets one worker's payload by itself",
    ("ssp", "random_k"): "a server gets one worker's payload by itself",
    ("gossip", "dgc"): "a neighbour gets one worker's payload by itself",
    ("gossip", "terngrad"): "farther off",
    ("gossip(graph='one_peer')", "top_k"): "there neighbours change",
    ("local", "dgc"): "its momentum is that of gradients",
    ("diloco", "sign_sgd"): "no more than the sign",
    ("elastic(mode='round_robin')", "top_k"): "the centre itself goes",
    ("push_sum", "top_k"): "with its weight",
    ("parallel_sgd", "int8"): "sends nothing in any step",
}


@pytest.mark.parametrize(("strategy", "compress"), REFUSED)
def test_what_cannot_work_is_refused_when_the_plan_is_made(strategy, compress):
    with pytest.raises(InvalidPlan) as e:
        resolve(Plan(strategy=strategy, compress=compress, workers=4), Facts(cores=4, batch_size=16, stateless=True))
    (found,) = e.value.problems
    assert f"compress={compress}" in found.asked
    assert REFUSED[strategy, compress] in found.rule
    assert found.cure


@pytest.mark.parametrize(
    "text", ["local(switch=3, compress=int8)", "gossip(gamma=0.5)", "gossip(gamma=2, compress=int8)"]
)
def test_options_that_contradict_each_other_say_so(text):
    with pytest.raises(BadInput, match=r"switch=|gamma="):
        strategy_from(text)


def test_gamma_follows_what_is_sent():
    gammas = [gamma_for(compressor_from(t)) for t in ("top_k(ratio=0.01)", "entropy(of='top_k(ratio=0.1)')", "int8")]
    assert gammas == [0.02, 0.2, 0.4]
    assert [approaches(compressor_from(t)) for t in ("qsgd", "terngrad", "sign_sgd", "one_bit")] == [
        True,
        False,
        False,
        True,
    ]


@pytest.mark.parametrize("strategy", ["local", "gossip", "ssp"])
def test_a_plans_compress_is_an_option_of_its_strategy(strategy):
    decided = resolve(Plan(strategy=strategy, compress="int8", workers=3), Facts(cores=3, batch_size=12)).plan
    assert decided.strategy.compress == "int8"
    assert resolve(decided, Facts(cores=3, batch_size=12)).plan == decided
    assert strategy_from(str(decided.strategy)) == decided.strategy


@pytest.mark.parametrize("text", VARIABLE)
def test_a_bound_says_that_it_is_one(text):
    assert strategy_from(text).sends_at_most
    assert_declared(text, run(text, "simulated", 3, UNEVEN))


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["local(every=2)", "diloco(inner=2)"])
def test_pieces_of_a_model_that_is_cut_are_compressed_among_their_counterparts(strategy):
    task = mh.Task(model="perceptron(hidden=16)", data="digits", optimizer="sgd(lr=0.1)", steps=4, batch_size=30)

    def train(compress: str) -> mh.Result:
        plan = mh.Plan(strategy, mesh="data=2,tensor=2", transport="shared", threads=1, compress=compress)
        return mh.train(task, plan, progress=False, evaluate="never")

    # PowerSGD with all ranks loses nothing, and knows the shapes of what is here.
    dense, compressed = train("none"), train("powersgd(rank=99)")
    assert all((dense.state[k] - compressed.state[k]).abs().max() <= 1e-5 for k in dense.state)
    assert compressed.summary.sent_B_per_step > 0
