"""Signals: each assigns one number to every unit, by which units are proposed or protected."""
