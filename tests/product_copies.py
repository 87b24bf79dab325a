"""Copies of the product with a file more, to try what a contributor would do."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

ROOT = Path(__file__).parent.parent
ROOMS = ("attention", "infra", "training", "evaluation", "pipelines")


def product_with(folder: Path, *additions: tuple[str, str, str]) -> dict[str, str]:
    """Copy the product with files more; each addition is (toy, place, lines).

    tests/`toy` is put at `place`, and `lines` at the end of that room's __init__.py. Returns the environment in which
    Python imports the copy.
    """
    package = folder / "longreach"
    for room in ROOMS:
        shutil.copytree(ROOT / room, package / room)
    shutil.copy(ROOT / "__init__.py", package)
    for toy, place, lines in additions:
        shutil.copy(ROOT / "tests" / toy, package / place)
        with (package / place).with_name("__init__.py").open("a") as file:
            file.write(lines)
    return os.environ | {"PYTHONPATH": str(folder)}
