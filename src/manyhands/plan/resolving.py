"""Every ``auto`` decided, and every problem found, before a process starts."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

from manyhands.checks import is_positive, is_whole
from manyhands.communication import transports
from manyhands.communication.topology import Mesh
from manyhands.contract import Setting, Strategy
from manyhands.errors import InvalidPlan, Problem, UnknownName
from manyhands.plan.compressing import compressed
from manyhands.plan.cuts import check_cuts, micro_batches, sharded
from manyhands.plan.description import Plan
from manyhands.plan.facts import ALLOCATORS, BUFFER_POLICIES, DEVICES, ONE_SIDED, PRECISIONS, SHARE_MEMORY, Facts
from manyhands.plan.placing import device_for, mesh_for, transport_for, workers_for


@dataclass(frozen=True)
class Resolved:
    """A plan with every ``auto`` decided, and what the user should know about it (each said once)."""

    plan: Plan
    setting: Setting
    notes: tuple[str, ...] = field(default=())


def resolve(plan: Plan, facts: Facts) -> Resolved:
    """Decide every ``auto`` and raise `InvalidPlan` with *all* problems (`UnknownName` if the only one is a name)."""
    found: list[Problem] = []
    notes: list[str] = []
    workers = workers_for(plan, facts, found)
    unknown = _unknown_names(plan, found)
    device = device_for(plan, facts, workers, found, notes)
    transport = transport_for(plan, facts, workers, device, found, notes)
    mesh = mesh_for(plan, workers, found)
    _numbers(plan, found)
    if facts.optimizer_problem is not None:
        found.append(facts.optimizer_problem)
    replicas = mesh["data"]
    setting = Setting(
        workers=replicas,
        transport=transport,
        shares_memory=transport in SHARE_MEMORY and facts.nodes in (None, 1),
        elementwise=facts.elementwise,
        stateless=facts.stateless,
        clip=facts.clip,
        served=facts.served,
        one_sided=transport in ONE_SIDED or facts.nodes is not None,
    )
    strategy = compressed(plan, sharded(plan, found), device, found)
    found.extend(strategy.problems(setting))
    check_cuts(plan, mesh, facts, strategy, found)
    if plan.precision == "flexpoint":
        _whole_tensors(plan, mesh, strategy, found)
    if len(found) == len(unknown) == 1:
        raise unknown[0]
    if found:
        raise InvalidPlan(found)
    decided = strategy.resolve(setting)
    if not facts.elementwise and workers > 1:
        notes.append(
            "the optimizer looks at whole tensors, so every worker updates all parameters (no sharing of its state)"
        )
    of_whom = "workers" if replicas == workers else "replicas of the model"
    if facts.batch_size < replicas and not strategy.whole_batch:
        notes.append(
            f"a batch of {facts.batch_size} over {replicas} {of_whom} leaves {replicas - facts.batch_size} of them "
            "idle in every step"
        )
    elif facts.batch_size % replicas and not strategy.whole_batch:
        notes.append(
            f"a batch of {facts.batch_size} does not divide by {replicas} {of_whom}: shares differ by one sample and "
            "are weighted"
        )
    threads = plan.threads or max(1, facts.cores // workers)
    if workers * threads > facts.cores and facts.launched is None and facts.nodes is None:
        notes.append(f"{workers} workers × {threads} threads on {facts.cores} cores: right, but not faster")
    if transport == "threads" and workers > 1:
        notes.append(
            "threads share one random number generator and one interpreter lock: results repeat only for models that "
            "draw no random numbers (no dropout), and Python's share of a step is not parallel"
        )
    made = dataclasses.replace(
        plan,
        strategy=decided,
        mesh=mesh,
        workers=workers,
        threads=threads,
        transport=transport,
        device=device,
        micro_batches=micro_batches(plan, mesh),
    )
    return Resolved(made, setting, tuple(notes))


def _whole_tensors(plan: Plan, mesh: Mesh, strategy: Strategy, found: list[Problem]) -> None:
    cut = any(mesh[axis] > 1 for axis in mesh if axis != "data") or plan.tensor is not None or plan.pipeline is not None
    if cut or is_whole(plan.shard, 2) or not strategy.identical:
        found.append(
            Problem(
                f"precision='flexpoint' with strategy={strategy.name} on {mesh}",
                "every worker rounds whole tensors of weights, and all of them alike, between two steps.",
                "Use strategy=synchronous and a mesh of data alone, or precision=float32.",
            )
        )


def _unknown_names(plan: Plan, found: list[Problem]) -> list[UnknownName]:
    unknown = []
    for kind, name, choices in (
        ("device", plan.device, DEVICES),
        ("transport", plan.transport, (*transports, "auto")),
    ):
        if name not in choices:
            unknown.append(UnknownName(kind, str(name), choices))
            found.append(Problem(f"{kind}={name!r}", str(unknown[-1]), f"E.g. {kind}=auto."))
    return unknown


def _numbers(plan: Plan, found: list[Problem]) -> None:
    for name, at_least in (("micro_batches", 1), ("threads", 0)):
        value = getattr(plan, name)
        if value is not None and not is_whole(value, at_least):
            found.append(
                Problem(
                    f"{name}={value!r}", f"{name} is a whole number from {at_least}.", f"E.g. {name}={at_least + 1}."
                )
            )
    if not is_positive(plan.timeout_s):
        found.append(
            Problem(
                f"timeout_s={plan.timeout_s!r}", "a deadline is a positive number of seconds.", "E.g. timeout_s=60."
            )
        )
    for name, choices in (("buffers", BUFFER_POLICIES), ("precision", PRECISIONS), ("allocator", ALLOCATORS)):
        value = getattr(plan, name)
        if value not in choices:
            found.append(
                Problem(f"{name}={value!r}", f"{name} is one of {', '.join(choices)}.", f"E.g. {name}={choices[0]!r}.")
            )
