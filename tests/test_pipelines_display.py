"""The display: lines for logs, bars for terminals, from the same events."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from longreach.pipelines import display as displays
from longreach.pipelines.display import Display, duration


def progress(done: int, total: int, time_s: float, **extra: float) -> dict[str, Any]:
    return {
        "event": "progress",
        "done": done,
        "total": total,
        "unit": "step",
        "extra": extra,
        "time_ms": int(1000 * time_s),
    }


START = {"event": "start", "name": "finetune[lora] attempt 1", "time_ms": 0}


def plain() -> Console:
    return Console(file=io.StringIO(), width=40, markup=False, highlight=False)


def text_of(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_plain_lines_tell_states_steps_loss_speed_and_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(displays, "PLAIN_EVERY_S", 0.0)
    console = plain()
    with Display(console) as display:
        display.stage("finetune[lora]", "waiting")
        display.event("finetune[lora]", START)
        display.event("finetune[lora]", progress(1, 8, 10.0))
        display.event(
            "finetune[lora]", {"event": "metrics", "values": {"train/loss": 3.25, "train/lr": 1.0}, "step": 1}
        )
        display.event("finetune[lora]", progress(3, 8, 20.0, tokens_per_s=1234.5))
        display.stage("finetune[lora]", "done", "40 s")
    assert text_of(console).splitlines() == [
        "[    0s] finetune[lora]: running (attempt 1)",
        "[    0s] finetune[lora]: step 1/8",
        "[    0s] finetune[lora]: step 1/8, loss 3.250",
        "[    0s] finetune[lora]: step 3/8, loss 3.250, 1,234 tokens/s, 25s left",
        "[    0s] finetune[lora]: done (40 s)",
    ]


def test_plain_progress_is_a_line_in_ten_seconds_for_each_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(displays.time, "monotonic", lambda: now)
    console = plain()
    with Display(console) as display:
        for name in ("a", "b"):
            display.stage(name, "running")
        for second in range(21):
            now = float(second)
            for name in ("a", "b"):
                display.event(name, progress(second, 100, second))
    lines = [line for line in text_of(console).splitlines() if "a: step" in line]
    assert [line.split(",")[0] for line in lines] == [
        "[    0s] a: step 0/100",
        "[   10s] a: step 10/100",
        "[   20s] a: step 20/100",
    ]


def test_time_left_counts_from_where_this_attempt_began() -> None:
    stage = displays._Stage("running")
    stage.progress(progress(50, 100, 0.0))
    assert stage.seconds_left is None, "one point has no speed"
    stage.progress(progress(60, 100, 10.0))
    assert stage.seconds_left == pytest.approx(40.0), "10 steps took 10 s; the 50 before came from a checkpoint"
    stage.progress(progress(40, 100, 20.0))
    stage.progress(progress(41, 100, 22.0))
    assert stage.seconds_left == pytest.approx(118.0), "a retry went back to 40 and takes 2 s a step"


def test_a_second_start_is_a_retry_and_late_events_are_ignored() -> None:
    console = plain()
    with Display(console) as display:
        display.event("pack", START)
        display.stage("pack", "waiting")
        display.event("pack", {**START, "name": "pack attempt 1"})
        display.event("pack", {**START, "name": "pack attempt 2"})
        display.stage("pack", "failed", "out of memory")
        display.event("pack", progress(1, 2, 0.0))
    assert [line.split("] ")[1] for line in text_of(console).splitlines()] == [
        "pack: running (attempt 1)",
        "pack: retrying (attempt 2)",
        "pack: failed (out of memory)",
    ]


def test_losses_that_are_not_numbers_are_left_out() -> None:
    stage = displays._Stage("running")
    stage.metrics({"train/loss": "nan", "train/tokens_per_s": 10.0})
    assert stage.text() == "10 tokens/s"


def test_what_a_stage_notes_is_a_line() -> None:
    console = plain()
    with Display(console) as display:
        display.stage("finetune[lora]", "waiting")
        display.event("finetune[lora]", START)
        display.event("finetune[lora]", {"event": "tag", "key": "longreach.note", "value": "step 3 skipped"})
        display.event("finetune[lora]", {"event": "tag", "key": "ours", "value": "not shown"})
    assert "finetune[lora]: step 3 skipped" in text_of(console)
    assert "not shown" not in text_of(console)


def test_quiet_shows_failures_only() -> None:
    console = plain()
    with Display(console, quiet=True) as display:
        display.stage("pack", "running")
        display.event("pack", progress(1, 2, 0.0))
        display.stage("pack", "done")
        display.stage("merge[lora]", "failed", "no space")
    assert text_of(console) == "[    0s] merge[lora]: failed (no space)\n"


def test_a_terminal_gets_a_bar_for_each_running_stage_and_a_line_when_it_ends() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=120, record=True, color_system=None)
    with Display(console) as display:
        display.stage("finetune[lora]", "waiting")
        display.stage("finetune[full]", "waiting")
        display.event("finetune[lora]", START)
        display.event("finetune[lora]", progress(0, 8, 0.0))
        display.event("finetune[lora]", progress(4, 8, 20.0, tokens_per_s=512.0))
        assert display._bars is not None
        console.print(display._bars.get_renderable())
        display.stage("finetune[lora]", "done", "40 s")
        console.print(display._bars.get_renderable())
    shown = console.export_text()
    bar = next(line for line in shown.splitlines() if "step 4/8, 512 tokens/s, 20s left" in line)
    assert bar.startswith("finetune[lora] "), "brackets of a name are no markup"
    assert "finetune[lora]: done (40 s)" in shown
    assert "finetune[full]" not in shown, "a waiting stage has no bar"
    assert display._bars.tasks == [], "an ended one loses it"


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0s"), (59.4, "59s"), (65, "1m05s"), (3661, "1h01m")])
def test_durations_are_short(seconds: float, text: str) -> None:
    assert duration(seconds) == text
