"""A pruned model in the caller's own class, where the forward runs unchanged with the narrower layers."""

from __future__ import annotations

import re
from typing import Any

from torch import fx, nn

from fxprune.caller.arguments import check
from fxprune.caller.computed_weights import computed_tensors, make_permanent
from fxprune.caller.isolation import isolated_copy, undisturbed
from fxprune.caller.meta import need_numbers
from fxprune.caller.tensors import named_tensors, put, without_place
from fxprune.errors import NarrowError, a_kind, summary
from fxprune.planning.plan import Plan
from fxprune.recovery.candidates import rewritten
from fxprune.reporting.report import pruned_of
from fxprune.rewriting.node_mending import is_inserted
from fxprune.rewriting.proof import outputs_of, relative_error
from fxprune.rewriting.rewrite import check_labels
from fxprune.saving.rebuild import held_tensors
from fxprune.tracing.agreement import TOLERANCES
from fxprune.tracing.capture import capture_as
from fxprune.tracing.graph import ModelGraph, example_of, plain_attributes
from fxprune.tracing.part import part_of, with_part

_REMEDY = "use fxprune.apply, whose graph mends that, or exclude the layers that feed it"


def narrow(model: nn.Module, plan: Plan, *, weights: nn.Module | None = None) -> nn.Module:
    """A deep copy of `model`, of its own class, whose layers are narrowed by `plan`.

    Only layers and tensors change, no code: it works where the forward reads sizes from its tensors, or leaves them to
    the layers. The copy is captured anew; the labels of every node have to be the kept ones of the original, and the
    output has to equal that of `apply`. Forward hooks are copied, with the variables that they close over; weights that
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
    if isinstance(part, ModelGraph):
        raise NarrowError(f"{type(part).__name__} is a graph already, with no forward of its own: use fxprune.apply")
    need_numbers(model, "narrow", NarrowError)
    if computed_tensors(part):
        part = isolated_copy(part)
        make_permanent(part)
    small, planned = rewritten(model, plan)
    with undisturbed():
        pruned: Any = part_of(small, plan.submodule)
        own = _narrowed(part, planned.graph, pruned)
        example: Any = example_of(planned.graph)
        try:
            check_labels(capture_as(plan.settings, own, example), planned.coupling, planned.keep, planned.graph)
        except Exception as error:
            raise NarrowError(_blamed(own, planned.graph, pruned, summary(error))) from error
        _compare(own, pruned, example, planned.graph, pruned)
        if weights is not None:
            _take(own, weights, planned.graph, pruned, plan)
        return with_part(model, plan.submodule, own)


def _narrowed(part: nn.Module, graph: ModelGraph, small: ModelGraph) -> nn.Module:
    """A copy of a model with the tensors of `small`, and with the settings of layers that differ from `graph`."""
    new = named_tensors(small)
    instead: dict[int, object] = {}
    for name, module, held in held_tensors(part):
        if name in new:
            if type(module) is nn.MultiheadAttention and new[name].shape != held.shape:
                path = name.rpartition(".")[0] or "the model"
                raise NarrowError(
                    f"{path} is an nn.MultiheadAttention of {module.num_heads} heads, some of which are removed: its "
                    f"class computes embed_dim = heads x head_dim and cannot have fewer; {_REMEDY}"
                )
            instead[id(held)] = new[name]
    own = isolated_copy(part, instead)
    for path, module in own.named_modules():
        if path:
            before, after = plain_attributes(graph.get_submodule(path)), plain_attributes(small.get_submodule(path))
            vars(module).update({k: value for k, value in after.items() if k in before and before[k] != value})
            if isinstance(module, nn.RNNBase):
                module._init_flat_weights()
    return own


def _compare(own: nn.Module, other: ModelGraph, example: Any, graph: ModelGraph, small: ModelGraph) -> None:
    """Raise NarrowError where the outputs of a narrowed copy differ from those of a rewritten graph."""
    wanted = outputs_of(other, example)
    try:
        found = outputs_of(own, example)
    except Exception as failure:
        raise NarrowError(_blamed(own, graph, small, summary(failure))) from failure
    error = relative_error(wanted, found)
    limit = max((TOLERANCES[t.dtype] for t in wanted), default=0.0)
    if not error <= limit:
        why = f"its outputs differ from those of apply by {error:.3g} of their scale, more than {limit:.3g}"
        raise NarrowError(_blamed(own, graph, small, why))


def _blamed(own: nn.Module, graph: ModelGraph, small: ModelGraph, why: str) -> str:
    """The message: the first node that `apply` mended, its line in the forward, and the failure without that."""
    found = _mended(graph, small)
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


def _take(own: nn.Module, weights: nn.Module, graph: ModelGraph, pruned: ModelGraph, plan: Plan) -> None:
    """Put the weights of a model that was made by the same plan into a narrowed copy, and compare the two."""
    given = part_of(weights, plan.submodule)
    made_by = pruned_of(given)
    if not isinstance(given, ModelGraph) or made_by is None or dict(made_by.plan.keep) != dict(plan.keep):
        raise NarrowError(
            f"weights is {a_kind(weights)} that was not made by this plan: give what apply or compress "
            "made of the model by it"
        )
    tensors = named_tensors(given)
    needed = {name for name, _ in given.named_parameters()} | set(given.state_dict())
    have = named_tensors(own)
    if missing := without_place(own, [name for name in tensors if name in needed and name not in have]):
        raise NarrowError(f"weights has {missing[0]}, which {type(own).__name__} has no place for: {_REMEDY}")
    for name in tensors:
        if name in have or name in needed:
            put(own, name, tensors[name])
    _compare(own, given, example_of(graph), graph, pruned)
