"""The axes of a graph's values that are longer for longer inputs."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import cached_property
from typing import Any

from fxprune.caller.example import TensorSpec, batch_length
from fxprune.caller.other_batches import stretched, varied_batch
from fxprune.errors import first_line
from fxprune.tracing.facts import facts_on
from fxprune.tracing.graph import ModelGraph, example_of

_LOG = logging.getLogger(__name__)


class Growth:
    """The shapes of a captured graph's values on its example and on longer ones, computed when first needed."""

    def __init__(self, graph: ModelGraph, specs: Mapping[str, Any]) -> None:
        self.graph, self.specs = graph, specs

    def along(self, name: str, axis: int) -> bool:
        """Whether axis `axis` of node `name`'s tensor is longer for more samples or positions."""
        shapes = (specs[name].shape for specs in self.grown if isinstance(specs.get(name), TensorSpec))
        return any(shape[axis] != self.specs[name].shape[axis] for shape in shapes)

    @cached_property
    def grown(self) -> list[Mapping[str, Any]]:
        """The specs for one more sample, and for twice the length of every further axis, where the model runs so."""
        example = example_of(self.graph)
        more = varied_batch(example, batch_length(example) + 1)
        longer = [more, *(stretched(example, axis) for axis in (1, 2, 3, 4))]
        return [specs for batch in longer if (specs := self._on(batch))]

    def _on(self, batch: Any) -> Mapping[str, Any]:
        try:
            return facts_on(self.graph, batch).specs
        except Exception as error:  # noqa: BLE001 - whatever the user's model says of other sizes
            _LOG.debug("%s does not run on other sizes: %s", type(self.graph).__name__, first_line(error))
            return {}
