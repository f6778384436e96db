"""Models follow their files, and a faulty file does not affect the others."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from aoft_deploy import memory
from aoft_deploy.artefacts.manifest import manifest_path
from aoft_deploy.errors import SettingError
from aoft_deploy.serving.protocol.refusals import Refusal
from aoft_deploy.serving.repository import opened_artefact
from aoft_deploy.serving.repository.opened_artefact import open_artefact
from aoft_deploy.serving.service import Service
from aoft_deploy.serving.settings import Settings
from aoft_exporters.onnx.engine import OnnxEngine
from aoft_exporters.onnx.fleet import OnnxFleet


class Watched:
    """A service whose scans and clock are controlled by the test."""

    def __init__(self, folder: Path, *given: tuple[str, Path], **settings: Any) -> None:
        self.now = 0.0
        options = {"threads": 1, "follow": 2.0, "max_batch": 2, **settings}
        self.service = Service(Settings(repository=folder, **options), given)
        self.models, self.repository = self.service.models, self.service.repository
        self.repository._clock = lambda: self.now

    async def scan(self, count: int = 2, seconds: float = 0.0) -> None:
        for _ in range(count):
            self.now += seconds
            await self.repository.update()

    async def index(self) -> dict[str, tuple[str, str]]:
        found = await self.repository.index()
        json.dumps(found).encode("utf-8")
        return {entry["name"]: (entry["state"], entry["reason"]) for entry in found}

    async def answers(self, name: str) -> list[list[float]]:
        model = self.models.find(name)
        images = np.ones((1, 3, 16, 16), np.float32)
        found: list[list[float]] = (
            await model.artefact.batcher.answer(images, model.task, 60.0)
        ).logits.tolist()
        return found


def run(scenario: Callable[[], Awaitable[None]]) -> None:
    async def run_scenario() -> None:
        await scenario()

    asyncio.run(run_scenario())


READY = ("READY", "")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "repository").mkdir()
    return tmp_path / "repository"


@pytest.mark.parametrize("most", [1, 16])
@pytest.mark.parametrize("manifest", ["beside", "without sizes", "one size", "none"])
def test_a_cpu_is_ready_after_one_image_if_other_batch_sizes_were_verified(
    manifest: str,
    most: int,
    artefact: Path,
    fleet_artefact: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A batch of the maximum size would take seconds, and its first run as long as its second."""
    sizes = list[int]()
    for engine in (OnnxEngine, OnnxFleet):

        def recording(self: Any, images: Any, *given: Any, run: Any = engine.run) -> Any:
            sizes.append(len(images))
            return run(self, images, *given)

        monkeypatch.setattr(engine, "run", recording)
    for name, source in (("task", artefact), ("fleet", fleet_artefact)):
        path = tmp_path / f"{name}.onnx"
        path.symlink_to(source)
        entries = json.loads(Path(f"{source}.json").read_text("utf-8"))
        assert entries["verification"]["batch_sizes"] == [1, 2, 7]
        if manifest != "beside":  # a copy without the manifest beside the target
            path.unlink()
            shutil.copy(source, path)
        if manifest == "without sizes":
            entries["verification"] = None
        elif manifest == "one size":
            entries["verification"]["batch_sizes"] = [1, 1]
        if manifest in ("without sizes", "one size"):
            manifest_path(path).write_text(json.dumps(entries), "utf-8")
        open_artefact("a", path, Settings(threads=1, max_batch=most)).batcher.close()
    assert sizes == 2 * [1 if manifest == "beside" else min(2, most)]


def test_freed_blocks_are_kept_while_an_engine_is_opened_and_then_returned(
    artefact: Path, fleet_artefact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events = list[str]()
    library: Any = __import__("onnxruntime")
    session = library.InferenceSession

    def opening(*arguments: Any, **options: Any) -> Any:
        events.append("open")
        return session(*arguments, **options)

    def run(*arguments: Any) -> None:
        events.append("run")

    monkeypatch.setattr(library, "InferenceSession", opening)
    monkeypatch.setattr(opened_artefact, "_check_answers", run)
    monkeypatch.setattr(memory, "_set", lambda block, heap: events.append(f"{block >> 20} MB"))
    for path in (artefact, fleet_artefact):
        open_artefact("a", path, Settings(threads=1)).batcher.close()
    assert events == 2 * ["open", "run"]  # another program's memory is not touched
    monkeypatch.setattr(memory, "_returned", True)
    events.clear()
    for path in (artefact, fleet_artefact):
        open_artefact("a", path, Settings(threads=1)).batcher.close()
    assert events == 2 * ["32 MB", "open", "1 MB", "run"]


def test_a_checkpoint_that_arrives_before_its_fleet_is_served_later(
    folder: Path, artefact: Path, fleet_artefact: Path, fleet_tasks: dict[str, Path]
) -> None:
    async def scenario() -> None:
        watched = Watched(folder, ("task", artefact))
        shutil.copy(fleet_tasks["zürich"], folder / "new.ckpt")
        await watched.repository.open_given()
        assert "no fleet is served that takes it" in (await watched.index())["new"][1]
        assert watched.repository.failed == {"new"}
        shutil.copy(fleet_artefact, folder / "fleet.onnx")
        await watched.scan(3)  # no time passes: the fleet triggers the retry
        assert (await watched.index()).items() >= {"new": READY, "pets": READY}.items()
        assert not watched.repository.failed and watched.models.find("new").task == "new"
        watched.models.close()

    run(scenario)


def test_a_file_is_retried_when_its_manifest_arrives(
    folder: Path, artefact: Path, pixel_artefact: Path
) -> None:
    async def scenario() -> None:
        path, manifest = folder / "task.onnx", folder / "task.onnx.json"
        shutil.copy(artefact, path)
        shutil.copy(f"{artefact}.json", manifest)
        watched = Watched(folder)
        await watched.repository.open_given()
        assert await watched.index() == {"task": READY}
        shutil.copy(pixel_artefact, path)
        await watched.scan(2)
        state, reason = (await watched.index())["task"]
        assert state == "READY" and "was changed after its manifest" in reason
        assert watched.models.find("task").artefact.tensor.name == "pixel_values"
        shutil.copy(f"{pixel_artefact}.json", manifest)
        await watched.scan(2)  # no time passes
        assert await watched.index() == {"task": READY}
        assert watched.models.find("task").artefact.tensor.name == "image"
        watched.models.close()

    run(scenario)


def test_a_failure_with_a_cause_outside_the_folder_is_retried(
    folder: Path,
    artefact: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def scenario() -> None:
        shutil.copy(artefact, folder / "task.onnx")
        watched = Watched(folder)
        with monkeypatch.context() as patch:
            patch.setattr("aoft_deploy.serving.repository.models.open_artefact", no_memory)
            await watched.repository.open_given()
            for _ in range(3):
                await watched.scan(1, seconds=100.0)
        assert await watched.index() == {
            "task": ("UNAVAILABLE", "task.onnx cannot be read (Cannot allocate memory).")
        }
        await watched.scan(1)
        assert "UNAVAILABLE" in (await watched.index())["task"]
        await watched.scan(1, seconds=100.0)
        assert await watched.index() == {"task": READY}
        watched.models.close()

    def no_memory(*arguments: Any) -> None:
        raise OSError(12, "Cannot allocate memory")

    run(scenario)
    events = [json.loads(line)["event"] for line in capsys.readouterr().err.splitlines()]
    assert events.count("model not loaded") == 1  # the reason was the same each time


def test_an_unreadable_entry_does_not_affect_others(
    folder: Path, artefact: Path, fleet_artefact: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    async def scenario() -> None:
        (folder / "loop.onnx").symlink_to("loop.onnx")
        (folder / "nothing.onnx").symlink_to("none")
        os.mkfifo(folder / "pipe.onnx")
        shutil.copy(artefact, folder / "task.onnx")
        watched = Watched(folder)
        await watched.repository.open_given()
        loop = ("UNAVAILABLE", "loop.onnx cannot be examined (Too many levels of symbolic links).")
        assert await watched.index() == {"task": READY, "loop": loop}
        with pytest.raises(Refusal, match="cannot be examined") as caught:
            await watched.repository.load("loop")
        assert caught.value.status == 400
        shutil.copy(fleet_artefact, folder / "fleet.onnx")
        before = await watched.answers("task")
        (folder / "task.onnx").unlink()
        (folder / "task.onnx").symlink_to("task.onnx")
        await watched.scan(4)
        found = await watched.index()
        assert found["pets"] == READY and found["loop"] == loop
        assert found["task"][0] == "READY" and "symbolic links" in found["task"][1]
        assert await watched.answers("task") == before
        (folder / "loop.onnx").unlink()
        shutil.copy(artefact, folder / "loop.onnx")
        await watched.scan(2)
        assert (await watched.index())["loop"] == READY
        watched.models.close()

    run(scenario)
    events = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    passed = {e["entry"]: e["reason"] for e in events if e["event"] == "skipped"}
    assert passed == {
        "nothing.onnx": "it is a broken link",
        "pipe.onnx": "it is neither a file nor a folder",
    }
    unseen = [e["entry"] for e in events if e["event"] == "cannot be examined"]
    assert unseen == ["loop", "task"]  # logged once each


def test_a_name_that_is_not_utf_8_is_skipped_and_logged(
    folder: Path, artefact: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    async def scenario() -> None:
        for name in (b"\xff.onnx", b"\xe9t\xe9.json", b"\xfe"):
            (folder / os.fsdecode(name)).write_bytes(b"")
        shutil.copy(artefact, folder / "été.onnx")
        watched = Watched(folder)
        await watched.repository.open_given()
        await watched.scan(3)
        assert await watched.index() == {"été": READY}
        watched.models.close()

    run(scenario)
    events = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    passed = {e["entry"]: e["reason"] for e in events if e["event"] == "skipped"}
    assert passed["\\udcff.onnx"] == "its name cannot be part of a URL: rename it"
    assert passed.keys() == {"\\udcff.onnx", "\\udce9t\\udce9.json", "\\udcfe"}


def test_names_of_a_store_that_are_not_utf_8_do_not_hide_the_others(
    folder: Path, fleet_artefact: Path, fleet_tasks: dict[str, Path], tmp_path: Path
) -> None:
    async def scenario() -> None:
        store = tmp_path / "store"
        store.mkdir()
        for name in (b"\xff.ckpt", b"good.ckpt"):
            shutil.copy(fleet_tasks["zürich"], store / os.fsdecode(name))
        watched = Watched(folder, ("fleet", fleet_artefact), store=store)
        await watched.repository.open_given()
        assert set(await watched.index()) == {"pets", "birds", "good"}
        watched.models.close()

    run(scenario)


def test_a_missing_repository_unloads_nothing(
    folder: Path, artefact: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    async def scenario() -> None:
        shutil.copy(artefact, folder / "task.onnx")
        watched = Watched(folder)
        await watched.repository.open_given()
        before = await watched.answers("task")
        folder.rename(folder.parent / "away")
        await watched.scan(5)
        assert await watched.index() == {"task": READY}
        with pytest.raises(Refusal, match="the repository cannot be read"):
            await watched.repository.load("task")
        folder.mkdir()  # an empty mount point, for one scan
        await watched.scan(1)
        folder.rmdir()
        (folder.parent / "away").rename(folder)
        await watched.scan(2)
        assert await watched.index() == {"task": READY}
        assert await watched.answers("task") == before
        (folder / "task.onnx").unlink()
        await watched.scan(2)
        assert await watched.index() == {}
        watched.models.close()

    run(scenario)
    events = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert [e["event"] for e in events].count("model loaded") == 1
    (event,) = [e for e in events if e["event"] == "cannot be examined"]
    assert "cannot be read (No such file or directory)" in event["reason"]


@pytest.mark.parametrize("kind", ["missing", "file", "loop"])
def test_a_repository_that_is_not_a_folder_is_refused(kind: str, folder: Path) -> None:
    folder.rmdir()
    if kind == "file":
        folder.write_text("")
    elif kind == "loop":
        folder.symlink_to(folder)
    with pytest.raises(SettingError, match=r"The repository .* cannot be read"):
        asyncio.run(Watched(folder).repository.open_given())


def test_a_triton_model_is_skipped_with_the_reason(
    folder: Path, artefact: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    async def scenario() -> None:
        (folder / "pets" / "1").mkdir(parents=True)
        shutil.copy(artefact, folder / "pets" / "1" / "model.onnx")
        (folder / "notes.txt").write_text("")
        shutil.copy(artefact, folder / "task.onnx")
        shutil.copy(f"{artefact}.json", folder / "task.onnx.json")
        watched = Watched(folder)
        await watched.repository.open_given()
        await watched.scan(2)
        assert await watched.index() == {"task": READY}
        watched.models.close()

    run(scenario)
    events = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    passed = {e["entry"]: e["reason"] for e in events if e["event"] == "skipped"}
    assert passed.keys() == {"pets", "notes.txt"}
    assert "a model of a Triton repository" in passed["pets"]
    assert "its suffix is none of .ckpt, .onnx" in passed["notes.txt"]


READS = """
import os, sys
from pathlib import Path
from aoft_deploy.artefacts.registry import load_artefact
from aoft_deploy.errors import ArtefactError
from aoft_deploy.artefacts.manifest import check_unchanged
from aoft_deploy.serving.repository.scan import check_readable
from aoft_deploy.artefacts.onnx_metadata import read_metadata
import aoft_exporters.onnx.exporter, onnxruntime
if os.geteuid() == 0:
    os.setuid(65534)  # the user nobody, since root may read everything
for reads in (read_metadata, check_unchanged, load_artefact, check_readable):
    try:
        reads(Path(sys.argv[1]))
    except (ArtefactError, PermissionError) as error:
        print(error)
"""


def test_a_file_without_read_permission_is_not_reported_as_damaged(
    artefact: Path, folder: Path
) -> None:
    path = folder / "task.onnx"
    shutil.copy(artefact, path)
    shutil.copy(f"{artefact}.json", f"{path}.json")
    path.chmod(0)
    command = [sys.executable, "-c", READS, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert len(lines) == 4, done
    assert all("ermission denied" in line and "damaged" not in line for line in lines), lines


READINESS: dict[str, tuple[bool, list[str], int, int]] = {
    # an artefact given, the repository's files; status without and with --strict
    "nothing": (False, [], 200, 503),
    "a model": (False, ["task.onnx"], 200, 200),
    "a damaged one": (False, ["damaged.onnx"], 503, 503),
    "a damaged one beside a model": (False, ["damaged.onnx", "task.onnx"], 200, 503),
    "a damaged one beside a given one": (True, ["damaged.onnx"], 200, 503),
    "a link in a circle beside a model": (False, ["loop.onnx", "task.onnx"], 200, 503),
    "a model of Triton": (False, ["triton"], 200, 503),
}


@pytest.mark.parametrize("case", READINESS)
def test_a_server_is_ready_if_its_models_are_open(case: str, folder: Path, artefact: Path) -> None:
    given, names, loose, strict = READINESS[case]

    async def scenario() -> None:
        for name in names:
            if name == "triton":
                (folder / name / "1").mkdir(parents=True)
            elif name == "loop.onnx":
                (folder / name).symlink_to(name)
            else:
                content = artefact.read_bytes()
                (folder / name).write_bytes(content[:2000] if name == "damaged.onnx" else content)
        for asked, status in ((False, loose), (True, strict)):
            artefacts = [("given", artefact)] if given else []
            watched = Watched(folder, *artefacts, strict=asked, follow=0)
            await watched.service.start()
            assert watched.service.ready is (status == 200), (asked, watched.service.unready)
            watched.models.close()

    run(scenario)


def test_a_strict_server_becomes_ready_when_failed_models_are_repaired_or_removed(
    folder: Path, artefact: Path
) -> None:
    async def scenario() -> None:
        for name in ("task.onnx", "one.onnx", "two.onnx", "three.onnx"):
            (folder / name).write_bytes(
                artefact.read_bytes()[: None if name == "task.onnx" else 99]
            )
        watched = Watched(folder, strict=True)
        await watched.repository.open_given()
        watched.service.state = "ready"
        assert watched.service.unready == "without a model that failed at the start"
        (folder / "one.onnx").unlink()
        shutil.copy(artefact, folder / "two.onnx")
        await watched.scan(2)
        assert watched.repository.failed == {"three"} and not watched.service.ready
        shutil.copy(artefact, folder / "three.onnx")
        await watched.scan(2)
        assert watched.service.ready
        (folder / "later.onnx").write_bytes(
            b"junk"
        )  # failures after the start are only in the index
        await watched.scan(2)
        assert watched.service.ready and (await watched.index())["later"][0] == "UNAVAILABLE"
        for path in list(folder.iterdir()):
            path.unlink()
        await watched.scan(2)
        assert watched.service.unready == "without a model"
        watched.models.close()

    run(scenario)
