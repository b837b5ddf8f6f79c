"""The sessions of docs/cli.md: its commands, and what they print. `python tests/sessions.py` runs them all anew.

A block whose first line is a comment with a file's name is that file; one that begins with "$ " is a session.
"""

from __future__ import annotations

import os
import re
import runpy
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

PAGE = Path(__file__).parent.parent / "docs" / "cli.md"
BLOCK = re.compile(r"^```\n(.*?)\n```$", re.MULTILINE | re.DOTALL)


def files(text: str) -> dict[str, str]:
    """The files that a page lists, by name."""
    bodies = BLOCK.findall(text)
    return {body.split()[1]: f"{body}\n" for body in bodies if re.match(r"# \w+\.py\n", body)}


def prepare(text: str, folder: Path) -> None:
    """Write the files of a page, and run the one that trains; the folder has to be the working directory."""
    for name, content in files(text).items():
        (folder / name).write_text(content, encoding="utf-8")
    sys.path.insert(0, str(folder))
    try:
        runpy.run_path("train.py")
    finally:
        sys.path.remove(str(folder))


def sessions(text: str) -> Iterator[tuple[str, str]]:
    """Every command of a page, as it stands there, with what the page says that it prints."""
    for body in BLOCK.findall(text):
        if body.startswith("$ "):
            for part in re.split(r"^(?=\$ )", body, flags=re.MULTILINE)[1:]:
                command, printed = re.fullmatch(r"\$ ((?:[^\n]*\\\n)*[^\n]*)\n?(.*)", part.rstrip(), re.DOTALL).groups()
                yield command, printed


def arguments(command: str) -> list[str]:
    """The words of a command, without the program's name."""
    return shlex.split(command.replace("\\\n", " "))[1:]


def renewed(text: str) -> str:
    """A page with what its commands print now."""
    with tempfile.TemporaryDirectory() as name:
        os.chdir(name)
        prepare(text, Path(name))
        for command, printed in list(sessions(text)):
            words = [sys.executable, "-m", "fxprune", *arguments(command)]
            done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True)
            now = "\n".join(line.rstrip() for line in done.stdout.rstrip().splitlines())
            old, new = ("\n".join(filter(None, (f"$ {command}", shown))) for shown in (printed, now))
            text = text.replace(f"{old}\n", f"{new}\n")
        return text


if __name__ == "__main__":
    PAGE.write_text(renewed(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
