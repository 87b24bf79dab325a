"""Stage `merge`: base + adapter -> one model that plain transformers loads, its RoPE stretch in config.json.

longreach run quickstart
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from longreach.infra.artifact import Artifact
from longreach.infra.choices import Choices
from longreach.infra.resources import Resources
from longreach.pipelines.stage import StageRun
from longreach.training.checkpoint import merge_adapter
from longreach.training.recipe import RopeRecipe


def merge(
    base: Artifact, adapter: Artifact, *, recipe: Choices, resources: Resources, out: Path, run: StageRun
) -> dict[str, Any]:
    """ModelCheckpoint + AdapterCheckpoint -> ModelCheckpoint; fails unless its logits are the adapter's."""
    trained = json.loads((adapter.path / "training.json").read_text())
    merged = merge_adapter(base.path, adapter.path, out, rope=RopeRecipe(**trained["rope"]))
    shutil.copyfile(adapter.path / "training.json", out / "training.json")
    return merged
