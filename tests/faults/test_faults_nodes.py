"""Nodes that Ray Train takes for one, since they have one address (containers behind one, host networking)."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from ranks import run_spawned

from longreach.training.checkpoint import elect_disk_leader


def act(job: dict[str, Any]) -> bool:
    """What a rank is told whose disk is its own (or everybody's), and whose LOCAL_RANK is what Ray Train says."""
    rank = dist.get_rank()
    os.environ["LOCAL_RANK"] = str(job["local_ranks"][rank])
    return elect_disk_leader(Path(job["disks"][rank]))


@pytest.mark.parametrize(
    ("disks", "local_ranks", "expected"),
    [
        ("aa", (0, 1), [True, False]),
        ("aa", (0, 0), [True, False]),
        ("ab", (0, 0), [True, True]),
        ("ab", (0, 1), [True, True]),
    ],
    ids=["one node", "two nodes, one disk", "two nodes", "two nodes of one address"],
)  # fmt: skip
def test_one_rank_of_each_disk_acts_for_it(tmp_path: Path, disks: str, local_ranks: tuple[int, int], expected):
    job = {"disks": [str(tmp_path / disk) for disk in disks], "local_ranks": local_ranks}
    assert run_spawned("test_faults_nodes:act", job, world=2, folder=tmp_path / "ranks") == expected
    assert json.loads((tmp_path / "ranks/rank0.json").read_text()) is True
