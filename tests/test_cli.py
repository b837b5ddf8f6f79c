"""The command line as a whole: help, usage, exit codes, output for programs, and what it says when typer is missing."""

import json
import re
import subprocess
import sys

import pytest
from command_line import flat, invoke

import fxprune
from fxprune import cli
from fxprune.caller.installation import install
from fxprune.caller.source_lines import warn
from fxprune.cli import extras
from fxprune.cli.app import COMMANDS, loaded
from fxprune.cli.option_names import OPTIONS, as_options
from fxprune.cli.output import Output
from fxprune.cli.sweeping import numbers_between


def test_alphas_are_sorted_and_distinct():
    assert numbers_between("0.3,0, 0.05,0.05") == (0.0, 0.05, 0.3)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0.1,much", "'much' is no number; write alpha as 0.02,0.05,0.1"),
        ("", "'' is no number"),
        ("1.5", "alpha 1.5 is outside 0 to 1"),
        ("-0.1", "alpha -0.1 is outside 0 to 1"),
        ("nan", "alpha nan is outside 0 to 1"),
    ],
)
def test_bad_alphas_are_named(text, message):
    with pytest.raises(ValueError, match="alpha") as caught:
        numbers_between(text)
    assert message in str(caught.value)


def test_version_is_the_installed_one():
    result = invoke("--version")
    assert (result.exit_code, result.output) == (0, f"fxprune {fxprune.__version__}\n")


def test_help_lists_all_commands_and_exit_codes():
    text = flat(invoke("--help").output)
    assert all(f" {command} " in text for command in COMMANDS)
    assert "0 done, 1 an error (its message is on stderr), 2 wrong usage, 130 interrupted" in text
    assert flat(invoke().output) == text


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command_has_an_example_and_says_what_each_option_does(command):
    result = invoke(command, "--help")
    example = COMMANDS[command].example
    assert result.exit_code == 0
    assert f"Example: {example}" in flat(result.output)
    assert "Exit codes:" in result.output
    options = re.findall(r"^│ [* ]*(--\S+)(.*)│$", result.output, re.MULTILINE)
    assert {"--json", "--quiet", "--help"} <= {name for name, _ in options}
    assert [name for name, rest in options if len(rest.split()) < 3] == []


@pytest.mark.parametrize("command", COMMANDS)
def test_the_list_of_commands_has_the_first_line_of_each_help(command):
    summary = COMMANDS[command].summary
    assert loaded(command).help.splitlines()[0] == summary
    assert f"{command} {summary}" in flat(invoke("--help").output)


def test_demo_says_what_is_missing(monkeypatch, tmp_path):
    monkeypatch.setattr(extras, "find_spec", lambda name: None if name in {"sklearn", "matplotlib"} else object())
    result = invoke("demo", "--out", tmp_path / "out")
    assert result.exit_code == 1
    assert "The demo needs scikit-learn and matplotlib, which" in result.stderr
    assert f"They come with the extra demo: {install('demo')}." in result.stderr


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


def test_an_error_has_its_message_alone(project):
    result = invoke("compress", "mynets:broken", "--model-arg", "width=8", "--data", "mynets:loader")
    assert result.exit_code == 1
    assert result.stderr.startswith("Error: mynets:broken(width=8) fails: OSError: no checkpoint of width 8 (line ")
    assert "mynets.py)" in result.stderr
    assert "Traceback" not in result.output
    assert list(project.glob("*.safetensors")) == []


def test_an_error_is_json_too(project):
    result = invoke("plan", "mynets.py", "--json")
    content = json.loads(result.stdout)
    assert result.exit_code == 1
    assert content["command"] == "plan"
    assert content["error"]["type"] == "PlanError"
    assert "mynets.py is not a score file that Scores.save wrote" in content["error"]["message"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["compress", "mynets:build"], "--data: none is given"),
        (["compress", "mynets", "--data", "mynets:loader"], "'mynets' names nothing: write torchvision:NAME, timm"),
        (["compress", "mynets:build", "--model-arg", "width", "--data", "mynets:loader"], "'width' is no key=value"),
        (["compress", "mynets:build", "--data", "nowhere"], "there is no folder 'nowhere'"),
        (["compress", "mynets:build", "--data", "mynets:loader", "--alpha", "2"], "Invalid value for '--alpha'"),
        (
            ["compress", "mynets:build", "--data", "mynets:loader", "--round-to", "heds=2"],
            "'heds=2' is no multiple such as 8, or heads=1,hidden=128: there is no kind of units 'heds'",
        ),
        (
            ["compress", "mynets:build", "--data", "mynets:loader", "--alpha", "0.1", "--macs", "0.5"],
            "--alpha 0.1 and --macs 0.5 are given: one of alpha, params, macs, latency decides",
        ),
        (["compress", "mynets:build", "--data", "mynets:loader", "--macs", "0"], "macs is 0.0; it is a share"),
        (["compress", "mynets:build", "--data", "mynets:loader", "--macs", "60"], "60 is not from 0 to 1; write 0.6"),
        (["compress", "mynets:build", "--data", "mynets:loader", "--image-size", "64x64"], "'64x64' is not one number"),
        (["compress", "resnet18", "--data", "mynets:loader"], "did you mean torchvision:resnet18"),
        (["compress", "nets", "--data", "mynets:loader"], "write torchvision:NAME, timm:NAME or package.module:callab"),
        (
            ["inspect", "net.safetensors"],
            "'net.safetensors' is a file: name the model first, and the file by --weights",
        ),
        (["compress", "mynets:build", "--data", "mynets:loader", "--propose", "luck"], "'luck' is none of"),
        (
            ["compress", "mynets:build", "--data", "mynets:loader", "--compensate", "luck"],
            "'luck' is none of none, bias",
        ),
        (
            ["compress", "mynets:build", "--data", "mynets:loader", "--compensate", "squential"],
            "'squential' is none of none, bias, ridge, sequential; did you mean sequential?",
        ),
        (["compress", "mynets:build", "--data", "mynets:loader", "--macz", "0.5"], "No such option: --macz"),
        (["compress", "mynets:build", "--data", "mynets:loader", "--weights-key", "ema"], "names a part of --weights"),
        (["compress", "mynets:build", "--data", "mynets:loader", "--device", "abacus"], "abacus"),
        (
            ["compress", "mynets:build", "--data", "mynets:loader", "--export", "net.zip"],
            "net.zip has to end in .onnx or .pt2",
        ),
        (
            ["compress", "mynets:build", "--data", "mynets:loader", "--out", "net.pt"],
            "net.pt has to end in .safetensors",
        ),
        (["compress", "mynets:build", "--data", "mynets:loader", "--mean", "a"], "'a' is no list of numbers"),
        (["compress", "mynets:build", "--data", "mynets:loader", "--mean", "0,0"], "2 means and 3 standard deviations"),
        (["inspect", "mynets:build"], "is needed: the size of a sample, such as 3,224,224"),
        (["inspect", "mynets:build", "--input", "3,x"], "'3,x' is no size such as 3,224,224"),
        (["inspect", "mynets:build", "--input", "3,8,8", "--out", "a.txt"], "a.txt has to end in .svg, .png"),
        (["apply", "mynets:build", "nowhere.json"], "nowhere.json"),
        (["prune"], "No such command 'prune'"),
    ],
)
def test_wrong_usage_is_2(project, arguments, message):
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert message in flat(result.output)
    assert {path.name for path in project.iterdir()} <= {"mynets.py", "__pycache__"}


def test_quiet_shows_nothing(project):
    result = invoke("score", "mynets:model", "--data", "mynets:loader", "--quiet")
    assert (result.exit_code, result.stdout, result.stderr) == (0, "", "")


def test_bars_are_shown_on_a_terminal_unless_quiet(monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")
    for quiet in (False, True):
        with Output(json=False, quiet=quiet).busy("working") as bars:
            for part in bars.steps(["a", "b"], "parts"):
                bars.progress.refresh()
                assert part in "ab"
        out, err = capsys.readouterr()
        assert out == ""
        assert all((text in flat(err)) != quiet for text in ("working", "parts", "0/2", "1/2"))


def test_warnings_go_to_stderr_and_into_the_json(project):
    result = invoke("compress", "mynets:build", "--data", "mynets:loader", "--exclude", "*", "--json")
    assert result.exit_code == 0
    content = json.loads(result.stdout)
    assert len(content["warnings"]) == 1
    assert content["warnings"][0].startswith("nothing in Net can be pruned: ")
    assert f"Warning: {content['warnings'][0]}" in result.stderr


def test_main_says_what_is_missing(monkeypatch):
    monkeypatch.setattr(extras, "find_spec", lambda name: None if name == "typer" else object())
    with pytest.raises(SystemExit) as caught:
        cli.main()
    message = str(caught.value.code)
    assert message.startswith("fxprune's command line needs typer, which this Python does not have.")
    assert f"It comes with the extra cli: {install('cli')}." in message


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("prune in several rounds=, as compress does", "prune in several --rounds, as compress does"),
        ("lower round_to=16 or score with inexact=True", "lower --round-to 16 or score with --inexact"),
        ("pass unknown=\"freeze\" or compensate='none'.", "pass --unknown freeze or --compensate none."),
        ("run compress with rounds=2 or more", "run compress with --rounds 2 or more"),
        ("macs=0.25 asks for 25%, alpha=1e-05. It", "--macs 0.25 asks for 25%, --alpha 1e-05. It"),
        ("verify=False, or max_samples= and loader=", "--no-verify, or --samples and --data"),
        ("pass loss=, a callable(output, target)", "pass --loss, a callable(output, target)"),
        (
            "pass loss=lambda out, y: F.cross_entropy(out, torch.as_tensor(y, device=out.device))",
            "pass --loss MODULE:FUNCTION, where FUNCTION is lambda out, y: "
            "F.cross_entropy(out, torch.as_tensor(y, device=out.device))",
        ),
        ("nets:build(seed=3, run=1) fails; a.seed=1", "nets:build(seed=3, run=1) fails; a.seed=1"),
        ("dynamic_batch=False fixes it; unrounds=3", "dynamic_batch=False fixes it; unrounds=3"),
    ],
)
def test_remedies_are_options(text, wanted):
    assert as_options(text) == wanted


def test_every_name_in_a_remedy_is_an_option():
    texts = [invoke(command, "--help").output for command in COMMANDS]
    known = {option for text in texts for option in re.findall(r"--[a-z-]+", text)}
    assert set(OPTIONS.values()) <= known


def test_messages_of_the_library_name_options(project):
    data = ["--data", "mynets:loader"]
    result = invoke("compress", "mynets:build", *data, "--macs", "0.001", "--round-to", "4")
    assert result.stderr.startswith("Error: --macs 0.001 asks for 0.1% of the MACs, but ")
    assert "that can be reached: lower --round-to 4 or raise --macs 0.001 to at least 0.156" in result.stderr
    result = invoke("compress", "mynets:Odd", *data)
    assert "--unknown freeze" in result.stderr
    result = invoke("compress", "mynets:build", *data, "--loss", "mynets:pair", "--json")
    message = json.loads(result.stdout)["error"]["message"]
    assert "pass --loss, a callable(output, target) that takes these" in message
    assert message in result.stderr


def test_warnings_of_the_library_name_options(capsys):
    output = Output(json=False, quiet=True)
    with output.session("score"):
        warn("too few: pass max_samples=, or unknown='freeze'")
    assert output.warnings == ["too few: pass --samples, or --unknown freeze"]
    assert capsys.readouterr().err == "Warning: too few: pass --samples, or --unknown freeze\n"
