"""Copies of the product with a file more, to try what a contributor would do."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

ROOT = Path(__file__).parent.parent
ROOMS = ("attention", "infra", "training", "evaluation", "pipelines")


def product_with(folder: Path, toy: str, place: str, lines: str) -> dict[str, str]:
    """Copy the product, put tests/`toy` at `place` and add `lines` to the end of that room's __init__.py.

    Returns the environment in which Python imports the copy.
    """
    package = folder / "longreach"
    for room in ROOMS:
        shutil.copytree(ROOT / room, package / room)
    shutil.copy(ROOT / "__init__.py", package)
    shutil.copy(ROOT / "tests" / toy, package / place)
    with (package / place).with_name("__init__.py").open("a") as file:
        file.write(lines)
    return os.environ | {"PYTHONPATH": str(folder)}
