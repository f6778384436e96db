import json
from pathlib import Path

import pytest
import torch

from aoft_deploy.errors import CheckpointError, OutputError, SettingError
from aoft_deploy.training.run_folder import Progress, RunFolder, check_same

RUN = {"lr": 0.1, "classes": ["a", "b"]}


def saved(path: Path, **changes: object) -> RunFolder:
    folder = RunFolder(path)
    tensors = {"now.x": torch.arange(3.0), "best.x": torch.zeros(3)}
    lines = [{"epoch": 1, "val_loss": 0.1}]
    folder.save(Progress(lines, {"epoch": 1}, tensors, run=RUN, **changes))  # type: ignore[arg-type]
    return folder


def test_an_empty_folder_starts_a_run_with_and_without_resume(tmp_path: Path) -> None:
    for resume in (False, True):
        assert RunFolder(tmp_path / "new").open(resume=resume) == Progress()


def test_foreign_files_do_not_matter(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    assert RunFolder(tmp_path).open() == Progress()


def test_progress_is_restored_exactly(tmp_path: Path) -> None:
    progress = saved(tmp_path).open(resume=True)
    assert progress.lines == [{"epoch": 1, "val_loss": 0.1}]
    assert progress.best == {"epoch": 1}
    assert progress.result is None
    assert torch.equal(progress.group("now")["x"], torch.arange(3.0))
    assert torch.equal(progress.group("best")["x"], torch.zeros(3))


@pytest.mark.parametrize("name", ["model.ckpt", "metrics.jsonl", "resume.safetensors"])
def test_a_run_is_not_overwritten(tmp_path: Path, name: str) -> None:
    (tmp_path / name).touch()
    with pytest.raises(
        OutputError,
        match=f"already holds a run .{name}.: continue .* `resume=True`, replace it with",
    ):
        RunFolder(tmp_path).open()
    assert (tmp_path / name).exists()
    assert RunFolder(tmp_path).open(overwrite=True) == Progress()
    assert (tmp_path / name).exists()  # until the new run starts


def test_a_file_is_no_output_folder(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "run" / "1"):
        with pytest.raises(OutputError, match="/file is a file: give a folder as `out`"):
            RunFolder(path).open(overwrite=True)


def test_a_new_run_deletes_the_old_one_and_nothing_else(tmp_path: Path) -> None:
    saved(tmp_path).append_metrics({"epoch": 1})
    (tmp_path / "notes.txt").touch()
    RunFolder(tmp_path).prepare({"caf\udce9.png": "it is empty", "zürich.png": "it is empty"})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["notes.txt", "unreadable.json"]
    assert list(RunFolder(tmp_path).left_out()) == ["caf\udce9.png", "zürich.png"]
    RunFolder(tmp_path).prepare({})
    assert RunFolder(tmp_path).left_out() == {}


@pytest.mark.parametrize("text", ["{", "[]", "3"])
def test_a_damaged_list_of_what_is_left_out_is_one_sentence(tmp_path: Path, text: str) -> None:
    (tmp_path / "unreadable.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"unreadable.json cannot be read .*: start a new"):
        RunFolder(tmp_path).left_out()


def test_results_without_a_state_cannot_be_resumed(tmp_path: Path) -> None:
    (tmp_path / "model.ckpt").touch()
    with pytest.raises(OutputError, match=r"holds model.ckpt but no resume.safetensors"):
        RunFolder(tmp_path).open(resume=True)


def test_other_settings_and_images_are_named(tmp_path: Path) -> None:
    run = saved(tmp_path).open(resume=True).run
    check_same(tmp_path, run, RUN)
    with pytest.raises(SettingError, match=r"started with lr 0.1, but now it is 0.2: continue"):
        check_same(tmp_path, run, RUN | {"lr": 0.2})
    with pytest.raises(SettingError, match=r"started with other images in val: continue with the"):
        check_same(tmp_path, {"val_images": "3f"}, {"val_images": "4e"})


def test_long_settings_are_shortened(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match=r'now it is \["aaa.*…: continue'):
        check_same(tmp_path, RUN, RUN | {"classes": ["a" * 100]})


@pytest.mark.parametrize("content", [b"", b"nonsense", b"\x02\0\0\0\0\0\0\0{}"])
def test_a_damaged_state_is_one_sentence(tmp_path: Path, content: bytes) -> None:
    folder = saved(tmp_path)
    folder.state.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"resume.safetensors cannot be read"):
        folder.open(resume=True)


def test_a_complete_run_without_its_checkpoint_is_refused(tmp_path: Path) -> None:
    folder = saved(tmp_path, result={"method": "lora"})
    with pytest.raises(CheckpointError, match=r"complete, but its model.ckpt is missing"):
        folder.open(resume=True)
    folder.checkpoint.touch()
    assert folder.open(resume=True).result == {"method": "lora"}


def test_metrics_are_rewritten_to_agree_with_the_progress(tmp_path: Path) -> None:
    folder = saved(tmp_path)
    folder.metrics.write_text('{"epoch": 1, "val_loss": 0.1}\n{"epoch": 2, "va')
    folder.rewrite_metrics(folder.open(resume=True))
    folder.append_metrics({"epoch": 2})
    lines = [json.loads(line) for line in folder.metrics.read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [1, 2]


def test_a_write_error_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="Cannot write"):
        saved(tmp_path / "file" / "out")
    with pytest.raises(OutputError, match="Cannot write into"):
        RunFolder(tmp_path / "file" / "out").prepare({})
    with pytest.raises(OutputError, match=r"Cannot write .*metrics.jsonl"):
        RunFolder(tmp_path / "absent").append_metrics({})
