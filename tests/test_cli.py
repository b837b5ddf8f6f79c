"""The command line: its messages, its options, and what it says when the demo extra is missing."""

import subprocess
import sys

import pytest
from typer.testing import CliRunner

import fxprune
from fxprune import cli


def invoke(*arguments: str):
    return CliRunner().invoke(cli.build_app(), arguments)


def test_alphas_are_sorted_and_distinct():
    assert cli.parse_alphas("0.3,0, 0.05,0.05") == (0.0, 0.05, 0.3)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0.1,much", "'much' is no number; write alphas as 0,0.05,0.1"),
        ("", "'' is no number"),
        ("1.5", "alpha 1.5 is outside 0 to 1"),
        ("-0.1", "alpha -0.1 is outside 0 to 1"),
        ("nan", "alpha nan is outside 0 to 1"),
    ],
)
def test_bad_alphas_are_named(text, message):
    with pytest.raises(ValueError, match="alpha") as caught:
        cli.parse_alphas(text)
    assert message in str(caught.value)


def test_bad_alphas_are_a_usage_error(tmp_path):
    result = invoke("demo", "--alphas", "0.1,7", "--out", str(tmp_path / "out"))
    assert result.exit_code == 2
    assert "outside 0 to 1" in " ".join(result.output.split())
    assert not (tmp_path / "out").exists()


def test_version_is_the_installed_one():
    result = invoke("--version")
    assert (result.exit_code, result.output) == (0, f"fxprune {fxprune.__version__}\n")


def test_help_names_the_demo_and_its_defaults():
    listing, details = invoke("--help").output, invoke("demo", "--help").output
    assert "demo" in listing
    for text in ("--out", "--alphas", "--seed", "--epochs", cli.DEMO_ALPHAS, str(cli.DEMO_FOLDER)):
        assert text in details


def test_missing_extra_is_said_with_the_remedy(monkeypatch):
    monkeypatch.setattr(cli, "find_spec", lambda name: None if name in {"typer", "sklearn"} else object())
    with pytest.raises(SystemExit) as caught:
        cli.main()
    message = str(caught.value.code)
    assert message.startswith("fxprune's command line needs typer and scikit-learn, which")
    assert "pip install 'fxprune[demo]'" in message


def test_command_line_module_needs_no_extra():
    """In a process that has no typer, main leaves with status 1 and the message, not with a traceback."""
    program = (
        "import sys, importlib.util as u; find = u.find_spec\n"
        "u.find_spec = lambda name, *a: None if name == 'typer' else find(name, *a)\n"
        "sys.modules['typer'] = None\n"
        "from fxprune.cli import main; main()"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "needs typer, which this Python does not have" in done.stderr
    assert "Traceback" not in done.stderr
