"""Every transport keeps the promises of `transport_checks`, at every size.

Exact where the transport sums by `reduction` (see `SELF_REDUCING` there), to rounding elsewhere. A new transport is
one word in `TRANSPORTS`.
"""

import pytest
import torch

from manyhands.testing import run_ranks
from tests.communication import transport_checks

TRANSPORTS = ("single", "threads", "simulated", "shared")
SIZES = {"single": (1,)}
CASES = [(on, size) for on in TRANSPORTS for size in SIZES.get(on, range(1, 9))]


@pytest.mark.parametrize(("on", "size"), CASES, ids=[f"{on}-{size}" for on, size in CASES])
@pytest.mark.parametrize("check", transport_checks.CHECKS, ids=lambda c: c.__name__.removeprefix("check_"))
def test_transport(check, on, size):
    results = run_ranks(check, size, on=on, timeout_s=30)
    assert len(results) == size
    for result in results[1:]:
        if isinstance(result, torch.Tensor):
            assert transport_checks.same_bits(result, results[0])
        else:
            assert result == results[0]
