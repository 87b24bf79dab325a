"""Copy the product and add files, to test what a contributor would do."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

ROOT = Path(__file__).parent.parent
ROOMS = ("attention", "infra", "training", "evaluation", "pipelines")


def product_with(folder: Path, *additions: tuple[str, str, str]) -> dict[str, str]:
    """Copy the product and add files; each addition is (toy, place, lines).

    tests/`toy` is copied to `place`, and `lines` are appended to the __init__.py beside it. Return the environment
    variables with which Python imports the copy.
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
