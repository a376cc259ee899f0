"""Layers cut among ranks equal the layers that were cut, and a rehearsal finds what does not fit."""

import copy
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from manyhands.communication.topology import Mesh
from manyhands.communication.transports.simulated import SimulatedWorld
from manyhands.contract import Block
from manyhands.errors import BadInput, UnknownName, WorkerFailed
from manyhands.partition.conjugate import copied, divided, joined, summed
from manyhands.partition.data import DataReplica
from manyhands.partition.tensor import chain
from manyhands.partition.tensor.cut import cut, own_randomness
from manyhands.partition.tensor.rehearsal import Rehearsal, rehearsed
from manyhands.partition.tensor.rules import Rule, found, matched, parse

EXACT = {"rtol": 1e-12, "atol": 1e-12}


# -- blocks ------------------------------------------------------------------------------------------------------------


@given(
    rows=st.integers(1, 6),
    columns=st.integers(1, 6),
    cuts=st.lists(st.integers(0, 6), min_size=1, max_size=3),
    dim=st.integers(0, 1),
)
def test_blocks_that_tile_a_tensor_put_it_together_again(rows, columns, cuts, dim):
    whole = torch.arange(rows * columns).view(rows, columns)
    n = whole.shape[dim]
    ends = sorted({0, n, *(min(c, n) for c in cuts)})
    blocks = [Block.of(whole, dim, [(lo, hi)]) for lo, hi in pairwise(ends)]
    again = torch.full_like(whole, -1)
    for block in blocks:
        part = block.take(whole)
        assert part.numel() == block.numel
        assert torch.equal(whole.reshape(-1)[block.places()], part.reshape(-1))
        block.put(part, again)
    assert torch.equal(again, whole)


def test_places_are_those_in_the_wholes_memory():
    whole = torch.arange(24).view(1, 2, 3, 4).permute(0, 3, 1, 2)  # channels last in memory
    block = Block.of(whole, 1, [(1, 3)])
    in_memory = whole.permute(0, 2, 3, 1).reshape(-1)
    assert torch.equal(in_memory[block.places()], block.take(whole).reshape(-1))
    again = torch.zeros(whole.shape, dtype=whole.dtype)
    block.put(block.take(whole), again)
    assert torch.equal(again[:, 1:3], whole[:, 1:3])


def test_a_block_may_take_a_range_of_each_of_several_stacked_matrices():
    whole = torch.arange(12.0).view(6, 2)
    assert Block.of(whole, 0, [(1, 2), (4, 5)]).take(whole).tolist() == [[2.0, 3.0], [8.0, 9.0]]


# -- conjugate pairs ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 3])
def test_the_backward_of_each_collective_is_the_forward_of_its_conjugate(size):
    def run(comm):
        rank = comm.rank
        x = torch.arange(6.0, dtype=torch.float64).view(2, 3).requires_grad_()
        scale = rank + 1.0
        results = {}
        results["copied"] = torch.autograd.grad((copied(x, comm) * scale).sum(), x)[0]
        y = summed(x * scale, comm)
        results["summed"] = y.detach()
        results["grad of summed"] = torch.autograd.grad(y.sum(), x)[0]
        part = divided(x, comm)
        results["divided"] = part.detach()
        again = joined(part, comm, -1, [p.shape[-1] for p in x.detach().tensor_split(size, -1)])
        results["again"] = again.detach()
        results["grad of both"] = torch.autograd.grad((again * x.detach()).sum(), x)[0]
        return results

    whole = torch.arange(6.0, dtype=torch.float64).view(2, 3)
    all_scales = sum(range(1, size + 1))
    for rank, found_here in enumerate(SimulatedWorld(size).run(run)):
        assert torch.equal(found_here["copied"], torch.full((2, 3), float(all_scales), dtype=torch.float64))
        assert torch.equal(found_here["summed"], whole * all_scales)
        assert torch.equal(found_here["grad of summed"], torch.full((2, 3), rank + 1.0, dtype=torch.float64))
        assert torch.equal(found_here["divided"], whole.tensor_split(size, -1)[rank])
        assert torch.equal(found_here["again"], whole)
        assert torch.equal(found_here["grad of both"], whole)


def test_what_a_cut_exchanges_is_counted_apart_from_the_strategys_payload():
    def run(comm):
        summed(torch.ones(8, requires_grad=True), comm).sum().backward()
        copied(torch.ones(8, requires_grad=True), comm).sum().backward()
        return comm.counters.sent_B(), comm.counters.sent_B("cut")

    assert SimulatedWorld(2).run(run) == [(0, 2 * 8 * 4)] * 2


# -- layers ------------------------------------------------------------------------------------------------------------


class Feeding(nn.Module):
    """A transformer's feed-forward part with a gate."""

    def __init__(self):
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = nn.Linear(6, 10), nn.Linear(6, 10), nn.Linear(10, 6)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Attending(nn.Module):
    """Attention with projections of its own, which reads the number of its heads."""

    def __init__(self, fused):
        super().__init__()
        self.num_heads = 4
        if fused:
            self.qkv = nn.Linear(8, 24)
        else:
            self.q_proj, self.k_proj, self.v_proj = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.out_proj = nn.Linear(8, 8)
        self.fused = fused

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, -1) if self.fused else (self.q_proj(x), self.k_proj(x), self.v_proj(x))
        q, k, v = (t.unflatten(-1, (self.num_heads, 2)).transpose(1, 2) for t in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out_proj(y.transpose(1, 2).flatten(-2))


class Encoding(nn.Module):
    """torch's own attention, with its mask."""

    def __init__(self, **options):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 4, **options)

    def forward(self, x):
        if not self.attention.batch_first and not hasattr(self.attention, "blocks"):
            x = x.transpose(0, 1)
            return self.attention(x, x, x, need_weights=False)[0].transpose(0, 1)
        if hasattr(self.attention, "_first_is_batch") and not self.attention._first_is_batch:
            x = x.transpose(0, 1)
            return self.attention(x, x, x, need_weights=False)[0].transpose(0, 1)
        return self.attention(x, x, x, need_weights=False)[0]


def sequence(*modules):
    return nn.Sequential(*modules)


MODELS = {
    "pair": (lambda: sequence(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 5)), (4, 6)),
    "three layers": (lambda: sequence(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 7), nn.ReLU(), nn.Linear(7, 5)), (4, 6)),
    "without bias": (lambda: sequence(nn.Linear(6, 8, bias=False), nn.Linear(8, 5, bias=False)), (4, 6)),
    "convolutions": (
        lambda: sequence(
            nn.Conv2d(2, 6, 3, padding=1),
            nn.BatchNorm2d(6),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(6, 4, 3, stride=2),
            nn.Flatten(),
            nn.Linear(4 * 1 * 1, 3),
        ),
        (5, 2, 6, 6),
    ),
    "convolution and dense": (
        lambda: sequence(nn.Conv2d(1, 5, 3), nn.Sigmoid(), nn.Flatten(), nn.Linear(5 * 16, 3)),
        (4, 1, 6, 6),
    ),
    "gated": (Feeding, (3, 4, 6)),
    "attention": (lambda: Attending(False), (2, 5, 8)),
    "fused attention": (lambda: Attending(True), (2, 5, 8)),
    "torch's attention": (lambda: Encoding(batch_first=True), (2, 5, 8)),
    "torch's attention, time first": (lambda: Encoding(), (2, 5, 8)),
    "encoder layer": (lambda: nn.TransformerEncoderLayer(8, 4, 12, dropout=0.0, batch_first=True), (2, 5, 8)),
}


def made(name):
    torch.manual_seed(4)
    build, shape = MODELS[name]
    model = build().double().train()
    return model, torch.randn(shape, dtype=torch.float64)


def answered(model, x):
    """Output, gradient of the input and of each parameter."""
    x = x.clone().requires_grad_()
    y = model(x)
    weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)
    (y * weights).sum().backward()
    return y.detach(), x.grad, {n: p.grad for n, p in model.named_parameters()}, dict(model.named_buffers())


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("size", [2, 3])
def test_a_cut_model_equals_the_whole_one(name, size):
    whole, x = made(name)
    rules = rehearsed(whole, None, size, x[:1]).rules
    assert rules, "something is recognised"
    y, grad_x, grads, buffers = answered(copy.deepcopy(whole), x)

    def run(comm):
        mine = copy.deepcopy(whole)
        done = cut(mine, rules, comm)
        answers = answered(mine, x)
        mine.eval()
        with torch.no_grad():
            return *answers, done.blocks, mine(x)

    answers = SimulatedWorld(size).run(run)
    ended = whole.eval()
    for own_y, own_grad_x, own_grads, own_buffers, blocks, evaluated in answers:
        torch.testing.assert_close(own_y, y, **EXACT)
        torch.testing.assert_close(own_grad_x, grad_x, **EXACT)
        assert own_grads.keys() == grads.keys(), "parameters keep the user's names"
        assert blocks.keys() <= grads.keys() | buffers.keys()
        assert blocks
        for key, grad in own_grads.items():
            torch.testing.assert_close(grad, blocks[key].take(grads[key]) if key in blocks else grads[key], **EXACT)
        for key, value in own_buffers.items():
            torch.testing.assert_close(
                value, blocks[key].take(buffers[key]) if key in blocks else buffers[key], **EXACT
            )
        if not buffers:  # else its statistics have moved
            torch.testing.assert_close(evaluated, ended(x).detach(), **EXACT)


@pytest.mark.parametrize(
    ("kind", "options"), [("column", {}), ("row", {}), ("column", {"padding_idx": 3}), ("row", {"padding_idx": 3})]
)
def test_an_embedding_is_cut_by_its_width_or_by_its_words(kind, options):
    torch.manual_seed(1)
    whole = sequence(nn.Embedding(7, 4, **options)).double()
    indices = torch.tensor([[0, 3, 6], [2, 2, 5]])

    def answered(model):
        y = model(indices)
        (y * torch.arange(y.numel(), dtype=y.dtype).view(y.shape)).sum().backward()
        return y.detach(), model[0].weight.grad

    y, grad = answered(copy.deepcopy(whole))

    def run(comm):
        mine = copy.deepcopy(whole)
        done = cut(mine, {"0": Rule(kind)}, comm)
        own_y, own_grad = answered(mine)
        return own_y, own_grad, done.blocks["0.weight"].take(grad)

    for own_y, own_grad, expected in SimulatedWorld(3).run(run):
        torch.testing.assert_close(own_y, y, **EXACT)
        torch.testing.assert_close(own_grad, expected, **EXACT)


def test_a_gathered_column_layer_gives_all_outputs_to_all():
    torch.manual_seed(2)
    whole = sequence(nn.Linear(5, 7), nn.Softmax(-1)).double()
    x = torch.randn(3, 5, dtype=torch.float64)
    y, grad_x, grads, _ = answered(copy.deepcopy(whole), x)

    def run(comm):
        mine = copy.deepcopy(whole)
        done = cut(mine, matched(mine, parse("0=column(gathered=True)")), comm)
        return *answered(mine, x)[:3], done.blocks

    for own_y, own_grad_x, own_grads, blocks in SimulatedWorld(3).run(run):
        torch.testing.assert_close(own_y, y, **EXACT)
        torch.testing.assert_close(own_grad_x, grad_x, **EXACT)
        for key, grad in own_grads.items():
            torch.testing.assert_close(grad, blocks[key].take(grads[key]), **EXACT)


def test_a_column_and_a_row_layer_exchange_one_sum_each_way():
    whole, x = made("pair")
    rules = found(whole, 2)

    def run(comm):
        mine = copy.deepcopy(whole)
        cut(mine, rules, comm)
        answered(mine, x)
        tally = comm.counters.tallies["cut"]["all_reduce"]
        return tally.calls, tally.sent_B

    forward_B, backward_B = 4 * 5 * 8, 4 * 6 * 8  # batch × outputs, batch × inputs; 2(P-1)/P = 1 of each
    assert SimulatedWorld(2).run(run) == [(2, forward_B + backward_B)] * 2


def test_frozen_parameters_stay_frozen_and_a_cut_model_stays_in_its_mode():
    whole = sequence(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)).eval()
    whole[0].weight.requires_grad_(False)

    def run(comm):
        mine = copy.deepcopy(whole)
        cut(mine, found(mine, 2), comm)
        return [p.requires_grad for p in mine.parameters()], mine[0].training

    assert SimulatedWorld(2).run(run) == [([False, True, True, True], False)] * 2


# -- random numbers ----------------------------------------------------------------------------------------------------


def test_a_dropout_within_the_cut_draws_on_its_own_and_leaves_the_common_stream_alone():
    whole = sequence(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 4), nn.Dropout(0.5))
    how = rehearsed(whole, None, 2, torch.ones(1, 4))
    rules, parts = how.rules, how.parts
    assert parts == ["1"]

    def run(comm):
        torch.manual_seed(7)
        mine = copy.deepcopy(whole)
        cut(mine, rules, comm)
        for path in parts:
            own_randomness(mine.get_submodule(path), comm.rank)
        seen = []
        mine[1].register_forward_hook(lambda m, i, o: seen.append(o == 0))
        first = mine(torch.ones(16, 4)).detach()
        second = mine(torch.ones(16, 4)).detach()
        return first, second, seen, torch.rand(3)

    (first, second, masks, after), (first_1, second_1, masks_1, after_1) = SimulatedWorld(2).run(run)
    assert torch.equal(first, first_1), "what follows the cut is the same on all ranks"
    assert torch.equal(second, second_1)
    assert torch.equal(after, after_1)
    assert not torch.equal(masks[0], masks_1[0]), "parts of one layer are dropped independently"
    assert not torch.equal(masks[0], masks[1]), "and anew in every step"


class Forgetful(Attending):
    """Drops within its heads, by a function and not by a module."""

    def forward(self, x):
        q, k, v = (
            p(x).unflatten(-1, (self.num_heads, 2)).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj)
        )
        self.seen = F.dropout(torch.ones_like(q), 0.5, self.training)
        return self.out_proj((q * k * v * self.seen).transpose(1, 2).flatten(-2))


def test_an_attention_that_drops_within_its_heads_draws_on_its_own():
    whole = sequence(Forgetful(False), nn.Dropout(0.5))
    how = rehearsed(whole, None, 2, torch.ones(1, 3, 8))
    assert how.parts == ["0"]

    def run(comm):
        torch.manual_seed(5)
        mine = copy.deepcopy(whole)
        cut(mine, how.rules, comm)
        own_randomness(mine[0], comm.rank)
        return mine(torch.ones(4, 3, 8)).detach(), mine[0].seen, torch.rand(2)

    (y, seen, after), (y_1, seen_1, after_1) = SimulatedWorld(2).run(run)
    assert torch.equal(y, y_1)
    assert torch.equal(after, after_1)
    assert seen.shape == seen_1.shape
    assert not torch.equal(seen, seen_1)


# -- rules -------------------------------------------------------------------------------------------------------------


def test_rules_are_read_and_the_last_that_matches_counts():
    rules = parse("mlp.up=column, *.qkv=column(groups=3, unit=2), mlp.*=whole,")
    assert rules == {"mlp.up": Rule("column"), "*.qkv": Rule("column", groups=3, unit=2), "mlp.*": Rule("whole")}
    model = nn.ModuleDict({"a": nn.ModuleDict({"mlp": nn.ModuleDict({"up": nn.Linear(2, 2)}), "qkv": nn.Linear(2, 6)})})
    assert matched(model, rules) == {"a.qkv": Rule("column", groups=3, unit=2)}


@pytest.mark.parametrize(
    ("text", "error", "says"),
    [
        ("up", BadInput, "pattern=rule"),
        ("up=sideways", UnknownName, "column"),
        ("up=column(groups=0)", BadInput, "whole numbers from 1"),
        ("up=column(colour=1)", BadInput, "gathered="),
        ("nowhere=column", BadInput, "no module is called so"),
        ("1=column", BadInput, "Tanh"),
        ("0=column(unit=4)", BadInput, "units of 4"),
        ("0=column(unit=9)", BadInput, "1 units"),
        ("0=channels", BadInput, "BatchNorm"),
        ("0=column", BadInput, "2 says RuntimeError: mat1 and mat2"),
        ("0=column", BadInput, "takes parts (…=row), or the outputs are gathered"),
        ("0=column(gathered=True), 2=row", BadInput, "2 says RuntimeError"),
    ],
)
def test_what_cannot_be_cut_is_refused_with_the_module_and_the_reason(text, error, says):
    model, x = made("pair")
    with pytest.raises(error, match=None) as refused:
        rehearsed(model, text, 2, x[:1])
    assert says in str(refused.value)
    assert not any(isinstance(m, nn.Linear) and m.out_features in (4, 5) and m is model[0] for m in model.modules())


def test_a_norm_between_cut_convolutions_is_told_how_it_is_cut():
    model = sequence(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 3))
    with pytest.raises(BadInput, match=r"its own are cut alike: 1=channels"):
        rehearsed(model, "0=column, 3=row", 2, torch.ones(1, 1, 8, 8))


def test_a_model_in_which_nothing_is_recognised_is_refused():
    class Opaque(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(4, 4)

        def forward(self, x):
            return self.first(x)

    with pytest.raises(BadInput, match="nothing in Opaque is recognised"):
        rehearsed(Opaque(), None, 2, torch.ones(1, 4))


def test_what_is_found_and_does_not_run_is_left_whole():
    class Stubborn(Attending):
        def forward(self, x):
            q, k, v = (p(x).view(*x.shape[:2], 4, 2).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
            return self.out_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(-2))

    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention, self.norm, self.feeding = Stubborn(False), nn.LayerNorm(8), nn.ModuleDict()
            self.fc1, self.fc2 = nn.Linear(8, 12), nn.Linear(12, 8)

        def forward(self, x):
            return self.fc2(F.gelu(self.fc1(self.norm(self.attention(x)))))

    assert rehearsed(Both(), None, 2, torch.ones(1, 3, 8)).rules.keys() == {"fc1", "fc2"}


def test_modules_that_share_a_parameter_are_not_cut():
    model = sequence(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    model[2].weight = model[0].weight
    with pytest.raises(WorkerFailed, match=r"its weight is also 2.weight"):
        SimulatedWorld(2).run(lambda comm: cut(copy.deepcopy(model), found(model, 2), comm))


def test_uneven_heads_that_draw_unlike_amounts_of_random_numbers_are_refused():
    class Dropping(Attending):
        def forward(self, x):
            q, k, v = (p(x) for p in (self.q_proj, self.k_proj, self.v_proj))
            return self.out_proj(F.dropout(q * k * v, 0.5, self.training))

    with pytest.raises(BadInput, match="random numbers"):
        rehearsed(
            Dropping(False),
            "q_proj=column(unit=2), k_proj=column(unit=2), v_proj=column(unit=2), out_proj=row(unit=2)",
            3,
            torch.ones(1, 3, 8),
        )


# -- one mesh ----------------------------------------------------------------------------------------------------------


def test_the_mesh_is_where_ranks_are_told_apart():
    def run(comm):
        comm.mesh = Mesh(data=2, tensor=3)
        x = torch.full((1,), float(comm.rank))
        return float(summed(x, comm.over(frozenset({"tensor"})))), float(summed(x, comm.over(frozenset({"data"}))))

    assert SimulatedWorld(6).run(run) == [(3.0, 3.0), (3.0, 5.0), (3.0, 7.0), (12.0, 3.0), (12.0, 5.0), (12.0, 7.0)]


# -- what a shape does not tell ----------------------------------------------------------------------------------------


class Between(nn.Module):
    """Two layers, and something between them that is not done element by element."""

    def __init__(self, between):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(6, 8), nn.Linear(8, 4)
        self.between = between

    def forward(self, x):
        return self.fc2(self.between(self.fc1(x)))


UNEVEN = {
    "softmax": lambda h: h.softmax(-1),
    "norm": lambda h: h / h.norm(),
    "layer norm": lambda h: F.layer_norm(h, h.shape[-1:]),
    "mean": lambda h: h - h.mean(-1, keepdim=True),
    "flip": lambda h: h.flip(-1),
    "scaled": lambda h: h / h.size(-1) ** 0.5,
}


@pytest.mark.parametrize("name", UNEVEN)
def test_what_would_compute_something_else_is_refused_or_left_whole(name):
    model = Between(UNEVEN[name])
    with pytest.raises(BadInput, match="computes something else"):
        rehearsed(model, "fc1=column, fc2=row", 2, torch.ones(1, 6), checked=True)
    both = sequence(nn.Linear(6, 6), model, nn.ReLU(), nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))
    how = rehearsed(both, None, 2, torch.ones(1, 6), checked=True)
    assert how.rules.keys() == {"3", "5"}
    assert list(how.left) == ["1"]
    assert "left whole: 1" in str(how)
    assert rehearsed(both, how.said, 2, torch.ones(1, 6)).rules == how.rules, "told so, others cut alike unchecked"


@pytest.mark.parametrize("name", MODELS)
def test_what_is_recognised_computes_the_same(name):
    whole, x = made(name)
    assert not rehearsed(whole.float(), None, 2, x[:1].float(), checked=True).left


def test_heads_without_projections_that_are_cut_are_refused():
    for model, rule in ((sequence(nn.Linear(4, 4)), "0=heads"), (nn.ModuleDict({"a": Attending(False)}), "a=heads")):
        with pytest.raises(BadInput, match="none of the layers in it is cut"):
            cut(model, matched(model, parse(rule)), Rehearsal(0, 2))


def test_a_dropout_of_a_part_keeps_its_own_stream_when_a_replica_starts_alike():
    whole = sequence(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 4))
    how = rehearsed(whole, None, 2, torch.ones(1, 4))

    def run(comm):
        comm.mesh = Mesh(tensor=2)
        mine = copy.deepcopy(whole)
        blocks = how.cut(mine, comm.over(frozenset({"tensor"}))).blocks
        DataReplica(mine, torch.optim.SGD(mine.parameters(), lr=0.1), None, comm, common=False, blocks=blocks)
        seen = []
        mine[1].register_forward_hook(lambda m, i, o: seen.append(o == 0))
        mine(torch.ones(64, 4))
        return seen[0]

    first, second = SimulatedWorld(2).run(run)
    assert not torch.equal(first, second)


def test_a_module_that_comes_again_in_a_sequence_is_seen_again():
    again = nn.Softmax(-1)
    model = nn.Sequential(nn.Linear(8, 8), again, nn.Linear(8, 8), again, nn.Linear(8, 4))
    assert [path for path, _ in chain.sequence(model, "rotate")] == ["0", "1", "2", "3", "4"]
    assert found(model, 2) == {}, "a softmax lies between any two layers, and wants all of its inputs"
