"""The visitor's picture: which files it may be, and its name in the page."""

from __future__ import annotations

import importlib
import io
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from aoft_demo.tasks.skills import bundled_examples
from aoft_demo.views.ask.picture import captions, identity, payload, picture_field, thumbnail

PICTURES = [example.file for example in bundled_examples()]


@pytest.fixture
def uploads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "uploads"))
    return tmp_path / "uploads"


def uploaded(folder: Path, name: str) -> Path:
    path = folder / name / "a.png"
    path.parent.mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(path)
    return path


def test_only_examples_and_uploads_are_pictures(uploads: Path) -> None:
    own, host = uploaded(uploads, "one"), uploaded(uploads.parent, "host")
    (uploads / "link").symlink_to(host)
    picture: Any = picture_field(PICTURES).preprocess
    assert picture({"example": 2}) == str(PICTURES[2])
    assert picture({"path": str(own)}) == str(own)
    assert picture(None) is None is picture("text")
    error = importlib.import_module("gradio").Error
    for odd in (
        {"example": -1},
        {"example": len(PICTURES)},
        {"example": "0"},
        {},
        {"path": str(host)},
        {"path": str(uploads / "link")},
        {"path": f"{uploads}/../host/a.png"},
        {"path": str(uploads)},
        {"path": "\0"},
        {"path": [str(own)]},
    ):
        with pytest.raises(error, match="was not uploaded"):
            picture(odd)


def test_a_picture_that_was_deleted_is_replaced_by_the_first_example(tmp_path: Path) -> None:
    kept = uploaded(tmp_path, "kept")
    assert payload(kept, PICTURES) == {"path": str(kept)}
    assert payload(PICTURES[3], PICTURES) == {"example": 3}
    for gone in (None, tmp_path / "gone.png"):
        assert payload(gone, PICTURES) == {"example": 0}
        assert payload(gone, []) is None


def test_two_uploads_of_the_same_name_are_told_apart(tmp_path: Path) -> None:
    one, other = (uploaded(tmp_path, name) for name in ("one", "other"))
    assert identity(one, PICTURES) != identity(other, PICTURES)
    assert identity(PICTURES[1], PICTURES) == "example-1"


def test_captions_are_no_templates(tmp_path: Path) -> None:
    path = tmp_path / "${1}`{{c\\<b>'\".png"
    Image.new("RGB", (8, 8)).save(path)
    assert captions([path, PICTURES[0]]) == [
        captions([path])[0],
        bundled_examples()[0],
    ]
    template = picture_field([path]).html_template
    assert "&lt;b&gt;" in template
    assert not any(text in template for text in ("$", "`", "{{", "\\", "<b>"))


def test_a_thumbnail_is_upright_and_small(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turned
    Image.new("RGB", (200, 100), "red").save(tmp_path / "photo.jpg", exif=exif)
    with Image.open(io.BytesIO(thumbnail(tmp_path / "photo.jpg", 80))) as small:
        assert (small.format, small.size, small.getexif().get(0x0112)) == ("JPEG", (40, 80), None)
