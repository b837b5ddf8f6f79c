"""The command in messages that installs more of fxprune is one that works here."""

from __future__ import annotations

import json
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import pytest

from fxprune.caller import installation
from fxprune.caller.installation import install


class Recorded:
    """A distribution with one record of where it came from, or none."""

    def __init__(self, record: Any) -> None:
        self.record = record

    def read_text(self, name: str) -> str | None:
        assert name == "direct_url.json"
        return None if self.record is None else json.dumps(self.record)


def installed(monkeypatch: pytest.MonkeyPatch, record: Any) -> str:
    monkeypatch.setattr(installation, "distribution", lambda name: Recorded(record))
    return install("cli")


def test_from_an_index(monkeypatch: pytest.MonkeyPatch) -> None:
    assert installed(monkeypatch, None) == "pip install 'fxprune[cli]'"


@pytest.mark.parametrize(("editable", "option"), [(True, "-e "), (False, "")])
def test_from_a_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, *, editable: bool, option: str) -> None:
    record = {"url": tmp_path.as_uri(), "dir_info": {"editable": editable}}
    assert installed(monkeypatch, record) == f"pip install {option}'{tmp_path}[cli]'"


def test_from_a_folder_with_a_space(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folder = tmp_path / "my checkout"
    folder.mkdir()
    assert installed(monkeypatch, {"url": folder.as_uri(), "dir_info": {}}) == f"pip install '{folder}[cli]'"


def test_from_a_folder_that_is_gone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    record = {"url": (tmp_path / "gone").as_uri(), "dir_info": {"editable": True}}
    assert installed(monkeypatch, record) == "pip install 'fxprune[cli]'"


def test_from_an_archive(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    record = {"url": (tmp_path / "fxprune.whl").as_uri(), "archive_info": {}}
    assert installed(monkeypatch, record) == "pip install 'fxprune[cli]'"


def test_in_a_checkout_that_is_not_installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def missing(name: str) -> None:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(installation, "distribution", missing)
    monkeypatch.setattr(installation, "__file__", str(tmp_path / "fxprune" / "caller" / "installation.py"))
    assert install("cli") == "pip install 'fxprune[cli]'"
    (tmp_path / "pyproject.toml").touch()
    assert install("cli") == f"pip install -e '{tmp_path}[cli]'"
