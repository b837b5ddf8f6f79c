"""Models without numbers: the plan, its cost and the small model are those of the model that has them."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from helpers import difference, outputs
from nets import layers
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from zoo import ZOO

import fxprune
from fxprune import FxpruneError, Scores
from fxprune.caller.meta import has_numbers
from fxprune.tracing.facts import macs

pytestmark = pytest.mark.filterwarnings("ignore:.*config.*:UserWarning")


def llama() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        T = pytest.importorskip("transformers")
    return T.LlamaForCausalLM(
        T.LlamaConfig(
            vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=32, use_cache=False,
        )
    )  # fmt: skip


def vit() -> nn.Module:
    return torchvision.models.VisionTransformer(
        image_size=32, patch_size=8, num_layers=2, num_heads=4, hidden_dim=32, mlp_dim=64, num_classes=5
    )


def words(batch: int = 2) -> dict[str, Tensor]:
    return {"input_ids": torch.arange(batch * 16).reshape(batch, 16) % 50}


def pictures(batch: int = 2) -> Tensor:
    return torch.ones(batch, 3, 32, 32)


MODELS = {"llama": (llama, words), "vit": (vit, pictures)}
every_model = pytest.mark.parametrize(("make", "example"), MODELS.values(), ids=MODELS)


def without_numbers(model: nn.Module, how: str, mode: FakeTensorMode | None = None) -> nn.Module:
    """A copy whose parameters (of "meta", also its buffers) have shapes only; shared tensors stay shared."""
    mode = mode or FakeTensorMode(allow_non_fake_inputs=True)
    instead: dict[int, Any] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                shape = mode.from_tensor(parameter.detach()) if how == "fake" else parameter.detach().to("meta")
                instead[id(parameter)] = nn.Parameter(shape)
        for buffer in module._buffers.values() if how == "meta" else ():
            if buffer is not None:
                instead[id(buffer)] = buffer.to("meta")
    return copy.deepcopy(model, instead)


@every_model
@pytest.mark.parametrize("ghost", [pytest.param("example given", marks=pytest.mark.wide), "meta", "fake"])
def test_the_plan_is_that_of_the_model_with_numbers(
    make: Callable[[], nn.Module], example: Callable[[], Any], ghost: str
) -> None:
    torch.manual_seed(0)
    real = Scores.random(make(), example(), seed=3)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with torch.device("meta"):
        model, inputs = make(), example()
    if ghost != "meta":
        model, inputs = without_numbers(make(), "fake", mode) if ghost == "fake" else model, example()
    assert not any(has_numbers(p) for p in model.parameters())
    with {"meta": torch.device("meta"), "fake": mode}.get(ghost, nullcontext()):  # the caller may be inside
        found = Scores.random(model, inputs, seed=3)
        groups = fxprune.couple(fxprune.capture(model, inputs))
    assert [str(group) for group in groups] == [str(g) for g in fxprune.couple(fxprune.capture(make(), example()))]
    for options in ({"alpha": 0.3}, {"params": 0.6}, {"macs": 0.6}):
        plan, wanted = found.plan(**options), real.plan(**options)
        assert dict(plan.keep) == dict(wanted.keep)
        assert plan.budget == wanted.budget
        assert any(len(kept) < plan.widths[site] for site, kept in plan.keep.items())


@pytest.mark.wide
@every_model
def test_apply_gives_a_small_model_without_numbers(make: Callable[[], nn.Module], example: Callable[[], Any]) -> None:
    torch.manual_seed(0)
    model = make()
    with torch.device("meta"):
        ghost = make()
    plan = Scores.random(ghost, example()).plan(params=0.6)
    small, wanted = fxprune.apply(ghost, plan), fxprune.apply(model, plan)
    assert all(parameter.is_meta for parameter in small.parameters())
    assert {n: t.shape for n, t in small.state_dict().items()} == {n: t.shape for n, t in wanted.state_dict().items()}
    assert fxprune.report(small) == fxprune.report(wanted)
    assert macs(small, example()) == macs(wanted, example()) < macs(fxprune.capture(ghost, example()), example())


@pytest.mark.parametrize("how", ["meta", "fake", "parameters"])
@pytest.mark.parametrize(
    "name", ["roll_then_add", "tied_weights", "lstm_from_zeros", "channel_shuffle", "attention_unbind_function"]
)
def test_networks_of_the_zoo(name: str, how: str) -> None:
    case = ZOO[name]
    model = case.build()
    plan = Scores.random(model, case.example(2)).plan(alpha=0.5)
    ghost = without_numbers(model, how)
    assert dict(Scores.random(ghost, case.example(2)).plan(alpha=0.5).keep) == dict(plan.keep)
    small = fxprune.apply(ghost, plan)
    wanted = fxprune.apply(model, plan)
    small.load_state_dict(wanted.state_dict(), assign=True)
    if how == "parameters":  # all that the state_dict does not hold had its numbers
        inputs = case.example(2)
        assert difference(outputs(wanted, inputs), outputs(small, inputs)) == 0


class Branches(nn.Module):
    """A forward that decides by its input, and one that decides by a weight."""

    def __init__(self, by_weight: bool) -> None:
        super().__init__()
        self.a, self.b, self.by_weight = nn.Linear(4, 6), nn.Linear(6, 2), by_weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x) if bool(x.sum() >= 0) else -self.a(x)
        return self.b(x.relu() if not self.by_weight or bool(self.a.weight.sum() > 0) else x)


@pytest.mark.filterwarnings("ignore:Branches decides by the values")
def test_branches_go_by_the_example_and_fail_on_weights() -> None:
    with torch.device("meta"):
        model, undecided = Branches(by_weight=False), Branches(by_weight=True)
    graph = fxprune.capture(model, -torch.ones(2, 4))
    assert any("neg" in node.name for node in graph.graph.nodes)
    assert not any("neg" in n.name for n in fxprune.capture(model, torch.empty(2, 4, device="meta")).graph.nodes)
    with pytest.raises(fxprune.CaptureError, match=r"a\.weight and others have shapes only"):
        fxprune.capture(undecided, torch.ones(2, 4))


@layers(lambda: dict(a=nn.Linear(4, 6), norm=nn.BatchNorm1d(6), b=nn.Linear(6, 2)))
def Places(self, x: Tensor) -> Tensor:
    """A forward that asks for the device."""
    y = self.norm(self.a(x)).relu()
    return self.b(y * torch.ones(1, device=y.device) if y.is_cpu else y.sin())


@pytest.mark.filterwarnings("ignore:Places decides by the values")
@pytest.mark.parametrize("method", ["fx", "values"])
def test_every_way_of_capture(method: str) -> None:
    with torch.device("meta"):
        ghost = Places()
    if method == "fx":  # which cannot follow a branch
        with pytest.raises(fxprune.CaptureError, match="symbolically traced variables"):
            fxprune.capture(ghost, torch.ones(2, 4), method=method)
        return
    graph, wanted = (fxprune.capture(m, torch.ones(2, 4), method=method) for m in (ghost, Places()))
    assert [n.format_node() for n in graph.graph.nodes] == [n.format_node() for n in wanted.graph.nodes]
    assert [str(group) for group in fxprune.couple(graph)] == [str(group) for group in fxprune.couple(wanted)]
    assert graph.a.weight.is_meta


@layers(lambda: dict(a=nn.Linear(4, 6), b=nn.Linear(6, 2), order=nn.Buffer(torch.tensor([5, 4, 3, 2, 1, 0]))))
def Indexed(self, x: Tensor) -> Tensor:
    return self.b(self.a(x)[:, self.order])


def test_channels_moved_by_a_buffer_need_its_numbers() -> None:
    model = Indexed()
    with pytest.raises(fxprune.CaptureError, match=r"moves channels by constants without numbers.*on the CPU"):
        fxprune.couple(fxprune.capture(without_numbers(model, "meta"), torch.ones(2, 4)))
    plan = Scores.random(model, torch.ones(2, 4)).plan(alpha=0.5)
    assert Scores.random(without_numbers(model, "parameters"), torch.ones(2, 4)).plan(alpha=0.5).keep == plan.keep


NEEDY: dict[str, Callable[[nn.Module, fxprune.Plan, Path], Any]] = {
    "scoring": lambda model, plan, path: fxprune.score(model, [(pictures(), torch.zeros(2).long())]),
    "verify": lambda model, plan, path: fxprune.verify(model, plan, fxprune.apply(model, plan), pictures()),
    "narrow": lambda model, plan, path: fxprune.narrow(model, plan),
    "save": lambda model, plan, path: fxprune.save(fxprune.apply(model, plan), path / "small.safetensors"),
    "export": lambda model, plan, path: fxprune.export(fxprune.apply(model, plan), path / "a.pt2", pictures()),
    "finetune": lambda model, plan, path: fxprune.finetune(fxprune.apply(model, plan), [], []),
    "with_latency": lambda model, plan, path: Scores.random(model, pictures()).with_latency(model),
    "compensate='sequential'": lambda model, plan, path: fxprune.apply(
        model, plan, loader=[(pictures(), torch.zeros(2).long())], compensate="sequential"
    ),
}


@pytest.mark.parametrize("what", NEEDY)
def test_stages_that_need_numbers_say_so(what: str, tmp_path: Path) -> None:
    if what == "finetune":
        pytest.importorskip("lightning_fabric")
    with torch.device("meta"):
        model = vit()
    plan = Scores.random(model, pictures()).plan(alpha=0.5)
    with pytest.raises(FxpruneError, match=rf"^{what} needs numbers, and class_token of .* has a shape only"):
        NEEDY[what](model, plan, tmp_path)
    assert not list(tmp_path.iterdir())
