"""The site is built without a warning, and links, commands and code of the documents are right."""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from checkout import ROOT
from documents import DOCUMENTS, blocks, command_lines, commands, prose
from forked import run_python
from served import Served

from aoft_deploy.cli.export import main as export_main
from aoft_deploy.serving.repository.models import Models
from aoft_deploy.serving.settings import read_toml
from aoft_deploy.serving.telemetry.gpus import Gpu
from aoft_deploy.serving.telemetry.observations import Observations
from aoft_deploy.tuning.methods import method_names

sys.path.append(str(ROOT / "tools"))
hooks = importlib.import_module("docs_hooks")
transcripts = importlib.import_module("transcripts")

TRANSCRIPTS = ("README.md", "docs/tutorials/many-tasks.md", "docs/tutorials/photographs.md")
"""Documents whose commands are run. The page of the first ten minutes repeats the README's."""

OPTIONS_OF_OTHERS = {"--check", "--version", "--input-data"}
"""Options in the text of tools/transcripts.py, of every command, and of perf_analyzer."""

EVERY_DOCUMENT = pytest.mark.parametrize(
    "path", DOCUMENTS, ids=[str(path.relative_to(ROOT)) for path in DOCUMENTS]
)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built strictly in a folder of its own."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_the_site_has_a_page_for_every_command_and_public_name(site: Path) -> None:
    for name in hooks.COMMANDS:
        text = (site / "commands" / f"{name}.html").read_text("utf-8")
        for action in hooks.command_parser(name)._actions:
            assert all(f"<code>{option}</code>" in text for option in action.option_strings)
    reference = (site / "python" / "reference.html").read_text("utf-8")
    for package in hooks.PACKAGES:
        names = importlib.import_module(package).__all__
        assert all(f'id="{package}.{name}"' in reference for name in names if name[0] != "_")


def test_the_site_loads_nothing_from_elsewhere(site: Path) -> None:
    loading = re.compile(r"""<(?:script|img|iframe|source)[^>]*\ssrc=["']?(https?:[^"'> ]+)""")
    styles = re.compile(r"""<link[^>]*rel=["']?stylesheet[^>]*href=["']?(https?:[^"'> ]+)""")
    for page in site.rglob("*.html"):
        text = page.read_text("utf-8")
        assert not [*loading.findall(text), *styles.findall(text)], page


def anchors(path: Path) -> set[str]:
    """The anchors that GitHub gives to a document's headings."""
    titles = re.findall(r"^#+ (.*)$", prose(path), re.M)
    plain = (re.sub(r"[^\w\- ]", "", title.lower()).strip() for title in titles)
    return {title.replace(" ", "-") for title in plain}


@EVERY_DOCUMENT
def test_links_lead_to_files_and_headings(path: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(path)):
        file, _, anchor = target.partition("#")
        if re.match(r"[a-z]+:", target) or "python/reference" in file or "commands/" in file:
            continue  # addresses elsewhere, and pages that only the site has
        linked = (path.parent / file) if file else path
        assert linked.exists(), target
        assert not anchor or anchor.startswith("only-") or anchor in anchors(linked), target


@EVERY_DOCUMENT
def test_named_files_exist(path: Path) -> None:
    names = re.findall(r"`((?:benchmarks|tests|tools|deploy)/[\w/.]+\.\w+)`", prose(path))
    assert [name for name in names if not (ROOT / name).exists()] == []


@EVERY_DOCUMENT
def test_commands_parse(path: Path) -> None:
    for name, *arguments in commands(path):
        if "--help" in arguments or "--version" in arguments:
            continue
        parser = hooks.command_parser(name)
        parser.allow_abbrev = False
        try:
            with contextlib.redirect_stderr(io.StringIO()) as errors:
                options = parser.parse_intermixed_args(arguments)
        except SystemExit:
            pytest.fail(f"{name} {' '.join(arguments)}: {errors.getvalue()}")
        method = getattr(options, "method", None)
        assert method is None or method in method_names()


def test_there_are_commands_and_snippets() -> None:
    assert sum(1 for path in DOCUMENTS for _ in commands(path)) > 60
    assert sum(len(blocks(path, "python")) for path in DOCUMENTS) > 8


@EVERY_DOCUMENT
def test_options_in_the_text_exist(path: Path) -> None:
    parsers = map(hooks.command_parser, hooks.COMMANDS)
    known = {option for parser in parsers for option in parser._option_string_actions}
    named = re.findall(r"`(--[a-z][\w-]*)", prose(path))
    assert set(named) - known - OPTIONS_OF_OTHERS == set()


@EVERY_DOCUMENT
def test_extras_exist(path: Path) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    for line in command_lines(path):
        for extras in re.findall(r"(?:aoft-deploy|\.)\[([\w,]+)\]", line):
            assert set(extras.split(",")) <= set(project["optional-dependencies"]), line


def test_the_extras_table_is_complete() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    page = (ROOT / "docs" / "start" / "install.md").read_text("utf-8")
    named = {name for cell in re.findall(r"`([\w,]+)`", page) for name in cell.split(",")}
    assert set(project["optional-dependencies"]) <= named


@EVERY_DOCUMENT
def test_settings_files_are_read(path: Path, tmp_path: Path) -> None:
    for block in blocks(path, "toml"):
        (tmp_path / "serve.toml").write_text(block)
        assert read_toml(tmp_path / "serve.toml")


def test_all_metrics_are_documented() -> None:
    page = (ROOT / "docs" / "serving" / "metrics.md").read_text("utf-8")

    gpu = Gpu("cuda:0", "GPU-1", "GPU", 2, 1, 0.5, 100.0)
    shown = Observations().exposition(cast(Models, SimpleNamespace(artefacts={})), True, [gpu])
    metrics = set(re.findall(r"^# TYPE (\w+)", shown, re.M))
    assert metrics == set(re.findall(r"^\| `((?:aoft|nv)_\w+)`", page, re.M))


def reads_files(path: Path) -> bool:
    """Whether a document's Python code needs the workspace or a server."""
    code = "".join(blocks(path, "python"))
    return bool(re.search(r'"(?:photos|runs|fleet\.onnx)|127\.0\.0\.1', code))


def run_code(path: Path, address: str = "") -> None:
    """Run a document's Python code, with a server's address instead of 127.0.0.1:8000."""
    names: dict[str, Any] = {}
    for code in blocks(path, "python"):
        code = code.replace("127.0.0.1:8000", address)
        exec(compile(code, str(path.relative_to(ROOT)), "exec"), names)


@EVERY_DOCUMENT
def test_python_code_runs(path: Path) -> None:
    if not reads_files(path):
        run_code(path)


@pytest.mark.slow
def test_python_code_runs_that_reads_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, serve: Callable[..., Served]
) -> None:
    monkeypatch.chdir(tmp_path)
    transcripts.write_pictures(tmp_path)
    bundled = ROOT / "demo" / "aoft_demo" / "bundled"
    tasks = []
    for name, task in {"photos": "tilt", "shapes": "shape", "colours": "colour"}.items():
        tasks.append(tmp_path / "runs" / name / "model.ckpt")
        tasks[-1].parent.mkdir(parents=True)
        shutil.copy(bundled / f"{task}.ckpt", tasks[-1])
    assert export_main(["--merge", str(tasks[0])]) == 0
    assert export_main(["--merge", str(tasks[0]), "--to", "timm"]) == 0
    assert export_main(["--fleet", *map(str, tasks[:2]), "-o", "fleet.onnx"]) == 0
    server = serve(f"photos={tasks[0].with_suffix('.onnx')}")
    for path in filter(reads_files, DOCUMENTS):
        run_code(path, f"127.0.0.1:{server.port}")


class ForkingShell(transcripts.Shell):  # type: ignore[misc,name-defined]
    """Runs this package's commands in forked processes, and pipelines in bash."""

    def execute(self, command: str) -> tuple[int, str]:
        """The exit code and the output of a command."""
        program, _, rest = command.partition(" ")
        if not program.startswith("aoft-") or "|" in rest:
            code, output = super().execute(command)
            return int(code), str(output)
        code, words = super().execute(f"printf '%s\\n' {rest}")
        assert code == 0
        module = f"aoft_deploy.cli.{program.removeprefix('aoft-')}"
        done = run_python(
            "-m", module, *words.splitlines(), cwd=self.folder, env=self.environment, joined=True
        )
        return done.returncode, done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("name", TRANSCRIPTS)
def test_transcripts_show_what_the_commands_print(name: str) -> None:
    _, faults = transcripts.run_document((ROOT / name).read_text("utf-8"), ForkingShell)
    assert faults == []


def test_a_transcript_that_shows_other_lines_is_found() -> None:
    text = "```console\n$ echo one more\none more\na line of another version\n```\n"
    rewritten, faults = transcripts.run_document(text)
    assert faults == ["a line of another version"]
    assert "one more" in rewritten and "another version" not in rewritten
