"""Steps of random networks: a table of small builders, one file a family of rules."""

from steps import (
    attention,
    contractions,
    embeddings,
    fills,
    indexing,
    layers,
    movement,
    norms,
    pointwise,
    pools,
    queries,
    recurrent,
    reductions,
    transforms,
    vision,
)  # fmt: skip
from steps.kind import KINDS, SIZE, Kind

__all__ = [
    "KINDS", "SIZE", "Kind", "attention", "contractions", "embeddings", "fills", "indexing", "layers", "movement",
    "norms", "pointwise", "pools", "queries", "recurrent", "reductions", "transforms", "vision",
]  # fmt: skip
