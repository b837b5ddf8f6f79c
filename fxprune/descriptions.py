"""What files say of examples and settings, checked before anything is made of it; and what is made of it then."""

from __future__ import annotations
