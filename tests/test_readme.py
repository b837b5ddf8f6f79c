"""README.md and docs/: their commands name what exists, and their code runs as it stands."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

import fxprune
from fxprune.rules import RULES
from fxprune.rules.resize import RESIZES

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str, text: str = README) -> list[str]:
    """The fenced blocks of a text in `language`; "" for those of no language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


@pytest.fixture
def names(tmp_path, monkeypatch):
    """What README's code takes as given: a trained model, a loader, images; and a folder to write into."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    layers = [
        nn.Conv2d(3, 16, 3),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    ]
    model = nn.Sequential(*layers, nn.Linear(16, 3))
    batches = [(torch.randn(24, 3, 8, 8), torch.arange(24) % 3) for _ in range(2)]
    return {"model": model, "loader": batches, "images": batches[0][0]}


@pytest.fixture
def tables() -> Iterator[None]:
    """Rules that a page registers are gone after it."""
    before = [(table, dict(table)) for table in (RULES, RESIZES)]
    yield
    for table, entries in before:
        table.clear()
        table.update(entries)


def test_first_use_gives_a_smaller_model_and_a_report(names, capsys):
    first = blocks("python")[0]
    exec(first, names)
    assert len(first.strip().splitlines()) <= 5
    assert isinstance(names["small"], torch.fx.GraphModule)
    assert names["logits"].shape == (24, 3)
    report = fxprune.report(names["small"])
    assert report.params_after < report.params_before
    assert capsys.readouterr().out == f"{report}\n"


def test_stages_save_and_load(names, tmp_path):
    exec("import fxprune", names)
    for block in blocks("python")[1:]:
        exec(block, names)
    assert names["error"] < 1e-4
    assert {path.name for path in tmp_path.iterdir()} == {
        "scores.npz",
        *(f"plan-{a}.json" for a in (0.02, 0.05, 0.1)),
    }


def test_two_commands_stand_in_ci_too():
    demo, test = (block.strip() for block in blocks("bash"))
    assert demo == "python3 -m venv .venv && .venv/bin/pip install '.[demo]' && .venv/bin/fxprune demo"
    assert test == "python3 -m venv .venv && .venv/bin/pip install -e '.[test]' && .venv/bin/python -m pytest"
    ci = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert "install --quiet -e '.[test]'" in ci
    assert ci.rstrip().splitlines()[-1].startswith('"$bin/python" -m pytest')


PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page):
    targets = re.findall(r"\]\((.*?)\)", page.read_text(encoding="utf-8"))
    local = [target.partition("#")[0] for target in targets if not target.startswith("https://")]
    assert [target for target in local if not (page.parent / target).is_file()] == []


@pytest.mark.usefixtures("tables")
def test_rules_page_runs():
    names = {"__name__": "docs_rules"}
    for block in blocks("python", (ROOT / "docs" / "rules.md").read_text(encoding="utf-8")):
        exec(block, names)
    first = names["clipped"][0]
    assert (first.name, len(first), first.frozen) == ("first", 8, None)
    assert names["small"].get_submodule("1").channels == len(names["plan"].keep["0"]) < 8
    assert names["error"] < 1e-6
    assert [(group.name, group.frozen) for group in names["mixed"]] == [("0", None), ("1", "it is the model's output")]


def test_design_page_shows_the_groups_that_couple_finds():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, 10)
            self.conv1, self.bn1 = nn.Conv2d(8, 6, 3, padding=1), nn.BatchNorm2d(6)
            self.conv2, self.bn2 = nn.Conv2d(6, 8, 3, padding=1), nn.BatchNorm2d(8)

        def forward(self, x):
            x = self.stem(x).relu()
            y = self.bn1(self.conv1(x)).relu()
            x = (x + self.bn2(self.conv2(y))).relu()
            return self.head(x.mean((2, 3)))

    listing = "\n".join(map(str, fxprune.couple(fxprune.capture(Net(), torch.zeros(2, 3, 8, 8)))))
    design = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
    assert f"{listing}\n" in blocks("", design)


def test_readme_names_the_public_calls():
    for name in ("compress", "report", "score", "apply", "verify", "Plan"):
        assert f"fxprune.{name}" in README
        assert hasattr(fxprune, name)
