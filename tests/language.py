"""The small language models of the benchmarks, by their names: a constructor and an example's inputs each."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any


def _models() -> dict[str, Any]:
    path = Path(__file__).parents[1] / "examples" / "benchmarks" / "transformers_small.py"
    spec = importlib.util.spec_from_file_location("examples_language", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return dict(module.MODELS)


SMALL = _models()
