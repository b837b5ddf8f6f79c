"""The detectors of torchvision, pruned through their backbones."""

from __future__ import annotations

import pickle

import pytest
import torch
import torchvision
from detectors import OPTIONS, Batch, check_parts, random_batch, run
from helpers import difference, outputs, parameters, picture, same_picture
from torch import nn

import fxprune

LIGHT = ("fasterrcnn_mobilenet_v3_large_320_fpn", "ssdlite320_mobilenet_v3_large")
HEAVY = (
    "fasterrcnn_resnet50_fpn", "fasterrcnn_resnet50_fpn_v2", "fcos_resnet50_fpn", "keypointrcnn_resnet50_fpn",
    "maskrcnn_resnet50_fpn", "retinanet_resnet50_fpn", "ssd300_vgg16",
)  # fmt: skip


def torchvision_detector(name: str) -> nn.Module:
    torch.manual_seed(0)
    sizes = {} if name.startswith("ssd") else {"min_size": 64, "max_size": 96}
    counts = {"num_classes": 4} | ({"num_keypoints": 3} if name.startswith("keypoint") else {})
    model: nn.Module = torchvision.models.get_model(name, weights=None, weights_backbone=None, **counts, **sizes)
    return model


def detection_batch(name: str) -> Batch:
    images, targets = random_batch(((9, 10), (12, 9)), scale=8)
    for image, target in zip(images, targets, strict=True):
        count = len(target["boxes"])
        if name.startswith("mask"):
            target["masks"] = torch.ones(count, *image.shape[1:], dtype=torch.uint8)
        if name.startswith("keypoint"):
            target["labels"] = torch.ones(count, dtype=torch.int64)
            target["keypoints"] = torch.tensor([[[9.0, 9.0, 1.0], [16.0, 20.0, 1.0], [30.0, 40.0, 1.0]]] * count)
    return images, targets


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(LIGHT[1], marks=pytest.mark.wide),
        *(pytest.param(name, marks=pytest.mark.slow) for name in (LIGHT[0], *HEAVY)),
    ],
)
def test_torchvisions_detectors(name: str) -> None:
    model = torchvision_detector(name)
    side = {"ssdlite320_mobilenet_v3_large": 320, "ssd300_vgg16": 300}.get(name, 64)
    example = torch.randn(1, 3, side, side)
    plan = fxprune.Scores.random(model, example, submodule="backbone").plan(alpha=0.5)
    small = fxprune.apply(model, plan)
    check_parts(model, small)
    assert parameters(small.backbone) < 0.7 * parameters(model.backbone)
    assert fxprune.verify(model, plan, small, torch.randn(2, 3, side, side)) < 1e-4
    images, targets = detection_batch(name)
    with torch.no_grad():
        assert len(small.eval()(images)) == 2
    loss = run(small, images, targets)
    loss.backward()
    assert loss.isfinite()
    assert small.get_parameter(next(name for name, _ in small.named_parameters())).grad is not None
    twin = fxprune.apply(torchvision_detector(name), plan)
    twin.load_state_dict(small.state_dict())
    assert difference(outputs(small.backbone, example), outputs(twin.backbone, example)) == 0


@pytest.mark.slow
@pytest.mark.parametrize("name", LIGHT)
def test_compress_on_a_real_detector(name: str) -> None:
    model = torchvision_detector(name)
    before = picture(model)
    small = fxprune.compress(model, [detection_batch(name)], 0.3, **OPTIONS)
    assert same_picture(before, picture(model))
    check_parts(model, small)
    report = fxprune.report(small)
    assert report.params_after < 0.8 * report.params_before
    assert report.error is not None
    assert report.error < 1e-4
    images = detection_batch(name)[0]
    assert difference(outputs(small, (images,)), outputs(pickle.loads(pickle.dumps(small)), (images,))) == 0
