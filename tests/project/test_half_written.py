"""Files that are half of one model and half of another are never opened.

``cp`` overwrites a file in place: until it ends, the first bytes are the new model's, the others
the old one's, and the length is right.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from faulty_model import metadata_of

from aoft_deploy.artefacts.engine import EngineOptions
from aoft_deploy.artefacts.manifest import check_unchanged, manifest_path, unchanged
from aoft_deploy.artefacts.onnx_metadata import (
    CHUNK,
    DIGEST,
    checked_metadata,
    read_metadata,
    seal,
)
from aoft_deploy.artefacts.registry import load_artefact, load_fleet
from aoft_deploy.cli.bench import main as bench
from aoft_deploy.cli.export import main as export
from aoft_deploy.cli.predict import main as predict
from aoft_deploy.errors import ArtefactError
from aoft_deploy.fleet.fleet import Fleet
from aoft_deploy.serving.repository.opened_artefact import open_artefact
from aoft_deploy.serving.settings import Settings

REFUSED = "is half overwritten, still being written, or was changed"
FRACTIONS = (0.001, 0.03, 0.25, 0.5, 0.75, 0.97, 0.999)


@pytest.fixture(scope="module")
def written(
    make_checkpoint: Callable[..., Path],
    backbone_weights: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[..., list[Path]]:
    """Function that exports two artefacts of equal length with different weights, no manifests."""

    def make(*options: str) -> list[Path]:
        folder, artefacts = tmp_path_factory.mktemp("two"), []
        for seed in (31, 32):
            path = folder / f"{seed}.onnx"
            fleet = "--fleet" in options
            first = make_checkpoint("aoft-lora-star", seed=seed)
            checkpoint = folder / "task.ckpt"
            shutil.copy(first, checkpoint)
            arguments = ["--fleet" if fleet else "--merge", checkpoint, "-o", path]
            arguments += ["--backbone-weights", backbone_weights]
            rest = [option for option in options if option != "--fleet"]
            assert export([*map(str, arguments), *rest]) == 0
            manifest_path(path).unlink()
            artefacts.append(path)
        assert len({path.stat().st_size for path in artefacts}) == 1
        assert artefacts[0].read_bytes() != artefacts[1].read_bytes()
        return artefacts

    return make


@pytest.fixture(scope="module")
def two(written: Callable[..., list[Path]]) -> list[Path]:
    return written()


@pytest.fixture(scope="module")
def two_fleets(written: Callable[..., list[Path]]) -> list[Path]:
    return written("--fleet")


def mixed(pair: list[Path], path: Path, place: float) -> Path:
    """Write the start of the second file and the rest of the first.

    Args:
        pair: The two files.
        path: The file to write.
        place: Where the first file begins: below 1, a fraction of the range in which the files
            differ; from 1, a number of bytes before the end.
    """
    old, new = (each.read_bytes() for each in pair)
    differ = np.flatnonzero(np.frombuffer(old, np.uint8) != np.frombuffer(new, np.uint8))
    first, last = int(differ[0]), int(differ[-1])
    cut = (
        first + 1 + int(place * (last - first - 1))
        if place < 1
        else min(len(old) - int(place), last)
    )
    path.write_bytes(new[:cut] + old[cut:])
    assert path.read_bytes() not in (old, new)
    return path


@pytest.mark.parametrize("place", [*FRACTIONS, 1, 30, 64, 66, 70, 90, 120, 400])
def test_a_mixture_of_two_models_is_not_opened(
    place: float, two: list[Path], tmp_path: Path
) -> None:
    path = mixed(two, tmp_path / "task.onnx", place)
    with pytest.raises(ArtefactError):
        load_artefact(path, EngineOptions(threads=1))


@pytest.mark.parametrize("place", FRACTIONS)
@pytest.mark.parametrize("linked", [False, True])
def test_no_command_opens_a_half_overwritten_model(
    place: float,
    linked: bool,
    two: list[Path],
    tmp_path: Path,
    photos: list[Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = mixed(two, tmp_path / "task.onnx", place)
    if linked:
        path = tmp_path / "link.onnx"
        path.symlink_to("task.onnx")
    for main, arguments in ((predict, [path, photos[0]]), (bench, [path])):
        assert main([str(argument) for argument in arguments]) == 1
        assert REFUSED in capsys.readouterr().err
    with pytest.raises(ArtefactError, match=REFUSED):
        open_artefact("task", path, Settings(threads=1))
    with pytest.raises(ArtefactError, match=REFUSED):
        load_artefact(path, EngineOptions(engine="openvino"))


@pytest.mark.parametrize("place", FRACTIONS)
def test_a_half_overwritten_fleet_is_not_opened(
    place: float, two_fleets: list[Path], tmp_path: Path
) -> None:
    path = mixed(two_fleets, tmp_path / "fleet.onnx", place)
    for opened in (Fleet, load_fleet, load_artefact):
        with pytest.raises(ArtefactError, match=REFUSED):
            opened(path)
    with pytest.raises(ArtefactError, match=REFUSED):
        open_artefact("fleet", path, Settings(threads=1))


@pytest.mark.parametrize("options", [["--precision", "int8"], ["--precision", "fp16"]])
def test_low_precision_artefacts_have_a_digest_too(
    options: list[str], written: Callable[..., list[Path]], photos: list[Path], tmp_path: Path
) -> None:
    images = ["--images", *map(str, photos), "--min-agreement", "0"]
    pair = written(*options, *images)
    for path in pair:
        assert DIGEST in checked_metadata(path)
    with pytest.raises(ArtefactError, match=REFUSED):
        load_artefact(mixed(pair, tmp_path / "task.onnx", 0.5))


def test_a_triton_model_has_a_digest(
    checkpoint: Path, backbone_weights: Path, two: list[Path], tmp_path: Path
) -> None:
    output = tmp_path / "task"
    options = ["--merge", checkpoint, "--to", "triton", "--backbone-weights", backbone_weights]
    assert export([str(option) for option in [*options, "-o", output]]) == 0
    manifest_path(output).unlink()
    load_artefact(output, EngineOptions(threads=1))
    file = output / "1" / "model.onnx"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(ArtefactError, match=REFUSED):
        load_artefact(output, EngineOptions(threads=1))


def test_the_digest_covers_all_bytes_before_it(artefact: Path) -> None:
    """It is recomputed with hashlib, chunk by chunk, and onnx still reads the file."""
    content = artefact.read_bytes()
    (digest,) = (e.value for e in onnx.load(artefact).metadata_props if e.key == DIGEST)
    assert content.endswith(digest.encode())
    entry = onnx.ModelProto(metadata_props=[onnx.StringStringEntryProto(key=DIGEST, value=digest)])
    before = content.removesuffix(entry.SerializeToString())
    assert len(before) < len(content)
    parts = [hashlib.sha256(before[i : i + CHUNK]).digest() for i in range(0, len(before), CHUNK)]
    assert digest == hashlib.sha256(b"".join(parts)).hexdigest()
    assert onnx.load(artefact).SerializeToString() == content
    onnx.checker.check_model(content, full_check=True)


@pytest.mark.parametrize("size", [0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 7])
def test_a_change_of_any_chunk_changes_the_digest(size: int, tmp_path: Path) -> None:
    def sealed(content: bytes) -> bytes:
        path = tmp_path / "model.onnx"
        path.write_bytes(content)
        seal(path)
        assert path.read_bytes().startswith(content)
        return path.read_bytes()[len(content) :]

    content = np.random.default_rng(size).integers(0, 256, size, np.uint8).tobytes()
    chunks = [hashlib.sha256(content[i : i + CHUNK]).digest() for i in range(0, size, CHUNK)]
    entry = sealed(content)
    assert entry.endswith(hashlib.sha256(b"".join(chunks)).hexdigest().encode())
    for place in {0, size // 2, size - 1} if size else ():
        other = content[:place] + bytes([content[place] ^ 128]) + content[place + 1 :]
        assert sealed(other) != entry


def test_a_file_without_a_digest_is_opened(artefact: Path, tmp_path: Path) -> None:
    proto = onnx.load(artefact)
    onnx.helper.set_model_props(proto, metadata_of(artefact))
    onnx.save(proto, tmp_path / "old.onnx")
    x = np.random.default_rng(0).normal(size=(2, 3, 16, 16)).astype(np.float32)
    old, new = (
        load_artefact(tmp_path / "old.onnx", EngineOptions(threads=1)),
        load_artefact(artefact, EngineOptions(threads=1)),
    )
    np.testing.assert_array_equal(old.run(x), new.run(x))


@pytest.mark.parametrize("added", ["before", "behind", "twice"])
def test_bytes_outside_of_the_digest_are_refused(
    added: str, artefact: Path, tmp_path: Path
) -> None:
    content, path = artefact.read_bytes(), tmp_path / "task.onnx"
    more = onnx.ModelProto(metadata_props=[onnx.StringStringEntryProto(key="a", value="b")])
    extra = more.SerializeToString()
    changed = {
        "before": extra + content,
        "behind": content + extra,
        "twice": content,
    }
    path.write_bytes(changed[added])
    if added == "twice":
        seal(path)
    assert read_metadata(path)["classes"]
    with pytest.raises(ArtefactError, match=REFUSED):
        load_artefact(path)


@pytest.mark.parametrize("cut", [1, 73, 2000])
def test_a_file_that_is_truncated_during_reading_is_an_error_and_no_crash(
    cut: int, artefact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reading a memory-mapped file would end the process with SIGBUS."""
    path = tmp_path / "task.onnx"
    shutil.copy(artefact, path)
    fstat = os.fstat

    def truncating(file: int) -> os.stat_result:
        status = fstat(file)
        os.truncate(path, cut)
        return status

    with monkeypatch.context() as patch:
        patch.setattr("aoft_deploy.artefacts.onnx_metadata.os.fstat", truncating)
        with pytest.raises(ArtefactError, match="is no ONNX model, or a damaged one"):
            checked_metadata(path)


def test_a_file_that_is_replaced_during_opening_is_refused(
    two: list[Path], two_fleets: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise the class names could be of one file and the weights of the other."""
    library: Any = __import__("onnxruntime")
    session = library.InferenceSession

    for pair, opened in ((two, load_artefact), (two_fleets, load_artefact), (two_fleets, Fleet)):
        path, other = tmp_path / "task.onnx", tmp_path / "other.onnx"
        shutil.copy(pair[0], path)
        shutil.copy(pair[1], other)

        def replacing(*arguments: Any, path: Path = path, other: Path = other, **rest: Any) -> Any:
            if other.exists():
                os.replace(other, path)
            return session(*arguments, **rest)

        with monkeypatch.context() as patch:
            patch.setattr(library, "InferenceSession", replacing)
            with pytest.raises(ArtefactError, match="was changed while it was opened"):
                opened(path)
            opened(path)  # now it is the other file


@pytest.mark.parametrize("what", ["content", "time", "replaced", "manifest", "folder"])
def test_every_kind_of_change_is_noticed(what: str, artefact: Path, tmp_path: Path) -> None:
    path = tmp_path / "task.onnx"
    shutil.copy(artefact, path)
    if what == "folder":
        path = tmp_path / "a.triton"
        (path / "1").mkdir(parents=True)
        (path / "1" / "model.onnx").write_bytes(b"a")
    with unchanged(path):
        path.stat()
    with pytest.raises(ArtefactError, match="was changed while it was opened"), unchanged(path):
        if what == "content":
            with path.open("ab") as file:
                file.write(b"a")
        elif what == "time":
            os.utime(path, ns=(0, 0))
        elif what == "replaced":
            before = path.stat()
            shutil.copy(path, tmp_path / "new")
            os.utime(tmp_path / "new", ns=(before.st_atime_ns, before.st_mtime_ns))
            os.replace(tmp_path / "new", path)
        elif what == "manifest":
            manifest_path(path).write_text("{}")
        else:
            (path / "1" / "model.onnx").write_bytes(b"bb")


@pytest.mark.parametrize("manifest_of", ["target", "link"])
def test_a_symbolic_link_finds_its_manifest(
    manifest_of: str, artefact: Path, two: list[Path], tmp_path: Path
) -> None:
    (tmp_path / "store").mkdir()
    target, link = tmp_path / "store" / "v1.onnx", tmp_path / "task.onnx"
    shutil.copy(artefact, target)
    link.symlink_to("store/v1.onnx")
    shutil.copy(f"{artefact}.json", manifest_path(target if manifest_of == "target" else link))
    check_unchanged(link)
    shutil.copy(two[0], target)  # complete, but not the file of the manifest
    with pytest.raises(ArtefactError, match="was changed after its manifest"):
        check_unchanged(link)
    with pytest.raises(ArtefactError, match="was changed after its manifest"):
        load_artefact(link)


def test_a_slow_copy_is_opened_before_and_after_but_not_during(
    two: list[Path], tmp_path: Path
) -> None:
    """The file is overwritten in place and opened after each piece."""
    path = tmp_path / "task.onnx"
    shutil.copy(two[0], path)
    x = np.random.default_rng(1).normal(size=(2, 3, 16, 16)).astype(np.float32)
    old, new = (load_artefact(each, EngineOptions(threads=1)).run(x) for each in two)
    before, after = (each.read_bytes() for each in two)
    answers = {before: old, after: new}
    step = len(after) // 12
    refused = 0
    with path.open("r+b", buffering=0) as file:
        for start in range(0, len(after), step):
            file.write(after[start : start + step])
            expected = answers.get(path.read_bytes())
            if expected is None:
                refused += 1
                with pytest.raises(ArtefactError, match=REFUSED):
                    load_artefact(path, EngineOptions(threads=1))
            else:
                np.testing.assert_array_equal(
                    load_artefact(path, EngineOptions(threads=1)).run(x), expected
                )
    assert refused > 4 and path.read_bytes() == after and not np.array_equal(old, new)


def openvino_folders(
    fleet: bool, make_checkpoint: Callable[..., Path], weights: Path, folder: Path
) -> list[Path]:
    """Two artefacts with different weights, without manifests."""
    folders = []
    for seed in (41, 42):
        output = folder / f"{seed}.openvino"
        checkpoint = folder / "task.ckpt"
        shutil.copy(make_checkpoint("aoft-lora-star", seed=seed), checkpoint)
        options = ["--fleet" if fleet else "--merge", checkpoint, "--to", "openvino", "-o", output]
        assert export([str(o) for o in [*options, "--backbone-weights", weights]]) == 0
        manifest_path(output).unlink()
        folders.append(output)
    return folders


@pytest.mark.parametrize("fleet", [False, True])
def test_a_half_overwritten_openvino_folder_is_not_opened(
    fleet: bool, make_checkpoint: Callable[..., Path], backbone_weights: Path, tmp_path: Path
) -> None:
    opened = Fleet if fleet else load_artefact
    old, new = openvino_folders(fleet, make_checkpoint, backbone_weights, tmp_path)
    opened(old)
    files = [file.name for file in old.iterdir()]
    changed = [f for f in files if (old / f).read_bytes() != (new / f).read_bytes()]
    assert len(changed) > 1
    for name in changed:
        content = (old / name).read_bytes()
        shutil.copy(new / name, old / name)
        with pytest.raises(ArtefactError, match=REFUSED):
            opened(old)
        (old / name).write_bytes(content)
    opened(old)
    for name in files:
        shutil.copy(new / name, old / name)
    opened(old)  # now all files are the new ones


def test_a_running_openvino_model_does_not_change_with_its_files(
    make_checkpoint: Callable[..., Path], backbone_weights: Path, tmp_path: Path
) -> None:
    old, new = openvino_folders(False, make_checkpoint, backbone_weights, tmp_path)
    x = np.random.default_rng(2).normal(size=(2, 3, 16, 16)).astype(np.float32)
    engine = load_artefact(old, EngineOptions(threads=1))
    before = engine.run(x)
    for name in os.listdir(old):
        (old / name).write_bytes((new / name).read_bytes())
    np.testing.assert_array_equal(engine.run(x), before)
    assert not np.array_equal(load_artefact(old, EngineOptions(threads=1)).run(x), before)
