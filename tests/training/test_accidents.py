"""Accidents: a run ends soon, says which worker failed at which step, and leaves nothing behind.

What is left behind (processes, /dev/shm, memory files, sockets) is found by the guard around every test.
"""

import contextlib
import errno
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

import manyhands as mh
from manyhands.errors import DeadlineExceeded, FactoryFailed, NonFiniteLoss, WorkerFailed
from manyhands.training import checkpoint
from manyhands.training.sampler import order
from manyhands.training.team_folder import TeamFolder
from manyhands.verbs import LastCheckpointNotWritten
from tests import guards
from tests.training.factories import HERE, rank

ROOT = Path(__file__).parent.parent.parent
#: From the accident to the end of the run: two seconds or so, and less than `run`'s deadline on any machine, so that
#: whoever only waits for that is found.
END_S = 20.0


def fragile(folder: Path, **options: object) -> mh.Task:
    said = "".join(f", {k}={v!r}" for k, v in options.items())
    return mh.Task(model=f"{HERE}:fragile(folder={str(folder)!r}{said})", data=f"{HERE}:data", batch_size=10, epochs=2)


def run(task: mh.Task, folder: Path, *, workers: int = 2, transport: str = "shared", timeout_s: float = 30.0):
    plan = mh.Plan(workers=workers, transport=transport, timeout_s=timeout_s)
    return mh.train(task, plan, out=folder / "out", progress=False)


def ended_soon_after(folder: Path) -> bool:
    return time.time() - float((folder / "happened").read_text()) < END_S


# -- a worker is killed ------------------------------------------------------------------------------------------------

PHASES = {
    "while the model is made": ({"where": "start"}, None),
    "in the first step": ({"where": "forward", "step": 0}, 0),
    "in a later step": ({"where": "forward", "step": 3}, 3),
    "in backward": ({"where": "backward", "step": 3}, 3),
    "in evaluation": ({"where": "evaluation"}, 4),  # of the first epoch, whose last step is 4
    "in the last step of an epoch": ({"where": "backward", "step": 4}, 4),
}


def phases():
    """Every phase on one of the workers, and the most common on both; the others are slow."""
    for number, (name, (where, step)) in enumerate(PHASES.items()):
        for worker in (0, 1):
            slow = worker != number % 2 and name != "in a later step"
            yield pytest.param(where, step, worker, id=f"{name}-{worker}", marks=[pytest.mark.slow] if slow else [])


@pytest.mark.parametrize(("where", "step", "rank"), list(phases()))
def test_a_killed_worker_ends_the_run_which_names_it_and_its_step(tmp_path, where, step, rank):
    with pytest.raises(WorkerFailed) as e:
        run(fragile(tmp_path, on=rank, **where), tmp_path)
    assert ended_soon_after(tmp_path)
    assert (e.value.rank, e.value.step) == (rank, step)
    assert f"worker {rank}" in str(e.value)
    assert "SIGKILL" in str(e.value)
    assert step is None or f"step {step}" in str(e.value)


def test_a_worker_killed_while_it_waits_for_another_is_named(tmp_path):
    with pytest.raises(WorkerFailed) as e:
        run(fragile(tmp_path, how="kill the other", on=0, step=3), tmp_path)
    assert ended_soon_after(tmp_path)
    assert (e.value.rank, e.value.step) == (1, 3)


def go_on(task: mh.Task, out: Path, *, epochs: int) -> mh.Result:
    longer = mh.Task(**{**vars(task), "epochs": epochs})
    return mh.train(longer, mh.Plan(workers=2), out=out, resume=True, progress=False)


def test_a_worker_killed_before_its_first_checkpoint_leaves_none(tmp_path):
    with pytest.raises(WorkerFailed, match=r"worker 0 .* SIGKILL"):
        run(fragile(tmp_path, on=0, where="checkpoint"), tmp_path)
    assert ended_soon_after(tmp_path)
    assert not list((tmp_path / "out" / "checkpoints").glob("step-*"))


def test_a_worker_killed_while_it_writes_a_checkpoint_leaves_the_older_one_to_go_on_from(tmp_path):
    out = tmp_path / "out"
    with pytest.raises(WorkerFailed, match=r"worker 0 at step 9 .*SIGKILL"):
        run(fragile(tmp_path, on=0, where="writing", step=2), tmp_path)  # two files, then half of a third
    assert ended_soon_after(tmp_path)
    assert checkpoint.load_newest(out / "checkpoints").step == 5
    assert go_on(fragile(tmp_path, where="nowhere"), out, epochs=3).summary.steps == 15
    assert not [p.name for p in (out / "checkpoints").iterdir() if not p.name.startswith("step-")]


@pytest.mark.parametrize("transport", ["gloo", pytest.param("mpi", marks=pytest.mark.slow)])
def test_a_killed_worker_ends_the_run_on_other_transports_too(tmp_path, transport):
    with pytest.raises(WorkerFailed) as e:
        run(fragile(tmp_path, on=1, where="backward", step=3), tmp_path, transport=transport)
    assert ended_soon_after(tmp_path)
    assert e.value.rank == 1
    # mpiexec ends the other ranks before they can say where they were.
    assert e.value.step == (None if transport == "mpi" else 3)


def test_a_worker_that_exits_on_its_own_is_named_with_its_status(tmp_path):
    with pytest.raises(WorkerFailed, match=r"worker 1 at step 2 failed: .*exited with status 3"):
        run(fragile(tmp_path, how="exit", step=2), tmp_path)
    assert ended_soon_after(tmp_path)


@pytest.mark.parametrize("transport", ["single", "threads", "shared"])
def test_an_exception_called_like_one_of_ours_is_the_users_own(transport):
    task = mh.Task(model=f"{HERE}:Confusing", data=f"{HERE}:data", batch_size=10)
    with pytest.raises(WorkerFailed, match="BadInput: not yours") as e:
        mh.train(task, mh.Plan(workers=1 if transport == "single" else 2, transport=transport), progress=False)
    assert "factories.py" in e.value.traceback


def test_a_single_worker_that_raises_is_told_like_any_other(tmp_path):
    task = mh.Task(model=f"{HERE}:Confusing", data=f"{HERE}:data", batch_size=10)
    with pytest.raises(WorkerFailed, match="worker 0 at step 0 failed") as e:
        mh.train(task, mh.Plan(workers=1), progress=False)
    assert e.value.traceback.count("Traceback") == 1
    assert "team/threads.py" not in e.value.traceback
    assert type(e.value.__cause__).__name__ == "BadInput"


@pytest.mark.parametrize("workers", [1, 2])
def test_a_factory_that_raises_is_named_with_its_own_traceback(workers):
    with pytest.raises(FactoryFailed, match=r"model .*:breaks failed: LookupError: .*the factory's own words") as e:
        mh.train(mh.Task(model=f"{HERE}:breaks", data=f"{HERE}:data"), mh.Plan(workers=workers), progress=False)
    assert e.value.exit_code == 1
    assert "factories.py" in e.value.traceback
    assert "verbs/building.py" not in e.value.traceback


# -- a worker raises, freezes, or sees a loss that is not finite -------------------------------------------------------


@pytest.mark.parametrize("where", ["start", "forward", "backward", "evaluation"])
@pytest.mark.parametrize("transport", ["shared", "gloo"])
def test_a_worker_that_raises_shows_its_own_traceback_once(tmp_path, where, transport):
    with pytest.raises(WorkerFailed) as e:
        run(fragile(tmp_path, how="raise", where=where, step=2), tmp_path, transport=transport)
    assert e.value.rank == 1
    assert e.value.step == {"start": None, "evaluation": 4}.get(where, 2)
    assert e.value.traceback.count("ValueError: the user's own words") == 1
    assert e.value.traceback.count("Traceback (most recent call last)") == 1
    assert "factories.py" in e.value.traceback
    assert "ValueError: the user's own words" in str(e.value)


def test_a_frozen_worker_is_a_deadline_exceeded_that_names_it_and_the_step(tmp_path):
    with pytest.raises(DeadlineExceeded) as e:
        run(fragile(tmp_path, how="freeze", step=3), tmp_path, timeout_s=1.0)
    assert "rank 1" in str(e.value)
    assert "step 3" in str(e.value)
    assert "1.0 s" in str(e.value)


@pytest.mark.parametrize("model", ["model", "normed"])
@pytest.mark.parametrize("workers", [1, 2])
def test_a_loss_that_is_not_finite_stops_all_at_one_step_and_the_last_good_state_is_kept(tmp_path, workers, model):
    task = mh.Task(model=f"{HERE}:{model}", data=f"{HERE}:poisoned(at=17)", batch_size=10, epochs=2)
    step = order(50, 0, 0).tolist().index(17) // 10
    with pytest.raises(NonFiniteLoss) as e:
        mh.train(task, mh.Plan(workers=workers), out=tmp_path / "out", progress=False)
    assert e.value.step == step
    kept = checkpoint.load_newest(tmp_path / "out" / "checkpoints")
    assert kept.step == step
    assert str(kept.path) in str(e.value)
    events = (tmp_path / "out" / "events.jsonl").read_text()
    assert '"failed"' in events
    assert "NonFiniteLoss" in events
    assert all(bool(v.isfinite().all()) for v in kept.model.values())


# -- a full disk -------------------------------------------------------------------------------------------------------


def test_a_disk_that_is_full_costs_a_checkpoint_and_not_the_run(tmp_path):
    result = run(fragile(tmp_path, how="fail once", on=0, where="writing", step=0), tmp_path)
    assert result.summary.steps == 10
    events = (tmp_path / "out" / "events.jsonl").read_text()
    assert events.count('"checkpoint_not_written"') == 1
    assert "No space left" in events
    assert [p.name for p in (tmp_path / "out" / "checkpoints").iterdir()] == ["step-00000010"]


@pytest.mark.parametrize("workers", [1, 2])
def test_a_last_checkpoint_that_is_not_written_is_a_failure_that_carries_the_result(tmp_path, workers, monkeypatch):
    monkeypatch.setattr(checkpoint, "write_tensors", checkpoint.write_tensors)  # one worker breaks this process's
    monkeypatch.setattr("tests.training.factories.rank", lambda: 0 if workers == 1 else rank())
    with pytest.raises(LastCheckpointNotWritten, match=r"10 steps.* No space left") as e:
        run(
            fragile(tmp_path, how="nothing", on=0, where="writing", step=2),
            tmp_path,
            workers=workers,
            transport="auto",
        )
    assert e.value.exit_code == 1
    result = e.value.result
    assert result.summary.steps == 10
    assert len(result.history) == 2
    assert result.model.state_dict().keys() == result.state.keys()
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["steps"] == 10
    assert [p.name for p in (tmp_path / "out" / "checkpoints").iterdir()] == ["step-00000005"]


def test_a_summary_that_cannot_be_written_costs_only_itself(tmp_path, monkeypatch, caplog):
    from manyhands.training import metrics

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(metrics, "write_summary", full)
    result = run(fragile(tmp_path, where="nowhere"), tmp_path, workers=1, transport="single")
    assert result.summary.steps == 10
    assert "No space left" in caplog.text
    assert checkpoint.load_newest(tmp_path / "out" / "checkpoints").step == 10


# -- listeners ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("transport", ["shared", "gloo"])
def test_no_worker_listens_anywhere_but_on_loopback(tmp_path, transport):
    run(fragile(tmp_path, how="listen", step=2), tmp_path, transport=transport)
    addresses = (tmp_path / "happened").read_text().splitlines()
    assert all(a.startswith("loopback") for a in addresses)
    assert transport != "shared" or addresses == []


# -- the launcher is killed or interrupted -----------------------------------------------------------------------------

SCRIPT = """
import sys
import manyhands as mh
task = mh.Task(model=sys.argv[1], data="{here}:data", batch_size=10, epochs=2)
try:
    mh.train(task, mh.Plan(workers=2, transport=sys.argv[2]), progress=False)
except KeyboardInterrupt:
    sys.exit(130)
""".replace("{here}", HERE)


def is_running(pid: int) -> bool:
    return guards._status(pid)[0] not in ("", "Z")


@pytest.mark.timeout(120)  # two processes import torch one after the other, which a busy machine makes a minute of
@pytest.mark.parametrize(
    ("transport", "number", "status"),
    [
        ("shared", signal.SIGKILL, (-9,)),
        pytest.param("gloo", signal.SIGKILL, (-9,), marks=pytest.mark.slow),
        pytest.param("mpi", signal.SIGKILL, (-9,), marks=pytest.mark.slow),
        pytest.param("shared", signal.SIGTERM, (130, 143, -15), marks=pytest.mark.slow),
        pytest.param("shared", signal.SIGINT, (130, -2), marks=pytest.mark.slow),
    ],
)
def test_when_the_launcher_ends_so_do_its_workers(tmp_path, number, status, transport):
    """Ctrl-C goes to the whole process group, as a terminal sends it; the others to the launcher alone."""
    model = fragile(tmp_path, how="linger", on=1, step=2).model
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, model, transport],
        cwd=ROOT,
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        deadline = time.monotonic() + 90
        while not (tmp_path / "happened").exists():
            assert process.poll() is None, process.communicate()[0]
            assert time.monotonic() < deadline
            time.sleep(0.02)
        workers = [int((tmp_path / f"pid-{r}").read_text()) for r in range(2)]
        assert all(map(is_running, workers))
        if number == signal.SIGINT:
            os.killpg(process.pid, number)
        else:
            os.kill(process.pid, number)
        said, _ = process.communicate(timeout=END_S + 2)
        assert process.returncode in status, said
        assert "Traceback" not in said
        end = time.monotonic() + END_S
        while any(map(is_running, workers)) and time.monotonic() < end:
            time.sleep(0.02)
        assert not any(map(is_running, workers))
        assert not list(Path(tempfile.gettempdir()).glob(f"manyhands-{process.pid}-*"))
    finally:
        if process.poll() is None:
            process.kill()
            process.communicate()


def test_a_team_that_was_killed_as_a_whole_leaves_its_folder_until_the_next_one_starts(tmp_path, monkeypatch):
    said = "import os; from manyhands.training.team_folder import TeamFolder; print(TeamFolder().path, flush=True)"
    killed = f"{said}; os.kill(os.getpid(), 9)"
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    found = subprocess.run([sys.executable, "-c", killed], env=environment, stdout=subprocess.PIPE, text=True)
    left = Path(found.stdout.strip())
    assert found.returncode == -signal.SIGKILL
    assert [*left.iterdir()]
    (tmp_path / "manyhands-bench-mine").mkdir()  # no team's
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with contextlib.closing(TeamFolder()) as first, contextlib.closing(TeamFolder()) as second:
        assert {*tmp_path.iterdir()} == {first.path, second.path, tmp_path / "manyhands-bench-mine"}
    assert [p.name for p in tmp_path.iterdir()] == ["manyhands-bench-mine"]


def test_a_buffer_made_on_the_way_does_not_hide_a_loss_that_is_not_finite():
    task = mh.Task(model=f"{HERE}:LateBuffer", data=f"{HERE}:data", batch_size=10, steps=5)
    with pytest.raises(NonFiniteLoss, match="step 2"):
        mh.train(task, mh.Plan(workers=1, threads=1), evaluate="never", progress=False)
