"""Integer attributes that name widths: where a forward uses them, and the values that they need in a narrowed copy."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn

from fxprune.caller.isolation import isolated_copy
from fxprune.tracing.facts import facts_on
from fxprune.tracing.graph import ModelGraph, example_of

_ARITHMETIC = {operator.add, operator.sub, operator.mul, operator.floordiv, operator.neg}
SPLITS = {"split", "chunk", torch.split, torch.chunk}


@dataclass(frozen=True, slots=True)
class Attribute:
    """An integer that the module at `path` keeps as `name`, or at a `place` in the list or tuple of that name."""

    path: str
    name: str
    value: int = field(compare=False)
    place: int | None = None


Values = Mapping[Attribute, int]


class NamedSize(int):
    """A number that a module keeps as an attribute, or one computed from such numbers and others.

    `names` are the attributes that it is computed from, and `given` computes it from other values of them.
    """

    names: frozenset[Attribute]
    given: Callable[[Values], int]

    @classmethod
    def of(cls, value: int, names: frozenset[Attribute], given: Callable[[Values], int]) -> NamedSize:
        """A number with its origin."""
        own = cls(value)
        own.names, own.given = names, given
        return own

    @classmethod
    def held(cls, attribute: Attribute) -> NamedSize:
        """The number of an attribute."""
        value = attribute.value
        return cls.of(value, frozenset({attribute}), lambda values: values.get(attribute, value))

    def __deepcopy__(self, memo: Any) -> NamedSize:
        return self

    def __eq__(self, other: object) -> bool:
        equal, noted = int(self) == other, _COMPARED.get()
        return equal if noted is None else noted.compared(self, other, equal)

    def __ne__(self, other: object) -> bool:
        return not self == other

    __hash__ = int.__hash__


@dataclass(frozen=True, slots=True)
class Use:
    """A number in a call of the forward that is computed from attributes, and the number that is needed there."""

    node: str
    size: NamedSize
    needed: int


class Comparisons:
    """The comparisons of named sizes with other numbers in a forward, in order, and how they ended.

    With those of an earlier run, comparisons end as they did there, and the ones that held need equal numbers.
    """

    def __init__(self, earlier: Comparisons | None = None) -> None:
        self.earlier, self.ended, self.uses = earlier, list[bool](), list[Use]()

    def compared(self, size: NamedSize, other: object, equal: bool) -> bool:  # noqa: FBT001 - as Python compares
        """Note a comparison; gives how it ends."""
        if self.earlier is not None and len(self.ended) < len(self.earlier.ended):
            equal = self.earlier.ended[len(self.ended)]
            if equal and isinstance(other, int):
                self.uses.append(Use("", size, int(other)))
        self.ended.append(equal)
        return equal

    @contextmanager
    def noted(self) -> Iterator[None]:
        """Note the comparisons that are made in this context."""
        token = _COMPARED.set(self)
        try:
            yield
        finally:
            _COMPARED.reset(token)


_COMPARED: ContextVar[Comparisons | None] = ContextVar("_COMPARED", default=None)


def _arithmetic(operation: Callable[..., Any], *, reflected: bool) -> Callable[..., Any]:
    """A method of `NamedSize` that computes a `NamedSize` from whole numbers, and leaves all else to the other one."""

    def computed(own: NamedSize, *other: Any) -> Any:
        if any(type(number) not in (int, NamedSize) for number in other):
            return NotImplemented
        numbers = (*other, own) if reflected else (own, *other)
        named = [number for number in numbers if isinstance(number, NamedSize)]

        def given(values: Values) -> int:
            return int(operation(*(n.given(values) if isinstance(n, NamedSize) else n for n in numbers)))

        names = frozenset[Attribute]().union(*(number.names for number in named))
        return NamedSize.of(operation(*map(int, numbers)), names, given)

    return computed


for _name in ("add", "sub", "mul", "floordiv", "neg"):
    setattr(NamedSize, f"__{_name}__", _arithmetic(getattr(operator, _name), reflected=False))
    if _name != "neg":
        setattr(NamedSize, f"__r{_name}__", _arithmetic(getattr(operator, _name), reflected=True))


def with_named_sizes(model: nn.Module) -> nn.Module:
    """A copy of a model in which the integers that modules keep, alone or in lists and tuples, are `NamedSize`s.

    The layers of torch.nn, whose settings follow from their tensors, keep plain ones.
    """
    own = isolated_copy(model)
    for path, module in own.named_modules():
        held = {} if type(module).__module__.startswith("torch.nn") else vars(module)
        for name, value in held.items():
            if type(value) is int:
                held[name] = NamedSize.held(Attribute(path, name, value))
            elif type(value) in (list, tuple):
                entries = enumerate(value)
                held[name] = type(value)(
                    NamedSize.held(Attribute(path, name, v, i)) if type(v) is int else v for i, v in entries
                )
    return own


def set_sizes(own: nn.Module, values: Values) -> None:
    """Give integer attributes of a model other values."""
    for attribute, value in values.items():
        held, name = vars(own.get_submodule(attribute.path)), attribute.name
        if attribute.place is None:
            held[name] = value
        else:
            entries = list(held[name])
            entries[attribute.place] = value
            held[name] = type(held[name])(entries)


class Calls:
    """The calls of a graph with named sizes, beside those of the graph that was rewritten from it."""

    def __init__(self, named: ModelGraph, small: ModelGraph) -> None:
        self.before = {node.name: node for node in named.graph.nodes}
        self.after = {node.name: node for node in small.graph.nodes}
        self.specs = facts_on(small, example_of(named)).specs

    def uses(self) -> list[Use]:
        """The numbers with names, and the numbers that are needed in their places.

        Arithmetic on sizes counts where its result is used.
        """
        return [
            Use(name, old, new)
            for name, node in self.before.items()
            if not isinstance(node.meta["spec"], int)
            for old, new in self._pairs(name)
            if isinstance(old, NamedSize) and isinstance(new, int)
        ]

    def are_named(self, node: str) -> bool:
        """Whether all that rewriting changed in a call are numbers with names."""
        pairs = self._pairs(node)
        changed = [(old, new) for old, new in pairs if old is not None and old != new]
        return bool(pairs) and all(isinstance(old, NamedSize) and isinstance(new, int) for old, new in changed)

    def _pairs(self, name: str) -> list[tuple[Any, Any]]:
        """The arguments of two calls, side by side, nodes by their names; none where one has more, or was removed."""
        if name not in self.after:
            return []
        before, after = self.before[name], self.after[name]
        if before.target in SPLITS and len(before.args) > 1:
            old, new = self._sizes_of_pieces(before), list(_leaves(after.args[1]))
        else:
            old, new = (list(_leaves((node.args, sorted(node.kwargs.items())))) for node in (before, after))
        pairs = zip(map(self._named, old), new, strict=True) if len(old) == len(new) else ()
        return [(a, self._number(b)) if isinstance(a, NamedSize) else (_shown(a), _shown(b)) for a, b in pairs]

    def _sizes_of_pieces(self, split: fx.Node) -> list[Any]:
        """The sizes of the pieces of a split, with their names."""
        given: Any = split.args[1]
        if isinstance(given, (list, tuple)):
            return list(_leaves(given))
        dim: Any = split.args[2] if len(split.args) > 2 else 0
        size, sizes = self._named(given), [piece.shape[dim] for piece in split.meta["spec"]]
        return [size if own == size and split.target not in ("chunk", torch.chunk) else own for own in sizes]

    def _named(self, value: Any) -> Any:
        """A number of the graph before, with the names in it; a node as it is where there are none in it."""
        found = self._computed(value)
        return found if isinstance(found, NamedSize) and found.names else value

    def _computed(self, value: Any) -> Any:
        """The number of a node with the names in it; a size that is read from a tensor counts as after rewriting."""
        if not isinstance(value, fx.Node):
            return value
        if value.target in _ARITHMETIC:
            numbers = [self._computed(number) for number in value.args]
            return value.target(*numbers) if all(isinstance(number, int) for number in numbers) else None  # type: ignore[operator]
        before, after = value.meta["spec"], self.specs.get(value.name)
        return NamedSize.of(before, frozenset(), lambda _: after) if type(before) is type(after) is int else None

    def _number(self, value: Any) -> Any:
        """A number of the graph after."""
        return self.specs[value.name] if isinstance(value, fx.Node) else value


def _shown(value: Any) -> Any:
    return value.name if isinstance(value, fx.Node) else value


def _leaves(value: Any) -> Iterator[Any]:
    """The numbers and nodes in arguments, in order."""
    if isinstance(value, (list, tuple)):
        for entry in value:
            yield from _leaves(entry)
    elif isinstance(value, slice):
        yield from () if value == slice(None) else (value.start, value.stop, value.step)
    elif value is not Ellipsis:
        yield value


def solved(uses: Sequence[Use]) -> dict[Attribute, int]:
    """Values of the attributes that give the numbers that are needed, as far as there are such values.

    >>> heads, size = Attribute("", "heads", 8), Attribute("", "size", 16)
    >>> uses = [Use("view", NamedSize.held(heads), 6), Use("reshape", NamedSize.held(heads) * NamedSize.held(size), 96)]
    >>> [(attribute.name, value) for attribute, value in solved(uses).items()]
    [('heads', 6)]
    """
    values: dict[Attribute, int] = {}
    for use in sorted(uses, key=lambda use: len(use.size.names)):  # those of one attribute decide first
        for name in sorted(use.size.names - values.keys(), key=str):
            if len(use.size.names) == 1 or use.size.given(values) != use.needed:
                tried = (name.value, use.needed, *range(1, max(use.size, use.needed) + 1))
                fit = next((value for value in tried if _given(use.size, {**values, name: value}) == use.needed), None)
                values |= {} if fit is None else {name: fit}
    return values


def _given(size: NamedSize, values: Values) -> int | None:
    """A number for other values of its attributes; None where it divides by zero."""
    try:
        return size.given(values)
    except ZeroDivisionError:
        return None


def unsolved(uses: Sequence[Use], values: Values) -> list[Use]:
    """The uses that need other numbers than they get from these values: one attribute cannot be two numbers."""
    return [use for use in uses if _given(use.size, values) != use.needed]


def sets_of_pieces(odd: Sequence[fx.Node], uses: Sequence[Use], missed: Sequence[Use]) -> list[set[str]]:
    """Sets of nodes that a forward could follow if all of their pieces had one size.

    These are splits into equal pieces, and all calls that use an attribute which would need several values.
    """
    direct = [use for use in uses if _is_attribute(use.size)]
    wanted = {use.size.names for use in missed if use in direct}
    found = [{node.name} for node in odd if node.target in SPLITS]
    return found + [{use.node for use in direct if use.size.names == names} for names in wanted]


def _is_attribute(size: NamedSize) -> bool:
    return len(size.names) == 1 and size.given(dict.fromkeys(size.names, -1)) == -1
