"""How bytes move (survey §VI-B): communicators, collectives, topology.

`transports` is the table of contents: a new transport is one file in ``transports/``, one line here and a row in the
contract test.
"""

from manyhands.catalogue import Catalogue

transports = Catalogue(
    "transport",
    {
        "single": "manyhands.communication.transports.single:SingleCommunicator",
        "threads": "manyhands.communication.transports.threads:ThreadsCommunicator",
        "shared": "manyhands.communication.transports.shared:SharedCommunicator",
        "gloo": "manyhands.communication.transports.torch_distributed:GlooCommunicator",
        "nccl": "manyhands.communication.transports.torch_distributed:NcclCommunicator",
        "mpi": "manyhands.communication.transports.mpi:MpiCommunicator",
        "simulated": "manyhands.communication.transports.simulated:SimulatedCommunicator",
    },
)
