"""What exporters write and engines run: interfaces, registry, description, proof, prediction."""

from __future__ import annotations

from typing import TYPE_CHECKING

from aoft_deploy._lazy import lazy_names

if TYPE_CHECKING:
    from aoft_deploy.artefacts.prediction import load_classifier
    from aoft_deploy.artefacts.protocols import Engine, Exporter
    from aoft_deploy.artefacts.registry import exporter_names, get_exporter, load_artefact
    from aoft_deploy.artefacts.spec import Recipe
    from aoft_deploy.artefacts.verification import verify

__all__ = [
    "Engine",
    "Exporter",
    "Recipe",
    "exporter_names",
    "get_exporter",
    "load_artefact",
    "load_classifier",
    "verify",
]

_HOMES = {
    "Engine": "protocols",
    "Exporter": "protocols",
    "Recipe": "spec",
    "exporter_names": "registry",
    "get_exporter": "registry",
    "load_artefact": "registry",
    "load_classifier": "prediction",
    "verify": "verification",
}
__getattr__, __dir__ = lazy_names(__name__, _HOMES)
