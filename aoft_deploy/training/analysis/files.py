"""The files of an analysis: analysis.json and its plots, written together."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from aoft_deploy.drawing import check_matplotlib, save_figure
from aoft_deploy.errors import OutputError
from aoft_deploy.files import json_text, settle, taken, writable_folder
from aoft_deploy.training.analysis.plots import FILES, draw

__all__ = ["check_folder", "write_analysis"]


def check_folder(folder: Path, overwrite: bool) -> None:
    """Refuse a folder that holds files of an analysis, before the analysis begins.

    Args:
        folder: As for ``write_analysis``.
        overwrite: Accept such files.

    Raises:
        OutputError: The folder cannot be used.
    """
    for path in (folder / name for name in (*FILES, "analysis.json")):
        if path.exists() and not path.is_file():
            raise OutputError(f"Cannot write {path}: it exists and is no file.")
        if path.exists() and not overwrite:
            raise taken(path, "plots")


def write_analysis(
    analysis: Mapping[str, Any], folder: Path, overwrite: bool = False
) -> list[Path]:
    """Write analysis.json and its plots; all files are complete before the first is renamed.

    Args:
        analysis: From ``analyse_file``.
        folder: Output folder; created if it is missing.
        overwrite: Replace the files of an earlier analysis, and remove its plots that this analysis
            does not have.

    Returns:
        The written files.

    Raises:
        MissingExtraError: matplotlib is not installed.
        OutputError: The folder or a file in it cannot be written, or exists.
    """
    check_matplotlib()
    check_folder(folder, overwrite)
    figures = draw(analysis)
    names = [*figures, "analysis.json"]
    with writable_folder(folder) as temporary:
        try:
            for name, figure in figures.items():
                save_figure(figure, temporary / name)
            text = json_text(analysis, indent=1) + "\n"
            (temporary / "analysis.json").write_text(text, "utf-8")
            for name in names:
                settle(temporary / name)
            for name in names:
                (temporary / name).replace(folder / name)
            for name in set(FILES).difference(names):
                (folder / name).unlink(missing_ok=True)
        except OSError as error:
            raise OutputError(f"Cannot write into {folder}: {error.strerror or error}.") from error
    return [folder / name for name in names]
