"""Whether a graph gives the outputs of its model, and by what two outputs differ."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fxprune.caller.example import as_fields
from fxprune.caller.meta import has_numbers
from fxprune.errors import CaptureError, a_kind

TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
_PLAIN = (bool, int, float, complex, str, bytes, range, slice, type(None))
_LOOSER, _ROUNDING = 100.0, 1000.0  # how far a slice may be off: times its own tolerance, times the others
_FILLS, _FAR = 2, 100.0  # constants in an output, such as those of a mask, and how many times larger they are


def agree(wanted: Any, found: Any) -> bool:
    """Whether two nested outputs are the same, floats up to rounding.

    >>> agree(torch.tensor([[1e6, 0.5]]), torch.tensor([[1e6, 0.6]]))
    False
    """
    return difference(wanted, found) is None


def difference(wanted: Any, found: Any) -> str | None:
    """The first difference between two nested outputs, in words, or None."""
    a, b = pytree.tree_leaves(as_fields(wanted)), pytree.tree_leaves(as_fields(found))
    if len(a) != len(b):
        return f"it gives {len(b)} values, the model {len(a)}"
    return next((text for one, other in zip(a, b, strict=True) if (text := _difference_of_leaves(one, other))), None)


def check_comparable(output: Any) -> None:
    """Raise CaptureError where an output holds tensors inside an object that cannot be compared by its fields."""
    for leaf in pytree.tree_leaves(as_fields(output)):
        held = leaf if isinstance(leaf, (set, frozenset)) else getattr(leaf, "__dict__", {}).values()
        if not isinstance(leaf, (Tensor, type)) and any(isinstance(value, Tensor) for value in held):
            raise CaptureError(
                f"its output holds {a_kind(leaf)}, which cannot be compared: "
                "return tensors, lists, tuples, dicts or dataclasses"
            )


def _difference_of_leaves(a: Any, b: Any) -> str | None:
    if type(a) is not type(b) and not (isinstance(a, _PLAIN) and isinstance(b, _PLAIN)) and not isinstance(a, Tensor):
        return f"it gives {a_kind(b)}, the model {a_kind(a)}"
    if not isinstance(a, Tensor):
        return None if same_value(a, b) else f"it gives {b!r:.40}, the model {a!r:.40}"
    if not isinstance(b, Tensor):
        return f"it gives {a_kind(b)}, the model a tensor"
    if not has_numbers(b):
        return "it gives a tensor without numbers"
    a, b = a.detach(), b.detach()
    if a.shape != b.shape or a.dtype != b.dtype:
        return f"it gives {tuple(b.shape)} of {b.dtype}, the model {tuple(a.shape)} of {a.dtype}"
    if a.layout is not torch.strided and a.layout is b.layout:
        a, b = a.to_dense(), b.to_dense()
    if a.is_floating_point() and a.itemsize == 1:  # float8, of which torch computes nothing
        a, b = a.float(), b.float()
    if not a.is_floating_point() and not a.is_complex():
        return None if torch.equal(a, b.to(a.device)) else "in integers"
    error, tolerance = apart(a, b.to(a.device)), TOLERANCES.get(a.dtype, 1e-4)
    if error > tolerance:
        return f"by {error:.2g} of their scale"
    return None if a.is_complex() else _difference_of_slices(a, b.to(a.device), tolerance)


def _difference_of_slices(a: Tensor, b: Tensor, tolerance: float) -> str | None:
    """The first slice along the last axis, or along that of channels, that is off though others are equal, in words.

    Such a slice is off by more than 100 times the tolerance of its own scale, and by more than the rounding that the
    others show.
    """
    errors, sizes = torch.where(a == b, 0.0, (a - b).abs()).nan_to_num(0.0, 0.0, 0.0), a.abs().nan_to_num(0.0, 0.0, 0.0)
    for axis in {a.ndim - 1, 1} if a.ndim > 1 and a.numel() and bool(errors.any()) else ():
        rest = [other for other in range(a.ndim) if other != axis]
        error, scale = errors.amax(rest), sizes.amax(rest)
        shown = error[error <= tolerance * scale]
        if len(shown):
            rounding = max(_ROUNDING * float(shown.max()), 4 * torch.finfo(a.dtype).eps * float(scale.median()))
            off = (error > _LOOSER * tolerance * scale) & (error > rounding)
            if bool(off.any()):
                return f"in entry {int(off.nonzero()[0])} along axis {axis}"
    return None


def same_value(a: Any, b: Any) -> bool:
    """Whether two attributes have the same value; those that cannot be compared plainly count as the same."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and a.dtype == b.dtype and bool(torch.equal(a, b.to(a.device)))
    return type(a) not in _PLAIN or type(b) not in _PLAIN or a == b or (a != a and b != b)


def apart(wanted: Tensor, found: Tensor) -> float:
    """The largest difference, relative to the largest finite entry; entries that are not finite have to be equal.

    Up to two values that fill parts of both tensors, and are more than 100 times all others, set no scale.
    """
    if not wanted.numel():
        return 0.0
    if wanted.is_complex():
        return max(apart(wanted.real, found.real), apart(wanted.imag, found.imag))
    finite = wanted.isfinite()
    same = (wanted == found) | (wanted.isnan() & found.isnan())
    if bool((~finite & ~same).any()):
        return math.inf
    scale = _scale(wanted[finite].abs(), same[finite]) if bool(finite.any()) else 1.0
    error = float(torch.where(same, 0.0, (wanted - found).abs()).max()) / scale
    return math.inf if math.isnan(error) else error


def relative_error(wanted: Sequence[Tensor], found: Sequence[Tensor]) -> float:
    """The largest difference of two lists of tensors, in shares of the largest entry; infinite for other shapes."""
    if [t.shape for t in wanted] != [t.shape for t in found]:
        return math.inf
    errors = [apart(a, b.to(a)) for a, b in zip(wanted, found, strict=True)]
    return math.inf if any(map(math.isnan, errors)) else max(errors, default=0.0)


def _scale(sizes: Tensor, same: Tensor) -> float:
    """The largest of these magnitudes without up to two constants, equal in both, such as -1e9 where a mask is."""
    tiny = torch.finfo(sizes.dtype).tiny
    for _ in range(_FILLS):
        rest = sizes < sizes.max()
        largest_rest = float(sizes[rest].max()) if bool(rest.any()) else 0.0
        if largest_rest <= tiny or not bool(same[~rest].all()) or float(sizes.max()) <= _FAR * largest_rest:
            break
        sizes, same = sizes[rest], same[rest]
    return max(float(sizes.max()), tiny)
