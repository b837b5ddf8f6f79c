"""The divergence of outputs: Kullback-Leibler for classes, squared error for the rest, or the caller's own."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxprune
from fxprune.scoring.divergence import Divergence, Metric, logits_by


def test_logits_differ_by_their_distributions() -> None:
    wanted, found = torch.randn(2, 5, 7).double()
    expected = F.kl_div(found.log_softmax(1), wanted.log_softmax(1), log_target=True, reduction="batchmean")
    judge = Divergence(logits=((0, 1),))
    assert judge(wanted, found) == pytest.approx(float(expected))
    assert judge(wanted, wanted + 3.0) == pytest.approx(0, abs=1e-12)  # the same distribution
    assert judge.scaled([wanted]).measure == "Kullback-Leibler divergence"


def test_probabilities_differ_as_their_logits_do() -> None:
    wanted, found = torch.randn(2, 5, 3, 4).double()
    by_logits = Divergence(logits=((0, 1),))(wanted, found)
    assert Divergence()(wanted.softmax(1), found.softmax(1)) == pytest.approx(by_logits)


def test_other_outputs_differ_by_shares_of_their_variance() -> None:
    wanted = torch.tensor([[1.0, 3.0], [5.0, 7.0]])
    found = wanted + torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    assert Divergence()(wanted, found) == pytest.approx(0.5 / 5)
    scaled = Divergence().scaled([wanted[:1], wanted[1:]])  # the variance of both batches, not of each
    assert scaled(wanted[:1], found[:1]) == pytest.approx(0.5 / 5)
    assert Divergence()({"a": wanted, "b": wanted}, {"a": found, "b": wanted}) == pytest.approx(0.1)


def test_positions_as_classes_may_differ_from_batch_to_batch() -> None:
    """As the first and the last word of an answer do: what is known of them is that they are not any word alike."""
    batches = [[1e3 * torch.eye(classes)[:2] for _ in range(2)] for classes in (4, 8)]
    judge = Divergence(logits=((0, 1), (1, 1))).scaled(batches)
    assert judge.scales == pytest.approx([(math.log(4) + math.log(8)) / 2] * 2)
    alike = [torch.zeros_like(batch) for batch in batches[1]]
    assert judge(batches[1], alike) == pytest.approx(2 * math.log(8) / judge.scales[0])


def test_numbers_that_are_not_finite_do_not_count() -> None:
    wanted = torch.tensor([1.0, float("inf"), 3.0])
    assert Divergence()(wanted, wanted + 1) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("shape", "labels", "axis"),
    [
        ((4, 10), (4,), 1), ((4, 6, 10), (4, 6), 2), ((4, 10, 6, 6), (4, 6, 6), 1), ((4, 10), (4, 10), None),
        ((4, 2), (4,), None), ((4,), (4,), None),
    ],
)  # fmt: skip
def test_targets_tell_which_outputs_are_logits(shape: tuple[int, ...], labels: tuple[int, ...], axis: int) -> None:
    targets = torch.full(labels, 5)
    assert logits_by(torch.zeros(shape), targets) == (() if axis is None else ((0, axis),))
    assert logits_by((torch.zeros(3), torch.zeros(shape)), targets) == (() if axis is None else ((1, axis),))


def test_a_metric_of_the_callers_is_taken_instead() -> None:
    def agreement(original: torch.Tensor, pruned: torch.Tensor) -> float:
        return 1 - float((original.argmax(1) == pruned.argmax(1)).float().mean())

    judge = Divergence(metric=agreement)
    assert judge(torch.eye(4), torch.eye(4).roll(1, 0)) == 1
    assert judge.measure == "agreement"
    with pytest.raises(fxprune.CalibrationError, match=r"metric=.*it is called as metric\(original, pruned\)"):
        Divergence(metric=lambda original, pruned: original.no_such)(torch.eye(2), torch.eye(2))


@pytest.mark.parametrize(
    ("metric", "said"),
    [
        (lambda a, b: (a.argmax(1) == b.argmax(1)).float().mean(), "gives 1 for the original's outputs and the same"),
        (lambda a, b: float("nan"), "gives nan for two outputs"),
        (lambda a, b: -1.0, "gives -1 for two outputs"),
        (lambda a, b: float("inf") if (a - b).abs().sum() > 0 else 0.0, "gives inf for two outputs"),
    ],
)
def test_metrics_that_do_not_tell_what_is_lost_are_errors(metric: Metric, said: str) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 4))
    data = [(torch.randn(30, 6), torch.randint(4, (30,)))]
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    with pytest.raises(fxprune.CalibrationError, match=f"metric= {said}.*1 - metric where more is better"):
        fxprune.compress(net, data, macs=0.5, metric=metric, progress=False)
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())


def test_after_several_rounds_no_error_of_a_single_one_is_reported() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 4))
    data = [(torch.randn(60, 6), torch.randint(4, (60,)))]
    one, two = (
        fxprune.report(fxprune.compress(net, data, macs=0.5, rounds=rounds, progress=False)).compensation
        for rounds in (1, 2)
    )
    assert one is not None
    assert two is not None
    assert one.after is not None
    assert two.after is None
    assert "output's error not measured" in str(two)
