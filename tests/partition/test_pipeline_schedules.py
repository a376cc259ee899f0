"""Schedules are data: each is valid for all sizes, as fast as its paper says, and a bad one is shown with an arrow."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from manyhands.errors import BadInput
from manyhands.partition.pipeline import gpipe, interleaved, one_f_one_b, pipedream, schedules, zero_bubble
from manyhands.partition.pipeline.schedule import (
    PRODUCTS,
    UNIT,
    Action,
    Schedule,
    bubble,
    in_flight,
    in_flight_of_stage,
    makespan,
    parse,
    schedule,
    simulate,
)

RANKS, MICRO_BATCHES = st.integers(1, 8), st.integers(1, 20)
FEW = settings(max_examples=25)  # of each schedule
EXACT = 1e-12
BUILT = [name for name in schedules if name != "written"]


@pytest.mark.parametrize("name", BUILT)
@FEW
@given(ranks=RANKS, micro_batches=MICRO_BATCHES)
def test_every_schedule_is_valid_and_prints_what_is_read_back(name, ranks, micro_batches):
    made = schedules.load(name)(ranks, micro_batches).validate()
    assert (made.ranks, made.micro_batches) == (ranks, micro_batches)
    assert parse(str(made)) == made
    assert all(made.stage_rank(s) == r for r in range(ranks) for s in made.stages_of(r))


@pytest.mark.parametrize("name", BUILT)
@FEW
@given(ranks=RANKS, micro_batches=MICRO_BATCHES, left_out=st.sets(st.integers(0, 19)))
def test_leaving_micro_batches_out_leaves_nobody_waiting(name, ranks, micro_batches, left_out):
    rest = schedules.load(name)(ranks, micro_batches).without(left_out)
    assert simulate(rest, UNIT)[1] == {}


@pytest.mark.parametrize("name", BUILT)
@FEW
@given(ranks=RANKS, micro_batches=MICRO_BATCHES)
def test_busy_and_idle_time_make_up_the_whole(name, ranks, micro_batches):
    made = schedules.load(name)(ranks, micro_batches)
    busy = sum(PRODUCTS[a.kind] for row in made.rows for a in row)
    assert bubble(made, PRODUCTS) == pytest.approx(1 - busy / (ranks * makespan(made, PRODUCTS)), abs=EXACT)


@pytest.mark.parametrize("build", [gpipe.gpipe, one_f_one_b.one_f_one_b])
@FEW
@given(ranks=RANKS, micro_batches=MICRO_BATCHES, f=st.integers(1, 5), b=st.integers(1, 5))
def test_the_bubble_of_a_flush_is_its_closed_form(build, ranks, micro_batches, f, b):
    made, closed = build(ranks, micro_batches), gpipe.bubble(ranks, micro_batches)
    assert bubble(made) == pytest.approx(closed, abs=EXACT)
    if build is gpipe.gpipe or micro_batches >= ranks:  # whatever either direction costs
        assert bubble(made, {"F": f, "B": b}) == pytest.approx(closed, abs=EXACT)


@FEW
@given(ranks=RANKS, groups=st.integers(1, 4), chunks=st.integers(1, 3))
def test_interleaving_divides_the_bubble(ranks, groups, chunks):
    made = interleaved.interleaved(ranks, groups * ranks, chunks=chunks)
    assert bubble(made) == pytest.approx(interleaved.bubble(ranks, groups * ranks, chunks), abs=EXACT)
    assert in_flight(made) == interleaved.in_flight(ranks, groups * ranks, chunks)


@FEW
@given(ranks=RANKS, micro_batches=MICRO_BATCHES, chunks=st.integers(1, 3))
def test_interleaving_holds_no_more_when_micro_batches_do_not_divide(ranks, micro_batches, chunks):
    made = interleaved.interleaved(ranks, micro_batches, chunks=chunks).validate()
    assert made.stages == ranks * chunks
    full = -(-micro_batches // ranks) * ranks
    bounds = interleaved.in_flight(ranks, full, chunks)
    assert all(held <= bound for held, bound in zip(in_flight(made), bounds, strict=True))


def test_one_chunk_is_as_fast_as_1f1b():
    assert makespan(interleaved.interleaved(4, 8, chunks=1)) == makespan(one_f_one_b.one_f_one_b(4, 8))


@FEW
@given(ranks=RANKS, more=st.integers(0, 12))
def test_the_bubble_of_zero_bubble_is_a_third_of_1f1bs(ranks, more):
    micro_batches = ranks + more
    made = zero_bubble.zero_bubble(ranks, micro_batches)
    assert bubble(made) == pytest.approx(zero_bubble.bubble(ranks, micro_batches), abs=EXACT)
    plain = one_f_one_b.one_f_one_b(ranks, micro_batches)
    idle = [makespan(s, PRODUCTS) - 3 * micro_batches for s in (made, plain)]
    assert 3 * idle[0] == pytest.approx(idle[1], abs=EXACT)


@FEW
@given(ranks=RANKS, micro_batches=MICRO_BATCHES)
def test_in_flight_bounds(ranks, micro_batches):
    assert in_flight(gpipe.gpipe(ranks, micro_batches)) == [micro_batches] * ranks
    plain = one_f_one_b.one_f_one_b(ranks, micro_batches)
    assert in_flight(plain) == one_f_one_b.in_flight(ranks, micro_batches)
    assert [in_flight_of_stage(plain, s) for s in range(ranks)] == in_flight(plain)
    bounds = zero_bubble.in_flight(ranks, micro_batches)
    zero_bubble.zero_bubble(ranks, micro_batches).validate(bounds)


def test_1f1b_holds_4_3_2_1_where_gpipe_holds_8():
    assert in_flight(one_f_one_b.one_f_one_b(4, 8)) == [4, 3, 2, 1]
    assert in_flight(gpipe.gpipe(4, 8)) == [8, 8, 8, 8]


def test_a_schedule_reads_like_the_figure_of_its_paper():
    assert str(one_f_one_b.one_f_one_b(2, 4)) == (
        "rank 0  F0 F1 ·  B0 F2 B1 F3 B2 ·  B3\nrank 1  ·  F0 B0 F1 B1 F2 B2 F3 B3 ·"
    )
    assert str(interleaved.interleaved(2, 2)) == (
        "rank 0  0F0 0F1 2F0 2F1 ·   2B0 ·   2B1 0B0 0B1\nrank 1  ·   1F0 1F1 3F0 3B0 3F1 3B1 1B0 1B1 ·"
    )


@FEW
@given(ranks=RANKS, micro_batches=MICRO_BATCHES)
def test_pipedream_lacks_as_many_updates_as_there_are_stages_behind(ranks, micro_batches):
    versions = pipedream.versions(pipedream.pipedream(ranks, micro_batches))
    for (stage, i), version in versions.items():
        assert i - version == min(i, pipedream.staleness(ranks, stage))


@FEW
@given(ranks=RANKS, micro_batches=MICRO_BATCHES, vertical=st.booleans(), data=st.data())
def test_pipedream_with_fewer_in_flight_or_one_version_for_all(ranks, micro_batches, vertical, data):
    d = data.draw(st.integers(1, ranks))
    made = pipedream.pipedream(ranks, micro_batches, in_flight=d).validate(d)
    for (stage, i), version in pipedream.versions(made, vertical_sync=vertical).items():
        assert i - version == min(i, pipedream.staleness(ranks, stage, in_flight=d, vertical_sync=vertical))
    for stage in range(ranks):
        by, outlived = pipedream.used(made, stage, vertical_sync=vertical)
        for i, version in by.items():
            assert (version in outlived) == any(v == version and k > v for k, v in by.items())
            assert outlived.get(version, i) >= i or version == i
    with pytest.raises(BadInput, match=f"Use in_flight={ranks} at most"):
        pipedream.pipedream(ranks, micro_batches, in_flight=ranks + 1)


@pytest.mark.parametrize("name", BUILT)
@FEW
@given(ranks=RANKS, micro_batches=st.integers(2, 12), left=st.sets(st.integers(0, 11), min_size=1))
def test_an_order_of_some_micro_batches_is_that_of_so_many(name, ranks, micro_batches, left):
    made, some = schedules.load(name)(ranks, micro_batches), sorted(i for i in left if i < micro_batches) or [0]
    order = made.of(some)
    assert simulate(order, UNIT)[1] == {}
    again = {a: n for n, a in enumerate(some)}
    assert [[a._replace(micro_batch=again[a.micro_batch]) for a in row] for row in order.rows] == [
        list(row) for row in made.without(range(len(some), micro_batches)).rows
    ]


# -- hand-written ones -------------------------------------------------------------------------------------------------

BAD = {
    "a cycle": ("F0 B0 F1 B1 \n F1 F0 B0 B1", "1F1 waits for ever: 0F1", "rank 1  ⇒F1 F0"),
    "backward first": ("B0 F0 \n F0 B0", "0B0 waits for ever: 0F0", "rank 0  ⇒B0"),
    "no backward": ("F0 B0 F1 \n F0 B0 F1 B1", "0B1 is missing", "F1 ⇒"),
    "no forward": ("F0 B0 \n B0", "1F0 is missing", "B0 ⇒"),
    "half a backward": ("F0 I0 \n F0 B0", "0W0 is missing", "I0 ⇒"),
    "both backwards": ("F0 B0 W0 \n F0 B0", "0W0: its backward is whole (B) or in two parts", "⇒W0"),
    "twice": ("F0 F0 B0 \n F0 B0", "0F0 is there a second time", "F0  ⇒F0"),
    "another rank's": ("F0 1F0 B0 \n F0 B0", "1F0: stage 1 is on rank 1", "⇒1F0"),
    "weights before inputs": ("F0 W0 I0 \n F0 B0", "0W0 waits for ever: 0I0", "⇒W0"),
    "a rank without work": ("F0 B0 \n ·", "1F0 is missing", "rank 1"),
    "nothing at all": ("·", "nothing to do", "rank 0"),
}


@pytest.mark.parametrize(("text", "why", "arrow"), BAD.values(), ids=list(BAD))
def test_a_bad_schedule_is_shown_with_an_arrow_at_the_fault(text, why, arrow):
    with pytest.raises(BadInput, match="cannot be run") as caught:
        parse(text).validate()
    assert why in str(caught.value)
    assert arrow in str(caught.value)
    assert "⇒" in str(caught.value)


@pytest.mark.parametrize("bound", [1, [2, 1]])
def test_more_in_flight_than_allowed_is_refused(bound):
    with pytest.raises(BadInput, match="2 micro-batches in flight where 1"):
        gpipe.gpipe(2, 2).validate(bound)


@FEW
@given(ranks=RANKS, micro_batches=st.integers(1, 6), name=st.sampled_from(BUILT), data=st.data())
def test_a_schedule_that_lost_an_action_is_refused(ranks, micro_batches, name, data):
    made = schedules.load(name)(ranks, micro_batches)
    rank = data.draw(st.integers(0, ranks - 1))
    at = data.draw(st.integers(0, len(made.rows[rank]) - 1))
    rows = [[a for k, a in enumerate(row) if (r, k) != (rank, at)] for r, row in enumerate(made.rows)]
    with pytest.raises(BadInput, match="⇒"):
        schedule(rows).validate()


@FEW
@given(rows=st.permutations([Action(k, 0, i) for k in "FB" for i in range(3)]))
def test_one_rank_may_take_any_order_with_forwards_before_backwards(rows):
    made = Schedule((tuple(rows),))
    fine = all(rows.index(Action("F", 0, i)) < rows.index(Action("B", 0, i)) for i in range(3))
    if fine:
        assert bubble(made.validate()) == 0
    else:
        with pytest.raises(BadInput, match="waits for ever"):
            made.validate()


def test_text_that_is_no_schedule_is_refused():
    with pytest.raises(BadInput, match="'X3' is no action"):
        parse("F0 X3")


@pytest.mark.parametrize("name", BUILT)
@pytest.mark.parametrize("sizes", [(0, 1), (1, 0), (True, 2), (2, 1.5)])
def test_sizes_are_whole_numbers_from_1(name, sizes):
    with pytest.raises(BadInput, match="whole number"):
        schedules.load(name)(*sizes)


def test_chunks_are_whole_numbers_from_1():
    with pytest.raises(BadInput, match="chunks=0"):
        interleaved.interleaved(2, 2, chunks=0)
