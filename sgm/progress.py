"""How far a long work is: a line now and then, for logs in which a bar would be thousands of them."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Self


class Tally:
    """Says how much is done, how fast, and how long the rest will take.

    Args:
        what: the things that are counted, in the plural.
        every: seconds between two lines, at least.
    """

    def __init__(self, title: str, what: str, total: int, say: Callable[[str], None], every: float = 10.0):
        self.title, self.what, self.total, self._say, self._every = title, what, total, say, every
        self.done, self._start = 0, time.monotonic()
        self._next = self._start + every

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        pass

    def update(self, count: int) -> None:
        """So many more are done."""
        self.done += count
        now = time.monotonic()
        if now >= self._next:
            self._next = now + self._every
            rate = self.done / (now - self._start)
            left = (self.total - self.done) / rate
            done = f"{self.title}: {self.done} of {self.total} {self.what}"
            self._say(f"{done}, {rate:.2g} a second, {left:.0f} s to go")

    def finish(self) -> None:
        """The last line: how long it took."""
        seconds = time.monotonic() - self._start
        rate = self.done / max(seconds, 1e-9)
        self._say(f"{self.title}: {self.done} {self.what} in {seconds:.1f} s ({rate:.2g} a second)")
