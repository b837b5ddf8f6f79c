"""Rules: operation -> effect on labels, one file a family of operations."""

from fxprune.rules import contractions, layers, movement, opaque, pointwise, queries, recurrent, reductions
from fxprune.rules.context import Context
from fxprune.rules.table import RULES, rule

__all__ = [
    "RULES", "Context", "contractions", "layers", "movement", "opaque", "pointwise", "queries", "recurrent",
    "reductions", "rule",
]  # fmt: skip
