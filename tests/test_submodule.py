"""Pruning a named part of a model that cannot be captured as a whole, by the whole model's loss."""

from __future__ import annotations

import copy
import json
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from detectors import BATCHES, OPTIONS, check_parts, classes_of, detector, pyramid_input, run
from helpers import parameters, picture, same_picture, squares, width
from nets import layers
from torch import Tensor, nn
from zoo.case import conv, randomise

import fxprune
from fxprune.errors import CalibrationError, CaptureError, FxpruneError

U_SCORE = OPTIONS | {"propose": "separability"}


def test_compress_prunes_the_part_by_the_loss_of_the_whole() -> None:
    model = detector()
    model.norm.eval()
    handle = model.backbone.register_forward_hook(lambda *_: None)
    before = picture(model)
    small = fxprune.compress(model, BATCHES, 0.3, **OPTIONS)
    assert same_picture(before, picture(model))
    handle.remove()
    check_parts(model, small)
    assert width(small, "backbone.stem.0") < 8
    assert width(small, "backbone.fine") == width(small, "backbone.coarse") == 6
    modes = {name: module.training for name, module in small.named_modules()}
    assert all(modes[name] == module.training for name, module in model.named_modules() if name in modes)
    assert len(small.eval()(BATCHES[0][0])) == 3
    assert same_picture(copy.deepcopy(small).state_dict(), small.state_dict())


def test_the_stages_one_by_one(tmp_path: Path) -> None:
    model = detector()
    fxprune.score(model, BATCHES, **OPTIONS).save(tmp_path / "scores")
    fxprune.Scores.load(tmp_path / "scores").plan(alpha=0.3).save(tmp_path / "plan")
    plan = fxprune.Plan.load(tmp_path / "plan")
    assert plan.submodule == "backbone"
    assert set(plan.keep) == {"stem.0", "body.0", "fine", "coarse"}
    small = fxprune.apply(detector(), plan)
    check_parts(model, small)
    assert fxprune.verify(model, plan, small, pyramid_input()) < 1e-4
    whole = fxprune.compress(model, BATCHES, 0.3, compensate="none", **OPTIONS)
    assert same_picture(small.state_dict(), whole.state_dict())


def test_the_report_is_of_the_part() -> None:
    model = detector()
    small = fxprune.compress(model, BATCHES, 0.3, **OPTIONS)
    report = fxprune.report(small)
    assert report == fxprune.report(small.backbone)
    assert report.model == "Detector.backbone"
    assert (report.params_before, report.params_after) == (parameters(model.backbone), parameters(small.backbone))
    assert report.whole == (parameters(model), parameters(small))
    assert report.error is not None
    assert "Detector.backbone at alpha 0.3" in str(report)
    assert f"{parameters(model):,}" in str(report)
    assert json.loads(json.dumps(report.to_dict()))["whole"] == [parameters(model), parameters(small)]


def test_r_scores_are_those_of_the_whole_models_loss() -> None:
    """Closing a unit's gate changes the loss by its R-Score, to first order; the part stays in eval mode meanwhile."""
    torch.manual_seed(0)
    model = nn.Sequential(OrderedDict(part=nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 3))))
    model.append(nn.Linear(3, 2))
    randomise(model)
    x, y = torch.randn(6, 4), torch.arange(6) % 2
    whole = fxprune.score(model, [(x, y)], progress=False, exclude=["part.2"])
    for options in ({}, {"run": lambda m, x, y: F.cross_entropy(m.train()(x), y)}):
        part = fxprune.score(model, [(x, y)], submodule="part", progress=False, **options)
        assert part.protect == pytest.approx(whole.protect[: len(part.protect)])
        assert part.propose == pytest.approx(whole.propose[: len(part.propose)])


def test_run_without_a_submodule() -> None:
    model = randomise(nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)))
    batches = [({"x": torch.randn(7, 4), "w": 2.0}, torch.arange(7) % 3)]
    by_run = fxprune.score(
        model, batches, run=lambda m, inputs, y: F.cross_entropy(m(inputs["x"]), y) * inputs["w"], progress=False
    )
    plain = fxprune.score(model, [(batches[0][0]["x"], batches[0][1])], progress=False)
    assert by_run.protect == pytest.approx(2 * plain.protect)
    assert by_run.plan(0.3).submodule == ""


def test_a_part_reached_under_two_names_is_replaced_under_both() -> None:
    class Twins(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left = self.right = randomise(nn.Sequential(conv(3, 8), nn.ReLU(), conv(8, 4)))
            self.others = [self.left]

        def forward(self, x: Tensor) -> Tensor:
            both = self.left(x) + self.right(x.flip(3)) if float(x.sum()) > 0 else self.left(x)
            return both.mean((2, 3))

    model = Twins()
    small = fxprune.compress(
        model, [(torch.rand(8, 3, 6, 6), torch.arange(8) % 4)], 0.5, submodule="left", progress=False
    )
    assert small.left is small.right is small.others[0]
    assert width(small, "right.0") < 8
    assert len(list(small.state_dict())) == len(list(model.state_dict()))


@pytest.mark.parametrize("what", ["layer", "weight"])
def test_what_the_rest_shares_with_the_part_is_an_error(what: str) -> None:
    model = detector()
    if what == "layer":
        model.shortcut = model.backbone.body
    else:
        model.head.weight = nn.Parameter(torch.zeros(10, 8, 3, 3))
        model.backbone.body[0].weight = model.head.weight
    name = {"layer": r"backbone\.body is also shortcut", "weight": r"backbone\.body\.0\.weight is also head\.weight"}
    with pytest.raises(FxpruneError, match=name[what] + ".*: name a submodule that holds both"):
        fxprune.compress(model, BATCHES, **OPTIONS)


@pytest.mark.parametrize(
    ("name", "hint"),
    [("backbon", "; close names: 'backbone'"), ("zzz", "; names are 'backbone', 'norm', 'head', 'noise'$")],
)
def test_an_unknown_name_is_an_error(name: str, hint: str) -> None:
    with pytest.raises(FxpruneError, match=f"submodule is '{name}', but Detector has no module of that name{hint}"):
        fxprune.compress(detector(), BATCHES, submodule=name)


def test_a_part_that_is_not_called_is_an_error() -> None:
    model = detector()
    model.spare = conv(3, 4)
    with pytest.raises(CaptureError, match=r"Detector\.spare is not called by a forward pass .*: name a module that"):
        fxprune.compress(model, BATCHES, **OPTIONS | {"submodule": "spare"})


def test_a_model_that_fails_before_its_part_is_an_error() -> None:
    with pytest.raises(CaptureError, match=r"Detector fails on the loader's first batch \(TypeError: .*pass unpack="):
        fxprune.compress(detector(), BATCHES, submodule="backbone")


def test_a_part_without_tensor_outputs_is_an_error() -> None:
    class Names(nn.Module):
        def forward(self, x: Tensor) -> str:
            return "none"

    @layers(lambda: dict(part=Names(), head=nn.Linear(4, 2)))
    def Model(self, x: Tensor) -> Tensor:
        assert self.part(x) == "none"
        return self.head(x)

    batches = [(torch.randn(4, 4), torch.arange(4) % 2)]
    with pytest.raises(FxpruneError, match="output holds no tensor of floats"):
        fxprune.compress(Model(), batches, submodule="part", progress=False)


def test_a_run_that_fails_is_an_error() -> None:
    def broken(model: Any, images: Any, targets: Any) -> Any:
        model.eval()(images)
        raise ValueError("no loss here")

    with pytest.raises(CalibrationError, match=r"run= fails on batch 0 \(ValueError: no loss here\): it is called as"):
        fxprune.compress(detector(), BATCHES, **OPTIONS | {"run": broken})


def test_a_part_that_is_left_out_of_a_later_batch_is_an_error() -> None:
    def sometimes(model: Any, images: Any, targets: Any) -> Tensor:
        return run(model, images, targets) if len(images) == 3 else model.head.weight.sum()

    with pytest.raises(CalibrationError, match=r"Detector\.backbone was not called on batch 1"):
        fxprune.score(detector(), BATCHES, **OPTIONS | {"run": sometimes})


def test_a_part_that_sees_other_rows_than_the_batch_is_an_error_with_a_remedy() -> None:
    def twice(model: Any, images: Any, targets: Any) -> Tensor:
        return run(model, images * 2, targets * 2)

    with pytest.raises(CalibrationError, match="runs on 6 samples, but the batch has classes for 3: pass classes="):
        fxprune.score(detector(), BATCHES, **U_SCORE | {"run": twice})
    scores = fxprune.score(detector(), BATCHES, **U_SCORE | {"run": twice, "classes": lambda t: classes_of(t * 2)})
    assert scores.about["samples"] == 10


def test_a_part_that_is_called_several_times_is_sampled_at_the_first_call() -> None:
    def again(model: Any, images: Any, targets: Any) -> Tensor:
        return run(model, images, targets) + squares(model.backbone(torch.rand(1, 3, 7, 7)))

    once, twice = (fxprune.score(detector(), BATCHES, **OPTIONS | {"run": which}) for which in (run, again))
    assert twice.example == once.example == [{"tensor": [2, 3, 12, 12], "dtype": "float32"}]
    assert (twice.propose == once.propose).all()
    assert (twice.protect != once.protect).any()


def test_two_parts_in_turn() -> None:
    model = detector()
    model.head = nn.Sequential(conv(6, 12, 1), nn.ReLU(), conv(12, 4, 1))
    first = fxprune.compress(model, BATCHES, 0.3, **OPTIONS)
    both = fxprune.compress(first, BATCHES, 0.3, **OPTIONS | {"submodule": "head"})
    assert (width(first, "head.0"), type(first.head)) == (12, nn.Sequential)
    assert width(both, "head.0") < 12
    assert parameters(both.backbone) == parameters(first.backbone) < parameters(model.backbone)
    assert fxprune.report(both.backbone).model == "Detector.backbone"
    assert fxprune.report(both.head).whole == (parameters(first), parameters(both))
    again = fxprune.compress(both, BATCHES, 0.3, **OPTIONS)
    assert parameters(again.backbone) < parameters(both.backbone)


def test_nan_in_the_part_is_named() -> None:
    model = detector()
    with torch.no_grad():
        model.backbone.stem[0].weight[0] = torch.nan
    with pytest.raises(CalibrationError, match=r"the loss of batch 0 is nan: the output of stem\.0 holds NaN"):
        fxprune.score(model, BATCHES, **OPTIONS)


def test_targets_of_detectors_need_classes() -> None:
    with pytest.raises(CalibrationError, match=r"the targets are a list, .* pass classes=, .* such as lambda targets"):
        fxprune.score(detector(), BATCHES, **U_SCORE | {"classes": None})
    with pytest.raises(CalibrationError, match=r"classes= fails on the targets of a batch \(KeyError: 'label'\)"):
        fxprune.score(detector(), BATCHES, **U_SCORE | {"classes": lambda t: t[0]["label"]})
    with pytest.raises(CalibrationError, match="classes= gave an int"):
        fxprune.score(detector(), BATCHES, **U_SCORE | {"classes": len})


def test_samples_that_nobody_collated() -> None:
    pairs = [list(zip(*batch, strict=True)) for batch in BATCHES]
    with pytest.raises(CalibrationError, match=r"not a pair .*: pass unpack=lambda batch: tuple\(zip\(\*batch\)\)"):
        fxprune.score(detector(), pairs, **OPTIONS)
    collated = fxprune.score(detector(), pairs, **OPTIONS, unpack=lambda batch: tuple(zip(*batch, strict=True)))
    assert (collated.protect == fxprune.score(detector(), BATCHES, **OPTIONS).protect).all()


def test_a_run_without_gradients_is_an_error() -> None:
    with pytest.raises(CalibrationError, match=r"the loss does not depend on Detector\.backbone: .* torch\.no_grad"):
        fxprune.score(detector(), BATCHES, **OPTIONS | {"run": torch.no_grad()(run)})


def test_a_run_that_returns_no_number_is_an_error() -> None:
    with pytest.raises(CalibrationError, match="the loss of batch 0 has type dict: it must be one number"):
        fxprune.score(detector(), BATCHES, **OPTIONS | {"run": lambda m, images, targets: m.train()(images, targets)})


class Part(nn.Module):
    """Two layers, with a factor between them."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.scale = conv(3, 8), conv(8, 6), 1.0
        self.film: Any = None

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x).relu() * self.scale
        return self.b(h if self.film is None else h * self.film)

    def of(self) -> float:
        return float(type(self).weight_of(self))

    def weight_of(self) -> Tensor:
        return self.a.weight.sum()


class Whole(nn.Module):
    """Calls its part in a way of a test's."""

    def __init__(self, way: Any) -> None:
        super().__init__()
        self.part, self.head, self.way = Part(), nn.Linear(6, 4), way

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.way(self.part, x).mean((2, 3)))


def with_attribute(name: str, value: Any) -> Any:
    def way(part: Any, x: Tensor) -> Tensor:
        before = getattr(part, name)
        setattr(part, name, value(x))
        y: Tensor = part(x)
        setattr(part, name, before)
        return y

    return way


TREATED: dict[str, tuple[Any, str]] = {
    "set": (with_attribute("scale", lambda x: 3.0), r"when it is called \(by 0.* after scale was set on it"),
    "computed": (with_attribute("film", lambda x: x.mean((1, 2, 3)).view(-1, 1, 1, 1)), "after film was set on it"),
    "asked": (lambda part, x: part(x) * (2 if isinstance(part, Part) else 1), r"it gives other outputs \(by 0"),
    "reached": (lambda part, x: part(x) + Part.of(part), "with the graph in its place, it fails"),
}


@pytest.mark.parametrize("name", TREATED)
@pytest.mark.parametrize("options", [{}, {"run": lambda m, x, y: F.cross_entropy(m.train()(x), y)}])
def test_what_the_rest_does_to_its_part_is_refused(name: str, options: Any) -> None:
    way, text = TREATED[name]
    batches = [(torch.randn(4, 3, 8, 8), torch.arange(4)), (torch.randn(4, 3, 8, 8), torch.arange(4))]
    with pytest.raises(CaptureError, match=f"the rest of Whole treats part in a way that a graph cannot.*{text}"):
        fxprune.compress(Whole(way).eval(), batches, 0.3, submodule="part", progress=False, **options)


def test_a_part_that_torch_vectorises_is_refused() -> None:
    model = Whole(lambda part, x: torch.vmap(lambda z: part(z[None])[0])(x)).eval()
    with pytest.raises(CaptureError, match=r"Whole.part is called inside of torch.vmap, .*: name a submodule that"):
        fxprune.score(model, [(torch.randn(4, 3, 8, 8), torch.arange(4))], submodule="part", progress=False)


# -- how the rest of a model may call its part, and what it may ask of it ----------------------------------------------


class Asked(Part):
    """A part with more than a forward."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.config = nn.Embedding(9, 3), Settings(gain=2.0)

    def forward(self, x: Tensor, mask: Tensor | None = None, **more: Tensor) -> Tensor:
        y = super().forward(x) + more.get("shift", 0)
        return y if mask is None else y * mask

    def encoded(self, x: Tensor) -> Tensor:
        return self(x).tanh()

    def get_input_embeddings(self) -> nn.Module:
        return self.table

    @property
    def gain(self) -> float:
        return self.config.gain

    @staticmethod
    def halved(x: Tensor) -> Tensor:
        return x / 2


class Settings:
    """A configuration of a class of its own."""

    def __init__(self, gain: float) -> None:
        self.gain = gain


def _embedded(part: Any, x: Tensor) -> Tensor:
    rows: Tensor = part.get_input_embeddings()(x.abs().mean((1, 2, 3)).long())
    y: Tensor = part(x + rows[:, :, None, None])
    return y


CALLS: dict[str, Any] = {
    "by its forward": lambda part, x: part.forward(x),
    "by its forward and by name": lambda part, x: part.forward(mask=x[:, :1].sigmoid(), x=x),
    "by names that only its star takes": lambda part, x: part(x=x, shift=x[:, :1]),
    "by a star, beside one without a name": lambda part, x: part(x, None, shift=x[:, :1]),
    "by another method": lambda part, x: part.encoded(x),
    "its table": _embedded,
    "a property": lambda part, x: part(x) * part.gain,
    "a static method": lambda part, x: part.halved(part(x)),
    "an object of its own": lambda part, x: part(x) * part.config.gain,
    "whether it has a method": lambda part, x: part(x) * (2 if hasattr(part, "encoded") else 1),
}


class Asking(Whole):
    """As the other, with the part that has more to ask for."""

    def __init__(self, way: Any) -> None:
        super().__init__(way)
        self.part = Asked()


@pytest.mark.parametrize("name", CALLS)
def test_the_rest_may_call_its_part_so(name: str) -> None:
    torch.manual_seed(0)
    model = Asking(CALLS[name]).eval()
    batches = [(torch.randn(4, 3, 8, 8), torch.arange(4)), (torch.randn(4, 3, 8, 8), torch.arange(4))]
    small = fxprune.compress(model, batches, 1.0, submodule="part", compensate="none", progress=False)
    assert width(small, "part.a") < 8
    assert fxprune.report(small).error is not None
    twin = copy.deepcopy(small)
    with torch.no_grad():
        zeroed = copy.deepcopy(model)
        plan = small.part.meta["fxprune"]["plan"]
        gone = [unit for unit in range(8) if unit not in plan.keep["a"]]
        zeroed.part.b.weight[:, gone] = 0
        assert torch.allclose(zeroed(batches[0][0]), small(batches[0][0]), atol=1e-5)
        assert torch.equal(twin(batches[0][0]), small(batches[0][0]))


def test_a_layer_of_the_part_that_runs_alone_is_refused() -> None:
    """Its width may change, and the rest would take other channels for the first ones."""
    model = Asking(lambda part, x: part(x) + part.a(x)[:, :6]).eval()
    batches = [(torch.randn(4, 3, 8, 8), torch.arange(4))] * 2
    with pytest.raises(CaptureError, match="it runs a of it alone, which the graph may narrow"):
        fxprune.compress(model, batches, 0.3, submodule="part", progress=False)


class Features(nn.Module):
    """A forward that takes one dict, writes into it, and gives it back, as those of sentence embeddings do."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.a, self.b = nn.Embedding(9, 6), nn.Linear(6, 12), nn.Linear(12, 4)

    def forward(self, features: dict[str, Any]) -> dict[str, Any]:
        rows = self.a(self.table(features["numbers"])).relu()
        features.update(rows=rows)
        features["mean"] = (features["rows"] * features["mask"][..., None]).mean(1)
        features["result"] = self.b(features.pop("mean"))
        assert "mean" not in features
        return {**features, "keys": len(features)}


def test_a_forward_that_takes_one_dict_and_writes_into_it() -> None:
    features = sentences()
    model = Features().eval()
    with pytest.warns(fxprune.FxpruneWarning, match="the forward of Features writes into its input"):
        small = fxprune.compress(
            model, [((features,), torch.arange(4))] * 2, 1.0, loss=lambda y, _: y["result"].square().mean(),
            compensate="none", progress=False,
        )  # fmt: skip
    assert sorted(features) == ["mask", "numbers"]
    assert width(small, "a") == 12  # its maps are given, too
    without_columns(model.table, small.meta["fxprune"]["plan"].keep["table"])
    given, wanted = small(dict(features)), model(dict(features))
    assert list(given) == list(wanted)
    assert given["keys"] == wanted["keys"] == 4
    assert torch.allclose(given["result"], wanted["result"], atol=1e-6)


def test_a_part_that_takes_one_dict() -> None:
    class Sentences(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = Features(), nn.Linear(4, 3)

        def forward(self, numbers: Tensor, mask: Tensor) -> Tensor:
            return self.last(self.first({"numbers": numbers, "mask": mask})["result"])

    batch, model = (sentences(), torch.arange(4) % 3), Sentences().eval()
    with pytest.warns(fxprune.FxpruneWarning, match="the forward of Features writes into its input"):
        small = fxprune.compress(model, [batch] * 2, 1.0, submodule="first", compensate="none", progress=False)
    without_columns(model.first.table, small.first.meta["fxprune"]["plan"].keep["table"])
    assert torch.allclose(model(**batch[0]), small(**batch[0]), atol=1e-6)


def sentences() -> dict[str, Tensor]:
    numbers = torch.randint(0, 9, (4, 5), generator=torch.Generator().manual_seed(0))
    return {"numbers": numbers, "mask": (numbers > 2).float()}


@torch.no_grad()
def without_columns(table: nn.Embedding, kept: tuple[int, ...]) -> None:
    """Set the columns that are not kept to zero."""
    assert len(kept) < table.embedding_dim
    table.weight[:, [column for column in range(table.embedding_dim) if column not in kept]] = 0
