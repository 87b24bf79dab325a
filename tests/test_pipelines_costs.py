"""Cost by row length: arms are measured in turns, resumed where it stopped, compared within a round, and drawn."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from test_pipelines_recipe import mistakes
from toy_models import job, tiny_folder, training_summary

from longreach.evaluation.figures import Style
from longreach.infra import launch
from longreach.infra.artifact import Artifact, Store
from longreach.infra.errors import OutOfMemory, Stopped
from longreach.infra.launch import be_the_only_rank, run_local
from longreach.infra.resources import Resources
from longreach.infra.tracking import Spool, read_events
from longreach.pipelines.costs import CostsStageRecipe, at_length, costs
from longreach.pipelines.foresee import foresee
from longreach.pipelines.graph import build
from longreach.pipelines.kind import stop_file
from longreach.pipelines.reader import load
from longreach.pipelines.recipe import Recipe
from longreach.pipelines.report.costs import cost_by_length, costs_in_words
from longreach.pipelines.report.findings import Findings, Model
from longreach.training import trial
from longreach.training.checkpoint import Checkpoints
from longreach.training.corpus import PackedRows, write_whole_rows
from longreach.training.model import describe
from longreach.training.recipe import ArmRecipe
from longreach.training.summary import CostCell, CostsSummary, PackSummary

RECIPE = """\
name: costly
base: {source: base}
corpus:
  sources: [{files: "texts/*.txt"}]
finetune:
  rope: {type: linear, factor: 2}
  pack: {seq_len: 32}
  steps: 2
  global_batch_tokens: 64
  arms:
    lora: {tune: lora}
    full: {learning_rate: 1e-3}
    longlora:
      tune: lora+embed+norm
      attention: {pattern: shifted_sparse, group_tokens: 8, anneal_to: causal, anneal_fraction: 0.5}
costs:
  lengths: [64, 32]
resources: {workers: 2}
tracking: {enabled: false}
"""


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A recipe with a section `costs`, its base (64 positions) and its texts."""
    monkeypatch.chdir(tmp_path)
    tiny_folder(tmp_path / "base")
    (tmp_path / "texts").mkdir()
    for n in range(4):
        (tmp_path / "texts" / f"text{n}.txt").write_text(" ".join(f"w{2 + (n + i) % 60}" for i in range(100 + n)))
    (tmp_path / "costly.yaml").write_text(RECIPE)
    return tmp_path / "costly.yaml"


# ---- the recipe and its stage


def test_without_the_section_the_stages_and_their_fingerprints_are_those_of_before(path: Path) -> None:
    measured = build(load(path).recipe)
    plain = build(load(path, ["costs=null"]).recipe)
    assert [stage.label for stage in measured if stage not in plain][-2:] == ["costs", "report"]
    fingerprints = {stage.label: stage.fingerprint for stage in plain if stage.name != "report"}
    assert fingerprints == {s.label: s.fingerprint for s in measured if s.name not in ("costs", "report")}


def test_the_stage_runs_when_all_others_are_done_and_depends_on_nothing_but_what_costs_depend_on(path: Path) -> None:
    def stage_of(*overrides: str):
        stages = build(load(path, [*overrides]).recipe)
        return next(stage for stage in stages if stage.name == "costs"), stages

    stage, stages = stage_of()
    assert [one.label for one in stage.after] == [one.label for one in stages if one.name not in ("costs", "report")]
    same = ("finetune.arms.lora.learning_rate=0.1", "finetune.steps=9", "finetune.seeds=[1, 2]", "seed=3")
    assert stage_of(*same)[0].fingerprint == stage.fingerprint
    for other in ("costs.rounds=3", "finetune.arms.lora.lora_rank=4", "finetune.global_batch_tokens=128"):
        assert stage_of(other)[0].fingerprint != stage.fingerprint, other


def test_groups_have_the_same_share_of_every_row_and_nothing_anneals() -> None:
    arm = ArmRecipe(attention={"pattern": "shifted_sparse", "group_tokens": 8, "sink_tokens": 2, "anneal_to": "causal",
                               "anneal_fraction": 0.5})  # fmt: skip
    longer = at_length(arm, 32, 64).attention
    assert str(longer.own_pattern()) == "shifted_sparse(group_tokens=16, sink_tokens=2)"
    assert longer.pattern_at(step=9, steps=10) == longer.own_pattern()
    window = ArmRecipe(attention={"pattern": "sink_window", "window_tokens": 8})
    assert at_length(window, 32, 64) == window


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("costs.lengths=[32, 256]", "costs.lengths: lora: 256 exceeds the 128 positions of a base trained to 64"),
        ("costs.lengths=[20]", "longlora: group_tokens 8 of rows of 32 are 5 of rows of 20, which is not even: "
                               "use a multiple of 8"),
        ("costs.lengths=[32, 32]", "costs.lengths: [32, 32] has a duplicate length"),
        ("costs.lengths=[4]", "costs.lengths: 4 is less than 8, the minimum row length in tokens"),
        ("costs.rounds=0", "costs.rounds: should be greater than or equal to 2, got 0"),
        ("costs.arms=[ful]", "costs.arms: no arm 'ful'; did you mean full?"),
        ("finetune=null", "costs: there is no section finetune, whose arms it measures"),
    ],
)  # fmt: skip
def test_what_cannot_be_measured_is_refused_with_both_numbers(path: Path, override: str, says: str) -> None:
    extra = ["baselines={base: {}}"] if override.startswith("finetune") else []
    said = "\n".join(mistakes(path, override, *extra))
    assert says in said


def test_a_length_that_ranks_of_one_row_do_not_divide_is_refused(path: Path) -> None:
    narrow = ["costs.arms=[full]", "costs.lengths=[33]", "resources.sequence_parallel=2"]
    (said,) = mistakes(path, *narrow)
    assert said.endswith("costs.lengths: 33 is not divisible by resources.sequence_parallel 2: change one of them")


def test_of_a_base_that_is_known_only_when_converted_the_stage_itself_refuses_the_length(stage_inputs) -> None:
    recipe = stage_inputs["recipe"].model_copy(update={"lengths": (32, 4096)})
    with pytest.raises(ValueError, match="4096 exceeds the 128 positions of a base trained to 64"):
        costs(**stage_inputs | {"recipe": recipe})


# ---- the stage, with ranks that only say what they were asked


class Ranks:
    """Stands for infra.launch.run_ranks: keeps each trial, and answers with made up seconds."""

    def __init__(self) -> None:
        self.asked: list[dict] = []
        self.seconds = {"lora": 3.0, "full": 6.0, "longlora": 2.0}
        self.fail_at: dict[int, Exception] = {}

    def __call__(self, function: str, asked: dict, **_) -> dict:
        assert function == "longreach.training.trial:measure"
        number = len(self.asked)
        self.asked.append(asked)
        if number in self.fail_at:
            raise self.fail_at[number]
        arm, optim = asked["job"]["arm"], asked["job"]["optim"]
        name = {"lora": "lora", "all": "full", "lora+embed+norm": "longlora"}[arm["tune"]]
        slow = 1 + number // 3  # the machine gets slower and slower, the same for all arms of a round
        seconds = [slow * self.seconds[name] * asked["length"] / 32] * (optim["steps"] - 1)
        return {
            "tokens": optim["global_batch_tokens"], "seconds": seconds, "peak_gib": 2.0, "predicted_s": 1.0,
            "predicted_gib": 1.5, "kernel": "sdpa",
        }  # fmt: skip

    def order(self) -> list[tuple[int, str]]:
        return [(one["length"], one["job"]["arm"]["tune"]) for one in self.asked]


@pytest.fixture
def ranks(monkeypatch: pytest.MonkeyPatch) -> Ranks:
    ranks = Ranks()
    monkeypatch.setattr(launch, "run_ranks", ranks)
    return ranks


@pytest.fixture
def stage_inputs(path: Path) -> dict:
    """What the stage is called with."""
    folder = path.parent
    spool = Spool.open(folder / "spool" / "c.jsonl", run="r", parent=None, experiment="x", name="c", kind="attempt")
    attempt = SimpleNamespace(work=folder / "1" / "work", superseded_file=folder / "superseded")
    about = describe(folder / "base")
    (folder / "out").mkdir()
    return {
        "corpus": SimpleNamespace(path=folder / "corpus"),
        "base": Artifact(folder / "base", {"summary": about}),
        "recipe": CostsStageRecipe.of(load(path).recipe),
        "resources": Resources(workers=2),
        "out": folder / "out",
        "run": SimpleNamespace(
            spool=spool, attempt=attempt, earlier=[], share=None, storage=str(folder / "ray"), note=print, waits_s=[]
        ),
    }


def test_arms_are_measured_in_turns_and_compared_within_a_round(ranks: Ranks, stage_inputs: dict) -> None:
    summary = CostsSummary.model_validate(costs(**stage_inputs))
    turn = ["lora", "all", "lora+embed+norm"]
    assert ranks.order() == [*((32, tune) for tune in turn * 2), *((64, tune) for tune in turn * 2)]
    assert summary.yardstick == "full"
    assert summary == CostsSummary.read(stage_inputs["out"])
    # the second round took twice as long, for all arms alike
    assert summary.seconds_per_1k(32, "full") == pytest.approx((1000 * 9 / 64, 1000 * 6 / 64, 1000 * 12 / 64))
    assert summary.times_as_fast(32, "longlora", "full") == (3.0, 3.0, 3.0)
    assert summary.times_as_fast(64, "lora", "full") == (2.0, 2.0, 2.0)
    assert summary.predicted(32, "full") == (1000 / 64, 1.5)
    assert [asked["job"]["optim"]["global_batch_tokens"] for asked in ranks.asked] == [64] * 6 + [128] * 6
    groups = [asked["job"]["arm"]["attention"].get("group_tokens") for asked in ranks.asked]
    assert groups == [None, None, 8] * 2 + [None, None, 16] * 2
    assert 0.6 < ranks.asked[0]["needs_gib"] < 0.7, "mostly the process itself"
    events, _ = read_events(stage_inputs["run"].spool.path)
    (at_32, at_64) = [event for event in events if "costs/times_as_fast/longlora" in event.get("values", {})]
    assert (at_32["step"], at_32["values"]["costs/times_as_fast/longlora"]) == (32, 3.0)
    assert at_64["step"] == 64


def test_an_interrupted_stage_goes_on_with_the_next_measurement(ranks: Ranks, stage_inputs: dict) -> None:
    ranks.fail_at = {4: ConnectionError("a node is gone")}
    with pytest.raises(ConnectionError):
        costs(**stage_inputs)
    ranks.fail_at = {}
    run = stage_inputs["run"]
    again = SimpleNamespace(**vars(run) | {
        "earlier": [run.attempt.work.parent],
        "attempt": SimpleNamespace(work=run.attempt.work.parents[1] / "2" / "work", superseded_file=Path("x")),
    })  # fmt: skip
    summary = CostsSummary.model_validate(costs(**stage_inputs | {"run": again}))
    assert ranks.order()[4:7] == [(32, "all"), (32, "all"), (32, "lora+embed+norm")]
    assert len(ranks.asked) == 12 + 1, "the failed one was measured again, and no other"
    assert len(summary.cells) == 12
    ranks.asked.clear()
    elsewhere = Resources(workers=2, activation_checkpointing=True)
    costs(**stage_inputs | {"run": again, "resources": elsewhere})
    assert len(ranks.asked) == 12, "what other resources gave is no measurement of these"


def test_a_stage_that_was_asked_to_stop_starts_no_further_ranks(ranks: Ranks, stage_inputs: dict) -> None:
    stop_file(stage_inputs["run"].spool.path.parent).touch()
    with pytest.raises(Stopped):
        costs(**stage_inputs)
    assert ranks.asked == []


def test_an_arm_that_does_not_fit_is_left_out_there_and_at_greater_lengths(ranks: Ranks, stage_inputs: dict) -> None:
    ranks.fail_at = {1: OutOfMemory("out of memory with 1 rows of 32 tokens")}
    summary = CostsSummary.model_validate(costs(**stage_inputs))
    assert len(ranks.asked) == 1 + 4 * 2, "full is not tried again"
    assert summary.of(32, "full") == summary.of(64, "full") == []
    assert summary.seconds_per_1k(64, "full") is None
    assert summary.times_as_fast(32, "lora", "full") is None
    assert summary.seconds_per_1k(64, "lora") is not None
    section = cost_by_length(Findings({}, costs=summary), Style.of(summary.arms))
    assert section.blocks[-2].rows == [["full", "32", "out of memory with 1 rows of 32 tokens"]]
    assert costs_in_words(summary) == ""


# ---- what ranks measure


def trial_of(tmp_path: Path, **choices) -> dict:
    todo = job(tmp_path, optim={"steps": 3, "global_batch_tokens": 128, "warmup_steps": 0})
    return {"job": todo, "length": 64, "needs_gib": 0.1} | choices


def test_a_trial_measures_its_timed_steps_at_its_own_row_length_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Checkpoints, "save", None)  # due after two steps, were it a training
    measured = run_local("longreach.training.trial:measure", trial_of(tmp_path))
    cell = CostCell(length=64, round=0, arm="full", **measured)
    assert cell.tokens == 128
    assert len(cell.seconds) == 2
    assert min(cell.seconds) > 0
    assert cell.peak_gib > 0.1
    assert cell.predicted_s > 0
    assert {path.name for path in tmp_path.iterdir()} == {"base", "corpus", "texts"}


def test_a_trial_that_would_not_fit_is_not_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial, "TrialTraining", None)
    monkeypatch.setattr(trial, "LOOKS", 2)
    measured = run_local("longreach.training.trial:measure", trial_of(tmp_path, needs_gib=1e6))
    assert measured["left_out"].startswith("rows of 64 tokens need about 1000000.0 GiB on each rank")
    assert measured["left_out"].endswith("GiB are free for it")


def test_a_trial_waits_for_memory_that_the_ranks_before_it_still_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    be_the_only_rank(gpu=False)
    free = [1.0, 3.0]
    monkeypatch.setattr(trial, "_free_gib", lambda gpu: free.pop(0))
    assert trial._wait_for_gib(2.0, gpu=False) == 3.0
    assert free == []


def test_rows_of_another_length_are_one_run_each_and_a_small_corpus_is_repeated(tmp_path: Path) -> None:
    job(tmp_path)
    write_whole_rows(tmp_path / "rows", tmp_path / "corpus", seq_len=48, rows=100)
    rows = PackedRows(tmp_path / "rows")
    assert (len(rows), rows.summary.seq_len) == (100, 48)
    batch = rows.batch([0, 99])
    assert torch.equal(batch["position_ids"], torch.arange(48).expand(2, 48))
    assert (batch["labels"][:, 1:] == batch["input_ids"][:, 1:]).all()
    assert rows.mean_document() == 48
    flat = PackedRows(tmp_path / "corpus").batch(range(3))["input_ids"].reshape(-1)
    assert torch.equal(batch["input_ids"][0], flat)


# ---- the report


def summary_of(ratio: dict[int, float]) -> CostsSummary:
    """Two arms: at each length longlora is so many times as fast as full, and a tenth more in the second round."""
    cells = []
    for length, fast in ratio.items():
        for turn in range(2):
            for arm, step_s in (("full", 8.0), ("longlora", 8.0 / fast / (1 + 0.1 * turn))):
                step = {"tokens": 4096, "seconds": (step_s, 1.1 * step_s), "peak_gib": 4.0, "kernel": "flash"}
                cells.append(CostCell(length=length, round=turn, arm=arm, predicted_s=5, predicted_gib=3, **step))
    return CostsSummary(yardstick="full", steps=2, rounds=2, ranks=2, cells=tuple(cells))


def test_the_report_draws_time_and_memory_by_length_and_says_the_ratio_at_the_greatest() -> None:
    measured = summary_of({1024: 1.0, 16384: 2.0})
    assert costs_in_words(measured) == (
        "At rows of 16,384 tokens, speed as a multiple of full's: longlora 2.10 (2.00 to 2.20)."
    )
    section = cost_by_length(Findings({}, costs=measured), Style.of(["base", "full", "longlora"]))
    text, times, ratios, memory, figures = section.blocks
    assert text.startswith(costs_in_words(measured))
    assert times.rows[0][0] == "full\nattention by flash"
    assert "Disturbed" not in text
    assert ratios.rows[1][1:] == ["1.05 ×\n1 to 1.1", "2.1 ×\n2 to 2.2"]
    assert ratios.rows[0][1:] == ["1 ×", "1 ×"]
    assert memory.rows[1][1:] == ["4", "4"]
    values = figures[0].vega_lite["datasets"] if "datasets" in figures[0].vega_lite else figures[0].vega_lite
    assert "longlora, predicted" in json.dumps(values)
    assert [figure.file for figure in figures] == ["costs-time.png", "costs-memory.png"]
    assert cost_by_length(Findings({}), Style.of([])) is None


def test_steps_that_other_work_has_slowed_are_said_to_be_disturbed() -> None:
    quiet = summary_of({1024: 1.0, 2048: 1.0})
    slow = quiet.cells[0].model_copy(update={"seconds": (8.0, 12.5)})
    measured = quiet.model_copy(update={"cells": (slow, *quiet.cells[1:])})
    text = cost_by_length(Findings({}, costs=measured), Style.of([])).blocks[0]
    assert (
        "took more than 1.5 times as long as the fastest): full at 1,024; to measure again, run with --force costs"
        in text
    )


def test_the_plan_says_what_measuring_will_cost(path: Path) -> None:
    converted = Artifact(path.parent / "base", {"summary": describe(path.parent / "base")})
    recipe = load(path).recipe
    machine = {"matmul": 1e9, "attention": 1e9, "attention_backward": 1e9, "bytes": 1e9, "process_gib": 0.5}
    trained = {"published_at": "now", "resources": recipe.resources.model_dump(mode="json"),
               "summary": training_summary(machine=machine).to_json()}  # fmt: skip
    for manifests, says in (([], "; no time estimate before an arm has"), ([trained], "s of training, plus as many")):
        store = SimpleNamespace(find=lambda *_: converted, manifests=lambda name, found=manifests: found)
        sentence = foresee(store, build(recipe), recipe.resources)["costs"].sentence
        assert sentence.startswith("12 times 3 steps, at most about 1."), sentence
        assert "GiB on 2 ranks" in sentence
        assert says in sentence


def test_speeds_elsewhere_in_the_report_are_those_measured_in_turns_if_rows_are_as_long() -> None:
    def arm(name: str, tokens_per_s: float) -> Model:
        return Model(name, "finetune", "", of=name, summary=SimpleNamespace(tokens_per_s=tokens_per_s))

    full, longlora = arm("full", 100.0), arm("longlora", 66.0)  # disturbed: LongLoRA seems to be slower
    packs = {"pack": PackSummary.model_construct(seq_len=1024)}
    assert Findings({}, packs=packs).speedup(longlora, full) == (0.66, 0.66, 0.66)
    found = Findings({}, packs=packs, costs=summary_of({1024: 1.4}))
    assert found.speedup(longlora, full) == pytest.approx((1.47, 1.4, 1.54))
    other = Findings({}, packs=packs, costs=summary_of({2048: 1.4}))
    assert other.speedup(longlora, full) == (0.66, 0.66, 0.66)


@pytest.mark.slow
def test_the_whole_chain_measures_two_arms_at_two_lengths_and_the_report_draws_them(path: Path) -> None:
    command = [sys.executable, "-m", "longreach.pipelines", "run", str(path), "--set", "costs.steps=1"]
    command += ["--set", "costs.arms=[full, longlora]"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    store = Store(str(path.parent / ".longreach"))
    (manifest,) = store.manifests("costs")
    measured = CostsSummary.model_validate(manifest["summary"])
    assert [(cell.length, cell.round, cell.arm) for cell in measured.cells][:4] == [
        (32, 0, "full"), (32, 0, "longlora"), (32, 1, "full"), (32, 1, "longlora"),
    ]  # fmt: skip
    assert all(cell.seconds and not cell.left_out for cell in measured.cells)
    (page,) = store.manifests("report")
    folder = store.fetch("report", page["fingerprint"]).path
    assert "## Cost by row length" in (folder / "report.md").read_text()
    assert (folder / "costs-time.png").stat().st_size > 1000
    assert Recipe.model_validate(load(path).recipe.model_dump()) == load(path).recipe
