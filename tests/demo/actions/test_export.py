"""Tasks as files to take home."""

from __future__ import annotations

import importlib
import json
import re
import shlex
import zipfile
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from aoft_demo.actions.classify import classify
from aoft_demo.actions.export import TakenHome, export_all, export_task
from aoft_demo.actions.export_code import Plan, export_code, next_steps
from aoft_demo.actions.formats import CHECKPOINT, DEFAULT, Format
from aoft_demo.actions.sample_pictures import write_sample_pictures
from aoft_demo.tasks.session import Session
from aoft_demo.tasks.shared_fleet import Task, bundled_checkpoints
from aoft_deploy.artefacts.prediction import load_classifier
from aoft_deploy.artefacts.verification import Report
from aoft_deploy.checkpoints.checkpoint import read_checkpoint
from aoft_deploy.data.images import read_image
from aoft_deploy.errors import CheckpointError, ImageError, UnknownNameError, VerificationError

NAME = bundled_checkpoints()[0].stem


def report_of(done: TakenHome) -> Report:
    assert done.report is not None
    return done.report


@pytest.mark.parametrize("key", [DEFAULT, f"{DEFAULT}-uint8", "timm"])
def test_a_file_gives_the_fleets_answers_and_its_manifest_has_the_report(
    session: Session, key: str
) -> None:
    done = export_task(session, NAME, key)
    report = report_of(done)
    assert (report.images, done.pictures, report.agreement) == (32, 25, 1)
    assert done.manifest is not None
    manifest = json.loads(done.manifest.read_text("utf-8"))
    assert manifest["verification"]["max_abs"] == report.max_abs
    assert manifest["command"] == done.code["Shell"]
    assert ("--uint8" in done.code["Shell"]) is key.endswith("uint8")
    assert ("uint8=True" in done.code["Python"]) is key.endswith("uint8")
    assert done.steps["Ask it about a picture"] == f"aoft-predict {done.path.name} picture.png"
    picture = session.shared.examples[0]
    classifier = load_classifier(done.path)
    assert getattr(classifier.engine, "takes_pixels", False) is key.endswith("uint8")
    ours = {a.label: a[1] for a in classify(session, picture, [NAME], top=9).predictions[NAME]}
    theirs = {a.label: a[1] for a in classifier.predict(picture, 9)}
    assert theirs == pytest.approx(ours, abs=2e-5)
    assert sorted(p.name for p in (session.folder / "exports").iterdir()) == sorted(
        [done.path.name, done.manifest.name]
    )


def test_eight_bits_are_checked_on_pictures_alone(session: Session) -> None:
    done = export_task(session, NAME, f"{DEFAULT}-int8")
    report = report_of(done)
    assert done.path.name == f"{NAME}-int8.onnx" and done.size < 5e6
    assert report.images == done.pictures == 25 and report.tolerance is None
    assert "precision='int8'" in done.code["Python"]


def test_a_folder_is_packed_with_its_manifest(session: Session, tmp_path: Path) -> None:
    done = export_task(session, NAME, "peft")
    assert done.path.name == f"{NAME}.peft.zip" and done.size == done.path.stat().st_size
    with zipfile.ZipFile(done.path) as archive:
        archive.extractall(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {f"{NAME}.peft", f"{NAME}.peft.json"}
    picture = session.shared.examples[0]
    ((label, share),) = load_classifier(tmp_path / f"{NAME}.peft").predict(picture, 1)
    best = classify(session, picture, [NAME], top=1).predictions[NAME][0]
    assert best.label == label and best[1] == pytest.approx(share, abs=2e-5)
    assert "peft.PeftModel" in done.steps["Use it without this project"]


def test_the_tasks_own_file_is_a_copy(session: Session) -> None:
    done = export_task(session, NAME, "checkpoint")
    assert done.path.read_bytes() == bundled_checkpoints()[0].read_bytes()
    assert done.report is None and done.manifest is None
    assert read_checkpoint(done.path).classes == session.tasks[NAME].classes


def test_all_tasks_fit_into_one_file(session: Session) -> None:
    task = session.tasks[NAME]
    session.tasks["bare"] = Task(task.key, task.classes, None)
    done = export_all(session)
    names = [path.stem for path in bundled_checkpoints()]
    assert done.tasks == tuple(names) and done.left_out == ("bare",)
    assert report_of(done).agreement == 1
    assert done.size < 1.2 * export_task(session, NAME, DEFAULT).size
    assert done.code["Shell"].startswith(f"aoft-export --fleet {names[0]}.ckpt {names[1]}.ckpt")
    done = export_all(session)
    assert {path.name for path in (session.folder / "exports").iterdir()} == {
        "all-skills.onnx",
        "all-skills.onnx.json",
    }
    asked = done.steps["Ask it about a picture"]
    assert asked == f"aoft-predict all-skills.onnx --task {names[0]} picture.png"
    odd = next_steps(done.path, "it's (2)")
    assert shlex.split(odd["Ask it about a picture"])[2:4] == ["--task", "it's (2)"]
    assert repr("it's (2)") in odd["Ask it in Python"]
    picture = session.shared.examples[0]
    for name in names:
        expected = classify(session, picture, [name], top=1).predictions[name][0]
        ((label, share),) = load_classifier(done.path, name).predict(picture, 1)
        assert label == expected.label and share == pytest.approx(expected[1], abs=2e-5)
    session.tasks = {"bare": session.tasks["bare"]}
    with pytest.raises(CheckpointError, match="no checkpoint of any skill"):
        export_all(session)


def test_a_failed_check_writes_nothing(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    merged = importlib.import_module("aoft_deploy.export.merged")

    def fail(*arguments: Any, **options: Any) -> None:
        raise VerificationError("The answers differ.")

    monkeypatch.setattr(merged, "verify", fail)
    with pytest.raises(VerificationError, match="The answers differ"):
        export_task(session, NAME, "timm")
    assert not any((session.folder / "exports").iterdir())


def test_a_removed_task_and_an_ended_session_leave_nothing(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UnknownNameError, match="task 'nothing'"):
        export_task(session, "nothing", DEFAULT)
    export = importlib.import_module("aoft_demo.actions.export")

    def write(examples: Any, folder: Path, size: int) -> int:
        session.end()
        return 0

    monkeypatch.setattr(export, "write_sample_pictures", write)
    export_task(session, NAME, "timm")
    assert not session.folder.exists()


def test_the_own_file_of_a_skill_is_its_checkpoint(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    for checkpoint in bundled_checkpoints()[1:3]:
        done = export_task(session, checkpoint.stem, CHECKPOINT)
        assert done.path.read_bytes() == checkpoint.read_bytes()
        assert done.tasks == (checkpoint.stem,) and done.manifest is None and done.report is None
        assert [path.name for path in done.path.parent.iterdir()] == [checkpoint.name]
        assert all(checkpoint.name in code for code in (*done.code.values(), *done.steps.values()))

    def copy(source: Path, target: Path) -> None:
        session.end()
        target.parent.mkdir(parents=True)
        target.touch()

    monkeypatch.setattr("aoft_demo.actions.export.shutil.copyfile", copy)
    with pytest.raises(UnknownNameError):
        export_task(session, NAME, CHECKPOINT)
    assert not session.folder.exists()


def test_the_names_of_files_are_quoted_and_the_weights_are_named() -> None:
    chosen = Format(DEFAULT, "", to=DEFAULT)
    plan = Plan(["it's $HOME.ckpt"], "it's $HOME.onnx", chosen, True, Path("/a/w.npz"))
    code = export_code(plan)
    assert re.fullmatch(
        r"""aoft-export --merge 'it'"'"'s \$HOME.ckpt' --images pictures --backbone-weights """
        r"""w.npz --output 'it'"'"'s \$HOME.onnx'""",
        code["Shell"],
    )
    compile(code["Python"], "code", "exec")
    assert "BackboneSource(weights=Path('w.npz'))" in code["Python"] and "/a" not in str(code)


def test_sample_pictures_are_whole_examples_and_then_parts(tmp_path: Path) -> None:
    wide = tmp_path / "wide.png"
    Image.new("RGB", (2000, 1000), "red").save(wide)
    assert write_sample_pictures([wide], tmp_path / "a", 64) == 6
    sizes = [read_image(path).size for path in sorted((tmp_path / "a").iterdir())]
    assert sizes[0] == (256, 128) and len(sizes) == 6
    tall = tmp_path / "tall.png"
    Image.new("RGB", (1000, 2000), "red").save(tall)
    assert write_sample_pictures([wide, *[tall] * 6], tmp_path / "b", 64) == 25
    sizes = [read_image(path).size for path in sorted((tmp_path / "b").iterdir())]
    assert sizes[:7] == [(256, 128), *[(128, 256)] * 6]
    assert write_sample_pictures([], tmp_path / "c", 64) == 0 and not (tmp_path / "c").exists()
    Image.new("RGB", (1, 1)).save(wide)
    assert write_sample_pictures([wide], tmp_path / "d", 64) == 6
    wide.write_bytes(b"no picture")
    with pytest.raises(ImageError, match=r"wide\.png"):
        write_sample_pictures([wide], tmp_path / "e", 64)
