"""Loaders by name: a folder of images, a dataset of torchvision, or `package.module:callable`."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import typer
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset
from torchvision import datasets

from fxprune.caller.isolation import device_of, evaluating, seeded
from fxprune.caller.source_lines import warn
from fxprune.cli.named_objects import called, did_you_mean, guarded
from fxprune.cli.output import Bars
from fxprune.cli.preprocessing import Preparation
from fxprune.cli.subsets import balanced, labels_of
from fxprune.errors import FxpruneError, a_kind, plural

SAMPLES = 1000  # of calibration, by default
BATCH = 64
SPLITS = {"train", "training", "val", "valid", "validation", "test"}  # folders of folders, one a class
_SHOWN = 6  # names in a message
HELD_OUT = {"ImageNet": "val", "Imagenette": "val", "Places365": "val", "Kinetics": "val"}  # where it is not "test"


@dataclass(frozen=True, slots=True)
class Source:
    """The place of some data, by the command line: its name, the option that has the name, and its arguments."""

    name: str
    option: str
    arguments: Mapping[str, Any]
    root: Path
    training: bool

    def __post_init__(self) -> None:
        """Wrong usage where the name is no folder, and names nothing else."""
        place = Path(self.name)
        if ":" in self.name or place.is_dir():
            return
        beside = [str(entry) for entry in place.parent.iterdir() if entry.is_dir()] if place.parent.is_dir() else []
        close = did_you_mean(self.name, beside) or ", and no torchvision:NAME or package.module:callable"
        raise typer.BadParameter(f"there is no folder {self.name!r}{close}", param_hint=self.option)

    @property
    def prepared(self) -> bool:
        """Whether its images are prepared here: those of a callable are as it gives them."""
        return Path(self.name).is_dir() or self.name.startswith("torchvision:")


def loader_of(
    source: Source,
    prepare: Preparation,
    bars: Bars,
    *,
    samples: int | None,
    batch_size: int | None,
    workers: int,
    seed: int,
) -> Iterable[Any]:
    """A loader over `samples` of a source's samples, all of them for 0; None is `SAMPLES` of a dataset for calibration.

    Raises FxpruneError where there is no such source, or it cannot be cut down to so many samples.
    """
    found = _opened(source, prepare)
    loading: dict[str, Any] = {"batch_size": batch_size or BATCH, "num_workers": workers}
    if isinstance(found, DataLoader) and samples:
        loading = {"batch_size": batch_size or found.batch_size, "collate_fn": found.collate_fn, "num_workers": workers}
        found = found.dataset
    if isinstance(found, Dataset) and not isinstance(found, IterableDataset) and hasattr(found, "__len__"):
        total, count = len(found), samples if samples is not None else SAMPLES if source.training else 0
        if not total:
            raise FxpruneError("the data has no sample: at least one is needed")
        if 0 < count < total:
            found = Subset(found, balanced(labels_of(found, total, bars), total, count, seed).tolist())
        return DataLoader(found, **loading)
    if samples:
        raise FxpruneError(
            f"{source.name} gives {a_kind(found)}, from which {samples} samples cannot be taken: leave out "
            "the number of samples, or give a torch.utils.data.Dataset or a DataLoader over one"
        )
    return DataLoader(found, **loading) if isinstance(found, IterableDataset) else cast("Iterable[Any]", found)


def warn_of_other_classes(model: nn.Module, loader: Iterable[Any], source: Source) -> None:
    """Warn where a folder of images has another number of classes than the model has outputs."""
    data = loader.dataset if isinstance(loader, DataLoader) else None
    data = data.dataset if isinstance(data, Subset) else data
    if not isinstance(data, datasets.ImageFolder):
        return
    with seeded(0), torch.no_grad(), evaluating(model):
        try:
            output = model(data[0][0].unsqueeze(0).to(device_of(model)))
        except Exception:  # noqa: BLE001 - the stage that runs the model says what is wrong
            return
    if isinstance(output, Tensor) and output.ndim == 2 and output.shape[1] != len(data.classes):
        remedy = "folders are numbered in alphabetical order, so give one for each output"
        if parts := sorted(SPLITS.intersection(data.classes), key=lambda name: not name.startswith("train")):
            remedy = f"give one of them, {source.option} {source.name}/{parts[0]}"
        names = ", ".join(data.classes[:_SHOWN]) + ", ..." * (len(data.classes) > _SHOWN)
        warn(
            f"{source.option} {source.name} has {plural(len(data.classes), 'folder')} ({names}), one a class, but "
            f"{type(model).__name__} has {plural(output.shape[1], 'output')}: {remedy}"
        )


def _opened(source: Source, prepare: Preparation) -> Any:
    """The dataset or loader of a source."""
    if Path(source.name).is_dir():
        try:
            return datasets.ImageFolder(source.name, prepare, **source.arguments)
        except (FileNotFoundError, TypeError) as error:
            raise FxpruneError(
                f"{source.name} holds no images in folders, one a class ({error}): arrange them as CLASS/IMAGE in it"
            ) from error
    collection, _, name = source.name.partition(":")
    if collection == "torchvision":
        return _from_torchvision(name, source, prepare)
    found = called(source.name, source.option, source.arguments)
    if not isinstance(found, (Dataset, Iterable)):
        raise FxpruneError(f"{source.name} gives {a_kind(found)}: name a loader or a Dataset")
    return found


def _from_torchvision(name: str, source: Source, prepare: Preparation) -> Any:
    if name not in datasets.__all__:
        raise FxpruneError(f"torchvision has no dataset {name!r}{did_you_mean(name, datasets.__all__)}")
    kind = getattr(datasets, name)
    known = _parameters(kind)
    offered = {"root": str(source.root), "train": source.training, "transform": prepare}
    if not source.training and "train" not in known:
        offered["split"] = HELD_OUT.get(name, "test")
    arguments = {key: value for key, value in offered.items() if key in known} | dict(source.arguments)
    try:
        return guarded(kind, source.name, arguments)
    except FxpruneError as error:
        if "download" not in known or "download=True" not in str(error):
            raise
        raise FxpruneError(
            f"{source.name} is not in {source.root}: name its folder with --data-root, or add "
            f"{'--data-arg' if source.training else '--eval-arg'} download=True"
        ) from error


def _parameters(kind: type) -> set[str]:
    """The parameters of a class, and of its parents where it passes further keywords on to them."""
    names: set[str] = set()
    for parent in kind.__mro__:
        if "__init__" in vars(parent):
            parameters = inspect.signature(vars(parent)["__init__"]).parameters
            names |= set(parameters)
            if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
                break
    return names
