"""A pipeline's step: m micro-batches through p stages, v chunks of the model a stage.

    T = m·(t_f + t_b)·(1 + (p − 1)/(v·m)) + (p − 1)-fold hand-overs      bubble, share of the step (p−1)/(v·m + p − 1)
    in flight, at most    GPipe m; 1F1B min(m, p − stage)

Y. Huang et al. 2019, "GPipe: Efficient Training of Giant Neural Networks using Pipeline Parallelism", NeurIPS; D.
Narayanan et al. 2021, "Efficient Large-Scale Language Model Training on GPU Clusters Using Megatron-LM", SC, section
2.2. Equal stages; the longest path of unequal ones is `manyhands.partition.pipeline.schedule.makespan`.
"""

from __future__ import annotations

from manyhands.catalogue import Reference


def bubble(stages: int, micro_batches: int, chunks: int = 1) -> float:
    """The share of a step in which a stage has nothing to do."""
    return (stages - 1) / (chunks * micro_batches + stages - 1)


def step_s(
    forward_s: float,
    backward_s: float,
    stages: int,
    micro_batches: int,
    *,
    chunks: int = 1,
    hand_over_s: float = 0.0,
) -> float:
    """Seconds of a step; times are of a micro-batch through a stage (all its chunks), ``hand_over_s`` of one message.

    A stage hands over while it computes the next, so only the way through the pipe and back is added.
    """
    fill = (stages - 1) * (forward_s + backward_s) / chunks
    return micro_batches * (forward_s + backward_s) + fill + 2 * (stages * chunks - 1) * hand_over_s


def in_flight(stage: int, stages: int, micro_batches: int, *, flush: bool = False) -> int:
    """Micro-batches whose activations a stage holds at most: 1F1B, or all of them with GPipe (``flush``)."""
    return micro_batches if flush else min(micro_batches, stages - stage)


vars(step_s)["paper"] = Reference(
    "Y. Huang et al.",
    "GPipe: Efficient Training of Giant Neural Networks using Pipeline Parallelism",
    2019,
    "NeurIPS, arXiv:1811.06965",
    survey="V-C",
)
