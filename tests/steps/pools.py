"""Steps that pool or resample the positions, each channel by itself."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from steps.kind import SIZE, exactly, kind

add = partial(kind, "pools")


def _positions(x: Tensor, nd: int) -> Tensor:
    """The same numbers on 1, 2 or 3 axes of positions."""
    return x.flatten(2) if nd == 1 else x if nd == 2 else x.unflatten(3, (2, 3))


def _image(x: Tensor, nd: int) -> Tensor:
    """An image of the right size again, from positions of any number."""
    x = F.adaptive_avg_pool1d(x.flatten(2), SIZE * SIZE)
    return x.unflatten(2, (SIZE, SIZE))


def _still(x: Tensor) -> Tensor:
    """Every channel the same everywhere: wherever a random pool looks, it finds the same."""
    return x.mean((2, 3), keepdim=True).expand(-1, -1, SIZE, SIZE).contiguous()


def _pool(call: Callable[[Tensor], Any], nd: int, first: bool = False) -> Callable[[Any, Tensor], Tensor]:
    def run(_: Any, x: Tensor) -> Tensor:
        found = call(_positions(x, nd))
        return _image(found[0] if first else found, nd)

    return run


def _random(call: Callable[[Tensor], Any], nd: int, first: bool = False) -> Callable[[Any, Tensor], Tensor]:
    run = _pool(call, nd, first)
    return lambda _, x: run(_, _still(x))


def _unpooled(nd: int, unpool: Callable[..., Tensor]) -> Callable[[Any, Tensor], Tensor]:
    def run(_: Any, x: Tensor) -> Tensor:
        y = _positions(x, nd)
        found = getattr(F, f"max_pool{nd}d")(y, 2 if nd < 3 else (2, 1, 1), return_indices=True)
        return _image(unpool(*found), nd)

    return run


def _native(nd: int, name: str) -> Any:
    """What stands under a name in the module of torch's own functions, or None."""
    return getattr(torch._C._nn, name.format(nd), None)


def _window(nd: int) -> Any:
    return 2 if nd < 3 else [2, 1, 1]


for _nd in (1, 2, 3):
    _two = _window(_nd)
    for _name in ("max_pool", "avg_pool", "lp_pool"):
        _own, _extra = f"{_name}{_nd}d", (2.0,) if _name == "lp_pool" else ()
        _class = getattr(nn, "".join(part.capitalize() for part in _name.split("_")).replace("Lp", "LP") + f"{_nd}d")
        add(
            f"nn.{_class.__name__}",
            lambda own, x, nd=_nd: _image(own(_positions(x, nd)), nd),
            lambda i, o, c=_class, e=_extra, t=_two: c(*e, t),
        )
        _call = getattr(F, _own)
        add(f"F.{_own}", _pool(lambda x, f=_call, e=_extra, t=_two: f(x, *e, t), _nd))
        if hasattr(torch, _own):
            _call = getattr(torch, _own)
            add(f"torch.{_own}", _pool(lambda x, f=_call, t=_two: f(x, t), _nd))
    for _name in ("adaptive_avg_pool", "adaptive_max_pool"):
        _own = f"{_name}{_nd}d"
        _class = getattr(nn, "".join(part.capitalize() for part in _name.split("_")) + f"{_nd}d")
        add(
            f"nn.{_class.__name__}",
            lambda own, x, nd=_nd: _image(own(_positions(x, nd)), nd),
            lambda i, o, c=_class: c(2),
        )
        _call = getattr(F, _own)
        add(f"F.{_own}", _pool(lambda x, f=_call: f(x, 2), _nd))
        for _home, _where in ((torch, "torch"), (torch._C._nn, "torch._C._nn")):
            if hasattr(_home, _own):
                _pair = "max" in _name
                _call = getattr(_home, _own)
                add(
                    f"{_where}.{_own}",
                    _pool(lambda x, f=_call, n=_nd: exactly(f, x, [2] * n), _nd, _pair),
                )
    for _name in ("max_pool", "adaptive_max_pool"):
        _own = f"{_name}{_nd}d_with_indices"
        _size = _two if _name == "max_pool" else 2
        for _home, _where in ((F, "F"), (torch, "torch"), (torch._C._nn, "torch._C._nn")):
            if hasattr(_home, _own):
                _sized = [_size] * _nd if isinstance(_size, int) else _size
                _call = getattr(_home, _own)
                add(f"{_where}.{_own}", _pool(lambda x, f=_call, t=_sized: exactly(f, x, t), _nd, True))
    _class, _unpool = getattr(nn, f"MaxUnpool{_nd}d"), getattr(F, f"max_unpool{_nd}d")
    add(f"nn.MaxUnpool{_nd}d", lambda own, x, nd=_nd: _unpooled(nd, own)(None, x), lambda i, o, c=_class, t=_two: c(t))
    add(f"F.max_unpool{_nd}d", _unpooled(_nd, partial(_unpool, kernel_size=_two)))

for _nd in (2, 3):
    _shape = {2: [3, 3], 3: [3, 1, 1]}[_nd]
    _kernel = {2: [2, 2], 3: [2, 1, 1]}[_nd]
    _class = getattr(nn, f"FractionalMaxPool{_nd}d")
    add(
        f"nn.{_class.__name__}",
        lambda own, x, nd=_nd: _image(own(_positions(_still(x), nd)), nd),
        lambda i, o, c=_class, k=_kernel, s=_shape: c(tuple(k), output_size=tuple(s)),
    )
    _own = f"fractional_max_pool{_nd}d"
    _call = getattr(F, _own)
    add(f"F.{_own}", _random(lambda x, f=_call, k=_kernel, s=_shape: f(x, k, output_size=s), _nd))
    _call = getattr(F, f"{_own}_with_indices")
    add(
        f"F.{_own}_with_indices",
        _random(
            lambda x, f=_call, k=_kernel, s=_shape: exactly(f, x, k, output_size=s),
            _nd,
            True,
        ),
    )

    _call = getattr(torch._C._nn, _own)

    def _native_fractional(x: Tensor, f: Any = _call, k: Any = _kernel, s: Any = _shape, n: int = _nd) -> Any:
        samples = x.flatten(2)[:, :, :n].detach().sigmoid()
        return exactly(f, x, k, s, samples)

    add(f"torch._C._nn.{_own}", _random(_native_fractional, _nd, True))
    add(
        f"torch._C._nn.max_unpool{_nd}d",
        _unpooled(
            _nd,
            {
                2: lambda x, at: exactly(torch._C._nn.max_unpool2d, x, at, [6, 6]),
                3: lambda x, at: exactly(torch._C._nn.max_unpool3d, x, at, [6, 2, 3], [2, 1, 1], [0, 0, 0]),
            }[_nd],
        ),
    )

add("pool", lambda _, x: F.max_pool2d(x, 3, 1, 1))
add("upsample", lambda _, x: F.avg_pool2d(F.interpolate(x, scale_factor=2), 2))
add("F.upsample", lambda _, x: F.avg_pool2d(exactly(F.upsample, x, scale_factor=2), 2))
for _class in (nn.Upsample, nn.UpsamplingNearest2d, nn.UpsamplingBilinear2d):
    add(f"nn.{_class.__name__}", lambda own, x: F.avg_pool2d(own(x), 2), lambda i, o, c=_class: c(scale_factor=2))
for _nd in (1, 2, 3):
    for _name in ("ReflectionPad", "ReplicationPad", "CircularPad"):
        _class = getattr(nn, f"{_name}{_nd}d")
        add(
            f"nn.{_class.__name__}",
            lambda own, x, nd=_nd: _image(own(_positions(x, nd)), nd),
            lambda i, o, c=_class: c(1),
        )


def _grid(own: nn.Module, x: Tensor) -> Tensor:
    return F.grid_sample(x, own.weight.expand(x.size(0), -1, -1, -1), align_corners=False)


from steps.kind import Held  # noqa: E402

add("F.grid_sample", _grid, lambda i, o: Held(torch.rand(1, SIZE, SIZE, 2) - 0.5))
