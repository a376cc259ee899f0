"""The validation finds what was put into made-up tables, and its networks and exchanges are those of the programs."""

import csv
import math

import pytest

from manyhands.cluster import load
from validation import exchange, limits, networks, published, scores, tables
from validation.tables import Row


@pytest.mark.parametrize(
    ("program", "name", "millions", "multiplications"),
    [
        ("tensorflow", "AlexNet", 61.84, 0.839e9),
        ("tensorflow", "VGG16", 138.36, 15.47e9),
        ("tensorflow", "ResNet-50", 25.55, 3.86e9),
        ("mxnet", "alexnet", 203 / 4, 1.010e9),
        pytest.param("mxnet", "inception-v3", 95 / 4, 5.713e9, marks=pytest.mark.slow),
        pytest.param("mxnet", "resnet-152", 240 / 4, 11.51e9, marks=pytest.mark.slow),
    ],
)
def test_a_network_has_the_size_that_its_table_states(program, name, millions, multiplications):
    step = published.step(program, name, 2)
    assert sum(step.parameter_B.values()) / 4e6 == pytest.approx(millions, rel=0.005)
    products = sum(x.flops for x in step if x.phase == "forward" and x.name in ("convolution", "addmm"))
    assert products / 2 / 2 == pytest.approx(multiplications, rel=0.005)
    assert not step.untraced


def row(platform, model, devices, way, program="tensorflow", step_s=1.0, batch=32):
    return Row(program, platform, "K80", model, batch, devices, way, "synthetic", step_s)


SIZES = {"a": 6e8, "b": 3e8, "c": 1e8}


def test_one_device_exchanges_nothing_but_with_the_host():
    for way in ("parameter_server/gpu", "replicated_nccl", "replicated_no_nccl", "dist_device_sync"):
        alone = exchange.of(way, load("gce_k80"), 1, SIZES, None)
        assert (alone.pull_s_per_B, alone.push_s_per_B, alone.after_s) == (0, 0, 0)
    assert exchange.of("parameter_server/cpu", load("gce_k80"), 1, SIZES, None).pull_s_per_B > 0


def test_arrays_are_put_on_the_emptiest_device():
    assert exchange.largest_load([6, 3, 1, 2], 2) == 6
    assert exchange.largest_load([1] * 8, 4) == 2


def test_a_host_adds_up_the_last_gradient_after_it_has_come_and_the_longer_the_more_devices():
    steps = [published.predicted_s(row("DGX-1", "AlexNet", n, "parameter_server/cpu", batch=2), 1.0) for n in (2, 4, 8)]
    assert steps[0] < steps[1] < steps[2]


def test_limits_take_in_those_before_them_and_leave_unknown_devices_alone():
    k80, other = load("gce_k80").device, load("dgx_a100").device
    found = [limits.limited(k80, limit) for limit in limits.Limit]
    assert [d.peak_of("float32") / 4.37e12 for d in found] == pytest.approx([1, 0.64, 0.64, 0.64 * 2 / 3], rel=1e-12)
    assert [d.memory_bandwidth.si / 240e9 for d in found] == pytest.approx([1, 1, 0.8, 0.8], rel=1e-12)
    assert limits.limited(other, limits.Limit.ISSUE) == other


def test_a_ring_within_the_node_moves_what_a_ring_moves():
    link = load("dgx1_p100").link("within")
    found = exchange.of("replicated_nccl", load("dgx1_p100"), 8, SIZES, None)
    assert found.push_s_per_B == pytest.approx(2 * 7 / 8 / link.bandwidth_Bps(8), rel=1e-12)


def test_servers_on_the_nodes_share_their_ports():
    cluster = load("ec2_p2_8xlarge")
    within = exchange.of("distributed_replicated_ps_sync", cluster, 8, SIZES, None)
    across = exchange.of("distributed_replicated_ps_sync", cluster, 32, SIZES, None)
    network = (across.push_s_per_B - within.push_s_per_B) * cluster.link("between").bandwidth_Bps(1)
    assert network == pytest.approx(2 * 3 / 4, rel=1e-12)  # 2(W − 1)/W with a server a node
    fewer = exchange.of("distributed_replicated_ps_sync", cluster, 32, SIZES, 2)
    assert fewer.push_s_per_B > across.push_s_per_B


def test_scores_of_known_errors():
    found = scores.Score.of([(1.1, 1.0), (0.8, 1.0), (None, 1.0)])
    assert (found.n, found.failures) == (2, 1)
    assert (found.mean, found.bias, found.worst) == pytest.approx((0.15, -0.05, 0.2), abs=1e-12)
    assert scores.spearman([1, 2, 3, 4], [10, 20, 40, 30]) == pytest.approx(0.8, abs=1e-12)
    assert scores.spearman([1, 1, 2], [5, 5, 9]) == pytest.approx(1, abs=1e-12)
    assert math.isnan(scores.spearman([1, 1], [1, 2]))
    groups = [("a", x, x) for x in range(4)] + [("b", x, -x) for x in range(4)] + [("c", 1, 1)]
    assert scores.within_groups(groups) == (0.0, 2)


TRUE = 0.4


def written(folder, change=lambda row: 1.0):
    """Tables in the published form whose steps are our own predictions with one constant, times ``change``."""
    rows = [
        row(platform, model, n, "parameter_server/cpu", batch=b)
        for platform in ("GCE n1-standard-32-k80x8", "EC2 p2.8xlarge")
        for model, b in (("AlexNet", 512), ("VGG16", 32))
        for n in (1, 2, 4, 8)
    ]
    mx = [row("EC2 p2.16xlarge", "alexnet", n, "dist_device_sync", "mxnet", batch=512) for n in (1, 2, 16, 32)]

    def rate(r):
        return repr(r.batch * r.devices / (published.predicted_s(r, TRUE) * change(r)))

    columns = "platform gpu gpus gpus_per_node model batch_per_gpu data variable_update param_device measured_images_s"
    found = [
        [r.platform, "K80", r.devices, 8, r.model, r.batch, "synthetic", "parameter_server", "cpu", rate(r)]
        for r in rows
    ]
    _write(folder / tables.TENSORFLOW, columns, found)
    columns = "model batch_per_gpu gpus gpu measured_images_s derived_iter_ms"
    found = [[r.model, r.batch, r.devices, "K80", rate(r), r.batch * r.devices / float(rate(r)) * 1e3] for r in mx]
    _write(folder / tables.MXNET, columns, found)
    columns = "model tp pp vp gpus global_batch micro_batch recompute seq_parallel quantity measured"
    found = [["megatron-22B", 8, 1, 1, 8, 4, 4, "full", False, "iteration_time", 1.42],
             ["megatron-22B", 8, 1, 1, 8, 4, 4, "full", False, "activations per GPU", 59.25]]  # fmt: skip
    _write(folder / tables.MEGATRON, columns, found)
    columns = "gpu n_gpus bytes time_out_of_place_us busbw_out_GBps"
    sizes = [2**k for k in range(20, 31)]
    found = [["A100", 2, n, us, n / us / 1e3] for n in sizes for us in [20 + n / 2e5]]
    found += [["V100", 2, n, us, n / us / 1e3] for n in sizes for us in [20 + n / 1e5]]
    _write(folder / tables.NCCL, columns, found)
    return rows + mx


def _write(path, columns, rows):
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([columns.split(), *rows])


def test_the_constant_that_made_a_table_is_found_and_predicts_its_other_rows(tmp_path):
    written(tmp_path)
    rows = tables.images(tmp_path)
    found = published.constants(rows)
    assert set(found) == {("K80", "tensorflow"), ("K80", "mxnet")}
    assert list(found.values()) == pytest.approx([TRUE, TRUE], rel=1e-9)
    for r in rows:
        assert published.predicted_s(r, found[r.constant]) == pytest.approx(r.step_s, rel=1e-9)


def test_held_out_rows_do_not_move_the_constants(tmp_path):
    written(tmp_path, change=lambda r: 1.0 if r.devices == 1 else 3.0)
    assert list(published.constants(tables.images(tmp_path)).values()) == pytest.approx([TRUE, TRUE], rel=1e-9)


def test_the_report_says_good_and_bad(tmp_path, capsys):
    written(tmp_path, change=lambda r: 1.0 if r.devices == 1 else 1.25)
    assert published.main([str(tmp_path)]) == 0
    said = capsys.readouterr().out
    ours = next(line for line in said.splitlines() if line.startswith("| **one constant"))
    assert [cell.strip() for cell in ours.split("|")[2:8]] == ["20.0", "20.0", "20.0", "20.0", "-20.0", "15"]
    assert "baseline: last known configuration" in said
    assert "1 measured iterations; the other 1 rows are memory" in said


def test_the_last_known_configuration_is_the_next_smaller_that_was_measured():
    rows = [row("GCE n1-standard-32-k80x8", "VGG16", n, "parameter_server/cpu", step_s=n) for n in (1, 2, 8)]
    assert published.last_known_s(rows[2], rows) == 2
    assert published.last_known_s(rows[0], rows) is None


def test_baselines_are_a_bound_and_a_sum():
    r = row("GCE n1-standard-32-k80x8", "AlexNet", 1, "parameter_server/cpu", batch=512)
    assert published.roofline_s(r) < published.paleo_s(r, 1.0)
    assert published.paleo_s(r, 0.5) == pytest.approx(2 * published.paleo_s(r, 1.0), rel=1e-12)


def test_without_tables_it_says_what_to_name(tmp_path, capsys):
    assert published.main([str(tmp_path)]) == 2
    assert "MANYHANDS_MEASURED" in capsys.readouterr().err


def test_images_and_labels_have_no_contents():
    x, y = networks.batch("mxnet", "alexnet", 512)
    assert x.device.type == y.device.type == "meta"
    assert tuple(x.shape) == (512, 3, 224, 224)
