"""Pages of wide tables take the room of the table of contents."""

from __future__ import annotations

from typing import Any


def on_page_markdown(markdown: str, page: Any, **context: Any) -> None:
    """Hide the table of contents of pages that scripts write."""
    del markdown, context
    if page.file.src_uri.startswith("benchmarks/") or page.file.src_uri == "coverage.md":
        page.meta.setdefault("hide", ["toc"])
