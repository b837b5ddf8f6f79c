"""Residual branches as units: which are found, exact removal, budgets beside widths, and the model's own class."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import outputs
from torch import Tensor, nn

import fxprune
from fxprune.coupling.couple import analyse
from fxprune.coupling.kinds import BRANCHES
from fxprune.errors import NarrowError, PlanError
from fxprune.planning.costs import costs_of
from fxprune.planning.planned import planned_by
from fxprune.reporting.report import pruned_of
from fxprune.reporting.tables import summary

EXACT = 1e-9


class Basic(nn.Module):
    """A block of a ResNet, whose activations work in place, with a projected shortcut where the width changes."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inputs, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.down = None if inputs == width else nn.Sequential(nn.Conv2d(inputs, width, 1), nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        out += x if self.down is None else self.down(x)
        return self.relu(out)


class ResNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(inplace=True))
        self.layer1, self.layer2 = nn.Sequential(Basic(8, 8), Basic(8, 8)), nn.Sequential(Basic(8, 12), Basic(12, 12))
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer2(self.layer1(self.stem(x))).mean((2, 3)))


class Scaled(nn.Module):
    """A pre-norm block with dropout, and a scale of its branch: one number, one a channel, or a parameter's share."""

    def __init__(self, scale: Tensor, width: int = 8) -> None:
        super().__init__()
        self.norm, self.fc1, self.fc2 = nn.LayerNorm(width), nn.Linear(width, 12), nn.Linear(12, width)
        self.drop, self.gamma = nn.Dropout(0.2), nn.Parameter(scale)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.gamma * self.drop(self.fc2(torch.relu(self.fc1(self.norm(x)))))


class Stack(nn.Module):
    """A list of blocks, through which the forward iterates."""

    def __init__(self, scale: Tensor | float = 0.5, count: int = 3) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(5, 8), nn.Linear(8, 4)
        self.blocks = nn.ModuleList(Scaled(torch.as_tensor(scale) * torch.ones(())) for _ in range(count))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class Attention(nn.Module):
    def __init__(self, width: int = 16, heads: int = 4) -> None:
        super().__init__()
        self.heads, self.qkv, self.proj = heads, nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        n, t, c = x.shape
        q, k, v = self.qkv(x).reshape(n, t, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        return self.proj(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, t, c))


class Layer(nn.Module):
    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.norm1, self.attn, self.norm2 = nn.LayerNorm(width), Attention(width), nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 24), nn.GELU(), nn.Linear(24, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class ViT(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patch, self.place = nn.Conv2d(3, 16, 4, 4), nn.Parameter(torch.randn(1, 4, 16))
        self.layers, self.norm, self.head = nn.ModuleList(Layer() for _ in range(2)), nn.LayerNorm(16), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2) + self.place
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x).mean(1))


IMAGES, ROWS = (3, 8, 8), (5,)
NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], list[str]]] = {
    "resnet": (ResNet, IMAGES, [f"layer{i}.{j}.conv1+conv2" for i in (1, 2) for j in (0, 1)]),
    "scalar scale": (Stack, ROWS, [f"blocks.{i}.fc1+fc2" for i in range(3)]),
    "channel scale": (lambda: Stack(torch.rand(8)), ROWS, [f"blocks.{i}.fc1+fc2" for i in range(3)]),
    "vit": (ViT, IMAGES, [f"layers.{i}.{part}" for i in (0, 1) for part in ("attn", "mlp")]),
}


def made(name: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    build, shape, _ = NETS[name]
    model = build().double().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight, 1, 0.3)
            nn.init.normal_(module.running_mean, 0, 0.3)
    return model, torch.randn(4, *shape).double()


def loader(name: str, count: int = 40) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    shape = NETS[name][1]
    return [
        (torch.randn(10, *shape, generator=generator).double(), torch.randint(4, (10,), generator=generator))
        for _ in range(count // 10)
    ]


def found(model: nn.Module, example: Any, **options: Any) -> tuple[list[str], dict[str, str]]:
    """The branches that can be removed, and the reasons why others cannot."""
    graph = fxprune.capture(model, example, prove=False)
    groups = [group for group in analyse(graph, blocks="branches", **options).groups if group.kind == BRANCHES]
    free = [site.name for group in groups if group.frozen is None for site in group.sites]
    return [name.removeprefix("branch:") for name in free], {g.name: g.frozen for g in groups if g.frozen}


@pytest.mark.parametrize("name", NETS)
def test_every_branch_is_removed_exactly(name: str) -> None:
    """Alone and with others: equal to the original with the branch at zero, and nothing of it is left."""
    model, x = made(name)
    names, _ = found(model, x)
    assert names == NETS[name][2]
    for removed in (names[:1], names[1:2], names[-2:], names):
        kept: dict[str, list[int]] = {f"branch:{branch}": [] for branch in removed}
        plan = fxprune.Plan.from_kept(model, x, kept, blocks=True)
        small = fxprune.apply(model, plan)
        assert fxprune.verify(model, plan, small, x) <= EXACT
        assert plan.removed_branches == tuple(removed)
        planned = planned_by(model, plan)
        costs = costs_of(planned.graph, planned.coupling)
        assert costs.parameters(planned.keep) == sum(p.numel() for p in small.parameters())
        assert costs.macs(planned.keep) == fxprune.report(small).macs_after
        layers = {node.target for node in small.graph.nodes if node.op == "call_module"}
        for branch in removed:
            path, _, last = branch.rpartition(".")
            for part in last.split("+"):
                assert not any(f"{key}.".startswith(f"{path}.{part}.") for key in (*layers, *small.state_dict()))


def test_a_branch_at_zero_by_hand() -> None:
    """The same numbers as the user's model gives with the last layer of the branch at zero."""
    model, x = made("vit")
    plan = fxprune.Plan.from_kept(model, x, {"branch:layers.0.mlp": []}, blocks=True)
    small = fxprune.apply(model, plan)
    with torch.no_grad():
        model.layers[0].mlp[2].weight.zero_()
        model.layers[0].mlp[2].bias.zero_()
    assert torch.allclose(outputs(model, x)[0], outputs(small, x)[0], rtol=0, atol=1e-12)


def test_a_removed_branch_in_training_mode() -> None:
    """Dropout of kept branches still drops, and gradients flow through the shortcut."""
    model, x = made("scalar scale")
    names, _ = found(model, x)
    small = fxprune.apply(model, fxprune.Plan.from_kept(model, x, {f"branch:{names[1]}": []}, blocks=True)).train()
    assert not torch.equal(small(x), small(x))
    small(x).sum().backward()
    assert all(parameter.grad is not None for parameter in small.parameters())
    assert [name for name, _ in small.blocks.named_children()] == ["0", "2"]


class Leaky(nn.Module):
    """The hidden values of the branch are read elsewhere as well."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b = nn.Linear(5, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.head, self.other = nn.Linear(8, 4), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        hidden = torch.relu(self.a(x))
        return self.head(x + self.b(hidden)) + self.other(hidden)


class Writing(nn.Module):
    """The branch changes its input in place, which the shortcut then has, too."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.head = nn.Linear(5, 8), nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(x + self.a(x.relu_()))


class Late(Writing):
    """The sum is changed in place, and the shortcut is read after that."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = (x + self.a(x)).relu_()
        return self.head(x * y)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (Leaky, "a value inside it, relu, is read elsewhere, by other"),
        (Writing, "relu_ in it writes into a tensor that stays"),
    ],
)
def test_a_branch_that_may_not_be_removed(kind: type[nn.Module], reason: str) -> None:
    torch.manual_seed(0)
    model, x = kind().double(), torch.randn(4, 5).double()
    names, reasons = found(model, x)
    assert names == []
    assert list(reasons.values()) == [reason]
    with pytest.raises(PlanError, match="which cannot be removed"):
        fxprune.Plan.from_kept(model, x, {next(iter(reasons)): []}, blocks=True)


def test_a_sum_that_is_changed_in_place_is_a_copy_of_its_shortcut() -> None:
    """The shortcut keeps its values, and gradients flow."""
    torch.manual_seed(0)
    model, x = Late().double(), torch.randn(4, 5).double()
    plan = fxprune.Plan.from_kept(model, x, {"branch:a": []}, blocks=True)
    small = fxprune.apply(model, plan)
    assert fxprune.verify(model, plan, small, x) <= EXACT
    assert [node.target for node in small.graph.nodes if node.op == "call_method"] == ["clone", "relu_"]
    small(x).sum().backward()


def test_an_excluded_layer_keeps_its_branch() -> None:
    model, x = made("vit")
    names, reasons = found(model, x, exclude="layers.0.attn")
    assert names == NETS["vit"][2][1:]
    assert reasons == {"branch:layers.0.attn": "excluded by the caller"}


@pytest.mark.parametrize("name", ["resnet", "vit"])
def test_budgets_and_plans_from_stored_scores(name: str, tmp_path: Path) -> None:
    """One order for all branches; the first is the one that moves the outputs least for what it saves."""
    model, _ = made(name)
    data = loader(name)
    scores = fxprune.score(model, data, blocks=True, progress=False)
    scores.save(tmp_path / "scores.npz")
    again = fxprune.Scores.load(tmp_path / "scores.npz")
    for asked in ({"params": 0.5}, {"macs": 0.5}, {"macs": 0.6, "blocks": "only"}, {"macs": 0.6, "blocks": False}):
        plan = again.plan(**asked)
        assert plan.to_dict() == scores.plan(**asked).to_dict()
        small = fxprune.apply(model, plan)
        assert fxprune.verify(model, plan, small, data[0][0]) <= EXACT
        share = fxprune.report(small).macs_after / fxprune.report(small).macs_before
        if "macs" in asked:
            assert share == pytest.approx(plan.budget.achieved, abs=1e-3)
            assert share <= asked["macs"]
        widths = {site: (plan.widths[site], len(kept)) for site, kept in plan.keep.items()}
        if asked.get("blocks") == "only":
            assert plan.removed_branches
            assert all(a == b for site, (a, b) in widths.items() if not site.startswith("branch:"))
        if asked.get("blocks") is False:
            assert not plan.removed_branches


def test_the_curve_is_measured_with_the_branches_at_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every value is the divergence of the emitted model on the samples held out; the best goes first."""
    monkeypatch.setattr("fxprune.scoring.curves.MOST", 1000)
    model, _ = made("vit")
    data = loader("vit")
    scores = fxprune.score(model, data, blocks="only", progress=False)
    number = [name for name, *_ in scores.groups].index("branches")
    depths, values = scores.curves.of(number)
    assert depths.tolist() == [0, 1, 2, 3, 4]
    x = torch.cat([inputs for inputs, _ in data])[4::5]
    wanted = outputs(model, x)[0].log_softmax(-1)

    def moved(removed: list[str]) -> float:
        plan = fxprune.Plan.from_kept(model, x, {site: [] for site in removed}, blocks=True)
        found = outputs(fxprune.apply(model, plan), x)[0].log_softmax(-1)
        return float((wanted.exp() * (wanted - found)).sum(-1).mean())

    names = {int(site.units[0]): site.name for site in scores.sites if site.name.startswith("branch:")}
    order = [names[unit] for unit in scores.curves.order.tolist() if unit in names]
    assert np.allclose(values[1:], np.maximum.accumulate([moved(order[:n]) for n in (1, 2, 3, 4)]), rtol=1e-6)
    saved = dict(zip(names.values(), scores._saved()[sorted(names)], strict=True))
    assert order[0] == min(order, key=lambda site: moved([site]) / saved[site])


def test_compress_removes_branches_and_refits_the_rest(tmp_path: Path) -> None:
    model, x = made("resnet")
    data = loader("resnet")
    small = fxprune.compress(model, data, macs=0.5, blocks="only", progress=False)
    report = fxprune.report(small)
    assert report.error <= EXACT
    assert report.compensation.level == "sequential"
    assert report.macs_after / report.macs_before <= 0.5
    plan = pruned_of(small).plan
    assert "branches removed" in str(plan)
    count = len(plan.removed_branches)
    row = next(row for row in summary(report) if row[0] == "branches")
    assert row == ("branches", "4", str(4 - count), f"without {', '.join(plan.removed_branches)}")
    fxprune.save(small, tmp_path / "small.fxprune")
    again = fxprune.load(tmp_path / "small.fxprune", model)
    assert torch.equal(outputs(again, x)[0], outputs(small, x)[0])


def test_several_rounds() -> None:
    """One plan leads from the original to the result."""
    model, x = made("resnet")
    data = loader("resnet")
    small = fxprune.compress(model, data, params=0.4, blocks="only", rounds=2, compensate="none", progress=False)
    plan = pruned_of(small).plan
    assert len(plan.removed_branches) > 1
    assert fxprune.verify(model, plan, small, x) <= EXACT


@pytest.mark.parametrize(("blocks", "share"), [("only", 0.35), pytest.param(True, 0.15, marks=pytest.mark.wide)])
def test_several_rounds_reach_what_widths_alone_do_not(blocks: bool | str, share: float) -> None:
    model, _ = made("scalar scale")
    how: dict[str, Any] = {"compensate": "none", "progress": False, "rounds": 2, "allocate": "measured"}
    small = fxprune.compress(model, loader("scalar scale"), params=share, blocks=blocks, **how)
    assert fxprune.report(small).params_after <= share * fxprune.report(small).params_before


@pytest.mark.parametrize("level", ["bias", "ridge"])
def test_compensation_by_moments_does_not_look_at_branches(level: str) -> None:
    model, _ = made("vit")
    small = fxprune.compress(
        model, loader("vit"), params=0.6, blocks=True, allocate="measured", compensate=level, progress=False
    )
    assert fxprune.report(small).params_after <= 0.6 * fxprune.report(small).params_before


def test_a_latency_budget_counts_no_node_of_a_removed_branch() -> None:
    model, _ = made("vit")
    scores = fxprune.score(model, loader("vit"), blocks="only", progress=False).with_latency(model, repeats=2)
    keep = np.ones(len(scores.propose), dtype=bool)
    whole = scores.times.estimate(keep)
    start = next(start for name, start, _ in scores.groups if name == "branches")
    keep[start:] = False
    assert 0 < scores.times.estimate(keep) < whole
    plan = scores.plan(latency=0.9)
    assert plan.removed_branches
    assert plan.budget.achieved <= 0.9


# -- the model's own class ---------------------------------------------------------------------------------------------


def test_a_list_of_blocks_gets_shorter_in_the_models_own_class() -> None:
    model, x = made("scalar scale")
    own = fxprune.compress(
        model, loader("scalar scale"), params=0.7, blocks="only", own_class=True, compensate="none", progress=False
    )
    plan = pruned_of(own).plan
    assert type(own) is Stack
    assert plan.removed_branches
    assert len(own.blocks) == 3 - len(plan.removed_branches)
    assert fxprune.verify(model, plan, own, x) <= EXACT
    kept = [i for i in range(3) if f"blocks.{i}" not in plan.removed_branches]
    for place, number in enumerate(kept):
        assert torch.equal(own.blocks[place].fc1.weight, model.blocks[number].fc1.weight)
    refitted = fxprune.compress(
        model, loader("scalar scale"), params=0.7, blocks="only", own_class=True, progress=False
    )
    assert len(refitted.blocks) == len(own.blocks)


class Counting(Stack):
    """Its forward goes by the numbers of the blocks, which it wrote down."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for number in (0, 1, 2):
            x = self.blocks[number](x)
        return self.head(x)


def test_a_class_that_counts_its_blocks_keeps_them() -> None:
    torch.manual_seed(0)
    model = Counting().double().eval()
    own = fxprune.compress(model, loader("scalar scale"), macs=0.9, blocks=True, own_class=True, progress=False)
    assert len(own.blocks) == 3
    reasons = {frozen.reason for frozen in fxprune.report(own).frozen if "branch:blocks.0" in frozen.sites}
    assert any("its own class does not run" in reason for reason in reasons)


def test_where_all_blocks_are_kept_the_error_says_why() -> None:
    torch.manual_seed(0)
    with pytest.raises(PlanError, match=r"nothing in the model can be pruned: 'branch:blocks.0', .*its own class does"):
        fxprune.compress(
            Counting().double().eval(), loader("scalar scale"), macs=0.9, blocks="only", own_class=True, progress=False
        )


class Aliased(Stack):
    """It holds a block, and a part of another, in a second place."""

    def __init__(self) -> None:
        super().__init__(count=4)
        self.last, self.part = self.blocks[3], self.blocks[2].fc1


def test_a_block_that_is_held_elsewhere_is_kept() -> None:
    torch.manual_seed(0)
    model = Aliased().double().eval()
    own = fxprune.compress(
        model, loader("scalar scale"), params=0.8, blocks="only", own_class=True, compensate="none", progress=False
    )
    before, after = (sum(p.numel() for p in m.parameters()) for m in (model, own))
    assert len(own.blocks) == 3
    assert after <= 0.8 * before
    reasons = {frozen.sites: frozen.reason for frozen in fxprune.report(own).frozen}
    assert reasons["branch:blocks.3",] == "the model also holds blocks.3 as last, outside of its list"
    assert reasons["branch:blocks.2",] == "the model also holds blocks.2 as part, outside of its list"


def test_a_single_branch_is_not_for_the_models_own_class() -> None:
    model, x = made("vit")
    plan = fxprune.Plan.from_kept(model, x, {"branch:layers.0.mlp": []}, blocks=True)
    with pytest.raises(NarrowError, match=r"which is removed alone: .*own_class=True removes whole blocks"):
        fxprune.narrow(model, plan)


# -- what is refused ---------------------------------------------------------------------------------------------------


def test_messages() -> None:
    model, _ = made("scalar scale")
    data = loader("scalar scale")
    with pytest.raises(
        PlanError, match="blocks=True removes branches within a budget: give params=, macs= or latency="
    ):
        fxprune.compress(model, data, 0.1, blocks=True, progress=False)
    with pytest.raises(PlanError, match=r"blocks is 'all'; it is True, False, or \"only\" to keep all widths"):
        fxprune.score(model, data, blocks="all", progress=False)
    without = fxprune.score(model, data, progress=False)
    with pytest.raises(PlanError, match="the scores were made without blocks: score with it"):
        without.plan(params=0.5, blocks=True)
    alone = fxprune.score(model, data, blocks="only", progress=False)
    with pytest.raises(PlanError, match='the scores were made with blocks="only": score with it'):
        alone.plan(params=0.5, blocks=True)
    with pytest.raises(PlanError, match='blocks="only" removes branches within a budget'):
        alone.plan(0.1)


# -- models of transformers --------------------------------------------------------------------------------------------


@pytest.mark.wide
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("way", ["plain", "own_class"])
def test_a_language_model_has_fewer_layers(way: str, tmp_path: Path) -> None:
    """A folder that transformers loads alone; the layers know their new numbers, and it generates with its cache."""
    kinds = pytest.importorskip("transformers")
    from fxprune.integrations.huggingface import compress_pretrained

    torch.manual_seed(0)
    config = kinds.Qwen2Config(
        vocab_size=40, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=48, max_position_embeddings=64, use_sliding_window=True, sliding_window=4,
        max_window_layers=1, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = kinds.Qwen2ForCausalLM(config).double().eval()
    words = torch.randint(3, 40, (4, 9))
    texts = [{"input_ids": words, "attention_mask": torch.ones_like(words), "labels": words} for _ in range(4)]
    own = compress_pretrained(model, texts, blocks="only", params=0.8, compensate="none", progress=False, **{way: True})
    removed = [int(name.rpartition(".")[2]) for name in pruned_of(own).plan.removed_branches]
    kept = [number for number in range(3) if number not in removed]
    assert removed
    assert len(own.model.layers) == own.config.num_hidden_layers == len(kept)
    assert own.config.layer_types == [config.layer_types[number] for number in kept]
    assert [layer.self_attn.layer_idx for layer in own.model.layers] == list(range(len(kept)))
    assert torch.equal(own.model.layers[-1].mlp.up_proj.weight, model.model.layers[kept[-1]].mlp.up_proj.weight)
    own.save_pretrained(tmp_path)
    again = kinds.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.double)
    assert torch.equal(again(words).logits, own(words).logits)
    options = {"max_new_tokens": 5, "do_sample": False, "attention_mask": torch.ones_like(words)}
    assert torch.equal(own.generate(words, **options), own.generate(words, use_cache=False, **options))
