"""Weights that a hook of torch computes before every forward, and their conversion into ordinary parameters."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrize, prune, remove_spectral_norm, remove_weight_norm
from torch.nn.utils.spectral_norm import SpectralNorm, SpectralNormLoadStateDictPreHook
from torch.nn.utils.weight_norm import WeightNorm

from fxprune.caller.source_lines import warn
from fxprune.errors import CaptureError, error_text

_REMOVERS: dict[type, tuple[Any, str]] = {
    prune.BasePruningMethod: (prune.remove, "torch.nn.utils.prune.remove"),
    WeightNorm: (remove_weight_norm, "torch.nn.utils.remove_weight_norm"),
    SpectralNorm: (remove_spectral_norm, "torch.nn.utils.remove_spectral_norm"),
}


@dataclass(frozen=True, slots=True)
class Computed:
    """A tensor of the module at `path` that one of torch's hooks computes."""

    path: str
    module: nn.Module
    name: str
    kind: type

    @property
    def call(self) -> str:
        """The call that makes an ordinary parameter of it, as a user would write it."""
        return f'{_REMOVERS[self.kind][1]}({_module(self.path)}, "{self.name}")'

    def remove(self) -> None:
        """Make an ordinary parameter of it, with its value in eval mode; CaptureError where torch cannot."""
        try:
            _REMOVERS[self.kind][0](self.module, self.name)
        except (AssertionError, AttributeError, KeyError, RuntimeError, ValueError) as error:
            raise CaptureError(
                f"{self.path}.{self.name} is computed by a hook, and torch cannot make a parameter of it "
                f"({error_text(error)}): call {self.call} on your model first"
            ) from error
        hooks = self.module._load_state_dict_pre_hooks
        for key, hook in list(hooks.items()):  # torch itself does not find this one
            if isinstance(getattr(hook, "hook", hook), SpectralNormLoadStateDictPreHook):
                del hooks[key]


def _module(path: str) -> str:
    """A module of a model, as a user would write it."""
    return "model" + "".join(f"[{name}]" if name.isdigit() else f".{name}" for name in path.split(".") if name)


def parametrized(model: nn.Module, path: str = "") -> dict[str, tuple[str, ...]]:
    """The layers of the part at `path` that use `torch.nn.utils.parametrize`, by the reason, with its remedy."""
    reasons: dict[str, tuple[str, ...]] = {}
    for layer, module in model.named_modules():
        if parametrize.is_parametrized(module):
            whole = _module(f"{path}.{layer}")
            for name in module.parametrizations:  # type: ignore[union-attr]
                call = f'torch.nn.utils.parametrize.remove_parametrizations({whole}, "{name}")'
                reasons[f"its {name} is computed by torch.nn.utils.parametrize; {call} makes a parameter of it"] = (
                    layer,
                )
    return reasons


def computed_tensors(model: nn.Module) -> list[Computed]:
    """All tensors of a model that hooks of torch compute, the latest hook of a module first."""
    found = []
    for path, module in model.named_modules():
        for hook in reversed(module._forward_pre_hooks.values()):
            kind = next((kind for kind in _REMOVERS if isinstance(hook, kind)), None)
            name: Any = getattr(hook, "_tensor_name", None) or getattr(hook, "name", None)
            found += [] if kind is None else [Computed(path, module, name, kind)]
    return found


def stored_weights(model: nn.Module) -> Iterator[Tensor]:
    """The values that pre-forward hooks computed last and left on their modules as plain attributes."""
    held = (vars(module).values() for module in model.modules() if module._forward_pre_hooks)
    return (value for values in held for value in values if isinstance(value, Tensor) and not value.is_leaf)


def make_permanent(model: nn.Module) -> list[Computed]:
    """Make ordinary parameters of all computed tensors of a copy of a model; returns the computed tensors."""
    found = computed_tensors(model)
    for entry in found:
        entry.remove()
    return found


def warn_of_computed(model: nn.Module, found: list[Computed]) -> None:
    """Warn which tensors that hooks compute in the caller's model are ordinary parameters in the graph."""
    if found:
        first, more = found[0], f" (and {len(found) - 1} more)" if len(found) > 1 else ""
        warn(
            f"{type(model).__name__}: {first.path}.{first.name}{more} is computed by a hook, before every forward; "
            f"in the graph it is a parameter, at its present value: {first.call} makes one in your model too"
        )
