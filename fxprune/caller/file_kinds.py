"""The kind of a file by its first bytes, for messages about a file of another kind than the one wanted."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from fxprune.errors import FxpruneError

_HEAD = 4096  # bytes; what tells files apart is written first
KINDS = {
    "plan": ("a plan", "Plan.load reads it, and so does fxprune apply"),
    "scores": ("a score file", "Scores.load reads it, and so does fxprune plan"),
    "artifact": ("a pruned model", "fxprune.load reads it, and so does fxprune report"),
    "weights": ("a safetensors file of weights", "safetensors.torch.load_file reads it, and so does --weights"),
    "checkpoint": ("a file of torch.save", "torch.load reads it, and so does --weights"),
    "program": ("a program of torch.export", "torch.export.load reads it"),
}
_ENTRIES = {b"header.npy": "scores", b"/data.pkl": "checkpoint", b"/data/": "program", b"archive_format": "program"}


def check_kind(path: Path, wanted: str, error: type[FxpruneError], allowed: Collection[str] = ()) -> None:
    """Raise `error` where a file is of one of `KINDS`, neither the one `wanted` nor `allowed`.

    Raises OSError where it cannot be read.
    """
    with path.open("rb") as file:
        kind = kind_of(file.read(_HEAD))
    if kind and kind != wanted and kind not in allowed:
        what, reader = KINDS[kind]
        raise error(f"{path} is {what}, not {KINDS[wanted][0]}: {reader}")


def kind_of(head: bytes) -> str:
    """The kind in `KINDS` of a file that begins with some bytes; empty where it is of none.

    >>> kind_of(b'{"fxprune_plan": 1}'), kind_of(b"import torch")
    ('plan', '')
    """
    if head.startswith(b"PK\x03\x04"):
        first = head[30 : 30 + int.from_bytes(head[26:28], "little")]  # the name of a zip file's first entry
        return next((kind for part, kind in _ENTRIES.items() if part in first), "")
    if head[8:9] == b"{" and b"\0" in head[:8]:  # the length of the header, in eight bytes
        return "artifact" if b'"fxprune' in head else "weights"
    if head.startswith(b"\x80\x02"):
        return "checkpoint"
    return "plan" if head.lstrip().startswith(b"{") and b'"fxprune_plan"' in head else ""
