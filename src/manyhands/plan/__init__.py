"""How the work is split: everything but task and hardware, checked against both before a process starts.

description   the plan itself, and the strategy that its text names
facts         what a plan is checked against: the machine, the optimizer, the loss
placing       how many workers, on which device, reached by which transport, on which mesh
cuts          what goes with a model that is cut
resolving     every ``auto`` decided, every problem found
"""

from manyhands.plan.description import Plan as Plan
from manyhands.plan.description import strategy_from as strategy_from
from manyhands.plan.facts import ONE_SIDED as ONE_SIDED
from manyhands.plan.facts import SERVERS_IN_MEMORY as SERVERS_IN_MEMORY
from manyhands.plan.facts import SHARE_MEMORY as SHARE_MEMORY
from manyhands.plan.facts import WORKER_B as WORKER_B
from manyhands.plan.facts import Facts as Facts
from manyhands.plan.placing import server_ranks as server_ranks
from manyhands.plan.resolving import Resolved as Resolved
from manyhands.plan.resolving import resolve as resolve
