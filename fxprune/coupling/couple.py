"""Coupling: which channels must be removed together."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from fxprune.caller.arguments import check
from fxprune.caller.example import TensorSpec
from fxprune.caller.isolation import undisturbed
from fxprune.caller.meta import computing, lacking_numbers
from fxprune.coupling.collector import Collector, Exclude
from fxprune.coupling.groups import Coupling, Group
from fxprune.coupling.interpreter import Unknown, named, step
from fxprune.coupling.units import resolve
from fxprune.errors import CaptureError, FxpruneError, UnsupportedOpError, first_line, is_out_of_memory
from fxprune.rules.context import labels_in
from fxprune.rules.table import describe, key_of
from fxprune.rules.vision import register_torchvision
from fxprune.rules.vocabulary import GIVEN_UP
from fxprune.tracing.graph import ModelGraph


def couple(
    graph: ModelGraph,
    *,
    exclude: Exclude = (),
    unknown: Unknown = "error",
    inexact: bool = False,
    head_dim: bool = False,
    query_heads: bool = False,
) -> tuple[Group, ...]:
    """The groups of coupled channels of a captured graph, prunable ones and frozen ones.

    Args:
        graph: what `capture` returned.
        exclude: module names, glob patterns of names, or module types whose outputs are not pruned.
        unknown: "error", or "freeze" to keep all channels that an operation without a rule touches.
        inexact: also remove channels over which a statistic is taken (LayerNorm, say), although it changes.
        head_dim: in attention, remove the same dimensions of every head instead of whole heads.
        query_heads: where several heads of queries share keys and values, remove single heads of queries, the same ones
            of each group, instead of whole groups.

    Raises:
        UnsupportedOpError: an operation has no rule.
        FxpruneError: an entry of `exclude` matches nothing.

    >>> from torch import nn
    >>> from fxprune import capture
    >>> net = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    >>> for group in couple(capture(net, torch.zeros(2, 4))):
    ...     print(group)
    0: 3 units, prunable
      0: 3 of 3 channels
      read by _2
    2: 2 units, frozen: it is the model's output
      2: 2 of 2 channels
    """
    check(couple, locals())
    how: dict[str, Any] = {"inexact": inexact, "head_dim": head_dim, "query_heads": query_heads}
    with undisturbed():
        return analyse(graph, exclude=exclude, unknown=unknown, **how).groups


def analyse(
    graph: ModelGraph,
    *,
    exclude: Exclude = (),
    unknown: Unknown = "error",
    inexact: bool = False,
    head_dim: bool = False,
    query_heads: bool = False,
) -> Coupling:
    """Everything behind `couple`: groups, sites, edges, and the labels that rewriting and verifying need."""
    register_torchvision()
    collector = Collector(graph, exclude, inexact=inexact, head_dim=head_dim, query_heads=query_heads)
    with torch.no_grad(), computing():
        for node in collector.graph.graph.nodes:
            with explained(collector, node):
                collector.env[node] = _value(collector, node, unknown)
            collector.freeze_excluded(node)
    collector.check_exclude()
    with computing():
        return resolve(collector)


def _value(collector: Collector, node: fx.Node, unknown: Unknown) -> Any:
    """The value of a node; where its rule cannot take it, and no error is wanted or needed, as if it had no rule."""
    try:
        return _checked_step(collector, node, unknown)
    except Exception as error:
        is_question = not node.op.startswith("call") or node.target is getattr
        needed = is_question or (unknown == "error" and collector.touches_channels())
        if needed or is_out_of_memory(error) or lacking_numbers(collector.graph):
            raise
    collector.remember(GIVEN_UP, 1)
    return _checked_step(collector, node, "freeze")


def _checked_step(collector: Collector, node: fx.Node, unknown: Unknown) -> Any:
    value = step(collector, node, unknown=unknown)
    if node.op.startswith("call"):
        _check_shapes(value, collector.spec(node))
    return value


def _check_shapes(value: Any, spec: Any) -> None:
    """Raise ValueError where a rule gives other shapes than the model gave on the example."""
    found = [x.shape for x in labels_in(value)]
    wanted = [x.shape for x in pytree.tree_leaves(spec) if isinstance(x, TensorSpec)]
    if wanted and found != wanted:
        raise ValueError(f"it makes shapes {found} of what the model makes {wanted}")


@contextmanager
def explained(collector: Collector, node: fx.Node) -> Iterator[None]:
    """Name the call that a rule cannot take, or the constant without numbers that it needs."""
    try:
        yield
    except FxpruneError:
        raise
    except Exception as error:
        model, name = collector.graph, lacking_numbers(collector.graph)
        if is_out_of_memory(error) or not node.op.startswith("call"):
            raise
        if name is None:
            raise UnsupportedOpError(
                f"the rule for {describe(key_of(node, model))} cannot take {named(node)} "
                f"({type(error).__name__}: {first_line(error)}): spell the call in another way, or register a rule of "
                "your own in its place"
            ) from error
        raise CaptureError(
            f"{collector.describe()} of {type(model).__name__} moves channels by constants without numbers "
            f"({type(error).__name__}: {first_line(error)}): build the buffers and tensors that the forward indexes by "
            "on the CPU; only parameters may be on the meta device"
        ) from error
