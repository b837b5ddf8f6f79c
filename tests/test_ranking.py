"""Signals by name and of the caller's, against their formulas."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import part_of, squares
from nets import layers
from numpy.typing import NDArray
from torch import Tensor, nn
from zoo import CLASSES, ZOO, images, tensors

import fxprune
from fxprune.errors import CalibrationError
from fxprune.scoring.evidence import Evidence
from fxprune.scoring.signals.reconstruction import RIDGE
from fxprune.scoring.signals.table import SIGNALS

IMAGES, VECTORS, LABELS = images()(20), tensors(6)(20), torch.arange(20) % CLASSES


def score(model: nn.Module, x: Tensor = IMAGES, **options: Any) -> fxprune.Scores:
    return fxprune.score(model, [(x, LABELS)], progress=False, **options)


def units_of(scores: fxprune.Scores, name: str) -> NDArray[np.int64]:
    return {site.name: site.units for site in scores.sites}[name]


def chain() -> Any:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, CLASSES)).double()


@layers(lambda: dict(stem=nn.Conv2d(3, 4, 3, bias=False), conv=nn.Conv2d(4, 5, 3), flat=nn.Linear(4 * 6 * 6, CLASSES)))
def Forked(self, x: Tensor) -> Tensor:
    """Channels of a convolution that a convolution and, flattened, a linear layer read."""
    y = F.relu(self.stem(x))
    return self.flat(y.flatten(1)) + self.conv(y).mean((2, 3))  # type: ignore[no-any-return]


def forked() -> Forked:
    torch.manual_seed(4)
    return Forked().double()


# -- formulas ----------------------------------------------------------------------------------------------------------


def cheapest_first(errors: Any, count: int) -> list[int]:
    """The order in which units leave whose loss, given those that left, is least."""
    gone: list[int] = []
    while len(gone) < count:
        left = [unit for unit in range(count) if unit not in gone]
        gone.append(min(left, key=lambda unit: errors([*gone, unit])))
    return gone


def test_reconstruction_is_what_refitting_cannot_give_back() -> None:
    """Ridge regression of the outputs on what stays, by lstsq on the samples themselves."""
    model, x = chain(), VECTORS.double()
    hidden = model[1](model[0](x)).detach().numpy()
    centred = hidden - hidden.mean(0)
    wanted = centred @ model[2].weight.detach().numpy().T
    strength = RIDGE * (centred**2).mean()

    def error(gone: list[int]) -> float:
        """Rows of their own hold every weight near the one that it had."""
        stay = [unit for unit in range(5) if unit not in gone]
        extra = np.sqrt(strength * len(x)) * np.eye(5)
        rows = np.concatenate([centred, extra])
        targets = np.concatenate([wanted, extra @ model[2].weight.detach().numpy().T])
        fit = np.linalg.lstsq(rows[:, stay], targets, rcond=None)[0]
        return float(((targets - rows[:, stay] @ fit) ** 2).sum() / (targets**2).sum())

    order = cheapest_first(error, 5)
    scores = score(model, x)
    found = scores.propose[units_of(scores, "0")]
    assert np.argsort(found).tolist() == order
    assert found[order] == pytest.approx([error(order[: k + 1]) for k in range(5)], rel=1e-6)
    assert found.max() == pytest.approx(1)


def test_reconstruction_adds_up_over_readers() -> None:
    """Each reader's error is a share of its own output, so that all of everything is the number of readers."""
    scores = score(forked(), IMAGES.double(), exclude=["conv"])
    assert len(scores.propose) == 4
    assert scores.propose.max() == pytest.approx(2)


def test_activation_is_the_root_mean_square_of_what_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fxprune.scoring.moments.ROWS", 36)
    model, x = forked(), IMAGES.double()
    scores = score(model, x, propose="activation", exclude=["conv"])
    maps = F.relu(model.stem(x)).detach()
    rows = maps.movedim(1, -1).flatten(0, -2)  # as the convolution reads them: all rows enter
    sampled = rows.square().mean(0).sqrt()
    flat = maps.flatten(2).square().mean(0).sqrt().sum(-1)
    assert scores.propose[units_of(scores, "stem")] == pytest.approx((sampled + flat).numpy(), rel=1e-6)


BY_SAMPLE = {
    "channels that are flattened": (forked, IMAGES.double()),
    "residual": (lambda: ZOO["residual"].build().double(), IMAGES.double()),
    **{
        name: (lambda name=name: ZOO[name].build().double(), ZOO[name].example(20).double())
        for name in ("attention_chunk_function", "windows_with_padding", "nhwc_flatten", "lstm_time_major")
    },
}


@pytest.mark.parametrize("name", part_of(BY_SAMPLE, 4))
def test_taylor_by_sample_is_that_of_loaders_of_one_sample_each(name: str) -> None:
    """Of what recurrent weights read a step later, only the whole batch's derivative is known."""
    build, x = BY_SAMPLE[name]
    model = build().eval()
    loaders = [[(x[i : i + 1], LABELS[i : i + 1])] for i in range(20)]
    alone = sum(fxprune.score(model, loader, squares, progress=False).protect for loader in loaders)
    found, plain = (score(model, x, loss=squares, protect=by).protect for by in ("taylor-by-sample", "taylor"))
    if "lstm" not in name:
        np.testing.assert_allclose(found, alone, rtol=1e-8)
    assert (found <= alone * (1 + 1e-9)).all()
    assert (found >= plain * (1 - 1e-9)).all()


@layers(lambda: dict(a=nn.Linear(6, 8), head=nn.Linear(8, CLASSES)))
def Steps(self, x: Tensor) -> Tensor:
    """A linear layer that takes all steps of all sequences as rows of one matrix."""
    rows = self.head(self.a(x.view(-1, x.size(-1))).relu())
    return rows.view(x.size(0), x.size(1), -1).mean(1)


def test_taylor_by_sample_of_sequences_of_other_lengths() -> None:
    model = Steps().double().eval()
    parts = [tensors(5, 6)(6).double(), tensors(7, 6)(4).double()]
    loader = [(x, LABELS[: len(x)]) for x in parts]
    singles = [[(x[i : i + 1], LABELS[:1])] for x in parts for i in range(len(x))]
    alone = sum(fxprune.score(model, single, squares, progress=False).protect for single in singles)
    found = fxprune.score(model, loader, squares, protect="taylor-by-sample", progress=False).protect
    np.testing.assert_allclose(found, alone, rtol=1e-8)


def test_magnitude_is_the_norm_of_all_that_goes() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, CLASSES))
    nn.init.normal_(model[1].weight)
    scores = score(model, propose="magnitude", protect="random")
    parts = [
        model[0].weight.flatten(1), model[0].bias[:, None], model[1].weight[:, None], model[1].bias[:, None],
        model[4].weight.reshape(CLASSES, 4, 36).transpose(0, 1).flatten(1),
    ]  # fmt: skip
    expected = torch.cat(parts, 1).norm(dim=1).detach().numpy()
    assert scores.propose[units_of(scores, "0")] == pytest.approx(expected, rel=1e-6)


def test_random_is_seeded() -> None:
    model = ZOO["residual"].build()
    one, again, other = (score(model, propose="random", seed=seed) for seed in (1, 1, 2))
    assert np.array_equal(one.propose, again.propose)
    assert not np.array_equal(one.propose, other.propose)
    assert np.array_equal(one.protect, score(model).protect)


def test_either_ranking_may_be_any_signal() -> None:
    model = ZOO["residual"].build()
    found = {name: score(model, propose=name) for name in SIGNALS}
    for name, scores in found.items():
        turned = score(model, propose="taylor", protect=name)
        assert np.array_equal(turned.protect, scores.propose)
        assert (scores.about["propose"], turned.about["protect"]) == (name, name)
        assert ("classes" in scores.about) == (name == "separability")
    assert len({tuple(scores.propose) for scores in found.values()}) == len(SIGNALS)


# -- a signal of the caller's ------------------------------------------------------------------------------------------


def test_a_function_ranks() -> None:
    """The U-Score is there where it is asked for by the other ranking."""

    def both(evidence: Evidence) -> NDArray[np.float64]:
        assert evidence.separability is not None
        return evidence.separability + evidence.taylor

    model = ZOO["residual"].build()
    scores = score(model, propose=both, protect="separability")
    plain = score(model, propose="separability", protect="taylor")
    assert np.allclose(scores.propose, plain.propose + plain.protect)
    assert scores.about["propose"] == "both"


def test_a_signal_of_another_number() -> None:
    def few(evidence: Evidence) -> NDArray[np.float64]:
        return np.array([0.0, np.inf, np.nan])

    with pytest.raises(CalibrationError, match=r"the signal few gives shape \(3,\), 2 of it not finite, for 5 units"):
        score(chain(), VECTORS.double(), propose=few)


def test_a_u_score_that_was_not_asked_for() -> None:
    with pytest.raises(CalibrationError, match='the U-Score was not gathered: ask for it by its name, "separability"'):
        score(chain(), VECTORS.double(), propose=lambda e: SIGNALS["separability"](e))


# -- what the signals need ---------------------------------------------------------------------------------------------


def test_one_class_is_enough() -> None:
    model, batches = ZOO["residual"].build(), [(IMAGES, torch.full((20,), 2))]
    assert (fxprune.score(model, batches, progress=False).propose > 0).all()
    with pytest.raises(CalibrationError, match=r"all 20 samples of the loader are of one class \(2\)"):
        fxprune.score(model, batches, protect="separability", progress=False)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", list(SIGNALS))
def test_every_signal_in_every_precision(name: str, dtype: torch.dtype) -> None:
    """Coarse numbers leave the order about as it is."""
    model = ZOO["residual"].build()
    fine = score(model, propose=name)
    coarse = score(model.to(dtype), IMAGES.to(dtype), propose=name)
    assert np.corrcoef(fine.propose, coarse.propose)[0, 1] > 0.9
