"""The files of the package stand in one order, that of docs/design.md, and import only what stands above them."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import fxprune

PACKAGE = Path(fxprune.__file__).parent
DESIGN = PACKAGE.parent / "docs" / "design.md"
NO_STAGE = {"__init__", "__main__"}  # these only name what the others hold


def listed() -> list[str]:
    """The files and folders of the table, from the top down."""
    cells = [line.split("|")[1] for line in DESIGN.read_text(encoding="utf-8").splitlines() if line.startswith("| `")]
    return [name.removesuffix(".py").rstrip("/") for cell in cells for name in re.findall(r"`([^`]+)`", cell)]


def imports(file: Path) -> set[str]:
    """The files and folders of the package that a file imports when it is imported itself."""
    body = ast.parse(file.read_text(encoding="utf-8")).body
    modules = [node.module or "" for node in body if isinstance(node, ast.ImportFrom)]
    return {module.split(".")[1] for module in modules if module.startswith("fxprune.")}


def test_every_file_is_listed_once() -> None:
    there = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert sorted(listed()) == sorted(there - NO_STAGE)


def test_each_imports_only_what_stands_above_it() -> None:
    order = {name: place for place, name in enumerate(listed())}
    for name, place in order.items():
        files = (PACKAGE / name).rglob("*.py") if (PACKAGE / name).is_dir() else [PACKAGE / f"{name}.py"]
        for file in files:
            below = {other for other in imports(file) - {name} if order[other] > place}
            assert not below, f"{file.relative_to(PACKAGE)} imports {below}"
