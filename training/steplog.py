"""Rank 0's record of each step: metrics.jsonl (in the result) and the spool (for MLflow).

metrics.jsonl holds every step once: after a return to a checkpoint it is truncated to the steps
before it. The spool is never truncated, so a repeated step is not sent to it again.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from longreach.infra import relay
from longreach.infra.machine import system_metrics

CURVES = ("loss", "lr", "grad_norm", "tokens_per_s", "seconds", "mfu", "validation_loss")
"""The numbers of a step that MLflow plots, as `train/...`."""


class StepLog:
    """The record of one attempt's steps."""

    def __init__(self, path: Path, spool: str | None) -> None:
        self.path = path
        self.rows: list[dict[str, Any]] = []
        self.spool = None
        self.label = ""
        self.last_logged_step = 0
        """The last step that was sent to the spool, by this process or before the ranks were restarted."""
        if spool:
            self.spool = relay.spool(spool)
            self.label = Path(spool).name.partition("@")[0]
            self.last_logged_step = self.spool.last_step("train/seconds")

    def restart(self, history: Path | None) -> None:
        """Start with the steps recorded in the loaded checkpoint, or with none."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        text = history.read_text() if history else ""
        self.path.write_text(text)
        self.rows = [json.loads(line) for line in text.splitlines()]

    def trained_losses(self) -> list[tuple[int, float]]:
        """Return (step from 0, loss) of the steps that changed the weights."""
        return [(row["step"] - 1, row["loss"]) for row in self.rows if not row["skipped"]]

    def validation_losses(self) -> dict[int, float]:
        """Return the finite validation losses of the steps that changed the weights."""
        losses = {}
        for row in self.rows:
            if not row["skipped"] and row.get("validation_loss") is not None:
                losses[row["step"]] = row["validation_loss"]
        return losses

    def add(self, row: dict[str, Any], *, total: int) -> None:
        """Append one step's record and send it to the spool; NaN and infinity become null."""
        for name, value in row.items():
            if isinstance(value, float) and not math.isfinite(value):
                row = row | {name: None}
        self.rows.append(row)
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        if self.spool is None:
            return
        if row["step"] > self.last_logged_step:
            self.spool.metrics(_metrics(row) | system_metrics(), step=row["step"])
            self.last_logged_step = row["step"]
        loss = {} if row["loss"] is None else {"loss": row["loss"]}
        self.spool.progress(row["step"], total, tokens_per_s=row["tokens_per_s"], **loss)

    def checkpoint(self, step: int, identity: str, path: Path) -> None:
        """Report a saved checkpoint to MLflow, which ranks checkpoints by their losses."""
        if self.spool is None:
            return
        row = self.rows[-1] if self.rows else {}
        losses = {}
        for name in ("loss", "validation_loss"):
            if row.get(name) is not None:
                # not `train/...`, since MLflow also shows a model's metrics in its run, and the curve
                # would get the point twice
                losses[f"checkpoint/{name}"] = row[name]
        name = f"{self.label} step {step}"
        self.spool.model(name, f"{identity}-{step}", losses, step=step, tags={"checkpoint": path, "step": step})

    @property
    def stop_asked(self) -> bool:
        """Whether the driver on another node was asked to stop."""
        return self.spool is not None and relay.stop_asked(self.spool)

    def note(self, text: str) -> None:
        """Print a note for readers of the run, and keep it as a tag of the run."""
        print(text, flush=True)
        if self.spool:
            self.spool.tag("longreach.note", text)


def _metrics(row: dict[str, Any]) -> dict[str, float]:
    """Return a step's numbers under their names in MLflow."""
    metrics = {}
    for name in CURVES:
        if row.get(name) is not None:
            metrics[f"train/{name}"] = row[name]
    for phase, seconds in row["phases"].items():
        metrics[f"time/{phase}_s"] = seconds
    for place, shares_by_layer in row.get("sink_mass", {}).items():
        metrics[f"sink/{place}"] = sum(shares_by_layer) / len(shares_by_layer)
    for place, share in row.get("sink_heads", {}).items():
        metrics[f"sink/heads_{place}"] = share
    return metrics
