"""The house's one-way rule: a room imports only from the rooms that it may."""

import ast
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
MAY_IMPORT = {
    "datasets": set(),
    "sam_embed": {"datasets"},
    "models": set(),
    "losses": set(),
    "engine": {"losses", "models"},
}
ENTRY_POINTS = {"main_ddp", "extract_backbone_weights", "scripts", "benchmarks", "tests"}


def imported_rooms(path: Path) -> set[str]:
    """First words of all modules that a file imports, wherever in it."""
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.append(node.module)
    return {name.split(".")[0] for name in names}


@pytest.mark.parametrize("room", sorted(MAY_IMPORT))
def test_a_room_imports_only_from_the_rooms_it_may(room):
    files = sorted((REPOSITORY / room).rglob("*.py"))
    assert len(files) > 2
    strangers = (set(MAY_IMPORT) | ENTRY_POINTS) - MAY_IMPORT[room] - {room}
    wrong = {path.name: sorted(imported_rooms(path) & strangers) for path in files if imported_rooms(path) & strangers}
    assert not wrong, f"{room}/ imports what it may not: {wrong}"
