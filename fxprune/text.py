"""Text from names and files, made fit for a terminal."""

from __future__ import annotations


def visible(text: str) -> str:
    r"""Text in which all that a terminal would obey, or not show, stands as an escape; ends of lines stay.

    >>> print(visible("conv\x1b[31m1"))
    conv\x1b[31m1
    """
    if text.replace("\n", "").isprintable():
        return text
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)
