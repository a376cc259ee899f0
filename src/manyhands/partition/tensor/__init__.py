"""Neurons divided among the ranks of the tensor axis (survey §V-B, network parallelism).

cut         the model with its layers cut, and which part of the user's tensors each holds
rules       which modules, and how: said, or found
layers      linear layers, convolutions, norms and embeddings by columns and rows;  attention: by heads
rehearsal   the forward pass of a cut model on one process, by shapes, before anything is started
chain       a sequence of modules, as the schemes below want it

`schemes` cut a whole network in one way, instead of module by module: a plan's ``tensor`` is rules, auto, or one of
them with its options. A new one is one file with a function ``(model, group, inputs, **options)`` that cuts the model
in place and returns a `cut.Cut`, or raises `BadInput`, and one line here; ``inputs`` are a batch of one sample.
"""

import re

from manyhands.catalogue import Catalogue
from manyhands.errors import UnknownName
from manyhands.grammar import Call, parse_call

schemes = Catalogue(
    "tensor scheme",
    {
        "rotate": "manyhands.partition.rotate:rotate",
        "redundant": "manyhands.partition.redundant:redundant",
        "cannon": "manyhands.partition.cannon:cannon",
        "spatial": "manyhands.partition.spatial:spatial",
        "one_weird_trick": "manyhands.partition.hybrid:one_weird_trick",
    },
)

#: Those that cut along the data axis, whose ranks have samples and random numbers of their own.
ALONG_DATA = ("one_weird_trick",)


def axis_of(said: str | None) -> str:
    """The axis of the mesh along which a plan's ``tensor`` cuts."""
    return "data" if str(said).partition("(")[0].strip() in ALONG_DATA else "tensor"


def scheme_of(said: str | None) -> Call | None:
    """The scheme that a plan's ``tensor`` names, with its options; None where it says rules or auto."""
    if said is None or said.strip() == "auto" or set("=,") & set(re.sub(r"\(.*?\)", "", said)) or not said.strip():
        return None
    return parse_call(said, kind="tensor scheme")


def check_known(scheme: Call | None) -> None:
    """Raise `UnknownName` for a scheme that is neither listed nor one of the user's."""
    if scheme is not None and scheme.name not in schemes and ":" not in scheme.name:
        rules = "Rules are pattern=rule, e.g. mlp.up=column, mlp.down=row; auto finds some."
        raise UnknownName(schemes.kind, scheme.name, schemes, also=rules)
