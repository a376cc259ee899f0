"""Every transport keeps the promises of `transport_checks`, at every size.

Exact where the transport sums by `reduction` (see `SELF_REDUCING` there), to rounding elsewhere. A new transport is
one word in `TRANSPORTS`.
"""

import pytest
import torch

from manyhands.testing import run_ranks
from tests.communication import transport_checks

TRANSPORTS = ("single", "threads", "simulated", "shared", "gloo", "mpi")
SIZES = {"single": (1,)}
#: Engines that are not ours take seconds where there are more ranks than cores: those sizes wait for `make test-all`.
#: One process alone on shared memory is in the contract of strategies.
QUICK = {"gloo": (1, 2, 3), "mpi": (1, 2), "shared": (2, 5)}
#: Of the others nobody else, a power of two, and an odd number that is more than the cores of a small machine.
QUICK_OF_OURS = (1, 2, 5)


def case(on, size):
    marks = () if size in QUICK.get(on, QUICK_OF_OURS) else pytest.mark.slow
    return pytest.param(on, size, id=f"{on}-{size}", marks=marks)


@pytest.mark.parametrize(("on", "size"), [case(on, n) for on in TRANSPORTS for n in SIZES.get(on, range(1, 9))])
@pytest.mark.parametrize("check", transport_checks.CHECKS, ids=lambda c: c.__name__.removeprefix("check_"))
def test_transport(check, on, size):
    results = run_ranks(check, size, on=on, timeout_s=30)
    assert len(results) == size
    for result in results[1:]:
        if isinstance(result, torch.Tensor):
            assert transport_checks.same_bits(result, results[0])
        else:
            assert result == results[0]
