"""The context of a section: its device, its time limit, and the place of its results."""

from __future__ import annotations

import gc
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn


class Bench:
    """One section's run."""

    def __init__(self, section: str, out: Path, *, tiny: bool, limit_s: float, base: str) -> None:
        self.section, self.out, self.tiny, self.base = section, out, tiny, base
        self.begun, self.limit_s = time.perf_counter(), limit_s
        if not tiny and not torch.cuda.is_available():
            raise RuntimeError("this machine has no GPU: use --tiny")
        self.gpu = not tiny
        self.device = torch.device("cuda" if self.gpu else "cpu")
        self.dtype = torch.bfloat16 if self.gpu else torch.float32
        self.work = out / "work" / section
        self.work.mkdir(parents=True, exist_ok=True)
        torch.manual_seed(0)
        if self.gpu:
            properties = torch.cuda.get_device_properties(0)
            about = {"gpu": properties.name, "memory_gib": properties.total_memory / 2**30}
            self.note("machine", **about, torch=torch.__version__, cuda=torch.version.cuda)

    @property
    def left_s(self) -> float:
        """Seconds until the limit."""
        return self.limit_s - (time.perf_counter() - self.begun)

    def note(self, what: str, *, detail: bool = False, **numbers: Any) -> None:
        """Append one result. Details are not shown in the final table."""
        row = {"section": self.section, "what": what, "at_s": time.perf_counter() - self.begun, "detail": detail}
        with (self.out / "results.jsonl").open("a") as f:
            f.write(json.dumps(row | numbers, default=str) + "\n")

    def fits(self, what: str, seconds: float) -> bool:
        """Return whether this many seconds are left; if not, note that `what` was left out."""
        if self.tiny or self.left_s > seconds:
            return True
        self.note(what, left_out=f"{self.left_s:.0f} s left, {seconds:.0f} s needed")
        return False

    def milliseconds(self, work: Callable[[], object], rounds: int = 7) -> float:
        """Return the median time of several runs after two warm-up runs: by events on a GPU, by the clock on a CPU."""
        took = []
        for n in range(rounds + 2):
            if self.gpu:
                begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                begin.record()
                work()
                end.record()
                torch.cuda.synchronize()
                milliseconds = begin.elapsed_time(end)
            else:
                begun = time.perf_counter()
                work()
                milliseconds = (time.perf_counter() - begun) * 1e3
            if n >= 2:
                took.append(milliseconds)
        return statistics.median(took)

    def placed(self, model: nn.Module) -> Any:
        """Move a model to this device and its weights to this dtype; rotary frequencies stay in float32."""
        for weight in model.parameters():
            weight.data = weight.data.to(self.device, self.dtype)
        return nn.Module.to(model, self.device)

    def free(self) -> None:
        """Free unused memory and reset the peak."""
        gc.collect()
        if self.gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def peak_gib(self) -> float:
        """Return the peak memory of tensors on the GPU since `free`; 0 on a CPU."""
        return torch.cuda.max_memory_allocated() / 2**30 if self.gpu else 0.0
