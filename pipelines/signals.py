"""Graceful stop: after SIGTERM or Ctrl-C, training has GRACE_S seconds to write its checkpoints.

with terminable() as stopping: ...      # exit status 143 or 130; a second signal does not wait
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

SIGNALS = (signal.SIGTERM, signal.SIGINT)
GRACE_S = 25.0  # Kubernetes kills a container 30 seconds after it asked it to end


@dataclass
class Stopping:
    """Whether somebody asked the run to stop, and until when it may save."""

    file: Path | None = None
    """The file that makes training stop (kind.stop_file); None while there is nothing to stop."""
    signum: int = 0  # the signal that asked; 0: none did
    until_s: float | None = None  # when the time to save is over, by time.monotonic(); None: nobody asked

    def listen(self) -> None:
        """Handle the signals from now on; not Ctrl-C if it is ignored, as in a script's
        background."""
        if threading.current_thread() is not threading.main_thread():
            return
        for number in SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self.ask)

    def ask(self, signum: int, frame: object) -> None:
        """Let training save and stop; end at once if there is none, or if it was asked before."""
        self.signum = signum
        if self.file is None or self.until_s is not None:
            self.end()
        self.file.touch()
        self.until_s = time.monotonic() + GRACE_S

    def end(self) -> NoReturn:
        """End the process as the signal would have."""
        if self.signum == signal.SIGINT:
            raise KeyboardInterrupt
        raise SystemExit(128 + self.signum)


@contextmanager
def terminable() -> Iterator[Stopping]:
    """Turn SIGTERM and Ctrl-C into exceptions: leases are released and Ray's processes end."""
    stopping = Stopping()
    before = {number: signal.getsignal(number) for number in SIGNALS}
    stopping.listen()
    try:
        yield stopping
    except SystemExit as ended:
        if ended.code == signal.SIGTERM:  # raised by Ray's own handler, while Ray starts
            raise SystemExit(128 + signal.SIGTERM) from None
        raise
    finally:
        if threading.current_thread() is threading.main_thread():
            for number, handler in before.items():
                signal.signal(number, handler or signal.SIG_DFL)
