"""Merging the probes of all ranks, each of which saw its share of the loader."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fxprune.caller.rank_batches import Share
from fxprune.caller.ranks import check_same, gathered, rank_and_size, summed
from fxprune.scoring.moments import WIDEST, MomentSums
from fxprune.scoring.position_classes import first_of_each
from fxprune.scoring.probes import Probe
from fxprune.scoring.sampler import EdgeSamples, Sampler


def merge(probes: Sequence[Probe], totals: Sequence[Tensor], sampler: Sampler, share: Share) -> list[Tensor]:
    """Give every rank's probes and sampler the data of all ranks; returns the totals over all ranks.

    Afterwards all ranks hold the data that a single rank would hold after all batches, up to the order of additions.
    Raises DistributedError where a rank was lost, or the loaders of the ranks differ.
    """
    if rank_and_size()[1] == 1:
        return list(totals)
    check_same("the loader", str(share), "give all ranks the same loader, over all samples; each reads its share of it")
    sampler.seen = int(summed(torch.tensor(sampler.seen)))
    for probe in probes:
        if probe.moment_sums is not None:
            _merge_moments(probe.moment_sums, len(probe.units))
    if sampler.compares:
        _merge_samples(sampler)
    sizes = [len(total) for total in totals]
    return list(summed(torch.cat([*totals, torch.empty(0, dtype=torch.float64)])).split(sizes)) if sizes else []


def _merge_moments(own: MomentSums, channels: int) -> None:
    """Sum the products about the mean of all ranks' rows."""
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


def _merge_samples(sampler: Sampler) -> None:
    """Keep the samples that a single rank would have kept, of every class that all ranks admit."""
    known = torch.cat(gathered(torch.tensor(sorted({*sampler.counts, *sampler.left_out}), dtype=torch.int64)))
    admitted = torch.tensor(sorted(sampler.first_of(set(known.tolist()))), dtype=torch.int64)
    own = torch.tensor([sampler.counts.get(label, 0) for label in admitted.tolist()], dtype=torch.int64)
    sampler.per_class = min(_of_ranks(sampler.per_class))
    counts = summed(own).clamp_max(sampler.per_class).tolist()
    sampler.counts = dict(zip(admitted.tolist(), counts, strict=True))
    sampler.projections = min(_of_ranks(sampler.projections))
    for edge in sampler.edges:
        _merge_edge(edge, sampler, admitted)
    sampler.bound()


def _merge_edge(edge: EdgeSamples, sampler: Sampler, admitted: Tensor) -> None:
    widest = max(_of_ranks(max([part.shape[-1] for part in edge.parts], default=0)))
    samples = torch.cat(gathered(edge.joined(min(widest, sampler.projections))))
    labels, keys = torch.cat(gathered(edge.labels)), torch.cat(gathered(edge.keys))
    chosen = torch.isin(labels, admitted).nonzero()[:, 0]
    kept = chosen[first_of_each(labels[chosen], keys[chosen], sampler.per_class)].sort().values
    if len(kept):
        edge.parts, edge.labels, edge.keys = [samples[kept]], labels[kept], keys[kept]


def _of_ranks(number: int) -> list[int]:
    return [int(part) for part in gathered(torch.tensor([number]))]
