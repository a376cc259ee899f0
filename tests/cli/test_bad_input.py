"""Every mistake ends in one plain message and status 2, before any worker is started."""

import functools
import os

import pytest
import torch

import manyhands as mh
from manyhands.errors import BadInput
from manyhands.verbs import launching


@pytest.fixture(autouse=True)
def no_workers(monkeypatch):
    def team(*_, **__):
        raise AssertionError("a worker was started")

    monkeypatch.setattr(launching, "team", team)


SMALL = ("train", "--data", "digits")

SAID = {
    # what was typed: what the message must say
    ("tran",): "no command named 'tran'. Did you mean 'train'?",
    ("predict", "--compute", "guess"): "no source of computing named 'guess'",
    ("search", "--workers", "1,0"): "workers=0: it is a whole number from 1.",
    ("search", "--compress", "top_c"): "Did you mean 'top_k'?",
    ("search", "--mesh", "tensor"): "the form is axis=extent",
    ("search", "--batch-per-worker", "5"): "Say --batch-size.",
    ("search", "--cluster", "dgx_h100", "--measure", "3"): "plans are run on this machine",
    ("search", "--data", "digits", "--limit", "3"): "this search has",
    ("search", "--data", "digits", "--study", "nowhere"): "nowhere holds no rows.sqlite",
    (): "a command is missing: train",
    ("--foo",): "no option of manyhands named '--foo'",
    ("train", "--modle", "cnn"): "Did you mean '--model'?",
    ("train", "--modle=cnn"): "named '--modle'. Did you mean '--model'?",
    ("train", "--work", "2"): "Did you mean '--workers'?",  # no abbreviations
    ("verify", "--workrs", "2"): "Did you mean '--workers'?",
    ("train", "cnn"): "train does not take 'cnn'",
    ("train", "--model"): "--model: expected one argument",
    ("report",): "required: DIR",
    ("list", "modles"): "Did you mean 'models'?",
    ("study", "quik"): "Did you mean 'quick'?",
    ("study", "missing.toml"): "missing.toml",
    ("report", "nowhere"): "nowhere",
    ("train", "--workers", "two"): "--workers: 'two' is not a whole number",
    ("train", "--lr", "nan"): "--lr: 'nan' is not a finite number",
    ("train", "--lr", "fast"): "--lr: 'fast' is not a number",
    ("train", "--steps", "3", "--epochs", "1"): "--epochs: not allowed with argument --steps",
    ("train", "--batch-size", "3", "--batch-per-worker", "1"): "not allowed with argument --batch-size",
    (*SMALL, "--model", "cn"): "Did you mean 'cnn'?",
    (*SMALL, "--model", "perceptron(hiden=3)"): "Did you mean 'hidden'?",
    (*SMALL, "--model", "perceptron(hidden=-3)"): "hidden=-3",
    (*SMALL, "--model", "perceptron(hidden=__import__('os'))"): "must be a whole number",
    (*SMALL, "--model", "perceptron(hidden="): "cannot be read",
    (*SMALL, "--model", "no_such_module:build"): "there is no module 'no_such_module'",
    ("train", "--data", "mnits"): "Did you mean 'mnist'?",
    ("train", "--data", "digits(limit=0)"): "limit",
    ("train", "--data-dir", "no/such/folder"): "the data folder no/such/folder does not exist",
    (*SMALL, "--strategy", "synchronus"): "Did you mean 'synchronous'?",
    (*SMALL, "--strategy", "synchronous(updat='sharded')"): "Did you mean 'update'?",
    (*SMALL, "--strategy", "synchronous(update='sharp')"): "it is auto, sharded or replicated",
    (*SMALL, "--loss", "cross_entrpy"): "Did you mean 'cross_entropy'?",
    (*SMALL, "--optimizer", "adm"): "Did you mean 'adam'?",
    (*SMALL, "--optimizer", "sgd(lr=0.1, momentun=0.9)"): "Did you mean 'momentum'?",
    (*SMALL, "--lr", "-1"): "Invalid learning rate",
    (*SMALL, "--schedule", "cosin"): "Did you mean 'cosine'?",
    (*SMALL, "--transport", "shred"): "Did you mean 'shared'?",
    (*SMALL, "--transport", "simulated"): "virtual time is not for training",
    (*SMALL, "--transport", "single", "--workers", "2"): "single is one worker",
    (*SMALL, "--device", "cdua"): "Did you mean 'cuda'?",
    (*SMALL, "--buffers", "mean"): "average, rank0, local",
    (*SMALL, "--precision", "float16"): "float32, bfloat16",
    (*SMALL, "--allocator", "jemalloc"): "tuned, plain",
    (*SMALL, "--shard", "4"): "shard=4",
    (*SMALL, "--compress", "auto", "--strategy", "synchronous(compress=int8)"): "they contradict each other",
    (*SMALL, "--compress", "strom(threshold=-1.0)"): "it is above 0",
    (*SMALL, "--compress", "storm"): "Did you mean 'strom'?",
    (*SMALL, "--compress", "top_k", "--strategy", "push_sum"): "a share is pushed together with its weight",
    (*SMALL, "--mesh", "data=3", "--workers", "2"): "mesh(data=3) needs 3 ranks; there are 2",
    (*SMALL, "--mesh", "data=1,expert=2", "--workers", "2"): "the axes that exist are data",
    (*SMALL, "--mesh", "data:2"): "the form is axis=extent",
    (*SMALL, "--workers", "0"): "workers=0",
    (*SMALL, "--workers", "-2"): "workers=-2",
    (*SMALL, "--batch-size", "0"): "batch_size=0",
    (*SMALL, "--batch-size", "-7"): "batch_size=-7",
    (*SMALL, "--batch-per-worker", "0"): "--batch-per-worker 0",
    (*SMALL, "--epochs", "0"): "epochs=0",
    (*SMALL, "--steps", "-1"): "steps=-1",
    (*SMALL, "--seed", "-1"): "seed=-1",
    (*SMALL, "--clip", "0"): "clip=0.0",
    (*SMALL, "--threads", "-1"): "threads=-1",
    (*SMALL, "--micro-batches", "0"): "micro_batches=0",
    (*SMALL, "--timeout", "0"): "timeout_s=0.0",
    (*SMALL, "--evaluate", "always"): "it is epoch, end, never, or",
    (*SMALL, "--checkpoint", "0"): "checkpoint=0",
    (*SMALL, "--keep", "0"): "keep=0",
    (*SMALL, "--resume"): "resume without out",
    (*SMALL, "--out", "/dev/null/run"): "/dev/null/run cannot be written",
    ("train", "--config", "no_such.toml"): "no_such.toml cannot be read",
    ("calibrate", "--transport", "shard"): "Did you mean 'shared'?",
    ("calibrate", "--transport", "nccl"): "it has no curve to measure",
    ("calibrate", "--out", "/dev/null/mine.toml"): "cannot be written to /dev/null/mine.toml",
    ("simulate", "--cluser", "wan"): "Did you mean '--cluster'?",
    ("simulate", "--data", "digits", "--cluster", "ethernet_1"): "Did you mean 'ethernet_1g'?",
    ("simulate", "--data", "digits", "--cluster", "no_such.toml"): "no_such.toml: it cannot be read",
    ("simulate", "--data", "digits", "--stragglers", "lognorml"): "Did you mean 'lognormal'?",
    ("simulate", "--data", "digits", "--failures", "failures(mtbf=1)"): "Did you mean 'mtbf_s'?",
    ("simulate", "--data", "digits", "--compute-s", "-1"): "compute_s=-1.0",
    ("simulate", "--data", "digits", "--update-s", "1"): "Give compute_s",
    ("simulate", "--data", "digits", "--transport", "gloo"): "choose a cluster",
    ("simulate", "--data", "digits", "--batch-per-worker", "5"): "--workers 64",
    ("simulate", "--data", "digits", "--evaluate", "end"): "epoch, never, or every",
    ("simulate", "--data", "digits", "--sizes", "--seconds", "3", "--workers", "2"): "the length that it is given",
    ("simulate", "--data", "digits", "--workers", "32", "--strategy", "hogwild"): "hogwild on transport=simulated",
    ("simulate", "--data", "digits", "--compute-s", "1", "--trace", "no/t.json", "--steps", "1"): "no/t.json cannot be",
    ("verify", "--transport", "gluu"): "Did you mean 'gloo'?",
    ("verify", "--workers", "0"): "workers=0",
    ("verify", "--strategy", "synch"): "no strategy named 'synch'",
    ("verify", "--optimizer", "sdg"): "Did you mean 'sgd'?",
}


@pytest.mark.parametrize(("typed", "message"), SAID.items(), ids=lambda x: " ".join(x) if isinstance(x, tuple) else "")
def test_a_mistake_is_answered_in_one_message(run, typed, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, out, err = run(*typed)
    said = [line for line in err.splitlines() if not line.startswith("manyhands: data:")]
    assert status == 2
    assert out == ""
    assert message in err
    assert "Traceback" not in err
    if typed:  # without a command, the help stands above the message
        assert len(said) == 1
        assert said[0].startswith("manyhands: ")


def test_a_bad_schedule_written_by_hand_is_shown_with_an_arrow_at_the_fault(run, tmp_path):
    (tmp_path / "mine.txt").write_text("F0 F1 B0 B1\nB0 F0 F1 B1\n")
    for said in ("written(rows='F0 F1 B0 B1 / B0 F0 F1 B1')", f"written(file={str(tmp_path / 'mine.txt')!r})"):
        status, out, err = run(*SMALL, "--mesh", "pipeline=2", "--pipeline", said)
        assert (status, out) == (2, "")
        assert err.splitlines()[-2:] == ["rank 0  F0  F1  B0  B1", "rank 1  ⇒B0 F0  F1  B1"]
        assert "Traceback" not in err


def test_all_problems_of_a_plan_are_said_at_once(run):
    _, _, err = run(*SMALL, "--workers", "2", "--mesh", "data=3", "--micro-batches", "0", "--timeout", "-1")
    assert "mesh(data=3)" in err
    assert "micro_batches=0" in err
    assert "timeout_s=-1.0" in err


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("def build(): return 3", "returned a int; the rule is: a model factory returns a torch.nn.Module"),
        ("import no_such_package", "failed: No module named 'no_such_package'"),
        ("1 / 0", "ZeroDivisionError"),
        ("def other(): return 3", "named 'build'"),
        ("def build(width): return 3", "missing a required argument: 'width'"),
    ],
)
def test_a_bad_factory_is_answered_in_one_message(run, module, body, message):
    status, out, err = run(*SMALL, "--model", f"{module(body)}:build")
    assert (status, out) == (2, "")
    assert message in err
    assert "Traceback" not in err


def test_a_strategy_of_the_wrong_kind_is_refused(run, module):
    status, _, err = run(*SMALL, "--strategy", f"{module('class Mine: pass')}:Mine")
    assert status == 2
    assert "a subclass of manyhands' Strategy" in err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[task]\nmodle = 'cnn'", "no key in [task] of plan.toml named 'modle'. Did you mean 'model'?"),
        ("[plan]\nworker = 2", "Did you mean 'workers'?"),
        ("[tusk]\nmodel = 'cnn'", "no table in plan.toml named 'tusk'. Did you mean 'task'?"),
        ("task = 3", "task is a table of options, [task], not 3"),
        ("[task", "plan.toml is not TOML"),
        ("[task]\ndata = 'digits'\nbatch_size = 'many'", "batch_size='many'"),
        ("[task]\nmodel = '<Sequential>'", "a live object, which a file cannot hold"),
    ],
)
def test_a_bad_file_is_answered_in_one_message(run, tmp_path, monkeypatch, text, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "plan.toml").write_text(text)
    status, out, err = run("train", "--config", "plan.toml")
    assert (status, out) == (2, "")
    assert message in err


def test_a_damaged_data_file_is_found(run, tmp_path):
    for name in (
        "train-images-idx3-ubyte",
        "train-labels-idx1-ubyte",
        "t10k-images-idx3-ubyte",
        "t10k-labels-idx1-ubyte",
    ):
        (tmp_path / name).write_bytes(b"\0\0\x08\x03 cut short")
    status, _, err = run("train", "--data", "mnist", "--data-dir", tmp_path)
    assert status == 2
    assert "train-images-idx3-ubyte" in err


def test_an_out_that_holds_a_run_is_not_written_over(run, tmp_path):
    (tmp_path / "checkpoints" / "step-00000005").mkdir(parents=True)
    status, _, err = run(*SMALL, "--out", tmp_path)
    assert status == 2
    assert "--resume" in err


def test_a_live_optimizer_is_refused_with_the_line_that_works():
    live = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.25)
    with pytest.raises(BadInput, match=r"functools\.partial\(torch\.optim\.SGD, lr=0\.25\)"):
        mh.train(mh.Task(data="digits", optimizer=live), mh.Plan(workers=2))


def test_a_recipe_is_not_refused(monkeypatch):
    recipe = functools.partial(torch.optim.SGD, lr=0.25)
    with pytest.raises(AssertionError, match="a worker was started"):
        mh.train(mh.Task(data="digits", optimizer=recipe), mh.Plan(workers=2))


@pytest.mark.parametrize("rank", [0, 1])
def test_of_launched_ranks_only_the_first_says_what_all_find(run, monkeypatch, rank):
    for name, value in {"RANK": rank, "WORLD_SIZE": 2, "LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1"}.items():
        monkeypatch.setitem(os.environ, name, str(value))
    status, out, err = run(*SMALL, "--strategy", "synchronus")
    assert (status, out) == (2, "")
    assert ("synchronous" in err) == (rank == 0)


def test_an_error_of_one_launched_rank_names_it(run, monkeypatch):
    for name, value in {"RANK": 1, "WORLD_SIZE": 2, "LOCAL_RANK": 1, "MASTER_ADDR": "127.0.0.1"}.items():
        monkeypatch.setitem(os.environ, name, str(value))
    _, _, err = run("train", "--data-dir", "no/such/folder")
    assert err.startswith("manyhands (rank 1): the data folder no/such/folder does not exist")
