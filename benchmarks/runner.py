"""Measure the runner's overhead: thousands of stages that do nothing, one Ray task each, without MLflow.

    python benchmarks/runner.py 1000          # about half a minute on two cores; 10000: about two minutes

The pipeline has a root, chains of four stages after it (like pack, finetune, merge and evaluate), and one stage that
reads all others (like the report). Then it runs again with nothing to do, and it is planned once with every stage
reused and once with every stage to explain. Times are wall time divided by the number of stages, without Ray's start.
The driver is this process.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import resource
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console

from longreach.infra.artifact import Artifact
from longreach.infra.choices import Choices
from longreach.infra.cluster import connected
from longreach.pipelines import plan, run
from longreach.pipelines.display import Display
from longreach.pipelines.kind import stage
from longreach.pipelines.reader import load
from longreach.pipelines.stage import Stage
from longreach.pipelines.stages import STAGES

CHAIN = 4


class NoopRecipe(Choices):
    """The field that distinguishes the stages."""

    text: str


@stage(makes=Artifact, revision=1, cpus=lambda resources: 0.5)
def noop(inputs: Mapping[str, Artifact], *, recipe: NoopRecipe, resources: Any, out: Path, run: Any) -> dict[str, Any]:
    """A stage that writes one small file."""
    (out / "text").write_text(recipe.text)
    return {"text": recipe.text}


def pipeline(count: int, text: str) -> list[Stage]:
    """Return a root, chains of CHAIN stages, and a stage that reads all others."""
    stages = [Stage("noop", "root", NoopRecipe(text=text))]
    for n in range(count - 2):
        before = stages[0] if n % CHAIN == 0 else stages[-1]
        stages.append(Stage("noop", f"noop[{n},{n % CHAIN}]", NoopRecipe(text=f"{text} {n}"), {"before": before}))
    everything = {f"input_{n:03d}": stage for n, stage in enumerate(stages)}
    return [*stages, Stage("noop", "all", NoopRecipe(text=text), everything)]


class Watch(threading.Thread):
    """Record the largest number of open file descriptors of this process, ten times per second."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.most = 0
        self.begun = len(os.listdir("/proc/self/fd"))

    def run(self) -> None:
        while True:
            self.most = max(self.most, len(os.listdir("/proc/self/fd")) - self.begun)
            time.sleep(0.1)


def main() -> None:
    count = int(sys.argv[1]) if sys.argv[1:] else 1000
    here = str(Path(__file__).parent)
    os.environ["PYTHONPATH"] = os.pathsep.join([here, os.environ.get("PYTHONPATH", "")])  # for the workers
    STAGES["noop"] = importlib.import_module("runner").noop  # not __main__'s, which no worker can import
    with tempfile.TemporaryDirectory() as folder:
        places = [f"store.root={folder}/root", f"store.workdir={folder}/work", "tracking.enabled=false"]
        loaded = load("quickstart", places)

        def build(text: str) -> None:
            plan.build = run.build = lambda recipe: pipeline(count, text)  # type: ignore[assignment]

        build("first")
        watch = Watch()
        before_mib = peak_mib()
        with connected(None, cpus=2), Display(console=Console(file=io.StringIO())) as display:
            watch.start()
            own, all_s = time.process_time(), cpu_s()
            outcome = run.run(loaded, display=display)
            own, all_s = time.process_time() - own, cpu_s() - all_s
            assert len(outcome.ran) == count, outcome.failed
            each, own, all_s = (seconds / count * 1000 for seconds in (outcome.seconds, own, all_s))
            print(f"{count:,} stages in {outcome.seconds:.1f} s: {each:.1f} ms each")
            print(f"CPU time of it: {own:.1f} ms in this process, {all_s:.1f} ms in total")
            print(f"peak {peak_mib():.0f} MiB ({before_mib:.0f} before), {watch.most} files open", flush=True)
            again = run.run(loaded, display=display)
            assert len(again.reused) == count
            print(f"nothing to do: {again.seconds / count * 1000:.2f} ms per stage", flush=True)
        for text in ("first", "second"):
            build(text)
            began = time.perf_counter()
            states = Counter(row.state for row in plan.plan(loaded))
            each = (time.perf_counter() - began) / count * 1000
            print(f"plan, {dict(states)}: {each:.2f} ms per stage", flush=True)


def cpu_s() -> float:
    """Return the CPU seconds of this process and of Ray's processes, which are its children."""
    total = 0.0
    for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
        with contextlib.suppress(psutil.NoSuchProcess):
            total += sum(process.cpu_times()[:2])
    return total


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    main()
