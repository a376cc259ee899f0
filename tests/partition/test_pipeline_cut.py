"""Stages compute what the model does, share its parameters, and are balanced; what cannot be cut is refused by name."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from manyhands import models
from manyhands.errors import BadInput, UnknownName
from manyhands.partition.pipeline.balancing import balance
from manyhands.partition.pipeline.cut import cut, cut_points
from manyhands.partition.pipeline.opening import decoder


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.scale = nn.Parameter(torch.ones(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.scale * self.down(torch.tanh(self.up(self.norm(x))))


class Transformerish(nn.Module):
    """Positions that are a bare parameter, residual blocks, a skip over all of them, shapes that are asked for."""

    def __init__(self, *, tied: bool = False) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 8)
        self.position = nn.Parameter(torch.randn(5, 8))
        self.blocks = nn.ModuleList(Block(8) for _ in range(3))
        self.head = nn.Linear(8, 11, bias=False)
        self.register_buffer("shift", torch.ones(()))
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, tokens: torch.Tensor, mask: None = None) -> torch.Tensor:
        n, length = tokens.size()
        first = x = self.embedding(tokens) + self.position[:length] + self.shift
        for block in self.blocks:
            x = block(x)
        x = (x + first + self.shift).view(n * length, 8)
        return self.head(x).view(n, length, 11)


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(2, 2), nn.Linear(2, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.a(x) if x.sum() > 0 else self.b(x)


class FunctionalDropout(Branching):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(nn.functional.dropout(self.a(x), 0.5, self.training))


class TwoInputs(Branching):
    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return self.a(x) + self.b(y)


class Parameterless(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + 1


class Derived(nn.Sequential):
    """A chain under a name of its own."""


class Masked(nn.Module):
    """torch's encoder as people use it, with a causal mask that is made on the way."""

    def __init__(self, *, padded: bool = False) -> None:
        super().__init__()
        self.embedding, self.padded = nn.Embedding(11, 8), padded
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 3, norm=nn.LayerNorm(8), enable_nested_tensor=False)
        self.head = nn.Linear(8, 11)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(tokens.size(1), dtype=torch.float64) < 0
        padding = tokens == 0 if self.padded else None
        return self.head(self.encoder(self.embedding(tokens), mask=mask, src_key_padding_mask=padding))


class BothWays(nn.Module):
    """torch's whole transformer: what the encoder makes of the source goes to every layer of the decoder."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 8)
        self.transformer = nn.Transformer(8, 2, 2, 2, 16, dropout=0.0, batch_first=True)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens)
        return self.transformer(x, x.flip(1))


class Stacked(nn.Module):
    """A list of layers and a loop over them."""

    def __init__(self, *, branching: bool = False) -> None:
        super().__init__()
        self.layers, self.branching = nn.ModuleList(nn.Linear(4, 4) for _ in range(3)), branching

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            if not self.branching or x.sum() > 0:
                x = x + layer(x).tanh()
        return x


def of_torch() -> nn.Sequential:
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    return nn.Sequential(nn.Embedding(11, 8), nn.TransformerEncoder(layer, 3), nn.Linear(8, 3))


def tokens() -> torch.Tensor:
    return torch.arange(15).view(3, 5) % 11


def chain() -> nn.Sequential:
    return Derived(nn.Linear(4, 8), Derived(nn.ReLU(), nn.Linear(8, 8), nn.ReLU()), nn.BatchNorm1d(8), nn.Linear(8, 3))


CASES = {
    "chain": (chain, lambda: torch.ones(5, 4), ["1", "1.1, 2", "1.0, 1.1, 1.2, 2, 3"]),
    "perceptron": (
        lambda: models.build("perceptron(hidden=(16, 16))", inputs=(1, 4, 4), classes=3),
        lambda: torch.ones(5, 1, 4, 4),
        ["hidden2", "activation1, output"],
    ),
    "cnn": (
        lambda: models.build("cnn", inputs=(1, 28, 28), classes=10),
        lambda: torch.ones(2, 1, 28, 28),
        None,
    ),
    "transformer": (
        Transformerish,
        tokens,
        ["blocks.1", "blocks.0, blocks.2, head", "blocks.1.up", "blocks, blocks.1.norm, blocks.1.down"],
    ),
    "torch's encoder": (Masked, tokens, ["encoder.layers.1, encoder.norm", "encoder, encoder.layers.2, head"]),
    "with padding": (lambda: Masked(padded=True), tokens, ["encoder.layers.1"]),
    "torch's transformer": (
        BothWays,
        tokens,
        ["transformer.encoder.layers.1, transformer.decoder.layers.1", "transformer.decoder"],
    ),
    "an encoder in a chain": (of_torch, tokens, ["1.layers.1", "1, 1.layers.2, 2"]),
    "a list in a chain": (
        lambda: nn.Sequential(nn.Linear(4, 4), Stacked(), nn.Linear(4, 2)),
        lambda: torch.ones(5, 4),
        ["1.layers.1", "1, 1.layers.2, 2"],
    ),
}


@pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))
@pytest.mark.parametrize("training", [False, True])
def test_stages_one_after_the_other_are_the_model(case, training):
    make, sample, cuts = case
    torch.manual_seed(0)
    model = make().double().train(training)
    x = sample() if sample is tokens else sample().double()
    for at in cuts if cuts is not None else [cut_points(model, 3, x)]:
        made = cut(model, at)
        handed = x
        for stage in made.stages:
            assert all(m.training == training for m in stage.modules())
            handed = stage(handed)
        assert torch.equal(handed, model(x))
        own = [id(p) for stage in made.stages for p in stage.parameters()]
        assert sorted(own) == sorted(id(p) for p in model.parameters())  # the same objects, each once
        assert len(str(made).splitlines()) == len(made.stages) == len(made.at)


def test_a_stage_hands_over_no_more_than_later_ones_need():
    first, second = cut(Transformerish(), "blocks.1").stages
    handed = first(tokens())
    assert isinstance(handed, tuple)
    assert sorted(t.dtype for t in handed if not t.is_floating_point()) == [torch.int64]  # asked for its shape
    assert [tuple(t.shape) for t in handed if t.is_floating_point()] == [(3, 5, 8)] * 2  # the skip and the stream
    assert second(handed).shape == (3, 5, 11)
    assert isinstance(cut(chain(), "1.1").stages[0](torch.ones(2, 4)), torch.Tensor)


def test_cut_points_cut_and_leave_no_trace():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(), nn.ReLU(inplace=True), nn.Linear(8, 3))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    drawn = torch.get_rng_state()
    points = cut_points(model, 3, torch.randn(6, 4, generator=torch.Generator().manual_seed(1)))
    assert len(cut(model, points).stages) == 3
    assert torch.equal(drawn, torch.get_rng_state())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_the_dear_part_has_a_stage_of_its_own():
    wide = 512
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, wide), nn.Linear(wide, 8 * wide), nn.Linear(8 * wide, 4))
    model.insert(3, nn.Sequential(nn.Linear(8 * wide, 8 * wide)))
    assert cut_points(model, 3, torch.ones(64, 4))[0] in ("2", "3.0")


def test_a_decoder_takes_all_its_arguments_by_position():
    layer = nn.TransformerDecoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    model, x = nn.TransformerDecoder(layer, 2), torch.randn(2, 5, 8)
    mask = nn.Transformer.generate_square_subsequent_mask(5)
    given = (x, x.flip(1), mask, mask, None, None, True, True)
    assert torch.equal(decoder(model, *given), model(*given))


# -- balance -----------------------------------------------------------------------------------------------------------

ROW = st.lists(st.integers(0, 9), min_size=1, max_size=8)


@settings(max_examples=60)
@given(costs=ROW, data=st.data())
def test_balance_is_the_best_of_all_cuts(costs, data):
    n = len(costs)
    parameters = data.draw(st.lists(st.integers(0, 9), min_size=n, max_size=n))
    forbidden = data.draw(st.sets(st.integers(1, n), max_size=3))
    free = [b for b in range(1, n) if b not in forbidden]
    trains = data.draw(st.lists(st.booleans(), min_size=n, max_size=n).filter(any))
    bounds = [0, *free, n]
    stages = data.draw(st.integers(1, sum(any(trains[a:b]) for a, b in itertools.pairwise(bounds))))

    def learn(starts):
        return all(any(trains[a:b]) for a, b in itertools.pairwise([*starts, n]))

    def largest(weights, starts):
        return max(sum(weights[a:b]) for a, b in itertools.pairwise([*starts, n]))

    found = balance(costs, parameters, stages, forbidden, trains)
    every = [s for inner in itertools.combinations(free, stages - 1) if learn(s := (0, *inner))]
    assert tuple(found) in every
    best = min((largest(costs, s), largest(parameters, s)) for s in every)
    assert (largest(costs, found), largest(parameters, found)) == best


# -- what cannot be cut ------------------------------------------------------------------------------------------------


def test_tied_weights_stay_in_one_stage():
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(4)))
    model[2].weight = model[1].weight
    assert len(cut(model, "1, 3").stages) == 3
    with pytest.raises(BadInput, match=r"share parameters \(1\.weight = 2\.weight\)"):
        cut(model, "2")
    for stages in (2, 3):
        assert "2" not in cut_points(model, stages, torch.ones(2, 4))
    with pytest.raises(BadInput, match="share parameters"):
        cut_points(model, 4, torch.ones(2, 4))
    with pytest.raises(BadInput, match=r"embedding\.weight = head\.weight"):
        cut(Transformerish(tied=True), "blocks.1")


@pytest.mark.parametrize(
    ("model", "why"),
    [
        (Branching, "control flow"),
        (FunctionalDropout, "dropout"),
        (TwoInputs, "takes y beside"),
        (Parameterless, "no module or parameter"),
        (nn.Sequential, "is empty"),
    ],
)
def test_a_model_that_cannot_be_cut_is_refused_with_the_reason(model, why):
    with pytest.raises(BadInput, match=why):
        cut(model(), "b")


def test_a_refused_model_is_in_the_mode_it_was_in():
    model = Branching().eval()
    with pytest.raises(BadInput):
        cut(model, "b")
    assert not model.training


@pytest.mark.parametrize(
    ("at", "why"),
    [("9", "no module to cut before named '9'"), ("0", "begins the model"), ("3, 1", "does not come after")],
)
def test_cut_points_that_do_not_fit_are_refused(at, why):
    with pytest.raises(BadInput, match=why) as caught:
        cut(chain(), at)
    if at == "9":
        assert isinstance(caught.value, UnknownName)


def test_a_cut_within_a_part_names_the_module_the_reason_and_what_works():
    model = nn.Sequential(nn.Linear(4, 4), Stacked(branching=True), nn.Linear(4, 2))
    with pytest.raises(BadInput, match=r"before 1\.layers\.1, which lies in 1\. 1 \(Stacked\) is one part") as caught:
        cut(model, "1.layers.1")
    assert "control flow" in str(caught.value)
    assert "make what it cannot trace a module of its own" in str(caught.value)
    with pytest.raises(BadInput, match=r"has 3 parts .* 1 \(Stacked\) is one part: torch\.fx cannot trace"):
        cut_points(model, 4, torch.ones(2, 4))
    with pytest.raises(BadInput, match=r"encoder\.layers\.1 \(TransformerEncoderLayer\) is one part\. Cut before it"):
        cut(Masked(), "encoder.layers.1.linear1")


def test_more_stages_than_parts_are_refused():
    with pytest.raises(BadInput, match="has 6 parts"):
        cut_points(chain(), 7, torch.ones(2, 4))
    with pytest.raises(BadInput, match="stages=0"):
        cut_points(chain(), 0, torch.ones(2, 4))


def test_a_sample_that_does_not_fit_names_the_module():
    with pytest.raises(BadInput, match="timing 0 on the sample"):
        cut_points(chain(), 2, torch.ones(2, 5))
