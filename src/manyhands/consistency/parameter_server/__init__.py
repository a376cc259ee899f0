"""Parameters that nobody owns: kept by servers, pulled and pushed a shard at a time (survey §VI-A).

opening        which of the servers below a strategy gets
store          what a worker sees of the servers;  shards: what lies where
common_store   servers that are memory of all workers, under locks
window_store   servers that are memory of the workers, which the others reach one-sidedly
remote_store   servers that are ranks, seen from a worker; remote_board: their clocks
server         such a rank;  requests: what is said between the two
rounds         gradients of several workers that become one update: backup workers
common_rounds, window_rounds, remote_rounds    rounds of the stores above
strategy       what the descriptions of all strategies on servers have in common
worker         what the workers of all strategies on servers have in common
"""
