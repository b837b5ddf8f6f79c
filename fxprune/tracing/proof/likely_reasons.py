"""Likely reasons why a graph gives other outputs: code in a forward that a graph may not hold."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator

from torch import nn

from fxprune.caller.source_lines import is_users

_PATTERNS = (
    (r"\btype\(|\.__class__\b", "asks for the exact type of a value; ask with isinstance"),
    (r"\bnp\.|numpy\.|\.numpy\(", "computes with NumPy, which no graph holds; use torch's functions"),
    (r"vmap|torch\.func|functorch|\bjit\.", "calls a function that torch.fx cannot look into; write it with tensors"),
    (r"\bcallable\(|\bhasattr\(|\bgetattr\(", "asks what a value can do; ask with isinstance"),
    (r"\bexcept\b", "catches errors; decide before, by a size or an argument"),
    (r"\.item\(|\.tolist\(|\bfloat\(|\bint\(", "makes a Python number of a value, which the graph then holds fixed"),
    (r"^(if|while|elif)\b|\bif\b.*\belse\b", "decides by something that its graph holds fixed"),
)


def likely_reasons(model: nn.Module) -> Iterator[str]:
    """Code of the user's classes that a graph may not hold, with its lines; the likeliest first."""
    lines = []
    for kind in dict.fromkeys(type(module) for module in model.modules()):
        try:
            filename, (source, start) = inspect.getsourcefile(kind), inspect.getsourcelines(kind)
        except (OSError, TypeError):
            continue
        if filename is not None and is_users(filename):
            lines += [(line.partition("#")[0].strip(), f"{filename}:{start + at}") for at, line in enumerate(source)]
    for pattern, what in _PATTERNS:
        yield from (f"the forward {what} ({where}: {line})" for line, where in lines if re.search(pattern, line))
