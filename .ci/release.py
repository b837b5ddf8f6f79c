"""What has to agree before a release: the tag, the version, the changelog, CITATION.cff, and the project's address.

python .ci/release.py TAG ADDRESS
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def disagreements(tag: str, address: str) -> list[str]:
    """What is wrong, one line each; none where a release may follow.

    Args:
        tag: the tag that was pushed, `v1.2.3`.
        address: where the repository is, without a slash at the end.
    """
    version = found(r'__version__ = "(.*)"', "fxprune/version.py")
    cited = found(r"^version: (.*)$", "CITATION.cff")
    source = found(r'^Source = "(.*)"$', "pyproject.toml")
    released = found(r"^## \[(\d.*?)\] - \d{4}-\d\d-\d\d$", "CHANGELOG.md")
    pairs = {
        "fxprune/version.py": (f"v{version}", tag),
        "CITATION.cff": (f"v{cited}", tag),
        "the newest section of CHANGELOG.md": (f"v{released}", tag),
        "Source in pyproject.toml": (source, address),
    }
    return [
        f"{place} says {said}, and the release is {asked}" for place, (said, asked) in pairs.items() if said != asked
    ]


def found(pattern: str, name: str) -> str | None:
    """The first match of the pattern's group in a file of the repository."""
    match = re.search(pattern, (ROOT / name).read_text(encoding="utf-8"), re.MULTILINE)
    return match and match[1]


if __name__ == "__main__":
    sys.exit("\n".join(disagreements(*sys.argv[1:])))
