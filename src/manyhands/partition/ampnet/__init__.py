"""AMPNet: asynchronous pipelined training of dynamic networks (survey §V-C; Gaunt et al. 2017, arXiv 1705.09786).

message, nodes, graph   the intermediate representation: what passes, what nodes make of it, how they hang together
chain                   a plain nn.Sequential as a graph
place                   which rank owns which node
learning, runtime       when a node updates; the loop of a rank, and the controller
wire                    a message between ranks
replica, strategy       what the training loop sees of it

    graph = ampnet.Graph({"x": Source(pick), "a": Transform(nn.Linear(4, 2)), "loss": Loss()}, ["x -> a", "a -> loss"])
"""

from manyhands.partition.ampnet.graph import Graph
from manyhands.partition.ampnet.message import Message, State
from manyhands.partition.ampnet.nodes import (
    Add,
    Begin,
    Broadcast,
    Concat,
    Cond,
    Drop,
    Flatmap,
    Group,
    Isu,
    Loss,
    Node,
    Phi,
    Source,
    Split,
    Transform,
    Ungroup,
)

__all__ = [
    "Add",
    "Begin",
    "Broadcast",
    "Concat",
    "Cond",
    "Drop",
    "Flatmap",
    "Graph",
    "Group",
    "Isu",
    "Loss",
    "Message",
    "Node",
    "Phi",
    "Source",
    "Split",
    "State",
    "Transform",
    "Ungroup",
]
