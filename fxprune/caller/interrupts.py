"""Interrupts that wait while a context is entered or left, so that contexts restore everything that they change."""

from __future__ import annotations

import _thread
import _weakrefset
import gc
import signal
import sys
import threading
import time
import weakref
from inspect import CO_GENERATOR
from types import FrameType
from typing import Any

from torch._library import simple_registry
from torch.utils import weak

_BUSY = frozenset({
    "__enter__", "__exit__", "enter_context", "callback",  # half of a context
    "__del__", "__index__", "__bool__", "__len__", "__hash__", "__eq__", "__getattr__", "__class__",  # called by C
})  # fmt: skip
_BY_C = (weakref, _weakrefset, weak, simple_registry)  # called by C, where an error is lost or ends the process
_FILES = frozenset(module.__file__ for module in _BY_C)
_PAUSE = 0.001  # seconds until a deferred interrupt is sent again


class DeferredInterrupts:
    """A context in which an interrupt (SIGINT) is raised only where no other context is half entered or half left.

    Context managers restore the state of torch (modes, patches of tracing, autocast); an interrupt within `__enter__`
    or `__exit__` would skip that. It is sent again a moment later, and then passed to the handler that was set before,
    by default Python's, which raises KeyboardInterrupt.

    Does nothing outside the main thread, which gets all signals, inside of another such context, or where SIGINT is
    ignored or handled outside of Python. `frame` is the frame that entered the context.
    """

    def __init__(self) -> None:
        self.frame: FrameType | None = None
        self.before: Any = None
        self.lock: Any = None

    def __enter__(self) -> None:
        before: Any = signal.getsignal(signal.SIGINT)
        inside = isinstance(before, DeferredInterrupts) and before.frame is not None
        if threading.current_thread() is not threading.main_thread() or inside or not callable(before):
            return
        self.before = before
        self.frame = frame = sys._getframe(1)
        while frame.f_back and (frame.f_code.co_name in _BUSY or frame.f_code.co_flags & CO_GENERATOR):
            self.frame = frame = frame.f_back
        signal.signal(signal.SIGINT, self)

    def __exit__(self, *error: object) -> None:
        current: Any = signal.getsignal(signal.SIGINT)
        try:
            if current is self:
                signal.signal(signal.SIGINT, self.before)
        finally:
            self.frame = None

    def wait_for(self, lock: Any) -> None:
        """Acquire an RLock; an interrupt ends the wait, although a context is being entered."""
        self.lock = lock
        lock.acquire()
        self.lock = None

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """Pass an interrupt on, or send it again later."""
        waits = self.lock is not None and not self.lock._is_owned()
        if self._is_busy(frame) and not waits:
            _thread.start_new_thread(_again, (signal.Signals(number),))
        else:
            self.lock = None
            self.before(number, frame)

    def _is_busy(self, frame: FrameType | None) -> bool:
        """Whether any frame of the work enters or leaves a context, or is called where errors are lost."""
        lost = {getattr(callback, "__code__", None) for callback in gc.callbacks}
        while frame is not None and frame is not self.frame:
            code = frame.f_code
            is_own = code is DeferredInterrupts.__call__.__code__
            if is_own or code.co_name in _BUSY or code.co_filename in _FILES or code in lost:
                return self.frame is not None
            frame = frame.f_back
        return False


def _again(number: signal.Signals) -> None:
    """Send a signal to the main thread after a pause."""
    time.sleep(_PAUSE)
    if sys.platform == "win32":
        _thread.interrupt_main(number)
    else:
        signal.pthread_kill(threading.main_thread().ident or 0, number)  # ends waiting in C, too
