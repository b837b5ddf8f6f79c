"""YOLOs of ultralytics, where it is installed: pruned in their own class, with their own loss and exporter."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from helpers import difference, outputs, parameters, part_of
from torch import Tensor

import fxprune
from fxprune.rewriting.class_limits import limits_of

ultralytics: Any = pytest.importorskip("ultralytics")
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
NAMES = (
    "yolov8n",
    "yolov5n",
    "yolo11n-seg",
    "yolo12n",
    "yolo26n",
    "yolov8n-pose",
    "yolo11n",
    "yolo26n-seg",
    "yolo26n-pose",
)


def network(name: str) -> Any:
    torch.manual_seed(0)
    return ultralytics.YOLO(f"{name}.yaml", verbose=False).model.requires_grad_().eval()


def pictures(count: int = 2) -> Tensor:
    return torch.rand(count, 3, 64, 64, generator=torch.Generator().manual_seed(count))


@pytest.mark.parametrize("name", part_of(NAMES, 3))
def test_every_kind_is_pruned_in_its_class(name: str) -> None:
    model = network(name)
    graph = fxprune.capture(model, pictures())
    limits = limits_of(model, graph)
    plan = fxprune.Scores.random(graph, pictures()).plan(alpha=0.4, allocate="tod-by-group")
    own: Any = fxprune.narrow(model, plan)
    assert type(own) is type(model)
    assert parameters(own) < 0.6 * parameters(model)
    near = (".attn", ".ffn", "cv1.conv")  # the values of attention, which are reshaped to the width of their block
    assert all(any(name in site for name in near) or "attn" in why for site, why in limits.held.items())
    assert difference(outputs(fxprune.apply(model, plan), pictures(3)), outputs(own, pictures(3))) < 1e-4
    trained, wanted = (net.train()(pictures()) for net in (own, model))
    shapes = [[t.shape for t in torch.utils._pytree.tree_leaves(found)] for found in (trained, wanted)]
    assert shapes[0] == shapes[1]
    file = io.BytesIO()
    torch.save(copy.deepcopy(own).half(), file)
    assert b"fxprune" not in file.getvalue()
    before = outputs(own, pictures())[0]
    for module in own.modules():  # as its exporter does
        module.forward = getattr(module, "forward_split", module.forward)
    assert difference([before], outputs(own, pictures())[:1]) < 1e-6
    fused = copy.deepcopy(own).eval().fuse(verbose=False)
    assert difference([before], outputs(fused, pictures())[:1]) < 1e-3
