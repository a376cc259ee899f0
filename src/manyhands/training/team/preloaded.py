"""What the fork server imports, so that the workers forked from it need not.

Once nobody is left who could ask it for workers the server ends, and Python takes down all of these libraries first:
0.6 s of processor time, on a busy machine ten seconds, in which it still holds its launcher's output open. It has
nothing to tidy up, so it leaves at once. Its workers never come by here: a forked process ends by `os._exit` anyway.
"""

import atexit
import os
import sys

import torch._dynamo  # noqa: F401

import manyhands.training.loop
import manyhands.training.member  # noqa: F401

if any("multiprocessing.forkserver" in word for word in sys.orig_argv):
    atexit.register(os._exit, 0)
