"""The progress display: on standard error only, and hardly there."""

import io
import time

import pytest
import torch
from rich.console import Console

from manyhands.training import progress
from manyhands.training.progress import Progress


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still until it is moved."""

    class Clock:
        now = 100.0

    monkeypatch.setattr(progress.time, "monotonic", lambda: Clock.now)
    return Clock


def plain():
    return Console(file=io.StringIO())


def terminal():
    return Console(file=io.StringIO(), force_terminal=True, width=120, _environ={"TERM": "xterm"})


def run(clock, console, seconds, *, first_step=0, **options):
    """Eight steps of 50 samples a second; an eighth adds up without rounding."""
    with Progress(1000, epochs=3, first_step=first_step, console=console, **options) as shown:
        for i in range(1, round(seconds * 8) + 1):
            clock.now += 0.125
            shown.update(first_step + i, 1, 50 * i, 0.25)
    return console.file.getvalue()


def test_lines_come_every_few_seconds_and_say_all(clock):
    text = run(clock, plain(), 12.0)
    assert text.splitlines() == [
        "epoch 2/3  step 40/1,000  loss 0.25  400 samples/s  0:02:00 left",
        "epoch 2/3  step 80/1,000  loss 0.25  400 samples/s  0:01:55 left",
        "epoch 2/3  step 96/1,000  loss 0.25  400 samples/s  0:00:12 taken",
    ]


def test_a_resumed_run_shows_its_own_speed(clock):
    text = run(clock, plain(), 5.0, first_step=900)
    assert "step 940/1,000  loss 0.25  400 samples/s  0:00:08 left" in text


def test_the_speed_shown_is_that_of_late(clock):
    console = plain()
    shown = Progress(10_000, console=console)
    for step in range(1, 2001):
        clock.now += 0.125 if step <= 400 else 1.0
        shown.update(step, 0, step, 1.0)
    assert console.file.getvalue().splitlines()[-1] == "epoch 1  step 2,000/10,000  loss 1  1 samples/s  2:13:20 left"
    shown.close()


def test_a_terminal_gets_a_bar_twice_a_second_and_the_last_state_as_a_line(clock):
    console = terminal()
    text = run(clock, console, 12.0)
    drawn = [part for part in text.split("\r") if "samples/s" in part]
    assert 20 <= len(drawn) <= 30
    assert "━" in text
    assert text.endswith("epoch 2/3  step 96/1,000  loss 0.25  400 samples/s  0:00:12 taken\n")


def test_a_dumb_terminal_gets_lines(clock):
    console = Console(file=io.StringIO(), force_terminal=True, _environ={"TERM": "dumb"})
    assert "\x1b" not in run(clock, console, 12.0)


def test_other_ranks_show_nothing(clock):
    console = plain()
    assert run(clock, console, 12.0, rank=1) == ""


def test_nothing_is_written_to_standard_output(clock, capsys):
    with Progress(10) as shown:
        for step in range(1, 11):
            clock.now += 1.0
            shown.update(step, 0, step, 1.0)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("samples/s") == 3


def test_a_terminal_leaves_standard_output_alone(clock, capsys):
    console = terminal()
    with Progress(10, console=console) as shown:
        clock.now += 1.0
        shown.update(1, 0, 1, 1.0)
        print("from the user's model")  # noqa: T201
    assert capsys.readouterr().out == "from the user's model\n"
    assert "user" not in console.file.getvalue()


def test_a_run_without_steps_says_nothing(clock):
    assert run(clock, plain(), 0) == ""


def test_close_twice_says_it_once(clock):
    console = plain()
    shown = Progress(10, console=console)
    shown.update(1, 0, 1, float("nan"))
    shown.close()
    shown.close()
    shown.update(2, 0, 2, 1.0)
    assert console.file.getvalue().count("\n") == 1
    assert "loss nan" in console.file.getvalue()


def test_a_closed_pipe_ends_the_display_and_not_the_run(clock):
    class Closed(io.StringIO):
        def write(self, text):
            raise BrokenPipeError

    shown = Progress(10, console=Console(file=Closed()))
    for step in range(1, 11):
        clock.now += 10
        shown.update(step, 0, step, 1.0)
    shown.close()


def test_the_loss_is_read_only_when_it_is_drawn(clock):
    class Loss:
        reads = 0

        def __float__(self):
            Loss.reads += 1
            return 1.0

    shown = Progress(1000, console=plain())
    for step in range(1, 81):
        clock.now += 0.125
        shown.update(step, 0, step, Loss())
    assert Loss.reads == 2
    shown.update(81, 0, 81, torch.tensor(1.0))
    shown.close()


@pytest.mark.parametrize("console", [plain, terminal])
def test_an_update_costs_less_than_a_microsecond(console):
    shown = Progress(10**9, console=console())
    loss = torch.tensor(1.0)
    shown.update(1, 0, 1, loss)
    costs = []
    for _ in range(5):
        began = time.perf_counter()
        for step in range(20_000):
            shown.update(step, 0, step, loss)
        costs.append((time.perf_counter() - began) / 20_000)
    shown.close()
    assert min(costs) < 1e-6
