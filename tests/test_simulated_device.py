"""The tests of test_device.py on a device that needs no GPU, in a process of its own."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest


@pytest.mark.slow
@pytest.mark.skipif(
    sys.platform != "linux" or not shutil.which("c++") or not find_spec("ninja"),
    reason="needs Linux, a C++ compiler and ninja",
)
def test_models_on_a_simulated_device() -> None:
    here = Path(__file__).parent
    programs = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # ninja is beside Python
    paths = {"PATH": programs, "PYTHONPATH": str(here), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "pytest", "-p", "simulated", "-p", "no:cacheprovider", "-q"]
    done = subprocess.run(
        [*command, str(here / "test_device.py")], env=os.environ | paths, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    passed, skipped = (int(n) for n in re.search(r"(\d+) passed, (\d+) skipped", done.stdout).groups())
    assert passed >= 80
    assert skipped == 6  # fine-tuning
