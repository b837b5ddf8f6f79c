"""Fixtures that all tests share."""

from __future__ import annotations

import os
import random
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import settings
from torch import fx

settings.register_profile("fxprune", deadline=None, derandomize=True, max_examples=60)
settings.load_profile("fxprune")
torch.set_num_threads(1)  # the tests run in one process a core
torch.set_warn_always(True)  # what torch says once a process would hit whichever test comes first


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Every test starts from the same random state."""
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)


@pytest.fixture(scope="session")
def data() -> Path:
    """The folder with the CIFAR-10 images and checkpoints."""
    folder = os.environ.get("FXPRUNE_DATA")
    if not folder:
        pytest.skip("FXPRUNE_DATA does not name the folder with the CIFAR-10 images and checkpoints")
    return Path(folder)


@pytest.fixture
def project(tmp_path, monkeypatch) -> Iterator[Path]:
    """The working directory of a user of the command line, whose models and data are in mynets.py."""
    shutil.copy(Path(__file__).parent / "mynets.py", tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(tmp_path)):
            del sys.modules[name]


@pytest.fixture
def steady_times(monkeypatch) -> None:
    """Every node takes as long as its weights and outputs are large, in place of what a busy machine takes for it."""
    from fxprune.scoring import node_times

    total = [0.0]

    def run_node(self, node):
        value = fx.Interpreter.run_node(self, node)
        held = self.module.get_submodule(node.target).parameters() if node.op == "call_module" else ()
        sizes = [
            tensor.numel() for tensor in (*held, *torch.utils._pytree.tree_leaves(value)) if torch.is_tensor(tensor)
        ]
        self.seconds[node.name].append(1e-6 + 1e-9 * sum(sizes))
        total[0] = sum(seconds[-1] for seconds in self.seconds.values() if seconds)
        return value

    monkeypatch.setattr(node_times._TimedNodes, "run_node", run_node)
    monkeypatch.setattr(
        node_times, "timed", lambda call, device: (call(), total[0])
    )  # of the whole: what its nodes take
