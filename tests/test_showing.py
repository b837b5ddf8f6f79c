"""Objects that show themselves: in a few lines of text, as markup in a notebook, and as bars of progress."""

from __future__ import annotations

import dataclasses
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import batches
from safetensors.torch import save_file
from torch import nn
from zoo import ZOO

import fxprune
from fxprune.caller.progress import NotebookBar, progress_bar
from fxprune.coupling.couple import analyse
from fxprune.planning.bars import bars
from fxprune.reporting.records import Finetuning

LINES, CHARACTERS = 14, 1200
HOSTILE = '<script>alert(1)</script>\x1b[31m&"'


def deep(layers: int = 60) -> nn.Sequential:
    """A network of many layers."""
    torch.manual_seed(0)
    body = [part for _ in range(layers) for part in (nn.Linear(16, 16), nn.ReLU())]
    return nn.Sequential(*body, nn.Linear(16, 3)).eval()


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Every kind of object, of a deep network."""
    model, loader = deep(), [(torch.randn(8, 16), torch.arange(8) % 3)]
    scores = fxprune.score(model, loader, propose="magnitude", progress=False)
    plan = scores.plan(macs=0.6)
    graph = fxprune.capture(model, loader[0][0])
    small = fxprune.apply(model, plan, scores=scores, compensate="ridge")
    latency = fxprune.measure_latency(model, small, loader[0][0], (1,), repeats=2)
    report = fxprune.report(small)
    folder = tmp_path_factory.mktemp("checkpoint")
    save_file(model.state_dict(), folder / "model.safetensors")
    manifest = fxprune.rewrite_checkpoint(folder, plan, folder / "small", model=model)
    evidence: list[fxprune.Evidence] = []
    fxprune.score(model, loader, propose=lambda found: evidence.append(found) or found.taylor, progress=False)
    return {
        "scores": scores, "timed": scores.with_latency(model, repeats=1), "plan": plan, "coupling": analyse(graph),
        "group": fxprune.couple(graph)[0], "groups": fxprune.couple(graph)[:3], "site": scores.sites[0],
        "report": report, "latency": latency, "compensation": report.compensation, "budget": plan.budget,
        "comparison": report.compare(report), "manifest": manifest, "evidence": evidence[0],
        "tuned": Finetuning(200, "32-true", (0.5,) * 150, (0.9, *(0.4,) * 150), (), 1),
    }  # fmt: skip


NAMES = (
    "scores", "timed", "plan", "coupling", "group", "groups", "site", "report", "latency", "compensation", "budget",
    "comparison", "manifest", "evidence", "tuned",
)  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_a_repr_is_a_few_lines(shown: dict[str, Any], name: str) -> None:
    text = repr(shown[name])
    assert len(text.splitlines()) <= LINES
    assert len(text) <= CHARACTERS


@pytest.mark.parametrize(("name", "said"), [
    ("scores", r"^scores of Sequential: 960 units in 60 groups; 1 layer kept whole\n  magnitude proposes and "
     r"taylor-by-sample protects, on 8 samples\n  the original there: loss \d\.\d+, right on \d+\.\d%$"),
    ("timed", r"(?s)^scores of .*\n  <times of \d+ nodes at 5 widths on cpu: [\d.]+ ms in all>$"),
    ("plan", r"(?s)^plan at alpha \S+ \(asked for 60.0% of the MACs, achieved [\d.]+%\): \d+ of 963 channels kept, "
     r"\d+ of 61 layers narrowed\n  \d+: \d+ of 16\n.*\n  and \d+ more$"),
    ("coupling", "^<coupling of 61 layers: 960 units in 60 groups can be removed, 1 group frozen>$"),
    ("group", "^<group 0: 16 units of 0, read by _2, prunable>$"),
    ("groups", "^.<group 0: .*>, <group 2: .*>, <group 4: .*>.$"),
    ("site", "^<site 0: 16 channels>$"),
    ("report", r"(?s)^report of Sequential at [\d.]+% of the MACs\n  parameters: [\d,]+ -> [\d,]+ "
     r"\([\d.]+%\)\n  MACs a sample: .*\n  60 groups in print\(report\), every layer in report.to_html\(path\)$"),
    ("latency", "^measured on cpu, "),
    ("compensation", r"^compensation ridge: output's error not measured, \d+ layers refitted$"),
    ("budget", r"^Budget\(of='macs', asked=0.6, achieved=0.[\d]+\)$"),
    ("manifest", r"^checkpoint of Sequential: 122 tensors, \d+ of them narrowed, in \d files? of [\d,]+ bytes; plan "),
    ("evidence", "^<evidence of Sequential: moments of 60 edges, <coupling of 61 layers: "),
    ("tuned", "^fine-tuning in 32-true, 150 of 200 epochs: validation loss 0.9 -> 0.4 at epoch 1$"),
])  # fmt: skip
def test_a_repr_says_what_counts(shown: dict[str, Any], name: str, said: str) -> None:
    assert re.search(said, repr(shown[name])), repr(shown[name])


def test_a_group_names_a_few_of_its_layers(shown: dict[str, Any]) -> None:
    group = dataclasses.replace(shown["group"], sites=shown["coupling"].sites[:5], consumers=())
    assert "16 units of 0, 2, 4 and 2 more, read by none" in repr(group)


def test_a_plan_lists_the_layers_that_lose_most_front_to_back() -> None:
    widths = {f"conv{index}": 10 for index in range(9)}
    keep = {name: tuple(range(index + 1)) for index, name in enumerate(widths)}
    text = str(fxprune.Plan(keep, widths, None))
    assert text.splitlines() == [
        "plan: 45 of 90 channels kept, 9 of 9 layers narrowed",
        *(f"  conv{index}: {index + 1} of 10" for index in range(6)), "  and 3 more",
    ]  # fmt: skip


def test_a_plan_compares_layers_by_share() -> None:
    widths = {"wide": 1000} | {f"conv{index}": 10 for index in range(6)}
    keep = {name: tuple(range(width - 5)) for name, width in widths.items()}
    assert "wide" not in str(fxprune.Plan(keep, widths, None))


def test_objects_with_a_short_repr_are_what_they_were(shown: dict[str, Any]) -> None:
    plan = shown["plan"]
    assert fxprune.Plan.from_dict(plan.to_dict()) == plan
    assert dataclasses.replace(plan, alpha=0.5) != plan
    assert hash(shown["report"].model) == hash("Sequential")
    assert dataclasses.replace(shown["report"]) == shown["report"]


def test_scores_from_a_file_show_the_same(shown: dict[str, Any], tmp_path: Path) -> None:
    shown["timed"].save(tmp_path / "scores.npz")
    assert repr(fxprune.Scores.load(tmp_path / "scores.npz")) == repr(shown["timed"])


def test_scores_without_data_say_no_more_than_they_know() -> None:
    case = ZOO["residual"]
    scores = fxprune.Scores.random(case.build(), case.example(2))
    assert re.fullmatch(r"scores of \w+: \d+ units in \d+ groups; 1 layer kept whole", repr(scores))


def test_names_are_shown_and_not_executed() -> None:
    plan = fxprune.Plan({HOSTILE: (0,)}, {HOSTILE: 2}, None)
    for text in (repr(plan), plan._repr_html_()):
        assert "\x1b" not in text
    assert "<script>" not in plan._repr_html_()
    assert "&lt;script&gt;" in plan._repr_html_()


# -- text without a terminal -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("surroundings", [{}, {"FORCE_COLOR": "1"}, {"TTY_COMPATIBLE": "1"}, "notebook"])
def test_a_printed_report_has_no_escape_codes(
    shown: dict[str, Any], surroundings: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    displayed: list[Any] = []
    if surroundings == "notebook":
        monkeypatch.setattr("rich.console._is_jupyter", lambda: True)
        monkeypatch.setitem(sys.modules, "IPython.display", SimpleNamespace(display=displayed.append))
        monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(display=sys.modules["IPython.display"]))
    else:
        for name, value in surroundings.items():
            monkeypatch.setenv(name, value)
    for text in (str(shown["report"]), str(shown["comparison"])):
        assert "\x1b" not in text
        assert "MACs a sample" in text
    assert displayed == []  # beside the text


# -- markup ------------------------------------------------------------------------------------------------------------


class Elements(HTMLParser):
    """Opens and closes every element, and gathers the cells of tables, the titles and the heights."""

    def __init__(self, markup: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text: list[str] = []
        self.titles: list[str] = []
        self.heights: list[float] = []
        self.tags: set[str] = set()
        self.feed(markup)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.open.append(tag)
        self.tags.add(tag)
        given = dict(attrs)
        self.titles += [given["title"]] if given.get("title") else []
        self.heights += [float(found) for found in re.findall(r"[;\s]height:([\d.]+)%", given.get("style") or "")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += [" ".join(data.split())] if data.strip() else []


def test_a_report_is_a_table_in_a_notebook(shown: dict[str, Any]) -> None:
    found, report = Elements(shown["report"]._repr_html_()), shown["report"]
    assert found.text[:4] == [f"Sequential at {report.budget.achieved:.1%} of the MACs", "before", "after", "left"]
    row = found.text.index("parameters")
    assert found.text[row + 1 : row + 3] == [f"{report.params_before:,}", f"{report.params_after:,}"]
    assert str(report.budget) in found.text
    assert found.tags == {"div", "table", "caption", "thead", "tbody", "tr", "th", "td"}  # nothing is loaded or run


def test_a_report_with_a_hostile_name_is_escaped(shown: dict[str, Any]) -> None:
    markup = dataclasses.replace(shown["report"], model=HOSTILE)._repr_html_()
    assert "<script" not in markup
    assert "\x1b" not in markup
    assert Elements(markup).text[0].startswith("<script>alert(1)")


def test_a_plan_is_a_row_of_bars_in_a_notebook() -> None:
    plan = fxprune.Plan({"stem": (0, 1), "conv": (0, 2, 3), "head": (0,)}, {"stem": 4, "conv": 8, "head": 1}, None)
    found = Elements(plan._repr_html_())
    assert found.titles == ["stem: 2 of 4 channels", "conv: 3 of 8 channels", "head: 1 of 1 channels"]
    assert found.heights == [50.0, 50.0, 100.0, 37.5, 12.5, 100.0]  # of the widest layer, and of the layer
    assert found.text[0] == "plan: 6 of 13 channels kept, 2 of 3 layers narrowed"
    assert found.tags == {"figure", "figcaption", "div", "span"}


def test_a_plan_without_layers_has_no_bars() -> None:
    assert Elements(bars("plan", [])).titles == []


# -- bars of progress --------------------------------------------------------------------------------------------------


@pytest.fixture
def notebook(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """A notebook; the list holds what its cell showed, state after state."""
    states: list[Any] = []

    def display(thing: Any, *, display_id: bool) -> Any:
        states.append(thing._repr_mimebundle_(include=(), exclude=()))
        return SimpleNamespace(update=lambda other: states.append(
            other if isinstance(other, str) else other._repr_mimebundle_(include=(), exclude=())
        ))  # fmt: skip

    monkeypatch.setattr("rich.console._is_jupyter", lambda: True)
    monkeypatch.setattr("fxprune.caller.progress.PERIOD", 0.0)
    monkeypatch.setitem(sys.modules, "IPython.display", SimpleNamespace(display=display, HTML=str))
    return states


def test_a_notebook_shows_one_bar_without_a_warning(notebook: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    case = ZOO["residual"]
    fxprune.score(case.build(), batches(case.example, 5))
    assert [state for state in notebook if not isinstance(state, dict)] == [""]  # it is taken away in the end
    assert notebook[-1] == ""
    assert "scoring" in notebook[1]["text/html"]
    assert "100%" in notebook[-2]["text/html"]
    assert capsys.readouterr() == ("", "")


def test_a_notebook_shows_no_bar_that_is_not_asked_for(notebook: list[Any]) -> None:
    with progress_bar(shown=False) as bar:
        assert isinstance(bar, NotebookBar)
        bar.advance(bar.add_task("work", total=2))
    assert notebook == []


def test_a_bar_of_a_notebook_is_replaced_a_few_times_a_second(
    notebook: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fxprune.caller.progress.PERIOD", 3600.0)
    with progress_bar(shown=True) as bar:
        task = bar.add_task("work", total=1000)
        for _ in range(1000):
            bar.advance(task)
    assert len(notebook) <= 3
