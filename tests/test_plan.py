"""Plans: what prints parses back, `auto` is decided by rule, and all that cannot work is said at once."""

import contextlib
import dataclasses
import itertools
import math
import typing

import pytest
from hypothesis import given
from hypothesis import strategies as st

from manyhands.communication import transports
from manyhands.communication.topology import Mesh, parse_mesh
from manyhands.consistency import strategies
from manyhands.consistency.synchronous import Synchronous
from manyhands.contract import Strategy
from manyhands.errors import BadInput, InvalidPlan, Problem, UnknownName
from manyhands.partition import cut_strategies, partitions
from manyhands.plan import SHARE_MEMORY, Facts, Plan, resolve, strategy_from
from manyhands.plan.facts import ALLOCATORS, BUFFER_POLICIES, DEVICES, PRECISIONS
from manyhands.task import Task, from_table

MACHINE = Facts(cores=4, batch_size=100)


def described(cls: type[Strategy]) -> st.SearchStrategy[Strategy]:
    """Any instance of a strategy class, its fields drawn by their types; one with a value it refuses keeps its default.

    Text in a field is a description itself, and has tests where it is read.
    """
    hints = typing.get_type_hints(cls)
    fields = {}
    for name in (f.name for f in dataclasses.fields(cls)):
        literal = typing.get_origin(hints[name]) is typing.Literal
        if hints[name] is not str:
            fields[name] = st.sampled_from(typing.get_args(hints[name])) if literal else st.from_type(hints[name])
    return st.fixed_dictionaries(fields).map(lambda drawn: with_accepted(cls, drawn))


def with_accepted(cls: type[Strategy], drawn: dict) -> Strategy:
    strategy = cls()
    for name, value in drawn.items():
        with contextlib.suppress(ValueError, BadInput):
            strategy = dataclasses.replace(strategy, **{name: value})
    return strategy


any_strategy = st.one_of([described(strategies.load(name)) for name in strategies])
axes = st.dictionaries(st.sampled_from([*partitions, "tensor", "pipeline"]), st.integers(1, 8), min_size=1)
#: Fields, and not plans: what is type-checked draws numbers of its own, which Hypothesis does not allow while it draws.
plans = st.fixed_dictionaries(
    {},
    optional={
        "strategy": any_strategy,
        "mesh": axes,
        "shard": st.sampled_from([0, 1, 2, 3]),
        "micro_batches": st.integers(1, 9),
        "buffers": st.sampled_from(BUFFER_POLICIES),
        "precision": st.sampled_from(PRECISIONS),
        "workers": st.integers(1, 9),
        "threads": st.integers(0, 4),
        "transport": st.sampled_from(["auto", *transports]),
        "device": st.sampled_from(DEVICES),
        "allocator": st.sampled_from(ALLOCATORS),
        "timeout_s": st.floats(0.1, 1e6) | st.integers(1, 100),
    },
)


def made(fields: dict) -> Plan:
    return Plan(**fields | ({"mesh": Mesh(fields["mesh"])} if "mesh" in fields else {}))


# -- what prints parses back -------------------------------------------------------------------------------------------


@given(any_strategy)
def test_a_strategys_text_reads_back_to_an_equal_one(strategy):
    again = strategy_from(str(strategy))
    assert again == strategy
    assert type(again) is type(strategy)
    assert hash(again) == hash(strategy)


@pytest.mark.parametrize("name", strategies)
def test_a_bare_name_is_the_strategy_with_its_defaults(name):
    assert strategy_from(name) == strategies.load(name)()
    assert str(strategy_from(name)) == name


@given(axes)
def test_a_meshs_text_reads_back_to_an_equal_one(axes):
    mesh = Mesh(axes)
    assert parse_mesh(str(mesh)) == mesh
    assert parse_mesh(",".join(f"{a}={n}" for a, n in mesh.axes)) == mesh


@given(plans)
def test_a_plans_table_reads_back_to_an_equal_plan(fields):
    plan = made(fields)
    assert from_table(Plan, plan.as_table(), "[plan]") == plan


@given(plans)
def test_a_plans_text_reads_back_to_an_equal_plan(fields):
    plan = made(fields)
    from manyhands.calling import call
    from manyhands.grammar import parse_call

    said = parse_call(str(plan))
    assert said.name == "plan"
    assert call("plan", said.name, Plan, said.args, said.kwargs) == plan


@given(plans)
def test_a_plans_table_survives_a_toml_file(fields):
    plan = made(fields)
    import tomllib

    import tomli_w

    assert from_table(Plan, tomllib.loads(tomli_w.dumps(plan.as_table())), "[plan]") == plan


def test_a_resolved_plan_resolves_to_itself():
    asked = [Plan(strategy=strategy, workers=workers) for strategy in strategies for workers in (1, 3)]
    for plan in [*asked, *(Plan(strategy=strategy, mesh="pipeline=2") for strategy in cut_strategies)]:
        machine = dataclasses.replace(MACHINE, stateless="sandblaster" in str(plan.strategy))  # brings its own update
        plan = resolve(plan, machine).plan
        assert resolve(plan, machine).plan == plan
        assert from_table(Plan, plan.as_table(), "[plan]") == plan


# -- auto --------------------------------------------------------------------------------------------------------------


def decided(plan: Plan, **facts: object) -> Plan:
    return resolve(plan, dataclasses.replace(MACHINE, **facts)).plan


def test_workers_are_what_the_launcher_started_else_the_mesh_else_the_cores():
    assert decided(Plan()).workers == 4
    assert decided(Plan(mesh="data=3")).workers == 3
    assert decided(Plan(transport="single")).workers == 1
    assert decided(Plan(), launched=7, launcher="torchrun").workers == 7
    assert decided(Plan(workers=2)).workers == 2


def test_threads_are_the_cores_over_the_workers():
    assert decided(Plan(workers=2)).threads == 2
    assert decided(Plan(workers=9)).threads == 1
    assert decided(Plan(workers=2, threads=5)).threads == 5


@pytest.mark.parametrize(
    ("plan", "facts", "transport"),
    [
        (Plan(workers=1), {}, "single"),
        (Plan(workers=2), {}, "shared"),
        (Plan(workers=2), {"shared_memory": False}, "gloo"),
        (Plan(workers=2), {"gpus": 2}, "nccl"),
        (Plan(workers=2), {"gpus": 1}, "shared"),
        (Plan(workers=2, device="cuda"), {"gpus": 1}, "gloo"),
        (Plan(workers=1), {"gpus": 1}, "single"),
        (Plan(workers=2, device="cpu"), {"gpus": 2}, "shared"),
        (Plan(), {"launched": 2, "launcher": "torchrun"}, "gloo"),
        (Plan(), {"launched": 2, "launcher": "mpi"}, "mpi"),
        (Plan(), {"launched": 2, "launcher": "torchrun", "gpus": 2}, "nccl"),
        (Plan(), {"launched": 1, "launcher": "torchrun"}, "single"),
    ],
)
def test_the_transport_of_auto(plan, facts, transport):
    assert decided(plan, **facts).transport == transport


def test_auto_never_picks_mpi_without_mpis_own_launcher():
    for workers, gpus, memory in itertools.product((1, 2, 8), (0, 1, 8), (True, False)):
        assert decided(Plan(workers=workers), gpus=gpus, shared_memory=memory).transport != "mpi"


@pytest.mark.parametrize(
    ("facts", "update"),
    [({}, "sharded"), ({"elementwise": False}, "replicated"), ({"shared_memory": False}, "replicated")],
)
def test_synchronous_shares_the_update_where_memory_is_shared_and_the_optimizer_allows_it(facts, update):
    assert decided(Plan(workers=2), **facts).strategy == Synchronous(update=update)


def test_shard_says_the_same_as_update():
    assert decided(Plan(workers=2, shard=1)).strategy == Synchronous(update="sharded")
    assert decided(Plan(workers=2, shard=0)).strategy == Synchronous(update="replicated")
    assert decided(Plan(workers=2, shard=3)).strategy == Synchronous(update="sharded")


# -- notes -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("plan", "facts", "said"),
    [
        (Plan(workers=3), {"batch_size": 100}, "does not divide by 3"),
        (Plan(workers=4), {"batch_size": 2}, "leaves 2 of them idle"),
        (Plan(workers=8), {}, "8 workers × 1 threads on 4 cores"),
        (Plan(workers=2, transport="threads"), {}, "random number generator"),
        (Plan(workers=2), {"elementwise": False}, "whole tensors"),
        (Plan(workers=2), {"shared_memory": False}, "gets gloo"),
        (Plan(workers=2, transport="mpi"), {}, "listeners on all interfaces"),
        (Plan(workers=2), {"gpus": 1}, "2 workers on 1 GPUs train on the CPU"),
        (Plan(workers=2, transport="gloo"), {"gpus": 2}, "2 workers on 2 GPUs train on the CPU"),
        (Plan(workers=2, device="cuda"), {"gpus": 1}, "not been tested on GPUs"),
    ],
)
def test_what_a_user_should_know_is_said_once(plan, facts, said):
    notes = resolve(plan, dataclasses.replace(MACHINE, **facts)).notes
    assert sum(said in note for note in notes) == 1
    assert len(set(notes)) == len(notes)


def test_an_ordinary_plan_says_nothing():
    assert resolve(Plan(workers=2), MACHINE).notes == ()


def test_strategies_of_the_whole_batch_say_nothing_of_shares():
    for batch_size in (3, 1):
        found = resolve(Plan(strategy="slice_update", workers=2), dataclasses.replace(MACHINE, batch_size=batch_size))
        assert found.notes == ()


# -- problems ----------------------------------------------------------------------------------------------------------

ALSO = Problem("optimizer x", "the rule.", "the cure.")

PROBLEMS = [
    (Plan(workers=0), {}, "workers=0"),
    (Plan(workers=-2), {}, "workers=-2"),
    (Plan(workers=True), {}, "workers=True"),
    (Plan(workers=2.0), {}, "workers=2.0"),
    (Plan(workers=3), {"launched": 2, "launcher": "torchrun"}, "workers=3 under torchrun, which started 2"),
    (Plan(device="cuda"), {}, "device=cuda"),
    (Plan(transport="simulated"), {}, "transport=simulated"),
    (Plan(transport="single", workers=2), {}, "transport=single with 2 workers"),
    (Plan(transport="shared", device="cuda"), {"gpus": 4}, "transport=shared on cuda"),
    (Plan(transport="threads", device="cuda", workers=2), {"gpus": 4}, "transport=threads on cuda"),
    (Plan(transport="mpi", device="cuda", workers=2), {"gpus": 4}, "transport=mpi on cuda"),
    (Plan(device="cuda"), {"gpus": 4, "launched": 2, "launcher": "mpi"}, "transport=mpi on cuda"),
    (Plan(transport="nccl", device="cpu", workers=2), {"gpus": 4}, "transport=nccl on cpu"),
    (Plan(transport="shared"), {"shared_memory": False}, "transport=shared"),
    (Plan(transport="nccl", workers=2), {"gpus": 1}, "transport=nccl with 2 workers on 1 GPUs"),
    (Plan(transport="shared"), {"launched": 2, "launcher": "torchrun"}, "transport=shared under torchrun"),
    (Plan(transport="gloo"), {"launched": 2, "launcher": "mpi"}, "transport=gloo under mpi"),
    (Plan(mesh="data=3", workers=4), {}, "mesh(data=3) needs 3 ranks; there are 4"),
    (Plan(mesh="data=2,expert=2"), {}, "cuts along expert"),
    (Plan(micro_batches=0), {}, "micro_batches=0"),
    (Plan(micro_batches=1.5), {}, "micro_batches=1.5"),
    (Plan(threads=-1), {}, "threads=-1"),
    (Plan(timeout_s=0), {}, "timeout_s=0"),
    (Plan(timeout_s=math.inf), {}, "timeout_s=inf"),
    (Plan(timeout_s=math.nan), {}, "timeout_s=nan"),
    (Plan(buffers="mean"), {}, "buffers='mean'"),
    (Plan(precision="float8"), {}, "precision='float8'"),
    (Plan(allocator="fast"), {}, "allocator='fast'"),
    (Plan(compress="dgc", strategy="local"), {}, "compress=dgc with local"),
    (Plan(compress="top_k", strategy="push_sum"), {}, "compress=top_k with push_sum"),
    (Plan(compress="top_k", strategy="synchronous(compress='int8')"), {}, "compress=top_k with synchronous"),
    (Plan(compress="top_k", strategy="synchronous(aggregate='median')"), {}, "compress=top_k with aggregate=median"),
    (Plan(compress="top_k", shard=1), {}, "compress=top_k with update='sharded'"),
    (Plan(compress="top_k", device="cuda"), {"gpus": 1}, "compress=top_k on cuda"),
    (Plan(compress="dgc"), {"stateless": False}, "compress=dgc with an optimizer that keeps state"),
    (Plan(tensor="rows"), {}, "tensor='rows'"),
    (Plan(pipeline="gpipe"), {}, "pipeline='gpipe'"),
    (Plan(recompute=True), {}, "recompute=True"),
    (Plan(shard=4), {}, "shard=4"),
    (Plan(shard=2, strategy="gossip"), {}, "shard=2 with gossip"),
    (Plan(shard=3, strategy="slice_update"), {}, "shard=3 with slice_update"),
    (Plan(shard=3, strategy=Synchronous(update="replicated")), {}, "shard=3 with synchronous(update='replicated')"),
    (Plan(shard=3, strategy=Synchronous(aggregate="median"), workers=3), {}, "update='sharded' with aggregate=median"),
    (Plan(shard=3, workers=2), {"elementwise": False}, "looks at whole tensors"),
    (Plan(shard=2, compress="top_k"), {}, "compress=top_k with update='sharded'"),
    (Plan(shard=3, mesh="data=2,tensor=2"), {}, "shard=3 on mesh(data=2, tensor=2)"),
    (Plan(shard=2, mesh="pipeline=2"), {}, "shard=2 on mesh(pipeline=2)"),
    (Plan(shard=3, mesh="data=2", tensor="one_weird_trick"), {}, "shard=3 with tensor=one_weird_trick"),
    (Plan(shard=2, workers=2), {"nodes": 1}, "shard=2 in virtual time"),
    (Plan(shard=True), {}, "shard=True"),
    (Plan(shard="1"), {}, "shard='1'"),
    (Plan(shard=1, strategy="slice_update"), {}, "shard=1 with slice_update"),
    (Plan(shard=0, strategy="slice_update"), {}, "shard=0 with slice_update"),
    (Plan(shard=1, strategy="replica_average"), {}, "shard=1 with replica_average"),
    (Plan(shard=0, strategy=Synchronous(update="sharded")), {}, "shard=0 with synchronous(update='sharded')"),
    (Plan(strategy=Synchronous(update="sharded"), workers=2), {"elementwise": False}, "looks at whole tensors"),
    (Plan(strategy="slice_update", workers=2), {"elementwise": False}, "slice_update with an optimizer"),
    (Plan(), {"optimizer_problem": ALSO}, "optimizer x"),
]


def problems(plan: Plan, facts: dict) -> tuple[Problem, ...]:
    with pytest.raises(InvalidPlan) as e:
        resolve(plan, dataclasses.replace(MACHINE, **facts))
    return e.value.problems


@pytest.mark.parametrize(("plan", "facts", "asked"), PROBLEMS, ids=[p[2][:40] for p in PROBLEMS])
def test_what_cannot_work_is_refused_with_what_was_asked_the_rule_and_a_cure(plan, facts, asked):
    found = problems(plan, facts)
    (problem,) = [p for p in found if asked in p.asked]
    assert problem.rule.endswith((".", ")"))
    assert problem.cure.endswith((".", ")"))
    assert str(problem) == f"{problem.asked}: {problem.rule} {problem.cure}"


def test_all_problems_are_listed_at_once():
    plan = Plan(
        strategy="slice_update",
        workers=3,
        mesh="data=2,expert=2",
        micro_batches=0,
        threads=-1,
        timeout_s=-1,
        buffers="mean",
        precision="float8",
        allocator="fast",
        compress="top_k",
        tensor="rows",
        pipeline="gpipe",
        recompute=True,
        shard=1,
        transport="simulated",
        device="cuda",
    )
    facts = {"elementwise": False, "optimizer_problem": ALSO}
    found = problems(plan, facts)
    wanted = (
        "slice_update with an opt|mesh(data=2, expert=2) cuts|needs 4 ranks|micro_batches|"
        "threads=|timeout_s|buffers|precision|allocator|compress|tensor=|pipeline|recompute|shard|simulated|cuda|opt"
    )
    for asked in wanted.split("|"):
        assert any(asked in p.asked for p in found), asked
    with pytest.raises(InvalidPlan) as e:
        resolve(plan, dataclasses.replace(MACHINE, **facts))
    lines = str(e.value).splitlines()
    assert len(lines) == len(found)
    assert [line.partition(". ")[0] for line in lines] == [str(i + 1) for i in range(len(lines))]
    assert e.value.exit_code == 2


@pytest.mark.parametrize(
    ("mesh", "workers", "fit"),
    [
        ("pipeline=3", 2, "pipeline=2; data=2"),
        ("pipeline=3", 4, "pipeline=4; data=2,pipeline=2; data=4"),
        ("data=3,tensor=2", 4, "data=4; data=2,tensor=2; tensor=4"),
        ("data=2", 1, "data=1"),
    ],
)
def test_meshes_that_fit_have_the_axes_that_were_asked_for(mesh, workers, fit):
    (problem,) = [p for p in problems(Plan(mesh=mesh, workers=workers), {}) if "needs" in p.asked]
    assert problem.cure == f"Meshes that fit {workers}: {fit}."


def test_one_problem_has_no_number():
    assert str(InvalidPlan(problems(Plan(threads=-1), {}))).startswith("threads=-1: ")


@pytest.mark.parametrize(
    ("make", "near"),
    [
        (lambda: Plan(strategy="syncronous"), "synchronous"),
        (lambda: Plan(strategy="synchronous(updat='sharded')"), "update"),
        (lambda: resolve(Plan(transport="share"), MACHINE), "shared"),
        (lambda: resolve(Plan(device="gpu"), MACHINE), "cpu"),
        (lambda: from_table(Plan, {"worker": 2}, "[plan]"), "workers"),
        (lambda: from_table(Task, {"batchsize": 2}, "[task]"), "batch_size"),
    ],
)
def test_an_unknown_name_offers_the_nearest(make, near):
    with pytest.raises(UnknownName, match=near):
        make()


def test_unknown_names_stand_among_the_other_problems():
    found = problems(Plan(transport="share", device="gpu", workers=0), {})
    said = [str(p) for p in found]
    assert [s.partition("=")[0] for s in said] == ["workers", "device", "transport"]
    assert "Did you mean 'shared'?" in said[2]


def test_a_shard_that_is_refused_says_why():
    (shared,) = problems(Plan(shard=0, strategy="slice_update"), {})
    assert "always shared" in shared.rule
    assert decided(Plan(shard=0, strategy="replica_average")).strategy == strategy_from("replica_average")


@pytest.mark.parametrize(
    ("plan", "gpus", "device"),
    [
        (Plan(workers=1), 1, "cuda"),
        (Plan(workers=2), 2, "cuda"),
        (Plan(workers=2), 1, "cpu"),
        (Plan(workers=2, transport="shared"), 2, "cpu"),
        (Plan(workers=2, transport="gloo"), 2, "cpu"),
        (Plan(workers=2, transport="threads"), 2, "cpu"),
        (Plan(workers=2, transport="mpi"), 2, "cpu"),
        (Plan(workers=2, transport="nccl"), 2, "cuda"),
        (Plan(transport="single"), 2, "cuda"),
        (Plan(workers=2), 0, "cpu"),
    ],
)
def test_the_device_of_auto(plan, gpus, device):
    made = decided(plan, gpus=gpus)
    assert made.device == device
    assert decided(made, gpus=gpus) == made


def test_the_transports_that_share_memory_are_those_whose_classes_say_so():
    assert {name for name in transports if transports.load(name).shares_memory} == {*SHARE_MEMORY, "simulated"}


@pytest.mark.parametrize(
    "strategy",
    ["", "synchronous(", "synchronous(update='half')", "3", 3, None, "no.such.module:Thing", "math:pi", "os:getcwd"],
)
def test_what_is_no_strategy_is_bad_input(strategy):
    with pytest.raises(BadInput):
        Plan(strategy=strategy)


@pytest.mark.parametrize(
    "mesh", ["data", "data=", "data=x", "data=0", "data=2,data=2", "=2", "data=2;tensor=2", "data=²", 3, {"data": 2}]
)
def test_what_is_no_mesh_is_bad_input(mesh):
    with pytest.raises(BadInput):
        Plan(mesh=mesh)


def test_a_strategy_of_ones_own_is_reached_by_its_module():
    made = strategy_from("manyhands.consistency.synchronous:Synchronous(update='sharded')")
    assert made == Synchronous(update="sharded")


# -- tasks -------------------------------------------------------------------------------------------------------------


def test_all_problems_of_a_task_are_listed_at_once():
    task = Task(batch_size=0, epochs=2, steps=-1, seed=-1, clip=0.0)
    assert [p.asked.split("=")[0] for p in task.problems()] == ["batch_size", "steps", "seed", "epochs", "clip"]
    with pytest.raises(InvalidPlan):
        task.check()


@pytest.mark.parametrize("clip", [0, -1, math.inf, math.nan, "1", True])
def test_a_clip_that_is_no_positive_number_is_a_problem(clip):
    assert Task(clip=clip).problems()


@pytest.mark.parametrize("name", ["batch_size", "epochs", "steps", "seed"])
@pytest.mark.parametrize("value", [-1, 1.0, True, "2"])
def test_a_count_that_is_no_whole_number_is_a_problem(name, value):
    assert [p for p in Task(**{name: value}).problems() if p.asked.startswith(f"{name}=")]


def test_a_task_lasts_one_epoch_unless_told():
    assert Task().length == {"epochs": 1, "steps": None}
    assert Task(steps=7).length == {"epochs": None, "steps": 7}


def test_a_tasks_table_names_what_it_cannot_hold():
    def local(inputs, classes):
        raise NotImplementedError

    assert Task(model=dataclasses.dataclass).as_table()["model"] == "dataclasses:dataclass"
    assert Task(model=local).as_table()["model"] == "<function>"
    with pytest.raises(BadInput, match="live object"):
        from_table(Task, Task(model=local).as_table(), "[task]")
    task = Task(model="cnn", clip=1.0, schedule="cosine", steps=3, seed=4)
    assert from_table(Task, task.as_table(), "[task]").as_table() == task.as_table()
