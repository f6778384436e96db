import os
import pickle
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from aoft_deploy.data.folder import write_folder
from aoft_deploy.data.preprocessing import Preprocessing
from aoft_deploy.data.splits import ImageList
from aoft_deploy.data.synthetic import load_task
from aoft_deploy.errors import ImageError, SettingError
from aoft_deploy.training.batches import (
    Loader,
    Part,
    PixelBatches,
    evaluation_parts,
    fingerprint,
    training_parts,
)
from aoft_deploy.training.settings import AUGMENTATIONS

HALVES = (0.5, 0.5, 0.5)
PREPROCESSING = Preprocessing(size=16, crop_pct=1.0, mean=HALVES, std=HALVES)
DIGITS = load_task("digits", train=12, val=1, test=0).train

FORKS = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")


def whole(epoch: int = 0) -> Part:
    return Part(epoch, 0, 0, tuple(range(len(DIGITS))), 1.0)


@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("count", [1, 8, 33, 100])
def test_an_epoch_has_every_image_once_and_weights_that_add_up(count: int, parts: int) -> None:
    plan = list(training_parts(count, 8, parts, range(parts), seed=0, epoch=2))
    seen = sorted(i for part in plan if part.weight for i in part.images)
    assert seen == list(range(count))
    for step in range(-(-count // 8)):
        members = [part for part in plan if part.step == step]
        assert len(members) == parts
        assert sum(len(p.images) * p.weight for p in members) == pytest.approx(1)


def test_the_steps_of_an_epoch_differ_by_one_image_at_most() -> None:
    sizes = {len(p.images) for p in training_parts(100, 32, 1, range(1), 0, 0)}
    assert sizes == {25}


def test_processes_share_the_steps_of_one_process() -> None:
    alone = list(training_parts(50, 16, 2, range(2), 0, 0))
    first = list(training_parts(50, 16, 2, range(1), 0, 0))
    second = list(training_parts(50, 16, 2, range(1, 2), 0, 0))
    assert sorted([*first, *second], key=lambda p: (p.step, p.number)) == alone


def test_seed_and_epoch_decide_the_order() -> None:
    def order(seed: int, epoch: int) -> list[Part]:
        return list(training_parts(50, 16, 1, range(1), seed, epoch))

    assert order(0, 1) == order(0, 1)
    assert order(0, 1)[0].images != order(0, 2)[0].images != order(1, 2)[0].images


def test_evaluation_has_every_image_for_exactly_one_process() -> None:
    plans = [list(evaluation_parts(11, 2, process, 3)) for process in range(3)]
    seen = sorted(i for plan in plans for part in plan for i in part.images)
    assert seen == list(range(11))


@pytest.mark.parametrize("memory", [0, 1 << 30])
def test_pixels_are_those_of_preprocessing(memory: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("aoft_deploy.training.batches.MEMORY", memory)
    batches = PixelBatches(DIGITS, PREPROCESSING)
    pixels, labels = batches[whole()]
    assert (batches.cached is None) == (memory == 0)
    assert pixels.dtype == torch.uint8
    assert labels.tolist() == DIGITS.labels
    for i, image in enumerate(pixels):
        expected = PREPROCESSING.pixels(DIGITS[i][0]).transpose(2, 0, 1)
        assert np.array_equal(image.numpy(), expected)


@pytest.mark.parametrize("augment", ["flip", "affine", "window", "crop", "rand"])
def test_augmented_pixels_depend_on_the_epoch_and_on_nothing_before(augment: str) -> None:
    batches = PixelBatches(DIGITS, PREPROCESSING, augment, seed=3)
    first, later = batches[whole(0)][0], batches[whole(1)][0]
    alone = batches[Part(0, 7, 0, (5,), 1.0)][0]
    assert not torch.equal(first, later)
    assert torch.equal(first, batches[whole(0)][0])
    assert torch.equal(first[5], alone[0])


@pytest.mark.parametrize("augment", AUGMENTATIONS)
def test_batches_can_be_sent_to_workers_that_do_not_fork(augment: str) -> None:
    batches = PixelBatches(DIGITS, PREPROCESSING, augment)
    received = pickle.loads(pickle.dumps(batches))
    assert torch.equal(received[whole()][0], batches[whole()][0])


class Fatal(Sequence[Path]):
    """Images whose access kills the process, as the system does without shared memory."""

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: Any) -> Any:
        os.kill(os.getpid(), signal.SIGKILL)


@FORKS
def test_a_worker_that_the_system_kills_is_one_sentence() -> None:
    batches = PixelBatches(ImageList(Fatal(), [0]), PREPROCESSING, "crop")
    loader = Loader(batches, lambda epoch: iter([Part(0, 0, 0, (0,), 1.0)]), workers=1)
    with pytest.raises(SettingError, match=r"was killed, as happens .* use fewer `workers`, such"):
        list(loader.epoch(0))


@FORKS
@pytest.mark.parametrize("workers", [0, 2])
def test_a_damaged_image_is_one_sentence_from_any_process(tmp_path: Path, workers: int) -> None:
    write_folder(load_task("digits", train=10, val=1, test=0), tmp_path / "digits")
    path = next((tmp_path / "digits").rglob("*.png"))
    path.write_bytes(path.read_bytes()[:-40])
    batches = PixelBatches(ImageList([path], [0]), PREPROCESSING, "crop")
    loader = Loader(batches, lambda epoch: iter([Part(0, 0, 0, (0,), 1.0)]), workers=workers)
    with pytest.raises(ImageError, match=path.name) as caught:
        list(loader.epoch(0))
    assert "\n" not in str(caught.value)


def test_a_fingerprint_tells_pixels_and_labels_apart() -> None:
    pixels = [np.zeros((2, 2, 3), np.uint8), np.ones((2, 2, 3), np.uint8)]
    prints = {
        fingerprint(ImageList(pixels, [0, 1])),
        fingerprint(ImageList(pixels, [1, 0])),
        fingerprint(ImageList(pixels[::-1], [0, 1])),
        fingerprint(ImageList([Path("a/x.png")], [0])),
        fingerprint(ImageList([Path("a/y.png")], [0])),
    }
    assert len(prints) == 5


def test_a_fingerprint_of_files_does_not_depend_on_where_the_folder_is(tmp_path: Path) -> None:
    splits = load_task("digits", train=10, val=1, test=0)
    lists = []
    for name in ("here", "there"):
        write_folder(splits, tmp_path / name)
        paths = sorted((tmp_path / name / "train").rglob("*.png"))
        lists.append(ImageList(paths, [0] * len(paths)))
    assert fingerprint(lists[0]) == fingerprint(lists[1])
    lists[0].images[0].write_bytes(b"other")  # type: ignore[union-attr]
    assert fingerprint(lists[0]) != fingerprint(lists[1])


def test_a_fingerprint_takes_names_that_are_not_utf_8(tmp_path: Path) -> None:
    paths = [tmp_path / os.fsdecode(name) for name in (b"caf\xe9.png", b"caf\xe8.png")]
    for path in paths:
        path.write_bytes(b"-")
    assert len({fingerprint(ImageList([path], [0])) for path in paths}) == 2
