"""Products of widths: the sizes of tensor axes as functions of a plan, and numbers that are products of them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array
from torch import Tensor

from fxprune.caller.arrays import Flags, Index
from fxprune.coupling.groups import Coupling
from fxprune.rules.labels import Labels
from fxprune.rules.vocabulary import Slot

Axes = tuple[int, ...]  # for each axis of a tensor, the number of its width


Record = TypeVar("Record", bound="Arrays")


class Arrays:
    """The base of a dataclass of arrays, which files hold by the names of its fields, with a prefix."""

    __slots__ = ()

    def arrays(self, prefix: str = "") -> dict[str, Index]:
        """The arrays by their names."""
        return {f"{prefix}{each.name}": getattr(self, each.name) for each in fields(self)}  # type: ignore[arg-type]

    @classmethod
    def of_arrays(cls: type[Record], arrays: Mapping[str, Index], prefix: str = "") -> Record:
        """The record whose `arrays` these are."""
        return cls(*(arrays[f"{prefix}{each.name}"] for each in fields(cls)))  # type: ignore[arg-type]


@dataclass(frozen=True, slots=True, eq=False)
class Widths(Arrays):
    """The sizes of axes as functions of a plan: width i is `fixed[i]` and one for each of its kept units.

    The units of width i are `units[starts[i] : starts[i + 1]]`.
    """

    fixed: Index
    units: Index
    starts: Index

    def under(self, keep: Flags) -> Index:
        """All widths where the units `keep` are kept.

        >>> Widths(np.array([1, 2]), np.array([0, 0, 1]), np.array([0, 0, 3])).under(np.array([True, False]))
        array([1, 4])
        """
        ones = np.ones(len(self.units), dtype=np.int64)
        table = csr_array((ones, self.units, self.starts), shape=(len(self.fixed), len(keep)))
        under: Index = self.fixed + table @ keep.astype(np.int64)
        return under


@dataclass(frozen=True, slots=True)
class Product:
    """A factor times the widths of some axes; zero where all of the axes `vanishing` have width 1."""

    factor: int
    axes: Axes = ()
    vanishing: Axes = ()


@dataclass(frozen=True, slots=True, eq=False)
class Products(Arrays):
    """Many products, one a row: factors, (products, n) numbers of their axes, and of their `vanishing` axes (-1: none).

    Rows of axes are padded with width 0, whose size is 1.
    """

    factor: Index
    axes: Index
    vanishing: Index

    def of(self, widths: Index) -> Index:
        """The value of each product under some widths.

        >>> Products(np.array([9, 1]), np.array([[1, 2], [3, 0]]), np.array([[-1], [0]])).of(np.array([1, 3, 8, 5]))
        array([216,   0])
        """
        numbers = self.factor * widths[self.axes].prod(1)
        vanished = (self.vanishing >= 0).any(1) & ((self.vanishing < 0) | (widths[self.vanishing] == 1)).all(1)
        result: Index = np.where(vanished, 0, numbers)
        return result

    def slopes(self, widths: Widths, keep: Flags) -> NDArray[np.float64]:
        """How much the sum of all products falls by the removal of each unit from `keep`, to first order.

        >>> widths = Widths(np.array([1, 2]), np.array([0, 1]), np.array([0, 0, 2]))
        >>> Products(np.array([9]), np.array([[1, 1]]), np.array([[-1]])).slopes(widths, np.array([True, True]))
        array([72., 72.])
        """
        sizes = np.maximum(widths.under(keep), 1).astype(np.float64)
        numbers = self.factor * sizes[self.axes].prod(1)
        of_width = np.bincount(self.axes.ravel(), (numbers[:, None] / sizes[self.axes]).ravel(), minlength=len(sizes))
        each = np.repeat(of_width, np.diff(np.append(widths.starts, len(widths.units))[: len(sizes) + 1]))
        return np.bincount(widths.units, each, minlength=len(keep)).astype(np.float64)


def products(rows: Sequence[Product]) -> Products:
    """The products in arrays."""
    factor = np.array([row.factor for row in rows], dtype=np.int64)
    return Products(factor, _table([row.axes for row in rows], 0), _table([row.vanishing for row in rows], -1))


def _table(rows: Sequence[Axes], fill: int) -> Index:
    table = np.full((len(rows), max(map(len, rows), default=0)), fill, dtype=np.int64)
    for row, numbers in enumerate(rows):
        table[row, : len(numbers)] = numbers
    return table


@dataclass(slots=True)
class Ruler:
    """Numbers the widths of a coupled graph's tensor axes, equal ones alike; width 0 has size 1."""

    coupling: Coupling
    known: dict[tuple[int, bytes], int] = field(default_factory=dict)
    found: list[tuple[int, Index]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._width(np.full(1, -1, dtype=np.int64))

    def widths(self) -> Widths:
        """All widths numbered so far."""
        units = [units for _, units in self.found]
        starts = np.cumsum([0, *map(len, units)])
        fixed = np.array([fixed for fixed, _ in self.found], dtype=np.int64)
        return Widths(fixed, np.concatenate(units).astype(np.int64), starts.astype(np.int64))

    def parameter(self, owner: str, shape: Iterable[int]) -> Axes:
        """The axes of a parameter."""
        return tuple(self._slot(Slot(owner, axis), size) for axis, size in enumerate(shape))

    def tensor(self, x: Labels) -> Axes:
        """The axes of an activation."""
        return tuple(self._axis(x, axis) for axis in range(x.ndim))

    def unit(self, unit: int) -> int:
        """A width of 1 where a unit is kept, and of 0 without it."""
        return self._width(np.array([unit], dtype=np.int64))

    def size(self, axes: Iterable[int]) -> int:
        """The product of the original sizes of some axes."""
        return math.prod(self.found[axis][0] + len(self.found[axis][1]) for axis in axes)

    def product(self, axes: Axes, factor: int = 1, vanishing: Axes = ()) -> Product:
        """A product whose factor includes the axes that no plan changes."""
        free = tuple(axis for axis in axes if self.changes(axis))
        fixed = self.size(axis for axis in axes if not self.changes(axis))
        return Product(factor * fixed, free, vanishing if any(map(self.changes, vanishing)) else ())

    def changes(self, axis: int) -> bool:
        """Whether a plan can change a width."""
        return len(self.found[axis][1]) > 0

    def _slot(self, slot: Slot, size: int) -> int:
        if slot not in self.coupling.slots:
            return self._width(np.full(size, -1, dtype=np.int64))
        start, size = self.coupling.slots[slot]
        return self._width(self.coupling.unit_of[start : start + size])

    def _axis(self, x: Labels, axis: int) -> int:
        """An index is removed with the one unit that its whole slice belongs to; a slice of several units is kept."""
        units = np.full(x.shape[axis], -1, dtype=np.int64)
        for plane in x.along(axis):
            if plane.ragged and axis == x.ndim - 1:
                return self._width(self._units(plane.columns[0])[0])
            slices = self._units(plane.core.movedim(axis, 0).reshape(x.shape[axis], -1))
            low, high = slices.min(1, initial=np.iinfo(np.int64).max), slices.max(1, initial=-1)
            units = np.where(low == high, low, units)
        return self._width(units)

    def _units(self, labels: Tensor) -> Index:
        numbers = labels.numpy().astype(np.int64)
        return np.append(self.coupling.unit_of, -1)[np.where(numbers < 0, -1, numbers)]

    def _width(self, units: Index) -> int:
        free = np.sort(units[units >= 0])
        key = (len(units) - len(free), free.tobytes())
        if key not in self.known:
            self.known[key] = len(self.found)
            self.found.append((key[0], free))
        return self.known[key]
