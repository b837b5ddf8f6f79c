"""Labels: the channel to which each slot of a tensor belongs.

A `Labels` stands for one tensor. Each of its planes gives the channel (an integer label) of each index along some of
the axes; a tensor may have several planes, such as those of the two axes of a weight. A slot with the label -1 belongs
to no channel.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor

NO_CHANNEL = -1.0
SMALL = 4  # times smaller than its storage, labels are copied out of it


@dataclass(frozen=True, slots=True, eq=False)
class Plane:
    """Labels that vary along `axes` of a tensor.

    `core` has the tensor's rank, with size 1 along every axis that is not in `axes`. It is float64, which every
    data-movement op accepts; integers up to 2**53 are exact. In a `ragged` plane, the last of `axes` is the tensor's
    last axis, along which each slice keeps channels of its own, all the same number.
    """

    core: Tensor
    axes: tuple[int, ...]
    ragged: bool = False

    @property
    def columns(self) -> tuple[Tensor, Tensor]:
        """The first slice along the last axis, and all of them: tied where every slice keeps the same channels."""
        rows = self.core.reshape(-1, self.core.shape[-1])
        return rows[:1], rows

    def slices(self, axis: int) -> Tensor:
        """The labels of each slice along an axis: (indices, slots of a slice)."""
        return slices(self.core, axis)

    def over(self, shape: Iterable[int]) -> Tensor:
        """The labels in the tensor's full shape, as an expanded view."""
        return self.core.expand(tuple(shape))

    def shifted(self, by: int) -> Plane:
        """The plane of the same tensor with `by` axes of size 1 in front; it is not ragged."""
        if not by and not self.ragged:
            return self
        core = self.core.reshape((1,) * by + tuple(self.core.shape))
        return Plane(core, tuple(axis + by for axis in self.axes))


@dataclass(frozen=True, slots=True, eq=False)
class Labels:
    """One tensor in the label interpreter: its shape, its planes, and its numbers where it is a known constant.

    `single` are the labels of the single channels that a movement selected from an axis, to be checked. The numbers of
    a tensor with `index_of` are places along an axis with these labels, such as the numbers of chosen experts.

    >>> import torch
    >>> x = Labels((2, 3), (vector_plane(torch.tensor([7.0, 8.0, 9.0]), dim=1, ndim=2),))
    >>> x.planes[0].over(x.shape).tolist()
    [[7.0, 8.0, 9.0], [7.0, 8.0, 9.0]]
    """

    shape: tuple[int, ...]
    planes: tuple[Plane, ...] = ()
    value: Tensor | None = None
    single: tuple[float, ...] = ()
    index_of: Tensor | None = None

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
        """Whether every index along axis `dim` is a channel of its own, without positions or samples."""
        return any(len(plane.slices(dim)[:, 0].unique()) == self.shape[dim] for plane in self.along(dim))


def slices(core: Tensor, axis: int) -> Tensor:
    """A tensor as a matrix with a row for each index along an axis."""
    return core.movedim(axis, 0).reshape(core.shape[axis], -1)


def has_channels(labels: Tensor) -> bool:
    """Whether any slot belongs to a channel."""
    return bool((labels != NO_CHANNEL).any())


def vector_plane(vector: Tensor, dim: int, ndim: int) -> Plane:
    """The plane of a tensor of rank `ndim` whose axis `dim` carries the labels `vector`."""
    return Plane(vector.reshape([len(vector) if axis == dim else 1 for axis in range(ndim)]), (dim,))


def labelled(vector: Tensor, dim: int, ndim: int) -> tuple[Plane, ...]:
    """The `vector_plane` in a tuple, which is empty where no slot belongs to a channel."""
    return (vector_plane(vector, dim, ndim),) if has_channels(vector) else ()


def varying_axes(tensor: Tensor) -> tuple[int, ...]:
    """The axes along which `tensor` is not constant.

    >>> import torch
    >>> varying_axes(torch.tensor([1.0, 2.0]).reshape(1, 2, 1).expand(4, 2, 5))
    (1,)
    """
    small = tensor
    for dim in range(tensor.ndim):
        if tensor.stride(dim) == 0:  # one index of an expanded axis is enough
            small = small.narrow(dim, 0, min(1, tensor.shape[dim]))
    varying = []
    for dim in range(small.ndim):
        if small.shape[dim] > 1 and bool((small != small.narrow(dim, 0, 1)).any()):
            varying.append(dim)
        else:
            small = small.narrow(dim, 0, min(1, small.shape[dim]))
    return tuple(varying)


def unemptied(tensor: Tensor) -> Tensor | None:
    """An empty view of labels with one index along its empty axes instead; None where the labels vary along these.

    >>> import torch
    >>> unemptied(torch.tensor([1.0, 2.0])[:, None].expand(2, 3)[:, :0])
    tensor([[1.],
            [2.]])
    """
    if any(stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if not size):
        return None  # or this is a copy
    return tensor.as_strided([max(size, 1) for size in tensor.shape], tensor.stride(), tensor.storage_offset())


def core_of(tensor: Tensor, axes: tuple[int, ...]) -> Tensor:
    """`tensor` with every axis outside `axes` narrowed to its first index; a copy where that is a small part of it."""
    for dim in range(tensor.ndim):
        if dim not in axes:
            tensor = tensor.narrow(dim, 0, 1)
    return tensor.clone() if tensor.nbytes < tensor.untyped_storage().nbytes() // SMALL else tensor


def is_constant_beside(tensor: Tensor, axes: tuple[int, ...]) -> bool:
    """Whether `tensor` varies along no axis but `axes`."""
    return set(varying_axes(tensor)) <= set(axes)
