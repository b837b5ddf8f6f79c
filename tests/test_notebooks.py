"""The notebooks are stored as they ran, use what is public, and give the same figures when they run again."""

from __future__ import annotations

import ast
import copy
import importlib
import re
import runpy
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("nbclient")
nbformat = pytest.importorskip("nbformat")

ROOT = Path(__file__).parent.parent
HOW = runpy.run_path(str(ROOT / ".ci" / "notebooks.py"))
NOTEBOOKS = {path.stem: path for path in sorted((ROOT / "examples" / "notebooks").glob("*.ipynb"))}
PAGE = (ROOT / "docs" / "notebooks.md").read_text(encoding="utf-8")
each = pytest.mark.parametrize("name", NOTEBOOKS)

# notebook: packages beside torch, and how far another run may be from the figures that are stored
NEEDS: dict[str, tuple[tuple[str, ...], dict[str, float]]] = {
    "quickstart": (("matplotlib", "sklearn"), {"abs": 5}),  # percentages after another training
    "pretrained": (("PIL",), {"abs": 1.5}),  # the same weights and images
    "transformer": (("transformers",), {"rel": 0.2}),  # perplexities; every version of Python has another text
}


def read(name: str) -> Any:
    return nbformat.read(NOTEBOOKS[name], as_version=4)


def code(notebook: Any) -> list[Any]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def outputs(notebook: Any) -> list[Any]:
    return [output for cell in code(notebook) for output in cell.outputs]


def printed(notebook: Any) -> str:
    return "".join(output.text for output in outputs(notebook) if output.output_type == "stream")


def figures(notebook: Any) -> list[float]:
    """The accuracies and perplexities that a notebook prints; those without fitting depend on chance too much."""
    return [float("".join(pair)) for pair in re.findall(r"([\d.]+)% right|perplexity ([\d.]+)", printed(notebook))]


def test_every_notebook_is_run_here() -> None:
    assert set(NOTEBOOKS) == set(NEEDS)


@each
def test_is_stored_as_it_ran(name: str) -> None:
    notebook = read(name)
    nbformat.validate(notebook)
    assert HOW["plain"](copy.deepcopy(notebook)) == notebook
    assert NOTEBOOKS[name].stat().st_size < 300_000
    assert [cell.execution_count for cell in code(notebook)] == list(range(1, len(code(notebook)) + 1))
    assert {output.output_type for output in outputs(notebook)} <= {"stream", "execute_result", "display_data"}
    assert len(figures(notebook)) >= 4


@each
def test_outputs_hold_no_warnings_and_no_paths_of_a_machine(name: str) -> None:
    notebook = read(name)
    assert {output.name for output in outputs(notebook) if output.output_type == "stream"} == {"stdout"}
    for output in outputs(notebook):
        texts = [output.get("text", ""), *(text for kind, text in output.get("data", {}).items() if "text" in kind)]
        assert not re.search(r"(?i)warning|/(home|root|tmp|users|opt|usr)/|[a-z]:\\", "\n".join(texts))


@each
def test_cells_are_short(name: str) -> None:
    assert max(len(cell.source.splitlines()) for cell in code(read(name))) <= 20


@each
def test_code_names_what_is_public(name: str) -> None:
    tree = ast.parse("\n".join(cell.source for cell in code(read(name))))
    modules = {"fxprune": "fxprune", "huggingface": "fxprune.integrations.huggingface"}
    if name == "transformer":
        pytest.importorskip("transformers")
    imported = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and "fxprune" in str(node.module)]
    assert {(node.module, alias.name) for node in imported for alias in node.names} <= {
        ("fxprune.integrations", "huggingface")
    }
    named = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)]
    used = {(modules[node.value.id], node.attr) for node in named if node.value.id in modules}
    assert len(used) >= 3
    assert [pair for pair in used if pair[1] not in importlib.import_module(pair[0]).__all__] == []


@each
def test_is_listed_and_its_links_lead_to_files(name: str) -> None:
    assert f"](../examples/notebooks/{name}.ipynb)" in PAGE
    prose = "\n".join(cell.source for cell in read(name).cells if cell.cell_type == "markdown")
    links = [link for link in re.findall(r"\]\((.*?)\)", prose) if not link.startswith("https://")]
    assert links
    assert [link for link in links if not (NOTEBOOKS[name].parent / link).is_file()] == []


@each
def test_has_a_page_on_the_site(name: str) -> None:
    pytest.importorskip("mkdocs")
    hook = runpy.run_path(str(ROOT / ".mkdocs" / "notebooks.py"))
    assert f"notebooks/{name}.md\n" in (ROOT / ".mkdocs" / "mkdocs.yml").read_text(encoding="utf-8")
    page = hook["as_markdown"](NOTEBOOKS[name])
    assert all(f"```python\n{cell.source}\n```" in page for cell in code(read(name)))
    assert all(line in page for line in printed(read(name)).splitlines())
    assert page.count("<table") == sum("<table" in o.get("data", {}).get("text/html", "") for o in outputs(read(name)))
    assert page.count("<img") == sum("image/png" in output.get("data", {}) for output in outputs(read(name)))


def test_the_two_lines_to_replace_are_there() -> None:
    """What stands in the prose of the pretrained network, for other libraries, is set in its code."""
    notebook = read("pretrained")
    prose = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    assert re.findall(r"^(\w+) = ", prose, re.MULTILINE) == ["model", "prepare"] * 2
    (cell,) = (cell for cell in code(notebook) if "prepare = " in cell.source)
    assert [target.id for node in ast.parse(cell.source).body for target in node.targets] == ["model", "prepare"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of what runs notebooks
@each
def test_gives_the_stored_figures_again(name: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    packages, near = NEEDS[name]
    for package in ("ipykernel", *packages):
        pytest.importorskip(package)
    if "FXPRUNE_DATA" in NOTEBOOKS[name].read_text(encoding="utf-8"):
        request.getfixturevalue("data")
    stored, again = read(name), HOW["run"](NOTEBOOKS[name], tmp_path)
    assert figures(again) == pytest.approx(figures(stored), **near)
    kinds = [[(o.output_type, sorted(o.get("data", {}))) for o in outputs(each)] for each in (stored, again)]
    assert kinds[0] == kinds[1]
    assert "same outputs: False" not in printed(again)
