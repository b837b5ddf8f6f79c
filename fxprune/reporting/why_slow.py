"""Why a smaller model is not faster: what its nodes compute and move, and how wide its layers are."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from fxprune.caller.batches import sample_count
from fxprune.caller.example import TensorSpec
from fxprune.caller.tensors import INDEX
from fxprune.reporting.layers import kind_of
from fxprune.reporting.records import BatchLatency
from fxprune.reporting.report import Report
from fxprune.tracing.facts import facts_on
from fxprune.tracing.graph import PRUNED, ModelGraph
from fxprune.tracing.settings import example_for

INTENSE = 8  # multiply-accumulates a byte; below, processors wait for memory, of all kinds and by a wide margin
BLOCK = 8  # channels, in multiples of which kernels work
SHORT = {"cpu": 20e-6, "cuda": 60e-6}  # seconds a node; what is shorter is mostly the cost of calling it
MUCH = 0.5  # the share from which on something is a reason
FREE = frozenset({
    "view", "reshape", "flatten", "unflatten", "permute", "transpose", "t", "squeeze", "unsqueeze", "expand",
    "expand_as", "chunk", "split", "unbind", "getitem", "getattr", "size", "dim", "select", "narrow", "movedim",
    "detach", "Flatten", "Unflatten", "Identity", "Dropout", "Dropout2d", "dropout", "dropout2d",
})  # fmt: skip


@dataclass(frozen=True, slots=True)
class Work:
    """What one node computes and moves a sample: multiply-accumulates, and bytes of activations; and of its weights."""

    kind: str
    macs: float
    moved: float
    weights: int

    def bytes_at(self, batch: int) -> float:
        """The bytes that it reads and writes for one batch."""
        return self.moved * batch + self.weights

    def waits(self, batch: int) -> bool:
        """Whether memory is what bounds it."""
        return self.macs * batch < INTENSE * self.bytes_at(batch)


def why_slow(graph: ModelGraph, report: Report, pair: BatchLatency, device: str) -> Iterator[str]:
    """The reasons why a pruned graph is not faster at one batch size, each with its numbers and a remedy."""
    left = report.macs_after / max(report.macs_before, 1)
    if left > 0.9:
        yield f"{left:.0%} of the MACs are left, so there was little to gain: prune more"
    yield from _odd(report)
    works = list(work_of(graph))
    yield from _waiting(works, pair.batch_size)
    yield from _short(len(works), pair, device)
    gathers = sum(name.rpartition(".")[2].startswith(INDEX) for name, _ in graph.named_buffers())
    if gathers:
        yield f"{gathers} gathers by index were put in where channels had to be picked: exclude= the layers they follow"


def work_of(graph: ModelGraph) -> Iterator[Work]:
    """What every node of a pruned graph computes and moves, but for those that only give another view of a tensor."""
    example = example_for(graph, graph.meta[PRUNED].plan.example)
    facts, samples = facts_on(graph, example), sample_count(example)
    for node in graph.graph.nodes:
        kind = kind_of(graph, node)
        if node.op in ("placeholder", "get_attr", "output") or kind in FREE:
            continue
        values = [facts.specs[other.name] for other in (node, *node.all_input_nodes) if other.op != "get_attr"]
        moved = sum(_bytes(spec) for spec in pytree.tree_leaves(values) if isinstance(spec, TensorSpec))
        yield Work(
            kind, facts.flops[node.name] / 2 / samples, moved / samples, sum(t.nbytes for t in _weights(graph, node))
        )


def _odd(report: Report) -> Iterator[str]:
    """A word on narrowed layers whose width is no multiple of a block."""
    sites = {name: after for group in report.groups for name, (before, after) in group.sites.items() if after < before}
    odd = [f"{name} {after}" for name, after in sites.items() if after % BLOCK]
    if odd:
        named = ", ".join(odd[:3]) + (", ..." if len(odd) > 3 else "")
        yield (
            f"{len(odd)} of {len(sites)} narrowed layers have a width that is no multiple of {BLOCK} ({named}), and "
            f"kernels work in blocks: plan with round_to={BLOCK}"
        )


def _waiting(works: list[Work], batch: int) -> Iterator[str]:
    """A word on the nodes that wait for memory, where these move most of the bytes."""
    moved = Counter[str]()
    for work in works:
        if work.waits(batch):
            moved[work.kind] += round(work.bytes_at(batch))
    whole = sum(work.bytes_at(batch) for work in works)
    share = moved.total() / max(whole, 1)
    if share > MUCH:
        kinds = ", ".join(f"{kind} {n / whole:.0%}" for kind, n in moved.most_common(4) if n > 0.005 * whole)
        yield (
            f"at batch size {batch}, {share:.0%} of the bytes are moved by layers with fewer than {INTENSE} MACs a "
            f"byte ({kinds}): memory bounds these, and fewer MACs do not make them faster; fuse them (torch.compile)"
        )


def _short(nodes: int, pair: BatchLatency, device: str) -> Iterator[str]:
    """A word on the cost of calling nodes, where they take hardly longer than that."""
    each = pair.after.median / max(nodes, 1)
    if each < SHORT.get(device, SHORT["cuda"]):
        yield (
            f"at batch size {pair.batch_size}, its {nodes} operations take {1e6 * each:.0f} µs each, which is mostly "
            "the cost of calling them: use larger batches, or torch.compile"
        )


def _bytes(spec: TensorSpec) -> int:
    count = spec.dtype.itemsize
    for size in spec.shape:
        count *= size
    return count


def _weights(graph: ModelGraph, node: fx.Node) -> list[Tensor]:
    """The tensors that a node reads beside activations: those of its module, and attributes of the graph."""
    if node.op == "call_module":
        module: nn.Module = graph.get_submodule(str(node.target))
        return [*module.parameters(), *module.buffers()]
    sources = (str(other.target) for other in node.all_input_nodes if other.op == "get_attr")
    found = (_held(graph, path) for path in sources)
    return [tensor for tensor in found if isinstance(tensor, Tensor)]


def _held(graph: ModelGraph, path: str) -> object:
    owner, _, leaf = path.rpartition(".")
    return getattr(graph.get_submodule(owner), leaf, None)
