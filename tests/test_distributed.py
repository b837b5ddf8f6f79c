"""Scoring on several ranks of this machine: the same plan as on one, and a word of ours where a rank fails."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import ranks
import torch

import fxprune

pytestmark = [
    pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without distributed"),
    pytest.mark.filterwarnings("ignore:the original is right on"),  # its labels mean nothing
]


@pytest.fixture(scope="module")
def alone() -> dict[str, fxprune.Scores]:
    return {name: make() for name, make in ranks.JOBS.items()}


@pytest.fixture(
    scope="module", params=[pytest.param(2, marks=pytest.mark.wide), pytest.param(4, marks=pytest.mark.slow)]
)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[int, Path]:
    folder = tmp_path_factory.mktemp(f"ranks{request.param}")
    assert ranks.started(folder, request.param, "jobs") == [0] * request.param
    return request.param, folder


@pytest.mark.parametrize("name", list(ranks.JOBS))
def test_the_plan_is_that_of_a_single_rank(
    name: str, folder: tuple[int, Path], alone: dict[str, fxprune.Scores]
) -> None:
    size, place = folder
    one = alone[name]
    for rank in range(size):
        found = fxprune.Scores.load(place / f"{name}-{rank}.npz")
        for ours, theirs in ((one.propose, found.propose), (one.protect, found.protect)):
            assert np.allclose(ours, theirs, rtol=1e-5, atol=1e-5 * np.abs(ours).max())
        assert found.about == one.about
        assert found.moments.keys() == one.moments.keys()
        for key, moments in one.moments.items():
            assert np.allclose(moments.covariance, found.moments[key].covariance, rtol=1e-4, atol=1e-5)
        for alpha in (0.0, 0.1, 0.5):
            assert found.plan(alpha).keep == one.plan(alpha).keep
        assert found.plan(macs=0.6).keep == one.plan(macs=0.6).keep


@pytest.mark.parametrize("level", [*ranks.LEVELS, "compressed"])
def test_compensation_is_the_same_on_all_ranks_and_as_good_as_on_one(level: str, folder: tuple[int, Path]) -> None:
    size, place = folder
    alone = ranks.record_of(ranks.compressed() if level == "compressed" else ranks.compensated(level))
    found = [torch.load(place / f"{level}-{rank}.pt", weights_only=True) for rank in range(size)]
    for other in found:
        assert other["errors"] == found[0]["errors"]
        assert other["weights"].keys() == alone["weights"].keys()
        for name, weight in found[0]["weights"].items():
            assert torch.equal(other["weights"][name], weight)
            assert level == "compressed" or weight.shape == alone["weights"][name].shape
    (before, after), (before_alone, after_alone) = found[0]["errors"], alone["errors"]
    assert after < before
    if level == "compressed":  # curves are measured on the samples held out, and so are its widths
        return
    assert before == pytest.approx(before_alone, rel=0.3)  # other samples are held out
    assert after == pytest.approx(after_alone, rel=0.5)


@pytest.mark.wide
def test_all_ranks_are_told_what_is_wrong_on_one(tmp_path: Path) -> None:
    assert ranks.started(tmp_path, 2, "failures") == [0, 0]
    zero, one = ranks.told(tmp_path, 0), ranks.told(tmp_path, 1)
    nan = "the loss of batch 0 is nan: the input input holds NaN or infinity"
    assert one["not a number"] == f"CalibrationError: while scoring: {nan}"
    assert zero["not a number"].startswith(
        "DistributedError: scoring failed on rank 1 of 2: CalibrationError: the loss"
    )
    gone = "(OSError: sample 25 is gone): look at that sample, or at the data's options"
    assert zero["unreadable"] == f"CalibrationError: while scoring: the loader fails on batch 1 {gone}"
    assert one["unreadable"].startswith("DistributedError: scoring failed on rank 0 of 2: CalibrationError: the loader")
    of_models = dict.fromkeys(
        ("other weights", "another order of weights", "other buffers"), "one whose weights and buffers have the"
    )
    for name, word in {"other loaders": "21 samples", "other samples": "digest", **of_models}.items():
        for found in (zero, one):
            assert found[name].startswith("DistributedError: the ")
            assert word in found[name]
            assert "rank 1" in found[name]


@pytest.mark.wide
def test_a_rank_that_dies_ends_the_others_with_an_error_of_ours(tmp_path: Path) -> None:
    assert ranks.started(tmp_path, 2, "killed") == [0, 3]
    assert ranks.told(tmp_path, 0)["killed"].startswith(
        "DistributedError: rank 0 of 2 lost another rank, which ended or"
    )
    assert not (tmp_path / "told-1.txt").exists()


@pytest.mark.wide
def test_models_of_which_each_rank_has_a_part(tmp_path: Path) -> None:
    assert ranks.started(tmp_path, 2, "spread") == [0, 0]
    for rank in range(2):
        found = ranks.told(tmp_path, rank)
        for name in ("score", "compress"):
            assert found[name].startswith(
                "CaptureError: 0.weight of FSDPSequential is a DTensor: each rank holds a part"
            )
        assert found["parallel"].startswith("CaptureError: 7.weight of Sequential is a DTensor: each rank holds a part")
        assert found["wrapped"].startswith(
            "CaptureError: the model is wrapped in FullyShardedDataParallel, and each rank"
        )
        assert all("get_model_state_dict" in found[name] for name in ("score", "compress", "parallel", "wrapped"))
        assert found["gathered"] == "20"  # the units of the plain model
