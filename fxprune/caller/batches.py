"""Batches of the caller's loaders: their forms, inputs, targets and classes."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.data import Dataset, IterableDataset

from fxprune.caller.example import check_dense, to_device
from fxprune.caller.tensors import dtype_name
from fxprune.errors import CalibrationError, a_kind, blaming

LONGEST = 10_000  # batches of a calibration loader whose length is unknown
LONGEST_EPOCH = 1_000_000  # batches of a training or evaluation loader
TARGET_KEYS = ("labels", "label", "targets", "target")
Unpack = Callable[[Any], tuple[Any, Any]]
Classes = Callable[[Any], Tensor]


def batches(
    loader: Iterable[Any], unpack: Unpack | None = None, *, name: str = "the loader", when: str = "",
    least: int = 1, most: int | None = LONGEST,
) -> Iterator[tuple[Any, Any]]:  # fmt: skip
    """The (inputs, targets) of every batch of a loader; messages use its `name`, and `when` before a batch's number.

    Raises CalibrationError where it is no loader, fails, can be read only once, gives batches of unknown form or
    without samples, fewer than `least`, or more than both `most` and its length.
    """
    check_loader(loader, name)
    with blaming(name, f"{when}batch 0", ": give a list of batches, or a torch.utils.data.DataLoader"):
        once = iter(loader) is loader
    if once:
        raise CalibrationError(
            f"{name} is {a_kind(loader)}, which can be read only once: give a list of batches, a "
            "DataLoader, or another object that starts anew each time it is iterated"
        )
    found, end = 0, None if most is None else max(most, length_of(loader) or 0)
    for found, batch in enumerate(read(loader, name, when), 1):
        if end is not None and found > end:
            raise CalibrationError(
                f"{name} gives more than {end:,} batches, and may never end: pass max_samples= to score or compress, "
                "or a list of its first batches, list(itertools.islice(loader, 100)) say"
            )
        with blaming("unpack=", f"{when}batch {found - 1} of {name}"):
            pair: Any = (unpack or split)(batch)
        where = f"{when}batch {found - 1} of {name}"
        if not isinstance(pair, (tuple, list)) or length_of(pair) != 2:
            raise CalibrationError(f"unpack= gives {_kind(pair)} on {where}: it has to give a pair, (inputs, targets)")
        check_dense(pair, where, CalibrationError)
        first = _first_tensor(pair[0])
        if first is not None and not len(first):
            shape = tuple(first.shape)
            raise CalibrationError(f"{where} has no samples, its first tensor is {shape}: leave it out")
        yield pair[0], pair[1]
    if found < least:
        raise CalibrationError(f"{name} gives no batch: at least one is needed")


def check_loader(loader: Any, name: str = "the loader") -> None:
    """Raise CalibrationError where data are given in place of a loader; the message says how to make one of them."""
    if isinstance(loader, Tensor):
        what, remedy = (
            "it is read row by row",
            "give a list of batches, [(x, y)] with targets y, or x.split(64) without",
        )
    elif isinstance(loader, Mapping):
        what, remedy = "it is read key by key", "put the one batch that it is into a list, [batch]"
    elif isinstance(loader, Dataset) and not isinstance(loader, IterableDataset):
        what, remedy = "it gives single samples", "wrap it, torch.utils.data.DataLoader(dataset, batch_size=64)"
    elif _is_pair(loader):
        what = "its two tensors are read as two batches"
        remedy = "give [(x, y)], or torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=64)"
    elif loader is None or isinstance(loader, (str, bytes, nn.Module)):
        what, remedy = "it gives no batches", "give a list of batches, or a torch.utils.data.DataLoader"
    else:
        return
    kind = "None" if loader is None else f"{a_kind(loader)}"
    raise CalibrationError(f"{name} is {kind}, and {what}: {remedy}")


def _kind(value: Any) -> str:
    """A value in words: its type, and the length of a tuple or list."""
    length = f" of length {length_of(value)}" if isinstance(value, (tuple, list)) else ""
    return "None" if value is None else f"{a_kind(value)}{length}"


def _is_pair(loader: Any) -> bool:
    """Whether a loader is all inputs and all targets: two tensors of one length, and of different ranks or dtypes."""
    is_pair = isinstance(loader, (tuple, list)) and length_of(loader) == 2
    if not is_pair or not all(isinstance(t, Tensor) for t in loader):
        return False
    x, y = loader
    return bool(x.ndim and y.ndim and len(x) == len(y)) and (x.ndim != y.ndim or x.dtype != y.dtype)


def read(loader: Iterable[Any], name: str = "the loader", when: str = "") -> Iterator[Any]:
    """The batches of a loader. Raises CalibrationError, with the number of the batch, where it fails."""
    end, source = object(), None
    for index in count():
        with blaming(name, f"{when}batch {index}", ": look at that sample, or at the data's options"):
            source = iter(loader) if source is None else source
            batch = next(source, end)
        if batch is end:
            return
        yield batch


def length_of(loader: Iterable[Any]) -> int | None:
    """The number of batches of a loader, or None where it is unknown."""
    try:
        return len(loader) if isinstance(loader, Sized) else None
    except Exception:  # noqa: BLE001 - a DataLoader over an iterable dataset raises, and a user's loader may
        return None


def split(batch: Any) -> tuple[Any, Any]:
    """The inputs and targets of a batch, which is a pair, a dict that names its targets, or inputs without targets.

    >>> split({"x": 1, "labels": 2})
    ({'x': 1}, 2)
    """
    if isinstance(batch, Mapping):
        named = [key for key in TARGET_KEYS if key in batch]
        if len(named) == 1:
            return {key: value for key, value in batch.items() if key != named[0]}, batch[named[0]]
        alone = "give batches that hold targets, too, or " if len(batch) == 1 else ""
        raise CalibrationError(
            f"a batch has the keys {sorted(map(str, batch))}, and {len(named) or 'none'} of them are names of targets "
            f"({', '.join(TARGET_KEYS)}): {alone}{_unpack(*_two_of(batch, named))}"
        )
    if isinstance(batch, Tensor):
        return batch, None
    if isinstance(batch, (tuple, list)) and len(batch) in (1, 2) and not _is_uncollated(batch):
        _check_collated(batch)
        return batch[0], batch[1] if len(batch) == 2 else None
    remedy = "pass unpack=lambda batch: tuple(zip(*batch))" if _is_uncollated(batch) else _unpack(0, 1)
    raise CalibrationError(f"a batch is {_kind(batch)}, not a pair (inputs, targets), a dict or inputs alone: {remedy}")


def _unpack(inputs: Any, targets: Any) -> str:
    """The remedy for batches of another form: an `unpack` by the keys, or the places, of inputs and targets."""
    second = "None), with a loss= that needs none" if targets is None else f"batch[{targets!r}])"
    return (
        f"pass unpack=, a function from a batch to (inputs, targets), such as "
        f"unpack=lambda batch: (batch[{inputs!r}], {second}"
    )


def _two_of(batch: Mapping[Any, Any], named: Sequence[Any]) -> tuple[Any, Any]:
    """The keys of a batch that are most likely the inputs, its largest tensor of floats, and the targets, if any."""

    def size(key: Any) -> tuple[bool, int]:
        value = batch[key]
        return (value.is_floating_point(), value.numel()) if isinstance(value, Tensor) else (False, 0)

    likely = [*named, *(key for key in batch if any(part in str(key).lower() for part in ("label", "target", "class")))]
    inputs = max((key for key in batch if key not in likely[:1]), key=size, default=next(iter(batch), "image"))
    return inputs, next((key for key in [*likely, *reversed(batch)] if key != inputs), None)


def _check_collated(batch: Sequence[Any]) -> None:
    """Raise where a pair is a single sample: a tensor and one number as its target."""
    inputs, number = batch[0], batch[-1]
    is_number = isinstance(number, (int, float)) or (isinstance(number, Tensor) and not number.ndim)
    if isinstance(inputs, Tensor) and is_number:
        raise CalibrationError(
            f"a batch is a tensor of shape {tuple(inputs.shape)} and the number {float(number):g}, as single samples "
            "are: wrap them, torch.utils.data.DataLoader(samples, batch_size=64), or pass unpack= where the number is "
            "the target of a batch"
        )


def _is_uncollated(batch: Any) -> bool:
    """Whether a batch is a list of (image, dict of targets), the samples of a detector."""
    return isinstance(batch, (tuple, list)) and all(
        isinstance(sample, (tuple, list)) and len(sample) == 2 and isinstance(sample[1], Mapping) for sample in batch
    )


def model_inputs(inputs: Any, names: list[str]) -> Any:
    """Inputs as the model takes them: the only value of a dict is passed by position if its key names no argument."""
    if isinstance(inputs, Mapping) and len(inputs) == 1 and next(iter(inputs)) not in names:
        return next(iter(inputs.values()))
    return inputs


def first_inputs(model: nn.Module, loader: Iterable[Any], unpack: Unpack | None = None) -> Any:
    """The inputs of the loader's first batch, as the model's forward takes them."""
    names = list(inspect.signature(model.forward).parameters)
    return model_inputs(next(iter(batches(loader, unpack)))[0], names)


def sample_count(inputs: Any) -> int:
    """The number of samples in a batch: the first axis of its first tensor."""
    first = _first_tensor(inputs)
    if first is None:
        raise CalibrationError(
            "a batch has no tensor with a batch axis among its inputs: pass unpack= to say what they are"
        )
    return len(first)


def _first_tensor(inputs: Any) -> Tensor | None:
    return next((leaf for leaf in pytree.tree_leaves(inputs) if isinstance(leaf, Tensor) and leaf.ndim), None)


def count_of(inputs: Any, targets: Any) -> int:
    """The number of samples in a batch: that of its targets where they are a tensor or a list, else of its inputs."""
    if isinstance(targets, Tensor) and targets.ndim:
        return len(targets)
    return len(targets) if isinstance(targets, (tuple, list)) and targets else sample_count(inputs)


def class_of_samples(targets: Any, samples: int | None, classes: Classes | None) -> Tensor:
    """The class of each sample, (samples,), or of each position, (samples, ...), as int64 on the CPU.

    Any number of samples is accepted where `samples` is None. Positions have classes only where `classes` gives them.
    Raises CalibrationError where `classes` is None and the targets are not one integer for each sample.
    """
    if targets is None and classes is None:
        raise CalibrationError(
            "the batches have no targets, and the U-Score compares classes: pass classes=, or unpack= where the "
            "batches have targets after all; or pass propose= with a signal that needs no classes"
        )
    remedy = ": it takes the targets as the loader gives them, and returns the class of each sample, or position"
    with blaming("classes=", "the targets of a batch", remedy):
        labels: Any = classes(targets) if classes else targets
    check_dense(labels, "what classes= gives" if classes else "a batch's targets", CalibrationError, strided=True)
    if not isinstance(labels, Tensor):
        of_a_detector = isinstance(labels, (tuple, list)) and all(isinstance(target, Mapping) for target in labels)
        raise CalibrationError(
            f"{'classes= gave' if classes else 'the targets are'} {a_kind(labels)}, not a tensor of class "
            "numbers: pass classes=, a function from targets to the class of each sample"
            + ", such as lambda targets: torch.stack([t['labels'].max() for t in targets])"
            * of_a_detector
        )
    wrong = labels.ndim < 1 if classes else labels.ndim != 1
    wrong = wrong or (samples is not None and len(labels) != samples)
    if labels.is_floating_point() or labels.is_complex() or wrong:
        raise CalibrationError(
            f"the {'classes' if classes else 'targets'} have shape {tuple(labels.shape)} and dtype "
            f"{dtype_name(labels)}; the U-Score needs one integer class for each of the "
            f"{'' if samples is None else f'{samples} '}samples: pass classes=, a function from targets to the class "
            "of each sample, or of each position of it; fxprune.classes has ready-made ones (argmax for one-hot "
            "targets, quantile_bins for a regression, each_position for masks)"
        )
    return labels.detach().to("cpu", torch.int64)


def batch_to_device(batch: tuple[Any, Any], device: torch.device) -> tuple[Any, Any]:
    """The inputs and the targets of a batch, each on `device`."""
    inputs, targets = batch
    return to_device(inputs, device), to_device(targets, device)
