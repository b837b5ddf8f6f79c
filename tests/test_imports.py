"""The tower of rooms: imports go down only, never in circles, and the root stays small."""

from __future__ import annotations

import ast
import graphlib
from pathlib import Path

import fxprune

ROOT = Path(fxprune.__file__).parent
TOWER = (
    "errors", "version", "caller", "rules", "tracing", "coupling", "planning", "rewriting", "scoring", "reporting",
    "recovery", "rounds", "pipeline", "saving", "integrations", "cli",
)  # fmt: skip
ROOT_MODULES = {"__init__", "__main__", "errors", "pipeline", "rounds", "version"}


def modules() -> dict[str, Path]:
    """Every module of the package, by its dotted name below `fxprune`; a folder stands for its `__init__`."""
    named = {path: path.relative_to(ROOT).with_suffix("").parts for path in sorted(ROOT.rglob("*.py"))}
    return {".".join(parts).removesuffix(".__init__"): path for path, parts in named.items()}


MODULES = modules()


def imported(path: Path) -> set[str]:
    """The modules of the package that a file imports, in functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names = {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
        elif isinstance(node, ast.Import):
            names = {alias.name for alias in node.names}
        else:
            assert not (isinstance(node, ast.ImportFrom) and node.level), f"{path} imports relatively"
            continue
        inside = {name.partition(".")[2] for name in names if name.startswith("fxprune.")}
        found |= {name for name in inside if name in MODULES}
    return found


IMPORTS = {name: imported(path) - {name} for name, path in MODULES.items()}
SUBMODULES = {name: found for name, found in IMPORTS.items() if name not in ("__init__", "__main__")}


def room(module: str) -> str:
    return module.partition(".")[0]


def test_the_root_holds_the_rooms_and_six_modules() -> None:
    names = {path.stem for path in ROOT.glob("*.py")}
    rooms = {path.name for path in ROOT.iterdir() if (path / "__init__.py").exists()}
    assert names == ROOT_MODULES
    assert rooms == set(TOWER) - ROOT_MODULES


def test_imports_go_down_the_tower() -> None:
    ups = [
        f"{name} imports {other}"
        for name, found in SUBMODULES.items()
        for other in sorted(found)
        if TOWER.index(room(other)) > TOWER.index(room(name))
    ]
    assert not ups, "\n".join(ups)


def test_no_imports_go_in_a_circle() -> None:
    circle = None
    try:
        graphlib.TopologicalSorter(SUBMODULES).prepare()
    except graphlib.CycleError as error:
        circle = " -> ".join(error.args[1])
    assert circle is None


def test_the_public_names_are_listed_and_nothing_else() -> None:
    assert set(dir(fxprune)) == {*fxprune.__all__, "__version__", "rules"}
    assert all(hasattr(fxprune, name) for name in fxprune.__all__)
