"""The house: imports run down its floors, and never in a circle."""

from __future__ import annotations

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest
from draw_floors import FLOORS

from conftest import ROOT


def module_of(path: Path) -> str:
    parts = path.with_suffix("").parts
    parts = ("parallel_parnet", *parts) if parts[0] in ("kernels", "profiling") else parts
    return ".".join(parts).removesuffix(".__init__")


def sources(root: Path) -> dict[str, Path]:
    """Every module of the project, by the name it is imported as."""
    found = [
        p for folder in ("launch", "parallel_parnet", "kernels", "profiling") for p in (root / folder).rglob("*.py")
    ]
    return {module_of(path.relative_to(root)): path for path in sorted(found)}


def arrows(modules: dict[str, Path]) -> list[tuple[str, str]]:
    """(importing, imported), wherever in a file the import stands, but where types alone are imported."""
    found = []
    for name, path in modules.items():
        tree = ast.parse(path.read_text())
        for_types = {
            node for test in ast.walk(tree) if isinstance(test, ast.If) and ast.unparse(test.test) == "TYPE_CHECKING"
            for node in ast.walk(test)
        }  # fmt: skip
        package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node not in for_types:
                above = package[: len(package) - node.level + 1] if node.level else []
                source = ".".join([*above, *filter(None, [node.module])])
                targets = [f"{source}.{alias.name}" for alias in node.names]
                found += [(name, target if target in modules else source) for target in targets]
            elif isinstance(node, ast.Import) and node not in for_types:
                found += [(name, alias.name) for alias in node.names]
    return [(a, b) for a, b in found if b in modules]


def floor(module: str) -> int:
    """0 at the top."""
    rooms = [(len(room), i) for i, floor in enumerate(FLOORS) for room in floor.modules if is_in(module, room)]
    assert rooms, f"{module} stands on no floor: docs/draw_floors.py has them"
    return max(rooms)[1]


def is_in(module: str, room: str) -> bool:
    return f"{module}.".startswith(f"{room}.")


def faults(root: Path) -> list[str]:
    modules = sources(root)
    found, below = [], {name: set() for name in modules}
    for a, b in arrows(modules):
        if floor(a) > floor(b):
            found.append(f"{modules[a]} imports {modules[b]}, which stands above it")
        elif a != b:
            below[a].add(b)
    try:
        TopologicalSorter(below).prepare()
    except CycleError as error:
        found.append("a circle: " + " imports ".join(str(modules[name]) for name in error.args[1][::-1]))
    return found


def test_imports_run_down() -> None:
    assert not faults(ROOT)


@pytest.mark.parametrize(
    ("file", "line", "says"),
    [
        ("parallel_parnet/program/fold.py", "from ..engine import Engine", "which stands above"),
        ("parallel_parnet/network/blocks.py", "from ..program.program import INPUT", "which stands above"),
        ("kernels/gpu/launch.py", "def late(): from parallel_parnet.executors import local", "which stands above"),
        ("parallel_parnet/transport/group.py", "from . import shared_memory", "a circle: "),
    ],
)
def test_a_planted_arrow_is_found(file: str, line: str, says: str, tmp_path: Path) -> None:
    for path in sources(ROOT).values():
        copy = tmp_path / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(path.read_text() + (f"\n{line}\n" if path == ROOT / file else ""))
    (fault,) = faults(tmp_path)
    assert str(tmp_path / file) in fault and says in fault


def test_what_a_person_types_is_short() -> None:
    scripts = sorted((ROOT / "launch").iterdir())
    assert [path.name for path in scripts if path.suffix != ".py" and path.name != "__pycache__"] == ["demo"]
    assert max(len(path.read_text().splitlines()) for path in scripts if path.suffix == ".py") <= 40
