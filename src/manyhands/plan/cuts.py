"""What goes with a model that is cut, or whose state is shared, and what does not."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from manyhands.catalogue import import_object
from manyhands.checks import is_whole
from manyhands.communication.topology import Mesh
from manyhands.consistency import strategies
from manyhands.contract import Strategy
from manyhands.errors import Problem, UnknownName
from manyhands.partition.pipeline.description import MICRO_BATCHES
from manyhands.partition.pipeline.description import parse as parse_pipeline
from manyhands.partition.pipeline.strategy import PipeDream
from manyhands.partition.tensor import axis_of, check_known, scheme_of
from manyhands.plan.description import Plan
from manyhands.plan.facts import Facts


def micro_batches(plan: Plan, mesh: Mesh) -> int:
    """As the plan says, else one, or enough to fill a pipeline."""
    assert isinstance(plan.strategy, Strategy)
    if plan.micro_batches is not None:
        return plan.micro_batches
    if not plan.strategy.scheduled or mesh["pipeline"] == 1:
        return 1
    said = parse_pipeline(plan.pipeline, plan.strategy).micro_batches
    return MICRO_BATCHES * mesh["pipeline"] if said is None else said


def check_cuts(plan: Plan, mesh: Mesh, facts: Facts, strategy: Strategy, found: list[Problem]) -> None:
    """What does not go with a model that is cut."""
    cut = {axis: mesh[axis] for axis in mesh if axis != "data" and mesh[axis] > 1}
    if is_whole(plan.shard, 2):
        _shared_out(plan, cut, facts, found)
    if axis_of(plan.tensor) == "data":
        _hybrid(plan, mesh, facts, strategy, cut, found)
    elif plan.tensor is not None and "tensor" not in cut:
        found.append(
            Problem(
                f"tensor={plan.tensor!r} on {mesh}",
                "what is cut is divided among the ranks of the mesh's tensor axis.",
                "Say so, e.g. mesh=tensor=2 (--mesh tensor=2), or leave tensor out.",
            )
        )
    for name, value in (("pipeline", plan.pipeline), ("recompute", plan.recompute)):
        if value and "pipeline" not in cut:
            found.append(
                Problem(
                    f"{name}={value!r} on {mesh}",
                    "stages lie on the ranks of the mesh's pipeline axis.",
                    f"Say so, e.g. mesh=pipeline=2 (--mesh pipeline=2), or leave {name} out.",
                )
            )
    if not strategy.scheduled:
        _cuts_itself(plan, cut, strategy, found)
    if "pipeline" in cut or isinstance(strategy, PipeDream):
        parse_pipeline(plan.pipeline, strategy).made(mesh["pipeline"], micro_batches(plan, mesh))
    if not cut:
        return
    scheme = scheme_of(plan.tensor)
    try:
        check_known(scheme)
    except UnknownName as e:
        found.append(Problem(f"tensor={plan.tensor!r}", str(e), "E.g. tensor=auto."))
    if scheme is not None and "pipeline" in cut:
        found.append(
            Problem(
                f"tensor={plan.tensor!r} on {mesh}",
                "a scheme cuts a whole network, and a stage is only some of one.",
                "Leave the pipeline axis out, or cut stages by rules, e.g. tensor=auto.",
            )
        )
    by_stage = strategy.bears_stages and set(cut) == {"pipeline"} and plan.transport not in ("gloo", "nccl")
    if not (strategy.bears_cuts or by_stage):
        found.append(
            Problem(
                f"{strategy} on {mesh}",
                f"{strategy.name} wants the whole model on every worker.",
                "Use synchronous, local, diloco, elastic or gossip; or mesh data alone.",
            )
        )
    if not facts.elementwise:
        found.append(_of_whole_tensors(str(mesh)))


def _cuts_itself(plan: Plan, cut: dict[str, int], strategy: Strategy, found: list[Problem]) -> None:
    """What has no meaning where instances pass from node to node as they come."""
    for name, value in (
        ("pipeline", plan.pipeline),
        ("recompute", plan.recompute),
        ("micro_batches", None if plan.micro_batches == 1 else plan.micro_batches),
    ):
        if value:
            found.append(
                Problem(
                    f"{name}={value!r} with {strategy}",
                    "messages go as they come: there is no schedule of micro-batches.",
                    f"Leave {name} out; samples= of {strategy.name} says how many samples go together.",
                )
            )
    if "tensor" in cut:
        found.append(
            Problem(
                f"tensor={cut['tensor']} with {strategy}",
                "a node lies on one rank.",
                f"Say mesh=pipeline={cut['tensor']} (--mesh pipeline={cut['tensor']}).",
            )
        )


def _hybrid(
    plan: Plan, mesh: Mesh, facts: Facts, strategy: Strategy, cut: Mapping[str, int], found: list[Problem]
) -> None:
    """What does not go with dense layers that are cut along the data axis."""
    said = f"tensor={plan.tensor}"
    if cut:
        found.append(
            Problem(
                f"{said} on {mesh}",
                "the workers that divide the batch divide the dense layers, too.",
                f"Use mesh data alone, e.g. mesh=data={mesh.size} (--mesh data={mesh.size}).",
            )
        )
    if not strategy.averages_gradients:
        found.append(
            Problem(
                f"{said} with {strategy}",
                "all workers pass through the dense layers together, in every step, and average all else.",
                "Use synchronous.",
            )
        )
    if plan.micro_batches not in (None, 1):
        found.append(
            Problem(
                f"{said} with micro_batches={plan.micro_batches}",
                "a share goes through the convolutions at once; the dense layers have the passes of their scheme.",
                "Leave micro_batches out, or use scheme=b or c for smaller passes.",
            )
        )
    if not facts.elementwise and mesh["data"] > 1:
        found.append(_of_whole_tensors(said))
    scheme = scheme_of(plan.tensor)
    if facts.clip and scheme is not None and str(scheme.kwargs.get("updates", "step")) == "each":
        found.append(
            Problem(
                f"{said} with clip",
                "the norm of all gradients is known after the last pass, and dense layers are updated before.",
                "Leave clip out, or use updates=step.",
            )
        )


def _shared_out(plan: Plan, cut: Mapping[str, int], facts: Facts, found: list[Problem]) -> None:
    """What does not go with gradients, or parameters too, that are divided along the data axis."""
    said = f"shard={plan.shard}"
    if cut:
        found.append(
            Problem(
                f"{said} on {plan.mesh}",
                "it divides whole tensors along the data axis, and here they are cut along another already.",
                "Use mesh data alone with shard=2 or 3, or shard=1, which goes with every mesh.",
            )
        )
    elif axis_of(plan.tensor) == "data":
        found.append(
            Problem(
                f"{said} with tensor={plan.tensor}",
                "both divide tensors along the data axis.",
                "Say one of them; shard=1 goes with it.",
            )
        )
    if facts.nodes is not None:
        found.append(
            Problem(
                f"{said} in virtual time",
                "what is exchanged within forward and backward has no price there yet.",
                "Simulate shard=0 or 1; `manyhands plan` tells what shard=2 and 3 hold and send.",
            )
        )


def _of_whole_tensors(what: str) -> Problem:
    return Problem(
        f"{what} with an optimizer that looks at whole tensors",
        "of a model that is cut a worker updates parts of tensors.",
        "Use an optimizer such as sgd, adam, adamw, adagrad or rmsprop.",
    )


def sharded(plan: Plan, found: list[Problem]) -> Strategy:
    """The strategy, sharing what the plan's ``shard`` says."""
    strategy = plan.strategy
    assert isinstance(strategy, Strategy)
    if plan.shard is None:
        return strategy
    if not is_whole(plan.shard, 0) or plan.shard > 3:
        rule = "0 shares nothing, 1 optimizer state, 2 gradients too, 3 parameters too."
        found.append(Problem(f"shard={plan.shard!r}", rule, "Use shard=1, 2 or 3."))
        return strategy
    if isinstance(strategy, import_object(strategies["synchronous"])):
        update = "sharded" if plan.shard else "replicated"
        if strategy.update not in ("auto", update):
            found.append(
                Problem(f"shard={plan.shard} with {strategy}", "they contradict each other.", "Say one of them.")
            )
        made: Strategy = dataclasses.replace(strategy, update=update)
        return made
    if strategy.parameters == "common":
        rule = f"every worker of {strategy.name} updates a slice, so optimizer state is always shared."
        found.append(Problem(f"shard={plan.shard} with {strategy}", rule, "Leave shard out."))
    elif plan.shard:
        found.append(
            Problem(
                f"shard={plan.shard} with {strategy}",
                "sharing optimizer state is part of synchronous."
                if plan.shard == 1
                else "workers that share out gradients or parameters need each other in every step.",
                "Use strategy=synchronous.",
            )
        )
    return strategy
