"""Ctrl-C at any moment: torch, Python and the caller's model are as before, and the next call works."""

from __future__ import annotations

import gc
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import count
from typing import Any

import pytest
import torch
from helpers import picture, same_picture
from nets import layers
from process import changed, state
from torch import nn

import fxprune
from fxprune.caller.interrupts import DeferredInterrupts
from fxprune.caller.isolation import seeded, undisturbed

pytestmark = pytest.mark.skipif(os.name == "nt", reason="SIGINT cannot be sent to one process")
PATIENCE = 20.0  # seconds in which an interrupt has to come, however busy the machine is


@pytest.fixture(autouse=True)
def heard() -> Iterator[None]:
    """Interrupts are raised, in a process too that was started in the background, which ignores them."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@layers(lambda: dict(first=nn.Linear(4, 8), norm=nn.BatchNorm1d(8), last=nn.Linear(8, 3)))
def Net(self, x: torch.Tensor) -> torch.Tensor:
    """Small, with a size that becomes a number, which needs the second way to a graph."""
    h = self.norm(self.first(x)).relu()
    return self.last(h + torch.zeros(x.shape[0], 1))


MODEL, X = Net().eval(), torch.randn(9, 4)
BATCHES = [(X, torch.arange(9) % 3)]
SCORES = fxprune.score(MODEL, BATCHES, progress=False)
PLAN = SCORES.plan(alpha=0.5)
SMALL = fxprune.apply(MODEL, PLAN)
CALLS: dict[str, Callable[[], Any]] = {
    **{f"capture by {rung}": partial(fxprune.capture, MODEL, X, method=rung) for rung in ("fx", "values")},
    "score": partial(fxprune.score, MODEL, BATCHES, progress=False),
    "apply": partial(fxprune.apply, MODEL, PLAN),
    "verify": partial(fxprune.verify, MODEL, PLAN, SMALL, X),
    "compress": partial(fxprune.compress, MODEL, BATCHES, 0.5, progress=False),
}


def interrupted(call: Callable[[], Any], after: float) -> None:
    """Make a call, and send this process a SIGINT after so many seconds; returns when that has come through."""

    def send() -> None:
        time.sleep(after)
        os.kill(os.getpid(), signal.SIGINT)

    thread, came = threading.Thread(target=send), False
    try:
        thread.start()
        call()
        time.sleep(PATIENCE)
    except KeyboardInterrupt:
        came = True
    assert came, "no KeyboardInterrupt came through"
    thread.join()


@pytest.fixture
def no_callbacks() -> Iterator[None]:
    """Nothing runs while garbage is collected, where Python would lose an interrupt between two calls of ours."""
    callbacks = list(gc.callbacks)
    gc.callbacks.clear()
    yield
    gc.callbacks.extend(callbacks)


def durations() -> dict[str, float]:
    """The seconds that each call takes, once it has been made before."""
    taken = {}
    for name, call in CALLS.items():
        call()
        start = time.perf_counter()
        call()
        taken[name] = time.perf_counter() - start
    return taken


@pytest.mark.usefixtures("no_callbacks")
@pytest.mark.parametrize(
    "times", [20, pytest.param(200, marks=pytest.mark.wide), pytest.param(2000, marks=pytest.mark.slow)]
)
def test_an_interrupt_at_any_moment_leaves_nothing_behind(times: int) -> None:
    draw, taken = random.Random(times), durations()
    before, looked = state(), picture(MODEL)
    for index in range(times):
        name = list(CALLS)[index % len(CALLS)]
        interrupted(CALLS[name], draw.uniform(0, taken[name]))
        assert not changed(before, state()), (index, name)
        assert same_picture(looked, picture(MODEL)), (index, name)
        CALLS[name]()


# -- the rule, at moments that are chosen ------------------------------------------------------------------------------


class Half:
    """Is interrupted while it is entered, or while it is left."""

    def __init__(self, moment: str) -> None:
        self.moment, self.said = moment, list[str]()

    def __enter__(self) -> None:
        self.note("entered")

    def __exit__(self, *error: object) -> None:
        self.note("left")

    def note(self, what: str) -> None:
        if self.moment == what:
            signal.raise_signal(signal.SIGINT)
        self.said.append(what)


def by_a_generator(half: Half) -> Any:
    @contextmanager
    def generator() -> Iterator[None]:
        half.__enter__()
        try:
            yield
        finally:
            half.__exit__()

    return generator()


def on_a_stack(half: Half) -> Any:
    stack = ExitStack()
    stack.enter_context(half)
    return stack


@pytest.mark.parametrize("moment", ["entered", "left"])
@pytest.mark.parametrize("kind", [lambda half: half, by_a_generator, on_a_stack], ids=["class", "generator", "stack"])
@pytest.mark.parametrize(
    "around", [undisturbed, partial(seeded, 0), DeferredInterrupts], ids=["undisturbed", "seeded", "Orderly"]
)
def test_a_context_is_entered_and_left_as_a_whole(around: Any, kind: Any, moment: str) -> None:
    half, before = Half(moment), state()

    def work() -> None:
        with around():
            with kind(half):
                time.sleep(PATIENCE if moment == "entered" else 0)
            time.sleep(PATIENCE)

    with pytest.raises(KeyboardInterrupt):
        work()
    assert half.said == ["entered", "left"]
    assert not changed(before, state())


def enter() -> None:
    with undisturbed():
        pass


def interrupted_at(moment: int) -> bool:
    """Whether entering and leaving a section has so many calls and returns; then it was interrupted at this one."""
    left = moment

    def profile(*event: object) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            sys.setprofile(None)
            signal.raise_signal(signal.SIGINT)

    try:
        sys.setprofile(profile)
        with seeded(0):
            pass
        sys.setprofile(None)
        time.sleep(PATIENCE if left <= 0 else 0)
    except KeyboardInterrupt:
        return True
    return False


def test_a_section_is_entered_and_left_as_a_whole() -> None:
    before = state()
    moment = next(moment for moment in count(1) if not interrupted_at(moment))
    assert moment > 100
    assert not changed(before, state())
    thread = threading.Thread(target=enter, daemon=True)
    thread.start()
    thread.join(PATIENCE)
    assert not thread.is_alive(), "the lock is still held"


@pytest.mark.parametrize("around", [undisturbed, DeferredInterrupts])
def test_an_interrupt_elsewhere_comes_at_once(around: Any) -> None:
    reached: list[str] = []

    def work() -> None:
        with around():
            signal.raise_signal(signal.SIGINT)
            reached.append("the next line")

    with pytest.raises(KeyboardInterrupt):
        work()
    assert not reached


def test_an_interrupt_while_garbage_is_collected_is_not_lost() -> None:
    def collected(phase: str, info: dict[str, int]) -> None:
        if phase == "start":
            signal.raise_signal(signal.SIGINT)

    def work() -> None:
        with undisturbed():
            gc.collect()
            time.sleep(PATIENCE)

    gc.callbacks.append(collected)
    try:
        with pytest.raises(KeyboardInterrupt):
            work()
    finally:
        gc.callbacks.remove(collected)


def test_the_callers_own_handler_is_called_and_put_back() -> None:
    calls: list[int] = []

    def own(number: int, frame: Any) -> None:
        calls.append(number)

    before = signal.signal(signal.SIGINT, own)
    try:
        with undisturbed(), undisturbed():
            assert signal.getsignal(signal.SIGINT) is not own
            signal.raise_signal(signal.SIGINT)
        assert calls == [signal.SIGINT]
        assert signal.getsignal(signal.SIGINT) is own
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_handler_that_is_set_meanwhile_stays() -> None:
    before = signal.getsignal(signal.SIGINT)
    try:
        with undisturbed():
            between = signal.signal(signal.SIGINT, signal.SIG_IGN)
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
        signal.signal(signal.SIGINT, between)  # ours, which only hands on now
        with pytest.raises(KeyboardInterrupt), Half("entered"):
            pass
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("handler", [signal.SIG_IGN, signal.SIG_DFL])
def test_what_is_no_handler_of_python_stays(handler: Any) -> None:
    before = signal.signal(signal.SIGINT, handler)
    try:
        with undisturbed():
            assert signal.getsignal(signal.SIGINT) == handler
    finally:
        signal.signal(signal.SIGINT, before)


def test_in_another_thread_nothing_is_done() -> None:
    found: list[bool] = []
    before = signal.getsignal(signal.SIGINT)

    def work() -> None:
        with undisturbed():
            found.append(signal.getsignal(signal.SIGINT) is before)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [True]


def test_an_interrupt_ends_waiting_for_another_thread() -> None:
    held, go_on = threading.Event(), threading.Event()

    def hold() -> None:
        with undisturbed():
            held.set()
            go_on.wait(PATIENCE)

    thread, before = threading.Thread(target=hold), state()
    thread.start()
    assert held.wait(PATIENCE)
    interrupted(enter, 0.05)
    go_on.set()
    thread.join()
    assert not changed(before, state())
    enter()
