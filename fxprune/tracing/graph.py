"""`ModelGraph`: a GraphModule that keeps the caller's whole module tree."""

from __future__ import annotations

import copy
import importlib
import inspect
import keyword
import linecache
import sys
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx import graph_module as fx_internals
from torch.utils import _pytree as pytree

from fxprune.errors import CaptureError
from fxprune.tracing.value_proxies import ValueProxy


class OwnSource(fx.GraphModule):
    """A GraphModule whose generated source is freed with it; torch.fx itself keeps that of every graph.

    Its modules and tensors may have any name, such as a keyword or one with quotes.
    """

    def recompile(self) -> fx.graph.PythonCode:
        """Generate the forward. Raises CaptureError where a call names an argument as Python cannot."""
        for node in self._graph.nodes:
            odd = [name for name in node.kwargs if keyword.iskeyword(name) or not name.isidentifier()]
            if odd:
                raise CaptureError(
                    f"{node.name} is given {odd[0]!r} by name, which is no name in Python: give it by place"
                )
        with self._graph.on_generate_code(lambda _: self._with_any_names):
            code = super().recompile()
        forget = weakref.finalize(self, _forget, type(self).forward.__code__.co_filename)
        forget.atexit = False
        return code

    def _with_any_names(self, body: list[str]) -> list[str]:
        """The parts of a generated forward, with quotes around names that cannot follow a dot in Python."""
        places = {part.partition(" = ")[0]: place for place, part in enumerate(body)}
        for node in self._graph.nodes:
            path = str(node.target).split(".") if node.op in ("call_module", "get_attr") else []
            if not all(map(_can_follow_a_dot, path)):
                written, place = f"{node} = " + _reached(path, str.isidentifier, '"{}"'.format), places[node.name]
                assert body[place].startswith(written)
                body[place] = f"{node} = " + _reached(path, _can_follow_a_dot, repr) + body[place][len(written) :]
        return body


def _can_follow_a_dot(name: str) -> bool:
    """Whether Python takes a name after a dot for that attribute; it takes some other letters for ASCII ones."""
    return name.isascii() and name.isidentifier() and not keyword.iskeyword(name)


def _reached(path: list[str], plain: Callable[[str], bool], quoted: Callable[[str], str]) -> str:
    """The source of the module or tensor at a path.

    >>> _reached(["heads", "class"], str.isidentifier, repr), _reached(["heads", "a b"], str.isidentifier, repr)
    ('self.heads.class', "getattr(self.heads, 'a b')")
    """
    source = "self"
    for name in path:
        source = f"{source}.{name}" if plain(name) else f"getattr({source}, {quoted(name)})"
    return source


def _forget(name: str) -> None:
    """Free the source that torch.fx generated under the name of this file, for tracebacks."""
    if name.startswith("<eval_with_key>"):
        linecache.cache.pop(name, None)
        fx_internals._loader.eval_cache.pop(name, None)


class ModelGraph(OwnSource):
    """A `torch.fx.GraphModule` with the children, names, types and state_dict keys of the model that it came from.

    A plain GraphModule keeps only the modules that its graph calls, in containers of torch's; here the path
    `small.layer1[0].conv1` remains. It deep-copies and pickles as itself. `meta` holds the record of its capture, or of
    its pruning. In the place of a part of a model, it has the methods and attributes of that, see `take_place_of`.
    """

    def __init__(self, root: nn.Module, graph: fx.Graph, class_name: str = "ModelGraph") -> None:
        super().__init__(root, graph, class_name)
        for store in ("_modules", "_parameters", "_buffers"):
            self.__dict__[store] = dict(root.__dict__[store])
        self._non_persistent_buffers_set = set(root._non_persistent_buffers_set)
        self.meta = dict(root.__dict__.get("meta", {}))
        self.training = root.training
        if _PLACE in vars(root):
            vars(self)[_PLACE] = vars(root)[_PLACE]
        vars(self).update({name: value for name, value in plain_attributes(root).items() if name not in vars(self)})

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the graph. Raises CaptureError where a call fails that leaves out an input which the example gives."""
        if torch.compiler.is_compiling():
            return super().__call__(*args, **kwargs)
        try:
            return super().__call__(*args, **kwargs)
        except Exception as error:
            if (name := self._left_out(args, kwargs)) is None or isinstance(error, CaptureError):
                raise
            raise CaptureError(
                f"the graph was made for an example that gives {name}, and this call leaves it out: give it, or "
                "capture the model with an example that leaves it out"
            ) from error

    def _left_out(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> str | None:
        """The first input that the graph uses, and that a call gives as None, the default of the model's forward."""
        inputs = [node for node in self.graph.nodes if node.op == "placeholder"]
        given = dict(zip([str(node.target) for node in inputs], args, strict=False)) | dict(kwargs)
        for node in inputs:
            used = any(user.target is not must_be for user in node.users)
            if used and node.args == (None,) and given.get(str(node.target)) is None:
                return str(node.target)
        return None

    def take_place_of(self, part: nn.Module) -> None:
        """Have the methods, properties and attributes of another module, for those that ask for them.

        Attributes are copied; those that refuse it are left out.
        """
        if isinstance(part, ModelGraph):
            vars(self)[_PLACE] = vars(part).get(_PLACE, vars(self).get(_PLACE))
            return
        own = dict(self.named_modules(remove_duplicate=False))
        memo = {id(module): own[path] for path, module in part.named_modules() if path in own}
        copies: dict[str, Any] = {}
        for name in vars(part).keys() - vars(nn.Module()).keys() - {"forward"}:
            with suppress(Exception):  # whatever the caller's class raises
                copies[name] = copy.deepcopy(vars(part)[name], dict(memo))
        vars(self)[_PLACE] = type(part), copies

    def __getattr__(self, name: str) -> Any:
        """An attribute of the module in whose place this stands, if the graph has none of that name."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            place: tuple[Any, dict[str, Any]] | None = vars(self).get(_PLACE)
            kind, attributes = place or (None, {})
            if name in attributes:
                return attributes[name]
            found = None if kind is None or name.startswith("__") else inspect.getattr_static(kind, name, None)
            if found is None:
                raise
            return found.__get__(self, kind) if hasattr(type(found), "__get__") else found

    def get_submodule(self, target: str) -> nn.Module:
        """The module at a path; `nn.Module`'s own search takes ten times as long."""
        module: nn.Module | None = self
        for name in target.split(".") if target else ():
            module = module._modules.get(name) if module is not None else None
        return super().get_submodule(target) if module is None else module

    def _deepcopy_init(self) -> Callable[..., None]:
        """How fx initialises a deep copy: with the whole module tree and the name of the class."""
        name = type(self).__name__
        return lambda copied, root, graph: ModelGraph.__init__(copied, root, graph, name)

    def __reduce__(self) -> tuple[Any, ...]:
        body = {name: value for name, value in self.__dict__.items() if name not in ("_graph", "forward")}
        nodes = [_packed(node) for node in self.graph.nodes]
        return _restore, (type(self).__name__, body, nodes)


def plain_attributes(module: nn.Module) -> dict[str, Any]:
    """The numbers, strings and lists of them that a module keeps as attributes, such as `num_classes`."""
    own = {name: value for name, value in vars(module).items() if not name.startswith("_") and name != "training"}
    plain = (bool, int, float, str, type(None))
    return {name: value for name, value in own.items() if all(isinstance(v, plain) for v in pytree.tree_leaves(value))}


_PLACE = "_place_of"  # of a graph: the class and the attributes of the module in whose place it stands


@dataclass(frozen=True, slots=True)
class _NodeName:
    """Stands for a node in a pickled graph."""

    name: str


@dataclass(frozen=True, slots=True)
class _FunctionName:
    """Stands for a function in a pickled graph; pickle itself cannot name all of torch's."""

    module: str
    name: str


def _packed(node: fx.Node) -> tuple[Any, ...]:
    """A node as names and plain values, with the facts that `capture` found about it."""
    to_name: Any = lambda node: _NodeName(node.name)  # noqa: E731 - map_arg expects a node back
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), to_name)
    module, name = (str(getattr(node.target, key, "")) for key in ("__module__", "__name__"))
    known = not isinstance(node.target, str) and getattr(sys.modules.get(module), name, None) is node.target
    noted = {key: node.meta[key] for key in ("spec", "flops", "stack_trace") if key in node.meta}
    return node.name, node.op, _FunctionName(module, name) if known else node.target, args, kwargs, noted


def _target(packed: Any) -> Any:
    """The target of a packed node."""
    if isinstance(packed, _FunctionName):
        return getattr(importlib.import_module(packed.module), packed.name)
    return packed


def _restore(class_name: str, body: dict[str, Any], nodes: list[tuple[Any, ...]]) -> ModelGraph:
    """The inverse of pickling: the graph is built node by node, under the names that its nodes had."""
    graph, made = fx.Graph(), dict[str, fx.Node]()

    def node_of(leaf: Any) -> Any:
        return made[leaf.name] if isinstance(leaf, _NodeName) else leaf

    for name, op, target, *given, noted in nodes:
        args, kwargs = (fx.node.map_aggregate(value, node_of) for value in given)
        made[name] = graph.create_node(op, _target(target), args, kwargs, name=name)  # type: ignore[arg-type]
        made[name].meta.update(noted)
    root = nn.Module()
    root.__dict__.update(body)
    return ModelGraph(root, graph, class_name)


def must_be(value: Any, fixed: Any, name: str) -> None:
    """Check, inside a graph, that an argument or the length of a container is the one that tracing has fixed.

    Raises CaptureError where it is another.
    """
    known = value.concrete if issubclass(type(value), ValueProxy) else value
    known = len(known) if isinstance(known, (list, tuple, Mapping, Tensor)) else known
    if known is not fixed and known != fixed:
        raise CaptureError(
            f"the graph was made for {name}={fixed!r}, as in the example or by default: "
            f"capture the model with an example that gives {name} the value that you need, or keep its class, "
            "own_class=True, which takes any"
        )


@dataclass(frozen=True, slots=True)
class History:
    """How a pruned model was made, so that it can be made again from its architecture.

    `plans` were applied in this order to a graph of the given `structure`; `biases` names the parameters that
    compensation created.
    """

    plans: tuple[Any, ...] = ()
    structure: tuple[str, ...] = ()
    biases: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ClassLimits:
    """What the code of a model can run narrower.

    `held` gives the reason for each layer that keeps all its channels. Each set of `even` holds axes of values, as
    (node, number of the output, axis), that keep equal numbers of channels. `repeats` are sets of layers whose groups
    keep equal numbers of units, in place of those found in blocks that repeat. `counts` has, for layers whose groups
    cannot keep any number of units, the numbers that they can keep, rising. `blocks` says in which pieces residual
    branches can be removed: empty for single ones.
    """

    held: Mapping[str, str] = field(default_factory=dict)
    even: tuple[tuple[tuple[str, int, int], ...], ...] = ()
    repeats: tuple[tuple[str, ...], ...] = ()
    counts: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    blocks: str = ""


class Record:
    """A frozen dataclass whose fields can also be read by name, as in `small.meta["fxprune"]["plan"]`."""

    __slots__ = ()

    @property
    def refitted(self) -> str:
        """What changed the weights after channels were removed; empty where nothing did."""
        return ""

    def __getitem__(self, name: str) -> Any:
        if name not in (own.name for own in fields(self)):  # type: ignore[arg-type]
            raise KeyError(name)
        return getattr(self, name)


@dataclass(frozen=True, slots=True)
class Captured(Record):
    """How a graph was captured.

    `method` names the way to the graph, `example` is the batch that shapes and flops are of, and `description` the
    same in JSON. `leaves` are the modules kept as single nodes. `decisions` are the values that control flow was
    decided by. `by_batch` and `by_length` are the numbers of samples and the other lengths near which the forward
    decides, as multiples of those in the example, or 1.0 where they are not known. `by_layout` says that the forward
    may decide by how a tensor lies in memory. `changed` names buffers and attributes that the forward changes. `limits`
    say what the model's own class can run narrower.
    """

    method: str = ""
    example: Any = None
    description: Any = None
    leaves: tuple[str, ...] = ()
    decisions: tuple[Any, ...] = ()
    by_batch: frozenset[float] = frozenset()
    by_length: frozenset[float] = frozenset()
    by_layout: bool = False
    concrete_args: Any = None
    changed: tuple[str, ...] = ()
    history: History = History()
    limits: ClassLimits = ClassLimits()


RECORD = "fxprune"  # the key in `meta` of a graph of its one record, of its capture or of its pruning


def captured_of(graph: nn.Module) -> Captured:
    """The record of a graph's capture; an empty one for a graph that was rewritten since."""
    record = getattr(graph, "meta", {}).get(RECORD)
    return record if isinstance(record, Captured) else Captured()


def history_of(model: nn.Module) -> History:
    """How a model was pruned before, where it is a graph that was."""
    record: Any = model.meta.get(RECORD) if isinstance(model, ModelGraph) else None
    return record.history if record else History()


def refitted(model: nn.Module) -> str:
    """What changed the weights of a graph after its channels were removed; empty for other modules."""
    record: Any = model.meta.get(RECORD) if isinstance(model, ModelGraph) else None
    return record.refitted if record else ""


def is_captured(model: nn.Module) -> bool:
    """Whether `model` came from `capture` and was not rewritten since."""
    return isinstance(model, ModelGraph) and isinstance(model.meta.get(RECORD), Captured)


def example_of(graph: ModelGraph) -> Any:
    """The example batch that `graph` was captured with."""
    return captured_of(graph).example


def changed_buffers(graph: ModelGraph) -> list[str]:
    """The names of the buffers whose numbers the forward changes."""
    buffers = dict(graph.named_buffers())
    return [name for name in captured_of(graph).changed if name in buffers]


def flops_of(graph: ModelGraph) -> dict[str, int]:
    """The flops of every node of a captured graph on its whole example; two are one multiply-accumulate."""
    return {node.name: node.meta["flops"] for node in graph.graph.nodes}
