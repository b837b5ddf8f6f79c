"""What hooks, forwards set on instances and overridden methods compute is in the graph, or is refused by name."""

from __future__ import annotations

import copy
import functools
import threading
from pathlib import Path
from typing import Any

import hooked
import pytest
import torch
import torch.nn.functional as F
from helpers import difference, outputs, part_of, picture, same_picture
from hooked import HOOKED, Net, conv, images, watched, with_hook
from nets import layers
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm

import fxprune
from fxprune.caller.isolation import isolated_copy
from fxprune.errors import CaptureError, FxpruneWarning

RUNGS = ("fx", "values")
LOADER = [(images(6, seed), torch.arange(6) % 3) for seed in range(2)]
NOT_BY_FX = {"forward_on_batchnorm", "forward_on_attention", "hook_that_may_return"}  # they ask for values or shapes
PRUNED = (
    "weight_that_a_pre_hook_left",
    "hook_on_a_layer", "hook_by_a_module_of_the_model", "hook_by_what_another_noted", "hooks_at_the_root",
    "pre_hook_that_computes_a_weight", "forward_as_a_partial", "forward_closing_over_the_old_one",
    "DoubleWeight", "DoubleCall", "CalledNet",
)  # fmt: skip
DECIDING = "ignore:.* decides by the values:fxprune.FxpruneWarning"


@pytest.mark.filterwarnings(DECIDING)
@pytest.mark.parametrize("rung", RUNGS)
@pytest.mark.parametrize("name", HOOKED)
def test_the_graph_equals_the_model_with_its_hooks(name: str, rung: str) -> None:
    model, x = HOOKED[name]().eval(), images(5, seed=7)
    seen, before = (list(hooked.SEEN), hooked.CALLS), picture(model)
    if rung == "fx" and name in NOT_BY_FX:
        with pytest.raises(CaptureError, match=r"(?s)cannot be captured:\n  fx.*depends on the forward"):
            fxprune.capture(model, images(2), method=rung)
        return
    graph = fxprune.capture(model, images(2), method=rung)
    assert same_picture(before, picture(model))
    assert seen == (hooked.SEEN, hooked.CALLS)
    assert difference(outputs(model, x), outputs(graph, x)) <= (1e-6 if "attention" in name else 0)
    assert list(graph.state_dict()) == list(model.state_dict())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in graph.modules())
    assert not any("forward" in vars(module) for module in graph.modules())


@pytest.mark.parametrize("rung", RUNGS)
def test_hooks_that_look_on_leave_no_nodes(rung: str) -> None:
    model, seen = watched()
    graph, plain = (fxprune.capture(net, images(2), method=rung) for net in (model, Net()))
    assert [str(node) for node in graph.graph.nodes] == [str(node) for node in plain.graph.nodes]
    assert seen == []
    assert "last" not in vars(model.c1)


def test_what_a_hook_shares_is_copied_apart_from_what_cannot_be() -> None:
    class Watcher:
        def __init__(self, model: nn.Module) -> None:
            self.model, self.seen, self.lock = model, [model(images(2))], threading.Lock()

        def hook(self, module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
            with self.lock:
                self.seen.append(output)
            return output * self.model.f.bias[0]

    model = Net().eval()
    watcher = Watcher(model)
    model.c1.register_forward_hook(watcher.hook)
    graph = fxprune.capture(model, images(2))
    assert len(watcher.seen) == 1
    assert difference(outputs(model, images(5)), outputs(graph, images(5))) == 0
    assert graph.get_submodule("f").bias.data_ptr() != model.f.bias.data_ptr()


def test_functions_of_torch_are_shared() -> None:
    model = nn.Sequential(conv(), nn.Flatten()).eval()
    model.pool, model.relu = functools.partial(F.max_pool2d, kernel_size=2), F.relu
    own = isolated_copy(model)
    assert own.pool.func is F.max_pool2d
    assert own.relu is F.relu


def test_a_hook_may_change_the_structure_of_what_it_is_given() -> None:
    model = Net().eval()
    model.register_forward_hook(lambda module, inputs, output: {"logits": output})
    assert list(fxprune.capture(model, images(2))(images(5))) == ["logits"]


def test_what_was_compiled_is_captured_as_it_was_before() -> None:
    model, x = Net().eval(), images(5)
    wanted = outputs(model, x)
    model.forward, model.c1.forward = torch.compile(model.forward), torch.compile(model.c1.forward)
    assert difference(wanted, outputs(fxprune.capture(model, images(2)), x)) == 0


@pytest.mark.parametrize("name", ["hooks_at_the_root", "forward_as_a_partial"])
def test_a_model_without_numbers_is_captured_with_its_hooks(name: str) -> None:
    graphs = [fxprune.capture(HOOKED[name]().to(device), images(2)) for device in ("cpu", "meta")]
    one, other = ([node.format_node() for node in graph.graph.nodes] for graph in graphs)
    assert one == other


def test_hooks_of_accelerate() -> None:
    hooks = pytest.importorskip("accelerate.hooks")

    class Tripled(hooks.ModelHook):
        def post_forward(self, module: nn.Module, output: Tensor) -> Tensor:
            return output * 3

    model = Net().eval()
    hooks.add_hook_to_module(model.c1, hooks.AlignDevicesHook(execution_device="cpu"))
    hooks.add_hook_to_module(model.c2, Tripled())
    graph = fxprune.capture(model, images(2))
    assert difference(outputs(model, images(5)), outputs(graph, images(5))) == 0


def test_hooks_follow_the_mode_that_the_graph_is_of() -> None:
    def noise(module: nn.Module, inputs: Any, output: Tensor) -> Tensor | None:
        return output + torch.randn_like(output) if module.training else None

    model = with_hook(noise).train()
    graph = fxprune.capture(model, images(2))
    assert difference(outputs(model, images(5)), outputs(graph, images(5))) == 0


def zero(keep: Any, model: nn.Module) -> None:
    """Let the readers of two layers, the second of which is c2, read zero from the channels that a plan removes."""
    first = next(iter(keep))
    for layer, reader in ((first, model.c2), ("c2", model.f)):
        gone = [unit for unit in range(reader.weight.shape[1]) if unit not in keep[layer]]
        assert gone or layer != "c2"
        with torch.no_grad():
            reader.weight[:, gone] = 0


@pytest.mark.filterwarnings(DECIDING)
@pytest.mark.parametrize("name", part_of(PRUNED, 3))
def test_what_is_pruned_equals_the_model_with_those_channels_read_as_zero(name: str, tmp_path: Path) -> None:
    model, x = HOOKED[name]().eval(), images(5, seed=3)
    small = fxprune.compress(model, LOADER, 0.3, compensate="none", progress=False).eval()
    keep = small.meta["fxprune"].plan.keep
    zeroed = HOOKED[name]().eval()
    zero(keep, zeroed)
    assert difference(outputs(zeroed, x), outputs(small, x)) < 1e-6
    fxprune.save(small, tmp_path / "small")
    loaded = fxprune.load(tmp_path / "small", HOOKED[name]())
    assert difference(outputs(small, x), outputs(loaded, x)) == 0
    own = fxprune.narrow(model, small.meta["fxprune"].plan)
    assert difference(outputs(small, x), outputs(own, x)) < 1e-6
    fitted = fxprune.compress(model, LOADER, 0.3, progress=False).train()
    F.cross_entropy(fitted(x), torch.arange(5) % 3).backward()
    assert all(parameter.grad is not None for parameter in fitted.parameters())


# -- what is refused ---------------------------------------------------------------------------------------------------


def refused(model: nn.Module, message: str, **options: Any) -> None:
    with pytest.raises(CaptureError, match=message):
        fxprune.capture(model, images(2), **options)


def _fails(module: nn.Module, *given: Any) -> None:
    raise KeyError("stats")


class _Failing:
    def __call__(self, module: nn.Module, inputs: Any, output: Tensor) -> None:
        _fails(module)


@pytest.mark.parametrize("hook", [_fails, _Failing(), functools.partial(_fails)], ids=["function", "object", "partial"])
@pytest.mark.parametrize("kind", ["forward_hook", "forward_pre_hook"])
def test_a_hook_that_fails_is_named_and_the_batch_is_not(hook: Any, kind: str) -> None:
    model = Net()
    name = "_Failing" if isinstance(hook, _Failing) else "_fails"
    given = (lambda module, inputs: hook(module, inputs, None)) if kind == "forward_pre_hook" else hook
    getattr(model.c1, f"register_{kind}")(given)
    called = f"the {kind.replace('_', ' ').replace('pre ', 'pre-')} "
    called += ".*lambda.*" if given is not hook else rf"{name} \(.*test_hooks.py:\d+\) "
    refused(
        model, rf"Net does not run, because {called}of c1 fails \(KeyError: 'stats', at .*\): mend the hook, or take"
    )
    with pytest.raises(CaptureError, match=r"does not run, because the forward .* of c1 fails \(KeyError: 'stats'"):
        fxprune.score(model, LOADER, submodule="c2", progress=False)


def test_a_hook_that_cannot_be_traced_is_named() -> None:
    def by_numpy(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        return torch.from_numpy(output.detach().numpy() * 2)

    refused(
        with_hook(by_numpy),
        r"(?s)Net cannot be captured:.*depends on the forward hook .*by_numpy \(.*test_hooks.py:\d+\) of c1: take off",
    )


def _shrinks_in_place(module: nn.Module, inputs: Any, output: Tensor) -> None:
    if output.abs().max() > 1e4:
        output.mul_(0.1)


def _sets_in_place(module: nn.Module, inputs: Any, output: Tensor) -> None:
    if output.abs().max() > 1e4:
        output[output > 1e4] = 0


def _scales_in_place(module: nn.Module, inputs: Any, output: Tensor) -> None:
    if output.abs().max() > 1e4:
        output *= 0.1


@pytest.mark.parametrize("hook", [_shrinks_in_place, _sets_in_place, _scales_in_place])
def test_a_hook_that_may_compute_in_place_is_not_dropped(hook: Any) -> None:
    with pytest.warns(fxprune.FxpruneWarning, match=r"decides by the values of its input.*test_hooks\.py"):
        fxprune.capture(with_hook(hook), images(2))


def _tenth(given: Tensor) -> None:
    given.mul_(0.1)


def _where_large(given: Tensor) -> Tensor | None:
    return given * 0.1 if given.abs().max() > 1e4 else None


class Shrinking:
    """A hook that works through methods."""

    def __call__(self, module: nn.Module, inputs: Any, output: Tensor) -> None:
        self.look(output)

    def look(self, given: Tensor) -> None:
        if given.abs().max() > 1e4:
            self.change(factor=0.1, given=given)

    def change(self, given: Tensor, factor: float) -> None:
        given.mul_(factor)


def _by_a_function(module: nn.Module, inputs: Any, output: Tensor) -> None:
    if output.abs().max() > 1e4:
        _tenth(output)


def _by_what_another_returns(module: nn.Module, inputs: Any, output: Tensor) -> Tensor | None:
    return _where_large(output)


def _that_returns_what_it_was_given(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
    if output.abs().max() > 1e4:
        output = output * 0.1
    return output


@pytest.mark.parametrize(
    "hook",
    [_by_a_function, _by_what_another_returns, _that_returns_what_it_was_given, Shrinking(), Shrinking().__call__],
)
def test_a_hook_that_may_compute_through_others_is_not_dropped(hook: Any) -> None:
    with pytest.warns(fxprune.FxpruneWarning, match=r"decides by the values of its input.*test_hooks\.py"):
        fxprune.capture(with_hook(hook), images(2))


def test_hooks_of_all_modules_are_not_in_the_graph() -> None:
    model, x = Net().eval(), images(3)
    wanted = outputs(model, x)
    handles = [
        register_module_forward_hook(lambda module, inputs, output: output * 1.5),
        register_module_forward_pre_hook(lambda module, inputs: (inputs[0] * 1.5,)),
    ]
    try:
        with pytest.warns(FxpruneWarning, match="registered for all modules are not part of the graph") as told:
            graph = fxprune.capture(model, images(2))
        assert difference(outputs(model, x), wanted) > 0.1
        with pytest.warns(FxpruneWarning, match="registered for all modules") as compressing:
            fxprune.compress(model, LOADER, 0.3, progress=False, verify=False)
    finally:
        for handle in handles:
            handle.remove()
    assert len(told) == sum("registered for all modules" in str(warning.message) for warning in compressing) == 1
    assert difference(outputs(graph, x), wanted) == 0


def _noted(store: dict[str, Any], name: str, given: Tensor) -> None:
    if name not in store:
        store[name] = given.abs().max().item()


def test_a_hook_that_notes_through_a_function_only_looks_on() -> None:
    store: dict[str, Any] = {}
    model = with_hook(lambda module, inputs, output: _noted(store, "c1", output))
    assert len(fxprune.capture(model, images(2), method="fx").graph.nodes) == len(
        fxprune.capture(Net(), images(2)).graph.nodes
    )


def test_a_hook_that_notes_in_containers_only_looks_on() -> None:
    noted: dict[str, Any] = {}

    def note(module: nn.Module, inputs: Any, output: Tensor) -> None:
        found = {}
        for index, tensor in enumerate(inputs):
            found[index] = tensor.abs().max().item()
            noted["count"] = noted.get("count", 0) + 1
        noted.setdefault("all", []).append(found)

    graph = fxprune.capture(with_hook(note), images(2), method="fx")
    assert len(graph.graph.nodes) == len(fxprune.capture(Net(), images(2)).graph.nodes)


STRANGERS: list[nn.Module] = []


def scaled(x: Tensor) -> Tensor:
    return x * STRANGERS[-1].f.bias.mean()


def test_a_function_that_reaches_the_model_itself_is_named() -> None:
    model = with_hook(lambda module, inputs, output: scaled(output))
    STRANGERS.append(model)
    refused(model, r"the forward hook .*<lambda> .* of c1 works with f.bias of the Net itself.*in scaled.*closes over")
    old = Net.forward
    model = Net()
    STRANGERS.append(model)
    model.forward = lambda x: scaled(old(model, x))
    refused(model, "a forward works with f.bias of the Net itself")


def test_one_that_only_looks_on_may_reach_the_model_itself() -> None:
    model = with_hook(lambda module, inputs, output: scaled(output) and None if len(output) > 99 else None)
    model.f.register_forward_hook(lambda module, inputs, output: STRANGERS.append(scaled(output)))
    STRANGERS.append(model)
    graph = fxprune.capture(model, images(2))
    assert str(graph.graph) == str(fxprune.capture(Net(), images(2)).graph)


def test_what_a_forward_shares_with_a_hook_and_no_copy_can_follow() -> None:
    noted: dict[str, Tensor] = {}

    class Shared(Net):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + noted["x"].mean()

    model = Shared()
    model.c1.register_forward_hook(lambda module, inputs, output: noted.update(x=output))
    refused(model, r"(?s)Shared does not run on the example \(KeyError: 'x'\).*depends on the forward hook .*lambda")
    model(images(2))
    refused(model, "a forward works with a tensor in noted, which no copy of the model can follow .*in forward")


@pytest.mark.parametrize(
    ("model", "leaf", "message"),
    [
        (HOOKED["hooks_in_and_on_a_container"], "c1", "leaves keeps c1 whole, but c1.0 has a forward hook"),
        (HOOKED["forward_as_a_partial"], "c1", "leaves keeps c1 whole, but c1 has a forward of its own"),
        (HOOKED["DoubleCall"], "c1", "leaves keeps c1 whole, but c1 has its own __call__: let another"),
    ],
)
def test_leaves_that_a_node_cannot_stand_for(model: Any, leaf: str, message: str) -> None:
    refused(model(), message, leaves=leaf)


def test_a_leaf_with_hooks_around_it() -> None:
    model = HOOKED["hook_on_a_layer"]().eval()
    graph = fxprune.capture(model, images(2), leaves="c1")
    assert difference(outputs(model, images(5)), outputs(graph, images(5))) == 0


def test_a_tensor_that_an_earlier_forward_left_is_named() -> None:
    model = Net()
    model.c1.register_forward_hook(lambda module, inputs, output: setattr(module, "last", output))
    model(images(2))
    refused(model, r"Net cannot be deep-copied .*c1.last was computed by an earlier forward.*: set them to None, or")


# -- weights that hooks compute ----------------------------------------------------------------------------------------

KINDS: dict[str, Any] = {
    "prune.remove": lambda layer: prune.ln_structured(layer, "weight", 0.5, 2, 0),
    "remove_weight_norm": weight_norm,
    "remove_spectral_norm": spectral_norm,
}
OLD = "ignore:.*weight_norm.* is deprecated:FutureWarning"


def computed(kind: str, *, run: str = "") -> nn.Module:
    """A network with computed weights; "graded" or "ungraded" says how it ran before."""
    model = Net().train()
    for layer in (model.c1, model.c2):
        KINDS[kind](layer)
    if run:
        with torch.set_grad_enabled(run == "graded"):
            model(images(4))
    return model.eval()


@pytest.mark.filterwarnings(OLD)
@pytest.mark.parametrize("run", ["", "graded", "ungraded"])
@pytest.mark.parametrize("kind", KINDS)
def test_weights_that_hooks_of_torch_compute_become_parameters(kind: str, run: str, tmp_path: Path) -> None:
    model, x = computed(kind, run=run), images(5, seed=3)
    before = picture(model)
    says = rf'Net: c1.weight \(and 1 more\) is computed by a hook, .*torch.nn.utils.{kind}\(model.c1, "weight"\)'
    with pytest.warns(FxpruneWarning, match=says) as caught:
        small = fxprune.compress(model, LOADER, 0.3, compensate="none", progress=False).eval()
    assert len(caught) == 1
    assert same_picture(before, picture(model))
    assert set(small.state_dict()) == set(Net().state_dict())
    assert fxprune.report(small).error < 1e-5
    with pytest.warns(FxpruneWarning, match=says):
        whole = fxprune.capture(model, images(2))
    assert difference(outputs(model, x), outputs(whole, x)) < 1e-6
    plan, wanted = small.meta["fxprune"].plan, outputs(small, x)
    fxprune.save(small, tmp_path / "small")
    with pytest.warns(FxpruneWarning, match=says):
        loaded = fxprune.load(tmp_path / "small", computed(kind))
    with pytest.warns(FxpruneWarning, match=says):
        own = fxprune.narrow(model, plan, weights=small)
    assert difference(wanted, outputs(loaded, x)) == difference(wanted, outputs(own, x)) == 0
    other = copy.deepcopy(small)
    other.load_state_dict(small.state_dict())
    other.train()(x).sum().backward()
    assert all(parameter.grad is not None for parameter in other.parameters())


@pytest.mark.filterwarnings(OLD, "ignore::fxprune.FxpruneWarning")
def test_weights_that_several_hooks_compute() -> None:
    model = Net().eval()
    weight_norm(model.c1)
    prune.l1_unstructured(model.c1, "weight_v", 0.5)
    prune.random_unstructured(model.c1, "weight_v", 0.5)
    prune.l1_unstructured(model.f, "bias", 0.5)
    graph = fxprune.capture(model, images(2))
    assert set(graph.state_dict()) == set(Net().state_dict())
    assert difference(outputs(model, images(5)), outputs(graph, images(5))) < 1e-6


@pytest.mark.filterwarnings("ignore::fxprune.FxpruneWarning")
def test_a_weight_of_which_torch_can_make_no_parameter() -> None:
    model = Net()
    prune.identity(model.c1, "weight")
    model.c1._buffers.pop("weight_mask")
    refused(model, r'c1.weight is computed by a hook, .*: call torch.nn.utils.prune.remove\(model.c1, "weight"\) on')


def test_layers_under_parametrize_are_in_the_report() -> None:
    model = Net(nn.Sequential(conv(), nn.ReLU())).eval()
    parametrizations.weight_norm(model.c1[0])
    small = fxprune.compress(model, LOADER, 0.3, progress=False)
    reasons = {entry.sites: entry.reason for entry in fxprune.report(small).frozen}
    assert reasons["c1.0",] == (
        "its weight is computed by torch.nn.utils.parametrize; "
        'torch.nn.utils.parametrize.remove_parametrizations(model.c1[0], "weight") makes a parameter of it'
    )


# -- a part of a model -------------------------------------------------------------------------------------------------


@layers(lambda: dict(stem=conv(3, 3), body=Net()))
def Whole(self, x: Tensor) -> Tensor:
    return self.body(self.stem(x))


def whole() -> tuple[nn.Module, list[int]]:
    """A model with hooks outside of its part "body", on it, and in it; and how often the first was called."""
    model, calls = Whole().eval(), []

    def outside(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        calls.append(1)
        return output * model.stem.bias[0] + 1

    model.stem.register_forward_hook(outside)
    model.register_forward_pre_hook(lambda module, inputs: (inputs[0] * 2,))
    model.body.register_forward_pre_hook(lambda module, inputs: (inputs[0] - 1,))
    model.body.register_forward_hook(lambda module, inputs, output: output * 3)
    model.body.c1.register_forward_hook(lambda module, inputs, output: output * 2)
    return model, calls


def test_hooks_around_a_part_stay_and_those_in_it_are_in_its_graph() -> None:
    model, calls = whole()
    small = fxprune.compress(model, LOADER, 0.3, submodule="body", compensate="none", progress=False)
    assert calls == []
    keep = small.body.meta["fxprune"].plan.keep
    zeroed, _ = whole()
    zero(keep, zeroed.body)
    assert difference(outputs(zeroed, images(5)), outputs(small, images(5))) < 1e-6
    own = fxprune.narrow(model, small.body.meta["fxprune"].plan)
    assert difference(outputs(small, images(5)), outputs(own, images(5))) < 1e-6
    assert calls == []
