"""The gate: its rules on made-up scores, and its effect on real MLflow servers: SQLite, and PostgreSQL with S3."""

from __future__ import annotations

import json
import shutil
import uuid
from pathlib import Path

import numpy as np
import pytest
import s3fs
from local_cluster import s3_server
from mlflow_servers import Server, postgresql
from tiny_models import byte_tokenizer, tiny_llama
from toy_models import pack_summary, training_summary

from longreach.infra import registry
from longreach.infra.artifact import Artifact, Store
from longreach.infra.tracking import Spool, read_events
from longreach.pipelines.gate import PromoteRecipe, PromoteStageRecipe, decide, promote
from longreach.pipelines.kind import StageRun
from longreach.pipelines.reader import load
from longreach.pipelines.release import ReleaseRecipe, release
from longreach.training.recipe import ArmRecipe

LENGTHS = (64, 128)


def perplexity_rows(worse_by: float, spread: float = 0.02, seed: int = 1) -> list[dict]:
    """Position rows of four documents in bins of 16 tokens: the text's own difficulty, plus a model's loss."""
    text, noise = np.random.default_rng(0), np.random.default_rng(seed)
    documents = [{"kind": "document", "document": name} for name in "abcd"]
    return documents + [
        {"kind": "position", "document": name, "start": start, "end": start + 16,
         "nll": float(2 + text.normal() / 2 + worse_by + spread * noise.normal())}
        for name in "abcd" for start in range(0, 128, 16)
    ]  # fmt: skip


def passkey_rows(*found: int, trials: int = 20) -> list[dict]:
    return [
        {"kind": "length", "length": 64 * 2**n, "accuracy": k / trials, "correct": k, "trials": trials}
        for n, k in enumerate(found)
    ]


def rules(**changes) -> PromoteRecipe:
    return PromoteRecipe(model="arm", name="name", **changes)


def kept(findings) -> list[bool]:
    return [finding.passed for finding in findings]


def test_a_model_that_is_a_little_better_than_champion_and_base_keeps_the_rules():
    rows = {"challenger_perplexity": perplexity_rows(-0.05), "champion_perplexity": perplexity_rows(0, seed=2)}
    findings = decide(rules(), LENGTHS, 64, **rows, base_perplexity=perplexity_rows(0, seed=3))
    assert kept(findings) == [True, True, True]
    assert [finding.rule for finding in findings] == [
        "perplexity_ratio, tokens 0 to 64",
        "perplexity_ratio, tokens 64 to 128",
        "base_ratio, tokens 0 to 64",  # 128 tokens are more than the base was trained to
    ]


def test_a_worse_model_is_refused_and_the_reason_has_both_numbers():
    rows = {"challenger_perplexity": perplexity_rows(0.05), "champion_perplexity": perplexity_rows(0, seed=2)}
    findings = decide(rules(base_ratio=None), LENGTHS, 64, **rows)
    assert kept(findings) == [False, False]
    assert findings[0].measured == "1.0491, 95% interval 1.0188 to 1.0803 over 4 documents"
    assert findings[0].required == "at most 1.01"


def test_lengths_that_are_nearer_than_a_bin_is_wide_are_one_stretch():
    rows = {"challenger_perplexity": perplexity_rows(-0.05), "champion_perplexity": perplexity_rows(0, seed=2)}
    findings = decide(rules(base_ratio=None), (50, 60, 128), 64, **rows)
    assert [finding.rule for finding in findings] == [
        "perplexity_ratio, tokens 0 to 50",
        "perplexity_ratio, tokens 50 to 128",
    ]


def test_a_model_that_ends_badly_is_not_saved_by_a_good_start():
    champion = perplexity_rows(0, seed=2)
    challenger = perplexity_rows(-0.2)
    for row in challenger:
        if row["kind"] == "position" and row["start"] >= 64:
            row["nll"] += 0.3
    findings = decide(
        rules(base_ratio=None), LENGTHS, 64, challenger_perplexity=challenger, champion_perplexity=champion
    )
    assert kept(findings) == [True, False]


@pytest.mark.parametrize(("certainty", "passes"), [("interval", False), ("estimate", True)])
def test_what_is_only_perhaps_as_good_is_refused_unless_the_estimate_is_enough(certainty, passes):
    rows = {
        "challenger_perplexity": perplexity_rows(-0.05, spread=0.05),
        "champion_perplexity": perplexity_rows(0, 0.05, seed=2),
    }
    findings = decide(rules(base_ratio=None, certainty=certainty), LENGTHS, 64, **rows)
    assert kept(findings) == [passes, True]  # the second stretch is better for sure


def test_keys_that_are_lost_at_any_length_refuse_it_and_so_does_a_short_effective_length():
    asked = rules(base_ratio=None, perplexity_ratio=None, passkey=0.9, effective_length=128)
    assert kept(decide(asked, LENGTHS, 64, challenger_passkey=passkey_rows(20, 18))) == [True, True, True]
    assert kept(decide(asked, LENGTHS, 64, challenger_passkey=passkey_rows(20, 17))) == [True, False, False]
    assert kept(decide(asked, LENGTHS, 64, challenger_passkey=passkey_rows(17, 20))) == [False, True, False]


def gain_rows(nll: dict[int, float], spread: float = 0.0, documents: int = 6) -> list[dict]:
    """Rows of test documents by length, the first two better by `spread` than the mean and the last two worse."""
    rows: list[dict] = []
    for length, value in nll.items():
        for n in range(documents):
            place = {"document": str(n), "split": "test", "length": length, "tokens": 16}
            own = value + 0.3 * n + spread * (n // 2 - 1) * (length == max(nll))
            rows += [{"kind": "window", "end": 128, "nll": own} | place, {"kind": "document", "nll": own} | place]
        rows.append({"kind": "pooled", "split": "test", "length": length, "documents": documents, "nll": value})
    return rows


GAIN_ALONE = {"base_ratio": None, "perplexity_ratio": None}


@pytest.mark.parametrize(
    ("nll", "choices", "passes"),
    [
        (1.60, {}, True),  # the base at its best, with 64 tokens, has 1.65
        (1.70, {}, False),
        (1.70, {"gain_over_base": -0.1}, True),
        (1.60, {"gain_over_base": 0.06}, False),
    ],
)
def test_a_gain_is_held_against_the_base_at_the_best_of_its_own_lengths(nll, choices, passes):
    asked = rules(**GAIN_ALONE, **choices)
    base, arm = gain_rows({32: 1.7, 64: 1.65, 128: 9.0}), gain_rows({32: 1.7, 64: 1.7, 128: nll})
    (finding,) = decide(asked, (), 64, challenger_gain=arm, base_gain=base)
    assert finding.passed == passes
    assert finding.rule == "gain_over_base at 128 tokens, to the base at its best (64)"
    assert finding.measured.startswith(f"{1.65 - nll:+.3f} nats per token, 95% interval")
    assert finding.required == f"at least {choices.get('gain_over_base', 0):+g}"


def test_a_gain_that_only_some_documents_have_is_refused_unless_the_estimate_is_enough():
    base, arm = gain_rows({64: 1.65}), gain_rows({64: 1.65, 128: 1.6}, spread=0.3)
    for certainty, passes in (("interval", False), ("estimate", True)):
        asked = rules(**GAIN_ALONE, certainty=certainty)
        (finding,) = decide(asked, (), 64, challenger_gain=arm, base_gain=base)
        assert finding.passed == passes
    one = {"challenger_gain": gain_rows({128: 1.0}, documents=1), "base_gain": gain_rows({64: 2.0}, documents=1)}
    (finding,) = decide(rules(**GAIN_ALONE), (), 64, **one)
    assert not finding.passed
    assert "without an interval" in finding.measured
    with pytest.raises(ValueError, match=r"promote.gain_over_base: no length of \[64\] is within the 32 tokens"):
        decide(rules(**GAIN_ALONE), (), 32, challenger_gain=arm, base_gain=base)


def test_a_gain_is_held_against_every_untrained_stretch_at_the_same_length():
    arm = gain_rows({64: 1.65, 128: 1.60})
    stretches = {"stretch:theta_gain": gain_rows({64: 1.5, 128: 1.62}), "stretch:yarn_gain": gain_rows({128: 1.58})}
    theta, yarn = decide(rules(**GAIN_ALONE), (), 64, challenger_gain=arm, **stretches)
    assert (theta.rule, theta.passed) == ("gain_over_stretches at 128 tokens, to theta", True)
    assert (yarn.rule, yarn.passed) == ("gain_over_stretches at 128 tokens, to yarn", False)
    assert yarn.measured.startswith("-0.020 nats per token, 95% interval")
    _, yarn = decide(rules(**GAIN_ALONE, gain_over_stretches=-0.03), (), 64, challenger_gain=arm, **stretches)
    assert (yarn.required, yarn.passed) == ("at least -0.03", True)


def test_gain_is_a_rule_by_itself_where_a_recipe_measures_it_and_no_rule_elsewhere():
    overrides = ["promote.perplexity_ratio=null", "promote.base_ratio=null", "promote.passkey=null"]
    overrides += ["promote.gain_over_base=auto", "promote.gain_over_stretches=auto", "evaluate.gain=null"]
    overrides += ["baselines={base: {}}"]
    measured = "evaluate.gain={lengths: [2048, 12288]}"
    plain = load("retrain", overrides[3:]).recipe
    assert not plain.promote.asks_for_gain(plain)
    alone = load("retrain", [*overrides, measured]).recipe
    assert alone.promote.asks_for_gain(alone)
    for more, message in (
        ([], "has no rule"),
        (["promote.gain_over_base=0.01"], "needs evaluate.gain of base"),
        (
            ["evaluate.gain={lengths: [2048, 8192]}"],
            r"needs target_length 12288 in evaluate.gain.lengths \[2048, 8192\]",
        ),
        ([measured, "promote.gain_over_base=null"], "has no rule"),
        ([measured, "promote.gain_over_base=0", "baselines={}"], "needs the untrained base to compare with"),
        (["promote.gain_over_stretches=0"], "needs evaluate.gain of longlora and of a stretch: add a stretch"),
    ):
        with pytest.raises(ValueError, match=message):
            load("retrain", [*overrides, *more])


def test_the_recipe_for_schedules_asks_for_gains_over_the_base_and_over_its_own_start_untrained():
    recipe = load("retrain").recipe
    assert recipe.promote.asks_for_gain(recipe)
    assert recipe.promote.stretches(recipe) == ["theta"]
    assert recipe.baselines["theta"] == recipe.finetune.rope


def test_a_base_that_no_length_is_within_is_told_before_training():
    overrides = ["evaluate.perplexity.lengths=[12288]", "promote.target_length=12288"]
    message = r"promote\.base_ratio: no length of evaluate\.perplexity\.lengths \[12288\] is within the 8,192 tokens"
    with pytest.raises(ValueError, match=message):
        load("retrain", overrides)


def test_an_arm_from_scratch_is_held_against_no_stretch_of_the_base():
    from_scratch = "{model: {hidden: 32, layers: 1, heads: 2, kv_heads: 2, context_length: 512}, pack: {seq_len: 512, "
    from_scratch += "method: concat, first_token: sink}, steps: 1, global_batch_tokens: 512, learning_rate: 1e-3, "
    from_scratch += "warmup_steps: 0, arms: {scratch: {sink: none}}}"
    overrides = ["promote.base_ratio=null", "promote.gain_over_base=null", "promote.model=scratch"]
    overrides += ["promote.gain_over_stretches=auto"]
    with pytest.raises(
        ValueError, match=r"scratch was not made from the base: set promote\.gain_over_stretches to null"
    ):
        load(
            "retrain",
            [
                f"pretrain={from_scratch}",
                "evaluate.gain={lengths: [2048, 12288]}",
                *overrides,
                "baselines={base: {}, theta: {type: theta, theta: 300000, factor: 2}}",
            ],
        )


def test_a_base_that_was_trained_to_less_than_anything_measured_cannot_be_compared_with():
    with pytest.raises(
        ValueError, match=r"no length of evaluate.perplexity.lengths \[64, 128\] is within the 32 tokens"
    ):
        decide(rules(), LENGTHS, 32, challenger_perplexity=perplexity_rows(0), base_perplexity=perplexity_rows(0))


def test_one_stretch_of_text_has_no_interval_and_is_refused():
    one = [row for row in perplexity_rows(-1) if row["kind"] == "position"][:1]
    (finding,) = decide(
        rules(base_ratio=None, target_length=16), (16,), 64, challenger_perplexity=one, champion_perplexity=one
    )
    assert not finding.passed
    assert "without an interval" in finding.measured


# ---- with a registry


@pytest.fixture(scope="module", params=["sqlite", "postgresql-s3"])
def server(request, tmp_path_factory):
    """An MLflow server, which the environment names; of S3's keys only the server knows."""
    folder = tmp_path_factory.mktemp(request.param)
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "sqlite":
            yield from serve(Server(folder), patch)
        else:
            with postgresql() as database, s3_server(folder) as keys:
                yield from serve(Server(folder, database, "s3://longreach/mlflow", keys), patch)
                s3 = s3fs.S3FileSystem(key="test", secret="test", endpoint_url=keys["AWS_ENDPOINT_URL"])
                assert [path for path in s3.find("longreach/mlflow") if path.endswith("model.safetensors")]


def serve(server: Server, patch):
    server.start()
    patch.setenv("MLFLOW_TRACKING_URI", server.uri)
    yield server
    server.kill()


@pytest.fixture(scope="module")
def releases(tmp_path_factory):
    """Makes releases of tiny models, an artifact each."""
    return Releases(tmp_path_factory.mktemp("releases"))


class Releases:
    def __init__(self, folder: Path) -> None:
        self.folder, self.store = folder, Store(str(folder / "store"))

    def publish(self, stage: str, write, identity: dict, summary: dict) -> Artifact:
        attempt = self.store.new_attempt(stage, uuid.uuid4().hex)
        write(attempt.out)
        record = {"label": stage, "identity": identity, "summary": summary, "seconds": 0.0}
        self.store.publish(attempt, record)
        return self.store.fetch(stage, attempt.fingerprint)

    def run(self, stage: str) -> StageRun:
        attempt = self.store.new_attempt(stage, uuid.uuid4().hex)
        name = f"{stage} {attempt.fingerprint[:6]}"
        spool = Spool.open(
            self.folder / "spool" / f"{attempt.fingerprint}.jsonl",
            run=uuid.uuid4().hex, parent=None, experiment="gate", name=name, kind="attempt",
        )  # fmt: skip
        return StageRun(stage, spool, attempt, [], experiment="gate")

    def scores(self, rows: list[dict], name: str = "perplexity") -> Artifact:
        def write(out: Path) -> None:
            content = {"eval": name, "protocol": "made up", "recipe": {}, "rows": rows, "summary": {"ppl_128": 8.0}}
            (out / "scores.json").write_text(json.dumps(content))
            (out / "cases.jsonl").write_text("")

        return self.publish("evaluate", write, {}, {})

    def base(self, dtype: str | None) -> Artifact:
        def write(out: Path) -> None:
            (out / "config.json").write_text(json.dumps({"dtype": dtype} if dtype else {}))

        origin = {"source": "hub:owner/base", "licence": "Apache-2.0"}
        return self.publish(
            "convert",
            write,
            {"recipe": {"source": "hub:owner/base"}},
            {"origin": origin, "context_length": 64},
        )

    def make(
        self,
        seed: int,
        scores: Artifact | None = None,
        trained: Path | None = None,
        gguf: tuple[str, ...] = (),
        base_type: str | None = None,
        **more: Artifact,
    ) -> tuple[Artifact, StageRun]:
        """Release a random model, or a trained one's folder; `more` are further scores, by their input's name."""

        def model(out: Path) -> None:
            if trained:
                shutil.copytree(trained, out, dirs_exist_ok=True)
                return
            tiny_llama(seed).save_pretrained(out)
            byte_tokenizer().save_pretrained(out)
            attention = {"pattern": "shifted_sparse", "group_tokens": 8}
            arm = ArmRecipe(tune="lora+embed+norm", attention=attention)
            training_summary(arm=arm, pattern="S²-Attn").write(out)

        source = self.publish("merge", model, {}, {})
        sources = {"sources": [{"package": None, "files": "texts/*.txt", "dataset": None}]}
        packed = pack_summary(documents={"train": 12}, rows=40, seq_len=32).to_json()
        corpus = self.publish(
            "pack",
            lambda out: (out / "x").write_text("x"),
            {"recipe": {"corpus": sources}, "digests": {"documents": "d" * 32}},
            packed,
        )
        run = self.run("release")
        own = {"own_perplexity": scores, "base_perplexity": scores} if scores else more
        recipe = ReleaseRecipe(name="weekly", arm="arm", register_as="", gguf=gguf)
        inputs = release.arguments({"model": source, "corpus": corpus, "base": self.base(base_type), **own})
        summary = release(**inputs, recipe=recipe, out=run.attempt.out, run=run)
        record = {"label": "release", "identity": {}, "summary": summary, "seconds": 0.0}
        self.store.publish(run.attempt, record)
        return self.store.fetch("release", run.attempt.fingerprint), run


def ask_the_gate(releases: Releases, model: Artifact, champion: str | None, worse_by: float) -> dict:
    run = releases.run("promote")
    recipe = PromoteStageRecipe(rules=rules(base_ratio=None, perplexity_ratio=1.01), champion=champion, lengths=LENGTHS)
    recipe = recipe.model_copy(update={"rules": recipe.rules.model_copy(update={"name": releases.name})})
    inputs = {"model": model, "challenger_perplexity": releases.scores(perplexity_rows(worse_by))}
    if champion:
        inputs["champion_perplexity"] = releases.scores(perplexity_rows(0, seed=2))
    return promote(**promote.arguments(inputs), recipe=recipe, out=run.attempt.out, run=run)


def aliases(name: str) -> dict[str, str]:
    return {alias: str(version) for alias, version in registry.connect().get_registered_model(name).aliases.items()}


def test_a_worse_challenger_is_refused_and_a_better_one_promoted(server, releases, tmp_path):
    releases.name = f"gate {uuid.uuid4().hex[:6]}"
    models = [releases.make(seed)[0] for seed in range(3)]
    assert registry.champion(releases.name) is None
    first = ask_the_gate(releases, models[0], None, 0.0)
    assert (first["passed"], first["version"]) == (True, "1")
    assert aliases(releases.name) == {"champion": "1"}

    refused = ask_the_gate(releases, models[1], "1", 0.05)
    assert not refused["passed"]
    assert "at most 1.01" in refused["refusals"][0]
    assert aliases(releases.name) == {"champion": "1"}, "nothing moves"

    better = ask_the_gate(releases, models[2], "1", -0.05)
    assert better["version"] == "2"
    assert aliases(releases.name) == {"champion": "2", "previous": "1"}
    assert ask_the_gate(releases, models[2], "1", -0.05)["version"] == "2", "after a kill it is said once more"
    assert aliases(releases.name) == {"champion": "2", "previous": "1"}

    with pytest.raises(registry.AliasMoved, match=r"champion of .* is version 2, .* against version 1"):
        ask_the_gate(releases, models[1], "1", -0.05)
    assert registry.champion(releases.name).version == "2"

    version = registry.champion(releases.name)
    assert version.tags[registry.FINGERPRINT] == models[2].fingerprint
    assert version.tags[registry.BASE] == "hub:owner/base"
    assert version.tags["longreach.licence"] == "Apache-2.0"
    from longreach.training.convert import convert

    convert(f"models:/{releases.name}@champion", tmp_path / "champion")
    weights = [(folder / "model.safetensors").read_bytes() for folder in (tmp_path / "champion", models[2].path)]
    assert weights[0] == weights[1]

    assert registry.rollback(releases.name) == ("2", "1")
    assert aliases(releases.name) == {"champion": "1", "previous": "2"}


def test_a_model_without_a_previous_champion_cannot_be_rolled_back(server, releases):
    releases.name = f"gate {uuid.uuid4().hex[:6]}"
    ask_the_gate(releases, releases.make(0)[0], None, 0.0)
    with pytest.raises(ValueError, match="has no previous champion"):
        registry.rollback(releases.name)


def test_a_release_is_read_by_transformers_and_by_mlflow_and_its_card_says_what_it_is(releases, tmp_path, monkeypatch):
    import mlflow
    from huggingface_hub import ModelCard
    from transformers import AutoModelForCausalLM

    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")  # by default in the current folder
    model, run = releases.make(5, releases.scores(perplexity_rows(0)))
    plain = AutoModelForCausalLM.from_pretrained(model.path)
    pipeline = mlflow.transformers.load_model(str(model.path))
    assert all((a == b).all() for a, b in zip(plain.parameters(), pipeline.model.parameters(), strict=True))
    assert pipeline.tokenizer("abc")["input_ids"] == byte_tokenizer()("abc")["input_ids"]
    loaded = mlflow.pyfunc.load_model(str(model.path))
    assert loaded.metadata.signature.inputs.input_types() == [mlflow.types.DataType.string]
    card = ModelCard.load(model.path / "README.md")
    assert (card.data.license, card.data.base_model) == ("apache-2.0", "owner/base")
    (result,) = card.data.eval_results
    told = (result.dataset_type, result.dataset_name, result.metric_type, result.metric_value)
    assert told == ("longreach/perplexity", "Perplexity", "ppl_128", 8.0)
    text = card.text
    for said in (
        "4,096 tokens",
        "The base was trained to 64 tokens",
        "| ppl_128 | 8 | 8 |",
        "texts/*.txt",
        "768 tokens",
        "10 s on 2 ranks, peak 1.50 GiB over all ranks",
    ):
        assert said in text
    assert "measured on a, b, c, d;" in text
    assert "not measured" in text, "of the effective length, since no pass keys were asked"
    assert (model.path / "model.safetensors").stat().st_nlink > 1, "weights are linked, not copied"
    assert read_events(run.spool.path)[0][-1]["event"] == "dataset"
