"""Small networks written so that what is captured of them, or what is made of that, is easily another network."""

from hostile import (
    caches,
    decisions,
    hooks,
    names,
    operations,
    programs,
    questions,
    randomness,
    sizes,
    state,
    statistics,
    subclasses,
    weights,
)  # fmt: skip
from hostile.case import HOSTILE, Hostile
from hostile.judge import Finding, judge

__all__ = [
    "HOSTILE", "Finding", "Hostile", "caches", "decisions", "hooks", "judge", "names", "operations", "programs",
    "questions", "randomness", "sizes", "state", "statistics", "subclasses", "weights",
]  # fmt: skip
