"""OpenVINO: a folder with openvino_model.xml and .bin, run by OpenVINO's CPU plugin.

The graph is the ONNX exporter's: input ``pixel_values`` float32 [batch, 3, H, W], or with ``uint8``
``image`` uint8 [batch, H, W, 3]; output ``logits`` float32 [batch, classes]; the batch is dynamic.
Metadata stand in the graph's ``rt_info``. The precision of the arithmetic is the artefact's own
wherever it runs: a processor that cannot compute in it is refused.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from aoft_deploy.artefacts.inputs import check_batch
from aoft_deploy.artefacts.onnx_metadata import checked_metadata
from aoft_deploy.artefacts.spec import Recipe
from aoft_deploy.errors import CheckpointError, SettingError
from aoft_deploy.files import file_digest
from aoft_deploy.processors import limited
from aoft_exporters.graph.fleet_tables import FLEET_TABLES, folded_logits
from aoft_exporters.openvino.library import check_arithmetic, openvino_library

if TYPE_CHECKING:
    from torch import nn

    from aoft_deploy.tuning.multitask import FleetModel

__all__ = [
    "CALIBRATED",
    "ENGINES",
    "FORMS",
    "MARKER",
    "PRECISIONS",
    "SUFFIX",
    "TOLERANCE",
    "OpenvinoEngine",
    "OpenvinoFleet",
    "export",
    "export_fleet",
    "load",
    "load_fleet",
]

SUFFIX = ".openvino"
MARKER = "openvino_model.xml"
TASKS = "tasks.safetensors"
"""A fleet's tables."""

FORMS = ("mixed", "folded")
TOLERANCE = 5e-5
PRECISIONS = ("fp32", "bf16", "int8")
ENGINES = ("openvino",)
CALIBRATED = ("int8",)

ARITHMETIC = {"fp32": "f32", "bf16": "bf16", "int8": "f32"}
"""What is asked of OpenVINO for all that is not in 8 bits."""

SECTION = "aoft"
"""Where metadata stand in ``rt_info``."""

DIGEST = "files_sha256"
"""Key of the digest of all files; zeros stand in its place where it is taken of the graph's own."""

ZEROS = "0" * 64


def export(model: nn.Module, path: Path, recipe: Recipe) -> None:
    """Write a plain model as a folder of OpenVINO's intermediate representation.

    Args:
        model: A merged model in evaluation mode; it is not changed.
        path: Folder to make.
        recipe: Input form, normalisation, metadata, precision, and images to calibrate int8 with.

    Raises:
        MissingExtraError: OpenVINO, or for int8 NNCF, is not installed.
        SettingError: bf16 is asked of a processor that does not compute in it.
        AttachError: ``uint8`` is asked of a model without a plain patch embedding.
    """
    from aoft_exporters.onnx import exporter as onnx_exporter

    _write(
        path,
        recipe,
        lambda: onnx_exporter.plain_graph(model, recipe, separate=True),
        _images(recipe),
    )
    _seal(path)


def export_fleet(
    model: FleetModel, path: Path, recipe: Recipe, tables: Mapping[str, NDArray[Any]]
) -> None:
    """Write a fleet as such a folder, its tasks beside the graph in a safetensors file.

    Args:
        model: The model that all tasks share; it is not changed.
        path: Folder to make.
        recipe: Size of the input, metadata, precision, and images to calibrate int8 with.
        tables: The tasks' tables; ``MixedModel.forward`` names them.

    Raises:
        MissingExtraError: OpenVINO, or for int8 NNCF, is not installed.
        SettingError: bf16 is asked of a processor that does not compute in it, or ``uint8``.
    """
    from safetensors.numpy import save_file

    from aoft_exporters.onnx import exporter as onnx_exporter

    tasks = len(tables["count"])
    image = _images(recipe)

    def sample(index: int) -> dict[str, NDArray[Any]]:
        return {"pixel_values": image(index), "task": np.array([index % tasks]), **tables}

    _write(path, recipe, lambda: onnx_exporter.fleet_graph(model, recipe, tables), sample)
    save_file({name: np.ascontiguousarray(table) for name, table in tables.items()}, path / TASKS)
    _seal(path)


def _images(recipe: Recipe) -> Callable[[int], NDArray[Any]]:
    """The images to calibrate with, each as a batch of one."""
    from aoft_deploy.export.merged import normalised

    if recipe.precision == "int8" and recipe.calibration is None:
        raise SettingError("int8 of --to openvino needs a recipe with images to calibrate with.")

    def image(index: int) -> NDArray[Any]:
        assert recipe.calibration is not None
        pixels = recipe.calibration[index : index + 1]
        return pixels if recipe.uint8 else normalised(pixels, recipe)

    return image


def _write(
    path: Path, recipe: Recipe, graph_of: Callable[[], Any], sample: Callable[[int], Any]
) -> None:
    """Make the folder with an ONNX graph as OpenVINO's, in the recipe's precision."""
    openvino = openvino_library()
    check_arithmetic(openvino.Core(), recipe.precision)
    from onnx import save

    from aoft_exporters.openvino import int8

    if recipe.precision == "int8":
        int8.require()
    path.mkdir()
    told = {**recipe.metadata, "precision": recipe.precision, DIGEST: ZEROS}
    between = path / "graph"  # weights beside the graph, which a file of 2 GiB need not hold
    between.mkdir()
    save(graph_of(), between / "graph.onnx", save_as_external_data=True, location="weights")
    graph = openvino.convert_model(between / "graph.onnx")
    _renumber(graph)
    if recipe.precision == "int8":
        images = 0 if recipe.calibration is None else len(recipe.calibration)
        graph, left = int8.quantised(graph, images, sample, recipe.min_agreement)
        _renumber(graph)
        if left:
            told["left_in_float"] = json.dumps(left)
    for name, text in told.items():
        graph.set_rt_info(text, [SECTION, name])
    openvino.save_model(graph, path / MARKER, compress_to_fp16=False)
    del graph  # which may read the weights in place
    shutil.rmtree(between)


def _seal(path: Path) -> None:
    """Write down the digest of all files, so that a folder that is half overwritten is known."""
    digest = _digest(path).encode()
    text = (path / MARKER).read_bytes()
    before = f'{DIGEST} value="'.encode()
    assert text.count(before + ZEROS.encode()) == 1
    (path / MARKER).write_bytes(text.replace(before + ZEROS.encode(), before + digest))


def _check_whole(path: Path) -> None:
    """Whether a folder's files are those that were written; one without a digest passes.

    Raises:
        CheckpointError: They are not, or one cannot be read.
    """
    try:
        written = re.search(_written(), (path / MARKER).read_bytes())
        right = written is None or written[2].decode() == _digest(path)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror or error}).") from error
    if not right:
        raise CheckpointError(
            f"{path} is half overwritten, still being written, or was changed since aoft-export "
            "wrote it: copy or export it again."
        )


def _digest(path: Path) -> str:
    """SHA-256 of the graph, zeros where its digest stands, and of the SHA-256s of the others."""
    text = re.sub(_written(), rb"\g<1>" + ZEROS.encode(), (path / MARKER).read_bytes())
    parts = [hashlib.sha256(text).hexdigest()]
    others = (path / MARKER).with_suffix(".bin"), path / TASKS
    parts += [file_digest(file) for file in others if file.is_file()]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _written() -> bytes:
    """What finds the digest in the graph's file."""
    return rf'({DIGEST} value=")([0-9a-f]{{64}})'.encode()


def _renumber(graph: Any) -> None:
    """Name what has no name of its own by its place, where OpenVINO counts over the process.

    The same input gives the same files then.
    """
    for place, node in enumerate(graph.get_ordered_ops()):
        own = re.fullmatch(r"([A-Z][A-Za-z0-9]*)_\d+", node.get_friendly_name())
        if own:
            node.set_friendly_name(f"{own[1]}_{place}")


class OpenvinoEngine:
    """A folder, or an ONNX file in float32, compiled for the CPU in the artefact's own precision.

    Many threads may call ``run`` at once; OpenVINO computes one batch after the other.

    Attributes:
        info: Metadata stored in the graph.
        takes_pixels: Whether the input is uint8 [batch, H, W, 3].
        takes_tasks: Whether the graph is a fleet's.
        device: ``cpu``.

    Args:
        path: The folder or file.
        threads: Threads within a batch; None lets OpenVINO choose.

    Raises:
        CheckpointError: The artefact is missing or damaged, or not what ``export`` writes.
        SettingError: The processor does not compute in the artefact's precision, or OpenVINO does
            not run it.
        MissingExtraError: OpenVINO is not installed.
    """

    device = "cpu"

    def __init__(self, path: Path, threads: int | None = None) -> None:
        file = path if path.suffix == ".onnx" else path / MARKER
        if not file.is_file():
            what = "file" if file == path else "folder"
            also = "" if file == path else f" with an {MARKER}"
            raise CheckpointError(f"There is no {what} {path}{also}.")
        self._compiled = _Compiled(path, file, threads)
        self.info: Mapping[str, str] = self._compiled.info
        self.takes_tasks = "task" in self._compiled.inputs
        self.takes_pixels = "image" in self._compiled.inputs
        name = "image" if self.takes_pixels else "pixel_values"
        self._takes = np.uint8 if self.takes_pixels else np.float32, self._compiled.inputs[name]
        self._name = name
        self._tasks = len(json.loads(self.info["tasks"])) if self.takes_tasks else None
        self._tables = _tables(path) if "bank" in self._compiled.inputs else {}
        if file != path:
            _check_whole(path)

    @property
    def arithmetic(self) -> str:
        """What OpenVINO reports to compute in: ``f32`` or ``bf16``."""
        return str(self._compiled.property("INFERENCE_PRECISION_HINT").to_string())

    @property
    def threads(self) -> int:
        """Threads within a batch."""
        return int(self._compiled.property("INFERENCE_NUM_THREADS"))

    def run(
        self, images: NDArray[Any], task: NDArray[np.int64] | None = None
    ) -> NDArray[np.float32]:
        """Logits of a batch in the artefact's own input form; see ``Engine``."""
        check_batch(images, task, takes=self._takes, tasks=self._tasks)
        if task is None:
            return self._compiled.answer({self._name: images})
        return self._compiled.fleet_answer(images, task, self._tables)


class OpenvinoFleet:
    """A fleet's folder that reads the tasks' tables where the caller has them.

    Attributes:
        info: Metadata stored in the graph.
        tables: The tasks that the folder holds, as ``MixedModel.forward`` takes them.

    Args:
        path: What ``export_fleet`` wrote.
        threads: Threads within a batch; None lets OpenVINO choose.

    Raises:
        CheckpointError: The folder is missing, damaged, or no fleet.
        MissingExtraError: OpenVINO is not installed.
    """

    def __init__(self, path: Path, threads: int | None = None) -> None:
        if not (path / MARKER).is_file():
            raise CheckpointError(f"There is no folder {path} with an {MARKER}.")
        if not (path / TASKS).is_file():
            raise CheckpointError(f"{path} is no fleet: export one with aoft-export --fleet.")
        self._compiled = _Compiled(path, path / MARKER, threads)
        self.info: Mapping[str, str] = self._compiled.info
        self.tables = _tables(path)
        _check_whole(path)

    def run(
        self,
        images: NDArray[np.float32],
        task: NDArray[np.int64],
        tables: Mapping[str, NDArray[Any]],
    ) -> NDArray[np.float32]:
        """Logits, (batch, columns), −inf beyond each task's own."""
        return self._compiled.fleet_answer(images, np.asarray(task, np.int64), tables)


class _Compiled:
    """A graph compiled for the CPU, with requests that threads take and give back."""

    def __init__(self, path: Path, file: Path, threads: int | None) -> None:
        core = openvino_library().Core()
        core.set_property({"ENABLE_MMAP": False})  # a file written anew changes no model that runs
        found = _metadata_of_onnx(file) if file == path else None  # before OpenVINO opens others
        graph = _read(core, file, path)
        self.info: Mapping[str, str] = _metadata(graph, path) if found is None else found
        precision = self.info["precision"]
        check_arithmetic(core, precision)
        options: dict[str, Any] = {
            "INFERENCE_PRECISION_HINT": ARITHMETIC[precision],
            "NUM_STREAMS": 1,
        }
        threads = threads or limited()
        if threads is not None:
            options["INFERENCE_NUM_THREADS"] = threads
        try:
            self._model = core.compile_model(graph, "CPU", options)
        except RuntimeError as error:
            raise CheckpointError(f"{path} cannot be compiled ({_reason(error)}).") from error
        self.inputs: dict[str, tuple[int | None, ...]] = {
            port.get_any_name(): tuple(
                None if axis.is_dynamic else axis.get_length()
                for axis in list(port.partial_shape)[1:]
            )
            for port in self._model.inputs
        }
        self._idle: deque[Any] = deque()

    def property(self, name: str) -> Any:
        """A property as the plugin reports it."""
        return self._model.get_property(name)

    def answer(self, feed: Mapping[str, NDArray[Any]]) -> NDArray[np.float32]:
        """Logits; inputs are read in place where they are contiguous."""
        try:
            request = self._idle.pop()  # of a deque it is atomic
        except IndexError:
            request = self._model.create_infer_request()
        try:
            given = {name: np.ascontiguousarray(value) for name, value in feed.items()}
            (logits,) = request.infer(given, share_inputs=True).values()
            return np.array(logits, np.float32)
        finally:
            self._idle.append(request)

    def fleet_answer(
        self, images: NDArray[Any], task: NDArray[np.int64], tables: Mapping[str, NDArray[Any]]
    ) -> NDArray[np.float32]:
        """Logits of a fleet, in its form."""
        task, tables = _taken(task, tables)

        def answer(images: NDArray[Any], task: NDArray[np.int64]) -> NDArray[np.float32]:
            return self.answer({"pixel_values": images, "task": task, **tables})

        if self.info.get("form") == "folded":
            return folded_logits(answer, images, task)
        return answer(images, task)


def _taken(
    task: NDArray[np.int64], tables: Mapping[str, NDArray[Any]]
) -> tuple[NDArray[np.int64], dict[str, NDArray[Any]]]:
    """The rows of the tasks that a batch takes, and their numbers among these.

    OpenVINO answers with nothing where a table has more than 2³¹ numbers, as those of a live fleet
    may; the rows of a batch's tasks are few.
    """
    chosen, own = np.unique(task, return_inverse=True)
    first, count = tables["first"][chosen], tables["count"][chosen]
    heads = np.concatenate(
        [tables["heads"][start : start + rows] for start, rows in zip(first, count, strict=True)]
    )
    taken = {
        "bank": tables["bank"][chosen],
        "heads": heads,
        "first": np.cumsum(count) - count,
        "count": count,
        "columns": tables["columns"],
    }
    return own.astype(np.int64), taken


def _tables(path: Path) -> dict[str, NDArray[Any]]:
    """The tables of a fleet's own tasks.

    Raises:
        CheckpointError: Their file is missing or damaged.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        tables = load_file(path / TASKS)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path / TASKS} cannot be read ({error}).") from error
    if set(tables) != set(FLEET_TABLES):
        raise CheckpointError(f"{path / TASKS} does not hold a fleet's tables.")
    return tables


def _read(core: Any, file: Path, path: Path) -> Any:
    try:
        return core.read_model(file)
    except RuntimeError as error:
        raise CheckpointError(f"{path} is no OpenVINO model ({_reason(error)}).") from error


def _metadata(graph: Any, path: Path) -> dict[str, str]:
    """What ``export`` stored."""
    found = graph.get_rt_info([SECTION]).value if graph.has_rt_info([SECTION]) else None
    if not isinstance(found, dict) or found.get("precision") not in PRECISIONS:
        raise CheckpointError(
            f"{path} does not name its precision: it was not written by aoft-export."
        )
    return {str(name): str(text) for name, text in found.items()}


def _metadata_of_onnx(path: Path) -> dict[str, str]:
    """What the ONNX exporter stored.

    Raises:
        CheckpointError: The file is damaged, or keeps weights in other files.
        SettingError: The file is in another precision than float32.
    """
    found = checked_metadata(path)
    if found.setdefault("precision", "fp32") != "fp32":
        raise SettingError(
            f"{path} is in {found['precision']}, which OpenVINO would compute otherwise than it "
            "was verified: take --engine onnxruntime, or export with --to openvino."
        )
    return found


def _reason(error: RuntimeError) -> str:
    """What OpenVINO says after the places in its source, of its last line."""
    return " ".join(str(error).strip().rpartition("\n")[2].split())[:160]


def load(
    path: Path,
    *,
    engine: str | None = None,
    threads: int | None = None,
    device: str | None = None,
) -> OpenvinoEngine:
    """Open an artefact for inference; see ``OpenvinoEngine``.

    Raises:
        SettingError: Another device than the CPU is asked for.
    """
    if device not in (None, "cpu"):
        raise SettingError(
            f"OpenVINO runs artefacts on the CPU, not on {device!r}: leave --device out."
        )
    return OpenvinoEngine(Path(path), threads)


def load_fleet(path: Path, *, threads: int | None = None) -> OpenvinoFleet:
    """Open a fleet whose tasks may change; see ``OpenvinoFleet``."""
    return OpenvinoFleet(Path(path), threads)
