"""Progress bars on stderr."""

from __future__ import annotations

from rich.console import Console
from rich.progress import Progress


def progress_bar(*, shown: bool) -> Progress:
    """A bar where it is to be `shown`, on a terminal or in a notebook; anywhere else not even a blank line."""
    console = Console(stderr=True)
    return Progress(
        console=console, transient=True, disable=not (shown and (console.is_terminal or console.is_jupyter))
    )
