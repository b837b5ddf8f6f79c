"""Compensation in closed form, without gradients."""
