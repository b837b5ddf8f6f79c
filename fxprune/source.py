"""Where in the user's code something happens: what lies in torch and in fxprune is not the user's."""

from __future__ import annotations

import inspect
import linecache
import os
import traceback
from pathlib import Path
from types import FrameType

import torch

HOMES = tuple(f"{Path(file).parent}{os.sep}" for file in (str(torch.__file__), __file__))  # not the user's
_STATEMENTS = ("assert", "if ", "elif ", "while ", "return", "for ")


def is_users(filename: str) -> bool:
    """Whether a source file is the user's, and not torch's, fxprune's or generated."""
    return not filename.startswith((*HOMES, "<"))


def line_of(error: BaseException) -> str:
    """The innermost line of a traceback that is the user's."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if is_users(frame.filename)]
    return f"{frames[-1].filename}:{frames[-1].lineno}: {frames[-1].line}" if frames else "a line inside torch"


def users_frame() -> FrameType | None:
    """The innermost frame of the stack that is the user's."""
    frame = inspect.currentframe()
    while frame is not None and not is_users(frame.f_code.co_filename):
        frame = frame.f_back
    return frame


def users_line() -> str | None:
    """The innermost line of the stack that is the user's, as a traceback has it."""
    frame = users_frame()
    if frame is None:
        return None
    filename, number = frame.f_code.co_filename, frame.f_lineno
    line = linecache.getline(filename, number).strip()
    return f'File "{filename}", line {number}, in {frame.f_code.co_name}\n    {line}'


def deciding_line(frame: FrameType) -> str | None:
    """The line at which a frame stands, or None where the statement there is an assertion, or an `if` that raises."""
    filename, number = frame.f_code.co_filename, frame.f_lineno
    first = number
    while first > max(1, number - 8) and not linecache.getline(filename, first).lstrip().startswith(_STATEMENTS):
        first -= 1
    last = number
    while last < number + 8 and not linecache.getline(filename, last).rstrip().endswith(":"):
        last += 1
    lines = [linecache.getline(filename, at).strip() for at in (first, number, last + 1)]
    if "assert" in lines[0] or "assert" in lines[1] or (lines[0].startswith("if ") and lines[2].startswith("raise")):
        return None
    return f"{filename}:{number}: {lines[1]}"
