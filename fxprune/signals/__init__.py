"""Signals: rankings of the units of a group."""

from fxprune.signals.separability import directions, separability
from fxprune.signals.taylor import Through, inner_products

__all__ = ["Through", "directions", "inner_products", "separability"]
