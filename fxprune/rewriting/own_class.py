"""A pruned model in the caller's own class, where the forward runs with the narrower layers."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from fxprune.caller.arguments import check
from fxprune.caller.computed_weights import computed_tensors, make_permanent
from fxprune.caller.example import as_call, as_fields, copied
from fxprune.caller.isolation import applied, isolated_copy, undisturbed
from fxprune.caller.meta import need_numbers
from fxprune.caller.source_lines import users_frames
from fxprune.caller.tensors import held_tensors, named_tensors, put, without_place
from fxprune.errors import FxpruneError, NarrowError, a_kind, is_out_of_memory, stage, summary
from fxprune.planning.plan import Plan
from fxprune.planning.planned import Planned, planned_by
from fxprune.rewriting.named_sizes import (
    Calls,
    Comparisons,
    Use,
    set_sizes,
    sets_of_pieces,
    solved,
    unsolved,
    with_named_sizes,
)
from fxprune.rewriting.node_mending import is_inserted
from fxprune.rewriting.other_forwards import mend_other_forwards
from fxprune.rewriting.proof import outputs_of
from fxprune.rewriting.remaining import MismatchError
from fxprune.rewriting.removed_branches import compared_without, removed_residuals
from fxprune.rewriting.rewrite import check_labels, rewrite
from fxprune.rewriting.shorter_lists import removed_blocks, removed_entries, renaming, shorten
from fxprune.tracing.agreement import TOLERANCES, relative_error
from fxprune.tracing.capture import capture_as
from fxprune.tracing.graph import ModelGraph, example_of, history_of, plain_attributes
from fxprune.tracing.part import part_of, with_part
from fxprune.tracing.rounding import error_in_double, jumps

_REMEDY = "use fxprune.apply, whose graph mends that, or exclude the layers that feed it"


def narrow(model: nn.Module, plan: Plan, *, weights: nn.Module | None = None) -> nn.Module:
    """A deep copy of `model`, of its own class, whose layers are narrowed by `plan`.

    Layers, tensors, and integer attributes that name widths change (`self.num_heads`, `self.split_size`), but no code:
    it works where the forward reads sizes from its tensors, from attributes of its modules, or leaves them to the
    layers. The copy is captured anew; the labels of every node have to be the kept ones of the original, and the output
    has to equal that of `apply`. Forward hooks are copied, with the variables that they close over; weights that
    `torch.nn.utils.prune` or the old `weight_norm` and `spectral_norm` compute become parameters.

    Args:
        model: the model that the plan is for; it is not changed.
        plan: from `Scores.plan`.
        weights: a model that `apply` or `compress` made by this plan, whose weights to take: a compensated or a
            fine-tuned one. Biases that compensation created are created.

    Raises:
        PlanError: the plan does not fit the model.
        NarrowError: the forward names sizes or places of channels; the message has the line. `apply` works.

    >>> model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    >>> narrow(model, Plan({"0": (0, 2)}, {"0": 3}, {"tensor": [2, 4], "dtype": "float32"}))
    Sequential(
      (0): Linear(in_features=4, out_features=2, bias=True)
      (1): ReLU()
      (2): Linear(in_features=2, out_features=2, bias=True)
    )
    """
    check(narrow, locals())
    part = part_of(model, plan.submodule)
    check_no_graph(part)
    need_numbers(model, "narrow", NarrowError)
    with stage("narrowing"), undisturbed():
        given = weights and part_of(weights, plan.submodule)
        return with_part(model, plan.submodule, narrowed(part, plan, planned_by(model, plan), given))


def check_no_graph(part: nn.Module) -> None:
    """Raise NarrowError where a module is a graph."""
    if isinstance(part, ModelGraph):
        raise NarrowError(f"{type(part).__name__} is a graph already, with no forward of its own: use fxprune.apply")


def narrowed(part: nn.Module, plan: Plan, planned: Planned, weights: nn.Module | None) -> nn.Module:
    """`narrow` for a part whose graph and kept units are known; `weights` is a graph that the plan made of it."""
    attempt = Attempt(part, plan.settings, planned.graph)
    own, _ = attempt.narrowed(planned)
    if not removed_blocks(plan):
        own = mend_other_forwards(part, own, plan, planned.graph)
    if weights is not None:
        _take(attempt, own, weights, plan)
    return own


class UnfitError(NarrowError):
    """A class does not run narrower.

    `nodes` are those of the graph that its code does not follow, where they are known. `even` are sets among them:
    the code can follow a set if all pieces that its nodes make are of one size.
    """

    def __init__(self, message: str, nodes: Collection[str] = (), even: Iterable[Collection[str]] = ()) -> None:
        super().__init__(message)
        self.nodes, self.even = tuple(nodes), tuple(map(tuple, even))


class Attempt:
    """The narrowing of a module in its own class, for any kept units of its graph."""

    def __init__(self, part: nn.Module, settings: Mapping[str, Any], graph: ModelGraph) -> None:
        check_no_graph(part)
        if computed_tensors(part):
            part = isolated_copy(part)
            make_permanent(part)
        self.part, self.settings, self.graph = part, settings, graph

    @cached_property
    def named(self) -> ModelGraph | None:
        """The graph with the names of its sizes; None where the module is not traced with them in the same way."""
        try:
            named = self._captured(with_named_sizes(self.part))
        except FxpruneError:
            return None
        same = [node.name for node in named.graph.nodes] == [node.name for node in self.graph.graph.nodes]
        return named if same else None

    def _captured(self, own: nn.Module, *, prove: bool = False) -> ModelGraph:
        return capture_as(self.settings, own, example_of(self.graph), prove=prove)

    def narrowed(self, planned: Planned, *, labels: bool = True, prove: bool = True) -> tuple[nn.Module, ModelGraph]:
        """The narrowed module, compared with the rewritten graph by outputs, and by `labels`, and that graph.

        Raises RewriteError, and UnfitError where the module is not equal to the graph.
        """
        small = rewrite(*planned)
        if comparing := compared_without(planned.coupling, planned.keep):
            line = " ".join(str(self._node(comparing[0]).stack_trace or "").split())
            raise UnfitError(
                f"{type(self.part).__name__} does not run as its own class with the kept layers: its forward goes "
                f"through all experts, some of which are removed ({line}): {_REMEDY}", comparing,
            )  # fmt: skip
        lists = removed_entries(planned)
        if lists is None:
            single = removed_residuals(planned.coupling, planned.keep)[0].total
            raise UnfitError(
                f"{type(self.part).__name__} does not run as its own class with the kept layers: its forward calls the "
                f"branch that {single} added, which is removed alone: {_REMEDY}; own_class=True removes whole blocks",
                [single],
            )
        own = self._with_tensors(small)
        mended = _mended(self.graph, small)
        calls = Calls(self.named, small) if mended and self.named else None
        uses = calls.uses() if calls else []
        set_sizes(own, values := solved(uses))
        if compared := self._compared(own):
            set_sizes(own, values := solved([*uses, *compared]))
        shorten(own, lists)
        try:
            if labels and not lists:
                check_labels(self._captured(own, prove=prove), planned.coupling, planned.keep, self.graph)
            compare(own, small, example_of(self.graph))
            if self.trained is not None and _shapes_in_training(own, self.graph) != self.trained:
                raise NarrowError("in training mode, it does not give outputs of the original's shapes")
        except Exception as error:
            if is_out_of_memory(error):
                raise
            if lists:  # whatever else failed is found without removed blocks
                raise UnfitError(_blamed(own, self.graph, [], summary(error))) from error
            missed = unsolved(uses, values)
            odd = {node.name for node in mended if not (calls and calls.are_named(node.name))}
            odd |= {use.node for use in missed}
            found = [node for node in mended if node.name in odd]
            nodes = odd or _at_failure(self.graph, error)
            even = sets_of_pieces(found, uses, missed)
            raise UnfitError(_blamed(own, self.graph, found or mended, summary(error)), nodes, even) from error
        return own, small

    @cached_property
    def trained(self) -> list[torch.Size] | None:
        """The shapes of the module's outputs in training mode; None where it does not run on the example alone."""
        try:
            return _shapes_in_training(self.part, self.graph)
        except Exception as error:
            if is_out_of_memory(error):
                raise
            return None

    @cached_property
    def comparisons(self) -> Comparisons:
        """The comparisons of integer attributes in the forward."""
        with (found := Comparisons()).noted():
            outputs_of(with_named_sizes(self.part), example_of(self.graph))
        return found

    def _compared(self, own: nn.Module) -> list[Use]:
        """The numbers that integer attributes have to equal in the forward of a narrowed module, by the original's."""
        if not self.comparisons.ended:
            return []
        with (found := Comparisons(self.comparisons)).noted(), suppress(Exception):  # what fails is told by the proof
            outputs_of(with_named_sizes(own), example_of(self.graph))
        return found.uses

    def _with_tensors(self, small: ModelGraph) -> nn.Module:
        """A copy of the module with the tensors of `small`, and the settings of its layers."""
        new, instead = named_tensors(small), dict[int, object]()
        for name, module, held in held_tensors(self.part):
            if name in new:
                if type(module) is nn.MultiheadAttention and new[name].shape != held.shape:
                    raise UnfitError(_of_attention(path := name.rpartition(".")[0], module), self._nodes_of(path))
                instead[id(held)] = new[name]
        own = isolated_copy(self.part, instead)
        kept = dict(small.named_modules(remove_duplicate=False))
        for path, module in own.named_modules():
            if path and path in kept:
                before, after = (plain_attributes(graph.get_submodule(path)) for graph in (self.graph, small))
                vars(module).update({k: value for k, value in after.items() if k in before and before[k] != value})
                if isinstance(module, nn.RNNBase):
                    module._init_flat_weights()
        return own

    def _node(self, name: str) -> fx.Node:
        """A node of the graph, by its name."""
        found: fx.Node = next(node for node in self.graph.graph.nodes if node.name == name)
        return found

    def _nodes_of(self, path: str) -> list[str]:
        """The nodes that use the tensors of a module."""
        reads = [node for node in self.graph.graph.nodes if node.op == "get_attr"]
        return [user.name for node in reads if str(node.target).startswith(f"{path}.") for user in node.users]


def compare(own: nn.Module, other: nn.Module, example: Any) -> None:
    """Raise NarrowError where the outputs of a narrowed module differ on a batch from those of a rewritten graph."""
    wanted = outputs_of(other, example)
    error = relative_error(wanted, outputs_of(own, example))
    limit = max((TOLERANCES[t.dtype] for t in wanted), default=0.0)
    if not error <= limit and jumps(outputs_of, other, example):
        error = error_in_double(outputs_of, other, own, example)
    if not error <= limit:
        raise NarrowError(
            f"its outputs differ from those of apply by {error:.3g} of their scale, more than {limit:.3g}"
        )


def _shapes_in_training(module: nn.Module, graph: ModelGraph) -> list[torch.Size]:
    """The shapes of a module's outputs in training mode on the example of its graph; the module is unchanged."""
    own = isolated_copy(module)
    args, kwargs = as_call(copied(example_of(graph)))
    with torch.no_grad():
        output = applied(own, "train")(*args, **kwargs)
    return [leaf.shape for leaf in pytree.tree_leaves(as_fields(output)) if isinstance(leaf, Tensor)]


def _of_attention(path: str, module: nn.MultiheadAttention) -> str:
    return (
        f"{path or 'the model'} is an nn.MultiheadAttention of {module.num_heads} heads, some of which are removed: "
        f"its class computes embed_dim = heads x head_dim and cannot have fewer; {_REMEDY}"
    )


def _at_failure(graph: ModelGraph, error: BaseException) -> list[str]:
    """The nodes of the line and the module at which an error was raised, or the one whose labels differ."""
    if isinstance(error, MismatchError) and error.node is not None:
        return [error.node]
    frames = users_frames(error)
    modules = [frame.f_locals["self"] for frame, _ in frames if isinstance(frame.f_locals.get("self"), nn.Module)]
    if not modules:
        return []
    frame, number = frames[-1]
    line, path = f'File "{frame.f_code.co_filename}", line {number},', _path_in(modules[0], modules[-1])
    nodes = [node for node in graph.graph.nodes if line in str(node.stack_trace)]
    return [node.name for node in nodes if path == _module_of(node)]


def _module_of(node: fx.Node) -> str:
    """The path of the module whose forward makes a node."""
    inside = [path for path, _ in (node.meta.get("nn_module_stack") or {}).values()]
    return inside[-1 - (node.op == "call_module")] if len(inside) > (node.op == "call_module") else ""


def _path_in(model: nn.Module, module: nn.Module) -> str | None:
    """The path of a module in a model that holds it."""
    return next((path for path, inner in model.named_modules() if inner is module), None)


def _blamed(own: nn.Module, graph: ModelGraph, found: Sequence[fx.Node], why: str) -> str:
    """The message: the first node that `apply` mended, its line in the forward, and the failure without that."""
    if not found:
        return f"{type(own).__name__} does not run as its own class with the kept layers ({why}): {_REMEDY}"
    node, place = found[0], found[0].name
    line = " ".join(str(node.stack_trace or "").split())
    if node.op == "call_module":
        place = f"{node.target}, {a_kind(graph.get_submodule(str(node.target)))}"
        line = line if "in forward" in line else ""  # a container calls its layers in no line of the user's
    others = f" and {len(found) - 1} more" if len(found) > 1 else ""
    return (
        f"{type(own).__name__} does not run as its own class with the kept layers: its forward names sizes or "
        f"places of channels at {place}{others}, which apply mends{f' ({line})' if line else ''}: {_REMEDY}. "
        f"Without that: {why}"
    )


def _mended(graph: ModelGraph, small: ModelGraph) -> list[fx.Node]:
    """The nodes of `graph` that rewriting gave other arguments, or put a gather in front of."""
    known = {str(node.target) for node in graph.graph.nodes if node.op == "get_attr"}
    known |= {node.name for node in graph.graph.nodes}
    after = {node.name: node for node in small.graph.nodes}
    pairs = [(node, after[node.name]) for node in graph.graph.nodes if node.name in after]
    return [
        old
        for old, new in pairs
        if _call(old) != _call(new) or any(is_inserted(source, known) for source in new.all_input_nodes)
    ]


def _call(node: fx.Node) -> str:
    return re.sub(r"\[num_users=\d+\]", "", node.format_node() or "")


def _take(attempt: Attempt, own: nn.Module, given: nn.Module, plan: Plan) -> None:
    """Put the weights of a graph that was made by the same plan into a narrowed module, and compare the two."""
    made_by = history_of(given).plans
    if not isinstance(given, ModelGraph) or not made_by or dict(made_by[-1].keep) != dict(plan.keep):
        raise NarrowError(
            f"weights is {a_kind(given)} that was not made by this plan: give what apply or compress "
            "made of the model by it"
        )
    rename = renaming(removed_blocks(plan))
    tensors = {rename(name): tensor for name, tensor in named_tensors(given).items()}
    needed = {rename(name) for name in (*dict(given.named_parameters()), *given.state_dict())}
    have = named_tensors(own)
    if missing := without_place(own, [name for name in tensors if name in needed and name not in have]):
        raise NarrowError(f"weights has {missing[0]}, which {type(own).__name__} has no place for: {_REMEDY}")
    for name, tensor in tensors.items():
        if name in have and have[name].shape != tensor.shape:
            raise NarrowError(
                f"weights has {name} of shape {tuple(tensor.shape)}, and that of {type(own).__name__} is "
                f"{tuple(have[name].shape)}: give the model that was pruned"
            )
        if name in have or name in needed:
            put(own, name, tensor)
    compare(own, given, example_of(attempt.graph))
