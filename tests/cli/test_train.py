"""``manyhands train`` in this process: what it says, and what a file and the command line mean together."""

import json
import tomllib

import pytest

from manyhands.cli import options, request

DIGITS = ("train", "--data", "digits", "--workers", "2", "--transport", "threads", "-q")


def asked(*typed):
    """The task and plan that ``train …`` means."""
    return request.requested(options.parse(["train", *map(str, typed)]))[:2]


def test_the_summary_says_batch_rate_and_times(run):
    status, out, err = run(*DIGITS, "--steps", 6, "--lr", 0.05)
    assert status == 0
    for said in (
        "perceptron (3,760 parameters) on digits: synchronous(update='sharded'), 2 workers, threads",
        "test accuracy",
        "training loss",
        "100 = 50 each over 2 workers",
        "sgd(lr=0.05)",
        "6 steps",
        "compute",
        "samples per second",
        "15 kB a step by each worker",
        "--out DIR keeps them",
    ):
        assert said in out
    assert "interpreter lock" in err  # the notes of the plan
    assert err.count("manyhands: data: digits") == 1


def test_json_is_one_document_equal_to_the_file(run, tmp_path):
    status, out, _ = run(*DIGITS, "--steps", 3, "--json", "--out", tmp_path / "run")
    assert status == 0
    assert json.loads(out) == json.loads((tmp_path / "run" / "summary.json").read_text())


def test_what_a_model_prints_is_not_in_the_document(run, module):
    name = module("""
        import torch
        def build(inputs, classes):
            print("built")
            return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, classes))
        """)
    status, out, err = run(*DIGITS, "--steps", 2, "--json", "--model", f"{name}:build")
    assert status == 0
    assert json.loads(out)["model"] == f"{name}:build"
    assert "built" in err


def test_more_workers_than_samples_is_allowed_and_said(run):
    status, out, err = run(*DIGITS, "--workers", 3, "--batch-size", 2, "--steps", 2, "--json")
    assert status == 0
    assert json.loads(out)["global_batch"] == 2
    assert "leaves 1 of them idle" in err


def test_batch_per_worker_is_multiplied_by_the_workers(run):
    status, out, _ = run(*DIGITS, "--batch-per-worker", 7, "--steps", 2, "--json")
    assert status == 0
    assert json.loads(out)["global_batch"] == 14


def test_batch_per_worker_counts_the_workers_of_a_launcher(monkeypatch):
    for name, value in {"RANK": "0", "WORLD_SIZE": "5", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}.items():
        monkeypatch.setenv(name, value)
    assert asked("--batch-per-worker", 7)[0].batch_size == 35


def test_resume_goes_on_as_the_folder_says(run, tmp_path):
    folder = tmp_path / "run"
    first = run(*DIGITS, "--model", "logistic", "--batch-size", 300, "--epochs", 1, "--out", folder)
    assert first[0] == 0
    status, out, _ = run("train", "--resume", "--out", folder, "--epochs", 2, "--json", "-q")
    assert status == 0
    said = json.loads(out)
    assert (said["model"], said["global_batch"], said["transport"], said["epochs"]) == ("logistic", 300, "threads", 2)


def test_a_failing_worker_is_told_with_its_own_traceback_once(run, module):
    name = module("""
        import torch
        class Model(torch.nn.Linear):
            def __init__(self): super().__init__(64, 10)
            def forward(self, x): raise ValueError("not today")
        """)
    status, out, err = run(
        "train", "--data", "digits", "--workers", 2, "--transport", "shared", "-q", "--model", f"{name}:Model"
    )
    assert (status, out) == (1, "")
    assert "at step 0 failed: ValueError: not today" in err
    assert err.count("Traceback") == 1
    assert f"{name}.py" in err


def test_a_loss_that_is_not_finite_ends_with_status_1(run):
    status, out, err = run(*DIGITS, "--lr", 1e30, "--steps", 20)
    assert (status, out) == (1, "")
    assert "The loss is not finite at step" in err
    assert "Traceback" not in err


def test_an_interruption_ends_with_status_130(run, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("manyhands.verbs.train", interrupted)
    assert run("train", "--data", "digits") == (130, "", "manyhands: interrupted\n")


def test_a_mistake_of_ours_is_not_hidden(run, monkeypatch):
    def broken(*_, **__):
        raise ZeroDivisionError

    monkeypatch.setattr("manyhands.verbs.train", broken)
    with pytest.raises(ZeroDivisionError):
        run("train", "--data", "digits")


# -- files and options -------------------------------------------------------------------------------------------------


def test_a_runs_own_plan_reads_back(run, tmp_path):
    run(*DIGITS, "--steps", 2, "--clip", 1.0, "--strategy", "replica_average(what='parameters')", "--out", tmp_path)
    task, plan = asked("--config", tmp_path / "plan.toml")
    written = tomllib.loads((tmp_path / "plan.toml").read_text())
    assert task.as_table() == written["task"]
    assert plan.as_table() == written["plan"]


def test_the_command_line_goes_before_the_file(tmp_path):
    file = tmp_path / "mine.toml"
    file.write_text("""
        [task]
        model = "cnn"
        optimizer = "adam(lr=0.1)"
        epochs = 3
        batch_size = 64
        [plan]
        workers = 2
        mesh = "data=2"
        [machine]
        cores = 96
        """)
    task, plan = asked("--config", file, "--steps", 9, "--lr", 0.5, "--workers", 4, "--seed", 3)
    assert (task.model, task.optimizer, task.batch_size) == ("cnn", "adam(lr=0.5)", 64)
    assert (task.epochs, task.steps, task.seed) == (None, 9, 3)
    assert (plan.workers, plan.mesh) == (4, None)


def test_none_is_no_loss_and_no_schedule(tmp_path):
    file = tmp_path / "mine.toml"
    file.write_text("[task]\nschedule = 'cosine'")
    task, _ = asked("--config", file, "--loss", "none", "--schedule", "none")
    assert task.loss is None
    assert task.schedule is None
    assert task.as_table()["loss"] == "none"


def test_a_resumed_run_takes_its_workers_from_the_launcher(tmp_path, monkeypatch):
    (tmp_path / "plan.toml").write_text("[plan]\nworkers = 2\nmesh = 'data=2'\ntransport = 'shared'\nbuffers = 'rank0'")
    monkeypatch.setenv("OMPI_COMM_WORLD_RANK", "0")
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "4")
    _, plan = asked("--resume", "--out", tmp_path)
    assert (plan.workers, plan.mesh, plan.transport, plan.buffers) == (None, None, "auto", "rank0")


def test_how_a_run_was_kept_is_not_forgotten_on_resume(run, tmp_path):
    out = tmp_path / "run"
    assert run(*DIGITS, "--steps", 6, "--checkpoint", 2, "--keep", 9, "--out", out)[0] == 0
    assert run("train", "--resume", "--out", out, "--steps", 10, "-q")[0] == 0
    assert [p.name[-2:] for p in sorted(out.glob("checkpoints/step-*"))] == ["02", "04", "06", "08", "10"]


def test_more_workers_than_memory_holds_are_refused(run):
    status, _, err = run("train", "--data", "digits", "--workers", 10**6)
    assert status == 2
    assert "this machine has" in err
