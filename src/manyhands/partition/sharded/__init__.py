"""Sharded data parallelism: of gradients, or parameters too, a worker keeps a P-th (survey §V-A, pattern parallelism).

A worker has samples of its own, as in data parallelism, and optimizer state for its slice of the parameters, as under
``synchronous(update='sharded')``, which is stage 1. Beyond that, unit by unit (some modules that follow each other):

    stage    kept                       forward        backward
    2        parameters; g, m of 1/P    gather θ       reduce-scatter g, whose memory the next unit but one takes
    3        θ, g, m of 1/P             gather θ       gather θ, reduce-scatter g

θ parameters, g gradients, m optimizer state. In stage 2 a unit is gathered once a step, before its first forward, and
stays; in stage 3 it is gathered before each forward and each backward of a pass and let go after it.

S. Rajbhandari, J. Rasley, O. Ruwase & Y. He (2020), "ZeRO: Memory optimizations toward training trillion parameter
models", SC20, arXiv:1910.02054, §5 and §7.

Payload per rank and step, of n elements: 2(P−1)/P · n in stage 2, as data parallelism has, and 3(P−1)/P · n in stage 3,
see `units.exchanged_B`; counted as ``cut``. Beside it the loss and its count, as ``control``.
Guarantee: loss and gradients are those of one worker on the joined batch, up to the order of summation, for shares of
any sizes. BatchNorm normalises within a share, as in data parallelism.

units     which parameters go together and when they are needed, found by watching a forward pass
vector    the parameters of a unit end to end: gathered, let go, their gradients scattered
replica   a worker's model with such parameters
"""
