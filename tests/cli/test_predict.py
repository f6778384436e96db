from __future__ import annotations

import csv
import json
import os
import pty
import shutil
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from faulty_model import without_digest
from PIL import Image

from aoft_deploy.checkpoints.backbone_source import BackboneSource
from aoft_deploy.cli.predict import main


def answers(capsys: pytest.CaptureFixture[str], *arguments: object) -> list[Any]:
    """The answers of the command with --json, which must succeed."""
    assert main([*map(str, arguments), "--json"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    return [json.loads(line) for line in out.splitlines()]


def test_every_image_gets_a_line_in_the_order_of_the_arguments(
    artefact: Path, photos: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    order = [photos[i % 9] for i in range(35)]  # more than two batches
    assert main([str(artefact), *map(str, order)]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert [line.rpartition("  ")[0] for line in out.splitlines()] == [str(p) for p in order]


def test_the_json_output_has_labels_and_probabilities(
    artefact: Path,
    photos: list[Path],
    classes: tuple[str, ...],
    capsys: pytest.CaptureFixture[str],
) -> None:
    (answer,) = answers(capsys, artefact, photos[0], "--top", "9")
    assert answer["image"] == str(photos[0])
    assert {entry["label"] for entry in answer["classes"]} == set(classes)
    probabilities = [entry["probability"] for entry in answer["classes"]]
    assert probabilities == sorted(probabilities, reverse=True)
    assert abs(sum(probabilities) - 1) < 1e-5


def test_the_csv_output_is_a_table_with_a_row_for_each_class(
    artefact: Path, photos: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    expected = answers(capsys, artefact, *photos[:2], "--top", "3")
    assert main([str(artefact), "--top", "3", *map(str, photos[:2]), "--csv"]) == 0
    header, *rows = csv.reader(capsys.readouterr().out.splitlines())
    assert header == ["image", "label", "probability"]
    assert rows == [
        [answer["image"], entry["label"], str(entry["probability"])]
        for answer in expected
        for entry in answer["classes"]
    ]


@pytest.fixture
def folder(photos: list[Path], tmp_path: Path) -> Path:
    """Three photographs, one of them in a sub-folder, beside a text."""
    (tmp_path / "shots" / "more").mkdir(parents=True)
    for name in ("img10.png", "img9.png", "more/a.png"):
        shutil.copyfile(photos[0], tmp_path / "shots" / name)
    (tmp_path / "shots" / "notes.txt").touch()
    return tmp_path / "shots"


@pytest.mark.parametrize(
    ("inputs", "expected", "note"),
    [
        (["shots"], ["img9.png", "img10.png", "more/a.png"], True),
        (["shots/**"], ["img9.png", "img10.png", "more/a.png"], True),
        (["shots/*.png"], ["img9.png", "img10.png"], False),
        (["shots/more/a.png", "shots/*1*"], ["more/a.png", "img10.png"], False),
    ],
)
def test_folders_and_patterns_stand_for_their_images_in_natural_order(
    inputs: list[str],
    expected: list[str],
    note: bool,
    folder: Path,
    artefact: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(folder.parent)
    assert main([str(artefact), *inputs]) == 0
    out, err = capsys.readouterr()
    assert [line.partition("  ")[0] for line in out.splitlines()] == [
        f"shots/{e}" for e in expected
    ]
    assert err == ("note: 1 file with another suffix skipped (.txt 1).\n" if note else "")


def test_inputs_without_images_are_refused(
    artefact: Path, folder: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    (tmp_path / "empty").mkdir()
    line = refused(main, artefact, tmp_path / "empty")
    assert line == f"There are no images in the folder {tmp_path / 'empty'}."
    line = refused(main, artefact, folder / "*.txt")
    assert line.startswith(f"There are no images that match {folder / '*.txt'}: 1 file with")
    assert "cannot be read: No such file" in refused(main, artefact, "--list", tmp_path / "none")
    (tmp_path / "list").write_text("\n\n")
    assert "names no images: write one path a line" in refused(
        main, artefact, "--list", tmp_path / "list"
    )


def test_a_list_names_images_one_a_line(
    artefact: Path, photos: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "list.txt").write_bytes(f"{photos[1]}\r\n\n{photos[2]}".encode())
    found = answers(capsys, artefact, photos[0], "--list", tmp_path / "list.txt")
    assert [answer["image"] for answer in found] == [str(photo) for photo in photos[:3]]


def test_standard_input_holds_an_image_or_a_list(artefact: Path, photos: list[Path]) -> None:
    code = "import sys\nfrom aoft_deploy.cli.predict import main\nsys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, str(artefact), "--json"]
    image = subprocess.run([*command, "-"], input=photos[0].read_bytes(), stdout=subprocess.PIPE)
    text = f"{photos[0]}\n{photos[0]}\n".encode()
    listed = subprocess.run([*command, "--list", "-"], input=text, stdout=subprocess.PIPE)
    found = [json.loads(line) for line in (image.stdout + listed.stdout).splitlines()]
    assert [answer["image"] for answer in found] == ["-", str(photos[0]), str(photos[0])]
    assert found[0]["classes"] == found[1]["classes"] == found[2]["classes"]


def test_a_terminal_as_standard_input_is_refused(
    artefact: Path, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    leader, terminal = pty.openpty()
    with os.fdopen(terminal) as stdin, os.fdopen(leader):
        monkeypatch.setattr(sys, "stdin", stdin)
        for arguments in (["-"], ["--list", "-"]):
            assert "Standard input is a terminal" in refused(main, artefact, *arguments)


def test_a_pixel_artefact_and_a_state_dict_give_the_same_answers(
    artefact: Path,
    pixel_artefact: Path,
    photos: list[Path],
    checkpoint: Path,
    backbone_weights: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from aoft_deploy.export.merged import export_merged

    state = tmp_path / "a.safetensors"
    export_merged(checkpoint, state, to="timm", backbone=BackboneSource(weights=backbone_weights))
    tables = []
    for path in (artefact, pixel_artefact, state):
        found = answers(capsys, path, *photos, "--top", "5")
        rows = [{e["label"]: e["probability"] for e in answer["classes"]} for answer in found]
        tables.append([[row[name] for name in sorted(row)] for row in rows])
    np.testing.assert_allclose(tables[1], tables[0], atol=2e-5, rtol=0)
    np.testing.assert_allclose(tables[2], tables[0], atol=2e-5, rtol=0)


def save_png_bomb(path: Path) -> None:
    """A PNG of 100,000 × 100,000 pixels in a few hundred bytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        check = zlib.crc32(kind + data)
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", check)

    header = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + body)


@pytest.fixture
def unusual(tmp_path: Path, make_picture: Callable[..., Image.Image]) -> dict[str, Path]:
    """Valid image files of unusual sizes, modes and formats."""
    image = make_picture(30, 20, seed=3)
    paths = {
        name: tmp_path / f"{name}.{suffix}"
        for name, suffix in {
            "one pixel": "png",
            "cmyk": "jpg",
            "sixteen bits": "png",
            "animated": "gif",
            "thread": "png",
            "bilevel": "png",
            "transparent": "png",
            "misnamed": "txt",
        }.items()
    }
    Image.new("RGB", (1, 1), "red").save(paths["one pixel"])
    image.convert("CMYK").save(paths["cmyk"])
    grey = np.linspace(0, 65535, 600).astype(np.uint16).reshape(20, 30)
    Image.fromarray(grey).save(paths["sixteen bits"])
    others = [make_picture(30, 20, seed=i) for i in (4, 5)]
    image.save(paths["animated"], save_all=True, append_images=others)
    Image.new("RGB", (5000, 1), "blue").save(paths["thread"])
    image.convert("1").save(paths["bilevel"])
    image.convert("RGBA").save(paths["transparent"])
    image.save(paths["misnamed"], "PNG")
    return paths


def test_unusual_images_are_classified(
    artefact: Path, unusual: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    found = answers(capsys, artefact, *unusual.values())
    assert [answer["image"] for answer in found] == [str(path) for path in unusual.values()]


@pytest.fixture
def bad(tmp_path: Path, photos: list[Path]) -> list[Path]:
    """Paths that cannot be read as an image."""
    data = photos[0].read_bytes()
    contents = {
        "empty.png": b"",
        "text.jpg": b"no image at all\n",
        "truncated.png": data[: len(data) // 2],
        "header.png": data[:30],
        "line\nbreak.png": b"x",
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    save_png_bomb(tmp_path / "bomb.png")
    names = [*contents, "bomb.png", "missing.png"]
    return [tmp_path / name for name in names]


def test_a_bad_image_is_a_one_line_error(
    artefact: Path, bad: list[Path], refused: Callable[..., str]
) -> None:
    for path in bad:
        line = refused(main, artefact, path)
        assert line.startswith("Cannot read image ")
        assert path.name.partition("\n")[0] in line


def test_good_images_are_classified_despite_bad_ones(
    artefact: Path, bad: list[Path], photos: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    mixed = [path for pair in zip(bad, photos, strict=False) for path in pair]
    assert main([str(artefact), *map(str, mixed), "--json"]) == 1
    out, err = capsys.readouterr()
    answered = [json.loads(line)["image"] for line in out.splitlines()]
    assert answered == [str(path) for path in photos[: len(bad)]]
    *warnings, error = err.splitlines()
    assert len(warnings) == len(bad)
    for path, line in zip(bad, warnings, strict=True):
        assert line.startswith("warning: Cannot read image ")
        assert path.name.partition("\n")[0] in line
    assert error == f"error: No answer for {len(bad)} of {2 * len(bad)} images."


@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_exif_orientation_of_an_image_is_applied(
    orientation: int,
    artefact: Path,
    make_picture: Callable[..., Image.Image],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    upright = make_picture(24, 36, seed=7)
    transpose = Image.Transpose
    stored = {
        1: upright,
        2: upright.transpose(transpose.FLIP_LEFT_RIGHT),
        3: upright.transpose(transpose.ROTATE_180),
        4: upright.transpose(transpose.FLIP_TOP_BOTTOM),
        5: upright.transpose(transpose.TRANSPOSE),
        6: upright.transpose(transpose.ROTATE_90),
        7: upright.transpose(transpose.TRANSVERSE),
        8: upright.transpose(transpose.ROTATE_270),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "with_exif.png", exif=exif)
    upright.save(tmp_path / "upright.png")
    stored.save(tmp_path / "without_exif.png")
    paths = [tmp_path / f"{name}.png" for name in ("with_exif", "upright", "without_exif")]
    with_exif, expected, without_exif = answers(capsys, artefact, *paths, "--top", "5")
    assert with_exif["classes"] == expected["classes"]
    assert (without_exif["classes"] == expected["classes"]) == (orientation == 1)


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["a.onnx"],
        ["a.onnx", "b.png", "--top", "0"],
        ["a.onnx", "b.png", "--top", "two"],
        ["a.onnx", "b.png", "--json", "--csv"],
        ["a.onnx", "b.png", "--device", "gpu"],
    ],
    ids=" ".join,
)
def test_wrong_usage_exits_with_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 2
    assert "(see aoft-predict --help)" in capsys.readouterr().err


def test_a_file_that_is_not_an_artefact_is_refused(
    checkpoint: Path, photos: list[Path], tmp_path: Path, refused: Callable[..., str]
) -> None:
    line = refused(main, checkpoint, photos[0])
    assert (
        line == f"{checkpoint} is a checkpoint: export it first: aoft-export --merge {checkpoint}."
    )
    assert "is a picture: give what aoft-export wrote" in refused(main, photos[0], photos[1])
    assert "There is no file" in refused(main, tmp_path / "missing.onnx", photos[0])
    (tmp_path / "text.onnx").write_text("text")
    assert "is no ONNX model, or a damaged one" in refused(main, tmp_path / "text.onnx", photos[0])
    (tmp_path / "a.safetensors").write_bytes(checkpoint.read_bytes())
    line = refused(main, tmp_path / "a.safetensors", photos[0])
    assert "is no state dict of the timm exporter" in line


def test_an_image_whose_name_is_not_utf_8_is_classified(
    artefact: Path, photos: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / os.fsdecode(b"caf\xe9.png")
    path.write_bytes(photos[0].read_bytes())
    assert main([str(artefact), str(path)]) == 0
    assert r"caf\udce9.png" in capsys.readouterr().out


def test_onnx_runtime_sends_no_telemetry(
    artefact: Path, photos: list[Path], tmp_path: Path
) -> None:
    code = "import sys\nfrom aoft_deploy.cli.predict import main\nsys.exit(main(sys.argv[1:]))"
    environment = {k: v for k, v in os.environ.items() if k != "ORT_DISABLE_TELEMETRY"}
    command = [sys.executable, "-c", code, str(artefact), str(photos[0])]
    subprocess.run(command, check=True, env={**environment, "TMPDIR": str(tmp_path)})
    assert not list(tmp_path.iterdir())  # with telemetry, it stores its session there


def broken_for_bright_images(artefact: Path, target: Path, value: float) -> Path:
    """Copy the artefact, with ``value`` as the first logit of nearly white images."""
    model = onnx.load(artefact)
    node, constant = onnx.helper.make_node, onnx.numpy_helper.from_array
    (last,) = (n for n in model.graph.node if n.output[0] == "logits")
    last.output[0] = "logits before"
    model.graph.node.extend(
        [
            node("ReduceMean", ["pixel_values", "all but batch"], ["brightness"], keepdims=0),
            node("Greater", ["brightness", "white"], ["bright"]),
            node("Unsqueeze", ["bright", "first"], ["bright column"]),
            node("And", ["bright column", "first class"], ["places"]),
            node("Where", ["places", "broken", "logits before"], ["logits"]),
        ]
    )
    constants = {
        "all but batch": np.array([1, 2, 3]),
        "white": np.float32(2),
        "first": np.array([1]),
        "first class": np.arange(5)[None] == 0,
        "broken": np.float32(value),
    }
    model.graph.initializer.extend(constant(np.asarray(v), name) for name, v in constants.items())
    target.write_bytes(without_digest(model))
    return target


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("json_lines", [False, True])
def test_an_answer_that_is_not_finite_is_an_error_for_its_image_alone(
    value: float,
    json_lines: bool,
    artefact: Path,
    photos: list[Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = broken_for_bright_images(artefact, tmp_path / "a.onnx", value)
    whites = [tmp_path / "white.png", tmp_path / "white too.png"]
    for white in whites:
        Image.new("RGB", (20, 20), (255, 255, 255)).save(white)
    images = [photos[0], whites[0], *photos[1:4], whites[1]]
    assert main([str(path), *map(str, images), *(["--json"] if json_lines else [])]) == 1
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 4
    assert "white" not in out and "nan" not in out.lower() and "infinity" not in out.lower()
    lines = [
        f"warning: {white} has no answer. The model answers with {value}, not with a number for "
        "each class: export it with a higher precision, or train it with a lower learning rate.\n"
        for white in whites
    ]
    assert err == f"{''.join(lines)}error: No answer for 2 of 6 images.\n"
