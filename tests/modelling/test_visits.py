"""What is done to a server's memory, by the strategy's own store; and that it is all that a prediction lacked."""

import numpy as np
import pytest
import torch

from manyhands.communication.communicator import Communicator
from manyhands.modelling import visits
from manyhands.modelling.calibration.stamps import handed_over, median_and_spread
from manyhands.modelling.visits import Visits
from manyhands.partition.data import DataReplica
from manyhands.plan import strategy_from
from manyhands.simulation import sizes
from manyhands.testing import run_ranks
from tests.simulation.runs import COMPUTE_S, Flat, sized


def visiting(comm: Communicator, text: str, optimizer: type, kinds: list) -> tuple:
    torch.manual_seed(0)
    model = torch.nn.Linear(6, 5)
    replica = DataReplica(
        model, optimizer(model.parameters(), lr=0.1), torch.nn.functional.mse_loss, comm, common=False
    )
    before = [piece.flat.clone() for piece in replica.pieces]
    for piece in replica.pieces:
        piece.grad.fill_(1.0)
    found = Visits(strategy_from(text), replica, comm, kinds).take(0.0, 0.0)
    return found, all(map(torch.equal, before, (piece.flat for piece in replica.pieces)))


@pytest.mark.parametrize(
    ("text", "optimizer", "kinds"),
    [
        ("asynchronous(servers=1)", torch.optim.Adam, [("push", "pull")]),
        ("downpour(servers=1, fetch=2)", torch.optim.SGD, [("push",), ("push", "pull")]),
        ("ssp(servers=1)", torch.optim.SGD, [("push",), ("pull",)]),
    ],
)
def test_a_worker_visits_in_every_way_asked_for_and_changes_nothing(text, optimizer, kinds):
    for found, alike in run_ranks(visiting, 2, on="threads", args=(text, optimizer, kinds)):
        assert alike
        counted = {name: sum(name in kind for kind in kinds) for name in ("push", "pull")}
        for name, times in counted.items():
            mine = [(n_B, s) for operation, n_B, s in found if operation == name]
            assert len(mine) == times * visits.FEWEST
            assert all(n_B == 4 * 35 and s > 0 for n_B, s in mine)


def test_visits_become_curves_with_a_knot_for_each_size():
    first = [("push", 400, 1.0), ("push", 400, 3.0), ("push", 80, 1.0), ("pull", 400, 0.5)]
    push, pull = sorted(visits.curves([first, [("push", 400, 2.0)]], "shared", 2), key=lambda curve: curve.at(400))[
        ::-1
    ]
    assert (push.operation, push.sizes_B, push.seconds) == ("push", (80, 400), (1.0, 2.0))
    assert (pull.operation, pull.at(400), pull.ranks) == ("pull", 0.5, 2)
    assert visits.curves([[], []], "shared", 2) == ()


def test_who_waited_for_a_lock_is_late_by_what_lies_between():
    left = np.array([[1.0, 5.0, 3.0], [2.0, 4.0, 9.0]])
    got = np.array([[np.nan, 4.25, np.nan], [1.5, np.nan, np.nan]])
    late = handed_over(left, got)
    assert late[:2].tolist() == [0.5, 0.25]
    assert np.isnan(late[2])
    assert median_and_spread(late)[0] == 0.375
    assert median_and_spread(late[2:]) == (0.0, 0.0)


# -- in virtual time ---------------------------------------------------------------------------------------------------


class Served(Flat):
    """A push takes so long, a pull half of it."""

    def __call__(self, operation):
        return super().__call__(operation) * {"push": 1.0, "pull": 0.5}.get(operation.name, 0.0)


def ends(workers: int, woken_s: float) -> list[float]:
    price = Served(0.002)
    price.woken_s = woken_s
    found = sizes.run(sized("asynchronous(servers=1)", workers, steps=3, update_s=0.0), lambda: price)
    return sorted(found.clocks.last)


def test_a_push_and_its_pull_are_under_one_lock():
    first, second = ends(2, 0.0)
    assert first == pytest.approx(3 * (COMPUTE_S + 0.003), rel=1e-12)
    assert second == pytest.approx(first + 0.003, rel=1e-12)  # waits once, and then comes after the other has left


def test_who_waits_for_a_lock_is_woken_late():
    first, second = ends(2, 0.0005)
    assert first == pytest.approx(3 * (COMPUTE_S + 0.003), rel=1e-12)
    assert second == pytest.approx(first + 0.003 + 0.0005, rel=1e-12)
    crowded = ends(16, 0.0005)[-1] - ends(16, 0.0)[-1]
    assert crowded == pytest.approx(0.0005 * (3 * 16 - 1), rel=0.1)  # all but the first wait each time
