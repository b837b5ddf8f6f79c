"""Operations without a rule: on values without channels none is needed; what they touch otherwise is named, or kept."""

from __future__ import annotations

from collections.abc import Callable
from types import MappingProxyType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import difference, outputs
from torch import Tensor, nn

import fxprune
from fxprune.tracing.graph import captured_of


class Behind(nn.Module):
    """Two layers behind a step on the model's input, or on what the first layer gives."""

    def __init__(self, step: Callable[[Tensor], Tensor], *, inside: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.step, self.inside = step, inside
        self.first, self.last = nn.Linear(8, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        if self.inside:
            return self.last(self.step(self.first(x)).relu())
        return self.last(self.first(self.step(x)).relu())


def rows(samples: int = 2) -> Tensor:
    return torch.randn(samples, 8, generator=torch.Generator().manual_seed(samples))


def spectrum(x: Tensor) -> Tensor:
    return torch.stft(x.repeat(1, 4), 8, window=torch.hann_window(8), return_complex=True)


ON_INPUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "histc": lambda x: x * torch.histc(x, 4).mean(),
    "histc as rows": lambda x: torch.histc(x, 8, -3, 3).expand(len(x), 8),
    "unique": lambda x: x + 0 * torch.unique(x).sum(),
    "unique_consecutive": lambda x: x + 0 * torch.unique_consecutive(x.argmax(1)).numel(),
    "nonzero": lambda x: x + torch.nonzero(x > -99).sum() / 100,
    "where without a choice": lambda x: x + torch.where(x > 0)[0].sum(),
    "bincount": lambda x: x + torch.bincount((x.flatten() > 0).long(), minlength=8),
    "bucketize": lambda x: torch.bucketize(x, torch.linspace(-2, 2, 5)).float(),
    "searchsorted": lambda x: torch.searchsorted(torch.linspace(-2, 2, 5), x).float(),
    "stft": lambda x: spectrum(x).abs().mean(-1).repeat(1, 2)[:, :8],
    "fft": lambda x: torch.fft.rfft(x).abs()[:, :4].repeat(1, 2),
    "polar": lambda x: torch.view_as_real(torch.polar(x.abs(), x)).sum(-1),
    "meshgrid": lambda x: x + torch.meshgrid(x[0], x[0], indexing="ij")[0].mean(1),
    "cartesian_prod": lambda x: x + torch.cartesian_prod(x[0], x[0]).mean(),
    "as_strided": lambda x: x.as_strided((len(x), 8), (8, 1)),
    "unfold": lambda x: x.unfold(1, 8, 8)[:, 0],
    "scatter_": lambda x: torch.zeros_like(x).scatter_(1, x.argsort(1), x),
    "multinomial": lambda x: x + 0 * torch.multinomial(x.softmax(1), 2).sum(),
    "one_hot": lambda x: F.one_hot(x.argmax(1), 8).float(),
    "eigenvectors": lambda x: x @ torch.linalg.eigh(x.T @ x)[1].abs(),
    "cdist": lambda x: x * torch.cdist(x[None], x[None])[0].mean(1, keepdim=True),
    "masked_select": lambda x: x + torch.masked_select(x, x > 0).sum(),
    "hstack of parts": lambda x: torch.hstack(x.split([3, 5], 1)[::-1]),
}  # fmt: skip


@pytest.mark.parametrize("name", ON_INPUTS)
@pytest.mark.filterwarnings("ignore:.*draws random numbers", "ignore:.*holds for")
def test_an_operation_on_values_without_channels_needs_no_rule(name: str) -> None:
    model = Behind(ON_INPUTS[name]).eval()
    graph = fxprune.capture(model, rows())
    plan = fxprune.Scores.random(graph, rows()).plan(alpha=0.8)
    small = fxprune.apply(graph, plan)
    assert fxprune.verify(graph, plan, small, rows(3)) < 1e-4
    assert len(plan.keep["first"]) < 16


ON_CHANNELS: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "an operation without a rule": (lambda x: x * torch.histc(x, 4).mean(), r"no rule says what .*histc"),
    "a call that its rule cannot take": (lambda x: x + torch.where(x > 9)[0].sum(), r"cannot take node where"),
}  # fmt: skip


@pytest.mark.parametrize("name", ON_CHANNELS)
def test_on_channels_it_is_named_or_keeps_them(name: str) -> None:
    step, message = ON_CHANNELS[name]
    model = Behind(step, inside=True).eval()
    graph = fxprune.capture(model, rows())
    with pytest.raises(fxprune.UnsupportedOpError, match=message):
        fxprune.couple(graph)
    groups = {group.name: group for group in fxprune.couple(graph, unknown="freeze")}
    assert "no rule for function" in str(groups["first"].frozen)
    loader = [(rows(4), torch.arange(4))] * 2
    with pytest.warns(fxprune.FxpruneWarning, match="nothing in Behind can be pruned: 'first': no rule for function"):
        small = fxprune.compress(model, loader, unknown="freeze", compensate="none", progress=False)
    assert difference(outputs(model, rows(3)), outputs(small, rows(3))) < 1e-5


def test_a_learned_threshold_of_an_operation_without_a_rule_is_named() -> None:
    model = Behind(lambda x: x)
    model.bounds = nn.Parameter(torch.linspace(-2, 2, 5))
    model.step = lambda x: torch.bucketize(x, model.bounds).float()
    with pytest.raises(fxprune.UnsupportedOpError, match=r"no rule says what .*bucketize"):
        fxprune.couple(fxprune.capture(model.eval(), rows()))


def test_sizes_of_channels_that_such_an_operation_gets_are_the_originals() -> None:
    class Sized(Behind):
        def forward(self, x: Tensor) -> Tensor:
            y = self.first(x).relu()
            return self.last(y) + torch.bucketize(x, torch.linspace(-1, 1, y.shape[1])).float().mean(1, keepdim=True)

    graph = fxprune.capture(Sized(lambda x: x).eval(), rows())
    plan = fxprune.Scores.random(graph, rows()).plan(alpha=0.8)
    assert fxprune.verify(graph, plan, fxprune.apply(graph, plan), rows(3)) < 1e-5
    assert len(plan.keep["first"]) < 16


# -- attributes --------------------------------------------------------------------------------------------------------


class Immutable(dict[str, Any]):
    """A dict that nothing may change, as the configurations of some libraries."""

    def _refused(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError("immutable")

    __setitem__ = __delitem__ = clear = pop = popitem = setdefault = update = _refused  # type: ignore[assignment]


class Shadowed(Behind):
    """A tensor of the width of the channels, kept under the name of an attribute of the class."""

    scale: Any = torch.empty(0)

    def __init__(self, config: Any) -> None:
        super().__init__(lambda x: x)
        self.config, self.scale = config, torch.arange(16.0)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x) * self.scale
        return self.last(y.relu() if self.config["relu"] else y)


CONFIGURATIONS: dict[str, Any] = {
    "immutable": Immutable(relu=True, inner=Immutable(width=2)),
    "read only": MappingProxyType({"relu": True}),
    "inside of a dict": {"relu": True, "inner": [Immutable(width=2)]},
}


@pytest.mark.parametrize("name", CONFIGURATIONS)
@pytest.mark.parametrize("method", ["fx", "values"])
def test_attributes_that_shadow_the_class_and_dicts_that_refuse_to_change(name: str, method: str) -> None:
    model = Shadowed(CONFIGURATIONS[name]).eval()
    graph = fxprune.capture(model, rows(), method=method)
    assert captured_of(graph).method == method
    small = fxprune.compress(model, [(rows(4), torch.arange(4))] * 2, compensate="none", progress=False)
    assert fxprune.report(small).error < 1e-5
    assert len(small.first.weight) == small.scale.numel() < 16
    assert model.config is CONFIGURATIONS[name]
    assert model.scale.numel() == 16
