"""Operations in their odd spellings: by keyword, on nothing, of other dtypes, with axes that are no channels."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hostile.case import Net, Steps, add, conv, hostile, images, middle, middles, sequences

KIND = "operations"


# -- places --------------------------------------------------------------------------------------------------------


def _flow() -> dict[str, Any]:
    return {"flow": conv(8, 2), "theta": nn.Linear(8, 6)}


@middle(KIND, layers=_flow)
def grid_of_a_learned_flow(self: Any, x: Tensor) -> Tensor:
    return F.grid_sample(x, self.flow(x).permute(0, 2, 3, 1).tanh(), align_corners=False)


@middle(KIND, layers=_flow)
def grid_by_keyword(self: Any, x: Tensor) -> Tensor:
    grid = self.flow(x).movedim(1, -1)
    return F.grid_sample(input=x, grid=grid, mode="nearest", padding_mode="border", align_corners=True)


@middle(KIND, layers=_flow, wanted="any")
def grid_of_an_affine_map(self: Any, x: Tensor) -> Tensor:
    theta = self.theta(x.mean((2, 3))).view(-1, 2, 3)
    return F.grid_sample(x, F.affine_grid(theta, list(x.shape), align_corners=False), align_corners=False)


@middle(KIND, layers=_flow)
def grid_around_the_identity(self: Any, x: Tensor) -> Tensor:
    ys, xs = torch.meshgrid(torch.linspace(-1, 1, 8), torch.linspace(-1, 1, 8), indexing="ij")
    grid = torch.stack((xs, ys), -1)[None] + 0.1 * self.flow(x).permute(0, 2, 3, 1)
    return F.grid_sample(x, grid, align_corners=True)


@middle(KIND, layers=lambda: {"flow": nn.Conv3d(8, 3, 1)})
def grid_of_three_coordinates(self: Any, x: Tensor) -> Tensor:
    volume = x.unsqueeze(2).expand(-1, -1, 2, -1, -1)
    grid = self.flow(volume).permute(0, 2, 3, 4, 1).tanh()
    return F.grid_sample(volume, grid, align_corners=False).mean(2)


@middle(KIND, layers=lambda: {"points": nn.Linear(8, 6)})
def grid_of_points(self: Any, x: Tensor) -> Tensor:
    """Deformable attention: a few places for each sample."""
    places = self.points(x.mean((2, 3))).view(-1, 1, 3, 2).sigmoid() * 2 - 1
    return x + F.grid_sample(x, places, align_corners=False).mean(3, keepdim=True)


# -- nothing, everything, and axes -------------------------------------------------------------------------------------

WHOLE: dict[str, Callable[[Tensor], Tensor]] = {
    "group_norm_of_the_shape": lambda x: F.group_norm(x, x.shape[1]),
    "group_norm_of_half_the_shape": lambda x: F.group_norm(x, x.size(1) // 2),
    "group_norm_of_torch": lambda x: torch.group_norm(x, 2),
    "layer_norm_by_keyword": lambda x: F.layer_norm(input=x, normalized_shape=(8,), eps=1e-4),
    "empty_slice_in_front": lambda x: torch.cat([x[:, :0], x], 1),
    "empty_slice_behind": lambda x: torch.cat((x, x[:, 8:]), dim=1),
    "empty_split": lambda x: torch.cat([part * 2 for part in x.split([0, 8], 1)], 1),
    "empty_narrow": lambda x: torch.cat([x, x.narrow(1, 0, 0)], 1),
    "empty_places": lambda x: torch.cat([x[..., :0], x.tanh()], -1),
    "empty_tensor": lambda x: torch.cat([torch.empty(0), x.flatten()]).view_as(x),
    "empty_sum": lambda x: x + x[:, :0].sum(1, keepdim=True),
    "negative_padding": lambda x: F.pad(F.pad(x, (1, 1)), (-1, -1)) * 2,
    "padding_of_channels": lambda x: F.pad(x, (0, 0, 0, 0, 2, 3))[:, 2:10],
    "padding_by_tensors": lambda x: F.pad(x, [int(n) for n in torch.tensor([1, 1, 1, 1])])[..., 1:-1, 1:-1] * 2,
    "padding_with_a_value": lambda x: F.pad(x, pad=(0, 1), value=1.0).mean(3, keepdim=True) * x,
    "padding_of_constant_nd": lambda x: torch.constant_pad_nd(x, (0, 0, 1, 0), 0.5)[:, :, :8],
    "view_of_integers": lambda x: x.view(torch.int32).view(torch.float32) * 2,
    "view_of_bytes": lambda x: x.contiguous().view(torch.uint8).view(torch.float32) * 2,
    "view_with_a_dtype_keyword": lambda x: x.view(dtype=torch.int32).view(dtype=torch.float32) * 2,
    "view_as_complex": lambda x: torch.view_as_real(torch.view_as_complex(x.view(-1, 8, 8, 4, 2)) * 1j).view_as(x),
    "to_by_keyword": lambda x: x.to(dtype=torch.float64, copy=True).exp().to(x),
    "fourier": lambda x: torch.fft.irfft2(torch.fft.rfft2(x) * 0.5, s=(8, 8)),
    "fourier_of_channels": lambda x: torch.fft.fft(x, dim=1).real,
    "nan_and_infinity": lambda x: (
        x.masked_fill(x < -1, float("-inf")).nan_to_num(nan=0.0, neginf=-1.0).clamp(max=math.inf)
    ),
    "channels_backwards": lambda x: x.flip(1) * 2,
    "channels_by_a_tensor": lambda x: x[:, torch.tensor([1, 0, 3, 2, 5, 4, 7, 6])],
    "channels_by_bools": lambda x: torch.cat([x[:, torch.arange(8) < 3], x[:, torch.arange(8) >= 3]], 1),
    "channels_by_gather": lambda x: x.gather(1, torch.arange(8).flip(0).view(1, 8, 1, 1).expand(len(x), 8, 8, 8)),
    "channels_rolled": lambda x: torch.roll(input=x, shifts=(3, 1), dims=(1, 2)),
    "channels_sorted": lambda x: x.sort(dim=1, descending=True).values,
    "channels_in_threes": lambda x: torch.cat([torch.linalg.cross(x[:, :3], x[:, 3:6], dim=1), x[:, 3:]], 1),
    "channels_unfolded": lambda x: x.unfold(1, 2, 2).flip(4).permute(0, 1, 4, 2, 3).reshape(x.shape),
    "distances": lambda x: x * torch.cdist(x.flatten(2), x.flatten(2)).mean(2)[..., None, None],
    "unfold_and_fold": lambda x: F.fold(F.unfold(x, kernel_size=2, stride=2), (8, 8), kernel_size=2, stride=2) * 2,
}


def _as_tokens(function: Callable[[Tensor], Tensor]) -> Callable[[], nn.Module]:
    return lambda: Net(lambda _, x: function(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2))


MAY = (
    "padding_of_constant_nd", "view_as_complex", "fourier", "fourier_of_channels", "channels_in_threes",
    "channels_unfolded", "out", "addbmm_by_keyword", "index_add_by_keyword", "scatter_by_keyword",
)  # fmt: skip
for _name, _function in WHOLE.items():
    if "layer_norm" in _name:
        add(KIND, _name, _as_tokens(_function), images)
    else:
        middles(KIND, {_name: _function}, MAY)


# -- by keyword ------------------------------------------------------------------------------------------------------


def _flat(x: Tensor) -> Tensor:
    return x.flatten(2)


def _moved(x: Tensor) -> Tensor:
    x = torch.permute(input=x.swapaxes(axis0=1, axis1=3), dims=(0, 3, 2, 1)).transpose(dim0=2, dim1=3)
    first, second = torch.tensor_split(x, (3,), dim=1)
    x = torch.cat((second, first), axis=1).unflatten(dim=1, sizes=(2, 4)).flip(dims=[2]).flatten(start_dim=1, end_dim=2)
    return torch.stack(tensors=torch.cat(x.split(split_size=[2, 6], dim=1), 1).chunk(chunks=1, dim=1), dim=0).sum(dim=0)


def _each(x: Tensor) -> Tensor:
    x = torch.where(condition=x > 0, input=x, other=x * 0.1)
    x = torch.add(input=x, other=torch.rsub(x, other=2, alpha=3), alpha=2)
    x = torch.addcmul(input=x, tensor1=x.tanh(), tensor2=x.sigmoid(), value=0.5)
    return F.leaky_relu(input=x + x.mean((2, 3), True).expand(size=(-1, -1, 8, 8)), negative_slope=0.2, inplace=True)


def _reduced(x: Tensor) -> Tensor:
    x = x / (1 + torch.norm(input=x, p=2, dim=(2, 3), keepdim=True))
    x = x / (1 + torch.var(input=x, dim=(2, 3), correction=0, keepdim=True))
    return x / (1 + torch.amax(input=x.abs(), dim=(1, 2, 3), keepdim=True))


KEYWORDS: dict[str, Callable[[Tensor], Tensor]] = {
    "movement_by_keyword": _moved,
    "arithmetic_by_keyword": _each,
    "reductions_by_keyword": _reduced,
    "mean_by_axis": lambda x: x * x.mean(axis=(2, 3), keepdims=True),
    "mean_of_channels_by_axis": lambda x: x * x.mean(axis=1, keepdims=True),
    "sum_by_axis": lambda x: x + x.sum(axis=1, keepdim=True) / 8,
    "reshape_by_keyword": lambda x: torch.reshape(input=x, shape=(-1, 8, 64)).tanh().view(size=(-1, 8, 8, 8)),
    "out": lambda x: torch.add(x, x.tanh(), out=torch.empty_like(x)),
    "matmul_by_keyword": lambda x: torch.matmul(input=x, other=x.mT),
    "bmm_by_keyword": lambda x: (
        torch.bmm(input=_flat(x).mT, mat2=_flat(x)).softmax(2).bmm(_flat(x).mT).mT.reshape(x.shape)
    ),
    "baddbmm_by_keyword": lambda x: (
        torch.baddbmm(input=x.new_zeros(1, 1, 1), batch1=_flat(x).mT, batch2=_flat(x), beta=0, alpha=0.5)
        .softmax(2)
        .bmm(_flat(x).mT)
        .mT.reshape(x.shape)
    ),
    "baddbmm_of_channels": lambda x: torch.baddbmm(_flat(x), batch1=_flat(x) @ _flat(x).mT, batch2=_flat(x)).view_as(x),
    "addbmm_by_keyword": lambda x: (
        x + torch.addbmm(torch.zeros(8, 8), batch1=x[:, 0], batch2=x[:, 1], beta=1, alpha=0.1)
    ),
    "einsum_of_lists": lambda x: torch.einsum("bchw,bcij->bhwij", [x, x]).mean((1, 2))[:, None] + x,
    "tensordot_by_keyword": lambda x: torch.tensordot(a=x, b=torch.ones(8, 8) / 8, dims=([3], [0])),
    "attention_by_keyword": lambda x: F.scaled_dot_product_attention(
        query=_flat(x).mT, key=_flat(x).mT, value=_flat(x).mT, is_causal=True
    ).mT.reshape(x.shape),
    "glu_by_keyword": lambda x: F.glu(input=torch.cat((x, x.tanh()), 1), dim=1),
    "index_add_by_keyword": lambda x: x.index_add(dim=2, index=torch.tensor([0, 3]), source=x[:, :, :2], alpha=0.5),
    "scatter_by_keyword": lambda x: x.scatter(dim=3, index=torch.zeros(len(x), 8, 8, 1).long(), src=x[..., 1:2]),
}
middles(KIND, KEYWORDS, MAY)
WEIGHTED: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "conv_by_keyword": lambda self, x: F.conv2d(input=x, weight=self.g.weight, bias=self.g.bias, padding=1),
    "conv_transposed_by_keyword": lambda self, x: F.conv_transpose2d(input=x, weight=self.g.weight, padding=1),
    "linear_by_keyword": lambda self, x: F.linear(input=x.movedim(1, 3), weight=self.l.weight, bias=None).movedim(3, 1),
    "addmm_by_keyword": lambda self, x: (
        torch.addmm(input=self.l.bias, mat1=x.mean((2, 3)), mat2=self.l.weight.T, beta=2, alpha=0.5)[..., None, None]
        + x
    ),
    "batch_norm_by_keyword": lambda self, x: F.batch_norm(
        input=x,
        running_mean=self.bn.running_mean,
        running_var=self.bn.running_var,
        weight=self.bn.weight,
        bias=self.bn.bias,
    ),
    "prelu_of_channels": lambda self, x: F.prelu(input=x, weight=self.bn.weight),
    "bilinear": lambda self, x: x + F.bilinear(x.mean(3), x.mean(2), self.cube)[..., None],
    "matrix_in_front": lambda self, x: torch.einsum("oi,bihw->bohw", self.l.weight, x),
    "matrix_by_matmul": lambda self, x: (self.l.weight @ x.flatten(2)).view(x.shape),
}
LAYERS: Any = lambda: {  # noqa: E731
    "g": conv(8, 8), "l": nn.Linear(8, 8), "bn": nn.BatchNorm2d(8), "cube": nn.Parameter(torch.randn(8, 8, 8) * 0.1),
}  # fmt: skip
for _name, _weighted in WEIGHTED.items():
    middle(KIND, layers=LAYERS)(type(_weighted)(_weighted.__code__, globals(), _name))


# -- of attention ----------------------------------------------------------------------------------------------------


def _rotated(x: Tensor, turned: int) -> Tensor:
    """Rotary positions on the first channels, and the rest, which may be none, as it is."""
    rotary, rest = x[..., :turned], x[..., turned:]
    angle = torch.arange(x.shape[-2])[:, None] / torch.arange(1, turned // 2 + 1)
    cos, sin = torch.cat((angle, angle), -1).cos(), torch.cat((angle, angle), -1).sin()
    first, second = rotary.chunk(2, -1)
    return torch.cat((rotary * cos + torch.cat((-second, first), -1) * sin, rest), -1)


def _attention(turned: int) -> Callable[[Any, Tensor, Any], Tensor]:
    def middle(self: Any, h: Tensor, mask: Any) -> Tensor:
        q, k, v = (t.unflatten(-1, (2, 8)).transpose(1, 2) for t in self.qkv(h).chunk(3, -1))
        given = F.scaled_dot_product_attention(_rotated(q, turned), _rotated(k, turned), v)
        return self.out(given.transpose(1, 2).flatten(2))

    return middle


for _turned in (8, 4):
    add(
        KIND,
        f"rotary_of_{_turned}",
        lambda turned=_turned: Steps(_attention(turned), qkv=nn.Linear(16, 48), out=nn.Linear(16, 16)),
        sequences,
    )


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
