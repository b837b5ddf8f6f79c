"""Lines of the user's code in tracebacks and stacks; code of torch and of fxprune is not the user's."""

from __future__ import annotations

import ast
import inspect
import linecache
import os
import traceback
from pathlib import Path
from types import FrameType

import torch

HOMES = tuple(f"{home}{os.sep}" for home in (Path(str(torch.__file__)).parent, Path(__file__).parents[1]))


def is_users(filename: str) -> bool:
    """Whether a source file is the user's: not torch's, fxprune's or generated."""
    return not filename.startswith((*HOMES, "<"))


def line_of(error: BaseException) -> str:
    """The innermost line of the user's in an error's traceback, or in that of its cause."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if is_users(frame.filename)]
    if not frames and error.__cause__ is not None:
        return line_of(error.__cause__)
    return f"{frames[-1].filename}:{frames[-1].lineno}: {frames[-1].line}" if frames else "a line inside torch"


def users_frame() -> FrameType | None:
    """The innermost frame of the user's in the stack."""
    frame = inspect.currentframe()
    while frame is not None and not is_users(frame.f_code.co_filename):
        frame = frame.f_back
    return frame


def users_line() -> str | None:
    """The innermost line of the user's in the stack, in the form of a traceback."""
    frame = users_frame()
    if frame is None:
        return None
    filename, number = frame.f_code.co_filename, frame.f_lineno
    line = linecache.getline(filename, number).strip()
    return f'File "{filename}", line {number}, in {frame.f_code.co_name}\n    {line}'


def deciding_line(frame: FrameType) -> str | None:
    """The current line of a frame, or None where its statement is an assertion, or an `if` that raises."""
    filename, number = frame.f_code.co_filename, frame.f_lineno
    inner = [node for node in _statements(filename) if node.lineno <= number <= (node.end_lineno or node.lineno)]
    statement = max(inner, key=lambda node: (node.lineno, -(node.end_lineno or 0)), default=None)
    raises = isinstance(statement, ast.If) and isinstance(statement.body[0], ast.Raise)
    call = statement.value if isinstance(statement, ast.Expr) else None
    asserts = isinstance(statement, ast.Assert) or (isinstance(call, ast.Call) and "assert" in ast.unparse(call.func))
    if raises or asserts:
        return None
    return f"{filename}:{number}: {linecache.getline(filename, number).strip()}"


def _statements(filename: str) -> list[ast.stmt]:
    """All statements of a source file; none where it cannot be read."""
    try:
        tree = ast.parse("".join(linecache.getlines(filename)))
    except SyntaxError:
        return []
    return [node for node in ast.walk(tree) if isinstance(node, ast.stmt)]
