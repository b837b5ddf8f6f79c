"""The page of a report: its summary comes first, its numbers are those of the record, and it says how to go on."""

from __future__ import annotations

import dataclasses
import html
import re

import pytest
import torch
from torch import nn
from zoo import ZOO, images

import fxprune
from fxprune.reporting.html.drawing import bars
from fxprune.reporting.html.page import page, short
from fxprune.reporting.records import Calibration, Evaluation
from fxprune.reporting.widths import layer_widths

BATCHES = [(images()(20), torch.arange(20) % 5)]


@pytest.fixture(scope="module")
def report() -> fxprune.Report:
    torch.manual_seed(0)
    found = fxprune.report(fxprune.compress(ZOO["residual"].build(), BATCHES, macs=0.5, progress=False))
    return dataclasses.replace(found, evaluation=Evaluation("accuracy", 0.931, 0.9237))


def text_of(markup: str) -> str:
    """The text between tags."""
    return html.unescape(" ".join(re.sub(r"<[^>]*>", " ", re.sub(r"<wbr>", "", markup)).split()))


def lead(report: fxprune.Report) -> str:
    found = re.search(r'<p class="lead">(.*?)</p>', page(report), re.DOTALL)
    assert found
    return text_of(found[1])


def tiles(report: fxprune.Report) -> dict[str, tuple[str, str]]:
    """The number and the detail of each tile, by its label, in their order."""
    pattern = r'<div class="label">(.*?)</div>\s*<div class="number">(.*?)</div><div class="detail">(.*?)</div>'
    return {
        html.unescape(label): (number, html.unescape(detail))
        for label, number, detail in re.findall(pattern, page(report))
    }


def rows(report: fxprune.Report, title: str) -> list[list[str]]:
    """The values by which the rows of one card's table are sorted."""
    card = next(card for card in page(report).split('<section class="card">') if f"<h2>{title}</h2>" in card)
    entries = re.findall(r'<tr class="row">.*?</tr>', card, re.DOTALL)
    return [[html.unescape(value) for value in re.findall(r'data-value="(.*?)"', row)] for row in entries]


def facts(report: fxprune.Report) -> dict[str, str]:
    """What the card on provenance says, by its names."""
    return {
        name: text_of(said) for name, said in re.findall(r"<dt>([^<]*)</dt><dd>(.*?)</dd>", page(report), re.DOTALL)
    }


def test_the_summary_says_what_was_saved_at_what_accuracy_and_whether_it_is_proven(report: fxprune.Report) -> None:
    macs, params = 1 - report.macs_after / report.macs_before, 1 - report.params_after / report.params_before
    assert lead(report) == (
        f"{macs:.1%} of the MACs and {params:.1%} of the parameters were removed. The accuracy is 92.4%, and was 93.1% "
        "before. The removal is proven: the original gives the same outputs with the removed units at zero."
    )
    bare = dataclasses.replace(report, evaluation=None, error=None)
    assert lead(bare).endswith(
        "No accuracy was measured on held-out data. The removal is not proven: verify did not run."
    )
    tuned = fxprune.Finetuning(1, "32-true", (0.5,), (0.6, 0.5), (), 1)
    assert "Fine-tuning took the validation loss from 0.6 to 0.5." in lead(dataclasses.replace(bare, finetuned=tuned))
    assert lead(dataclasses.replace(bare, evaluation=Evaluation("loss", None, 0.123456))).count("The loss is 0.1235.")


def test_tiles_begin_with_the_summary_and_hold_the_numbers_of_the_record(report: fxprune.Report) -> None:
    found = tiles(report)
    assert list(found) == ["MACs a sample", "Parameters", "accuracy", "Removal", "Output's error", "Weight bytes"]
    counts = {
        "MACs a sample": (report.macs_before, report.macs_after, ""),
        "Parameters": (report.params_before, report.params_after, ""),
        "Weight bytes": (*report.weight_bytes, "B"),  # type: ignore[misc]
    }
    for name, (before, after, unit) in counts.items():
        assert found[name] == (short(after, unit), f"of {short(before, unit)}, {after / before:.1%} left")
    assert found["accuracy"] == ("92.4%", "from 93.1%")
    assert found["Removal"] == ("proven", f"difference {report.error:.1e}")
    done = report.compensation
    assert done is not None
    what, without = "compensation: sequential; ", f"{done.shown(done.before)} without"
    assert found["Output's error"] == (done.shown(done.after), f"{what}{without}; {done.measure}")
    shares = dataclasses.replace(done, before=0.4, after=0.123, measure="squared error, in shares of the variance")
    shown = tiles(dataclasses.replace(report, compensation=shares))["Output's error"]
    assert shown == ("12.3%", f"{what}40.0% without")


def test_what_was_not_measured_has_no_tile(report: fxprune.Report) -> None:
    bare = dataclasses.replace(report, error=None, evaluation=None, compensation=None, weight_bytes=None)
    assert list(tiles(bare)) == ["MACs a sample", "Parameters"]


def test_the_widths_are_those_of_every_layer_front_to_back(report: fxprune.Report) -> None:
    order = [
        name for name, module in ZOO["residual"].build().named_modules() if isinstance(module, nn.Conv2d | nn.Linear)
    ]
    assert sorted(report.widths) == sorted(order)
    assert (next(iter(report.widths)), list(report.widths)[-1]) == ("stem", order[-1])
    sites = {name: pair for group in report.groups for name, pair in group.sites.items()}
    assert {name: report.widths[name] for name in sites} == sites
    assert all(before == after for name, (before, after) in report.widths.items() if name not in sites)
    expected = [
        [str(place), name, str(before), str(after / before)]
        for place, (name, (before, after)) in enumerate(report.widths.items(), start=1)
    ]
    assert rows(report, "Layer widths") == expected
    for name, (before, after) in report.widths.items():
        assert f'title="{before:,} to {after:,}"' in page(report), name


def test_the_bars_are_as_high_as_the_layers_are_wide(report: fxprune.Report) -> None:
    widths = layer_widths(report)
    most = max(width.before for width in widths)
    for top in (None, most):
        heights = {part: re.findall(r"M([\d.]+) ([\d.]+)V([\d.]+)", bars(widths, part, top)) for part in PARTS}
        drawn = {
            (part, int(float(x))): (100 - float(low), 100 - float(high))
            for part, found in heights.items()
            for x, low, high in found
        }
        for place, width in enumerate(widths):
            scale = 100 / (top or width.before)
            if not width.prunable:
                assert drawn.pop(("whole", place)) == pytest.approx((0, scale * width.before), rel=1e-2)
                continue
            assert drawn.pop(("kept", place)) == pytest.approx((0, scale * width.after), rel=1e-2)
            if width.after < width.before:
                removed = (scale * width.after, scale * width.before)
                assert drawn.pop(("removed", place)) == pytest.approx(removed, rel=2e-2)
        assert drawn == {}


PARTS = ("kept", "removed", "whole")


def test_a_report_of_an_older_version_shows_the_widths_of_its_groups(report: fxprune.Report) -> None:
    old = dataclasses.replace(report, widths={}, provenance=None)
    sites = [(name, *pair) for group in old.groups for name, pair in group.sites.items()]
    assert [(width.name, width.before, width.after) for width in layer_widths(old)] == sites
    assert [row[1] for row in rows(old, "Layer widths")] == [name for name, *_ in sites]
    assert "date" not in facts(old)


def test_odd_widths_are_named_with_the_remedy_of_the_interface(report: fxprune.Report) -> None:
    widths = {"a": (64, 37), "b": (64, 40), "c": (64, 64), "d": (10, 10)}
    odd = dataclasses.replace(report, widths=widths, groups=(dataclasses.replace(report.groups[0], sites=widths),))
    text = text_of(page(odd))
    assert "1 of 2 narrowed layers has a width that is no multiple of 8 (a: 37)" in text
    assert "round_to=8 keeps multiples of 8 units" in text
    assert re.findall(r">(\w+) <span class=\"tag\">odd</span>", page(odd)) == ["a"]
    assert report.provenance is not None
    made = dataclasses.replace(report.provenance, file="small.safetensors")
    assert "--round-to 8 keeps multiples" in text_of(page(dataclasses.replace(odd, provenance=made)))
    even = dataclasses.replace(odd, widths={name: pair for name, pair in widths.items() if name != "a"})
    assert "no multiple" not in page(even)


def test_the_tables_hold_the_numbers_of_the_record(report: fxprune.Report) -> None:
    groups = [
        [str(i), g.name, str(g.before), str(g.after / g.before), str(len(g.sites))]
        for i, g in enumerate(report.groups, start=1)
    ]
    assert rows(report, "Groups") == groups
    layers = [
        [layer.name, str(layer.params[1]), str(layer.macs[1]), str(layer.macs[1] / report.macs_after)]
        for layer in report.layers
    ]
    assert rows(report, "Largest layers that remain") == layers
    for layer in report.layers:
        assert f'title="{layer.params[0]:,} to {layer.params[1]:,}"' in page(report)
        assert f'title="{layer.macs[0]:,} to {layer.macs[1]:,}"' in page(report)


def test_the_provenance_is_shown(report: fxprune.Report) -> None:
    assert report.provenance is not None
    made = dataclasses.replace(report.provenance, data="Subset of CIFAR10", data_size=1234)
    found = facts(dataclasses.replace(report, provenance=made, calibration=Calibration(20, 0.25, 0.95, 5)))
    assert found["call"] == "compress(model, loader, macs=0.5, progress=False)"
    assert found["date"] == made.date.replace("T", " ").replace("+00:00", " UTC")
    assert found["versions"] == ", ".join(f"{name} {version}" for name, version in made.versions.items())
    assert (found["model"], found["captured by"]) == ("Residual", "fx")
    assert (found["data"], found["scored on"]) == ("Subset of CIFAR10, 1,234 samples", "20 samples, seed 0")
    assert found["calibration"] == (
        "the original on 20 calibration samples: loss 0.25, right on 95.0%; these are few samples, give some hundred"
    )
    assert report.compensation is not None
    best, *others = sorted(report.compensation.compared, key=lambda name: report.compensation.compared[name])
    assert found["plans compared"].startswith(f"{best} (taken): error ")
    assert all(f" {name}: error " in found["plans compared"] for name in others)
    named = dataclasses.replace(
        made, call="fxprune compress a:b", model="a:b", weights="net.pt", file="out.safetensors"
    )
    found = facts(dataclasses.replace(report, provenance=named))
    assert (found["command"], found["model"], found["checkpoint"]) == (
        "fxprune compress a:b",
        "Residual, a:b",
        "net.pt",
    )


def steps(report: fxprune.Report) -> list[str]:
    found = re.search(r"<pre><code>(.*?)</code></pre>", page(report), re.DOTALL)
    return [line for line in html.unescape(found[1]).splitlines() if not line.startswith("#")] if found else []


def test_the_next_steps_are_code_with_the_names_that_are_known(report: fxprune.Report) -> None:
    assert steps(report) == [
        "small = fxprune.finetune(small, train_loader, val_loader)",
        'fxprune.export(small, "residual.onnx", images)',
        'fxprune.save(small, "residual.safetensors")',
    ]
    assert report.provenance is not None
    made = dataclasses.replace(report.provenance, file='runs/a "b" <c>.safetensors')
    tuned = fxprune.Finetuning(1, "32-true", (0.5,), (0.6, 0.5), (), 1)
    found = steps(dataclasses.replace(report, provenance=made, finetuned=tuned))
    compile("\n".join(found), "steps", "exec")
    assert len(found) == 3
    assert '.load("runs/a \\"b\\" \\u003cc\\u003e.safetensors", model)' in found[0]
    part = dataclasses.replace(report, model="Detector.body.0")
    assert steps(part)[-1] == 'fxprune.save(small, "detector-body-0.safetensors")'


@pytest.mark.filterwarnings("ignore:nothing")
def test_a_model_of_which_nothing_was_removed_says_so() -> None:
    frozen = fxprune.compress(
        nn.Sequential(nn.Linear(3, 5)), [(torch.rand(20, 3), torch.arange(20) % 5)], progress=False
    )
    report = fxprune.report(frozen)
    assert lead(report) == "Nothing of this model can be pruned; the reasons are below."
    assert "it is the model's output" in text_of(page(report))
    plan = fxprune.Scores.random(ZOO["residual"].build(), images()(2)).plan(0.0, allocate="uniform")
    whole = fxprune.report(fxprune.apply(ZOO["residual"].build(), plan))
    assert lead(whole) == "Nothing was removed: a budget, such as macs=0.7, or a larger alpha removes more."
    for found in (report, whole):
        assert "Removal" not in tiles(found)
        assert steps(found) == []
