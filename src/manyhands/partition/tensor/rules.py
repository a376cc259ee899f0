"""Which modules are cut along the tensor axis, and how: said by the user, or found in the shape of the model.

    mlp.up=column, mlp.down=row, *.attention=heads

A pattern names modules by the end of their path, ``*`` standing for any part of one: ``mlp.up`` is ``blocks.0.mlp.up``
and all its likes. What is done is one of

    column[(gathered=, groups=, unit=)]   outputs; ``groups``: as many matrices stacked in one are cut each;
                                          ``unit``: never within so many outputs (a head's width)
    row[(unit=)]                          inputs
    channels                              a norm's channels, between a column and a row convolution
    heads                                 `nn.MultiheadAttention`, or a module of projections that are cut: its count of
                                          heads is divided
    whole                                 nothing: takes a module out of what is found

``auto`` is what `found` finds: multi-head attention, projections and feed-forward parts by their customary names, and
in a `nn.Sequential` pairs of layers with only element by element functions between them.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import nn

from manyhands.checks import is_whole
from manyhands.errors import BadInput, UnknownName
from manyhands.grammar import format_call, parse_call
from manyhands.partition.tensor.layers import CONVOLUTIONS, NORMS

KINDS = ("column", "row", "channels", "heads", "whole")


@dataclass(frozen=True)
class Rule:
    """What is done to a module."""

    kind: str
    gathered: bool = False
    groups: int = 1
    unit: int = 1

    def __str__(self) -> str:
        said = {k: getattr(self, k) for k in ("gathered", "groups", "unit") if getattr(self, k) != getattr(Rule, k)}
        return format_call(self.kind, **said)


def parse(text: str) -> dict[str, Rule]:
    """``pattern=rule, …`` in the order given; raises `BadInput`."""
    rules = {}
    for part in _parts(text):
        pattern, equals, said = part.partition("=")
        if not equals or not pattern.strip() or not said.strip():
            raise BadInput(f"tensor {part!r}: the form is pattern=rule, e.g. mlp.up=column, mlp.down=row; or auto.")
        call = parse_call(said, kind="tensor rule")
        if call.name not in KINDS:
            raise UnknownName("tensor rule", call.name, KINDS)
        try:
            rule = Rule(call.name, *call.args, **call.kwargs)
        except TypeError:
            raise BadInput(f"tensor {part!r}: {call.name} takes gathered=, groups= and unit=.") from None
        if not (is_whole(rule.groups, 1) and is_whole(rule.unit, 1)):
            raise BadInput(f"tensor {part!r}: groups and unit are whole numbers from 1.")
        rules[pattern.strip()] = rule
    return rules


def _parts(text: str) -> Iterator[str]:
    """Cut at commas that stand in no bracket."""
    depth, start = 0, 0
    for i, c in enumerate(text):
        depth += (c == "(") - (c == ")")
        if c == "," and depth == 0:
            yield text[start:i].strip()
            start = i + 1
    if text[start:].strip():
        yield text[start:].strip()


def matched(model: nn.Module, rules: Mapping[str, Rule]) -> dict[str, Rule]:
    """The rule of each module that some pattern names, the last that does; a pattern that names none is refused."""
    result: dict[str, Rule] = {}
    for pattern, rule in rules.items():
        result |= dict.fromkeys(named(model, pattern, rule), rule)
    return {path: rule for path, rule in result.items() if rule.kind != "whole"}


def named(model: nn.Module, pattern: str, rule: Rule) -> list[str]:
    """The modules that ``pattern`` names; raises `BadInput` where there is none."""
    paths = [path for path, _ in model.named_modules() if path]
    result = [
        p for p in paths if any(fnmatch.fnmatchcase(f".{p}", x) for x in (f".{pattern}", f"*.{pattern}", pattern))
    ]
    if not result:
        raise BadInput(
            f"tensor {pattern}={rule}: no module is called so. The model has {_some(paths)}; * stands for any part."
        )
    return result


def _some(paths: Sequence[str], most: int = 12) -> str:
    return ", ".join(paths[:most]) + (f" and {len(paths) - most} more" if len(paths) > most else "")


# -- what is found -------------------------------------------------------------------------------------------------

#: Customary names of an attention's projections, of its output, and of a feed-forward part's two or three layers.
PROJECTIONS = (
    ("query", "key", "value"),
    ("q", "k", "v"),
    ("q_proj", "k_proj", "v_proj"),
    ("wq", "wk", "wv"),
    ("to_q", "to_k", "to_v"),
)
FUSED = ("qkv", "qkv_proj", "in_proj", "to_qkv", "Wqkv", "c_attn")
OUTPUTS = ("out", "out_proj", "o_proj", "proj", "wo", "to_out", "dense", "c_proj", "output")
UP_AND_DOWN = (
    (("up", "gate"), "down"),
    (("up_proj", "gate_proj"), "down_proj"),
    (("fc1",), "fc2"),
    (("c_fc",), "c_proj"),
    (("linear1",), "linear2"),
    (("w1", "w3"), "w2"),
    (("lin1",), "lin2"),
)
#: Attributes that say how many heads there are, or how wide one is.
HEADS = ("heads", "n_heads", "num_heads", "n_head", "nhead", "num_attention_heads", "num_key_value_heads")
HEAD_WIDTHS = ("head_width", "head_dim", "head_size", "attention_head_size", "d_head")

#: Functions of single elements, which a cut in between does not disturb; pooling and norms work channel by channel.
ELEMENTWISE = (
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish, nn.Softplus, nn.Hardswish),
    *(nn.Tanh, nn.Sigmoid, nn.Hardtanh, nn.Hardsigmoid, nn.Identity),
    *(nn.Dropout, nn.AlphaDropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d),
)
BY_CHANNEL = (
    *(nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d),
    *(nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.Flatten),
)


def found(model: nn.Module, size: int) -> dict[str, Rule]:
    """By path, how the modules of ``model`` can be cut among ``size`` ranks; empty if nothing is recognised."""
    rules: dict[str, Rule] = {}
    for path, module in model.named_modules():
        if isinstance(module, nn.MultiheadAttention):
            if path and module.num_heads >= size:
                rules[path] = Rule("heads")
        elif isinstance(module, nn.Sequential):
            rules |= _pairs(path, module, size)
        else:
            rules |= _attention(path, module, size) or {}
            rules |= _feed_forward(path, module, size)
    return {path: rule for path, rule in rules.items() if not _within_attention(model, path)}


def found_but(model: nn.Module, size: int, said: str) -> dict[str, Rule]:
    """What is `found`, but rules ``said`` besides go before it; ``whole`` takes out a module and what lies in it."""
    rules = found(model, size)
    for pattern, rule in parse(said).items():
        for path in named(model, pattern, rule):
            rules = without(rules, path) | ({} if rule.kind == "whole" else {path: rule})
    return rules


def _within_attention(model: nn.Module, path: str) -> bool:
    """A module of torch's own attention, which is cut as one."""
    parent = path.rpartition(".")[0]
    return bool(parent) and isinstance(model.get_submodule(parent), nn.MultiheadAttention)


def _linear(module: nn.Module, name: str) -> nn.Linear | None:
    child = dict(module.named_children()).get(name)
    return child if type(child) is nn.Linear else None


def _attention(path: str, module: nn.Module, size: int) -> dict[str, Rule] | None:
    """Projections on heads and the way back; None if it is no attention, or its heads cannot be told."""
    width = head_width(module)
    output = next((name for name in OUTPUTS if _linear(module, name) is not None), None)
    if width is None or output is None:
        return None
    prefix = f"{path}." if path else ""
    for names in PROJECTIONS:
        layers = [_linear(module, name) for name in names]
        if all(layer is not None and layer.out_features >= size * width for layer in layers):
            column = {prefix + name: Rule("column", unit=width) for name in names}
            return {path: Rule("heads"), **column, prefix + output: Rule("row", unit=width)}
    for name in FUSED:
        layer = _linear(module, name)
        if layer is not None and layer.out_features >= 3 * size * width:
            fused = Rule("column", groups=3, unit=width)
            return {
                path: Rule("heads"),
                prefix + name: fused,
                prefix + output: Rule("row", unit=width),
            }
    return None


def head_width(module: nn.Module) -> int | None:
    """How wide one of a module's heads is, as far as its attributes tell."""
    widths = [n for name in HEAD_WIDTHS if isinstance(n := getattr(module, name, None), int)]
    if widths:
        return widths[0]
    heads = [n for name in HEADS if isinstance(n := getattr(module, name, None), int)]
    layers = [
        layer for names in (*PROJECTIONS, FUSED) for name in names if (layer := _linear(module, name)) is not None
    ]
    if not heads or not layers:
        return None
    fused = 3 if any(_linear(module, name) is layers[0] for name in FUSED) else 1
    width, rest = divmod(layers[0].out_features, fused * heads[0])
    return width if not rest else None


def _feed_forward(path: str, module: nn.Module, size: int) -> dict[str, Rule]:
    prefix = f"{path}." if path else ""
    for ups, down in UP_AND_DOWN:
        there = [name for name in ups if _linear(module, name) is not None]
        first, last = _linear(module, there[0]) if there else None, _linear(module, down)
        if first is not None and last is not None and last.in_features == first.out_features >= size:
            return {**{prefix + name: Rule("column") for name in there}, prefix + down: Rule("row")}
    return {}


def _pairs(path: str, chain: nn.Sequential, size: int) -> dict[str, Rule]:
    """Column and row in turn, as long as what lies between lets a cut pass."""
    prefix = f"{path}." if path else ""
    rules: dict[str, Rule] = {}
    opened: tuple[str, int] | None = None  # a layer whose outputs are not used by another yet, and how many
    between: list[str] = []  # norms on the way
    for name, module in zip(chain._modules, chain, strict=True):  # named_children() leaves out what comes again
        inputs, outputs = _sizes(module)
        if opened is not None and inputs is not None and inputs % opened[1] == 0:
            rules[prefix + opened[0]] = Rule("column")
            rules |= {prefix + norm: Rule("channels") for norm in between}
            rules[prefix + name] = Rule("row", unit=inputs // opened[1])
            opened, between = None, []
        elif outputs is not None:
            opened, between = ((name, outputs) if outputs >= size else None), []
        elif opened is not None and isinstance(module, NORMS) and module.affine:
            between.append(name)
        elif not isinstance(module, (*ELEMENTWISE, *BY_CHANNEL)):
            opened, between = None, []
    return rules


def _sizes(module: nn.Module) -> tuple[int | None, int | None]:
    """Inputs and outputs of a layer that can be cut, (None, None) of any other."""
    if type(module) is nn.Linear:
        return module.in_features, module.out_features
    if type(module) in CONVOLUTIONS and module.groups == 1 and module.padding_mode == "zeros":
        return module.in_channels, module.out_channels  # type: ignore[return-value]
    return None, None


def divided(rule: Rule, count: int, size: int) -> int:
    """How many units each of the rule's groups has, of ``count`` things; `ValueError` if ``size`` ranks want more."""
    units, rest = divmod(count, rule.groups * rule.unit)
    if rest or units < size:
        raise ValueError(
            f"{count} of them in {rule.groups} group{'s' if rule.groups > 1 else ''} of units of {rule.unit} "
            f"{'do not come out even' if rest else f'are {units} units'}, and there are {size} ranks"
        )
    return units


def without(rules: Mapping[str, Rule], path: str) -> dict[str, Rule]:
    """The rules but those of the module ``path`` and what lies in it."""
    return {p: replace(rule) for p, rule in rules.items() if p != path and not p.startswith(f"{path}.")}
