"""The forward pass of training: the same logits as the model's, with less work and memory."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from aoft_deploy.errors import SettingError
from aoft_deploy.tuning.class_token import class_token_logits, reads_class_token
from aoft_deploy.tuning.frozen_functions import FrozenFunctions

__all__ = ["check_checkpointing", "training_logits"]


def training_logits(model: nn.Module, images: Tensor, checkpointing: bool) -> Tensor:
    """Logits for a backward pass.

    Autograd records nothing before the first site, because nothing there is trained.

    Args:
        model: A timm model with frozen weights and updates.
        images: (batch, 3, height, width).
        checkpointing: Keep only the inputs of the blocks. The model passed ``check_checkpointing``.

    Returns:
        (batch, classes).
    """
    if not reads_class_token(model):
        # timm's own checkpointing would compute blocks again without our functions.
        logits: Tensor = model(images)
        return logits
    again = checkpointing or bool(model.grad_checkpointing)
    with FrozenFunctions():
        return class_token_logits(model, images, _checkpointed if again else _call)  # type: ignore[arg-type]


def check_checkpointing(model: nn.Module) -> None:
    """Refuse a model whose blocks cannot be computed again in the backward pass.

    Raises:
        SettingError: The model is not timm's plain Vision Transformer with a class token.
    """
    if not reads_class_token(model):
        raise SettingError(
            f"`checkpointing` needs timm's VisionTransformer, whose classifier reads the class "
            f"token and whose blocks are plain, not {type(model).__name__} with these updates: "
            "compute each step in parts with `accumulate` instead."
        )


def _call(block: nn.Module, tokens: Tensor) -> Tensor:
    result: Tensor = block(tokens)
    return result


def _contexts() -> tuple[AbstractContextManager[None], FrozenFunctions]:
    """Contexts of a block's first computation and of its second one, in the backward pass."""
    return nullcontext(), FrozenFunctions()


def _checkpointed(block: nn.Module, tokens: Tensor) -> Tensor:
    result: Tensor = checkpoint(block, tokens, use_reentrant=False, context_fn=_contexts)
    return result
