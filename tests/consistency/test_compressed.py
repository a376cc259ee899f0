"""Compressed gradients under `synchronous`: the contract's promises, and that a plan's ``compress`` gets there."""

import pytest
import torch
from torch import nn

import manyhands as mh
from manyhands.communication.communicator import Communicator
from manyhands.communication.compression import compressors, one_shot
from manyhands.communication.compression.compressor import compressor_from
from manyhands.errors import BadInput, NonFiniteLoss
from manyhands.plan import Facts, Plan, resolve, strategy_from
from manyhands.testing import run_ranks
from manyhands.training.preparation import check_same_strategy
from tests.consistency.jobs import problem
from tests.consistency.test_contract import TOGETHER, assert_declared, assert_identical, assert_joined, plain, run

HERE = "tests.consistency.test_compressed"


def synchronous(compress: str) -> str:
    return str(strategy_from(f"synchronous(compress={compress})"))


def spec_for(name: str, spec: dict) -> dict:
    """With plain SGD for schemes that have a momentum of their own."""
    return spec | {"optimizer": "sgd"} if compressors.load(name).replaces_optimizer else spec


#: Two pieces, shares that differ, and steps in which some workers have no samples.
UNEVEN = problem(optimizer="nesterov", shares="uneven", batches=(8, 8, 2, 8))


@pytest.mark.parametrize("on", ["simulated", "shared"])
@pytest.mark.parametrize("name", compressors)
def test_replicas_stay_identical_and_send_what_is_declared(name, on):
    assert_joined(synchronous(name), on, 3, spec_for(name, UNEVEN))


@pytest.mark.parametrize("name", compressors)
def test_results_on_shared_memory_are_those_in_virtual_time_bit_for_bit(name):
    a, b = (run(synchronous(name), on, 3, spec_for(name, UNEVEN)) for on in ("simulated", "shared"))
    assert all(torch.equal(x, y) for x, y in zip(a[0]["parameters"], b[0]["parameters"], strict=True))


@pytest.mark.parametrize("on", ["threads", "gloo", "mpi"])
@pytest.mark.parametrize("name", ["strom", "one_bit", "bfloat16", "powersgd"])
def test_so_they_do_on_the_other_transports(name, on):
    assert_joined(synchronous(name), on, 3, UNEVEN)


@pytest.mark.parametrize("name", compressors)
def test_one_worker_sends_nothing_and_is_plain_torch(name):
    spec = spec_for(name, problem(optimizer="momentum", dtype="float32", clip=0.05))
    (mine,) = run(synchronous(name), "shared", 1, spec)
    assert set(mine["sent_B"]) == {0}
    if name == "dgc":
        # Momentum of its own, before the clip: compared without one.
        (mine,) = run(synchronous("dgc(momentum=0.0)"), "shared", 1, spec)
    assert torch.equal(mine["parameters"][-1], plain(spec)["parameters"][-1])


@pytest.mark.parametrize("compress", ["none", "entropy(of='none')", "powersgd(rank=99)"])
@pytest.mark.parametrize("case", ["uneven", "clip", "sum and l2", "tokens", "used by one worker"])
def test_what_loses_nothing_is_one_worker_on_the_joined_batch(compress, case):
    spec = TOGETHER[case]
    results = run(synchronous(compress), "simulated", 3, spec)
    theirs = plain(spec)["parameters"]
    assert all((a - b).abs().max() <= 1e-11 for a, b in zip(results[0]["parameters"][1:], theirs, strict=True))


@pytest.mark.parametrize("name", ["top_k", "one_bit", "float16"])
@pytest.mark.parametrize("case", ["unused", "conv", "micro, tokens", "fewer samples than workers"])
def test_odd_models_and_shares_keep_the_promises(name, case):
    results = run(synchronous(name), "simulated", 3, TOGETHER[case])
    assert_identical(synchronous(name), results)
    assert_declared(synchronous(name), results)


def test_a_model_of_two_dtypes_has_two_vectors():
    assert_joined(synchronous("top_k(ratio=0.1)"), "simulated", 3, problem("mixed", "momentum", dtype="mixed"))


@pytest.mark.parametrize(
    "options",
    [
        {"optimizer": "sgd(lr=0.1)"},
        {"optimizer": "sgd(lr=0.1)", "clip": 0.01},
        {"optimizer": "sgd(lr=0.1, weight_decay=0.01)"},
        {"optimizer": "sgd(lr=0.1)", "loss": "squared_error(l2=0.01)"},
        {"optimizer": "adam"},
    ],
    ids=str,
)
def test_a_mean_of_few_entries_updates_as_the_whole_vector_does(options, tmp_path, monkeypatch):
    def parameters(few: int) -> list[torch.Tensor]:
        monkeypatch.setattr(one_shot, "FEW", few)
        task = mh.Task(model="perceptron(hidden=50)", data="digits", steps=8, batch_size=50, **options)
        plan = mh.Plan(workers=2, transport="threads", threads=1, compress="top_k(ratio=0.001)")
        result = mh.train(task, plan, out=tmp_path / str(few), progress=False)
        return [p.detach() for p in result.model.parameters()]

    some, whole = parameters(64), parameters(10**9)
    assert all(torch.equal(a, b) for a, b in zip(some, whole, strict=True))


# -- not finite --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["strom", "top_k", "bfloat16", "powersgd"])
def test_a_loss_that_is_not_finite_stops_all_and_leaves_no_trace(name):
    spec = problem(optimizer="momentum", poison=(1, 2))
    results = run(synchronous(name), "simulated", 3, spec)
    assert {tuple(r["raised"]) for r in results} == {tuple(results[0]["raised"])}
    assert results[0]["raised"][0] == 2
    assert all(torch.equal(r["parameters"][-1], results[0]["parameters"][2]) for r in results)


class Root(nn.Module):
    """All zero, so that `root` is 0 with a gradient of NaN."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(64, 10)
        for p in self.parameters():
            nn.init.zeros_(p)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x.flatten(1))


def root(outputs: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return outputs.norm(dim=1).sqrt().mean()


@pytest.mark.parametrize("compress", ["top_k", "sign_sgd"])
def test_a_gradient_that_is_not_finite_does_too_though_its_loss_is(compress, tmp_path):
    task = mh.Task(model=f"{HERE}:Root", data="digits", loss=f"{HERE}:root", steps=5, batch_size=50)
    plan = mh.Plan(workers=2, transport="threads", threads=1, compress=compress)
    with pytest.raises(NonFiniteLoss) as e:
        mh.train(task, plan, out=tmp_path, progress=False)
    assert e.value.step == 0
    assert not e.value.spoilt
    assert "gradient" in str(e.value)


# -- resume ------------------------------------------------------------------------------------------------------------

KEEP = {
    "strom": "strom(threshold=0.01)",
    "strom_adaptive": "strom_adaptive(threshold=0.01, clip=1.0)",
    "random_k": "random_k(ratio=0.1)",
    "dgc": "dgc(ratio=0.02, warmup=8)",
    "one_bit": "one_bit",
    "terngrad": "terngrad",
    "flexpoint": "flexpoint",
    "powersgd": "powersgd",
}


@pytest.mark.parametrize("compress", KEEP.values(), ids=KEEP)
def test_a_resume_is_exact_with_all_that_was_not_sent_yet(compress, tmp_path):
    def train(steps: int, **options: object) -> mh.Result:
        task = mh.Task(
            model="perceptron(hidden=12)", data="digits", optimizer="sgd(lr=0.1)", steps=steps, batch_size=30
        )
        plan = mh.Plan(workers=3, transport="threads", threads=1, compress=compress)
        return mh.train(task, plan, progress=False, evaluate="never", **options)

    whole = train(9)
    train(5, out=tmp_path)
    resumed = train(9, out=tmp_path, resume=True)
    assert resumed.summary.steps == 9
    assert all(torch.equal(whole.state[k], resumed.state[k]) for k in whole.state)


# -- plans -------------------------------------------------------------------------------------------------------------


def test_a_plans_compress_is_an_option_of_its_strategy():
    decided = resolve(Plan(compress="strom(threshold=1e-3)", workers=2), Facts(cores=2, batch_size=10)).plan
    assert str(decided.strategy) == "synchronous(update='replicated', compress='strom')"
    assert decided.compress == "strom"
    again = resolve(decided, Facts(cores=2, batch_size=10)).plan
    assert again == decided
    assert resolve(Plan(compress="none", workers=2), Facts(cores=2, batch_size=10)).plan.strategy == strategy_from(
        "synchronous(update='sharded')"
    )


def test_sent_bytes_are_in_the_summary(tmp_path):
    task = mh.Task(model="perceptron(hidden=12)", data="digits", steps=3, batch_size=30)
    plan = mh.Plan(workers=2, transport="threads", threads=1, compress="top_k(ratio=0.05)")
    result = mh.train(task, plan, progress=False, evaluate="never")
    n = sum(v.numel() for v in result.state.values())
    assert result.summary.sent_B_per_step == 8 * -(-n // 20)
    assert result.summary.strategy == "synchronous(update='replicated', compress='top_k(ratio=0.05)')"


def say(comm: Communicator, *texts: str) -> str:
    try:
        check_same_strategy(strategy_from(texts[comm.rank]), comm)
    except BadInput as e:
        return str(e)
    return ""


def test_peers_with_other_settings_are_refused_with_both():
    alike, other = run_ranks(say, 2, on="threads", args=("synchronous(compress='top_k')", "synchronous(compress=int8)"))
    assert alike == ""
    assert "worker 0: synchronous(compress='top_k')" in other
    assert "worker 1: synchronous(compress='int8')" in other


def test_compressors_of_ones_own_are_reached_by_their_module():
    assert str(compressor_from(f"{HERE}:Mine(threshold=0.1)")) == f"{HERE}:Mine(threshold=0.1)"
    assert_joined(f"synchronous(compress='{HERE}:Mine')", "simulated", 3, problem())


class Mine(compressors.load("two_bit")):
    """A user's own."""

    name = "mine"


@pytest.mark.parametrize("mesh", ["data=2,tensor=2", "data=2,pipeline=2"])
def test_pieces_of_a_model_that_is_cut_are_compressed_among_their_holders(mesh):
    task = mh.Task(model="perceptron(hidden=16)", data="digits", optimizer="sgd(lr=0.1)", steps=4, batch_size=30)

    def train(compress: str | None) -> mh.Result:
        plan = mh.Plan(mesh=mesh, transport="shared", threads=1, compress=compress, strategy="synchronous")
        return mh.train(task, plan, progress=False, evaluate="never")

    # PowerSGD with all ranks loses nothing, and knows the shapes of what is here.
    dense, compressed = train(None), train("powersgd(rank=99)")
    assert all((dense.state[k] - compressed.state[k]).abs().max() <= 1e-5 for k in dense.state)
    assert compressed.summary.sent_B_per_step > 0
