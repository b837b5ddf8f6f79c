"""Messages of the library in the words of the command line: the remedy `round_to=8` is `--round-to 8` there."""

from __future__ import annotations

import re

from fxprune.planning.allocation import BESIDE, ONLY

_SAME = (
    "allocate", "alpha", "blocks", "checkpoint", "classes", "compensate", "device", "equal_blocks", "every", "exclude",
    "head_dim", "inexact", "latency", "loss", "macs", "min_keep", "new_biases", "params", "propose", "protect",
    "query_heads", "round_to", "rounds", "run", "scores", "seed", "submodule", "unknown", "unpack", "verify",
)  # fmt: skip
OPTIONS = {name: f"--{name.replace('_', '-')}" for name in _SAME} | {
    "max_samples": "--samples", "loader": "--data", "ratios": "--ratio",
}  # fmt: skip
_CALL, _VALUE = r"\w\([^()]*\)", r"\"[^\"]*\"|'[^']*'|\{[^{}]*\}|[\w+-]+(?:\.[\w+-]+)*"
_TOKEN = re.compile(rf"{_CALL}|(?<![\w.-])({'|'.join(OPTIONS)})=({_VALUE})?")


def as_options(text: str) -> str:
    """A message with options in place of keyword arguments; calls in it stay as they are.

    >>> as_options('prune in several rounds=, or lower round_to=8; score with inexact=True')
    'prune in several --rounds, or lower --round-to 8; score with --inexact'
    >>> as_options('build(seed=3) fails; pass unknown="freeze"')
    'build(seed=3) fails; pass --unknown freeze'
    """
    return _TOKEN.sub(_option, text)


def _option(found: re.Match[str]) -> str:
    name, value = found.groups()
    if name is None:
        return found[0]
    if name == "blocks":
        return f"{OPTIONS[name]} {BESIDE if value == 'True' else ONLY}"
    if value == "lambda":  # options name functions
        return f"{OPTIONS[name]} MODULE:FUNCTION, where FUNCTION is lambda"
    if value in ("True", "False"):
        return OPTIONS[name] if value == "True" else OPTIONS[name].replace("--", "--no-", 1)
    return f"{OPTIONS[name]} {value.strip(chr(34) + chr(39))}" if value else OPTIONS[name]
