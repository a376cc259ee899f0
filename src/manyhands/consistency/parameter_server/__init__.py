"""Parameters that nobody owns: kept by servers, pulled and pushed a shard at a time (survey §VI-A).

store          what a worker sees of the servers; servers that are memory under locks
remote_store   servers that are ranks, seen from a worker; remote_board: their clocks
server         such a rank;  requests: what is said between the two
worker         what the workers of all strategies on servers have in common
"""
