"""Graceful stop: after SIGTERM or Ctrl-C, training has GRACE_S seconds to write its checkpoints.

with terminable() as stopping: ...      # exit status 143 or 130; a second signal stops at once
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
GRACE_S = 25.0  # Kubernetes sends SIGKILL 30 seconds after SIGTERM


@dataclass
class Stopping:
    """Whether a signal asked the run to stop, and how long training may still save."""

    file: Path | None = None
    """The file that makes training stop (kind.stop_file); None while there is nothing to stop."""
    signum: int = 0  # the signal that asked to stop; 0 if none did
    until_s: float | None = None  # deadline for saving, by time.monotonic(); None if training was not asked to stop

    def listen(self) -> None:
        """Handle the signals from now on, except those that are ignored, as Ctrl-C is in a script's
        background job."""
        if threading.current_thread() is not threading.main_thread():
            return
        for number in SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self.ask)

    def ask(self, signum: int, frame: object) -> None:
        """Let training save and stop; end at once if nothing trains, or at the second signal."""
        self.signum = signum
        if self.file is None or self.until_s is not None:
            self.end()
        self.file.touch()
        self.until_s = time.monotonic() + GRACE_S

    def end(self) -> NoReturn:
        """Raise what the signal would: KeyboardInterrupt, or SystemExit with 128 + its number."""
        if self.signum == signal.SIGINT:
            raise KeyboardInterrupt
        raise SystemExit(128 + self.signum)


@contextmanager
def terminable() -> Iterator[Stopping]:
    """Turn SIGTERM and Ctrl-C into exceptions, so that leases are released and Ray's processes
    end."""
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
