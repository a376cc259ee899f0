"""Buckets cover every gradient once, come in the same order everywhere, and are announced only when final."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from manyhands.communication.transports.single import SingleCommunicator
from manyhands.contract import BUCKET_B, Batch, Piece
from manyhands.partition import buckets
from manyhands.partition.data import DataReplica
from manyhands.partition.update import Span

LOSS = nn.functional.cross_entropy


def laid_out(sizes: list[list[int]]) -> tuple[list[Piece], list[list[Span]]]:
    pieces, spans = [], []
    for group in sizes:
        at, own = 0, []
        for i, n in enumerate(group):
            own.append(Span(str(i), nn.Parameter(torch.zeros(n)), at, at + n))
            at += n
        pieces.append(Piece(torch.zeros(at), torch.zeros(at), frozenset({"data"})))
        spans.append(own)
    return pieces, spans


@given(
    sizes=st.lists(st.lists(st.integers(1, 50), min_size=1, max_size=8), min_size=1, max_size=3),
    bucket_B=st.integers(1, 400),
)
def test_buckets_cover_every_element_once_and_end_at_parameters(sizes, bucket_B):
    pieces, spans = laid_out(sizes)
    cut = buckets.cut_into_buckets(pieces, spans, bucket_B)
    covered = [[0] * p.flat.numel() for p in pieces]
    for i, lo, hi in cut:
        assert {lo, hi} <= {0} | {s.stop for s in spans[i]}
        assert (hi - lo) * 4 >= bucket_B or lo == 0  # only the last of a piece may be small
        for k in range(lo, hi):
            covered[i][k] += 1
    assert all(count == 1 for piece in covered for count in piece)
    assert cut == sorted(cut, reverse=True)  # backward reaches the last parameters first


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.middle, self.unused, self.last = (nn.Linear(6, 6) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(torch.tanh(self.middle(torch.tanh(self.first(x)))))


def batch(n: int = 5) -> Batch:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n, 6, generator=generator)
    return Batch(x, torch.arange(n) % 6, n)


def replica(micro_batches: int = 1, loss=LOSS, bucket_B: int = BUCKET_B) -> DataReplica:
    torch.manual_seed(0)
    model = Model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    options = {"micro_batches": micro_batches, "bucket_B": bucket_B}
    return DataReplica(model, optimizer, loss, SingleCommunicator(), common=False, **options)


def tokens(outputs: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, float]:
    return LOSS(outputs, target, reduction="sum"), float(len(target))


@pytest.mark.parametrize("bucket_B", [1, 200, 4 * 2**20])
@pytest.mark.parametrize("micro_batches", [1, 3])
@pytest.mark.parametrize("loss", [LOSS, tokens])
@pytest.mark.parametrize("n", [0, 1, 5])
def test_what_is_announced_is_final_complete_and_in_order(bucket_B, micro_batches, loss, n):
    made = replica(micro_batches, loss, bucket_B)
    for _ in range(3):  # hooks of an earlier step must not speak again
        said = []

        def ready(i, lo, hi, loss, count, said=said):
            said.append((i, lo, hi, made.pieces[i].grad[lo:hi].clone(), float(loss), count))

        loss_now, count_now = made.gradients(batch(n), ready)
        assert [s[:3] for s in said] == buckets.cut_into_buckets(made.pieces, made._spans, bucket_B)
        assert made.runs == len(said)
        for i, lo, hi, gradient, loss_then, count_then in said:
            assert torch.equal(gradient, made.pieces[i].grad[lo:hi])
            assert (loss_then, count_then) == (float(loss_now), count_now)


def test_announcing_changes_no_gradient():
    announced, silent = replica(), replica()
    announced.gradients(batch(), lambda *_: None)
    silent.gradients(batch())
    assert torch.equal(announced.pieces[0].grad, silent.pieces[0].grad)


def test_buckets_go_out_while_backward_still_runs():
    made = replica(bucket_B=1)
    order = []
    made.model.first.weight.register_post_accumulate_grad_hook(lambda _: order.append("first layer done"))
    made.gradients(batch(), lambda i, lo, hi, *_: order.append((lo, hi)))
    made.gradients(batch(), lambda i, lo, hi, *_: order.append((lo, hi)))
    last = made._spans[0][-1]
    assert order.index((last.start, last.stop)) < order.index("first layer done")
