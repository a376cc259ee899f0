"""What strategies compute together when workers differ along more axes than the data's, and what they count."""

import pytest
import torch
from torch import nn

from manyhands.communication.topology import Mesh
from manyhands.communication.transports.simulated import SimulatedWorld
from manyhands.consistency.clipping import clip_, global_norm
from manyhands.consistency.replica_average import ReplicaAverage
from manyhands.consistency.synchronous import Synchronous
from manyhands.contract import Batch
from manyhands.errors import NonFiniteLoss
from manyhands.partition.data import DataReplica
from manyhands.testing import run_ranks

BOTH, DATA = frozenset({"data", "tensor"}), frozenset({"data"})


def cut_replica(comm, **options):
    """Two pieces: one that every worker holds, and one that is cut along ``tensor``."""
    comm.mesh = Mesh(data=2, tensor=2)
    model = nn.ModuleList([nn.Linear(8, 16, bias=False), nn.Linear(8, 24, bias=False)])
    groups = [{"params": layer.parameters()} for layer in model]
    made = DataReplica(model, torch.optim.SGD(groups, lr=0.1), None, comm, common=False, **options)
    made.pieces[0].replicated_over, made.pieces[1].replicated_over = BOTH, DATA
    generator = torch.Generator().manual_seed(3)
    whole = [torch.randn(p.grad.numel() * n, generator=generator) for p, n in zip(made.pieces, (1, 2), strict=True)]
    made.pieces[0].grad.copy_(whole[0])
    made.pieces[1].grad.copy_(whole[1].chunk(2)[comm.mesh.coordinates(comm.rank)["tensor"]])
    return made, torch.cat(whole).norm()


@pytest.mark.parametrize("sliced", [False, True])
def test_the_global_norm_counts_every_element_once_on_a_mesh_of_two_axes(sliced):
    def run(comm):
        made, expected = cut_replica(comm)
        bounds = []
        for piece in made.pieces:
            n, group = piece.grad.numel(), comm.over(piece.replicated_over)
            bounds.append((group.rank * n // group.size, (group.rank + 1) * n // group.size) if sliced else (0, n))
        return global_norm(made, comm, bounds, sliced=sliced), expected

    found = SimulatedWorld(4).run(run)
    for norm, expected in found:
        torch.testing.assert_close(norm, expected)
        assert torch.equal(norm, found[0][0])


def test_weights_of_an_average_are_those_of_the_pieces_own_group():
    def run(comm):
        made, _ = cut_replica(comm)
        worker = ReplicaAverage().start(made, comm)
        vectors = [torch.full((p.flat.numel(),), float(comm.rank)) for p in made.pieces]
        worker._average(vectors, [1.0, 2.0, 3.0, 6.0])
        return [float(v[0]) for v in vectors]

    # Groups along data are the ranks {0, 2} and {1, 3}.
    for rank, (everybody, along_data) in enumerate(SimulatedWorld(4).run(run)):
        assert everybody == pytest.approx((0 * 1 + 1 * 2 + 2 * 3 + 3 * 6) / 12)
        assert along_data == pytest.approx([(0 * 1 + 2 * 3) / 4, (1 * 2 + 3 * 6) / 8][rank % 2])


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("sliced", [False, True])
def test_a_norm_that_is_not_finite_stops_every_worker_with_nothing_scaled(size, sliced):
    def run(comm):
        model = nn.Linear(8, 24, bias=False)
        made = DataReplica(model, torch.optim.SGD(model.parameters(), lr=0.1), None, comm, common=False, clip=1.0)
        made.pieces[0].grad.fill_(1.0)
        lo, hi = comm.rank * 64 if size == 3 and sliced else 0, (comm.rank + 1) * 64 if size == 3 and sliced else 192
        if comm.rank == 0 or not sliced:
            made.pieces[0].grad[3] = torch.inf
        with pytest.raises(NonFiniteLoss, match="gradient is not finite"):
            clip_(made, comm, [(lo, hi)], sliced=sliced)
        return float(made.pieces[0].grad[100])

    assert SimulatedWorld(size).run(run) == [1.0] * size


# -- buckets count as what was declared --------------------------------------------------------------------------------


def bucketed(comm, bucket_B):
    """Two steps in buckets; what was counted, what is declared, how many buckets, and the parameters."""
    comm.mesh = Mesh(data=comm.size)
    comm.overlaps = True  # for the simulated transport, which lets nothing go on beside computing
    try:
        generator = torch.Generator().manual_seed(2)
        model = nn.Sequential(nn.Linear(7, 11), nn.Tanh(), nn.Linear(11, 13), nn.Tanh(), nn.Linear(13, 3)).double()
        with torch.no_grad():
            for p in model.parameters():
                p.copy_(torch.rand(p.shape, generator=generator, dtype=p.dtype) - 0.5)
        groups = [{"params": model[:3].parameters()}, {"params": model[3:].parameters()}]
        sgd = torch.optim.SGD(groups, lr=0.1)
        made = DataReplica(model, sgd, nn.functional.mse_loss, comm, common=False, bucket_B=bucket_B)
        strategy = Synchronous(update="replicated")
        with comm.counting("control"):
            worker = strategy.start(made, comm)
        sent_B, messages = comm.counters.sent_B(), comm.counters.messages()
        buckets_before = comm.counters.tallies["buckets"]["all_reduce"].calls
        x = torch.randn(comm.size, 7, generator=generator, dtype=torch.float64)[comm.rank :][:1]
        for _ in range(2):
            worker.step(Batch(x, x[:, :3], 1))
        declared = [strategy.traffic(p.flat.numel(), comm.size, 8) for p in made.pieces]
        return {
            "counted": [comm.counters.sent_B() - sent_B, comm.counters.messages() - messages],
            "declared": [sum(t.sent_B_in(2) for t in declared), sum(t.messages_in(2) for t in declared)],
            "buckets": comm.counters.tallies["buckets"]["all_reduce"].calls - buckets_before,
            "parameters": torch.cat([p.flat for p in made.pieces]),
        }
    finally:
        del comm.overlaps


@pytest.mark.parametrize(("size", "on"), [(3, "gloo"), (3, "simulated"), (5, "simulated")])
def test_gradients_that_leave_in_buckets_count_as_one_all_reduce_a_piece(size, on):
    single, many = (run_ranks(bucketed, size, on=on, args=(bucket_B,)) for bucket_B in (2000, 1))  # of 2,288 bytes
    for result in (*single, *many):
        assert result["counted"] == result["declared"]
    assert single[0]["buckets"] == 2 * 2
    assert many[0]["buckets"] == 2 * 6
    torch.testing.assert_close(many[0]["parameters"], single[0]["parameters"], rtol=0, atol=1e-14)
