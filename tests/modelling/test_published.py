"""Published formulas against the papers' own numbers, their limits, and what this project's own schedules do."""

import itertools
import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from manyhands.communication import collectives
from manyhands.errors import BadInput, UnknownName
from manyhands.modelling.published import (
    bunch_mode,
    checkpoint_interval,
    formulas,
    hierarchical,
    megatron,
    null_step,
    oyama,
    paleo,
    parameter_server,
    pipeline,
    roofline,
    thakur,
    winograd,
    yan,
)
from manyhands.modelling.published.thakur import Hop
from manyhands.partition.pipeline import gpipe, interleaved, one_f_one_b, schedule

MESSAGES, BYTES, ADDED = Hop(1, 0), Hop(0, 1), Hop(0, 0, 1)
HOP = Hop(3.4e-6, 1 / 240e9, 1 / 1000e9)
ranks = st.integers(1, 40)
sizes = st.floats(1, 1e9)


@pytest.mark.parametrize("name", formulas)
def test_every_formula_names_its_paper(name):
    assert formulas.load(name).paper.year >= 1974


# -- Thakur et al.: collectives ----------------------------------------------------------------------------------------


def played(make, size):
    """Messages in a row, and the parts of the vector sent and added in them, by this project's own schedule."""
    bounds = collectives.even(5040 * 16 * size, size)
    rounds = list(zip(*(make(rank, bounds) for rank in range(size)), strict=True))
    sent = sum(max(sum(s.hi - s.lo for s in r.sends) for r in each) for each in rounds)
    added = sum(max(sum(x.hi - x.lo for x in r.receives if x.then == "add") for r in each) for each in rounds)
    return len(rounds), sent / bounds[-1][1], added / bounds[-1][1]


@pytest.mark.parametrize("size", [2, 3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize(
    ("name", "formula"),
    [
        ("ring_all_reduce", thakur.ring_all_reduce_s),
        ("ring_reduce_scatter", thakur.ring_reduce_scatter_s),
        ("ring_all_gather", thakur.ring_all_gather_s),
        ("recursive_doubling_all_reduce", thakur.recursive_doubling_all_reduce_s),
        ("recursive_halving_reduce_scatter", thakur.recursive_halving_reduce_scatter_s),
        ("recursive_doubling_all_gather", thakur.recursive_doubling_all_gather_s),
        ("rabenseifner_all_reduce", thakur.rabenseifner_all_reduce_s),
        ("binomial_broadcast", thakur.binomial_broadcast_s),
        ("binomial_reduce", thakur.binomial_reduce_s),
    ],
)
def test_a_formula_costs_what_the_schedule_does(name, formula, size):
    expected = played(getattr(collectives, name), size)
    assert [formula(1.0, size, hop) for hop in (MESSAGES, BYTES, ADDED)] == pytest.approx(expected, rel=1e-12)


@given(sizes, ranks)
def test_the_quickest_all_reduce_is_none_of_the_slower(size_B, p):
    best = thakur.all_reduce_s(size_B, p, HOP)
    assert all(best <= thakur.all_reduce_s(size_B, p, HOP, algorithm=name) for name in thakur.ALL_REDUCES)


def test_small_vectors_take_few_messages_and_large_ones_few_bytes():
    quickest = [min(thakur.ALL_REDUCES, key=lambda a: thakur.all_reduce_s(n, 16, HOP, algorithm=a)) for n in (8, 1e9)]
    assert quickest[0] == "recursive_doubling"
    assert quickest[1] != "recursive_doubling"


def test_one_rank_costs_nothing_and_an_unknown_algorithm_is_refused():
    assert thakur.all_reduce_s(1e6, 1, HOP) == 0
    with pytest.raises(UnknownName, match="rabenseifner"):
        thakur.all_reduce_s(1e6, 2, HOP, algorithm="rabenseifer")


@given(sizes, st.integers(2, 40))
def test_a_reduce_scatter_and_a_gather_are_an_all_reduce(size_B, p):
    halves = thakur.ring_reduce_scatter_s(size_B, p, HOP) + thakur.ring_all_gather_s(size_B, p, HOP)
    assert halves == pytest.approx(thakur.ring_all_reduce_s(size_B, p, HOP), rel=1e-12)


def test_the_other_collectives_of_the_paper():
    assert thakur.bruck_all_gather_s(6.0, 6, MESSAGES) == 3
    assert thakur.bruck_all_gather_s(6.0, 6, BYTES) == 5
    assert thakur.pairwise_all_to_all_s(8.0, 8, Hop(1, 1)) == 7 + 7
    assert thakur.bruck_all_to_all_s(8.0, 8, Hop(1, 1)) == 3 + 12
    assert thakur.scatter_gather_broadcast_s(8.0, 8, Hop(1, 1)) == 3 + 7 + 14


# -- levels ------------------------------------------------------------------------------------------------------------


@given(sizes, st.integers(2, 9))
def test_one_level_is_the_flat_all_reduce(size_B, p):
    assert hierarchical.all_reduce_s(size_B, [(p, HOP)]) == thakur.ring_all_reduce_s(size_B, p, HOP)


@given(sizes, st.integers(2, 9), st.integers(2, 9))
def test_levels_move_as_many_bytes_as_one_ring(size_B, p, q):
    """2(p−1)/p·n within and 2(q−1)/q·n/p between are 2(pq−1)/(pq)·n: bandwidth optimal, whatever the levels."""
    levels = hierarchical.all_reduce_s(size_B, [(p, BYTES), (q, BYTES)])
    assert levels == pytest.approx(thakur.ring_all_reduce_s(size_B, p * q, BYTES), rel=1e-12)


def test_the_outer_link_carries_the_least():
    slow = Hop(0, 1.0)
    assert hierarchical.all_reduce_s(8.0, [(8, Hop(0, 0)), (2, slow)]) == thakur.ring_all_reduce_s(1.0, 2, slow)
    assert hierarchical.all_reduce_s(8.0, []) == 0


# -- parameter server --------------------------------------------------------------------------------------------------


@given(st.integers(1, 64), st.floats(1e8, 1e11), st.floats(1e8, 1e11))
def test_with_enough_servers_the_workers_own_port_is_the_bound(workers, worker_Bps, server_Bps):
    servers = parameter_server.enough_servers(workers, worker_Bps=worker_Bps, server_Bps=server_Bps)
    took = parameter_server.exchange_s(1e8, workers, servers, worker_Bps=worker_Bps, server_Bps=server_Bps)
    assert took == pytest.approx(2e8 / worker_Bps, rel=1e-9)
    if servers > 1:
        less = parameter_server.exchange_s(1e8, workers, servers - 1, worker_Bps=worker_Bps, server_Bps=server_Bps)
        assert less >= took * (1 - 1e-9)


# -- Paleo -------------------------------------------------------------------------------------------------------------

GPU = paleo.Platform(peak_flops_per_s=6.144e12, memory_Bps=336.5e9, network_Bps=2.5e9)
LAYERS = [paleo.Layer(1e11, 2e8, 1e8), paleo.Layer(2e10, 1e9, 1e8)]


def test_a_layer_reads_computes_and_writes_one_after_the_other():
    assert paleo.layer_s(LAYERS[0], GPU) == pytest.approx(3e8 / 336.5e9 + 1e11 / 6.144e12, rel=1e-12)


@pytest.mark.parametrize(("scheme", "times"), [("one_to_all", 14), ("tree", 6), ("butterfly", 3)])
def test_the_three_exchanges_of_the_paper(scheme, times):
    assert paleo.exchange_s(2.5e9, 8, GPU, scheme=scheme) == times
    assert paleo.exchange_s(2.5e9, 1, GPU, scheme=scheme) == 0


def test_a_step_is_its_layers_and_the_exchange():
    alone = paleo.step_s(LAYERS, 2.5e9, 1, GPU)
    assert alone == pytest.approx(sum(paleo.layer_s(x, GPU) for x in LAYERS), rel=1e-12)
    assert paleo.step_s(LAYERS, 2.5e9, 8, GPU, scheme="butterfly") == pytest.approx(alone + 3, rel=1e-12)


def test_hybrid_parallelism_exchanges_no_dense_weights():
    conv, dense = LAYERS[:1], LAYERS[1:]
    took = paleo.hybrid_step_s(conv, dense, 0.0, 0.0, 4, GPU)
    assert took == pytest.approx(paleo.layer_s(conv[0], GPU) + paleo.layer_s(dense[0], GPU) / 4, rel=1e-12)


@given(st.floats(0.05, 1.0))
def test_the_platform_percent_is_found_again(percent):
    real = paleo.Platform(GPU.peak_flops_per_s, GPU.memory_Bps, percent_of_peak=percent)
    pairs = [(paleo.layer_s(x, GPU), paleo.layer_s(x, real)) for x in LAYERS]
    assert paleo.percent_of_peak(pairs) == pytest.approx(percent, rel=1e-12)


# -- roofline, Winograd ------------------------------------------------------------------------------------------------


def test_the_roof_has_its_ridge_where_both_bounds_meet():
    machine = {"peak_flops_per_s": 10.6e12, "memory_Bps": 732e9}
    at = roofline.ridge(**machine)
    assert roofline.seconds(at * 1e9, 1e9, **machine) == pytest.approx(1e9 / 732e9, rel=1e-12)
    assert roofline.seconds(2 * at * 1e9, 1e9, **machine) == pytest.approx(2e9 / 732e9, rel=1e-12)
    assert roofline.seconds(at * 1e8, 1e9, **machine) == pytest.approx(1e9 / 732e9, rel=1e-12)


@pytest.mark.parametrize(("tile", "kernel", "fewer"), [(2, 3, 2.25), (4, 3, 4.0), (4, 5, 6.25), (6, 3, 5.0625)])
def test_winograd_saves_what_the_paper_says(tile, kernel, fewer):
    conv = winograd.Convolution(2, 3, 5, 12, 24, kernel)
    assert winograd.direct_multiplications(conv) / winograd.multiplications(conv, tile) == fewer


def test_tiles_that_stick_out_count_whole():
    conv = winograd.Convolution(1, 1, 1, 5, 5, 3)
    assert winograd.multiplications(conv, 4) == 4 * 36
    assert winograd.transformed(conv, 4) == (4 * 36, 4 * 36, 36)


# -- Oyama et al.: asynchronous SGD ------------------------------------------------------------------------------------

periods = st.floats(1e-3, 10)


@given(st.integers(1, 20), st.integers(1, 300), periods, periods)
def test_no_gradient_is_lost_on_its_way_to_an_update(workers, batch, gradient_s, update_s):
    found = oyama.effective_batch(workers, batch, gradient_s, update_s)
    assert math.fsum(found.probabilities) == pytest.approx(1, abs=1e-12)
    assert found.mean == pytest.approx(workers * batch * update_s / gradient_s, rel=1e-9)


@given(periods, periods)
def test_the_mean_staleness_is_the_ratio_of_the_two_times(gradient_s, update_s):
    found = oyama.staleness(gradient_s, update_s)
    assert found.mean == pytest.approx(gradient_s / update_s, rel=1e-9)
    assert len(found.probabilities) <= 2


def test_the_distributions_are_those_of_workers_with_chance_phases():
    workers, batch, gradient_s, update_s = 6, 50, 0.35, 1.0
    draw, seen, rounds = random.Random(3), {}, 40_000
    for _ in range(rounds):
        # Events of a worker at phase, phase + T_g, …; how many of them lie in an interval of T_u.
        events = sum(math.floor((update_s - draw.uniform(0, gradient_s)) / gradient_s) + 1 for _ in range(workers))
        seen[events * batch] = seen.get(events * batch, 0) + 1
    found = oyama.effective_batch(workers, batch, gradient_s, update_s)
    for value, p in zip(found.values, found.probabilities, strict=True):
        assert seen.get(value, 0) / rounds == pytest.approx(p, abs=4 * math.sqrt(0.25 / rounds))
    assert sum(seen.values()) == sum(n for v, n in seen.items() if v in found.values)


def test_equal_workers_at_a_server_are_stale_by_all_the_others():
    found = oyama.server_staleness([2.0] * 5, 0)
    assert (found.first, found.probabilities) == (4, (1.0,))


def test_a_slow_worker_is_stale_by_more_and_a_fast_one_by_less():
    cycles = [1.0, 1.0, 4.0]
    means = [oyama.server_staleness(cycles, w).mean for w in range(3)]
    assert means == pytest.approx([1.25, 1.25, 8.0], rel=1e-12)
    assert oyama.server_staleness(cycles, 0).quantile(0.5) == 1
    assert oyama.server_staleness(cycles, 0).variance == pytest.approx(0.25 * 0.75, rel=1e-12)


def test_a_server_is_the_bound_from_saturation_on():
    assert oyama.server_cycle_s(3, 1.0, 0.1) == 1.1
    assert oyama.server_cycle_s(20, 1.0, 0.1) == 2.0
    assert oyama.sweep_s(60_000, 4, 50, 0.01) == pytest.approx(3.0, rel=1e-12)


# -- Yan et al.: partitions, replicas, servers, threads ----------------------------------------------------------------

NET = [yan.Layer(2e8, 4e5, 1e7), yan.Layer(4e8, 2e5, 4e7), yan.Layer(1e8, 4e3, 8e7)]
XEON = yan.Machine(flops_per_s=2e10, interference=0.1, threads=8, network_Bps=1.25e9, latency_s=5e-5)


def test_one_machine_alone_is_serial_training():
    took = yan.epoch_s(NET, XEON, yan.Configuration(1, 1, 0, 1), examples=1000, batch=10)
    assert took == pytest.approx(1000 * 7e8 / 2e10, rel=1e-12)


def test_threads_that_do_not_disturb_each_other_share_the_examples():
    alone = yan.Machine(2e10, 0.0, 8, 1.25e9)
    one, eight = (yan.epoch_s(NET, alone, yan.Configuration(1, 1, 0, h), examples=800, batch=8) for h in (1, 8))
    assert one / eight == pytest.approx(8, rel=1e-12)
    assert yan.rate(XEON, 8) / yan.rate(XEON, 1) == pytest.approx(8 / 1.7, rel=1e-12)


def test_a_free_network_makes_replicas_and_partitions_linear():
    free = yan.Machine(2e10, 0.0, 1, math.inf)
    serial = yan.epoch_s(NET, free, yan.Configuration(1, 1, 0, 1), examples=1000, batch=10)
    for p, r in ((4, 1), (1, 4), (2, 3)):
        took = yan.epoch_s(NET, free, yan.Configuration(p, r, 1, 1), examples=1000, batch=10)
        assert took == pytest.approx(serial / (p * r), rel=1e-12)


@pytest.mark.parametrize(("network_Bps", "batch"), list(itertools.product((1.25e7, 1.25e8, 1.25e10), (1, 64))))
@pytest.mark.parametrize("overlapped", [True, False])
def test_the_optimizer_picks_the_best_of_all(network_Bps, batch, overlapped):
    machine = yan.Machine(2e10, 0.3, 4, network_Bps, 5e-5)
    said = {"examples": 10_000, "batch": batch, "overlapped": overlapped}
    best = yan.epoch_s(NET, machine, yan.best(NET, machine, 9, **said), **said)
    every = min(yan.epoch_s(NET, machine, c, **said) for c in yan.configurations(9, 4))
    assert best == pytest.approx(every, rel=1e-12)


def test_a_model_larger_than_a_machine_is_cut_and_one_larger_than_all_is_refused():
    said = {"examples": 1000, "batch": 10}
    assert yan.best(NET, XEON, 8, memory_B=4e7, **said).partitions >= 4
    with pytest.raises(BadInput, match="13 would"):
        yan.best(NET, XEON, 8, memory_B=1e7, **said)


# -- Färber & Asanović: bunches ----------------------------------------------------------------------------------------

SPEECH, SPERT = (153, 1000, 56), bunch_mode.Nodes(connections_per_s=1.2e8, word_s=4e-8, message_s=1e-6)


def test_an_online_pattern_on_one_node_is_plain_training():
    plain = bunch_mode.weights(SPEECH) / SPERT.connections_per_s
    assert bunch_mode.pattern_parallel_s(SPEECH, 1, 1, SPERT) == pytest.approx(plain, rel=1e-12)
    assert bunch_mode.network_parallel_s(SPEECH, 1, 1, SPERT) == pytest.approx(plain, rel=1e-12)
    assert bunch_mode.connection_updates_per_s(SPEECH, 1, plain) == pytest.approx(1.2e8, rel=1e-12)


@pytest.mark.parametrize("units", [(64, 128, 64), (64, 128, 128, 64)])
@pytest.mark.parametrize("nodes", [2, 4, 8])
def test_the_two_cost_models_meet_at_the_crossover(units, nodes):
    where = bunch_mode.crossover(units, nodes, SPERT)
    below, above = (max(1, int(where * x)) // nodes * nodes for x in (0.5, 2.0))
    for bunch, quicker in ((below, "network"), (above + nodes, "pattern")):
        if bunch:
            pattern = bunch_mode.pattern_parallel_s(units, bunch, nodes, SPERT)
            network = bunch_mode.network_parallel_s(units, bunch, nodes, SPERT)
            assert ("network" if network < pattern else "pattern") == quicker


def test_without_hidden_units_cutting_the_network_exchanges_nothing():
    assert bunch_mode.crossover((10, 10), 4, SPERT) == math.inf


def test_eight_nodes_bring_what_the_paper_predicts_from_five():
    """More than 530 MCUPS on 5 nodes, more than 800 on 8: 1.5 times as much, of 1.6 at most."""
    bunch = 4000
    rates = [
        bunch_mode.connection_updates_per_s(SPEECH, bunch, bunch_mode.pattern_parallel_s(SPEECH, bunch, p, SPERT))
        for p in (5, 8)
    ]
    assert rates[0] > 530e6
    assert rates[1] > 800e6
    assert rates[1] / rates[0] < 8 / 5


# -- Abadi et al.: the null step ---------------------------------------------------------------------------------------

#: From the paper's figures for one worker: 100 MB in 147 ms and 1 GB in 1.01 s; scalars, 1.8 ms to 8.8 ms at 100.
_BPS = (1e9 - 1e8) / (1.01 - 0.147)
SERVICE = null_step.Service(16, worker_Bps=_BPS, server_Bps=_BPS, step_s=0.147 - 1e8 / _BPS, per_worker_s=0.0)
SCALAR = null_step.Service(16, worker_Bps=_BPS, server_Bps=_BPS, step_s=1.73e-3, per_worker_s=(8.8e-3 - 1.8e-3) / 99)


@pytest.mark.parametrize(("moved_B", "measured_s", "within"), [(1e8, 0.613, 0.1), (1e9, 7.16, 0.2)])
def test_one_worker_tells_what_a_hundred_take(moved_B, measured_s, within):
    assert null_step.step_s(moved_B, 100, SERVICE) == pytest.approx(measured_s, rel=within)


def test_scalars_cost_coordination_only():
    assert null_step.step_s(4 * 16, 1, SCALAR) == pytest.approx(1.8e-3, rel=0.01)
    assert null_step.step_s(4 * 16, 100, SCALAR) == pytest.approx(8.8e-3, rel=0.01)


def test_a_sparse_step_takes_milliseconds_whatever_the_table():
    row_B = 32 * 1024.0
    assert null_step.step_s(null_step.sparse_B(32, row_B), 1, SCALAR) < 20e-3


def test_a_backup_worker_gains_less_than_it_costs_at_some_number():
    """Figure 8: four backups cut the median step by 23 % to 1.93 s; divided by 54/50 that gains 20 %."""
    assert null_step.backup_gain(1.93 / 0.77, 1.93, 50, 4) == pytest.approx(1.2, abs=0.01)
    assert null_step.backup_gain(2.0, 2.0, 50, 5) < 1


# -- pipelines ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("stages", "micro_batches"), [(2, 4), (4, 8), (4, 4), (3, 7)])
@pytest.mark.parametrize("make", [gpipe.gpipe, one_f_one_b.one_f_one_b])
def test_a_pipelines_step_is_its_schedules_longest_path(make, stages, micro_batches):
    rows = make(stages, micro_batches)
    assert pipeline.bubble(stages, micro_batches) == pytest.approx(schedule.bubble(rows), rel=1e-12)
    assert pipeline.step_s(1, 1, stages, micro_batches) == pytest.approx(schedule.makespan(rows), rel=1e-12)
    held = [pipeline.in_flight(s, stages, micro_batches, flush=make is gpipe.gpipe) for s in range(stages)]
    assert held == schedule.in_flight(rows)


@pytest.mark.parametrize("chunks", [2, 4])
def test_interleaving_divides_the_bubble(chunks):
    rows = interleaved.interleaved(4, 8, chunks=chunks)
    assert pipeline.bubble(4, 8, chunks) == pytest.approx(schedule.bubble(rows), rel=1e-12)
    # The schedule's unit is a chunk's forward; a stage has ``chunks`` of them.
    assert pipeline.step_s(chunks, chunks, 4, 8, chunks=chunks) == pytest.approx(schedule.makespan(rows), rel=1e-12)


def test_a_hand_over_is_paid_on_the_way_through_the_pipe_and_back():
    assert pipeline.step_s(1, 2, 4, 8, hand_over_s=0.5) == pipeline.step_s(1, 2, 4, 8) + 3


# -- Megatron ----------------------------------------------------------------------------------------------------------

GPT_22B = megatron.Transformer(48, 6144, 64)
GPT_175B = megatron.Transformer(96, 12288, 96)
GPT_530B = megatron.Transformer(105, 20480, 128)


def test_operations_are_those_of_the_papers_closed_form():
    for m, sequences in ((GPT_22B, 4), (GPT_175B, 64)):
        s, l, h, v = m.length, m.layers, m.width, m.vocabulary  # noqa: E741
        full = 96 * sequences * s * l * h**2 * (1 + s / (6 * h) + v / (16 * l * h))
        plain = 72 * sequences * s * l * h**2 * (1 + s / (6 * h) + v / (12 * l * h))
        assert megatron.flops_per_step(m, sequences, recompute="full") == pytest.approx(full, rel=1e-12)
        assert megatron.flops_per_step(m, sequences) == pytest.approx(plain, rel=1e-12)
        assert plain < megatron.flops_per_step(m, sequences, recompute="attention") < full


@pytest.mark.parametrize(
    ("model", "micro_batch", "pipeline", "chunks", "recompute", "gib"),
    [
        (GPT_22B, 4, 1, 1, "none", 59.25),
        (GPT_22B, 4, 1, 1, "attention", 9.5625),
        (GPT_175B, 1, 8, 3, "none", 66.84375),
        (GPT_175B, 1, 8, 3, "attention", 12.3515625),
        (GPT_530B, 1, 35, 3, "none", 114.0234375),
        (GPT_530B, 1, 35, 3, "attention", 23.076171875),
    ],
)
def test_activations_are_those_of_figure_1_of_korthikanti(model, micro_batch, pipeline, chunks, recompute, gib):
    held = megatron.activation_B(
        model, micro_batch, 8, pipeline, chunks=chunks, recompute=recompute, sequence_parallel=recompute == "attention"
    )
    assert held / 2**30 == pytest.approx(gib, rel=1e-12)


def test_doing_everything_again_keeps_a_layers_input_only():
    assert megatron.activation_B_per_layer(GPT_22B, 4, 8, recompute="full") == 2 * 2048 * 4 * 6144
    traffic = [megatron.tensor_traffic_B(GPT_22B, 4, recompute=r) for r in ("none", "full")]
    assert traffic[1] / traffic[0] == 1.5


# -- checkpoints -------------------------------------------------------------------------------------------------------


@given(st.floats(1, 100), st.floats(1e5, 1e7))
def test_daly_refines_young_where_failures_are_rare(write_s, failure_s):
    young, daly = (f(write_s, failure_s) for f in (checkpoint_interval.young_s, checkpoint_interval.daly_s))
    assert daly == pytest.approx(young, rel=0.03)


def test_the_interval_is_the_best_of_the_expected_time():
    write_s, failure_s = 60.0, 3600.0
    best = min(range(60, 3600), key=lambda t: checkpoint_interval.wall_s(1e6, t, write_s, 30, failure_s))
    assert checkpoint_interval.daly_s(write_s, failure_s) == pytest.approx(best, rel=0.005)
    assert checkpoint_interval.daly_s(7200, 3600) == 3600


def test_a_cluster_that_fails_every_three_hours_can_work_nine_tenths_of_the_time():
    """419 unexpected interruptions of 16,384 devices in 54 days: one in 3.1 h."""
    failure_s = 54 * 86400 / 419
    interval = checkpoint_interval.daly_s(30, failure_s)
    assert 1e6 / checkpoint_interval.wall_s(1e6, interval, 30, 60, failure_s) > 0.9
