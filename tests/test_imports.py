"""Who imports whom: the contributions nothing of this project, and each room only what lies below it."""

import ast
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parents[1]
FILES = [path.relative_to(HERE) for path in (*HERE.glob("*.py"), *HERE.glob("[a-z]*/**/*.py"))]
ROOMS = {path.parts[0] for path in FILES} | {path.stem for path in FILES if len(path.parts) == 1}
GROUND = ("rcldm", "esm", "liu", "sam_loss", "dataset", "pictures", "disk")
TOP = {*GROUND, "edit", "train"}
BELOW = {name: set() for name in GROUND} | {
    "rcldm": {"scan_kernels"},  # looked up where a faster backend is asked for
    "dataset": {"pictures"},
    "pictures": {"disk"},
    "scan_kernels": set(),
    "backbone": {"rcldm", "disk"},
    "training": {"backbone", *GROUND},
    "edit": {"backbone", *GROUND},
    "train": {"backbone", "training", *TOP},
    "apps": {"backbone", "training", "toy", *TOP},
    "evaluation": {"backbone", "training", "apps", *TOP},
    "data_making": {"backbone", "training", *TOP},
    "toy": {"backbone", "training", "apps", "evaluation", "data_making", "scan_kernels", *TOP},
}


def imported(path: Path) -> set[str]:
    """The rooms and top-level files of this project that a file imports, also inside its functions."""
    names = set()
    for node in ast.walk(ast.parse((HERE / path).read_text("utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module.split(".")[0])
    own = path.parts[0].removesuffix(".py")
    return (names & ROOMS) - {own}


@pytest.mark.parametrize("room", BELOW)
def test_a_room_imports_only_what_lies_below_it(room):
    files = [path for path in FILES if path.parts[0].removesuffix(".py") == room]
    assert files
    for path in files:
        assert imported(path) <= BELOW[room], f"{path} imports {imported(path) - BELOW[room]}"


def test_an_import_is_found_inside_a_function():
    assert "scan_kernels" in imported(Path("rcldm.py"))
