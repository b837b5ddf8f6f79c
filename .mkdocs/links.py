"""On the page of the API, names of its own in running text, such as `score`, become links to their sections."""

from __future__ import annotations

import re
from typing import Any

SECTION = re.compile(r'<h\d id="fxprune\.((?:\w+\.)?\w+)"')
NAME = re.compile(r"(?<!>)(?<![\w(])<code>([\w.]+)</code>(?!</a>)")


def on_page_content(content: str, page: Any, **context: Any) -> str:
    """Link what has a section; headings, tables of contents and names of arguments are left as they are."""
    del context
    if page.file.src_uri != "api.md":
        return content
    sections = set(SECTION.findall(content))
    return NAME.sub(lambda match: _linked(match, sections), content)


def _linked(match: re.Match[str], sections: set[str]) -> str:
    name = match[1].removeprefix("fxprune.")
    return f'<a href="#fxprune.{name}">{match[0]}</a>' if name in sections else match[0]
