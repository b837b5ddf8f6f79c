"""Levels, budgets and costs as products of widths, and the plans that follow: arithmetic on arrays."""
