"""Artefacts: exporters and engines, their registry, metadata, verification, prediction, timing."""

from __future__ import annotations

from typing import TYPE_CHECKING

from aoft_deploy._lazy import lazy_names

if TYPE_CHECKING:
    from aoft_deploy.artefacts.description import ArtefactInfo
    from aoft_deploy.artefacts.engine import Engine, EngineOptions
    from aoft_deploy.artefacts.exporter import Exporter
    from aoft_deploy.artefacts.prediction import load_classifier
    from aoft_deploy.artefacts.registry import exporter_names, get_exporter, load_artefact
    from aoft_deploy.artefacts.spec import ExportSpec, InputSpec
    from aoft_deploy.artefacts.verification import verify

__all__ = [
    "ArtefactInfo",
    "Engine",
    "EngineOptions",
    "ExportSpec",
    "Exporter",
    "InputSpec",
    "exporter_names",
    "get_exporter",
    "load_artefact",
    "load_classifier",
    "verify",
]

_HOMES = {
    "ArtefactInfo": "description",
    "Engine": "engine",
    "EngineOptions": "engine",
    "ExportSpec": "spec",
    "Exporter": "exporter",
    "InputSpec": "spec",
    "exporter_names": "registry",
    "get_exporter": "registry",
    "load_artefact": "registry",
    "load_classifier": "prediction",
    "verify": "verification",
}
__getattr__, __dir__ = lazy_names(__name__, _HOMES)
