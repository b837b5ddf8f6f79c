"""What every benchmark shares: clocks, peak memory, child processes, and tables for eyes and for files."""

from __future__ import annotations

import argparse
import datetime as dt
import importlib.metadata
import json
import multiprocessing
import os
import platform
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from rich.console import Console
from rich.table import Table as RichTable
from torch import nn

import fxprune

DOCS = Path(__file__).resolve().parents[2] / "docs" / "benchmarks"
MIB = 2**20
Result = TypeVar("Result")
CONSOLE = Console(width=None if sys.stdout.isatty() else 160)


@dataclass(frozen=True, slots=True)
class Table:
    """A title, the names of the columns, rows of finished text, and a note on how to read them."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""

    def rich(self) -> RichTable:
        """The table for the terminal."""
        table = RichTable(title=self.title, caption=self.note or None, caption_justify="left")
        for index, column in enumerate(self.columns):
            table.add_column(column, justify="right" if index else "left", overflow="fold")
        for row in self.rows:
            table.add_row(*row)
        return table

    def markdown(self) -> str:
        """The table as a section of a Markdown page.

        >>> print(Table("T", ("a", "b"), (("1", "2"),), "Seconds.").markdown())
        ## T
        <BLANKLINE>
        Seconds.
        <BLANKLINE>
        | a | b |
        |:--|--:|
        | 1 | 2 |
        <BLANKLINE>
        """
        lines = [f"## {self.title}", "", *([self.note, ""] if self.note else [])]
        lines += [_line(self.columns), "|:--|" + "--:|" * (len(self.columns) - 1)]
        lines += [_line(row) for row in self.rows]
        return "\n".join([*lines, ""])


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


def seconds(call: Callable[[], object]) -> float:
    """The wall-clock time of one call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def timed(call: Callable[[], Result]) -> tuple[Result, float]:
    """A result and the seconds that it took."""
    results: list[Result] = []
    spent = seconds(lambda: results.append(call()))
    return results[0], spent


def interleaved(jobs: dict[str, Callable[[], object]], *, repeats: int, warmups: int = 1) -> dict[str, list[float]]:
    """Seconds of each run of each job; the jobs take turns, so that a busy moment of the machine meets all."""
    for _ in range(warmups):
        for job in jobs.values():
            job()
    times: dict[str, list[float]] = {name: [] for name in jobs}
    for _ in range(repeats):
        for name, job in jobs.items():
            times[name].append(seconds(job))
    return times


def peak_growth(job: Callable[[], object]) -> dict[str, float]:
    """MiB of resident memory: before the job, at its peak, and the difference.

    The kernel's high-water mark is set back just before the job (Linux, /proc/self/clear_refs), so that no
    earlier peak hides the job's own. Where it cannot be set back, it is the mark of the process's whole life.
    """
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        CONSOLE.print("the high-water mark of memory cannot be set back here: an earlier peak may hide this one")
    before = _memory("VmRSS")
    job()
    peak = _memory("VmHWM")
    return {"before": before, "peak": peak, "growth": peak - before}


def _memory(field: str) -> float:
    """One field of /proc/self/status, in MiB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) / 1024
    raise SystemExit(f"/proc/self/status has no field {field}: memory is measured on Linux only")


def child(script: str, *arguments: str, limit: float) -> dict[str, Any]:
    """Run a script in a process of its own; the JSON object on its last line of output, or {"failed": why}."""
    command = [sys.executable, script, *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit, check=False)
    except subprocess.TimeoutExpired:
        return {"failed": f"over the limit of {limit:.0f} s"}
    if done.returncode != 0:
        return {"failed": _last_line(done.stderr) or f"exit status {done.returncode}"}
    result: dict[str, Any] = json.loads(_last_line(done.stdout))
    return result


def run(model: nn.Module, inputs: Any) -> Any:
    """The output for a tensor, several of them, or named ones."""
    if isinstance(inputs, dict):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, tuple) else model(inputs)


def forked(job: Callable[[Callable[[dict[str, Any]], None]], None], limit: float) -> dict[str, Any]:
    """Run a job in a fork of this process: its last report, with "over" where it died or was over a limit.

    The job is called with a function that takes a report. The limit is one of processor time; ten times as long may
    pass. Importing costs a fork nothing; the parent must not have run a backward pass, whose threads a fork lacks.
    """
    receiver, sender = multiprocessing.get_context("fork").Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=_silently, args=(job, sender.send, int(limit)))
    process.start()
    sender.close()
    end, found = time.monotonic() + 10 * limit, dict[str, Any]()
    with suppress(EOFError):
        while receiver.poll(max(end - time.monotonic(), 0)):
            found = receiver.recv()
        process.kill()
    process.join()
    if process.exitcode:
        slow = process.exitcode in (-signal.SIGXCPU, -signal.SIGKILL)
        found["over"] = f"over the limit of {limit:.0f} s" if slow else f"the process died with {process.exitcode}"
    return found


def _silently(job: Callable[[Any], None], report: Callable[[dict[str, Any]], None], limit: int) -> None:
    resource.setrlimit(resource.RLIMIT_CPU, (limit, limit + 10))
    with Path(os.devnull).open("w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
        os.dup2(nowhere.fileno(), 2)
        job(report)


def _last_line(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1].strip() if lines else ""


def parser(about: str, page: str | None = None) -> argparse.ArgumentParser:
    """The options that every benchmark has; --out only where it writes a page."""
    options = argparse.ArgumentParser(description=about)
    options.add_argument("--quick", action="store_true", help="few images, few repeats, few models")
    options.add_argument("--child", help=argparse.SUPPRESS)
    if page:
        where = f"folder of {page}.md and {page}.json (default docs/benchmarks; with --quick, nothing is written)"
        options.add_argument("--out", type=Path, help=where)
    return options


def show(tables: Sequence[Table]) -> None:
    """Print the tables."""
    for table in tables:
        CONSOLE.print(table.rich())


def publish(page: str, heading: str, tables: Sequence[Table], data: object, options: argparse.Namespace) -> Path | None:
    """Print the tables; write them to PAGE.md and the figures to PAGE.json; the folder written to, if any."""
    show(tables)
    folder = write(page, heading, tables, data, options)
    if folder is not None:
        CONSOLE.print(f"wrote {folder / page}.md and .json")
    return folder


def write(page: str, heading: str, tables: Sequence[Table], data: object, options: argparse.Namespace) -> Path | None:
    """Write the tables to PAGE.md and the figures to PAGE.json; the folder written to, if any."""
    folder: Path | None = options.out or (None if options.quick else DOCS)
    if folder is None:
        return None
    folder.mkdir(parents=True, exist_ok=True)
    sections = [f"# {heading}", "", environment(), "", *(table.markdown() for table in tables)]
    (folder / f"{page}.md").write_text("\n".join(sections))
    (folder / f"{page}.json").write_text(json.dumps(data, indent=1, default=asdict) + "\n")
    return folder


def environment() -> str:
    """The command, the date, the versions and the machine, as a paragraph."""
    command = " ".join(["python", f"examples/benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]])
    versions = f"fxprune {fxprune.__version__}, torch {version('torch')}, torchvision {version('torchvision')}"
    today = dt.datetime.now(dt.timezone.utc).date().isoformat()
    threads = torch.get_num_threads()
    machine = f"{_processor()}, {os.cpu_count()} cores, {threads} thread{'s' * (threads != 1)}"
    return f"`{command}`\n\n{today}; Python {platform.python_version()}, {versions}; {machine}."


def version(distribution: str) -> str:
    """The installed version of a distribution, or a word that there is none."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "(not installed)"


def _processor() -> str:
    """The name of the processor, as the system gives it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def millions(count: float) -> str:
    """A count in millions.

    >>> millions(269_722)
    '0.270 M'
    """
    return f"{count / 1e6:.3f} M" if count < 1e8 else f"{count / 1e6:,.1f} M"


def percent(share: float) -> str:
    """A share in percent.

    >>> percent(0.8676)
    '86.8 %'
    """
    return f"{100 * share:.1f} %"


def short(value: float) -> str:
    """Seconds in a unit that fits.

    >>> short(0.0123), short(12.3)
    ('12.3 ms', '12.3 s')
    """
    return f"{1e3 * value:.3g} ms" if value < 1 else f"{value:.3g} s"
