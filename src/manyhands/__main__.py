"""``python -m manyhands`` is ``manyhands``: what torchrun and mpirun start."""

import sys

from manyhands.cli import main

if __name__ == "__main__":
    sys.exit(main())
