"""The table of rules: unknown operations, rules of the user's own, double registration."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from helpers import width
from nets import layers
from torch import Tensor, fx, nn
from zoo import conv, head, images, tensors

import fxprune
from fxprune.errors import RewriteError, UnsupportedOpError, VerificationError
from fxprune.rules.movement import move
from fxprune.rules.table import RULES, rule


def wobble(x: Tensor, amount: float = 0.5) -> Tensor:
    """An element-wise function that no rule knows."""
    return x + amount * torch.sin(x)


def in_eights(x: Tensor) -> Tensor:
    """A movement with a literal number of channels inside, where no rewriting can reach it."""
    return x.reshape(-1, 8, 64)


def backwards(x: Tensor, amount: float = 0.5) -> Tensor:
    """The same with the channels in reverse order."""
    return wobble(x, amount).flip(1)


fx.wrap("wobble")
fx.wrap("in_eights")
fx.wrap("backwards")


@layers(lambda: dict(a=conv(3, 8), b=conv(8, 8), c=conv(8, 8), head=head(8)))
def Wobbly(self, x: Tensor) -> Tensor:
    x = self.b(self.a(x).relu())
    return self.head(self.c(wobble(x, amount=0.25)))


class Blend(nn.Module):
    """A module with a parameter a channel, whose forward torch.fx cannot follow."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(channels))

    def forward(self, x: Tensor) -> Tensor:
        if float(x.detach().abs().max()) < 0:
            return x
        return x * self.weight.sigmoid().view(1, -1, 1, 1)


@pytest.fixture
def table() -> Iterator[None]:
    """Rules that a test registers are gone after it."""
    before = dict(RULES)
    yield
    RULES.clear()
    RULES.update(before)


def test_an_unknown_function_is_an_error_that_says_where_and_what_to_do() -> None:
    with pytest.raises(UnsupportedOpError) as error:
        fxprune.couple(fxprune.capture(Wobbly(), images()(2)))
    message = str(error.value)
    assert "no rule says what function" in message
    assert "wobble (node wobble, " in message
    assert "test_rules.py" in message
    assert 'register one with @fxprune.rules.rule(...), or pass unknown="freeze"' in message


@pytest.mark.parametrize("overload", [False, True])
def test_an_unknown_operator_has_the_name_by_which_it_is_called(*, overload: bool) -> None:
    with torch.library._scoped_library("fxprune_tests", "DEF") as library:
        library.define("triple(Tensor x) -> Tensor")
        library.impl("triple", lambda x: x * 3, "CompositeImplicitAutograd")
        packet = torch.ops.fxprune_tests.triple

        class Tripled(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.a = nn.Linear(6, 4)

            def forward(self, x: Tensor) -> Tensor:
                return packet.default(self.a(x)) if overload else packet(self.a(x))

        name = f"torch.ops.fxprune_tests.triple{'.default' * overload}"
        with pytest.raises(UnsupportedOpError, match=rf"no rule says what function {re.escape(name)} \(node triple"):
            fxprune.couple(fxprune.capture(Tripled(), tensors(6)(2)))


def test_an_unknown_function_is_an_error_in_every_stage() -> None:
    batches = [(images()(4), torch.arange(4))]
    for run in (
        lambda: fxprune.score(Wobbly(), batches, progress=False),
        lambda: fxprune.compress(Wobbly(), batches, progress=False),
        lambda: fxprune.Scores.random(Wobbly(), images()(2)),
    ):
        with pytest.raises(UnsupportedOpError, match="wobble"):
            run()


def test_an_unknown_function_freezes_what_it_touches_on_demand() -> None:
    groups = fxprune.couple(fxprune.capture(Wobbly(), images()(2)), unknown="freeze")
    frozen = {group.name: group.frozen for group in groups}
    assert frozen["a"] is None
    assert "no rule for function" in str(frozen["b"])
    assert "wobble" in str(frozen["b"])
    assert frozen["c"] is None


def test_a_rule_of_the_users_for_a_function(table: None) -> None:
    rule(wobble)(lambda ctx, x, amount=0.5: x)
    model = Wobbly()
    plan = fxprune.Scores.random(model, images()(2)).plan(alpha=1.0)
    small = fxprune.apply(model, plan)
    assert fxprune.verify(model, plan, small, images()(3)) < 1e-4
    assert width(small, "b") == 1


def test_a_rule_of_the_users_for_a_module(table: None) -> None:
    """It makes the module a leaf, and its parameters are narrowed by the labels that the rule ties them to."""

    def blend(ctx: Any, module: Blend, x: Any) -> Any:
        weight = ctx.own("weight")
        ctx.tie(ctx.vector(x, 1), ctx.vector(weight, 0))
        return x

    rule(Blend)(blend)
    model = nn.Sequential(conv(3, 8), Blend(8), nn.ReLU(), conv(8, 6), head(6))
    plan = fxprune.Scores.random(model, images()(2)).plan(alpha=0.6)
    small = fxprune.apply(model, plan)
    assert fxprune.verify(model, plan, small, images()(3)) < 1e-4
    assert len(small.get_submodule("1").weight) == len(plan.keep["0"]) < 8
    assert type(small.get_submodule("1")) is Blend


class Using(nn.Module):
    """A function between two layers."""

    def __init__(self, function: Callable[[Tensor], Tensor], reader: nn.Module) -> None:
        super().__init__()
        self.a, self.function, self.b, self.head = conv(3, 8), function, reader, nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.b(self.function(self.a(x)))
        return self.head(x.flatten(2).mean(2))


def test_an_operation_with_a_hidden_literal_cannot_be_narrowed(table: None) -> None:
    rule(in_eights)(move)
    model = Using(lambda x: in_eights(x), nn.Conv1d(8, 6, 1))
    plan = fxprune.Scores.random(model, images()(2)).plan(alpha=1.0)
    with pytest.raises(RewriteError, match=r"in_eights.* cannot be narrowed .*: exclude the layers that feed it"):
        fxprune.apply(model, plan)
    kept = fxprune.Scores.random(model, images()(2), exclude=["a"]).plan(alpha=1.0)
    assert fxprune.verify(model, kept, fxprune.apply(model, kept), images()(2)) < 1e-4


def test_a_rule_that_lies_is_caught(table: None) -> None:
    """It says that the channels go through in order, but they come out reversed."""
    rule(wobble, backwards)(lambda ctx, x, amount=0.5: x)
    model = Using(lambda x: wobble(x), conv(8, 6))
    plan = fxprune.Scores.random(model, images()(2), seed=1).plan(alpha=0.7)
    small = fxprune.apply(model, plan)
    (node,) = [node for node in small.graph.nodes if node.target is wobble]
    node.target = backwards
    small.recompile()
    with pytest.raises(VerificationError):
        fxprune.verify(model, plan, small, images()(2))


def test_a_second_rule_for_one_operation_is_an_error(table: None) -> None:
    def first(ctx: Any, x: Any) -> Any:
        return x

    def second(ctx: Any, x: Any) -> Any:
        return x

    rule(wobble)(first)
    rule(wobble)(first)
    with pytest.raises(
        ValueError, match=r"function .*wobble has a rule already, .*first.*: remove that one or do not add .*second"
    ):
        rule(wobble)(second)
    assert RULES[wobble] is first
    with pytest.raises(ValueError, match=r"function .*relu.* has a rule already"):
        rule(torch.relu)(second)


def test_a_subclass_with_its_parents_forward_takes_its_parents_rule() -> None:
    class Conv(nn.Conv2d):
        pass

    model = nn.Sequential(Conv(3, 8, 3), nn.ReLU(), Conv(8, 6, 3), head(6))
    plan = fxprune.Scores.random(model, images()(2)).plan(alpha=0.6)
    small = fxprune.apply(model, plan)
    assert type(small.get_submodule("0")) is Conv
    assert fxprune.verify(model, plan, small, images()(2)) < 1e-4
