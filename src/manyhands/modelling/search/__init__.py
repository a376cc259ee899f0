"""Search: which of many plans to take, before any is run.

space      which plans: lists, and their product
costs      what their steps compute, from a few measured ones
engine     decided, held against memory, priced, ranked
ranking    the order, ties, and how many workers are worth it
"""
