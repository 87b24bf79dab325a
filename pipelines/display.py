"""Progress of a run: bars with stage, step, tokens/s and time left on a terminal, plain lines anywhere else.

It is told what happens (events as stages spool them, and changes of a stage's state) and reads no file itself.

    with Display() as display:
        display.stage("pack", "running")
        display.event("pack", {"event": "progress", "done": 3, "total": 8, "unit": "step", "time_ms": 1})
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.text import Text

ENDED = {"done": "green", "reused": "cyan", "failed": "bold red"}
PLAIN_EVERY_S = 10.0


@dataclass
class _Stage:
    """What is known of a stage that has not ended."""

    state: str
    bar: TaskID | None = None
    done: float = 0
    total: float = 0
    unit: str = ""
    origin: tuple[float, float] | None = None
    """(time_ms, done) of the first progress: what the time left is reckoned from."""
    time_ms: float = 0
    tokens_per_s: float | None = None
    loss: float | None = None
    printed_s: float = float("-inf")

    def progress(self, event: dict[str, Any]) -> None:
        if self.origin is None or event["done"] < self.done:  # the first, or a new attempt that starts further back
            self.origin = event["time_ms"], event["done"]
        self.done, self.total, self.unit = event["done"], event["total"], event.get("unit", "step")
        self.time_ms = event["time_ms"]
        self.tokens_per_s = event.get("extra", {}).get("tokens_per_s", self.tokens_per_s)

    def metrics(self, values: dict[str, Any]) -> None:
        for name, value in values.items():
            if isinstance(value, int | float):  # NaN and infinity arrive as text and are not worth a line
                self.loss = value if name.endswith("/loss") else self.loss
                self.tokens_per_s = value if name.endswith("/tokens_per_s") else self.tokens_per_s

    @property
    def seconds_left(self) -> float | None:
        """From the speed since the first progress; None before there is any."""
        if self.origin is None or self.done <= self.origin[1] or self.done >= self.total:
            return None
        return (self.time_ms - self.origin[0]) / 1000 / (self.done - self.origin[1]) * (self.total - self.done)

    def text(self) -> str:
        parts = [f"{self.unit} {self.done:g}/{self.total:g}"] if self.total else []
        parts += [f"loss {self.loss:.3f}"] if self.loss is not None else []
        parts += [f"{self.tokens_per_s:,.0f} tokens/s"] if self.tokens_per_s is not None else []
        parts += [f"{duration(self.seconds_left)} left"] if self.seconds_left is not None else []
        return ", ".join(parts)


class Display:
    """Shows stages on `console` (stderr by default, so that stdout carries results alone)."""

    def __init__(self, console: Console | None = None, *, quiet: bool = False) -> None:
        """
        Args:
            quiet: say nothing but failures.
        """
        self.console = console or Console(stderr=True, highlight=False, markup=False)
        self.quiet = quiet
        self.started_s = time.monotonic()
        self._stages: dict[str, _Stage] = {}
        self._lock = threading.Lock()  # states come from the driver, events from the thread that tails the spools
        self._bars: Progress | None = None
        if self.console.is_terminal and not quiet:
            columns = (
                TextColumn("{task.description}", markup=False),
                BarColumn(12),
                TextColumn("{task.fields[text]}", markup=False),
            )
            self._bars = Progress(*columns, console=self.console, transient=True)

    def __enter__(self) -> Display:
        if self._bars:
            self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bars:
            self._bars.stop()

    def stage(self, name: str, state: str, detail: str = "") -> None:
        """A stage changed its state: waiting, running, retrying; or, for good: done, reused, failed."""
        with self._lock:
            self._change(name, state, detail)

    def note(self, text: str) -> None:
        """A line that belongs to no stage."""
        if not self.quiet:
            self.console.print(Text(text), soft_wrap=True)

    def event(self, name: str, event: dict[str, Any]) -> None:
        """One line of the spool of a stage's attempt. Those of stages that have ended come late and are ignored."""
        with self._lock:
            known = self._stages.get(name)
            if known is None:
                return
            if event["event"] == "start":
                detail = event["name"].removeprefix(name).strip()  # "attempt 1"
                self._change(name, "running" if known.state == "waiting" else "retrying", detail)
            elif event["event"] in ("progress", "metrics"):
                known.progress(event) if event["event"] == "progress" else known.metrics(event["values"])
                self._show(name, known)
            elif event["event"] == "tag" and event["key"] == "longreach.note" and not self.quiet:
                self._line(name, event["value"])  # a skipped step, a checkpoint passed over

    def _change(self, name: str, state: str, detail: str) -> None:
        known = self._stages.setdefault(name, _Stage(state))
        known.state = state
        if self._bars and known.bar is None and state in ("running", "retrying"):
            known.bar = self._bars.add_task(name, total=None, text="")
        if state in ENDED:
            del self._stages[name]
            if self._bars and known.bar is not None:
                self._bars.remove_task(known.bar)
        if state == "failed" or not (self.quiet or state == "waiting"):
            self._line(name, state, detail)

    def _show(self, name: str, known: _Stage) -> None:
        if self._bars and known.bar is not None:
            self._bars.update(known.bar, completed=known.done, total=known.total or None, text=known.text())
        elif not self.quiet and known.text() and time.monotonic() - known.printed_s >= PLAIN_EVERY_S:
            known.printed_s = time.monotonic()
            self._line(name, known.text())

    def _line(self, name: str, text: str, detail: str = "") -> None:
        elapsed = duration(time.monotonic() - self.started_s)
        line = f"[{elapsed:>6}] {name}: {text}" + (f" ({detail})" if detail else "")
        self.console.print(Text(line, ENDED.get(text, "")), soft_wrap=True)  # Text: finetune[lora] is no markup


def duration(seconds: float) -> str:
    """7 -> "7s", 65 -> "1m05s", 3661 -> "1h01m"."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    return f"{whole // 60}m{whole % 60:02d}s" if whole < 3600 else f"{whole // 3600}h{whole % 3600 // 60:02d}m"
