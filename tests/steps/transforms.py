"""Steps that mix the entries along some axes: Fourier transforms, windows, quantiles, linear algebra."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from steps.kind import SIZE, exactly, kind, rows

add = partial(kind, "transforms")

# -- Fourier transforms ------------------------------------------------------------------------------------------------

_SIZES: dict[str, dict[str, Any]] = {"2": dict(dim=(2, 3)), "n": dict(dim=(2, 3)), "": dict(dim=3)}


def _spectrum(call: Callable[..., Tensor], axes: dict[str, Any], x: Tensor) -> Tensor:
    return x * call(x, **axes).abs().mean((2, 3), keepdim=True)


def _and_back(there: Callable[..., Tensor], back: Callable[..., Tensor], axes: dict[str, Any], x: Tensor) -> Tensor:
    found = there(x, **axes)
    return x + back(found * found, **axes).real


for _nd, _axes in _SIZES.items():
    for _there, _back in (("fft", "ifft"), ("rfft", "irfft"), ("ihfft", "hfft")):
        _pair = [getattr(torch.fft, f"{name}{_nd}") for name in (_there, _back)]
        add(f"torch.fft.{_there}{_nd}", lambda _, x, p=_pair, a=_axes: _spectrum(p[0], a, x))
        add(f"torch.fft.{_back}{_nd}", lambda _, x, p=_pair, a=_axes: _and_back(*p, a, x))
add("torch.fft.fft of channels", lambda _, x: torch.fft.fft(x, dim=1).real, whole=True, alike=False)
add("torch.fft.fftn of all", lambda _, x: torch.fft.fftn(x).real, whole=True, alike=False)
add("torch.fft.fftshift", lambda _, x: torch.fft.fftshift(x, dim=(2, 3)))
add("torch.fft.ifftshift", lambda _, x: torch.fft.ifftshift(x, dim=3))
add("torch.diff", lambda _, x: torch.diff(x, dim=3, append=x[..., :1]))
add("diff", lambda _, x: x.diff(dim=2, prepend=x.new_zeros(x.shape[0], x.shape[1], 1, SIZE)))
add("diff of channels", lambda _, x: x.diff(dim=1, prepend=x[:, :1]), whole=True, alike=False)
add("torch.cumulative_trapezoid", lambda _, x: x + torch.cumulative_trapezoid(x, dim=3).mean(3, keepdim=True))


def _frames(call: Callable[..., Tensor], x: Tensor) -> Tensor:
    """The spectrogram of every channel's rows behind each other."""
    return call(x.flatten(2).flatten(0, 1), 4, window=torch.ones(4, dtype=x.dtype), return_complex=True)


def _back(call: Callable[..., Tensor], x: Tensor) -> Tensor:
    found: Tensor = call(_frames(torch.stft, x), 4, window=torch.ones(4, dtype=x.dtype), length=SIZE * SIZE)
    return found.unflatten(0, x.shape[:2]).unflatten(2, (SIZE, SIZE))


def _strength(call: Callable[..., Tensor], x: Tensor) -> Tensor:
    return x * _frames(call, x).abs().mean((1, 2)).unflatten(0, x.shape[:2])[:, :, None, None]


for _title, _call in (("torch.stft", torch.stft), ("stft", partial(exactly, "stft"))):
    add(_title, lambda _, x, call=_call: _strength(call, x))
for _title, _call in (("torch.istft", torch.istft), ("istft", partial(exactly, "istft"))):
    add(_title, lambda _, x, call=_call: _back(call, x))
add(
    "torch.stft of channels",
    lambda _, x: x * torch.stft(x.mean((2, 3)), 4, 2, window=x.new_ones(4), return_complex=True).abs().mean(),
    whole=True,
    alike=False,
)

# -- windows and diagonals ---------------------------------------------------------------------------------------------

_WINDOWS: dict[str, Callable[[Tensor], Tensor]] = {
    "unfold": lambda x: x.unfold(3, 2, 2).mean(-1).repeat_interleave(2, 3),
    "torch.diagonal": lambda x: x * torch.diagonal(x, dim1=2, dim2=3)[:, :, None],
    "diagonal": lambda x: x * x.diagonal(0, 2, 3)[:, :, None],
    "torch.linalg.diagonal": lambda x: x * torch.linalg.diagonal(x)[:, :, None],
}
for _title, _window in _WINDOWS.items():
    add(_title, lambda _, x, call=_window: call(x))
add("unfold of channels", lambda _, x: x + x.unfold(1, 2, 1).mean((1, -1))[:, None], whole=True, alike=False)
add(
    "diagonal of channels",
    lambda _, x: x + x.diagonal(0, 1, 2).mean((1, 2))[:, None, None, None],
    whole=True,
    alike=False,
)

# -- quantiles ---------------------------------------------------------------------------------------------------------


def _two(x: Tensor) -> Tensor:
    return torch.tensor([0.1, 0.7], dtype=x.dtype)


for _name in ("quantile", "nanquantile"):
    for _title, _quantile in ((f"torch.{_name}", getattr(torch, _name)), (_name, partial(exactly, _name))):
        add(_title, lambda _, x, call=_quantile: x * call(x, 0.3, dim=2, keepdim=True))
        _mixed = lambda _, x, call=_quantile: x * call(x, _two(x), dim=1)[0][:, None]  # noqa: E731
        add(f"{_title} of channels", _mixed, whole=True)
add("several quantiles", lambda _, x: x * torch.quantile(x, _two(x), dim=2).sum(0)[:, :, None])

# -- linear algebra on the maps, of every channel by itself ------------------------------------------------------------


def _scaled(call: Callable[[Tensor], Any], x: Tensor) -> Tensor:
    """The image, scaled by the mean of what a function gives of symmetric matrices, with all eigenvalues above 1."""
    found = call(x @ x.mT / 64 + torch.eye(SIZE, dtype=x.dtype))
    return x * found.reshape(x.shape[0], x.shape[1], -1).mean(-1)[..., None, None].tanh()


_MATRICES: dict[str, Callable[[Tensor], Any]] = {
    f"torch.linalg.{name}": getattr(torch.linalg, name)
    for name in ("inv", "pinv", "matrix_exp", "cholesky", "det", "svdvals", "eigvalsh", "matrix_norm")
}
_MATRICES |= {
    "torch.linalg.matrix_power": lambda x: torch.linalg.matrix_power(x, 2),
    "torch.linalg.svd": lambda x: torch.linalg.svd(x)[1],
    "torch.linalg.eigh": lambda x: torch.linalg.eigh(x)[0],
    "torch.linalg.qr": lambda x: torch.linalg.qr(x)[1],
    "torch.linalg.slogdet": lambda x: torch.linalg.slogdet(x)[1],
    "torch.slogdet": lambda x: torch.slogdet(x)[1],
    "slogdet": lambda x: x.slogdet()[1],
}
_MATRICES |= {f"torch.{name}": getattr(torch, name) for name in ("inverse", "det", "logdet", "matrix_exp")}
_MATRICES |= {name: partial(exactly, name) for name in ("inverse", "det", "logdet", "matrix_exp")}
for _title, _matrix in _MATRICES.items():
    add(_title, lambda _, x, call=_matrix: _scaled(call, x))


add(
    "torch.linalg.inv of channels",
    lambda _, x: x + torch.linalg.inv(rows(x).mT @ rows(x) + rows(x).mT[:, :, :1]).mean(),
    whole=True,
)


def _solved(call: Callable[..., Tensor], x: Tensor) -> Tensor:
    """The first row of every channel, solved for by a triangle (N, 6, 6) without channels."""
    triangle = torch.eye(SIZE, dtype=x.dtype) + torch.tril(x.sum(1)).tanh() / 8
    return x + call(triangle, x[:, :, 0].mT).mT[..., None]


add("torch.linalg.solve", lambda _, x: _solved(torch.linalg.solve, x))
_lower = partial(torch.linalg.solve_triangular, upper=False)
add("torch.linalg.solve_triangular", lambda _, x: _solved(_lower, x))
