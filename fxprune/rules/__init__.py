"""Rules: operation -> effect on labels, one file a family of operations."""

from fxprune.rules import (
    attention,
    contractions,
    experts,
    fills,
    indexing,
    layers,
    movement,
    norms,
    pointwise,
    queries,
    recurrent,
    reductions,
    transforms,
)
from fxprune.rules import embeddings as tables
from fxprune.rules.context import Context
from fxprune.rules.table import RULES, rule

__all__ = [
    "RULES", "Context", "attention", "contractions", "experts", "fills", "indexing", "layers", "movement", "norms",
    "pointwise", "queries", "recurrent", "reductions", "rule", "tables", "transforms",
]  # fmt: skip
