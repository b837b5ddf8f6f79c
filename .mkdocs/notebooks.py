"""The notebooks of examples/notebooks as pages of the site: prose, code, and the outputs that are stored in them.

A link says where a file is in the repository; the site has docs/ at its top, and the notebooks in a folder below.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

FOLDER = Path(__file__).parent.parent / "examples" / "notebooks"
LINKS = {"](../../docs/": "](../", "](../examples/notebooks/": "](notebooks/", ".ipynb)": ".md)"}


def on_files(files: Files, config: Any) -> Files:
    """Add a page for each notebook."""
    for path in sorted(FOLDER.glob("*.ipynb")):
        files.append(File.generated(config, f"notebooks/{path.stem}.md", content=as_markdown(path)))
    return files


def on_page_markdown(markdown: str, page: Any, **context: Any) -> str:
    """Make links to notebooks, and links that they hold, links within the site."""
    del context
    if page.file.src_uri.startswith("notebooks"):
        for old, new in LINKS.items():
            markdown = markdown.replace(old, new)
    return markdown


def as_markdown(path: Path) -> str:
    """A notebook as Markdown."""
    return "\n\n".join(map(_cell, json.loads(path.read_text(encoding="utf-8"))["cells"]))


def _cell(cell: dict[str, Any]) -> str:
    source = "".join(cell["source"])
    if cell["cell_type"] == "markdown":
        return source
    return "\n\n".join([f"```python\n{source}\n```", *map(_output, cell["outputs"])])


def _output(output: dict[str, Any]) -> str:
    """An output in the richest form that it has: a picture, HTML, or text."""
    data = output.get("data", {})
    if "image/png" in data:
        return (
            f'<img alt="the plot that the code draws" src="data:image/png;base64,{"".join(data["image/png"]).strip()}">'
        )
    if "text/html" in data:
        return "".join(line for line in "".join(data["text/html"]).splitlines(keepends=True) if line.strip())
    text = "".join(output.get("text") or data["text/plain"])
    return f"```text\n{text.strip()}\n```"
