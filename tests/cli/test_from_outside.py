"""The command as a shell starts it: output streams, exit status, signals, launchers."""

import json
import os
import signal
import subprocess
import sys
import time
from importlib.metadata import entry_points, version
from pathlib import Path

import pytest

MANYHANDS = [sys.executable, "-m", "manyhands"]
#: Generous: a busy machine imports torch in 5 s. pytest's own limit is the next one.
DEADLINE_S = 45


def start(*arguments, **settings):
    settings = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True} | settings
    return subprocess.run([*MANYHANDS, *map(str, arguments)], timeout=DEADLINE_S, check=False, **settings)


def test_the_installed_command_is_the_module():
    (command,) = [e for e in entry_points(group="console_scripts") if e.name == "manyhands"]
    assert command.value == "manyhands.cli:main"


def test_help_list_and_mistakes_do_not_import_torch():
    code = """
import sys
from manyhands.cli import main
for said in (["--help"], ["train", "--help"], ["--version"]):
    try:
        main(said)
    except SystemExit as e:
        assert e.code == 0
assert main(["list"]) == 0
assert main(["list", "--json"]) == 0
for said in (["tran"], ["train", "--modle", "cnn"], ["train", "--workers", "two"], ["simulat"], []):
    assert main(said) == 2
heavy = {"torch", "numpy", "rich", "matplotlib"} & set(sys.modules)
assert not heavy, heavy
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=DEADLINE_S, check=False)
    assert done.returncode == 0, done.stderr


def test_version_and_help_go_to_standard_output():
    assert start("--version").stdout == f"manyhands {version('manyhands')}\n"
    done = start("--help")
    assert (done.returncode, done.stderr) == (0, "")
    for command in ("train", "study", "report", "list", "verify", "doctor"):
        assert f"\n    {command} " in done.stdout
    assert "predict" in done.stdout


def test_a_mistake_goes_to_standard_error_with_status_2():
    done = start("train", "--modle", "cnn", "--json")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("manyhands: ")


@pytest.mark.slow
def test_json_stands_alone_whatever_the_workers_print(tmp_path):
    (tmp_path / "loud.py").write_text(
        "import os, torch\n"
        "class Model(torch.nn.Linear):\n"
        "    def __init__(self): super().__init__(64, 10)\n"
        "    def forward(self, x):\n"
        "        print('loud'); os.write(1, b'louder')\n"
        "        return super().forward(x.flatten(1))\n"
    )
    done = start(
        "train", "--data", "digits", "--model", "loud:Model", "--workers", 2, "--steps", 2, "--json", cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["steps"] == 2
    assert "louder" in done.stderr


def test_a_reader_that_leaves_early_is_no_failure():
    with subprocess.Popen([*MANYHANDS, "list"], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        error = process.stderr.read()
        assert process.wait(DEADLINE_S) == 0
    assert error == b""


def test_a_terminal_without_our_letters_shows_others():
    done = start("train", "--help", env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)], ids=lambda s: s.name
)
def test_a_signal_ends_a_run_and_its_workers(tmp_path, number):
    typed = ["train", "--data", "digits", "--workers", "2", "--epochs", "1000000", "--checkpoint", "1", "-q"]
    typed += ["--out", str(tmp_path / "run")]
    with subprocess.Popen([*MANYHANDS, *typed], stderr=subprocess.PIPE, text=True, start_new_session=True) as process:
        end = time.monotonic() + DEADLINE_S
        while not list(tmp_path.glob("run/checkpoints/step-*")):  # it is training
            assert process.poll() is None, process.stderr.read()
            assert time.monotonic() < end
            time.sleep(0.05)
        process.send_signal(number)
        _, error = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 130
    interrupted, kept = error.splitlines()[-2:]
    assert interrupted == "manyhands: interrupted"
    assert "is kept; to go on: manyhands train --resume --out" in kept
    assert "Traceback" not in error
    # That no worker is left, tests/conftest.py looks after.


@pytest.mark.slow
def test_torchruns_ranks_join_and_one_of_them_speaks():
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    typed = ["train", "--data", "digits", "--batch-per-worker", "20", "--steps", "2", "--json"]
    done = subprocess.run(
        [*launcher, "-m", "manyhands", *typed],
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert (said["workers"], said["transport"], said["global_batch"]) == (2, "gloo", 40)


@pytest.mark.slow
def test_mpiexecs_ranks_join_and_one_of_them_speaks():
    pytest.importorskip("mpi4py")
    mpiexec = Path(sys.executable).with_name("mpiexec")
    if not mpiexec.exists():
        pytest.skip("no mpiexec beside Python")
    done = subprocess.run(
        [str(mpiexec), "-n", "2", *MANYHANDS, "verify", "--json"],
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said["passed"]
    assert {(r["transport"], r["workers"]) for r in said["rows"]} == {("mpi", 2)}
