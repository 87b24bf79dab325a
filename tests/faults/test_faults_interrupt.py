"""Ctrl-C in training: exit 130, the lease is free, and the same command goes on from the last checkpoint."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from test_quickstart import RECIPE, make_project, manifests, run, steps_of, wait_for

from infra.artifact import Lease, Store

pytestmark = [pytest.mark.slow, pytest.mark.drill]


def test_ctrl_c_in_training_is_exit_130_frees_the_lease_and_costs_at_most_one_checkpoint_interval(tmp_path: Path):
    recipe = {key: RECIPE[key] for key in ("name", "base", "corpus", "finetune")}
    recipe["finetune"] = recipe["finetune"] | {"steps": 200, "arms": {"full": {"tune": "all"}}}
    project = make_project(tmp_path / "project", recipe | {"resources": {"workers": 2, "checkpoint_every_steps": 5}})
    command = [sys.executable, "-m", "pipelines", "run", "tiny.yaml"]
    with (tmp_path / "driver.log").open("w") as log:
        driver = subprocess.Popen(command, cwd=project, stdout=log, stderr=log, start_new_session=True)
        wait_for(lambda: sum(map(len, steps_of(project))) > 20, "the first steps")
        family = psutil.Process(driver.pid).children(recursive=True)
        asked = time.monotonic()
        driver.send_signal(signal.SIGINT)
        assert driver.wait(timeout=60) == 130, (tmp_path / "driver.log").read_text()
    print(f"ended after {time.monotonic() - asked:.1f} s")
    assert Lease(Store(str(project / ".longreach")), "tiny", "test").current_holder() is None
    assert not psutil.wait_procs(family, timeout=30)[1], "Ray's processes live on"
    again = time.monotonic()
    run(project)
    print(f"done {time.monotonic() - again:.0f} s later")
    before, after = steps_of(project)
    assert before[-1] - after[0] + 1 <= 5
    assert after[-1] == 200
    assert "finetune[full]" in manifests(project)
