import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from folder_contents import folder_contents

from aoft_deploy import memory
from aoft_deploy.checkpoints.checkpoint import read_checkpoint
from aoft_deploy.cli.train import main
from aoft_deploy.cli.train_options import given_settings, parser
from aoft_deploy.data.folder import write_folder
from aoft_deploy.data.synthetic import load_task, task_names
from aoft_deploy.training.precision import fast_bf16
from aoft_deploy.training.run_folder import RunFolder
from aoft_deploy.training.settings import TrainingSettings
from aoft_deploy.tuning.backbones.bundled import WEIGHTS
from aoft_deploy.tuning.methods import method_names

SHAPES = load_task("shape", train=30, val=12, test=12)
SMALL = ["--img-size", "16", "--epochs", "1", "--batch-size", "16"]
SMALL += ["--backbone", "aoft_vit_nano"]


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
            after = text.partition(f" {option} ")[2].partition(" --")[0]
            assert "(default: " in after, name
            assert value is None or f"(default: {value}" in after, name


def test_the_help_lists_all_methods_and_tasks() -> None:
    text = " ".join(parser().format_help().replace("aoft-\n", "aoft-").split()).replace("- ", "-")
    assert f"fine-tuning method: {', '.join(method_names())} (default" in text
    assert f"a built-in task: {', '.join(task_names())} " in text


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
    assert "method    lora: rank 3, scale 0.5, targets k fc1\n" in printed.err
    update, head = re.findall(r"^trained parameters +(\S+) \+ (\S+) ", printed.out, re.MULTILINE)[0]
    assert re.search(
        rf"^trained   {update} parameters .* \+ {head} \(classifier\)$", printed.err, 8
    )


def test_the_command_keeps_freed_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = list[bool]()
    monkeypatch.setattr(memory, "keep_large_blocks", lambda: kept.append(True))
    assert main(["--data", str(tmp_path / "missing"), "--out", str(tmp_path / "run")]) == 1
    assert kept == [True]


def test_the_command_first_says_what_it_trains(
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
    names = "circle, cross, ring, square, star, triangle"
    plain = timm.create_model("aoft_vit_nano", num_classes=0, img_size=16)
    size = sum(parameter.numel() for parameter in plain.parameters())
    threads = f"{torch.get_num_threads()} threads".replace("1 threads", "1 thread")
    precision = "bf16" if fast_bf16(torch.device("cpu")) else "fp32"
    start = [
        *notes,
        f"data      {data}: 54 images of 6 classes ({names})",
        "train     30 images, 5 of each class (from Training)",
        "val       12 images, 2 of each class (from Valid)",
        "test      12 images, 2 of each class (from test)",
        f"backbone  aoft_vit_nano, {size:,} parameters, bundled weights, input 16 x 16 pixels",
        "method    linear",
        "trained   0 parameters (0.00% of the backbone) + 1,158 (classifier)",
        "training  1 epoch of 2 steps, up to 16 images per step, learning rate 0.03, augment none",
        f"device    cpu ({threads}), precision {precision}",
        f"output    {tmp_path / 'run'}",
    ]
    lines = capsys.readouterr().err.splitlines()
    assert lines[: len(start)] == start
    assert lines[len(start)].startswith("epoch 1/1")
    assert main([*options, "--out", str(tmp_path / "quiet"), "--quiet"]) == 0
    assert capsys.readouterr().err.splitlines() == notes


def test_after_training_commands_to_copy_export_try_and_serve_the_model(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, out, weights = (tmp_path / name for name in ("my photös", "run 1", "it's.safetensors"))
    shutil.copytree(folder, data)
    shutil.copyfile(WEIGHTS, weights)
    options = ["--data", str(data), "--out", str(out), "--backbone-weights", str(weights)]
    assert main([*options, *SMALL, "--method", "linear"]) == 0
    *_, export, predict, serve = (shlex.split(s) for s in capsys.readouterr().err.splitlines()[-3:])
    checkpoint, artefact = str(out / "model.ckpt"), str(out / "model.onnx")
    assert export == ["aoft-export", "--merge", checkpoint, "--backbone-weights", str(weights)]
    assert predict[:2] == ["aoft-predict", artefact]
    assert Path(predict[2]).is_relative_to(data / "test")
    assert Path(predict[2]).is_file()
    assert serve == ["aoft-serve", artefact]
    Path(artefact).touch()
    assert main([*options, *SMALL, "--method", "linear", "--overwrite"]) == 0
    again = shlex.split(capsys.readouterr().err.splitlines()[-3])
    assert again == [*export, "--overwrite"]


def test_without_a_backbone_the_demo_model_is_named_and_a_real_one_offered(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--img-size", "16", "--epochs", "1", "--method", "linear", "--quiet"]
    assert main(["--data", str(folder), "--out", str(tmp_path / "run"), *options]) == 0
    note = capsys.readouterr().err
    assert note.startswith("note: Without --backbone, aoft_vit_nano is trained, a small demo model")
    assert note.count("\n") == 1
    for option in re.findall(r"--[\w-]+", note):
        assert option in parser()._option_string_actions
    (name,) = re.findall(r"--backbone (vit\S+),", note)
    config = timm.get_pretrained_cfg(name)
    assert config is not None and config.hf_hub_id
    digits = ["--data", "digits", "--out", str(tmp_path / "digits"), "--rank", "0"]
    assert main(digits) == 1
    assert capsys.readouterr().err.startswith("error: ")


def test_a_run_is_overwritten_only_on_request_and_only_by_a_run_that_can_start(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--data", str(folder), "--out", str(tmp_path), *SMALL, "--method", "linear"]
    assert main(options) == 0
    before = folder_contents(tmp_path)
    capsys.readouterr()
    assert main(options) == 1
    assert capsys.readouterr().err == (
        f"error: {tmp_path} already holds a run (model.ckpt): continue it with --resume, replace "
        "it with --overwrite, or give another folder as --out.\n"
    )
    assert main([*options, "--overwrite", "--rank", "4"]) == 1
    assert folder_contents(tmp_path) == before
    assert main([*options, "--overwrite", "--seed", "1"]) == 0
    assert read_checkpoint(tmp_path / "model.ckpt").training["settings"]["seed"] == 1
    assert main([*options, "--resume"]) == 1
    assert (
        "was started with seed 1, but now it is 0: continue with the same, or start a new run "
        "with --overwrite" in capsys.readouterr().err
    )


def test_unreadable_images_are_left_out_on_request(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "shapes"
    shutil.copytree(folder, data)
    last = data / "test" / "triangle" / "00011.png"
    last.write_bytes(b"")
    options = ["--data", str(data), "--out", str(tmp_path / "run"), *SMALL, "--method", "linear"]
    assert main([*options, "--quiet"]) == 1
    assert "or leave them out with --skip-unreadable.\n" in capsys.readouterr().err
    assert main([*options, "--skip-unreadable"]) == 0
    printed = capsys.readouterr()
    assert "aoft-predict" in printed.err and f"{last}\n" not in printed.err.partition("Next:")[2]
    assert re.search(
        r"^left out +1 unreadable, see /\S+/unreadable\.json$",
        printed.out,
        re.MULTILINE,
    )


def test_an_interrupt_says_what_can_be_continued(
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def interrupting(self: RunFolder, line: object) -> None:
        raise KeyboardInterrupt

    options = ["--data", str(folder), "--out", str(tmp_path / "run"), *SMALL, "--method", "linear"]
    monkeypatch.setattr(RunFolder, "append_metrics", interrupting)
    assert main([*options, "--quiet"]) == 1
    hint = f"Finished epochs are in {tmp_path / 'run'}. To continue, add --resume."
    assert hint in capsys.readouterr().err
    monkeypatch.setattr(RunFolder, "save", interrupting)
    assert main([*options, "--quiet", "--overwrite"]) == 1
    assert capsys.readouterr().err == "error: Interrupted; nothing unfinished was left.\n"


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
        (["--suite", "vtab", "--seeds", "0"], "--seeds: '0' is no whole number from 1"),
        (["--resume", "--overwrite"], "not allowed with argument"),
        (["--skip-unreadable", "--trust-images"], "not allowed with argument"),
        (["--recipe", "vtab/kitti", "--skip-unreadable"], "--any-size accepts that"),
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
