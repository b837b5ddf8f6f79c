"""Setting the size attributes of layers whose parameters were narrowed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from fxprune.rules.experts import has_stacked_experts
from fxprune.rules.labels import Labels
from fxprune.rules.table import Key, module_class, registers

Resize = Callable[[Any, Any, Any], None]
RESIZES: dict[Key, Resize] = {}


resizes = registers(RESIZES)  # decorates function(module, input, output), which sets a module's sizes from these Labels


def resize(module: nn.Module, x: Any = None, output: Any = None) -> None:
    """Set the sizes of a module whose parameters were narrowed, without labels where only its weights are used."""
    function = RESIZES.get(module_class(module) or type(module), experts if has_stacked_experts(module) else None)
    if function is not None:
        try:
            function(module, x, output)
        except AttributeError:  # the weight of the layer is computed by its pre-hook
            if x is not None:
                raise


def experts(module: Any, x: Any, output: Any) -> None:
    """The number of experts, for a module whose class takes it as the length of its weights."""
    module.num_experts = len(module.down_proj)


@resizes(nn.Linear)
def linear(module: nn.Linear, x: Labels, output: Labels) -> None:
    """Features: the sizes of the weight."""
    module.out_features, module.in_features = module.weight.shape


@resizes(nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
def convolution(module: Any, x: Labels | None, output: Any) -> None:
    """Channels of the input and output, or of the weight; groups."""
    if x is None:
        sizes = len(module.weight), module.weight.shape[1] * module.groups
        module.out_channels, module.in_channels = sizes[::-1] if module.transposed else sizes
        return
    axis = x.ndim - len(module.kernel_size) - 1
    module.in_channels, module.out_channels = x.shape[axis], output.shape[axis]
    split = module.out_channels if module.transposed else module.in_channels
    module.groups = split // module.weight.shape[1]


@resizes(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
@resizes(nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
def normalisation(module: Any, x: Labels | None, output: Labels) -> None:
    """Features: the channels."""
    if module.weight is not None:
        module.num_features = len(module.weight)
    elif x is not None:
        module.num_features = x.shape[1]


@resizes(nn.RNN, nn.LSTM, nn.GRU)
def recurrent(module: Any, x: Labels, output: Labels) -> None:
    """Sizes of the weights; the module's list of them has to be one block of memory for cuDNN."""
    module.input_size, module.hidden_size = module.weight_ih_l0.shape[1], module.weight_hh_l0.shape[1]
    if module.proj_size:
        module.proj_size, module.hidden_size = module.weight_hr_l0.shape
    module._init_flat_weights()


@resizes(nn.RNNCell, nn.LSTMCell, nn.GRUCell)
def cell(module: Any, x: Labels, output: Labels) -> None:
    """Sizes of the weights."""
    module.input_size, module.hidden_size = module.weight_ih.shape[1], module.weight_hh.shape[1]


@resizes(nn.PReLU)
def prelu(module: nn.PReLU, x: Labels, output: Labels) -> None:
    """One slope for each channel, or one for all."""
    module.num_parameters = module.weight.numel()


@resizes(nn.LayerNorm, nn.RMSNorm)
def layer_norm(module: Any, x: Labels | None, output: Labels) -> None:
    """The last axes of the input."""
    module.normalized_shape = tuple(
        x.shape[x.ndim - len(module.normalized_shape) :] if x is not None else module.weight.shape
    )


@resizes(nn.GroupNorm)
def group_norm(module: Any, x: Labels | None, output: Labels) -> None:
    """Groups keep their size, where there are several."""
    size, channels = module.num_channels // module.num_groups, len(module.weight) if x is None else x.shape[1]
    module.num_groups = 1 if module.num_groups == 1 else channels // size
    module.num_channels = channels


@resizes(nn.Embedding, nn.EmbeddingBag)
def embedding(module: Any, x: Labels, output: Labels) -> None:
    """The size of the table."""
    module.num_embeddings, module.embedding_dim = module.weight.shape
