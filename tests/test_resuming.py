"""A scoring pass that was interrupted and goes on gives the scores that it would have given at once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import part_of
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from zoo import CLASSES, ZOO, images

import fxprune
from fxprune.errors import CalibrationError

X = images()(60)
Y = torch.arange(60) % CLASSES
SIZES = (13, 7, 20, 11, 9)
BOTH = {"propose": "separability", "samples_per_class": 4}
TIGHT = BOTH | {"sample_memory": 9_000}
POSITIONS = BOTH | {"classes": lambda masks: masks}


def build() -> nn.Module:
    return ZOO["residual"].build().eval()


def labelled() -> list[tuple[Tensor, Tensor]]:
    return list(zip(X.split(SIZES), Y.split(SIZES), strict=True))


class Interrupted:
    """A loss that is interrupted on the batch of a certain number."""

    def __init__(self, at: int) -> None:
        self.left = at

    def __call__(self, output: Tensor, target: Tensor) -> Tensor:
        if not self.left:
            raise KeyboardInterrupt
        self.left -= 1
        return nn.functional.cross_entropy(output, target)


def interrupted(path: Path, model: nn.Module, loader: Any, at: int, **options: Any) -> None:
    with pytest.raises(KeyboardInterrupt):
        fxprune.score(model, loader, Interrupted(at), progress=False, checkpoint=path, **options)


def assert_equal(one: fxprune.Scores, other: fxprune.Scores) -> None:
    """Bit for bit, moments and all."""
    assert np.array_equal(one.propose, other.propose)
    assert np.array_equal(one.protect, other.protect)
    assert one.about == other.about
    assert one.moments.keys() == other.moments.keys()
    for key, moments in one.moments.items():
        assert np.array_equal(moments.mean, other.moments[key].mean)
        assert np.array_equal(moments.covariance, other.moments[key].covariance)


@pytest.mark.parametrize("options", [{}, BOTH, TIGHT, BOTH | {"max_classes": 2}], ids=["plain", "u", "tight", "few"])
@pytest.mark.parametrize(("at", "every"), part_of([(4, 3), (1, 1), (4, 1), (2, 3)], 2))
def test_goes_on_where_it_was_interrupted(tmp_path: Path, options: dict[str, Any], at: int, every: int) -> None:
    path = tmp_path / "pass.npz"
    interrupted(path, build(), labelled(), at, every=every, **options)
    assert path.exists() == (at >= every)
    resumed = fxprune.score(build(), labelled(), progress=False, checkpoint=path, every=every, **options)
    assert_equal(resumed, fxprune.score(build(), labelled(), progress=False, **options))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("at", [1, 2, 4])
def test_rows_that_wait_for_others_are_in_the_file(tmp_path: Path, at: int) -> None:
    """Of 40 channels, products are formed of 40 rows or more: of the first three batches, and of the others."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(X[0].numel(), 40), nn.ReLU(), nn.Linear(40, CLASSES)).eval()
    path = tmp_path / "pass.npz"
    interrupted(path, model, labelled(), at, every=1)
    with np.load(path) as arrays:
        assert [len(arrays[name]) for name in arrays if name.startswith("waiting")] == [sum(SIZES[:at]) % 40]
    resumed = fxprune.score(model, labelled(), progress=False, checkpoint=path, every=1)
    assert_equal(resumed, fxprune.score(model, labelled(), progress=False))


def test_only_what_is_left_is_computed(tmp_path: Path) -> None:
    path, model, seen = tmp_path / "pass.npz", build(), list[int]()
    interrupted(path, model, labelled(), 3, every=1)

    def loss(output: Tensor, target: Tensor) -> Tensor:
        seen.append(len(output))
        return nn.functional.cross_entropy(output, target)

    fxprune.score(model, labelled(), loss, progress=False, checkpoint=path)
    assert seen == list(SIZES[3:])


def test_classes_of_positions(tmp_path: Path) -> None:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 5, 1)]
    model, masks = nn.Sequential(*layers).eval(), (X.sum(1) * 3).long().abs() % 5
    loader = list(zip(X.split(SIZES), masks.split(SIZES), strict=True))
    path = tmp_path / "pass.npz"
    interrupted(path, model, loader, 3, every=2, **POSITIONS)
    resumed = fxprune.score(model, loader, progress=False, checkpoint=path, **POSITIONS)
    assert_equal(resumed, fxprune.score(model, loader, progress=False, **POSITIONS))


def test_a_loader_that_shuffles_by_the_global_seed(tmp_path: Path) -> None:
    """Scoring seeds torch for itself, so the order is the same again."""
    path, loader = tmp_path / "pass.npz", DataLoader(TensorDataset(X, Y), batch_size=9, shuffle=True)
    interrupted(path, build(), loader, 4, every=2)
    resumed = fxprune.score(build(), loader, progress=False, checkpoint=path)
    assert_equal(resumed, fxprune.score(build(), loader, progress=False))


def _other_model(_: Path) -> dict[str, Any]:
    model = build()
    with torch.no_grad():
        next(model.parameters()).add_(1)
    return {"model": model}


def _other_seed(_: Path) -> dict[str, Any]:
    return {"seed": 4}


def _less_whole(_: Path) -> dict[str, Any]:
    return {"exclude": "a.conv1"}


def _other_batches(_: Path) -> dict[str, Any]:
    return {"loader": [(x + 1, y) for x, y in labelled()]}


def _fewer_batches(_: Path) -> dict[str, Any]:
    return {"loader": labelled()[:1]}


def _damaged(path: Path) -> dict[str, Any]:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 255
    path.write_bytes(content)
    return {}


def _no_checkpoint(path: Path) -> dict[str, Any]:
    path.write_text("nothing of the kind")
    return {}


def _no_folder(path: Path) -> dict[str, Any]:
    return {"checkpoint": path / "in" / "nowhere"}


def _never(_: Path) -> dict[str, Any]:
    return {"every": 0}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_other_model, r"was written with model=\d+, and now it is \d+: go on with the same model and options"),
        (_other_seed, "was written with seed=0, and now it is 4"),
        (_less_whole, "was written with edges="),
        (_other_batches, "the loader's first 3 batches are not those that"),
        (_fewer_batches, "was written after 3 batches, and the loader gives 1"),
        (_damaged, "is not a checkpoint that score wrote"),
        (_no_checkpoint, "is not a checkpoint that score wrote"),
        (_no_folder, "there is no folder"),
        (_never, "every is 0"),
    ],
)
def test_what_does_not_fit(tmp_path: Path, change: Callable[[Path], dict[str, Any]], message: str) -> None:
    path = tmp_path / "pass.npz"
    interrupted(path, build(), labelled(), 3, every=1)
    options = {"model": build(), "loader": labelled(), "checkpoint": path} | change(path)
    before = path.read_bytes()
    with pytest.raises(CalibrationError, match=message):
        fxprune.score(progress=False, **options)
    assert path.read_bytes() == before
