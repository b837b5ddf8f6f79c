"""Frozen dataclasses from the plain JSON that they were written as, with every type checked."""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from fxprune.errors import a, a_kind

T = TypeVar("T")


def from_plain(kind: type[T], content: Any, where: str = "") -> T:
    """The object of type `kind` that `content`, plain JSON, describes; the inverse of `dataclasses.asdict`.

    Unknown fields are ignored, and missing ones take their defaults.

    Raises TypeError, with the path of the entry, where an entry does not have the type of its field.

    >>> from_plain(tuple[float, ...], [1, 2.5])
    (1.0, 2.5)
    """
    result: T = _value(kind, content, where)
    return result


def _value(kind: Any, content: Any, where: str) -> Any:
    if kind is Any:
        return content
    if is_dataclass(kind):
        return _record(kind, content, where)
    if get_origin(kind) in _CONTAINERS:
        return _CONTAINERS[get_origin(kind)](get_args(kind), content, where)
    if kind is float and type(content) is int:
        return float(content)
    return _checked(kind, content, where)


def _checked(kind: Any, content: Any, where: str) -> Any:
    """A plain value of exactly that type: True is no number."""
    if type(content) is not (type(None) if kind is None else kind):
        raise TypeError(f"{where or 'it'} is {a_kind(content)}, and should be {a(kind.__name__) if kind else None}")
    return content


def _record(kind: Any, content: Any, where: str) -> Any:
    _checked(dict, content, where)
    known, hints = {field.name: field for field in fields(kind)}, get_type_hints(kind)
    for name, field in known.items():
        if name not in content and field.default is MISSING and field.default_factory is MISSING:
            raise TypeError(f"{where or 'it'} lacks {name}")
    return kind(**{n: _value(hints[n], content[n], f"{where}.{n}".lstrip(".")) for n in known if n in content})


def _tuple(kinds: tuple[Any, ...], content: Any, where: str) -> Any:
    _checked(list, content, where)
    if kinds[-1] is Ellipsis:
        kinds = (kinds[0],) * len(content)
    if len(kinds) != len(content):
        raise TypeError(f"{where or 'it'} has {len(content)} entries, and should have {len(kinds)}")
    return tuple(
        _value(kind, entry, f"{where}[{i}]") for i, (kind, entry) in enumerate(zip(kinds, content, strict=True))
    )


def _mapping(kinds: tuple[Any, ...], content: Any, where: str) -> Any:
    _checked(dict, content, where)
    return {name: _value(kinds[1], entry, f"{where}.{name}".lstrip(".")) for name, entry in content.items()}


def _union(kinds: tuple[Any, ...], content: Any, where: str) -> Any:
    """A value of one of several plain types, or of one type or None."""
    if type(content) in kinds:
        return content
    return _value(next(kind for kind in kinds if kind is not type(None)), content, where)


def _literal(choices: tuple[Any, ...], content: Any, where: str) -> Any:
    if content not in choices:
        raise TypeError(f"{where or 'it'} is {content!r}, and should be one of {', '.join(map(str, choices))}")
    return content


_CONTAINERS: dict[Any, Callable[[tuple[Any, ...], Any, str], Any]] = {
    tuple: _tuple, Mapping: _mapping, dict: _mapping, types.UnionType: _union, Union: _union, Literal: _literal,
}  # fmt: skip
