"""Labels for a graph, and the facts that rules state about them."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

import torch
from torch import Tensor, fx

from fxprune.caller.example import TensorSpec
from fxprune.errors import FxpruneError, known_names
from fxprune.rules.context import Context
from fxprune.rules.labels import Labels, Plane, varying_axes
from fxprune.rules.vocabulary import GIVEN_UP, ChannelRead, Comparison, Option, Slot
from fxprune.tracing.checks import Leaves, listed
from fxprune.tracing.graph import ModelGraph, captured_of

Exclude = Leaves
EXCLUDED = "excluded by the caller"
STATISTIC = "takes a statistic over the channels"  # in the reasons that inexact=True lifts


class Collector(Context):
    """Gives out labels and collects the facts that rules state about them."""

    def __init__(
        self, graph: ModelGraph, exclude: Exclude = (), *, inexact: bool = False, head_dim: bool = False,
        query_heads: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(graph)
        self.exclude, self.allow_inexact, self.by_heads = listed(exclude), inexact, not head_dim
        self.query_heads, self.limits = query_heads, captured_of(graph).limits
        self.statistics: list[tuple[Tensor, str, str]] = []
        self.matched: set[int] = set()
        self.modules = dict(graph.named_modules(remove_duplicate=False))
        self.size = 0
        self.ties: list[tuple[Tensor, Tensor, fx.Node]] = []
        self.frozen: list[tuple[Tensor, str]] = []
        self.choices: list[tuple[Sequence[Option], bool]] = []
        self.produced: list[tuple[Tensor, str]] = []
        self.edges: list[ChannelRead] = []
        self.comparisons: list[Comparison] = []
        self.experts: list[Tensor] = []
        self.attended: list[Tensor] = []
        self.told: dict[fx.Node, int] = {}
        self.taken: list[tuple[fx.Node, Tensor, str]] = []
        self.marks: dict[int, int] = {}
        self.balanced: list[tuple[str, ...]] = []
        self.larger: list[tuple[str, str]] = []
        self.slots: dict[Slot, tuple[int, int]] = {}
        self.remembered: dict[tuple[str, str], int] = {}
        self.axes: dict[tuple[str, int, int], tuple[int, ...]] = {}

    def tie(self, a: Tensor, b: Tensor) -> None:
        if a.shape != b.shape:
            torch.broadcast_tensors(a, b)  # an error that names the node, where they do not fit
        self.ties.append((a, b, self.node))

    def freeze(self, labels: Tensor, reason: str) -> None:
        if labels.numel():
            self.frozen.append((labels.reshape(-1), reason))

    def inexact(self, x: Labels, plane: Plane, reason: str) -> None:
        if self.allow_inexact and isinstance(self.spec(), TensorSpec):
            self.statistics.append((plane.core.reshape(-1), self.node.name, reason))
        else:
            self.freeze(plane.core, reason)

    def choose(self, options: Sequence[Option], *, ordered: bool = False) -> None:
        self.choices.append((options, ordered))

    def produce(self, labels: Tensor, site: str) -> None:
        self.produced.append((labels.reshape(-1), site))
        if self.is_excluded(site):
            self.freeze(labels, EXCLUDED)
        elif site in self.limits.held:
            self.freeze(labels, self.limits.held[site])

    def balance(self, *sites: str) -> None:
        if len(sites) > 1 and sites not in self.balanced:
            self.balanced.append(sites)

    def outnumber(self, site: str, other: str) -> None:
        self.larger.append((site, other))

    def edge(self, reading: ChannelRead) -> None:
        self.edges.append(reading)

    def compare(self, comparison: Comparison) -> None:
        self.comparisons.append(comparison)

    def attend(self, labels: Tensor) -> None:
        self.attended.append(labels)

    def choose_by_number(self, labels: Tensor) -> None:
        self.experts.append(labels)

    def described(self, node: fx.Node) -> str:
        """A node, for a message or a reason."""
        self.node = node
        return self.describe()

    def tell_apart(self, expert: Tensor) -> None:
        label = int(expert)
        if self.told.setdefault(self.node, label) != label:
            self.freeze(torch.tensor([label, self.told[self.node]]), f"told apart by number in {self.describe()}")

    def take_out(self, label: Tensor, reason: str) -> None:
        expert = self.marks.get(int(label))
        if expert is not None:
            self.tell_apart(torch.tensor(expert))
        elif self.told:  # it may be a slice of stacked weights
            self.taken.append((self.node, label, reason))
        else:
            self.freeze(label, reason)

    def mark_numbers(self, labels: Tensor, experts: Tensor) -> None:
        self.marks.update(zip(labels.int().tolist(), experts.int().tolist(), strict=True))

    def fresh(self, slot: Slot, size: int) -> Tensor:
        if slot not in self.slots:
            self.slots[slot] = self.size, size
            self.size += size
        start, length = self.slots[slot]
        return torch.arange(start, start + length, dtype=torch.float64)

    def remember(self, what: str, value: int) -> int:
        self.remembered[self.node.name, what] = value
        return value

    def is_given_up(self) -> bool:
        return (self.node.name, GIVEN_UP) in self.remembered

    def slot_axes(self, owner: str, shape: Sequence[int]) -> tuple[int, ...]:
        return tuple(axis for axis, size in enumerate(shape) if size > 1)

    def axes_of(self, tensor: Tensor, output: int, plane: int) -> tuple[int, ...]:
        axes = varying_axes(tensor)
        self.axes[self.node.name, output, plane] = axes
        return axes

    def freeze_excluded(self, node: fx.Node) -> None:
        """Freeze the outputs of a module that the caller excluded."""
        if node.op == "call_module" and self.is_excluded(str(node.target)):
            self.opaque(EXCLUDED, self.env[node])

    def is_excluded(self, path: str) -> bool:
        """Whether the caller excluded the module at a path, or one that holds it."""
        return any(self._matches(index, path) for index in range(len(self.exclude)))

    def _matches(self, index: int, path: str) -> bool:
        """Whether entry `index` of `exclude` names the module at `path` or one that holds it."""
        pattern, parts = self.exclude[index], path.split(".")
        for end in range(1, len(parts) + 1):
            name = ".".join(parts[:end])
            if fnmatchcase(name, pattern) if isinstance(pattern, str) else isinstance(self.modules.get(name), pattern):
                self.matched.add(index)
                return True
        return False

    def check_exclude(self) -> None:
        """Raise where an entry of `exclude` matched no layer."""
        for index, entry in enumerate(self.exclude):
            if index in self.matched or not isinstance(entry, str):
                continue
            if not any(fnmatchcase(name, entry) for name in self.modules):
                kind, names = type(self.graph).__name__, known_names(entry, self.modules)
                raise FxpruneError(
                    f"exclude: no module of {kind} matches {entry!r}{names}; from Python, a class of modules can be "
                    "given, too"
                )
