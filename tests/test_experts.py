"""Mixtures of experts: hidden units and whole experts are removed exactly, and the report lists the experts."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import part_of
from torch import Tensor, nn

import fxprune
from fxprune.coupling.couple import analyse
from fxprune.errors import NarrowError, PlanError
from fxprune.planning.costs import costs_of
from fxprune.planning.planned import planned_by
from fxprune.rules.experts import expert_linear

pytest.importorskip("transformers")
from experts import (
    FAMILIES,
    LOOPS,
    Always,
    Loop,
    Single,
    Stacked,
    at_minus_infinity,
    family,
    halved,
    loop,
    routers_of,
    words,
)

pytestmark = pytest.mark.filterwarnings("ignore")
WAYS = ("eager", "grouped_mm", "batched_mm")


# -- models of transformers --------------------------------------------------------------------------------------------


def masked(model: Any, plan: fxprune.Plan, batch: dict[str, Tensor]) -> Tensor:
    """The original's logits with removed hidden units and experts at zero, and the latter's router logits at -inf."""
    own, removed = copy.deepcopy(model), dict[int, list[int]]()
    for name, router in routers_of(own).items():
        experts = own.get_submodule(name.rpartition(".")[0] + ".experts")
        gone = sorted({*range(plan.widths[name])} - {*plan.keep.get(name, range(plan.widths[name]))})
        removed[id(router.weight)] = gone
        site = next(site for site in plan.widths if site == f"{name.rpartition('.')[0]}.experts.gate_up_proj")
        lost = {*range(plan.widths[site])} - {*plan.keep.get(site, range(plan.widths[site]))}
        half = plan.widths[site] // 2
        hidden = sorted({channel // 2 if not experts.is_concatenated else channel % half for channel in lost})
        with torch.no_grad():
            experts.down_proj[gone] = 0
            (experts.down_proj if experts.is_transposed else experts.down_proj.transpose(1, 2))[:, hidden] = 0
    with torch.no_grad(), at_minus_infinity(removed):
        return own(**batch).logits


@pytest.mark.parametrize("name", part_of(FAMILIES, 4))
def test_whole_experts_and_hidden_units_are_removed_exactly(name: str) -> None:
    model, example = family(name), words()
    graph = fxprune.capture(model, example)
    routers = routers_of(model)
    names = [f"{path.rpartition('.')[0]}.experts.gate_up_proj" for path in routers]
    plan = halved(graph, example, **dict.fromkeys((*routers, *names), 0.5))
    small = fxprune.apply(graph, plan)
    assert fxprune.verify(model, plan, small, example) < 1e-5
    for batch in (words(1), words(5)) if name == "jamba" else (words(1, 3), words(5, 9)):
        expected = masked(model, plan, batch)
        found = small(**batch).logits
        assert torch.allclose(found, expected, atol=1e-5 * float(expected.abs().max()))
    assert list(small.state_dict()) == list(model.state_dict())
    for path, up in zip(routers, names, strict=True):
        stack = small.get_parameter(f"{up.rpartition('.')[0]}.down_proj")
        assert len(stack) == len(small.get_submodule(path).weight) == plan.widths[path] // 2
        assert small.get_parameter(up).numel() == model.get_parameter(up).numel() // 4


@pytest.mark.wide
@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "qwen3_moe"])
def test_all_ways_to_run_the_experts_give_the_same_graph(name: str) -> None:
    models, example = [family(name, way) for way in WAYS], words()
    groups = [[str(group) for group in fxprune.couple(fxprune.capture(model, example))] for model in models]
    assert groups[0] == groups[1] == groups[2]
    graph = fxprune.capture(models[1], example)
    with torch.no_grad():
        for model in models:
            assert torch.allclose(graph(**words(2, 9)).logits, model(**words(2, 9)).logits, atol=1e-5)


def test_experts_are_captured_without_a_warning() -> None:
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        fxprune.capture(family("mixtral"), words())
    assert not [warning for warning in told if issubclass(warning.category, fxprune.FxpruneWarning)]


@pytest.mark.parametrize("way", ["eager", pytest.param("grouped_mm", marks=pytest.mark.wide)])
def test_the_narrowed_class_generates(way: str) -> None:
    from fxprune.integrations.huggingface import compress_pretrained, narrow_pretrained

    model, batch = family("mixtral", way), words(4, 8)
    loader = [batch | {"labels": batch["input_ids"]}]
    small = compress_pretrained(
        model, loader, ratios={"*.gate": 0.5, "*.experts.gate_up_proj": 0.5}, compensate="none", progress=False
    )
    own = narrow_pretrained(small, model)
    assert type(own) is type(model)
    assert torch.allclose(own(**batch).logits, small(**batch)["logits"], atol=1e-6)
    tokens = own.generate(**batch, max_new_tokens=3, do_sample=False)
    assert tokens.shape == (4, 11)


@pytest.mark.wide
def test_a_budget_of_parameters_is_met() -> None:
    model, batch = family("mixtral"), words(8, 8)
    loader = [(batch, batch["input_ids"])] * 3

    def loss(output: Any, tokens: Tensor) -> Tensor:
        return F.cross_entropy(output.logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())

    small = fxprune.compress(model, loader, params=0.7, loss=loss, progress=False)
    assert 0.68 < fxprune.report(small).budget.achieved <= 0.7
    assert fxprune.report(small).error < 1e-5


# -- experts written by hand -------------------------------------------------------------------------------------------


def rows(count: int, seed: int = 0) -> Tensor:
    return torch.randn(count, 5, generator=torch.Generator().manual_seed(seed))


def masked_loop(model: Loop, plan: fxprune.Plan, batch: Tensor) -> Tensor:
    """The original's output with removed hidden units at zero, and removed experts' logits at minus infinity."""
    own: Any = copy.deepcopy(model)
    with torch.no_grad():
        for name, kept in plan.keep.items():
            gone = sorted({*range(plan.widths[name])} - {*kept})
            if name == "up":
                own.down[:, gone] = 0
            elif name.startswith("experts"):
                number = int(name.split(".")[1])
                own.experts[number][2].weight[:, gone] = 0
            elif name == "inputs":
                own.inputs.weight[gone], own.inputs.bias[gone] = 0, 0
        gone = sorted({*range(4)} - {*plan.keep["router"]})
        with at_minus_infinity({id(own.router.weight): gone}):
            output: Tensor = own(batch)
            return output


@pytest.mark.parametrize("kind", LOOPS)
def test_loops_over_experts_lose_whole_experts_and_hidden_units(kind: type[Loop]) -> None:
    model, example = loop(kind), rows(6)
    with warnings.catch_warnings():
        warnings.simplefilter("error", fxprune.FxpruneWarning)
        graph = fxprune.capture(model, example)
    hidden = [name for group in fxprune.couple(graph) for name in [group.name] if name == "up" or "experts" in name]
    plan = halved(graph, example, **dict.fromkeys(["router", *hidden], 0.5))
    small: Any = fxprune.apply(graph, plan)
    assert fxprune.verify(model, plan, small, example) < 1e-6
    with torch.no_grad():
        for batch in (rows(1), rows(40, 1)):
            assert torch.allclose(small(batch), masked_loop(model, plan, batch), atol=1e-6)
    assert small.router.weight.shape == (2, 8)
    if hasattr(model, "experts"):
        assert list(small.experts._modules) == [str(number) for number in plan.keep["router"]]
        assert all(expert[0].out_features == 3 for expert in small.experts)
        left = {key for key in model.state_dict() if not key.startswith("experts.")}
        assert {key for key in small.state_dict() if not key.startswith("experts.")} == left
    else:
        assert small.up.shape == (2, 8, 3)
    assert sum(p.numel() for p in small.parameters()) == costs_of(graph, analyse(graph)).parameters(
        planned_by(graph, plan).keep
    )


@pytest.mark.parametrize("kind", LOOPS)
def test_a_graph_holds_experts_that_the_example_does_not_choose(kind: type[Loop]) -> None:
    model = loop(kind, experts=12)
    graph = fxprune.capture(model, rows(2))
    with torch.no_grad():
        for batch in (rows(1), rows(3, 1), rows(64, 2)):
            assert torch.allclose(graph(batch), model(batch), atol=1e-6)


def test_a_choice_for_the_whole_batch_goes_the_way_of_the_example() -> None:
    class OfTheBatch(Loop):
        def forward(self, x: Tensor) -> Tensor:
            x = self.inputs(x)
            number = int(self.router(x.mean(0)).argmax())
            return self.outputs(x + self.experts[number](x))

    class Iterated(OfTheBatch):
        def forward(self, x: Tensor) -> Tensor:
            x = self.inputs(x)
            for number in self.router(x.mean(0, keepdim=True)).argmax(-1).unique().tolist():
                x = x + self.experts[number](x)
            return self.outputs(x)

    for kind in (OfTheBatch, Iterated):
        model = loop(kind)
        with torch.no_grad():
            model.router.weight[2] = 0
            model.router.weight[2] += 100 * model.inputs(rows(4)).mean(0)
        with pytest.warns(fxprune.FxpruneWarning, match="decides by the values of its input"):
            graph = fxprune.capture(model, rows(4), other=rows(4))
        assert any(str(node.target).startswith("experts.2") for node in graph.graph.nodes)
        assert torch.allclose(graph(rows(4)), model(rows(4)))


def test_an_expert_whose_rows_are_counted_is_kept() -> None:
    class Counting(Always):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            chosen = self.router(self.inputs(x)).topk(2)[1]
            return super().forward(x), (chosen == 1).float().mean()

    model, example = loop(Counting), rows(6)
    groups = [group for group in fxprune.couple(fxprune.capture(model, example)) if group.sites[0].name == "router"]
    assert [(len(group), group.frozen) for group in groups] == [
        (3, None), (1, "told apart by number, and used by mean (node mean)")
    ]  # fmt: skip


@pytest.mark.parametrize("kind", [Always, Stacked])
def test_the_own_class_of_a_loop_keeps_its_experts(kind: type[Loop]) -> None:
    model = loop(kind)
    batches = [(rows(24, seed), torch.arange(24) % 3) for seed in range(2)]
    own: Any = fxprune.compress(model, batches, ratios={"inputs": 0.5}, own_class=True, progress=False)
    assert type(own) is kind
    assert own.inputs.out_features == 4
    assert own.router.out_features == 4
    plan = fxprune.Plan.from_kept(model, rows(4), {"router": [0, 1, 3]})
    with pytest.raises(NarrowError, match=r"goes through all experts, some of which are removed \(File"):
        fxprune.narrow(model, plan)


@pytest.mark.wide
@pytest.mark.parametrize("kind", [Always, pytest.param(Single, marks=pytest.mark.wide)])
def test_loops_are_scored_compensated_and_pruned_twice(kind: type[Loop]) -> None:
    model = loop(kind)
    batches = [(rows(24, seed), torch.arange(24) % 3) for seed in range(3)]
    small = fxprune.compress(model, batches, params=0.6, rounds=2, progress=False)
    assert fxprune.report(small).budget.achieved <= 0.6
    fewer = fxprune.compress(model, batches, ratios={"router": 0.5}, progress=False)
    (router,) = fxprune.report(fewer).routers
    assert router.usage is not None
    assert set(router.kept) == set(np.argsort(router.usage)[2:].tolist())


class Dense(nn.Module):
    """All experts compute every row; their weights lie in a dense matrix, which `written` makes of the scores."""

    def __init__(self, written: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.router, self.written = nn.Linear(5, 6), written
        self.experts = nn.ModuleList(nn.Linear(5, 3) for _ in range(6))

    def forward(self, x: Tensor) -> Tensor:
        weights, out = self.written(self.router(x)), torch.zeros(len(x), 3)
        for number, expert in enumerate(self.experts):
            out = out + weights[:, number : number + 1] * expert(x)
        return out


def dense_zeros(scores: Tensor) -> Tensor:
    weights, chosen = scores.softmax(-1).topk(2)
    return torch.zeros(len(scores), 6).scatter(1, chosen, weights)


def dense_in_place(scores: Tensor) -> Tensor:
    weights, chosen = scores.topk(2)
    zeros = torch.zeros_like(scores)
    zeros.scatter_(1, chosen, weights.softmax(-1))
    return zeros


def dense_mask(scores: Tensor) -> Tensor:
    chosen = scores.topk(2)[1]
    mask = scores.new_zeros(scores.shape).scatter(-1, chosen, 1.0)
    return mask * scores.exp()


@pytest.mark.parametrize("written", [dense_zeros, dense_in_place, dense_mask])
def test_experts_whose_weights_are_written_into_zeros(written: Callable[[Tensor], Tensor]) -> None:
    model, example = Dense(written), rows(6)
    (group,) = (group for group in fxprune.couple(fxprune.capture(model, example)) if group.kind == "experts")
    assert (group.name, len(group), group.frozen) == ("router", 6, None)
    plan = fxprune.Plan.from_kept(model, example, {"router": [0, 1, 5]})  # neighbours are removed
    small: Any = fxprune.apply(model, plan)
    assert list(small.experts._modules) == ["0", "1", "5"]
    assert small.router.out_features == 3
    assert fxprune.verify(model, plan, small, example) < 1e-6


def test_experts_whose_weights_are_written_into_another_number_are_kept_with_the_reason() -> None:
    def written(scores: Tensor) -> Tensor:
        weights, chosen = scores.topk(2)
        return torch.full_like(scores, -10.0).scatter(1, chosen, weights).softmax(-1)

    groups = fxprune.couple(fxprune.capture(Dense(written), rows(6)))
    reasons = {str(group.frozen) for group in groups if group.name.startswith("router")}
    assert all(reason.startswith("a single channel is taken out by getitem") for reason in reasons)


# -- what plans keep ---------------------------------------------------------------------------------------------------


class Looked(nn.Module):
    """Experts whose weights are looked up, three for each row."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(5, 6)
        self.up, self.down = nn.Parameter(torch.randn(6, 5, 4)), nn.Parameter(torch.randn(6, 4, 3))

    def forward(self, x: Tensor) -> Tensor:
        weights, chosen = self.router(x).softmax(-1).topk(3)
        hidden = torch.einsum("bd,bkdh->bkh", x, self.up[chosen]).relu() * weights.unsqueeze(-1)
        return torch.einsum("bkh,bkhd->bd", hidden, self.down[chosen])


def test_as_many_experts_are_kept_as_are_chosen_at_once() -> None:
    model, example = Looked(), rows(4)
    scores = fxprune.Scores.random(model, example)
    plan = scores.plan(ratios={"router": 0.9})
    assert len(plan.keep["router"]) == 3
    assert fxprune.verify(model, plan, fxprune.apply(model, plan), example) < 1e-6
    with pytest.raises(PlanError, match="keeps 2 of 6 units of 'router', of which 3 are chosen at once: keep at least"):
        fxprune.Plan.from_kept(model, example, {"router": [0, 4]})


class ByKind(nn.Module):
    """A weight for each kind of row, which every row looks up, as layers of graphs for several relations do."""

    def __init__(self, look_up: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last, self.look_up = nn.Linear(5, 8), nn.Linear(6, 3), look_up
        self.weight = nn.Parameter(torch.randn(4, 8, 6))

    def forward(self, x: Tensor, kinds: Tensor) -> Tensor:
        weights = self.look_up(self.weight, kinds)
        return self.last(torch.bmm(self.first(x).unsqueeze(1), weights).squeeze(1).relu())


@pytest.mark.parametrize("name", ["index_select", "torch.index_select", "getitem"])
def test_weights_that_rows_look_up_are_pruned(name: str) -> None:
    ways: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "index_select": lambda w, at: w.index_select(0, at),
        "torch.index_select": lambda w, at: torch.index_select(w, 0, at),
        "getitem": lambda w, at: w[at],
    }
    model, example = ByKind(ways[name]), (rows(7), torch.arange(7) % 4)
    groups = fxprune.couple(fxprune.capture(model, example))
    assert [len(group) for group in groups if group.frozen is None] == [8, 6]
    plan = fxprune.Scores.random(model, example).plan(ratios={"*": 0.5})
    small: Any = fxprune.apply(model, plan)
    assert small.weight.shape == (4, 4, 3)
    assert fxprune.verify(model, plan, small, example) < 1e-6
    batches = [((rows(9, seed), torch.arange(9) % 4), torch.arange(9) % 3) for seed in range(2)]
    assert fxprune.report(fxprune.compress(model, batches, params=0.6, progress=False)).budget.achieved <= 0.6


def test_hidden_units_of_experts_whose_weights_are_looked_up() -> None:
    model, example = Looked(), rows(4)
    plan = fxprune.Plan.from_kept(model, example, {"router": [0, 1, 3, 4], "up": [0, 2, 3]})
    small: Any = fxprune.apply(model, plan)
    assert (small.up.shape, small.down.shape) == ((4, 5, 3), (4, 3, 3))
    assert fxprune.verify(model, plan, small, example) < 1e-6


def test_floors_are_saved_with_scores(tmp_path: Path) -> None:
    scores = fxprune.Scores.random(Looked(), rows(4))
    scores.save(tmp_path / "scores.npz")
    (units, least), *others = fxprune.Scores.load(tmp_path / "scores.npz").floors
    assert (units.tolist(), least, others) == (scores.floors[0][0].tolist(), 3, [])
    assert len(units) == 6


def test_experts_are_proposed_by_how_often_and_how_strongly_they_are_used() -> None:
    torch.manual_seed(0)
    model = family("mixtral")
    batches = [words(4, 8), words(5, 8)]
    sizes = [np.zeros(4), np.zeros(4)]
    layers = [layer.mlp for layer in model.model.layers]
    for total, block in zip(sizes, layers, strict=True):

        def used(module: nn.Module, given: Any, output: Tensor, total: Any = total) -> None:
            states, chosen, weights = given
            for expert in range(4):
                tokens, places = torch.where(chosen == expert)
                gate, up = F.linear(states[tokens], module.gate_up_proj[expert]).chunk(2, -1)  # type: ignore[index]
                out = F.linear(module.act_fn(gate) * up, module.down_proj[expert])  # type: ignore[index, operator]
                total[expert] += float((out * weights[tokens, places, None]).norm(dim=1).sum())

        block.experts.register_forward_hook(used)
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    for block in layers:
        block.experts._forward_hooks.clear()
    scores = fxprune.score(
        model, [(batch, batch["input_ids"]) for batch in batches], lambda out, _: out.logits.square().mean(),
        progress=False,
    )  # fmt: skip
    for number, total in enumerate(sizes):
        name = f"model.layers.{number}.mlp.gate"
        start, end = next((start, end) for group, start, end in scores.groups if group == name)
        assert np.argsort(scores.propose[start:end]).tolist() == np.argsort(total).tolist()
        assert np.allclose(scores.about["experts"][name], total / total.sum(), rtol=1e-3)


# -- the report --------------------------------------------------------------------------------------------------------


@pytest.mark.wide
def test_the_report_lists_the_routed_experts(tmp_path: Path) -> None:
    model, batch = family("mixtral"), words(6, 8)
    small = fxprune.compress(
        model, [(batch, batch["input_ids"])], ratios={"*.gate": 0.5}, loss=lambda out, _: out.logits.square().mean(),
        compensate="none", progress=False,
    )  # fmt: skip
    report = fxprune.report(small)
    first, second = report.routers
    assert (first.router, first.experts, len(first.kept), first.chosen) == ("model.layers.0.mlp.gate", 4, 2, 2)
    assert second.router == "model.layers.1.mlp.gate"
    assert first.usage is not None
    assert sum(first.usage) == pytest.approx(1)
    assert set(first.kept) == set(np.argsort(first.usage)[2:].tolist())
    assert "4 -> 2" in str(report)
    assert f"{max(first.usage):.0%}" in str(report)
    report.to_html(tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<h2>Experts</h2>" in page
    gone = int(np.argmin(first.usage))
    assert f"<s>{gone}: {first.usage[gone]:.1%}</s>" in page
    fxprune.save(small, tmp_path / "small.safetensors")
    assert fxprune.report(fxprune.load(tmp_path / "small.safetensors", model)).routers == report.routers


def test_a_plan_without_scores_lists_experts_without_their_use() -> None:
    model, example = Looked(), rows(4)
    plan = fxprune.Plan.from_kept(model, example, {"router": [0, 2, 5]})
    (router,) = fxprune.report(fxprune.apply(model, plan)).routers
    assert (router.router, router.kept, router.chosen, router.usage) == ("router", (0, 2, 5), 3, None)


# -- the operation -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("count", [0, 7])
def test_expert_linear(count: int, transposed: bool) -> None:
    torch.manual_seed(0)
    x, experts = torch.randn(count, 5), torch.randint(0, 3, (count,))
    weight, bias = torch.randn(4, 5, 6) if transposed else torch.randn(4, 6, 5), torch.randn(4, 6)
    matrices = weight.transpose(1, 2) if transposed else weight
    wanted = [F.linear(row, matrices[expert], bias[expert]) for row, expert in zip(x, experts, strict=True)]
    found = expert_linear(x, experts, weight, bias, transposed=transposed)
    assert found.shape == (count, 6)
    assert torch.allclose(found, torch.stack([*wanted, torch.zeros(6)])[:-1], atol=1e-6)
    places = (t.to("meta") for t in (x, experts, weight, bias))
    assert expert_linear(*places, transposed=transposed).shape == (count, 6)


def test_expert_linear_exports_and_trains() -> None:
    x, experts = torch.randn(7, 5, requires_grad=True), torch.tensor([2, 0, 0, 1, 2, 2, 0])
    weight = torch.randn(3, 6, 5, requires_grad=True)

    class Layer(nn.Module):
        def forward(self, x: Tensor, experts: Tensor) -> Tensor:
            return expert_linear(x, experts, weight)

    program = torch.export.export(Layer(), (x, experts))
    assert torch.allclose(program.module()(x, experts), expert_linear(x, experts, weight), atol=1e-6)
    assert torch.autograd.gradcheck(lambda x, w: expert_linear(x, experts, w), (x.double(), weight.double()))
