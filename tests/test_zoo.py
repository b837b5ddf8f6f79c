"""Every network of the zoo, under random plans and through the whole pipeline."""

from __future__ import annotations

import copy
import dataclasses
import io
import pickle

import numpy as np
import pytest
import torch
from helpers import (
    batches,
    call,
    difference,
    double,
    outputs,
    parameters,
    picture,
    rounding,
    same_kind,
    same_picture,
    squares,
    storages,
    tensors_of,
    width,
)
from zoo import CLASSES, ZOO, Case

import fxprune
from fxprune.planning.planned import planned_by
from fxprune.rewriting.oracle import oracle

every_case = pytest.mark.parametrize("case", ZOO.values(), ids=ZOO)


@every_case
@pytest.mark.parametrize("alpha", [0.2, 0.5, 1.0])
def test_verify_holds_in_float32(case: Case, alpha: float) -> None:
    graph, plan, small = case.graph(), case.plan(alpha), case.small(alpha)
    assert fxprune.verify(graph, plan, small, case.example(3)) < 1e-4  # and on four samples
    masked = oracle(*planned_by(graph, plan))
    for samples in (1, 5):
        example = case.example(samples)
        assert difference(outputs(masked, example), outputs(small, example)) < 1e-4, samples


@every_case
def test_verify_holds_in_float64(case: Case) -> None:
    example = double(case.example(2))
    graph = fxprune.capture(case.build().double(), example)
    scores, rng = fxprune.Scores.random(graph, example), np.random.default_rng(1)
    for alpha in (0.3, 0.5, 0.7, 1.0):
        plan = dataclasses.replace(scores, propose=rng.random(len(scores.propose))).plan(alpha=alpha)
        assert fxprune.verify(graph, plan, fxprune.apply(graph, plan), example) < 1e-9


@every_case
def test_what_can_go_goes_and_what_must_stay_stays(case: Case) -> None:
    model, small = case.build(), case.small(alpha=1.0)
    for name in case.shrinks:
        assert width(small, name) < width(model, name), name
    for name in case.frozen:
        assert width(small, name) == width(model, name), name
    assert parameters(small) < parameters(model)


@every_case
def test_widths_are_those_of_the_plan(case: Case) -> None:
    model, plan, small = case.build(), case.plan(alpha=0.5), case.small(alpha=0.5)
    modules = dict(small.named_modules(remove_duplicate=False))
    for site, kept in plan.keep.items():
        if site in modules:
            assert width(small, site) == len(kept), site
    for name, module in model.named_modules(remove_duplicate=False):
        if name and type(module).__module__.startswith("torch.nn"):
            assert same_kind(modules[name], module), name


@every_case
def test_empty_plan_is_the_identity(case: Case) -> None:
    model, example = case.build(), case.example(2)
    some = case.plan(alpha=0.5)
    plan = dataclasses.replace(some, keep={site: tuple(range(of)) for site, of in some.widths.items()})
    small = fxprune.apply(model, plan)
    assert difference(outputs(model, example), outputs(small, example)) <= rounding(model)
    before, after = model.state_dict(), small.state_dict()
    assert list(before) == list(after)
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert storages(model).isdisjoint(storages(small))


@every_case
def test_other_batch_and_image_sizes(case: Case) -> None:
    model, plan, small = case.build(), case.plan(alpha=0.5), case.small(alpha=0.5)
    others = [case.example(1), case.example(5)] + ([case.example(2, size=11)] if case.any_size else [])
    for other in others:
        assert [t.shape for t in outputs(small, other)] == [t.shape for t in outputs(model, other)]
        assert fxprune.verify(model, plan, small, other) < 1e-4


@every_case
def test_trains_for_two_steps(case: Case) -> None:
    model, example = case.build(), case.example(4)
    small = copy.deepcopy(case.small(alpha=0.5)).train()
    assert [p.requires_grad for p in small.parameters()] == [p.requires_grad for p in model.parameters()]
    optimizer = torch.optim.SGD([p for p in small.parameters() if p.requires_grad], lr=1e-2)
    before = [p.detach().clone() for p in small.parameters()]
    for _ in range(2):
        optimizer.zero_grad()
        loss = squares(call(small, example))
        loss.backward()
        optimizer.step()
    assert loss.isfinite()
    assert any(not torch.equal(p, old) for p, old in zip(small.parameters(), before, strict=True))
    squares(call(model.train(), example)).backward()
    reached = {name: p.grad is not None for name, p in model.named_parameters()}
    assert {name: p.grad is not None for name, p in small.named_parameters()} == reached


@every_case
def test_state_dict_round_trip(case: Case) -> None:
    model, example = case.build(), case.example(2)
    first, second = copy.deepcopy(case.small(alpha=0.5)), fxprune.apply(case.build(), case.plan(alpha=0.5))
    assert list(first.state_dict()) == list(model.state_dict())
    with torch.no_grad():
        for parameter in first.parameters():
            parameter.add_(0.01)
    stream = io.BytesIO()
    torch.save(first.state_dict(), stream)
    stream.seek(0)
    second.load_state_dict(torch.load(stream, weights_only=True))
    assert difference(outputs(first, example), outputs(second, example)) == 0


@every_case
def test_copies_and_pickles(case: Case) -> None:
    model, example, small = case.build(), case.example(2), case.small(alpha=0.5)
    expected = outputs(small, example)
    for twin in (copy.deepcopy(small), pickle.loads(pickle.dumps(small))):
        assert type(twin).__name__ == type(small).__name__ == type(model).__name__
        assert difference(expected, outputs(twin, example)) == 0
        assert list(twin.state_dict()) == list(small.state_dict())
        assert storages(twin).isdisjoint(storages(small))


@every_case
def test_compress_leaves_the_model_alone(case: Case) -> None:
    """The whole pipeline with real scores; the model has odd modes, gradients and flags, which must all survive."""
    model = case.build()
    for index, module in enumerate(model.modules()):
        module.training = index % 3 != 1
    for index, parameter in enumerate(model.parameters()):
        parameter.grad = torch.ones_like(parameter) if index % 2 else None
        parameter.requires_grad_(parameter.requires_grad and index % 4 != 3)
    handle = model.register_forward_hook(lambda *_: None)
    loader = batches(case.example, CLASSES)
    before = picture(model)
    small = fxprune.compress(model, loader, alpha=1.0, loss=squares)
    assert same_picture(before, picture(model))
    handle.remove()
    assert storages(model).isdisjoint(storages(small))
    assert parameters(small) < parameters(model)
    modes = {name: module.training for name, module in small.named_modules()}
    assert all(modes[name] == module.training for name, module in model.named_modules() if name in modes)
    flags = dict(small.named_parameters())
    assert all(flags[name].requires_grad == p.requires_grad for name, p in model.named_parameters())
    assert all(p.grad is None for p in small.parameters())
    assert all(tensor.isfinite().all() for tensor in tensors_of(outputs(small, case.example(2))))
