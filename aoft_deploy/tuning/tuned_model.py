"""A timm model with a method's updates in it: ``attach`` creates it, ``merge`` folds it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from timm.data.config import resolve_model_data_config
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from aoft_deploy.classes import Classes
from aoft_deploy.data.image_inputs import Predictor
from aoft_deploy.data.preprocessing import Preprocessing
from aoft_deploy.errors import CheckpointError, SettingError
from aoft_deploy.tuning.backbones.identity import Backbone, image_size
from aoft_deploy.tuning.sites.classifier import classifier_names
from aoft_deploy.tuning.training_forward import training_logits
from aoft_deploy.tuning.updates.update import Update

__all__ = ["TunedModel"]


class TunedModel(nn.Module, Predictor):
    """A frozen backbone with trained updates and a trained classifier, created by ``attach``.

    ``classes``, ``activation`` and ``preprocessing`` can be set; ``save`` writes them.

    Attributes:
        backbone: The timm model, with updates at its sites.
        method: Name of the method.
        settings: Settings of the method, including defaults.
        identity: Identity of the backbone before training.
        classifier: Names of the classifier's parameters in the backbone.
        direct: Names of the backbone's own parameters that are trained: the classifier's, or all.
        updates: The update of every site, by the site's name.
        checkpointing: Keep only the inputs of the blocks for the backward pass, which computes each
            block again: less memory, more time, the same gradients.
    """

    checkpointing = False

    def __init__(
        self,
        backbone: nn.Module,
        method: str,
        settings: dict[str, Any],
        updates: dict[str, Update],
        identity: Backbone,
        everything: bool = False,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.method = method
        self.settings = settings
        self.identity = identity
        self.updates = updates
        self.classifier = classifier_names(backbone)
        names = [name for name, _ in backbone.named_parameters()]
        self.direct = names if everything else self.classifier
        self._classes = Classes(map(str, range(self.num_classes)))
        self._preprocessing: Preprocessing | None = None
        self.train(backbone.training)

    def forward(self, x: Tensor) -> Tensor:
        """Logits. x: (batch, 3, H, W) → (batch, classes)."""
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            return training_logits(self.backbone, x, self.checkpointing)
        logits: Tensor = self.backbone(x)
        return logits

    def forward_features(self, x: Tensor) -> Tensor:
        """What the classifier's pooling takes, such as tokens (batch, tokens, width)."""
        features: Tensor = self.backbone.forward_features(x)  # type: ignore[operator]
        return features

    @property
    def classes(self) -> Classes:
        """One name for each logit, ``"0"``, ``"1"`` … until names are set.

        Raises:
            SettingError: The number of names differs from the number of logits.
        """
        return self._classes

    @classes.setter
    def classes(self, names: Sequence[str]) -> None:
        if len(names) != self.num_classes:
            raise SettingError(
                f"{len(names)} classes are named, but the model has {self.num_classes} logits."
            )
        activation = names.activation if isinstance(names, Classes) else self.activation
        self._classes = Classes(map(str, names), activation)

    @property
    def activation(self) -> str:
        """What the outputs mean: ``softmax``, ``sigmoid`` (independent labels) or ``none``.

        Raises:
            UnknownNameError: Another text is set.
        """
        return self._classes.activation

    @activation.setter
    def activation(self, activation: str) -> None:
        self._classes = Classes(self._classes, activation)

    @property
    def preprocessing(self) -> Preprocessing:
        """How an image becomes the input: as in training, or the backbone's own if none is set.

        Raises:
            SettingError: None is set, and the backbone's own input is no RGB image.
        """
        if self._preprocessing is None:
            config = resolve_model_data_config(self.backbone)  # type: ignore[no-untyped-call]
            default = Preprocessing.from_timm(config)
            size = image_size(self.backbone) or default.size
            self._preprocessing = replace(default, size=size)
        return self._preprocessing

    @preprocessing.setter
    def preprocessing(self, preprocessing: Preprocessing) -> None:
        self._preprocessing = preprocessing

    @torch.inference_mode()
    def image_logits(self, images: Sequence[Image.Image]) -> NDArray[np.float32]:
        """Logits in evaluation mode, (batch, classes), of upright RGB images."""
        inputs = torch.from_numpy(np.stack([self.preprocessing(image) for image in images]))
        weight = self.backbone.get_parameter(self.classifier[0])
        training = self.training
        self.eval()
        try:
            logits = self(inputs.to(weight.device, weight.dtype))
        finally:
            self.train(training)
        found: NDArray[np.float32] = logits.float().cpu().numpy()
        return found

    def train(self, mode: bool = True) -> Self:
        """Set the training mode, but keep the backbone's BatchNorm statistics."""
        super().train(mode)
        for module in self.backbone.modules():
            if isinstance(module, _BatchNorm):
                module.eval()
        return self

    def trained(self) -> dict[str, nn.Parameter]:
        """The trained parameters, by their names in a checkpoint.

        Names are ``update.SITE.PARAMETER`` and ``head.NAME``, and ``backbone.NAME`` in full
        fine-tuning.
        """
        named = {
            f"update.{site}.{name}": parameter
            for site, update in self.updates.items()
            for name, parameter in update.named_parameters()
        }
        for name in self.direct:
            kind = "head" if name in self.classifier else "backbone"
            named[f"{kind}.{name}"] = self.backbone.get_parameter(name)
        return named

    def load_trained(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy tensors into the trained parameters.

        Args:
            tensors: Tensors with exactly the names and shapes of ``trained()``.

        Raises:
            CheckpointError: A name is missing or unknown, a shape differs, a value is not finite.
        """
        parameters = self.trained()
        _check_tensors(tensors, {name: p.shape for name, p in parameters.items()})
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(tensors[name])

    @property
    def num_classes(self) -> int:
        """Number of logits."""
        return len(self.backbone.get_parameter(self.classifier[-1]))


def _check_tensors(tensors: Mapping[str, Tensor], shapes: dict[str, torch.Size]) -> None:
    for name, shape in shapes.items():
        if name not in tensors:
            raise CheckpointError(f"The checkpoint lacks {name}.")
        if tensors[name].shape != shape:
            raise CheckpointError(
                f"{name} has shape {tuple(tensors[name].shape)} in the checkpoint, "
                f"but the model needs {tuple(shape)}."
            )
        if not tensors[name].isfinite().all():
            raise CheckpointError(f"{name} holds values that are not finite.")
    unknown = sorted(set(tensors) - set(shapes))
    if unknown:
        raise CheckpointError(
            f"The checkpoint holds {unknown[0]}, which the model has no place for."
        )
