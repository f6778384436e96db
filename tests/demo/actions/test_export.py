"""Export of a session's task."""

from __future__ import annotations

from aoft_demo.actions.export import export_task
from aoft_demo.tasks.session import Session
from aoft_deploy.artefacts.engine import EngineOptions
from aoft_deploy.artefacts.prediction import load_classifier


def test_an_export_is_verified_and_has_a_manifest(session: Session) -> None:
    exported = export_task(session, "colour", uint8=True)
    assert exported.path.name == "colour.onnx" and exported.manifest.is_file()
    assert exported.report.agreement == 1
    assert load_classifier(exported.path, options=EngineOptions(threads=1)).engine.takes_pixels
