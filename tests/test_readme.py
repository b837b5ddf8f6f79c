"""README.md: its commands name what exists, and its code runs as it stands."""

import re
from pathlib import Path

import pytest
import torch
from torch import nn

import fxprune

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    """The fenced blocks of README.md in `language`."""
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


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


def test_links_lead_to_files():
    targets = [target for target in re.findall(r"\]\((.*?)\)", README) if not target.startswith("https://")]
    assert targets
    assert [target for target in targets if not (ROOT / target).is_file()] == []


def test_readme_names_the_public_calls():
    for name in ("compress", "report", "score", "apply", "verify", "Plan"):
        assert f"fxprune.{name}" in README
        assert hasattr(fxprune, name)
