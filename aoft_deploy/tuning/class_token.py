"""The last block of a Vision Transformer, only for the token that the classifier reads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from timm.layers.attention import Attention
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["class_token_logits", "reads_class_token"]

Run = Callable[[nn.Module, Tensor], Tensor]


def reads_class_token(model: nn.Module) -> bool:
    """Whether ``class_token_logits`` computes what the model does.

    The model must be timm's plain Vision Transformer whose classifier reads the class token alone.
    """
    if type(model) is not VisionTransformer or model.global_pool != "token":
        return False
    last = model.blocks[-1] if len(model.blocks) else None
    if model.attn_pool is not None or type(last) is not Block or type(last.attn) is not Attention:
        return False
    attention = last.attn
    dropouts = (each for each in last.modules() if isinstance(each, nn.Dropout))
    dropout = any(each.p and each.training for each in dropouts)
    dropout |= bool(attention.training and attention.attn_drop.p)  # the attention asks only itself
    seen = (model, model.blocks, model.norm, *last.modules())  # they would see one token alone
    hooked = any(each._forward_hooks or each._forward_pre_hooks for each in seen)
    gated = getattr(attention, "gate", None) is not None
    return attention.fused_attn and not (dropout or hooked or gated)


def class_token_logits(model: VisionTransformer, images: Tensor, run: Run) -> Tensor:
    """The model's logits, for which the last block computes the class token alone.

    The other tokens of that block change no logit; only its keys and values are needed. This
    leaves out most of a block, in the forward and in the backward pass.

    Args:
        model: A model that ``reads_class_token``.
        images: (batch, 3, height, width).
        run: Calls a block with the tokens.

    Returns:
        (batch, classes).
    """
    x = model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(images))))
    *blocks, last = model.blocks
    for block in blocks:
        x = run(block, x)
    logits: Tensor = model.forward_head(model.norm(run(_ClassToken(last), x)))
    return logits


class _ClassToken(nn.Module):
    """A block's output for the first token. (batch, tokens, width) → (batch, 1, width)."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        block: Any = self.block
        attention = block.attn
        batch, tokens, _ = x.shape
        shape = batch, tokens, 3, attention.num_heads, attention.head_dim
        qkv = attention.qkv(block.norm1(x)).reshape(shape)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        q, k = attention.q_norm(q[:, :, :1]), attention.k_norm(k)
        heads = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        mixed = attention.proj(attention.norm(heads.reshape(batch, 1, -1)))
        x = x[:, :1] + block.drop_path1(block.ls1(mixed))
        result: Tensor = x + block.drop_path2(block.ls2(block.mlp(block.norm2(x))))
        return result
