import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from aoft_deploy.checkpoints.checkpoint import read_checkpoint
from aoft_deploy.cli.train import main
from aoft_deploy.cli.train_options import given_settings, parser
from aoft_deploy.data.folder import write_folder
from aoft_deploy.data.synthetic import load_task
from aoft_deploy.training.settings import TrainingSettings

SHAPES = load_task("shape", train=30, val=12, test=12)
SMALL = ["--img-size", "16", "--epochs", "1", "--batch-size", "16"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "shapes"
    write_folder(SHAPES, path)
    return path


def test_help_needs_no_torch() -> None:
    code = (
        "import sys\n"
        "from aoft_deploy.cli.train import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "sys.exit(any(n in sys.modules for n in ('torch', 'numpy', 'PIL', 'timm', 'accelerate')))"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


def test_help_costs_less_than_a_third_of_a_second() -> None:
    command = [sys.executable, "-m", "aoft_deploy.cli.train", "--help"]
    before = os.times()
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    after = os.times()  # CPU time, which does not depend on other processes
    assert done.stdout.startswith("usage: aoft-train")
    used = after.children_user + after.children_system
    assert used - before.children_user - before.children_system < 0.3


def test_options_that_are_not_given_keep_the_defaults_of_the_library() -> None:
    options = parser().parse_args(["--data", "digits", "--out", "x"])
    assert given_settings(options) == {"method_settings": {}}
    options = parser().parse_args(["--data", "digits", "--out", "x", "--lr", "1", "--set", "a=2"])
    assert given_settings(options) == {"lr": 1.0, "method_settings": {"a": 2}}


def test_every_training_setting_has_an_option_whose_help_shows_its_default() -> None:
    text = " ".join(parser().format_help().partition("options:")[2].split())
    for name, value in vars(TrainingSettings()).items():
        if name != "method_settings":
            option = "--" + name.replace("_", "-")
            after = text.partition(f" {option} ")[2]
            assert after, name
            assert value is None or f"({value})" in after.partition(" --")[0], name


def test_training_on_a_folder_writes_a_checkpoint_and_prints_a_table(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--method", "lora", "--rank", "3", "--targets", "k", "fc1", "--set", "scale=0.5"]
    assert main(["--data", str(folder), "--out", str(tmp_path / "run"), *SMALL, *options]) == 0
    printed = capsys.readouterr()
    checkpoint = read_checkpoint(tmp_path / "run" / "model.ckpt")
    given = {"rank": 3, "scale": 0.5, "targets": ["k", "fc1"]}
    assert given.items() <= checkpoint.settings.items()
    assert checkpoint.classes == SHAPES.classes
    for name in ("method", "trained parameters", "chosen epoch", "val accuracy", "test accuracy"):
        assert re.search(rf"^{name} +\S", printed.out, re.MULTILINE)
    assert "epoch 1/1" in printed.err


def test_the_command_first_prints_skipped_files_classes_and_image_counts(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "shapes"
    shutil.copytree(folder, data)
    (data / "train").rename(data / "Training")
    (data / "val").rename(data / "Valid")
    (data / "unlabelled").mkdir()
    (data / "Training" / "star" / "photo.heic").touch()
    options = ["--data", str(data), *SMALL, "--method", "linear"]
    assert main([*options, "--out", str(tmp_path / "run")]) == 0
    notes = [
        "note: Folder 'unlabelled' skipped.",
        "note: 1 file with another suffix skipped (.heic 1).",
    ]
    start = [
        *notes,
        "6 classes: circle, cross, ring, square, star, triangle",
        "images: train 30 (from Training), val 12 (from Valid), test 12 (from test)",
    ]
    lines = [line for line in capsys.readouterr().err.splitlines() if line and "%|" not in line]
    assert lines[:4] == start
    assert lines[4].startswith("epoch 1/1")
    assert main([*options, "--out", str(tmp_path / "quiet"), "--quiet"]) == 0
    assert capsys.readouterr().err.splitlines() == notes


def test_trust_images_skips_the_check_of_all_images(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "shapes"
    shutil.copytree(folder, data)
    path = data / "train" / "star" / "00004.png"
    path.write_bytes(path.read_bytes()[:-60])
    given = ["--data", str(data), "--out", str(tmp_path / "run"), *SMALL, "--quiet"]
    assert main(given) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: 1 of 54 images cannot be used: Cannot read image")
    assert error.count("\n") == 1 and "00004.png" in error
    assert not (tmp_path / "run").exists()
    assert main([*given, "--trust-images"]) == 1
    assert capsys.readouterr().err.startswith("error: Cannot read image")


def test_quiet_prints_only_the_table(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--train-on", "train+val", "--method", "linear", "--quiet"]
    assert main(["--data", str(folder), "--out", str(tmp_path), *SMALL, *options]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    assert re.search(r"^val accuracy +none$", printed.out, re.MULTILINE)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--rank", "999"], "rank is 999, but a 192 × 192 weight allows 1 to 192"),
        (["--method", "linear", "--rank", "4"], "Unknown setting of linear 'rank'"),
        (["--targets", "qq"], "Unknown target of aoft-lora-star 'qq'"),
        (["--set", "rank=many"], "rank of aoft-lora-star is 'many', but must be of type int"),
        (["--data", "digitz"], "Unknown folder or task 'digitz'. Did you mean digits?"),
        (["--backbone", "aoft_vit_nono"], "Unknown backbone 'aoft_vit_nono'. Did you mean"),
        (["--lr", "-1"], "--lr is -1.0, but must be a number above 0"),
        (["--workers", "-1"], "--workers is -1, but must be a whole number from 0"),
    ],
)
def test_an_invalid_option_is_a_one_line_error(
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    message: str,
) -> None:
    given = ["--data", str(folder), "--out", str(tmp_path / "run"), *SMALL, *options]
    assert main(given) == 1
    printed = capsys.readouterr()
    assert printed.err.startswith(f"error: {message}")
    assert printed.err.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "options",
    [["--set", "rank"], ["--set", "=3"], ["--augment", "blur"], ["--precision", "fp16"]],
)
def test_wrong_usage_exits_with_2(options: list[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["--data", "digits", "--out", "x", *options])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--recipe", "vtab/kitti", "--suite", "vtab"], "not allowed with argument"),
        (["--suite", "vtap"], "--suite: Unknown name 'vtap'. Did you mean vtab?"),
        (["--method", "aoft-lora-start"], "Unknown name 'aoft-lora-start'. Did you mean"),
        (["--seeds", "2"], "--seeds and --tasks need --suite"),
        (["--recipe", "vtab/kitti", "--seeds", "2"], "--seeds and --tasks need --suite"),
        (["--recipe", "vtab/kitti", "--tasks", "kitti"], "--seeds and --tasks need --suite"),
        (["--suite", "vtab", "--seeds", "0"], "--seeds must be 1 or more"),
        (["--suite", "vtab", "--seed", "1"], "give --seeds instead of --seed"),
        (["--any-size"], "--any-size needs --recipe or --suite"),
        (["--recipe", "vtab/kitti", "--train-on", "train"], "decide --train-on and --stop-after"),
        (["--suite", "vtab", "--stop-after", "1"], "decide --train-on and --stop-after"),
    ],
)
def test_options_that_cannot_be_combined_exit_with_2(
    capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["--data", "digits", "--out", "x", *options])
    assert message in capsys.readouterr().err


BENCHMARK = ["--backbone", "aoft_vit_nano", "--img-size", "16", "--epochs", "1", "--quiet"]
BENCHMARK += ["--any-size", "--method", "linear", "--head-lr", "0.03"]


@pytest.fixture(scope="module")
def vtab(tmp_path_factory: pytest.TempPathFactory, write_vtab: Callable[..., Path]) -> Path:
    root = tmp_path_factory.mktemp("vtab")
    for name in ("kitti", "eurosat"):
        write_vtab(root, name)
    return root


def test_a_recipe_prints_its_choices_and_deviations(
    vtab: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["--recipe", "vtab/kitti", "--data", str(vtab), "--out", str(tmp_path / "run")]
    assert main([*command, *BENCHMARK]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    assert re.search(r"^task +vtab/kitti$", printed.out, re.MULTILINE)
    assert re.search(r"^chosen rate +0\.03$", printed.out, re.MULTILINE)
    assert re.search(r"^chosen epoch +1$", printed.out, re.MULTILINE)
    assert re.search(r"^deviation +train has 8 images instead of 800$", printed.out, re.MULTILINE)
    assert read_checkpoint(tmp_path / "run/model.ckpt").training["images"] == 14
    assert main([*command, *BENCHMARK]) == 1
    assert "continue it with --resume" in capsys.readouterr().err
    assert main([*command, *BENCHMARK, "--resume"]) == 0
    assert capsys.readouterr().out == printed.out


def test_a_suite_prints_its_means_and_the_path_of_the_table(
    vtab: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["--suite", "vtab", "--data", str(vtab), "--out", str(tmp_path), *BENCHMARK]
    assert main([*command, "--seeds", "1", "--tasks", "kitti", "eurosat"]) == 0
    printed = capsys.readouterr().out
    mean = json.loads((tmp_path / "results.json").read_text())["mean of 2 of 19 tasks"]
    assert re.search(rf"^mean of 2 of 19 tasks +{mean:.2f}%$", printed, re.MULTILINE)
    assert re.search(r"^other sizes +vtab/eurosat, vtab/kitti$", printed, re.MULTILINE)
    assert "group means" not in printed
    assert re.search(r"^table +\S+table\.md$", printed, re.MULTILINE)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--recipe", "vtab/kity"], "Unknown task of a benchmark 'vtab/kity'. Did you mean"),
        (["--recipe", "vtab/dtd"], "There is no folder "),
        (["--recipe", "vtab/kitti"], "{vtab}/kitti/train800.txt lists 8 images instead of the"),
        (["--suite", "vtab", "--tasks", "kity"], "Unknown task of vtab 'kity'. Did you mean kitti"),
        (["--suite", "vtab", "--tasks", "dtd"], "There is no folder {vtab}/dtd with VTAB-1k's dtd"),
    ],
)
def test_an_invalid_benchmark_option_is_a_one_line_error(
    vtab: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    message: str,
) -> None:
    assert main(["--data", str(vtab), "--out", str(tmp_path / "run"), *options]) == 1
    printed = capsys.readouterr()
    assert printed.err.startswith(f"error: {message.format(vtab=vtab)}")
    assert printed.err.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_data_and_out_are_required() -> None:
    with pytest.raises(SystemExit, match="2"):
        main([])
