"""What the README shows first runs as printed."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

README = Path(__file__).parents[1] / "README.md"


@pytest.mark.slow
def test_the_readmes_example_runs_as_printed(tmp_path):
    section = README.read_text(encoding="utf-8").split("## Three nouns, four verbs")[1]
    code = re.search(r"```python\n(.*?)```", section, re.DOTALL).group(1)
    for verb in ("train", "simulate", "predict", "search"):
        assert f"mh.{verb}(" in code
    (tmp_path / "example.py").write_text(code, encoding="utf-8")
    ran = subprocess.run(
        [sys.executable, "example.py"], cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False
    )
    assert ran.returncode == 0, ran.stderr
    accuracy, simulated, predicted, best = ran.stdout.splitlines()
    assert 0.8 < float(accuracy) <= 1
    step_s, simulated_accuracy = map(float, simulated.split())
    assert step_s > 0
    assert abs(simulated_accuracy - float(accuracy)) < 0.05
    assert float(predicted.split()[0]) > 0
    assert best.startswith("plan(")
    assert (tmp_path / "runs" / "first" / "summary.json").is_file()
