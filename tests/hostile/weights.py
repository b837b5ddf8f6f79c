"""Weights that hooks or parametrizations compute out of other tensors, before and after a forward."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune, remove_spectral_norm, remove_weight_norm
from torch.nn.utils import spectral_norm as old_spectral_norm
from torch.nn.utils import weight_norm as old_weight_norm
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from hostile.case import Deep, Net, add, conv, hostile, images, middle, with_layers

KIND = "weights"


def permanent(model: nn.Module) -> nn.Module:
    """The same network, whose weights are parameters."""
    with torch.no_grad():
        model(images(4, 0))  # for the hooks of our own, which set a weight when they run
    for module in list(model.modules()):
        for key, hook in list(module._forward_pre_hooks.items()):
            _remove(module, key, hook)
        for name in list(getattr(module, "parametrizations", {})):
            parametrize.remove_parametrizations(module, name, leave_parametrized=True)
    return model


def _remove(module: nn.Module, key: int, hook: Any) -> None:
    if isinstance(hook, prune.BasePruningMethod):
        prune.remove(module, hook._tensor_name)
    elif isinstance(hook, WeightNorm):
        remove_weight_norm(module, hook.name)
    elif isinstance(hook, SpectralNorm):
        remove_spectral_norm(module, hook.name)
    elif hook in OWN:
        del module._forward_pre_hooks[key]
        weight = module.__dict__.pop("weight").detach().clone()
        for name in ("raw", "gain"):
            module._parameters.pop(name, None)
        module.weight = nn.Parameter(weight)


# -- hooks of our own ------------------------------------------------------------------------------------------------


def equalized(module: Any, args: Any) -> None:
    """The equalized learning rate of StyleGAN."""
    module.weight = module.raw * 0.7


def normed(module: Any, args: Any) -> None:
    module.weight = F.normalize(module.raw.flatten(1)).view_as(module.raw) * module.gain.view(-1, 1, 1, 1)


def quantized(module: Any, args: Any) -> None:
    step = module.raw.detach().abs().max() / 63
    module.weight = module.raw + ((module.raw / step).round() * step - module.raw).detach()


OWN = (equalized, normed, quantized)


def _own(hook: Any, net: Any) -> None:
    for layer in (net.c1, net.c2):
        layer.raw = layer._parameters.pop("weight")
        layer.gain = nn.Parameter(torch.rand(len(layer.raw)) + 0.5)
        if hook is not normed:
            del layer.gain
        hook(layer, ())
        layer.register_forward_pre_hook(hook)


# -- what is done to a network ---------------------------------------------------------------------------------------


def _each(function: Callable[..., Any], *args: Any, **options: Any) -> Callable[[Any], None]:
    def change(net: Any) -> None:
        for layer in (net.c1, net.block[0], net.c2, net.f):
            function(layer, *args, **options)

    return change


def _one(name: str, function: Callable[..., Any], *args: Any, **options: Any) -> Callable[[Any], Any]:
    return lambda net: function(net.get_submodule(name), *args, **options)


class Standardised(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return (weight - weight.mean((1, 2, 3), keepdim=True)) / (weight.std((1, 2, 3), keepdim=True) + 1e-4)


def _pruned_and_parametrized(net: Any) -> None:
    prune.l1_unstructured(net.c1, "weight", 0.4)
    parametrizations.weight_norm(net.c2)


CHANGES: dict[str, Callable[[Any], Any]] = {
    "prune_rows": _each(prune.ln_structured, "weight", 0.25, 2, 0),
    "prune_columns": _one("c2", prune.ln_structured, "weight", 0.25, 1, 1),
    "prune_a_bias": _one("c1", prune.l1_unstructured, "bias", 0.5),
    "prune_a_norm": _one("bn", prune.l1_unstructured, "weight", 0.5),
    "weight_norm": _each(old_weight_norm),
    "weight_norm_of_columns": _one("c2", old_weight_norm, dim=1),
    "spectral_norm": _each(old_spectral_norm),
    "hook_equalized": functools.partial(_own, equalized),
    "hook_normed": functools.partial(_own, normed),
    "hook_quantized": functools.partial(_own, quantized),
    "parametrized_weight_norm": _each(parametrizations.weight_norm),
    "parametrized_spectral_norm": _one("c2", parametrizations.spectral_norm),
    "parametrized_orthogonal": _one("f", parametrizations.orthogonal),
    "parametrized_standardised": _one("c2", parametrize.register_parametrization, "weight", Standardised()),
    "prune_and_parametrized": _pruned_and_parametrized,
}
COMPUTED = ("*parametrizations*", "*.raw")  # of which norms and scales are taken
AFTER = (
    "prune_rows", "prune_a_bias", "weight_norm", "spectral_norm", "hook_equalized", "hook_normed",
    "parametrized_spectral_norm",
)  # fmt: skip


def _made(change: Callable[[Any], Any], *, run: bool) -> Callable[[], nn.Module]:
    """A network as it comes, or after a forward in train mode without gradients, which makes its weights leaves."""

    def build() -> nn.Module:
        net = Deep()
        change(net)
        if run:
            with torch.no_grad():
                net.train()(images(6, 3))
        return net

    return build


TORCHS = ("prune", "weight_norm", "spectral_norm", "parametrized")  # what torch has computed, it makes permanent, too
for _name, _change in CHANGES.items():
    _expected: Any = {"plain": permanent, "whole": ("*parametrizations*",) if "equalized" in _name else COMPUTED}
    _expected["wanted"] = "exact" if _name.startswith(TORCHS) else "any"
    add(KIND, _name, _made(_change, run=False), images, **_expected)
    if _name in AFTER:
        add(KIND, f"{_name}_after_a_forward", _made(_change, run=True), images, **_expected)


WEIGHED: dict[str, Callable[[Tensor], Tensor]] = {
    "scaled": lambda w: w * 0.5,
    "binary": lambda w: w + (w.sign() * 0.1 - w).detach(),
    "transposed": lambda w: w.transpose(0, 1),
    "averaged_with_itself": lambda w: (w + w.roll(1, 0)) / 2,
}
for _name, _weigh in WEIGHED.items():
    with_layers(
        KIND, lambda: dict(weight=nn.Parameter(torch.randn(8, 8, 3, 3) * 0.1), bias=nn.Parameter(torch.zeros(8))),
        {f"computed_{_name}": lambda self, x, weigh=_weigh: F.conv2d(x, weigh(self.weight), self.bias, padding=1)},
    )  # fmt: skip


def _masked(**options: Any) -> dict[str, Any]:
    """One layer with a mask, at two places."""
    g = conv(8, 8, **options)
    prune.ln_structured(g, "weight", 0.25, 2, 0)
    return {"g": g, "again": g}


SHARED: Any = {"masked_depthwise": lambda self, x: self.g(x), "masked_twice": lambda self, x: self.again(self.g(x))}
with_layers(KIND, lambda: _masked(groups=8), SHARED, plain=permanent, wanted="any")


@middle(KIND, lambda: dict(g=parametrizations.weight_norm(conv(8, 8))), plain=permanent)
def parametrized_under_cache(self: Any, x: Tensor) -> Tensor:
    with parametrize.cached():
        return self.g(self.g(x).relu())


@hostile(KIND, wanted="any")
def weights_of_another() -> nn.Module:
    """A layer whose weight is another layer's, set before each forward by a hook on the model."""
    net = Net(lambda self, x: self.h(self.g(x).relu()), g=conv(8, 8), h=conv(8, 8))
    net.register_forward_pre_hook(lambda module, args: setattr(module.h, "weight", module.g.weight))
    return net


@middle(KIND, lambda: dict(latent=nn.Parameter(torch.randn(4, 6)), hyper=nn.Linear(24, 576)), wanted="any")
def weights_by_a_hypernetwork(self: Any, x: Tensor) -> Tensor:
    """The weight of a convolution is what a linear layer gives."""
    return F.conv2d(x, self.hyper(self.latent.flatten()).view(8, 8, 3, 3) * 0.3, padding=1)
