"""Capture with values: traces that follow Python's decisions on shapes, and keep sizes symbolic."""

from __future__ import annotations

import copy
import functools
import math
import pickle
import warnings
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from helpers import call, difference, graph_of, outputs, part_of, tensors_of
from nets import layers
from torch import Tensor, fx, nn
from torch.fx import _symbolic_trace as fx_internals
from zoo import ZOO, conv, head, images, tensors

import fxprune
from fxprune.errors import CaptureError, FxpruneWarning
from fxprune.scoring.scores import Scores
from fxprune.tracing.values import ValueTracer, trace

Forward = Callable[..., Any]


class Net(nn.Module):
    """Two layers, and a forward that a test brings along."""

    def __init__(self, forward: Forward) -> None:
        super().__init__()
        self.a, self.b, self.how = conv(3, 8), conv(8, 8), forward
        self.register_buffer("scale", torch.ones(8, 1, 1))

    def forward(self, x: Tensor) -> Any:
        return self.how(self, x)


def starred(net: Any, x: Tensor) -> Tensor:
    b, *rest = net.a(x).shape
    return net.a(x).reshape(b, math.prod(rest))


def loop_over_channels(net: Any, x: Tensor) -> Tensor:
    parts = net.a(x).unbind(1)
    assert len(parts) == 8
    return torch.stack([part * index for index, part in enumerate(parts)], 1)


def loop_over_rows(net: Any, x: Tensor) -> Tensor:
    return sum(row.relu() for row in net.a(x).transpose(0, 1))


def branch(net: Any, x: Tensor) -> Tensor:
    if not isinstance(x, Tensor) or x.ndim != 4 or x.size(1) != 3:
        raise ValueError(f"expected images, got {x.shape}")
    x = net.a(x)
    assert x.dtype in (torch.float32, torch.float64)
    assert x.shape[1:2] == (8,)
    return net.b(x) if len(x.shape) == 4 and isinstance(x.shape[-1], int) else x


def padded(net: Any, x: Tensor) -> Tensor:
    _, _, h, w = x.shape
    x = F.pad(net.a(x), (0, (3 - w % 3) % 3, 0, (3 - h % 3) % 3))
    b, c, h, w = x.shape
    return x.view(b, c, h // 3, 3, w // 3, 3).mean((3, 5)) / math.sqrt(h * w)


def factories(net: Any, x: Tensor) -> Tensor:
    b, _, h, w = x.shape
    grid = torch.arange(w, device=x.device, dtype=x.dtype) + torch.linspace(0, 1, h, device=x.device)[:, None]
    bias = torch.full((b, 1, h, w), torch.finfo(x.dtype).eps, device=x.device, dtype=x.dtype)
    ones, zeros = torch.ones(b, 8, 1, 1, dtype=x.dtype), torch.zeros((), device=x.device)
    return torch.where(grid > 2, net.a(x) * ones + bias, zeros) + torch.tensor([b], dtype=x.dtype)


def assigned(net: Any, x: Tensor) -> Tensor:
    x = net.a(x)
    out = torch.zeros(x.shape, dtype=x.dtype)
    out[:, :, 1:] = x[:, :, :-1]
    out[:, :, 0] += 1
    out *= 2
    mask = x.new_zeros((x.shape[-2], x.shape[-1]))
    for count, rows in enumerate((slice(0, -2), slice(-2, None))):
        mask[rows] = count
    return out + mask.masked_fill(mask != 0, 0.5)


def aliased(net: Any, x: Tensor) -> Tensor:
    x = net.a(x)
    view = x[:, 2:4]
    view += 1
    return x * net.scale


def changed_types(net: Any, x: Tensor) -> Tensor:
    y = net.a(x)
    if y.is_floating_point() and y.device.type == x.device.type and y.device == x.device:
        y = y.to(x.dtype).to(y.device)
    return y * y.new_ones((len(y), *(1 for _ in range(y.dim() - 1)))) * round(y.shape[0] * 0.5 + 1)


FORWARDS = (
    starred, loop_over_channels, loop_over_rows, branch, padded, factories, assigned, aliased, changed_types,
)  # fmt: skip


@pytest.mark.parametrize("forward", FORWARDS)
def test_the_graph_computes_the_same(forward: Forward) -> None:
    model = Net(forward)
    graph = fxprune.capture(model, images()(2), method="values")
    for batch in (2, 1, 5):
        assert difference(outputs(model, images()(batch)), outputs(graph, images()(batch))) == 0


# A tensor that the forward makes of numbers is a constant for symbols, and a node without channels here.
@pytest.mark.parametrize("name", part_of((name for name in ZOO if name != "constants_of_channels"), 16))
def test_the_zoo_is_captured_as_by_symbolic_tracing(name: str) -> None:
    case = ZOO[name]
    model = case.build().eval()
    first, graph = (graph_of(model, case.example(2), method=method) for method in ("auto", "values"))
    assert list(graph.state_dict()) == list(model.state_dict())
    assert list(map(str, fxprune.couple(graph))) == list(map(str, fxprune.couple(first)))
    examples = [case.example(batch) for batch in (1, 2, 5) if case.any_batch or batch == 2]
    for example in examples + ([case.example(2, size=11)] if case.any_size else []):
        assert difference(outputs(model, example), outputs(graph, example)) < 1e-6


@pytest.mark.parametrize("name", part_of(["shufflenet_v2_x0_5", "mobilenet_v2"], 2))
def test_groups_are_those_of_symbolic_tracing(name: str) -> None:
    torch.manual_seed(0)
    model, example = torchvision.models.get_model(name).eval(), torch.randn(2, 3, 32, 32)
    first, graph = (fxprune.capture(model, example, method=method, prove=False) for method in ("fx", "values"))
    assert list(map(str, fxprune.couple(graph))) == list(map(str, fxprune.couple(first)))


MADE: dict[str, Callable[[Tensor, int], Tensor]] = {
    "zeros": lambda x, n: torch.zeros(n, x.shape[1], dtype=x.dtype, device=x.device),
    "zeros in place": lambda x, n: torch.zeros(3, 8).index_add_(0, torch.arange(n) % 3, x).sum(0),
    "ones": lambda x, n: torch.ones((n, 8)),
    "empty": lambda x, n: torch.empty(n, 8).fill_(1.0),
    "full": lambda x, n: torch.full((n, 1), float(n > 0), dtype=x.dtype),
    "arange": lambda x, n: torch.arange(n, dtype=x.dtype).view(-1, 1),
    "eye": lambda x, n: torch.eye(n).sum(1, keepdim=True),
    "tensor": lambda x, n: torch.tensor([n, 1.0], dtype=x.dtype).sum(),
    "as_tensor": lambda x, n: torch.as_tensor(n),
    "rand": lambda x, n: torch.rand(n, 8) * 0,
    "randn": lambda x, n: torch.randn(n, 8) * 0,
    "randint": lambda x, n: torch.randint(0, 3, (n, 8)) * 0,
    "randperm": lambda x, n: torch.randperm(n).view(-1, 1) * 0,
    "normal": lambda x, n: torch.normal(0.0, 1.0, (n, 8)) * 0,
    "finfo": lambda x, n: x.clamp(max=torch.finfo(x.dtype).max),
    "iinfo": lambda x, n: x.long().clamp(max=torch.iinfo(x.long().dtype).max),
}


@pytest.mark.filterwarnings("ignore:Net draws random numbers")
@pytest.mark.parametrize("name", MADE)
def test_tensors_made_of_sizes_follow_the_batch(name: str) -> None:
    model = Net(
        lambda net, x: F.linear(pooled := net.a(x).mean((2, 3)), net.b.weight[..., 0, 0]) + MADE[name](pooled, len(x))
    )
    graph = fxprune.capture(model, images()(2), method="values")
    for batch in (2, 5):
        assert difference(outputs(model, images()(batch)), outputs(graph, images()(batch))) < 1e-6


def test_few_functions_of_torch_are_replaced_while_a_forward_is_traced() -> None:
    before = dict(vars(torch))
    with ValueTracer(images()(2))._symbols_understood():
        replaced = [name for name, value in vars(torch).items() if value is not before[name]]
    assert "zeros" in replaced
    assert len(replaced) <= 12  # two of them are assertions
    assert vars(torch) == before


@pytest.mark.parametrize("forward", [starred, padded, factories, assigned, aliased, loop_over_rows])
def test_other_image_sizes(forward: Forward) -> None:
    model = Net(forward)
    graph = fxprune.capture(model, images(size=7)(2), method="values")
    for size in (7, 10, 5):
        x = images(size=size)(3)
        assert difference(outputs(model, x), outputs(graph, x)) == 0


@functools.lru_cache(maxsize=4)
def _ramp(height: int, shape: torch.Size) -> Tensor:
    return torch.arange(height * shape[-1]).reshape(height, -1) / height


class Tables:
    """Holds cached functions as a class does."""

    ramp = staticmethod(_ramp)
    bare = functools.lru_cache(maxsize=4)(lambda height, shape: _ramp.__wrapped__(height, shape))


CACHED: dict[str, Forward] = {
    "by name": lambda net, x: net.b(net.a(x) * _ramp(x.shape[2], x.shape)),
    "of a class": lambda net, x: net.b(net.a(x) * Tables.bare(x.shape[2], x.shape)),
    "packed": lambda net, x: net.b(net.a(x) * _ramp(*(x.shape[2], x.shape))),
}


@pytest.mark.parametrize("name", CACHED)
def test_cached_functions_of_sizes_are_run_on_symbols_that_do_not_outlive_the_trace(name: str) -> None:
    model = Net(CACHED[name]).eval()
    _ramp.cache_clear()
    Tables.bare.cache_clear()
    graph = trace(model, images()(2))
    assert _ramp.cache_info().currsize == Tables.bare.cache_info().currsize == 0
    for other in (images()(3), images(size=6)(2)):
        assert difference(outputs(graph, other), outputs(model, other)) == 0


def test_sizes_are_no_keys_of_a_dict() -> None:
    text = r"unhashable while it is traced: int \(at .*\{2: 3.0\}\[x.shape\[0\]\]"
    with pytest.raises(CaptureError, match=text):
        fxprune.capture(Net(lambda net, x: net.b(net.a(x)) * {2: 3.0}[x.shape[0]]).eval(), images()(2), method="values")


@pytest.mark.parametrize("method", ["fx", "values"])
def test_numbers_of_numpy_are_plain_ones_in_a_graph(method: str) -> None:
    model = Net(lambda net, x: net.b(net.a(x) * np.sqrt(2.0)).clamp(np.float32(-0.5), np.int64(3))).eval()
    graph = fxprune.capture(model, images()(2), method=method)
    assert {type(arg) for node in graph.graph.nodes for arg in node.args} <= {fx.Node, float, int}
    assert difference(outputs(graph, images()(3)), outputs(model, images()(3))) == 0


def test_the_model_and_torch_are_left_alone() -> None:
    """Functions of torch are replaced while tracing, also where tracing fails."""
    names = ("zeros", "ones", "arange", "finfo", "tensor", "full")
    before = [getattr(torch, name) for name in names], dict(fx_internals._wrapped_fns_to_patch)
    model = Net(assigned)
    weights = copy.deepcopy(model.state_dict())
    fxprune.capture(model, images()(2), method="values")
    with pytest.raises(CaptureError, match=r"ValueError: no \(at .*test_capture_values.py:\d+: raise ValueError"):
        fxprune.capture(Net(unable), images()(2), method="values")
    assert ([getattr(torch, name) for name in names], dict(fx_internals._wrapped_fns_to_patch)) == before
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in weights.items())


def unable(net: Any, x: Tensor) -> Tensor:
    if type(x) is not Tensor:
        raise ValueError("no")
    return net.a(x)


def test_a_buffer_that_the_forward_changes() -> None:
    class Counts(Net):
        def forward(self, x: Tensor) -> Tensor:
            self.scale += 1
            self.seen = self.a(x) * self.scale
            return self.seen

    model = Counts(branch)
    with pytest.warns(
        FxpruneWarning, match="the forward of Counts changes scale, seen: the graph begins with the buffers"
    ):
        graph = fxprune.capture(model, images()(2), method="values")
    assert torch.equal(model.scale, torch.ones(8, 1, 1))
    assert torch.equal(graph.scale, model.scale)
    assert not any(issubclass(type(value), fx.Proxy) for value in vars(graph).values())


# -- outputs -----------------------------------------------------------------------------------------------------------


@dataclass
class Answer:
    logits: Tensor
    features: Tensor | None = None
    attentions: tuple[Tensor, ...] | None = None


class Pair(NamedTuple):
    first: Tensor
    second: Tensor


def as_dict(net: Any, x: Tensor) -> dict[str, Any]:
    x = net.a(x)
    return OrderedDict(out=net.b(x), aux={"x": x, "sizes": [x.mean()]}) if len(x) else {}


def as_dataclass(net: Any, x: Tensor) -> Answer:
    x = net.a(x)
    return Answer(net.b(x) * len([*x.shape]), attentions=(x, x + 1))


def as_pair(net: Any, x: Tensor) -> Pair:
    return Pair(net.a(x), second=net.b(net.a(x).reshape(*net.a(x).shape)))


@pytest.mark.parametrize(("forward", "kind"), [(as_dict, dict), (as_dataclass, Answer), (as_pair, Pair)])
def test_outputs_in_containers(forward: Forward, kind: type) -> None:
    model = Net(forward)
    graph = fxprune.capture(model, images()(2), method="values")
    for twin in (graph, pickle.loads(pickle.dumps(graph)), copy.deepcopy(graph)):
        for batch in (2, 3):
            expected, found = call(model, images()(batch)), call(twin, images()(batch))
            assert type(found) is kind
            pairs = zip(_leaves(expected), _leaves(found), strict=True)
            assert all(torch.equal(a, b) for a, b in pairs)


def _leaves(output: Any) -> list[Tensor]:
    fields = vars(output) if isinstance(output, Answer) else output
    return tensors_of(dict(fields) if isinstance(fields, dict) else fields)


# -- decisions ---------------------------------------------------------------------------------------------------------


def decides(net: Any, x: Tensor) -> Tensor:
    x = net.a(x)
    if x.abs().sum() > 0:
        x = x * 2
    return net.b(x)


def checks(net: Any, x: Tensor) -> Tensor:
    x = net.a(x)
    assert torch.isfinite(x).all()
    torch._assert(bool((x < 1e9).all()), "large")
    if (x > 1e9).any():
        raise ValueError("large")
    if net.scale.sum() > 0 and torch.zeros_like(x).sum() == 0:
        x = x * 2
    return net.b(x) if len(x) else x


def test_a_decision_on_values_is_the_examples_and_says_so() -> None:
    model = Net(decides)
    with pytest.warns(
        FxpruneWarning, match=r"Net decides by the values of its input.*if x.abs\(\).sum\(\) > 0:"
    ) as told:
        graph = fxprune.capture(model, images()(2))
    assert len([warning for warning in told if warning.category is FxpruneWarning]) == 1
    assert difference(outputs(model, images()(3)), outputs(graph, images()(3))) == 0


def decides_by_the_mean(net: Any, x: Tensor) -> Tensor:
    assert x.abs().max() < 4
    large = float((x.abs() > 4).sum())
    h = net.a(x).relu()
    if x.mean() > 0.1:
        h = net.b(h).relu()
    if 1.0 in (x * 0):
        h = -h
    return h * (1 + large + round(float((x > 9).sum())))


@pytest.mark.parametrize("sign", [1, -1])
def test_every_stage_decides_as_the_example_did(sign: int, tmp_path: Path) -> None:
    model, x = Net(decides_by_the_mean).eval(), sign * images()(6).abs().clamp(0.2, 3)
    model.a, model.b = nn.Sequential(model.a, nn.Conv2d(8, 8, 1)), nn.Sequential(model.b, nn.Conv2d(8, 8, 1))
    batches = [(x, torch.zeros(6, dtype=torch.int64))]
    with pytest.warns(FxpruneWarning, match="decides by the values of its input") as told:
        scores = fxprune.score(model, batches, lambda out, _: out.square().mean(), progress=False)
    assert len(told) == 1
    scores.save(tmp_path / "scores.npz")
    plan = Scores.load(tmp_path / "scores.npz").plan(0.9)
    plan.save(tmp_path / "plan.json")
    plan = fxprune.Plan.load(tmp_path / "plan.json")
    small = fxprune.apply(model, plan)
    fxprune.save(small, tmp_path / "small.safetensors")
    again = fxprune.load(tmp_path / "small.safetensors", model)
    for other in (x, -x[:3]):
        assert fxprune.verify(model, plan, again, other) < 1e-5
    assert plan.settings["decisions"][0] is True
    assert plan.settings["decisions"][1] == 0
    assert plan.settings["decisions"][2] is (sign > 0)
    assert fxprune.report(small).params_after < fxprune.report(small).params_before


def test_assertions_and_decisions_on_constants_do_not_warn() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fxprune.capture(Net(checks), images()(2), method="values")


# -- modules that are opened, and those that are not -------------------------------------------------------------------


@pytest.mark.parametrize(
    "build",
    [
        lambda: nn.TransformerEncoderLayer(12, 2, 16, batch_first=True),
        lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(12, 2, 16, batch_first=True), 2),
        lambda: nn.TransformerEncoderLayer(12, 3, 16, norm_first=True),
    ],
)
def test_transformer_layers_are_opened(build: Callable[[], nn.Module]) -> None:
    model, x = build().eval(), tensors(5, 12)(4)
    graph = fxprune.capture(model, x)
    assert any(str(node.target).endswith("linear1") for node in graph.graph.nodes)
    assert difference(outputs(model, x), outputs(graph, x)) < 1e-6  # torch takes a fused way through the layer


def test_a_module_made_in_the_forward() -> None:
    model = Net(lambda net, x: net.b(nn.ReLU()(net.a(x))))
    for method in ("fx", "values"):
        graph = fxprune.capture(model, images()(2), method=method)
        assert difference(outputs(model, images()(3)), outputs(graph, images()(3))) == 0


class Stubborn(nn.Module):
    """Its forward cannot be traced, but it can be kept whole."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.inner = conv(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) + torch.from_numpy(x.detach().numpy().copy())


@layers(lambda: dict(a=conv(3, 8), b=conv(8, 8), hard=Stubborn(8), c=conv(8, 8), head=head(8)))
def Holder(self, x: Tensor) -> Tensor:
    return self.head(self.c(self.hard(self.b(self.a(x).relu()))).relu())


@pytest.mark.parametrize("leaves", [["hard"], ["h?rd"], [Stubborn]])
def test_leaves_are_kept_whole(leaves: list[Any]) -> None:
    model = Holder()
    graph = fxprune.capture(model, images()(2), leaves=leaves)
    assert [n.target for n in graph.graph.nodes if str(n.target).startswith("hard")] == ["hard"]
    found = {group.name: group for group in fxprune.couple(graph)}
    assert "hard is kept whole as a leaf" in str(found["b"])


def test_what_cannot_be_captured_says_why_in_a_line_a_way() -> None:
    with pytest.raises(CaptureError) as found:
        fxprune.capture(Holder(), images()(2))
    lines = str(found.value).splitlines()
    assert lines[0] == "Holder cannot be captured:"
    assert lines[1].startswith("  fx: ")
    assert lines[2].startswith("  values: ")
    assert all("test_capture_values.py" in line and "from_numpy" in line for line in lines[1:3])
    assert "leaves=" in lines[-1]
    assert "concrete_args=" in lines[-1]
    assert "fxprune.rules.rule" in lines[-1]


def test_what_is_excluded_is_kept_whole_where_it_cannot_be_captured() -> None:
    model, example = Holder(), images()(2)
    plan = Scores.random(model, example, exclude=["hard"]).plan(alpha=1.0)
    assert plan.settings["leaves"] == ["hard"]
    small = fxprune.apply(model, plan)
    assert fxprune.verify(model, plan, small, images()(3)) < 1e-5
    assert (small.a.out_channels < 8, small.b.out_channels, small.c.out_channels < 8) == (True, 8, True)
    loader = [(images()(8), torch.arange(8) % 5)]
    assert fxprune.compress(model, loader, alpha=1.0, exclude=["hard"], progress=False).b.out_channels == 8


@layers(lambda: dict(a=nn.Linear(6, 8), b=nn.Linear(8, 8), head=nn.Linear(8, 5)))
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


@pytest.mark.parametrize("method", ["fx", "values"])
def test_arguments_and_outputs_keep_their_structure(method: str) -> None:
    model = Options().eval()
    graph = fxprune.capture(model, options(), method=method)
    with torch.no_grad():
        expected, found = model(**options(3)), graph(**options(3))
    assert difference(tensors_of(expected), tensors_of(found)) < 1e-6
    assert [found["sizes"], found["pair"][1]] == [[3, None], "name"]
    assert isinstance(found["pair"], tuple)
    with pytest.raises(CaptureError, match=r"the graph was made for mask=None"):
        graph(**options(), mask=torch.ones(2, 1))


@layers(lambda: dict(a=nn.Linear(6, 8), b=nn.Linear(8, 4)))
def Moded(self, mode: str, x: Tensor, *, twice: bool = False, gain: float = 2.0) -> Tensor:
    x = self.a(x)
    x = x.relu() if mode == "relu" else x.tanh()
    return self.b(x * 2 if twice else x) * gain


@pytest.mark.parametrize("method", ["fx", "values"])
def test_concrete_args_leave_the_signature(method: str) -> None:
    model, x = Moded(), tensors(6)(3)
    concrete = {"mode": "relu", "twice": True}
    graph = fxprune.capture(model, tensors(6)(2), method=method, concrete_args=concrete)
    assert torch.equal(graph(x), model("relu", x, twice=True))
    plan = Scores.random(graph, None).plan(alpha=1.0)
    assert plan.settings["concrete_args"] == concrete
    assert fxprune.apply(model, plan).a.out_features < 8
    with pytest.raises(CaptureError, match=r"the graph was made for gain=2.0, .* an example that gives gain"):
        graph(x, gain=3.0)


def test_concrete_args_that_the_forward_does_not_have() -> None:
    with pytest.raises(CaptureError, match=r"concrete_args names 'speed', but it is Moded.forward"):
        fxprune.capture(Moded(), tensors(6)(2), concrete_args={"speed": 1})


def test_star_arguments() -> None:
    @layers(lambda: dict(a=nn.Linear(6, 4)))
    def Stars(self, *xs: Tensor, **more: Tensor) -> Tensor:
        return sum(self.a(x) for x in xs) + sum(more.values())

    model, example = Stars(), (tensors(6)(2), tensors(6)(2) + 1)
    for method in ("fx", "values"):
        graph = fxprune.capture(model, example, method=method)
        assert torch.equal(graph(*example), model(*example))
    named = {"shift": tensors(4)(2)}
    assert torch.equal(fxprune.capture(model, named)(**named), model(**named))


def test_the_four_ways_of_the_zoo() -> None:
    """What symbolic tracing cannot follow goes the second way by itself."""
    for name in ("write_to_slice", "loop_over_chunks", "starred_shape", "branch_on_shape"):
        case = ZOO[name]
        graph = fxprune.capture(case.build(), case.example(2))
        assert graph.meta["fxprune"].method == "values"


def test_an_unknown_leaf_is_an_error() -> None:
    with pytest.raises(CaptureError, match=r"leaves: no module of Holder matches 'missing'; names are '"):
        fxprune.capture(Holder(), images()(2), leaves=["missing"])


def test_a_narrowed_class_that_goes_another_way_says_so() -> None:
    model, x = Net(decides_by_the_mean).eval(), images()(2).abs().clamp(0.2, 3)
    model.a = nn.Sequential(model.a, nn.Conv2d(8, 8, 1))
    with pytest.warns(FxpruneWarning, match="decides by the values"):
        plan = Scores.random(model, x).plan(0.9)
    with pytest.raises(fxprune.NarrowError, match="Net does not run as its own class with the kept layers"):
        fxprune.narrow(model, plan)
