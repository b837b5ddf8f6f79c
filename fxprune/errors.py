"""The errors that fxprune raises on purpose; each message names the thing, the numbers and the remedy."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from typing import Any

_FIRST = 6  # names in a message


class FxpruneError(Exception):
    """The parent of every error that fxprune raises on purpose; `stage` is the work that failed, or empty.

    Its text is made `visible`, so that quoted names cannot control a terminal.
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
    """The model, a loader, its batches or the loss fail on the data, or memory runs out."""


class PlanError(FxpruneError):
    """A plan contradicts the model, or a plan or score file cannot be read."""


class UnreachableError(PlanError):
    """No plan is within a budget: what was `asked`, with the least share that can be reached, and the `remedies`."""

    def __init__(self, asked: str, remedies: Sequence[str] = ()) -> None:
        super().__init__(f"{asked}: {either(remedies)}" if remedies else asked)
        self.asked, self.remedies = asked, tuple(remedies)


class RewriteError(FxpruneError):
    """The graph cannot be rewritten so that its labels hold."""


class VerificationError(FxpruneError):
    """The rewritten model differs from the original with the removed units zeroed."""


class ArtifactError(FxpruneError):
    """A file of a pruned model cannot be written or read, or belongs to another model."""


class CheckpointError(FxpruneError):
    """A checkpoint cannot be read or rewritten, or belongs to another model."""


class NarrowError(FxpruneError):
    """A model's own class does not run with the narrowed layers of a plan."""


class DistributedError(FxpruneError):
    """One of several ranks failed, was lost, or was given other arguments than the rest."""


class ExportError(FxpruneError):
    """A model cannot be exported, or the exported file gives other outputs than the model."""


def text_of(error: BaseException | None) -> str:
    """An error's message, or an empty one where its own `__str__` fails."""
    try:
        return str(error)
    except Exception:  # noqa: BLE001 - the class of the error is not fxprune's
        return ""


def first_line(error: BaseException | None) -> str:
    """The first line of an error's message; torch.fx adds tracebacks below it."""
    return (text_of(error).splitlines() or [""])[0]


def error_text(error: BaseException | None) -> str:
    """An error's type and the first line of its message, with a remedy where memory ran out.

    >>> error_text(ValueError("odd")), error_text(MemoryError())
    ('ValueError: odd', 'MemoryError: give smaller batches or another device=, they take too much memory')
    """
    parts = [type(error).__name__, first_line(error)]
    if is_out_of_memory(error):
        parts.append("give smaller batches or another device=, they take too much memory")
    if "'lengths' argument should be a 1D CPU" in text_of(error):
        parts.append("move the other tensors of a batch to the device, with unpack=, and its lengths stay on the CPU")
    return ": ".join(part for part in parts if part)


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether an error says that memory ran out: Python's, a device's, or torch's RuntimeError on the CPU."""
    signs = "out of memory", "DefaultCPUAllocator"
    return isinstance(error, MemoryError) or any(sign in text_of(error) for sign in signs)


def a(noun: str) -> str:
    """A noun with its indefinite article; names that begin with two capitals are read letter by letter.

    >>> a("Encoder"), a("Linear"), a("LSTM"), a("UNet")
    ('an Encoder', 'a Linear', 'an LSTM', 'a UNet')
    """
    vowels = "AEFHILMNORSX" if noun[:2].isupper() else "AEIOU"
    return f"{'an' if noun[:1].upper() in vowels else 'a'} {noun}"


def a_kind(value: Any) -> str:
    """The type of a value, with its article.

    >>> a_kind(3), a_kind("three")
    ('an int', 'a str')
    """
    return a(type(value).__name__)


def close_names(name: str, known: Iterable[str]) -> str:
    """The end of a message about an unknown name: the known names that are close to it, if any.

    >>> close_names("conv11", ["conv1", "bn1"]), close_names("fc", ["conv1"])
    ("; close names: 'conv1'", '')
    """
    close = get_close_matches(name, dict.fromkeys(entry for entry in known if entry), n=3)
    return f"; close names: {', '.join(map(repr, close))}" if close else ""


def known_names(name: str, known: Iterable[str]) -> str:
    """The end of a message about an unknown name: the names close to it, or else the first ones at the top.

    >>> known_names("convv", ["", "conv", "fc"]), known_names("body", ["", "conv", "conv.0", "fc"])
    ("; close names: 'conv'", "; names are 'conv', 'fc'")
    """
    known = [entry for entry in known if entry]
    top = [entry for entry in known if "." not in entry]
    first = f"; names are {', '.join(map(repr, top[:_FIRST]))}{', ...' * (len(top) > _FIRST)}" if top else ""
    return close_names(name, known) or first


def either(choices: Sequence[str]) -> str:
    """Several choices in one sentence.

    >>> either(["a"]), either(["a", "b", "c"])
    ('a', 'a, b or c')
    """
    return " or ".join(part for part in (", ".join(choices[:-1]), *choices[-1:]) if part)


def plural(count: int, noun: str) -> str:
    """A number of things.

    >>> plural(1, "thread"), plural(2048, "thread")
    ('1 thread', '2,048 threads')
    """
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


@contextmanager
def blaming(what: str, where: str, remedy: str = "") -> Iterator[None]:
    """Replace any error but fxprune's own by a CalibrationError: `what` fails on `where`, and the remedy."""
    try:
        yield
    except FxpruneError:
        raise
    except Exception as error:
        raise CalibrationError(f"{what} fails on {where} ({error_text(error)}){remedy}") from error


@contextmanager
def stage(doing: str) -> Iterator[None]:
    """Add the stage to a CalibrationError, and turn errors of memory into one."""
    try:
        yield
    except CalibrationError as error:
        error.stage = error.stage or ("" if str(error).startswith(doing) else doing)
        raise
    except Exception as error:
        if isinstance(error, FxpruneError) or not is_out_of_memory(error):
            raise
        short = CalibrationError(error_text(error))
        short.stage = doing
        raise short from error


def summary(error: BaseException) -> str:
    """An error's first line, and the next one if the first ends with a colon."""
    lines = [" ".join(line.split()) for line in text_of(error).splitlines()] or [""]
    return " ".join(lines[: 2 if lines[0].endswith(":") else 1])


class FxpruneWarning(UserWarning):
    """A request of the user had no effect, or another effect than asked."""

    def __str__(self) -> str:
        return visible(super().__str__())


def visible(text: str) -> str:
    r"""Text with control characters, and others that a terminal does not show, escaped, except line ends.

    >>> print(visible("conv\x1b[31m1"))
    conv\x1b[31m1
    """
    if text.replace("\n", "").isprintable():
        return text
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)
