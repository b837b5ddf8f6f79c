"""Every operation in the table of rules, its call spelled in other ways: exact, or an error that names the node."""

from __future__ import annotations

import pytest
from helpers import graph_of, part_of
from invariants import made
from random_nets import FAMILIES, RandomNet, one_of_each
from spellings import Way, by_keyword, by_shape, respelled, with_empty
from steps import KINDS

import fxprune

pytestmark = pytest.mark.filterwarnings("ignore:.*upsample.* is deprecated", "ignore:.*deprecated signature")
AT_ONCE = 40  # kinds in one network
NONE = {
    "F.batch_norm", "F.instance_norm", "torch.native_channel_shuffle", # with weights of six channels
    "torch.istft", "istft", "one head of keys", # what is reshaped as if there were samples or heads
}  # fmt: skip
BOXES = {name for name in KINDS if "roi_" in name}  # whose numbers of samples and sizes no other tensor gives


def chunks() -> list[list[str]]:
    """The names of all kinds, some of one family at a time."""
    found = []
    for family in FAMILIES:
        names = [name for name, kind in KINDS.items() if kind.family == family]
        found += [names[start : start + AT_ONCE] for start in range(0, len(names), AT_ONCE)]
    return found


def prove(net: RandomNet, way: Way) -> None:
    """The graph of the respelled network gives what that gives, and a smaller one what the masked original gives.

    Where torch takes no other spelling of any of its calls, there is nothing to see.
    """
    other = respelled(net, way)
    if other is None:
        return
    graph = graph_of(other, net.example())
    plan = fxprune.Scores.random(graph, net.example()).plan(alpha=0.6)
    assert fxprune.verify(graph, plan, made(graph, plan), net.example(3)) < 1e-9


def fails(name: str, way: Way) -> str | None:
    """What is wrong with one kind, if it is tried alone."""
    try:
        prove(one_of_each([name]), way)
    except Exception as error:  # noqa: BLE001 - whatever it is, it is said with the kind's name
        return f"{name}: {type(error).__name__}: {error}"
    return None


@pytest.mark.parametrize(
    ("names", "way"),
    part_of([(names, way) for names in chunks() for way in (by_keyword, with_empty, by_shape)], 25),
    ids=lambda part: f"{KINDS[part[0]].family}: {part[0]}" if isinstance(part, list) else part.__name__,
)
def test_every_step_in_another_spelling(names: list[str], way: Way) -> None:
    names = [name for name in names if way is by_keyword or name not in (NONE | BOXES if way is with_empty else BOXES)]
    if KINDS[names[0]].family == "pointwise" and way is not by_keyword:
        names = names[::8]  # one rule has nearly all of them
    try:
        prove(one_of_each(names), way)
    except Exception as error:
        raise AssertionError([found for n in names if (found := fails(n, way))] or "only together") from error


@pytest.mark.parametrize("name", sorted(NONE))
def test_calls_on_no_channels_that_no_rule_can_take(name: str) -> None:
    with pytest.raises(fxprune.FxpruneError, match=r"cannot take node|does not run on the example|cannot be narrowed"):
        prove(one_of_each([name]), with_empty)
