"""The proof that a captured part stands for the part in the whole model, whatever the rest does to it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fxprune.caller.isolation import applied, isolated_copy
from fxprune.errors import error_text
from fxprune.tracing.agreement import difference
from fxprune.tracing.checks import cuts
from fxprune.tracing.graph import captured_of
from fxprune.tracing.hooks import plain_copy
from fxprune.tracing.outside import outside_restored
from fxprune.tracing.proof.reference import DisagreementError
from fxprune.tracing.proof.trials import run_under_seed

Call = Callable[[nn.Module, Any], Any]


def check_stands_in(model: nn.Module, whole: nn.Module, path: str, batches: Sequence[Any], call: Call) -> None:
    """Raise DisagreementError where `whole`, in which a graph replaces the part at `path`, differs from `model`.

    `call` gives the result of a model on a batch; batches that `model` does not take are left out. Both are run with
    the graph's outputs, so that decisions of the rest by their last bits are the same.
    """
    for batch in batches:
        for cut, grad in product(cuts(batch), (False, True)):
            own, own_whole = plain_copy(model), plain_copy(whole)
            followed = _Followed(own.get_submodule(path), isolated_copy(whole.get_submodule(path)))
            own_whole.get_submodule(path).register_forward_pre_hook(_in_eval_mode)
            try:
                with outside_restored(own):
                    wanted = run_under_seed(call, (own, cut), {}, grad=grad)
            except Exception:  # noqa: BLE001 - the caller's model takes no such batch, whatever it says
                if not followed.difference:
                    continue
            what = followed.difference or followed.beside()
            try:
                with outside_restored(own_whole):
                    found = None if what else run_under_seed(call, (own_whole, cut), {}, grad=grad)
            except Exception as error:  # noqa: BLE001 - whatever the rest of the caller's model raises
                what = f"with the graph in its place, it fails ({error_text(error)})"
            if not what and (text := difference(wanted, found)):
                what = f"with the graph in its place, it gives other outputs ({text})"
            if what:
                raise DisagreementError(_message(model, path, what))
            break


class _Followed:
    """A part of a model whose graph runs beside every call, and gives its output in place of the part's.

    `difference` says how the graph's first other output differs from the part's.
    """

    def __init__(self, part: nn.Module, graph: nn.Module) -> None:
        self.part, self.graph, self.difference, self.calls = part, applied(graph, "eval"), "", 0
        self.inside, self.asked = 0, dict[str, None]()
        self._watch_layers(part)
        self.before, self.found = _attributes(part), list[Any]()
        part.register_forward_pre_hook(_in_eval_mode, prepend=True)
        part.register_forward_pre_hook(self._ahead, prepend=True, with_kwargs=True)
        part.register_forward_hook(self._behind)

    def _watch_layers(self, part: nn.Module) -> None:
        """Note the layers of the part that run while the part itself does not."""
        forward = part.forward

        def run(*args: Any, **kwargs: Any) -> Any:
            self.inside += 1
            try:
                return forward(*args, **kwargs)
            finally:
                self.inside -= 1

        def note(name: str) -> Callable[[Any, Any], None]:
            return lambda *_: None if self.inside else self.asked.update({name: None})

        part.forward = run
        for name, layer in part.named_modules():
            if name and layer._parameters:
                layer.register_forward_pre_hook(note(name))

    def beside(self) -> str:
        """What is wrong with layers that run without the part: the graph may have narrowed them."""
        used = {str(node.target) for node in self.graph.graph.nodes if node.op in ("call_module", "get_attr")}  # type: ignore[union-attr]
        own = [name for name in self.asked if any(f"{target}.".startswith(f"{name}.") for target in used)]
        return f"it runs {', '.join(own[:3])} of it alone, which the graph may narrow" if own else ""

    def _ahead(self, part: nn.Module, args: Any, kwargs: Any) -> None:
        args, kwargs = pytree.tree_map_only(Tensor, torch.clone, (args, kwargs))
        with torch.random.fork_rng(range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []):
            try:
                self.found.append(self.graph(*args, **kwargs))
            except Exception as error:
                self.difference = self.difference or f"its graph fails in one of its calls ({error_text(error)})"
                raise

    def _behind(self, part: nn.Module, args: Any, output: Any) -> Any:
        found, self.calls = self.found.pop(), self.calls + 1
        follows = self.calls == 1 or not captured_of(self.graph).changed  # of which the caller is warned
        if follows and not self.difference and (text := difference(output, found)):
            now = _attributes(part)
            set_by_rest = [name for name, value in now.items() if self.before.get(name, self) is not value]
            after = f", after {', '.join(set_by_rest[:3])} was set on it" if set_by_rest else ""
            self.difference = f"the graph gives other outputs than the part when it is called ({text}){after}"
        return found


def _attributes(part: nn.Module) -> dict[str, Any]:
    """The attributes, parameters and buffers of all modules of a part, by their names."""
    return {
        f"{path}.{name}" if path else name: value
        for path, module in part.named_modules()
        for name, value in (*vars(module).items(), *module._parameters.items(), *module._buffers.items())
        if not name.startswith("_") and name != "training"
    }


def _in_eval_mode(module: nn.Module, _: Any) -> None:
    applied(module, "eval")


def _message(model: nn.Module, path: str, what: str) -> str:
    who, name = (f"the rest of {type(model).__name__}", path) if path else ("run=", type(model).__name__)
    return (
        f"{who} treats {name} in a way that a graph cannot stand for: {what}. Hand over what it sets as arguments of a "
        "call, ask nothing but outputs of it, or name a submodule that holds both"
    )
