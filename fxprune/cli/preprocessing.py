"""From an image to a model's input: as the model's own library prepares images, or as the options say."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

from PIL.Image import Image
from torch import Tensor, float32, nn
from torchvision import models
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as V


@dataclass(frozen=True, slots=True)
class Preparation:
    """From an image to a tensor (channels, size, size): resized, cropped in the middle, and normalised.

    With a `size` of None images keep their size; an image that has the size already is not resized. One mean makes
    images grey, three make them RGB. A library's own `geometry` gives the tensor, not yet normalised, in place of size
    and crop. `source` says where the settings come from.
    """

    size: int | None
    crop: float
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: InterpolationMode = InterpolationMode.BILINEAR
    geometry: Callable[[Image], Tensor] | None = None
    source: str = "the mean and standard deviation of ImageNet, because the model names none"

    def __call__(self, image: Image) -> Tensor:
        image = image.convert("L" if len(self.mean) == 1 else "RGB")
        made = V.convert_image_dtype((self.geometry or self._cropped)(image), float32)
        return cast("Tensor", V.normalize(made, list(self.mean), list(self.std)))

    def _cropped(self, image: Image) -> Tensor:
        if self.size is not None and image.size != (self.size, self.size):
            image = V.resize(image, [round(self.size / self.crop)], self.interpolation, antialias=True)
            image = V.center_crop(image, [self.size, self.size])
        return cast("Tensor", V.pil_to_tensor(image))

    def with_options(self, **options: Any) -> Preparation:
        """The preparation with those options of the command line that are not None."""
        given = {name: value for name, value in options.items() if value is not None}
        if not given:
            return self
        kept = self.geometry if given.keys() <= {"mean", "std"} else None
        names = ", ".join(f"--{'image-size' if name == 'size' else name}" for name in given)
        return replace(self, **given, geometry=kept, source=f"{self.source}, but for {names}")

    def to_dict(self) -> dict[str, Any]:
        """The settings as plain numbers and texts."""
        return {
            "size": self.size, "crop": self.crop, "mean": list(self.mean), "std": list(self.std),
            "interpolation": self.interpolation.value, "source": self.source,
        }  # fmt: skip

    def __str__(self) -> str:
        mean, std = (", ".join(f"{number:g}" for number in numbers) for numbers in (self.mean, self.std))
        size = "their own size"
        if self.size is not None:
            size = f"{self.size} x {self.size}, the middle of {round(self.size / self.crop)}"
        return f"Images: {size}; mean {mean}; std {std}. From {self.source}."


IMAGENET = Preparation(None, 0.875, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def of_timm(name: str, model: nn.Module) -> Preparation:
    """The images of a model of timm, by its own data configuration."""
    data: Any = importlib.import_module("timm.data")
    config = data.resolve_model_data_config(model)
    size = config["input_size"][-1]
    return Preparation(
        size, size / int(size / config["crop_pct"]), tuple(config["mean"]), tuple(config["std"]),
        InterpolationMode(config["interpolation"]), data.create_transform(**config, is_training=False, normalize=False),
        f"timm's data configuration of {name}",
    )  # fmt: skip


def of_torchvision(name: str, arguments: Mapping[str, Any]) -> Preparation:
    """The images of a model of torchvision, by the transforms of its weights, or else of its default weights."""
    if not any(name in models.list_models(module=module) for module in (models, models.quantization)):
        return IMAGENET  # a builder of the caller's own; or a detector, say, which no folder of images is for
    known: Any = models.get_model_weights(name)
    weights = known.verify(arguments.get("weights")) or known.DEFAULT
    preset = weights.transforms()
    (size,), (resized,) = preset.crop_size, preset.resize_size
    return Preparation(
        size, size / resized, tuple(preset.mean), tuple(preset.std), preset.interpolation,
        weights.transforms(mean=(0.0,) * len(preset.mean), std=(1.0,) * len(preset.std)),
        f"the transforms of {type(weights).__name__}.{weights.name}",
    )  # fmt: skip
