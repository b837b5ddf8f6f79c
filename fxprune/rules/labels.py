"""The values of the label interpreter: which channel each slot of an activation belongs to.

A `Labels` stands for one tensor. Its planes say, for some of the axes, which channel (an integer label) each index
belongs to; a tensor may carry several planes, as the two axes of a weight or the rows and columns of an outer
product do. A slot with the label -1 belongs to no channel.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor

NO_CHANNEL = -1.0


@dataclass(frozen=True, slots=True, eq=False)
class Plane:
    """Labels that vary along `axes` of a tensor.

    `core` is float64 (so that every data-movement op takes it; integers up to 2**53 are exact) and has the tensor's
    rank, with size 1 along every axis that is not in `axes`. Where it is `ragged`, the last of its axes is the
    tensor's last axis, along which each slice keeps channels of its own, as many as every other slice.
    """

    core: Tensor
    axes: tuple[int, ...]
    ragged: bool = False

    @property
    def columns(self) -> tuple[Tensor, Tensor]:
        """What is tied where the same channels stay in every slice along the last axis: the first slice, and all."""
        return self.core.reshape(-1, self.core.shape[-1])[:1], self.core.reshape(-1, self.core.shape[-1])

    def over(self, shape: Iterable[int]) -> Tensor:
        """The labels in the tensor's full shape, as an expanded view."""
        return self.core.expand(tuple(shape))

    def shifted(self, by: int) -> Plane:
        """The plane of the same tensor with `by` axes of size 1 put in front; it is not ragged."""
        if not by and not self.ragged:
            return self
        core = self.core.reshape((1,) * by + tuple(self.core.shape))
        return Plane(core, tuple(axis + by for axis in self.axes))


@dataclass(frozen=True, slots=True, eq=False)
class Labels:
    """One tensor in the label interpreter: its shape, its planes, and its numbers where it is a known constant.

    `single` holds the label of each single channel that a movement took out of an axis, so that it can be checked.

    >>> import torch
    >>> x = Labels((2, 3), (vector_plane(torch.tensor([7.0, 8.0, 9.0]), dim=1, ndim=2),))
    >>> x.planes[0].over(x.shape).tolist()
    [[7.0, 8.0, 9.0], [7.0, 8.0, 9.0]]
    """

    shape: tuple[int, ...]
    planes: tuple[Plane, ...] = ()
    value: Tensor | None = None
    single: tuple[float, ...] = ()

    @property
    def ndim(self) -> int:
        """The number of axes."""
        return len(self.shape)

    def along(self, dim: int) -> tuple[Plane, ...]:
        """The planes that vary along axis `dim`."""
        return tuple(plane for plane in self.planes if dim in plane.axes)

    def beside(self, *dims: int) -> tuple[Plane, ...]:
        """The planes that vary along none of the axes `dims`."""
        return tuple(plane for plane in self.planes if not set(dims) & set(plane.axes))

    def is_of_channels(self, dim: int) -> bool:
        """Whether every index along axis `dim` is a channel of its own: no positions or samples lie there, too."""
        firsts = [plane.core.movedim(dim, 0).reshape(self.shape[dim], -1)[:, 0] for plane in self.along(dim)]
        return any(len(first.unique()) == len(first) for first in firsts)


def vector_plane(vector: Tensor, dim: int, ndim: int) -> Plane:
    """The plane of a tensor of rank `ndim` whose axis `dim` carries the labels `vector`."""
    shape = [1] * ndim
    shape[dim] = len(vector)
    return Plane(vector.reshape(shape), (dim,))


def varying_axes(tensor: Tensor) -> tuple[int, ...]:
    """The axes along which `tensor` is not constant; expanded axes are looked at in one index only.

    >>> import torch
    >>> varying_axes(torch.tensor([1.0, 2.0]).reshape(1, 2, 1).expand(4, 2, 5))
    (1,)
    """
    small = tensor
    for dim in range(tensor.ndim):
        if tensor.stride(dim) == 0:
            small = small.narrow(dim, 0, min(1, tensor.shape[dim]))
    varying = []
    for dim in range(small.ndim):
        if small.shape[dim] > 1 and bool((small != small.narrow(dim, 0, 1)).any()):
            varying.append(dim)
        else:
            small = small.narrow(dim, 0, min(1, small.shape[dim]))
    return tuple(varying)


def unemptied(tensor: Tensor) -> Tensor | None:
    """A view of labels that has no elements, with one index along its empty axes; None where it is no such view.

    >>> import torch
    >>> unemptied(torch.tensor([1.0, 2.0])[:, None].expand(2, 3)[:, :0])
    tensor([[1.],
            [2.]])
    """
    if any(stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if not size):
        return None  # the labels lie along that axis, or this is a copy
    return tensor.as_strided([max(size, 1) for size in tensor.shape], tensor.stride(), tensor.storage_offset())


def core_of(tensor: Tensor, axes: tuple[int, ...]) -> Tensor:
    """`tensor` with every axis outside `axes` narrowed to its first index."""
    for dim in range(tensor.ndim):
        if dim not in axes:
            tensor = tensor.narrow(dim, 0, 1)
    return tensor


def is_constant_beside(tensor: Tensor, axes: tuple[int, ...]) -> bool:
    """Whether `tensor` varies along no axis but `axes`."""
    return set(varying_axes(tensor)) <= set(axes)
