"""Prompts in a model: tokens that come into a block, and do not leave it beside the block's own.

A plain block takes them among its tokens. A block of windows, Swin's and SwinV2's, shows them to
every window (``PromptedWindows``). Either way a block keeps its parameters' names and its own
forward; the class that is mixed into the block's says where the prompts go.
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
    """Prompts as constants of a merged model.

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
    """Mixed into a block's class, by one of the classes below, to make it see prompts.

    The block keeps its parameters' names; ``prompts`` is one more child where prompts come in. A
    block is pickled with its two classes, of which the one it has is made again.
    """

    def __reduce_ex__(self, protocol: SupportsIndex) -> tuple[Any, ...]:
        return _empty, type(self).__bases__, vars(self)


class PromptedTokens(Prompted):
    """A plain block of all tokens: prompts come in before it, or are dropped after it.

    Attributes:
        prefix: Tokens in front of the prompts.
        dropped: Prompts that do not leave the block.
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
    """A block of Swin or SwinV2: the tokens of every window see the block's prompts too.

    VPT (arXiv 2203.12119, section 4.2, and its released code) puts the prompts before the tokens of
    each window, with neither position bias nor mask, and keeps them out of patch merging. With
    prompts of every block's own, what the block makes of them is dropped after it, and so is what
    their queries find: here they are further keys and values, and nothing else.
    """

    def _attn(self, x: Tensor) -> Tensor:
        """What the windows attend to. x: (batch, H, W, width), normalised in Swin; as x."""
        tokens: Tensor = self.prompts.delta().tokens.to(x.dtype)  # type: ignore[operator, union-attr]
        prompts = tokens if tokens.dim() == 3 else tokens[None]
        timm_block: Any = SwinTransformerV2Block
        if isinstance(self, SwinTransformerBlock):
            timm_block, prompts = SwinTransformerBlock, self.norm1(prompts)
        attention = functools.partial(_attend, self.attn, prompts)
        attended: Tensor = timm_block._attn(_WithAttention(self, attention), x)
        return attended


class _WithAttention:
    """A block as timm's own shifting and partitioning sees it, but with another attention."""

    def __init__(self, block: nn.Module, attention: Callable[..., Tensor]) -> None:
        self.block, self.attn = block, attention

    def __getattr__(self, name: str) -> Any:
        return getattr(self.block, name)


def _attend(attention: Any, prompts: Tensor, x: Tensor, mask: Tensor | None = None) -> Tensor:
    """Window attention of timm with prompts as further keys and values.

    Args:
        attention: The ``WindowAttention`` of Swin or SwinV2.
        prompts: (1 or batch, prompts, width); one for all samples, or each sample's own.
        x: (batch · windows, tokens, width), the windows of a sample in turn.
        mask: What is added to the scores of each window, (windows, tokens, tokens), or None.

    Returns:
        (batch · windows, tokens, width).
    """
    q, k, v = _heads(attention, x)
    windows = x.shape[0] // prompts.shape[0]
    _, own_k, own_v = (each.repeat_interleave(windows, 0) for each in _heads(attention, prompts))
    k, v = torch.cat([own_k, k], dim=2), torch.cat([own_v, v], dim=2)
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
    """Queries, keys and values, scaled so that the products of the first two are the scores.

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
    """What is added to the scores of a window's tokens, (1, heads, tokens, tokens)."""
    if not isinstance(attention, CosineWindowAttention):
        bias: Tensor = attention._get_rel_pos_bias()
        return bias
    table = attention.cpb_mlp(attention.relative_coords_table).flatten(0, -2)
    by_head: Tensor = table[attention.relative_position_index].permute(2, 0, 1)
    return 16 * torch.sigmoid(by_head[None])


@functools.cache
def _prompted_class(mixed_in: type[Prompted], cls: type[nn.Module]) -> Any:
    return type(f"Prompted{cls.__name__}", (mixed_in, cls), {"__module__": __name__})


def _empty(mixed_in: Any, cls: Any) -> Any:
    """A block of both classes without its contents, for pickle and copy to fill."""
    prompted = _prompted_class(mixed_in, cls)
    return prompted.__new__(prompted)


def _mix_in(mixed_in: Any, block: Any) -> None:
    """Make a block one of both classes."""
    own: Any = type(block)
    block.__class__ = _prompted_class(mixed_in, own)


def place_prompts(model: nn.Module, prompted: list[tuple[Site, Update]]) -> None:
    """Let prompts come into their blocks; none outlive a block that is followed by others.

    Args:
        model: A timm model, whose blocks are changed.
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
