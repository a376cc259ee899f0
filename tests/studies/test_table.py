"""What a person reads: the table in its two forms, and the sentences below it, from rows that are known."""

import dataclasses
import io

import pytest
from rich.console import Console

from manyhands.contract import StepParts
from manyhands.studies.analysis import Listing
from manyhands.studies.contenders import contenders
from manyhands.studies.findings import fastest, surprises
from manyhands.studies.summary import summarize
from manyhands.studies.table import in_bytes, listed, table
from tests.studies.made import cell, measurement, row

ONE, TWO, FOUR = (cell(workers=n) for n in (1, 2, 4))


def lines_of(*pairs):
    return summarize(list({c.id: c for c, _ in pairs}.values()), [r for _, r in pairs])


def some(two=None, **fields):
    two = two or measurement(2, 0.006)
    return lines_of((ONE, row(ONE, **fields)), (TWO, row(TWO, measured=two, **fields)))


def test_plain_text_is_aligned_and_says_what_was_measured():
    head, one, two = table(some()).plain().splitlines()[:3]
    assert head.split("  ")[0] == "strategy"
    for title, first, second in [
        ("workers", "1", "2"),
        ("step ms [p10 … p90]", "10.0 [9.00 … 12.0]", "6.00 [5.40 … 7.20]"),
        ("samples/s", "10,000", "16,667"),
        ("speed-up", "1.00×", "1.67×"),
        ("efficiency", "100 %", "83 %"),
        ("accuracy", "95.0 %", "95.0 %"),
        ("sent/step", "0 B", "2.6 kB"),
        ("sent/sample", "0 B", "52 B"),
    ]:
        end = head.index(title) + len(title)
        assert (one[:end].endswith(first), two[:end].endswith(second)) == (True, True), title


def test_the_remarks_say_which_base():
    assert any(
        "one worker (single, 1 thread) of the same strategy at the same batch." in x for x in table(some()).remarks
    )
    own = cell("slice_update", 2)
    foreign = lines_of((ONE, row(ONE)), (own, row(own)))
    assert any("slice_update: synchronous's, having none of its own" in x for x in table(foreign).remarks)


def test_a_terminal_gets_a_drawn_table_and_a_pipe_gets_plain_text():
    drawn, piped = io.StringIO(), io.StringIO()
    table(some()).show(Console(file=drawn, force_terminal=True, width=150))
    table(some()).show(Console(file=piped, width=20))
    assert "\x1b[" in drawn.getvalue()
    assert "1.67×" in drawn.getvalue()
    assert piped.getvalue() == table(some()).plain() + "\n"


@pytest.mark.parametrize("width", [75, 85, 110, 130])
def test_a_narrow_terminal_gets_fewer_columns_and_is_told_which(width):
    drawn = io.StringIO()
    table(some()).show(Console(file=drawn, force_terminal=True, color_system=None, width=width))
    head, *body = drawn.getvalue().splitlines()[:3]
    assert "accuracy" in head
    assert [line.split()[0] for line in body] == ["synchronous", "synchronous"]
    assert ("A wider terminal also shows" in drawn.getvalue()) == ("sent/sample" not in head) == (width < 120)


def test_markup_in_a_name_is_shown_and_not_obeyed():
    odd = cell("[red]x[/red]", 1)
    drawn = io.StringIO()
    table(lines_of((odd, row(odd)))).show(Console(file=drawn, force_terminal=True, width=200))
    assert "[red]x[/red]" in drawn.getvalue()


def test_a_factor_that_varies_gets_a_column():
    cells = [cell(task={"batch_size": n}, factors=("task.batch_size", "task.seed")) for n in (50, 100)]
    assert "batch_size" in table(lines_of(*((c, row(c)) for c in cells))).head
    assert "seed" not in table(lines_of(*((c, row(c)) for c in cells))).head


def test_oversubscribed_refused_and_failed_cells_are_marked():
    lines = lines_of(
        (ONE, row(ONE)),
        (ONE, row(ONE, 2, status="failed", reason="it broke")),
        (TWO, row(TWO, status="refused", reason="it cannot be.")),
        (FOUR, row(FOUR)),
    )
    marks = [line[-1] for line in table(lines).body]
    assert marks == ["1 of 2 failed", "refused", "correctness only"]
    assert "–" in table(lines).body[2]
    said = surprises(lines)
    assert "strategy=synchronous, workers=2 is refused: it cannot be." in said
    assert "synchronous with 1 worker failed in 1 of 2 runs: it broke" in said


def fastest_of(*pairs):
    return fastest(contenders(lines_of(*pairs), [r for _, r in pairs]))


def test_the_fastest_plan_is_named_with_the_best_single_process():
    threaded = cell(threads=2)
    assert fastest_of(
        (ONE, row(ONE)),
        (TWO, row(TWO, measured=measurement(2, 0.005))),
        (threaded, row(threaded, measured=measurement(1, 0.008), threads=2)),
    ) == ["Fastest: synchronous with 2 workers, 1.60× as fast as one process with 2 threads, 95.0 % right."]


def test_it_is_said_when_nothing_beats_one_process():
    assert fastest_of((ONE, row(ONE)), (TWO, row(TWO, measured=measurement(2, 0.02)))) == [
        "Nothing here is faster than one process with 1 thread: synchronous with 2 workers is 0.50× as fast."
    ]


@pytest.mark.parametrize(
    ("two", "says"),
    [
        (
            measurement(2, 0.02, step_parts_s=StepParts(0.011, 0.005, 0.003, 0.001)),
            "is slower than one worker with 1 thread (0.50×): communication and waiting are 40 % of its step.",
        ),
        (
            measurement(2, 0.012, step_parts_s=StepParts(0.009, 0.001, 0.0, 0.001)),
            "computing a share takes 9 ms where the whole takes 9 ms",
        ),
        (measurement(2, 0.004), "more than there can be by dividing work"),
        (measurement(2, 0.006, test_accuracy=0.9), "learns less: 90.0 % right against 95.0 % of one worker."),
    ],
)
def test_what_surprises_is_one_sentence(two, says):
    assert [x for x in surprises(some(two)) if says in x]


def test_what_a_whole_batch_strategy_costs_is_explained_by_its_design():
    own = cell("slice_update", 2)
    said = surprises(lines_of((ONE, row(ONE)), (own, row(own, measured=measurement(2, 0.02)))))
    assert [x for x in said if "every worker computes the whole batch, by design" in x]


def test_what_goes_as_it_should_is_no_surprise():
    assert surprises(some()) == []


def test_disturbed_runs_are_marked_where_a_reader_looks():
    rows = [(ONE, dataclasses.replace(row(ONE, i), noisy=i > 1)) for i in (1, 2, 3)]
    found = table(lines_of(*rows, (TWO, row(TWO))))
    assert [line[-1] for line in found.body] == ["2 of 3 disturbed", ""]
    assert any(remark.startswith("Disturbed: ") for remark in found.remarks)
    assert "disturbed" not in table(some()).plain().lower()


def test_a_table_of_an_analysis_is_plain_text_or_drawn_with_its_title_and_note():
    found = listed(Listing("Plans", ("plan", "gain", "remark"), (("a", "1.5×", "good"), ("bcd", "10×", "")), "A note."))
    assert found.plain() == "Plans\n\nplan  gain  remark\na     1.5×  good\nbcd    10×\n\nA note."
    drawn = io.StringIO()
    found.show(Console(file=drawn, force_terminal=True, width=80))
    assert "\x1b[" in drawn.getvalue()
    assert "A note." in drawn.getvalue()


def test_nothing_measured_is_a_table_all_the_same():
    assert table(()).plain().startswith("strategy")


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (999.4, "999 B"), (115752, "116 kB"), (2.5e6, "2.5 MB"), (3e9, "3 GB")]
)
def test_bytes_have_three_digits_and_a_unit(count, text):
    assert in_bytes(count) == text
