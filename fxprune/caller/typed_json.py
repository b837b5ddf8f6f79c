"""From what JSON gives back to the frozen dataclasses that it was made of, every type checked."""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

T = TypeVar("T")


def from_plain(kind: type[T], content: Any, where: str = "") -> T:
    """The object of type `kind` that `content`, plain JSON, describes; the inverse of `dataclasses.asdict`.

    Fields that `kind` does not know are passed over, and those that are missing take their defaults.

    Raises TypeError, with the path of the entry, where one has another type than its field.

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
    convert = _CONTAINERS.get(get_origin(kind))
    if convert is not None:
        return convert(kind, content, where)
    if kind is float and type(content) is int:
        return float(content)
    return _checked(kind, content, where)


def _checked(kind: Any, content: Any, where: str) -> Any:
    """A plain value, which has to be exactly of its type: True is no number."""
    if type(content) is not (type(None) if kind is None else kind):
        raise TypeError(f"{where or 'it'} is a {type(content).__name__}, and should be a {kind}")
    return content


def _record(kind: Any, content: Any, where: str) -> Any:
    _checked(dict, content, where)
    hints = get_type_hints(kind)
    given: dict[str, Any] = {}
    for field in fields(kind):
        if field.name in content:
            given[field.name] = _value(hints[field.name], content[field.name], f"{where}.{field.name}".lstrip("."))
        elif field.default is MISSING and field.default_factory is MISSING:
            raise TypeError(f"{where or 'it'} lacks {field.name}")
    return kind(**given)


def _tuple(kind: Any, content: Any, where: str) -> Any:
    _checked(list, content, where)
    kinds = get_args(kind)
    if kinds[-1] is Ellipsis:
        kinds = (kinds[0],) * len(content)
    if len(kinds) != len(content):
        raise TypeError(f"{where or 'it'} has {len(content)} entries, and should have {len(kinds)}")
    pairs = enumerate(zip(kinds, content, strict=True))
    return tuple(_value(inner, entry, f"{where}[{index}]") for index, (inner, entry) in pairs)


def _mapping(kind: Any, content: Any, where: str) -> Any:
    _checked(dict, content, where)
    _, inner = get_args(kind)
    return {name: _value(inner, entry, f"{where}.{name}".lstrip(".")) for name, entry in content.items()}


def _union(kind: Any, content: Any, where: str) -> Any:
    """A value of one of several plain types, or one that may be missing: of one type, or None."""
    kinds = get_args(kind)
    if type(content) in kinds:
        return content
    return _value(next(arg for arg in kinds if arg is not type(None)), content, where)


def _literal(kind: Any, content: Any, where: str) -> Any:
    if content not in get_args(kind):
        raise TypeError(f"{where or 'it'} is {content!r}, and should be one of {', '.join(map(str, get_args(kind)))}")
    return content


_CONTAINERS: dict[Any, Callable[[Any, Any, str], Any]] = {
    tuple: _tuple,
    Mapping: _mapping,
    dict: _mapping,
    types.UnionType: _union,
    Union: _union,
    Literal: _literal,
}
