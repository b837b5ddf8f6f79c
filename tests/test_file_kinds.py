"""A file of another kind than the one wanted: the message names both kinds, and what reads the file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import fxprune
from fxprune.errors import FxpruneError

NET, X = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)).eval(), torch.randn(3, 4)
SCORES = fxprune.Scores.random(NET, X)
PLAN = SCORES.plan(macs=0.7)
WRITE: dict[str, Callable[[Path], Any]] = {
    "a plan": PLAN.save,
    "a score file": SCORES.save,
    "a pruned model": lambda path: fxprune.save(fxprune.apply(NET, PLAN), path),
    "a safetensors file of weights": lambda path: save_file(NET.state_dict(), path),
    "a file of torch.save": lambda path: torch.save(NET.state_dict(), path),
    "a program of torch.export": lambda path: torch.export.save(torch.export.export(NET, (X,)), path),
}
READ: dict[str, Callable[[Path], Any]] = {
    "a plan": fxprune.Plan.load,
    "a score file": fxprune.Scores.load,
    "a pruned model": lambda path: fxprune.load(path, NET),
}


@pytest.mark.parametrize("wanted", READ)
@pytest.mark.parametrize("given", WRITE)
def test_a_file_of_another_kind(tmp_path: Path, given: str, wanted: str) -> None:
    path = tmp_path / ("file.pt2" if "export" in given else "file")
    WRITE[given](path)
    if given == wanted:
        assert READ[wanted](path) is not None
        return
    said = f"file.* is {given}, not {wanted}: .* reads it"
    if (given, wanted) == ("a safetensors file of weights", "a pruned model"):
        said = "a safetensors file without fxprune's header: load it as a state_dict"
    with pytest.raises(FxpruneError, match=said):
        READ[wanted](path)


@pytest.mark.parametrize(("read", "message"), [
    (fxprune.Plan.load, r"is not a plan that Plan.save wrote \(it is no text\)$"),
    (fxprune.Scores.load, r"is not a score file that Scores.save wrote \(it is no .npz, or is cut off\)$"),
])  # fmt: skip
def test_a_file_of_no_known_kind(tmp_path: Path, read: Callable[[Path], Any], message: str) -> None:
    (tmp_path / "file").write_bytes(b"\xff\xfe\xdd")
    with pytest.raises(FxpruneError, match=message):
        read(tmp_path / "file")
