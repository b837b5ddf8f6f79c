"""Running commands of fxprune in this process."""

import json
import re
from typing import Any

import pytest

typer = pytest.importorskip("typer")
CliRunner = pytest.importorskip("typer.testing").CliRunner
WIDE = {"TERMINAL_WIDTH": "300", "COLUMNS": "300"}


def invoke(*arguments: object):
    """A command's exit code and what it printed."""
    from fxprune import cli

    return CliRunner().invoke(cli.build_app(), list(map(str, arguments)), env=WIDE, catch_exceptions=False)


def done(*arguments: object) -> dict[str, Any]:
    """The JSON object of a command that went well."""
    result = invoke(*arguments, "--json")
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


def flat(text: str) -> str:
    """A text without line breaks, colours, and the frames around messages."""
    return " ".join(re.sub(r"\x1b\[[0-9;]*m|[│╭╮╰╯─]", " ", text).split())
