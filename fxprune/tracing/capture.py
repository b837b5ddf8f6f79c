"""Capture: from the caller's model to a graph that every later stage works on."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from contextvars import copy_context
from dataclasses import replace
from functools import partial
from typing import Any, cast

from torch import nn

from fxprune.caller.arguments import CHECKS, check, chosen, wanted
from fxprune.caller.computed_weights import computed_tensors, warn_of_computed
from fxprune.caller.example import batch_length, plain, to_json
from fxprune.caller.isolation import applied, device_of, kept_buffers, undisturbed
from fxprune.caller.meta import META, lacking_numbers, to_home
from fxprune.caller.model_checks import if_of_transformers
from fxprune.caller.other_batches import varied_batch
from fxprune.caller.source_lines import line_of
from fxprune.errors import CaptureError, first_line, is_out_of_memory, stage
from fxprune.rules.arguments import spell
from fxprune.tracing import hooks, symbolic, values
from fxprune.tracing.attention import lower
from fxprune.tracing.checks import (
    Entry,
    Leaves,
    check_example,
    check_held,
    check_leaves,
    check_names,
    check_unwrapped,
    cuts,
    first_running,
    is_named,
    listed,
)
from fxprune.tracing.choices import MOST, ChoiceError, as_made
from fxprune.tracing.facts import annotate
from fxprune.tracing.graph import RECORD, ModelGraph, captured_of, history_of, is_captured
from fxprune.tracing.hook_effects import computing_hooks
from fxprune.tracing.outside import outside_restored
from fxprune.tracing.proof.reference import DisagreementError, Reference
from fxprune.tracing.proof.trials import Original
from fxprune.tracing.settings import example_for

RUNGS = {"fx": symbolic.trace, "values": values.trace}
METHODS = ("auto", *RUNGS)
CHECKS["method"] = chosen(METHODS, CaptureError)


def capture(
    model: nn.Module,
    example: Any,
    *,
    method: str = "auto",
    concrete_args: Mapping[str, Any] | None = None,
    leaves: Leaves = (),
    other: Any = None,
    prove: bool = True,
) -> ModelGraph:
    """Copy `model` into a `torch.fx.GraphModule` with the shapes of every activation on its nodes.

    Args:
        model: the trained model; it is not changed in any respect.
        example: one batch as the model's forward takes it: a tensor, a tuple of positional arguments, or a dict of
            named ones. It is moved to the model's device; its first two samples are enough, and are taken where the
            model runs on them.
        method: the way to the graph: "fx" traces symbolically; "values" traces with the example's values beside the
            symbols, for models that branch on shapes; "auto" is the first of these that works.
        concrete_args: named arguments of the forward that are fixed at a value and removed from its signature.
        leaves: module names, glob patterns of names, or module types that are not traced into: each is one node, whose
            inputs and outputs keep their channels.
        other: another batch, of other values, on which the graph is compared with the model beside the example; one is
            made of the example by default.
        prove: compare the graph with the model, on the example and on the other batch, in eval mode, before it is
            returned. A way whose graph gives other outputs is given up.

    Returns:
        A graph module named after the caller's class, with its module paths, module types and state_dict keys, in
        the training mode that the model is in. A graph from an earlier `capture` is returned as it is.

    Raises:
        CaptureError: the model cannot be copied, traced, or run on the example, or no graph gives its outputs.

    Warns:
        FxpruneWarning: the model decides by the values of its input, and the graph goes the example's way; it draws
            random numbers in eval mode; its forward changes buffers, attributes, or what is outside of the model; its
            gradients are not those of the graph; or hooks are registered for all modules of the process.

    >>> import torch
    >>> graph = capture(nn.Sequential(nn.Linear(4, 3), nn.ReLU()), torch.zeros(2, 4))
    >>> [node.name for node in graph.graph.nodes], graph.get_submodule("0")
    (['input_1', '_0', '_1', 'output'], Linear(in_features=4, out_features=3, bias=True))
    """
    return _capture(**locals())


def _capture(
    model: nn.Module,
    example: Any,
    method: str,
    concrete_args: Mapping[str, Any] | None,
    leaves: Leaves,
    *,
    other: Any = None,
    prove: bool = True,
    again: bool = False,
) -> ModelGraph:
    """As `capture`; `again` leaves out the checks of lengths and gradients, which warned the first time."""
    check(capture, locals())
    if is_captured(model):
        return cast("ModelGraph", model)
    check_unwrapped(model, listed(leaves))
    check_held(model)
    concrete = dict(concrete_args or {})
    options: dict[str, Any] = {"concrete_args": concrete, "leaves": listed(leaves)}
    failures: dict[str, CaptureError] = {}
    with stage("capturing"), undisturbed(), hooks.without_global_hooks(), outside_restored(model):
        warn_of_computed(model, computed_tensors(model))
        check_names(model)
        numbers = lacking_numbers(model) is None
        example = to_home(example, device_of(model) if numbers else META)
        check_example(model, example, concrete)
        reference = None
        if numbers:
            other = None if other is None else to_home(other, device_of(model))
            if prove:
                reference = Reference.of(model, example, other, concrete)
                example = reference.example
            elif len(cuts(example)) > 1:
                with suppress(CaptureError):  # where it runs on neither, all of the example is annotated
                    example = Original(model, concrete).first_run(example)[0]
        kept = computing_hooks(model, example, concrete)
        prepared = partial(_prepared, model, kept, options["leaves"])
        for rung in tuple(RUNGS) if method == "auto" else (method,):
            own, traced = prepared(), partial(_captured, model, rung=rung, options=options, reference=reference)
            try:
                graph = _with_choices(traced, own, prepared, example)
            except CaptureError as error:
                failures[rung] = error
            else:
                if reference is not None:
                    reference.warn(graph)
                    if not again:
                        reference.warn_of_lengths(graph)
                        reference.warn_of_gradients(graph)
                return graph
        beside = hooks.hooks_in_words(model, kept)
        raise CaptureError(_no_way(model, failures, beside, reference)) from next(iter(failures.values()))


def capture_as(
    settings: Mapping[str, Any], model: nn.Module, example: Any, *, made: bool = False, prove: bool = True,
    other: Any = None,
) -> ModelGraph:  # fmt: skip
    """Capture a model by the `settings` of scores or a plan; see `settings_of`. `other` is as for `capture`.

    With `prove`, the graph is compared with the model, with two exceptions. A graph that follows the decisions of the
    scores' example was compared on that example. An example that was `made` from a plan's description may have numbers
    on which the model does not run.
    """
    decisions, concrete = settings.get("decisions", ()), settings.get("concrete_args")
    prove = prove and not decisions and (not made or _runs_on(model, example, concrete or {}))
    method, leaves = str(settings.get("method", "auto")), tuple(settings.get("leaves", ()))
    with values.replaying(decisions):
        return _capture(model, example, method, concrete, leaves, other=other, prove=prove, again=True)


def _runs_on(model: nn.Module, example: Any, concrete: Mapping[str, Any]) -> bool:
    """Whether a model runs on an example, where that has to be tried."""
    if is_captured(model) or lacking_numbers(model) is not None:
        return True
    try:
        Original(model, concrete).first_run(to_home(example, device_of(model)))
    except CaptureError:
        return False
    return True


def capture_around(
    exclude: Leaves, model: nn.Module, example: Any, *, other: Any = None, prove: bool = True
) -> ModelGraph:
    """Capture a model; where that fails, keep the modules whole that the caller excludes from pruning anyway."""
    named = [entry for entry in listed(exclude) if any(is_named([entry], m, name) for name, m in model.named_modules())]
    try:
        return capture(model, example, other=other, prove=prove)
    except CaptureError:
        if not named:
            raise
    return capture(model, example, leaves=named, other=other, prove=prove)


def _with_choices(
    traced: Callable[[nn.Module, Any], ModelGraph], own: nn.Module, prepared: Callable[[], nn.Module], example: Any
) -> ModelGraph:
    """The graph of `own`; of a fresh copy, traced on more samples, if the choices of the forward need them.

    If more samples do not help, the graph follows the example's own choices.
    """
    try:
        return traced(own, example)
    except ChoiceError as error:
        times = error.times
    if 1 < times <= MOST:
        with suppress(ChoiceError):
            return traced(prepared(), varied_batch(example, times * batch_length(example)))
    with as_made():
        return traced(prepared(), example)


def _prepared(model: nn.Module, kept: Collection[hooks.Hook], leaves: Sequence[Entry]) -> nn.Module:
    """A copy of the model in eval mode with the hooks that are `kept`, to be traced."""
    own = applied(lower(hooks.plain_copy(model)), "eval")
    hooks.keep_only(own, kept)
    check_leaves(own, leaves)
    hooks.check_whole(own, leaves)
    return own


def _captured(
    model: nn.Module,
    own: nn.Module,
    example: Any,
    *,
    rung: str,
    options: dict[str, Any],
    reference: Reference | None,
) -> ModelGraph:
    """The graph of `own`, a copy of `model`, by one method, compared with the model."""
    with kept_buffers(own), outside_restored(own, symbols=True):
        try:
            graph = copy_context().run(RUNGS[rung], own, example, **options)
            graph.graph.lint()
        except Exception as error:
            if is_out_of_memory(error) or isinstance(error, ChoiceError):
                raise
            what = "" if isinstance(error, CaptureError) else f"{type(error).__name__}: "
            raise CaptureError(f"{what}{first_line(error)} (at {line_of(error)})") from error
        finally:
            if reference is not None:
                reference.original.outside.restore()
        small = _annotate(graph, example)
    spell(graph)
    if reference is not None:
        reference.check(graph)
    graph.meta[RECORD] = replace(
        captured_of(graph), method=rung, example=plain(small), description=to_json(small),
        concrete_args=to_json(options["concrete_args"]),
        changed=reference.changed if reference else (), history=history_of(model),
    )  # fmt: skip
    modes = {name: module.training for name, module in model.named_modules(remove_duplicate=False)}
    for name, module in graph.named_modules():
        module.training = modes.get(name, modes.get(name.rpartition(".")[0], model.training))
    return graph


def _no_way(model: nn.Module, failures: Mapping[str, CaptureError], beside: str, reference: Reference | None) -> str:
    """The message for a model that no method captures: the reason of each, and what to do."""
    reasons = "".join(f"\n  {rung}: {error}" for rung, error in failures.items()) + beside
    if reference is not None and any(isinstance(error, DisagreementError) for error in failures.values()):
        reasons += f"\nLikely: {reference.reason()}."
    lacking = lacking_numbers(model)
    if lacking is not None:
        reasons += f"\n  ({lacking} and others have shapes only: where the forward asks for numbers, load the weights)"
    return (
        f"{type(model).__name__} cannot be captured:{reasons}\n"
        "Keep the submodule that holds the line whole: exclude= its name, or leaves= its name in fxprune.capture. Or "
        "use tensor operations in place of Python control flow on tensor values, register a rule for the submodule "
        "with fxprune.rules.rule, or fix an argument of the forward with concrete_args={name: value} of fxprune.capture"
        + if_of_transformers(model)
    )


CHECKS["graph"] = wanted(is_captured, "give what fxprune.capture gave", CaptureError)


def _annotate(graph: ModelGraph, example: Any) -> Any:
    """Put shapes and flops on all nodes; gives the example that was run, which is cut where no model ran on it yet."""
    batches = (example,) if lacking_numbers(graph) is None else cuts(example)
    batch, short = first_running(graph, batches, partial(annotate, graph))
    if 1 < short <= MOST:
        more = varied_batch(batch, short * batch_length(batch))
        return first_running(graph, (more, batch), partial(annotate, graph))[0]
    return batch


def captured(settings: Mapping[str, Any], model: nn.Module, description: Any) -> ModelGraph:
    """The graph of a model, captured as `settings` say on an example of the described shapes; a graph as it is."""
    if is_captured(model):
        return cast("ModelGraph", model)
    check_held(model)
    return capture_as(settings, model, example_for(model, description), made=True)
