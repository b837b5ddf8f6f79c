"""fxprune: structured pruning as a torch.fx compiler pass, after FAIR-Pruner (arXiv 2508.02291).

A public name is imported at its first use, so that `import fxprune` takes no time; `__init__.pyi` lists the names.
"""

import ast
import importlib
import pkgutil
import random
from typing import Any

from fxprune.version import __version__ as __version__


def _homes() -> dict[str, str]:
    """Every public name, and the module that it is imported from."""
    stub = ast.parse(pkgutil.get_data("fxprune", "__init__.pyi") or b"")
    found = [node for node in stub.body if isinstance(node, ast.ImportFrom)]
    return {alias.name: str(node.module) for node in found for alias in node.names}


_HOMES = _homes()
__all__ = [name for name in sorted(_HOMES) if name not in ("rules", "__version__")]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'fxprune' has no attribute {name!r}")
    home, drawn = _HOMES[name], random.getstate()
    is_module = name in ("classes", "rules")
    try:
        value = importlib.import_module(f"{home}.{name}") if is_module else getattr(importlib.import_module(home), name)
    finally:
        random.setstate(drawn)  # rich draws a number when it is imported
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(_HOMES)
