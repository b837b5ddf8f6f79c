"""README.md and docs/: their Python runs, page by page; their commands name what exists; their links lead somewhere."""

from __future__ import annotations

import ast
import inspect
import json
import re
import runpy
import socket
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree as ET

import pytest
import torch
import torchvision
from nets import layers
from pages import given, tiny_resnet
from torch import nn

import fxprune
from fxprune.rules.resize import RESIZES
from fxprune.rules.table import RULES

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
AT_THE_TOP = [ROOT / name for name in ("CHANGELOG.md", "CONTRIBUTING.md", "README.md", "SECURITY.md")]
IN_DOCS = sorted((ROOT / "docs").rglob("*.md"))
PAGES = [*AT_THE_TOP, *IN_DOCS]
NOT_RUN = {
    "bash": "installs, serves or trains for a minute; what it names is looked for in tests of its own",
    "": "drawings and listings",
    "json": "what files hold",
    "text": "what commands print",
    "console": "sessions, which tests of the command line run",
}


def blocks(language: str, text: str = README) -> list[str]:
    """The fenced blocks of a text in `language`; "" for those of no language."""
    return [body for found, body in fenced(text) if found == language]


def fenced(text: str) -> list[tuple[str, str]]:
    """The language and the body of every fenced block."""
    return re.findall(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def text_of(page: str) -> str:
    return (ROOT / "docs" / page).read_text(encoding="utf-8")


@pytest.fixture(autouse=True)
def apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steady_times: None) -> Iterator[None]:
    """A folder to write into, a small network for a large one; rules that a page registers are gone after it."""
    monkeypatch.chdir(tmp_path)
    with socket.socket() as free:  # a process group of one rank, for the page that makes one
        free.bind(("127.0.0.1", 0))
        rank = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free.getsockname()[1], "RANK": 0, "WORLD_SIZE": 1}
    for name, value in rank.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(torchvision.models, "resnet50", tiny_resnet)
    before = [(table, dict(table)) for table in (RULES, RESIZES)]
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    for table, entries in before:
        table.clear()
        table.update(entries)


EXTRAS = {"finetune": "lightning_fabric", "onnx": "onnxscript", "sklearn": "sklearn", "transformers": "transformers"}


def executed(page: Path) -> dict[str, Any]:
    """What the blocks of a page define, run in their order; a failure names the page and the line."""
    text = page.read_text(encoding="utf-8")
    for word, extra in EXTRAS.items():
        if any(word in block for block in blocks("python", text)):
            pytest.importorskip(extra)
    names = given(page.name)
    for block in blocks("python", text):
        above = text[: text.index(block)].count("\n")
        tree = ast.increment_lineno(ast.parse(block), above)
        exec(compile(tree, str(page), "exec"), names)
    return names


WITH_CODE = [page for page in IN_DOCS if blocks("python", page.read_text(encoding="utf-8"))]  # README has own tests


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


OF_OTHER_LIBRARIES = ("blocks.md", "integrations.md", "llm.md", "yolo.md")
LONG = (
    "cnn.md", "compensation.md", "deployment.md", "experts.md", "finetuning.md", "recipes.md", "reports.md",
    "transformer.md", "index.md",
)  # fmt: skip


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, id=name_of(page), marks=pytest.mark.wide if page.name in LONG else ())
        for page in WITH_CODE
        if page.name not in OF_OTHER_LIBRARIES
    ],
)
def test_python_of_a_page_runs(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = executed(page)
    models = [value for value in found.values() if isinstance(value, nn.Module)]
    assert any(isinstance(part, torch.fx.GraphModule) for model in models for part in model.modules())
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.wide
@pytest.mark.filterwarnings("ignore")  # of the other libraries
def test_python_of_the_integrations_runs() -> None:
    found = executed(ROOT / "docs" / "integrations.md")
    assert type(found["own"]).__name__ == "BertForSequenceClassification"
    assert found["logits"].shape == (8, 3)
    assert isinstance(found["module"].model, torch.fx.GraphModule)
    assert isinstance(found["trained_module"].model, torch.fx.GraphModule)


@pytest.mark.wide
@pytest.mark.filterwarnings("ignore")  # of transformers
def test_python_of_whole_blocks_runs() -> None:
    found = executed(ROOT / "docs" / "prune" / "blocks.md")
    assert len(found["own"].blocks) < 4
    assert found["small"].config.num_hidden_layers == len(found["small"].model.layers) == 1


@pytest.mark.wide
@pytest.mark.filterwarnings("ignore")  # of transformers
def test_python_of_language_models_runs() -> None:
    found = executed(ROOT / "docs" / "prune" / "llm.md")
    assert type(found["own"]).__name__ == "LlamaForCausalLM"
    assert found["logits"].shape == (8, 9, 50)
    assert type(found["again"]).__name__ == "LlamaForCausalLM"
    assert [block.path for block in found["done"].blocks] == ["model.layers.0", "model.layers.1"]
    for name in ("small", "free"):
        budget = fxprune.report(found[name]).budget
        assert budget.asked == 0.8 >= budget.achieved


def test_python_of_yolos_is_that_of_the_script() -> None:
    script = (ROOT / "examples" / "yolo.py").read_text(encoding="utf-8")
    assert all(body in script for body in blocks("python", text_of("prune/yolo.md")))


def test_every_block_runs_or_is_said_not_to() -> None:
    languages = {language for page in PAGES for language, _ in fenced(page.read_text(encoding="utf-8"))}
    assert languages - {"python"} <= set(NOT_RUN)


def test_first_use_gives_a_smaller_model_and_a_report(capsys: pytest.CaptureFixture[str]) -> None:
    assert blocks("python")[:2] == blocks("python", text_of("index.md"))[:2]  # the start is one, there and here
    assert blocks("text")[0] == blocks("text", text_of("index.md"))[0]
    own, names = blocks("python")[1], given("index.md")
    exec(own, names)
    assert len(own.strip().splitlines()) <= 5
    assert names["logits"].shape == (24, 3)
    report = fxprune.report(names["small"])
    assert report.params_after < report.params_before
    assert capsys.readouterr().out == f"{report}\n"


def test_the_first_block_of_readme_prints_what_it_shows(tmp_path: Path) -> None:
    """In a process of its own, in twelve lines. Weights start at random: percentages may differ, and nothing else."""
    pytest.importorskip("sklearn")
    code, shown = blocks("python")[0], blocks("text")[0]
    assert len([line for line in code.splitlines() if line]) == 12
    share = "report = fxprune.report(small)\nprint(report.macs_after / report.macs_before)\n"
    run = [sys.executable, "-c", code + share]
    printed = subprocess.run(run, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    *lines, left = printed.splitlines()
    percent = re.compile(r"\d+\.\d(?=%)")
    assert [percent.sub("", line) for line in lines] == [percent.sub("", line) for line in shown.splitlines()]
    found, written = ([float(number) for number in percent.findall(text)] for text in ("\n".join(lines), shown))
    assert found == pytest.approx(written, abs=2)
    assert found[0] - found[1] < 1.5  # nine of ten runs on other starts lost 0.4 or less
    assert 0.25 < float(left) <= 0.3


def test_readme_expands_a_term_where_it_first_stands() -> None:
    for term, around in {
        "MAC": "MACs are the multiply-accumulate operations that one sample takes",
        "*unit": "*units*, channels that must be removed together",
        "*group": "*groups*, the units that the same layers produce",
        "ToD": "*tolerance of difference* (ToD), the fraction",
    }.items():
        found = README.index(around)
        assert found <= README.index(term) <= found + len(around), term
    assert "fxprune.verify" not in README  # it is for removal alone, and compress refits


def test_figures_of_the_demo_are_those_of_its_session() -> None:
    row = re.search(r"^ +0 +\S+ +\S+ +\S+ +(\d+)% +\S+ +\S+ x +(\S+)% +(\S+)%", text_of("cli.md"), re.MULTILINE)
    assert row is not None
    macs, accuracy, plain = row.groups()
    text = " ".join(README.split())
    assert f"With {macs} % of its MACs the network still classifies {accuracy} % of the held-out digits" in text
    assert f"correctly ({plain} % without refitting)" in text


def test_the_table_of_rules_is_as_long_as_pages_say() -> None:
    assert len(RULES) > 1000
    assert "over 1,000 operations" in " ".join(README.split())


@pytest.mark.wide
def test_recipes_save_scores_and_plans(tmp_path: Path) -> None:
    names = executed(ROOT / "docs" / "recipes.md")
    scores, plan = fxprune.Scores.load(tmp_path / "scores.npz"), fxprune.Plan.load(tmp_path / "plan.json")
    assert plan.keep == scores.plan(macs=0.6).keep
    assert plan.keep != names["scores"].plan(macs=0.9).keep


@pytest.mark.wide
def test_stages_on_the_first_page_are_exact() -> None:
    assert executed(ROOT / "docs" / "index.md")["error"] < 1e-4


def test_extras_that_pages_name_exist() -> None:
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    extras = set(re.findall(r"^(\w+) = \[$", project.partition("[project.optional-dependencies]")[2], re.MULTILINE))
    for page in PAGES:
        for named in re.findall(r"install (?:-e )?'(?:\.|fxprune)\[([\w,]+)\]'", page.read_text(encoding="utf-8")):
            assert set(named.split(",")) <= extras, page.name


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_to_files(page: Path) -> None:
    targets = re.findall(r"\]\((.*?)\)", page.read_text(encoding="utf-8"))
    local = [target.partition("#")[0] for target in targets if not target.startswith(("https://", "#"))]
    assert [target for target in local if not (page.parent / target).is_file()] == []


def test_scripts_that_pages_name_exist() -> None:
    named = {script for page in PAGES for script in re.findall(r"examples/[\w/]+\.py", page.read_text("utf-8"))}
    assert [script for script in sorted(named) if not (ROOT / script).is_file()] == []
    recipes = set(re.findall(r"examples/\w+\.py", text_of("recipes.md")))
    helpers = {"examples/quickstart.py", "examples/digits.py"}
    assert recipes == {f"examples/{path.name}" for path in (ROOT / "examples").glob("*.py")} - helpers


def test_every_page_is_in_the_navigation() -> None:
    listed = re.findall(r"[\w/]+\.md$", (ROOT / ".mkdocs" / "mkdocs.yml").read_text(encoding="utf-8"), re.MULTILINE)
    beside = [page.name.lower() for page in AT_THE_TOP if page.name != "README.md"]
    notebooks = [f"notebooks/{path.stem}.md" for path in (ROOT / "examples" / "notebooks").glob("*.ipynb")]
    in_docs = [page.relative_to(ROOT / "docs").as_posix() for page in IN_DOCS]
    assert sorted(listed) == sorted([*beside, *notebooks, *in_docs])


def test_pages_at_the_top_are_linked_on_the_site() -> None:
    pytest.importorskip("mkdocs")
    hook = runpy.run_path(str(ROOT / ".mkdocs" / "top_level.py"))
    assert set(hook["PAGES"].values()) == {page.name.lower() for page in AT_THE_TOP if page.name != "README.md"}
    text = "[a](docs/rules.md#x) [b](CHANGELOG.md) [c](https://example.org/docs/y)"
    top, page, below = (
        SimpleNamespace(file=SimpleNamespace(src_uri=uri)) for uri in ("contributing.md", "a.md", "b/c.md")
    )
    linked = hook["on_page_markdown"]
    assert linked(text, top) == "[a](rules.md#x) [b](changelog.md) [c](https://example.org/docs/y)"
    assert linked("[a](../SECURITY.md) [b](rules.md)", page) == "[a](security.md) [b](rules.md)"
    assert linked("[a](../../CONTRIBUTING.md#tests)", below) == "[a](../contributing.md#tests)"


def test_every_public_name_is_in_the_api() -> None:
    listed = set(re.findall(r"^::: [\w.]+?\.(\w+)$", text_of("api.md"), re.MULTILINE))
    errors = {name for name in fxprune.__all__ if name.endswith(("Error", "Warning"))}
    assert set(fxprune.__all__) - errors <= listed | {"classes"}
    assert "errors" in listed


def test_examples_of_docstrings_are_code_on_the_site() -> None:
    markdown = pytest.importorskip("markdown")
    hook = runpy.run_path(str(ROOT / ".mkdocs" / "doctests.py"))
    page = markdown.markdown("Text.\n\n>>> 1 + 1\n2\n\nMore.", extensions=[hook["Doctests"](), "fenced_code"])
    code = '<pre><code class="language-pycon">&gt;&gt;&gt; 1 + 1\n2\n</code></pre>'
    assert page == f"<p>Text.</p>\n{code}\n<p>More.</p>"


def test_names_on_the_page_of_the_api_are_links() -> None:
    linked = runpy.run_path(str(ROOT / ".mkdocs" / "links.py"))["on_page_content"]
    text = '<h3 id="fxprune.score">score</h3><p>see <code>score</code>, <code>seed</code>'
    api, other = (SimpleNamespace(file=SimpleNamespace(src_uri=f"{name}.md")) for name in ("api", "method"))
    assert linked(text, api) == text.replace("<code>score</code>", '<a href="#fxprune.score"><code>score</code></a>')
    assert linked(text, other) == text


@pytest.mark.parametrize("function", [fxprune.compress, fxprune.score])
def test_options_by_purpose_are_all_options(function: Any) -> None:
    table = text_of("api.md").partition(f"| options of `{function.__name__}` |\n")[2].partition("\n\n")[0]
    listed = [name for line in table.splitlines()[1:] for name in re.findall(r"`(\w+)`", line.split("|")[2])]
    assert sorted(listed) == sorted(inspect.signature(function).parameters)


def test_comparison_says_what_was_measured() -> None:
    models, text = json.loads(text_of("benchmarks/peers.json")), text_of("comparison.md")
    ours, theirs = ([model[tool] for model in models] for tool in ("fxprune", "torch-pruning"))
    ran = [[row for row in rows if "seconds" in row] for rows in (ours, theirs)]
    right = [sum(row["error"] < 1e-4 for row in rows) for rows in ran]
    counts = f"| {len(ran[0])} run, {right[0]} results are right | {len(ran[1])} run, {right[1]} are right |"
    assert f"([{len(models)} of them](benchmarks/peers.md)) {counts}" in text
    both = [pair for pair in zip(ours, theirs, strict=True) if all("seconds" in row for row in pair)]
    medians = [statistics.median(row["seconds"] for row in rows) for rows in zip(*both, strict=True)]
    assert f"of the {len(both)} models that both run | {medians[0]:.2f} s | {medians[1]:.2f} s |" in text
    scoring = json.loads(text_of("benchmarks/scoring.json"))["original"]["figures"]
    original = scoring["original"]["seconds"]
    assert f"| {scoring['fxprune']['fxprune, 128 projections']:.2f} s | not measured | {original:.0f} s |" in text


RUNS = json.loads(text_of("benchmarks/oneshot.json"))
NETWORKS = {"resnet20": "ResNet-20", "resnet56": "ResNet-56", "vgg": "VGG"}
SHARES = (100, 90, 70, 50, 30)


def measured(network: str, budget: float) -> dict[str, float]:
    """The accuracy of each method on a network right after pruning it to a share of its MACs."""
    runs = [run for run in RUNS if (run["stage"], run["model"]) == ("pruned", network)]
    rows = [(run["method"], row) for run in runs for row in run.get("rows", ())]
    return {method: row["accuracy"] for method, row in rows if row["budget"] == budget and "accuracy" in row}


def ours_and_best(network: str, budget: float, tools: tuple[str, ...]) -> tuple[float, float]:
    found = measured(network, budget)
    return found["fxprune"], max(found[method] for method in found if method.startswith(tools))


def test_the_comparison_gives_the_accuracies_that_were_measured() -> None:
    """A row a budget, a column a network: fxprune, and in brackets the best of the others there."""
    text = text_of("comparison.md")
    table = text[text.index("| MACs left |") :].split("\n\n")[0].splitlines()
    names, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in table if "---" not in line)
    assert names[1:] == list(NETWORKS.values())
    assert [row[0] for row in rows] == [f"{share} %" for share in SHARES]
    for column, network in enumerate(NETWORKS, start=1):
        assert rows[0][column] == f"{measured(network, 1)['not pruned']:.1%}".replace("%", " %")
        for share, *cells in rows[1:]:
            pair = ours_and_best(network, int(share.removesuffix(" %")) / 100, ("torch-pruning", "network-pruner"))
            assert cells[column - 1] == "{:.1%} ({:.1%})".format(*pair).replace("%", " %")


def test_readme_describes_its_picture_by_what_was_measured() -> None:
    (described,) = re.findall(r"!\[(.*?)\]\(docs/benchmarks/headline.svg\)", README)
    half = {
        network: "{:.1%} {:.1%}".format(*ours_and_best(network, 0.5, ("torch-pruning", "network-pruner")))
        for network in NETWORKS
    }
    said = re.findall(r"(\S+?)(?: has)? ([\d.]+ %)(?: with fxprune)? and ([\d.]+ %)", described)
    assert {name: f"{ours} {others}".replace(" %", "%") for name, ours, others in said} == {
        NETWORKS[network]: text for network, text in half.items()
    }


SVG = "{http://www.w3.org/2000/svg}"


def corners(group: ET.Element) -> list[tuple[float, float]]:
    """The points of the first path in a group of a picture."""
    path = group.find(f"{SVG}path")
    assert path is not None
    return [(float(x), float(y)) for x, y in re.findall(r"[ML] (\S+) (\S+)", path.get("d", ""))]


def accuracies(network: str, tool: str) -> dict[int, float]:
    """What a line shows: percent right by percent of the MACs, of fxprune by default, or of the best of a tool's."""
    found = {}
    for budget in SHARES:
        values = measured(network, budget / 100)
        named = [name for name in values if name in (tool, "not pruned") or name.startswith(f"{tool},")]
        shown = [name for name in named if tool != "fxprune" or "," not in name]
        found |= {budget: 100 * max(values[name] for name in shown)} if shown else {}
    return found if len(found) > 1 else {}


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("tool", ["fxprune", "torch-pruning", "network-pruner"])
def test_the_picture_of_readme_draws_what_was_measured(network: str, tool: str) -> None:
    """The points of each line, read back from the picture by the frame of their panel."""
    picture = ET.parse(ROOT / "docs" / "benchmarks" / "headline.svg")
    groups = {group.get("id"): group for group in picture.iter(f"{SVG}g")}
    (left, bottom), (right, _), (_, top), *_ = corners(groups[f"{network}-frame"])
    line = corners(groups[f"{network}-{tool}"]) if f"{network}-{tool}" in groups else []
    drawn = {103 - 76 * (x - left) / (right - left): 100 * (bottom - y) / (bottom - top) for x, y in line}
    wanted = accuracies(network, tool)
    assert list(drawn) == pytest.approx(list(wanted), abs=0.01)
    assert list(drawn.values()) == pytest.approx(list(wanted.values()), abs=0.01)


def test_rules_page_shows_what_it_says() -> None:
    names = executed(ROOT / "docs" / "rules.md")
    first = names["clipped"][0]
    assert (first.name, len(first), first.frozen) == ("first", 8, None)
    assert names["small"].get_submodule("1").channels == len(names["plan"].keep["0"]) < 8
    assert names["error"] < 1e-6
    assert [(group.name, group.frozen) for group in names["mixed"]] == [("0", None), ("1", "it is the model's output")]


def test_design_page_shows_the_groups_that_couple_finds() -> None:
    @layers(lambda: dict(
        stem=nn.Conv2d(3, 8, 3, padding=1), head=nn.Linear(8, 10), conv1=nn.Conv2d(8, 6, 3, padding=1),
        bn1=nn.BatchNorm2d(6), conv2=nn.Conv2d(6, 8, 3, padding=1), bn2=nn.BatchNorm2d(8),
    ))  # fmt: skip
    def Net(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x).relu()
        y = self.bn1(self.conv1(x)).relu()
        x = (x + self.bn2(self.conv2(y))).relu()
        return self.head(x.mean((2, 3)))

    listing = "\n".join(map(str, fxprune.couple(fxprune.capture(Net(), torch.zeros(2, 3, 8, 8)))))
    assert f"{listing}\n" in blocks("", text_of("design.md"))
