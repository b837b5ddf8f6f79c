"""The commands, from a user's module to files that the library reads."""

import json
import re
from contextlib import nullcontext
from functools import partial

import numpy as np
import pytest
import torch
from command_line import done, flat, invoke

import fxprune
from fxprune.caller.isolation import seeded
from fxprune.cli.evaluation import HeldOut, accuracy
from fxprune.cli.input_options import DataOptions, EvalOptions
from fxprune.cli.named_objects import Built
from fxprune.cli.output import Output
from fxprune.cli.sweeping import ALPHAS
from fxprune.errors import FxpruneWarning

DATA = ["--data", "mynets:loader"]
RESIDUAL = """
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, 3)
        self.one, self.two, self.three = (nn.Conv2d(8, 8, 3, padding=1) for _ in range(3))

    def forward(self, x):
        x = self.stem(x).relu()
        for layer in (self.one, self.two, self.three):
            x = x + layer(x).relu()
        return self.head(x.mean((2, 3)))
"""


def test_compress_writes_an_artifact_that_can_be_rebuilt(project):
    import mynets

    content = done("compress", "mynets:build", "--model-arg", "width=10", *DATA, "--macs", "0.6", "-o", "s.safetensors")
    small = fxprune.load(project / "s.safetensors", build=True)
    assert content["command"] == "compress"
    assert content["out"] == "s.safetensors"
    assert content["bytes"] == (project / "s.safetensors").stat().st_size
    assert content["report"] == json.loads(json.dumps(fxprune.report(small).to_dict()))
    assert content["report"]["budget"]["asked"] == 0.6
    assert content["report"]["macs_after"] <= 0.6 * content["report"]["macs_before"]
    assert content["report"]["compensation"]["level"] == "sequential"
    assert content["report"]["error"] < 1e-5
    again = fxprune.load(project / "s.safetensors", mynets.build(10))
    images = torch.randn(3, 3, 8, 8)
    assert torch.equal(small(images), again(images))


def test_compress_is_what_the_library_does_and_repeats(project):
    import mynets

    done("compress", "mynets:build", *DATA, "--alpha", "0.3", "--seed", "5", "--round-to", "4", "-o", "a.safetensors")
    done("compress", "mynets:build", *DATA, "--alpha", "0.3", "--seed", "5", "--round-to", "4", "-o", "b.safetensors")
    torch.manual_seed(5)
    model = mynets.build()
    wanted = fxprune.compress(model.eval(), mynets.loader(), 0.3, seed=5, round_to=4, progress=False)
    first, second = (fxprune.load(f"{name}.safetensors", mynets.build()).state_dict() for name in "ab")
    assert all(torch.equal(first[name], tensor) for name, tensor in wanted.state_dict().items())
    assert all(torch.equal(first[name], second[name]) for name in second)


def test_no_new_biases(project):
    import mynets

    done("compress", "mynets:build", *DATA, "--alpha", "0.3", "--no-new-biases")
    assert fxprune.load("small.safetensors", mynets.build()).state_dict().keys() == mynets.build().state_dict().keys()


EVALUATED = ["compress", "mynets:build", *DATA, "--macs", "0.6", "--eval-data", "mynets:dataset"]


def test_compress_evaluates_before_and_after(project):
    import mynets

    content = done(*EVALUATED, "--seed", "3", "--eval-samples", "30", "--eval-arg", "count=90")
    small = fxprune.load("small.safetensors", build=True)
    found = fxprune.report(small).evaluation
    assert content["report"]["evaluation"] == {"name": "accuracy", "before": found.before, "after": found.after}
    with seeded(3):
        model = mynets.build().eval()
    options = DataOptions(data="mynets:loader"), Built(model), Output(json=False, quiet=True), 3
    held = EvalOptions(eval_data="mynets:dataset", eval_samples=30, eval_arg=["count=90"]).held_out(*options)
    with Output(json=False, quiet=True).busy("evaluating") as bars:
        assert (held.value(model, bars), held.value(small, bars)) == (found.before, found.after)
    shown = invoke("report", "small.safetensors").stdout
    assert re.search(rf"accuracy +│ +{found.before:.4g} +│ +{found.after:.4g} │", shown)


def test_an_evaluation_near_chance_is_told():
    right, counts = (torch.eye(4).repeat(50, 1), torch.arange(200) % 4), dict[str, int]()
    with Output(json=False, quiet=True).busy("evaluating") as bars:
        for labels in (right[1], (right[1] + 1) % 4):
            held = HeldOut("accuracy", partial(accuracy, counts=counts), [(right[0], labels)], counts)
            told = pytest.warns(
                FxpruneWarning, match=r"right on 0.0% of the 200 evaluation samples, no more than guess"
            )
            with told if labels is not right[1] else nullcontext():
                assert held.before(torch.nn.Identity(), bars) == float(labels is right[1])


def test_options_of_an_evaluation_need_one(project):
    for options in (["--eval-arg", "count=3"], ["--eval-samples", "3"], ["--eval-metric", "mynets:negative_loss"]):
        result = invoke(*EVALUATED[:-2], *options)
        assert result.exit_code == 2
        assert "does nothing without --eval-data" in flat(result.stderr)


def test_compress_removes_residual_branches(project):
    (project / "residual.py").write_text(RESIDUAL)
    command = ["compress", "residual:Net", "--data", "mynets:dataset", "--params", 0.6, "--blocks", "only"]
    done(*command, "-o", "s.safetensors")
    plan = fxprune.load(project / "s.safetensors", build=True).meta["fxprune"].plan
    removed = [f"branch:{name}" for name in plan.removed_branches]
    assert removed
    assert all(len(kept) == plan.widths[site] for site, kept in plan.keep.items() if site not in removed)
    alone = invoke(*command[:4], "--alpha", 0.1, "--blocks", "only")
    assert "--blocks only removes branches within a budget: give --params, --macs or --latency" in flat(alone.stderr)
    assert "'off' is none of beside, only" in flat(invoke(*command[:-1], "off").stderr)


@pytest.mark.wide
def test_compress_takes_a_metric(project):
    evaluation = done(*EVALUATED, "--eval-metric", "mynets:negative_loss")["report"]["evaluation"]
    assert evaluation["name"] == "mynets:negative_loss"
    assert evaluation["before"] < 0
    assert evaluation["after"] < 0
    assert done(*EVALUATED[:-2])["report"]["evaluation"] is None


def test_a_metric_that_fails_is_said_before_anything_is_pruned(project):
    result = invoke(*EVALUATED, "--eval-metric", "mynets:loss")
    assert result.exit_code == 1
    assert "Error: Net cannot be evaluated: TypeError" in result.stderr
    assert not list(project.glob("*.safetensors"))


def test_scores_say_how_good_the_original_is(project):
    command = ["score", "mynets:build", "--data", "mynets:dataset", "--data-arg", "count=300"]
    result = invoke(*command, "--json")
    content = json.loads(result.stdout)
    about = content["about"]
    said = f"The original on 300 calibration samples: loss {about['loss']:.3g}, right on {about['accuracy']:.1%}."
    assert said in result.stderr
    assert about["outputs"] == 3
    assert about["accuracy"] < 0.39  # two standard errors above a third
    assert content["warnings"] == [
        f"the original is right on {about['accuracy']:.1%} of these 300 samples, no more than guessing among 3 classes "
        "would be: wrong preprocessing, labels or weights?"
    ]


def test_compress_takes_functions_weights_and_exports(project):
    import mynets

    model = mynets.build()
    torch.save(model.state_dict(), "net.pt")
    content = done(
        "compress", "mynets:build", "--weights", "net.pt", "--data", "mynets:dicts", "--unpack", "mynets:pair",
        "--loss", "mynets:loss", "--propose", "magnitude", "--protect", "random", "--macs", "0.7", "--export", "s.pt2",
        "--compensate", "ridge",
    )  # fmt: skip
    assert content["exported"]["s.pt2"] < 1e-4
    small = fxprune.load("small.safetensors", model)
    images = torch.randn(4, 3, 8, 8)
    assert torch.allclose(torch.export.load("s.pt2").module()(images), small.eval()(images), atol=1e-5)
    assert content["report"]["compensation"]["level"] == "ridge"
    made = content["report"]["provenance"]
    assert made["call"].startswith("fxprune compress mynets:build --weights net.pt --data mynets:dicts --unpack")
    assert made["call"].endswith("--compensate ridge --json")
    assert (made["model"], made["weights"], made["file"]) == ("mynets:build", "net.pt", "small.safetensors")
    assert (made["samples"], made["seed"]) == (content["report"]["calibration"]["samples"], 0)


def test_compress_of_a_part(project):
    content = done(
        "compress", "mynets:Wrapped", *DATA, "--submodule", "backbone", "--run", "mynets:run", "--macs", "0.7"
    )
    assert content["report"]["model"] == "Wrapped.backbone"
    assert content["report"]["provenance"]["model"] == "mynets:Wrapped"
    small = fxprune.load("small.safetensors", build=True)
    layers = [small.backbone.get_submodule(name) for name in ("stem", "body")]
    assert min(layer.out_channels for layer in layers) < 12


@pytest.fixture
def scored(project, steady_times):
    import mynets

    torch.manual_seed(1)
    torch.save(mynets.build().state_dict(), project / "net.pt")
    return done("score", "mynets:build", "--weights", "net.pt", *DATA, "--exclude", "body", "--times")


NET = ["mynets:build", "--weights", "net.pt"]


def test_score_plan_apply(scored, project):
    import mynets

    assert (scored["units"], scored["groups"], scored["about"]["samples"]) == (12, 1, 60)
    scores = fxprune.Scores.load(project / "scores.npz")
    planned = done("plan", "scores.npz", "--params", "0.8", "--round-to", "2")
    plan = fxprune.Plan.load("plan.json")
    assert plan == scores.plan(params=0.8, round_to=2)
    assert planned["stay"] == sum(map(len, plan.keep.values()))
    assert planned["budget"] == {"of": "params", "asked": 0.8, "achieved": plan.budget.achieved}
    content = done("apply", *NET, "plan.json", *DATA, "--scores", "scores.npz")
    model = mynets.build()
    model.load_state_dict(torch.load("net.pt", weights_only=True))
    wanted = fxprune.apply(model.eval(), plan, scores=scores, loader=mynets.loader(), compensate="sequential")
    found = fxprune.load("small.safetensors", model)
    assert all(torch.equal(found.state_dict()[name], tensor) for name, tensor in wanted.state_dict().items())
    assert content["report"]["error"] < 1e-5
    assert content["report"]["frozen"][0]["sites"] == ["body"]


@pytest.mark.parametrize(
    ("options", "level"),
    [([], None), (["--scores", "scores.npz"], "ridge"), (DATA, "sequential"), ([*DATA, "--compensate", "none"], None)],
)
def test_apply_compensates_with_what_it_is_given(scored, options, level):
    done("plan", "scores.npz", "--macs", "0.8")
    report = done("apply", *NET, "plan.json", *options)["report"]
    assert (report["compensation"] or {}).get("level") == level


def test_apply_says_what_is_missing(scored):
    done("plan", "scores.npz")
    result = invoke("apply", *NET, "plan.json", "--compensate", "bias")
    assert result.exit_code == 1
    assert "Error: --compensate bias works with the moments of the scoring pass" in result.stderr
    result = invoke("apply", *NET, "plan.json", "--submodule", "stem")
    assert "the plan is for the part '', and --submodule is 'stem'" in result.stderr


def test_plan_by_latency_needs_times(scored, project):
    assert done("plan", "scores.npz", "--latency", "1")["budget"]["of"] == "latency"
    done("score", *NET, *DATA, "-o", "plain.npz")
    result = invoke("plan", "plain.npz", "--latency", "0.9")
    assert result.exit_code == 1
    assert "a plan by --latency needs the times of the layers: score with --times" in result.stderr


def test_report_needs_no_model(project):
    made = done("compress", "mynets:build", *DATA, "--macs", "0.7")
    content = done("report", "small.safetensors")
    assert content["reports"] == [{"part": "", **made["report"]}]
    assert content["versions"]["fxprune"] == fxprune.__version__
    text = invoke("report", "small.safetensors").stdout
    assert "verify's error" in text
    assert "built by mynets:build()" in text


def test_report_writes_a_page(project, monkeypatch):
    """The page itself is the report's; here it is that it appears under its name, whole."""
    done("compress", "mynets:build", *DATA, "--macs", "0.7")
    if not hasattr(fxprune.Report, "to_html"):
        monkeypatch.setattr(fxprune.Report, "to_html", lambda self, path: path.write_text(f"<html>{self.model}"), False)
    content = done("report", "small.safetensors", "--html", "page.html")
    assert content["html"] == ["page.html"]
    assert "Net" in (project / "page.html").read_text(encoding="utf-8")
    assert [path.name for path in project.glob(".*part*")] == []


def test_report_of_what_is_no_artifact(project):
    np.savez("other.npz", a=1)
    result = invoke("report", "other.npz")
    assert result.exit_code == 1
    assert result.stderr.startswith("Error: other.npz is cut off, or no safetensors file")


SWEEP = ["sweep", *NET, "--scores", "scores.npz", "--eval-data", "mynets:dataset"]


@pytest.mark.wide
def test_sweep(scored, project):
    pytest.importorskip("matplotlib")
    content = done(*SWEEP, "--alphas", "0,0.4", "--macs", "0.8", *DATA, "--time-batch", "4", "--out", "deep/sweep")
    rows = content["rows"]
    assert json.loads((project / "deep" / "sweep" / "results.json").read_text()) == {
        "compensate": "sequential",
        "metric": "accuracy",
        "time_batch": 4,
        "rows": rows,
    }
    assert [row["name"] for row in rows] == ["original", "alpha 0", "alpha 0.4", "macs 0.8"]
    assert rows[3]["macs"] <= 0.8 * rows[0]["macs"]
    assert all(row["milliseconds"] > 0 and 0 <= row["accuracy"] <= 1 for row in rows)
    assert any(row["on_front"] for row in rows)
    assert (project / "deep" / "sweep" / "results.png").read_bytes().startswith(b"\x89PNG")


def test_sweep_by_default_and_by_a_metric(scored, project):
    pytest.importorskip("matplotlib")
    result = invoke(*SWEEP, "--eval-metric", "mynets:negative_loss", "--time-batch", "0", "--round-to", "3")
    assert result.exit_code == 0, result.stderr
    document = json.loads((project / "fxprune-sweep" / "results.json").read_text())
    assert [row["name"] for row in document["rows"][1:]] == [f"alpha {alpha}" for alpha in ALPHAS.split(",")]
    assert document["compensate"] == "ridge"
    assert all(row["milliseconds"] is None and row["accuracy"] < 0 for row in document["rows"])
    assert all(f"{row['accuracy']:.4f}" in result.stdout for row in document["rows"])
    assert "Wrote fxprune-sweep/results.json and fxprune-sweep/results.png." in flat(result.stdout)


def test_sweep_leaves_out_what_cannot_be_reached(scored):
    pytest.importorskip("matplotlib")
    content = done(*SWEEP, "--macs", "0.01,0.9", "--time-batch", "0")
    assert [row["name"] for row in content["rows"]] == ["original", "macs 0.9"]
    assert content["warnings"][0].startswith("left out: --macs 0.01 asks for 1.0% of the MACs, but ")
    result = invoke(*SWEEP, "--macs", "0.01")
    assert result.exit_code == 1
    assert "Error: --macs 0.01 asks for 1.0% of the MACs" in result.stderr


def test_compress_shows_the_report(project):
    result = invoke("compress", "mynets:build", *DATA, "--macs", "0.6", "--compensate", "none", "--min-keep", "2")
    assert result.exit_code == 0
    small = fxprune.load("small.safetensors", build=True)
    shown, wanted = (
        [line.rstrip() for line in text.splitlines()] for text in (result.stdout, str(fxprune.report(small)))
    )
    assert shown[1:-1] == wanted
    assert result.stdout.endswith("Wrote small.safetensors.\n")
