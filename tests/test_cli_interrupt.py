"""Ctrl-C, in processes of their own: status 130, no traceback, and no half-written file."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("typer")
COMMAND = [sys.executable, "-m", "fxprune"]
TORN_DISK = """
import time
from pathlib import Path
import fxprune.saving.container as container
from mynets import build, loader

def save_file(tensors, path, notes):
    Path(path).write_bytes(b"half of it")
    Path("started").touch()
    time.sleep(600)

container.save_file = save_file
"""
TORN_SCORES = """
import time
from pathlib import Path
import fxprune.caller.arrays as arrays
from mynets import build, loader

def write_array(file, array, allow_pickle):
    file.write(b"half of it")
    Path("started").touch()
    time.sleep(600)

arrays.npy.write_array = write_array
"""


def heeding():
    """Heed SIGINT: a shell has the jobs that it starts in the background ignore it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def interrupted(*arguments):
    """The process of a command that gets SIGINT once there is a file `started`."""
    process = subprocess.Popen(
        [*COMMAND, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=heeding
    )
    try:
        deadline = time.monotonic() + 300
        while not Path("started").exists():
            assert process.poll() is None, process.communicate()[1]
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=300)
    finally:
        process.kill()
    return process.returncode, out, err


@pytest.mark.wide
@pytest.mark.skipif(os.name == "nt", reason="SIGINT cannot be sent to one process")
@pytest.mark.parametrize(
    ("module", "arguments"),
    [
        (None, ["compress", "mynets:build", "--data", "mynets:Stuck", "-o", "out.safetensors"]),
        (TORN_DISK, ["compress", "user:build", "--data", "user:loader", "-o", "out.safetensors", "--quiet"]),
        (TORN_SCORES, ["score", "user:build", "--data", "user:loader", "-o", "out.safetensors", "--json"]),
    ],
    ids=["while data is read", "while the artefact is written", "while scores are written"],
)
def test_an_interrupt_leaves_the_old_file(project, module, arguments):
    if module:
        (project / "user.py").write_text(module)
    (project / "out.safetensors").write_bytes(b"the old one")
    code, out, err = interrupted(*arguments)
    assert code == 130
    assert "Interrupted; no file was left half-written." in err
    assert "Traceback" not in err
    assert out in ("", "a model that talks\n")
    assert (project / "out.safetensors").read_bytes() == b"the old one"
    left = {path.name for path in project.iterdir()} - {"__pycache__", "mynets.py", "user.py"}
    assert left == {"out.safetensors", "started"}


def test_a_process_of_its_own_prints_one_object(project):
    """What user code prints goes to stderr, too."""
    done = subprocess.run(
        [*COMMAND, "compress", "mynets:build", "--data", "mynets:loader", "--macs", "0.7", "--json"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["out"] == "small.safetensors"
    assert done.stdout.count("\n") == 1
    assert "a model that talks" in done.stderr
