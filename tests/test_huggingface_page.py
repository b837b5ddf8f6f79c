"""The classes that docs/integrations.md lists are pruned, kept and made again, and run narrower where it says so."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fxprune

pytestmark = pytest.mark.filterwarnings("ignore")  # of transformers

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    pytest.importorskip("transformers")
    from language import SMALL

    from fxprune.integrations.huggingface import (
        compress_pretrained,
        from_pretrained,
        narrow_pretrained,
        save_pretrained,
    )


def families() -> dict[str, Any]:
    """The small models of the benchmarks by their classes, which the page's table lists."""
    return {type(make()).__name__: (make, example) for make, example in SMALL.values()}


def listed() -> dict[str, bool]:
    """The page's table: class, and whether it runs narrower as it is."""
    page = (Path(__file__).parents[1] / "docs" / "integrations.md").read_text(encoding="utf-8")
    return {name: own == "yes" for name, own in re.findall(r"^\| `(\w+)` \| yes \| (yes|no|where)", page, re.MULTILINE)}


def labels_for(name: str, inputs: dict[str, Tensor]) -> Tensor:
    if "LM" in name:
        return inputs["input_ids"]
    return torch.randint(0, 2, (2, 64, 64)) if "Segmentation" in name else torch.tensor([0, 1])


@pytest.mark.slow
@pytest.mark.parametrize("name", listed())
def test_the_pages_table_of_classes(name: str, tmp_path: Path) -> None:
    make, example = families()[name]
    torch.manual_seed(0)
    model, inputs = make().eval(), example()
    inputs = inputs if isinstance(inputs, dict) else {model.main_input_name: inputs}
    small = compress_pretrained(model, [inputs | {"labels": labels_for(name, inputs)}] * 2, params=0.85)
    save_pretrained(small, tmp_path, model)
    with torch.no_grad():
        assert torch.equal(from_pretrained(tmp_path)(**inputs).logits, small(**inputs).logits)
    if listed()[name]:
        assert type(narrow_pretrained(small, model)) is type(model)
    else:
        with pytest.raises(fxprune.NarrowError, match="apply mends"):
            narrow_pretrained(small, model)


def test_the_pages_table_is_of_the_models_of_the_benchmarks() -> None:
    assert set(listed()) == set(families()) - {"T5EncoderModel"}
