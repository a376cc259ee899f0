"""Where the network is cut (survey §V). Each partition makes a `Replica`, all in terms of `contract` types.

`partitions` is the table of contents: a new cut is one file, one line here and a row in the contract test.
`cut_strategies` are those whose update is part of the cut, so that they stand here and not in ``consistency``.
"""

from manyhands.catalogue import Catalogue

partitions = Catalogue(
    "partition",
    {
        "data": "manyhands.partition.data:DataReplica",
        "tensor": "manyhands.partition.tensor.cut:cut",
        "pipeline": "manyhands.partition.pipeline.replica:PipelineReplica",
    },
)

cut_strategies = Catalogue(
    "strategy",
    {
        "pipedream": "manyhands.partition.pipeline.strategy:PipeDream",
        "ampnet": "manyhands.partition.ampnet.strategy:AMPNet",
    },
)
