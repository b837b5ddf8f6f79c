"""Jobs that several ranks do, each in a process of its own, and what a single one does."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, DistributedSampler, IterableDataset, TensorDataset

import fxprune
from fxprune.errors import FxpruneError

CLASSES = 4
Job = Callable[[], fxprune.Scores]
JOBS: dict[str, Job] = {}


def job(make: Job) -> Job:
    """Register a job, which gives the same scores on any number of ranks."""
    JOBS[make.__name__] = make
    return make


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 12, 3), nn.ReLU(),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(48, CLASSES),
    )  # fmt: skip


def data(count: int = 70) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, 3, 10, 10, generator=generator), torch.arange(count) ** 2 % 7 % CLASSES


def parts(*sizes: int) -> list[tuple[Tensor, Tensor]]:
    x, y = data(sum(sizes))
    return list(zip(x.split(list(sizes)), y.split(list(sizes)), strict=True))


def scored(loader: Any, model: nn.Module | None = None, **options: Any) -> fxprune.Scores:
    options = {"propose": "separability", "samples_per_class": 6, "progress": False} | options
    return fxprune.score(model or network(), loader, **options)


@job
def uneven_batches() -> fxprune.Scores:
    return scored(parts(12, 30, 1, 20, 7))


@job
def fewer_batches_than_ranks() -> fxprune.Scores:
    return scored(parts(40))


@job
def reconstruction() -> fxprune.Scores:
    return scored(parts(12, 30, 1, 20, 7), propose="reconstruction", protect="activation")


@job
def a_class_in_one_batch_alone() -> fxprune.Scores:
    x, _ = data(40)
    return scored([(x[:20], torch.zeros(20, dtype=torch.int64)), (x[20:], torch.ones(20, dtype=torch.int64))])


@job
def more_classes_than_are_compared() -> fxprune.Scores:
    x, _ = data(60)
    return scored(list(zip(x.split(13), (torch.arange(60) % 9).split(13), strict=True)), loss=squares, max_classes=3)


@job
def a_loader_that_shuffles() -> fxprune.Scores:
    return scored(DataLoader(TensorDataset(*data()), batch_size=9, shuffle=True))


@job
def a_loader_with_workers() -> fxprune.Scores:
    return scored(DataLoader(TensorDataset(*data()), batch_size=20, num_workers=1))


@job
def a_distributed_sampler() -> fxprune.Scores:
    dataset = TensorDataset(*data(67))
    sampler = DistributedSampler(dataset, shuffle=True, seed=3) if dist.is_initialized() else None
    if sampler is None:
        sampler = DistributedSampler(dataset, num_replicas=1, rank=0, shuffle=True, seed=3)
    return scored(DataLoader(dataset, batch_size=8, sampler=sampler))


class Stream(IterableDataset[tuple[Tensor, Tensor]]):
    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        yield from zip(*data(30), strict=True)


@job
def a_stream() -> fxprune.Scores:
    return scored(DataLoader(Stream(), batch_size=8))


@job
def classes_of_positions() -> fxprune.Scores:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 6, 3, padding=1), nn.ReLU(),
                          nn.Conv2d(6, CLASSES, 1))  # fmt: skip
    x, _ = data(24)
    masks = (x.sum(1) * 3).long().abs() % CLASSES
    return scored(list(zip(x.split(7), masks.split(7), strict=True)), model, classes=lambda masks: masks)


@job
def goes_on_after_an_interruption() -> fxprune.Scores:
    left = 2

    def breaks(output: Tensor, target: Tensor) -> Tensor:
        nonlocal left
        left -= 1
        if left < 0:
            raise RuntimeError("out of luck")
        return F.cross_entropy(output, target)

    loader = parts(12, 30, 1, 20, 7, 11, 5, 9, 2, 14, 6)  # a third batch for three ranks of four
    with tempfile.TemporaryDirectory() as folder:
        options: dict[str, Any] = {"checkpoint": Path(folder) / "pass.npz", "every": 1}
        with contextlib.suppress(FxpruneError):
            scored(loader, loss=breaks, **options)
        assert list(Path(folder).iterdir())
        return scored(loader, **options)


@job
def no_more_than_so_many_samples() -> fxprune.Scores:
    return scored(parts(12, 30, 1, 20, 7), max_samples=43)


@job
def no_more_than_so_many_samples_of_a_data_loader() -> fxprune.Scores:
    return scored(DataLoader(TensorDataset(*data()), batch_size=9, shuffle=True), max_samples=9)


@job
def half_the_samples_memory() -> fxprune.Scores:
    return scored(parts(12, 30, 1, 20, 7), sample_memory=20_000)


def squares(output: Tensor, _: Any) -> Tensor:
    return output.square().mean()


class Broken(Dataset[tuple[Tensor, Tensor]]):
    """Its 25th sample, in the third batch of ten, cannot be read."""

    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        if index == 25:
            raise OSError("sample 25 is gone")
        x, y = data(40)
        return x[index], y[index]


LEVELS = ("bias", "ridge", "sequential")


def apart(original: Tensor, pruned: Tensor) -> float:
    return float((original - pruned).square().mean())


def compensated(level: str, sizes: tuple[int, ...] = (40, 25, 30, 25)) -> nn.Module:
    """A network pruned to three fifths of its MACs by scores that do not depend on the ranks, and compensated."""
    model, loader = network(), parts(*sizes)
    scores = scored(loader, model, propose="reconstruction")
    return fxprune.apply(model, scores.plan(macs=0.6), scores=scores, loader=loader, compensate=level, metric=apart)  # type: ignore[arg-type]


def compressed() -> nn.Module:
    """All of it at once, and then a loader with fewer batches than ranks."""
    compensated("sequential", sizes=(60,))
    return fxprune.compress(network(), DataLoader(TensorDataset(*data()), batch_size=9), macs=0.6, progress=False)


def failures(rank: int) -> dict[str, str]:
    """What each rank is told where something is wrong on one of them."""
    weights, order, buffers = network(), network(), network()
    with torch.no_grad():
        weights[0].weight.add_(rank)
        order[3].weight.copy_(order[3].weight.roll(rank, 0))
        buffers[1].running_mean.add_(rank)
    tried: dict[str, Callable[[], object]] = {
        "not a number": lambda: scored([(x.index_fill(0, torch.tensor([0]), float("nan")) if i == 1 else x, y)
                                        for i, (x, y) in enumerate(parts(10, 10, 10))]),
        "unreadable": lambda: scored(DataLoader(Broken(), batch_size=10)),
        "other loaders": lambda: scored(parts(10, 10 + rank)),
        "other samples": lambda: scored([(x + rank, y) for x, y in parts(10, 10)]),
        "other weights": lambda: scored(parts(10, 10), weights),
        "another order of weights": lambda: scored(parts(10, 10), order),
        "other buffers": lambda: scored(parts(10, 10), buffers),
    }  # fmt: skip
    found = {}
    for name, call in tried.items():
        try:
            call()
        except (FxpruneError, OSError) as error:
            found[name] = f"{type(error).__name__}: {error}"
    return found


def killed(rank: int) -> str:
    """What rank 0 is told when rank 1 ends in the midst of scoring."""

    def loss(output: Tensor, targets: Tensor) -> Tensor:
        if rank == 1:
            os._exit(3)
        return F.cross_entropy(output, targets)

    try:
        scored(parts(10, 10, 10), loss=loss)
    except FxpruneError as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def spread() -> dict[str, str]:
    """What is said of models of which each rank has a part, and what the way out gives."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    mesh = dist.init_device_mesh("cpu", (dist.get_world_size(),))
    sharded = network()
    fully_shard(sharded, mesh=mesh)
    columns = parallelize_module(network(), mesh, {"7": ColwiseParallel()})
    wrapped = FullyShardedDataParallel(network(), device_id=torch.device("cpu"))
    tried: dict[str, Callable[[], object]] = {
        "score": lambda: scored(parts(10, 10), sharded),
        "compress": lambda: fxprune.compress(sharded, parts(10, 10), macs=0.6, progress=False),
        "parallel": lambda: scored(parts(10, 10), columns),
        "wrapped": lambda: scored(parts(10, 10), wrapped),
    }
    found = {}
    for name, call in tried.items():
        try:
            call()
        except FxpruneError as error:
            found[name] = f"{type(error).__name__}: {error}"
    plain = network()
    plain.load_state_dict(get_model_state_dict(sharded, options=StateDictOptions(full_state_dict=True)))
    found["gathered"] = str(len(scored(parts(10, 10), plain).propose))
    return found


def words(count: int = 5) -> list[dict[str, Tensor]]:
    """Batches of token numbers, the last one smaller."""
    drawn = torch.randint(3, 40, (4 * count - 1, 9), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": own, "attention_mask": torch.ones_like(own)} for own in drawn.split(4)]


def block_by_block(folder: Path, rank: int) -> dict[str, str]:
    """What each rank is told of a folder that all of them prune, and where they cannot."""
    from fxprune.integrations.blockwise import compress_folder

    tried: dict[str, Callable[[], object]] = {
        "none": lambda: compress_folder(folder / "whole", folder / "none", words(), params=0.6, compensate="none"),
        "sequential": lambda: compress_folder(folder / "whole", folder / "sequential", words(), params=0.6),
        "other samples": lambda: compress_folder(folder / "whole", folder / "other", words(5 + rank), params=0.6),
        "few": lambda: compress_folder(folder / "whole", folder / "few", words(1), params=0.6),
        "exists": lambda: compress_folder(folder / "whole", folder / "none", words(), params=0.6),
    }
    found = {}
    for name, call in tried.items():
        try:
            found[name] = repr(str(call()))
        except FxpruneError as error:
            found[name] = f"{type(error).__name__}: {error}"
    return found


def record_of(small: nn.Module) -> dict[str, Any]:
    """The weights of a compensated network, and its errors before and after."""
    done = fxprune.report(small).compensation
    assert done is not None
    return {"weights": dict(small.state_dict()), "errors": (done.before, done.after)}


def started(folder: Path, size: int, what: str) -> list[int]:
    """Run `what` on so many ranks; their exit codes."""
    script = str(Path(__file__))
    processes = [
        subprocess.Popen([sys.executable, script, str(folder), str(rank), str(size), what]) for rank in range(size)
    ]
    return [process.wait(timeout=300) for process in processes]


def told(folder: Path, rank: int) -> dict[str, str]:
    lines = (folder / f"told-{rank}.txt").read_text().splitlines()
    return dict(line.split("|", 1) for line in lines)


def main(folder: Path, rank: int, size: int, what: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder / 'meeting'}", rank=rank, world_size=size, timeout=timedelta(seconds=300)
    )
    if what == "jobs":
        for name, make in JOBS.items():
            make().save(folder / f"{name}-{rank}.npz")
        for level in LEVELS:
            torch.save(record_of(compensated(level)), folder / f"{level}-{rank}.pt")
        torch.save(record_of(compressed()), folder / f"compressed-{rank}.pt")
    else:
        told: dict[str, Callable[[], dict[str, str]]] = {
            "failures": lambda: failures(rank), "killed": lambda: {"killed": killed(rank)}, "spread": spread,
            "blocks": lambda: block_by_block(folder, rank),
        }  # fmt: skip
        found = told[what]()
        (folder / f"told-{rank}.txt").write_text("\n".join(f"{name}|{text}" for name, text in found.items()))
    if what == "killed":
        os._exit(0)  # a group that has lost a rank cannot be taken down in good order
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
