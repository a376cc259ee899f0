"""The user's model with some of its layers cut among the ranks of the tensor axis.

Modules are replaced in place, under their own names and with parameters of their own names, so that the model's
``state_dict`` has the user's keys and a `Block` says which part of each tensor is here.

Dropout within a cut part draws from a stream of this rank's own; elsewhere all ranks of the axis draw alike, as what
they compute there is the same.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from manyhands.catalogue import Reference
from manyhands.communication.communicator import Communicator
from manyhands.communication.topology import shares
from manyhands.contract import Block
from manyhands.errors import BadInput
from manyhands.partition.data import OWN_STREAM
from manyhands.partition.tensor import attention, layers
from manyhands.partition.tensor.layers import CONVOLUTIONS, NORMS
from manyhands.partition.tensor.rules import HEADS, Rule, divided

#: What draws random numbers and works element by element, so that a part of it can have a stream of its own.
DRAWS = (nn.Dropout, nn.AlphaDropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.FeatureAlphaDropout)


@dataclass
class Cut:
    """What has been cut: by the name of the user's tensor the part that is here, and by module what was done."""

    blocks: dict[str, Block] = field(default_factory=dict)
    done: dict[str, str] = field(default_factory=dict)


def cut(model: nn.Module, rules: Mapping[str, Rule], group: Communicator) -> Cut:
    """Cut ``model`` in place by the ``rules`` of its modules; raises `BadInput` where one does not fit.

    Modules that share a parameter are not cut: the parts would no longer be one tensor.
    """
    result = Cut()
    if group.size == 1:
        return result
    tied = tied_parameters(model)
    for path, rule in rules.items():
        module = model.get_submodule(path)
        shared = sorted(name for name in tied if name.rpartition(".")[0] == path)
        if shared:
            _refuse(path, rule, f"its {shared[0].rpartition('.')[2]} is also {tied[shared[0]]}", "Leave both whole.")
        try:
            if rule.kind == "heads" and not _has_heads(module, path, rules):
                raise ValueError("it is no nn.MultiheadAttention, and none of the layers in it is cut by columns")
            made, blocks, said = _made(module, rule, group)
        except ValueError as e:
            _refuse(path, rule, str(e), f"Choose another rule for it, e.g. {path}=whole.")
        result.blocks |= {f"{path}.{name}".lstrip("."): block for name, block in blocks.items()}
        result.done[path] = said
        if made is not module:
            made.train(module.training)
            frozen_alike(module, made)
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, made)
    return result


vars(cut)["paper"] = Reference(
    "M. Shoeybi, M. Patwary, R. Puri, P. LeGresley, J. Casper, B. Catanzaro",
    "Megatron-LM: training multi-billion parameter language models using model parallelism",
    2019,
    "arXiv 1909.08053",
    survey="V-B",
)


def _has_heads(module: nn.Module, path: str, rules: Mapping[str, Rule]) -> bool:
    inside = (rule for p, rule in rules.items() if p.startswith(f"{path}." if path else "") and p != path)
    return isinstance(module, nn.MultiheadAttention) or any(rule.kind == "column" for rule in inside)


def _refuse(path: str, rule: Rule, why: str, what_works: str) -> None:
    raise BadInput(f"tensor {path}={rule}: the module cannot be cut so: {why}. {what_works}")


def tied_parameters(model: nn.Module) -> dict[str, str]:
    """Parameters that are found under several names: each name with another one of them."""
    names: dict[int, list[str]] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(p), []).append(name)
    return {n: next(m for m in same if m != n) for same in names.values() if len(same) > 1 for n in same}


def frozen_alike(module: nn.Module, made: nn.Module) -> None:
    """Parameters of ``made`` that are frozen in ``module`` become so, too."""
    frozen = {name for name, p in module.named_parameters() if not p.requires_grad}
    for name, p in made.named_parameters():
        p.requires_grad_(name not in frozen)


Made = tuple[nn.Module, layers.Blocks, str]


def _made(module: nn.Module, rule: Rule, group: Communicator) -> Made:
    if rule.kind == "heads":
        return _heads(module, group)
    if rule.kind == "channels":
        return _channels(module, group)
    if type(module) is nn.Linear:
        return _linear(module, rule, group)
    if type(module) in CONVOLUTIONS:
        return _convolution(module, rule, group)
    if type(module) is nn.Embedding:
        return _embedding(module, rule, group)
    raise ValueError(f"{rule.kind} is for Linear, Conv and Embedding, and this is a {type(module).__name__}")


def _ranges(count: int, rule: Rule, group: Communicator) -> tuple[list[tuple[int, int]], list[int]]:
    """This rank's ranges of so many outputs or inputs, one a group of them, and how many each rank has in all."""
    units = divided(rule, count, group.size)
    parts = shares(units, group.size)
    lo, hi = parts[group.rank]
    own = [((k * units + lo) * rule.unit, (k * units + hi) * rule.unit) for k in range(rule.groups)]
    return own, [(b - a) * rule.unit * rule.groups for a, b in parts]


def _halves(
    weight: Tensor, bias: Tensor | None, rule: Rule, group: Communicator
) -> tuple[Tensor, Tensor | None, layers.Blocks, list[int]]:
    """Weight and bias of a layer whose weight has outputs as its first dim and inputs as its second."""
    column = rule.kind == "column"
    if rule.groups > 1 and (not column or rule.gathered):
        raise ValueError("groups= is for column layers that are not gathered")
    own, lengths = _ranges(weight.shape[0 if column else 1], rule, group)
    blocks = {"weight": Block.of(weight, 0 if column else 1, own)}
    part = blocks["weight"].take(weight.detach())
    if bias is None or not column:
        return part, None if bias is None else bias.detach().clone(), blocks, lengths
    blocks["bias"] = Block.of(bias, 0, own)
    return part, blocks["bias"].take(bias.detach()), blocks, lengths


def _linear(module: nn.Linear, rule: Rule, group: Communicator) -> Made:
    weight, bias, blocks, lengths = _halves(module.weight, module.bias, rule, group)
    made = (
        layers.ColumnLinear(weight, bias, group, lengths if rule.gathered else None)
        if rule.kind == "column"
        else layers.RowLinear(weight, bias, group)
    )
    return made, blocks, _said(rule, module.weight, weight)


def _convolution(module: nn.Module, rule: Rule, group: Communicator) -> Made:
    if module.groups != 1 or module.padding_mode != "zeros":
        raise ValueError("only convolutions of one group that pad with zeros are cut")
    whole: Tensor = module.weight  # type: ignore[assignment]
    weight, bias, blocks, lengths = _halves(whole, module.bias, rule, group)  # type: ignore[arg-type]
    column = rule.kind == "column"
    gathered = lengths if rule.gathered else None
    made = layers.CutConvolution(module, weight, bias, group, column=column, lengths=gathered)
    return made, blocks, _said(rule, whole, weight)


def _embedding(module: nn.Embedding, rule: Rule, group: Communicator) -> Made:
    if module.max_norm is not None or module.scale_grad_by_freq or module.sparse:
        raise ValueError("it has max_norm, scale_grad_by_freq or sparse gradients")
    dim = 1 if rule.kind == "column" else 0  # a row layer's inputs are the words
    own, lengths = _ranges(module.weight.shape[dim], Rule(rule.kind, unit=rule.unit), group)
    block = Block.of(module.weight, dim, own)
    weight = block.take(module.weight.detach())
    made = layers.CutEmbedding(
        weight, module.padding_idx, group, first=own[0][0], lengths=lengths if rule.kind == "column" else None
    )
    return made, {"weight": block}, _said(rule, module.weight, weight)


def _channels(module: nn.Module, group: Communicator) -> Made:
    """A norm's own channels: its tensors are cut, and it stays what it is."""
    if not isinstance(module, NORMS):
        raise ValueError(f"channels is for BatchNorm, and this is a {type(module).__name__}")
    count = module.num_features
    lo, hi = shares(count, group.size)[group.rank]
    blocks = {}
    for name, tensor in [*module._parameters.items(), *module._buffers.items()]:
        if tensor is not None and tensor.dim() == 1:
            block = blocks[name] = Block.of(tensor, 0, [(lo, hi)])
            part = block.take(tensor.detach())
            if name in module._parameters:
                module._parameters[name] = nn.Parameter(part, requires_grad=tensor.requires_grad)
            else:
                module._buffers[name] = part
    module.num_features = hi - lo
    return module, blocks, f"channels, {hi - lo} of {count}"


def _heads(module: nn.Module, group: Communicator) -> Made:
    if isinstance(module, nn.MultiheadAttention):
        why = attention.refusal(module, group.size)
        if why is not None:
            raise ValueError(why)
        made = attention.CutAttention(module, group)
        own_randomness(made, group.rank, draws=module.dropout > 0)
        return made, made.blocks, f"heads, {made.num_heads} of {module.num_heads}"
    counts = {name: n for name in HEADS if isinstance(n := getattr(module, name, None), int)}
    for name, n in counts.items():
        if n < group.size:
            raise ValueError(f"its {name} is {n}, for {group.size} ranks")
        lo, hi = shares(n, group.size)[group.rank]
        setattr(module, name, hi - lo)
    return module, {}, ", ".join(f"{name} {n} → {getattr(module, name)}" for name, n in counts.items()) or "heads"


def _said(rule: Rule, whole: Tensor, part: Tensor) -> str:
    return f"{rule}, {'×'.join(map(str, whole.shape))} → {'×'.join(map(str, part.shape))}"


# -- random numbers ------------------------------------------------------------------------------------------------


def own_randomness(module: nn.Module, rank: int, *, draws: bool = True) -> None:
    """Let ``module`` draw from a stream of this rank's, and leave the one of all ranks as it is."""
    if not draws:
        return
    seed = torch.initial_seed()
    generator = torch.Generator().manual_seed((seed * 2_654_435_761 + rank + 1) % 2**63)
    module.register_buffer(OWN_STREAM, generator.get_state(), persistent=False)
    kept: list[Tensor] = []

    def swap_in(*_: Any) -> None:
        if module.training:
            kept.append(torch.get_rng_state())
            torch.set_rng_state(getattr(module, OWN_STREAM))

    def swap_out(*_: Any) -> None:
        if kept:
            getattr(module, OWN_STREAM).copy_(torch.get_rng_state())
            torch.set_rng_state(kept.pop())

    module.register_forward_pre_hook(swap_in)
    module.register_forward_hook(swap_out, always_call=True)


@contextlib.contextmanager
def inputs_of_draws(model: nn.Module) -> Any:
    """By path, the shape of what each dropout gets in the forward passes inside."""
    shapes: dict[str, tuple[int, ...]] = {}
    hooks = []
    for path, module in model.named_modules():
        if isinstance(module, DRAWS) and module.p > 0:

            def note(_: nn.Module, inputs: tuple[Any, ...], path: str = path) -> None:
                shapes[path] = tuple(inputs[0].shape)

            hooks.append(module.register_forward_pre_hook(note))
    try:
        yield shapes
    finally:
        for hook in hooks:
            hook.remove()
