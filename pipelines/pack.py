"""Documents -> PackedCorpus, with the tokenizer of the base: the stage around training/packed.py.

Documents are tokenised by Ray tasks where a cluster is there, by threads of this process where none is; the rows are
the same.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import ray
from transformers import AutoTokenizer

from longreach.infra.artifact import Artifact
from longreach.infra.resources import Resources
from longreach.pipelines.stage import StageRun
from longreach.training.corpus import known_names
from longreach.training.packed import pack_corpus
from longreach.training.recipe import PackStageRecipe
from longreach.training.summary import PackSummary

REPORT_EVERY_S = 0.5


def pack(base: Artifact, *, recipe: PackStageRecipe, resources: Resources, out: Path, run: StageRun) -> dict[str, Any]:
    """Write a PackedCorpus to `out`; relative globs of the recipe start at the working directory.

    The summary is packed.json without the list of malformed entries. ValueError as pack_corpus.
    """
    total = len(known_names(recipe.corpus, Path.cwd()) or ())  # 0: nobody knows before the end
    said_at = 0.0

    def progress(documents: int) -> None:
        nonlocal said_at
        if time.monotonic() - said_at > REPORT_EVERY_S or documents == total:
            said_at = time.monotonic()
            run.spool.progress(documents, total, unit="document")

    tokenizer = AutoTokenizer.from_pretrained(base.path, local_files_only=True)
    workers = int(ray.cluster_resources()["CPU"]) if ray.is_initialized() else 0
    packed = pack_corpus(
        recipe.corpus, recipe.pack, tokenizer, out, base_dir=Path.cwd(), workers=workers, progress=progress
    )
    run.spool.metrics({"pack/rows": packed.rows, "pack/tokens": packed.tokens, "pack/efficiency": packed.efficiency})
    run.spool.artifact(out / PackSummary.file)
    run.spool.dataset(run.label, packed.source_digest, str(out))
    return packed.model_dump(mode="json", exclude={"bad": {"listed"}})
