"""Checkpoints in shards, narrowed by a plan: the tensors of `apply`, whatever happens on the way."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import outputs
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import fxprune
from fxprune import CheckpointError, Manifest, Plan, Scores
from fxprune.saving.sharded import rewrite, shards


class Net(nn.Module):
    """Convolutions, BatchNorm, attention, and on demand two names of one table."""

    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        self.table = nn.Linear(6, 12, bias=False)
        self.conv, self.norm = nn.Conv1d(12, 8, 3, padding=1), nn.BatchNorm1d(8)
        self.mix = nn.MultiheadAttention(8, 4, batch_first=True)
        self.out = nn.Linear(8, 6)
        self.back = nn.Linear(6, 12, bias=False)
        self.register_buffer("scale", torch.tensor(0.5))
        if tied:
            self.back.weight = self.table.weight

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.conv(self.table(x).relu().transpose(1, 2))).relu().transpose(1, 2)
        return self.back(self.out(self.mix(y, y, y)[0]).relu() * self.scale)


def example() -> Tensor:
    return torch.linspace(-1, 1, 60).reshape(2, 5, 6)


def model_of(tied: bool = False) -> Net:
    torch.manual_seed(0)
    model = Net(tied)
    model(example() + torch.randn(2, 5, 6))  # so that the running statistics are no zeros and ones
    return model.eval()


def ghost_of(tied: bool = False) -> Net:
    with torch.device("meta"):
        return Net(tied)


def plan_of(model: nn.Module) -> Plan:
    return Scores.random(model, example(), seed=1).plan(alpha=0.6)


def write_shards(model: nn.Module, folder: Path, count: int = 3, leave: tuple[str, ...] = ()) -> Path:
    """Save a model's tensors in some files with an index."""
    folder.mkdir()
    tensors = {name: t.clone() for name, t in model.state_dict().items() if name not in leave}
    names = list(tensors)
    places = {name: f"model-{i % count + 1:05d}-of-{count:05d}.safetensors" for i, name in enumerate(names)}
    for file in dict.fromkeys(places.values()):
        save_file({n: tensors[n] for n in names if places[n] == file}, folder / file, {"format": "pt"})
    index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def read(folder: Path) -> dict[str, Tensor]:
    return {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture
def made(tmp_path: Path) -> tuple[Net, Plan, Path]:
    model = model_of()
    return model, plan_of(model), write_shards(model, tmp_path / "source")


@pytest.mark.parametrize("count", [1, 3])
def test_the_tensors_are_those_of_apply(tmp_path: Path, count: int) -> None:
    model = model_of()
    plan = plan_of(model)
    source = write_shards(model, tmp_path / "source", count)
    if count == 1:  # one file needs no index
        (source / "model.safetensors.index.json").unlink()
    manifest = fxprune.rewrite_checkpoint(source, plan, tmp_path / "small", model=ghost_of())
    small, wanted = fxprune.apply(model, plan), fxprune.apply(model, plan).state_dict()
    found = read(tmp_path / "small")
    assert set(found) == set(wanted)
    assert any(found[name].shape != tensor.shape for name, tensor in model.state_dict().items())
    assert all(torch.equal(found[name], wanted[name]) and found[name].dtype == wanted[name].dtype for name in wanted)
    fresh = fxprune.apply(ghost_of(), Plan.load(tmp_path / "small" / "plan.json")).eval()
    fresh.load_state_dict(found, strict=True, assign=True)
    assert torch.equal(outputs(fresh, example())[0], outputs(small, example())[0])
    assert ("model.safetensors.index.json" in contents(tmp_path / "small")) == (count > 1)
    assert not list(tmp_path.glob(".*"))
    for name, record in manifest.files.items():
        data = (tmp_path / "small" / name).read_bytes()
        assert (record.sha256, record.size) == (hashlib.sha256(data).hexdigest(), len(data))
        with safe_open(tmp_path / "small" / name, "pt") as file:
            assert file.metadata() == {"format": "pt"}


def test_the_manifest_and_the_index_say_what_is_there(made: tuple[Net, Plan, Path], tmp_path: Path) -> None:
    model, plan, source = made
    manifest = fxprune.rewrite_checkpoint(source, plan, tmp_path / "small", model=ghost_of())
    assert Manifest.load(tmp_path / "small" / "manifest.json") == manifest
    found = read(tmp_path / "small")
    for name, change in manifest.tensors.items():
        assert change.before == tuple(model.state_dict()[name].shape)
        assert change.after == tuple(found[name].shape)
    index = json.loads((tmp_path / "small" / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == {name: change.file for name, change in manifest.tensors.items()}
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in found.values())
    plain = json.dumps(json.loads((tmp_path / "small" / "plan.json").read_text()), sort_keys=True)
    assert manifest.plan == hashlib.sha256(plain.encode()).hexdigest()
    (tmp_path / "small" / "manifest.json").write_text("[1]")
    with pytest.raises(CheckpointError, match="is not a manifest that rewrite_checkpoint wrote"):
        Manifest.load(tmp_path / "small" / "manifest.json")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn, torch.float64, torch.int8, torch.complex64])
def test_the_dtypes_of_the_files_are_kept(tmp_path: Path, dtype: torch.dtype) -> None:
    model = model_of()
    plan = plan_of(model)
    (tmp_path / "source").mkdir()
    weights = {name: (t * 50).to(dtype) for name, t in model.state_dict().items()}
    weights["norm.num_batches_tracked"] = torch.tensor(7)
    save_file(weights, tmp_path / "source" / "model.safetensors")
    fxprune.rewrite_checkpoint(tmp_path / "source", plan, tmp_path / "small", model=ghost_of())
    found = read(tmp_path / "small")
    for name, kept in plan.keep.items():
        if f"{name}.bias" in weights:
            picked = weights[f"{name}.bias"].view(torch.uint8).reshape(-1, weights[f"{name}.bias"].itemsize)[list(kept)]
            assert torch.equal(found[f"{name}.bias"].view(torch.uint8).flatten(), picked.flatten())
            assert found[f"{name}.bias"].dtype == dtype
    assert int(found["norm.num_batches_tracked"]) == 7


@pytest.mark.parametrize("left_out", ["", "back.weight", "table.weight"])
def test_tied_weights(tmp_path: Path, left_out: str) -> None:
    model = model_of(tied=True)
    plan = plan_of(model)
    source = write_shards(model, tmp_path / "source", leave=(left_out,))
    manifest = fxprune.rewrite_checkpoint(source, plan, tmp_path / "small", model=ghost_of(tied=True))
    small = fxprune.apply(model, plan)
    found = read(tmp_path / "small")
    assert {"back.weight", "table.weight"} - set(found) == ({left_out} if left_out else set())
    other = {"back.weight": "table.weight", "table.weight": "back.weight"}
    assert dict(manifest.aliases) == ({left_out: other[left_out]} if left_out else {})
    found |= {name: found[first] for name, first in manifest.aliases.items()}
    assert torch.equal(found["back.weight"], small.state_dict()["back.weight"])
    fresh = fxprune.apply(model_of(tied=True), plan)
    torch.nn.init.zeros_(fresh.table.weight)
    fresh.load_state_dict(found, strict=True)
    assert fresh.table.weight is fresh.back.weight
    assert torch.equal(outputs(fresh, example())[0], outputs(small, example())[0])


def test_a_part_of_a_model(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({"front": nn.Linear(6, 6), "net": model_of()})
    with torch.device("meta"):
        ghost = nn.ModuleDict({"front": nn.Linear(6, 6), "net": Net()})
    plan = Scores.random(ghost, example(), submodule="net").plan(alpha=0.6)
    source = write_shards(model, tmp_path / "source")
    fxprune.rewrite_checkpoint(source, plan, tmp_path / "small", model=ghost)
    found, wanted = read(tmp_path / "small"), fxprune.apply(model, plan).state_dict()
    assert {name: t.tolist() for name, t in found.items()} == {name: t.tolist() for name, t in wanted.items()}


def test_equal_runs_give_equal_bytes(made: tuple[Net, Plan, Path], tmp_path: Path) -> None:
    _, plan, source = made
    metadata = {name: f'"{name}"\n\x1f\u00e9\u20ac' for name in ("format", "other", "third", "fourth", "fifth")}
    for file in source.glob("*.safetensors"):
        save_file(load_file(file), file, metadata)
    for name in ("first", "second"):
        fxprune.rewrite_checkpoint(source, plan, tmp_path / name, model=ghost_of())
    assert contents(tmp_path / "first") == contents(tmp_path / "second")
    with safe_open(first_shard(tmp_path / "first"), "pt") as shard:
        assert shard.metadata() == metadata


def test_no_more_than_one_file_is_in_memory(
    made: tuple[Net, Plan, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, plan, source = made
    written: list[list[weakref.ref[Tensor]]] = []

    def save(tensors: dict[str, Tensor], *rest: Any) -> None:
        assert not any(tensor() is not None for file in written for tensor in file)
        written.append([weakref.ref(tensor) for tensor in tensors.values()])
        save_file(tensors, *rest)

    monkeypatch.setattr(shards, "save_file", save)
    manifest = fxprune.rewrite_checkpoint(source, plan, tmp_path / "small", model=ghost_of())
    assert len(written) == len(manifest.files) == 3
    assert sum(map(len, written)) == len(manifest.tensors)


# -- what does not fit -------------------------------------------------------------------------------------------------


def spoil(source: Path, change: Callable[[dict[str, Tensor]], Any]) -> Path:
    """Write the shards of a checkpoint as one file, after a change of its tensors."""
    tensors = read(source)
    change(tensors)
    for path in source.iterdir():
        path.unlink()
    save_file(tensors, source / "model.safetensors")
    return source


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda t: t.pop("out.bias"), r"lacks out\.bias \(6,\), which Net has \(1 of 1\d tensors are missing\)"),
        (
            lambda t: t.update(extra=torch.zeros(3, 2)),
            r"model\.safetensors holds extra \(3, 2\), which Net does not have",
        ),
        (lambda t: t.update({"out.bias": torch.zeros(7)}), r"out\.bias is \(7,\) in .*, and \(6,\) in the Net"),
    ],
)
def test_tensors_that_do_not_fit(
    made: tuple[Net, Plan, Path], tmp_path: Path, change: Callable[[dict[str, Tensor]], Any], text: str
) -> None:
    _, plan, source = made
    with pytest.raises(CheckpointError, match=text):
        fxprune.rewrite_checkpoint(spoil(source, change), plan, tmp_path / "small", model=ghost_of())
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_what_is_ignored_is_left_out(made: tuple[Net, Plan, Path], tmp_path: Path) -> None:
    _, plan, source = made
    spoil(source, lambda t: t.update({"rotary.inv_freq": torch.zeros(3)}))
    manifest = fxprune.rewrite_checkpoint(source, plan, tmp_path / "small", model=ghost_of(), ignore=["rotary.*"])
    assert manifest.left_out == ("rotary.inv_freq",)
    assert "rotary.inv_freq" not in read(tmp_path / "small")


def test_targets_that_exist_or_have_no_place(made: tuple[Net, Plan, Path], tmp_path: Path) -> None:
    _, plan, source = made
    (tmp_path / "small").mkdir()
    (tmp_path / "small" / "mine").write_text("")
    with pytest.raises(CheckpointError, match="small exists: name a folder that does not"):
        fxprune.rewrite_checkpoint(source, plan, tmp_path / "small", model=ghost_of())
    (tmp_path / "small" / "mine").unlink()
    fxprune.rewrite_checkpoint(source, plan, tmp_path / "small", model=ghost_of())  # an empty folder is none
    with pytest.raises(CheckpointError, match=r"there is no folder .*nowhere"):
        fxprune.rewrite_checkpoint(source, plan, tmp_path / "nowhere" / "small", model=ghost_of())


def index_of(source: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    path = source / "model.safetensors.index.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def first_shard(source: Path) -> Path:
    return min(source.glob("*.safetensors"))


def write_raw(path: Path, dtype: str, size: int) -> None:
    """Write a file of one tensor of four entries, whose dtype is smaller than a byte."""
    header = json.dumps({"x": {"dtype": dtype, "shape": [2, 2], "data_offsets": [0, size]}}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(size))


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (
            lambda s: index_of(s, lambda c: c["weight_map"].update(x="../../x.safetensors")),
            "no safetensors file beside",
        ),
        (lambda s: index_of(s, lambda c: c.pop("weight_map")), "is no index of a checkpoint"),
        (lambda s: index_of(s, lambda c: c["weight_map"].pop("table.weight")), "which .* puts into None"),
        (
            lambda s: index_of(s, lambda c: c["weight_map"].update(x=c["weight_map"]["table.weight"])),
            "puts x into .*, which does not hold it",
        ),
        (lambda s: first_shard(s).write_bytes(first_shard(s).read_bytes()[:-5]), "is cut off or damaged"),
        (lambda s: first_shard(s).write_bytes(b"\xff" * 64), "its header alone would need 18,446"),
        (lambda s: first_shard(s).unlink(), "cannot be read"),
        (lambda s: write_raw(first_shard(s), "F4", 2), "x in .* has the dtype F4, which packs several entries"),
        (lambda s: write_raw(first_shard(s), "F6_E2M3", 3), "x in .* has the dtype F6_E2M3, which cannot be read"),
        (lambda s: (s / "b.safetensors.index.json").write_text("{}"), "holds 2 files"),
        (lambda s: [p.unlink() for p in s.iterdir()], "0 files .* and 0 safetensors files"),
    ],
)
def test_sources_that_are_no_checkpoint(
    made: tuple[Net, Plan, Path], tmp_path: Path, change: Callable[[Path], Any], text: str
) -> None:
    _, plan, source = made
    change(source)
    with pytest.raises(CheckpointError, match=text):
        fxprune.rewrite_checkpoint(source, plan, tmp_path / "small", model=ghost_of())
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
    with pytest.raises(CheckpointError, match="is no folder"):
        fxprune.rewrite_checkpoint(source / "x", plan, tmp_path / "small", model=ghost_of())


# -- what happens on the way -------------------------------------------------------------------------------------------

KILLED = """
import os, signal, sys
sys.path[:0] = {paths!r}
from pathlib import Path
import fxprune
from fxprune.saving.sharded import shards
from test_rewrite_checkpoint import ghost_of
from fxprune import Plan

narrow, counted = shards.narrow, 0

def counting(*args):
    global counted
    counted += 1
    if counted == {after}:
        os.kill(os.getpid(), signal.SIGKILL)
    return narrow(*args)

shards.narrow = counting
root = Path({root!r})
fxprune.rewrite_checkpoint(root / "source", Plan.load(root / "plan.json"), root / "small", model=ghost_of())
"""


@pytest.mark.skipif(os.name == "nt", reason="signals")
def test_a_killed_run_goes_on_to_the_same_bytes(
    made: tuple[Net, Plan, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, plan, source = made
    plan.save(tmp_path / "plan.json")
    paths = [str(Path(__file__).parent), str(Path(fxprune.__file__).parents[1])]
    code = KILLED.format(paths=paths, after=8, root=str(tmp_path))
    ended = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True, timeout=120)
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    assert not (tmp_path / "small").exists()
    left = sorted(path.name for path in (tmp_path / ".small.unfinished").iterdir())
    finished = [name for name in left if name.startswith("model-")]
    assert len(finished) == 1, left
    assert any(".part" in name for name in left)
    (tmp_path / ".small.unfinished" / ".model.0123456789ab.young").mkdir()  # of a kill before the folder was held
    written: list[str] = []
    real = shards.write_shard
    monkeypatch.setattr(rewrite, "write_shard", lambda shard, *rest: written.append(shard.name) or real(shard, *rest))
    fxprune.rewrite_checkpoint(source, plan, tmp_path / "small", model=ghost_of())
    assert len(written) == 2, "the finished file was made again"
    assert finished[0] not in written
    fxprune.rewrite_checkpoint(source, plan, tmp_path / "again", model=ghost_of())
    assert contents(tmp_path / "small") == contents(tmp_path / "again")
    assert not list(tmp_path.glob(".*"))


def interrupted(made: tuple[Net, Plan, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Any) -> Path:
    """Rewrite until the second file, at which `error` is raised; gives the folder that is left."""
    _, plan, source = made
    real, calls = shards.narrow, []

    def failing(tensor: Tensor, kept: Any) -> Tensor:
        calls.append(tensor)
        if len(calls) == 8:
            raise error
        return real(tensor, kept)

    with monkeypatch.context() as patch:
        patch.setattr(shards, "narrow", failing)
        with pytest.raises((type(error), CheckpointError)) as raised:
            fxprune.rewrite_checkpoint(source, plan, tmp_path / "small", model=ghost_of())
        if isinstance(error, OSError):
            assert "small" in str(raised.value)
            assert "is there room" in str(raised.value)
    assert not (tmp_path / "small").exists()
    return tmp_path / ".small.unfinished"


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_full_disk_and_an_interrupt_can_be_gone_on_from(
    made: tuple[Net, Plan, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    left = interrupted(made, tmp_path, monkeypatch, error)
    assert not list(left.glob("*.part*"))
    _, plan, source = made
    fxprune.rewrite_checkpoint(source, plan, tmp_path / "small", model=ghost_of())
    fxprune.rewrite_checkpoint(source, plan, tmp_path / "again", model=ghost_of())
    assert contents(tmp_path / "small") == contents(tmp_path / "again")


def test_what_was_left_is_checked(
    made: tuple[Net, Plan, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, plan, source = made
    left = interrupted(made, tmp_path, monkeypatch, KeyboardInterrupt())
    finished = next(left.glob("model-*"))
    data = bytearray(finished.read_bytes())
    data[-1] ^= 1
    finished.write_bytes(data)
    other = Scores.random(model, example(), seed=2).plan(alpha=0.6)
    with pytest.raises(CheckpointError, match="of an unfinished run with another plan"):
        fxprune.rewrite_checkpoint(source, other, tmp_path / "small", model=ghost_of())
    fxprune.rewrite_checkpoint(source, plan, tmp_path / "small", model=ghost_of())
    wanted = fxprune.apply(model, plan).state_dict()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in read(tmp_path / "small").items())


def test_starting_anew(made: tuple[Net, Plan, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _, source = made
    left = interrupted(made, tmp_path, monkeypatch, KeyboardInterrupt())
    other = Scores.random(model, example(), seed=2).plan(alpha=0.6)
    fxprune.rewrite_checkpoint(source, other, tmp_path / "small", model=ghost_of(), resume=False)
    assert not left.exists()
    left.mkdir()
    (left / "letters").write_text("mine")
    (tmp_path / "small").rename(tmp_path / "done")
    for resume in (True, False):
        with pytest.raises(CheckpointError, match="is no unfinished run of rewrite_checkpoint"):
            fxprune.rewrite_checkpoint(source, other, tmp_path / "small", model=ghost_of(), resume=resume)
    assert (left / "letters").read_text() == "mine"


def test_killed_in_the_last_step(made: tuple[Net, Plan, Path], tmp_path: Path) -> None:
    _, plan, source = made
    fxprune.rewrite_checkpoint(source, plan, tmp_path / "small", model=ghost_of())
    before = contents(tmp_path / "small")
    (tmp_path / "small").rename(tmp_path / ".small.unfinished")
    for path in (tmp_path / ".small.unfinished").glob("model-*"):
        os.utime(path, ns=(0, 0))
    fxprune.rewrite_checkpoint(source, plan, tmp_path / "small", model=ghost_of())
    assert contents(tmp_path / "small") == before
    assert {p.stat().st_mtime_ns for p in (tmp_path / "small").glob("model-0*")} == {0}
