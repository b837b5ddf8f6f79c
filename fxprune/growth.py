"""Which axes of a graph's values grow with the number of samples."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import cached_property
from typing import Any

from fxprune.capture import ModelGraph, example_of, facts_on
from fxprune.errors import first_line
from fxprune.example import TensorSpec, another, batch_length

_LOG = logging.getLogger(__name__)


class Growth:
    """The shapes of a captured graph's values on its example and on one more sample, looked at when first asked for."""

    def __init__(self, graph: ModelGraph, specs: Mapping[str, Any]) -> None:
        self.graph, self.specs = graph, specs

    def along(self, name: str, axis: int) -> bool:
        """Whether axis `axis` of the tensor that node `name` gives is longer for more samples."""
        before, after = self.specs[name], self.grown.get(name)
        if not isinstance(before, TensorSpec) or not isinstance(after, TensorSpec):
            return False
        return before.shape[axis] != after.shape[axis]

    @cached_property
    def grown(self) -> dict[str, Any]:
        """The specs for one more sample; none where the model runs on as many as the example has alone."""
        example = example_of(self.graph)
        try:
            return facts_on(self.graph, another(example, batch_length(example) + 1)).specs
        except Exception as error:  # noqa: BLE001 - whatever the user's model says of another number of samples
            _LOG.debug("%s runs on its example alone: %s", type(self.graph).__name__, first_line(error))
            return {}
