"""Progress of a run: on a terminal bars with stage, step, tokens/s and time left, else plain lines.

The driver passes in changes of stage states and the events that stages spool. This module reads no
files.

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
"""Final states of a stage -> the style of their lines."""
PLAIN_EVERY_S = 10.0  # seconds between two progress lines of a stage when stderr is not a terminal


@dataclass
class _Stage:
    state: str
    bar: TaskID | None = None
    done: float = 0
    total: float = 0
    unit: str = ""
    origin: tuple[float, float] | None = None
    """(time_ms, done) at the attempt's first progress event, from which the time left is
    estimated."""
    time_ms: float = 0
    tokens_per_s: float | None = None
    loss: float | None = None
    printed_s: float = float("-inf")  # when its last progress line was printed (time.monotonic)

    def progress(self, event: dict[str, Any]) -> None:
        if self.origin is None or event["done"] < self.done:  # a new attempt resumes from an earlier step
            self.origin = event["time_ms"], event["done"]
        self.done = event["done"]
        self.total = event["total"]
        self.unit = event.get("unit", "step")
        self.time_ms = event["time_ms"]
        self.tokens_per_s = event.get("extra", {}).get("tokens_per_s", self.tokens_per_s)

    def metrics(self, values: dict[str, Any]) -> None:
        for name, value in values.items():
            if not isinstance(value, int | float):  # NaN and infinity are strings in events
                continue
            if name.endswith("/loss"):
                self.loss = value
            elif name.endswith("/tokens_per_s"):
                self.tokens_per_s = value

    @property
    def seconds_left(self) -> float | None:
        """The time left at the average speed since the first progress event; None before it is
        known."""
        if self.origin is None:
            return None
        start_ms, start = self.origin
        if self.done <= start or self.done >= self.total:
            return None
        seconds_each = (self.time_ms - start_ms) / 1000 / (self.done - start)
        return seconds_each * (self.total - self.done)

    def text(self) -> str:
        """Return the progress as text; empty before there is any."""
        parts = []
        if self.total:
            parts.append(f"{self.unit} {self.done:g}/{self.total:g}")
        if self.loss is not None:
            parts.append(f"loss {self.loss:.3f}")
        if self.tokens_per_s is not None:
            parts.append(f"{self.tokens_per_s:,.0f} tokens/s")
        if (seconds := self.seconds_left) is not None:
            parts.append(f"{duration(seconds)} left")
        return ", ".join(parts)


class Display:
    """Shows stages on `console` (stderr by default, so that stdout carries only results)."""

    def __init__(self, console: Console | None = None, *, quiet: bool = False) -> None:
        """Prepare the display; if `quiet`, it prints only failures."""
        self.console = console or Console(stderr=True, highlight=False, markup=False)
        self.quiet = quiet
        self.started_s = time.monotonic()
        self._stages: dict[str, _Stage] = {}
        # the driver's thread sends states, the thread that tails the spools sends events
        self._lock = threading.Lock()
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
        """Show a stage's new state: waiting, running or retrying, and finally done, reused or
        failed."""
        with self._lock:
            self._change(name, state, detail)

    def note(self, text: str) -> None:
        """Print a line that belongs to no stage."""
        if not self.quiet:
            self.console.print(Text(text), soft_wrap=True)

    def event(self, name: str, event: dict[str, Any]) -> None:
        """Show an event that a stage spooled; ignore late events of stages that have ended."""
        with self._lock:
            stage = self._stages.get(name)
            if stage is None:
                return
            match event["event"]:
                case "start":
                    state = "running" if stage.state == "waiting" else "retrying"
                    attempt = event["name"].removeprefix(name).strip()  # "attempt 1"
                    self._change(name, state, attempt)
                case "progress":
                    stage.progress(event)
                    self._show(name, stage)
                case "metrics":
                    stage.metrics(event["values"])
                    self._show(name, stage)
                case "tag" if event["key"] == "longreach.note" and not self.quiet:
                    self._line(name, event["value"])  # e.g. a skipped step or an invalid checkpoint

    def _change(self, name: str, state: str, detail: str) -> None:
        stage = self._stages.setdefault(name, _Stage(state))
        stage.state = state
        if self._bars and stage.bar is None and state in ("running", "retrying"):
            stage.bar = self._bars.add_task(name, total=None, text="")
        if state in ENDED:
            del self._stages[name]
            if self._bars and stage.bar is not None:
                self._bars.remove_task(stage.bar)
        if state == "failed" or not (self.quiet or state == "waiting"):
            self._line(name, state, detail)

    def _show(self, name: str, stage: _Stage) -> None:
        if self._bars and stage.bar is not None:
            total = stage.total or None
            self._bars.update(stage.bar, completed=stage.done, total=total, text=stage.text())
            return
        due = time.monotonic() - stage.printed_s >= PLAIN_EVERY_S
        if due and stage.text() and not self.quiet:
            stage.printed_s = time.monotonic()
            self._line(name, stage.text())

    def _line(self, name: str, text: str, detail: str = "") -> None:
        elapsed = duration(time.monotonic() - self.started_s)
        line = f"[{elapsed:>6}] {name}: {text}"
        if detail:
            line += f" ({detail})"
        # as Text, so that rich does not read the brackets of finetune[lora] as markup
        self.console.print(Text(line, ENDED.get(text, "")), soft_wrap=True)


def duration(seconds: float) -> str:
    """Write seconds for people: 7 -> "7s", 65 -> "1m05s", 3661 -> "1h01m"."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
