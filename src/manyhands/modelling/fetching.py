"""What fetching a batch takes: ``rows`` of samples in random order, with which a worker's step begins.

The data is at hand also where the model is not run; of a small model's step this is 10 to 25 %.
"""

from __future__ import annotations

import statistics
import time

import torch

from manyhands.data import Dataset

#: As long is measured, but so many batches at least, and the first is not counted.
SECONDS, FEWEST = 0.02, 4


def fetch_s(data: Dataset, samples: int, *, threads: int, seconds: float = SECONDS) -> float:
    """Seconds for ``samples`` of ``data`` in a process of so many ``threads``: the median."""
    before = torch.get_num_threads()
    generator = torch.Generator().manual_seed(0)
    torch.set_num_threads(threads)
    try:
        end, took = time.perf_counter() + seconds, list[float]()
        while len(took) < FEWEST or time.perf_counter() < end:
            indices = torch.randint(len(data), (samples,), generator=generator)
            began = time.perf_counter()
            data.rows(indices)
            took.append(time.perf_counter() - began)
    finally:
        torch.set_num_threads(before)
    return statistics.median(took[1:])
