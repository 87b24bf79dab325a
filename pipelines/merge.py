"""Stage `merge`: base + adapter -> one model that plain transformers loads, its RoPE stretch in config.json.

longreach run quickstart
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from longreach.infra.artifact import Artifact
from longreach.infra.choices import Choices
from longreach.infra.resources import Resources
from longreach.pipelines.stage import StageRun
from longreach.training.checkpoint import merge_adapter
from longreach.training.summary import TrainingSummary


def merge(
    base: Artifact, adapter: Artifact, *, recipe: Choices, resources: Resources, out: Path, run: StageRun
) -> dict[str, Any]:
    """ModelCheckpoint + AdapterCheckpoint -> ModelCheckpoint; fails unless its logits are the adapter's."""
    trained = TrainingSummary.read(adapter.path)
    merged = merge_adapter(base.path, adapter.path, out, rope=trained.rope)
    trained.write(out)
    return merged
