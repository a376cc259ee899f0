"""How bytes move (survey §VI-B): communicators, collectives, topology.

`transports` is the table of contents: a new transport is one file in ``transports/``, one line in its ``__init__`` and
a row in the contract test.
"""

# The table stands in the package of its own name: importing a submodule binds its name here, over anything before.
from manyhands.communication.transports import transports

__all__ = ["transports"]
