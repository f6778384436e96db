"""The demo without a browser: the fleet that is shown, its visitors, and what they can do."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from aoft_demo.actions.classify import MAX_STORED, classify, read_picture
from aoft_demo.actions.export import export_task
from aoft_demo.actions.inside import attention_map, insight, lora_angles, overlay
from aoft_demo.actions.swap import residents, verify
from aoft_demo.tasks.shared_fleet import BUNDLED, Stage, bundled_checkpoints, open_stage, task_bytes
from aoft_demo.tasks.visitors import IDLE, MOST_TASKS, Visitor, Visitors, task_name
from aoft_deploy.artefacts.prediction import load_classifier
from aoft_deploy.data.images import read_image
from aoft_deploy.data.synthetic import load_task
from aoft_deploy.errors import CheckpointError, ImageError, SettingError, UnknownNameError
from aoft_deploy.training.analysis.quantities import analyse_file

TASKS = ("colour", "count", "digits", "orientation", "shape")

PICTURE = BUNDLED / "digits-7.png"


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Stage:
    return open_stage([], tmp_path_factory.mktemp("stage"), threads=1)


@pytest.fixture
def visitors(stage: Stage) -> Visitors:
    return Visitors(stage)


@pytest.fixture
def visitor(visitors: Visitors) -> Visitor:
    return visitors.of("someone")


def test_the_bundled_tasks_are_small_and_one_for_each_offline_task(stage: Stage) -> None:
    assert sorted(stage.tasks) == sorted(TASKS)
    assert all(path.stat().st_size < 60_000 for path in bundled_checkpoints())
    assert {path.stem.split("-")[0] for path in stage.examples} == set(TASKS)


@pytest.mark.parametrize("name", TASKS)
def test_a_bundled_task_has_learnt_its_task(stage: Stage, name: str) -> None:
    """Fresh pictures, of another seed than its training's."""
    splits = load_task(name, seed=1, train=1, val=1, test=96)
    assert splits.test is not None
    pairs = [splits.test[i] for i in range(96)]
    batch = np.stack([stage.fleet.preprocessing(image) for image, _ in pairs])
    answers = stage.fleet.predict(batch, [name] * len(pairs))
    right = np.mean(
        [row.logits.argmax() == label for row, (_, label) in zip(answers, pairs, strict=True)]
    )
    assert right > 3 / len(splits.classes)
    assert stage.tasks[name].classes == splits.classes


def test_the_fleet_is_exported_once(stage: Stage, tmp_path: Path) -> None:
    again = open_stage([], tmp_path, threads=1)
    assert again.tasks == stage.tasks
    assert not any(tmp_path.iterdir())
    kept = Path(os.environ["AOFT_CACHE_DIR"], "demo")
    assert len(list(kept.glob("*.onnx"))) >= 1


def test_without_a_cache_the_fleet_lies_among_the_temporary_files(
    fleet_tasks: dict[str, Path],
    backbone_weights: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("AOFT_CACHE_DIR", "")
    open_stage([fleet_tasks["pets"]], tmp_path, weights=backbone_weights, threads=1)
    assert len(list(tmp_path.glob("*.onnx"))) == 1


def test_the_bytes_are_those_that_the_fleet_tells(stage: Stage) -> None:
    own = sum(task_bytes(stage.fleet, task.classes) for task in stage.tasks.values())
    assert own <= stage.fleet.residency.bytes <= own + 64 * len(stage.tasks)
    assert stage.backbone_bytes == pytest.approx(4 * 2_719_296, rel=0.02)
    assert stage.backbone["name"] == "aoft_vit_nano"


def test_the_backbone_keeps_its_size_as_checkpoints_come(
    fleet_artefact: Path, fleet_tasks: dict[str, Path], tmp_path: Path
) -> None:
    alone = open_stage([fleet_artefact], tmp_path, threads=1)
    more = open_stage([fleet_artefact, *fleet_tasks.values()], tmp_path, threads=1)
    assert len(more.tasks) == len(alone.tasks) + 2
    assert more.backbone_bytes == alone.backbone_bytes
    inside = sum(task_bytes(alone.fleet, classes) for classes in alone.fleet.tasks.values())
    assert alone.backbone_bytes == fleet_artefact.stat().st_size - inside > 0


def test_a_fleets_file_with_checkpoints_beside_it(
    fleet_artefact: Path, fleet_tasks: dict[str, Path], tmp_path: Path
) -> None:
    stage = open_stage([fleet_artefact, fleet_tasks["pets"], fleet_tasks["zürich"]], tmp_path)
    assert list(stage.tasks) == ["pets", "birds", "zürich"]
    assert stage.tasks["pets"].checkpoint == fleet_tasks["pets"]
    assert stage.tasks["birds"].checkpoint is None
    someone = Visitors(stage).of("someone")
    with pytest.raises(CheckpointError, match="Task 'birds' came inside the fleet's file"):
        verify(someone, "birds")


def test_what_cannot_be_shown_is_refused(
    fleet_artefact: Path, artefact: Path, tmp_path: Path, fleet_tasks: dict[str, Path]
) -> None:
    with pytest.raises(CheckpointError, match=r"There is no file .*nothing\.ckpt"):
        open_stage([tmp_path / "nothing.ckpt"], tmp_path)
    with pytest.raises(CheckpointError, match="are two artefacts"):
        open_stage([fleet_artefact, artefact], tmp_path)
    with pytest.raises(CheckpointError, match="no fleet"):
        open_stage([artefact], tmp_path)
    twin = tmp_path / "pets.ckpt"
    shutil.copyfile(fleet_tasks["pets"], twin)
    with pytest.raises(CheckpointError, match="Two tasks are called 'pets'"):
        open_stage([fleet_artefact, fleet_tasks["pets"], twin], tmp_path)
    odd = tmp_path / "odd.ckpt"
    odd.write_bytes(b"odd")
    with pytest.raises(CheckpointError, match="odd"):
        open_stage([odd], tmp_path)


def test_every_task_answers_in_one_pass_as_its_merged_model_does(
    stage: Stage, visitor: Visitor, tmp_path: Path
) -> None:
    names = list(visitor.tasks)
    answers = classify(visitor, PICTURE, names, top=3)
    assert list(answers.predictions) == names
    assert 0 < answers.switch < answers.seconds
    done = export_task(visitor, "digits", uint8=False)
    expected = load_classifier(done.path, threads=1).classify([read_image(PICTURE)], 3)[0]
    for ours, theirs in zip(answers.predictions["digits"], expected, strict=True):
        assert ours.label == theirs.label
        assert ours.probability == pytest.approx(theirs.probability, abs=1e-5)
    assert answers.predictions["digits"][0].label == "7"


def test_classifying_tells_what_is_wrong(visitor: Visitor, tmp_path: Path) -> None:
    odd = tmp_path / "odd.png"
    odd.write_bytes(b"no picture")
    with pytest.raises(ImageError, match=r"odd\.png"):
        classify(visitor, odd, ["digits"])
    with pytest.raises(SettingError, match="Choose one task at least"):
        classify(visitor, PICTURE, [])
    with pytest.raises(UnknownNameError, match="task 'digit'"):
        classify(visitor, PICTURE, ["digit"])


PHOTOGRAPHS = {"24 MP": (6000, 4000), "50 MP": (8160, 6120), "panorama": (20_000, 2500)}
"""Sizes of what phones take; their largest picture is that of a sensor of 50 megapixels."""


def photograph(path: Path, size: tuple[int, int], **more: object) -> Path:
    """A JPEG of the digit seven as a phone would save it."""
    Image.open(PICTURE).convert("RGB").resize(size).save(path, "JPEG", quality=90, **more)
    return path


@pytest.mark.parametrize("name", PHOTOGRAPHS)
@pytest.mark.parametrize("progressive", [False, True])
def test_a_phones_photograph_is_answered_about(
    visitor: Visitor, tmp_path: Path, name: str, progressive: bool
) -> None:
    path = photograph(tmp_path / "photo.jpg", PHOTOGRAPHS[name], progressive=progressive)
    found = classify(visitor, path, ["digits"], top=3)
    assert (found.width, found.height) == PHOTOGRAPHS[name]
    whole = Image.open(path).convert("RGB")  # as Pillow decodes all of it
    row = visitor.stage.fleet.preprocessing(whole)
    ((logits, _),) = visitor.stage.fleet.predict(row[None], ["digits"])
    shares = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
    for label, probability in found.predictions["digits"]:
        expected = shares[visitor.stage.tasks["digits"].classes.index(label)]
        assert probability == pytest.approx(expected, abs=0.02)


def test_a_photograph_taken_upright_has_its_sides_the_other_way_round(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # the phone was held upright
    path = photograph(tmp_path / "photo.jpg", (6000, 4000), exif=exif)
    found = read_picture(path, 32)
    assert (found.width, found.height) == (4000, 6000)
    assert found.image.width < found.image.height


def test_a_picture_below_the_limit_is_read_as_aoft_predict_reads_it(tmp_path: Path) -> None:
    path = photograph(tmp_path / "photo.jpg", (4000, 3000))
    assert read_picture(path, 32).image.tobytes() == read_image(path).tobytes()


def test_a_model_of_large_pictures_sees_a_large_photograph_too(tmp_path: Path) -> None:
    path = photograph(tmp_path / "photo.jpg", (6000, 4000))
    assert read_picture(path, 1500).image.size == (3000, 2000)
    assert read_picture(path, 224).image.size == (1500, 1000)


MEMORY = """
import sys
from pathlib import Path
from aoft_demo.actions.classify import read_picture

def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM"))

small, large = map(Path, sys.argv[1:])
read_picture(small, 32)
before = peak()
read_picture(large, 32)
print(peak() - before)
"""


def test_a_photograph_of_fifty_megapixels_takes_little_memory(tmp_path: Path) -> None:
    large = photograph(tmp_path / "photo.jpg", PHOTOGRAPHS["50 MP"])
    command = [sys.executable, "-c", MEMORY, str(PICTURE), str(large)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 60e6  # decoded whole it has 150 MB and more


def test_what_is_too_large_or_of_a_phones_own_format_is_refused(tmp_path: Path) -> None:
    Image.new("L", (6000, 4000)).save(tmp_path / "large.png", compress_level=1)
    with pytest.raises(ImageError, match=r"6000 x 4000 = 24,000,000 pixels, above the limit of 20"):
        read_picture(tmp_path / "large.png", 32)
    assert 10_000 * 8_000 > MAX_STORED
    Image.new("L", (10_000, 8_000)).save(tmp_path / "huge.jpg")
    with pytest.raises(ImageError, match=r"10000 x 8000 .* above the limit of 64,000,000"):
        read_picture(tmp_path / "huge.jpg", 32)
    for brand, name in ((b"heic", "HEIC"), (b"mif1", "HEIC"), (b"avif", "AVIF")):
        (tmp_path / "photo.heic").write_bytes(b"\0\0\0\x18ftyp" + brand + bytes(40))
        with pytest.raises(ImageError, match=f"of the format {name}: convert it to one of JPEG"):
            read_picture(tmp_path / "photo.heic", 32)


def test_visitors_do_not_see_each_others_tasks(visitors: Visitors) -> None:
    ours, theirs = visitors.of("ours"), visitors.of("theirs")
    task = ours.add(BUNDLED / "digits.ckpt", "mine")
    theirs.add(BUNDLED / "colour.ckpt", "mine")
    assert "mine" in ours.tasks and len(theirs.tasks["mine"].classes) == 8
    assert classify(ours, PICTURE, ["mine"]).predictions["mine"][0].label == "7"
    assert visitors.of("other").tasks.keys() == visitors.stage.tasks.keys()
    ours.remove("digits")
    assert "digits" in theirs.tasks
    visitors.leave("ours")
    assert task.key not in visitors.stage.fleet
    assert not ours.folder.exists()
    assert theirs.tasks["mine"].key in visitors.stage.fleet
    visitors.leave("ours")  # again, as browsers do


def test_who_is_idle_for_long_has_left(stage: Stage) -> None:
    now = [0.0]
    visitors = Visitors(stage, clock=lambda: now[0])
    first = visitors.of("first")
    first.add(BUNDLED / "digits.ckpt", "mine")
    now[0] = IDLE + 1
    visitors.of("second")
    assert len(visitors) == 1 and not first.folder.exists() and first.gone
    assert "mine" not in visitors.of("first").tasks


def test_who_has_left_adds_nothing_more(visitor: Visitor) -> None:
    before = set(visitor.stage.fleet.names)
    with visitor.training("learnt") as training:
        visitor.leave()
        assert training.stopped
        with pytest.raises(SettingError, match="Training was stopped"):
            visitor.add_trained(training, BUNDLED / "digits.ckpt")
    with pytest.raises(SettingError, match="This page has ended: reload it"):
        visitor.add(BUNDLED / "digits.ckpt", "mine")
    assert set(visitor.stage.fleet.names) == before
    assert not visitor.folder.exists()


def test_a_task_whose_file_cannot_be_kept_is_not_in_the_fleet(visitor: Visitor) -> None:
    before = set(visitor.stage.fleet.names)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))  # as on a disk that is full
    try:
        with pytest.raises(OSError, match="too large"):
            visitor.add(BUNDLED / "digits.ckpt", "mine")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not any(visitor.folder.iterdir())
    assert set(visitor.stage.fleet.names) == before
    assert visitor.tasks.keys() == visitor.stage.tasks.keys()


def test_all_leave_when_the_demo_ends(stage: Stage) -> None:
    visitors = Visitors(stage)
    some = [visitors.of("a"), visitors.of("b")]
    some[1].add(BUNDLED / "digits.ckpt", "mine")
    key = some[1].tasks["mine"].key
    with some[0].training("learnt") as training:
        visitors.close()
        assert training.stopped
    assert len(visitors) == 0 and key not in stage.fleet
    assert all(one.gone and not one.folder.exists() for one in some)
    with pytest.raises(SettingError, match="The demo has ended"):
        visitors.of("late")


def test_a_name_is_kept_for_the_task_that_is_trained_under_it(visitor: Visitor) -> None:
    with visitor.training(" mine ") as training:
        for again in (lambda: visitor.add(BUNDLED / "digits.ckpt", "mine"), busy(visitor)):
            with pytest.raises(SettingError, match="A task 'mine' is being trained"):
                again()
        name, task = visitor.add_trained(training, BUNDLED / "digits.ckpt")
        assert (name, task.origin) == ("mine", "trained") and visitor.tasks["mine"] is task
    with pytest.raises(SettingError, match="There is a task 'mine'"):
        busy(visitor)()
    visitor.remove("mine")
    visitor.add(BUNDLED / "digits.ckpt", "mine")


def busy(visitor: Visitor) -> Callable[[], None]:
    def train() -> None:
        with visitor.training("mine"):
            raise AssertionError("two trainings of one name")

    return train


def test_a_task_that_leaves_while_it_is_used_is_named_as_its_visitor_knows_it(
    visitor: Visitor,
) -> None:
    fleet = visitor.stage.fleet
    size = fleet.preprocessing.size
    visitor.add(BUNDLED / "digits.ckpt", "mine")
    with (
        pytest.raises(UnknownNameError, match=r"Unknown task 'mine'\. Known: colour") as refusal,
        visitor.using("mine") as task,
    ):
        visitor.remove("mine")
        fleet.predict(np.zeros((1, 3, size, size), np.float32), [task.key])
    assert visitor.folder.name not in str(refusal.value)
    visitor.add(BUNDLED / "digits.ckpt", "mine")
    with (
        pytest.raises(CheckpointError, match="Task 'mine' was replaced by another meanwhile: try"),
        visitor.using("mine") as task,
    ):
        visitor.remove("mine")
        visitor.add(BUNDLED / "colour.ckpt", "mine")
        fleet.predict(np.zeros((1, 3, size, size), np.float32), [task.key])
    with pytest.raises(ZeroDivisionError), visitor.using("digits"):
        _ = 1 / 0


def test_labels_and_answers_are_of_one_version_while_a_task_is_replaced(visitor: Visitor) -> None:
    versions = {}
    for name in ("digits", "colour"):
        versions[name] = dict(classify(visitor, PICTURE, [name], top=20).predictions[name])
    visitor.add(BUNDLED / "digits.ckpt", "mine")
    ended = threading.Event()

    def replace() -> None:
        for i in range(60):
            visitor.remove("mine")
            visitor.add(BUNDLED / f"{('colour', 'digits')[i % 2]}.ckpt", "mine")
        ended.set()

    replacing = threading.Thread(target=replace)
    replacing.start()
    answered = 0
    while not ended.is_set() or not answered:
        try:
            found = dict(classify(visitor, PICTURE, ["mine"], top=20).predictions["mine"])
        except (UnknownNameError, CheckpointError) as error:
            assert str(error).startswith(("Unknown task 'mine'.", "Task 'mine' was replaced"))
            continue
        answered += 1
        assert any(found == pytest.approx(version, abs=1e-5) for version in versions.values())
    replacing.join()


def test_adding_and_removing(visitor: Visitor, stage: Stage) -> None:
    before = stage.fleet.residency.bytes
    visitor.add(BUNDLED / "digits.ckpt", "  my   digits ")
    assert "my digits" in visitor.tasks and stage.fleet.residency.bytes > before
    rows = {row.name: row for row in residents(visitor)}
    assert rows["my digits"].bytes == rows["digits"].bytes
    assert (rows["my digits"].origin, rows["digits"].origin) == ("added", "given")
    with pytest.raises(SettingError, match="There is a task 'my digits'"):
        visitor.add(BUNDLED / "digits.ckpt", "my digits")
    visitor.remove("my digits")
    assert stage.fleet.residency.bytes == before
    with pytest.raises(UnknownNameError, match="my digits"):
        visitor.remove("my digits")


def test_there_is_an_end_to_what_one_visitor_may_add(visitor: Visitor) -> None:
    for number in range(MOST_TASKS):
        visitor.add(BUNDLED / "digits.ckpt", f"task {number}")
    with pytest.raises(SettingError, match=f"You have added {MOST_TASKS} tasks"):
        visitor.add(BUNDLED / "digits.ckpt", "one more")
    visitor.leave()


@pytest.mark.parametrize("text", ["", " ", "../x", "a/b", "x" * 41, ".hidden", "a\0b", "<b>"])
def test_names_that_cannot_be_are_refused(text: str) -> None:
    with pytest.raises(SettingError, match="A task's name has 1 to 40"):
        task_name(text)


def test_a_checkpoint_of_another_backbone_or_none_at_all_is_refused(
    visitor: Visitor, make_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match="was trained on backbone weights"):
        visitor.add(make_checkpoint("aoft-lora-star"), "other")
    cut = tmp_path / "cut.ckpt"
    cut.write_bytes((BUNDLED / "digits.ckpt").read_bytes()[:20_000])
    with pytest.raises(CheckpointError, match="is no checkpoint"):
        visitor.add(cut, "cut")
    assert visitor.tasks.keys() == visitor.stage.tasks.keys()


def test_verifying_finds_merged_unmerged_and_fleet_alike(visitor: Visitor) -> None:
    found = verify(visitor, "shape")
    assert found.agreeing == found.images
    assert 0 < found.merged < 1e-4 * found.largest
    assert 0 < found.fleet < 1e-4 * found.largest


def test_looking_inside_shows_what_the_analysis_says(visitor: Visitor) -> None:
    found = insight(visitor, "digits")
    expected = analyse_file(BUNDLED / "digits.ckpt")
    by_name = {family.name: family for family in found.families}
    for kind in ("rows", "columns"):
        assert by_name[f"backbone, {kind}"].mean == expected["angles"][kind]["mean"]
    for kind in ("down", "up"):
        assert by_name[f"aoft-lora-star, {kind}"].sd == expected["angles"][kind]["sd"]
        assert by_name[f"LoRA, {kind}"].sd == lora_angles()[kind]["sd"]
    ratios = [x["change_ratio"] for x in expected["layers"] if x["change_ratio"] is not None]
    assert [ratio for _, ratio in found.layers] == ratios


def test_the_attention_is_that_of_the_model(visitor: Visitor) -> None:
    """Weights of the class token, as the library's own attention would multiply values with."""
    grid = attention_map(visitor, "digits", PICTURE)
    assert grid.shape == (8, 8) and grid.min() >= 0 and grid.max() == 1
    other = attention_map(visitor, "shape", PICTURE)
    assert np.abs(grid - other).max() > 0.01
    assert overlay(visitor, PICTURE, grid).size == (384, 384)


def test_an_export_has_its_manifest(visitor: Visitor) -> None:
    done = export_task(visitor, "colour", uint8=True)
    assert done.path.name == "colour.onnx" and done.manifest.is_file()
    assert done.report.agreement == 1
    assert load_classifier(done.path, threads=1).engine.takes_pixels
