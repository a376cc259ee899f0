"""Where a pipeline cuts a model: into contiguous stages, by measured cost or at modules that the user names.

Two kinds of models can be cut without a change:

- a *chain*: an `nn.Sequential`, or a class of one that keeps its forward; nested ones count as their children, and an
  `nn.TransformerEncoder` as its layers;
- anything whose forward `torch.fx` can trace. Operations stand in a row there, and a stage hands over whatever later
  ones still need, so residual and longer skip connections may cross stages: what is needed further on passes through.
  Transformers of torch's are opened (see `opening`); a module that cannot be traced is one part.

What is traced is operations, and the rest of a forward is lost: ``torch.no_grad()``, a buffer that counts, Python's own
state. So a chain is not traced where its own boundaries do, and of other models only the forwards around a cut are:
modules without one stay as they are. `rehearsal` finds what is lost there.

The stages hold the model's own modules and parameters, so training them trains the model. Each parameter belongs to one
stage: where two stages use one (tied weights), its gradient would be in two places, and that is refused.
"""

from __future__ import annotations

import builtins
import contextlib
import functools
import inspect
import itertools
import operator
import random
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from manyhands.checks import whole
from manyhands.errors import BadInput, UnknownName
from manyhands.partition.pipeline.opening import OPENED

_REPEATS = 3  # of a timing; the least counts


@dataclass(frozen=True)
class Cut:
    """A model as stages. Prints what went where."""

    stages: tuple[nn.Module, ...]
    #: The names of the modules with which stages begin.
    at: tuple[str, ...]

    def __str__(self) -> str:
        lines = [
            f"stage {k} from {name}: {sum(p.numel() for p in stage.parameters()):,} parameters"
            for k, (name, stage) in enumerate(zip(self.at, self.stages, strict=True))
        ]
        return "\n".join(lines)


def cut(model: nn.Module, at: str | Sequence[str]) -> Cut:
    """``model`` cut before the modules named in ``at``: ``"block2, head"`` makes three stages.

    Raises `BadInput` where the model cannot be cut, has no such module, or stages would share parameters.
    """
    names = [x for x in (n.strip() for n in at.split(",")) if x] if isinstance(at, str) else list(at)
    parts = _parts_from(model, names)
    starts = [0]
    for name in names:
        start = parts.starts.get(name)
        if start is None:
            parts.refuse_inside(name)
            raise UnknownName("module to cut before", name, parts.starts, also=_INSIDE)
        if start <= starts[-1]:
            raise BadInput(
                f'cut="{", ".join(names)}": {name} {"begins the model" if start == 0 else "does not come after"}'
                f"{'' if start == 0 else ' what is named before it'}. Name modules in order, without the first."
            )
        starts.append(start)
    bounds = list(itertools.pairwise([*starts, len(parts)]))
    tied = parts.tied()
    for start in starts[1:]:
        crossing = [t for t in tied if t.first < start <= t.last]
        if crossing:
            _refuse_tied(model, crossing)
    return Cut(tuple(parts.module(lo, hi) for lo, hi in bounds), tuple(parts.names[s] for s in starts))


def cut_points(model: nn.Module, stages: int, sample: Any) -> list[str]:
    """Where to cut ``model`` into ``stages``, so that the slowest takes as little time as it can.

    Each part's forward and backward are timed on ``sample``, the inputs of one micro-batch; parameters, gradients,
    buffers and random numbers stay as they were. Equal times are divided by parameters. Every stage has something to
    train. Timings differ from run to run and from worker to worker: let one find the points, and all cut there.
    """
    whole("pipeline: stages", stages)
    parts = _parts(model, lambda parts: parts.most_stages() >= stages)
    if parts.most_stages() < stages:
        learning = sum(parts.trains())
        if learning >= stages:
            _refuse_tied(model, parts.tied())
        raise BadInput(
            f"{type(model).__name__} into {stages} stages: it has {len(parts)} parts that can be told apart "
            f"({', '.join(parts.names)}), {learning} of them with trainable parameters. A stage needs one such at "
            f"least. Ask for {learning} stages or fewer."
            + "".join(f" {parts.why_one_part(name)}" for name in parts.closed)
        )
    costs = _measure(parts, sample)
    parameters = [sum(p.numel() for p in its) for its in parts.parameters]
    starts = balance(costs, parameters, stages, parts.forbidden(), parts.trains())
    return [parts.names[start] for start in starts[1:]]


def balance(
    costs: Sequence[float],
    parameters: Sequence[int],
    stages: int,
    forbidden: Collection[int] = (),
    trains: Sequence[bool] | None = None,
) -> list[int]:
    """Where each of ``stages`` contiguous runs begins so that the largest sum of ``costs`` is least.

    Among equals the one whose largest sum of ``parameters`` is least. No run begins at a ``forbidden`` index, and each
    has one of those at least that ``trains`` says (None: all).
    """
    total = list(itertools.accumulate(costs, initial=0))
    learning = list(itertools.accumulate([True] * len(costs) if trains is None else trains, initial=0))
    limit = _largest(costs, stages, forbidden, lambda lo, hi: learning[hi] > learning[lo])[0]
    within = limit * (1 + 1e-9)
    return _largest(
        parameters,
        stages,
        forbidden,
        lambda lo, hi: learning[hi] > learning[lo] and total[hi] - total[lo] <= within,
    )[1]


def _largest(
    weights: Sequence[float], stages: int, forbidden: Collection[int], allowed: Any
) -> tuple[float, list[int]]:
    """The least possible largest sum, and where the runs begin; by dynamic programming over the last run."""
    n = len(weights)
    total = list(itertools.accumulate(weights, initial=0))
    best: dict[int, tuple[float, list[int]]] = {0: (0.0, [])}  # by how many are in runs already
    for _ in range(stages):
        longer: dict[int, tuple[float, list[int]]] = {}
        for lo, (largest, starts) in best.items():
            for hi in range(lo + 1, n + 1):
                if (lo == 0 or lo not in forbidden) and allowed(lo, hi):
                    found = max(largest, total[hi] - total[lo])
                    if hi not in longer or found < longer[hi][0]:
                        longer[hi] = found, [*starts, lo]
        best = longer
    return best[n]


# -- parts -------------------------------------------------------------------------------------------------------------

_INSIDE = "A cut lies between modules of a chain or of a forward that torch.fx can trace."


@dataclass(frozen=True)
class _Tied:
    """A parameter that several parts use, from the first of them to the last."""

    names: tuple[str, ...]
    first: int
    last: int


class _Parts(ABC):
    """A model as a row of parts, between any two of which it can be cut."""

    model: nn.Module
    names: list[str]  # of what each part begins with
    starts: dict[str, int]  # every module that begins a part, also those that contain the first one
    closed: Mapping[str, str] = {}  # modules that are parts as they are, and why torch.fx does not trace them

    def __len__(self) -> int:
        return len(self.names)

    @abstractmethod
    def module(self, lo: int, hi: int) -> nn.Module:
        """Parts ``[lo, hi)`` as one module, a tensor or tuple in and out."""

    @functools.cached_property
    def parameters(self) -> list[list[nn.Parameter]]:
        """Of each part."""
        return [list(self.module(k, k + 1).parameters()) for k in range(len(self))]

    def why_one_part(self, name: str) -> str:
        """What to know of a module that has others and cannot be opened, and what would work."""
        kind = type(self.model.get_submodule(name)).__name__
        if name not in self.closed:
            return f"{name} ({kind}) is one part. Cut before it, or before what comes after it."
        return (
            f"{name} ({kind}) is one part: torch.fx cannot trace its forward ({self.closed[name]}). To cut there, make "
            "what it cannot trace a module of its own."
        )

    def refuse_inside(self, name: str) -> None:
        """Raise `BadInput` if the model has a module called so that lies within a part."""
        parents = list(itertools.accumulate(name.split("."), lambda a, b: f"{a}.{b}"))[:-1]
        around = [p for p in parents if p in self.names]
        if around and any(name == own for own, _ in self.model.named_modules()):
            raise BadInput(f"Cannot cut before {name}, which lies in {around[-1]}. {self.why_one_part(around[-1])}")

    def trains(self) -> list[bool]:
        """Which parts have trainable parameters."""
        return [any(p.requires_grad for p in its) for its in self.parameters]

    def forbidden(self) -> set[int]:
        """Parts that no stage may begin with, since the two would share parameters."""
        return {b for t in self.tied() for b in range(t.first + 1, t.last + 1)}

    def most_stages(self) -> int:
        """Into how many stages it can be cut, each with something to train."""
        forbidden, trains = self.forbidden(), self.trains()
        bounds = [*(b for b in range(len(self)) if b not in forbidden), len(self)]
        return sum(any(trains[lo:hi]) for lo, hi in itertools.pairwise(bounds))

    def tied(self) -> list[_Tied]:
        """Parameters that more than one part uses."""
        users: dict[int, list[int]] = {}
        for k in range(len(self)):
            for p in self.parameters[k]:
                users.setdefault(id(p), []).append(k)
        called: dict[int, list[str]] = {}
        for name, p in self.model.named_parameters(remove_duplicate=False):
            called.setdefault(id(p), []).append(name)
        return [_Tied(tuple(called[p]), min(at), max(at)) for p, at in users.items() if len(at) > 1]


def _refuse_tied(model: nn.Module, tied: Sequence[_Tied]) -> None:
    said = "; ".join(" = ".join(t.names) for t in tied)
    raise BadInput(
        f"{type(model).__name__} cannot be cut there: two stages would share parameters ({said}). Each parameter "
        "belongs to one stage. Cut so that all that use it are in one stage, or untie the weights."
    )


def _parts(model: nn.Module, enough: Callable[[_Parts], bool]) -> _Parts:
    """Those of the chain that a model is, if they are ``enough``; otherwise those that tracing finds."""
    if not (_is_chain(model) or type(model) is nn.TransformerEncoder):
        return _Traced(model)
    chain = _Chain(model)
    if not enough(chain) and any(map(_may_be_opened, chain.modules)):
        with contextlib.suppress(BadInput):
            return _Traced(model)
    return chain


def _parts_from(model: nn.Module, names: Sequence[str]) -> _Parts:
    """Parts that begin with ``names``, where there are such; with as little traced as that takes."""

    def begin(parts: _Parts) -> bool:
        return all(name in parts.starts for name in names)

    if not _is_chain(model):
        with contextlib.suppress(BadInput):
            parts = _Traced(model, names)
            if begin(parts):
                return parts
    return _parts(model, begin)


def _may_be_opened(module: nn.Module) -> bool:
    """Whether it is a container of the user's, with a forward of its own."""
    of_others = type(module).__module__.startswith(("torch.", "manyhands.partition."))
    return not of_others and next(module.children(), None) is not None


def _is_chain(module: nn.Module) -> bool:
    hooked = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks
    return isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward and not hooked


class _Chain(_Parts):
    """The children of a sequential, nested ones in place of their parents."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.names, self.starts = [], {}
        self.modules: list[nn.Module] = []
        self._walk(model, "")
        if not self.names:
            raise BadInput(f"{type(model).__name__} is empty; there is nothing to cut.")

    def _walk(self, module: nn.Module, prefix: str) -> None:
        for name, child in module._modules.items():
            if child is None:
                continue
            self.starts[prefix + name] = len(self.names)
            layers = isinstance(child, nn.ModuleList) and type(module) is nn.TransformerEncoder
            if (_is_chain(child) or layers or type(child) is nn.TransformerEncoder) and len(child._modules):
                self._walk(child, f"{prefix}{name}.")
            else:
                self.names.append(prefix + name)
                self.modules.append(child)

    def module(self, lo: int, hi: int) -> nn.Module:
        return _in_mode(nn.Sequential(*self.modules[lo:hi]), self.model)


class _Traced(_Parts):
    """The operations of a traced forward; a part begins where a module's first operation does."""

    def __init__(self, model: nn.Module, into: Sequence[str] | None = None) -> None:
        """Of modules of the user's only those are opened that some of ``into`` lie in; None: all."""
        self.model = model
        graph, self.closed = _trace(model, into)
        self._nodes = [n for n in graph.nodes if n.op not in ("placeholder", "output")]
        self._input = next(n for n in graph.nodes if n.op == "placeholder")
        self._output = next(n for n in graph.nodes if n.op == "output")
        self.names, self.starts = [], {}
        self._first: list[int] = []  # the node with which each part begins
        for at, node in enumerate(self._nodes):
            self._begin(at, node)
        if not self.names:
            raise BadInput(f"{type(model).__name__} cannot be cut: its forward uses no module or parameter.")
        self._first[0] = 0  # what comes before the first module belongs to it
        self._place = {n: at for at, n in enumerate(self._nodes)} | {self._input: -1, self._output: len(self._nodes)}

    def _begin(self, at: int, node: fx.Node) -> None:
        """If ``node`` is the first operation of modules, a part begins here."""
        if node.op not in ("call_module", "get_attr"):
            return
        path = str(node.target).split(".")
        if node.op == "get_attr":
            path = path[:-1]
        new = [p for p in itertools.accumulate(path, lambda a, b: f"{a}.{b}") if p not in self.starts]
        if new:
            self.starts |= dict.fromkeys(new, len(self.names))
            lists = (nn.ModuleList, nn.ModuleDict)
            self.names.append(next(n for n in new if not isinstance(self.model.get_submodule(n), lists)))
            self._first.append(at)

    def module(self, lo: int, hi: int) -> nn.Module:
        """A graph of its own on the model's modules."""
        start = self._first[lo]
        stop = self._first[hi] if hi < len(self) else len(self._nodes)
        graph, new = fx.Graph(), dict[fx.Node, fx.Node]()
        given = self._live(start)
        value = graph.placeholder("value")
        for k, node in enumerate(given):
            new[node] = value if len(given) == 1 else graph.call_function(operator.getitem, (value, k))

        def take(node: fx.Node) -> fx.Node:
            if node not in new:  # fetched or derived again rather than handed over
                assert _is_derived(node) or self._place[node] >= start
                for needed in node.all_input_nodes:
                    take(needed)
                new[node] = graph.node_copy(node, take)
            return new[node]

        for node in self._nodes[start:stop]:
            if not _is_derived(node):  # those come when they are asked for
                take(node)
        if stop == len(self._nodes):
            graph.output(fx.map_arg(self._output.args[0], take))
        else:
            handed = [take(node) for node in self._live(stop)]
            graph.output(handed[0] if len(handed) == 1 else tuple(handed))
        return _in_mode(fx.GraphModule(self.model, graph, type(self.model).__name__), self.model)

    def _live(self, at: int) -> list[fx.Node]:
        """What is computed before node ``at`` and needed from there on, in order."""
        if at == 0:
            return [self._input]
        found: set[fx.Node] = set()
        seen: set[fx.Node] = set()
        stack = [n for user in (*self._nodes[at:], self._output) for n in user.all_input_nodes]
        while stack:
            node = stack.pop()
            if node not in seen:
                seen.add(node)
                if _is_derived(node):
                    stack += node.all_input_nodes
                elif self._place[node] < at:
                    found.add(node)
        return sorted(found, key=self._place.__getitem__)


def _in_mode(stage: nn.Module, model: nn.Module) -> nn.Module:
    """What is new about a stage is in the model's mode; its own modules stay in theirs."""
    own = {id(m) for m in model.modules()}
    for m in stage.modules():
        if id(m) not in own:
            m.training = model.training
    return stage


def _is_derived(node: fx.Node) -> bool:
    """Whether a stage gets it anew: a parameter or buffer, or a number made of shapes."""
    if node.op == "get_attr" or (node.op == "call_method" and node.target in ("size", "dim")):
        return True
    if node.op != "call_function":
        return False
    if node.target is getattr:
        return node.args[1] in ("shape", "device", "dtype")
    if node.target is len:
        return True
    arithmetic = getattr(node.target, "__module__", "") == "_operator"
    return (
        arithmetic
        and bool(node.all_input_nodes)
        and all(_is_derived(n) and n.op != "get_attr" for n in node.all_input_nodes)
    )


def _trace(model: nn.Module, into: Sequence[str] | None) -> tuple[fx.Graph, dict[str, str]]:
    """The operations of a forward, the same in training and evaluation; and what modules are left whole, and why.

    What a forward does to buffers and attributes while it is traced is undone.
    """
    name = type(model).__name__
    fixed = {}
    parameters = list(inspect.signature(model.forward).parameters.values())
    for p in parameters[1:]:
        if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD):
            raise BadInput(f"{name} cannot be cut: its forward takes {p.name} beside the inputs. {_CURE}")
        if p.default is not p.empty:
            fixed[p.name] = p.default
    whole: dict[str, str] = {}  # what cannot be traced, or changes between training and evaluation: parts as they are
    while True:
        graphs = []
        tracer = _Tracer(whole, into)
        try:
            for mode in (False, True):
                tracer = _Tracer(whole, into)
                with kept(model), _len_noted():
                    model.train(mode)
                    graphs.append(_without_checks(tracer.trace(model, concrete_args=fixed or None)))
        except Exception as e:
            if tracer.failed:
                whole[tracer.failed] = str(e).partition("\n")[0]
                continue
            reason = str(e).partition("\n")[0]
            raise BadInput(f"{name} cannot be cut: torch.fx cannot trace its forward ({reason}). {_CURE}") from e
        differing = _difference(*graphs)
        if differing is None:
            return graphs[1], whole
        if not differing[1]:
            raise BadInput(
                f"{name} cannot be cut: its forward does something else in training than in evaluation, outside of its "
                f"modules ({differing[0]}). Use a module for it, such as nn.Dropout for functional.dropout."
            )
        whole[differing[1]] = f"it does something else in training than in evaluation: {differing[0]}"


class _Tracer(fx.Tracer):
    """Takes some modules as they are, and notes in which module it came to grief."""

    def __init__(self, whole: Collection[str], into: Sequence[str] | None) -> None:
        super().__init__()
        self._whole, self._into = whole, into
        self.failed = ""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """torch's own, the layers of a cut, what was asked for, and what no cut lies in."""
        if self._into is not None and not any(name.startswith(f"{module_qualified_name}.") for name in self._into):
            return True
        if module_qualified_name in self._whole or type(m) in OPENED:
            return module_qualified_name in self._whole
        return type(m).__module__.startswith("manyhands.partition.") or super().is_leaf_module(m, module_qualified_name)

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        """As torch does it, but that its containers are opened; the innermost module that fails is the one to blame."""
        if type(m) in OPENED:
            forward = functools.partial(OPENED[type(m)], m)
        try:
            return super().call_module(m, forward, args, kwargs)
        except Exception:
            self.failed = self.failed or self.path_of_module(m)
            raise


@contextlib.contextmanager
def _len_noted() -> Iterator[None]:
    """``len`` of what is traced is an operation: Python wants a whole number of it, which torch.fx does not have."""
    plain = builtins.len

    def noted(x: Any) -> Any:
        return x.tracer.create_proxy("call_function", plain, (x,), {}) if isinstance(x, fx.Proxy) else plain(x)

    builtins.len = noted
    try:
        yield
    finally:
        builtins.len = plain


def _difference(evaluating: fx.Graph, training: fx.Graph) -> tuple[str, str] | None:
    """Where two graphs of one model part: what is done, and within which module ("": in the model's own forward)."""
    pairs = itertools.zip_longest(evaluating.nodes, training.nodes)
    for a, b in pairs:
        if a is None or b is None or _said(a) != _said(b):
            node = b if b is not None else a
            inside = list(node.meta.get("nn_module_stack", {}))
            return _name(node.target), inside[-1] if inside else ""
    return None


def _said(node: fx.Node) -> tuple[str, str, str, str]:
    return node.op, _name(node.target), str(node.args), str(node.kwargs)


def _name(target: Any) -> str:
    return str(getattr(target, "__name__", target))


def _without_checks(graph: fx.Graph) -> fx.Graph:
    """Arguments that were fixed are not asked for, and what checks that they have their defaults goes, too."""

    def erase(node: fx.Node) -> None:
        for user in list(node.users):
            erase(user)
        graph.erase_node(node)

    for argument in [n for n in graph.nodes if n.op == "placeholder"][1:]:
        erase(argument)
    return graph


_CURE = (
    "A model that can be cut is an nn.Sequential, or has a forward of one argument without branches that depend on its "
    "values."
)


# -- timing ------------------------------------------------------------------------------------------------------------


def _measure(parts: _Parts, sample: Any) -> list[float]:
    """Seconds of forward and backward of each part on what the one before returns for ``sample``."""
    result = []
    given = sample
    with kept(parts.model):
        for k in range(len(parts)):
            module = parts.module(k, k + 1)
            each = [_once(module, given, parts.names[k]) for _ in range(_REPEATS)]
            result.append(min(seconds for seconds, _ in each))
            given = each[-1][1]
    return result


def _once(module: nn.Module, given: Any, name: str) -> tuple[float, Any]:
    leaves = torch.utils._pytree.tree_map(_leaf, given)
    t0 = time.perf_counter()
    try:
        outputs = module(leaves)
    except Exception as e:
        raise BadInput(f"timing {name} on the sample failed: {type(e).__name__}: {e}") from e
    ends = [x for x in torch.utils._pytree.tree_leaves(outputs) if isinstance(x, Tensor) and x.requires_grad]
    wanted = [x for x in torch.utils._pytree.tree_leaves(leaves) if isinstance(x, Tensor) and x.requires_grad]
    wanted += [p for p in module.parameters() if p.requires_grad]
    if ends and wanted:
        torch.autograd.grad(ends, wanted, [torch.ones_like(x) for x in ends], allow_unused=True)
    for device in _cuda(outputs):
        torch.cuda.synchronize(device)
    seconds = time.perf_counter() - t0
    return seconds, torch.utils._pytree.tree_map(lambda x: x.detach() if isinstance(x, Tensor) else x, outputs)


def _leaf(x: Any) -> Any:
    if not isinstance(x, Tensor) or not x.is_floating_point():
        return x
    # Not the leaf itself: a module may overwrite what it is given.
    return x.detach().clone().requires_grad_().clone()


@contextlib.contextmanager
def kept(model: nn.Module) -> Iterator[None]:
    """Whatever forwards and backwards may change is as it was when this is left.

    That is buffers, gradients, modes and other attributes of modules, and the random numbers of torch and Python.
    """
    buffers = [(b, b.clone()) for b in model.buffers()]
    gradients = [(p, p.grad) for p in model.parameters()]
    attributes = [(m, dict(vars(m)), dict(m._buffers)) for m in model.modules()]
    drawn = random.getstate()
    try:
        with torch.random.fork_rng(devices=_cuda([*model.parameters()])):
            yield
    finally:
        random.setstate(drawn)
        for module, its, own in attributes:
            # torch.fx puts there what it took for constants, and builds stages of it.
            its |= {name: x for name, x in vars(module).items() if name.startswith("_tensor_constant")}
            vars(module).clear()
            vars(module).update(its)
            module._buffers.update(own)
        for p, gradient in gradients:
            p.grad = gradient
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)


def _cuda(tree: Any) -> list[int]:
    tensors = (x for x in torch.utils._pytree.tree_leaves(tree) if isinstance(x, Tensor))
    return sorted({x.get_device() for x in tensors if x.device.type == "cuda"})
