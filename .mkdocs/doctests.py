"""Examples of docstrings, from `>>>` to the next empty line, as blocks of code: Markdown takes them for quotations."""

from __future__ import annotations

from typing import Any

from markdown import Extension, Markdown
from markdown.preprocessors import Preprocessor


def on_config(config: Any) -> Any:
    """Add the extension that finds them; the page of the API is rendered with the extensions of all pages."""
    config.markdown_extensions.append(Doctests())
    return config


class Doctests(Extension):
    """Runs before blocks of code are found."""

    def extendMarkdown(self, md: Markdown) -> None:  # noqa: N802 - Markdown's own name
        md.preprocessors.register(_Fences(md), "doctests", priority=28)


class _Fences(Preprocessor):
    def run(self, lines: list[str]) -> list[str]:
        found: list[str] = []
        inside = False
        for line in [*lines, ""]:
            if line.startswith(">>> ") and not inside:
                found.append("```pycon")
                inside = True
            elif inside and not line.strip():
                found.append("```")
                inside = False
            found.append(line)
        return found
