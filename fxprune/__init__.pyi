"""The public names, and the modules that they are imported from at their first use: `__init__.py` reads this file."""

from fxprune import rules as rules
from fxprune.caller import classes
from fxprune.coupling.couple import couple
from fxprune.coupling.groups import Coupling, Group, Site
from fxprune.errors import (
    ArtifactError,
    CalibrationError,
    CaptureError,
    CheckpointError,
    DistributedError,
    ExportError,
    FxpruneError,
    FxpruneWarning,
    NarrowError,
    PlanError,
    RewriteError,
    UnreachableError,
    UnsupportedOpError,
    VerificationError,
)
from fxprune.pipeline import apply, compress
from fxprune.planning.plan import Budget, Plan
from fxprune.recovery.finetune import finetune
from fxprune.reporting.comparison import Comparison
from fxprune.reporting.measured_latency import measure_latency
from fxprune.reporting.records import Compensation, Finetuning
from fxprune.reporting.report import Report, report
from fxprune.reporting.timings import MeasuredLatency
from fxprune.rewriting.own_class import narrow
from fxprune.rewriting.proof import verify
from fxprune.saving.artifact import load, save
from fxprune.saving.export import export
from fxprune.saving.sharded.manifest import Manifest
from fxprune.saving.sharded.rewrite import rewrite_checkpoint
from fxprune.scoring.evidence import Evidence
from fxprune.scoring.score import score
from fxprune.scoring.scores import Scores
from fxprune.tracing.capture import capture
from fxprune.version import __version__ as __version__

__all__ = [
    "ArtifactError", "Budget", "CalibrationError", "CaptureError", "CheckpointError", "Comparison", "Compensation",
    "Coupling", "DistributedError", "Evidence", "ExportError", "Finetuning", "FxpruneError", "FxpruneWarning", "Group",
    "Manifest", "MeasuredLatency", "NarrowError", "Plan", "PlanError", "Report", "RewriteError", "Scores", "Site",
    "UnreachableError", "UnsupportedOpError", "VerificationError", "apply", "capture", "classes", "compress", "couple",
    "export", "finetune", "load", "measure_latency", "narrow", "report", "rewrite_checkpoint", "save", "score",
    "verify",
]  # fmt: skip
