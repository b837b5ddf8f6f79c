"""The arguments of calls in the operation's own order, and by name, however a call is spelled."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._jit_internal import boolean_dispatched
from torch.utils import _pytree as pytree

from fxprune.caller.example import TensorSpec
from fxprune.rules.labels import Labels
from fxprune.rules.table import RULES, describe, key_of

_ALIASES = {"axis": "dim", "keepdims": "keepdim", "self": "input", "x": "input", "a": "input", "x1": "input"}
_ALIASES |= {"x2": "other"}  # as NumPy calls them


@dataclass(frozen=True, slots=True)
class Signature:
    """One way to call an operation: its parameters by position, those by name only, defaults, and schema types.

    `more` says that it takes further arguments. Parameters in `by_name` are passed by name, because another signature
    of the operation takes them only so.
    """

    places: tuple[str, ...]
    named: frozenset[str]
    defaults: Mapping[str, Any]
    types: Mapping[str, str]
    more: bool = False
    by_name: Set[str] = frozenset()

    def name(self, given: str) -> str:
        """The name here of a parameter that a call may give under an alias."""
        own = {*self.places, *self.named}
        return given if given in own or _ALIASES.get(given) not in own else _ALIASES[given]

    def fits(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
        """Whether a call gives all required arguments and no unknown ones."""
        free, names = {*self.places[len(args) :], *self.named}, {self.name(name) for name in kwargs}
        known = len(args) <= len(self.places) and names <= free
        return free - names <= self.defaults.keys() and (known or self.more)

    def suits(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
        """Whether tensors and truth values are given where the schema has them."""
        given = [*zip(self.places, args, strict=False), *((self.name(name), value) for name, value in kwargs.items())]
        return all(_suits(self.types.get(name, ""), value) for name, value in given)


@dataclass(frozen=True, slots=True)
class Call:
    """A called operation and its arguments: nodes, labels or numbers; for a module class, the module first."""

    key: Any
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    @property
    def signature(self) -> Signature | None:
        """The operation's signature that this call uses, or None where none is known."""
        fitting = [signature for signature in signatures(self.key) if signature.fits(self.args, self.kwargs)]
        return next((s for s in fitting if s.suits(self.args, self.kwargs)), fitting[0] if fitting else None)

    def get(self, name: str) -> Any:
        """The argument for the operation's parameter `name`, or its default; None without such a parameter.

        >>> Call("sum", ("x",), {"axis": 1}).get("dim"), Call(torch.topk, ("x", 3), {}).get("dim")
        (1, -1)
        """
        signature = self.signature
        if signature is None:
            raise TypeError(f"no known signature of {describe(self.key)} takes these arguments")
        given = {signature.name(own): value for own, value in self.kwargs.items()}
        return {**signature.defaults, **dict(zip(signature.places, self.args, strict=False)), **given}.get(name)

    def by_position(self) -> Call:
        """The same call with its arguments by position, up to the first that is not given.

        >>> Call(torch.topk, (), {"dim": 1, "k": 3, "input": "x"}).by_position().args
        ('x', 3, 1)
        """
        signature = self.signature if self.kwargs else None
        if signature is None:
            return self
        rest, args = {signature.name(name): value for name, value in self.kwargs.items()}, list(self.args)
        for name in signature.places[len(args) :]:
            if name not in rest or name in signature.by_name:
                break
            args.append(rest.pop(name))
        return Call(self.key, tuple(args), rest)


def spell(graph: fx.GraphModule) -> None:
    """Put the arguments of all calls that have a rule into their operation's order."""
    named = [node for node in graph.graph.nodes if node.kwargs and node.op.startswith("call")]
    for node in (node for node in named if key_of(node, graph) in RULES):
        module = (graph.get_submodule(str(node.target)),) if node.op == "call_module" else ()
        call = Call(key_of(node, graph), (*module, *node.args), node.kwargs).by_position()
        node.args, node.kwargs = call.args[len(module) :], dict(call.kwargs)
    if named:
        graph.recompile()


@lru_cache(maxsize=2048)
def signatures(key: Any) -> tuple[Signature, ...]:
    """All signatures of a function, of a method, or of the forward of a module class, which takes the module first."""
    if isinstance(key, type) and issubclass(key, nn.Module):
        return (_of_python(key.forward),)
    function: Any = getattr(Tensor, key, None) if isinstance(key, str) else key
    if function in boolean_dispatched:  # such as max_pool2d, with or without its indices
        return tuple(_of_python(boolean_dispatched[function][way]) for way in ("if_true", "if_false"))
    try:
        return (_of_python(function),)
    except (TypeError, ValueError):
        schemas = _schemas(key)
        named = {argument.name for schema in schemas for argument in schema.arguments if argument.kwarg_only}
        return tuple(_of_schema(schema, named, method=isinstance(key, str)) for schema in schemas)


def _of_python(function: Any) -> Signature:
    parameters = inspect.signature(function).parameters.values()
    named = {p.name for p in parameters if p.kind is p.KEYWORD_ONLY}
    stars = {p.name for p in parameters if p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}
    places = tuple(p.name for p in parameters if p.name not in named | stars)
    defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
    return Signature(places, frozenset(named), defaults, {}, bool(stars))


def _schemas(key: Any) -> list[Any]:
    """The schemas of an operator of torch, found by the name of its function or method."""
    own = getattr(key, "_schema", None)
    name = key if isinstance(key, str) else getattr(key, "__name__", "")
    found = [own] if own is not None else torch._C._jit_get_schemas_for_operator(f"aten::{name}") if name else []
    return [schema for schema in found if any("Tensor" in str(argument.type) for argument in schema.arguments)]


def _of_schema(schema: Any, by_name: Set[str], *, method: bool) -> Signature:
    """A schema in Python's terms: `self` is called `input`, and comes first in a method."""
    arguments = sorted(schema.arguments, key=lambda argument: method and argument.name != "self")
    pairs = [("input" if argument.name == "self" else argument.name, argument) for argument in arguments]
    return Signature(
        tuple(name for name, argument in pairs if not argument.kwarg_only),
        frozenset(name for name, argument in pairs if argument.kwarg_only),
        {name: argument.default_value for name, argument in pairs if argument.has_default_value()},
        {name: str(argument.type) for name, argument in pairs},
        by_name=by_name,
    )


def _suits(type_: str, value: Any) -> bool:
    if not type_ or value is None:
        return True
    leaves = [leaf.meta.get("spec") if isinstance(leaf, fx.Node) else leaf for leaf in pytree.tree_leaves(value)]
    tensors = any(isinstance(leaf, (Labels, TensorSpec)) for leaf in leaves)
    if type_ == "bool":
        return all(isinstance(leaf, bool) for leaf in leaves)
    return tensors == ("Tensor" in type_) and (not isinstance(value, bool) or "bool" in type_)
