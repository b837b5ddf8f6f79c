"""Operations in their odd spellings: by keyword, on nothing, of other dtypes, with axes that are no channels."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hostile.case import Net, Steps, add, conv, hostile, images, middles, sequences, with_layers

KIND = "operations"


# -- places --------------------------------------------------------------------------------------------------------


def _around_the_identity(self: Any, x: Tensor) -> Tensor:
    ys, xs = torch.meshgrid(torch.linspace(-1, 1, 8), torch.linspace(-1, 1, 8), indexing="ij")
    return F.grid_sample(
        x, torch.stack((xs, ys), -1)[None] + 0.1 * self.flow(x).permute(0, 2, 3, 1), align_corners=True
    )


def _of_points(self: Any, x: Tensor) -> Tensor:
    """Deformable attention: a few places for each sample."""
    places = self.theta(x.mean((2, 3))).view(-1, 1, 3, 2).sigmoid() * 2 - 1
    return x + F.grid_sample(x, places, align_corners=False).mean(3, keepdim=True)


def _affine(self: Any, x: Tensor) -> Tensor:
    theta = self.theta(x.mean((2, 3))).view(-1, 2, 3)
    return F.grid_sample(x, F.affine_grid(theta, list(x.shape), align_corners=False), align_corners=False)


FLOW: Any = lambda: dict(flow=conv(8, 2), theta=nn.Linear(8, 6))  # noqa: E731
with_layers(KIND, FLOW, {"grid_around_the_identity": _around_the_identity, "grid_of_points": _of_points})
with_layers(KIND, FLOW, {"grid_of_an_affine_map": _affine}, wanted="any")


# -- nothing, everything, and axes -------------------------------------------------------------------------------------

WHOLE: dict[str, Callable[[Tensor], Tensor]] = {
    "group_norm_of_torch": lambda x: torch.group_norm(x, 2),
    "layer_norm_by_keyword": lambda x: F.layer_norm(input=x, normalized_shape=(8,), eps=1e-4),
    "empty_narrow": lambda x: torch.cat([x, x.narrow(1, 0, 0)], 1),
    "empty_places": lambda x: torch.cat([x[..., :0], x.tanh()], -1),
    "empty_tensor": lambda x: torch.cat([torch.empty(0), x.flatten()]).view_as(x),
    "empty_sum": lambda x: x + x[:, :0].sum(1, keepdim=True),
    "negative_padding": lambda x: F.pad(F.pad(x, (1, 1)), (-1, -1)) * 2,
    "padding_of_channels": lambda x: F.pad(x, (0, 0, 0, 0, 2, 3))[:, 2:10],
    "padding_with_a_value": lambda x: F.pad(x, pad=(0, 1), value=1.0).mean(3, keepdim=True) * x,
    "padding_of_constant_nd": lambda x: torch.constant_pad_nd(x, (0, 0, 1, 0), 0.5)[:, :, :8],
    "view_of_bytes": lambda x: x.contiguous().view(torch.uint8).view(torch.float32) * 2,
    "view_with_a_dtype_keyword": lambda x: x.view(dtype=torch.int32).view(dtype=torch.float32) * 2,
    "view_as_complex": lambda x: torch.view_as_real(torch.view_as_complex(x.view(-1, 8, 8, 4, 2)) * 1j).view_as(x),
    "to_by_keyword": lambda x: x.to(dtype=torch.float64, copy=True).exp().to(x),
    "fourier": lambda x: torch.fft.irfft2(torch.fft.rfft2(x) * 0.5, s=(8, 8)),
    "fourier_of_channels": lambda x: torch.fft.fft(x, dim=1).real,
    "nan_and_infinity": lambda x: (
        x.masked_fill(x < -1, float("-inf")).nan_to_num(nan=0.0, neginf=-1.0).clamp(max=math.inf)
    ),
    "channels_by_a_tensor": lambda x: x[:, torch.tensor([1, 0, 3, 2, 5, 4, 7, 6])],
    "channels_by_bools": lambda x: torch.cat([x[:, torch.arange(8) < 3], x[:, torch.arange(8) >= 3]], 1),
    "channels_by_gather": lambda x: x.gather(1, torch.arange(8).flip(0).view(1, 8, 1, 1).expand(len(x), 8, 8, 8)),
    "channels_sorted": lambda x: x.sort(dim=1, descending=True).values,
    "channels_in_threes": lambda x: torch.cat([torch.linalg.cross(x[:, :3], x[:, 3:6], dim=1), x[:, 3:]], 1),
    "channels_unfolded": lambda x: x.unfold(1, 2, 2).flip(4).permute(0, 1, 4, 2, 3).reshape(x.shape),
    "out": lambda x: torch.add(x, x.tanh(), out=torch.empty_like(x)),
    "einsum_of_lists": lambda x: torch.einsum("bchw,bcij->bhwij", [x, x]).mean((1, 2))[:, None] + x,
    "index_add": lambda x: x.index_add(dim=2, index=torch.tensor([0, 3]), source=x[:, :, :2], alpha=0.5),
    "scatter": lambda x: x.scatter(dim=3, index=torch.zeros(len(x), 8, 8, 1).long(), src=x[..., 1:2]),
    "distances": lambda x: x * torch.cdist(x.flatten(2), x.flatten(2)).mean(2)[..., None, None],
    "unfold_and_fold": lambda x: F.fold(F.unfold(x, kernel_size=2, stride=2), (8, 8), kernel_size=2, stride=2) * 2,
}


def _as_tokens(function: Callable[[Tensor], Tensor]) -> Callable[[], nn.Module]:
    return lambda: Net(lambda _, x: function(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2))


MAY = (
    "padding_of_constant_nd", "view_as_complex", "fourier", "fourier_of_channels", "channels_in_threes",
    "channels_unfolded", "out", "index_add", "scatter",
)  # fmt: skip
for _name, _function in WHOLE.items():
    if "layer_norm" in _name:
        add(KIND, _name, _as_tokens(_function), images)
    else:
        middles(KIND, {_name: _function}, MAY)


# -- with layers -------------------------------------------------------------------------------------------------------

WEIGHTED: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "prelu_of_channels": lambda self, x: F.prelu(input=x, weight=self.bn.weight),
    "bilinear": lambda self, x: x + F.bilinear(x.mean(3), x.mean(2), self.cube)[..., None],
    "matrix_in_front": lambda self, x: torch.einsum("oi,bihw->bohw", self.l.weight, x),
    "matrix_by_matmul": lambda self, x: (self.l.weight @ x.flatten(2)).view(x.shape),
}
with_layers(
    KIND, lambda: dict(
        l=nn.Linear(8, 8), bn=nn.BatchNorm2d(8), cube=nn.Parameter(torch.randn(8, 8, 8) * 0.1)
    ), WEIGHTED,
)  # fmt: skip


# -- of attention ----------------------------------------------------------------------------------------------------


def _rotated(x: Tensor, turned: int) -> Tensor:
    """Rotary positions on the first channels, and the rest, which may be none, as it is."""
    rotary, rest = x[..., :turned], x[..., turned:]
    angle = torch.arange(x.shape[-2])[:, None] / torch.arange(1, turned // 2 + 1)
    cos, sin = torch.cat((angle, angle), -1).cos(), torch.cat((angle, angle), -1).sin()
    first, second = rotary.chunk(2, -1)
    return torch.cat((rotary * cos + torch.cat((-second, first), -1) * sin, rest), -1)


def _attention(turned: int, self: Any, h: Tensor, mask: Any) -> Tensor:
    q, k, v = (t.unflatten(-1, (2, 8)).transpose(1, 2) for t in self.qkv(h).chunk(3, -1))
    given = F.scaled_dot_product_attention(_rotated(q, turned), _rotated(k, turned), v)
    return self.out(given.transpose(1, 2).flatten(2))


@hostile(KIND, sequences)
def rotary_of_half() -> nn.Module:
    return Steps(partial(_attention, 4), qkv=nn.Linear(16, 48), out=nn.Linear(16, 16))


@hostile(KIND, sequences, wanted="any")
def rotary_by_complex_numbers() -> nn.Module:
    def middle(self: Any, h: Tensor, mask: Any) -> Tensor:
        q = torch.view_as_complex(self.q(h).float().reshape(*h.shape[:-1], -1, 2))
        turns = torch.polar(torch.ones(5, 8), torch.arange(5)[:, None] / torch.arange(1, 9))
        return h + torch.view_as_real(q * turns).flatten(2)

    return Steps(middle, q=nn.Linear(16, 16))


@hostile(KIND)
class DetachedHead(Net):
    """What is detached still reads channels."""

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.c2(self.c1(x)))
        return self.f((h + h.detach().flip(1)).mean((2, 3)))
