"""docs/cli.md: its commands run in their order, and print what the page says, but for numbers of the machine."""

import re

import pytest
from command_line import invoke
from sessions import PAGE, arguments, files, prepare, sessions

TEXT = PAGE.read_text(encoding="utf-8")
OF_THE_TRAINING = re.compile(r"(?<=loss )[\d.]+, right on [\d.]+%")  # differs with the number of threads
COMMANDS = ("compress", "score", "plan", "apply", "report", "inspect", "sweep", "demo")


def test_every_command_has_a_session():
    assert {arguments(command)[0] for command, _ in sessions(TEXT)} == set(COMMANDS)
    assert set(files(TEXT)) == {"digits.py", "train.py"}


@pytest.mark.wide
@pytest.mark.filterwarnings("ignore")  # of the other libraries
def test_sessions_run(project):
    pytest.importorskip("timm")
    prepare(TEXT, project)
    for command, printed in sessions(TEXT):
        words = arguments(command)
        if words[0] == "demo":  # test_demo.py runs it
            continue
        result = invoke(*words)
        assert result.exit_code == 0, (command, result.output)
        shown = [line.rstrip() for line in result.stdout.splitlines()]
        assert [line for line in shown if line.startswith("Wrote")] == re.findall("^Wrote .*$", printed, re.MULTILINE)
        if words[0] in ("inspect", "score"):
            wanted = [OF_THE_TRAINING.sub("", line) for line in printed.splitlines()]
            assert [OF_THE_TRAINING.sub("", line) for line in shown] == wanted
    assert {path.name for path in project.glob("*.*")} >= {
        "groups.svg", "small.safetensors", "small.onnx", "scores.npz", "plan.json", "digits.pt"
    }  # fmt: skip
