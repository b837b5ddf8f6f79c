"""What all ranks saw in their shares of the loader, put together on each of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fxprune.caller.rank_batches import RankBatches
from fxprune.caller.ranks import check_same, gathered, rank_and_size, summed
from fxprune.scoring.moments import WIDEST, Gathering
from fxprune.scoring.position_draw import first_of_each
from fxprune.scoring.probes import Probe
from fxprune.scoring.sampler import Sampler


def merge(probes: Sequence[Probe], totals: Sequence[Tensor], sampler: Sampler, share: RankBatches) -> list[Tensor]:
    """Give every rank's probes and sampler what those of all ranks hold; returns the totals over all ranks.

    Afterwards all ranks hold the same, and what a single rank would hold that had read all batches, up to the order of
    additions. Raises DistributedError where a rank was lost, or the loaders of the ranks differ.
    """
    if rank_and_size()[1] == 1:
        return list(totals)
    check_same("the loader", str(share), "give all ranks the same loader, over all samples; each reads its share of it")
    sampler.seen = int(summed(torch.tensor(sampler.seen)))
    for probe in probes:
        if probe.gathering is not None:
            _merge_moments(probe.gathering, len(probe.units))
    if sampler.compares:
        _merge_samples(probes, sampler)
    sizes = [len(total) for total in totals]
    return list(summed(torch.cat([*totals, torch.empty(0, dtype=torch.float64)])).split(sizes)) if sizes else []


def _merge_moments(own: Gathering, channels: int) -> None:
    """The sums of products about the mean of all ranks' rows."""
    rows = int(summed(torch.tensor(own.rows)))
    if not rows:
        return
    own.settle()
    place = own.products.device if own.products is not None else torch.device("cpu")
    nothing = torch.zeros(channels, dtype=torch.float64, device=place)
    origin = nothing if own.origin is None else own.origin.double()
    sums = nothing if own.sums is None else own.sums
    mean = summed(sums + own.rows * origin) / rows
    apart = mean - origin
    if channels > WIDEST:
        products = nothing if own.products is None else own.products
        moved = products - 2 * sums * apart + own.rows * apart.square()
    else:
        products = nothing.new_zeros(channels, channels) if own.products is None else own.products
        moved = products - sums.outer(apart) - apart.outer(sums) + own.rows * apart.outer(apart)
    own.rows, own.origin, own.sums, own.products = rows, mean, nothing, summed(moved)


def _merge_samples(probes: Sequence[Probe], sampler: Sampler) -> None:
    """Of every class that all ranks admit, the samples that a single rank would have kept."""
    known = torch.cat(gathered(torch.tensor(sorted({*sampler.counts, *sampler.left_out}), dtype=torch.int64)))
    admitted = torch.tensor(sorted(sampler.first_of(set(known.tolist()))), dtype=torch.int64)
    own = torch.tensor([sampler.counts.get(label, 0) for label in admitted.tolist()], dtype=torch.int64)
    sampler.per_class = min(int(part) for part in gathered(torch.tensor([sampler.per_class])))
    counts = summed(own).clamp_max(sampler.per_class).tolist()
    sampler.counts = dict(zip(admitted.tolist(), counts, strict=True))
    sampler.draw.projections = min(int(part) for part in gathered(torch.tensor([sampler.draw.projections])))
    for probe in probes:
        labels = torch.cat(gathered(torch.cat([*probe.labels, torch.empty(0, dtype=torch.int64)])))
        keys = torch.cat(gathered(probe.keys))
        widths = [max([s.shape[-1] for s in probe.samples], default=0)]
        width = min(max(int(part) for part in gathered(torch.tensor(widths))), sampler.draw.projections)
        samples = torch.cat(gathered(_in_one(probe, width)))
        chosen = torch.isin(labels, admitted).nonzero()[:, 0]
        kept = chosen[first_of_each(labels[chosen], keys[chosen], sampler.per_class)].sort().values
        if len(kept):
            probe.samples, probe.labels, probe.keys = [samples[kept]], [labels[kept]], keys[kept]
    sampler.bound(list(probes))


def _in_one(probe: Probe, width: int) -> Tensor:
    """The samples of a probe, (rows, own units, width)."""
    parts = [s[..., :width].expand(*s.shape[:2], width) for s in probe.samples]
    dtype = torch.float64 if probe.weight.dtype == torch.float64 else torch.float32
    return torch.cat([torch.empty(0, len(probe.own), width, dtype=dtype), *parts])
