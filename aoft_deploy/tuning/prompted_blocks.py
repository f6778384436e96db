"""Prompts in a model: tokens that enter a block and are dropped before the next prompts or the end.

A plain block gets them among its tokens (``PromptedTokens``). In a block of Swin or SwinV2, every
window gets them (``PromptedWindows``). A mixin class inserts the prompts; the block keeps the names
of its parameters and its own forward.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, SupportsIndex

import torch
from timm.models.swin_transformer import SwinTransformerBlock
from timm.models.swin_transformer_v2 import SwinTransformerV2Block
from timm.models.swin_transformer_v2 import WindowAttention as CosineWindowAttention
from torch import Tensor, nn
from torch.nn import functional as F

from aoft_deploy.tuning.sites.site import Site
from aoft_deploy.tuning.updates.delta import PromptDelta
from aoft_deploy.tuning.updates.update import Update

__all__ = ["FixedPrompts", "Prompted", "PromptedTokens", "PromptedWindows", "place_prompts"]


class FixedPrompts(nn.Module):
    """Constant prompts of a merged model.

    Args:
        tokens: (prompts, width).
    """

    tokens: Tensor

    def __init__(self, tokens: Tensor) -> None:
        super().__init__()
        self.register_buffer("tokens", tokens)

    def delta(self) -> PromptDelta:
        """The prompts."""
        return PromptDelta(self.tokens)


class Prompted(nn.Module):
    """Base of the mixins that add prompts to a block's class.

    The block keeps the names of its parameters. A block where prompts enter has one more child,
    ``prompts``. A pickle stores the mixin and the block's own class; loading it combines them
    again.
    """

    def __reduce_ex__(self, protocol: SupportsIndex) -> tuple[Any, ...]:
        return _new_prompted, type(self).__bases__, vars(self)


class PromptedTokens(Prompted):
    """Mixin for a plain block of all tokens: inserts prompts before it, or drops them after it.

    Attributes:
        prefix: Number of tokens in front of the prompts.
        dropped: Number of prompts that are dropped after the block.
    """

    prefix: int
    dropped: int

    def forward(self, x: Tensor, *args: Any, **options: Any) -> Tensor:
        """The block's output for x, (batch, tokens, width)."""
        prompts = self._modules.get("prompts")
        if prompts is not None:
            x = prompts.delta().before(x, self.prefix)  # type: ignore[operator]
        y: Tensor = super().forward(x, *args, **options)
        if self.dropped:
            y = torch.cat([y[:, : self.prefix], y[:, self.prefix + self.dropped :]], dim=1)
        return y


class PromptedWindows(Prompted):
    """Mixin for a block of Swin or SwinV2: the tokens of every window attend to the prompts too.

    VPT (arXiv 2203.12119, section 4.2, and its released code) puts the prompts before the tokens of
    each window, with neither position bias nor mask, and keeps them out of patch merging. Every
    block has its own prompts and drops their outputs, so their queries have no effect. The prompts
    are therefore only additional keys and values.
    """

    def _attn(self, x: Tensor) -> Tensor:
        """The attention's output. x and output: (batch, H, W, width); in Swin, x is normalised."""
        tokens: Tensor = self.prompts.delta().tokens.to(x.dtype)  # type: ignore[operator, union-attr]
        prompts = tokens if tokens.dim() == 3 else tokens[None]
        timm_block: Any = SwinTransformerV2Block
        if isinstance(self, SwinTransformerBlock):
            timm_block, prompts = SwinTransformerBlock, self.norm1(prompts)
        attention = functools.partial(_attend, self.attn, prompts)
        attended: Tensor = timm_block._attn(_WithAttention(self, attention), x)
        return attended


def place_prompts(model: nn.Module, prompted: list[tuple[Site, Update]]) -> None:
    """Put prompts into their blocks. Prompts are dropped before the next block with prompts.

    Args:
        model: A timm model; its blocks are changed in place.
        prompted: Sites of role ``block`` and their prompts.
    """
    for site, update in prompted:
        if site.windows:
            block = model.get_submodule(site.module)
            _mix_in(PromptedWindows, block)
            block.add_module("prompts", update)
    places = {site.index: update for site, update in prompted if not site.windows}
    blocks = list(model.get_submodule("blocks").children()) if places else []
    count = 0
    for index, block in enumerate(blocks):
        own = places.get(index)
        if own is not None:
            delta = own.delta()
            assert isinstance(delta, PromptDelta)
            count = len(delta.tokens)
        last = index + 1 == len(blocks) or index + 1 in places
        if own is not None or last:
            _mix_in(PromptedTokens, block)
            assert isinstance(block, PromptedTokens)
            block.prefix = int(model.num_prefix_tokens)  # type: ignore[arg-type]
            block.dropped = count if last else 0
            if own is not None:
                block.add_module("prompts", own)


class _WithAttention:
    """A block with another attention, for timm's own shifting and partitioning of windows."""

    def __init__(self, block: nn.Module, attention: Callable[..., Tensor]) -> None:
        self.block, self.attn = block, attention

    def __getattr__(self, name: str) -> Any:
        return getattr(self.block, name)


def _attend(attention: Any, prompts: Tensor, x: Tensor, mask: Tensor | None = None) -> Tensor:
    """Window attention of timm with prompts as additional keys and values.

    Args:
        attention: The ``WindowAttention`` of Swin or SwinV2.
        prompts: (1 or batch, prompts, width), shared by all samples or one set per sample.
        x: (batch · windows, tokens, width), with the windows of a sample in a row.
        mask: Summand of the scores of each window, (windows, tokens, tokens), or None.

    Returns:
        (batch · windows, tokens, width).
    """
    q, k, v = _heads(attention, x)
    windows = x.shape[0] // prompts.shape[0]
    _, prompt_k, prompt_v = (t.repeat_interleave(windows, 0) for t in _heads(attention, prompts))
    k, v = torch.cat([prompt_k, k], dim=2), torch.cat([prompt_v, v], dim=2)
    bias = _position_bias(attention)
    if mask is not None:
        bias = bias + mask[:, None]
    bias = F.pad(bias, (prompts.shape[1], 0))
    if getattr(attention, "fused_attn", False):
        bias = bias if mask is None else bias.repeat(x.shape[0] // bias.shape[0], 1, 1, 1)
        dropout = attention.attn_drop.p if attention.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, bias, dropout_p=dropout, scale=1.0)
    else:
        scores = (q @ k.mT).view(-1, *bias.shape).add(bias).flatten(0, 1)
        y = attention.attn_drop(scores.softmax(dim=-1)) @ v
    merged: Tensor = attention.proj(y.transpose(1, 2).flatten(2))
    dropped: Tensor = attention.proj_drop(merged)
    return dropped


def _heads(attention: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values, scaled so that q kᵀ are the scores.

    x: (n, tokens, width); each result: (n, heads, tokens, head width).
    """
    cosine = isinstance(attention, CosineWindowAttention)
    if not cosine or attention.q_bias is None:
        qkv = attention.qkv(x)
    else:
        bias = torch.cat([attention.q_bias, attention.k_bias, attention.v_bias])
        qkv = F.linear(x, attention.qkv.weight, bias)
    by_head: Tensor = qkv.reshape(*x.shape[:2], 3, attention.num_heads, -1)
    q, k, v = by_head.permute(2, 0, 3, 1, 4).unbind(0)
    if not cosine:
        return q * attention.scale, k, v
    scale = attention.logit_scale.clamp(max=math.log(1 / 0.01)).exp()
    return F.normalize(q, dim=-1) * scale, F.normalize(k, dim=-1), v


def _position_bias(attention: Any) -> Tensor:
    """The position bias of a window's scores, (1, heads, tokens, tokens)."""
    if not isinstance(attention, CosineWindowAttention):
        bias: Tensor = attention._get_rel_pos_bias()
        return bias
    table = attention.cpb_mlp(attention.relative_coords_table).flatten(0, -2)
    by_head: Tensor = table[attention.relative_position_index].permute(2, 0, 1)
    return 16 * torch.sigmoid(by_head[None])


@functools.cache
def _prompted_class(mixin: type[Prompted], cls: type[nn.Module]) -> Any:
    return type(f"Prompted{cls.__name__}", (mixin, cls), {"__module__": __name__})


def _new_prompted(mixin: Any, cls: Any) -> Any:
    """An empty block of both classes, which pickle and copy fill."""
    prompted = _prompted_class(mixin, cls)
    return prompted.__new__(prompted)


def _mix_in(mixin: Any, block: Any) -> None:
    """Add a mixin to a block's class."""
    block_class: Any = type(block)
    block.__class__ = _prompted_class(mixin, block_class)
