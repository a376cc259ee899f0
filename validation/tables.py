"""The published tables as rows, and what an audit finds in them before any is used.

They are read from where they lie (``MANYHANDS_MEASURED`` or an argument) and never copied into this project.
"""

from __future__ import annotations

import csv
import statistics
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

TENSORFLOW = "tensorflow_cnn_2017_p100_k80_images_s.csv"
MXNET = "mxnet_p2_16xlarge_k80_images_s.csv"
MEGATRON = "korthikanti_megatron_a100_calculon_validation.csv"
NCCL = "nccl_allreduce_nvlink_vtrain_lut.csv"

CLUSTERS = {
    "DGX-1": "dgx1_p100",
    "GCE n1-standard-32-k80x8": "gce_k80",
    "EC2 p2.8xlarge": "ec2_p2_8xlarge",
    "EC2 p2.8xlarge cluster": "ec2_p2_8xlarge",
    "EC2 p2.16xlarge": "ec2_p2_16xlarge",
}
#: Parameter servers on 8 instances, where fewer than instances: the document's section on the EC2 cluster.
SERVERS = {("InceptionV3", 64, 64): 6, ("ResNet-50", 32, 64): 4, ("ResNet-152", 32, 64): 4}


@dataclass(frozen=True)
class Row:
    """One measured training step of an image network."""

    program: str
    platform: str
    device: str
    model: str
    batch: int  # a device
    devices: int
    way: str  # of the exchange
    data: str
    step_s: float

    @property
    def group(self) -> tuple[str, str]:
        """Model × platform."""
        return self.model, self.platform

    @property
    def constant(self) -> tuple[str, str]:
        """What one efficiency constant is for."""
        return self.device, self.program

    @property
    def series(self) -> tuple[object, ...]:
        """All but the number of devices."""
        return self.program, self.platform, self.model, self.batch, self.data

    @property
    def servers(self) -> int | None:
        """Of parameters, where the document says how many; None: one a node."""
        return SERVERS.get((self.model, self.batch, self.devices)) if "cluster" in self.platform else None


def images(folder: Path) -> list[Row]:
    """TensorFlow's and MXNet's tables."""
    rows = []
    for r in _read(folder / TENSORFLOW):
        way = r["variable_update"] + ("/" + r["param_device"] if r["variable_update"] == "parameter_server" else "")
        batch, devices = int(r["batch_per_gpu"]), int(r["gpus"])
        step_s = batch * devices / float(r["measured_images_s"])
        rows.append(Row("tensorflow", r["platform"], r["gpu"], r["model"], batch, devices, way, r["data"], step_s))
    for r in _read(folder / MXNET):
        batch, devices = int(r["batch_per_gpu"]), int(r["gpus"])
        step_s = batch * devices / float(r["measured_images_s"])
        rows.append(
            Row(
                "mxnet",
                "EC2 p2.16xlarge",
                r["gpu"],
                r["model"],
                batch,
                devices,
                "dist_device_sync",
                "synthetic",
                step_s,
            )
        )
    return rows


@dataclass(frozen=True)
class Language:
    """One measured iteration of a Megatron model on A100."""

    model: str
    tensor: int
    pipeline: int
    chunks: int
    devices: int
    batch: int
    micro_batch: int
    recompute: str
    sequence_parallel: bool
    step_s: float


def languages(folder: Path) -> list[Language]:
    """Iteration times; the table's rows of memory are calculated ones and no measurements."""
    return [
        Language(
            r["model"], int(r["tp"]), int(r["pp"]), int(r["vp"]), int(r["gpus"]), int(r["global_batch"]),
            int(r["micro_batch"]), {"full": "full", "attn_only": "attention"}[r["recompute"]],
            r["seq_parallel"] == "True", float(r["measured"]),
        )
        for r in _read(folder / MEGATRON)
        if r["quantity"] == "iteration_time"
    ]  # fmt: skip


@dataclass(frozen=True)
class Reduction:
    """One measured all-reduce within a node."""

    device: str
    devices: int
    size_B: int
    seconds: float


def reductions(folder: Path) -> list[Reduction]:
    """NCCL's all-reduce, out of place."""
    return [
        Reduction(r["gpu"], int(r["n_gpus"]), int(r["bytes"]), float(r["time_out_of_place_us"]) * 1e-6)
        for r in _read(folder / NCCL)
    ]


def _read(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


# -- audit -------------------------------------------------------------------------------------------------------------


def audit(folder: Path) -> list[str]:
    """Units, rounding, repeats, exact straightness: what a simulator's table would show and a measured one not."""
    rows = images(folder)
    return [*_audit_images(folder, rows), *_audit_languages(folder), *_audit_reductions(folder)]


def _audit_images(folder: Path, rows: list[Row]) -> list[str]:
    single = [r for r in rows if r.devices == 1]
    same: dict[tuple[object, ...], list[float]] = defaultdict(list)
    for r in rows:
        if r.devices in (1, 8) and r.device == "K80" and r.program == "tensorflow":
            same[r.model, r.batch, r.devices].append(r.step_s)
    repeats = [max(x) / min(x) - 1 for x in same.values() if len(x) > 1]
    series: dict[tuple[object, ...], list[Row]] = defaultdict(list)
    for r in rows:
        series[r.series].append(r)
    long = [s for s in series.values() if len(s) >= 4]
    straight = [_straightness([(x.devices, x.step_s) for x in s]) for s in long]
    ahead = sum(
        r.devices > 1 and r.step_s < first.step_s
        for s in series.values()
        if (first := next((x for x in s if x.devices == 1), None))
        for r in s
    )
    derived = [_derived_error(r) for r in _read(folder / MXNET)]
    kinds = len({r.series for r in rows})
    return [
        f"Image networks: {len(rows)} rows, {len(single)} of them of one device, {kinds} series. Images a second of "
        "all devices are given; a step is batch × devices / that.",
        f"The same K80 configuration on different hosts and days differs by {100 * statistics.median(repeats):.1f} % "
        f"in the median and {100 * max(repeats):.1f} % at most ({len(repeats)} configurations of 1 and 8 devices; some "
        "exchange gradients in other ways): the noise floor.",
        f"{ahead} rows of several devices are quicker a step than their own single device: noise, too. Three digits "
        "are given, a rounding of up to 0.5 %.",
        f"No series is exactly straight in the number of devices: the best straight line misses by "
        f"{100 * min(straight):.2f} to {100 * max(straight):.1f} %.",
        f"MXNet's derived times agree with its images a second to {100 * max(derived):.3f} %. The parameters of the "
        "networks traced here come to the sizes that it states (203, 95 and 240 MB), which is a test.",
        "The EC2 cluster's rows with batch 32 end at 8 devices; its document goes on to 64. Two rows of AlexNet on 8 "
        "devices with real data are missing: the document says that its input pipeline was full. Real-data rows of "
        "AlexNet and VGG16 on fewer devices are near that, too; no figure for reading data is in a cluster file, so "
        "they are predicted too fast. They stay in.",
    ]


def _derived_error(r: dict[str, str]) -> float:
    step_ms = int(r["batch_per_gpu"]) * int(r["gpus"]) / float(r["measured_images_s"]) * 1e3
    return abs(float(r["derived_iter_ms"]) / step_ms - 1)


def _straightness(points: Iterable[tuple[float, float]]) -> float:
    """The largest relative distance from the best straight line."""
    x, y = (np.array(v, dtype=float) for v in zip(*points, strict=True))
    line = np.polyval(np.polyfit(x, y, 1), x)
    return float(np.max(np.abs(line / y - 1)))


def _audit_languages(folder: Path) -> list[str]:
    every = _read(folder / MEGATRON)
    measured = languages(folder)
    return [
        f"Megatron: {len(measured)} measured iterations; the other {len(every) - len(measured)} rows are memory, "
        "calculated in the paper and no measurements (the closed form gives them exactly, which tests it and not us). "
        "No row has fewer than 8 devices, so no constant can be had from a single one."
    ]


def _audit_reductions(folder: Path) -> list[str]:
    rows = reductions(folder)
    curves: dict[tuple[str, int], list[Reduction]] = defaultdict(list)
    for r in rows:
        curves[r.device, r.devices].append(r)
    off = []
    for curve in curves.values():
        x = np.array([r.size_B for r in curve], dtype=float)
        y = np.array([r.seconds for r in curve])
        fit = np.polyfit(x, y, 1, w=1 / y)
        off.append(float(np.mean(np.abs(np.polyval(fit, x) / y - 1))))
    bandwidth = [
        abs(2 * (n - 1) / n * int(r["bytes"]) / float(r["time_out_of_place_us"]) / 1e3 / float(r["busbw_out_GBps"]) - 1)
        for r in _read(folder / NCCL)
        if (n := int(r["n_gpus"]))
    ]
    return [
        f"NCCL: {len(rows)} all-reduces on {len(curves)} curves, bandwidths and times agreeing to "
        f"{100 * max(bandwidth):.2f} %. A straight line misses by {100 * min(off):.1f} to {100 * max(off):.1f} % in "
        "the mean: no table of a formula. (The same repository's single-device steps are exactly affine; they are not "
        "among the tables here.)"
    ]
