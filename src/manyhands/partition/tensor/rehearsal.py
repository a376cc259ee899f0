"""A forward pass of the cut model on one process, by shapes: does it fit, and where does it draw random numbers?

Sums and joins over the ranks have the shapes that they would have, so whatever is wrong with a cut shows before any
process is started. With one rank's model and the next one's it is seen which dropout works on a part (its input is
another than in the whole model) and whether the ranks would draw a different amount of random numbers, upon which all
that comes later would differ between them.
"""

from __future__ import annotations

import copy
import functools
import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from manyhands.calling import call
from manyhands.communication.communicator import DONE, Communicator, Received, Work
from manyhands.communication.topology import Mesh
from manyhands.communication.transports.simulated import SimulatedWorld
from manyhands.errors import BadInput
from manyhands.grammar import Call
from manyhands.partition.tensor import ALONG_DATA, check_known, scheme_of, schemes
from manyhands.partition.tensor.attention import CutAttention
from manyhands.partition.tensor.cut import DRAWS, Cut, cut, inputs_of_draws, own_randomness
from manyhands.partition.tensor.rules import Rule, found_but, matched, parse, without


class Rehearsal(Communicator):
    """A rank without peers: every operation returns at once, and what others would have sent is zero."""

    def over(self, axes: frozenset[str]) -> Communicator:
        """The ranks that would be met along ``axes``; what is counted there is counted here."""
        along = Mesh((axis, self.mesh[axis]) for axis in self.mesh if axis in axes)
        index = 0
        for axis, at in self.mesh.coordinates(self.rank).items():
            if axis in axes:
                index = index * self.mesh[axis] + at
        group = Rehearsal(index, along.size)
        group.context, group.mesh = self.context, along
        return group

    def _all_reduce(self, x: Tensor, weight: float | None) -> Work:
        return DONE

    def _reduce_scatter(self, x: Tensor, weight: float | None) -> None:
        return

    def _all_gather(self, x: Tensor, bounds: Sequence[tuple[int, int]]) -> Work:
        return DONE

    def _all_to_all(self, x: Tensor) -> Tensor:
        return x.clone()

    def _broadcast(self, x: Tensor, root: int) -> Work:
        return DONE

    def _barrier(self) -> None:
        return

    def _send(self, x: Tensor, to: int, tag: int) -> Work:
        return DONE

    def _recv(self, like: Tensor, frm: int | None, tag: int) -> Received:
        return Received(self.rank if frm is None else frm, like)

    def _split(self, color: int) -> Communicator:
        return Rehearsal(self.rank, self.size)

    def _make_groups(self) -> dict[frozenset[str], Communicator]:
        mesh = self.mesh
        made: dict[frozenset[str], Communicator] = {}
        for count in range(1, len(list(mesh)) + 1):
            for axes in map(frozenset, itertools.combinations(mesh, count)):
                ranks = next(ranks for ranks in mesh.groups(axes) if self.rank in ranks)
                made[axes] = Rehearsal(ranks.index(self.rank), len(ranks))
        return made

    def _alone(self) -> Communicator:
        return Rehearsal(0, 1)


#: What cuts a model in place, for one rank of a group.
Way = Callable[[nn.Module, Communicator], Cut]


@dataclass(frozen=True)
class Rehearsed:
    """How a model is going to be cut."""

    rules: dict[str, Rule]  # none where a scheme cuts the network
    parts: list[str]  # the dropouts that work on a part
    done: dict[str, str]  # by module, what becomes of it on the first rank
    way: Way
    left: dict[str, str] = field(default_factory=dict)  # what auto has found and left whole, and why

    @property
    def said(self) -> str:
        """``auto`` as it was decided, for those who are to cut alike and check nothing."""
        return ", ".join(["auto", *(f"{path}=whole" for path in self.left)])

    def cut(self, model: nn.Module, group: Communicator) -> Cut:
        """Cut such a model in place, with random numbers of a rank's own where it has a part. Collective."""
        found = self.way(model, group)
        for path in self.parts:
            own_randomness(model.get_submodule(path), group.rank)
        return found

    def __str__(self) -> str:
        """One entry for all modules whose paths differ by numbers only."""
        alike: dict[tuple[str, str], list[str]] = {}
        for path, said in self.done.items():
            alike.setdefault((re.sub(r"\d+", "*", path), said), []).append(path or "the model")
        told = [
            f"{paths[0]} {said}" if len(paths) == 1 else f"{path} {said} ({len(paths)} of them)"
            for (path, said), paths in alike.items()
        ]
        return "; ".join([*told, *(f"left whole: {path}, as {why}" for path, why in self.left.items())])


def rehearsed(model: nn.Module, said: str | None, size: int, inputs: Any, *, checked: bool = False) -> Rehearsed:
    """How ``model`` can be cut among ``size`` ranks.

    ``said`` is the plan's ``tensor`` (None: auto), ``inputs`` a batch of one sample. What ``auto`` finds and does not
    fit is left whole; what the user has said and does not fit is `BadInput`. The model is left as it is. ``checked``:
    all ranks' parts also compute an output together, which must be that of the whole model: takes so many models'
    memory, in float64, and two forward passes.
    """
    scheme = scheme_of(said)
    check_known(scheme)
    if scheme is not None:
        return _rehearsed_scheme(model, scheme, size, inputs)
    text = (said or "auto").strip()
    automatic = text == "auto" or text.startswith("auto,")
    if not text or (said is not None and not said.strip()):
        raise BadInput("tensor='' says nothing: it is auto, rules such as 'up=column, down=row', or a scheme.")
    rules = found_but(model, size, text.removeprefix("auto").lstrip(", ")) if automatic else matched(model, parse(text))
    left: dict[str, str] = {}
    while True:
        if not rules:
            raise BadInput(
                f"tensor={said or 'auto'}: nothing in {type(model).__name__} is recognised that could be cut among "
                f"{size} ranks. Name the layers, e.g. tensor='first=column, second=row' (--tensor), or cut another "
                "axis: mesh data or pipeline."
            )
        try:
            way: Way = functools.partial(_by_rules, rules)
            how = Rehearsed(rules, *_fits(model, way, rules, size, inputs), way, left)
            wrong = [] if not checked else _wrong(model, rules, size, inputs)
            if not wrong:
                return how
            if not automatic or "" in wrong:
                raise BadInput(
                    f"tensor={said or 'auto'}: the cut model runs, but computes something else than the whole one. "
                    "What lies between a column layer and its row layer may only work on single elements (a norm, "
                    "softmax or flip over the cut dim does not), and heads are cut by projections that are columns of "
                    "whole heads. Cut other layers, or gather: column(gathered=True)."
                )
            for path in wrong:
                left[path] = "what its forward does between its layers is not element by element"
                rules = without(rules, path)
        except _DoesNotFit as e:
            within = next((p for p in _outwards(e.path) if any(_in(r, p) for r in rules)), None)
            if not automatic or within is None:
                raise BadInput(
                    f"tensor={said or 'auto'}: the cut model does not run: {e.path or type(model).__name__} says "
                    f"{e.error}. {_advice(model, rules, e.path)}"
                ) from None
            left[within] = f"its code takes the size of a layer for granted ({e.error.partition(chr(10))[0]})"
            rules = without(rules, within)


def _wrong(model: nn.Module, rules: Mapping[str, Rule], size: int, inputs: Any) -> list[str]:
    """The modules whose layers, when they are cut, make the model compute something else; "" where none is to blame."""
    if _computes_the_same(model, rules, size, inputs):
        return []
    parents = dict.fromkeys(path.rpartition(".")[0] for path in rules)
    blamed = [
        parent
        for parent in parents
        if not _computes_the_same(
            model, {p: r for p, r in rules.items() if p == parent or p.rpartition(".")[0] == parent}, size, inputs
        )
    ]
    return blamed or [""]


def _computes_the_same(model: nn.Module, rules: Mapping[str, Rule], size: int, inputs: Any) -> bool:
    """Whether all ranks' parts together give the whole model's output, dropout off."""
    whole = copy.deepcopy(model).eval()
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for p in whole.parameters():  # where all is zero at the start, everything would be the same
            if p.is_floating_point():
                p.add_(torch.randn_like(p) * 0.02)
        given, tolerance = inputs, 1e-3
        try:
            double = copy.deepcopy(whole).double()
            precise = torch.utils._pytree.tree_map(_in_double, inputs)
            expected = double(precise)
            whole, given, tolerance = double, precise, 1e-7
        except Exception:  # something in it wants float32
            expected = whole(inputs)

        def run(comm: Communicator) -> Any:
            mine = copy.deepcopy(whole)
            cut(mine, rules, comm)
            with torch.no_grad():
                return mine.eval()(given)

        answers = SimulatedWorld(size).run(run)
    return all(_close(expected, answer, tolerance) for answer in answers)


def _in_double(x: Any) -> Any:
    return x.double() if isinstance(x, Tensor) and x.is_floating_point() else x


def _close(expected: Any, found: Any, tolerance: float) -> bool:
    pairs = zip(torch.utils._pytree.tree_leaves(expected), torch.utils._pytree.tree_leaves(found), strict=True)
    for a, b in pairs:
        if isinstance(a, Tensor) and a.is_floating_point() and a.numel():
            scale = float(a.abs().max()) or 1.0
            if not float((a - b).abs().max()) <= tolerance * scale:
                return False
    return True


def _by_rules(rules: Mapping[str, Rule], model: nn.Module, group: Communicator) -> Cut:
    return cut(model, rules, group)


def _rehearsed_scheme(model: nn.Module, said: Call, size: int, inputs: Any) -> Rehearsed:
    """A scheme says itself what it cannot cut; what it finds while it computes has the module beside it."""
    scheme = schemes.load(said.name)

    def way(model: nn.Module, group: Communicator) -> Cut:
        made = call("tensor scheme", said.name, scheme, (model, group, inputs, *said.args), said.kwargs)
        assert isinstance(made, Cut)
        return made

    try:
        return Rehearsed({}, *_fits(model, way, {}, size, inputs, alike=said.name not in ALONG_DATA), way)
    except _DoesNotFit as e:
        raise BadInput(
            f"tensor={said}: the cut model does not run: {e.path or type(model).__name__} says {e.error}. Cut it by "
            "rules, e.g. tensor='first=column, second=row', or by auto."
        ) from None


def _advice(model: nn.Module, rules: Mapping[str, Rule], path: str) -> str:
    """What would work, where a cut model stopped at ``path``."""
    stopped = model.get_submodule(path)
    if isinstance(stopped, nn.modules.batchnorm._BatchNorm):
        return f"It gets a part of the channels there, so its own are cut alike: {path}=channels."
    kinds = {rule.kind for rule in rules.values() if not rule.gathered}
    if "column" in kinds and "row" not in kinds:
        return (
            "After a column layer each rank has a part of the outputs: the next layer takes parts (…=row), or the "
            "outputs are gathered: …=column(gathered=True)."
        )
    return (
        "Its code takes the size of a layer that is cut for granted: cut other layers, name that module whole "
        "(…=whole), or give it sizes it reads from its layers."
    )


class _DoesNotFit(Exception):
    def __init__(self, path: str, error: Exception) -> None:
        super().__init__(path)
        self.path, self.error = path, f"{type(error).__name__}: {error}"


def _outwards(path: str) -> list[str]:
    parts = path.split(".")
    return [".".join(parts[:n]) for n in range(len(parts), 0, -1)]


def _in(path: str, within: str) -> bool:
    return path == within or path.startswith(f"{within}.")


def _fits(
    model: nn.Module, way: Way, rules: Mapping[str, Rule], size: int, inputs: Any, *, alike: bool = True
) -> tuple[list[str], dict[str, str]]:
    """The dropouts that work on a part, and what is done; raises `_DoesNotFit`.

    Where the ranks do not draw ``alike`` anyway, no dropout needs anything.
    """
    shapes, _, output = _forwarded(_double(model), inputs)
    ends: list[Tensor] = []
    first: dict[str, str] = {}
    for rank in (0, size - 1):
        mine = _double(model)
        done = way(mine, Rehearsal(rank, size)).done
        first = done if rank == 0 else first
        own, _, own_output = _forwarded(mine, inputs)
        if own_output != output:
            raise _DoesNotFit("", ValueError(f"its output has shape {own_output}, and {output} when it is whole"))
        parts = [path for path, shape in shapes.items() if alike and own.get(path) != shape]
        parts += [path for path, rule in rules.items() if rule.kind == "heads" and _draws(mine, path, parts, inputs)]
        for path in parts:
            own_randomness(mine.get_submodule(path), rank)
        ends.append(_forwarded(mine, inputs)[1])
    if alike and not torch.equal(*ends):
        raise BadInput(
            f"The first and the last of {size} ranks would draw unlike amounts of random numbers in a forward pass "
            "(dropout on parts of unlike size), and all that they draw later would differ. Use nn.Dropout modules, "
            "parts of equal size, or no dropout."
        )
    return parts, first


def _double(model: nn.Module) -> nn.Module:
    """The same model in the same memory of its parameters, which nobody writes to; of a large one two are too many."""
    same: dict[int, Any] = {id(p): nn.Parameter(p.detach(), p.requires_grad) for p in model.parameters()}
    return copy.deepcopy(model, same)


def _draws(model: nn.Module, path: str, parts: Sequence[str], inputs: Any) -> bool:
    """Whether an attention of the user's draws for itself, as `scaled_dot_product_attention` does for its heads.

    One that also has a dropout on what is whole is left alone: what it draws for its heads is then alike on all ranks.
    """
    module = model.get_submodule(path)
    mixed = any(isinstance(m, DRAWS) and m.p > 0 and f"{path}.{n}" not in parts for n, m in module.named_modules())
    if isinstance(module, CutAttention) or mixed:
        return False
    drawn: list[Tensor] = []
    note: Any = lambda *_: drawn.append(torch.get_rng_state())  # noqa: E731
    hooks = [module.register_forward_pre_hook(note), module.register_forward_hook(note)]
    try:
        _forwarded(model, inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return len(drawn) > 1 and not torch.equal(drawn[0], drawn[1])


def _forwarded(model: nn.Module, inputs: Any) -> tuple[dict[str, tuple[int, ...]], Tensor, Any]:
    """Shapes that dropouts get, the state of the generator afterwards, and the output's shape."""
    model.train()
    for module in model.modules():  # one sample has no variance
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()
    calls: list[str] = []
    hooks = [
        m.register_forward_pre_hook(lambda _m, _i, path=path: calls.append(path)) for path, m in model.named_modules()
    ]
    hooks += [m.register_forward_hook(lambda _m, _i, _o: calls.pop() and None) for _, m in model.named_modules()]
    before = torch.get_rng_state()
    try:
        with torch.no_grad(), inputs_of_draws(model) as shapes:
            outputs = model(inputs)
        return shapes, torch.get_rng_state(), _shape(outputs)
    except Exception as e:
        raise _DoesNotFit(calls[-1] if calls else "", e) from e
    finally:
        torch.set_rng_state(before)
        for hook in hooks:
            hook.remove()


def _shape(outputs: Any) -> Any:
    return torch.utils._pytree.tree_map(lambda t: tuple(t.shape) if isinstance(t, Tensor) else t, outputs)
