"""`save_pretrained` of models of transformers that were pruned in their own class: the folder, and a check of it."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from fxprune.caller.isolation import undisturbed
from fxprune.caller.source_lines import warn
from fxprune.caller.tensors import named_tensors
from fxprune.errors import ArtifactError, error_text

CONFIG, WEIGHTS = "config.json", "fxprune.safetensors"
WIDTHS = "pruned_shapes"  # in the configuration of a model whose widths its other fields do not say


def narrowed_class(own: nn.Module, model: PreTrainedModel) -> Any:
    """A model narrowed to its own class, whose configuration lists its widths, and which warns where it is saved."""
    before = {name: tensor.shape for name, tensor in named_tensors(model).items()}
    now = {name: tensor.shape for name, tensor in own.named_parameters()}
    if narrower := {name: list(now[name]) for name in now if now[name] != before.get(name, now[name])}:
        own.config.update({WIDTHS: narrower})  # type: ignore[union-attr, operator]
    vars(own)["save_pretrained"] = Saving(own, plain=False)
    return own


class Saving:
    """`save_pretrained` of a model that was narrowed in its own class: that of the class, and a check of the folder.

    A folder of a plain model is loaded again and compared. Of another model, the class does not load it: a warning says
    so. It pickles as the method of the class.
    """

    def __init__(self, own: nn.Module, *, plain: bool) -> None:
        self.own: Any = own
        self.plain = plain

    def __call__(self, save_directory: str | PathLike[str], *args: Any, **options: Any) -> Any:
        if Path(save_directory).is_file():
            raise ArtifactError(f"{save_directory} is a file: name a folder")
        check_weights(save_directory, plain=True)
        save = type(self.own).save_pretrained
        done = save(self.own, save_directory, *args, **options)
        given = inspect.signature(save).bind(self.own, save_directory, *args, **options).arguments
        if self.plain:
            if given.get("is_main_process", True):
                check_folder(self.own, save_directory, given.get("state_dict"), given.get("variant"))
        elif self.own.config.to_dict().get(WIDTHS):
            warn(
                f"no class loads the folder {save_directory}: layers of this {type(self.own).__name__} have other "
                f"widths than its configuration says ({WIDTHS!r} in {CONFIG} lists them). Use save_pretrained of "
                "fxprune.integrations.huggingface, or prune with compress_pretrained(..., plain=True)"
            )
        return done

    def __deepcopy__(self, memo: dict[int, Any]) -> Saving:
        return Saving(copy.deepcopy(self.own, memo), plain=self.plain)

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (self.own, "save_pretrained")


def check_weights(folder: str | PathLike[str], *, plain: bool) -> None:
    """Look for the weights of a checkpoint of the other kind, plain or fxprune's own, in a folder to be written.

    Raises:
        ArtifactError: there are such, which would be loaded in place of those that are written.
    """
    for path in sorted((*Path(folder).glob("*.safetensors"), *Path(folder).glob("pytorch_model*.bin"))):
        if (path.name == WEIGHTS) == plain:
            raise ArtifactError(
                f"{path} holds the weights of another checkpoint, which could be loaded in place of these: name an "
                "empty folder, or remove it"
            )


def check_folder(
    own: PreTrainedModel, folder: str | PathLike[str], state: Mapping[str, Tensor] | None = None, variant: Any = None
) -> None:
    """Load a model again from a folder, and compare all of its tensors with those of `own`, or of another `state`.

    Raises:
        ArtifactError: it cannot be loaded, or a tensor differs.
    """
    try:
        with undisturbed():
            again = type(own).from_pretrained(folder, local_files_only=True, dtype="auto", variant=variant)
    except Exception as error:
        raise ArtifactError(f"{folder} cannot be loaded again ({error_text(error)}): the model is not saved") from error
    there, here = again.state_dict(), own.state_dict() if state is None else state
    for name, tensor in here.items():
        if name not in there or not _same(there[name], tensor.detach().cpu()):
            raise ArtifactError(f"{name} of the model loaded from {folder} is not that which was saved: save it again")


def _same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors hold the same numbers, NaN among them, in the same shape and dtype."""
    if (one.shape, one.dtype) != (other.shape, other.dtype):
        return False
    return bool(((one == other) | (one != one) & (other != other)).all())
