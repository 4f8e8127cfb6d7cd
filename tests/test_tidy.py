"""The few rules about the source itself that matter enough to be tests."""

from __future__ import annotations

import ast
from collections.abc import Container, Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "src" / "nopin"

ALLOWED: dict[str, set[str]] = {
    "errors": set(),
    "units": set(),
    "codes": set(),
    "pending": {"errors"},
    "ranges": {"errors", "units"},
    "mm": {"errors", "units", "codes", "ranges"},
    "iommu": {"errors", "units", "ranges", "mm"},
    "nic": {"errors", "units", "codes", "ranges", "mm", "iommu"},
    "linux": {"errors", "units", "ranges", "mm"},
    "link": {"errors", "units", "mm", "nic", "linux"},
    "control": {"errors", "units", "nic"},
    "server": {"errors", "units", "ranges", "mm", "iommu", "nic", "linux", "link", "control"},
    "accel": {"errors", "units", "pending", "ranges", "linux", "control"},
    "verbs": {"errors", "units", "pending", "ranges", "nic", "linux", "control", "accel"},
    "lab": {"errors", "units", "ranges", "mm", "iommu", "nic", "linux", "link", "control", "server", "verbs", "model"},
    "cli": {"errors", "units", "nic", "linux", "link", "control", "server", "verbs", "lab", "model"},
    "model": {"errors", "units", "ranges", "mm", "iommu", "nic", "control"},
    "testing": {"errors", "units", "ranges", "mm", "iommu", "nic", "link", "model"},
    "__init__": {"errors", "verbs"},
    "__main__": {"cli"},
}
"""Which top-level parts a part may import; itself is always allowed. `linux` and `link` share the plain data
types of `mm.space` and `nic.wire.batch` with their callers and nothing else of those packages."""

SANS_IO = {"mm", "iommu", "nic", "ranges", "units"}
IMPURE = {"time", "random", "secrets", "socket", "os", "threading", "select", "selectors", "fcntl", "subprocess"}


def modules() -> list[Path]:
    return sorted(SOURCE.rglob("*.py"))


def part_of(path: Path) -> str:
    relative = path.relative_to(SOURCE)
    return relative.parts[0].removesuffix(".py")


def imports_of(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import; write it out"
            assert node.module is not None
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
    return found


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(SOURCE)))
def test_imports_run_one_way(path: Path) -> None:
    part = part_of(path)
    for name in imports_of(path):
        pieces = name.split(".")
        if pieces[0] != "nopin" or len(pieces) < 2:
            continue
        if part == "__init__" or pieces[1] == part:
            continue
        assert pieces[1] in ALLOWED[part] | {"__version__"}, f"{path} imports {name}: {part} must not know {pieces[1]}"


def test_no_modules_import_each_other() -> None:
    """Types that name each other are imported for checking only."""
    names = {".".join(("nopin", *path.relative_to(SOURCE).with_suffix("").parts)): path for path in modules()}
    names = {name.removesuffix(".__init__"): path for name, path in names.items()}
    needs = {name: set(imported_by(path, names)) for name, path in names.items()}
    TopologicalSorter(needs).prepare()  # it raises CycleError, which names them


def imported_by(path: Path, names: Container[str]) -> Iterator[str]:
    """Yield those modules of `names` that one imports when it is run."""
    waiting: list[ast.AST] = [ast.parse(path.read_text())]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            waiting += node.orelse
            continue
        if isinstance(node, ast.ImportFrom) and node.module is not None:
            found = (f"{node.module}.{alias.name}" for alias in node.names)
            needed = (name if name in names else node.module for name in found)
            yield from (name for name in needed if name in names)
        waiting += ast.iter_child_nodes(node)


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(SOURCE)))
def test_deciding_code_has_no_clock_socket_or_randomness(path: Path) -> None:
    if part_of(path) not in SANS_IO:
        return
    touched = {name.split(".")[0] for name in imports_of(path)} & IMPURE
    assert not touched, f"{path} imports {touched}; take time, randomness and effects as parameters"


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(SOURCE)))
def test_only_the_command_line_prints(path: Path) -> None:
    if part_of(path) == "cli":
        return
    calls = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Call)]
    prints = [n.lineno for n in calls if isinstance(n.func, ast.Name) and n.func.id == "print"]
    assert not prints, f"{path}:{prints} prints; standard output belongs to cli/"


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(SOURCE)))
def test_files_hold_one_subject(path: Path) -> None:
    n_lines = len(path.read_text().splitlines())
    assert n_lines <= 500, f"{path} has {n_lines} lines; split it by subject"
