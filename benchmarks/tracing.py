"""What `--trace` costs: steps of the same small run with and without, in turn.

python benchmarks/tracing.py [--quick] [--json FILE] [--rounds N]
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import _measure as measure
from _measure import Burst, Report, Spread, Target

import manyhands as mh

#: Of a step, the most that tracing may cost.
LIMIT = 0.02
PLAIN, TRACED = "without", "with --trace"
STEPS = 600


def trained(trace: Path | None) -> measure.Candidate:
    """A candidate whose steps are those of one run on 2 workers."""
    task = mh.Task(model="perceptron(hidden=50)", data="digits", batch_size=50, steps=STEPS)

    def run(steps: int, warm: int) -> list[Burst]:
        done = mh.train(task, mh.Plan(workers=2, threads=1), evaluate="never", progress=False, trace=trace)
        assert done.summary is not None
        return [Burst(done.summary.step_s.median, done.summary.wall_s / done.summary.steps)]

    return run


def main() -> None:
    """Both in turn."""
    options = measure.arguments(__doc__ or "")
    report = Report("tracing")
    with tempfile.TemporaryDirectory() as folder:
        candidates = {PLAIN: trained(None), TRACED: trained(Path(folder) / "trace.json")}
        rounds = options.rounds or (3 if options.quick else 20)
        measured = measure.alternate(candidates, lambda: None, rounds=rounds, burst_s=0.0, least=1)
    cost = measured.ratio(TRACED, PLAIN)
    percent = Spread(*(100 * (x - 1) for x in cost))
    report.row(
        "perceptron(50), 25 samples a worker", measured, [Target("a step longer by", percent, "≤", 100 * LIMIT, "%")]
    )
    report.finish(options.json)


if __name__ == "__main__":
    main()
