"""Means and covariances against numpy, and which edges have them."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import pytest
import torch
from helpers import double
from nets import layers
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from zoo import CLASSES, ZOO

import fxprune
from fxprune.coupling.couple import analyse
from fxprune.coupling.groups import key_of_edge
from fxprune.scoring import moments
from fxprune.scoring.moments import BATCH_ROWS, ROWS, Moments, MomentSums
from fxprune.tracing.capture import capture


def gathered(*parts: Tensor, dim: int = 1, seed: int = 0) -> Moments:
    sums = MomentSums(seed)
    for part in parts:
        sums.add(part, dim)
    return sums.moments()


def score(model: nn.Module, x: Any, **options: Any) -> fxprune.Scores:
    count = len(next(iter(x.values())) if isinstance(x, dict) else x[0] if isinstance(x, tuple) else x)
    return fxprune.score(model, [(x, torch.arange(count) % CLASSES)], progress=False, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_rounding_makes_of_constants_is_no_variance(dtype: torch.dtype) -> None:
    values = torch.tensor([0.1, 700.3, -5.7], dtype=dtype)
    shaken = values * (1 + 3 * torch.finfo(dtype).eps * torch.randn(40, 3, dtype=dtype))
    found = gathered(*shaken.split(9))
    assert not found.varies
    assert not found.covariance.any()
    assert np.allclose(found.mean, values.double())
    assert gathered(values * (1 + 1e-3 * torch.randn(40, 3, dtype=dtype))).varies
    assert gathered(torch.cat([values.expand(40, 3), torch.randn(40, 1, dtype=dtype)], 1)).covariance[3, 3] > 0


@pytest.mark.parametrize("size", [1, 3, 11, 12, 30])
def test_rows_may_come_a_few_at_a_time(size: int) -> None:
    x = torch.randn(30, 12, dtype=torch.float64) + 7
    sums = MomentSums(seed=0)
    for part in x.split(size):
        sums.add(part, 1)
        assert sum(map(len, sums.waiting)) < 12
    assert sums.rows == 30
    for _ in range(2):
        assert np.allclose(sums.moments().covariance, np.cov(x.numpy().T, bias=True), atol=1e-12)


@pytest.mark.parametrize("dim", [1, -1, 2])
def test_they_are_those_of_all_rows_while_rows_are_few(dim: int) -> None:
    parts = [torch.randn(n, 3, 4, 5, dtype=torch.float64) + 7 for n in (4, 1, 6)]
    found = gathered(*parts, dim=dim)
    rows = torch.cat(parts).movedim(dim, -1).flatten(0, -2).numpy()
    assert np.allclose(found.mean, rows.mean(0), atol=1e-12)
    assert np.allclose(found.covariance, np.cov(rows.T, bias=True), atol=1e-12)
    assert np.allclose(found.variance, rows.var(0), atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_means_far_from_zero_do_not_drown_the_covariance(dtype: torch.dtype) -> None:
    x = (torch.randn(500, 4) * 4 + 1000).to(dtype)
    found = gathered(x[:200], x[200:])
    assert found.covariance.dtype == np.float64
    assert np.allclose(found.covariance, np.cov(x.double().numpy().T, bias=True), rtol=1e-4, atol=1e-3)


def test_of_many_rows_seeded_ones_are_taken() -> None:
    x = torch.randn(64, 3, 20, 20) * torch.tensor([1.0, 2, 3])[:, None, None]
    for numbers, count in ((None, BATCH_ROWS), (torch.arange(64), 64 * ROWS)):
        found = []
        for seed in (1, 1, 2):
            sums = MomentSums(seed)
            sums.add(x, 1, numbers)
            assert sums.rows == count
            found.append(sums.moments())
        one, again, other = found
        assert np.array_equal(one.covariance, again.covariance)
        assert not np.array_equal(one.covariance, other.covariance)
        assert np.allclose(np.sqrt(one.variance), [1, 2, 3], rtol=0.1)


@pytest.mark.parametrize("shape", [(24, 6, 9, 9), (24, 6, 7), (24, 6)])
def test_what_enters_of_a_sample_does_not_depend_on_its_batch(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, dtype=torch.float64)
    whole, apart = MomentSums(seed=3), MomentSums(seed=3)
    whole.add(x, 1, torch.arange(24))
    for numbers in torch.randperm(24).split([1, 10, 6, 7]):
        apart.add(x[numbers], 1, numbers)
    assert whole.rows == apart.rows == 24 * min(ROWS, x[0, 0].numel())
    assert np.allclose(whole.moments().mean, apart.moments().mean, rtol=0, atol=1e-13)
    assert np.allclose(whole.moments().covariance, apart.moments().covariance, rtol=0, atol=1e-13)


def test_places_of_a_sample_are_spread_and_differ_from_sample_to_sample() -> None:
    x = torch.arange(400.0).view(1, 1, 20, 20).expand(50, 1, 20, 20)
    rows = [MomentSums(seed=0) for _ in range(50)]
    for number, sums in enumerate(rows):
        sums.add(x[:1], 1, torch.tensor([number]))
    means = np.array([sums.moments().mean[0] for sums in rows])
    spreads = np.array([sums.moments().variance[0] for sums in rows])
    assert len(np.unique(means)) > 25
    assert np.abs(means.mean() - 199.5) < 10
    assert (spreads > 0.7 * 400**2 / 12).all()  # of the variance of all places


def test_wide_edges_keep_single_precision_and_wider_ones_variances(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moments, "SINGLE", 20)
    monkeypatch.setattr(moments, "WIDEST", 40)
    x = torch.randn(30, 41, dtype=torch.float64)
    found = gathered(x[:10], x[10:])
    assert found.covariance.shape == (41,)
    assert np.allclose(found.variance, x.numpy().var(0))
    for channels, precision in ((40, np.float32), (20, np.float64)):
        found = gathered(x[:10, :channels], x[10:, :channels])
        assert found.covariance.dtype == precision
        assert np.allclose(found.covariance, np.cov(x[:, :channels].numpy().T, bias=True), atol=1e-5)


def test_no_room_for_a_covariance(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(moments, "SINGLE", 20)
    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(fxprune.CalibrationError, match=r"24 channels.*No space left.*set TMPDIR"):
        gathered(torch.randn(30, 24))


def test_nothing_has_no_moments() -> None:
    with pytest.raises(ValueError, match="nothing was added"):
        MomentSums(0).moments()


# -- in the scoring pass -----------------------------------------------------------------------------------------------


def test_they_are_those_of_what_a_layer_reads() -> None:
    model = ZOO["mlp"].build().double().eval()
    x = torch.randn(20, 6, dtype=torch.float64)
    scores = score(model, x)
    hidden = model[1](model[0](x)).detach().numpy()
    (found,) = [moments for moments in scores.moments.values() if moments.mean.shape == hidden.shape[1:]]
    assert np.allclose(found.mean, hidden.mean(0))
    assert np.allclose(found.covariance, np.cov(hidden.T, bias=True))


@pytest.mark.parametrize(
    "name",
    [
        "residual", "concat_spellings", "squeeze_excite", "lstm_deep", "gru_deep_both_ways", "lstm_time_major",
        "rnn_relu_deep_both_ways", "lstm_cell_from_none", "gru_cell_from_parameter", "packed_lstm_states_samples_first",
        "packed_gru_outputs_samples_first", "attention_chunk_matmul",
    ],
)  # fmt: skip
def test_every_edge_has_moments(name: str) -> None:
    """Those that recurrent layers read a step later as well; a cell that is called at every step has them once."""
    model, x = ZOO[name].build().double(), double(ZOO[name].example(8))
    scores, coupling = score(model, x), analyse(capture(model, x))
    edges = [edge for edge in coupling.edges if (edge.units >= 0).any()]
    assert edges
    for edge in edges:
        shape = edge.parameter, len(edge.units)
        own = [edge, *(e for e in edges if edge.parameter is not None and (e.parameter, len(e.units)) == shape)]
        (moments, *_) = [scores.moments[key_of_edge(e)] for e in own if key_of_edge(e) in scores.moments]
        assert moments.mean.shape == edge.units.shape
        assert np.linalg.eigvalsh(moments.covariance).min() > -1e-9
    assert (scores.propose >= 0).all()


def test_what_a_recurrent_layer_reads_a_step_later_are_its_outputs() -> None:
    """The last outputs are not read, and few of many: they are counted all the same."""
    model = nn.Sequential(nn.GRU(3, 4, batch_first=True), First(), nn.Flatten(), nn.Linear(24, CLASSES)).double()
    x = torch.randn(9, 6, 3, dtype=torch.float64)
    scores = score(model, x)
    states = model[0](x)[0].detach().flatten(0, 1).numpy()
    (found,) = [moments for (_, how), moments in scores.moments.items() if how == "weight_hh_l0"]
    assert np.allclose(found.covariance, np.cov(states.T, bias=True))


class First(nn.Module):
    def forward(self, pair: Any) -> Tensor:
        return pair[0]


def test_padding_does_not_count() -> None:
    @layers(lambda: dict(a=nn.GRU(3, 4, batch_first=True), b=nn.GRU(4, CLASSES, batch_first=True)))
    def Packed(self, x: Tensor, lengths: Tensor) -> Tensor:
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        outputs, _ = self.a(packed)
        outputs, _ = self.b(outputs)
        return pad_packed_sequence(outputs, batch_first=True)[0].mean(1)

    model, x, lengths = Packed().double(), torch.randn(5, 6, 3, dtype=torch.float64), torch.tensor([6, 1, 2, 4, 2])
    scores = score(model, (x, lengths))
    rows = [model.a(part[None, :length])[0][0] for part, length in zip(x, lengths.tolist(), strict=True)]
    states = torch.cat(rows).detach().numpy()
    assert len(states) == 15
    for known in scores.moments.values():
        if len(known.mean) == 4:
            assert np.allclose(known.mean, states.mean(0))
            assert np.allclose(known.covariance, np.cov(states.T, bias=True))


@pytest.mark.parametrize("widest", [16384, 4])
def test_merged_over_a_single_rank_they_stay(widest: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moments, "WIDEST", widest)
    x, sums = torch.randn(30, 5, dtype=torch.float64), moments.MomentSums(seed=0)
    for batch, rows in enumerate((x[:10], x[10:] + 3)):  # whose mean is far from that of the first batch
        sums.add(rows, 1, batch=batch)
    before = sums.moments()
    sums.merge_ranks(5)
    assert np.allclose(sums.moments().mean, before.mean)
    assert np.allclose(sums.moments().covariance, before.covariance)
