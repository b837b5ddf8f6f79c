"""A captured graph is what the caller's model is, or it is refused with the likely reason."""

from __future__ import annotations

import contextlib
import contextvars
import copy
import dataclasses
import itertools
import threading
import types
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import call, difference, outputs, part_of
from hostile import HOSTILE
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from zoo import conv, head, images

import fxprune
from fxprune.caller.example import as_fields
from fxprune.caller.other_batches import varied_batch
from fxprune.errors import CaptureError, FxpruneError, FxpruneWarning
from fxprune.tracing.agreement import agree, apart

Forward = Callable[..., Tensor]
RUNGS = ("fx", "values")


class Net(nn.Module):
    """Three layers, with a forward of a test's between the first two."""

    def __init__(self, middle: Forward) -> None:
        super().__init__()
        self.a, self.b, self.head, self.middle = conv(3, 8), conv(8, 8), head(8), middle
        self.register_buffer("seen", torch.zeros(8))
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.b(self.middle(self, self.a(x)).relu()).relu())


def captured(model: nn.Module, rung: str, **options: Any) -> Any:
    """The graph by one rung, or the text of the error."""
    try:
        return fxprune.capture(model, images()(4), method=rung, **options)
    except CaptureError as error:
        return str(error)


def same(model: nn.Module, graph: nn.Module) -> bool:
    """Whether both give the same on batches of other sizes and values."""
    return all(difference(outputs(model, images()(n)), outputs(graph, images()(n))) < 1e-6 for n in (4, 1, 5))


# -- questions about values --------------------------------------------------------------------------------------------


FOREIGN = [name for name in HOSTILE if name.startswith(("questions-", "programs-"))][::3]


@pytest.mark.parametrize("name", part_of(FOREIGN, 5))
@pytest.mark.parametrize("rung", RUNGS)
@pytest.mark.filterwarnings("ignore")
def test_every_way_of_capture_gives_the_model_or_refuses(name: str, rung: str) -> None:
    case = HOSTILE[name]
    model, example = case.build(), case.inputs(4, 0)
    try:
        graph = fxprune.capture(model, example, method=rung)
    except CaptureError:  # test_hostile asks that one of the rungs takes it
        return
    if case.wanted != "said":
        for size in (4, 1, 5):
            assert difference(outputs(model, case.inputs(size, 1)), outputs(graph, case.inputs(size, 1))) < 1e-6


@pytest.mark.parametrize("rung", RUNGS)
def test_the_exact_type_of_a_value_is_refused_with_the_line(rung: str) -> None:
    text = captured(Net(lambda net, x: x * 2 if type(x) is Tensor else x).eval(), rung)
    assert "gives other outputs than the model on a batch of 2 samples (by 0." in text
    assert "of their scale), first in what Net hands to b" in text


@pytest.mark.parametrize("rung", RUNGS)
def test_a_decision_by_the_recording_of_gradients_is_refused(rung: str) -> None:
    text = captured(Net(lambda net, x: x * 2 if torch.is_grad_enabled() else x).eval(), rung)
    assert "Likely: it decides by whether gradients are recorded: give the decision an argument of its own." in text


class ByType(Net):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x * 2 if type(x) is Tensor else x)


def test_a_difference_is_told_where_the_run_that_looks_for_its_place_fails() -> None:
    def middle(net: Any, x: Tensor) -> Tensor:
        if net.a._forward_hooks:
            raise RuntimeError("watched")
        return x if type(x) is Tensor else x * 2

    text = captured(Net(middle), "fx")
    assert "gives other outputs than the model on a batch of 2 samples" in text
    assert "first at an unknown place, because a run that watches the layers fails (RuntimeError: watched)" in text


def test_the_likely_reason_names_the_line_and_the_ways_out() -> None:
    text = captured(ByType(lambda net, x: x).eval(), "auto")
    assert "ByType cannot be captured" in text
    assert "Likely: the forward asks for the exact type of a value; ask with isinstance (" in text
    assert "return super().forward(x * 2 if type(x) is Tensor else x))." in text
    assert "leaves= its name" in text


# -- random numbers and state ------------------------------------------------------------------------------------------


def test_random_numbers_from_elsewhere_are_refused_as_such() -> None:
    text = captured(Net(lambda net, x: x * float(np.random.rand())).eval(), "auto")
    assert "Likely: it draws random numbers that a graph does not hold: draw with torch" in text


@pytest.mark.parametrize("rung", ["fx", "values", "auto"])
def test_what_is_random_stays_random(rung: str) -> None:
    model = Net(lambda net, x: F.dropout(x, 0.5, training=True) + torch.rand_like(x)).eval()
    with pytest.warns(FxpruneWarning, match="Net draws random numbers in eval mode: its graph draws them, too"):
        graph = captured(model, rung)
    x = images()(3)
    assert not torch.equal(call(graph, x), call(graph, x))
    torch.manual_seed(3)
    wanted = call(model, x)
    torch.manual_seed(3)
    assert torch.equal(call(graph, x), wanted)


def counts(net: Any, x: Tensor) -> Tensor:
    net.seen.mul_(0.9).add_(x.mean((0, 2, 3)))
    net.calls += 1
    return x + net.seen.view(1, -1, 1, 1)


@pytest.mark.parametrize("compensate", ["none", "sequential"])
def test_buffers_keep_the_callers_numbers(compensate: Any) -> None:
    model = Net(counts).eval()
    model.seen += torch.arange(8.0)
    data = [(images()(4), torch.arange(4) % 3), (images()(4) + 1, torch.arange(4) % 3)]
    with pytest.warns(
        FxpruneWarning, match="the forward of Net changes calls, seen: the graph begins with the buffers"
    ):
        small = fxprune.compress(model, data, 0.5, compensate=compensate, progress=False)
    kept = list(small.meta["fxprune"].plan.keep["a"])
    assert len(kept) < 8
    assert torch.equal(small.seen, torch.arange(8.0)[kept])
    assert (torch.equal(model.seen, torch.arange(8.0)), model.calls) == (True, 0)


# -- the comparison itself ---------------------------------------------------------------------------------------------


def test_another_batch_is_compared_too() -> None:
    """The example alone shows no difference."""
    model = Net(lambda net, x: x * 2 if float(x.abs().max()) > 100 else x).eval()
    with pytest.warns(FxpruneWarning, match="Net decides by the values of its input"):
        assert same(model, fxprune.capture(model, images()(2)))
    with (
        pytest.warns(FxpruneWarning),
        pytest.raises(CaptureError, match="other outputs than the model on a batch of 3"),
    ):
        fxprune.capture(model, images()(2), other=images()(4) * 1000)


def test_the_comparison_can_be_left_out() -> None:
    model = Net(lambda net, x: x * 2 if type(x) is Tensor else x).eval()
    graph = fxprune.capture(model, images()(2), prove=False)
    assert not same(model, graph)
    data = [(images()(4), torch.arange(4) % 3)]
    with pytest.raises(CaptureError, match="gives other outputs than the model"):
        fxprune.compress(model, data, 0.3, progress=False)


# -- what is compared --------------------------------------------------------------------------------------------------


def _halves(self: Net, x: Tensor) -> Tensor:
    return torch.cat([part * 2 for part in x.split(2)])


def _doubled_where_many(self: Net, x: Tensor) -> Tensor:
    return x * 2 if x.shape[0] > 4 else x


def _centred(self: Net, x: Tensor) -> Tensor:
    return x - x.mean(0) if len(x) > 1 else x


@pytest.mark.parametrize("rung", RUNGS)
@pytest.mark.parametrize("middle", [_halves, _doubled_where_many, _centred])
def test_the_whole_example_and_one_sample_are_compared(middle: Forward, rung: str) -> None:
    with pytest.raises(CaptureError):
        fxprune.capture(Net(middle), images()(8), method=rung)


class Masked(Net):
    """A network that fills a column of its output with a constant, as masks do."""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return torch.cat([y, torch.full_like(y[:, :1], -1e9), torch.full_like(y[:, :1], -3e38)], 1)


def test_constants_of_the_output_do_not_hide_the_rest() -> None:
    model = Masked(lambda self, x: x / float(x.shape[0]))
    assert "other outputs than the model" in captured(model, "values")
    wanted, filled = torch.randn(2, 4), torch.full((2, 1), -1e9)
    with_fill = torch.cat([wanted, filled], 1)
    assert apart(with_fill, torch.cat([wanted * 1.01, filled], 1)) == pytest.approx(apart(wanted, wanted * 1.01))
    assert apart(with_fill, with_fill) == apart(filled, filled) == 0
    assert apart(with_fill, torch.cat([wanted, filled * 1.01], 1)) == pytest.approx(0.01, rel=1e-3)


@dataclasses.dataclass
class Answer:
    """What a network gives, by name."""

    logits: Any


class Answers(dict[str, Any]):
    """A dict that pytree does not know."""


class Listed(list[Any]):
    """A list that pytree does not know."""


class Held:
    """An object that holds a tensor."""

    def __init__(self, logits: Tensor) -> None:
        self.logits = logits


def _twice_where_plain(self: Net, x: Tensor) -> Tensor:
    return x * 2 if type(x) is Tensor else x


class Answering(Net):
    """A network whose output is inside something."""

    def __init__(self, into: Callable[[Tensor], Any], middle: Forward = _twice_where_plain) -> None:
        super().__init__(middle)
        self.into = into

    def forward(self, x: Tensor) -> Any:
        return self.into(super().forward(x))


INTO: tuple[Callable[[Tensor], Any], ...] = (
    lambda y: (Answer(y),),
    lambda y: {"a": Answer(y)},
    lambda y: Answer(Answer(y)),
    lambda y: Answers(logits=y),
    lambda y: (Listed([y]),),
)


@pytest.mark.parametrize("rung", ["fx", "values"])
@pytest.mark.parametrize("into", INTO)
def test_what_is_inside_of_an_output_is_compared(into: Callable[[Tensor], Any], rung: str) -> None:
    assert "type of a value" in (error := captured(Answering(into), rung)) or "other outputs" in error
    graph = captured(Answering(into, lambda self, x: x * 2), rung)
    model = Answering(into, lambda self, x: x * 2)
    graph.load_state_dict(model.state_dict())
    wanted, found = (pytree.tree_leaves(as_fields(m(images()(3)))) for m in (model, graph))
    assert len(wanted) == len(found) == 1
    assert torch.allclose(wanted[0], found[0], atol=1e-6)


def test_an_output_that_cannot_be_compared_is_refused() -> None:
    with pytest.raises(CaptureError, match="its output holds a Held, which cannot be compared: return tensors, lists"):
        fxprune.capture(Answering(lambda y: (Held(y),)), images()(4))


# -- decisions by values -----------------------------------------------------------------------------------------------

BY_VALUES: dict[str, Forward] = {
    "numel of what a mask picks": lambda self, x: x if x[x > 1e4].numel() else x * 2,
    "len of nonzero": lambda self, x: x if len((x > 1e4).nonzero()) else x * 2,
    "size of unique": lambda self, x: x if torch.unique(x > 1e4).size(0) > 1 else x * 2,
    "shape of masked_select": lambda self, x: x if x.masked_select(x > 1e4).shape[0] else x * 2,
    "loop over nonzero": lambda self, x: x + sum(1 for _ in (x > 1e4).nonzero()),
    "loop over where": lambda self, x: x + sum(1 for _ in zip(*torch.where(x > 1e4), strict=True)),
    "range of nonzero": lambda self, x: x + sum(range(len((x > 1e4).nonzero()))),
    "tolist": lambda self, x: x + len((x > 1e4).nonzero().tolist()),
    "format": lambda self, x: x if float(f"{x.max():.3f}") > 1e4 else x * 2,
    "str": lambda self, x: x if str(x.max() > 1e4) == "tensor(True)" else x * 2,
}


@pytest.mark.parametrize("name", BY_VALUES)
def test_a_decision_by_sizes_lengths_or_texts_of_values_is_told(name: str) -> None:
    with pytest.warns(FxpruneWarning, match=r"decides by the values of its input.*test_capture_proof\.py"):
        assert not isinstance(captured(Net(BY_VALUES[name]), "values"), str)
    assert isinstance(captured(Net(BY_VALUES[name]), "fx"), str)


@pytest.mark.parametrize("name", ["by the kept rows", "by their mean"])
def test_sizes_that_values_do_not_decide_are_not_told(name: str) -> None:
    middles: dict[str, Forward] = {
        "by the kept rows": lambda self, x: x * 2 if torch.zeros_like(x).masked_fill(x > 0, 1).shape[1] == 8 else x,
        "by their mean": lambda self, x: x * 2 if x[x > 0].mean().expand(3).shape[0] == 3 else x,
    }
    model = Net(middles[name])
    assert same(model, captured(model, "values"))


BY_TEXT: dict[str, Forward] = {
    "format": lambda self, x: x * 2 if f"{x.size(0)}" == "2" else x,
    "percent": lambda self, x: x * 2 if "%s" % x.shape[0] == "2" else x,  # noqa: UP031
    "repr": lambda self, x: x * 2 if repr(x.shape[0]) == "2" else x,
    "hash": lambda self, x: x * 2 if hash(x.shape[0]) == 2 else x,
    "dict": lambda self, x: x * {2: 5.0, 16: 3.0}.get(x.shape[0], 1.0),
    "set": lambda self, x: x * 2 if x.shape[0] in {2, 8} else x,
}


@pytest.mark.parametrize("name", BY_TEXT)
def test_texts_and_hashes_of_symbols_are_refused_where_no_value_is_known(name: str) -> None:
    assert "the forward " in (error := captured(Net(BY_TEXT[name]), "fx"))
    assert "test_capture_proof.py" in error
    assert isinstance(captured(Net(BY_TEXT[name]), "values"), str)  # for other numbers of samples it is another one


def test_the_message_of_an_assertion_is_no_decision() -> None:
    def middle(self: Net, x: Tensor) -> Tensor:
        torch._assert(x.shape[1] == 8, f"{x.shape} has no 8 channels")
        return x

    model = Net(middle)
    assert same(model, captured(model, "fx"))


def _seen(self: Net, x: Tensor) -> Tensor:
    seen = torch.zeros(1)
    seen.add_(x.max())
    return x * 2 if seen.item() > 1e4 else x


def _row(self: Net, x: Tensor) -> Tensor:
    y = torch.zeros(3, 8)
    y[0].copy_(x.amax((0, 2, 3)))
    return x * 2 if y.max() > 1e4 else x


def _out(self: Net, x: Tensor) -> Tensor:
    y = torch.empty_like(x.detach())
    torch.add(x.detach(), 0, out=y)
    return x * 2 if y.max() > 1e4 else x


def _set_all(self: Net, x: Tensor) -> Tensor:
    y = torch.zeros(1)
    y[:] = x.max()
    return x * 2 if y.max() > 1e4 else x


@pytest.mark.parametrize("middle", [_seen, _row, _out, _set_all])
def test_a_tensor_that_a_value_is_written_into_is_no_constant(middle: Forward) -> None:
    assert isinstance(captured(Net(middle), "fx"), str)
    with pytest.warns(FxpruneWarning, match="decides by the values of its input"):
        captured(Net(middle), "values")


_STORE = torch.zeros(1)


@pytest.mark.parametrize("rung", ["fx", "values"])
def test_a_tensor_of_python_and_a_parameter_are_not_written(rung: str) -> None:
    def stored(self: Net, x: Tensor) -> Tensor:
        _STORE.copy_(x.detach().max())
        return x

    def weight(self: Net, x: Tensor) -> Tensor:
        self.b.bias.data.copy_(x.detach().mean((0, 2, 3)))
        return x

    assert "writes a value into a tensor that was made without one" in captured(Net(stored), rung)
    assert "writes into the parameter b.bias" in (error := captured(Net(weight), rung))
    assert "test_capture_proof.py" in error


# -- what tracing leaves behind ----------------------------------------------------------------------------------------

_KEPT: dict[str, Any] = {"calls": []}
_LAST: Any = None


def _noted(x: Tensor) -> Tensor:
    global _LAST
    _LAST = x.detach()
    _KEPT["last"] = x.detach()
    _KEPT["calls"].append(x.detach())
    return x


class Noting(Net):
    """A network that notes activations everywhere outside of its instances."""

    last: Any = None
    store: dict[str, Any] = {}  # noqa: RUF012

    def forward(self, x: Tensor) -> Tensor:
        Noting.last = x.detach()
        self.store["x"] = x.detach()
        return super().forward(_noted(x))


@pytest.mark.parametrize("rung", RUNGS)
def test_no_symbol_stays_outside_of_the_model(rung: str) -> None:
    model = Noting(lambda self, x: x * 2)
    with pytest.warns(
        FxpruneWarning, match=r"the forward of Noting changes .*test_capture_proof._KEPT\['calls'\]: the"
    ):
        assert not isinstance(captured(model, rung), str)
    assert (_LAST, _KEPT, Noting.last, Noting.store) == (None, {"calls": []}, None, {})


class Counted(Net):
    """A network that counts its calls in its class."""

    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        type(self).calls += 1
        return super().forward(x * 2 if Counted.calls > 12 else x)


_COUNT, _PLACES = [0], types.SimpleNamespace(n=0)
_SUMS, _ARRAY, _CALLS = torch.zeros(1), np.zeros(1), 0


def _counted(self: Net, x: Tensor) -> Tensor:
    global _CALLS
    _CALLS += 1
    _COUNT[0] += 1
    _PLACES.n += 1
    _ARRAY[0] += 1
    return x * 2 if _CALLS > 12 else x


def _sums(self: Net, x: Tensor) -> Tensor:
    with torch.no_grad():
        _SUMS.add_(1)
    return x


@pytest.mark.parametrize("rung", ["fx", "values"])
def test_what_a_forward_changes_outside_of_its_model_is_told_and_put_back(rung: str) -> None:
    with pytest.warns(FxpruneWarning, match="the forward of Counted changes Counted.calls: the graph"):
        fxprune.capture(Counted(lambda self, x: x), images()(4), method=rung)
    with pytest.warns(FxpruneWarning, match=r"_COUNT\[0\]") as told:
        fxprune.capture(Net(_counted), images()(4), method=rung)
    assert all(name in str(told[0].message) for name in ("._CALLS", "._PLACES.n", "_ARRAY"))
    assert (Counted.calls, _CALLS, _COUNT, _PLACES.n, float(_ARRAY[0])) == (0, 0, [0], 0, 0)
    with pytest.warns(FxpruneWarning, match="_SUMS"), contextlib.suppress(CaptureError):
        fxprune.capture(Net(_sums), images()(4), method=rung)
    assert float(_SUMS) == 0


@pytest.mark.parametrize("rung", ["fx", "values"])
def test_what_a_forward_counts_in_a_closure_is_told_and_put_back(rung: str) -> None:
    count = 0

    def counted(self: Net, x: Tensor) -> Tensor:
        nonlocal count
        count += 1
        return x

    with pytest.warns(FxpruneWarning, match=r"the forward of Net changes count of .*counted, middle\.count: the graph"):
        fxprune.capture(Net(counted), images()(4), method=rung)
    assert count == 0


def test_switches_of_torch_that_a_forward_sets_are_put_back() -> None:
    def middle(self: Net, x: Tensor) -> Tensor:
        torch.backends.mha.set_fastpath_enabled(False)  # type: ignore[no-untyped-call]
        torch.set_deterministic_debug_mode("warn")
        return x

    assert not isinstance(captured(Net(middle), "auto"), str)
    assert torch.backends.mha.get_fastpath_enabled()  # type: ignore[no-untyped-call]
    assert torch.get_deterministic_debug_mode() == 0


# -- what a graph was made for -----------------------------------------------------------------------------------------


class Nested(nn.Module):
    """A network of a batch with a mask or none, and a mode."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 16), nn.Linear(16, 4)

    def forward(self, batch: dict[str, Any]) -> Tensor:
        x = self.a(batch["x"]).relu()
        x = x if batch["mask"] is None else x * batch["mask"]
        return self.b(x * 2 if batch["mode"] == "a" else x)


class Several(Nested):
    """A network of several tensors."""

    def forward(self, xs: Any) -> Tensor:
        return self.b(torch.stack([self.a(x).relu() for x in xs]).sum(0))


def test_none_and_text_inside_of_an_input_are_checked() -> None:
    x, model = torch.randn(3, 6), Nested()
    graph = fxprune.capture(model, ({"x": torch.randn(4, 6), "mask": None, "mode": "a"},), method="values")
    given = {"x": x, "mask": None, "mode": "a"}
    assert torch.allclose(model(given), graph(given), atol=1e-6)
    for other in (given | {"mask": torch.full((3, 1), 0.3)}, given | {"mode": "b"}):
        with pytest.raises(CaptureError, match="the graph was made for"):
            graph(other)


@pytest.mark.parametrize("kind", [list, tuple])
def test_the_length_of_an_input_is_checked(kind: Any) -> None:
    x, model = torch.randn(3, 6), Several()
    graph = fxprune.capture(model, (kind([torch.randn(4, 6)] * 2),), method="values")
    assert torch.allclose(model(kind([x, x])), graph(kind([x, x])), atol=1e-6)
    for count in (1, 3):
        with pytest.raises(CaptureError, match=r"the graph was made for len\(xs\)=2"):
            graph(kind([x] * count))


class Unpacks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 4)

    def forward(self, xs: Any) -> Tensor:
        a, b = xs
        return self.layer(a + b)


class Switched(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 4)

    def forward(self, x: Tensor, options: Any) -> Tensor:
        return self.layer(x) * (2 if options[0] else 1)


def test_a_truth_in_a_list_is_checked() -> None:
    x, model = torch.randn(4, 6), Switched()
    graph = fxprune.capture(model, (x, [True]), method="values")
    assert torch.allclose(model(x, [True]), graph(x, [True]), atol=1e-6)
    with pytest.raises(CaptureError, match="the graph was made for"):
        graph(x, [False])


@pytest.mark.parametrize("rung", RUNGS)
def test_how_many_an_unpacked_input_has_is_checked(rung: str) -> None:
    x, model = torch.randn(3, 6), Unpacks()
    graph = fxprune.capture(model, ([torch.randn(4, 6)] * 2,), method=rung)
    assert torch.allclose(model([x, x]), graph([x, x]), atol=1e-6)
    with pytest.raises(CaptureError, match=r"the graph was made for len\(xs\)=2"):
        graph([x, x, x])


# -- other batches than the example ------------------------------------------------------------------------------------


class Sequences(nn.Module):
    """Two layers, with a step of a test's between them that goes along the axis of the time."""

    def __init__(self, middle: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.middle = nn.Linear(6, 8), nn.Linear(8, 4), middle

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        h = self.a(x).relu()
        return self.b(self.middle(h if scale is None else h * scale.unsqueeze(-1)))


def by_pattern(h: Tensor) -> Tensor:
    match h.shape:
        case [_, 10, _]:
            return h.mean(1) * 2
        case _:
            return h.mean(1)


FIXED: dict[str, Callable[[Tensor], Tensor]] = {
    "range": lambda h: torch.stack([h[:, i] * (i + 1) for i in range(h.shape[1])], 1).mean(1),
    "unbind": lambda h: sum(step.tanh() for step in h.unbind(1)),  # type: ignore[return-value, misc]
    "split": lambda h: torch.stack([s.squeeze(1) for s in h.split(1, 1)]).amax(0),
    "int": lambda h: h[:, : int(h.shape[1] / 2)].mean(1),
    "float": lambda h: h.sum(1) / float(h.shape[1]),
    "threshold": lambda h: h.mean(1) * (2 if h.shape[1] > 7 else 1),
    "parity": lambda h: h.mean(1) * (2 if h.shape[1] % 2 else 1),
    "multiple": lambda h: h.mean(1) * (2 if h.shape[1] % 7 == 0 else 1),
    "product": lambda h: h.mean(1) * (2 if h[0].numel() > 100 else 1),
    "shape": lambda h: h.mean(1) * (2 if h.shape[1:] == (10, 8) else 1),
    "match": by_pattern,
}
FREE: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": lambda h: h.mean(1),
    "slice": lambda h: h[:, : h.shape[1] // 2].sum(1),
    "view": lambda h: h.reshape(h.shape[0], h.shape[1] * 8)[:, :8] * h.shape[1],
    "own number": lambda h: torch.stack([h[:, i] for i in range(2)]).mean(0),
    "refused": lambda h: h.unflatten(1, (5, 1)).sum((1, 2)),
}


@pytest.mark.parametrize("name", FIXED)
def test_a_length_that_is_fixed_is_told(name: str) -> None:
    model, told = Sequences(FIXED[name]).eval(), r"holds for 5 entries along axis 1 of its input of shape \(2, 5, 6\)"
    with pytest.warns(FxpruneWarning, match=told):
        graph = fxprune.capture(model, torch.randn(8, 5, 6), method="values")
    x = torch.randn(3, 5, 6)
    assert torch.allclose(model(x), graph(x), atol=1e-5)


@pytest.mark.parametrize("rung", ["auto", "values"])
@pytest.mark.parametrize("name", FREE)
def test_a_length_that_is_not_fixed_is_not_told(name: str, rung: str) -> None:
    model = Sequences(FREE[name]).eval()
    graph = fxprune.capture(model, torch.randn(8, 5, 6), method=rung)
    x = torch.randn(3, 5 if name == "refused" else 9, 6)
    assert torch.allclose(model(x), graph(x), atol=1e-5)


def test_lengths_that_inputs_share_are_also_changed_one_by_one() -> None:
    class Pair(Sequences):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:  # type: ignore[override]
            return self.b((self.a(x).mean(1) + self.a(y).mean(1)) * (2 if x.shape[1] == y.shape[1] else 1))

    with pytest.warns(FxpruneWarning, match=r"5 entries along axis 1 of its input of shape \(2, 5, 6\)"):
        fxprune.capture(Pair(torch.relu).eval(), (torch.randn(4, 5, 6), torch.randn(4, 5, 6)))


@pytest.mark.parametrize("words", [1, 3, 7])
def test_an_input_that_is_broadcast_along_another_has_no_other_length(words: int) -> None:
    """As masks of decoders: where one has ones alone, their attention runs without it."""

    class Masked(Sequences):
        def forward(self, x: Tensor, mask: Tensor) -> Tensor:  # type: ignore[override]
            h = self.a(x).relu()
            if mask.shape[1] == x.shape[1]:
                h = h * mask.unsqueeze(-1)
            return self.b(h.sum(1))

    model = Masked(torch.relu).eval()
    mask = torch.ones(4, words).cumsum(0) / 4  # of which a single entry counts
    graph = fxprune.capture(model, (torch.randn(4, words, 6), mask), method="values")  # warnings are errors
    x = torch.randn(3, 9, 6), torch.rand(3, 9)
    assert torch.allclose(model(*x), graph(*x), atol=1e-5)


@pytest.mark.parametrize("longer", [False, True])
def test_lengths_beside_a_mask_of_one_entry_are_told(longer: bool) -> None:
    """A decision by a length that several inputs share is told, whether one of them has it or all."""

    class Deciding(Sequences):
        def forward(self, x: Tensor, mask: Tensor) -> Tensor:  # type: ignore[override]
            short = x.shape[1] < 5 if longer else x.shape[1] == 1
            return self.b((self.a(x).relu() * mask.unsqueeze(-1)).sum(1)) * (2 if short else 1)

    size = 5 if longer else 4
    told = rf"holds for {size} entries along axis 1 of its input of shape \(2, {size}"
    with pytest.warns(FxpruneWarning, match=told):
        fxprune.capture(Deciding(torch.relu).eval(), (torch.randn(4, size, 6), torch.ones(4, size)), method="values")


def test_lengths_that_inputs_share_are_changed_together() -> None:
    model = Sequences(FIXED["unbind"]).eval()
    with pytest.warns(
        FxpruneWarning, match=r"5 entries along axis 1 of its input of shape \(2, 5, 6\): with 6"
    ) as told:
        fxprune.capture(model, (torch.randn(8, 5, 6), torch.rand(8, 5)))
    assert len(told) == 1


BY_SAMPLES: dict[str, Callable[[Tensor], Tensor]] = {
    "more than": lambda h: h * 2 if h.shape[0] > 20 else h,
    "fewer than": lambda h: h * 2 if len(h) < 5 else h,
    "exactly": lambda h: h * 2 if h.size(0) == 17 else h,
    "of a multiple": lambda h: h * 2 if h.shape[0] * 3 >= 60 else h,
    "of a square": lambda h: h * 2 if h.shape[0] ** 2 > 100 else h,
    "of all numbers": lambda h: h * 2 if h.numel() > 150 else h,
    "as an int": lambda h: h * 2 if int(h.shape[0]) > 16 else h,
    "as a text": lambda h: h * 2 if str(h.shape[0]) == "17" else h,
    "in a shape": lambda h: h * 2 if h.size() > (10,) else h,
    "of pieces": lambda h: h * 2 if len(h.unbind()) > 16 else h,
    "as a tensor": lambda h: h * 2 if torch.ones(h.shape[0]).sum() > 16 else h,
}


@pytest.mark.parametrize("rung", ["auto", "values"])
@pytest.mark.parametrize("name", BY_SAMPLES)
def test_numbers_of_samples_beside_which_a_forward_decides_are_tried(name: str, rung: str) -> None:
    model = Sequences(BY_SAMPLES[name]).eval()
    with pytest.raises(CaptureError, match=r"gives other outputs than the model on a batch of \d+ samples"):
        fxprune.capture(model, torch.randn(8, 6), method=rung)


def checked(h: Tensor) -> None:
    if h.abs().max() > 30:
        raise ValueError


def with_a_caught_error(h: Tensor) -> Tensor:
    try:
        checked(h)
    except ValueError:
        return h.clamp(-1, 1)
    return h


def with_an_assertion(h: Tensor) -> Tensor:
    checked(h)
    assert h.isfinite().all()
    return h


def test_an_assertion_by_values_is_told_where_it_is_caught() -> None:
    x = torch.randn(8, 6)
    with pytest.warns(FxpruneWarning, match="decides by the values of its input, .*: if h.abs"):
        fxprune.capture(Sequences(with_a_caught_error).eval(), x, method="values")
    fxprune.capture(Sequences(with_an_assertion).eval(), x, method="values")


def test_a_decision_in_code_without_a_file_is_told() -> None:
    made: dict[str, Any] = {}
    exec(compile("def middle(h):\n    return h * 2 if h.sum() > 0 else h", "<stdin>", "exec"), made)
    with pytest.warns(FxpruneWarning, match="decides by the values of its input, .* at <stdin>:2"):
        fxprune.capture(Sequences(made["middle"]).eval(), torch.rand(8, 6), method="values")


def test_numbers_of_samples_that_are_too_large_to_try_are_told() -> None:
    model = Sequences(lambda h: h * 2 if h.shape[0] > 1 << 20 else h).eval()
    with pytest.warns(
        FxpruneWarning, match="decides by sizes, and its graph goes the way of 2 samples: it was not compared"
    ):
        fxprune.capture(model, torch.randn(8, 6))


@pytest.mark.parametrize("rung", ["auto", "values"])
def test_a_decision_by_the_layout_in_memory_is_refused(rung: str) -> None:
    model = Sequences(lambda h: h).eval()
    forward = model.forward
    model.forward = lambda x: forward(x) * (2 if x.is_contiguous() else 1)  # type: ignore[method-assign]
    with pytest.raises(CaptureError, match="its graph gives other outputs than the model"):
        fxprune.capture(model, torch.randn(8, 6), method=rung)


def test_containers_that_a_forward_fills_anew_are_not_told() -> None:
    def middle(self: Any, x: Tensor) -> Tensor:
        self.notes = [x]
        self.notes.append(self.notes[-1] * 2)
        return self.notes[-1]

    model: Any = Net(middle)
    model.notes = []
    assert same(model, captured(model, "fx"))


def test_containers_that_a_forward_fills_are_told() -> None:
    def middle(self: Any, x: Tensor) -> Tensor:
        self.notes.append(1)
        return x * 2 if len(self.notes) > 30 else x

    model: Any = Net(middle)
    model.notes = []
    with pytest.warns(FxpruneWarning, match="the forward of Net changes notes"):
        assert not isinstance(captured(model, "fx"), str)


@dataclasses.dataclass(slots=True)
class Slotted:
    """A number in a slot."""

    n: int = 0


def _next_number(self: Any, x: Tensor) -> Tensor:
    self.state.n += 1
    return x


def _next_key(self: Any, x: Tensor) -> Tensor:
    self.state["n"] += 1
    return x


def _next_entry(self: Any, x: Tensor) -> Tensor:
    self.state[0] += 1
    return x


def _longer(self: Any, x: Tensor) -> Tensor:
    self.state = self.state + self.state[:1]
    return x


def _counts_on(self: Any, x: Tensor) -> Tensor:
    next(self.state)
    return x


STATES: dict[str, tuple[Forward, Any, str]] = {
    "dict": (_next_key, {"n": 0}, r"state\['n'\]"),
    "Counter": (_next_key, Counter(n=1), r"state\['n'\]"),
    "list": (_next_entry, [0], r"state\[0\]"),
    "array": (_next_entry, np.zeros(1), "state"),
    "tensor": (_next_entry, torch.zeros(1), "state"),
    "namespace": (_next_number, types.SimpleNamespace(n=0), "state.n"),
    "slots": (_next_number, Slotted(), "state.n"),
    "tuple": (_longer, (1,), "state"),
    "str": (_longer, "a", "state"),
    "count": (_counts_on, itertools.count(), "state"),
}


@pytest.mark.parametrize("name", STATES)
def test_state_inside_of_what_a_module_holds_is_told(name: str) -> None:
    middle, state, told = STATES[name]
    model: Any = Net(middle)
    model.state = state
    with pytest.warns(FxpruneWarning, match=f"the forward of Net changes {told}: the graph begins with"):
        assert not isinstance(captured(model, "auto"), str)


def test_tensors_in_lists_are_told() -> None:
    def middle(self: Any, x: Tensor) -> Tensor:
        self.state[0].add_(1)
        return x

    model: Any = Net(middle)
    model.state = [torch.zeros(())]
    with pytest.warns(FxpruneWarning, match=r"the forward of Net changes state\[0\]"):
        captured(model, "values")


def test_what_each_run_sets_anew_or_once_is_not_told() -> None:
    def middle(self: Any, x: Tensor) -> Tensor:
        self.last, self.notes["shape"] = x.detach(), list(x.shape)
        self.cache.setdefault("scale", types.SimpleNamespace(scale=2.0))
        return x * self.cache["scale"].scale

    model: Any = Net(middle)
    model.last, model.notes, model.cache = torch.zeros(1), {"shape": [1], "n": 3}, {}
    graph = captured(model, "values")
    assert not isinstance(graph, str)
    assert same(model, graph)


class Recurrent(nn.Module):
    """A GRU that goes on from its last hidden state where the number of samples is the same."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head, self.state = nn.GRU(6, 8, batch_first=True), nn.Linear(8, 4), [None]

    def forward(self, x: Tensor) -> Tensor:
        (state,) = self.state
        y, new = self.layer(x, state if state is not None and state.shape[1] == len(x) else None)
        self.state = [new.detach()]
        return self.head(y[:, -1])


def test_state_that_is_kept_between_batches_of_one_size_is_told() -> None:
    with pytest.warns(FxpruneWarning, match=r"the forward of Recurrent changes state\[0\]"):
        fxprune.capture(Recurrent().eval(), torch.randn(4, 5, 6))


# -- small beside large ------------------------------------------------------------------------------------------------


class Beside(Net):
    """Numbers beside others that are much larger."""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        small = y.sigmoid() * (0.95 if type(y) is Tensor else 1.0)
        return torch.cat([small, *((y * 1e5,) if self.calls else (torch.full_like(y[:, :1], v) for v in FILLS))], 1)


FILLS = (1e9, 5e8, 2e8)


@pytest.mark.parametrize("calls", [0, 1])
def test_what_is_small_beside_the_rest_of_an_output_is_compared_by_its_own_scale(calls: int) -> None:
    model: Any = Beside(lambda net, x: x).eval()
    model.calls = calls
    assert "gives other outputs than the model on a batch of 2 samples (in entry 0 along axis 1)" in captured(
        model, "fx"
    )


@pytest.mark.parametrize(("noise", "same"), [(1e-7, True), (0.0, False)])
def test_a_small_slice_may_be_off_by_the_rounding_that_others_show(noise: float, same: bool) -> None:
    wanted = torch.rand(4, 3) + 1
    wanted[:, 2] = 1e-6
    found = wanted * (1 + 3 * noise)
    found[:, 2] += 2e-6
    assert agree(wanted, found) == same


# -- gradients ---------------------------------------------------------------------------------------------------------


class Straight(torch.autograd.Function):
    """Rounds, and hands gradients through."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # type: ignore[override]
        return (x * 4).round() / 4

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:  # type: ignore[override]
        return g


def frozen(net: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        return x * 2


def reversing(net: Any, x: Tensor) -> Tensor:
    if x.requires_grad:
        x.register_hook(lambda g: -g)
    return x


@pytest.mark.parametrize("middle", [lambda net, x: Straight.apply(x), frozen, reversing])
def test_gradients_that_the_graph_has_otherwise_are_told(middle: Forward) -> None:
    model = Net(middle).eval()
    with pytest.warns(FxpruneWarning, match="trains otherwise: it has other gradients of a.weight, a.bias, its input"):
        fxprune.capture(model, images()(4))
    model.requires_grad_(False)
    fxprune.capture(model, images()(4))


@pytest.mark.parametrize("middle", [lambda net, x: x.detach(), lambda net, x: x + x.softmax(1).detach(), counts])
@pytest.mark.filterwarnings("ignore:the forward of Net changes")
def test_gradients_that_the_graph_has_too_are_not_told(middle: Forward) -> None:
    graph = fxprune.capture(Net(middle).eval(), images()(4))
    assert not graph.get_buffer("seen").requires_grad


# -- what tracing does not see -----------------------------------------------------------------------------------------


def test_a_bias_that_a_hook_takes_away_stays_away() -> None:
    model = Net(lambda net, x: x).eval()
    model.a.register_forward_pre_hook(lambda module, args: setattr(module, "bias", None))
    data = [(images()(6), torch.arange(6) % 3)]
    assert same(copy.deepcopy(model), fxprune.capture(model, data[0][0]))
    small: Any = fxprune.compress(model, data, 0.5, compensate="none", progress=False)
    assert small.a.bias is None
    assert len(small.a.weight) < 8


@pytest.mark.parametrize(
    "transform", [lambda f: torch.vmap(f, randomness="same"), lambda f: torch.func.grad(lambda x: f(x).sum())]
)
def test_work_inside_of_a_transform_is_refused(transform: Any) -> None:
    def work(x: Tensor) -> Tensor:
        fxprune.capture(Net(lambda net, x: x).eval(), x)
        return x

    with pytest.raises(FxpruneError, match=r"capture is called inside of torch.vmap.*: call it outside"):
        transform(work)(torch.randn(2, 4, 3, 8, 8))


# -- inputs that are written, repeated, or of rare kinds ---------------------------------------------------------------


class Spiking(nn.Module):
    """Adds into a state that the caller gives and keeps."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor, state: Tensor) -> Tensor:
        state *= 0.9
        state += self.a(x)
        return self.b(state.relu())


def test_writing_into_an_input_is_told() -> None:
    model, x, state = Spiking().eval(), torch.randn(4, 8), torch.zeros(4, 16)
    with pytest.warns(FxpruneWarning, match="Spiking writes into its input, and its graph does not"):
        graph = fxprune.capture(model, (x, state))
    assert state.abs().max() == 0
    assert torch.allclose(graph(x, state.clone()), model(x, state.clone()), atol=1e-6)


class Identical(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.out = nn.Linear(8, 16), nn.Linear(8, 16), nn.Linear(16, 4)

    def forward(self, q: Tensor, k: Tensor) -> Tensor:
        return self.out(self.q(q) if q is k else self.q(q) * self.k(k))


@pytest.mark.parametrize("samples", [2, 5])
def test_whether_two_inputs_are_one_tensor_is_no_silent_decision(samples: int) -> None:
    x = torch.randn(samples, 8)
    with pytest.raises(CaptureError, match="asks whether two of its inputs are the same tensor"):
        fxprune.capture(Identical(), (x, x))
    model = Identical().eval()
    graph = fxprune.capture(model, (x, torch.randn(samples, 8)))
    assert torch.allclose(graph(x, 2 * x), model(x, 2 * x), atol=1e-6)


def test_equal_inputs_are_told_apart() -> None:
    """A graph that took one of two equal inputs for the other would give the same on batches that keep them equal."""
    x = torch.randn(2, 8)
    one, other = varied_batch((x, x.clone()), 3)
    assert one.shape == other.shape == (3, 8)
    assert not torch.equal(one, other)


class Patches(nn.Module):
    """Takes images of whole patches only, and keeps a share of them, which is a number of Python."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.head = nn.Conv2d(3, 16, 8, 8), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[2] % 8 or x.shape[3] % 8:
            raise ValueError("no whole patches")
        h = self.patches(x).flatten(2).transpose(1, 2)
        return self.head(h[:, : int(0.7 * h.shape[1])].mean(1))


def test_a_length_is_told_where_a_model_takes_whole_patches_only() -> None:
    with pytest.warns(FxpruneWarning, match="the graph of Patches holds for 24 entries along axis 2"):
        fxprune.capture(Patches(), torch.randn(2, 3, 24, 24))


class Fourier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lift, self.weight = nn.Linear(3, 8), nn.Parameter(torch.randn(8, 8, dtype=torch.cfloat))
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        spectrum = torch.fft.rfft(self.lift(x), dim=1)
        return self.head(torch.fft.irfft(spectrum @ self.weight, n=6, dim=1))


class Embedded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(10, 8, sparse=True), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.table(x).mean(1))


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.head(x.float())
        return h, h.to(torch.float8_e4m3fn)


@pytest.mark.parametrize(
    ("model", "example"),
    [
        (Fourier(), torch.randn(3, 6, 3)),
        (Embedded(), torch.arange(12).reshape(3, 4) % 10),
        (Small(), torch.randn(3, 8).to(torch.float8_e4m3fn)),
    ],
)
def test_dtypes_and_layouts_with_few_operations_are_compared(model: nn.Module, example: Tensor) -> None:
    graph = fxprune.capture(model.eval(), example)
    assert agree(model(example), graph(example))


class Ranged(nn.Module):
    def __init__(self, made: Callable[[int], Any]) -> None:
        super().__init__()
        self.head, self.made = nn.Linear(8, 4), made

    def forward(self, x: Tensor) -> dict[str, Any]:
        return {"y": self.head(x), "made": self.made(x.size(0))}


@pytest.mark.parametrize("made", [range, lambda n: complex(n, 1)])
def test_values_of_python_in_an_output_are_compared(made: Callable[[int], Any]) -> None:
    with pytest.raises(CaptureError, match="it gives"):
        fxprune.capture(Ranged(made), torch.randn(3, 8), method="values")


def test_a_decision_by_random_numbers_is_told() -> None:
    def middle(net: Net, x: Tensor) -> Tensor:
        return 2 * x if torch.rand(()).item() < 0.3 else x

    with pytest.warns(FxpruneWarning) as told:
        fxprune.capture(Net(middle), images()(4), method="values")
    assert any("decides by the values of its input" in str(warning.message) for warning in told)


LOCAL, VARIABLE, COUNTS = threading.local(), contextvars.ContextVar[Any]("VARIABLE", default=None), [0]


class Tape:
    entries: list[Tensor] = []  # noqa: RUF012 - shared by all, as is that of a user's


def _in_local(net: Net, x: Tensor) -> Tensor:
    LOCAL.mean = x.mean()
    return x


def _in_variable(net: Net, x: Tensor) -> Tensor:
    VARIABLE.set(x.mean())
    return x


def _on_tape(net: Net, x: Tensor) -> Tensor:
    Tape.entries.append(x.mean())
    return x


@pytest.mark.parametrize("middle", [_in_local, _in_variable, _on_tape])
@pytest.mark.parametrize("rung", RUNGS)
@pytest.mark.filterwarnings("ignore:the forward of Net changes")
def test_nothing_of_a_trace_stays_in_the_process(middle: Forward, rung: str) -> None:
    captured(Net(middle), rung)
    assert (vars(LOCAL), VARIABLE.get(), Tape.entries) == ({}, None, [])


def _counts_in_a_list(net: Net, x: Tensor) -> Tensor:
    COUNTS[0] += 1
    return x * COUNTS[0]


def test_outputs_that_go_on_from_a_variable_of_python_are_told() -> None:
    with pytest.warns(FxpruneWarning, match=r"changes .*COUNTS\[0\]"):
        graph = fxprune.capture(Net(_counts_in_a_list), images()(4))
    assert COUNTS == [0]
    x = images()(4)
    assert difference(outputs(Net(lambda _, x: x), x), outputs(graph, x)) > 0  # other weights: the graph runs
    assert COUNTS == [0]


class Regularised(nn.Module):
    """Reads a number of the part that is pruned by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.part, self.head = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.part(x) * self.part.linear2.out_features)


def test_the_rest_may_ask_a_part_for_its_layers() -> None:
    torch.manual_seed(1)
    batches = [(torch.randn(16, 5, 8), torch.arange(80).reshape(16, 5) % 4)]
    loss = lambda output, target: F.cross_entropy(output.flatten(0, 1), target.flatten())  # noqa: E731
    small = fxprune.compress(Regularised(), batches, 0.3, submodule="part", loss=loss, progress=False)
    assert small(torch.randn(3, 5, 8)).shape == (3, 5, 4)


@pytest.mark.parametrize("rung", ["fx", "values"])
def test_what_the_forward_of_a_class_counts_in_a_closure_is_put_back(rung: str) -> None:
    count = 0

    class Counting(Net):
        def forward(self, x: Tensor) -> Tensor:
            nonlocal count
            count += 1
            return super().forward(x)

    with pytest.warns(FxpruneWarning, match=r"the forward of Counting changes count of .*Counting\.forward"):
        fxprune.capture(Counting(lambda self, x: x), images()(4), method=rung)
    assert count == 0
