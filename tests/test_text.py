"""Names and files give no orders to a terminal: what it would obey is shown, not sent."""

from __future__ import annotations

import dataclasses
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from torch import nn

import fxprune
from fxprune import FxpruneError, FxpruneWarning, Plan, PlanError
from fxprune.errors import visible
from fxprune.reporting.records import GroupReport
from fxprune.reporting.timings import BatchLatency, MeasuredLatency, Timing

ORDER = "\x1b]0;owned\x07"  # names the window
NAME = f"{ORDER}[red]x[/red]"  # and is markup of rich
SHOWN = r"\x1b]0;owned\x07[red]x[/red]"
TIMING = Timing(0.02, 0.019, 0.021, 5, 20)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.add_module(NAME, nn.Linear(4, 6))
        self.last = nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(getattr(self, NAME)(x).relu())


def is_harmless(text: str) -> bool:
    return text.replace("\n", "").isprintable()


@given(st.text())
@settings(max_examples=200)
def test_text_is_harmless_and_says_the_same(text: str) -> None:
    shown = visible(text)
    assert is_harmless(shown)
    assert visible(shown) == shown
    assert shown == text or not is_harmless(text)


@given(st.text())
@settings(max_examples=50)
def test_errors_warnings_and_plans_are_harmless(text: str) -> None:
    assert is_harmless(str(PlanError(f"there is no {text}")))
    assert is_harmless(str(FxpruneWarning(text)))
    assert is_harmless(str(Plan({text: (0,)}, {text: 2}, None, allocate=text)))


def test_escapes_are_shown() -> None:
    assert str(FxpruneError(f"{NAME} is odd")) == f"{SHOWN} is odd"
    with pytest.warns(FxpruneWarning, match=r"^\\x1b\]0;owned\\x07 is odd$"):
        warnings.warn(f"{ORDER} is odd", FxpruneWarning, stacklevel=1)


@pytest.fixture(scope="module")
def report() -> fxprune.Report:
    """A report whose every name gives orders."""
    model, x = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)), torch.randn(9, 4)
    found = fxprune.report(fxprune.compress(model, [(x, torch.arange(9) % 3)], 0.9, progress=False))
    whole = dataclasses.replace(found.frozen[0], sites=(NAME,), reason=NAME)
    groups = (GroupReport(NAME, 6, 3, {NAME: (6, 3)}, NAME),)
    layers = tuple(dataclasses.replace(layer, name=NAME, kind=NAME) for layer in found.layers)
    latency = MeasuredLatency(NAME, 1, (BatchLatency(1, TIMING, TIMING),), (NAME,))
    return dataclasses.replace(
        found, model=NAME, groups=groups, layers=layers, frozen=(whole,), captured=NAME, signals=(NAME, NAME),
        latency=latency,
    )  # fmt: skip


def test_reports_are_harmless_on_a_terminal(report: fxprune.Report) -> None:
    for shown in (report, report.compare(dataclasses.replace(report, params_after=1))):
        assert is_harmless(str(shown))
        assert SHOWN in str(shown).replace("\n", "")
        console = Console(force_terminal=True, width=500)
        with console.capture() as held:
            console.print(shown)
        assert ORDER not in held.get()
        assert SHOWN in held.get()
    assert is_harmless(str(report.latency))


def test_a_page_is_harmless(report: fxprune.Report, tmp_path: Path) -> None:
    report.to_html(tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert is_harmless(text)
    assert SHOWN in text


def test_groups_and_the_command_line_are_harmless(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("typer")
    from fxprune.cli.inspection import tree
    from fxprune.cli.output import Output
    from fxprune.cli.pareto import Row, table

    groups = fxprune.couple(fxprune.capture(Net(), torch.zeros(2, 4)))
    console = Console(force_terminal=True, width=500)
    with console.capture() as held:
        console.print(tree(NAME, groups))
    assert ORDER not in held.get()
    assert held.get().count(SHOWN) > 1
    assert all(is_harmless(str(group)) for group in groups)
    output = Output(json=False, quiet=False)
    output.show(f"made by {NAME}", table([Row(NAME, 0.1, 1, 1, 0.5)], NAME))
    output.wrote(f"{NAME}.json")
    found = capsys.readouterr().out
    assert is_harmless(found)
    assert found.replace("\n", "").count(SHOWN) == 4
