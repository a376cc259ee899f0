"""Neurons divided among the ranks of the tensor axis (survey §V-B, network parallelism).

cut         the model with its layers cut, and which part of the user's tensors each holds
rules       which modules, and how: said, or found
layers      linear layers, convolutions, norms and embeddings by columns and rows;  attention: by heads
rehearsal   the forward pass of a cut model on one process, by shapes, before anything is started
chain       a sequence of modules, as the schemes below want it

`schemes` cut a whole network in one way, instead of module by module: a plan's ``tensor`` is rules, auto, or one of
them with its options. A new one is one file with a function ``(model, group, inputs, **options)`` that cuts the model in
place and returns a `cut.Cut`, or raises `BadInput`, and one line here; ``inputs`` are a batch of one sample.
"""

import re

from manyhands.catalogue import Catalogue
from manyhands.grammar import Call, parse_call

schemes = Catalogue(
    "tensor scheme",
    {
        "rotate": "manyhands.partition.rotate:rotate",
        "redundant": "manyhands.partition.redundant:redundant",
        "cannon": "manyhands.partition.cannon:cannon",
        "spatial": "manyhands.partition.spatial:spatial",
    },
)


def scheme_of(said: str | None) -> Call | None:
    """The scheme that a plan's ``tensor`` names, with its options; None where it says rules or auto."""
    if said is None or said.strip() == "auto" or set("=,") & set(re.sub(r"\(.*?\)", "", said)) or not said.strip():
        return None
    return parse_call(said, kind="tensor scheme")
