"""A new pattern is one file and one line in PATTERNS: recipe, plan and training take it as it is.

The whole chain, to its report: tests/test_adding_runs.py.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from attention_cases import positions
from test_quickstart import RECIPE, make_project
from toy_models import job, train
from toy_pattern import Dilated

from longreach.attention import PATTERNS
from longreach.attention.pattern import Heads
from longreach.attention.reference import dense_mask, starts
from longreach.infra.resources import Resources
from longreach.pipelines.plan import plan
from longreach.pipelines.reader import RecipeError, load
from longreach.training.cost import Shape, predict
from longreach.training.recipe import ArmRecipe

ARMS = {"full": {"tune": "lora"}, "dilated": {"tune": "lora", "attention": {"pattern": "dilated", "stride_tokens": 4}}}
SMALL = RECIPE | {
    "baselines": {},
    "pretrain": None,
    "finetune": RECIPE["finetune"] | {"steps": 1, "arms": ARMS},
    "evaluate": {"perplexity": {"lengths": [32], "last_tokens": 16}},
}


@pytest.fixture
def registered(monkeypatch) -> None:
    monkeypatch.setitem(PATTERNS, "dilated", Dilated)


@pytest.fixture
def project(tmp_path: Path, monkeypatch) -> Path:
    monkeypatch.chdir(make_project(tmp_path / "project", SMALL))
    return Path.cwd()


@pytest.mark.usefixtures("registered")
def test_a_recipe_chooses_it_and_the_plan_shows_its_arm(project: Path):
    loaded = load("tiny.yaml")
    attention = loaded.recipe.finetune.arms["dilated"].attention
    assert attention.pattern_at(step=0, steps=1) == Dilated(stride_tokens=4)
    assert loaded.origins["finetune.arms.dilated.attention.stride_tokens"].startswith("tiny.yaml:")
    assert "finetune[dilated]" in {row.stage for row in plan(loaded)}


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ("{pattern: dilated, stride: 4}", "attention.stride: no such field; did you mean stride_tokens?"),
        ("{pattern: dilated}", "attention.stride_tokens: missing, and it has no default (Distance between two keys"),
        ("{pattern: dilated, stride_tokens: 0}", "stride_tokens: should be greater than or equal to 1, got 0"),
        ("{pattern: dilated, stride_tokens: 5}", "attention.stride_tokens 5 does not divide pack.seq_len 32"),
        ("{pattern: dilatet, stride_tokens: 4}", "'sink_window' or 'dilated', got text 'dilatet'"),
    ],
)
def test_mistakes_in_its_section_are_shown_with_their_place(project: Path, choices: str, message: str):
    with pytest.raises(RecipeError) as refused:
        load("tiny.yaml", [f"finetune.arms.dilated.attention={choices}"])
    assert any(line.startswith("--set: ") and message in line for line in str(refused.value).splitlines())


@pytest.mark.usefixtures("registered")
def test_a_matrix_refuses_it_because_nothing_there_chooses_its_stride(project: Path):
    with pytest.raises(RecipeError, match="attention 'dilated' needs stride_tokens, which a matrix does not vary"):
        load("tiny.yaml", ["finetune.matrix={tune: [lora], attention: [dilated]}"])


@pytest.mark.usefixtures("registered")
def test_the_schema_of_recipes_lists_it():
    sections = ArmRecipe.model_json_schema()["$defs"]
    assert sections["Dilated"]["properties"]["stride_tokens"]["description"].startswith("Distance between two keys")


@pytest.mark.usefixtures("registered")
def test_it_trains_and_the_planner_counts_its_keys(tmp_path: Path):
    arms = {name: ArmRecipe(**choices) for name, choices in ARMS.items()}
    summary = train(job(tmp_path, arm=arms["dilated"], optim={"steps": 1}))
    assert (summary.pattern, summary.kernel) == ("dilated(stride_tokens=4)", "reference")
    assert summary.arm.attention.about() == "one key in 4"
    mask = dense_mask(Dilated(stride_tokens=4), Heads(1, 1), starts(positions((32,)), 1, 32, torch.device("cpu")))
    assert arms["dilated"].attention.mean_keys(32) == mask.sum() / 32
    shape = Shape(2, 32, 96, 4, 2, 8, 64, tied=True)
    flops = {name: predict(shape, arm, rows=1, seq_len=32, resources=Resources()).flops for name, arm in arms.items()}
    assert flops["dilated"] < flops["full"]
