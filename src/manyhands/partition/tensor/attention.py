"""torch's own multi-head attention with some of the heads on each rank.

    y = Σ_p concat_{h on p}(head_h) W_out[:, h]ᵀ + b_out

Heads know nothing of each other until the last projection, which is cut by its inputs: one sum of n·T·width elements
forward and one backward (Shoeybi et al. 2019, arXiv:1909.08053, §3). The maps of attention themselves are not put
together: where they are asked for, None is returned.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from manyhands.communication.communicator import Communicator
from manyhands.communication.topology import shares
from manyhands.contract import Block
from manyhands.errors import BadInput
from manyhands.partition.conjugate import copied
from manyhands.partition.tensor.layers import Blocks, RowLinear


class CutAttention(nn.Module):
    """Stands in for a `nn.MultiheadAttention`, of which this rank has some heads."""

    #: Tells torch's encoder layer that its fused path, which reads the whole weights, is not for this one.
    batch_first = False

    def __init__(self, whole: nn.MultiheadAttention, group: Communicator) -> None:
        super().__init__()
        heads, width = whole.num_heads, whole.head_dim
        lo, hi = shares(heads, group.size)[group.rank]
        ranges = [(k * heads * width + lo * width, k * heads * width + hi * width) for k in range(3)]
        self._group, self._first_is_batch, self._p = group, whole.batch_first, whole.dropout
        self.num_heads, self.head_dim = hi - lo, width
        self.blocks: Blocks = {"in_proj_weight": Block.of(whole.in_proj_weight, 0, ranges)}
        self.in_proj_weight = nn.Parameter(self.blocks["in_proj_weight"].take(whole.in_proj_weight.detach()))
        self.in_proj_bias = None
        if "in_proj_bias" in dict(whole.named_parameters(recurse=False)):
            self.blocks["in_proj_bias"] = Block.of(whole.in_proj_bias, 0, ranges)
            self.in_proj_bias = nn.Parameter(self.blocks["in_proj_bias"].take(whole.in_proj_bias.detach()))
        inputs = Block.of(whole.out_proj.weight, 1, [(lo * width, hi * width)])
        self.blocks["out_proj.weight"] = inputs
        bias = whole.out_proj.bias
        self.out_proj = RowLinear(
            inputs.take(whole.out_proj.weight.detach()),
            None if bias is None else bias.detach(),  # type: ignore[redundant-expr]
            group,
        )

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, None]:
        """As `nn.MultiheadAttention.forward`, without maps; batches of sequences only."""
        if query.dim() != 3:
            raise BadInput("A cut nn.MultiheadAttention takes batches of sequences (three dims), not one sequence.")
        same, same_value = key is query, value is key
        query = copied(query, self._group)
        key = query if same else copied(key, self._group)
        value = key if same_value else copied(value, self._group)
        weights = self.in_proj_weight.chunk(3)
        biases: Any = (None, None, None) if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        q, k, v = (self._heads(F.linear(x, w, b)) for x, w, b in zip((query, key, value), weights, biases, strict=True))
        mask = self._mask(attn_mask, key_padding_mask, q)
        y = F.scaled_dot_product_attention(
            q, k, v, mask, self._p if self.training else 0.0, is_causal=is_causal and mask is None
        )
        return self.out_proj(self._joined(y)), None

    def _heads(self, x: Tensor) -> Tensor:
        """``(batch, own heads, length, head_dim)``."""
        x = x.reshape(*x.shape[:-1], self.num_heads, self.head_dim)
        return x.transpose(1, 2) if self._first_is_batch else x.permute(1, 2, 0, 3)

    def _joined(self, y: Tensor) -> Tensor:
        y = y.transpose(1, 2) if self._first_is_batch else y.permute(2, 0, 1, 3)
        return y.flatten(-2)

    def _mask(self, attn_mask: Tensor | None, padding: Tensor | None, q: Tensor) -> Tensor | None:
        """Both masks as one that is added; (batch · heads, …) masks are of all heads, of which some are here."""
        found: Tensor | None = None
        if attn_mask is not None:
            found = _added(attn_mask, q.dtype)
            if found.dim() == 3:
                lo = shares(len(found) // len(q), self._group.size)[self._group.rank][0]
                found = found.reshape(len(q), -1, *found.shape[1:])[:, lo : lo + self.num_heads]
        if padding is not None:
            own = _added(padding, q.dtype)[:, None, None, :]
            found = own if found is None else found + own
        return found


def _added(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask of truth values (True: hidden) as one that is added."""
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(mask, float("-inf"))


def refusal(whole: nn.MultiheadAttention, size: int) -> str | None:
    """Why it cannot be cut, if it cannot."""
    if whole.num_heads < size:
        return f"it has {whole.num_heads} heads for {size} ranks"
    if not whole._qkv_same_embed_dim:
        return "its keys or values have a width of their own (kdim, vdim)"
    if whole.bias_k is not None or whole.add_zero_attn:
        return "it adds a key and a value of its own (add_bias_kv, add_zero_attn)"
    return None
