import json
import os
import random
import re
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, overload

import numpy as np
import pytest
import torch
from forked import run_python
from numpy.typing import NDArray

from aoft_deploy.checkpoints.checkpoint import read_checkpoint
from aoft_deploy.checkpoints.opening import load
from aoft_deploy.data.folder import load_folder, write_folder
from aoft_deploy.data.splits import ImageList
from aoft_deploy.data.synthetic import load_task
from aoft_deploy.errors import (
    BackboneError,
    DataError,
    DivergedError,
    MissingExtraError,
    OutputError,
    SettingError,
    UnknownNameError,
)
from aoft_deploy.training import run
from aoft_deploy.training.run import train
from aoft_deploy.training.settings import RunOptions, TrainingSettings
from aoft_deploy.tuning.methods import method_names

SMALL = TrainingSettings(img_size=16, epochs=2, batch_size=16, precision="fp32")
DIGITS = load_task("digits", train=32, val=20, test=20)
SHAPES = load_task("shape", train=30, val=12, test=12)
FORKS = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
CLOCK = ("seconds", "images_per_second")


def metrics(out: Path) -> list[dict[str, Any]]:
    """Lines of metrics.jsonl without measured times."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in CLOCK} for line in lines]


def outcome(out: Path) -> tuple[bytes, list[dict[str, Any]]]:
    return (out / "model.ckpt").read_bytes(), metrics(out)


def accuracy(path: Path, images: ImageList) -> float:
    """Accuracy of a checkpoint, computed without the code of training."""
    tuned, preprocessing = load(path), read_checkpoint(path).preprocessing
    with torch.no_grad():
        pictures = [images[i][0] for i in range(len(images))]
        x = torch.stack([torch.from_numpy(preprocessing(picture)) for picture in pictures])
        right = tuned(x).argmax(-1) == torch.tensor(images.labels)
    return float(right.double().mean())


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of ``SMALL`` on ``DIGITS``."""
    out = tmp_path_factory.mktemp("finished") / "run"
    train(DIGITS, out, SMALL)
    return out


def test_equal_seeds_give_equal_bits_and_other_seeds_do_not(finished: Path, tmp_path: Path) -> None:
    train(DIGITS, tmp_path / "again", SMALL)
    train(DIGITS, tmp_path / "other", replace(SMALL, seed=1))
    assert outcome(tmp_path / "again") == outcome(finished)
    assert metrics(tmp_path / "other")[0] != metrics(finished)[0]


def test_each_epoch_has_a_line_and_the_test_has_the_last_one(finished: Path) -> None:
    *epochs, last = (json.loads(t) for t in (finished / "metrics.jsonl").read_text().splitlines())
    assert [line["epoch"] for line in epochs] == [1, 2]
    for line in epochs:
        assert list(line) == [
            "epoch",
            "lr",
            "train_loss",
            "train_accuracy",
            "val_loss",
            "val_accuracy",
            "seconds",
            "images_per_second",
            "deviation_down_mean",
            "deviation_down_max",
            "deviation_up_mean",
            "deviation_up_max",
        ]
    assert {"epoch", "test_loss", "test_accuracy"} <= set(last)


def test_the_checkpoint_reproduces_the_reported_metrics(tmp_path: Path) -> None:
    settings = replace(SMALL, epochs=3, head_lr=0.03)
    result = train(DIGITS, tmp_path / "run", settings)
    lines = metrics(tmp_path / "run")
    assert result.val_accuracy == max(line["val_accuracy"] for line in lines)
    assert result.val_accuracy == lines[result.best_epoch - 1]["val_accuracy"]
    assert result.val_loss == lines[result.best_epoch - 1]["val_loss"]
    assert accuracy(result.checkpoint, DIGITS.val) == pytest.approx(result.val_accuracy)
    assert DIGITS.test is not None
    assert accuracy(result.checkpoint, DIGITS.test) == pytest.approx(result.test_accuracy)
    assert result.checkpoint_bytes == result.checkpoint.stat().st_size
    checkpoint = read_checkpoint(result.checkpoint)
    assert checkpoint.classes == DIGITS.classes
    assert checkpoint.preprocessing.size == 16
    assert checkpoint.training["epoch"] == result.best_epoch
    numbers = sum(tensor.numel() for tensor in checkpoint.tensors.values())
    assert numbers == result.update_parameters + result.head_parameters


def test_the_test_images_do_not_influence_training(finished: Path, tmp_path: Path) -> None:
    assert DIGITS.test is not None
    wrong = ImageList(DIGITS.test.images, [9 - label for label in DIGITS.test.labels])
    train(replace(DIGITS, test=wrong), tmp_path / "run", SMALL)
    before, now = (read_checkpoint(out / "model.ckpt") for out in (finished, tmp_path / "run"))
    assert all(torch.equal(t, now.tensors[n]) for n, t in before.tensors.items())
    assert metrics(tmp_path / "run")[:-1] == metrics(finished)[:-1]
    assert metrics(tmp_path / "run")[-1] != metrics(finished)[-1]


def test_of_equal_accuracies_the_lower_loss_is_chosen(tmp_path: Path) -> None:
    one = ImageList(DIGITS.val.images[:1], DIGITS.val.labels[:1])
    settings = replace(SMALL, epochs=3, head_lr=0.03)
    result = train(replace(DIGITS, val=one), tmp_path / "run", settings)
    lines = metrics(tmp_path / "run")[:-1]
    best = max(lines, key=lambda line: (line["val_accuracy"], -line["val_loss"]))
    assert result.best_epoch == best["epoch"]


@FORKS
def test_workers_do_not_change_the_results(tmp_path: Path) -> None:
    settings = replace(SMALL, augment="rand", mixup=0.5, drop_path=0.2)
    for workers in (0, 2):
        train(DIGITS, tmp_path / str(workers), settings, RunOptions(workers=workers))
    assert outcome(tmp_path / "0") == outcome(tmp_path / "2")


def test_accumulated_parts_equal_the_whole_step(finished: Path, tmp_path: Path) -> None:
    train(DIGITS, tmp_path / "run", replace(SMALL, accumulate=3))
    for whole, parts in zip(metrics(finished)[:-1], metrics(tmp_path / "run")[:-1], strict=True):
        assert parts == pytest.approx(whole, rel=1e-3)


class Interrupting(Sequence[Path | NDArray[np.uint8]]):
    """Images that interrupt the program on a certain access, like a signal."""

    def __init__(
        self,
        images: Sequence[Path | NDArray[np.uint8]],
        accesses: int,
        error: type[BaseException] = KeyboardInterrupt,
    ) -> None:
        self.images, self.left, self.error = images, accesses, error

    def __len__(self) -> int:
        return len(self.images)

    @overload
    def __getitem__(self, index: int) -> Path | NDArray[np.uint8]: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Path | NDArray[np.uint8]]: ...
    def __getitem__(self, index: int | slice) -> Any:
        self.left -= 1
        if self.left == 0:
            raise self.error
        return self.images[index]

    def __iter__(self) -> Iterator[Path | NDArray[np.uint8]]:
        return iter(self.images)


def test_a_run_interrupted_in_any_epoch_and_resumed_gives_the_same_result(tmp_path: Path) -> None:
    settings = replace(SMALL, epochs=3, augment="crop", cutmix=1.0, drop_path=0.2)
    train(DIGITS, tmp_path / "whole", settings)
    per_epoch = len(DIGITS.train)
    for accesses, done in ((5, 0), (2 * per_epoch - 5, 1), (per_epoch + 5, 2)):
        images = Interrupting(DIGITS.train.images, accesses)
        with pytest.raises(KeyboardInterrupt):
            train(
                replace(DIGITS, train=ImageList(images, DIGITS.train.labels)),
                tmp_path / "stopped",
                settings,
                RunOptions(resume=True),
            )
        finished_epochs = metrics(tmp_path / "stopped") if done else []
        assert len(finished_epochs) == done
    train(DIGITS, tmp_path / "stopped", settings, RunOptions(resume=True))
    assert outcome(tmp_path / "stopped") == outcome(tmp_path / "whole")


@pytest.mark.slow
def test_a_process_killed_twice_and_resumed_gives_the_same_result(tmp_path: Path) -> None:
    write_folder(SHAPES, tmp_path / "shapes")
    command = ["-m", "aoft_deploy.cli.train", "--data", str(tmp_path / "shapes")]
    command += ["--img-size", "16", "--epochs", "6", "--batch-size", "16", "--augment", "flip"]
    assert run_python(*command, "--out", tmp_path / "whole").returncode == 0
    command += ["--out", str(tmp_path / "killed"), "--resume"]
    for epochs in (1, 3):
        dying = (
            "import os, sys; from pathlib import Path\n"
            "def killing(event, given):\n"
            "    if event == 'open' and given[1] == 'a' and 'metrics.jsonl' in str(given[0]):\n"
            "        written = Path(given[0])\n"
            f"        if written.exists() and written.read_text().count('\\n') == {epochs}:\n"
            "            os.kill(os.getpid(), 9)\n"
            "sys.addaudithook(killing)\n"
            "from aoft_deploy.cli.train import main; sys.exit(main())"
        )
        killed = run_python("-c", dying, *command[2:])
        assert killed.returncode == -signal.SIGKILL
        assert metrics(tmp_path / "killed")[-1]["epoch"] == epochs
    assert run_python(*command).returncode == 0
    assert outcome(tmp_path / "killed") == outcome(tmp_path / "whole")


def test_a_complete_run_is_not_repeated(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path.name: path.read_bytes() for path in finished.iterdir()}
    result = train(DIGITS, finished, SMALL, RunOptions(resume=True, progress=True))
    assert "is already complete" in capsys.readouterr().err
    assert result.test_accuracy == metrics(finished)[-1]["test_accuracy"]
    assert {path.name: path.read_bytes() for path in finished.iterdir()} == before


def test_a_run_is_neither_overwritten_nor_mixed_with_another(finished: Path) -> None:
    with pytest.raises(OutputError, match=r"already holds a run .*`resume=True`"):
        train(DIGITS, finished, SMALL)
    with pytest.raises(SettingError, match="started with batch size 16, but now it is 8"):
        train(DIGITS, finished, replace(SMALL, batch_size=8), RunOptions(resume=True))
    fewer = ImageList(DIGITS.train.images[1:], DIGITS.train.labels[1:])
    with pytest.raises(SettingError, match="started with other images in train: continue with"):
        train(replace(DIGITS, train=fewer), finished, SMALL, RunOptions(resume=True))


def test_training_on_all_images_keeps_the_last_epoch(tmp_path: Path) -> None:
    result = train(DIGITS, tmp_path / "run", replace(SMALL, train_on="train+val"))
    assert result.best_epoch == 2
    assert result.val_accuracy is result.val_loss is None
    assert result.test_accuracy is not None
    assert metrics(tmp_path / "run")[0]["val_loss"] is None
    assert read_checkpoint(result.checkpoint).training["images"] == 52


def test_a_run_can_stop_early_with_the_learning_rates_of_all_epochs(tmp_path: Path) -> None:
    settings = replace(SMALL, epochs=4, train_on="train+val")
    train(DIGITS, tmp_path / "whole", settings)
    result = train(DIGITS, tmp_path / "early", replace(settings, stop_after=2))
    assert (result.epochs, result.best_epoch) == (2, 2)
    assert metrics(tmp_path / "early")[:2] == metrics(tmp_path / "whole")[:2]
    assert len(metrics(tmp_path / "early")) == 3
    assert read_checkpoint(result.checkpoint).training["settings"]["stop_after"] == 2


def test_images_are_resized_as_set_and_the_checkpoint_records_it(tmp_path: Path) -> None:
    settings = replace(SMALL, epochs=1, crop_mode="squash", crop_pct=0.8, augment="window")
    checkpoint = read_checkpoint(train(DIGITS, tmp_path / "run", settings).checkpoint)
    assert checkpoint.preprocessing.crop_mode == "squash"
    assert checkpoint.preprocessing.crop_pct == 0.8
    assert not {"crop_mode", "crop_pct"} & checkpoint.training["settings"].keys()
    with pytest.raises(SettingError, match="`crop_mode` is 'stretch', but must be one of"):
        train(DIGITS, tmp_path / "other", replace(SMALL, crop_mode="stretch"))
    assert not (tmp_path / "other").exists()


def test_without_test_images_there_is_no_test_accuracy(tmp_path: Path) -> None:
    result = train(replace(DIGITS, test=None), tmp_path / "run", replace(SMALL, epochs=1))
    assert result.test_accuracy is None
    assert metrics(tmp_path / "run")[-1]["test_accuracy"] is None


@pytest.mark.parametrize("method", method_names())
def test_every_method_fits_its_training_images(tmp_path: Path, method: str) -> None:
    settings = replace(SMALL, method=method, epochs=3)
    train(replace(DIGITS, test=None), tmp_path / "run", settings)
    losses = [line["train_loss"] for line in metrics(tmp_path / "run")[:-1]]
    assert losses[-1] < losses[0]


def test_regularisers_and_bf16_train_to_finite_losses(tmp_path: Path) -> None:
    settings = replace(
        SMALL, mixup=0.2, cutmix=1.0, label_smoothing=0.1, drop_path=0.3, precision="bf16"
    )
    result = train(DIGITS, tmp_path / "run", settings)
    assert all(np.isfinite(line["train_loss"]) for line in metrics(tmp_path / "run")[:-1])
    assert read_checkpoint(result.checkpoint).training["settings"]["precision"] == "bf16"


def test_diverging_training_stops_and_keeps_the_best_epoch(tmp_path: Path) -> None:
    # This decay multiplies the classifier's weights by −10⁶ in each step, until they overflow.
    settings = replace(SMALL, method="linear", head_lr=1e-2, weight_decay=1e8, epochs=9)
    with pytest.raises(DivergedError, match=r"diverged in epoch .* use lower learning rates than"):
        train(DIGITS, tmp_path / "run", settings)
    lines = metrics(tmp_path / "run")
    assert all(np.isfinite(line["val_loss"]) for line in lines)
    kept = read_checkpoint(tmp_path / "run" / "model.ckpt").training
    assert kept["val_accuracy"] == max(line["val_accuracy"] for line in lines)


def test_a_gpu_without_enough_memory_is_one_sentence(tmp_path: Path) -> None:
    images = Interrupting(DIGITS.train.images, 3, torch.OutOfMemoryError)
    train_images = ImageList(images, DIGITS.train.labels)
    with pytest.raises(SettingError, match="too little memory: compute each step in parts with"):
        train(replace(DIGITS, train=train_images), tmp_path / "run", SMALL)


def test_an_image_that_cannot_be_used_is_found_before_training(tmp_path: Path) -> None:
    write_folder(DIGITS, tmp_path / "digits")
    path = next((tmp_path / "digits" / "train").rglob("*.png"))
    path.write_bytes(b"no image")
    with pytest.raises(DataError, match=re.escape(path.name)):
        train(replace(DIGITS, train=ImageList([path], [0])), tmp_path / "run", SMALL)
    assert not (tmp_path / "run").exists()


def test_damaged_images_of_all_parts_are_found_at_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_folder(SHAPES, tmp_path / "shapes")
    for part, content in (("train", None), ("val", b""), ("test", b"<html>not found</html>")):
        path = next((tmp_path / "shapes" / part).rglob("*.png"))
        path.write_bytes(path.read_bytes()[:-40] if content is None else content)
    splits = load_folder(tmp_path / "shapes")
    message = r"^3 of 54 images cannot be used: .*train.*; .*val.*it is empty; .*test.*HTML"
    with pytest.raises(DataError, match=message):
        train(splits, tmp_path / "run", SMALL, RunOptions(progress=True))
    lines = capsys.readouterr().err.splitlines()
    assert len([line for line in lines if line.startswith("Cannot read image")]) == 3
    with pytest.raises(DataError, match=r"^2 of 54 images cannot be used: .*val.*; .*test"):
        train(splits, tmp_path / "run", SMALL, RunOptions(trust_images=True))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("trusted", "parts"), [(False, "train val test"), (True, "val test")])
def test_truncated_images_of_val_and_test_are_always_found_and_those_of_train_unless_trusted(
    tmp_path: Path, trusted: bool, parts: str
) -> None:
    write_folder(SHAPES, tmp_path / "shapes")
    for part in ("train", "val", "test"):
        path = next((tmp_path / "shapes" / part).rglob("*.png"))
        path.write_bytes(path.read_bytes()[:-40])
    splits, named = load_folder(tmp_path / "shapes"), parts.split()
    with pytest.raises(DataError, match=f"^{len(named)} of 54 images cannot") as caught:
        train(splits, tmp_path / "run", SMALL, RunOptions(trust_images=trusted))
    assert [part for part in ("train", "val", "test") if f"/{part}/" in str(caught.value)] == named


def test_checked_images_and_those_of_a_complete_run_are_not_checked_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checks: list[int] = []

    def checking(*_: object) -> dict[str, str]:
        checks.append(1)
        return {}

    monkeypatch.setattr(run, "find_unreadable", checking)
    settings = replace(SMALL, epochs=1)
    train(DIGITS, tmp_path / "run", settings, checked=True)
    train(DIGITS, tmp_path / "run", settings, RunOptions(resume=True))
    assert not checks
    train(DIGITS, tmp_path / "other", settings)
    assert checks


def test_unknown_names_and_missing_weights_are_found_before_training(tmp_path: Path) -> None:
    with pytest.raises(UnknownNameError, match=r"Unknown method 'lorra'\. Did you mean lora"):
        train(DIGITS, tmp_path / "run", replace(SMALL, method="lorra"))
    with pytest.raises(UnknownNameError, match="Unknown setting of lora 'seed'"):
        train(DIGITS, tmp_path / "run", replace(SMALL, method="lora", method_settings={"seed": 1}))
    with pytest.raises(BackboneError, match="There is no file"):
        train(DIGITS, tmp_path / "run", replace(SMALL, backbone_weights=tmp_path / "absent.pth"))


def test_an_output_folder_that_cannot_be_made_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="/file is a file: give a folder as `out`"):
        train(DIGITS, tmp_path / "file" / "run", SMALL)


def test_the_callers_random_numbers_are_left_alone(tmp_path: Path) -> None:
    def drawn() -> tuple[float, float, float]:
        return random.random(), np.random.rand(), torch.rand(()).item()

    state = random.getstate(), np.random.get_state(), torch.get_rng_state()
    expected = drawn()
    random.setstate(state[0])
    np.random.set_state(state[1])
    torch.set_rng_state(state[2])
    train(DIGITS, tmp_path / "run", replace(SMALL, epochs=1, augment="rand"))
    assert drawn() == expected


def test_tensorboard_gets_the_metrics(tmp_path: Path) -> None:
    train(DIGITS, tmp_path / "run", replace(SMALL, epochs=1), RunOptions(tensorboard=True))
    assert list((tmp_path / "run").glob("events.out.tfevents.*"))


def test_without_tensorboard_its_extra_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "model.ckpt").touch()
    with pytest.raises(MissingExtraError, match=r"pip install 'aoft-deploy\[tensorboard\]'"):
        train(DIGITS, tmp_path / "run", SMALL, RunOptions(tensorboard=True, overwrite=True))
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["model.ckpt"]


@pytest.mark.slow
def test_two_processes_train_what_one_trains(tmp_path: Path) -> None:
    write_folder(SHAPES, tmp_path / "shapes")
    options = ["--data", str(tmp_path / "shapes"), "--img-size", "16", "--epochs", "2"]
    options += ["--batch-size", "16", "--precision", "fp32", "--accumulate", "2"]
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2"]
    launch += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    launch += ["-m", "aoft_deploy.cli.train"]
    done = subprocess.run(
        [*launch, *options, "--out", tmp_path / "two"],
        check=True,
        timeout=240,
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.stdout.count("test accuracy") == 1
    train(load_folder(tmp_path / "shapes"), tmp_path / "one", SMALL)
    for one, two in zip(metrics(tmp_path / "one"), metrics(tmp_path / "two"), strict=True):
        assert two == pytest.approx(one, rel=1e-3)
