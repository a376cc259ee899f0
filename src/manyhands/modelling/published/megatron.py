"""A transformer under tensor, pipeline and data parallelism: operations, traffic and activations in closed form.

    operations a step    72·B·s·l·h²·(1 + s/(6h) + V/(12·l·h));  96 and V/(16·l·h) where every layer is done again
    activations a layer  s·b·h·(10 + 24/t + 5as/(ht)) bytes; sequence parallel (34 + 5as/h)/t; attention again 34/t
    tensor traffic       4 all-reduces of b·s·h a layer and micro-batch (6 where the layer is done again)

Operations: D. Narayanan et al. 2021, "Efficient Large-Scale Language Model Training on GPU Clusters Using Megatron-
LM", SC, arXiv:2104.04473, section 5.1 and appendix. Activations: V. Korthikanti et al. 2022, "Reducing Activation
Recomputation in Large Transformer Models", arXiv:2205.05198, equations 1 to 6. Two bytes a number, dropout masks one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from manyhands.catalogue import Reference

#: What is computed again in backward: nothing, attention's core, whole layers.
Recompute = Literal["none", "attention", "full"]


@dataclass(frozen=True)
class Transformer:
    """l layers of width h, a heads, sequences of s tokens out of a vocabulary of V."""

    layers: int
    width: int
    heads: int
    length: int = 2048
    vocabulary: int = 51200


def flops_per_step(model: Transformer, sequences: int, *, recompute: Recompute = "none") -> float:
    """Operations of all devices in one step of ``sequences``, a multiplication and an addition counted as two.

    A layer's forward is 24·s·h²·(1 + s/(6h)) a sequence, backward twice that, and doing it again once more; the logits
    are 6·s·h·V. ``attention`` does 4·s²·h of a layer again.
    """
    layer = 24 * model.length * model.width**2 * (1 + model.length / (6 * model.width))
    again = {"none": 0.0, "attention": 4.0 * model.length**2 * model.width, "full": layer}[recompute]
    logits = 6 * model.length * model.width * model.vocabulary
    return sequences * (model.layers * (3 * layer + again) + logits)


def activation_B_per_layer(
    model: Transformer,
    micro_batch: int,
    tensor: int = 1,
    *,
    recompute: Recompute = "none",
    sequence_parallel: bool = False,
) -> float:
    """Bytes that one layer keeps for backward on one of ``tensor`` devices, one micro-batch."""
    sbh = model.length * micro_batch * model.width
    if recompute == "full":
        return 2.0 * sbh / (tensor if sequence_parallel else 1)  # a layer's input
    scores = 0.0 if recompute == "attention" else 5 * model.heads * model.length / model.width
    whole, cut = (0.0, 34.0) if sequence_parallel else (10.0, 24.0)
    return sbh * (whole + (cut + scores) / tensor)


def activation_B(
    model: Transformer,
    micro_batch: int,
    tensor: int = 1,
    pipeline: int = 1,
    *,
    chunks: int = 1,
    recompute: Recompute = "none",
    sequence_parallel: bool = False,
) -> float:
    """Bytes on a device of the first stage: p micro-batches of l/p layers; interleaving holds 1 + (p−1)/(p·v) of it.

    Embedding and logits are left out, a percent of it.
    """
    layer = activation_B_per_layer(model, micro_batch, tensor, recompute=recompute, sequence_parallel=sequence_parallel)
    more = 1 + (pipeline - 1) / (pipeline * chunks) if chunks > 1 else 1.0
    return layer * model.layers * more


def tensor_traffic_B(model: Transformer, micro_batch: int, *, recompute: Recompute = "none") -> float:
    """Bytes of all-reduce that one layer needs for one micro-batch; with sequence parallelism as many, in halves."""
    return (6 if recompute == "full" else 4) * 2.0 * micro_batch * model.length * model.width


vars(flops_per_step)["paper"] = Reference(
    "D. Narayanan et al.",
    "Efficient Large-Scale Language Model Training on GPU Clusters Using Megatron-LM",
    2021,
    "SC, arXiv:2104.04473",
    survey="V",
)
