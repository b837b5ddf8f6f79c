"""Small networks written so that what is captured of them, or what is made of that, is easily another network."""

from hostile import hooks, names, operations, programs, questions, sizes, state, statistics, weights
from hostile.case import HOSTILE, Hostile
from hostile.judge import Finding, judge

__all__ = [
    "HOSTILE", "Finding", "Hostile", "hooks", "judge", "names", "operations", "programs", "questions", "sizes",
    "state", "statistics", "weights",
]  # fmt: skip
