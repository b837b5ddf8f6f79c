"""Regularised least squares for the weights of one layer, from its inputs and the wanted outputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

STRENGTHS = (1e-6, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)  # of the ridge, by the mean variance of the inputs
MANY = 1024  # features, from which on fewer strengths are tried
SINGLE = 4096  # features above which the equations are of single precision
ROUNDS = 3  # of refitting behind a rectifier
TINY = 1e-12
DEAD = 1e-6  # of the mean variance: outputs below it do not count


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """Inputs (groups, n, features), wanted outputs (groups, n, outputs), and a mask (n,) of those held out."""

    inputs: Tensor
    wanted: Tensor
    held: Tensor

    def part(self, chosen: Tensor) -> Rows:
        """The rows that a mask (n,) chooses."""
        return Rows(self.inputs[:, chosen], self.wanted[:, chosen], self.held[chosen])


@dataclass(frozen=True, slots=True, eq=False)
class Rectified:
    """A rectifier behind a layer's output z: max(0, z * scale + shift), both (groups, n or 1, outputs).

    It makes all values below zero equally good.
    """

    scale: Tensor
    shift: Tensor

    def part(self, chosen: Tensor) -> Rectified:
        """The rectifier of the rows that a mask (n,) chooses."""
        scale, shift = (v if v.shape[1] == 1 else v[:, chosen] for v in (self.scale, self.shift))
        return Rectified(scale, shift)

    def aim(self, wanted: Tensor, found: Tensor) -> Tensor:
        """Of all outputs as good as those wanted, the nearest to those found."""
        goal, given = (z * self.scale + self.shift for z in (wanted, found))
        nearest = torch.where(goal > 0, goal, torch.minimum(given, torch.zeros_like(given)))
        steep = self.scale.abs() > TINY
        safe = torch.where(steep, self.scale, torch.ones_like(self.scale))
        return torch.where(steep, (nearest - self.shift) / safe, wanted)


@dataclass(frozen=True, slots=True, eq=False)
class Fit:
    """Weights (groups, outputs, features) and biases (groups, outputs).

    `strength` is the ridge's, None where no fit helped. `before` and `after` are the errors on the rows held out, in
    shares of the wanted outputs' variance.
    """

    weight: Tensor
    bias: Tensor
    strength: float | None
    before: float
    after: float


def refitted(
    rows: Rows, weight: Tensor, bias: Tensor, *, intercept: bool = True, rectified: Rectified | None = None,
    strengths: Sequence[float] | None = None, all_rows: bool = True,
) -> Fit:  # fmt: skip
    """The weights near those given that produce the wanted outputs best.

    The ridge pulls towards the weights given. Its strength is the best on the rows held out, and the fit is used only
    if it is better there than the weights given. It is then repeated with `all_rows`.

    Args:
        weight, bias: (groups, outputs, features) and (groups, outputs) of float64.
        intercept: whether the bias may change; otherwise it is zero.
        rectified: the rectifier that follows, if one does: the fit is repeated towards outputs that are as good.
        strengths: of the ridge, to choose from; by default fewer where there are many features.
    """
    fitting, held = rows.part(~rows.held), rows.part(rows.held)
    part = Normal.of(fitting.inputs, fitting.wanted, intercept=intercept)
    strengths = strengths or (STRENGTHS if weight.shape[-1] <= MANY else STRENGTHS[2:5])
    best = best_fit(held, weight, bias, strengths, lambda strength: part.solve(weight, bias, strength))
    before = best.before
    if best.strength is None:
        return best
    if all_rows:
        others = Normal.of(held.inputs, held.wanted, intercept=intercept)
        part = part.with_rows(others, share=held.inputs.shape[1] / len(rows.held))
    else:
        rows, rectified = fitting, rectified and rectified.part(~rows.held)
    solved = part.solve(weight, bias, best.strength)
    if rectified is not None:
        for _ in range(ROUNDS):
            wanted = rectified.aim(rows.wanted, _outputs(rows.inputs, *solved))
            solved = part.towards(rows.inputs, wanted).solve(weight, bias, best.strength)
    finite = all(bool(values.isfinite().all()) for values in solved)
    return Fit(*solved, best.strength, before, best.after) if finite else best


def best_fit(
    held: Rows,
    weight: Tensor,
    bias: Tensor,
    strengths: Sequence[float],
    solve: Callable[[float], tuple[Tensor, Tensor]],
) -> Fit:
    """The fit by the strength that is best on the rows held out, or the weights given where none is better."""
    before = error_of(held, weight, bias)
    best = Fit(weight, bias, None, before, before)
    for strength in strengths:
        solved = solve(strength)
        error = error_of(held, *solved)
        if error < best.after:
            best = Fit(*solved, strength, before, error)
    return best


@dataclass(slots=True, eq=False)
class Normal:
    """The normal equations: means, covariance of the inputs, and their covariance with the wanted outputs."""

    mean: Tensor
    wanted_mean: Tensor
    covariance: Tensor
    cross: Tensor
    intercept: bool
    factors: dict[float, Tensor]

    @classmethod
    def of(cls, inputs: Tensor, wanted: Tensor, *, intercept: bool) -> Normal:
        """The equations for inputs (groups, n, features) and outputs (groups, n, outputs)."""
        mean = _mean(inputs, intercept)
        centred = inputs - mean[:, None].to(inputs.dtype)
        covariance = _exact(centred.transpose(1, 2) @ centred) / inputs.shape[1]
        return cls(mean, mean, covariance, covariance, intercept, {}).towards(inputs, wanted)

    def with_rows(self, other: Normal, *, share: float) -> Normal:
        """The equations for these rows and others, which are a `share` of all."""
        mean = (1 - share) * self.mean + share * other.mean
        wanted = (1 - share) * self.wanted_mean + share * other.wanted_mean
        covariance, cross = (-self._outer(mean, other) for other in (mean, wanted))
        for part, weight in ((self, 1 - share), (other, share)):
            covariance += weight * (part.covariance + self._outer(part.mean, part.mean))
            cross += weight * (part.cross + self._outer(part.mean, part.wanted_mean))
        return Normal(mean, wanted, covariance, cross, self.intercept, {})

    def _outer(self, a: Tensor, b: Tensor) -> Tensor:
        return a.to(self.cross)[:, :, None] * b.to(self.cross)[:, None, :]

    def towards(self, inputs: Tensor, wanted: Tensor) -> Normal:
        """The same for other wanted outputs."""
        mean = _mean(wanted, self.intercept)
        centred = inputs - self.mean[:, None].to(inputs.dtype)
        cross = _exact(centred.transpose(1, 2) @ (wanted - mean[:, None].to(wanted.dtype))) / inputs.shape[1]
        return Normal(self.mean, mean, self.covariance, cross, self.intercept, self.factors)

    def solve(self, weight: Tensor, bias: Tensor, strength: float) -> tuple[Tensor, Tensor]:
        """Weights and biases, pulled towards those given; not finite where rounding makes the matrix indefinite."""
        if strength not in self.factors:
            scale = self.covariance.diagonal(dim1=1, dim2=2).mean(-1).clamp_min(TINY)
            regular = self.covariance.clone()
            regular.diagonal(dim1=1, dim2=2).add_(strength * scale[:, None])
            factor, failures = torch.linalg.cholesky_ex(regular)
            self.factors[strength] = factor.masked_fill_((failures > 0)[:, None, None], torch.nan)
        apart = self.cross - self.covariance @ weight.transpose(1, 2).to(self.cross)
        step = torch.cholesky_solve(apart, self.factors[strength]).to(weight)
        moved = weight + step.transpose(1, 2)
        if not self.intercept:
            return moved, bias
        return moved, self.wanted_mean - (moved @ self.mean[..., None]).squeeze(-1)


def _mean(rows: Tensor, intercept: bool) -> Tensor:  # noqa: FBT001
    """The mean of rows (groups, n, columns), or zero without an intercept."""
    mean = rows.mean(1, dtype=torch.float64)
    return mean if intercept else torch.zeros_like(mean)


def _exact(products: Tensor) -> Tensor:
    """Products (groups, features, columns) in double precision, unless there are too many features."""
    return products if products.shape[1] > SINGLE else products.double()


def _outputs(inputs: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return torch.baddbmm(bias.to(inputs.dtype)[:, None], inputs, weight.to(inputs.dtype).transpose(1, 2))


def error_of(rows: Rows, weight: Tensor, bias: Tensor) -> float:
    """The mean over the outputs of the squared error, in shares of the wanted output's variance."""
    errors = (_outputs(rows.inputs, weight, bias) - rows.wanted).square().mean(1)
    spread = rows.wanted.var(1, unbiased=False)
    counts = spread > DEAD * spread.mean()
    return float((errors / spread)[counts].mean()) if bool(counts.any()) else 0.0
