"""Dependencies point one way; what answers quickly imports nothing slow; flash-attn is never a requirement."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = ("attention", "infra", "training", "evaluation", "pipelines")
MAY_IMPORT = {
    "attention": {"attention"},
    "infra": {"infra"},
    "training": {"training", "attention", "infra"},
    "evaluation": {"evaluation", "attention", "infra"},
    "pipelines": set(ROOMS),
}
SLOW = {
    "torch",
    "altair",
    "scipy",
    "huggingface_hub",
    "transformers",
    "ray",
    "mlflow",
    "deepspeed",
    "peft",
    "datasets",
    "pandas",
    "matplotlib",
    "pyarrow",
    "datasketch",
}
QUICK = [
    "attention/__init__.py", "attention/pattern.py", "attention/causal.py", "attention/shifted_sparse.py",
    "attention/sink_window.py", "training/attention_recipe.py",
    "infra/choices.py", "infra/resources.py", "infra/artifact.py",
    "infra/errors.py", "infra/files.py", "infra/lease.py", "infra/cluster.py", "infra/tracking.py",
    "infra/doctor.py", "infra/versions.py", "infra/registry.py", "infra/relay.py", "infra/share.py", "infra/notify.py",
    "infra/polling.py", "infra/schedule.py", "infra/kubernetes.py", "infra/mirror.py", "training/recipe.py",
    "training/convert.py", "training/cost.py", "training/documents.py", "training/summary.py", "infra/lazy.py",
    "infra/machine.py", "infra/mlflow_store.py", "training/corpus_recipe.py",
    "evaluation/__init__.py", "evaluation/base.py",
    "evaluation/blocks.py", "evaluation/cells.py", "evaluation/documents.py", "evaluation/figures.py",
    "evaluation/harness.py", "evaluation/lm_eval_files.py", "evaluation/longbench.py", "evaluation/stream_questions.py",
    "evaluation/lost_in_the_middle.py", "evaluation/needle.py", "evaluation/passkey.py",
    "evaluation/perplexity.py", "evaluation/ruler.py", "evaluation/ruler_tasks.py", "evaluation/scores.py",
    "evaluation/sinks.py", "evaluation/streaming.py",
    "pipelines/recipe.py", "pipelines/reader.py", "pipelines/gate.py", "pipelines/stage.py", "pipelines/kind.py",
    "pipelines/artifacts.py", "pipelines/stages.py", "pipelines/evaluate.py", "pipelines/release.py",
    "pipelines/report/report.py", "pipelines/report/compare.py", "pipelines/graph.py", "pipelines/plan.py",
    "pipelines/run.py", "pipelines/worker.py", "pipelines/signals.py", "pipelines/status.py", "pipelines/display.py",
    "pipelines/cli.py", "pipelines/cluster_cli.py", "pipelines/console.py", "pipelines/__main__.py", "infra/jobs.py",
    "training/scale.py", "training/probe.py", "pipelines/foresee.py",
]  # fmt: skip


def first_name(module: str) -> str:
    """`torch` of `torch.nn`; our own modules go by their room: `training` of `longreach.training.loop`."""
    return module.removeprefix("longreach.").split(".")[0]


def imports(path: Path, *, top_level: bool = False) -> set[str]:
    """First names of what a file imports (only when it is itself imported, if `top_level`)."""
    tree = ast.parse(path.read_text())
    lazy = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        or (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test))
        for inner in ast.walk(node)
    }
    found = set()
    for node in ast.walk(tree):
        if top_level and node in lazy:
            continue
        if isinstance(node, ast.Import):
            found |= {first_name(alias.name) for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.add(first_name(node.module or ""))
    return found


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_only_the_rooms_below_it(room):
    for path in (ROOT / room).rglob("*.py"):
        assert imports(path) & set(ROOMS) <= MAY_IMPORT[room], path


def test_attention_knows_neither_ray_nor_deepspeed_nor_mlflow():
    for path in (ROOT / "attention").rglob("*.py"):
        assert not imports(path) & {"ray", "deepspeed", "mlflow"}, path


@pytest.mark.parametrize("name", QUICK)
def test_what_answers_quickly_imports_nothing_slow(name):
    assert not imports(ROOT / name, top_level=True) & SLOW


def test_flash_attn_is_imported_only_inside_functions():
    for room in ROOMS:
        for path in (ROOT / room).rglob("*.py"):
            assert "flash_attn" not in imports(path, top_level=True), path
