"""Models whose tensors have shapes but no numbers: on torch's meta device, or made under FakeTensorMode."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily

from fxprune.caller.example import each_tensor, to_device
from fxprune.caller.model_checks import if_in_folder
from fxprune.errors import FxpruneError

META, CPU = torch.device("meta"), torch.device("cpu")


def has_numbers(tensor: Tensor) -> bool:
    """Whether a tensor has numbers, not only a shape."""
    return not (tensor.is_meta or isinstance(tensor, FakeTensor))


def lacking_numbers(model: nn.Module) -> str | None:
    """The name of the first parameter or buffer of a model that has no numbers, or None."""
    held = chain(model.named_parameters(), model.named_buffers())
    return next((name for name, tensor in held if not has_numbers(tensor)), None)


def need_numbers(model: nn.Module, what: str, error: type[FxpruneError] = FxpruneError) -> None:
    """Raise `error` where a model has no numbers; `what` is the stage that needs them."""
    if (name := lacking_numbers(model)) is not None:
        raise error(
            f"{what} needs numbers, and {name} of {type(model).__name__} has a shape only (meta device or "
            "FakeTensorMode): load the weights first; capture, couple, Scores.random, their plans and apply need none"
            + if_in_folder(model)
        )


@contextmanager
def computing() -> Iterator[None]:
    """Make tensors with numbers, even inside FakeTensorMode or `with torch.device("meta")`."""
    with ExitStack() as stack:
        stack.enter_context(unset_fake_temporarily())
        if torch.get_default_device().type == "meta":
            stack.enter_context(torch.device("cpu"))
        yield


def home_of(device: torch.device) -> torch.device:
    """The device of the batches for a model on `device`: the CPU where the model has no numbers."""
    return CPU if device.type == "meta" else device


def to_home(example: Any, device: torch.device) -> Any:
    """An example moved to `home_of(device)`, with zeros for tensors that have no numbers.

    >>> to_home(torch.empty(2, dtype=torch.int64, device="meta"), META)
    tensor([0, 0])
    """

    def numbered(tensor: Tensor) -> Tensor:
        return tensor.detach() if has_numbers(tensor) else torch.zeros(tensor.shape, dtype=tensor.dtype, device=CPU)

    return to_device(each_tensor(numbered, example), home_of(device))


def on_meta(model: nn.Module) -> dict[int, object]:
    """A memo of meta tensors for the fake tensors of a model."""
    stores = (store for module in model.modules() for store in (module._parameters, module._buffers, vars(module)))
    held = [tensor for store in stores for tensor in store.values() if isinstance(tensor, FakeTensor)]
    found: dict[int, object] = {}
    for tensor in held:
        made = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=META)
        is_parameter = isinstance(tensor, nn.Parameter)
        found[id(tensor)] = nn.Parameter(made, requires_grad=tensor.requires_grad) if is_parameter else made
    return found
