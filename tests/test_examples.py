"""The scripts in examples/ run, and print what they are about; their data ship with scikit-learn."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
SHARED = {"digits.py", "gguf_file.py"}  # of the others, and run by test_plain

SHARE = r"accuracy ([\d.]+)\n"
# script: what its output has to have, with numbers in groups, and the least of each
EXPECTED = {
    "quickstart.py": (r"accuracy: ([\d.]+) before, ([\d.]+) after", (0.9, 0.5)),
    "cnn.py": (f"original: {SHARE}pruned: {SHARE}trained on: {SHARE}", (0.9, 0.5, 0.9)),
    "vit.py": (f"original: {SHARE}whole heads.* {SHARE}places.* {SHARE}", (0.9, 0.7, 0.7)),
    "lstm.py": (f"original: 64 units, {SHARE}80% .*{SHARE}", (0.9, 0.8)),
    "mixture_of_experts.py": (
        r"original: accuracy ([\d.]+)\nhidden units: .* accuracy ([\d.]+)(?:.|\n)*whole experts: .* accuracy ([\d.]+)"
        r"(?:.|\n)*experts -> 4: ",
        (0.9, 0.7, 0.5),
    ),
    "detector_backbone.py": (r"original: (\d+)% of the digits found(?:.|\n)*pruned: (\d+)% of", (50, 30)),
    "budgets.py": (rf"original: {SHARE}(?:.*\n)+macs 0.5 +(\d+)% +(\d+)% +([\d.]+)", (0.9, 20, 45, 0.7)),
    "yolo.py": (r"original: mAP50 ([\d.]+)\n(?:.*\n)+trained on.* ([\d.]+)\n.*\nonnx: mAP50 ([\d.]+)", (0.4, 0.0, 0.0)),
    "deployment.py": (r"accuracy: ([\d.]+), pruned ([\d.]+)\nloaded, the same outputs: True\nown class", (0.9, 0.7)),
}


def test_every_script_is_run_here() -> None:
    assert {path.name for path in EXAMPLES.glob("*.py")} - SHARED == set(EXPECTED)


@pytest.mark.slow
@pytest.mark.parametrize("name", EXPECTED)
def test_script_runs(name: str, tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    if "finetune" in (EXAMPLES / name).read_text(encoding="utf-8"):
        pytest.importorskip("lightning_fabric")
    if "ultralytics" in (EXAMPLES / name).read_text(encoding="utf-8"):
        pytest.importorskip("ultralytics")
    pattern, least = EXPECTED[name]
    command = [sys.executable, str(EXAMPLES / name)]
    env = os.environ | {"PYTHONPATH": str(EXAMPLES.parent), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=1800, check=False)
    assert done.returncode == 0, done.stderr
    found = re.search(pattern, done.stdout)
    assert found, done.stdout
    for number, bound in zip(found.groups(), least, strict=True):
        assert float(number) >= bound, done.stdout
    assert list(tmp_path.iterdir()) == []
