"""The GPU benchmark: a bad step does not end the others, and a dry run has every step."""

from __future__ import annotations

import json
import os
import re
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from checkout import ROOT

from aoft_deploy.errors import MissingExtraError, OutputError, SettingError

sys.path.append(str(ROOT))  # benchmarks is no installed package

from benchmarks.gpu import pack
from benchmarks.gpu.__main__ import main, run_steps
from benchmarks.gpu.aims import aims
from benchmarks.gpu.run import NotMeasured, Run
from benchmarks.gpu.steps import STEPS, Step
from benchmarks.gpu.table import write_table

Rows = list[dict[str, Any]]

LACKING = ("tensorrt", "aoti")
"""Steps that need a GPU or a compiler, and say so."""

LOW = re.compile("fp8|bf16|tf32|lanes")
"""Rows that a CPU cannot measure."""


def read_rows(out: Path) -> Rows:
    return [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


BAD_STEPS = """
import sys
from pathlib import Path
import benchmarks.gpu.__main__ as program
from benchmarks.gpu.steps import Step

program.LEAST = 1
out = Path(sys.argv[1])
steps = [
    Step(name, 1 if name == "hangs" else 60, f"gpu_steps:{name}", artefacts=False)
    for name in ("raises", "lacks", "crashes", "hangs", "measures")
]
program.run_steps(steps, out, out, dry=True, seconds=600, exports=False)
"""


@pytest.mark.slow
def test_a_step_that_fails_crashes_or_hangs_does_not_end_the_others(tmp_path: Path) -> None:
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests/support")])
    done = subprocess.run(
        [sys.executable, "-c", BAD_STEPS, tmp_path],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=True,
        timeout=600,
    )
    rows = read_rows(tmp_path)
    found = {(row["step"], row["row"]): row for row in rows}
    assert found["raises", "raises"]["failed"] == "ValueError: no such tensor"
    assert found["lacks", "fp8"]["not_measured"] == "this GPU has no fp8"
    assert found["lacks", "after"]["passed"]
    assert found["crashes", "crashes"]["failed"] == "its process ended with -11"
    assert found["hangs", "hangs"]["failed"] == "it was ended when its time was over"
    assert found["measures", "a figure"]["passed"]
    assert all(found[name, "before"]["passed"] for name in ("raises", "crashes", "hangs"))
    child = found["hangs", "before"]["child"]
    deadline = time.monotonic() + 10
    while is_running(child) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not is_running(child)
    assert write_table(tmp_path) == 3
    assert "no such tensor" in done.stdout


def test_a_step_for_which_no_time_is_left_is_recorded(tmp_path: Path) -> None:
    step = Step("late", 60, "gpu_steps:measures", artefacts=False)
    with pytest.MonkeyPatch.context() as patch:
        for name in ("AOFT_CACHE_DIR", "HF_HUB_OFFLINE", "PYTHONPATH", "CUDA_VISIBLE_DEVICES"):
            patch.setenv(name, os.environ.get(name, ""))
        run_steps([step], tmp_path, tmp_path, dry=True, seconds=5, exports=False)
    (row,) = read_rows(tmp_path)
    assert row["not_measured"] == "no time was left for this step"
    assert write_table(tmp_path) == 0


def test_steps_wait_for_artefacts_and_say_why_there_is_none(tmp_path: Path) -> None:
    run = Run("parity", tmp_path, tmp_path, True, time.time() + 60)
    Thread(target=lambda: run.publish("small fp32", {"path": tmp_path / "a.onnx"})).start()
    assert run.artefact("small fp32") == tmp_path / "a.onnx"
    run.publish("small fp8", {"reason": "--to onnx has no fp8"})
    with pytest.raises(NotMeasured, match=r"small fp8 was not exported: --to onnx has no fp8$"):
        run.artefact("small fp8")
    late = Run("parity", tmp_path, tmp_path, True, time.time() + 4)
    with pytest.raises(NotMeasured, match="small bf16 was not exported in time"):
        late.artefact("small bf16")


@pytest.mark.parametrize(
    ("error", "dry", "recorded"),
    [
        (NotMeasured("no fp8"), False, "not_measured"),
        (MissingExtraError("peft", "peft"), False, "not_measured"),
        (ModuleNotFoundError("No module named 'peft'", name="peft"), False, "not_measured"),
        (ModuleNotFoundError("", name="aoft_exporters.onnx"), False, "failed"),
        (SettingError("the CPU would compute a layer"), True, "not_measured"),
        (SettingError("the CPU would compute a layer"), False, "failed"),
        (RuntimeError("CUDA error"), True, "failed"),
    ],
)
def test_only_what_the_machine_lacks_is_not_measured(
    error: Exception, dry: bool, recorded: str, tmp_path: Path
) -> None:
    with Run("parity", tmp_path, tmp_path, dry, 0.0).row("fp8"):
        raise error
    (row,) = read_rows(tmp_path)
    assert {"not_measured", "failed"} & row.keys() == {recorded}
    assert write_table(tmp_path) == (recorded == "failed")


def test_steps_that_fork_have_not_started_cuda() -> None:
    code = (
        "import os, sys; sys.path.insert(0, sys.argv[1]);"
        "import torch, benchmarks.gpu.training, benchmarks.gpu.commands;"
        "bad = lambda: os.waitpid(os.fork() or os._exit(torch._C._cuda_isInBadFork()), 0)[1];"
        "before = bad(); torch.cuda.is_available(); print(before, bool(bad()))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, ROOT], capture_output=True, text=True, check=True
    )
    assert done.stdout == "0 True\n"  # the second shows that the check can fail


def test_results_of_an_earlier_run_are_not_mixed_with_new_ones(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "results.jsonl").write_text("")
    with pytest.raises(SystemExit) as ended:
        main(["--dry", "--out", str(tmp_path)])
    assert ended.value.code == 2
    assert "choose another --out" in capsys.readouterr().err


def dry_run(out: Path, *options: str) -> Rows:
    """The rows of a dry run, in which nothing failed."""
    command = [sys.executable, "-m", "benchmarks.gpu", "--dry", "--out", str(out), *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
    log = (out / "log.txt").read_text()
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:] + log[-3000:]
    rows = read_rows(out)
    for row in rows:
        assert "failed" not in row and row.get("passed", True)
    return rows


@pytest.mark.slow
def test_the_steps_with_small_models_run(tmp_path: Path) -> None:
    steps = ("machine", "gradients", "fleet", "lanes", "fleet speed")
    rows = dry_run(tmp_path / "out", "--only", *steps)
    assert {row["step"] for row in rows if "seconds" in row} == {"exports", *steps}


@pytest.mark.stress
def test_a_dry_run_has_every_step(tmp_path: Path) -> None:
    out = tmp_path / "out"
    rows = dry_run(out)
    assert {row["step"] for row in rows if "seconds" in row} >= {
        step.name for step in STEPS if step.name not in LACKING
    }
    for row in rows:
        if "not_measured" in row:
            assert row["step"] in LACKING or LOW.search(row["row"]), row
    checked = {row["row"] for row in rows if "passed" in row}
    assert checked >= {"aoft-train twice", "aoft-serve one", "aoft-serve t0", "small fp32"}
    assert checked >= {"digits fp16", "large fp16", "large plain fp16", "tests marked gpu"}
    timed = {(row["runtime"], row["model"]) for row in rows if row.get("kind") == "speed"}
    assert timed >= {
        *((runtime, "merged") for runtime in ("ONNX Runtime", "ONNX Runtime alone", "PyTorch")),
        *(("torch.compile", "merged"), ("fleet", "6 tasks"), ("PEFT", "6 tasks")),
    }
    table = (out / "table.md").read_text()
    assert "| fp32 | NumPy |" in table and "its speeds mean nothing" in table
    assert "| yes |" not in table and "| no |" not in table


def speed(runtime: str, model: str, precision: str, images: str, rate: float) -> dict[str, Any]:
    return {
        **{"step": "engines", "row": runtime, "kind": "speed", "batch": 32, "ms": 32e3 / rate},
        **{"runtime": runtime, "model": model, "precision": precision, "images": images},
        **{"device_ms": None, "images_per_second": rate},
    }


def test_the_table_compares_what_was_found_with_the_aims(tmp_path: Path) -> None:
    rows: Rows = [
        {"step": "machine", "row": "machine", "device": "A | GPU", "flops": 35e9, "versions": {}},
        {"step": "machine", "row": "p", "kind": "peak", "precision": "fp16", "per_second": 700e12},
        speed("ONNX Runtime", "merged", "fp16", "NumPy", 10_000),
        speed("ONNX Runtime", "plain", "fp16", "NumPy", 10_500),
        speed("ONNX Runtime", "merged", "fp8", "NumPy", 15_000),
        speed("torch.compile", "merged", "bf16", "NumPy", 8_000),
        speed("PyTorch", "merged", "bf16", "GPU", 20_000),
        speed("fleet", "merged", "fp16", "NumPy", 10_000),
        speed("fleet", "64 tasks", "fp16", "NumPy", 9_800),
        {"step": "parity", "row": "digits fp8", "passed": False, "error": 0.5, "allowed": 0.3}
        | {"agreement": 0.996, "placement": {"CUDAExecutionProvider": {"MatMul": 48}}},
        {"step": "t", "row": "PEFT LoRA", "kind": "training step", "ms": 10.0, "peak_mib": 5.0}
        | {"batch": 64},
        {"step": "t", "row": "aoft-lora", "kind": "training step", "ms": 8.0, "peak_mib": 4.0}
        | {"batch": 64},
    ]
    found = {aim.text.partition(", at ")[0]: (aim.found, aim.reached) for aim in aims(rows)}
    assert found["artefact of ViT-B/16 in bf16 or fp16, images per second"] == (10_000, False)
    assert found["artefact × torch.compile, images in NumPy"] == (10_000 / 8_000, False)
    assert found["artefact × torch.compile, images in GPU"] == (None, False)
    assert found["merged × plain in ONNX Runtime, worst batch size"] == (10_000 / 10_500, False)
    assert found["64 mixed tasks × one merged model, fp16"] == (0.98, True)
    assert found["FP8 × fp16"] == (1.5, True)
    assert found["FP8, share of equal decisions"] == (0.996, True)
    assert found["AOFT's training step × PEFT's"] == (0.8, True)
    (tmp_path / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert write_table(tmp_path) == 1
    text = (tmp_path / "table.md").read_text()
    assert text.startswith("# A | GPU\n") and "dry run" not in text
    assert "| FP8 × fp16, at least 1.4 | 1.5 | yes |" in text
    assert "| parity | digits fp8 | FAILED | 5.0e-01 | 3e-01 | CUDAExecutionProvider: 48" in text
    assert "| 32 | ONNX Runtime | merged | fp16 | NumPy | 3.200 |  | 10,000 | 50% |" in text


def fatbin(*entries: tuple[int, int, bytes]) -> bytes:
    """A block of GPU code as CUDA's compiler writes it: kind, capability and code of each entry."""
    content = b""
    for kind, capability, code in entries:
        header = struct.pack("<HHIQ", kind, 0x101, 64, len(code)).ljust(28, b"\1")
        content += (header + struct.pack("<I", capability)).ljust(64, b"\2") + code
    return struct.pack("<IHHQ", 0xBA55ED50, 1, 16, len(content)) + content


CUBIN, PTX = 2, 1


def test_only_the_code_of_the_capability_is_kept() -> None:
    both = fatbin(
        (CUBIN, 80, b"eighty.." * 4), (CUBIN, 90, b"ninety.." * 4), (PTX, 90, b"text" * 8)
    )
    other = fatbin((CUBIN, 80, b"only80.." * 4))
    magic = struct.pack("<I", 0xBA55ED50)
    library = b"ELF" + magic + both + b"host code" + other + magic
    cut = pack.keep_capability(library, "9.0")
    assert len(cut) == len(library)
    assert b"eighty" not in cut and b"text" not in cut
    assert b"ninety.." * 4 in cut and b"only80.." * 4 in cut and b"host code" in cut
    assert sum(a != b for a, b in zip(cut, library, strict=True)) == 64  # nothing but the code


def test_a_capability_without_code_is_refused_with_those_that_have_some() -> None:
    library = fatbin((CUBIN, 75, b"code"), (CUBIN, 120, b"code"))
    with pytest.raises(SettingError, match=r"no code for 9\.0, but for 7\.5, 12\.0\.$"):
        pack.keep_capability(library, "9.0")
    with pytest.raises(SettingError, match="'H100': give a number such as"):
        pack.keep_capability(library, "H100")


def install(site: Path, python: str, names: list[str]) -> None:
    provider = site / pack.PROVIDER
    provider.parent.mkdir(parents=True)
    (site / "onnxruntime/__init__.py").write_text(f"version = {python!r}\nnames = {names!r}\n")
    provider.write_bytes(fatbin((CUBIN, 90, b"code"), (CUBIN, 80, b"more")))
    for name in pack.DROPPED:
        (site / name).touch()


@pytest.fixture
def packed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[Path]]:
    monkeypatch.setattr(pack, "_install", install)
    return lambda: list(pack.pack(tmp_path / "kit", "9.0", "3.12", ["uvicorn"]))


def test_the_archives_hold_the_packages_and_the_entry_points_of_the_exporters(
    packed: Callable[[], list[Path]], tmp_path: Path
) -> None:
    site = tmp_path / "site"
    site.mkdir()
    for archive in packed():
        subprocess.run(["tar", "-xJf", archive, "-C", site], check=True)
    assert b"code" in (site / pack.PROVIDER).read_bytes()
    assert b"more" not in (site / pack.PROVIDER).read_bytes()
    assert not any((site / name).exists() for name in pack.DROPPED)
    code = (
        "import onnxruntime; from importlib.metadata import distribution;"
        "print(onnxruntime.version, onnxruntime.names);"
        "print(sorted(e.name for e in distribution('aoft-deploy').entry_points))"
    )
    command = [sys.executable, "-S", "-c", code]
    environment = {"PYTHONPATH": str(site)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    version, names = done.stdout.splitlines()
    assert version == "3.12 ['onnxruntime-gpu', 'uvicorn']"
    assert {"'onnx'", "'openvino'", "'timm'"} <= set(names.strip("[]").split(", "))


def test_an_archive_above_the_limit_is_refused(
    packed: Callable[[], list[Path]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(pack, "LIMIT", 100)
    with pytest.raises(OutputError, match=r"packages\.tar\.xz has .* bytes, but at most 100 are"):
        packed()
    assert pack.main(["--out", str(tmp_path / "again"), "--capability", "9.0"]) == 1
    assert capsys.readouterr().err.startswith("error: ")
