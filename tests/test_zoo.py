"""Every network of the zoo: captured, priced, pruned by random plans in two precisions, trained, and compressed.

The checks of one network share what they look at: one capture, and one smaller network a level.
"""

from __future__ import annotations

import copy
import dataclasses
import io
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from helpers import (
    batches,
    call,
    difference,
    double,
    graph_of,
    outputs,
    parameters,
    part_of,
    picture,
    rounding,
    same_kind,
    same_picture,
    squares,
    storages,
    tensors_of,
    width,
)  # fmt: skip
from torch import fx, nn
from zoo import CLASSES, ZOO, Case

import fxprune
from fxprune.caller.batches import sample_count
from fxprune.coupling.couple import analyse
from fxprune.planning.costs import costs_of
from fxprune.planning.plan import kept_units
from fxprune.planning.planned import planned_by
from fxprune.rewriting.oracle import oracle
from fxprune.rewriting.rewrite import rewrite
from fxprune.tracing import facts
from fxprune.tracing.facts import facts_on, macs
from fxprune.tracing.graph import ModelGraph, example_of

every_case = pytest.mark.parametrize("case", part_of(ZOO.values(), 7, ZOO), scope="module")  # all tests of one in a row
some_cases = pytest.mark.parametrize("case", part_of(ZOO.values(), 12, ZOO), scope="module")
few_cases = pytest.mark.parametrize("case", part_of(ZOO.values(), 24, ZOO), scope="module")


def others(case: Case) -> list[Any]:
    """Batches of other sizes, and images of another size where the model takes any."""
    return [case.example(1), case.example(5)] + ([case.example(2, size=11)] if case.any_size else [])


# -- capture and costs -------------------------------------------------------------------------------------------------


@every_case
def test_captured_and_priced(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    model, example = case.build().eval(), case.example(2)
    before = picture(model)
    graph = fxprune.capture(model, example)
    assert same_picture(before, picture(model))
    is_a_copy_with_the_names_of(graph, model)
    for other in (example, *others(case)):
        assert difference(outputs(model, other), outputs(graph, other)) <= rounding(model)
    costs_what_was_foretold(graph)
    shapes_alone_tell_what_numbers_do(graph, example, monkeypatch)


def is_a_copy_with_the_names_of(graph: ModelGraph, model: nn.Module) -> None:
    assert isinstance(graph, fx.GraphModule)
    assert type(graph).__name__ == type(model).__name__
    assert list(graph.state_dict()) == list(model.state_dict())
    assert storages(graph).isdisjoint(storages(model))
    found = dict(graph.named_modules(remove_duplicate=False))
    for name, module in model.named_modules(remove_duplicate=False):
        assert not name or same_kind(found.get(name), module), name


def shapes_alone_tell_what_numbers_do(graph: ModelGraph, example: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = macs(graph, example), facts_on(graph, example).specs
    specs = {node.name: node.meta["spec"] for node in graph.graph.nodes}
    assert sample_count(example) != 2 or specs == alone[1]
    monkeypatch.setattr(facts, "places_of", lambda *_: set())  # every pass runs on the numbers
    assert alone == (macs(graph, example), facts_on(graph, example).specs)


def costs_what_was_foretold(graph: ModelGraph) -> None:
    """Random plans, with the options too where these lead to other groups; every node's work is understood."""
    tried, example = list[str](), example_of(graph)
    for options in ({}, {"inexact": True}, {"head_dim": True}):
        coupling = analyse(graph, **options)
        groups = [unit for group in coupling.prunable for unit in group.units]
        assert groups == list(range(coupling.units))  # numbered without gaps, each in one group
        assert {int(unit) for site in coupling.sites for unit in site.units if unit >= 0} == set(groups)
        listing = "\n".join(map(str, fxprune.couple(graph, **options)))
        if listing in tried:
            continue
        tried.append(listing)
        costs, scores = costs_of(graph, coupling), fxprune.Scores.random(graph, example, seed=3, **options)
        assert costs.inexact == ()
        everything = np.ones(coupling.units, dtype=bool)
        assert (costs.parameters(everything), costs.macs(everything)) == (parameters(graph), macs(graph, example))
        for alpha in (0.3, 1.0):
            keep = kept_units(scores.plan(alpha), coupling)
            small = rewrite(graph, coupling, keep)
            assert (costs.parameters(keep), costs.macs(keep)) == (parameters(small), macs(small, example))


# -- pruning -----------------------------------------------------------------------------------------------------------


@every_case
def test_pruned_at_two_levels(case: Case) -> None:
    model, graph = case.build(), case.graph()
    smalls = {alpha: case.small(alpha) for alpha in (0.5, 1.0)}
    for alpha in (0.5, 1.0):
        gives_what_the_zero_masked_original_gives(case, graph, alpha)
        attributes_agree_with_the_tensors(smalls[alpha])
    for name in case.shrinks:
        assert width(smalls[1.0], name) < width(model, name), name
    for name in case.frozen:
        assert width(smalls[1.0], name) == width(model, name), name
    widths_are_those_of(case.plan(0.5), smalls[0.5], model)
    costs_fall([fxprune.report(small) for small in smalls.values()], model)


def gives_what_the_zero_masked_original_gives(case: Case, graph: ModelGraph, alpha: float) -> None:
    plan, small = case.plan(alpha), case.small(alpha)
    assert fxprune.verify(graph, plan, small, case.example(3)) < 1e-4
    masked = oracle(*planned_by(graph, plan))
    for other in others(case):
        assert difference(outputs(masked, other), outputs(small, other)) < 1e-4


def widths_are_those_of(plan: fxprune.Plan, small: nn.Module, model: nn.Module) -> None:
    modules = dict(small.named_modules(remove_duplicate=False))
    for site, kept in plan.keep.items():
        if site in modules:
            assert width(small, site) == len(kept), site
    for name, module in model.named_modules(remove_duplicate=False):
        if name and type(module).__module__.startswith("torch.nn"):
            assert same_kind(modules[name], module), name


def attributes_agree_with_the_tensors(small: nn.Module) -> None:
    """What a layer says of itself is what it holds; so its repr, and whoever reads it, is right."""
    for name, module in small.named_modules():
        if isinstance(module, nn.Linear):
            assert tuple(module.weight.shape) == (module.out_features, module.in_features), name
        elif isinstance(module, nn.modules.conv._ConvTransposeNd):
            assert tuple(module.weight.shape[:2]) == (module.in_channels, module.out_channels // module.groups), name
        elif isinstance(module, nn.modules.conv._ConvNd):
            assert tuple(module.weight.shape[:2]) == (module.out_channels, module.in_channels // module.groups), name
        elif isinstance(module, nn.modules.batchnorm._BatchNorm):
            sizes = [t.numel() for t in (module.weight, module.bias, module.running_mean) if t is not None]
            assert set(sizes) == {module.num_features}, name
        elif isinstance(module, nn.PReLU):
            assert module.weight.numel() == module.num_parameters, name
        if isinstance(module, (nn.Linear, nn.modules.conv._ConvNd)) and module.bias is not None:
            assert len(module.bias) == getattr(module, "out_channels", getattr(module, "out_features", None)), name


def costs_fall(reports: list[fxprune.Report], model: nn.Module) -> None:
    for report in reports:
        assert report.params_before == parameters(model)
        assert all(0 < group.after <= group.before for group in report.groups)
    for series in ([r.params_after for r in reports], [r.macs_after for r in reports]):
        assert series == sorted(series, reverse=True)
    assert reports[-1].params_after < reports[-1].params_before
    assert reports[-1].macs_after < reports[-1].macs_before


@some_cases
def test_pruned_in_float64(case: Case) -> None:
    example = double(case.example(2))
    graph = graph_of(case.build().double(), example)
    scores, rng = fxprune.Scores.random(graph, example), np.random.default_rng(1)
    for alpha in (0.3, 0.7):
        plan = dataclasses.replace(scores, propose=rng.random(len(scores.propose))).plan(alpha=alpha)
        assert fxprune.verify(graph, plan, fxprune.apply(graph, plan), example) < 1e-9


# -- what comes out ----------------------------------------------------------------------------------------------------


@some_cases
def test_what_comes_out_is_an_ordinary_module(case: Case) -> None:
    model, small = case.build(), case.small(0.5)
    the_empty_plan_is_the_identity(case, model)
    comes_back_from_copies_pickles_and_states(case, model, small)
    trains_as_the_model_does(case, model, copy.deepcopy(small))
    is_clean(case, copy.deepcopy(small))


def the_empty_plan_is_the_identity(case: Case, model: nn.Module) -> None:
    some, example = case.plan(0.5), case.example(2)
    plan = dataclasses.replace(some, keep={site: tuple(range(of)) for site, of in some.widths.items()})
    same = fxprune.apply(model, plan)
    assert difference(outputs(model, example), outputs(same, example)) <= rounding(model)
    before, after = model.state_dict(), same.state_dict()
    assert list(before) == list(after)
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert storages(model).isdisjoint(storages(same))


def comes_back_from_copies_pickles_and_states(case: Case, model: nn.Module, small: nn.Module) -> None:
    expected = outputs(small, case.example(2))
    twins = copy.deepcopy(small), pickle.loads(pickle.dumps(small))
    for twin in twins:
        assert type(twin).__name__ == type(small).__name__ == type(model).__name__
        assert difference(expected, outputs(twin, case.example(2))) == 0
        assert list(twin.state_dict()) == list(small.state_dict()) == list(model.state_dict())
        assert storages(twin).isdisjoint(storages(small))
    with torch.no_grad():
        for parameter in twins[0].parameters():
            parameter.add_(0.01)
    stream = io.BytesIO()
    torch.save(twins[0].state_dict(), stream)
    stream.seek(0)
    twins[1].load_state_dict(torch.load(stream, weights_only=True))
    assert difference(outputs(twins[0], case.example(2)), outputs(twins[1], case.example(2))) == 0


def trains_as_the_model_does(case: Case, model: nn.Module, small: nn.Module) -> None:
    example = case.example(4)
    assert [p.requires_grad for p in small.parameters()] == [p.requires_grad for p in model.parameters()]
    optimizer = torch.optim.SGD([p for p in small.train().parameters() if p.requires_grad], lr=1e-2)
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


@pytest.mark.parametrize("case", part_of(list(ZOO.values())[::4], 4, list(ZOO)[::4]), scope="module")
def test_it_can_be_pruned_again(case: Case) -> None:
    """Its plan verifies against itself, and the keys are still the first model's."""
    model, once = case.build(), case.small(0.5)
    plan = fxprune.Scores.random(once, case.example(2), seed=2).plan(alpha=0.6)
    twice = fxprune.apply(once, plan)
    assert fxprune.verify(once, plan, twice, case.example(3)) < 1e-4
    assert list(twice.state_dict()) == list(model.state_dict())
    assert type(twice).__name__ == type(model).__name__


def is_clean(case: Case, small: Any) -> None:
    small.graph.lint()
    assert all("fxprune" not in str(node.meta) for node in small.graph.nodes)
    small.recompile()
    dtypes = {tensor.dtype for tensor in outputs(small.double(), double(case.example(2)))}
    assert dtypes <= {torch.float64, torch.int64, torch.bool}


@few_cases
def test_compress_leaves_the_model_alone(case: Case) -> None:
    """The whole pipeline with real scores; the model has odd modes, gradients and flags, which must all survive."""
    model = case.build()
    for index, module in enumerate(model.modules()):
        module.training = index % 3 != 1
    for index, parameter in enumerate(model.parameters()):
        parameter.grad = torch.ones_like(parameter) if index % 2 else None
        parameter.requires_grad_(parameter.requires_grad and index % 4 != 3)
    handle = model.register_forward_hook(lambda *_: None)
    before = picture(model)
    small = fxprune.compress(model, batches(case.example, CLASSES), alpha=1.0, loss=squares)
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
