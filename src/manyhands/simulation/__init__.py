"""Training in virtual time: the strategies that train, on a cluster one need not have.

    values     real gradients of many virtual workers in one process: loss and accuracy against virtual time
    sizes      no numbers at all: time and traffic of thousands of workers

A strategy sees a `Replica` and a `Communicator` as ever. Here the replica lets virtual time pass for what its computing
costs (`pace`, `stragglers`), and the communicator for what its operations cost on a cluster (`prices`). `failures` adds
what breaks down, `trace` draws who did what when.
"""
