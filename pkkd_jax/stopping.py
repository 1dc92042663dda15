"""What ends a training before its time: signals, a wish of another process, silence."""

import collections
import contextlib
import faulthandler
import signal
import sys
import threading
import time
from collections.abc import Callable

import jax
import numpy as np

from pkkd_jax import devices, distributed


class Interrupted(Exception):
    """A signal asked the training to stop; it has been saved.

    Attributes:
      signum: the signal.
      step: the step that was saved.
    """

    def __init__(self, signum: int, step: int):
        super().__init__(f"stopped by {signal.Signals(signum).name} and saved at step {step}")
        self.signum, self.step = signum, step


@contextlib.contextmanager
def signals(at_signal: Callable[[str], None]):
    """Yields a list that receives the first SIGINT or SIGTERM; a second one acts at once."""
    received: list[int] = []
    previous = {}

    def handle(signum, frame):
        del frame
        received.append(signum)
        signal.signal(signum, previous[signum])
        at_signal(signal.Signals(signum).name)

    if threading.current_thread() is threading.main_thread():
        for signum in (signal.SIGINT, signal.SIGTERM):
            previous[signum] = signal.signal(signum, handle)
    try:
        yield received
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)


class Watchdog:
    """Ends the program, with the stack of every thread, where nothing happens for `seconds`."""

    def __init__(self, seconds: float):
        self.seconds, self.armed_at = seconds, -float("inf")
        self.alive()

    def alive(self) -> None:
        """Something happened: the seconds begin anew."""
        now = time.monotonic()
        if self.seconds and now - self.armed_at > min(1.0, self.seconds / 10):
            faulthandler.dump_traceback_later(self.seconds, exit=True, file=sys.__stderr__)
            self.armed_at = now

    def close(self) -> None:
        """Ends the watch."""
        if self.seconds:
            faulthandler.cancel_dump_traceback_later()


class Agreement:
    """What any of the processes wishes, which all of them learn after the same step.

    Args:
      ahead: steps in flight; the wishes of so many are not waited for.
    """

    def __init__(self, ahead: int):
        self.ahead, self.asked = ahead, collections.deque()
        self.ask = devices.pmap(devices.largest) if distributed.several() else None

    def largest(self, wish: int) -> int:
        """The largest `wish` of all processes; 0 until `ahead` others have been asked."""
        if self.ask is None:
            return wish
        self.asked.append(self.ask(None, np.full(jax.local_device_count(), wish, np.int32)))
        return int(self.asked.popleft()) if len(self.asked) > self.ahead else 0
