"""How fxprune was installed, for messages that ask for more of it."""

from __future__ import annotations

import json
import shlex
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname


def install(extra: str) -> str:
    """The command that installs an extra of fxprune: by its name, or from the folder that it was installed from.

    >>> install("cli")
    "pip install ...cli]'"
    """
    folder, editable = _source()
    what = "fxprune" if folder is None else str(folder)
    return f"pip install {'-e ' * editable}{shlex.quote(f'{what}[{extra}]')}"


def _source() -> tuple[Path | None, bool]:
    """The folder that fxprune was installed from, if that is still there, and whether its files are used in place."""
    try:
        record = distribution("fxprune").read_text("direct_url.json")
    except PackageNotFoundError:  # it runs in a checkout that is not installed
        checkout = Path(__file__).parents[2]
        return (checkout, True) if (checkout / "pyproject.toml").is_file() else (None, False)
    found = json.loads(record) if record else {}
    folder = Path(url2pathname(urlsplit(found.get("url", "")).path))
    if "dir_info" not in found or not folder.is_dir():
        return None, False
    return folder, bool(found["dir_info"].get("editable"))
