"""The commands that make a model smaller, in one go or stage by stage: compress, score, plan, apply."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, cast

import typer
from torch import nn

import fxprune
from fxprune.caller.batches import first_inputs
from fxprune.cli.files import check_suffix, check_writable
from fxprune.cli.input_options import DataOptions, EvalOptions, File, ModelOptions
from fxprune.cli.named_objects import Built, object_of
from fxprune.cli.output import Output
from fxprune.cli.pruning_options import (
    Allocation,
    Chosen,
    Level,
    LevelOptions,
    LimitOptions,
    NewBiases,
    Run,
    ScoringOptions,
)
from fxprune.errors import FxpruneError, PlanError
from fxprune.planning.plan import Plan
from fxprune.reporting.attach import calibration_of, note_command, note_error
from fxprune.reporting.records import Evaluation
from fxprune.reporting.report import note_evaluation
from fxprune.saving.export import check_packages
from fxprune.scoring.scores import Scores
from fxprune.tracing.part import part_of
from fxprune.tracing.settings import example_for

EXPORTS = (".onnx", ".pt2")
SCORES, PLAN = Path("scores.npz"), Path("plan.json")


@dataclass(frozen=True, slots=True, kw_only=True)
class ResultOptions:
    """The files to write of a smaller model, and how it is checked and measured."""

    verify: Annotated[
        bool, typer.Option("--verify/--no-verify", help="Prove the result against the original with the units zeroed.")
    ] = True
    measure: Annotated[
        bool, typer.Option("--measure", help="Report the latency before and after, on batches of 1 and 32.")
    ] = False
    out: Annotated[Path, typer.Option("--out", "-o", help="The artefact to write, for fxprune.load.")] = Path(
        "small.safetensors"
    )
    export: Annotated[
        list[Path], typer.Option(help="Also write model.onnx or model.pt2, checked against the model. Repeatable.")
    ] = field(default_factory=list)

    def check(self) -> None:
        """Raise where a file could not be written."""
        check_suffix([self.out], (".safetensors",), "--out")
        check_suffix(self.export, EXPORTS, "--export")
        check_writable(self.out, *self.export)
        check_packages(self.export)

    def write(
        self,
        small: nn.Module,
        model: ModelOptions,
        built: Built,
        output: Output,
        example: Callable[[], Any],
        scores: Scores | None = None,
    ) -> dict[str, Any]:
        """Measure a smaller model, write its artefact and its exports, and show its report."""
        if not output.writes:
            return {}
        weights = None if model.weights is None else str(model.weights)
        names = {"call": output.command, "model": model.model, "weights": weights, "file": str(self.out)}
        note_command(small, model.submodule, **names)
        batch = example() if self.export or self.measure else None
        if self.measure:
            with output.busy("measuring latency"):
                fxprune.measure_latency(built.model, small, batch)
        fxprune.save(small, self.out, scores=scores, builder=built.builder, builder_kwargs=built.builder_kwargs)
        errors: dict[str, float] = {}
        for path in self.export:
            with output.busy(f"exporting {path}"):
                errors[str(path)] = fxprune.export(small, path, batch)
        report = fxprune.report(small)
        output.show(report)
        output.wrote(self.out, *self.export)
        size = self.out.stat().st_size
        return {"out": str(self.out), "bytes": size, "exported": errors, "report": report.to_dict()}


def compress(
    model: ModelOptions,
    data: DataOptions,
    level: LevelOptions,
    limits: LimitOptions,
    scoring: ScoringOptions,
    evaluation: EvalOptions,
    output: Output,
    *,
    allocate: Chosen = None,
    compensate: Annotated[str, Level(help="How the removed units are made up for.")] = "sequential",
    new_biases: NewBiases = True,
    rounds: Annotated[int, typer.Option(min=1, help="Score and prune so many times.")] = 1,
    result: ResultOptions,
) -> dict[str, Any]:
    """Make a model smaller, from scores to the artefact in one go, and report what was achieved."""
    result.check()
    data.check_given()
    evaluation.check_given()
    options = level.asked() | limits.given() | scoring.arguments() | {"unpack": data.unpacking()}
    built = model.build(output)
    loader = cast("Iterable[Any]", data.loader(built, output, model.seed))
    held = evaluation.held_out(data, built, output, model.seed) if evaluation.eval_data and output.writes else None
    with output.busy("compressing") as bars:
        before = held.before(built.model, bars) if held else None
        small = fxprune.compress(
            built.model, bars.over(loader), allocate=allocate, rounds=rounds, compensate=compensate,  # type: ignore[arg-type]
            verify=result.verify, seed=model.seed, submodule=model.submodule, progress=False, new_biases=new_biases,
            **options,
        )  # fmt: skip
        if held:
            note_evaluation(small, Evaluation(held.name, before, held.value(small, bars)))
    return result.write(small, model, built, output, lambda: first_inputs(small, loader, options["unpack"]))


def score(
    model: ModelOptions,
    data: DataOptions,
    limits: LimitOptions,
    scoring: ScoringOptions,
    output: Output,
    *,
    times: Annotated[bool, typer.Option("--times", help="Also time the layers here, for plans by --latency.")] = False,
    out: Annotated[Path, typer.Option("--out", "-o", help="The score file to write.")] = SCORES,
) -> dict[str, Any]:
    """Score every unit of a model in one pass over the data, for any number of plans."""
    check_writable(out)
    data.check_given()
    options = limits.given() | scoring.arguments() | {"unpack": data.unpacking()}
    built = model.build(output)
    loader = cast("Iterable[Any]", data.loader(built, output, model.seed))
    with output.busy("scoring") as bars:
        scores = fxprune.score(
            built.model, bars.over(loader), seed=model.seed, submodule=model.submodule, progress=False, **options
        )  # fmt: skip
    if not output.writes:
        return {}
    if times:
        with output.busy("timing the layers"):
            scores = scores.with_latency(built.model)
    scores.save(out)
    units = len(scores.propose)
    output.show(f"Scored {units:,} units in {len(scores.groups)} groups on {scores.about['samples']:,} samples.")
    output.show(f"{calibration_of(scores)}.".capitalize())
    output.wrote(out)
    return {"out": str(out), "units": units, "groups": len(scores.groups), "about": dict(scores.about)}


def plan(
    scores: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="A file that `fxprune score` wrote.")],
    level: LevelOptions,
    limits: LimitOptions,
    output: Output,
    *,
    allocate: Allocation = "tod",
    out: Annotated[Path, typer.Option("--out", "-o", help="The plan to write, as JSON.")] = PLAN,
) -> dict[str, Any]:
    """Decide from scores which channels to keep; needs no model, and takes no time."""
    check_writable(out)
    asked = level.asked()
    found = planned(Scores.load(scores), asked, allocate=allocate, limits=limits)
    found.save(out)
    output.show(str(found))
    output.wrote(out)
    total, stay = sum(found.widths.values()), sum(map(len, found.keep.values()))
    budget = found.budget and {"of": found.budget.of, "asked": found.budget.asked, "achieved": found.budget.achieved}
    return {"out": str(out), "alpha": found.alpha, "budget": budget, "channels": total, "stay": stay}


def planned(scores: Scores, asked: Mapping[str, Any], *, allocate: str, limits: LimitOptions) -> Plan:
    """A plan by scores from a file. Raises PlanError where they lack the times that it needs."""
    if asked.get("latency") is not None and scores.times is None:
        raise PlanError("a plan by --latency needs the times of the layers: score with --times")
    return scores.plan(**asked, allocate=allocate, **limits.given())


def apply(
    model: ModelOptions,
    plan: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="A file that `fxprune plan` wrote.")],
    data: DataOptions,
    output: Output,
    *,
    scores: Annotated[Path | None, File(help="The scores of the plan, for --compensate bias or ridge.")] = None,
    compensate: Annotated[
        str | None,
        Level(
            help="How the removed units are made up for; by default sequential with --data, ridge with --scores alone, "
            "and none without either."
        ),
    ] = None,
    new_biases: NewBiases = True,
    run: Run = None,
    result: ResultOptions,
) -> dict[str, Any]:
    """Make a model smaller by a plan, and report what was achieved."""
    result.check()
    chosen = Plan.load(plan)
    known = Scores.load(scores) if scores else None
    if model.submodule and model.submodule != chosen.submodule:
        raise PlanError(f"the plan is for the part {chosen.submodule!r}, and --submodule is {model.submodule!r}")
    built = model.build(output)
    loader, unpack = data.loader(built, output, model.seed), data.unpacking()
    level = compensate or ("sequential" if loader is not None else "ridge" if known else "none")
    with output.busy("applying the plan") as bars:
        small = compensated(
            built.model, chosen, level=level, scores=known, loader=loader if loader is None else bars.over(loader),
            verify=result.verify, unpack=unpack, run=object_of(run, "--run"), seed=model.seed, new_biases=new_biases,
        )  # fmt: skip

    def example() -> Any:
        if loader is None and chosen.submodule:
            raise FxpruneError(f"the plan has a batch of {chosen.submodule}, not of the whole model: add --data")
        return example_for(small, chosen.example) if loader is None else first_inputs(small, loader, unpack)

    of_part = replace(model, submodule=chosen.submodule)
    return result.write(small, of_part, built, output, example, known)


def compensated(
    model: nn.Module,
    plan: Plan,
    *,
    level: str,
    scores: Scores | None,
    loader: Iterable[Any] | None,
    verify: bool,
    **options: Any,
) -> nn.Module:
    """`model` after a plan; as in `fxprune.compress`, the plain removal is proved before any layer is refitted."""
    small = fxprune.apply(model, plan, scores=scores)
    error = None
    if verify:
        part = part_of(model, plan.submodule)
        error = fxprune.verify(model, plan, small, example_for(part, plan.example))
    if level != "none":
        small = fxprune.apply(model, plan, scores=scores, loader=loader, compensate=level, **options)  # type: ignore[arg-type]
    if error is not None:
        note_error(small, error, plan.submodule)
    return small
