"""What several test files share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def cluster():
    """One Ray cluster of two CPUs for all tests that run tasks in it; its workers import the helpers in tests/."""
    from infra.cluster import connected

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]))
        with connected(None, cpus=2) as ray:
            yield ray
