"""fxprune: structured pruning as a torch.fx compiler pass, after FAIR-Pruner (arXiv 2508.02291)."""

from fxprune import classes
from fxprune.capture import capture
from fxprune.compensation import Compensation
from fxprune.compress import apply, compress
from fxprune.coupling import Coupling, Group, Site, couple
from fxprune.errors import (
    CalibrationError,
    CaptureError,
    FxpruneError,
    FxpruneWarning,
    PlanError,
    RewriteError,
    UnsupportedOpError,
    VerificationError,
)
from fxprune.finetune import finetune
from fxprune.plan import Budget, Plan
from fxprune.ranking import Evidence
from fxprune.report import Finetuning, Report, report
from fxprune.scores import Scores
from fxprune.scoring import score
from fxprune.verify import verify

__version__ = "0.1.0"

__all__ = [
    "Budget", "CalibrationError", "CaptureError", "Compensation", "Coupling", "Evidence", "Finetuning", "FxpruneError",
    "FxpruneWarning", "Group", "Plan", "PlanError", "Report", "RewriteError", "Scores", "Site", "UnsupportedOpError",
    "VerificationError", "apply", "capture", "classes", "compress", "couple", "finetune", "report", "score", "verify",
]  # fmt: skip
