"""What in a trace depends on the values of the inputs, and by which of their sizes its Python decides."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from fxprune.caller.meta import META, has_numbers
from fxprune.caller.source_lines import deciding_line, users_frame
from fxprune.tracing.in_place import written

_FACTORIES = (
    "zeros", "ones", "full", "empty", "arange", "range", "linspace", "logspace", "rand", "randn", "randint", "randperm",
    "tensor", "as_tensor", "scalar_tensor", "eye", "tril_indices", "triu_indices", "normal", "hann_window",
)  # fmt: skip
MAKING = frozenset(getattr(torch, name) for name in _FACTORIES)
_ABOUT_SIZES = frozenset({
    "shape", "dtype", "device", "is_cuda", "requires_grad", "layout", "itemsize", "nbytes", "is_sparse", "is_nested",
    "size", "numel", "nelement", "stride", "is_contiguous", "is_floating_point", "is_complex", "element_size", "len",
    "get_device", "storage_offset", "is_inference", "type", "zeros_like", "ones_like", "empty_like", "new_zeros",
    "new_ones", "new_empty", "new_full", "is_quantized",
})  # fmt: skip
_SIZES = frozenset({"shape", "size", "numel", "nelement", "len", "nbytes"})
_SIZED_BY_VALUES = frozenset({
    "nonzero", "argwhere", "unique", "unique_consecutive", "_unique2", "_return_output", "_return_inverse",
    "_return_counts", "_consecutive_return_output", "_consecutive_return_inverse", "_consecutive_return_counts",
    "masked_select", "bincount", "repeat_interleave", "histc", "combinations", "nonzero_static",
})  # fmt: skip
_SIZED_AS_FIRST = frozenset({
    "index_add", "index_copy", "index_fill", "index_put", "scatter", "scatter_add", "scatter_reduce", "masked_fill",
    "masked_scatter", "setitem", "index_reduce", "slice_scatter", "select_scatter",
})  # fmt: skip
_SIZED_BY_NUMBERS = frozenset({
    "getitem", "narrow", "view", "reshape", "expand", "repeat", "tile", "unflatten", "split", "chunk", "new_zeros",
    "new_ones", "new_full", "new_empty",
})  # fmt: skip
_DRAWN = frozenset({
    "rand", "randn", "randint", "randperm", "normal", "bernoulli", "multinomial", "poisson", "rand_like", "randn_like",
    "randint_like", "uniform_", "normal_", "random_", "bernoulli_", "exponential_",
})  # fmt: skip
_COMPARISONS = frozenset({operator.lt, operator.le, operator.eq, operator.ne, operator.gt, operator.ge})
_ON_LAYOUT = frozenset({"is_contiguous", "stride", "view"})
PIECES = frozenset({"split", "chunk", "unbind", "tensor_split", "split_with_sizes", "tolist"})
_LARGEST = 1 << 24  # the largest number that is tried where a forward compares a size with it


class Dependence:
    """What depends on the values of the inputs, and on their sizes, among the nodes of a trace.

    `values` are those of all nodes on the example, kept by the tracer. `values_of` are the nodes whose values depend on
    those of the inputs, not only on their sizes, and `sizes_of` those whose sizes do, too. `by_batch`, `by_length` and
    `by_layout` are those of `Captured`.
    """

    def __init__(self, values: dict[fx.Node, Any]) -> None:
        self.values = values
        self.values_of: set[fx.Node] = set()
        self.sizes_of: set[fx.Node] = set()
        self.stored: dict[int, list[fx.Node]] = {}  # the nodes whose tensors share a storage
        self.by_batch: set[float] = set()
        self.by_length: set[float] = set()
        self.by_layout = False

    def note(self, node: fx.Node) -> None:
        """Note what a new node depends on, and what its Python decides by where it compares sizes."""
        self._note_dependence(node)
        self._note_comparison(node)

    def _note_dependence(self, node: fx.Node) -> None:
        """Note whether the value of a node, and its sizes, depend on the values of the inputs."""
        name = name_of(node)
        for tensor in tensors_of(self.values[node]):
            if has_numbers(tensor) and tensor.layout is torch.strided:
                self.stored.setdefault(tensor.untyped_storage().data_ptr(), []).append(node)
        if self._has_dependent_sizes(node, name):
            self.sizes_of.add(node)
        into = list(written(node.target, node.args, node.kwargs))
        if into and into[0] is node.all_input_nodes[0]:
            self._forget(node)
        read = self.sizes_of if name in _SIZES else self.values_of
        known = name in _ABOUT_SIZES and name not in _SIZES
        if node.op != "placeholder" and name not in _DRAWN and (known or not read.intersection(node.all_input_nodes)):
            return
        self.values_of.update((node, *into))
        for tensor in (tensor for other in into for tensor in tensors_of(self.values[other])):
            if has_numbers(tensor) and tensor.layout is torch.strided:
                self.values_of.update(self.stored.get(tensor.untyped_storage().data_ptr(), ()))

    def _has_dependent_sizes(self, node: fx.Node, name: str) -> bool:
        """Whether the sizes of a node's tensors, or its length, depend on the values of the inputs."""
        read, value = node.all_input_nodes, self.values[node]
        tensors = [tensor for tensor in tensors_of(value) if tensor.ndim]
        if node.op == "placeholder" or not read or not (tensors or name == "tolist"):
            return False
        if self.sizes_of.intersection(read[:1] if name.rstrip("_") in _SIZED_AS_FIRST else read):
            return True
        dependent = [other for other in read if other in self.values_of]
        if name == "getitem":
            masks = (self.values[other] for other in dependent if other is not node.args[0])
            if any(isinstance(mask, Tensor) and mask.dtype in (torch.bool, torch.uint8) for mask in masks):
                return True
        if name in _SIZED_BY_NUMBERS or node.target in MAKING:
            return any(type(self.values[other]) is int for other in dependent)
        if name == "where":
            return bool(dependent) and len(node.args) + len(node.kwargs) == 1
        if name == "repeat_interleave":
            return any(other is not read[0] for other in dependent)
        return bool(dependent) and name in _SIZED_BY_VALUES

    def _note_comparison(self, node: fx.Node) -> None:
        """Note by what a comparison of sizes is decided, and questions about how tensors lie in memory."""
        self.by_layout |= name_of(node) in _ON_LAYOUT
        if node.target in _COMPARISONS and isinstance(self.values[node], bool) and node not in self.values_of:
            pair = [self.values[arg] if isinstance(arg, fx.Node) else arg for arg in node.args]
            one, other = (value if isinstance(value, tuple) else (value,) for value in pair)
            known = (int, float)
            ratios = [
                b / a
                for a, b in zip(one, other, strict=False)
                if isinstance(a, known) and isinstance(b, known) and a > 0 < b
            ]
            self.decided_by_size(node, *ratios, *(1 / ratio for ratio in ratios))

    def decided_by_size(self, node: fx.Node, *ratios: float) -> None:
        """Note that Python decides by a size, unless it only asserts something of it."""
        frame = users_frame()
        if frame is None or deciding_line(frame):
            beside = {1.0, *(ratio for ratio in ratios if 1 / _LARGEST < ratio < _LARGEST)}
            first, others = self._axes_of(node)
            self.by_batch |= beside if first else set()
            self.by_length |= beside if others else set()

    def _axes_of(self, node: fx.Node) -> tuple[bool, bool]:
        """Whether a number follows from the length of a first axis, and whether from that of another one."""
        first, others, sources, seen = False, False, [node], set[fx.Node]()
        while sources:
            source = sources.pop()
            seen.add(source)
            name, index = name_of(source), source.args[-1] if source.args else None
            of_shape = name == "getitem" and isinstance(self.values[source.args[0]], torch.Size)  # type: ignore[index]
            if isinstance(index, int) and (of_shape or name == "size"):
                first, others = first or index == 0, others or index != 0
            elif name in _SIZES or name in PIECES:
                return True, True
            else:
                sources += {node for node in source.all_input_nodes if node not in self.values_of} - seen
        return first, others

    def _forget(self, node: fx.Node) -> None:
        """Drop the numbers of the value that a node writes into, where the values that it writes have none."""
        written, *others = node.all_input_nodes
        if any(not has_numbers(t) for other in others for t in tensors_of(self.values[other])):
            self.values[written] = pytree.tree_map_only(Tensor, lambda t: t.to(META), self.values[written])


def name_of(node: fx.Node) -> str:
    """The name of the function, method or attribute of a node."""
    return str(node.args[1] if node.target is getattr else getattr(node.target, "__name__", node.target))


def tensors_of(value: Any) -> list[Tensor]:
    """The tensors in a value, in nested containers too."""
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]
