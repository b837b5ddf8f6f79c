"""Steps that move data: views, cuts, joins, rolls, padding, spreading."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from steps.kind import PLACES, SIZE, Held, even, exactly, kind, pooled, spread

add = partial(kind, "movement")


def _shuffled(x: Tensor, groups: int = 2) -> Tensor:
    return x.view(x.size(0), groups, -1, SIZE, SIZE).transpose(1, 2).reshape(x.shape)


def _order(i: int, o: int) -> nn.Module:
    return Held(torch.randperm(SIZE))


def _any_order(i: int, o: int) -> nn.Module:
    return Held(torch.randperm(i))


def _twice(call: Callable[..., Tensor], *axes: Any) -> Callable[[Any, Tensor], Tensor]:
    """A swap of axes, and its own inverse."""
    return lambda _, x: call(call(x, *axes), *axes)


def _in_place(name: str, x: Tensor, *args: Any) -> Tensor:
    return getattr(x.clone(), name)(*args)


def _written(x: Tensor, y: Tensor) -> Tensor:
    x = x.clone()
    x[:, :, 1:3] = y[:, :, 2:4]
    return x


# -- what leaves each channel in its place: each is undone again -----------------------------------------------------

_BOTH_WAYS: dict[str, Callable[[Tensor], Tensor]] = {
    "flatten": lambda x: x.flatten(2).unflatten(2, (SIZE, SIZE)),
    "torch.flatten": lambda x: torch.unflatten(torch.flatten(x, 2), 2, (SIZE, SIZE)),
    "reshape": lambda x: x.reshape(x.size(0), -1, PLACES).view(x.size(0), -1, SIZE, SIZE),
    "torch.reshape": lambda x: torch.reshape(torch.reshape(x, (x.size(0), -1)), (x.size(0), -1, SIZE, SIZE)),
    "view_as": lambda x: x.flatten(2).view_as(x),
    "reshape_as": lambda x: x.flatten(2).reshape_as(x),
    "ravel": lambda x: x.ravel().view(x.size(0), -1, SIZE, SIZE),
    "torch.ravel": lambda x: torch.ravel(x).view(x.size(0), -1, SIZE, SIZE),
    "squeeze": lambda x: x.unsqueeze(2).squeeze(2),
    "torch.squeeze": lambda x: torch.squeeze(torch.unsqueeze(x, 2), 2),
    "squeeze_": lambda x: x.clone().unsqueeze_(2).squeeze_(2),
    "permute": lambda x: x.permute(0, 2, 3, 1).permute(0, 3, 1, 2),
    "torch.permute": lambda x: torch.permute(torch.permute(x, (0, 2, 3, 1)), (0, 3, 1, 2)),
    "t": lambda x: x * spread(pooled(x).t().t()),
    "torch.t": lambda x: x * spread(torch.t(torch.t(pooled(x)))),
    "t_": lambda x: x * spread(pooled(x).t_().t_()),
    "unbind": lambda x: torch.stack(x.unbind(2), 2),
    "torch.unbind": lambda x: torch.stack(torch.unbind(x, 2), 2),
    "torch.stack behind": lambda x: torch.stack([x, x.tanh()], -1).mean(-1),
    "torch.stack": lambda x: torch.stack([x, x.tanh()], 1).mean(1),
    "narrow": lambda x: torch.cat([x.narrow(2, 0, 2), x.narrow(2, 2, 4)], 2),
    "torch.narrow": lambda x: torch.cat([torch.narrow(x, 2, 3, 3), torch.narrow(x, 2, 0, 3)], 2),
    "select": lambda x: x * x.select(2, 1).unsqueeze(2),
    "torch.select": lambda x: x * torch.select(x, 3, 1).unsqueeze(3),
    "torch.flip": lambda x: torch.flip(x, (2, 3)),
    "flipud": lambda x: x.permute(2, 1, 0, 3).flipud().permute(2, 1, 0, 3),
    "torch.flipud": lambda x: torch.flipud(x.permute(2, 1, 0, 3)).permute(2, 1, 0, 3),
    "rot90": lambda x: x.rot90(1, (2, 3)),
    "torch.rot90": lambda x: torch.rot90(x, 1, (2, 3)),
    "dsplit": lambda x: torch.cat(x.dsplit(2)[::-1], 2),
    "torch.dsplit": lambda x: torch.cat(torch.dsplit(x, 2), 2),
    "vsplit": lambda x: torch.cat(x.transpose(0, 2).vsplit(2), 0).transpose(0, 2),
    "torch.vsplit": lambda x: torch.cat(torch.vsplit(x.transpose(0, 2), 3), 0).transpose(0, 2),
    "expand": lambda x: x * x.mean((2, 3), keepdim=True).expand(-1, -1, SIZE, SIZE),
    "expand_as": lambda x: x * x.mean((2, 3), keepdim=True).expand_as(x),
    "broadcast_to": lambda x: x * x.mean((2, 3), keepdim=True).broadcast_to(x.shape),
    "torch.broadcast_to": lambda x: x * torch.broadcast_to(x.mean((2, 3), keepdim=True), x.shape),
    "torch.expand_copy": lambda x: x * torch.expand_copy(x.mean((2, 3), keepdim=True), (-1, -1, SIZE, SIZE)),
    "pad": lambda x: F.avg_pool2d(F.pad(x, (1, 1, 1, 1), value=0.5), 3, 1),
    "pad by reflection": lambda x: F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="reflect"), 3, 1),
}  # fmt: skip
for _name, _move in _BOTH_WAYS.items():
    add(_name, lambda _, x, f=_move: f(x))
for _name in ("transpose", "swapaxes", "swapdims", "movedim", "moveaxis"):
    _back = (3, 1) if "move" in _name else (1, 3)
    add(f"torch.{_name}", _twice(getattr(torch, _name), 1, 2))
    add(_name, lambda _, x, n=_name, b=_back: getattr(getattr(x, n)(1, 3), n)(*b))
for _name, _function in (("tril", torch.tril), ("triu", torch.triu)):
    add(_name, lambda _, x, n=_name: getattr(x, n)())
    add(f"{_name}_", lambda _, x, n=_name: _in_place(f"{n}_", x, 1))
    add(f"torch.{_name}", lambda _, x, f=_function: f(x, -1))
    _mixed = lambda _, x, n=_name: getattr(x.transpose(1, 2), n)(1).transpose(1, 2)  # noqa: E731
    add(f"{_name} of channels", _mixed, alike=False, whole=True)
for _name in ("transpose_", "swapaxes_", "swapdims_"):
    add(_name, lambda _, x, n=_name: getattr(_in_place(n, x, 1, 3), n)(1, 3))
add("nn.Flatten", lambda layer, x: layer(x).unflatten(2, (SIZE, SIZE)), lambda i, o: nn.Flatten(2))
add("nn.Unflatten", lambda layer, x: layer(x.flatten(2)), lambda i, o: nn.Unflatten(2, (SIZE, SIZE)))
add("setitem", lambda _, x, y: _written(x, y), inputs=2)


def _padded(layer: Any, x: Tensor) -> Tensor:
    volume = isinstance(layer, (nn.ConstantPad3d, nn.ZeroPad3d))
    return F.adaptive_avg_pool2d(layer(x.unsqueeze(2)).squeeze(2) if volume else layer(x), SIZE)


for _nd, _add in ((1, (1, 1)), (2, (1, 1, 1, 1)), (3, (1, 1, 1, 1, 0, 0))):
    for _class, _extra in ((getattr(nn, f"ConstantPad{_nd}d"), (0.5,)), (getattr(nn, f"ZeroPad{_nd}d"), ())):
        add(f"nn.{_class.__name__}", _padded, lambda i, o, c=_class, a=_add, e=_extra: c(a, *e))

# -- sizes that are read from a tensor: of what the step gives, and of what it came from ------------------------------


def _tokens(own: Any, x: Tensor) -> Tensor:
    return F.linear(x.flatten(2).mT, own.weight).mT.reshape(x.shape)


def _halves(layer: Any, x: Tensor) -> Tensor:
    return layer(x.reshape(-1, x.shape[1] // 2, SIZE, SIZE)).reshape(x.shape)


def _pointwise(i: int, o: int) -> nn.Module:
    return nn.Conv2d(i, i, 1)


add("reshape to another's shape", _tokens, lambda i, o: Held(torch.randn(i, i) / i**0.5))
add("expand to another's shape", lambda own, x: x + own(x.mean((2, 3), keepdim=True)).expand(x.shape), _pointwise)
add("halves in the batch", _halves, lambda i, o: nn.Conv2d(i // 2, i // 2, 1), needs=even, alike=False)
add("unflatten by sizes", lambda own, x: own(x.flatten(1).unflatten(1, (x.shape[1], *x.shape[2:]))), _pointwise)

# -- what gives channels other places ----------------------------------------------------------------------------------

EVEN: Any = dict(needs=even, alike=False)
HALF: Any = dict(width=lambda i, o: i // 2, needs=lambda i: i % 2 == 0 and i > 2, alike=False)
FEWER: Any = dict(width=lambda i, o: i - i // 2, needs=lambda i: i > 4, alike=False)
QUARTER: Any = dict(width=lambda i, o: i // 4, needs=lambda i: i % 4 == 0 and i > 4, alike=False)
DOUBLE: Any = dict(width=lambda i, o: 2 * i, needs=lambda i: i <= 8, alike=False)
FOUR: Any = dict(width=lambda i, o: 4 * i, needs=lambda i: i <= 4, alike=False)
NINE: Any = dict(width=lambda i, o: 9 * i, needs=lambda i: i <= 4, alike=False)


def _swapped(cut: Callable[[Tensor], Any], x: Tensor) -> Tensor:
    return torch.cat([cut(x)[1], cut(x)[0]], 1)


_MOVES: dict[str, tuple[Callable[[Tensor], Tensor], dict[str, Any]]] = {
    "chunk": (partial(_swapped, lambda x: x.chunk(2, 1)), EVEN),
    "torch.chunk": (partial(_swapped, lambda x: torch.chunk(x, 2, 1)), EVEN),
    "tensor_split": (partial(_swapped, lambda x: x.tensor_split(2, 1)), EVEN),
    "torch.tensor_split": (partial(_swapped, lambda x: torch.tensor_split(x, 2, 1)), EVEN),
    "split": (partial(_swapped, lambda x: x.split(x.size(1) // 2, 1)), EVEN),
    "torch.split": (partial(_swapped, lambda x: torch.split(x, x.size(1) // 2, 1)), EVEN),
    "split_with_sizes": (partial(_swapped, lambda x: x.split_with_sizes([x.size(1) // 2] * 2, 1)), EVEN),
    "torch.split_with_sizes": (partial(_swapped, lambda x: torch.split_with_sizes(x, [x.size(1) // 2] * 2, 1)), EVEN),
    "hsplit": (partial(_swapped, lambda x: x.hsplit(2)), EVEN),
    "torch.hsplit": (partial(_swapped, lambda x: torch.hsplit(x, 2)), EVEN),
    "halves": (lambda x: x.chunk(2, 1)[0] * x.chunk(2, 1)[1], HALF),
    "maxout": (lambda x: x.view(x.size(0), -1, 2, SIZE, SIZE).amax(2), HALF),
    "rejoin": (
        lambda x: torch.cat(x.split([3, x.shape[1] - 3], 1)[::-1], 1), dict(needs=lambda i: i > 3, alike=False)
    ),
    "second half": (lambda x: x[:, x.shape[1] // 2 :], FEWER),
    "every second": (lambda x: x[:, ::2], FEWER),
    "__getitem__": (
        lambda x: exactly("__getitem__", x, (slice(None), slice(1, None))), FEWER | dict(width=lambda i, o: i - 1)
    ),
    "zero channels": (lambda x: F.pad(x, (0, 0, 0, 0, 1, 2)), dict(width=lambda i, o: i + 3, alike=False)),
    "zeros of sizes": (
        lambda x: torch.cat([x, x.new_zeros(x.shape[0], 2, *x.shape[2:])], 1),
        dict(width=lambda i, o: i + 2, alike=False),
    ),
    "roll": (lambda x: x.roll(1, 1), dict(alike=False)),
    "torch.roll": (lambda x: torch.roll(x, 2, 1), dict(alike=False)),
    "flip": (lambda x: x.flip(1), dict(alike=False)),
    "fliplr": (lambda x: x.fliplr(), dict(alike=False)),
    "torch.fliplr": (lambda x: torch.fliplr(x), dict(alike=False)),
    "channels and rows turned": (lambda x: x.rot90(2, (1, 2)), dict(alike=False)),
    "shuffle": (_shuffled, EVEN),
    "torch.channel_shuffle": (lambda x: torch.channel_shuffle(x, 2), EVEN),
    "F.channel_shuffle": (lambda x: F.channel_shuffle(x, 2), EVEN),
    "torch.native_channel_shuffle": (  # has no gradient
        lambda x: torch.native_channel_shuffle(x.detach(), 2), EVEN
    ),
    "repeat": (lambda x: x.repeat(1, 2, 1, 1), DOUBLE),
    "repeat_interleave": (lambda x: x.repeat_interleave(2, 1), DOUBLE),
    "torch.repeat_interleave": (lambda x: torch.repeat_interleave(x, 2, 1), DOUBLE),
    "tile": (lambda x: x.tile(1, 2, 1, 1), DOUBLE),
    "torch.tile": (lambda x: torch.tile(x, (1, 2, 1, 1)), DOUBLE),
    "torch.pixel_shuffle": (lambda x: F.avg_pool2d(torch.pixel_shuffle(x, 2), 2), QUARTER),
    "F.pixel_shuffle": (lambda x: F.avg_pool2d(F.pixel_shuffle(x, 2), 2), QUARTER),
    "torch.pixel_unshuffle": (lambda x: F.interpolate(torch.pixel_unshuffle(x, 2), scale_factor=2), FOUR),
    "F.pixel_unshuffle": (lambda x: F.interpolate(F.pixel_unshuffle(x, 2), scale_factor=2), FOUR),
    "F.unfold": (lambda x: F.unfold(x, 3, padding=1).unflatten(2, (SIZE, SIZE)), NINE),
}  # fmt: skip
for _name, (_move, _options) in _MOVES.items():
    add(_name, lambda _, x, f=_move: f(x), **_options)


def _end(x: Tensor, by: int) -> Tensor:
    """A number that the batch says, though it is always the same."""
    return (0 * x.detach().sum()).long() + by


_CUT: dict[str, tuple[Callable[[Tensor], Tensor], bool]] = {
    "cut at a computed place": (lambda x: F.pad(x, (0, 2))[:, :, :, 1 : _end(x, SIZE + 1)], False),
    "cut at a computed place from the end": (lambda x: F.pad(x, (0, 2))[..., : -_end(x, 2)], False),
    "channels cut at a computed place": (lambda x: x[:, : _end(x, 4)].mean(1, keepdim=True) + x, True),
}
for _title, (_cut, _whole) in _CUT.items():
    add(_title, lambda _, x, cut=_cut: cut(x), whole=_whole, alike=not _whole, needs=lambda i: i > 4)

add("index by numbers", lambda own, x: x[:, own.weight], _any_order, alike=False)
add("nn.ChannelShuffle", lambda layer, x: layer(x), lambda i, o: nn.ChannelShuffle(2), **EVEN)
add("nn.PixelShuffle", lambda own, x: F.avg_pool2d(own(x), 2), lambda i, o: nn.PixelShuffle(2), **QUARTER)
add(
    "nn.PixelUnshuffle", lambda own, x: F.interpolate(own(x), scale_factor=2), lambda i, o: nn.PixelUnshuffle(2), **FOUR
)
add("nn.Unfold", lambda own, x: own(x).unflatten(2, (SIZE, SIZE)), lambda i, o: nn.Unfold(3, padding=1), **NINE)
_STACKS: dict[str, Callable[..., Tensor]] = {
    "torch.hstack": lambda x, y: torch.hstack([x, y]),
    "torch.column_stack": lambda x, y: torch.column_stack([x, y]),
    "torch.vstack": lambda x, y: torch.vstack([x.transpose(0, 1), y.transpose(0, 1)]).transpose(0, 1),
    "torch.dstack": lambda x, y: torch.dstack([x.transpose(1, 2), y.transpose(1, 2)]).transpose(1, 2),
}
for _name, _join in _STACKS.items():
    add(_name, lambda _, x, y, f=_join: f(x, y), inputs=2, **DOUBLE | dict(needs=lambda i: i <= 12))
add(
    "torch.broadcast_tensors",
    lambda _, x, y: sum(torch.broadcast_tensors(x, y.mean((2, 3), keepdim=True))),
    inputs=2,
)
add("torch.view_as_real", lambda _, x, y: torch.view_as_real(torch.complex(x, y)).sum(-1), inputs=2)
add("torch.view_as_complex", lambda _, x, y: torch.view_as_complex(torch.stack([x, y], -1)).abs(), inputs=2)
add("repeat to channels", lambda _, x: x * x.mean(1, keepdim=True).repeat(1, x.shape[1], 1, 1), whole=True)
for _name, _join in (("cat", torch.cat), ("torch.concat", torch.concat), ("torch.concatenate", torch.concatenate)):
    add(_name, lambda _, x, y, f=_join: f([x, y], 1), inputs=2, **DOUBLE | dict(needs=lambda i: i <= 12))
