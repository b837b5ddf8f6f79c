"""Scoring: what loaders may look like, what the scores are, and what is said where they cannot be taken."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import sizes_of_slopes, squares
from nets import layers
from scipy.stats import wasserstein_distance
from torch import Tensor, nn
from zoo import CLASSES, ZOO, images, tensors

import fxprune
from fxprune.errors import CalibrationError, PlanError
from fxprune.scoring.signals.separability import directions

SAMPLES = 30
IMAGES, VECTORS = images()(SAMPLES), tensors(6)(SAMPLES)
LABELS = torch.arange(SAMPLES) % CLASSES


def build(name: str) -> nn.Module:
    return ZOO[name].build().double().eval()


def loader(x: Any = None, y: Tensor = LABELS, sizes: tuple[int, ...] = (12, 12, 6)) -> list[tuple[Any, Tensor]]:
    """Batches of the given sizes."""
    x = IMAGES.double() if x is None else x
    return list(zip(x.split(sizes), y.split(sizes), strict=True))


def score(model: nn.Module, batches: Any, **options: Any) -> fxprune.Scores:
    return fxprune.score(model, batches, progress=False, **options)


def u_score(model: nn.Module, batches: Any, **options: Any) -> fxprune.Scores:
    return score(model, batches, propose="separability", **options)


def equal(a: fxprune.Scores, b: fxprune.Scores) -> bool:
    return bool((a.propose == b.propose).all() and (a.protect == b.protect).all())


# -- the forms of loaders ----------------------------------------------------------------------------------------------


class Windows:
    """A loader of our own: it can be iterated again and again, and has no length."""

    def __init__(self, batches: list[Any]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[Any]:
        return iter(self.batches)


FORMS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "tuple": lambda x, y: (x, y),
    "list": lambda x, y: [x, y],
    "nested": lambda x, y: ((x,), y),
    "labels": lambda x, y: {"x": x, "labels": y},
    "label": lambda x, y: {"x": x, "label": y},
    "targets": lambda x, y: {"targets": y, "x": x},
    "target": lambda x, y: {"x": x, "target": y},
    "another name for the only input": lambda x, y: {"pixel_values": x, "labels": y},
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_every_form_of_batch_gives_the_same_scores(form: Callable[[Tensor, Tensor], Any]) -> None:
    model = build("residual")
    assert equal(score(model, loader()), score(model, Windows([form(x, y) for x, y in loader()])))


def test_unpack_takes_any_batch() -> None:
    model = build("residual")
    odd = [{"meta": 1, "picture": x, "answer": y, "labels": 3} for x, y in loader()]
    scores = score(model, odd, unpack=lambda batch: (batch["picture"], batch["answer"]))
    assert equal(score(model, loader()), scores)


def test_several_inputs_as_tuple_and_as_dict() -> None:
    model = build("several_inputs")
    x, v = IMAGES.double().split(10), VECTORS.double().split(10)
    tuples = [((a, b), y) for a, b, y in zip(x, v, LABELS.split(10), strict=True)]
    dicts = [{"vector": b, "image": a, "labels": y} for (a, b), y in tuples]
    assert equal(score(model, tuples), score(model, dicts))


@pytest.mark.parametrize("sizes", [(30,), (1, 29), (29, 1), (7, 11, 12), (1,) * 30])
def test_batch_sizes_do_not_matter(sizes: tuple[int, ...]) -> None:
    """A last batch of one, uneven batches, one batch: the loss is a mean over the samples, whatever the batches."""
    model = build("residual")
    one, other = u_score(model, loader()), u_score(model, loader(sizes=sizes))
    assert np.allclose(one.propose, other.propose, rtol=1e-5)
    assert np.allclose(one.protect, other.protect, rtol=1e-9)


# -- what the scores are -----------------------------------------------------------------------------------------------


def test_u_score_of_a_linear_layer_is_the_largest_wasserstein_distance() -> None:
    model = build("mlp")
    scores = u_score(model, loader(VECTORS.double()))
    hidden = model[1](model[0](VECTORS.double())).detach().float().numpy()
    sites = {site.name: site.units for site in scores.sites}
    for channel, unit in enumerate(sites["0"]):
        by_class = [hidden[LABELS.numpy() == label, channel] for label in range(CLASSES)]
        expected = max(wasserstein_distance(a, b) for a in by_class for b in by_class)
        assert scores.propose[unit] == pytest.approx(expected, abs=1e-6)


def test_u_score_of_maps_is_the_sliced_distance() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, CLASSES, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )
    scores = u_score(model, loader(IMAGES), projections=8, seed=3)
    maps = model[1](model[0](IMAGES)).detach().flatten(2) @ directions(36, 8, seed=3)
    unit = scores.sites[0].units[2]
    by_class = [maps[label == LABELS, 2].T for label in range(CLASSES)]
    expected = max(
        np.mean([wasserstein_distance(u, v) for u, v in zip(a, b, strict=True)]) for a in by_class for b in by_class
    )
    assert scores.propose[unit] == pytest.approx(expected, rel=1e-4)


def test_u_score_uses_the_first_samples_of_each_class() -> None:
    model = build("residual")
    few = u_score(model, loader(sizes=(10, 20)), samples_per_class=2)
    assert np.array_equal(few.propose, u_score(model, loader(IMAGES.double()[:10], LABELS[:10], sizes=(10,))).propose)
    assert not np.array_equal(few.propose, u_score(model, loader(), samples_per_class=4).propose)


@pytest.mark.parametrize(
    "name", ["mlp", "residual", "squeeze_excite", "concat_spellings", "called_twice", "nhwc_flatten"]
)
def test_r_score_is_the_derivative_of_the_loss_by_the_gate(name: str) -> None:
    """On each edge by itself, by central differences; the sizes are added."""
    model, x = build(name), ZOO[name].example(SAMPLES).double()
    scores = score(model, loader(x), protect="taylor")
    size = sizes_of_slopes(model, x, lambda output: F.cross_entropy(output, LABELS, reduction="sum"))
    units = len(scores.protect)
    for unit in range(0, units, max(1, units // 7)):
        assert scores.protect[unit] == pytest.approx(size(unit), rel=1e-5, abs=1e-7)


def test_r_score_with_a_loss_of_the_users() -> None:
    model = build("residual")
    for protect in ("taylor", "taylor-by-sample"):
        twice = score(model, loader(), loss=lambda output, target: 2 * F.cross_entropy(output, target), protect=protect)
        assert np.allclose(twice.protect, 2 * score(model, loader(), protect=protect).protect)


def test_scores_repeat_bit_for_bit() -> None:
    model = ZOO["concat_spellings"].build()
    assert equal(score(model, loader(IMAGES)), score(model, loader(IMAGES)))


def test_the_seed_moves_the_directions_only() -> None:
    model = build("residual")
    one, two = (u_score(model, loader(), seed=seed) for seed in (1, 2))
    assert np.array_equal(one.protect, two.protect)
    assert not np.array_equal(one.propose, two.propose)
    assert np.corrcoef(one.propose, two.propose)[0, 1] > 0.8


def test_batches_are_left_alone_by_a_model_that_changes_its_input() -> None:
    batches = loader(IMAGES.double().clone())
    first = score(build("changes_its_input"), batches)
    assert torch.equal(torch.cat([x for x, _ in batches]), IMAGES.double())
    assert equal(first, score(build("changes_its_input"), batches))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_the_callers_grad_mode_makes_no_difference(mode: Callable[[], Any]) -> None:
    model = build("residual")
    expected = score(model, loader())
    with mode():
        assert equal(expected, score(model, loader()))


def test_more_classes_than_max_classes_are_sampled() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 30))
    x, y = torch.randn(90, 6), torch.arange(90) % 30
    some = u_score(model, loader(x, y, (45, 45)), max_classes=4)
    assert some.about["classes"] == 4
    assert equal(some, u_score(model, loader(x, y, (45, 45)), max_classes=4))
    every = u_score(model, loader(x, y, (45, 45)))
    assert every.about["classes"] == 30
    assert (some.propose <= every.propose).all()
    assert (some.propose < every.propose).any()


@pytest.mark.filterwarnings("ignore:the original is right on")  # its labels mean nothing
def test_still_less_memory_means_fewer_samples_of_a_class() -> None:
    model, x = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 30)), torch.randn(240, 6)
    y = torch.arange(240) % 30
    batches = loader(x, y, (100, 80, 60))
    tight = u_score(model, batches, sample_memory=30 * 8 * 4 * 3)
    assert tight.about["projections"] == 1
    assert tight.about["samples_per_class"] == 2
    assert equal(tight, u_score(model, batches, samples_per_class=2))
    at_once = u_score(model, loader(x, y, (240,)), samples_per_class=2)
    np.testing.assert_allclose(tight.propose, at_once.propose, rtol=1e-5)


def test_a_constant_unit_tells_no_classes_apart() -> None:
    model = build("mlp")
    with torch.no_grad():
        model[0].weight[3] = 0
    scores = u_score(model, loader(VECTORS.double()))
    unit = scores.sites[0].units[3]
    assert scores.propose[unit] == 0
    assert 3 not in scores.plan(alpha=1.0).keep["0"]


# -- what is said where scores cannot be taken -------------------------------------------------------------------------


def spoiled(value: float) -> list[tuple[Tensor, Tensor]]:
    """Batches, with one number of the second replaced."""
    x = IMAGES.double().clone()
    x[20, 0, 0, 0] = value
    return loader(x)


def labelled(labels: Tensor, size: int = 12) -> list[tuple[Tensor, Tensor]]:
    return list(zip(IMAGES.double().split(12), labels.split(size), strict=False))


@layers(lambda: dict(a=nn.Linear(1, 8), b=nn.Linear(8, CLASSES)))
def Constant(self, x: Tensor) -> Tensor:
    return self.b(self.a(x.reshape(1, 1)).relu())


@torch.no_grad()
def without_gradients(output: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(output, target)


UNREACHED = r"loss does not depend on Residual: its gradient is 0.*no_grad\(\), detach"
NOT_FINITE = "the loss of batch 1 is nan: the input x holds NaN or infinity"
TO_UNPACK = r".*pass unpack=, a function from a batch to \(inputs, targets\)"
LOSSES: dict[str, tuple[Any, str]] = {
    "one a sample": (nn.CrossEntropyLoss(reduction="none"), r"of batch 0 has shape \(12,\): it must be one number"),
    "a float": (lambda o, t: 1.0, "the loss of batch 0 has type float"),
    "nan": (lambda o, t: o.sum() * float("nan"), "the loss of batch 0 is nan: the output is finite, look at the loss"),
    "no_grad": (without_gradients, UNREACHED),
    "detach": (lambda o, t: F.cross_entropy(o.detach().requires_grad_(), t), UNREACHED),
    "item": (lambda o, t: torch.tensor(F.cross_entropy(o, t).item()), UNREACHED),
    "zero": (lambda o, t: torch.zeros(()), UNREACHED),
    "zero times infinity": (
        lambda o, t: (o - o.detach()).abs().sqrt().sum(),
        r"a gradient on the edge .* is not finite: look for overflow in the model or the loss",
    ),
}
BATCHES: dict[str, tuple[Any, str]] = {
    "none": (list, "the loader gives no batch"),
    "a generator": (lambda: (batch for batch in loader()), "the loader is a generator, which can be read only once"),
    "nan": (lambda: spoiled(float("nan")), NOT_FINITE),
    "infinity": (lambda: spoiled(float("inf")), NOT_FINITE),
    "other sizes": (lambda: [*loader(), (VECTORS.double(), LABELS)], r"the model fails on batch 3 \(RuntimeError"),
    "a number": (lambda: [7], f"a batch is an int, not a pair{TO_UNPACK}"),
    "three": (lambda: [(IMAGES, LABELS, LABELS)], f"a batch is a tuple of length 3, not a pair{TO_UNPACK}"),
    "no targets": (lambda: [{"x": IMAGES, "y": LABELS}], rf"keys \['x', 'y'\], and none of them{TO_UNPACK}"),
    "no targets among them": (lambda: [{"y": LABELS, "x": IMAGES}], r"keys.*\(batch\['x'\], batch\['y'\]\)$"),
    "inputs alone": (
        lambda: [{"x": IMAGES}], r"none .*: give batches that hold .*\['x'\], None\), with a loss= that needs none$"
    ),
    "two targets": (
        lambda: [{"x": IMAGES, "label": LABELS, "target": LABELS}],
        f"and 2 of them are names of targets{TO_UNPACK}",
    ),
}  # fmt: skip
LABELLED: dict[str, tuple[Any, str]] = {
    "a list": ([(x, y.tolist()) for x, y in labelled(LABELS)], "the targets are a list, not a tensor of class numbers"),
    "a column": (labelled(LABELS[:, None]), r"shape \(12, 1\) and dtype int64.*each of the 12 samples: pass classes="),
    "floats": (labelled(LABELS.float()), r"shape \(12,\) and dtype float32.*pass classes="),
    "one hot": (labelled(F.one_hot(LABELS)), r"shape \(12, 5\) and dtype int64"),
    "fewer": (labelled(LABELS[:11].repeat(3), 11), r"shape \(11,\)"),
}


@pytest.mark.parametrize("name", LOSSES)
def test_losses_that_cannot_be_used(name: str) -> None:
    loss, message = LOSSES[name]
    with pytest.raises(CalibrationError, match=message):
        score(build("residual"), loader(), loss=loss)


@pytest.mark.parametrize("name", BATCHES)
def test_batches_that_cannot_be_used(name: str) -> None:
    batches, message = BATCHES[name]
    with pytest.raises(CalibrationError, match=message):
        score(build("residual"), batches())


@pytest.mark.parametrize("name", LABELLED)
def test_labels_that_are_not_one_class_a_sample(name: str) -> None:
    batches, message = LABELLED[name]
    with pytest.raises(CalibrationError, match=message):
        u_score(build("residual"), batches, loss=squares)


def test_a_batch_without_a_batch_axis() -> None:
    with pytest.raises(CalibrationError, match="a batch has no tensor with a batch axis among its inputs: pass unpack"):
        score(Constant(), [(torch.tensor(0.5), torch.tensor([1])), (torch.tensor(0.7), torch.tensor([2]))])


def test_an_activation_that_is_not_finite_but_harmless() -> None:
    """The loss does not see it, what proposes units would."""
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, CLASSES))
    with torch.no_grad():
        model[0].bias[0] = float("inf")
    loss = lambda output, target: F.cross_entropy(output.nan_to_num(0, 0, 0), target)  # noqa: E731
    with pytest.raises(CalibrationError, match=r"on the edge .* is not finite: look for overflow"):
        score(model, loader(VECTORS), loss=loss)


def test_a_loss_that_some_batches_do_not_reach() -> None:
    model, batches, calls = build("residual"), loader(), iter(range(3))
    found = score(model, batches, loss=lambda o, t: F.cross_entropy(o, t) if next(calls) else torch.zeros(()))
    assert np.allclose(found.protect, score(model, batches[1:]).protect)
    assert found.about["samples"] == SAMPLES


# -- Scores as a value -------------------------------------------------------------------------------------------------


def test_scores_survive_saving_bit_for_bit(tmp_path: Path) -> None:
    scores = score(build("split_spellings"), loader())
    scores.save(tmp_path / "scores.npz")
    again = fxprune.Scores.load(tmp_path / "scores.npz")
    assert equal(scores, again)
    assert (again.groups, again.example, again.about) == (scores.groups, scores.example, scores.about)
    for alpha in (0.0, 0.1, 0.4):
        assert again.plan(alpha=alpha) == scores.plan(alpha=alpha)


@pytest.mark.parametrize("content", [b"", b"no scores", b"PK\x03\x04 a broken archive"])
def test_a_file_that_holds_no_scores(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "scores.npz").write_bytes(content)
    with pytest.raises(PlanError, match=r"scores.npz is not a score file that Scores.save wrote"):
        fxprune.Scores.load(tmp_path / "scores.npz")


def test_the_bounds_of_plans_are_those_that_scoring_was_told(tmp_path: Path) -> None:
    model, batches = ZOO["residual"].build(), [(images()(20), torch.arange(20) % CLASSES)]
    told = fxprune.score(model, batches, min_keep=3, round_to=4, progress=False)
    asked = fxprune.score(model, batches, progress=False)
    told.save(tmp_path / "scores.npz")
    for scores in (told, fxprune.Scores.load(tmp_path / "scores.npz")):
        assert scores.plan(0.8).keep == asked.plan(0.8, min_keep=3, round_to=4).keep
        assert scores.plan(0.8, min_keep=1, round_to=1).keep == asked.plan(0.8).keep
    assert told.plan(0.8).keep != asked.plan(0.8).keep


def test_random_scores_are_seeded_and_leave_the_random_states_alone() -> None:
    model, example = build("residual"), images()(2).double()
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    one, two = (fxprune.Scores.random(model, example, seed=seed) for seed in (1, 1))
    assert equal(one, two)
    assert not equal(one, fxprune.Scores.random(model, example, seed=2))
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1:] == (random.getstate(), np.random.get_state()[1].tolist())
