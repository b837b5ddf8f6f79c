"""The third rung of capture: the program of torch.export becomes the same kind of graph."""

from __future__ import annotations

import copy
import pickle
from collections import Counter
from collections.abc import Iterable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision
from helpers import difference, outputs, picture, same_kind, same_picture, storages, tensors_of, width
from nets import layers
from torch import Tensor, nn
from torch._ops import OpOverload
from torchvision.ops import StochasticDepth
from zoo import CLASSES, ZOO, Case, conv, head, images, randomise, tensors

import fxprune
from fxprune.errors import CaptureError
from fxprune.tracing.export import trace as exported
from fxprune.tracing.graph import ModelGraph


def some_quick(names: Iterable[str]) -> list[Any]:
    """All names; torch.export is slow, so that seven of eight wait for the slow tests."""
    return [pytest.param(name, marks=[] if i % 8 == 0 else pytest.mark.slow) for i, name in enumerate(names)]


# torch.export knows no packed sequences, opens recurrent layers that are called now with a state and now without, and
# fixes the size of a tensor that is made and then assigned to.
BEYOND = ("last_steps", "lstm_cell_from_none", "shared_recurrent", "assigns_to_bare")
BEYOND += tuple(name for name in ZOO if name.startswith("packed_"))
every_case = pytest.mark.parametrize("name", some_quick(name for name in ZOO if name not in BEYOND))

# Layers that are given computed sizes are opened: their weights shrink, but the numbers on the module stay.
OPENED = {"transposed_to_size": {"up"}, "loop_over_chunks": {"b"}}


def export(model: nn.Module, example: Any) -> ModelGraph:
    return fxprune.capture(model, example, method="export")


def others(case: Case) -> list[Any]:
    """Batches of other sizes, and images where the model takes any."""
    return [case.example(batch) for batch in (1, 2, 5)] + ([case.example(2, size=11)] if case.any_size else [])


@layers(lambda: dict(a=conv(3, 8), head=head(8)))
def RectifiesSlice(self, x: Tensor) -> Tensor:
    """A function that writes in place is the last to look at the slice that it is given."""
    y = self.a(x)
    F.hardswish(y[:, 4:], inplace=True)
    y[:, :4].relu_()
    return self.head(y)


def test_what_is_written_in_place_last_is_kept() -> None:
    model, x = RectifiesSlice().eval(), images()(2)
    assert difference(outputs(model, x), outputs(export(model, x), x)) < 1e-6


@every_case
def test_the_graph_is_a_copy_that_computes_the_same(name: str) -> None:
    case = ZOO[name]
    model = case.build().eval()
    before = picture(model)
    graph = export(model, case.example(2))
    assert same_picture(before, picture(model))
    assert type(graph).__name__ == type(model).__name__
    assert list(graph.state_dict()) == list(model.state_dict())
    assert storages(graph).isdisjoint(storages(model))
    found = dict(graph.named_modules(remove_duplicate=False))
    for path, module in model.named_modules(remove_duplicate=False):
        assert not path or same_kind(found.get(path), module), path
    assert not [node for node in graph.graph.nodes if isinstance(node.target, OpOverload)]
    for example in others(case):
        assert difference(outputs(model, example), outputs(graph, example)) < 1e-6
    for twin in (copy.deepcopy(graph), pickle.loads(pickle.dumps(graph))):
        assert type(twin).__name__ == type(graph).__name__
        assert difference(outputs(graph, example), outputs(twin, example)) == 0
        assert list(twin.state_dict()) == list(graph.state_dict())
        assert storages(twin).isdisjoint(storages(graph))
    plans_hold(case, graph, name)


def plans_hold(case: Case, graph: ModelGraph, name: str) -> None:
    plan = fxprune.Scores.random(graph, case.example(2)).plan(alpha=1.0)
    small = fxprune.apply(graph, plan)
    assert fxprune.verify(graph, plan, small, case.example(3)) < 1e-4
    if name == "mlp":  # captured as the plan says
        assert plan.settings["method"] == "export"
        assert fxprune.verify(case.build(), plan, small, case.example(3)) < 1e-4
    for example in others(case):
        assert [t.shape for t in outputs(small, example)] == [t.shape for t in outputs(graph, example)]
    for site in set(case.shrinks) - OPENED.get(name, set()):
        assert width(small, site) < width(graph, site), site
    for site in case.frozen:
        assert width(small, site) == width(graph, site), site


@pytest.mark.parametrize("name", ["shufflenet_v2_x0_5", pytest.param("mobilenet_v2", marks=pytest.mark.wide)])
def test_groups_are_those_of_symbolic_tracing(name: str) -> None:
    torch.manual_seed(0)
    model, example = torchvision.models.get_model(name).eval(), torch.randn(2, 3, 32, 32)

    def groups(method: str) -> Counter[Any]:
        found = fxprune.couple(fxprune.capture(model, example, method=method))
        kinds = [(group.frozen or "").partition(" (node")[0] for group in found]
        sites = [tuple((site.name, group.channels(site)) for site in group.sites) for group in found]
        return Counter(zip(map(frozenset, sites), map(len, found), kinds, strict=True))

    assert groups("export") == groups("fx")


# -- training ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["dropout_functions"])
def test_dropout_follows_the_mode(name: str) -> None:
    for start in (True, False):
        graph = export(ZOO[name].build().train(start), images()(2))
        assert graph.training == start
        assert torch.equal(graph.eval()(images()(2)), graph(images()(2)))
        assert not torch.equal(graph.train()(images()(2)), graph(images()(2)))


class NormAct(nn.BatchNorm2d):
    """A BatchNorm with a forward of its own, as timm has it."""

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, self.training, self.momentum, self.eps
        ).relu()


def test_a_batchnorm_that_is_spelled_out_follows_its_mode() -> None:
    model = randomise(nn.Sequential(conv(3, 8), NormAct(8), conv(8, 8), NormAct(8), head(8))).train()
    model[3].eval()
    graph = export(model, images()(2))
    plan = fxprune.Scores.random(graph, images()(2)).plan(alpha=1.0)
    assert fxprune.verify(graph, plan, fxprune.apply(graph, plan), images()(3)) < 1e-4
    assert max(map(len, plan.keep.values())) < 8
    before = {key: value.clone() for key, value in model.state_dict().items()}
    assert list(graph.state_dict()) == list(before)
    assert torch.allclose(graph(images()(4)), model(images()(4)), atol=1e-5)
    for name in ("1.running_mean", "1.running_var", "3.running_mean"):
        assert torch.allclose(graph.state_dict()[name], model.state_dict()[name])
        assert torch.equal(graph.state_dict()[name], before[name]) == name.startswith("3")


def test_stochastic_depth_is_still_there() -> None:
    """In eval mode it hands on its input, and leaves no op behind."""

    @layers(lambda: dict(a=conv(3, 8), b=conv(8, 8), depth=StochasticDepth(0.5, "row"), head=head(8)))
    def Net(self, x: Tensor) -> Tensor:
        x = self.a(x)
        return self.head(x + self.depth(self.b(x)))

    graph = export(randomise(Net()), images()(2))
    assert "depth" in {node.target for node in graph.graph.nodes}


def test_what_runs_without_gradients_goes_on_to() -> None:
    @layers(lambda: dict(a=conv(3, 8), b=conv(8, 8), head=head(8)))
    def Net(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            y = self.a(x).relu()
            x = y + self.a(x + y[:, :3])
        return self.head(self.b(x))

    model = randomise(Net()).eval()
    graph = export(model, images()(2))
    assert difference(outputs(model, images()(3)), outputs(graph, images()(3))) < 1e-6
    assert [node.target for node in graph.graph.nodes].count("a") == 2
    graph(images()(3)).sum().backward()
    assert graph.get_parameter("a.weight").grad is None
    assert graph.get_parameter("b.weight").grad is not None


# -- arguments and outputs ---------------------------------------------------------------------------------------------


@layers(lambda: dict(a=nn.Linear(6, 8), b=nn.Linear(8, 8), head=nn.Linear(8, CLASSES)))
def Options(
    self, pair: tuple[Tensor, Tensor], scale: float = 0.5, mask: Tensor | None = None, *, extra: dict[str, Tensor]
) -> dict[str, Any]:
    """Arguments of all kinds: nested, by keyword, left out."""
    x = self.b(self.a(pair[0] + pair[1]).relu() * scale).relu()
    if mask is not None:
        x = x * mask
    return {"logits": self.head(x + extra["shift"]), "sizes": [x.shape[0], None], "pair": (x, "name")}


def options(batch: int = 2) -> dict[str, Any]:
    return {"extra": {"shift": torch.ones(batch, 1)}, "pair": (tensors(6)(batch), tensors(6)(batch + 1)[1:])}


def test_arguments_and_outputs_keep_their_structure() -> None:
    model = randomise(Options()).eval()
    graph = export(model, options())
    with torch.no_grad():
        expected, found = model(**options(3)), graph(**options(3))
    assert difference(tensors_of(expected), tensors_of(found)) < 1e-6
    assert [found["sizes"], found["pair"][1]] == [[3, None], "name"]
    assert isinstance(found["pair"], tuple)


def test_what_the_example_leaves_out_is_fixed() -> None:
    graph = export(Options(), options())
    with pytest.raises(CaptureError, match="the graph was made for mask=None"):
        graph(**options(), mask=torch.ones(2, 1))
    with pytest.raises(CaptureError, match=r"the graph was made for scale=0.5"):
        graph(**options(), scale=0.7)


# -- what only export takes --------------------------------------------------------------------------------------------


@layers(lambda: dict(convs=nn.Sequential(conv(3, 6), conv(6, 6), conv(6, 6)), head=head(6)))
def Windows(self, x: Tensor) -> Tensor:
    """Means over windows of images that are padded to whole numbers of them, over and over."""
    for module in self.convs:
        x = F.pad(x, (0, -x.shape[3] % 2, 0, -x.shape[2] % 2))
        b, c, h, w = x.shape
        x = module(x.reshape(b, c, h // 2, 2, w // 2, 2).mean((3, 5))).relu()
    return self.head(x)


def test_intricate_sizes_are_those_of_the_example(monkeypatch: pytest.MonkeyPatch) -> None:
    model = randomise(Windows()).eval()
    graph, large = export(model, images()(2)), images()(2, size=25)
    assert difference(outputs(model, images()(5)), outputs(graph, images()(5))) < 1e-6
    with pytest.raises(RuntimeError, match="shape"):
        graph(large)
    monkeypatch.setattr(exported, "INTRICATE", 1000)
    assert difference(outputs(model, large), outputs(export(model, images()(2)), large)) < 1e-6


def test_errors_of_later_stages_name_the_line() -> None:
    class Net(nn.Module):  # export keeps the lines of functions called forward alone
        def __init__(self) -> None:
            super().__init__()
            self.a, self.head = conv(3, 8), head(8)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.msort(self.a(x)))

    graph = export(Net(), images()(2))
    with pytest.raises(fxprune.UnsupportedOpError, match=r"no rule says what .*msort.*test_capture_export\.py"):
        fxprune.couple(graph)
