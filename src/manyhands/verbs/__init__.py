"""The verbs. Each decides every ``auto``, checks the plan against task and machine, and calls down.

train       on real workers                                         `train`, `Result`
simulate    in virtual time, on any cluster                         `simulate`
predict     what a plan will cost                                   `predict`
search      which of many plans to take                             `search`
calibrate   measures this machine for predictions                   `calibrate`
outline     a plan with everything decided                          `outlined`

What they share: `building` (the user's model and data), `deciding` (every ``auto``), `launching` (workers).
A verb's name in this package is the function: all modules are imported here, so none takes its function's place later.
"""

from manyhands.verbs.building import built as built
from manyhands.verbs.calibrate import calibrate as calibrate
from manyhands.verbs.deciding import log as log
from manyhands.verbs.deciding import resolved as resolved
from manyhands.verbs.launching import join_launcher as join_launcher
from manyhands.verbs.outline import outlined as outlined
from manyhands.verbs.predict import predict as predict
from manyhands.verbs.search import search as search
from manyhands.verbs.simulate import simulate as simulate
from manyhands.verbs.train import LastCheckpointNotWritten as LastCheckpointNotWritten
from manyhands.verbs.train import Result as Result
from manyhands.verbs.train import train as train
