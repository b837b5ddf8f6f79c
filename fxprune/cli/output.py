"""The output of a command: text and bars for people, one JSON object for programs."""

from __future__ import annotations

import json
import sys
import time
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, redirect_stdout
from typing import Any, TextIO

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from fxprune.caller.batches import length_of, read
from fxprune.caller.ranks import rank_and_size
from fxprune.cli.extras import INTERRUPTED
from fxprune.cli.option_names import as_options
from fxprune.errors import CaptureError, FxpruneError, FxpruneWarning, visible

WIDTH = 120  # of text that goes to a file or a pipe
FAILED = 1


class Output:
    """The destination of a command's text, bars and result.

    Text goes to stdout; with `json` to stderr, because stdout then has only the JSON object; with `quiet` nowhere.
    Bars, warnings and errors go to stderr. `about` has further entries of the JSON object. `writes` says whether the
    command writes its files: of several ranks, only the first does. `command` is the line that was typed.
    """

    def __init__(self, *, json: bool, quiet: bool, writes: bool = True, command: str = "") -> None:
        self.json, self.quiet, self.writes, self.command = json, quiet, writes, command
        self.warnings: list[str] = []
        self.about: dict[str, Any] = {}
        self._stdout: TextIO = sys.stdout
        file = sys.stderr if json else sys.stdout
        self._text = Console(file=file, width=None if file.isatty() else WIDTH)

    def show(self, *things: Any) -> None:
        """Print text, tables or trees, unless the command is to be quiet."""
        if not self.quiet:
            for thing in things:
                is_text = isinstance(thing, str)
                self._text.print(visible(thing) if is_text else thing, markup=False, highlight=False, soft_wrap=is_text)

    def wrote(self, *paths: object) -> None:
        """Name the files that were written."""
        self.show(f"Wrote {' and '.join(map(str, paths))}.")

    @contextmanager
    def busy(self, description: str) -> Iterator[Bars]:
        """A bar on stderr, where that is a terminal, for the time of some work."""
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TextColumn("{task.fields[done]}"),
            TimeElapsedColumn(),
        )
        console = Console(stderr=True)
        hidden = self.quiet or not console.is_terminal
        with Progress(*columns, console=console, transient=True, disable=hidden) as progress:
            progress.add_task(visible(description), total=None, done="")
            yield Bars(progress)

    @contextmanager
    def session(self, command: str) -> Iterator[dict[str, Any]]:
        """Run a command, which puts its result into the dict: warnings, errors and the exit code follow from it."""
        content: dict[str, Any] = {"command": command}
        start = time.perf_counter()
        try:
            with redirect_stdout(sys.stderr if self.json or not self.writes else sys.stdout), self._warnings():
                yield content
        except FxpruneError as error:
            message = as_options(str(error)) + self._size_option(command, error)
            typer.secho("Error: ", fg="red", bold=True, err=True, nl=False)
            typer.echo(message, err=True)
            about = {"type": type(error).__name__, "message": message}
            self._print_json({"command": command, "error": about, "warnings": self.warnings})
            raise typer.Exit(FAILED) from None
        except KeyboardInterrupt:
            typer.echo("Interrupted; no file was left half-written.", err=True)
            raise typer.Exit(INTERRUPTED) from None
        self._print_json(
            content | self.about | {"warnings": self.warnings, "seconds": round(time.perf_counter() - start, 3)}
        )

    def _size_option(self, command: str, error: FxpruneError) -> str:
        """The end of a message about an example, whose size may be wrong: the option that sets it."""
        if not isinstance(error, CaptureError) or "does not run on the example" not in str(error):
            return ""
        if "images" in self.about:
            return "; --image-size sets the size of the images"
        return "; --input sets the size of a sample, such as 3,224,224" if command == "inspect" else ""

    def _print_json(self, content: dict[str, Any]) -> None:
        if self.json:
            self._stdout.write(json.dumps(content, default=str) + "\n")
            self._stdout.flush()

    @contextmanager
    def _warnings(self) -> Iterator[None]:
        """Show and keep the warnings of fxprune, without the line of the code that they come from."""
        with warnings.catch_warnings():
            warnings.simplefilter("always", FxpruneWarning)
            others = warnings.showwarning

            def showwarning(message: Any, category: type[Warning], *where: Any, **more: Any) -> None:
                if not issubclass(category, FxpruneWarning):
                    return others(message, category, *where, **more)
                self.warnings.append(as_options(str(message)))
                typer.secho("Warning: ", fg="yellow", err=True, nl=False)
                return typer.echo(self.warnings[-1], err=True)

            warnings.showwarning = showwarning
            yield


class Bars:
    """The bars of some work: one for the whole, and one for each pass over data."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress

    def over(self, loader: Iterable[Any], what: str = "batches") -> Iterable[Any]:
        """A loader that shows a bar each time it is run through.

        One that can be read only once, and one that several ranks read their shares of, come back as they are.
        """
        return loader if rank_and_size()[1] > 1 or iter(loader) is loader else Watched(loader, self, what)

    def steps(self, items: Iterable[Any], what: str, total: int | None = None) -> Iterator[Any]:
        """The items, under a bar that is removed afterwards; `total` is their number where they do not know it."""
        total = length_of(items) if total is None else total
        of = "" if total is None else f"/{total}"
        task = self.progress.add_task(visible(what), total=total, done=f"0{of}")
        try:
            for count, item in enumerate(items, start=1):
                yield item
                self.progress.update(task, completed=count, done=f"{count}{of}")
        finally:
            self.progress.remove_task(task)


class Watched:
    """A loader whose passes are shown, and whose failures are CalibrationErrors."""

    def __init__(self, loader: Iterable[Any], bars: Bars, what: str) -> None:
        self.loader, self.bars, self.what = loader, bars, what
        self.dataset = getattr(loader, "dataset", loader)  # as of a DataLoader

    def __len__(self) -> int:
        found = length_of(self.loader)
        if found is None:
            raise TypeError("the loader does not know its length")
        return found

    def __iter__(self) -> Iterator[Any]:
        return self.bars.steps(read(self.loader), self.what, length_of(self.loader))
