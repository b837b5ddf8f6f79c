"""The errors that fxprune raises on purpose; each message names the thing, the numbers and the remedy."""

from __future__ import annotations


class FxpruneError(Exception):
    """The parent of every error that fxprune raises on purpose."""


class CaptureError(FxpruneError):
    """The model could not be turned into a graph."""


class UnsupportedOpError(FxpruneError):
    """The graph holds an operation for which no rule is registered."""


class CalibrationError(FxpruneError):
    """A loader, its batches or the loss cannot be used for scoring or fine-tuning."""


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


def first_line(error: BaseException | None) -> str:
    """The first line of an error's message; torch.fx adds tracebacks below it."""
    return (str(error).splitlines() or [""])[0]


def summary(error: BaseException) -> str:
    """An error's first line, and the one after it where the first only announces it."""
    lines = [" ".join(line.split()) for line in str(error).splitlines()] or [""]
    return " ".join(lines[: 2 if lines[0].endswith(":") else 1])


class FxpruneWarning(UserWarning):
    """Something that the user asked for had no effect, or had another effect than asked."""
