"""Metadata of an artefact: strings stored in the file, structured values as JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

from aoft_deploy.classes import Classes, check_classes
from aoft_deploy.errors import ArtefactError, CheckpointError, UnknownNameError
from aoft_deploy.files import json_text
from aoft_deploy.texts import decoded

if TYPE_CHECKING:
    from aoft_deploy.data.preprocessing import Preprocessing

__all__ = ["ArtefactInfo"]

FORMAT = "aoft-deploy/1"
FLEET_FORMAT = "aoft-deploy-fleet/1"


@dataclass(frozen=True)
class ArtefactInfo:
    """Typed access to an artefact's metadata.

    Properties are parsed on access, and raise ``ArtefactError`` if the entry is missing or damaged.

    Attributes:
        texts: The stored metadata.
        owner: The artefact's path or name, for messages.
    """

    texts: Mapping[str, str]
    owner: str = "The artefact"

    @classmethod
    def of_model(
        cls,
        classes: Classes,
        preprocessing: Preprocessing,
        method: str,
        settings: Mapping[str, Any],
        backbone: Mapping[str, Any],
    ) -> Self:
        """Metadata of a single task's model.

        Args:
            classes: Class names, in the order of the logits.
            preprocessing: Converts an image to the model's input.
            method: Name of the fine-tuning method.
            settings: Settings of the method.
            backbone: Identity of the backbone.
        """
        return cls(
            {
                "format": FORMAT,
                "classes": json_text(list(classes)),
                "activation": classes.activation,
                "preprocessing": json.dumps(preprocessing.to_dict()),
                "method": method,
                "settings": json.dumps(dict(settings)),
                "backbone": json.dumps(dict(backbone)),
            }
        )

    @classmethod
    def of_fleet(
        cls,
        tasks: Mapping[str, Classes],
        model: Self,
        defaults: Mapping[str, Any],
        row: Sequence[Any],
    ) -> Self:
        """Metadata of a fleet: many tasks on one backbone.

        Args:
            tasks: Name and classes of each task, in the order of the tables.
            model: Metadata of one task, for the entries that all tasks share.
            defaults: Default settings of the method.
            row: Names and shapes of a task's parameters, in the order of the bank's columns.
        """
        entries = [
            {"name": name, "classes": list(classes), "activation": classes.activation}
            for name, classes in tasks.items()
        ]
        shared = {key: model.texts[key] for key in ("preprocessing", "method", "settings")}
        return cls(
            {
                "format": FLEET_FORMAT,
                "tasks": json_text(entries),
                **shared,
                "defaults": json.dumps(dict(defaults)),
                "backbone": model.texts["backbone"],
                "row": json.dumps(row),
            }
        )

    def having(self, **texts: str | None) -> Self:
        """A copy with further entries, without those that are None."""
        given = {name: text for name, text in texts.items() if text is not None}
        return type(self)({**self.texts, **given}, self.owner)

    @property
    def is_fleet(self) -> bool:
        """Whether the artefact is a fleet."""
        return "tasks" in self.texts

    @property
    def preprocessing(self) -> Preprocessing:
        """Converts an image to the artefact's input."""
        from aoft_deploy.data.preprocessing import Preprocessing

        value = self._json("preprocessing")
        try:
            return Preprocessing.from_dict(value)
        except CheckpointError as error:
            raise ArtefactError(f"{self.owner}: {error}") from error
        except (TypeError, ValueError, AttributeError) as error:
            raise self._damaged("preprocessing") from error

    @property
    def classes(self) -> Classes:
        """Class names of a single task, in the order of the logits."""
        value = self._json("classes")
        if not isinstance(value, list):
            raise self._damaged("classes")
        classes = self._classes(value, self.texts.get("activation"))
        check_classes(classes, self.owner, ArtefactError)
        return classes

    @property
    def tasks(self) -> dict[str, Classes]:
        """Class names of each task of a fleet, by task name, in the order of the tables."""
        value = self._json("tasks")
        try:
            return {
                str(task["name"]): self._classes(task["classes"], task.get("activation"))
                for task in value
            }
        except (KeyError, TypeError, AttributeError) as error:
            raise self._damaged("tasks") from error

    @property
    def backbone(self) -> dict[str, Any]:
        """Identity of the backbone: name, arguments, digest and origin."""
        value = self._json("backbone")
        if not isinstance(value, dict):
            raise self._damaged("backbone")
        return value

    @property
    def precision(self) -> str:
        """Precision of most of the arithmetic, such as ``fp32``."""
        return self.texts.get("precision", "fp32")

    @property
    def form(self) -> str:
        """Form of a fleet: ``mixed`` or ``folded``."""
        return self.texts.get("form", "mixed")

    @property
    def flops(self) -> int | None:
        """Floating-point operations for one image; None if unknown."""
        count = self.texts.get("flops", "")
        return int(count) if count.isdecimal() else None

    @property
    def left_in_float(self) -> tuple[str, ...]:
        """Names of the matrix products that stay in a higher precision than the artefact's."""
        return tuple(json.loads(self.texts.get("left_in_float", "[]")))

    @property
    def placement(self) -> dict[str, dict[str, int]]:
        """Number of nodes by execution provider and operator; empty if the engine states none."""
        value = self._json("placement") if "placement" in self.texts else {}
        if not isinstance(value, dict) or not all(isinstance(x, dict) for x in value.values()):
            raise self._damaged("placement")
        return value

    @property
    def nodes_on_cpu(self) -> list[dict[str, str]]:
        """Name and operator of each node that an engine on a GPU leaves to the CPU."""
        value = self._json("nodes_on_cpu") if "nodes_on_cpu" in self.texts else []
        if not isinstance(value, list) or not all(isinstance(x, dict) for x in value):
            raise self._damaged("nodes_on_cpu")
        return value

    def entries(self) -> dict[str, Any]:
        """All entries, decoded if they are JSON."""
        return {key: decoded(text) for key, text in self.texts.items()}

    def _classes(self, names: Any, activation: Any) -> Classes:
        try:
            return Classes(map(str, names), activation)
        except UnknownNameError as error:
            raise ArtefactError(f"{self.owner}: {error} Upgrade aoft-deploy.") from error

    def _json(self, key: str) -> Any:
        try:
            return json.loads(self.texts[key])
        except (KeyError, TypeError, ValueError, RecursionError) as error:
            raise self._damaged(key) from error

    def _damaged(self, key: str) -> ArtefactError:
        return ArtefactError(
            f"{self.owner} has no valid entry {key!r} in its metadata: it was not written by "
            "aoft-export, or is damaged."
        )
