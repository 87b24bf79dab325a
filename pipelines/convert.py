"""Stage `convert`: the base model, from wherever the recipe says, as one plain Hugging Face folder.

longreach run quickstart
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from longreach.infra.resources import Resources
from longreach.pipelines.stage import StageRun
from longreach.training.convert import convert as convert_model
from longreach.training.model import describe
from longreach.training.recipe import BaseRecipe


def convert(*, recipe: BaseRecipe, resources: Resources, out: Path, run: StageRun) -> dict[str, Any]:
    """-> ModelCheckpoint with origin.json; the summary says where it came from and what it is."""
    origin = convert_model(recipe.source, out, recipe.revision)
    return {"origin": origin, **describe(out)}
