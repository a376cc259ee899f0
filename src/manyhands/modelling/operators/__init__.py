"""Operator tables: what each operator of torch takes inside a real training step, and steps put together of them.

For models and sizes that cannot run here. `measure` fills a table from real steps of a spread of networks
(`networks`), `price` reads the time of any traced step off it. In this order, for each operator:

    hit             the same operator on the same shapes was measured
    interpolation   the same operator on others: its roofline, corrected as its nearest neighbours were
    fallback        no such operator was measured: a roofline of all that were, at last the device's figures

To the operators comes what running them costs the host (`overhead`), and all of it is multiplied by how quick this
machine is now beside what it was (`gauge`). Nothing is scaled from other threads or
co-runners: an operator beside three busy cores is another operator.
"""

from manyhands.modelling.operators.gauge import slower
from manyhands.modelling.operators.measuring import measure
from manyhands.modelling.operators.pricing import OperatorEstimate, price

__all__ = ["OperatorEstimate", "measure", "price", "slower"]
