"""How long a thread does not run that wants to, beside what another one does. Standard library only."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def watched() -> Iterator[list[float]]:
    """Seconds between the turns of a thread that sleeps for a millisecond each time, inside of the block.

    They are in the list when the block has ended; at least one is.
    """
    gaps: list[float] = []
    over = threading.Event()

    def tick() -> None:
        last = time.perf_counter()
        while not over.is_set() or not gaps:
            time.sleep(0.001)
            now = time.perf_counter()
            gaps.append(now - last)
            last = now

    thread = threading.Thread(target=tick)
    thread.start()
    try:
        yield gaps
    finally:
        over.set()
        thread.join()
