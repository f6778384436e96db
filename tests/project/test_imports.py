"""Imports follow the table in ARCHITECTURE.md, and there are no import cycles."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = {
    "aoft_deploy": ROOT / "aoft_deploy",
    "aoft_exporters": ROOT / "exporters" / "aoft_exporters",
    "aoft_demo": ROOT / "demo" / "aoft_demo",
}
LONGEST = 300
"""Maximum number of lines of a module."""

Graph = Mapping[str, set[str]]


def module_name(path: Path, package: str, folder: Path) -> str:
    parts = [package, *path.relative_to(folder).with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {
    module_name(path, package, folder): path
    for package, folder in PACKAGES.items()
    for path in folder.rglob("*.py")
}


def room(module: str) -> str:
    """The room of a module, such as ``aoft_deploy.tuning``; the package for its root modules."""
    parts = module.split(".")
    is_room = len(parts) > 2 or MODULES[module].name == "__init__.py"
    return ".".join(parts[:2]) if is_room else parts[0]


def imports(text: str, known: Iterator[str] | Mapping[str, object]) -> Iterator[tuple[str, bool]]:
    """The known modules that a source imports, and whether only for type checking."""
    tree = ast.parse(text)
    for_types = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING"
        for node in ast.walk(block)
    }
    names = set(known)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found = inner if inner in names else node.module
                if found in names:
                    yield found, id(node) in for_types
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name in names:
                    yield alias.name, id(node) in for_types


def cycle(graph: Graph) -> list[str]:
    """Nodes of a cycle, in order; empty if there is none."""
    done: set[str] = set()

    def walk(node: str, path: list[str]) -> list[str]:
        if node in path:
            return path[path.index(node) :]
        if node in done:
            return []
        for target in sorted(graph[node]):
            if found := walk(target, [*path, node]):
                return found
        done.add(node)
        return []

    return next((found for node in sorted(graph) if (found := walk(node, []))), [])


def table() -> tuple[dict[str, set[str]], dict[str, set[str]]]:
    """Read the table in ARCHITECTURE.md: allowed imports of each room, and those only for types.

    Each name is a room, a package, or a module.
    """
    allowed: dict[str, set[str]] = {}
    for_types: dict[str, set[str]] = {}
    for line in (ROOT / "ARCHITECTURE.md").read_text("utf-8").splitlines():
        found = re.fullmatch(r"\| `(aoft_\w+(?:\.\w+)?)` \|.*\| ([^|]*) \|", line)
        if found is None:
            continue
        name, cell = found.groups()
        usual, _, types = cell.partition("for types:")
        package = name.partition(".")[0]

        def full_names(text: str, package: str = package) -> set[str]:
            names = re.findall(r"`([\w.]+)`", text)
            return {n if n.startswith("aoft_") else f"{package}.{n}" for n in names}

        allowed[name], for_types[name] = full_names(usual), full_names(types)
    return allowed, for_types


ALLOWED, FOR_TYPES = table()
GROUND = {module for module in MODULES if room(module) == "aoft_deploy"} - {"aoft_deploy"}


def forbidden(module: str, text: str) -> list[str]:
    """The imports of a module that the table does not allow."""
    own = room(module)
    result = []
    for target, types_only in imports(text, MODULES):
        names = {target, room(target), target.partition(".")[0]}
        allowed = ALLOWED[own] | (FOR_TYPES[own] if types_only else set())
        if room(target) != own and not names & allowed and target not in GROUND:
            result.append(target)
    return result


def file_graph(changed: Mapping[str, str] | None = None) -> dict[str, set[str]]:
    """The modules that each module imports, without imports of faces and imports for types."""
    graph = {}
    for module, path in MODULES.items():
        text = (changed or {}).get(module) or path.read_text("utf-8")
        found = imports(text, MODULES) if path.name != "__init__.py" else iter(())
        graph[module] = {target for target, types_only in found if not types_only} - {module}
    return graph


def room_graph(graph: Graph) -> dict[str, set[str]]:
    rooms: dict[str, set[str]] = {room(module): set() for module in graph}
    for module, targets in graph.items():
        rooms[room(module)] |= {room(target) for target in targets} - {room(module)}
    return rooms


def test_the_table_lists_all_rooms() -> None:
    assert {room(module) for module in MODULES} == set(ALLOWED)
    assert len([name for name in ALLOWED if name.startswith("aoft_deploy.")]) <= 9


@pytest.mark.parametrize("module", sorted(MODULES))
def test_the_imports_of_a_module_are_allowed(module: str) -> None:
    if MODULES[module].name != "__init__.py":
        assert forbidden(module, MODULES[module].read_text("utf-8")) == []


def test_the_root_modules_of_the_library_import_no_room() -> None:
    for module in GROUND:
        targets = imports(MODULES[module].read_text("utf-8"), MODULES)
        assert {target for target, _ in targets} <= GROUND


def test_there_is_no_import_cycle() -> None:
    graph = file_graph()
    assert cycle(graph) == []
    assert cycle(room_graph(graph)) == []


@pytest.mark.parametrize("module", sorted(MODULES))
def test_no_module_is_too_long(module: str) -> None:
    assert len(MODULES[module].read_text("utf-8").splitlines()) <= LONGEST


def test_planted_forbidden_imports_and_cycles_are_found() -> None:
    planted = "from aoft_deploy.serving.settings import Settings\n"
    assert forbidden("aoft_deploy.data.images", planted) == ["aoft_deploy.serving.settings"]
    planted = "def f():\n    from aoft_deploy.export import merged\n"
    assert forbidden("aoft_deploy.training.run", planted) == ["aoft_deploy.export.merged"]
    planted = "if TYPE_CHECKING:\n    from aoft_deploy.tuning.multitask import FleetModel\n"
    assert forbidden("aoft_deploy.artefacts.exporter", planted) == []
    assert forbidden("aoft_deploy.artefacts.exporter", planted.replace("if TYPE_CHECKING", "if 1"))
    low, high = "aoft_deploy.tuning.updates.delta", "aoft_deploy.tuning.updates.folding"
    assert cycle(file_graph({low: f"from {high} import fold_rows\n"})) in (
        [low, high],
        [high, low],
    )
    planted = "from aoft_deploy.export.options import VerifyOptions\n"
    assert cycle(room_graph(file_graph({"aoft_deploy.checkpoints.rlrr": planted})))
