"""The options on models and data, in groups: each group is a dataclass that makes the model or loader."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from fxprune.caller.isolation import applied, seeded
from fxprune.caller.source_lines import warn
from fxprune.cli.datasets import Source, loader_of, warn_of_other_classes
from fxprune.cli.evaluation import HeldOut, accuracy
from fxprune.cli.named_objects import Built, arguments_of, build, object_of
from fxprune.cli.output import Output
from fxprune.cli.preprocessing import Preparation
from fxprune.cli.weights import with_weights
from fxprune.errors import FxpruneError, first_line

IMAGE_SIZE = 224  # of a folder of images, where the model names none
File = partial(typer.Option, exists=True, dir_okay=False, readable=True)


def numbers_of(text: str, option: str) -> tuple[float, ...]:
    """Numbers that are separated by commas.

    >>> numbers_of("0.5, 0.25", "--mean")
    (0.5, 0.25)
    """
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise typer.BadParameter(f"{text!r} is no list of numbers such as 0.5,0.5,0.5", param_hint=option) from None


def _side(text: str) -> int:
    """The side of square images.

    >>> _side("64")
    64
    """
    if not text.isdecimal() or int(text) < 1:
        raise typer.BadParameter(f"{text!r} is not one number, at least 1: images are square, and 64 is 64 x 64")
    return int(text)


_Model = partial(typer.Option, rich_help_panel="Model")
_Data = partial(typer.Option, rich_help_panel="Data")
_Eval = partial(typer.Option, rich_help_panel="Evaluation")
KEYWORD, PLACE = "KEY=VALUE", "DIR|torchvision:NAME|MODULE:CALLABLE"


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelOptions:
    """Which model, with which weights, and where it runs."""

    model: Annotated[
        str,
        typer.Argument(
            help="package.module:callable that gives the model (the working directory is searched, too), "
            "torchvision:NAME or timm:NAME.",
            metavar="MODEL",
        ),
    ]
    model_arg: Annotated[
        list[str], _Model(metavar=KEYWORD, help="Argument of the callable: a Python literal or else text. Repeatable.")
    ] = field(default_factory=list)
    weights: Annotated[
        Path | None,
        _Model(
            exists=True,
            dir_okay=False,
            help="The model's weights: safetensors, a state_dict or checkpoint that torch.save wrote, or an artefact "
            "of fxprune (to prune it further). By default those of the callable.",
        ),
    ] = None
    weights_key: Annotated[
        str | None,
        _Model(
            help="Where the state_dict lies in that checkpoint, such as ema or ema.state_dict; found by usual names."
        ),
    ] = None
    submodule: Annotated[str, _Model(help="Prune only this part of the model, such as backbone.")] = ""
    device: Annotated[str | None, _Model(help="Where to run, such as cuda:1; by default the callable's device.")] = None
    seed: Annotated[int, _Model(help="Seed of initial weights, of the samples taken and of the scores.")] = 0

    def build(self, output: Output) -> Built:
        """The model in eval mode, with its weights, on its device."""
        arguments = arguments_of(self.model_arg, "--model-arg")
        if self.weights_key and not self.weights:
            raise typer.BadParameter("names a part of --weights, which is not given", param_hint="--weights-key")
        with output.busy("building the model"), seeded(self.seed):
            built = build(self.model, arguments)
            model = with_weights(built.model, self.weights, self.weights_key) if self.weights else built.model
            if self.device is not None:
                try:
                    device = torch.device(self.device)
                except RuntimeError as error:
                    raise typer.BadParameter(first_line(error), param_hint="--device") from None
                try:
                    model.to(device)
                except (RuntimeError, AssertionError, NotImplementedError) as error:
                    raise FxpruneError(f"--device {self.device} cannot be used here: {first_line(error)}") from error
        return replace(built, model=applied(model, "eval"))


@dataclass(frozen=True, slots=True, kw_only=True)
class DataOptions:
    """The batches to calibrate with."""

    data: Annotated[
        str | None,
        _Data(
            metavar=PLACE,
            help="Calibration data: a folder with one folder of images per class, a dataset of torchvision "
            "by its class's name (in --data-root), or package.module:callable that gives a loader or a Dataset.",
        ),
    ] = None
    data_arg: Annotated[
        list[str], _Data(metavar=KEYWORD, help="Argument of that callable, or of torchvision's dataset. Repeatable.")
    ] = field(default_factory=list)
    data_root: Annotated[Path, _Data(help="Where torchvision's datasets lie.")] = Path("data")
    samples: Annotated[
        int | None,
        _Data(
            min=0,
            help="Take so many samples, of all classes alike, drawn by --seed; 0 takes all. "
            "1000 of a dataset by default, and all that a loader gives.",
        ),
    ] = None
    batch_size: Annotated[
        int | None, _Data(min=1, help="Samples per batch: 64 of a dataset by default; a loader keeps its own.")
    ] = None
    image_size: Annotated[
        int | None,
        _Data(
            metavar="NUMBER",
            parser=_side,
            help="Side of the square images. By default that of a timm: or torchvision: model; for others 224 for a "
            "folder, and the size that a dataset's images have.",
        ),
    ] = None
    crop: Annotated[
        float | None,
        _Data(
            min=0.1, max=1.0, help="Share of the resized image that is cut out of its middle; the model's, or 0.875."
        ),
    ] = None
    mean: Annotated[
        str | None,
        _Data(help="Mean of each channel; a single number makes images grey. The model's by default, or ImageNet's."),
    ] = None
    std: Annotated[
        str | None, _Data(help="Standard deviation of each channel; the model's by default, or ImageNet's.")
    ] = None
    workers: Annotated[int, _Data(min=0, help="Processes that load images.")] = 0
    unpack: Annotated[
        str | None,
        _Data(metavar="MODULE:FUNCTION", help="Function from a batch to (inputs, targets); pairs need none."),
    ] = None

    def check_given(self) -> None:
        """Wrong usage where there is no --data."""
        if self.data is None:
            raise typer.BadParameter("none is given: name a folder, a dataset or a callable", param_hint="--data")

    def loader(self, built: Built, output: Output, seed: int) -> Iterable[Any] | None:
        """The calibration loader for a model; None where there is no --data."""
        if self.data is None:
            return None
        arguments = arguments_of(self.data_arg, "--data-arg")
        source = Source(self.data, "--data", arguments, self.data_root, training=True)
        return self.open(source, self.samples, built, output, seed)

    def open(self, source: Source, samples: int | None, built: Built, output: Output, seed: int) -> Iterable[Any]:
        """The loader over a source, its images prepared as the options say, or else as the model wants them."""
        prepare = self._preparation(built.images)
        if prepare.size is None and Path(source.name).is_dir():
            prepare = replace(prepare, size=IMAGE_SIZE)
        if source.prepared and output.about.get("images") != prepare.to_dict():
            output.about["images"] = prepare.to_dict()
            output.show(str(prepare))
        if prepare is not built.images and source.training and not source.prepared:
            warn(f"{source.name} prepares its images itself, so that --image-size, --crop, --mean and --std do nothing")
        with output.busy("opening the data") as bars:
            found = loader_of(
                source, prepare, bars, samples=samples, batch_size=self.batch_size, workers=self.workers, seed=seed
            )
        if output.writes and not self.unpack:  # of several ranks, one; and unpacking may give other class numbers
            warn_of_other_classes(built.model, found, source)
        return found

    def _preparation(self, wanted: Preparation) -> Preparation:
        """The preparation that a model wants, with the options given."""
        numbers = {"mean": self.mean, "std": self.std}
        given = {name: text if text is None else numbers_of(text, f"--{name}") for name, text in numbers.items()}
        found = wanted.with_options(size=self.image_size, crop=self.crop, **given)
        means, deviations = len(found.mean), len(found.std)
        if means not in (1, 3) or means != deviations:
            raise typer.BadParameter(
                f"{means} means and {deviations} standard deviations: give one or three of each",
                param_hint="--mean / --std",
            )
        return found

    def unpacking(self) -> Any:
        """The function of --unpack, or None."""
        return object_of(self.unpack, "--unpack")


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalOptions:
    """The data and the metric of an evaluation before and after."""

    eval_data: Annotated[
        str | None,
        _Eval(metavar=PLACE, help="Data for the accuracy, named as --data is; of torchvision's the test images."),
    ] = None
    eval_arg: Annotated[list[str], _Eval(metavar=KEYWORD, help="Argument of that callable or dataset. Repeatable.")] = (
        field(default_factory=list)
    )
    eval_samples: Annotated[int, _Eval(min=0, help="Take so many samples, of all classes alike; 0 takes all.")] = 0
    eval_metric: Annotated[
        str | None,
        _Eval(
            metavar="MODULE:FUNCTION",
            help="Function (model, loader) -> number, the higher the better; by default the share of right classes.",
        ),
    ] = None

    def held_out(self, data: DataOptions, built: Built, output: Output, seed: int) -> HeldOut:
        """The metric and its loader, with images prepared as those for calibration."""
        if self.eval_data is None:
            raise typer.BadParameter("none is given: name a folder, a dataset or a callable", param_hint="--eval-data")
        arguments = arguments_of(self.eval_arg, "--eval-arg")
        source = Source(self.eval_data, "--eval-data", arguments, data.data_root, training=False)
        loader = data.open(source, self.eval_samples or None, built, output, seed)
        counts = dict[str, int]()
        by_classes = partial(accuracy, unpack=data.unpacking(), counts=counts)
        metric = object_of(self.eval_metric, "--eval-metric") or by_classes
        return HeldOut(self.eval_metric or "accuracy", metric, loader, counts)

    def check_given(self) -> None:
        """Wrong usage where options say how to evaluate, and no data are named."""
        for option in ("eval_arg", "eval_samples", "eval_metric"):
            if self.eval_data is None and getattr(self, option):
                raise typer.BadParameter("does nothing without --eval-data", param_hint=f"--{option.replace('_', '-')}")


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepEvalOptions(EvalOptions):
    """The same, of a sweep, which needs it."""

    eval_data: Annotated[
        str, _Eval(metavar=PLACE, help="Data for the accuracy, named as --data is; of torchvision's the test images.")
    ]
