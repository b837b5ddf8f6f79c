"""Lines of the user's code in tracebacks and stacks; code of torch and of fxprune is not the user's."""

from __future__ import annotations

import ast
import functools
import inspect
import linecache
import os
import traceback
import warnings
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from fxprune.errors import FxpruneWarning

HOMES = tuple(f"{home}{os.sep}" for home in (Path(str(torch.__file__)).parent, Path(__file__).parents[1]))


_CAPTURE = str(Path(__file__).parents[1] / "tracing" / "capture.py")
_TYPED = ("<stdin>", "<ipython")  # code that a user types


def is_users(filename: str) -> bool:
    """Whether a source file is the user's: not torch's, fxprune's or generated."""
    return not filename.startswith((*HOMES, "<")) or filename.startswith(_TYPED)


def line_of(error: BaseException) -> str:
    """The innermost line of the user's in an error's traceback, or in that of its cause."""
    frames = users_frames(error)
    if not frames:
        return "a line inside torch"
    filename, number = frames[-1][0].f_code.co_filename, frames[-1][1]
    return f"{filename}:{number}: {linecache.getline(filename, number).strip()}"


def users_frames(error: BaseException) -> list[tuple[FrameType, int]]:
    """The user's frames in an error's traceback, or in that of its cause, each with its line; the innermost is last."""
    frames = [found for found in traceback.walk_tb(error.__traceback__) if is_users(found[0].f_code.co_filename)]
    return users_frames(error.__cause__) if not frames and error.__cause__ is not None else frames


def warn(text: str) -> None:
    """Give an FxpruneWarning at the user's line that is running."""
    frame, level = inspect.currentframe(), 1
    while frame is not None and not is_users(frame.f_code.co_filename):
        frame, level = frame.f_back, level + 1
    warnings.warn(text, FxpruneWarning, stacklevel=level)


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
    """The current line of a frame; None where its statement is an assertion, or an `if` that raises, uncaught."""
    filename, number = frame.f_code.co_filename, frame.f_lineno
    inner = [node for node in _statements(filename) if node.lineno <= number <= (node.end_lineno or node.lineno)]
    statement = max(inner, key=lambda node: (node.lineno, -(node.end_lineno or 0)), default=None)
    raises = isinstance(statement, ast.If) and isinstance(statement.body[0], ast.Raise)
    call = statement.value if isinstance(statement, ast.Expr) else None
    asserts = isinstance(statement, ast.Assert) or (isinstance(call, ast.Call) and "assert" in ast.unparse(call.func))
    if (raises or asserts) and not _is_caught(frame):
        return None
    return f"{filename}:{number}: {linecache.getline(filename, number).strip()}"


def _is_caught(frame: FrameType | None) -> bool:
    """Whether the forward that is traced catches what a frame may raise, there or in a frame that called it."""
    while frame is not None and not frame.f_code.co_filename.startswith(_CAPTURE):
        number = frame.f_lineno
        for node in _statements(frame.f_code.co_filename) if is_users(frame.f_code.co_filename) else ():
            catches = isinstance(node, ast.Try) and node.handlers
            suppresses = isinstance(node, ast.With) and "suppress" in ast.unparse(node.items[0])
            if (catches or suppresses) and node.body[0].lineno <= number <= (node.body[-1].end_lineno or number):  # type: ignore[attr-defined]
                return True
        frame = frame.f_back
    return False


def _statements(filename: str) -> tuple[ast.stmt, ...]:
    """All statements of a source file; none where it cannot be read."""
    linecache.getlines(filename)  # a file that changed on the disk keeps the lines that are running
    return _parsed(filename, linecache.cache.get(filename, ())[:2])


@functools.lru_cache(maxsize=16)
def _parsed(filename: str, _version: tuple[Any, ...]) -> tuple[ast.stmt, ...]:
    try:
        tree = ast.parse("".join(linecache.getlines(filename)))
    except SyntaxError:
        return ()
    return tuple(node for node in ast.walk(tree) if isinstance(node, ast.stmt))
