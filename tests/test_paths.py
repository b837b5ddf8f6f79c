"""Where nothing can be read or written: devices, pipes, sockets, folders, and what is no path at all."""

from __future__ import annotations

import importlib.util
import os
import re
import socket
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fxprune
from fxprune import CheckpointError, FxpruneError, Plan, Scores
from fxprune.recovery import epoch_checkpoint as checkpoint


def model() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))


BATCHES = [(torch.randn(8, 4), torch.arange(8) % 3)]
SCORES = Scores.random(model(), torch.zeros(2, 4))
PLAN = SCORES.plan(alpha=0.5)
SMALL = fxprune.apply(model(), PLAN)

Use = Callable[[Any], object]
WRITERS: dict[str, Use] = {
    "Plan.save": PLAN.save,
    "Scores.save": SCORES.save,
    "save": lambda path: fxprune.save(SMALL, path),
    "to_html": lambda path: fxprune.report(SMALL).to_html(path),
    "checkpoint of finetune": lambda path: checkpoint.write(path, {}, {}),
    "checkpoint of score": lambda path: fxprune.score(model(), BATCHES, checkpoint=path, progress=False),
}
if importlib.util.find_spec("typer"):
    from fxprune.cli.files import check_writable, write_json

    WRITERS |= {"files of the command line": lambda path: write_json(path, {})}
    WRITERS |= {"what the command line checks": check_writable}
READERS: dict[str, Use] = {
    "Plan.load": Plan.load,
    "Scores.load": Scores.load,
    "load": lambda path: fxprune.load(path, model()),
    "checkpoint of finetune": lambda path: checkpoint.read(path, {}, torch.device("cpu")),
    "Manifest.load": fxprune.Manifest.load,
}


def device(path: Path) -> None:
    try:
        os.mknod(path, stat.S_IFCHR | 0o600, os.makedev(1, 3))  # another /dev/null
    except OSError:
        pytest.skip("devices cannot be made here")


def bound(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(os.path.relpath(path))


THINGS: dict[str, tuple[Callable[[Path], None], str]] = {
    "pipe": (os.mkfifo, "it is a pipe; name a regular file"),
    "device": (device, "it is a device; name a regular file"),
    "socket": (bound, "it is a socket; name a regular file"),
    "folder": (Path.mkdir, "it is a folder; name a file in it"),
}
USES = [("written", use) for use in WRITERS.values()] + [("read", use) for use in READERS.values()]
NAMES = [f"{verb}: {name}" for verb, uses in (("written", WRITERS), ("read", READERS)) for name in uses]
every_use = pytest.mark.parametrize(("verb", "use"), USES, ids=NAMES)


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such files")
@pytest.mark.parametrize("linked", [False, True], ids=["itself", "by a link"])
@pytest.mark.parametrize("thing", THINGS)
@every_use
def test_what_is_no_regular_file_is_left_alone(verb: str, use: Use, thing: str, linked: bool, tmp_path: Path) -> None:
    make, said = THINGS[thing]
    make(tmp_path / "thing")
    path = tmp_path / "link" if linked else tmp_path / "thing"
    if linked:
        path.symlink_to("thing")
    before = (tmp_path / "thing").lstat()
    with pytest.raises(FxpruneError, match=f"{re.escape(str(path))} cannot be {verb}: {said}"):
        use(path)
    after = (tmp_path / "thing").lstat()
    assert (before.st_ino, before.st_mode, before.st_rdev) == (after.st_ino, after.st_mode, after.st_rdev)
    assert len([*tmp_path.iterdir()]) == 1 + linked


ODD: dict[str, tuple[Any, str]] = {
    "bytes": (b"x.json", "b'x.json' cannot be (written|read) .*bytes.*name it by a str or a pathlib.Path"),
    "None": (None, "None cannot be (written|read) .*NoneType.*name it by a str or a pathlib.Path"),
    "a number": (7, "7 cannot be (written|read) .*int.*name it by a str or a pathlib.Path"),
    "a null byte": ("a\0b", r"a\\x00b' cannot be (written|read) .*null.*name it by a str or a pathlib.Path"),
    "half a character": ("a\ud800", r"a\\ud800' cannot be (written|read) .*name it by a str or a pathlib.Path"),
    "10,000 characters": ("x" * 10_000, r"x{200}\.\.\. cannot be (written|read) \(File name too long\)$"),
}


@pytest.mark.parametrize("odd", ODD)
@every_use
def test_what_is_no_path(verb: str, use: Use, odd: str) -> None:
    path, said = ODD[odd]
    if path is None and use in (WRITERS["checkpoint of score"], WRITERS.get("what the command line checks")):
        use(path)  # which means that there is nothing to write
        return
    if use is WRITERS["checkpoint of score"] and not isinstance(path, str):
        said = "checkpoint is .*; it is the path of a file"
    with pytest.raises(FxpruneError, match=said):
        use(path)


def test_folders_of_checkpoints(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    tries: list[tuple[Any, Any, str]] = [
        (tmp_path / "file", tmp_path / "new", "file cannot be read: it is a file; name a folder"),
        (tmp_path, tmp_path / "file", "file cannot be written: it is a file; name a folder"),
        (None, tmp_path / "new", "None cannot be read"),
        (tmp_path, b"new", "b'new' cannot be written"),
        (tmp_path, "x" * 10_000, "cannot be written .File name too long"),
    ]
    for source, target, said in tries:
        with pytest.raises(CheckpointError, match=said):
            fxprune.rewrite_checkpoint(source, PLAN, target, model=model())
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such files")
def test_shards_and_weights_that_are_pipes(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"model\.safetensors cannot be read: it is a pipe"):
        fxprune.rewrite_checkpoint(tmp_path, PLAN, tmp_path / "new", model=model())
    pytest.importorskip("typer")
    from fxprune.cli.weights import with_weights

    with pytest.raises(FxpruneError, match=r"model\.safetensors cannot be read: it is a pipe"):
        with_weights(model(), tmp_path / "model.safetensors")
