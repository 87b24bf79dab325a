"""Call a function repeatedly in a thread while a block runs.

with polling(show_progress, every_s=0.5, name="tail"): ...
"""

import contextlib
import math
import threading
import time
import traceback
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def polling(look: Callable[[], object], *, every_s: float, name: str, for_s: float = math.inf) -> Iterator[None]:
    """Call `look` every `every_s` seconds while the block runs, for at most `for_s` in all. At the
    end, wait for a call in progress. If a call fails, the error is printed, and the next call follows."""
    over = threading.Event()
    until = time.monotonic() + for_s

    def loop() -> None:
        last_error = ""
        while not over.wait(every_s) and time.monotonic() < until:
            try:
                look()
            except Exception as error:  # noqa: BLE001 (one failed answer of Ray is no reason to look no more)
                if repr(error) != last_error:
                    last_error = repr(error)
                    traceback.print_exc()

    thread = threading.Thread(target=loop, daemon=True, name=name)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
