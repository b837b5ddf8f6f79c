"""The classification networks of torchvision: verify on each, and golden listings of the groups of four."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from helpers import outputs, parameters, part_of
from torch import Tensor, nn
from zoo import images, randomise

import fxprune

GOLDEN = Path(__file__).parent / "golden"
GOLDEN_NAMES = ("resnet18", "densenet121", "mobilenet_v2", "shufflenet_v2_x0_5")

# One small member of each family, with an image size that it can take.
SMALL = {
    "alexnet": 64, "vgg11_bn": 32, "resnet50": 32, "resnext50_32x4d": 32, "densenet121": 32, "inception_v3": 80,
    "googlenet": 32, "squeezenet1_1": 32, "mobilenet_v2": 32, "mobilenet_v3_small": 32, "efficientnet_b0": 32,
    "regnet_y_400mf": 32, "shufflenet_v2_x0_5": 32, "resnet18": 32,
}  # fmt: skip
FAMILIES = (
    "alexnet", "vgg", "resnet", "resnext", "wide_resnet", "densenet", "inception_v3", "googlenet", "squeezenet",
    "mobilenet", "mnasnet", "efficientnet", "regnet", "shufflenet",
)  # fmt: skip
ALL = [name for name in torchvision.models.list_models(torchvision.models) if name.startswith(FAMILIES)]


def build(name: str) -> nn.Module:
    """A network of torchvision with random weights and statistics, in eval mode."""
    torch.manual_seed(0)
    options = {"init_weights": False} if name in ("inception_v3", "googlenet") else {}
    return randomise(torchvision.models.get_model(name, weights=None, **options)).eval()


def size_of(name: str) -> int:
    """An image size that the network can take."""
    return next((size for small, size in SMALL.items() if name.startswith(small)), 80 if "inception" in name else 64)


def check(name: str, size: int, alpha: float) -> None:
    """A random plan verifies, and the parameters fall."""
    model, example = build(name), images(size=size)(2)
    graph = fxprune.capture(model, example)
    plan = fxprune.Scores.random(graph, example, seed=1).plan(alpha=alpha)
    small = fxprune.apply(graph, plan)
    assert fxprune.verify(graph, plan, small, example) < 1e-4
    assert parameters(small) < 0.9 * parameters(model)
    assert list(small.state_dict()) == list(model.state_dict())


@pytest.mark.parametrize(("name", "size"), part_of(SMALL.items(), 6))
def test_a_member_of_each_family(name: str, size: int) -> None:
    check(name, size, alpha=0.5)


@pytest.mark.slow
@pytest.mark.parametrize("alpha", [0.2, 1.0])
@pytest.mark.parametrize("name", ALL)
def test_all_classification_networks(name: str, alpha: float) -> None:
    check(name, size_of(name), alpha)


def videos(size: int) -> Tensor:
    return torch.randn(1, 3, 8, size, size, generator=torch.Generator().manual_seed(0))


def pairs(size: int) -> tuple[Tensor, Tensor]:
    first, second = torch.randn(2, 1, 3, size, size, generator=torch.Generator().manual_seed(0))
    return first, second


slow, wide = pytest.mark.slow, pytest.mark.wide
BACKBONES = [  # transformers, segmentation, video, optical flow: a small member of each, and what it takes
    pytest.param("vit_b_32", {"image_size": 64}, images(size=64)(2), marks=wide),
    pytest.param("swin_t", {}, images(size=64)(2), marks=slow),
    pytest.param("swin_v2_t", {}, images(size=64)(2), marks=wide),
    pytest.param("convnext_tiny", {}, images(size=64)(2), marks=slow),
    pytest.param("lraspp_mobilenet_v3_large", {"weights_backbone": None}, images(size=64)(2), marks=wide),
    pytest.param("deeplabv3_mobilenet_v3_large", {"weights_backbone": None}, images(size=64)(2), marks=wide),
    pytest.param("r3d_18", {}, videos(32), marks=wide),
    pytest.param("r2plus1d_18", {}, videos(32), marks=slow),
    pytest.param("swin3d_t", {}, videos(32), marks=slow),
    pytest.param("raft_small", {}, pairs(128), marks=wide),
    pytest.param("maxvit_t", {}, images(size=224)(1), marks=slow),
    pytest.param("fcn_resnet50", {"weights_backbone": None}, images(size=64)(2), marks=slow),
    pytest.param("mc3_18", {}, videos(32), marks=slow),
    pytest.param("s3d", {}, torch.randn(1, 3, 16, 224, 224), marks=slow),
    pytest.param("mvit_v1_b", {}, torch.randn(1, 3, 16, 224, 224), marks=slow),
    pytest.param("mvit_v2_s", {}, torch.randn(1, 3, 16, 224, 224), marks=slow),
]


@pytest.mark.parametrize(("name", "options", "example"), BACKBONES)
def test_a_member_of_each_other_family(name: str, options: dict[str, Any], example: Any) -> None:
    torch.manual_seed(0)
    model = randomise(torchvision.models.get_model(name, weights=None, **options)).eval()
    graph = fxprune.capture(model, example)
    plan = fxprune.Scores.random(graph, example, seed=1).plan(alpha=0.5)
    small = fxprune.apply(graph, plan)
    assert fxprune.verify(graph, plan, small, example) < 1e-4
    assert parameters(small) < 0.9 * parameters(model)
    assert list(small.state_dict()) == list(model.state_dict())
    found, wanted = outputs(small, example), outputs(model, example)
    assert [t.shape for t in found] == [t.shape for t in wanted]


def listing(name: str) -> str:
    """The groups of a network, as text."""
    groups = fxprune.couple(fxprune.capture(build(name), images(size=SMALL[name])(2)))
    return "\n".join(map(str, groups)) + "\n"


@pytest.mark.parametrize("name", GOLDEN_NAMES)
def test_groups_are_those_of_the_golden_listing(name: str) -> None:
    assert listing(name) == (GOLDEN / f"{name}.txt").read_text()


if __name__ == "__main__":  # writes the listings anew; read the difference before you commit it
    for golden in GOLDEN_NAMES:
        (GOLDEN / f"{golden}.txt").write_text(listing(golden))
