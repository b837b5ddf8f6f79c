"""Classes of samples and of positions: regressions, masks, texts and detections, and data without any targets."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from detectors import BATCHES as DETECTED
from detectors import OPTIONS, detector
from helpers import outputs, squares
from scipy.stats import wasserstein_distance
from torch import Tensor, nn
from zoo import ZOO, images
from zoo.case import randomise

import fxprune
from fxprune.caller.classes import bins, each_position, frequency_bins, majority, majority_class, quantile_bins
from fxprune.errors import CalibrationError
from fxprune.scoring.position_classes import ClassMap, first_of_each, resized


def score(model: nn.Module, batches: Any, **options: Any) -> fxprune.Scores:
    """The U-Score proposes: the one signal that looks at classes."""
    return fxprune.score(model, batches, propose="separability", progress=False, **options)


def units(scores: fxprune.Scores, site: str) -> Any:
    return {s.name: s.units for s in scores.sites}[site]


def largest_distance(values: Tensor, labels: Tensor) -> float:
    """The largest exact W1 between the values of two classes."""
    parts = [values[labels == label].numpy() for label in labels.unique() if label >= 0]
    return max(wasserstein_distance(a, b) for a in parts for b in parts)


# -- masks -------------------------------------------------------------------------------------------------------------


class Segmenter(nn.Module):
    """A map at full size, one at half, a gate made of the mean over all positions, and logits at full size."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 10, 3, stride=2, padding=1)
        self.squeeze, self.excite = nn.Linear(10, 6), nn.Linear(6, 10)
        self.head = nn.Conv2d(10, 4, 1)

    def full(self, x: Tensor) -> Tensor:
        return F.relu(self.a(x))

    def half(self, x: Tensor) -> Tensor:
        y = F.relu(self.b(self.full(x)))
        return y * torch.sigmoid(self.excite(F.relu(self.squeeze(y.mean((2, 3))))))[:, :, None, None]

    def forward(self, x: Tensor) -> Tensor:
        return F.interpolate(self.head(self.half(x)), scale_factor=2.0)


def segmenter() -> Segmenter:
    torch.manual_seed(1)
    return randomise(Segmenter()).double().eval()  # type: ignore[return-value]


def masks(count: int = 6, size: int = 8) -> tuple[Tensor, Tensor]:
    """Images with a mask of four classes in blocks, some of it to be ignored, that the pixels depend on."""
    generator = torch.Generator().manual_seed(2)
    labels = torch.randint(0, 4, (count, size // 4, size // 4), generator=generator)
    labels = labels.repeat_interleave(4, 1).repeat_interleave(4, 2)
    labels[:, :2, :3] = 255
    x = torch.randn(count, 3, size, size, generator=generator, dtype=torch.float64)
    x[:, 0] += labels.clamp(max=4)
    return x, labels


def in_batches(x: Any, y: Any, size: int = 4) -> list[Any]:
    return list(zip(x.split(size), y.split(size), strict=True))


def masked_loss(output: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(output, target, ignore_index=255)


MASKS = {"loss": masked_loss, "classes": each_position()}


def test_the_u_score_of_positions_is_exact() -> None:
    """All positions take part where `samples_per_class` allows it; the class map follows the size of the edge."""
    model, (x, y) = segmenter(), masks()
    scores = score(model, in_batches(x, y), samples_per_class=10_000, **MASKS)
    with torch.no_grad():
        full, half = model.full(x).movedim(1, -1).flatten(0, 2), model.half(x).movedim(1, -1).flatten(0, 2)
    small = y[:, 1::2, 1::2]
    for channel, unit in enumerate(units(scores, "a")):
        assert scores.propose[unit] == pytest.approx(largest_distance(full[:, channel], drop(y)), rel=1e-6)
    alone = score(model, in_batches(x, y), samples_per_class=10_000, loss=masked_loss, classes=majority_class())
    assert not np.allclose(scores.propose, alone.propose)
    with torch.no_grad():
        squeezed = F.relu(model.b(model.full(x))).mean((2, 3))
    by_sample = majority(torch.where(y == 255, -1, y))
    for channel, unit in enumerate(units(scores, "b")):
        expected = largest_distance(half[:, channel], drop(small)) + largest_distance(squeezed[:, channel], by_sample)
        assert scores.propose[unit] == pytest.approx(expected, rel=1e-6)


def drop(labels: Tensor) -> Tensor:
    return torch.where(labels == 255, -1, labels).flatten()


def test_positions_are_drawn_from_the_whole_loader_whatever_its_batches() -> None:
    model, (x, y) = segmenter(), masks(12)
    one, two, three = (score(model, in_batches(x, y, size), samples_per_class=7, **MASKS) for size in (12, 5, 1))
    assert np.allclose(one.propose, two.propose)
    assert np.allclose(one.propose, three.propose)
    other = score(model, in_batches(x, y, 12), samples_per_class=7, seed=1, **MASKS)
    assert not np.allclose(one.propose, other.propose)
    head = score(model, in_batches(x[:2], y[:2]), samples_per_class=7, **MASKS)
    assert not np.allclose(one.propose, head.propose)


# -- where positions correspond ----------------------------------------------------------------------------------------

STEPS, WIDTH = 6, 5


class Steps(nn.Module):
    """A sequence model in one of several spellings of the same function."""

    def __init__(self, spelling: str) -> None:
        super().__init__()
        self.spelling = spelling
        self.a, self.b = nn.Linear(3, WIDTH), nn.Linear(WIDTH, 4)

    def forward(self, x: Tensor) -> Tensor:
        if self.spelling == "flat":
            return self.b(F.relu(self.a(x.reshape(-1, 3)))).reshape(-1, STEPS, 4)
        if self.spelling == "time first":
            return self.b(F.relu(self.a(x.transpose(0, 1)))).transpose(0, 1)
        if self.spelling == "windows":
            return self.b(F.relu(self.a(x.reshape(-1, 2, 3)))).reshape(-1, STEPS, 4)
        return self.b(F.relu(self.a(x)))


def steps(spelling: str) -> nn.Module:
    torch.manual_seed(0)
    return randomise(Steps(spelling)).double()


TAGS = torch.randint(0, 3, (9, STEPS), generator=torch.Generator().manual_seed(5))
SIGNALS = torch.randn(9, STEPS, 3, generator=torch.Generator().manual_seed(4), dtype=torch.float64)


def tagged(output: Tensor, tags: Tensor) -> Tensor:
    return F.cross_entropy(output.movedim(-1, 1), tags)


@pytest.mark.parametrize("spelling", ["plain", "flat", "time first"])
def test_steps_have_classes_wherever_their_axis_lies(spelling: str) -> None:
    scores = score(
        steps(spelling), in_batches(SIGNALS, TAGS), loss=tagged, classes=each_position(), samples_per_class=99
    )
    with torch.no_grad():
        hidden = F.relu(steps("plain").a(SIGNALS)).flatten(0, 1)  # type: ignore[operator]
    expected = [largest_distance(hidden[:, channel], TAGS.flatten()) for channel in range(WIDTH)]
    assert scores.propose[units(scores, "a")] == pytest.approx(expected, rel=1e-6)


def test_windows_are_no_steps() -> None:
    """Where a sample has several rows of several places each, its own class is taken."""
    one, two = (
        score(steps("windows"), in_batches(SIGNALS, TAGS), loss=tagged, classes=classes)
        for classes in (each_position(), lambda tags: majority(tags))
    )
    assert np.array_equal(one.propose, two.propose)


# -- texts -------------------------------------------------------------------------------------------------------------


@pytest.mark.wide
@pytest.mark.filterwarnings("ignore")  # of transformers
def test_a_language_model_is_compressed_by_the_frequency_of_the_next_token() -> None:
    T = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = T.GPT2Config(vocab_size=40, n_embd=16, n_layer=2, n_head=4, n_positions=16, use_cache=False)
    model = T.GPT2LMHeadModel(config).eval()
    tokens = (torch.rand(12, 10, generator=torch.Generator().manual_seed(3)) ** 3 * 40).long()
    batches = [{"input_ids": part, "labels": part} for part in tokens.split(5)]

    def loss(output: Any, targets: Tensor) -> Tensor:
        return F.cross_entropy(output.logits[:, :-1].flatten(0, 1), targets[:, 1:].flatten())

    options = {"loss": loss, "classes": frequency_bins(batches, bins=4), "samples_per_class": 9}
    scores = score(model, batches, **options)
    assert scores.about["classes"] == 4
    assert np.isfinite(scores.propose).all()
    with torch.no_grad():
        hidden = model.transformer.h[0].mlp.act(model.transformer.h[0].mlp.c_fc(torch.zeros(1, 16)))
    assert hidden.shape[1] == len(units(scores, "transformer.h.0.mlp.c_fc"))
    assert (scores.propose[units(scores, "transformer.h.0.mlp.c_fc")] > 0).all()
    small = fxprune.compress(model, batches, 0.3, propose="separability", progress=False, **options)
    assert fxprune.report(small).params_after < fxprune.report(small).params_before
    assert small(input_ids=tokens).logits.shape == (12, 10, 40)


def test_the_next_token_has_the_bin() -> None:
    counts = torch.tensor([60, 30, 10])
    tokens = torch.tensor([[0, 1, 2, -100, 0, 9]])
    assert frequency_bins(counts, bins=2)(tokens).tolist() == [[1, 1, -1, 0, 1, -1]]
    assert frequency_bins(counts, bins=2, shift=False)(tokens).tolist() == [[0, 1, 1, -1, 0, 1]]
    assert frequency_bins(counts, bins=2, shift=False, ignore=0)(tokens).tolist() == [[-1, 1, 1, -1, -1, 1]]
    padded = [(tokens, torch.tensor([[0, 0, 0, 1, 2, -100]]))]
    assert frequency_bins(padded, bins=2, shift=False, ignore=0)(tokens).tolist() == [[-1, 0, 1, -1, -1, 1]]


# -- regressions -------------------------------------------------------------------------------------------------------


def test_a_regression_is_compressed_by_the_quantiles_of_its_targets() -> None:
    """Diabetes progression: what the two scores leave explains more than what chance leaves."""
    data = pytest.importorskip("sklearn.datasets").load_diabetes()
    x = torch.from_numpy(data.data).float() * 20
    y = torch.from_numpy((data.target - data.target.mean()) / data.target.std()).float()[:, None]
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, weight_decay=0.1)
    for _ in range(150):
        optimizer.zero_grad()
        F.mse_loss(model(x[:300]), y[:300]).backward()
        optimizer.step()
    batches = in_batches(x[:300], y[:300], 100)
    scores = score(model, batches, loss=F.mse_loss, classes=quantile_bins(batches, count=4))
    assert (scores.about["classes"], scores.about["samples"]) == (4, 300)

    def error(network: nn.Module) -> float:
        return float(F.mse_loss(outputs(network, x[300:])[0], y[300:]))

    found = error(fxprune.apply(model, scores.plan(alpha=0.1)))
    chance = [
        error(fxprune.apply(model, fxprune.Scores.random(model, x[:2], seed=s).plan(alpha=0.1))) for s in range(7)
    ]
    assert found < np.median(chance)


def test_quantile_bins_are_those_of_the_whole_loader() -> None:
    values = torch.tensor([5.0, 1, 9, 3, float("nan"), 7, 2, 8, 6, 4])
    classes = quantile_bins([(values, values[:5]), (values, values[5:])], count=3)
    assert classes(values).tolist() == [1, 0, 2, 0, -1, 2, 0, 2, 1, 1]
    assert classes(values[:, None]).shape == (10,)
    assert classes(values.reshape(2, 5)[:, :, None].expand(2, 5, 3)).shape == (2, 5, 3)
    mixed = quantile_bins([(values, {"age": values})], count=3, of=lambda targets: targets["age"])
    assert torch.equal(mixed({"age": values}), classes(values))
    skewed = torch.tensor([0.0] * 9 + [1, 2])
    assert quantile_bins([(skewed, skewed)], count=10)(skewed).tolist() == [0] * 9 + [1, 1]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: bins([]), r"the edges of bins are \[\]: give one or more rising finite numbers"),
        (lambda: bins([1.0, 1.0]), r"the edges of bins are \[1.0, 1.0\]"),
        (lambda: bins([float("nan")]), r"the edges of bins are \[nan\]"),
        (lambda: quantile_bins([(0, torch.ones(4))]), "the 4 finite targets of the loader fall into one bin"),
        (lambda: quantile_bins([(0, torch.full((4,), float("nan")))]), "the 0 finite targets of the loader fall"),
        (lambda: quantile_bins([(0, [1.0])]), "the targets are a list, not a number a sample: pass of="),
        (lambda: quantile_bins([(0, torch.tensor(1.0))]), r"the targets have shape \(\), not a number a sample"),
        (lambda: quantile_bins([(0, torch.ones(4))], count=1), "count is 1: the U-Score compares at least two classes"),
        (lambda: quantile_bins([]), "the loader gives no batch"),
        (
            lambda: frequency_bins([(0, torch.ones(4))]),
            "the targets are a Tensor of torch.float32, not a tensor of tok",
        ),
        (lambda: frequency_bins([torch.ones(4)]), "the targets are a NoneType, not a tensor of tokens: pass unpack="),
        (lambda: frequency_bins(torch.zeros(4)), r"the occurrences of tokens have shape \(4,\) and sum 0"),
        (lambda: frequency_bins(torch.ones(4), bins=1), "bins is 1: the U-Score compares at least two"),
    ],
)
def test_bins_that_cannot_be_made(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(CalibrationError, match=message):
        make()


# -- detections --------------------------------------------------------------------------------------------------------


def painted(targets: Any, side: int = 12) -> Tensor:
    """The label of the box that each pixel lies in; 0 where in none."""
    maps = torch.zeros(len(targets), side, side, dtype=torch.int64)
    for target, place in zip(targets, maps, strict=True):
        for (x0, y0, x1, y1), label in zip(target["boxes"].long().tolist(), target["labels"], strict=True):
            place[y0:y1, x0:x1] = label
    return maps


def test_a_detector_has_classes_of_images_or_of_pixels() -> None:
    model, options = detector(), OPTIONS | {"propose": "separability"}
    by_image = fxprune.score(model, DETECTED, **options)
    by_pixel = fxprune.score(model, DETECTED, **options | {"classes": painted})
    assert np.array_equal(by_image.protect, by_pixel.protect)
    assert by_pixel.about["classes"] == by_image.about["classes"] + 1
    assert not np.allclose(by_image.propose, by_pixel.propose)
    small = fxprune.compress(model, DETECTED, 0.3, **options | {"classes": painted})
    assert fxprune.report(small).params_after < fxprune.report(small).params_before


# -- samples that are left out, and data without targets ---------------------------------------------------------------

IMAGES, LABELS = images()(24), torch.arange(24) % 5


def test_samples_with_negative_classes_are_left_out_of_the_u_score_only() -> None:
    model = ZOO["residual"].build().eval()
    some = torch.where(LABELS == 3, -1, LABELS)
    found = score(model, [(IMAGES, (LABELS, some))], classes=lambda t: t[1], loss=lambda o, t: F.cross_entropy(o, t[0]))
    kept = LABELS != 3
    whole, rest = score(model, [(IMAGES, LABELS)]), score(model, [(IMAGES[kept], LABELS[kept])])
    assert np.array_equal(found.protect, whole.protect)
    assert np.allclose(found.propose, rest.propose, rtol=1e-4)
    assert (found.about["classes"], found.about["samples"]) == (4, 24)


def test_nothing_but_negative_classes() -> None:
    with pytest.raises(
        CalibrationError, match=r"all 24 samples of the loader are left out by a negative class; .* two"
    ):
        score(ZOO["residual"].build(), [(IMAGES, LABELS)], classes=lambda t: -1 - t)


@pytest.mark.parametrize("batch", [IMAGES, (IMAGES,), [IMAGES], {"x": IMAGES, "labels": None}])
def test_batches_without_targets_need_classes(batch: Any) -> None:
    with pytest.raises(
        CalibrationError, match="the batches have no targets, and the U-Score compares classes: pass cl"
    ):
        score(ZOO["residual"].build(), [batch], loss=squares)


def test_classes_can_come_from_nothing_but_the_inputs() -> None:
    model = ZOO["residual"].build().eval()
    bright = lambda x: (x, (x.mean((1, 2, 3)) > 0).long())  # noqa: E731
    one = score(model, list(IMAGES.split(12)), unpack=bright)
    assert one.about["classes"] == 2
    with pytest.raises(CalibrationError, match=r"classes= fails on the targets of a batch \(AttributeError"):
        score(model, [IMAGES], loss=squares, classes=lambda targets: targets.argmax(1))


def test_targets_of_positions_are_classes_only_where_that_is_said() -> None:
    x, y = masks()
    with pytest.raises(CalibrationError, match=r"the targets have shape \(4, 8, 8\) .* each_position for masks"):
        score(segmenter(), in_batches(x, y), loss=masked_loss)


# -- the parts ---------------------------------------------------------------------------------------------------------


def test_resizing_takes_the_nearest() -> None:
    classes = torch.arange(36).reshape(1, 6, 6)
    assert resized(classes, (3, 2)).tolist() == [[[7, 10], [19, 22], [31, 34]]]
    assert torch.equal(resized(resized(classes, (12, 18)), (6, 6)), classes)


def test_the_first_of_each_class() -> None:
    keys = torch.rand(200, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    labels = torch.arange(200) ** 2 % 11
    kept = first_of_each(labels, keys, 5)
    for label in labels.unique():
        mine = torch.nonzero(labels == label)[:, 0]
        assert set(kept[labels[kept] == label].tolist()) == set(mine[keys[mine].argsort()[:5]].tolist())


def test_positions_are_drawn_uniformly() -> None:
    """Of 40 equal batches, each gives its share of the positions that stay."""
    labels, keys, origins = torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.float64), torch.empty(0)
    for batch in range(40):
        numbers = torch.tensor([2 * batch, 2 * batch + 1])
        classes = ClassMap(torch.zeros(2, 30, 30, dtype=torch.int64), numbers, 400, seed=0)
        places = classes.positions((2, 30, 30))
        assert classes.positions((2, 30, 30)) is places
        labels, keys = torch.cat([labels, places.labels]), torch.cat([keys, places.keys])
        origins = torch.cat([origins, torch.full((len(places.labels),), float(batch))])
        kept = first_of_each(labels, keys, 400)
        labels, keys, origins = labels[kept], keys[kept], origins[kept]
    counts = torch.bincount(origins.long(), minlength=40)
    assert len(labels) == 400
    assert counts.min() >= 1
    assert counts.max() <= 25


def test_classes_for_another_number_of_samples() -> None:
    with pytest.raises(
        CalibrationError, match=r"the classes have shape \(3, 8, 8\) and dtype int64; .* the 24 samples"
    ):
        score(ZOO["residual"].build(), [(IMAGES, LABELS)], classes=lambda t: torch.zeros(3, 8, 8, dtype=torch.int64))
