"""The nodes of an AMPNet graph, its intermediate representation.

A. L. Gaunt, M. A. Johnson, M. Riechert, D. Tarlow, R. Tomioka, D. Vytiniotis, S. Webster (2017), AMPNet: asynchronous
model-parallel training for dynamic neural networks, arXiv 1705.09786, section 4.

node               what all have in common, and what a node holds
ends               Source, Loss
transform          Transform: a module; parameterised, if it learns (PPT)
branch             Cond, Phi
isu                Isu: a change of state with a way back; Add, Begin, Drop
concat             Concat, Split, Broadcast: within one state
group              Ungroup, Flatmap, Group: among states
"""

from manyhands.partition.ampnet.nodes.branch import Cond, Phi
from manyhands.partition.ampnet.nodes.concat import Broadcast, Concat, Split
from manyhands.partition.ampnet.nodes.ends import Loss, Source
from manyhands.partition.ampnet.nodes.group import Flatmap, Group, Ungroup
from manyhands.partition.ampnet.nodes.isu import Add, Begin, Drop, Isu
from manyhands.partition.ampnet.nodes.node import Node, Store
from manyhands.partition.ampnet.nodes.transform import Transform

__all__ = [
    "Add",
    "Begin",
    "Broadcast",
    "Concat",
    "Cond",
    "Drop",
    "Flatmap",
    "Group",
    "Isu",
    "Loss",
    "Node",
    "Phi",
    "Source",
    "Split",
    "Store",
    "Transform",
    "Ungroup",
]
