from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from aoft_deploy.checkpoints.checkpoint import read_checkpoint
from aoft_deploy.checkpoints.opening import load
from aoft_deploy.data.splits import ImageList, Splits, find_faults
from aoft_deploy.errors import CheckpointError, DataError, DivergedError, OutputError, SettingError
from aoft_deploy.training import image_check
from aoft_deploy.training.paper_benchmarks import task_run
from aoft_deploy.training.paper_benchmarks.recipes import Recipe, get_recipe
from aoft_deploy.training.paper_benchmarks.task_run import Outcome, load_splits, run_recipe
from aoft_deploy.training.run import Result, train
from aoft_deploy.training.settings import RunOptions, TrainingSettings

SMALL = {"backbone": "aoft_vit_nano", "img_size": 16, "epochs": 3, "precision": "fp32"}
RATES = (0.01, 0.001)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, write_vtab: Callable[..., Path]) -> Path:
    folder = tmp_path_factory.mktemp("vtab")
    write_vtab(folder, "kitti", train=12, val=8, test=8, classes=4)
    return folder


def recipe(**given: Any) -> Recipe:
    made = get_recipe("vtab/kitti", {**SMALL, **given})
    return made if len(made.rates) == 1 else replace(made, rates=RATES)


@pytest.fixture(scope="module")
def splits(root: Path) -> Splits:
    return load_splits(recipe(), root, any_size=True)


@pytest.fixture(scope="module")
def finished(splits: Splits, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Outcome]:
    """A run of AOFT* with two rates to choose from."""
    out = tmp_path_factory.mktemp("finished") / "run"
    return out, run_recipe(recipe(), splits, out)


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_rate_and_epoch_have_the_best_validation_accuracy(
    finished: tuple[Path, Outcome],
) -> None:
    out, outcome = finished
    searched = {rate: lines(out / f"search/lr-{rate:g}")[:-1] for rate in RATES}
    merit, rate, epoch = max(
        ((line["val_accuracy"], -line["val_loss"]), rate, line["epoch"])
        for rate, run in searched.items()
        for line in run
    )
    assert (outcome.lr, outcome.epoch, outcome.val_accuracy) == (rate, epoch, merit[0])
    assert all(len(run) == 3 for run in searched.values())


def test_the_final_run_trains_on_all_images_with_the_chosen_schedule(
    finished: tuple[Path, Outcome],
) -> None:
    out, outcome = finished
    checkpoint = read_checkpoint(out / "model.ckpt")
    assert checkpoint.training["images"] == 20
    assert checkpoint.training["settings"]["train_on"] == "train+val"
    *epochs, last = lines(out)
    searched = lines(out / f"search/lr-{outcome.lr:g}")
    assert len(epochs) == outcome.epoch
    assert [line["lr"] for line in epochs] == [line["lr"] for line in searched[: outcome.epoch]]
    assert last["test_accuracy"] == outcome.test_accuracy
    preprocessing = checkpoint.preprocessing
    assert (preprocessing.crop_mode, preprocessing.crop_pct) == ("squash", 1.0)


def test_the_checkpoint_reproduces_the_reported_test_accuracy(
    finished: tuple[Path, Outcome], splits: Splits
) -> None:
    out, outcome = finished
    tuned, preprocessing = load(out / "model.ckpt"), read_checkpoint(out / "model.ckpt")
    assert splits.test is not None
    pictures = [preprocessing.preprocessing(splits.test[i][0]) for i in range(len(splits.test))]
    with torch.no_grad():
        answers = tuned(torch.stack([torch.from_numpy(p) for p in pictures])).argmax(-1)
    right = (answers == torch.tensor(splits.test.labels)).double().mean().item()
    assert right == pytest.approx(outcome.test_accuracy)


def test_the_outcome_records_the_run_and_its_deviations(
    finished: tuple[Path, Outcome],
) -> None:
    out, outcome = finished
    assert (outcome.task, outcome.method, outcome.seed) == ("vtab/kitti", "aoft-lora-star", 0)
    assert outcome.head_parameters == 4 * 193
    assert outcome.deviations[0] == "train has 12 images instead of 800"
    saved = json.loads((out / "result.json").read_text())["outcome"]
    assert Outcome(**{**saved, "deviations": tuple(saved["deviations"])}) == outcome


def test_test_images_do_not_influence_the_run(
    finished: tuple[Path, Outcome], splits: Splits, tmp_path: Path
) -> None:
    assert splits.test is not None
    wrong = ImageList(splits.test.images, [3 - label for label in splits.test.labels])
    outcome = run_recipe(recipe(), replace(splits, test=wrong), tmp_path)
    before = finished[1]
    assert (outcome.lr, outcome.epoch) == (before.lr, before.epoch)
    tensors = read_checkpoint(finished[0] / "model.ckpt").tensors
    again = read_checkpoint(tmp_path / "model.ckpt").tensors
    assert all(torch.equal(tensor, again[name]) for name, tensor in tensors.items())


class Sealed(ImageList):
    """Images that raise on any access while ``on`` is true."""

    on = False

    def __getattribute__(self, name: str) -> Any:
        if name in ("images", "labels") and Sealed.on:
            raise AssertionError("the search used the test images")
        return super().__getattribute__(name)


def test_the_search_for_a_rate_never_reads_the_test_images(
    splits: Splits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs: list[str] = []

    def sealing(
        given: Splits, out: Path, settings: TrainingSettings, *args: Any, **options: Any
    ) -> Result:
        runs.append(settings.train_on)
        monkeypatch.setattr(Sealed, "on", settings.train_on == "train")
        try:
            return train(given, out, settings, *args, **options)
        finally:
            monkeypatch.setattr(Sealed, "on", False)

    monkeypatch.setattr(task_run, "train", sealing)
    assert splits.test is not None
    test = Sealed(splits.test.images, splits.test.labels)
    run_recipe(recipe(epochs=1), replace(splits, test=test), tmp_path)
    assert runs == ["train", "train", "train+val"]


def test_every_image_is_checked_once_before_the_search(
    splits: Splits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checked: list[Path] = []

    def recording(paths: Sequence[Path], **options: Any) -> list[tuple[Path, str]]:
        checked.extend(paths)
        return find_faults(paths, **options)

    monkeypatch.setattr(image_check, "find_faults", recording)
    run_recipe(recipe(epochs=1), splits, tmp_path / "run")
    assert splits.test is not None
    assert checked == [*splits.train.images, *splits.val.images, *splits.test.images]
    damaged = tmp_path / "damaged.jpg"
    damaged.write_bytes(b"")
    test = ImageList([damaged, *splits.test.images], [0, *splits.test.labels])
    with pytest.raises(DataError, match=r"1 of 29 images cannot be used: .*damaged\.jpg.*empty"):
        run_recipe(recipe(), replace(splits, test=test), tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_a_finished_run_is_not_repeated(finished: tuple[Path, Outcome], splits: Splits) -> None:
    out, outcome = finished
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    assert run_recipe(recipe(), splits, out, RunOptions(resume=True)) == outcome
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before


@pytest.mark.parametrize("lost", ["result.json", "the final run", "the second rate"])
def test_an_interrupted_run_is_resumed(
    finished: tuple[Path, Outcome], splits: Splits, tmp_path: Path, lost: str
) -> None:
    out, outcome = finished
    files = {p.relative_to(out): p.read_bytes() for p in out.rglob("*") if p.is_file()}
    for path in list(files):
        is_gone = {
            "result.json": path.name == "result.json",
            "the final run": path.parts[0] != "search",
            "the second rate": path.parts[:2] != ("search", "lr-0.01"),
        }[lost]
        if is_gone:
            del files[path]
    for path, content in files.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_bytes(content)
    again = run_recipe(recipe(), splits, tmp_path, RunOptions(resume=True))
    assert replace(again, seconds=0.0) == replace(outcome, seconds=0.0)
    assert (tmp_path / "model.ckpt").read_bytes() == (out / "model.ckpt").read_bytes()


def test_a_run_is_neither_overwritten_nor_mixed_with_another(
    finished: tuple[Path, Outcome], splits: Splits, tmp_path: Path
) -> None:
    out, _ = finished
    with pytest.raises(OutputError, match=r"already holds a run \(\S+\): .*`resume=True`"):
        run_recipe(recipe(), splits, out)
    with pytest.raises(SettingError, match=r"started with weight decay 0\.05, but now it is 0\.5"):
        run_recipe(recipe(weight_decay=0.5), splits, out, RunOptions(resume=True))
    fewer = ImageList(splits.train.images[1:], splits.train.labels[1:])
    with pytest.raises(SettingError, match="started with other images in train"):
        run_recipe(recipe(), replace(splits, train=fewer), out, RunOptions(resume=True))
    (tmp_path / "weights.pth").write_bytes(b"other")
    with pytest.raises(SettingError, match="started with backbone weights null"):
        other = recipe(backbone_weights=tmp_path / "weights.pth")
        run_recipe(other, splits, out, RunOptions(resume=True))


def test_an_overwritten_run_starts_anew_with_other_settings(splits: Splits, tmp_path: Path) -> None:
    made = {"method": "linear", "epochs": 1}
    run_recipe(recipe(**made, head_lr=0.1), splits, tmp_path)
    overwrite = RunOptions(overwrite=True)
    outcome = run_recipe(
        recipe(**made, head_lr=0.03, weight_decay=0.5), splits, tmp_path, overwrite
    )
    assert outcome.lr == 0.03
    assert [path.name for path in (tmp_path / "search").iterdir()] == ["lr-0.03"]


def test_unreadable_images_are_left_out_of_all_runs_and_when_resuming(
    splits: Splits, tmp_path: Path
) -> None:
    damaged = tmp_path / "damaged.jpg"
    damaged.write_bytes(b"")
    train = ImageList([damaged, *splits.train.images], [0, *splits.train.labels])
    given, out = replace(splits, train=train), tmp_path / "run"
    made, skip = recipe(method="linear", epochs=1, head_lr=0.1), RunOptions(skip_unreadable=True)
    outcome = run_recipe(made, given, out, skip)
    assert "train has 12 images instead of 800" in outcome.deviations
    assert read_checkpoint(out / "model.ckpt").training["left_out"] == 1
    damaged.write_bytes(Path(str(splits.train.images[0])).read_bytes())
    assert run_recipe(made, given, out, RunOptions(resume=True)) == outcome
    (out / "result.json").unlink()
    again = run_recipe(made, given, out, RunOptions(resume=True))
    assert replace(again, seconds=0.0) == replace(outcome, seconds=0.0)


@pytest.mark.parametrize("text", ["{", "{}", '{"run": {}, "outcome": {}}'])
def test_a_damaged_result_is_named(splits: Splits, tmp_path: Path, text: str) -> None:
    (tmp_path / "result.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"result\.json cannot be read .* another folder"):
        run_recipe(recipe(), splits, tmp_path, RunOptions(resume=True))


# This decay multiplies the classifier's weights in each step, until they overflow.
DIVERGING = {"method": "linear", "weight_decay": 1e15, "batch_size": 4}


def test_a_rate_that_diverges_is_skipped(splits: Splits, tmp_path: Path) -> None:
    made = replace(recipe(**DIVERGING), rates=(0.1, 1e-18))
    outcome = run_recipe(made, splits, tmp_path)
    assert outcome.lr == 1e-18


def test_rates_that_all_diverge_are_an_error(splits: Splits, tmp_path: Path) -> None:
    made = replace(recipe(**DIVERGING), rates=(0.1, 0.2))
    with pytest.raises(DivergedError, match=r"diverged in epoch .* use lower learning rates than"):
        run_recipe(made, splits, tmp_path)
    assert not (tmp_path / "result.json").exists()


def test_of_equal_accuracies_the_rate_with_the_lower_loss_is_chosen(
    splits: Splits, tmp_path: Path
) -> None:
    one = replace(splits, val=ImageList(splits.val.images[:1], splits.val.labels[:1]))
    made = replace(recipe(method="linear", epochs=1), rates=(1e-6, 1e-5, 1e-4))
    outcome = run_recipe(made, one, tmp_path)
    losses = {rate: lines(tmp_path / f"search/lr-{rate:g}")[0] for rate in made.rates}
    assert len({line["val_accuracy"] for line in losses.values()}) == 1
    assert outcome.lr == min(losses, key=lambda rate: losses[rate]["val_loss"])


def test_fgvc_runs_with_windows_of_larger_images(
    tmp_path: Path, write_fgvc: Callable[..., Path]
) -> None:
    ids = [4, 8, 15] * 5
    write_fgvc(tmp_path, "CUB_200_2011", "images", trainval=ids, test=[15, 4, 8])
    made = get_recipe("fgvc/CUB_200_2011", {**SMALL, "method": "rlrr", "epochs": 2, "seed": 1})
    splits = load_splits(made, tmp_path, any_size=True)
    outcome = run_recipe(made, splits, tmp_path / "run")
    checkpoint = read_checkpoint(tmp_path / "run/model.ckpt")
    assert (outcome.task, outcome.lr) == ("fgvc/CUB_200_2011", 3e-3)
    assert checkpoint.classes == ("4", "8", "15")
    assert checkpoint.preprocessing.crop_pct == 0.875
    assert checkpoint.training["settings"]["augment"] == "window"
    assert "3 classes have images instead of 200" in outcome.deviations
