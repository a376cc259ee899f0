"""A small GPT: a causal transformer over characters, in the pre-norm form of GPT-2.

    embedding   e_t = token[c_t] + position[t]                               V·w + L·w parameters
    block       x ← x + attention(norm(x)),  x ← x + mlp(norm(x))            12w² + 13w each
    head        logits = norm(x) · Wᵀ                                        2w + V·w

V characters, windows of L, width w. The head is not tied to the embedding, so that the two may lie on different stages.
"""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from manyhands.catalogue import Reference
from manyhands.checks import whole
from manyhands.errors import BadInput
from manyhands.models.sizes import sample_shape

_DEVIATION = 0.02  # of the weights at the start, as in GPT-2's published code


class Embedding(nn.Module):
    """``(n, length)`` characters to ``(n, length, width)``: what each is, and where it stands."""

    def __init__(self, classes: int, length: int, width: int, dropout: float) -> None:
        super().__init__()
        self.token = nn.Embedding(classes, width)
        self.position = nn.Embedding(length, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, characters: Tensor) -> Tensor:
        """Any length up to that of the windows."""
        embedded: Tensor = self.dropout(self.token(characters) + self.position.weight[: characters.shape[1]])
        return embedded


class Attention(nn.Module):
    """Causal self-attention, ``(n, length, width)`` to the same.

    A head is ``head_width`` neighbouring outputs of ``query``, ``key`` and ``value``. How many there are is read off
    these outputs: with layers that hold some heads, and those columns of ``out``, this is their share of the sum.
    """

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.head_width = width // heads
        self.dropout = dropout
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Position t sees positions 0 … t."""
        query, key, value = (
            layer(x).unflatten(-1, (-1, self.head_width)).transpose(1, 2)  # (n, heads, length, head_width)
            for layer in (self.query, self.key, self.value)
        )
        dropout = self.dropout if self.training else 0.0
        seen = F.scaled_dot_product_attention(query, key, value, dropout_p=dropout, is_causal=True)
        output: Tensor = self.out(seen.transpose(1, 2).flatten(2))
        return output


class Block(nn.Module):
    """Attention and a perceptron of one hidden layer, four times as wide, each added to what comes in."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width)
        self.attention = Attention(width, heads, dropout)
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            OrderedDict(
                up=nn.Linear(width, 4 * width), activation=nn.GELU(approximate="tanh"), down=nn.Linear(4 * width, width)
            )
        )
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """``(n, length, width)`` to the same."""
        x = x + self.dropout(self.attention(self.attention_norm(x)))
        x = x + self.dropout(self.mlp(self.mlp_norm(x)))
        return x


class ClassesFirst(nn.Module):
    """Logits as losses take them, ``(n, length, classes)`` to ``(n, classes, length)``: a view."""

    def forward(self, logits: Tensor) -> Tensor:
        """The same numbers."""
        return logits.transpose(1, 2)


def gpt(
    inputs: tuple[int, ...],
    classes: int,
    *,
    layers: int = 4,
    width: int = 128,
    heads: int = 4,
    dropout: float = 0.0,
) -> nn.Sequential:
    """``(n, length) → (n, classes, length)``: at each position, which character comes next.

    818,176 parameters for windows of 64 out of 65 characters (Tiny Shakespeare); ``gpt(width=256)`` has 3,209,216.
    ``dropout`` is that of GPT-2: of the embedding, of attention weights and of what a block adds.

    A plain `nn.Sequential` of ``embedding``, ``block1`` …, ``norm``, ``head`` and ``classes_first``, which hand on one
    tensor, so that it can be cut between any two of them. The linear layers of a block are ``attention.query``,
    ``key``, ``value``, ``out`` and ``mlp.up``, ``down``.
    """
    shape = sample_shape("gpt", inputs)
    if len(shape) != 1:
        raise BadInput(
            f"model gpt: inputs={shape} does not fit; it takes windows of characters, such as data=tinyshakespeare or "
            "data=markov, which needs no file."
        )
    whole("model gpt: classes", classes)
    whole("model gpt: layers", layers)
    if whole("model gpt: width", width) % whole("model gpt: heads", heads):
        raise BadInput(f"model gpt: width={width}, heads={heads}; heads are equally wide. E.g. width={heads * 32}.")
    if type(dropout) not in (int, float) or not 0 <= dropout < 1:
        raise BadInput(f"model gpt: dropout={dropout!r}; it must be a number from 0 to below 1.")
    chain: dict[str, nn.Module] = {"embedding": Embedding(classes, shape[0], width, dropout)}
    chain |= {f"block{i}": Block(width, heads, dropout) for i in range(1, layers + 1)}
    chain |= {"norm": nn.LayerNorm(width), "head": nn.Linear(width, classes, bias=False)}
    chain["classes_first"] = ClassesFirst()
    model = nn.Sequential(OrderedDict(chain))
    _initialise_(model, layers)
    return model


vars(gpt)["data"] = "markov"  # what samples it takes
vars(gpt)["paper"] = Reference(
    "A. Radford, J. Wu, R. Child, D. Luan, D. Amodei, I. Sutskever",
    "Language models are unsupervised multitask learners",
    2019,
    "OpenAI",
)


@torch.no_grad()
def _initialise_(model: nn.Module, layers: int) -> None:
    """Biases at 0, weights normal; smaller where 2·layers of them add up in the residual."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            adds = name.endswith(("attention.out", "mlp.down"))
            module.weight.normal_(std=_DEVIATION / (2 * layers) ** 0.5 if adds else _DEVIATION)
        if isinstance(module, nn.Linear) and module.bias is not None:
            module.bias.zero_()
