"""Verify: it passes what is right, and catches what is wrong, by labels and by numbers."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import picture, same_picture
from nets import layers
from torch import Tensor, nn
from zoo import ZOO, conv, images, tensors

import fxprune
from fxprune.errors import FxpruneError, PlanError, VerificationError
from fxprune.reporting.report import pruned_of


def pruned(name: str, alpha: float = 0.5, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, fxprune.Plan, Any]:
    case = ZOO[name]
    model = case.build().to(dtype).eval()
    plan = fxprune.Scores.random(model, case.example(2).to(dtype)).plan(alpha=alpha, allocate="tod-by-group")
    return model, plan, fxprune.apply(model, plan)


@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 0.1), (torch.float16, 0.02)]
)
def test_every_floating_type(dtype: torch.dtype, bound: float) -> None:
    model, plan, small = pruned("mlp", dtype=dtype)
    assert fxprune.verify(model, plan, small, tensors(6)(4).to(dtype)) <= bound
    assert all(parameter.dtype == dtype for parameter in small.parameters())


def test_nothing_is_changed_by_it() -> None:
    model, plan, small = pruned("residual")
    model.train()
    small.train()
    before = picture(model), picture(small)
    fxprune.verify(model, plan, small, images()(3))
    assert same_picture(before[0], picture(model))
    assert same_picture(before[1], picture(small))


def test_a_compensated_model_is_said_to_be_one() -> None:
    model = ZOO["residual"].build()
    small = fxprune.compress(model, [(images()(20), torch.arange(20) % 5)], macs=0.6, progress=False)
    plan = pruned_of(small).plan
    with pytest.raises(
        VerificationError,
        match=r'the weights of Residual were changed after the removal, by compensate="sequential", so it cannot equal '
        r'the masked original \(.* by .* of the output\'s scale.*\): compare plain removal, .*compensate="none"',
    ):
        fxprune.verify(model, plan, small, images()(3))
    assert fxprune.verify(model, plan, fxprune.apply(model, plan), images()(3)) < 1e-4
    assert fxprune.report(small).error < 1e-4


def test_another_plan_is_said_to_be_one() -> None:
    model, plan, small = pruned("residual")
    others = {name: kept[:-1] for name, kept in plan.keep.items() if 1 < len(kept) < plan.widths[name]}
    for other in (fxprune.Plan.from_kept(model, images()(2), {}), fxprune.Plan.from_kept(model, images()(2), others)):
        with pytest.raises(VerificationError, match=r'was not made by the plan given, but by small\.meta\["fxprune"\]'):
            fxprune.verify(model, other, small, images()(2))
    assert fxprune.verify(model, small.meta["fxprune"].plan, small, images()(2)) < 1e-4


def test_a_wrong_weight_is_caught() -> None:
    model, plan, small = pruned("residual")
    with torch.no_grad():
        small.a["conv2"].weight.copy_(small.a["conv2"].weight.flip(1))
    with pytest.raises(
        VerificationError, match=r"differs from the zero-masked original by .* of the output's scale, more than 0.0001"
    ):
        fxprune.verify(model, plan, small, images()(2))


@pytest.mark.parametrize("key", ["norm.running_mean", "norm.bias", "a.bn1.running_var", "down.1.weight", "head.2.bias"])
def test_channels_in_a_wrong_order_are_caught(key: str) -> None:
    model, plan, small = pruned("residual")
    state = small.state_dict()
    state[key].copy_(state[key].flip(0))
    with pytest.raises(VerificationError, match="differs from the zero-masked original"):
        fxprune.verify(model, plan, small, images()(2))


def test_a_wrong_literal_is_caught_by_the_labels() -> None:
    model, plan, small = pruned("flip_and_roll", alpha=0.0)
    (node,) = [node for node in small.graph.nodes if node.name == "flip"]
    node.args = (node.args[0], 2)
    small.recompile()
    with pytest.raises(VerificationError, match=r"node flip has other labels than .*; please report the model"):
        fxprune.verify(model, plan, small, images()(2))


def test_outputs_that_are_not_finite_are_caught() -> None:
    model, plan, small = pruned("mlp")
    with torch.no_grad():
        small.get_submodule("4").bias[0] = float("nan")
    with pytest.raises(VerificationError, match="by inf of the output's scale"):
        fxprune.verify(model, plan, small, tensors(6)(2))


@layers(lambda: dict(
    first=nn.Linear(6, 16), last=nn.Linear(16, 5), mask=nn.Buffer(torch.tensor([False, False, True, False, False])),
))  # fmt: skip
def Masked(self, x: torch.Tensor) -> torch.Tensor:
    """A network of which some outputs are minus infinity, as those of actions that are not allowed."""
    return self.last(self.first(x).relu()).masked_fill(self.mask, float("-inf"))


def test_infinities_that_both_hold_are_no_difference() -> None:
    torch.manual_seed(0)
    model, x, y = Masked().eval(), torch.randn(40, 6), torch.tensor([0, 1, 3, 4] * 10)
    small = fxprune.compress(model, [(x, y)], params=0.6, progress=False)
    assert small.get_submodule("first").out_features < 16
    plan = fxprune.Scores.random(model, x).plan(alpha=0.5)
    small = fxprune.apply(model, plan)
    assert fxprune.verify(model, plan, small, x) < 1e-6
    small.mask[0] = True
    with pytest.raises(VerificationError, match="by inf of the output's scale"):
        fxprune.verify(model, plan, small, x)


def test_an_original_that_gives_nan_without_the_units_says_so() -> None:
    model, plan, small = pruned("mlp")
    with torch.no_grad():
        for other in (model, small):
            other.get_submodule("4").bias[0] = float("nan")
    with pytest.raises(VerificationError, match="the zero-masked original gives NaN on the example"):
        fxprune.verify(model, plan, small, tensors(6)(2))


def test_outputs_of_another_shape_are_caught() -> None:
    model, plan, _ = pruned("mlp")
    other = fxprune.capture(nn.Sequential(nn.Linear(6, 3)), tensors(6)(2))
    with pytest.raises(VerificationError):
        fxprune.verify(model, plan, other, tensors(6)(2))
    plain = torch.fx.symbolic_trace(nn.Sequential(nn.Linear(6, 3)))
    with pytest.raises(
        VerificationError, match=r"the rewritten model gives shapes \[\(2, 3\)\], the original \[\(2, 5\)\]"
    ):
        fxprune.verify(model, plan, plain, tensors(6)(2))


def test_the_tolerance_can_be_set() -> None:
    model, plan, small = pruned("residual")
    with torch.no_grad():
        small.head[2].bias += 0.01
    error = fxprune.verify(model, plan, small, images()(2), tolerance=0.5)
    assert 1e-4 < error < 0.5
    with pytest.raises(VerificationError, match="more than 1e-05"):
        fxprune.verify(model, plan, small, images()(2), tolerance=1e-5)


def test_a_plan_that_does_not_fit_is_refused() -> None:
    _, plan, small = pruned("mlp")
    other = ZOO["residual"].build()
    with pytest.raises(PlanError, match="which has no channels there"):
        fxprune.verify(other, plan, small, images()(2))


def test_an_output_without_floats_cannot_be_compared() -> None:
    @layers(lambda: dict(a=conv(3, 8), b=conv(8, 5)))
    def Answer(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).relu()).mean((2, 3)).argmax(1)

    model = Answer().eval()
    plan = fxprune.Scores.random(model, images()(2)).plan(alpha=0.5)
    small = fxprune.apply(model, plan)
    with pytest.raises(FxpruneError, match="the model's output holds no tensor of floats: there is nothing to compare"):
        fxprune.verify(model, plan, small, images()(2))


NOISE: dict[str, Callable[[Tensor], Tensor]] = {
    "gaussian": lambda h: h + torch.randn_like(h),
    "around": lambda h: torch.normal(h, 0.5) + torch.normal(h, h.abs() + 1),
    "flipped": lambda h: h * torch.bernoulli(torch.sigmoid(h)) + torch.rand_like(h),
    "scaled": lambda h: h.exp() * torch.empty_like(h).normal_(),
}


class Noisy(nn.Module):
    """Draws numbers for each of its hidden units."""

    def __init__(self, noise: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.head, self.noise = nn.Linear(6, 16), nn.Linear(16, 16), nn.Linear(16, 3), noise

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.noise(self.b(self.noise(self.a(x)).relu())))


@pytest.mark.filterwarnings("ignore:.* draws random numbers in eval mode")
@pytest.mark.parametrize("noise", NOISE)
def test_models_that_draw_noise_are_compared_without_it(noise: str) -> None:
    model, x = Noisy(NOISE[noise]).double(), tensors(6)(4).double()
    scores = fxprune.Scores.random(model, x, unknown="freeze")
    plan = scores.plan(params=0.6)
    small: Any = fxprune.apply(model, plan)
    assert small.a.out_features < 16
    assert fxprune.verify(model, plan, small, x) < 1e-9
    with torch.no_grad():
        small.b.bias += 0.1
    with pytest.raises(VerificationError, match="differs from the zero-masked original"):
        fxprune.verify(model, plan, small, x)


@layers(lambda: dict(a=conv(3, 8), b=conv(4, 4), head=nn.Linear(8, 3)))
def Folded(self, x: Tensor) -> Tensor:
    """Works on the halves of its channels by themselves, in a batch that is twice as long."""
    y = self.a(x)
    return self.head(self.b(y.reshape(-1, 4, 8, 8)).reshape(y.shape).mean((2, 3)))


def test_what_holds_for_the_examples_batch_alone_is_caught() -> None:
    model, x = Folded().eval(), images()(2)
    plan = fxprune.Scores.random(model, x).plan(params=0.7)
    small: Any = fxprune.apply(model, plan)
    assert fxprune.verify(model, plan, small, x) < 1e-5
    node = [node for node in small.graph.nodes if node.target == "reshape"][-1]
    node.args = (node.args[0], 2, len(plan.keep["b"]) * 2, 8, 8)
    small.recompile()
    with pytest.raises(
        VerificationError, match=r"fails on 3 samples like the 2 of the example, on which the original runs \(Runtime"
    ):
        fxprune.verify(model, plan, small, x)


def test_what_holds_for_the_examples_values_alone_is_caught() -> None:
    model, plan, small = pruned("mlp")
    small.register_buffer("wanted", small(tensors(6)(2)).detach())
    (output,) = [node for node in small.graph.nodes if node.op == "output"]
    with small.graph.inserting_before(output):
        wanted = small.graph.get_attr("wanted")
    output.replace_input_with(output.args[0], wanted)
    plain = torch.fx.GraphModule(small, small.graph)
    with pytest.raises(VerificationError, match=r"on 3 samples like the 2 .* gives shapes \[\(2, 5\)\], the orig"):
        fxprune.verify(model, plan, plain, tensors(6)(2))


@layers(lambda: dict(a=nn.Linear(6, 16), b=nn.Linear(16, 5), last=torch.zeros(1), calls=nn.Buffer(torch.zeros(1))))
def Counting(self, x: Tensor) -> Tensor:
    """Counts its calls in a buffer, in place, and gives the count away; keeps its last output."""
    self.calls.add_(1)
    self.last = self.b(self.a(x).relu())
    return self.last + self.calls


@pytest.mark.filterwarnings("ignore:the forward of Counting changes calls")
def test_what_a_forward_changes_is_put_back() -> None:
    model, x = Counting().eval(), tensors(6)(2)
    for share in (0.6, 1.0):
        plan = fxprune.Scores.random(model, x).plan(params=share)
        small = fxprune.apply(model, plan)
        before = picture(model), picture(small)
        assert fxprune.verify(model, plan, small, x) < 1e-5
        assert same_picture(before[0], picture(model))
        assert same_picture(before[1], picture(small))


def test_a_plan_that_removes_nothing_is_proved_against_the_model_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = ZOO["mlp"].build().eval(), tensors(6)(2)
    graph = fxprune.capture(model, x)
    plan = fxprune.Scores.random(model, x).plan(params=1.0)
    small = fxprune.apply(model, plan)
    assert fxprune.verify(model, plan, small, x) == 0
    monkeypatch.setattr(sys.modules["fxprune.rewriting.proof"], "capture_as", lambda settings, model, example: graph)
    with torch.no_grad():
        model.get_submodule("4").bias.add_(1)
    with pytest.raises(VerificationError, match=r"differs from the model that it was made from by .* on the example"):
        fxprune.verify(model, plan, small, x)


def test_the_tolerance_is_also_that_against_the_model_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = ZOO["mlp"].build().eval(), tensors(6)(2)
    graph = fxprune.capture(model, x)
    plan = fxprune.Scores.random(model, x).plan(params=1.0)
    small = fxprune.apply(model, plan)
    monkeypatch.setattr(sys.modules["fxprune.rewriting.proof"], "capture_as", lambda settings, model, example: graph)
    with torch.no_grad():
        model.get_submodule("4").bias.add_(1)
    assert 0.01 < fxprune.verify(model, plan, small, x, tolerance=1e3) < 1e3
