"""The parts of a report: rankings, largest layers, comparisons, and the page, in a browser where there is one."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import parameters
from nets import layers
from torch import nn
from zoo import ZOO, images, tensors

import fxprune
from fxprune.caller.typed_json import from_plain
from fxprune.errors import PlanError
from fxprune.planning.allocation import tod_by_group
from fxprune.planning.tod import tod_curve
from fxprune.reporting.groups import rankings
from fxprune.reporting.html import page as page_module
from fxprune.reporting.html.page import page
from fxprune.reporting.records import Calibration, Evaluation, Ranking
from fxprune.reporting.timings import BatchLatency, MeasuredLatency, Timing

BATCHES = [(images()(20), torch.arange(20) % 5)]
BROWSER = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), ""
)
FILES = Path(page_module.__file__).parent


@pytest.fixture(scope="module")
def compressed() -> tuple[nn.Module, fxprune.Report]:
    torch.manual_seed(0)
    small = fxprune.compress(ZOO["residual"].build(), BATCHES, macs=0.5, progress=False)
    return small, fxprune.report(small)


@pytest.fixture
def full(compressed: tuple[nn.Module, fxprune.Report]) -> fxprune.Report:
    """A report that has everything in it."""
    before, after = Timing(0.02, 0.019, 0.021, 5, 20), Timing(0.0195, 0.018, 0.02, 5, 20)
    latency = MeasuredLatency("cpu", 1, (BatchLatency(1, before, after), BatchLatency(32, before, after)), ("why <b>",))
    tuned = fxprune.Finetuning(2, "32-true", (0.5, 0.4), (0.6, 0.5, 0.45), (0.7, 0.8, 0.81), 2)
    made = dataclasses.replace(
        compressed[1].provenance, model="zoo:residual", weights="net.pt", file="small.safetensors"
    )  # type: ignore[type-var]
    return dataclasses.replace(
        compressed[1], latency=latency, finetuned=tuned, evaluation=Evaluation("accuracy", 0.931, 0.9237),
        calibration=Calibration(20, 0.25, 0.95, 5), provenance=made,
    )  # fmt: skip


def test_a_ranking_holds_the_curve_that_decided() -> None:
    model, example = ZOO["residual"].build(), images()(2)
    scores = fxprune.Scores.random(model, example)
    for name, start, end in scores.groups:
        propose, protect = scores.propose[start:end], scores.protect[start:end]
        found = rankings(scores, scores.plan(0.3, allocate="tod-by-group"))[name]
        assert found.tod == tuple(tod_curve(propose, protect).round(4))
        order = np.argsort(propose)
        assert found.proposed == tuple(range(end - start))
        assert found.protected == tuple(np.argsort(np.argsort(protect))[order])
        assert (found.among, found.decides) == (end - start, True)
        gone = found.stays.count(False)
        assert found.stays == (False,) * gone + (True,) * (end - start - gone)
        assert gone == (tod_by_group(propose, protect, [("", 0, end - start)]) <= 0.3).sum()


def test_protection_over_the_network_is_ranked_over_the_network() -> None:
    model, example = ZOO["residual"].build(), images()(2)
    scores = fxprune.Scores.random(model, example)
    found = rankings(scores, scores.plan(0.3))
    everything = sorted(rank for ranking in found.values() for rank in ranking.protected)
    assert everything == list(range(len(scores.propose)))
    assert {ranking.among for ranking in found.values()} == {len(scores.propose)}
    alone = dataclasses.replace(scores, costs=None)
    for (name, start, end), ranking in zip(scores.groups, rankings(alone, alone.plan(0.3)).values(), strict=True):
        gone, n = ranking.stays.count(False), end - start
        both = [r / ranking.among >= 1 - gone / n for r in ranking.protected[:gone]]
        assert gone == 0 or ranking.tod[gone - 1] == pytest.approx(sum(both) / gone, abs=1e-4), name


def test_wide_groups_are_sampled_by_rank() -> None:
    model = nn.Sequential(nn.Linear(4, 2000), nn.ReLU(), nn.Linear(2000, 3))
    scores = fxprune.Scores.random(model, torch.zeros(2, 4))
    (found,) = rankings(scores, scores.plan(0.2, allocate="tod-by-group")).values()
    assert len(found.proposed) == len(found.tod) == 512
    assert (found.proposed[0], found.proposed[-1]) == (0, 1999)
    assert set(np.diff(found.proposed)) == {3, 4}
    whole = tod_curve(scores.propose, scores.protect)
    assert found.tod == tuple(whole[list(found.proposed)].round(4))
    small = fxprune.apply(model, scores.plan(0.2, allocate="tod-by-group"), scores=scores)
    assert "512 of 2,000 units are shown" in page(fxprune.report(small))


def test_compress_and_apply_with_scores_keep_rankings(compressed: tuple[nn.Module, fxprune.Report]) -> None:
    small, report = compressed
    assert report.signals == ("reconstruction", "taylor-by-sample")
    done = report.compensation
    assert done is not None
    assert small.meta["fxprune"].plan.allocate == min(done.compared, key=lambda way: done.compared[way])
    for group in report.groups:
        assert group.ranking is not None
        assert group.ranking.stays.count(True) == group.after
    model = ZOO["residual"].build()
    scores = fxprune.Scores.random(model, images()(2))
    assert all(g.ranking is None for g in fxprune.report(fxprune.apply(model, scores.plan(0.3))).groups)
    other = fxprune.Scores.random(ZOO["mlp"].build(), tensors(6)(2))
    noted = fxprune.report(fxprune.apply(model, scores.plan(0.3), scores=other))
    assert all(group.ranking is None for group in noted.groups)


def test_the_largest_layers_are_those_of_what_is_left(compressed: tuple[nn.Module, fxprune.Report]) -> None:
    small, report = compressed
    model, layers = ZOO["residual"].build(), {layer.name: layer for layer in report.layers}
    assert list(report.layers) == sorted(
        report.layers, key=lambda layer: (-layer.macs[1], -layer.params[1], layer.name)
    )
    for name, layer in layers.items():
        assert layer.params == (parameters(model.get_submodule(name)), parameters(small.get_submodule(name)))
        assert layer.kind == type(small.get_submodule(name)).__name__
    assert sum(layer.macs[1] for layer in report.layers) == report.macs_after
    assert sum(layer.macs[0] for layer in report.layers) == report.macs_before


@layers(lambda: dict(inner=nn.Linear(6, 16), weight=nn.Parameter(torch.randn(5, 16))))
def Functional(self, x: torch.Tensor) -> torch.Tensor:
    """Weights that functions read, and one that lies in no layer."""
    return nn.functional.linear(nn.functional.linear(x, self.inner.weight).relu(), self.weight)


def test_work_of_functions_counts_for_what_holds_the_weight() -> None:
    model = Functional()
    plan = fxprune.Scores.random(model, torch.zeros(2, 6)).plan(0.5, allocate="uniform")
    layers = {layer.name: layer for layer in fxprune.report(fxprune.apply(model, plan)).layers}
    assert layers["inner"].macs == (6 * 16, 6 * 8)
    assert layers["inner"].kind == "Linear"
    assert (layers["(model)"].macs, layers["(model)"].params) == ((5 * 16, 5 * 8), (5 * 16, 5 * 8))


def test_weight_bytes_are_those_of_the_tensors(compressed: tuple[nn.Module, fxprune.Report]) -> None:
    small, report = compressed
    held = [sum(t.nbytes for t in (*m.parameters(), *m.buffers())) for m in (ZOO["residual"].build(), small)]
    assert report.weight_bytes == tuple(held)
    half = fxprune.Scores.random(ZOO["mlp"].build().half(), tensors(6)(2).half())
    found = fxprune.report(fxprune.apply(ZOO["mlp"].build().half(), half.plan(0.3)))
    assert found.weight_bytes == (2 * found.params_before, 2 * found.params_after)


@pytest.mark.parametrize("level", ["bias", "ridge", "sequential"])
def test_biases_that_compensation_created_are_counted(level: Any) -> None:
    bare = nn.Sequential(
        nn.Linear(6, 16, bias=False), nn.ReLU(), nn.Linear(16, 12, bias=False), nn.Linear(12, 5, bias=False)
    )
    small = fxprune.compress(bare, [(torch.rand(20, 6), torch.arange(20) % 5)], 0.5, compensate=level, progress=False)
    report = fxprune.report(small)
    assert any(name.endswith("bias") for name, _ in small.named_parameters())
    assert report.params_after == parameters(small)
    assert report.weight_bytes is not None
    assert report.weight_bytes[1] == 4 * parameters(small)
    assert sum(layer.params[1] for layer in report.layers) == parameters(small)


def test_it_all_travels_in_the_saved_file(full: fxprune.Report, compressed: Any, tmp_path: Path) -> None:
    small = compressed[0]
    before = small.meta["fxprune"]
    small.meta["fxprune"] = dataclasses.replace(before, report=full)
    fxprune.save(small, tmp_path / "small.safetensors")
    small.meta["fxprune"] = before
    loaded = fxprune.load(tmp_path / "small.safetensors", ZOO["residual"].build())
    assert fxprune.report(loaded) == full
    assert full.provenance is not None
    assert fxprune.report(loaded).provenance.date == full.provenance.date
    assert page(fxprune.report(loaded)) == page(full)
    assert loaded.meta["fxprune"].plan.allocate == before.plan.allocate


NEW = (
    "weight_bytes", "layers", "signals", "latency", "calibration", "evaluation", "provenance", "widths"
)  # fmt: skip


def test_what_an_older_file_holds_is_read(full: fxprune.Report) -> None:
    content = json.loads(json.dumps(full.to_dict()))
    assert from_plain(fxprune.Report, content) == full
    old = {name: entry for name, entry in content.items() if name not in NEW}
    old["groups"] = [{name: entry for name, entry in group.items() if name != "ranking"} for group in old["groups"]]
    found = from_plain(fxprune.Report, old)
    assert (found.params_after, found.latency, found.weight_bytes) == (full.params_after, None, None)
    assert [group.ranking for group in found.groups] == [None] * len(full.groups)
    assert Checked(page(found)).open == []
    plan = fxprune.Scores.random(ZOO["mlp"].build(), tensors(6)(2)).plan(0.5)
    before = {name: entry for name, entry in plan.to_dict().items() if name != "allocate"}
    assert fxprune.Plan.from_dict(before) == dataclasses.replace(plan, allocate=None)
    with pytest.raises(PlanError, match="allocate is an int"):
        fxprune.Plan.from_dict(before | {"allocate": 3})


def test_comparing_two_reports(full: fxprune.Report) -> None:
    model = ZOO["residual"].build()
    scores = fxprune.Scores.random(model, images()(2))
    other = fxprune.report(fxprune.apply(model, scores.plan(0.0, allocate="uniform")))
    found = full.compare(other)
    figures = {figure.name: figure for figure in found.figures}
    macs = figures["MACs a sample"]
    assert (macs.before, macs.first, macs.second) == (full.macs_before, full.macs_after, other.macs_after)
    assert figures["ms, batch of 32"].cells() == ("ms, batch of 32", "20", "19.5", "", "")
    assert figures["metric, fine-tuned"].first == 0.81
    done = full.compensation
    assert done is not None
    assert done.after is not None
    shown = f"{done.after:.2%}" if done.is_share else f"{done.after:.3g}"
    assert figures["output's error"].cells() == ("output's error", "", shown, "", "")
    units = {group.name: (group.before, group.first, group.second) for group in found.groups}
    narrowed = {group.name: (group.before, group.after, group.before) for group in full.groups}
    assert units == {name: entry for name, entry in narrowed.items() if entry[1] != entry[2]}
    assert found.alike == len(full.groups) - len(units)
    text = str(found)
    assert "Residual at alpha" in text
    assert f"{other.macs_after / full.macs_after:.2f}" in text
    assert json.loads(json.dumps(found.to_dict()))["alike"] == found.alike
    with pytest.raises(dataclasses.FrozenInstanceError):
        found.alike = 3  # type: ignore[misc]
    assert full.compare(full).groups == ()


class Checked(HTMLParser):
    """Notes tags that do not match, text, and what would be fetched."""

    VOID = {"meta", "link", "br", "wbr"}  # noqa: RUF012

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.fetched: list[str] = []
        self.texts: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.open += [] if tag in self.VOID else [tag]
        self.ids += [value or "" for name, value in attrs if name == "id"]
        self.fetched += [value or "" for name, value in attrs if name in ("src", "href", "action")]

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def test_the_page_is_whole_and_fetches_nothing(full: fxprune.Report) -> None:
    text = page(full)
    found = Checked(text)
    assert found.open == []
    assert found.fetched == ["data:,"]
    assert len(set(found.ids)) == len(found.ids) == len(full.groups)
    assert not re.search(r"https?:|url\(|@import|fetch\(|XMLHttp", text)
    assert found.tags.count("svg") == 2 * len(full.groups) + 2 + 2  # curves and ranks, times, widths
    shown = " ".join(found.texts)
    for said in ("Residual", "captured by", "asked for 50.0% of the MACs", "stem", "layers left whole", "of all"):
        assert said.lower() in shown.lower()
    assert "not faster at batch size 1 and 32" in shown


def test_everything_in_it_is_escaped(full: fxprune.Report) -> None:
    evil = '<script>alert("1")</script>\'">'
    group = dataclasses.replace(full.groups[0], name=evil, sites={evil: (8, 4)}, inexact=evil)
    layer = dataclasses.replace(full.layers[0], name=evil, kind=evil)
    frozen = dataclasses.replace(full.frozen[0], sites=(evil,), reason=evil)
    assert full.latency is not None
    assert full.compensation is not None
    assert full.provenance is not None
    report = dataclasses.replace(
        full, widths={evil: (8, 5)}, evaluation=Evaluation(evil, None, 1.0),
        provenance=dataclasses.replace(
            full.provenance, call=evil, date=evil, versions={evil: evil}, data=evil, model=evil, weights=evil, file=evil
        ),
        model=evil, captured=evil, groups=(group,), layers=(layer,), frozen=(frozen,), signals=(evil, evil),
        latency=dataclasses.replace(full.latency, device=evil, reasons=(evil,)),
        compensation=dataclasses.replace(full.compensation, level=evil),
    )  # fmt: skip
    text = page(report)
    assert "<script>alert" not in text
    assert Checked(text).tags.count("script") == 1
    assert text.count("&lt;script&gt;alert") > 10


@pytest.mark.parametrize(
    "ranking",
    [
        Ranking((), (), (), (), 0), Ranking((0,), (0,), (True,), (1.0,), 1, "tod"),
        Ranking((0, 5), (1,), (False, True, True), (0.5,), 7, "uniform"),
    ],
)  # fmt: skip
def test_rankings_of_any_shape_are_drawn(full: fxprune.Report, ranking: Ranking) -> None:
    """A file may hold lists that do not fit each other."""
    group = dataclasses.replace(full.groups[0], before=1, after=1, ranking=ranking)
    assert Checked(page(dataclasses.replace(full, groups=(group,)))).open == []


@pytest.mark.skipif(not shutil.which("node"), reason="no node to check the script with")
def test_the_script_is_valid() -> None:
    done = subprocess.run(["node", "--check", FILES / "page.js"], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")


PROBE = """
<script>
const found = { errors: [], resources: performance.getEntriesByType("resource").length };
window.addEventListener("error", (event) => found.errors.push(event.message));
const table = [...document.querySelectorAll("table.sortable")].find((t) => t.querySelector(".toggle"));
const headers = [...table.tHead.rows[0].cells];
const names = () => [...table.tBodies].map((body) => body.querySelector(".toggle").textContent);
const click = (name) => headers.find((header) => header.textContent === name).querySelector("button").click();
found.start = names();
click("units"); found.rising = names();
click("units"); found.falling = names();
found.sorted = headers.map((header) => header.getAttribute("aria-sort"));
const more = () => [...document.querySelectorAll(".more")].filter((row) => row.getClientRects().length).length;
found.closed = more();
document.querySelector(".toggle").click(); found.one = more();
document.querySelector(".all").click(); found.all = more();
found.cut = [...document.querySelectorAll(".scroll")].filter((box) => box.scrollWidth > box.clientWidth).length;
found.wide = document.documentElement.scrollWidth > document.documentElement.clientWidth;
const probe = document.createElement("pre");
probe.id = "probe"; probe.textContent = JSON.stringify(found);
document.body.append(probe);
</script>
"""


def in_browser(path: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """The page after its scripts ran, and what the browser said."""
    command = [
        BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
        "--host-resolver-rules=MAP * ~NOTFOUND", f"--user-data-dir={path.parent / 'profile'}",
        "--enable-logging=stderr", *options, path.as_uri(),
    ]  # fmt: skip
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.skipif(not BROWSER, reason="no chromium to open the page in")
@pytest.mark.parametrize("size", ["1200,900", "390,800"])
def test_it_opens_sorts_and_unfolds_in_a_browser(full: fxprune.Report, tmp_path: Path, size: str) -> None:
    path = tmp_path / "report.html"
    path.write_text(page(full).replace("</body>", f"{PROBE}</body>"), encoding="utf-8")
    done = in_browser(path, f"--window-size={size}", "--dump-dom")
    assert not [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    match = re.search(r'<pre id="probe">(.*?)</pre>', done.stdout)
    assert match, done.stderr
    found = json.loads(match[1])
    assert (found["errors"], found["resources"], found["wide"], found["cut"]) == ([], 0, False, 0)
    sizes = {group.name: group.before for group in full.groups}
    assert found["start"] == list(sizes)
    assert [sizes[name] for name in found["rising"]] == sorted(sizes.values())
    assert [sizes[name] for name in found["falling"]] == sorted(sizes.values(), reverse=True)
    assert found["sorted"].count("descending") == 1
    assert (found["closed"], found["one"], found["all"]) == (0, 1, len(sizes))


@pytest.mark.parametrize("name", ["mean_over_channels", "mlp"])
def test_what_is_not_known_is_left_out(name: str) -> None:
    model, example = ZOO[name].build(), ZOO[name].example(2)
    report = fxprune.report(fxprune.apply(model, fxprune.Scores.random(model, example).plan(0.3)))
    bare = dataclasses.replace(report, layers=(), weight_bytes=None, error=None, groups=(), frozen=())
    for shown in (report, bare):
        assert Checked(page(shown)).open == []
    assert "No curve: the scores were not at hand" in page(report)
    assert "Nothing of this model can be pruned" in page(bare)
