"""Why a smaller model is not faster: arithmetic and memory traffic of its nodes, and odd widths of its layers."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, fx
from torch.utils import _pytree as pytree

from fxprune.caller.batches import sample_count
from fxprune.caller.example import TensorSpec
from fxprune.caller.tensors import INDEX
from fxprune.errors import plural
from fxprune.reporting.layers import attribute_of, kind_of
from fxprune.reporting.report import Report
from fxprune.reporting.timings import BatchLatency
from fxprune.reporting.widths import BLOCK, layer_widths, odd_widths
from fxprune.tracing.facts import facts_on
from fxprune.tracing.graph import RECORD, ModelGraph
from fxprune.tracing.settings import example_for

INTENSE = 8  # MACs per byte; processors of all kinds wait for memory at fewer, by a wide margin
SHORT = {"cpu": 20e-6, "cuda": 60e-6}  # seconds per node; in less time, the cost of the call dominates
MUCH = 0.5  # share of the bytes above which memory traffic is a reason
FREE = frozenset({  # give another view of a tensor, and move no bytes
    "view", "reshape", "flatten", "unflatten", "permute", "transpose", "t", "squeeze", "unsqueeze", "expand",
    "expand_as", "chunk", "split", "unbind", "getitem", "getattr", "size", "dim", "select", "narrow", "movedim",
    "detach", "Flatten", "Unflatten", "Identity", "Dropout", "Dropout2d", "dropout", "dropout2d",
})  # fmt: skip


@dataclass(frozen=True, slots=True)
class NodeCost:
    """The MACs of one node and the bytes of its inputs and outputs, both per sample, and the bytes of its weights."""

    kind: str
    macs: float
    activations: float
    weights: int

    def bytes_at(self, batch: int) -> float:
        """The bytes that it reads and writes for one batch."""
        return self.activations * batch + self.weights

    def is_memory_bound(self, batch: int) -> bool:
        """Whether it waits for memory at a batch size."""
        return self.macs * batch < INTENSE * self.bytes_at(batch)


def why_slow(graph: ModelGraph, report: Report, pair: BatchLatency, device: str) -> Iterator[str]:
    """The reasons why a pruned graph is not faster at one batch size, each with its numbers and a remedy."""
    left = report.macs_after / max(report.macs_before, 1)
    if left > 0.9:
        yield f"{left:.0%} of the MACs are left, so there was little to gain: prune more"
    if odd := odd_widths(layer_widths(report)):
        yield f"{odd}, and kernels work in blocks: plan with round_to={BLOCK}"
    nodes = list(node_costs(graph))
    yield from _memory_traffic(nodes, pair.batch_size)
    each = pair.after.median / max(len(nodes), 1)
    if each < SHORT.get(device, SHORT["cuda"]):
        yield (
            f"at batch size {pair.batch_size}, its {len(nodes)} operations take {1e6 * each:.0f} µs each, which is "
            "mostly the cost of calling them: use larger batches, or torch.compile"
        )
    gathers = sum(name.rpartition(".")[2].startswith(INDEX) for name, _ in graph.named_buffers())
    if gathers:
        yield (
            f"{plural(gathers, 'gather')} by index had to be inserted to pick channels: exclude= the layers before them"
        )


def node_costs(graph: ModelGraph) -> Iterator[NodeCost]:
    """The costs of every node of a pruned graph that does more than give another view of a tensor."""
    example = example_for(graph, graph.meta[RECORD].plan.example)
    facts, samples = facts_on(graph, example), sample_count(example)
    for node in graph.graph.nodes:
        kind = kind_of(graph, node)
        if node.op in ("placeholder", "get_attr", "output") or kind in FREE:
            continue
        values = [facts.specs[other.name] for other in (node, *node.all_input_nodes) if other.op != "get_attr"]
        specs = [spec for spec in pytree.tree_leaves(values) if isinstance(spec, TensorSpec)]
        moved = sum(spec.dtype.itemsize * math.prod(spec.shape) for spec in specs)
        weights = sum(tensor.nbytes for tensor in _weights(graph, node))
        yield NodeCost(kind, facts.flops[node.name] / 2 / samples, moved / samples, weights)


def _memory_traffic(nodes: list[NodeCost], batch: int) -> Iterator[str]:
    """The reason where memory-bound nodes move most of the bytes."""
    moved = Counter[str]()
    for node in nodes:
        if node.is_memory_bound(batch):
            moved[node.kind] += round(node.bytes_at(batch))
    whole = sum(node.bytes_at(batch) for node in nodes)
    share = moved.total() / max(whole, 1)
    if share > MUCH:
        kinds = ", ".join(f"{kind} {n / whole:.0%}" for kind, n in moved.most_common(4) if n > 0.005 * whole)
        yield (
            f"at batch size {batch}, {share:.0%} of the bytes are moved by layers with fewer than {INTENSE} MACs a "
            f"byte ({kinds}): memory bounds these, and fewer MACs do not make them faster; fuse them (torch.compile)"
        )


def _weights(graph: ModelGraph, node: fx.Node) -> list[Tensor]:
    """The tensors that a node reads beside activations: those of its module, and attributes of the graph."""
    if node.op == "call_module":
        module = graph.get_submodule(str(node.target))
        return [*module.parameters(), *module.buffers()]
    found = (attribute_of(graph, source) for source in node.all_input_nodes if source.op == "get_attr")
    return [tensor for tensor in found if isinstance(tensor, Tensor)]
