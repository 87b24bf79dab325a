"""Graceful stop: after SIGTERM, Ctrl-C or a closed terminal, training has GRACE_S seconds to write its
checkpoints.

with terminable() as stopping: ...      # exit status 143, 130 or 129; a second signal stops at once
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
STANDARD_STREAMS = (0, 1, 2)
"""File descriptors of standard input, output and error."""
GRACE_S = 25.0  # Kubernetes sends SIGKILL 30 seconds after SIGTERM


@dataclass
class Stopping:
    """Whether a signal asked the run to stop, and how long training may still save."""

    file: Path | None = None
    """The file that makes training stop (kind.stop_file); None while there is nothing to stop."""
    signum: int = 0  # the signal that asked to stop; 0 if none did
    until_s: float | None = None  # deadline for saving, by time.monotonic(); None if training was not asked to stop
    terminal: list[int] = field(default_factory=list)  # standard streams that are a terminal

    def listen(self) -> None:
        """Handle the signals from now on, except those that are ignored, as Ctrl-C is in a script's
        background job and SIGHUP under nohup."""
        if threading.current_thread() is not threading.main_thread():
            return
        self.terminal = [stream for stream in STANDARD_STREAMS if os.isatty(stream)]
        for number in SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self.ask)

    def ask(self, signum: int, frame: object) -> None:
        """Let training save and stop; end at once if nothing trains, or at the second signal."""
        self.signum = signum
        if signum == signal.SIGHUP:
            self._leave_terminal()
        if self.file is None or self.until_s is not None:
            self.end()
        self.file.touch()
        self.until_s = time.monotonic() + GRACE_S

    def _leave_terminal(self) -> None:
        """Stop using a closed terminal, because each further message would fail."""
        nowhere = os.open(os.devnull, os.O_RDWR)
        for stream in self.terminal:
            os.dup2(nowhere, stream)
        os.close(nowhere)

    def end(self) -> NoReturn:
        """Raise what the signal would: KeyboardInterrupt, or SystemExit with 128 + its number."""
        if self.signum == signal.SIGINT:
            raise KeyboardInterrupt
        raise SystemExit(128 + self.signum)


@contextmanager
def terminable() -> Iterator[Stopping]:
    """Turn SIGTERM, Ctrl-C and SIGHUP into exceptions, so that leases are released and Ray's
    processes end."""
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
