"""Formulas of the pages as MathML, which browsers draw themselves: the site loads no script for them."""

from __future__ import annotations

import html
import re
from typing import Any

from latex2mathml.converter import convert

FORMULA = re.compile(r'<(span|div) class="arithmatex">(?:\\\(|\\\[)(.*?)(?:\\\)|\\\])</\1>', re.DOTALL)


def on_page_content(content: str, **context: Any) -> str:
    """Replace what the arithmatex extension marked."""
    del context
    return FORMULA.sub(_drawn, content)


def _drawn(match: re.Match[str]) -> str:
    display = "block" if match[1] == "div" else "inline"
    return convert(html.unescape(match[2]).strip(), display=display)
