"""Outputs on the meta device, and flops, of layers for which torch itself takes long there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fxprune.caller.meta import META

Found = tuple[Any, int] | None


def shape_of_layer(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Found:
    """The output of a layer in eval mode on inputs without numbers, and its flops; None where torch has to say."""
    rule = _RULES.get(type(module))
    known = rule and args and isinstance(args[0], Tensor) and args[0].is_meta and not module.training
    return rule(module, *args, **kwargs) if rule and known else None


def shape_of_sum(x: Any, y: Any) -> Found:
    """The sum or product of two tensors without numbers that lie in memory alike; None where torch has to say."""
    if not (isinstance(x, Tensor) and isinstance(y, Tensor) and x.is_meta and y.is_meta and x.dtype == y.dtype):
        return None
    return (_like(x), 0) if x.shape == y.shape and x.stride() == y.stride() else None


def _made(x: Tensor, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=x.dtype, device=META)


def _like(x: Tensor) -> Tensor:
    return _made(x, *x.shape) if x.is_contiguous() else torch.empty_like(x)


def _activation(module: Any, x: Tensor) -> Found:
    if not x.is_floating_point():
        return None
    return x if getattr(module, "inplace", False) else _like(x), 0


def _batch_norm(module: Any, x: Tensor) -> Found:
    module._check_input_dim(x)
    return (_like(x), 0) if x.shape[1] == module.num_features else None


def _linear(module: Any, x: Tensor) -> Found:
    if x.ndim < 2 or x.shape[-1] != module.in_features or not _is_plain(module, x):
        return None
    output = _made(x, *x.shape[:-1], module.out_features)
    return output, 2 * output.numel() * module.in_features


def _convolution(module: Any, x: Tensor) -> Found:
    if x.ndim != len(module.kernel_size) + 2 or x.shape[1] != module.in_channels or not _is_plain(module, x):
        return None
    if isinstance(module.padding, str) or module.padding_mode != "zeros":
        return None
    windows = zip(x.shape[2:], module.kernel_size, module.stride, module.padding, module.dilation, strict=True)
    sizes = [(size + 2 * pad - dilation * (k - 1) - 1) // step + 1 for size, k, step, pad, dilation in windows]
    output = _made(x, len(x), module.out_channels, *sizes) if min(sizes) > 0 else None
    return None if output is None else (output, 2 * output.numel() * module.weight[0].numel())


def _is_plain(module: nn.Module, x: Tensor) -> bool:
    """Whether the output of a layer has the dtype of its input, and lies in memory like a new tensor."""
    weight: Any = module.weight
    return weight.is_meta and x.dtype == weight.dtype and x.is_contiguous() and weight.is_contiguous()


def _recurrent(module: Any, x: Tensor, hx: Any = None) -> Found:
    """Every step of every sequence meets every matrix."""
    if x.ndim == 2:  # one sequence, not a batch
        batch = 0 if module.batch_first else 1
        states = pytree.tree_map_only(Tensor, lambda state: state.unsqueeze(1), hx)
        (output, last), flops = _recurrent(module, x.unsqueeze(batch), states)  # type: ignore[misc]
        squeezed = pytree.tree_map_only(Tensor, lambda state: state.squeeze(1), last)
        return (output.squeeze(batch), squeezed), flops
    if hx is None:
        module.check_input(x, None)
    else:
        module.check_forward_args(x, hx, None)
    width, ways = module.proj_size or module.hidden_size, 2 if module.bidirectional else 1
    steps, batch = (x.shape[1], x.shape[0]) if module.batch_first else x.shape[:2]
    output, states = _made(x, steps, batch, ways * width), (module.num_layers * ways, batch)
    output = output.transpose(0, 1) if module.batch_first else output
    last = _made(x, *states, width)
    last = (last, _made(x, *states, module.hidden_size)) if isinstance(module, nn.LSTM) else last
    return (output, last), 2 * steps * batch * _matrices(module)


def _recurrent_cell(module: Any, x: Tensor, hx: Any = None) -> Found:
    state = hx[0] if isinstance(hx, (tuple, list)) else hx
    shape = (*x.shape[:1], module.hidden_size)
    if x.ndim != 2 or x.shape[1] != module.input_size or (state is not None and state.shape != shape):
        return None
    output = (_made(x, *shape), _made(x, *shape)) if isinstance(module, nn.LSTMCell) else _made(x, *shape)
    return output, 2 * len(x) * _matrices(module)


def _matrices(module: nn.Module) -> int:
    """The number of entries of all matrices of a layer."""
    return sum(weight.numel() for weight in module.parameters() if weight.ndim == 2)


_RULES: dict[type[nn.Module], Callable[..., Found]] = {
    **dict.fromkeys(
        (nn.ReLU, nn.ReLU6, nn.SiLU, nn.GELU, nn.Sigmoid, nn.Tanh, nn.Hardswish, nn.Hardsigmoid), _activation
    ),
    **dict.fromkeys((nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d), _batch_norm),
    **dict.fromkeys((nn.Conv1d, nn.Conv2d, nn.Conv3d), _convolution),
    **dict.fromkeys((nn.RNN, nn.LSTM, nn.GRU), _recurrent),
    **dict.fromkeys((nn.RNNCell, nn.LSTMCell, nn.GRUCell), _recurrent_cell),
    nn.Linear: _linear,
}
