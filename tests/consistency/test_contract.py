"""The contract: every strategy in the catalogue keeps the promises of DESIGN §7, on every transport.

A new strategy joins by its line in `consistency.strategies`, with every variant that its fields spell out as a
`Literal`. Per commit: all of them on `TRANSPORTS`, the `FAMILIES` on `OTHERS`; `-m slow` runs the whole matrix. Where
a claim is about the model, the optimizer or the loss, whose code is the same on every transport, its cases run in
virtual time, but for those that only repeat another with other numbers, and on shared memory those that take another
path through the communication.
"""

import dataclasses
import functools
import itertools
import typing

import pytest
import torch

from manyhands.communication.reduction import slices
from manyhands.consistency import strategies
from manyhands.contract import Setting, Strategy
from manyhands.models import optimizers
from manyhands.models.update_rules import served
from manyhands.plan import SERVERS_IN_MEMORY
from manyhands.plan import strategy_from as strategy_read
from manyhands.testing import run_ranks
from tests.consistency import jobs
from tests.consistency.jobs import problem

TRANSPORTS = ("simulated", "shared")
OTHERS = ("threads", "gloo", "mpi")
#: One of each family, for the transports that only carry bytes.
FAMILIES = (
    *("synchronous(update='sharded')", "synchronous(update='replicated')", "replica_average", "slice_update"),
    *("asynchronous", "backup_workers", "elastic", "gossip"),
)
#: Why 1e-12: float64 rounds at 1.1e-16, a step adds some hundred numbers of order 1, and there are four steps.
JOINED = 1e-12
#: Asked for again in every assertion; strategies are frozen.
strategy_from = functools.cache(strategy_read)


def variants(cls: type[Strategy]) -> list[str]:
    """The class with its defaults, and with every value that a field spells out; ``auto`` decides for one of those."""
    choices = {}
    hints = typing.get_type_hints(cls)
    for name in (f.name for f in dataclasses.fields(cls)):
        if typing.get_origin(hints[name]) is typing.Literal:
            choices[name] = [value for value in typing.get_args(hints[name]) if value != "auto"]
    made = [cls(**dict(zip(choices, values, strict=True))) for values in itertools.product(*choices.values())]
    return list(dict.fromkeys(map(str, made)))


STRATEGIES = [text for name in strategies for text in variants(strategies.load(name))]
#: Those of which every variant is looked at from all sides at each commit: all workers agree in every step. Of a class
#: that relaxes that its defaults are; the rest is in a few tests, and in the whole matrix.
LOCKSTEP = [t for t in STRATEGIES if strategy_from(t).lockstep]
CHOSEN = [t for t in STRATEGIES if t in LOCKSTEP or t in strategies]


def setting(on: str, size: int, spec: dict) -> Setting:
    made = jobs.optimizer(spec["optimizer"], torch.nn.Linear(2, 2))
    return Setting(
        workers=size,
        transport=on,
        shares_memory=on in ("single", "threads", "shared", "simulated"),
        elementwise=optimizers.is_elementwise(made),
        stateless=optimizers.is_stateless(made),
        clip=spec["clip"] is not None,
        served=served(made),
        one_sided=on == "mpi",
    )


def frozen(value: object) -> object:
    return tuple(sorted(value.items())) if isinstance(value, dict) else value


@functools.lru_cache(maxsize=1024)  # several tests look at one run, and not one after the other
def _run(text: str, on: str, size: int, spec: tuple) -> list[dict]:
    servers = strategy_from(text).server_ranks(in_memory=on in SERVERS_IN_MEMORY)
    return run_ranks(jobs.train, size, on=on, args=(text, dict(spec)), timeout_s=30, servers=servers)


@functools.lru_cache(maxsize=256)
def _plain(spec: tuple) -> dict:
    with jobs.one_thread():
        return jobs.plain(dict(spec))


def run(text: str, on: str, size: int, spec: dict) -> list[dict]:
    """Every rank's `jobs.train`, or a skip where the plan would have refused the combination."""
    refused = strategy_from(text).problems(setting(on, size, spec))
    if refused:
        assert all(p.asked and p.rule and p.cure for p in refused)
        pytest.skip(f"refused at plan time: {refused[0].rule}")
    return _run(str(strategy_from(text).resolve(setting(on, size, spec))), on, size, frozen(spec))


def plain(spec: dict) -> dict:
    return _plain(frozen({**spec, "micro_batches": 1, "shares": "even", "delays": None}))


def assert_joined(text: str, on: str, size: int, spec: dict, *, tolerance: float = JOINED) -> None:
    """Promise 1 where the strategy makes it, promises 2 and 3 in any case."""
    results = run(text, on, size, spec)
    if strategy_from(text).exact(setting(on, size, spec)):
        for step, (mine, theirs) in enumerate(
            zip(results[0]["parameters"][1:], plain(spec)["parameters"], strict=True)
        ):
            assert (mine - theirs).abs().max() <= tolerance, f"after step {step}"
    assert_identical(text, results)
    assert_declared(text, results)


def assert_identical(text: str, results: list[dict]) -> None:
    if not strategy_from(text).identical:
        return
    for rank, other in enumerate(results):
        assert len(other["parameters"]) == len(results[0]["parameters"])
        for step, (a, b) in enumerate(zip(results[0]["parameters"], other["parameters"], strict=True)):
            assert torch.equal(a, b), f"rank {rank} differs from rank 0 after step {step}"


def assert_declared(text: str, results: list[dict]) -> None:
    for rank, result in enumerate(results):
        steps = zip(*result["traffic"], strict=True)  # by step: of every piece
        declared = [[sum(column) for column in zip(*pieces, strict=True)] for pieces in steps]
        for step, counted in enumerate(zip(result["sent_B"], result["messages"], strict=True)):
            if strategy_from(text).sends_at_most:
                assert all(c <= d for c, d in zip(counted, declared[step], strict=True)), f"rank {rank} in step {step}"
            else:
                assert list(counted) == declared[step], f"rank {rank} in step {step}"


# -- promise 1: one worker is plain torch, bit for bit -----------------------------------------------------------------

OPTIMIZERS = ("sgd", "decay", "momentum", "nesterov", "adam", "adamw", "adagrad", "rmsprop")
ALONE = {
    **{name: problem(optimizer=name, dtype="float32") for name in OPTIMIZERS},
    "clip": problem(optimizer="momentum", dtype="float32", clip=0.05),
    "schedule": problem(optimizer="momentum", dtype="float32", schedule=True),
    "schedule, adam": problem(optimizer="adam", dtype="float32", schedule=True),
    "tied": problem("tied", "nesterov", dtype="float32"),
    "frozen": problem("frozen", "adamw", dtype="float32"),
    "unused": problem("unused", "adamw", dtype="float32"),
    "unused, decay": problem("unused", "decay", dtype="float32"),
    "unused, clip": problem("unused", "momentum", dtype="float32", clip=0.05),
    "used later": problem("used_later", "momentum", dtype="float32"),
    "used later, adamw": problem("used_later", "adamw", dtype="float32"),
    "mixed": problem("mixed", "momentum", dtype="mixed", clip=0.05),
    "conv": problem("conv", "momentum", dtype="float32", clip=0.05),
    "conv, adam": problem("conv", "adam", dtype="float32"),
    "norm": problem("norm", "momentum", dtype="float32"),
    "tokens": problem(loss="tokens", dtype="float32"),
    "sum": problem("regression", "small_sgd", "sum", dtype="float32"),
    "sum and l2": problem("regression", "small_sgd", "sum_l2", dtype="float32"),
    "own loss": problem("own_loss", "momentum", "own", dtype="float32"),
    "lbfgs": problem(optimizer="lbfgs", dtype="float32"),
}


#: What strategies that relax the meeting can get wrong when alone: how they call the optimizer, and whose loss it is.
ALONE_IN_ITS_OWN_WAY = (
    *("momentum", "adam", "adamw", "clip", "schedule", "tied", "unused, decay", "used later", "mixed", "norm"),
    *("tokens", "sum and l2", "lbfgs"),
)


def alone(text: str, name: str):
    """One of `ALONE`, slow where it is a matter of the model or the optimizer that `LOCKSTEP` looks at already."""
    marks = () if text in LOCKSTEP or name in ALONE_IN_ITS_OWN_WAY else pytest.mark.slow
    return pytest.param(text, ALONE[name], id=f"{text}-{name}", marks=marks)


@pytest.mark.parametrize(("text", "spec"), [alone(text, name) for text in CHOSEN for name in ALONE])
def test_one_worker_is_plain_torch_bit_for_bit(text, spec):
    if not strategy_from(text).plain_alone:
        pytest.skip("a second rule works on top of the optimizer, alone too")
    (mine,) = run(text, "single", 1, spec)
    theirs = plain(spec)
    for step, (a, b) in enumerate(zip(mine["parameters"][1:], theirs["parameters"], strict=True)):
        assert torch.equal(a, b), f"after step {step}: {(a - b).abs().max()}"
    assert mine["losses"] == theirs["losses"]
    for a, b in zip(mine["buffers"], theirs["buffers"], strict=True):
        assert torch.equal(a, b)
    assert set(mine["sent_B"]) == {0}
    assert torch.equal(mine["consensus"], mine["final"])


@pytest.mark.parametrize("on", TRANSPORTS)
@pytest.mark.parametrize("text", CHOSEN)
def test_one_worker_of_a_transport_for_many_is_plain_torch_too(text, on):
    if not strategy_from(text).plain_alone:
        pytest.skip("a second rule works on top of the optimizer, alone too")
    spec = ALONE["nesterov"]
    (mine,) = run(text, on, 1, spec)
    assert torch.equal(mine["parameters"][-1], plain(spec)["parameters"][-1])
    assert_declared(text, [mine])


def test_a_weighted_loss_whose_weights_add_up_to_less_than_one_is_their_mean():
    spec = problem(loss="weighted")
    (mine,) = run("synchronous(update='sharded')", "single", 1, spec)
    assert (mine["parameters"][-1] - plain(spec)["parameters"][-1]).abs().max() <= JOINED


def test_l2_is_the_gradient_of_half_lambda_w_squared():
    """`jobs.plain` adds λ·w by hand; here autograd differentiates λ/2·‖w‖²."""
    spec = ALONE["sum and l2"] | {"dtype": "float64"}
    with jobs.one_thread():
        model, opt = jobs.build(spec)
        for x, target in jobs.batches(spec):
            opt.zero_grad()
            l2 = sum(p.square().sum() for p in model.parameters()) * (jobs.LOSSES["sum_l2"].l2 / 2)
            (jobs.LOSSES["sum_l2"](model(x), target)[0] + l2).backward()
            opt.step()
    assert (jobs.vector(model.parameters()) - plain(spec)["parameters"][-1]).abs().max() <= JOINED


# -- promise 1: N workers are one worker on the joined batch -----------------------------------------------------------

TOGETHER = {
    **{name: problem(optimizer=name) for name in OPTIMIZERS},
    "clip": problem(optimizer="momentum", clip=0.05),
    "clip, sgd": problem(clip=0.05),
    "clip that does not bite": problem(optimizer="momentum", clip=1e3),
    "schedule": problem(optimizer="momentum", schedule=True),
    "schedule, adam": problem(optimizer="adam", schedule=True),
    "uneven": problem(optimizer="momentum", shares="uneven"),
    "uneven, sgd": problem(shares="uneven", clip=0.05),
    "fewer samples than workers": problem(optimizer="adam", batches=(8, 2, 1, 1, 8)),
    "first batch smaller than the workers": problem(optimizer="momentum", batches=(1, 8, 1)),
    "tied": problem("tied", "nesterov"),
    "frozen": problem("frozen", "adamw"),
    "unused": problem("unused", "adamw"),
    "unused, decay": problem("unused", "decay"),
    "used later": problem("used_later", "momentum"),
    "used later, adamw": problem("used_later", "adamw", batches=(8, 8, 8, 8)),
    "used by one worker": problem("routed", "momentum", batches=(8, 8, 8, 8)),
    "used in part by one worker": problem("routed_table", "decay", batches=(8, 8, 8, 8)),
    "used by one worker, clip": problem("routed", "momentum", batches=(8, 8, 8, 8), clip=0.05),
    "conv": problem("conv", "momentum", clip=0.05),
    "tokens": problem(loss="tokens", optimizer="momentum"),
    "tokens, sgd, uneven": problem(loss="tokens", shares="uneven"),
    "weighted": problem(loss="weighted", optimizer="momentum"),
    "weighted, micro": problem(loss="weighted", optimizer="momentum", micro_batches=2),
    "sum": problem("regression", "small_sgd", "sum"),
    "sum and l2": problem("regression", "small_sgd", "sum_l2"),
    "sum and l2, uneven": problem("regression", "small_sgd", "sum_l2", shares="uneven"),
    "sum and l2, fewer samples": problem("regression", "small_sgd", "sum_l2", batches=(8, 2, 1)),
    "own loss": problem("own_loss", "momentum", "own"),
    "micro": problem(optimizer="momentum", micro_batches=3),
    "micro, uneven": problem(optimizer="momentum", micro_batches=3, shares="uneven"),
    "micro, tokens": problem(loss="tokens", optimizer="momentum", micro_batches=3),
    "micro, sum and l2": problem("regression", "small_sgd", "sum_l2", micro_batches=3),
    "micro, clip": problem(micro_batches=2, clip=0.05),
}


#: The last two send workers down different paths in the first step, where collectives must match all the same.
ACROSS = (
    *("nesterov", "clip", "tokens", "uneven", "fewer samples than workers", "sum and l2"),
    *("first batch smaller than the workers", "used by one worker"),
)
#: What is another exchange, and not only another number in it: several pieces, a norm, idle workers, unlike paths.
CARRIED = ("nesterov", "clip", "first batch smaller than the workers", "used by one worker")


#: On shared memory per commit: `ACROSS`, and other ways through the update and the buckets.
ON_SHARED = (*ACROSS, "adam", "tied", "used later", "conv")
#: In virtual time not per commit: another optimizer or loss in the place of one that is there, or two cases in one.
#: "tokens, sgd, uneven" is none of them: momentum, as "tokens" has it, is refused by some and makes others inexact.
REPEATED = (
    *("adagrad", "rmsprop", "schedule", "clip, sgd", "used later, adamw", "used by one worker, clip", "weighted"),
    *("micro", "micro, tokens", "micro, sum and l2", "sum", "sum and l2, uneven"),
)


def together(on: str, name: str):
    """One of `TOGETHER`, slow where only the model, the optimizer or the loss is another and that is looked at."""
    slow = name not in ON_SHARED if on == "shared" else name in REPEATED
    marks = pytest.mark.slow if slow else ()
    return pytest.param(on, TOGETHER[name], id=f"{name}-{on}", marks=marks)


@pytest.mark.parametrize(("on", "spec"), [together(on, name) for on in TRANSPORTS for name in TOGETHER])
@pytest.mark.parametrize("text", LOCKSTEP)
def test_three_workers_are_one_on_the_joined_batch(text, on, spec):
    assert_joined(text, on, 3, spec)


def across(name: str, on: str):
    """One of `ACROSS`, slow on shared memory where it is another number in the same exchange."""
    marks = pytest.mark.slow if on == "shared" and name not in (*CARRIED, "uneven") else ()
    return pytest.param(name, on, marks=marks)


@pytest.mark.parametrize(("name", "on"), [across(name, on) for name in ACROSS for on in TRANSPORTS])
@pytest.mark.parametrize("text", [t for t in CHOSEN if t not in LOCKSTEP])
def test_relaxed_workers_send_what_they_declare_and_are_exact_where_they_say_so(text, name, on):
    assert_joined(text, on, 3, TOGETHER[name])


#: Even and odd, powers of two, and more than a small machine has cores; three workers are in most other tests.
SIZES = [("simulated", 5), ("shared", 4)]
SIZES += [pytest.param("simulated", size, marks=pytest.mark.slow) for size in (2, 8)]
SIZES += [pytest.param("shared", size, marks=pytest.mark.slow) for size in (2, 5, 8)]


@pytest.mark.parametrize(("on", "size"), SIZES)
@pytest.mark.parametrize("text", CHOSEN)
def test_any_number_of_workers_is_one_on_the_joined_batch(text, on, size):
    assert_joined(text, on, size, TOGETHER["adam"])
    assert_joined(text, on, size, TOGETHER["uneven, sgd"])


@pytest.mark.parametrize("on", OTHERS)
@pytest.mark.parametrize("name", [n if n in CARRIED else pytest.param(n, marks=pytest.mark.slow) for n in ACROSS])
@pytest.mark.parametrize("text", FAMILIES)
def test_a_family_keeps_its_promises_on_the_other_transports(text, name, on):
    assert_joined(text, on, 3, TOGETHER[name])


def test_the_families_are_strategies_of_the_catalogue():
    assert all(str(strategy_from(text)) in STRATEGIES or text in strategies for text in FAMILIES)
    assert {strategy_from(text).name for text in STRATEGIES} == set(strategies)


@pytest.mark.parametrize("on", TRANSPORTS)
@pytest.mark.parametrize("text", CHOSEN)
def test_a_model_of_two_dtypes_is_trained_in_both(text, on):
    """The float32 half rounds at 6e-8, and the gradient of the float64 half passes through it."""
    spec = problem("mixed", "momentum", dtype="mixed", clip=0.05)
    assert_joined(text, on, 3, spec, tolerance=1e-6)


# -- micro-batches -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("parts", [2, 3, 8, 50])
@pytest.mark.parametrize(
    ("model", "optimizer", "loss"),
    [("mlp", "momentum", "mean"), ("mlp", "adam", "tokens"), ("regression", "small_sgd", "sum_l2")],
)
def test_micro_batches_change_nothing_but_rounding(parts, model, optimizer, loss):
    spec = problem(model, optimizer, loss, micro_batches=parts)
    (mine,) = run("synchronous(update='sharded')", "single", 1, spec)
    whole = plain(spec)
    assert (mine["parameters"][-1] - whole["parameters"][-1]).abs().max() <= JOINED
    assert mine["losses"] == pytest.approx(whole["losses"], abs=JOINED)


# -- losses are what is reported ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", CHOSEN)
def test_the_local_losses_weighted_by_samples_are_the_loss_of_the_joined_batch(text):
    spec = TOGETHER["uneven, sgd"]
    results = run(text, "simulated", 3, spec)
    if strategy_from(text).whole_batch:
        shares = [[1.0, 0, 0]] * len(spec["batches"])
    else:
        shares = [[(hi - lo) / n for lo, hi in jobs.cut(n, 3, "uneven")] for n in spec["batches"]]
    if strategy_from(text).exact(setting("simulated", 3, spec)):
        for step, weights in enumerate(shares):
            joined = sum(w * r["losses"][step] for w, r in zip(weights, results, strict=True))
            assert joined == pytest.approx(plain(spec)["losses"][step], abs=JOINED)


# -- promise 2 ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("on", TRANSPORTS)
@pytest.mark.parametrize("text", STRATEGIES)
def test_everybody_starts_with_rank_0s_parameters(text, on):
    results = run(text, on, 3, TOGETHER["tied"])
    start = jobs.vector(jobs.build(TOGETHER["tied"])[0].parameters())
    assert all(torch.equal(r["parameters"][0], start) for r in results)


@pytest.mark.parametrize("on", TRANSPORTS)
@pytest.mark.parametrize("text", STRATEGIES)
def test_after_finish_all_workers_hold_the_consensus(text, on):
    results = run(text, on, 3, TOGETHER["adamw"])
    assert all(torch.equal(r["final"], results[0]["consensus"]) for r in results)


@pytest.mark.parametrize("text", [t for t in STRATEGIES if strategy_from(t).deterministic])
def test_results_on_shared_memory_are_those_in_virtual_time_bit_for_bit(text):
    spec = TOGETHER["uneven"]
    a, b = run(text, "simulated", 3, spec), run(text, "shared", 3, spec)
    assert all(torch.equal(x, y) for x, y in zip(a[0]["parameters"], b[0]["parameters"], strict=True))


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2))])
@pytest.mark.parametrize("text", [t for t in CHOSEN if strategy_from(t).deterministic])
def test_dawdling_workers_do_not_change_a_single_bit(text, seed):
    # Several pieces (two groups), so that one is exchanged while another waits.
    spec = problem(optimizer="nesterov", shares="uneven", batches=(8,) * 5)
    steady = run(text, "shared", 3, spec)
    slow = run(text, "shared", 3, spec | {"delays": seed})
    assert_identical(text, slow)
    for a, b in zip(steady[0]["parameters"], slow[0]["parameters"], strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("on", TRANSPORTS)
@pytest.mark.parametrize("text", CHOSEN)
def test_bfloat16_autocast_keeps_replicas_identical_and_parameters_in_float32(text, on):
    spec = problem(optimizer="momentum", dtype="float32", precision="bfloat16")
    results = run(text, on, 3, spec)
    assert_identical(text, results)
    assert results[0]["losses"][-1] == results[0]["losses"][-1]  # not NaN
    if strategy_from(text).exact(setting(on, 3, spec)):
        moved = results[0]["parameters"][-1] - results[0]["parameters"][0]
        expected = plain(spec)["parameters"][-1] - results[0]["parameters"][0]
        # bfloat16 keeps 8 bits: single gradients are off by a percent, their sum points the same way.
        assert torch.nn.functional.cosine_similarity(moved, expected, dim=0) > 0.99
        assert not torch.equal(moved, expected)


# -- unused parameters, memory formats, tied ones ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("on", "optimizer"),
    [
        *(("simulated", optimizer) for optimizer in ("decay", "adamw")),
        ("shared", "decay"),
        *(pytest.param("simulated", optimizer, marks=pytest.mark.slow) for optimizer in ("momentum", "adam")),
        *(pytest.param("shared", optimizer, marks=pytest.mark.slow) for optimizer in ("adamw", "momentum", "adam")),
    ],
)
@pytest.mark.parametrize("text", CHOSEN)
def test_weight_decay_does_not_touch_a_parameter_that_no_loss_depends_on(text, on, optimizer):
    results = run(text, on, 3, problem("unused", optimizer))
    model = jobs.build(problem("unused", optimizer))[0]
    at = sum(p.numel() for p in model.first.parameters())
    spare = slice(at, at + sum(p.numel() for p in model.spare.parameters()))
    first, last = results[0]["parameters"][0], results[0]["parameters"][-1]
    # Averaging equal numbers rounds; decay would move them by a thousandth.
    assert (first - last)[spare].abs().max() <= 1e-14
    assert not torch.equal(first, last)


@pytest.mark.parametrize("on", TRANSPORTS)
@pytest.mark.parametrize("text", CHOSEN)
def test_a_parameter_that_comes_into_use_does_so_in_all_its_slices(text, on):
    """Weight decay begins for the whole of it, also where a slice's own gradient is zero."""
    spec = problem("used_later_in_part", "decay")
    assert_joined(text, on, 3, spec)


@pytest.mark.parametrize("on", ["single", *TRANSPORTS])
@pytest.mark.parametrize("text", CHOSEN)
def test_convolutions_stay_in_channels_last_memory(text, on):
    results = run(text, on, 1 if on == "single" else 3, problem("conv", "adam"))
    for result in results:
        weight, gradient = result["strides"][0]
        assert weight == gradient == [27, 1, 9, 3]  # (8, 3, 3, 3) with the channel last


@pytest.mark.parametrize("text", CHOSEN)
def test_tied_parameters_stay_one_tensor(text):
    results = run(text, "shared", 3, TOGETHER["tied"])
    assert all(r["tied"] == 5 for r in results)  # two biases more than two layers' four: the shared weight is one


@pytest.mark.parametrize("text", LOCKSTEP)
def test_workers_of_a_common_copy_hold_one_copy_of_the_optimizers_state_together(text):
    """ZeRO-1: slices of state add up to one copy; where everybody updates everything, to N.

    (Servers keep their state themselves, and HOGWILD's workers a state each beside one copy of the parameters.)
    """
    spec = problem(optimizer="adam")
    results = run(text, "shared", 3, spec)
    numel = sum(p.numel() for p in jobs.build(spec)[0].parameters())
    common = strategy_from(text).parameters == "common"
    assert sum(r["state"] for r in results) == (2 if common else 6) * numel  # Adam keeps two numbers an element


# -- side state: buffers -----------------------------------------------------------------------------------------------


def by_hand(spec: dict, size: int) -> list[list[torch.Tensor]]:
    """Each rank's BatchNorm statistics by the formula r ← (1 − m) r + m·batch's, variance unbiased."""
    result = []
    for rank in range(size):
        mean, var = torch.zeros(jobs.INPUTS).double(), torch.ones(jobs.INPUTS).double()
        for x, target in jobs.batches(spec):
            lo, hi = jobs.cut(len(target), size, spec["shares"])[rank]
            mean = 0.75 * mean + 0.25 * x[lo:hi].mean(0)
            var = 0.75 * var + 0.25 * x[lo:hi].var(0, unbiased=True)
        result.append([mean, var])
    return result


@pytest.mark.parametrize(
    ("on", "policy"),
    [
        *(("simulated", policy) for policy in ("average", "rank0", "local")),
        ("shared", "average"),
        *(pytest.param("shared", policy, marks=pytest.mark.slow) for policy in ("rank0", "local")),
    ],
)
@pytest.mark.parametrize("text", [t for t in CHOSEN if not strategy_from(t).whole_batch])
def test_buffers_follow_their_policy(text, on, policy):
    spec = problem("norm", "sgd", buffers=policy, batches=(8, 8, 8))
    results, expected = run(text, on, 3, spec), by_hand(spec, 3)
    for rank, result in enumerate(results):
        mean, var, tracked, passes = result["agreed"]
        # What is exported under ``local`` is rank 0's.
        average = [sum(column) / 3 for column in zip(*expected, strict=True)]
        wanted = average if policy == "average" else expected[0]
        assert (mean - wanted[0]).abs().max() <= JOINED
        assert (var - wanted[1]).abs().max() <= JOINED
        assert tracked.dtype == torch.int64
        assert passes.dtype == torch.int32
        assert int(tracked) == int(passes) == 3
        own_mean, own_var, *_ = result["buffers"]  # training itself goes on with each worker's own
        assert (own_mean - expected[rank][0]).abs().max() <= JOINED
        assert (own_var - expected[rank][1]).abs().max() <= JOINED


# -- promise 5: a loss that is not finite ------------------------------------------------------------------------------

#: In the first step nothing has been exchanged yet.
POISONED = [("simulated", 0), ("simulated", 2), ("shared", 2), pytest.param("shared", 0, marks=pytest.mark.slow)]


@pytest.mark.parametrize(("size", "rank"), [(1, 0), (3, 0), (3, 2)])
@pytest.mark.parametrize(("on", "step"), POISONED)
@pytest.mark.parametrize("text", LOCKSTEP)
def test_nan_on_one_worker_stops_all_at_that_step_with_the_parameters_untouched(text, on, step, rank, size):
    spec = problem(optimizer="momentum", poison=(rank, step))
    clean = run(text, on, size, spec | {"poison": None})
    results = run(text, on, size, spec)
    for result in results:
        assert result["raised"][0] == step
        assert f"at step {step}" in result["raised"][1]
        assert torch.equal(result["parameters"][-1], clean[0]["parameters"][step])


@pytest.mark.parametrize(("size", "rank"), [(1, 0), (3, 0), (3, 2)])
@pytest.mark.parametrize(("on", "step"), POISONED)
@pytest.mark.parametrize("text", [t for t in CHOSEN if not strategy_from(t).lockstep])
def test_nan_on_one_worker_stops_the_others_where_they_meet_and_nobody_adopts_it(text, on, step, rank, size):
    for result in run(text, on, size, problem(optimizer="momentum", poison=(rank, step))):
        raised, message = result["raised"]
        assert raised == step
        assert f"of worker {rank} is not finite at step {step}" in message
        assert result["parameters"][-1].isfinite().all()


# -- the approximate ones do what they say -----------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["sgd", "nesterov", "adam"])
@pytest.mark.parametrize("shares", ["even", "uneven"])
@pytest.mark.parametrize("on", TRANSPORTS)
def test_averaging_parameters_is_the_naive_loop_over_p_models(on, shares, optimizer):
    spec = problem(optimizer=optimizer, shares=shares)
    results = run("replica_average(what='parameters')", on, 3, spec)
    for mine, naive in zip(results[0]["parameters"][1:], jobs.naive_parameter_average(spec, 3), strict=True):
        assert (mine - naive).abs().max() <= JOINED


@pytest.mark.parametrize("optimizer", ["sgd", "momentum", "adam"])
@pytest.mark.parametrize("batches", [(8, 8, 5), (8, 2, 8)])
@pytest.mark.parametrize("on", TRANSPORTS)
def test_slices_from_own_shares_are_the_naive_loop_over_p_models(on, batches, optimizer):
    spec = problem(optimizer=optimizer, batches=batches)
    results = run("slice_own_batch", on, 3, spec)
    numel = len(results[0]["parameters"][0])
    naive = jobs.naive_own_slices(spec, 3, slices(numel, 3))
    for mine, theirs in zip(results[0]["parameters"][1:], naive, strict=True):
        assert (mine - theirs).abs().max() <= JOINED


# -- optimizers that look at whole tensors -----------------------------------------------------------------------------


@pytest.mark.parametrize("on", TRANSPORTS)
@pytest.mark.parametrize("text", CHOSEN)
def test_an_optimizer_of_whole_tensors_works_or_is_refused_when_the_plan_is_made(text, on):
    spec = problem(optimizer="lbfgs", batches=(8, 8))
    # LBFGS divides by products of differences, which magnifies rounding.
    assert_joined(text, on, 3, spec, tolerance=1e-9)


# -- the full matrix ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("size", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("on", ["simulated", "threads", "shared", "gloo", "mpi"])
@pytest.mark.parametrize("text", STRATEGIES)
def test_full_matrix(text, on, size):
    optimizers = itertools.product(("sgd", "nesterov", "adam", "adamw", "adagrad", "rmsprop"), (None, 0.05))
    specs = [problem(optimizer=optimizer, clip=clip) for optimizer, clip in optimizers] + list(TOGETHER.values())
    if text not in LOCKSTEP:  # of these it is mostly the bytes that are compared
        specs = [TOGETHER[name] for name in (*ACROSS, "adam", "momentum")]
    able = [spec for spec in specs if not strategy_from(text).problems(setting(on, size, spec))]
    if not able:
        pytest.skip(f"refused at plan time: {strategy_from(text).problems(setting(on, size, specs[0]))[0].rule}")
    for spec in able:
        assert_joined(text, on, size, spec)
