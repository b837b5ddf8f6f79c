"""Models that choose among nearly equal values: their outputs jump with rounding, and are proven in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from helpers import difference, outputs
from torch import Tensor, nn
from zoo import tensors

import fxprune
from fxprune.errors import CaptureError, VerificationError
from fxprune.tracing.proof.reference import DisagreementError, Reference
from fxprune.tracing.rounding import jumps


class Queries(nn.Module):
    """A detector's queries: the tokens with the largest scores, in their order; all scores are 12 but for 1e-7."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(8, 16), nn.Linear(16, 12), nn.Linear(12, 5)
        self.attention = nn.MultiheadAttention(12, 3, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.b(self.a(x).relu())
        x = x + self.attention(x, x, x)[0]
        best = F.layer_norm(x, (12,), eps=1e-7).square().sum(-1).topk(10, 1).indices
        return self.head(x.gather(1, best[..., None].expand(-1, -1, 12)))


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    return Queries().eval()


BATCH = tensors(60, 8)(3)


def planned(model: nn.Module) -> fxprune.Plan:
    return fxprune.Scores.random(model, BATCH).plan(alpha=0.5, allocate="tod-by-group")


@pytest.mark.parametrize("rung", ["fx", "values"])
def test_it_is_captured(model: nn.Module, rung: str) -> None:
    graph = fxprune.capture(model, BATCH, method=rung)
    wide = BATCH.double()
    assert difference(outputs(model.double(), wide), outputs(graph.double(), wide)) < 1e-9
    model.float()


def test_a_wrong_graph_of_it_is_refused(model: nn.Module) -> None:
    assert jumps(lambda net, batch: net(batch), model, BATCH) > 0.01
    reference = Reference.of(model, BATCH, None, {})
    graph = fxprune.capture(model, BATCH)
    reference.check(graph)
    with torch.no_grad():
        graph.head.weight.mul_(1.001)
    with pytest.raises(DisagreementError, match="gives other outputs than the model"):
        reference.check(graph)


def test_a_precision_that_the_graph_does_not_hold_is_no_rounding() -> None:
    class Lower(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.head = nn.Linear(8, 512), nn.Linear(512, 512), nn.Linear(512, 5)

        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                x = self.b(self.a(x).relu()).relu()
            return self.head(x.to(self.head.weight.dtype))

    torch.manual_seed(0)
    net = Lower().eval()
    assert jumps(lambda net, batch: net(batch), net, BATCH) == 0
    with pytest.raises(CaptureError, match="its graph gives other outputs than the model"):
        fxprune.capture(net, BATCH)


def test_the_rewritten_graph_and_class_are_proven(model: nn.Module) -> None:
    plan = planned(model)
    small = fxprune.apply(model, plan)
    assert len(plan.keep["a"]) < 16
    assert difference(outputs(fxprune.apply(model, planned(model)), BATCH), outputs(small, BATCH)) == 0
    assert fxprune.verify(model, plan, small, BATCH) < 1e-9
    assert type(fxprune.narrow(model, plan)) is Queries
    with torch.no_grad():
        small.head.weight[0, 0] += 1
    with pytest.raises(VerificationError, match="differs from the zero-masked original"):
        fxprune.verify(model, plan, small, BATCH)


def test_other_models_do_not_jump() -> None:
    net = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3))
    assert jumps(lambda net, batch: net(batch), net, BATCH) == 0
    assert jumps(lambda net, batch: net(batch), net.double(), BATCH.double()) == 0
