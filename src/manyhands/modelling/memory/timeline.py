"""A worker's run as blocks that come and go: steps, updates and evaluations, in the order of its plan.

A block is named ``(kind, …)``; kinds are the parts that a `Memory` tells: ``activations``, ``optimizer``, ``buffers``,
``temporaries``.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from manyhands.contract import BUCKET_B
from manyhands.modelling.memory.heap import Heap
from manyhands.modelling.memory.liveness import Blocks, Event, Pass
from manyhands.modelling.memory.rehearsal import Update
from manyhands.partition.pipeline.schedule import Action

#: A step is over.
SETTLED = "settled"
#: Before the second step there is no optimizer state, and in the third a heap has found its form.
STEPS = 3


@dataclass(frozen=True)
class Held:
    """What a worker's heap is asked for, beside what stands there from the beginning to the end."""

    batch_B: int  # a step's share of the set
    #: What it does in a step: of a pipeline its row of the schedule, else forward and backward of each micro-batch.
    actions: Sequence[Action]
    stages: dict[int, Pass]
    #: Of each parameter that it updates, by name in the order of the model: its bytes, and those that it updates.
    learnt_B: dict[str, int]
    update: Update
    updated: float = 1.0  # of the parameters, the part that it updates
    recompute: bool = False
    by_message: bool = False  # stages hand over by messages, into memory of their own
    kept_B: int = 0  # copies of a strategy's, from the start on
    taken_B: int = 0  # of a strategy's and a transport's, in a step
    framed: bool = False  # gradients leave in buckets while backward goes on, each as a copy
    gathered_B: int = 0  # in a step of a sharded model: a unit, and what comes of its gradients
    whole_B: int = 0  # in an evaluation of one
    stashed: int = 0  # versions of the parameters beside the newest
    agreed_B: int = 0  # copies to agree on parameters
    carried_B: int = 0  # what the transport takes for that
    answers: Sequence[Blocks] = ()  # an evaluation: a chunk through each stage that is here
    chunk_B: int = 0


@dataclass
class Replay:
    """What came of it: the most that was live and which kinds that was, and how far a heap had to reach."""

    live_B: int = 0
    parts_B: dict[str, int] = field(default_factory=dict)
    reached_B: int = 0


def replayed(held: Held) -> Replay:
    """Live bytes and a heap's, over some steps and an evaluation after each but the first."""
    heap, found = Heap(), Replay()
    kinds: Counter[str] = Counter()
    sizes: dict[object, tuple[str, int]] = {}
    live = 0
    for block, size in run(held):
        if block == SETTLED:
            heap.settle()
        elif size > 0:
            kind = str(block[0])  # type: ignore[index]
            heap.take(block, size)
            sizes[block] = kind, size
            kinds[kind] += size
            live += size
            if live > found.live_B:
                found.live_B, found.parts_B = live, dict(kinds)
        else:
            heap.give(block)
            kind, size = sizes.pop(block)
            kinds[kind] -= size
            live -= size
    found.reached_B = heap.reached
    return found


def run(held: Held) -> Iterable[Event]:
    """The whole of it."""
    if held.kept_B:
        yield ("buffers", "kept"), held.kept_B
    for version in range(held.stashed):
        yield ("buffers", "stash", version), sum(held.learnt_B.values())
    for k in range(STEPS):
        yield from _step(held, k)
        if k == 0:
            yield SETTLED, 0
        if k:
            yield from _evaluation(held, k)


def _step(held: Held, k: int) -> Iterable[Event]:
    if held.batch_B:
        yield ("activations", "batch", k), held.batch_B
        if k:
            yield ("activations", "batch", k - 1), -held.batch_B
    if held.gathered_B:
        yield ("buffers", "unit", k), held.gathered_B
    frames: list[Event] = []
    last = max((a.micro_batch for a in held.actions), default=0)
    at_once = {a[1:] for a, b in itertools.pairwise(held.actions) if a.kind == "F" and b == a._replace(kind="B")}
    for action in held.actions:
        frame = held.framed and action.kind == "B" and action.micro_batch == last
        again = held.recompute and action[1:] not in at_once
        yield from _action(held, action, k, again=again, frames=frames if frame else None)
    if held.taken_B:
        yield ("buffers", "taken", k), held.taken_B
        yield ("buffers", "taken", k), -held.taken_B
    yield from ((block, -size) for block, size in frames)
    if held.gathered_B:
        yield ("buffers", "unit", k), -held.gathered_B
    yield from _update(held, k)


def _action(held: Held, action: Action, k: int, *, again: bool, frames: list[Event] | None) -> Iterable[Event]:
    stage, at = held.stages[action.stage], (k, action.stage, action.micro_batch)
    given = ("buffers", "given", *at)
    if action.kind == "F":
        if held.by_message and action.stage and stage.inputs_B:
            yield given, stage.inputs_B
        yield from _named(stage.forward, at)
        if again:
            yield from _left(stage.forward, at)
    elif action.kind in "BI":
        returned = ("buffers", "returned", *at)
        if held.by_message and stage.returned_B:
            yield returned, stage.returned_B
        if again:
            yield from _named(stage.forward, at)
        postponed = {b for b, size in stage.forward if size > 0} if action.kind == "I" else set()
        ready = 0
        for block, size in stage.backward:
            if size < 0 and block in postponed:
                continue
            if size:
                yield ("activations", *at, block), size
            elif frames is not None:
                ready += held.learnt_B.get(str(block), 0)
                if ready >= BUCKET_B:
                    frames.append((("buffers", "frame", *at, len(frames)), ready))
                    yield frames[-1]
                    ready = 0
        if ready and frames is not None:
            frames.append((("buffers", "frame", *at, len(frames)), ready))
            yield frames[-1]
        if held.by_message and stage.returned_B:
            yield returned, -stage.returned_B
        if action.kind == "B" and held.by_message and action.stage and stage.inputs_B:
            yield given, -stage.inputs_B
    else:
        yield from _left(stage.forward, at)
        if held.by_message and action.stage and stage.inputs_B:
            yield given, -stage.inputs_B


def _named(blocks: Blocks, at: tuple[int, ...]) -> Iterable[Event]:
    return ((("activations", *at, block), size) for block, size in blocks if size)


def _left(blocks: Blocks, at: tuple[int, ...]) -> Iterable[Event]:
    """What stands after these goes."""
    there: dict[object, int] = {}
    for block, size in blocks:
        if size > 0:
            there[block] = size
        else:
            there.pop(block, None)
    return ((("activations", *at, block), -size) for block, size in there.items())


def _update(held: Held, k: int) -> Iterable[Event]:
    update, part = held.update, held.updated
    sizes = list(held.learnt_B.values()) if update.one_by_one else [sum(held.learnt_B.values())]
    for i, whole in enumerate(sizes):
        size = int(whole * part)
        if k == 0:
            slots = max(round(update.kept), 1)
            if kept := int(size * update.kept / slots):
                for slot in range(slots):
                    yield ("optimizer", i, slot), kept
        if taken := int(size * update.taken):
            yield ("temporaries", k, i), taken
            yield ("temporaries", k, i), -taken


def _evaluation(held: Held, k: int) -> Iterable[Event]:
    if not held.answers:
        return
    if held.agreed_B:
        yield ("buffers", "agreed", k), held.agreed_B
    if held.carried_B:
        yield ("buffers", "carried", k), held.carried_B
        yield ("buffers", "carried", k), -held.carried_B
    for n in range(2):
        if held.whole_B:
            yield ("buffers", "whole", k, n), held.whole_B
        if held.chunk_B:
            yield ("activations", "chunk", k, n), held.chunk_B
            if n:
                yield ("activations", "chunk", k, n - 1), -held.chunk_B
        for s, blocks in enumerate(held.answers):
            yield from _named(blocks, (k, n, s, -1))
        if held.whole_B:
            yield ("buffers", "whole", k, n), -held.whole_B
    if held.chunk_B:
        yield ("activations", "chunk", k, 1), -held.chunk_B
    if held.agreed_B:
        yield ("buffers", "agreed", k), -held.agreed_B
