"""Progress bars, on stderr or in a notebook."""

from __future__ import annotations

import time
from importlib import import_module
from typing import Any

from rich.console import Console
from rich.progress import Progress, TaskID

PERIOD = 0.2  # seconds between two states of a bar in a notebook


def progress_bar(*, shown: bool) -> Progress:
    """A bar where it is to be `shown`, on a terminal or in a notebook; anywhere else not even a blank line."""
    console = Console(stderr=True)
    if console.is_jupyter:
        return NotebookBar(auto_refresh=False, disable=not shown)
    return Progress(console=console, transient=True, disable=not (shown and console.is_terminal))


class NotebookBar(Progress):
    """A bar in a notebook, as an output of the cell that is replaced; that of rich itself needs ipywidgets."""

    output: Any = None
    shown_at = 0.0

    def start(self) -> None:
        if not self.disable:
            self.output = import_module("IPython.display").display(self, display_id=True)

    def advance(self, task_id: TaskID, advance: float = 1) -> None:
        super().advance(task_id, advance)
        self.refresh()

    def refresh(self) -> None:
        if self.output is not None and time.monotonic() - self.shown_at >= PERIOD:
            self.shown_at = time.monotonic()
            self.output.update(self)

    def stop(self) -> None:
        if self.output is not None:
            self.output.update(import_module("IPython.display").HTML(""))
