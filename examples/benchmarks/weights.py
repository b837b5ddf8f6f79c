"""Models of torchvision and transformers with seeded random weights, statistics and biases, none of them 0 or 1.

The largest are not initialised, but filled from one block of numbers.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torchvision
import transformers_small
from torch import Tensor, nn
from torchvision.models import detection, optical_flow, segmentation, video

BLOCK = 1 << 16
GIANTS = ("vit_h_14", "vit_l_16", "vit_l_32", "regnet_y_128gf")
_MODULES = {
    "classification": torchvision.models, "segmentation": segmentation, "video": video,
    "optical flow": optical_flow, "detection": detection,
}  # fmt: skip
FAMILIES = {family: torchvision.models.list_models(module=module) for family, module in _MODULES.items()}
FAMILIES["transformers"] = list(transformers_small.MODELS)
MEMBERS = (  # one of every family of torchvision
    "alexnet", "vgg11_bn", "resnet18", "resnext50_32x4d", "wide_resnet50_2", "densenet121", "densenet161",
    "inception_v3", "googlenet", "squeezenet1_1", "mobilenet_v2", "mobilenet_v3_small", "mnasnet0_5",
    "efficientnet_b0", "efficientnet_v2_s", "regnet_x_400mf", "regnet_y_400mf", "shufflenet_v2_x0_5", "convnext_tiny",
    "vit_b_32", "swin_t", "swin_v2_t", "maxvit_t", "fcn_resnet50", "deeplabv3_mobilenet_v3_large",
    "lraspp_mobilenet_v3_large", "r3d_18", "mc3_18", "r2plus1d_18", "s3d", "swin3d_t", "mvit_v1_b", "raft_small",
    "fasterrcnn_mobilenet_v3_large_320_fpn", "retinanet_resnet50_fpn", "ssdlite320_mobilenet_v3_large",
)  # fmt: skip
SIZES = {  # height and width of the images, where a model does not take the usual ones, or would take very long
    "vit_h_14": 28, "vit_l_16": 32, "vit_l_32": 64, "regnet_y_128gf": 32, "maxvit_t": 224, "s3d": 224,
    "mvit_v1_b": 224, "mvit_v2_s": 224, "ssd300_vgg16": 300, "ssdlite320_mobilenet_v3_large": 320,
}  # fmt: skip
USUAL = {
    "classification": 224, "segmentation": 128, "video": 112, "optical flow": 128, "detection": 128, "transformers": 32,
}  # fmt: skip
FRAMES = 16
Norms = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def build(name: str, size: int, example: Any) -> nn.Module:
    """The named model in eval mode, without trained weights; BatchNorm statistics near those of `example`.

    `example` is what the model takes, or the backbone of a detector.
    """
    if name in transformers_small.MODELS:
        torch.manual_seed(0)
        return transformers_small.MODELS[name][0]().eval()
    torch.manual_seed(0)
    with skipped_initialisation() if name in GIANTS else nullcontext():
        model: nn.Module = torchvision.models.get_model(name, weights=None, **options_of(name, size)).eval()
    is_detector = name in torchvision.models.list_models(module=detection)
    with torch.no_grad():
        fill(model) if name in GIANTS else roughen(model)
        calibrate(model.backbone if is_detector else model, example)  # type: ignore[arg-type]
    return model


def family_of(name: str) -> str:
    """The family that a model belongs to."""
    return next(family for family, names in FAMILIES.items() if name in names)


def example_of(name: str, size: int) -> Any:
    """Two samples as the model, or the backbone of a detector, takes them; one of the heavy video models."""
    generator, family = torch.Generator().manual_seed(1), family_of(name)
    if family == "transformers":
        return transformers_small.MODELS[name][1]()
    if family == "video":
        return torch.randn(1 if size > 112 else 2, 3, FRAMES, size, size, generator=generator)
    images = torch.randn(2, 2, 3, size, size, generator=generator)
    return tuple(images) if family == "optical flow" else images[0]


def options_of(name: str, size: int) -> dict[str, Any]:
    """What a builder has to be told."""
    options: dict[str, Any] = {}
    if name.startswith("vit_"):
        options["image_size"] = size
    if name in ("googlenet", "inception_v3"):
        options["init_weights"] = False
    if name in torchvision.models.list_models(module=segmentation):
        options["weights_backbone"] = None
    if name in torchvision.models.list_models(module=detection):
        options["weights_backbone"] = None
        if not name.startswith("ssd"):
            options |= {"min_size": size, "max_size": size}
    return options


@contextmanager
def skipped_initialisation() -> Iterator[None]:
    """Layers keep the memory that they are given: the functions of torch.nn.init do nothing."""
    saved = {name: getattr(nn.init, name) for name in dir(nn.init) if name.endswith("_") and name[0] != "_"}
    for name in saved:
        setattr(nn.init, name, lambda tensor, *args, **kwargs: tensor)
    try:
        yield
    finally:
        for name, function in saved.items():
            setattr(nn.init, name, function)


def roughen(model: nn.Module) -> None:
    """Scales, shifts and biases of their own."""
    for module in model.modules():
        if isinstance(module, Norms) and module.affine:
            module.weight.uniform_(0.5, 1.5)
            module.bias.normal_(0, 0.2)
        elif isinstance(bias := getattr(module, "bias", None), nn.Parameter):
            bias.normal_(0, 0.05)
    for name, parameter in model.named_parameters():
        if "layer_scale" in name:
            parameter.uniform_(0.1, 1)  # one of 1e-6 would hide its block
        elif not parameter.any():
            parameter.normal_(0, 0.05)  # a head of zeros would hide everything


def fill(model: nn.Module) -> None:
    """Seeded numbers for every parameter: matrices scaled by their inputs, vectors near one, biases near zero."""
    block = torch.randn(BLOCK, generator=torch.Generator().manual_seed(0))
    for index, (name, parameter) in enumerate(model.named_parameters()):
        parameter.copy_(scaled(name.rpartition(".")[2], parameter, tiled(block.roll(index), parameter)))


def tiled(block: Tensor, tensor: Tensor) -> Tensor:
    """The block over and over, in the shape of a tensor. Its length is no multiple of any width."""
    length = BLOCK - 15  # a prime
    return block[:length].repeat(-(-tensor.numel() // length))[: tensor.numel()].view(tensor.shape)


def scaled(name: str, tensor: Tensor, numbers: Tensor) -> Tensor:
    """The numbers as a parameter of this name takes them."""
    if "bias" in name and "table" not in name:
        return 0.1 * numbers
    if tensor.numel() == max(tensor.shape, default=1):
        return 1 + 0.2 * numbers.clamp(-3, 3)
    return 1.4 * numbers * (tensor.shape[0] / tensor.numel()) ** 0.5


def calibrate(model: nn.Module, example: Any) -> None:
    """BatchNorm statistics a little off those of the example, so that activations keep their scale."""
    norms = [module for module in model.modules() if isinstance(module, Norms)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.train().momentum = None  # the statistics become those of the one batch
        norm.reset_running_stats()
    if isinstance(example, tuple):
        model(*example)
    else:
        model(torch.cat([example, example.flip(-1), -example]))  # two samples are few where maps are small
    generator = torch.Generator().manual_seed(0)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.eval().momentum = momentum
        mean, variance = norm.running_mean, norm.running_var
        if mean is not None and variance is not None:
            noise, other = torch.randn(2, *mean.shape, generator=generator)
            mean += 0.02 * variance.sqrt() * noise
            variance *= 1 + 0.02 * other.clamp(-3, 3)
