"""Ranks that a launcher has started, and one folder for all of them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.training.factories import HERE

ROOT = Path(__file__).parent.parent.parent
SCRIPT = """
import sys
import manyhands as mh
from manyhands.errors import BadInput
task = mh.Task(model="{here}:model", data="{here}:data", batch_size=10)
try:
    mh.train(task, out=sys.argv[1], progress=False)
except BadInput as e:
    print("refused:", e)
""".replace("{here}", HERE)


def torchrun(*arguments: object) -> subprocess.CompletedProcess[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--no-python"]
    return subprocess.run(
        [*launcher, sys.executable, "-c", SCRIPT, *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=55,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"},
    )


@pytest.mark.slow
def test_under_a_launcher_a_folder_that_holds_a_run_is_refused_by_every_rank(tmp_path):
    (tmp_path / "checkpoints" / "step-00000005").mkdir(parents=True)
    (tmp_path / "summary.json").write_text("{}")
    done = torchrun(tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("holds a run already (step-00000005)") == 2
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoints", "summary.json"]


@pytest.mark.slow
def test_under_a_launcher_rank_0_writes_the_folder(tmp_path):
    done = torchrun(tmp_path / "new")
    assert done.returncode == 0, done.stderr
    assert "refused" not in done.stdout
    assert json.loads((tmp_path / "new" / "summary.json").read_text())["workers"] == 2
    assert (tmp_path / "new" / "plan.toml").is_file()
