"""The errors that fxprune raises on purpose; each message names the thing, the numbers and the remedy."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class FxpruneError(Exception):
    """The parent of every error that fxprune raises on purpose; `stage` says while what, or nothing.

    Its text is `visible`: names and files that it quotes give no orders to a terminal.
    """

    stage = ""

    def __str__(self) -> str:
        text = visible(super().__str__())
        return f"while {self.stage}: {text}" if self.stage else text


class CaptureError(FxpruneError):
    """The model could not be turned into a graph."""


class UnsupportedOpError(FxpruneError):
    """The graph holds an operation for which no rule is registered."""


class CalibrationError(FxpruneError):
    """The model, a loader, its batches or the loss fail on the data, or there is too little memory for them."""


class PlanError(FxpruneError):
    """A plan contradicts the model, or a plan or score file cannot be read."""


class RewriteError(FxpruneError):
    """The graph cannot be rewritten so that its labels hold."""


class VerificationError(FxpruneError):
    """The rewritten model differs from the original with the removed units zeroed."""


class ArtifactError(FxpruneError):
    """A file of a pruned model cannot be written or read, or is not for the model that was given."""


class CheckpointError(FxpruneError):
    """A checkpoint cannot be read or rewritten, or is not of the model that was given."""


class NarrowError(FxpruneError):
    """A model's own class does not run with the layers that a plan leaves."""


class DistributedError(FxpruneError):
    """Several ranks were to work together, and one of them failed, was lost, or was given something else."""


class ExportError(FxpruneError):
    """A model cannot be exported, or what was exported does not give what the model gives."""


def text_of(error: BaseException | None) -> str:
    """An error's message; an empty one where its own `__str__` fails."""
    try:
        return str(error)
    except Exception:  # noqa: BLE001 - whatever the class of somebody else's error does
        return ""


def first_line(error: BaseException | None) -> str:
    """The first line of an error's message; torch.fx adds tracebacks below it."""
    return (text_of(error).splitlines() or [""])[0]


def told(error: BaseException | None) -> str:
    """An error's type and the first line of its message, and what helps where memory ran out.

    >>> told(ValueError("odd")), told(MemoryError())
    ('ValueError: odd', 'MemoryError: give smaller batches or another device=, they take too much memory')
    """
    parts = [type(error).__name__, first_line(error)]
    if is_of_memory(error):
        parts.append("give smaller batches or another device=, they take too much memory")
    if "'lengths' argument should be a 1D CPU" in text_of(error):
        parts.append("move the other tensors of a batch to the device, with unpack=, and its lengths stay on the CPU")
    return ": ".join(part for part in parts if part)


def is_of_memory(error: BaseException | None) -> bool:
    """Whether an error says that memory ran out: Python's, a device's, or that of torch on the CPU, a RuntimeError."""
    return isinstance(error, MemoryError) or any(sign in text_of(error) for sign in _SIGNS)


_SIGNS = ("out of memory", "DefaultCPUAllocator")


@contextmanager
def blaming(what: str, where: str, remedy: str = "") -> Iterator[None]:
    """Say what failed and on what, in the place of any error; fxprune's own errors go on as they are.

    Raises CalibrationError.
    """
    try:
        yield
    except FxpruneError:
        raise
    except Exception as error:
        raise CalibrationError(f"{what} fails on {where} ({told(error)}){remedy}") from error


@contextmanager
def stage(doing: str) -> Iterator[None]:
    """Let errors of data say what was being done with them; say the same where memory runs out."""
    try:
        yield
    except CalibrationError as error:
        error.stage = error.stage or ("" if str(error).startswith(doing) else doing)
        raise
    except Exception as error:
        if isinstance(error, FxpruneError) or not is_of_memory(error):
            raise
        short = CalibrationError(told(error))
        short.stage = doing
        raise short from error


def summary(error: BaseException) -> str:
    """An error's first line, and the one after it where the first only announces it."""
    lines = [" ".join(line.split()) for line in text_of(error).splitlines()] or [""]
    return " ".join(lines[: 2 if lines[0].endswith(":") else 1])


class FxpruneWarning(UserWarning):
    """Something that the user asked for had no effect, or had another effect than asked."""

    def __str__(self) -> str:
        return visible(super().__str__())


def visible(text: str) -> str:
    r"""Text in which all that a terminal would obey, or not show, stands as an escape; ends of lines stay.

    >>> print(visible("conv\x1b[31m1"))
    conv\x1b[31m1
    """
    if text.replace("\n", "").isprintable():
        return text
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)
