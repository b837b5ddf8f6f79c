"""What a wheel holds: the package whole, its licence, and nothing else; and that it runs as it is.

python .ci/wheel.py WHEEL
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from zipfile import ZipFile

ROOT = Path(__file__).parent.parent


def check(wheel: Path) -> None:
    """Exit with what is wrong, or come back."""
    with ZipFile(wheel) as file:
        held = {name for name in file.namelist() if ".dist-info/" not in name}
        notes = {name.rpartition("/")[2] for name in file.namelist() if ".dist-info/" in name}
    files = (path for path in (ROOT / "fxprune").rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    wanted = {path.relative_to(ROOT).as_posix() for path in files}
    if held != wanted:
        sys.exit(f"{wheel.name} lacks {sorted(wanted - held)} and has {sorted(held - wanted)} too many")
    if lacking := {"METADATA", "RECORD", "WHEEL", "LICENSE", "entry_points.txt"} - notes:
        sys.exit(f"{wheel.name} lacks {sorted(lacking)} of its notes")


def runs(wheel: Path) -> None:
    """Say the version, from the wheel alone."""
    env = os.environ | {"PYTHONPATH": str(wheel.resolve())}
    command = [sys.executable, "-m", "fxprune", "--version"]
    with tempfile.TemporaryDirectory() as elsewhere:
        said = subprocess.run(command, cwd=elsewhere, env=env, capture_output=True, text=True, check=False)
    version = wheel.name.split("-")[1]
    if said.stdout.strip() != f"fxprune {version}":
        sys.exit(f"{wheel.name} does not run: {said.stdout}{said.stderr}")


if __name__ == "__main__":
    check(Path(sys.argv[1]))
    runs(Path(sys.argv[1]))
