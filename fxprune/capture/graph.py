"""`ModelGraph`: a GraphModule that keeps the caller's whole module tree."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import fx, nn
from torch.fx.graph_module import reduce_graph_module


class ModelGraph(fx.GraphModule):
    """A `torch.fx.GraphModule` with the children, names, types and state_dict keys of the model that it came from.

    A plain GraphModule keeps only what its graph calls, in nameless containers; here `small.layer1[0].conv1` stays
    what it was. It deep-copies and pickles as itself. `meta` carries what capture and compress have to say.
    """

    def __init__(self, root: nn.Module, graph: fx.Graph, class_name: str = "ModelGraph") -> None:
        super().__init__(root, graph, class_name)
        for store in ("_modules", "_parameters", "_buffers"):
            self.__dict__[store] = dict(root.__dict__[store])
        self._non_persistent_buffers_set = set(root._non_persistent_buffers_set)
        self.meta = dict(root.__dict__.get("meta", {}))
        self.training = root.training

    def _deepcopy_init(self) -> Callable[..., None]:
        """How fx initialises a deep copy: with the whole module tree and the name, too."""
        name = type(self).__name__
        return lambda copied, root, graph: ModelGraph.__init__(copied, root, graph, name)

    def __reduce__(self) -> tuple[Any, ...]:
        _, (body, import_block) = super().__reduce__()
        return _restore, (body | {"_graphmodule_cls_name": type(self).__name__}, import_block)


def _restore(body: dict[str, Any], import_block: str) -> ModelGraph:
    """The inverse of pickling: fx traces the generated code again, the module tree comes from the pickled body."""
    root = nn.Module()
    root.__dict__.update(body)
    plain = reduce_graph_module(dict(body), import_block)
    assert isinstance(plain, fx.GraphModule)
    return ModelGraph(root, plain.graph, body["_graphmodule_cls_name"])
