"""Call a function again and again, in a thread, while something else goes on.

with polling(show_progress, every_s=0.5, name="tail"): ...
"""

import contextlib
import math
import threading
import time
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def polling(look: Callable[[], object], *, every_s: float, name: str, for_s: float = math.inf) -> Iterator[None]:
    """Call `look` every `every_s` seconds, for at most `for_s` in all; on leaving, wait for a call
    to end."""
    over = threading.Event()
    until = time.monotonic() + for_s

    def loop() -> None:
        while not over.wait(every_s) and time.monotonic() < until:
            look()

    thread = threading.Thread(target=loop, daemon=True, name=name)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
