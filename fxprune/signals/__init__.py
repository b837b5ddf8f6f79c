"""Signals: rankings of the units of a group."""

from fxprune.scoring.signals.separability import directions, separability
from fxprune.scoring.signals.taylor import Through, inner_products

__all__ = ["Through", "directions", "inner_products", "separability"]
