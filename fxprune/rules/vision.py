"""Operations of torchvision, which exist only once it is imported; a model that uses them has imported it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

from torch.utils import _pytree as pytree

from fxprune.caller.example import TensorSpec
from fxprune.rules.context import Context, labels_in
from fxprune.rules.labels import Labels
from fxprune.rules.layers import convolve
from fxprune.rules.pointwise import pointwise
from fxprune.rules.table import RULES, Key, Rule


def register_torchvision() -> None:
    """Add the rules, unless the user has registered others."""
    if ops := sys.modules.get("torchvision.ops"):
        for key, function in _rules(ops):
            RULES.setdefault(key, function)


def _rules(ops: Any) -> Iterator[tuple[Key, Rule]]:
    """The operations, as functions of Python and as operators, with their rules."""
    yield from ((key, pointwise) for key in (ops.StochasticDepth, ops.stochastic_depth))
    operators = sys.modules["torch"].ops.torchvision
    for name, function in (("roi_align", regions), ("roi_pool", regions), ("deform_conv2d", deformed)):
        if operator := getattr(operators, name, None):
            yield operator, function
            yield operator.default, function
    yield from ((key, regions) for key in (ops.roi_align, ops.roi_pool))


def regions(ctx: Context, x: Labels, boxes: Any, *args: Any, **kwargs: Any) -> Any:
    """Boxes are cut out of maps, from every channel alike."""
    planes = tuple(plane for plane in x.planes if plane.axes == (1,))
    for plane in (plane for value in labels_in((x, boxes)) for plane in value.planes if plane not in planes):
        ctx.freeze(plane.core, f"gives {ctx.describe()} its places")

    def result(spec: TensorSpec) -> Labels:
        return Labels((spec.shape[0], x.shape[1], *spec.shape[2:]), planes)

    return pytree.tree_map_only(TensorSpec, result, ctx.spec())


def deformed(ctx: Context, x: Labels, weight: Labels, offset: Labels, mask: Labels, bias: Labels, *args: Any) -> Any:
    """A convolution whose places are moved: the offsets and the mask are no channels."""
    for plane in (*offset.planes, *mask.planes):
        ctx.freeze(plane.core, f"gives {ctx.describe()} its places")
    groups, groups_of_offsets = args[6:8]
    if groups > 1 or groups_of_offsets > 1:
        return ctx.opaque(f"{ctx.describe()} reads the channels in groups", x, weight, bias)
    return convolve(ctx, x, weight, bias, nd=2, transposed=False)
