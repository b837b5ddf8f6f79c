"""What a process has once for all: the state of torch, Python and the random generators that must stay as it is."""

from __future__ import annotations

import logging
import random
import signal
import sys
import types
import warnings
from typing import Any

import numpy as np
import torch
import torch._guards
from torch.fx import _symbolic_trace, traceback
from torch.fx.experimental import proxy_tensor, symbolic_shapes
from torch.nn.modules import module as modules
from torch.utils import _python_dispatch

_PATCHED = ("torch", "torchvision", "builtins", "math", "operator", "zoo", "test_interrupts", "mynets")
_OF_MODULES: tuple[tuple[Any, str], ...] = (
    (proxy_tensor, "_CURRENT_MAKE_FX_TRACER"), (traceback, "current_meta"), (traceback, "should_preserve_node_meta"),
    (_python_dispatch, "_is_in_torch_dispatch_mode"), (_symbolic_trace, "CURRENT_PATCHER"),
    (_symbolic_trace, "_is_fx_tracing_flag"), (_symbolic_trace, "_wrapped_fns_to_patch"),
    (modules, "_global_buffer_registration_hooks"), (modules, "_global_parameter_registration_hooks"),
    (modules, "_global_forward_hooks"), (modules, "_global_forward_pre_hooks"), (warnings, "showwarning"),
)  # fmt: skip
_OF_THREADS = (
    torch._guards._TLS, getattr(symbolic_shapes, "TLS", None), getattr(_symbolic_trace, "_is_fx_tracing_tls", None),
)  # fmt: skip


def state() -> dict[str, Any]:
    """All of it, by name, as values that can be compared."""
    found: dict[str, Any] = dict(_functions())
    for owner in (torch.nn.Module, torch.Tensor):
        found |= {f"{owner.__name__}.{name}": id(value) for name, value in vars(owner).items()}
    for module, name in _OF_MODULES:
        value = getattr(module, name, None)
        found[f"{module.__name__}.{name}"] = dict(value) if isinstance(value, dict) else value
    for index, held in enumerate(_OF_THREADS):
        found[f"of threads {index}"] = {name: value for name, value in vars(held).items() if value} if held else {}
    return found | _of_torch() | _of_python()


def _functions() -> dict[str, int]:
    """The functions in the namespaces that tracing may patch."""
    loaded = [(name, module) for name, module in sys.modules.items() if name.partition(".")[0] in _PATCHED]
    kinds = (types.FunctionType, types.BuiltinFunctionType)
    return {
        f"{name}.{key}": id(value)
        for name, module in loaded
        for key, value in list(vars(module).items())
        if type(value) in kinds
    }


def _of_torch() -> dict[str, Any]:
    """Modes, flags and keys that torch keeps in C++."""
    own, keys = torch._C, torch._C._TorchDispatchModeKey
    infra = torch._ops._mode_stack_state_for_pre_dispatch._ModeStackStateForPreDispatch__infra_modes
    return {
        "function modes": own._len_torch_function_stack(), "dispatch modes": own._len_torch_dispatch_stack(),
        "infra modes": [own._get_dispatch_mode(key) for key in (keys.FAKE, keys.PROXY, keys.FUNCTIONAL)],
        "modes before dispatch": str(infra), "functions": own._is_torch_function_enabled(),
        "keys": (str(own._dispatch_tls_local_include_set()), str(own._dispatch_tls_local_exclude_set())),
        "lifting": own._only_lift_cpu_tensors(), "gradients": torch.is_grad_enabled(),
        "inference": torch.is_inference_mode_enabled(), "default dtype": torch.get_default_dtype(),
        "autocast": (torch.is_autocast_enabled("cpu"), torch.is_autocast_cache_enabled()),
        "default device": torch.get_default_device(), "threads": torch.get_num_threads(),
        "precision": torch.get_float32_matmul_precision(), "tf32": torch.backends.cudnn.allow_tf32,
    }  # fmt: skip


def _of_python() -> dict[str, Any]:
    drawn = np.random.get_state()
    return {
        "random": random.getstate(), "NumPy's random": (drawn[1].tobytes(), *drawn[2:]),  # type: ignore[union-attr]
        "torch's random": torch.get_rng_state().numpy().tobytes(), "logging": logging.root.manager.disable,
        "warnings": tuple(warnings.filters), "interrupts": signal.getsignal(signal.SIGINT),
        "profilers": (sys.getprofile(), sys.gettrace()),
    }  # fmt: skip


def changed(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """The names of what is other than it was; what was imported meanwhile is no change."""
    return sorted(name for name in before if before[name] != after.get(name))
