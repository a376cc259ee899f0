"""The averaging family: local SGD, parallel SGD and its map and reduce, DiLoCo, elastic averaging.

Each is compared with the loop that its paper prints, over P models of torch's own, and with what it degenerates to.
"""

import functools
import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import manyhands as mh
from manyhands.consistency.diloco import outer_step
from manyhands.consistency.elastic import BETA, stable_alpha, stretch
from manyhands.consistency.map_reduce import Partial, map_part, mean_over, reduce_parts
from manyhands.contract import Setting
from manyhands.errors import BadInput, InvalidPlan, NonFiniteLoss
from manyhands.plan import strategy_from
from manyhands.testing import run_ranks
from manyhands.training import checkpoint
from tests.consistency import jobs
from tests.consistency.jobs import problem
from tests.matrices import halved
from tests.training.factories import HERE

TRANSPORTS = ("simulated", "shared")
#: Why 1e-12: as in the contract test.
JOINED = 1e-12
STEPS = (8, 8, 8, 5, 8, 2)  # the last leaves one of three workers without a sample

#: Every option that changes what is exchanged when; periods that end within STEPS and ones that do not.
FAMILY = (
    "local(every=1)",
    "local(every=3)",
    "local(every=4)",
    "local(every=2, state='average')",
    "local(every=2, state='reset')",
    "local(every=3, warmup=2)",
    "local(every=2, switch=3)",
    "parallel_sgd",
    "diloco(inner=1)",
    "diloco(inner=2)",
    "diloco(inner=4)",
    "elastic(every=1)",
    "elastic(every=2)",
    "elastic(every=4, alpha=0.25)",
    "elastic(every=1, mode='round_robin')",
    "elastic(every=2, mode='round_robin')",
    "elastic(every=4, mode='round_robin')",
)


#: One of each way to meet: a mean, with the optimizer's state, by an outer step, on springs together and in turn. The
#: others differ in when, which virtual time shows.
WAYS = (
    *("local(every=3)", "local(every=2, state='average')", "diloco(inner=2)"),
    *("elastic(every=2)", "elastic(every=2, mode='round_robin')"),
)


def run(text: str, on: str, size: int, spec: dict) -> list[dict]:
    return _run(text, on, size, tuple(sorted(spec.items())))


@functools.lru_cache(maxsize=256)
def _run(text: str, on: str, size: int, spec: tuple) -> list[dict]:
    return run_ranks(jobs.train, size, on=on, args=(text, dict(spec)), timeout_s=30)


def assert_same(results: list[dict], expected: list[list[torch.Tensor]], tolerance: float = JOINED) -> None:
    """``expected``: by rank, parameters after every step."""
    for rank, (result, theirs) in enumerate(zip(results, expected, strict=True)):
        for step, (a, b) in enumerate(zip(result["parameters"][1:], theirs, strict=True)):
            assert (a - b).abs().max() <= tolerance, f"rank {rank} after step {step}: {(a - b).abs().max()}"


# -- the loops of the papers, with torch alone -------------------------------------------------------------------------


class Naive:
    """P models, each with its optimizer, and what all of them do in a step."""

    def __init__(self, spec: dict, size: int) -> None:
        self.spec, self.size = spec, size
        self.replicas = jobs.naive_replicas(spec, size)
        self.samples = [0] * size
        self.history: list[list[torch.Tensor]] = [[] for _ in range(size)]

    def steps(self):
        """Each step's shares; afterwards everybody's parameters are noted."""
        for step, (inputs, target) in enumerate(jobs.batches(self.spec), 1):
            yield (
                step,
                [
                    (jobs.rows(inputs, lo, hi), target[lo:hi])
                    for lo, hi in jobs.cut(len(target), self.size, self.spec["shares"])
                ],
            )
            for rank, x in enumerate(self.vectors()):
                self.history[rank].append(x)

    def gradient(self, rank: int, share) -> torch.Tensor:
        model, _ = self.replicas[rank]
        jobs.gradients_of_share(model, *share, self.spec)
        zero = (torch.zeros_like(p) for p in model.parameters())
        return jobs.vector(z if p.grad is None else p.grad for p, z in zip(model.parameters(), zero, strict=True))

    def own_steps(self, shares) -> None:
        for rank, share in enumerate(shares):
            if len(share[1]):
                self.gradient(rank, share)
                self.replicas[rank][1].step()
                self.samples[rank] += len(share[1])

    def vectors(self) -> list[torch.Tensor]:
        return [jobs.vector(model.parameters()) for model, _ in self.replicas]

    def put(self, rank: int, x: torch.Tensor) -> None:
        with torch.no_grad():
            nn.utils.vector_to_parameters(x.clone(), self.replicas[rank][0].parameters())

    def weighted(self, xs) -> torch.Tensor:
        return sum(x * n for x, n in zip(xs, self.samples, strict=True)) / sum(self.samples)

    def meet(self) -> torch.Tensor:
        mean = self.weighted(self.vectors())
        for rank in range(self.size):
            self.put(rank, mean)
        return mean

    def treat_state(self, policy: str) -> None:
        if policy == "reset":
            for _, opt in self.replicas:
                opt.state.clear()
        if policy == "average":
            for same in zip(*(model.parameters() for model, _ in self.replicas), strict=True):
                states = [opt.state[p] for p, (_, opt) in zip(same, self.replicas, strict=True)]
                for key in states[0]:
                    if key != "step":
                        mean = self.weighted([s[key] for s in states])
                        for s in states:
                            s[key].copy_(mean)


def naive_local(spec: dict, size: int, every: int, policy: str) -> Naive:
    naive = Naive(spec, size)
    for step, shares in naive.steps():
        naive.own_steps(shares)
        if step % every == 0:
            naive.meet()
            naive.treat_state(policy)
            naive.samples = [0] * size
    return naive


def naive_diloco(spec: dict, size: int, inner: int, lr: float, momentum: float) -> Naive:
    """The outer optimizer is torch's."""
    naive = Naive(spec, size)
    centre = nn.Parameter(naive.vectors()[0])
    outer = torch.optim.SGD([centre], lr=lr, momentum=momentum, nesterov=momentum > 0)
    for step, shares in naive.steps():
        naive.own_steps(shares)
        if step % inner == 0:
            centre.grad = centre.detach() - naive.weighted(naive.vectors())
            outer.step()
            for rank in range(size):
                naive.put(rank, centre.detach())
            naive.samples = [0] * size
    return naive


def naive_elastic(spec: dict, size: int, every: int, alpha: float, mode: str) -> tuple[Naive, torch.Tensor]:
    naive = Naive(spec, size)
    centre = naive.vectors()[0]
    for step, shares in naive.steps():
        old = naive.vectors()
        naive.own_steps(shares)
        if step % every == 0:
            seen, moved = centre.clone(), centre.clone()
            for rank, new in enumerate(naive.vectors()):
                difference = alpha * (old[rank] - (moved if mode == "round_robin" else seen))
                naive.put(rank, new - difference)
                moved = moved + difference
            centre = moved
    return naive, centre


def naive_eamsgd(spec: dict, size: int, every: int, alpha: float, mode: str, momentum: float, lr: float):
    naive = Naive(spec, size)
    xs, centre = naive.vectors(), naive.vectors()[0]
    vs = [torch.zeros_like(x) for x in xs]
    for step, shares in naive.steps():
        seen = centre.clone()
        for rank, share in enumerate(shares):
            naive.put(rank, xs[rank] + momentum * vs[rank])
            vs[rank] = momentum * vs[rank] - lr * naive.gradient(rank, share)
            force = torch.zeros_like(centre)
            if step % every == 0:
                force = alpha * (xs[rank] - (centre if mode == "round_robin" else seen))
            xs[rank], centre = xs[rank] + vs[rank] - force, centre + force
            naive.put(rank, xs[rank])
    return naive, centre


# -- local: what it degenerates to -------------------------------------------------------------------------------------

SAME_AS_SYNCHRONOUS = {
    "even": problem(),
    "uneven": problem(shares="uneven"),
    "fewer samples than workers": problem(batches=(8, 2, 1, 1, 8)),
    "first batch smaller than the workers": problem(batches=(1, 8, 1)),
    "decay": problem(optimizer="decay"),
    "tokens": problem(loss="tokens", shares="uneven"),
    "sum and l2, fewer samples": problem("regression", "small_sgd", "sum_l2", batches=(8, 2, 1)),
    "used by one worker": problem("routed", "decay", batches=(8, 8, 8, 8)),
    "micro": problem(micro_batches=3),
}


def same_as_synchronous():
    """All in virtual time; elsewhere per commit, on shared memory, a plain exchange and one in which paths differ."""
    for name, spec in SAME_AS_SYNCHRONOUS.items():
        for on in (*TRANSPORTS, "gloo"):
            quick = on == "simulated" or (on == "shared" and name in ("even", "used by one worker"))
            yield pytest.param(spec, on, marks=[] if quick else [pytest.mark.slow], id=f"{name}-{on}")


@pytest.mark.parametrize(("spec", "on"), list(same_as_synchronous()))
def test_averaging_parameters_after_every_step_of_plain_sgd_is_averaging_gradients(spec, on):
    """The first axis of deeplearning4j's taxonomy: parameter averaging with k = 1 equals the update-based form."""
    synchronous = run("synchronous(update='replicated')", on, 3, spec)
    assert_same(run("local(every=1)", on, 3, spec), [r["parameters"][1:] for r in synchronous])


@pytest.mark.parametrize("spec", [{}, {"shares": "uneven"}, {"batches": (1, 8, 2, 8)}], ids=str)
@pytest.mark.parametrize("optimizer", ["momentum", "nesterov"])
def test_with_momentum_it_is_if_momentum_is_averaged_too(optimizer, spec):
    spec = problem(optimizer=optimizer, **spec)
    synchronous = [r["parameters"][1:] for r in run("synchronous(update='replicated')", "shared", 3, spec)]
    assert_same(run("local(every=1, state='average')", "shared", 3, spec), synchronous)


def test_with_momentum_of_their_own_workers_of_unlike_shares_differ_from_one():
    """Shares alike in every step would average momenta without saying so, for all is linear; these change."""
    spec = problem(optimizer="momentum", shares="uneven", batches=(8, 3, 5, 7))
    synchronous = run("synchronous(update='replicated')", "shared", 3, spec)[0]["parameters"][-1]
    own = run("local(every=1)", "shared", 3, spec)[0]["parameters"][-1]
    assert (own - synchronous).abs().max() > 1e-6


@pytest.mark.parametrize("text", ["local(every=1)", "local(every=1, state='average')"])
def test_with_adam_it_is_not_whatever_becomes_of_the_moments(text):
    """The mean of squares is not the square of the mean."""
    spec = problem(optimizer="adam")
    synchronous = run("synchronous(update='replicated')", "shared", 3, spec)[0]["parameters"][-1]
    assert (run(text, "shared", 3, spec)[0]["parameters"][-1] - synchronous).abs().max() > 1e-6


@pytest.mark.parametrize("policy", ["local", "average", "reset"])
@pytest.mark.parametrize("optimizer", ["sgd", pytest.param("momentum", marks=pytest.mark.slow), "adam"])
@pytest.mark.parametrize(
    ("every", "shares"),
    [
        *((every, "uneven") for every in (1, 2, 3, 7)),
        (3, "even"),
        *(pytest.param(every, "even", marks=pytest.mark.slow) for every in (1, 2, 7)),
    ],
)
def test_local_is_the_naive_loop_over_p_models(every, shares, optimizer, policy):
    spec = problem(optimizer=optimizer, shares=shares, batches=STEPS)
    naive = naive_local(spec, 3, every, policy)
    results = run(f"local(every={every}, state={policy!r})", "simulated", 3, spec)
    assert_same(results, naive.history)
    if any(naive.samples):
        mean = naive.weighted(naive.vectors())
        assert (results[0]["consensus"] - mean).abs().max() <= JOINED


def test_state_is_averaged_or_not():
    spec = problem(optimizer="momentum", batches=STEPS)
    found = [run(f"local(every=2, state={p!r})", "shared", 3, spec)[1] for p in ("local", "average", "reset")]
    for a, b in itertools.combinations(found, 2):
        assert torch.equal(a["parameters"][2], b["parameters"][2])  # the first meeting
        assert not torch.equal(a["parameters"][3], b["parameters"][3])


def test_after_a_switch_the_steps_before_were_synchronous_ones_and_those_after_are_local():
    spec = problem(optimizer="adam", batches=STEPS, shares="uneven")
    synchronous = [r["parameters"][1:4] for r in run("synchronous(update='replicated')", "shared", 3, spec)]
    results = run("local(every=2, switch=3)", "shared", 3, spec)
    for mine, theirs in zip(results, synchronous, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(mine["parameters"][1:4], theirs, strict=True))
    alike = [all(torch.equal(r["parameters"][t], results[0]["parameters"][t]) for r in results) for t in range(7)]
    assert alike == [True, True, True, True, False, True, False]


def test_in_the_warm_up_parameters_meet_after_every_step():
    spec = problem(optimizer="momentum", batches=STEPS)
    each, results = (run(f"local({options})", "shared", 3, spec) for options in ("every=1", "every=3, warmup=2"))
    for mine, theirs in zip(results, each, strict=True):
        # A worker that meets in every step looks first whether all are well; what it computes is the same.
        assert all(torch.equal(a, b) for a, b in zip(mine["parameters"][:3], theirs["parameters"][:3], strict=True))
    alike = [all(torch.equal(r["parameters"][t], results[0]["parameters"][t]) for r in results) for t in range(7)]
    assert alike == [True, True, True, False, False, True, False]


@pytest.mark.parametrize("on", [*TRANSPORTS, "gloo"])
@pytest.mark.parametrize("text", ["local(every=1)", "local(every=1, state='average')", "diloco(inner=1)"])
def test_a_step_in_which_nobody_has_a_sample_changes_nothing(text, on):
    """Were all weights zero, the mean would be zero."""
    results = run(text, on, 3, problem(batches=(8, 0, 0, 8)))
    if text.startswith("diloco"):
        assert results[0]["parameters"][-1].norm() > 1
    else:
        a, b = results[0]["parameters"][1], results[0]["parameters"][3]
        assert (a - b).abs().max() <= 1e-15


# -- bytes, and the same bits in every world ---------------------------------------------------------------------------


@pytest.mark.parametrize("every", [1, 2, 4, 16])
@pytest.mark.parametrize("text", ["local(every={})", "diloco(inner={})", "elastic(every={})"])
def test_bytes_are_one_kth_of_those_of_synchronous_exactly(text, every):
    spec = problem(batches=(3,) * 16)
    synchronous, mine = (run(t, "simulated", 3, spec) for t in ("synchronous", text.format(every)))
    for a, b in zip(synchronous, mine, strict=True):
        assert sum(a["sent_B"]) == every * sum(b["sent_B"]) > 0
        assert sum(a["messages"]) == every * sum(b["messages"])


def everywhere():
    """All of the family in virtual time, the `WAYS` on shared memory, one that sends to a single peer elsewhere."""
    for text in FAMILY:
        yield text, "simulated", 2
        yield pytest.param(text, "shared", 5, marks=[] if text in WAYS else [pytest.mark.slow])
        for on in ("gloo", "threads", "mpi"):
            slow = on == "mpi" or text != "elastic(every=2, mode='round_robin')"
            yield pytest.param(text, on, 3, marks=[pytest.mark.slow] if slow else [])


@pytest.mark.parametrize(("text", "on", "size"), list(everywhere()))
def test_bytes_counted_are_bytes_declared_step_by_step(text, on, size):
    spec = problem("mixed", "momentum", dtype="mixed", batches=STEPS)  # two pieces
    for result in run(text, on, size, spec):
        declared = [[sum(c) for c in zip(*pieces, strict=True)] for pieces in zip(*result["traffic"], strict=True)]
        assert list(map(list, zip(result["sent_B"], result["messages"], strict=True))) == declared
        assert torch.equal(result["consensus"], result["final"])


def test_a_switch_and_a_warm_up_declare_what_the_first_steps_send():
    once = strategy_from("synchronous").traffic(1000, 4).sent_B
    for text in ("local(every=3, warmup=2)", "local(every=3, switch=2)"):
        traffic = strategy_from(text).traffic(1000, 4)
        assert [traffic.sent_B_in(1, after=t) // once for t in range(9)] == [1, 1, 0, 0, 1, 0, 0, 1, 0]
        assert traffic.sent_B_per_step == pytest.approx(once / 3)


def test_averaging_state_is_counted_apart():
    sizes = run_ranks(state_bytes, 3, on="simulated", args=(problem(optimizer="adam", batches=STEPS),))
    numel = sum(p.numel() for p in jobs.build(problem())[0].parameters())
    table_B = 8 * 3  # lengths, and a table of what is held
    for state_B in sizes:
        assert state_B > 2 * 2 * 2 * 2 * numel * 8 // 3 + table_B  # two meetings followed by a step, two moments
        assert state_B < 2 * (2 * 2 * 2 * numel * 8 // 3 + 10_000)


def state_bytes(comm, spec):
    before = comm.counters.sent_B("state")
    jobs.train(comm, "local(every=2, state='average')", spec)
    return comm.counters.sent_B("state") - before


@pytest.mark.parametrize("text", [t if t in WAYS else pytest.param(t, marks=pytest.mark.slow) for t in FAMILY])
def test_results_on_shared_memory_are_those_in_virtual_time_bit_for_bit(text):
    spec = problem(optimizer="nesterov", batches=STEPS, shares="uneven")  # two pieces
    a, b = run(text, "simulated", 3, spec), run(text, "shared", 3, spec | {"delays": 1})
    for mine, theirs in zip(a, b, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(mine["parameters"], theirs["parameters"], strict=True))
        assert torch.equal(mine["consensus"], theirs["consensus"])


@pytest.mark.parametrize("text", [t for t in FAMILY if not t.startswith("diloco")])
def test_one_worker_is_plain_torch_bit_for_bit(text):
    spec = problem(optimizer="momentum", dtype="float32", batches=(8, 8, 5, 8))
    with jobs.one_thread():
        theirs = jobs.plain(spec)
    (mine,) = run(text, "single", 1, spec)
    assert all(torch.equal(a, b) for a, b in zip(mine["parameters"][1:], theirs["parameters"], strict=True))
    assert torch.equal(mine["final"], theirs["parameters"][-1])
    assert set(mine["sent_B"]) == {0}


# -- diloco ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("on", TRANSPORTS)
@pytest.mark.parametrize("every", [1, 2, 4])
def test_diloco_with_outer_rate_1_and_no_momentum_is_local(every, on):
    spec = problem(optimizer="adam", shares="uneven", batches=STEPS)
    local, mine = (run(t.format(every), on, 3, spec) for t in ("local(every={})", "diloco(inner={}, lr=1, momentum=0)"))
    assert_same(mine, [r["parameters"][1:] for r in local])
    assert (mine[0]["consensus"] - local[0]["consensus"]).abs().max() <= JOINED


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize(("lr", "momentum"), [(0.7, 0.9), (0.5, 0)])
@pytest.mark.parametrize("inner", [1, 2])
def test_diloco_is_the_naive_loop_with_torchs_nesterov_outside(inner, lr, momentum, size):
    spec = problem(optimizer="momentum", batches=STEPS)
    naive = naive_diloco(spec, size, inner, lr, momentum)
    results = run(f"diloco(inner={inner}, lr={lr}, momentum={momentum})", "simulated", size, spec)
    assert_same(results, naive.history)
    assert torch.equal(results[0]["consensus"], results[0]["parameters"][-1])  # the centre, after a meeting


def test_the_consensus_within_a_period_is_the_centre_of_a_meeting_now():
    spec = problem(optimizer="momentum", batches=STEPS)
    within, at = (run(f"diloco(inner={inner})", "shared", 3, spec) for inner in (16, 6))
    assert (within[0]["consensus"] - at[0]["consensus"]).abs().max() <= JOINED


def test_an_outer_step_is_torchs():
    torch.manual_seed(0)
    centre, velocity = torch.randn(9).double(), torch.zeros(9).double()
    theirs = nn.Parameter(centre.clone())
    outer = torch.optim.SGD([theirs], lr=0.7, momentum=0.9, nesterov=True)
    for _ in range(5):
        mean = torch.randn(9).double()
        theirs.grad = theirs.detach() - mean
        outer.step()
        centre, velocity = outer_step(centre, mean, velocity, 0.7, 0.9)
        assert (centre - theirs).abs().max() <= 1e-14


# -- elastic: the rule -------------------------------------------------------------------------------------------------

SPRINGS = st.tuples(st.integers(1, 6), st.floats(0.01, 0.95), st.integers(0, 2**20))


def spring_system(workers: int, seed: int) -> tuple[list[torch.Tensor], torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    *xs, centre = torch.randn(workers + 1, 5, generator=generator, dtype=torch.float64)
    return xs, centre


def check_conservation(rule, workers: int, beta: float, seed: int) -> None:
    xs, centre = spring_system(workers, seed)
    total = sum(xs) + centre
    for _ in range(10):
        xs, centre = rule(xs, centre, beta / workers)
        assert (sum(xs) + centre - total).abs().max() <= 1e-13


@given(SPRINGS)
def test_springs_alone_conserve_the_sum_of_workers_and_centre(system):
    check_conservation(stretch, *system)


def swapped(xs, centre, alpha):
    """The mutant: the centre moves first, and workers are drawn to where it is then."""
    moved = centre + alpha * sum(x - centre for x in xs)
    return [x - alpha * (x - moved) for x in xs], moved


def swapped_the_other_way(xs, centre, alpha):
    moved = [x - alpha * (x - centre) for x in xs]
    return moved, centre + alpha * sum(x - centre for x in moved)


@pytest.mark.parametrize("mutant", [swapped, swapped_the_other_way])
def test_a_rule_that_reads_what_it_has_just_written_does_not(mutant):
    with pytest.raises(AssertionError):
        check_conservation(mutant, 3, 0.9, 1)


@settings(max_examples=10)  # up to thousands of steps each
@given(SPRINGS)
def test_springs_alone_bring_all_to_the_mean_of_workers_and_centre(system):
    workers, beta, seed = system
    xs, centre = spring_system(workers, seed)
    mean = (sum(xs) + centre) / (workers + 1)
    alpha = beta / workers
    # Workers close in on each other by 1 − α a step, on the centre by |1 − α − β|.
    slowest = max(1 - alpha, abs(1 - alpha - beta))
    for _ in range(math.ceil(math.log(1e-14) / math.log(slowest))):
        xs, centre = stretch(xs, centre, alpha)
    assert all((x - mean).abs().max() <= 1e-12 for x in [*xs, centre])


@pytest.mark.parametrize("lr", [0.0, 0.1, 0.5, 1.0, 1.9])
@pytest.mark.parametrize("workers", [1, 2, 3, 8])
def test_the_stated_range_of_alpha_is_where_no_mode_of_a_quadratic_grows(workers, lr):
    """The linear map of one step on ½x² for all workers and the centre; its largest eigenvalue crosses 1 there."""

    def growth(alpha: float, *, together: bool) -> float:
        n = workers + 1
        if together:
            step = torch.eye(n, dtype=torch.float64)
            for p in range(workers):
                step[p, p] = 1 - lr - alpha
                step[p, -1] = step[-1, p] = alpha
            step[-1, -1] = 1 - workers * alpha
        else:  # one worker's visit
            step = torch.tensor([[1 - lr - alpha, alpha], [alpha, 1 - alpha]], dtype=torch.float64)
        return float(torch.linalg.eigvals(step).abs().max())

    for together in (True, False):
        most = stable_alpha(lr, workers, together=together)
        assert growth(most * 0.999, together=together) <= 1 + 1e-12
        assert growth(most * 1.01, together=together) > 1
        assert BETA / workers <= stable_alpha(0.0, workers, together=together)


# -- elastic: on ranks -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("on", TRANSPORTS)
@pytest.mark.parametrize("mode", ["synchronous", "round_robin"])
def test_workers_on_springs_of_no_strength_are_independent_bit_for_bit(mode, on):
    spec = problem(optimizer="adam", batches=STEPS)
    alone = run("parallel_sgd", on, 3, spec)
    for mine, theirs in zip(run(f"elastic(alpha=0, every=1, mode={mode!r})", on, 3, spec), alone, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(mine["parameters"], theirs["parameters"], strict=True))
        assert torch.equal(mine["consensus"], mine["parameters"][0])  # the centre has not moved


@pytest.mark.parametrize(
    ("every", "alpha", "optimizer", "mode"),
    halved([(1, None), (2, 0.4), (3, None)], ["decay", "momentum", "adam"], ["synchronous", "round_robin"]),
)
def test_elastic_is_the_naive_loop_over_p_models(every, alpha, optimizer, mode):
    spec = problem(optimizer=optimizer, batches=STEPS, shares="uneven")
    naive, centre = naive_elastic(spec, 3, every, BETA / 3 if alpha is None else alpha, mode)
    results = run(f"elastic(alpha={alpha}, every={every}, mode={mode!r})", "simulated", 3, spec)
    assert_same(results, naive.history)
    assert all((r["consensus"] - centre).abs().max() <= JOINED for r in results)


@pytest.mark.parametrize("on", TRANSPORTS)
@pytest.mark.parametrize("mode", ["synchronous", "round_robin"])
@pytest.mark.parametrize("every", [1, 2])
def test_with_momentum_it_is_the_naive_loop_of_eamsgd(every, mode, on):
    spec = problem(batches=STEPS)
    naive, centre = naive_eamsgd(spec, 3, every, BETA / 3, mode, momentum=0.8, lr=0.1)
    results = run(f"elastic(every={every}, mode={mode!r}, momentum=0.8)", on, 3, spec)
    assert_same(results, naive.history)
    assert all((r["consensus"] - centre).abs().max() <= JOINED for r in results)


@pytest.mark.parametrize(
    ("on", "size"),
    [
        *(("shared", 2), ("shared", 3), ("gloo", 3), ("threads", 3)),
        *(pytest.param(on, 2, marks=pytest.mark.slow) for on in ("gloo", "threads", "mpi")),
        pytest.param("mpi", 3, marks=pytest.mark.slow),
    ],
)
def test_a_centre_larger_than_any_buffer_goes_round(size, on):
    """The last worker's message is on its way while the first trains; on shared memory it does not fit into a ring."""
    found = run_ranks(large_centre, size, on=on, timeout_s=30)
    assert all(torch.equal(f, found[0]) for f in found)


def large_centre(comm):
    from manyhands.communication.topology import Mesh
    from manyhands.consistency.elastic import Elastic
    from manyhands.contract import Batch
    from manyhands.partition.data import DataReplica

    comm.mesh = Mesh(data=comm.size)
    model = nn.Linear(400, 400)
    replica = DataReplica(
        model, torch.optim.SGD(model.parameters(), lr=0.01), nn.functional.mse_loss, comm, common=False
    )
    worker = Elastic(every=1, mode="round_robin").start(replica, comm)
    x = torch.full((2, 400), 1.0 + comm.rank)
    for _ in range(3):
        worker.step(Batch(x, x, 2))
    worker.meet()
    return worker.consensus()[0][:10]


# -- parallel SGD ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("on", TRANSPORTS)
def test_parallel_sgd_is_p_models_that_know_nothing_of_each_other_and_then_their_mean(on):
    spec = problem(optimizer="momentum", batches=STEPS)
    naive = Naive(spec, 3)
    for _, shares in naive.steps():
        naive.own_steps(shares)
    results = run("parallel_sgd", on, 3, spec)
    assert_same(results, naive.history)
    assert all((r["final"] - sum(naive.vectors()) / 3).abs().max() <= JOINED for r in results)
    assert all(set(r["sent_B"]) == set(r["messages"]) == {0} for r in results)


LAMBDA, RATE = 0.1, 0.05


def chain(w: torch.Tensor, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """SGD on ½(w·x − y)² + λ/2 w², many chains side by side: w is (chains, n), x (steps, chains, n)."""
    for x_t, y_t in zip(x, y, strict=True):
        w = w - RATE * (LAMBDA * w + ((w * x_t).sum(-1, keepdim=True) - y_t) * x_t)
    return w


def draws(steps: int, chains: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs on the unit sphere: η = 0.05 is below 1/(‖x‖²c* + λ) = 1/1.1."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(steps, chains, 4, generator=generator, dtype=torch.float64)
    x = x / x.norm(dim=-1, keepdim=True)
    return x, x.sum(-1, keepdim=True) + torch.randn(steps, chains, 1, generator=generator, dtype=torch.float64)


def test_the_variance_of_the_average_falls_as_one_over_the_number_of_workers():
    """Zinkevich et al.'s reason to average; the slope in log-log is −1 within 0.15. 400 runs for each k."""
    ks, runs = [1, 2, 4, 8, 16], 400
    variances = []
    for k in ks:
        parts = [draws(60, runs, seed=100 * k + i) for i in range(k)]
        mean = mean_over(lambda part: (chain(torch.zeros(runs, 4).double(), *part), 1), parts)
        variances.append(float(mean.var(0).sum()))
    x, y = torch.tensor(ks).double().log(), torch.tensor(variances).double().log()
    slope = ((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum()
    assert abs(float(slope) + 1) <= 0.15


def test_coupled_chains_come_together_by_1_minus_eta_lambda_a_step():
    x, y = draws(80, 50, seed=7)
    generator = torch.Generator().manual_seed(8)
    a, b = torch.randn(2, 50, 4, generator=generator, dtype=torch.float64) * 5
    for t in range(80):
        before = (a - b).norm(dim=-1)
        a, b = (chain(w, x[t : t + 1], y[t : t + 1]) for w in (a, b))
        assert bool(((a - b).norm(dim=-1) <= (1 - RATE * LAMBDA) * before + 1e-12).all())


# -- map and reduce ----------------------------------------------------------------------------------------------------


def gradient_sum(model: nn.Module):
    """The summation form of a gradient: over the part's samples, and how many those are."""

    def statistic(part) -> tuple[torch.Tensor, float]:
        inputs, target = part
        model.zero_grad()
        nn.functional.cross_entropy(model(inputs), target, reduction="sum").backward()
        return jobs.vector(p.grad for p in model.parameters()), len(target)

    return statistic


@pytest.mark.parametrize("parts", [1, 2, 3, 7, 29])
def test_the_gradient_in_parts_is_that_of_all_data_however_they_are_cut(parts):
    ((inputs, target),) = jobs.batches(problem(batches=(29,)))
    model, _ = jobs.build(problem())
    nn.functional.cross_entropy(model(inputs), target).backward()
    whole = jobs.vector(p.grad for p in model.parameters())
    cuts = jobs.cut(29, parts, "even")
    mean = mean_over(gradient_sum(model), [(inputs[lo:hi], target[lo:hi]) for lo, hi in cuts])
    assert (mean - whole).abs().max() <= JOINED


@given(
    st.integers(1, 6).flatmap(lambda n: st.tuples(st.just(n), st.lists(st.integers(0, n - 1), max_size=10))),
    st.randoms(),
)
def test_order_and_repeated_tasks_change_no_bit_and_a_retried_one_counts_once(drawn, random):
    tasks, again = drawn
    generator = torch.Generator().manual_seed(tasks)
    data = torch.randn(tasks, 3, generator=generator)

    def result(task: int) -> Partial:
        return map_part(task, lambda row: (row * 0.1, 2), data[task])

    total, count = reduce_parts([result(task) for task in range(tasks)], tasks)
    came = [*range(tasks), *again]
    random.shuffle(came)
    found, counted = reduce_parts([result(task) for task in came], tasks)
    assert torch.equal(found, total)
    assert counted == count == 2 * tasks


def test_a_part_that_no_task_has_computed_is_named():
    one = Partial(1, torch.ones(2), 1.0)
    with pytest.raises(ValueError, match="no result of task 0, 2"):
        reduce_parts([one, one], 3)
    with pytest.raises(ValueError, match="tasks 0 to 0"):
        reduce_parts([one], 1)
    with pytest.raises(ValueError, match="every part"):
        reduce_parts([], 0)


# -- resume ------------------------------------------------------------------------------------------------------------


def train(tmp_path, strategy: str, steps: int, *, workers: int = 3, **options) -> mh.Result:
    task = {"optimizer": options.pop("optimizer", f"{HERE}:momentum"), "batch_size": 8, "steps": steps, "seed": 4}
    return mh.train(
        mh.Task(model=f"{HERE}:model", data=f"{HERE}:data", **task),
        mh.Plan(workers=workers, threads=1, strategy=strategy, transport=options.pop("transport", "auto")),
        progress=False,
        **options,
    )


def same_bits(a: mh.Result, b: mh.Result) -> bool:
    return all(torch.equal(a.state[k], b.state[k]) for k in a.state)


RESUMED = (
    "local(every=4)",
    "local(every=4, state='average')",
    "local(every=4, state='reset')",
    "local(every=4, switch=9)",
    "local(every=4, warmup=11)",
    "parallel_sgd",
    "diloco(inner=4)",
    "elastic(every=4)",
    "elastic(every=3, mode='round_robin')",
)
IN_PROCESSES = ("local(every=4)", "elastic(every=3, mode='round_robin')")


@pytest.mark.parametrize(
    ("optimizer", "stop"), [("adam(lr=0.01)", 10), pytest.param(f"{HERE}:momentum", 12, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize(
    "strategy", [pytest.param(s, marks=[pytest.mark.slow] if "state=" in s or "switch" in s else []) for s in RESUMED]
)
def test_a_resume_within_a_period_and_at_a_meeting_is_exact(tmp_path, strategy, optimizer, stop):
    """What is kept is the same on every transport; processes of their own have those that meet in another way."""
    options = {"optimizer": optimizer, "transport": "shared" if strategy in IN_PROCESSES else "threads"}
    whole = train(tmp_path, strategy, 18, **options)
    train(tmp_path, strategy, stop, out=tmp_path, **options)
    assert same_bits(train(tmp_path, strategy, 18, out=tmp_path, resume=True, **options), whole)


@pytest.mark.parametrize("mode", ["synchronous", "round_robin"])
def test_a_resume_of_eamsgd_is_exact(tmp_path, mode):
    strategy = f"elastic(every=4, mode={mode!r}, momentum=0.9)"
    options = {"optimizer": "sgd(lr=0.1)", "transport": "threads"}
    whole = train(tmp_path, strategy, 18, **options)
    train(tmp_path, strategy, 10, out=tmp_path, **options)
    assert same_bits(train(tmp_path, strategy, 18, out=tmp_path, resume=True, **options), whole)


@pytest.mark.parametrize("strategy", ["elastic(every=3)", "elastic(every=3, mode='round_robin')"])
def test_on_another_number_of_workers_the_centre_goes_on_from_the_checkpoint(tmp_path, strategy):
    train(tmp_path, strategy, 12, workers=2, out=tmp_path, transport="threads")
    kept = checkpoint.load_newest(tmp_path / "checkpoints").model
    # No exchange in the one step more.
    resumed = train(tmp_path, strategy, 13, workers=3, out=tmp_path, resume=True, transport="threads")
    assert all(torch.equal(resumed.state[k], kept[k]) for k in kept)


@pytest.mark.parametrize(
    "strategy", ["elastic(every=3, mode='round_robin')", "local(every=4, state='average')", "diloco(inner=4)"]
)
def test_looking_and_writing_change_nothing(tmp_path, strategy):
    quiet = train(tmp_path, strategy, 18, evaluate="never", transport="threads")
    watched = train(tmp_path, strategy, 18, evaluate=5, out=tmp_path, checkpoint=2, transport="threads")
    assert same_bits(quiet, watched)


# -- a loss that is not finite -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("on", TRANSPORTS)
@pytest.mark.parametrize("text", ["local(every=1)", "diloco(inner=1)", "elastic(every=1)", "local(every=9, switch=4)"])
def test_who_exchanges_in_every_step_stops_in_that_step_with_parameters_untouched(text, on):
    spec = problem(optimizer="momentum", poison=(2, 1))
    clean = run(text, on, 3, spec | {"poison": None})
    for mine, theirs in zip(run(text, on, 3, spec), clean, strict=True):
        assert mine["raised"][0] == 1
        assert torch.equal(mine["parameters"][-1], theirs["parameters"][1])


@pytest.mark.parametrize("on", TRANSPORTS)
@pytest.mark.parametrize("text", ["elastic(every=2, momentum=0.9)", "elastic(every=1, momentum=0.9)"])
def test_a_worker_that_looked_ahead_is_left_where_it_stood(text, on):
    spec = problem(poison=(2, 1))
    clean = run(text, on, 3, spec | {"poison": None})
    for mine, theirs in zip(run(text, on, 3, spec), clean, strict=True):
        assert mine["raised"][0] == 1
        assert torch.equal(mine["parameters"][-1], theirs["parameters"][1])


@pytest.mark.parametrize("text", ["local(every=3)", "diloco(inner=3)", "elastic(every=3)", "local(every=3, warmup=1)"])
def test_others_stop_at_the_next_meeting_and_name_worker_and_step(text):
    for result in run(text, "shared", 3, problem(batches=STEPS, poison=(1, 1))):
        step, message = result["raised"]
        assert step == 1
        assert "worker 1" in message
        assert len(result["losses"]) in (2, 3)  # before the meeting that ends it


@pytest.mark.parametrize("strategy", ["local(every=4)", "elastic(every=4, mode='round_robin')"])
def test_the_error_says_what_to_change_and_where_the_last_good_state_is(tmp_path, strategy):
    with pytest.raises(NonFiniteLoss) as e:
        mh.train(
            mh.Task(model=f"{HERE}:model", data=f"{HERE}:poisoned", optimizer="sgd(lr=0.1)", batch_size=8, steps=12),
            mh.Plan(workers=2, threads=1, strategy=strategy),
            progress=False,
            out=tmp_path,
        )
    assert strategy_from(strategy).steadier in str(e.value)
    saved = checkpoint.load_newest(tmp_path / "checkpoints").model
    assert all(bool(v.isfinite().all()) for v in saved.values())


# -- bad input ---------------------------------------------------------------------------------------------------------

BAD = {
    "local(every=0)": "every=0: it is a whole number from 1",
    "local(every=1.5)": "every=1.5",
    "local(every=True)": "every=True",
    "local(state='keep')": "local, average or reset",
    "local(warmup=-1)": "warmup=-1",
    "local(warmup=2, switch=3)": "give one",
    "local(k=4)": "every",
    "diloco(inner=0)": "inner=0",
    "diloco(lr=0)": "lr=0: it is above 0",
    "diloco(momentum=1)": "momentum=1: it is from 0 to below 1",
    "diloco(momentum=-0.1)": "momentum=-0.1",
    "elastic(alpha=2)": "alpha=2: it is from 0 (workers on their own) to 1",
    "elastic(alpha=-0.1)": "alpha=-0.1",
    "elastic(alpha=nan)": "alpha=nan",
    "elastic(every=0)": "every=0",
    "elastic(mode='random')": "synchronous or round_robin",
    "elastic(momentum=1.0)": "momentum=1.0",
}


@pytest.mark.parametrize(("text", "said"), BAD.items())
def test_a_value_out_of_range_is_refused_with_the_range(text, said):
    with pytest.raises(BadInput) as e:
        strategy_from(text)
    assert said in str(e.value)


@pytest.mark.parametrize("text", [*FAMILY, *RESUMED, "elastic(momentum=0.5)"])
def test_what_prints_parses(text):
    assert strategy_from(str(strategy_from(text))) == strategy_from(text)


def setting(workers: int, *, elementwise: bool = True, stateless: bool = True, clip: bool = False) -> Setting:
    return Setting(
        workers=workers,
        transport="shared",
        shares_memory=True,
        elementwise=elementwise,
        stateless=stateless,
        clip=clip,
    )


def test_springs_too_stiff_for_so_many_workers_are_refused_with_what_works():
    strategy = strategy_from("elastic(alpha=0.9)")
    (found,) = strategy.problems(setting(4))
    assert "2/(workers + 1) = 0.4" in found.rule
    assert "0.225" in found.cure
    assert not strategy.problems(setting(1))
    assert not strategy_from("elastic(alpha=0.9, mode='round_robin')").problems(setting(4))
    for workers in range(1, 65):
        assert not strategy_from("elastic").problems(setting(workers))
    with pytest.raises(InvalidPlan, match="oscillates"):
        mh.train(mh.Task(data="digits", steps=1), mh.Plan(strategy=strategy, workers=4), progress=False)


def test_momentum_twice_is_refused():
    (found,) = strategy_from("elastic(momentum=0.9)").problems(setting(2, stateless=False))
    assert "EAMSGD" in found.rule


def test_state_that_has_no_average_is_refused():
    (found,) = strategy_from("local(state='average')").problems(setting(2, elementwise=False))
    assert "reset" in found.cure
    assert not strategy_from("local(state='average')").problems(setting(1, elementwise=False))


def test_exact_is_claimed_where_it_holds_only():
    assert strategy_from("local(every=1)").exact(setting(3))
    assert not strategy_from("local(every=1)").exact(setting(3, stateless=False))
    assert not strategy_from("local(every=1)").exact(setting(3, clip=True))
    assert not strategy_from("local(every=2)").exact(setting(3))
    for text in ("local", "parallel_sgd", "elastic"):
        assert strategy_from(text).exact(setting(1))
    assert not strategy_from("elastic(momentum=0.5)").exact(setting(1))
    assert not strategy_from("diloco").exact(setting(1))
