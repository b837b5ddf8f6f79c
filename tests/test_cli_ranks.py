"""Commands under torchrun: the work is shared, and the first rank alone speaks and writes."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import fxprune

pytest.importorskip("typer")
pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without distributed")
RANKS = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "fxprune"]
ALONE = [sys.executable, "-m", "fxprune"]
DATA = ["mynets:build", "--data", "mynets:loader"]


def ran(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)


@pytest.mark.wide
def test_ranks_score_and_compress_as_one_does(project: Path) -> None:
    for start, name in ((ALONE, "alone"), (RANKS, "ranks")):
        done = ran(*start, "score", *DATA, "-o", f"{name}.npz")
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("Scored 24 units") == 1
    alone, ranks = (fxprune.Scores.load(f"{name}.npz") for name in ("alone", "ranks"))
    assert np.allclose(alone.propose, ranks.propose, rtol=1e-5, atol=1e-6)
    assert alone.plan(macs=0.6).keep == ranks.plan(macs=0.6).keep
    done = ran(*RANKS, "compress", *DATA, "--macs", "0.6", "--json", "-o", "small.safetensors")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["out"] == "small.safetensors"
    assert found["report"]["macs_after"] <= 0.6 * found["report"]["macs_before"]
    assert {path.name for path in project.iterdir()} >= {"small.safetensors"}
    small = fxprune.load("small.safetensors", build=True)
    assert fxprune.report(small).compensation.after < fxprune.report(small).compensation.before


@pytest.mark.wide
def test_what_cannot_be_shared_says_so(project: Path) -> None:
    done = ran(*RANKS, "inspect", "mynets:build")
    assert done.returncode == 1
    assert "fxprune inspect works on one rank, and torchrun started 2: start it without torchrun" in done.stderr
    assert not list(project.glob("*.svg"))
