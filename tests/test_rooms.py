"""The house's law: a room imports only rooms on lower floors, and no entry point imports another."""

import ast
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
FLOORS = (
    ("datasets", "losses"),
    ("models", "sam_embed"),
    ("engine",),
    ("main_ddp", "extract_backbone_weights", "scripts"),
    ("benchmarks",),
)
ROOMS = [room for floor in FLOORS for room in floor]


def files_of(room: str) -> list[Path]:
    """A room's source files: those of its folder, or the one file of an entry point."""
    folder = REPOSITORY / room
    return sorted(folder.rglob("*.py")) if folder.is_dir() else [folder.with_suffix(".py")]


def imported_modules(path: Path) -> set[str]:
    """All modules that a file imports, wherever in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def rooms_of(modules: set[str]) -> set[str]:
    """First words of module names."""
    return {name.split(".")[0] for name in modules}


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_only_rooms_on_lower_floors(room):
    floor = next(number for number, rooms in enumerate(FLOORS) if room in rooms)
    lower = {other for rooms in FLOORS[:floor] for other in rooms}
    forbidden = {*ROOMS, "tests"} - lower - {room}
    wrong = {str(path): found for path in files_of(room) if (found := rooms_of(imported_modules(path)) & forbidden)}
    assert not wrong, f"{room} imports what it may not: {wrong}"


@pytest.mark.parametrize("path", files_of("scripts"), ids=lambda path: path.name)
def test_no_script_imports_another(path):
    assert "scripts" not in rooms_of(imported_modules(path)), f"{path} imports an entry point"


def test_every_source_file_belongs_to_a_room():
    """A file beside the rooms would escape the law."""
    top = {path.name.removesuffix(".py") for path in REPOSITORY.glob("*.py")}
    packages = {path.parent.name for path in REPOSITORY.glob("*/__init__.py")}
    assert top | packages <= {*ROOMS, "tests"}
