"""The weights of chosen experts, where a graph shows no outputs of experts on which these are read one by one."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence

import numpy as np
from torch import fx

from fxprune.caller.arrays import Index
from fxprune.caller.example import TensorSpec
from fxprune.coupling.grids import present_labels
from fxprune.rules.vocabulary import ChannelRead, Comparison
from fxprune.tracing.dependence import name_of


def weights_of(compared: Sequence[Comparison], reads: Sequence[ChannelRead], merged: Index) -> Iterator[ChannelRead]:
    """Reads of the weights of chosen experts, which show how these are used, for experts that nothing else reads.

    `merged` are the classes of tied labels.
    """
    none = np.empty(0, dtype=np.int64)
    known = merged[np.concatenate([none, *(present_labels(read.labels) for read in reads)])]
    routers: dict[bytes, list[Comparison]] = {}
    for choice in compared:
        own = np.unique(merged[present_labels(choice.labels)])
        if not np.isin(own, known).any():
            routers.setdefault(own.tobytes(), []).append(choice)
    for choices in routers.values():
        yield from next(filter(None, (_reads(choice, choices) for choice in choices)), [])


def _reads(choice: Comparison, others: Sequence[Comparison]) -> list[ChannelRead]:
    """The reads of the weights of experts whose numbers a choice gives; others of the same experts may give values."""
    own = choice.consumer
    numbers = own if name_of(own) == "argmax" else _part(own, "indices", 1)
    if numbers is None:
        return []
    values = [_part(other.consumer, "values", 0) for other in others]
    values += [user for user in numbers.users if name_of(user) == "gather"]
    fitting = [node for node in values if node is not None and _shape(node) == _shape(numbers)]
    last = _settled(fitting[0]) if fitting else None
    users = last.users if last is not None else ()
    return [ChannelRead(user.name, last.name, 1, choice.labels, chosen=numbers.name) for user in users if last]


def _part(choice: fx.Node, name: str, place: int) -> fx.Node | None:
    """The node that takes the values, or the numbers, out of the result of a choice."""
    parts = {(operator.getitem, place), (getattr, name)}
    return next((user for user in choice.users if len(user.args) == 2 and (user.target, user.args[1]) in parts), None)


def _settled(values: fx.Node) -> fx.Node:
    """The last of the nodes that turn the values of a choice into weights, one for each, such as a softmax."""
    while True:
        following = [user for user in values.users if _like(user, values)]
        if not following:
            return values
        values = following[-1]


def _like(node: fx.Node, values: fx.Node) -> bool:
    """Whether a node's value has the shape of `values`, and no other input has."""
    spec, own = node.meta["spec"], values.meta["spec"]
    others = [source for source in node.all_input_nodes if source is not values]
    same = isinstance(spec, TensorSpec) and spec.shape == own.shape and spec.dtype.is_floating_point
    return same and all(_shape(other) != own.shape for other in others)


def _shape(node: fx.Node) -> object:
    return getattr(node.meta["spec"], "shape", None)
