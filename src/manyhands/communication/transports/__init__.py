"""The transports, from nothing to move to a cluster; `simulated` moves everything in virtual time.

`exchange`, `events` and `inprocess` are what those in one process share.
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
