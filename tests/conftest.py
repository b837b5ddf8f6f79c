"""Fixtures that all tests share."""

from __future__ import annotations

import os
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import settings

settings.register_profile("fxprune", deadline=None, derandomize=True, max_examples=60)
settings.load_profile("fxprune")
torch.set_num_threads(1)  # the tests run in one process a core


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
