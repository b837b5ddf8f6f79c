"""The report of a pruned model, and the record that carries it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from os import PathLike
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from fxprune.caller.arguments import check, is_number, shown
from fxprune.caller.files import replacing
from fxprune.caller.isolation import evaluating
from fxprune.errors import CalibrationError, FxpruneError, blaming
from fxprune.planning.plan import Plan
from fxprune.reporting.comparison import Comparison, compared
from fxprune.reporting.records import Evaluation, ReportRecord
from fxprune.reporting.tables import brief, printed, tables
from fxprune.tracing.graph import RECORD, History, Record

Evaluate = Callable[[nn.Module], float]


@dataclass(frozen=True, slots=True)
class Report(ReportRecord):
    """A `ReportRecord` that prints as tables, on a terminal or as a page."""

    def to_html(self, path: str | PathLike[str]) -> None:
        """Write the report as one HTML page that loads nothing: no network, no other file.

        The file appears whole or not at all. Raises FxpruneError where it cannot be written.
        """
        from fxprune.reporting.html.page import page  # jinja2 is for pages only

        with replacing(path, FxpruneError) as unfinished:
            unfinished.write_text(page(self), encoding="utf-8")

    def compare(self, other: Report) -> Comparison:
        """This report beside another, such as that of another plan for the same model; it prints as a table."""
        return compared(self, other)

    def __str__(self) -> str:
        return printed(self)

    def __repr__(self) -> str:
        return brief(self)

    def _repr_html_(self) -> str:
        from fxprune.reporting.html.notebook import summary_table

        return summary_table(self)

    def __rich_console__(self, console: Console, options: Any) -> Any:
        yield from tables(self)


@dataclass(frozen=True, slots=True)
class Pruned(Record):
    """The record of a pruned graph: the last plan, its report, and the history to make the graph again.

    `scores` says how the scores behind the plan were made, where they were given.
    """

    plan: Plan
    report: Report
    history: History
    scores: Mapping[str, Any] | None = None

    @property
    def refitted(self) -> str:
        """What changed the weights after channels were removed; empty where nothing did."""
        done = self.report.compensation
        ways = [f'compensate="{done.level}"'] if done else []
        return " and ".join([*ways, *(["fine-tuning"] if self.report.finetuned else [])])


def report(small: nn.Module, *, evaluate: Evaluate | None = None, original: nn.Module | None = None) -> Report:
    """The report of a model that `compress` or `apply` made.

    Where parts of it were pruned, the first one's report: give another part, such as `small.backbone`, for its own.

    Args:
        evaluate: callable(model) -> a number, such as the accuracy on held-out data. Its result for `small` is added to
            the report under the function's name, stays in it, and is saved with it. The models are in eval mode then,
            and no gradients are computed.
        original: the model before pruning, whose result is added beside it.

    Raises:
        FxpruneError: `small` is not such a model, or `original` is given without `evaluate`.
        CalibrationError: `evaluate` fails, or gives no number.
    """
    check(report, locals())
    if evaluate is not None:
        before = None if original is None else _value(evaluate, original, "the original")
        note_evaluation(small, Evaluation(_name_of(evaluate), before, _value(evaluate, small, "the smaller model")))
    elif original is not None:
        raise FxpruneError("original= is given without evaluate=: name the function that measures both models")
    for _, found in reported(small):
        return found
    raise FxpruneError(
        f"{type(small).__name__} has no report: it did not come from fxprune.compress or fxprune.apply; prune it first"
    )


def _value(evaluate: Evaluate, model: nn.Module, which: str) -> float:
    """The result of a caller's function for a model. Raises CalibrationError where it fails, or is no number."""
    with blaming("evaluate=", which, ": it is called as evaluate(model), and returns a number"):
        with torch.no_grad(), evaluating(model):
            found: Any = evaluate(model)
        found = found.item() if isinstance(found, Tensor) and found.numel() == 1 else found
    if not is_number(found):
        raise CalibrationError(f"evaluate= gives {shown(found)} for {which}; it returns a number, such as the accuracy")
    return float(found)


def _name_of(evaluate: Evaluate) -> str:
    """The name of a function, also of one whose arguments are bound; a lambda has none."""
    inner = evaluate.func if isinstance(evaluate, partial) else evaluate
    name = getattr(inner, "__name__", type(inner).__name__)
    return "evaluation" if name == "<lambda>" else str(name)


def note_evaluation(small: nn.Module, found: Evaluation) -> None:
    """Add to the reports of a pruned model what the caller's function found."""
    for graph, _ in reported(small):
        with_report(graph, evaluation=found)


def pruned_of(model: nn.Module) -> Pruned | None:
    """The record of a pruned graph, or of a model that was narrowed in its own class; None for any other module."""
    meta = getattr(model, "meta", None)
    found = meta.get(RECORD) if isinstance(meta, dict) else None
    return found if isinstance(found, Pruned) else None


class OwnMeta(dict[str, Any]):
    """The `meta` of a model in its own class. It pickles as a plain dict without the record.

    So a file of the model can be read where fxprune is not installed.
    """

    def __reduce__(self) -> tuple[Any, ...]:
        return dict, ({name: value for name, value in self.items() if name != RECORD},)

    def __deepcopy__(self, memo: Any) -> OwnMeta:
        return OwnMeta(self)


def note_in_class(own: nn.Module, graph: nn.Module) -> None:
    """Give a model that was narrowed in its own class the record of the graph that it equals."""
    meta, record = getattr(own, "meta", {}), pruned_of(graph)
    if record is not None and isinstance(meta, dict):  # a class may use the name for something else
        vars(own)["meta"] = OwnMeta(meta | {RECORD: record})


def with_report(graph: Any, **entries: Any) -> None:
    """Replace entries of a pruned model's report."""
    record: Pruned = graph.meta[RECORD]
    graph.meta[RECORD] = replace(record, report=replace(record.report, **entries))


def reported(small: nn.Module) -> Iterator[tuple[nn.Module, Report]]:
    """The pruned models in a model, and their reports."""
    for module in small.modules():
        if record := pruned_of(module):
            yield module, record.report
