"""The pages that stand at the top of the repository, where they are looked for, as pages of the site.

A link says where a file is in the repository, `../CONTRIBUTING.md` or `docs/rules.md`; the site has both in one folder.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
PAGES = {name: name.lower() for name in ("CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md")}
UPWARDS = re.compile(rf"\]\((?:\.\./)?((?:\.\./)*)({'|'.join(map(re.escape, PAGES))})")


def on_files(files: Files, config: Any) -> Files:
    """Add a page for each of the files."""
    for name, page in PAGES.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / name)))
    return files


def on_page_markdown(markdown: str, page: Any, **context: Any) -> str:
    """Make links to them, and links that they hold, links within the site."""
    del context
    if page.file.src_uri in PAGES.values():
        markdown = markdown.replace("](docs/", "](")
    return UPWARDS.sub(lambda match: f"]({match[1]}{PAGES[match[2]]}", markdown)
