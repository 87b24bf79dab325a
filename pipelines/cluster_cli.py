"""Commands for runs that start elsewhere or later: submit, jobs, logs, stop, schedule.

longreach submit quickstart --address http://HOST:8265 --dry-run
"""

from __future__ import annotations

import contextlib
import json
import sys
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from longreach.pipelines.console import (
    FAILED,
    Overrides,
    RecipeName,
    load,
    option_groups,
    print_table,
    run_recipe,
    show_plan,
)

if TYPE_CHECKING:
    from longreach.infra.kubernetes import Place
    from longreach.pipelines.recipe import Recipe

app = typer.Typer()

Address = Annotated[
    str, typer.Option(metavar="URL", envvar="RAY_API_SERVER_ADDRESS", help="The cluster's dashboard, http://HOST:8265.")
]
JobId = Annotated[str, typer.Argument(metavar="ID", help="As submit printed it; jobs lists all.")]
Follow = Annotated[bool, typer.Option("--follow", "-f", help="Until the job ends, with its exit code.")]


@dataclass(frozen=True)
class PodOptions:
    """Options about the pods of a cluster that Kubernetes starts for one run."""

    image: Annotated[str | None, typer.Option(help="Kubernetes: holds longreach and Ray.")] = None
    namespace: Annotated[str, typer.Option(help="Kubernetes.")] = "longreach"
    memory: Annotated[str, typer.Option(help="Kubernetes: of one rank's pod.")] = "8Gi"


@dataclass(frozen=True)
class KubernetesOptions(PodOptions):
    """Options about what a Kubernetes cluster offers beside pods."""

    claim: Annotated[str | None, typer.Option(help="Kubernetes: a ReadWriteMany claim for the run's folder.")] = None
    queue: Annotated[str | None, typer.Option(help="Kubernetes: Kueue's LocalQueue.")] = None
    gpu_nodes: Annotated[
        list[str] | None, typer.Option("--gpu-node", metavar="LABEL=VALUE", help="Kubernetes: nodes with GPUs.")
    ] = None


@dataclass(frozen=True)
class TimingOptions:
    """Options about when a scheduled run starts."""

    cron: Annotated[str, typer.Option(help="Five fields, e.g. '0 3 * * 1': Mondays at three.")]
    tz: Annotated[str, typer.Option(help="The zone whose clock that is, e.g. Europe/Berlin.")] = "UTC"
    max_start_delay: Annotated[str | None, typer.Option(help="Do not start at all if later than this, e.g. 2h.")] = None
    env_file: Annotated[
        Path | None, typer.Option(help="systemd, crontab: a file of NAME=value lines with keys and passwords.")
    ] = None


@dataclass(frozen=True)
class PackageOptions:
    """Options about what a submitted run finds on the cluster."""

    install: Annotated[
        bool, typer.Option("--install", help="Let the cluster install this environment's versions first.")
    ] = False
    shared_disk: Annotated[
        bool, typer.Option("--shared-disk", help="Every node has this machine's folders under the same paths.")
    ] = False


@app.command()
@option_groups
def schedule(
    recipe: RecipeName,
    timing: TimingOptions,
    to: Annotated[str, typer.Option(help="ray-cronjob, cronjob, systemd or crontab.")] = "systemd",
    overrides: Overrides = None,
    enable: Annotated[bool, typer.Option("--enable", help="Kubernetes: not suspended.")] = False,
    out: Annotated[Path | None, typer.Option(help="A folder for the files; without it they are printed.")] = None,
    kubernetes: KubernetesOptions = KubernetesOptions(),
    run_now: Annotated[bool, typer.Option("--run", help="Run, if the last fire time is not too long ago.")] = False,
    address: Annotated[str | None, typer.Option(help="With --run: a Ray cluster.")] = None,
) -> None:
    """Show when a cron line fires, and print the files that start a recipe then."""
    from longreach.infra.jobs import whereabouts
    from longreach.infra.schedule import Job, Schedule, render
    from longreach.pipelines.plan import check_rules, check_scheduled

    loaded = load(recipe, overrides)
    times = Schedule.parse(timing.cron, timing.tz, timing.max_start_delay)
    if run_now:
        late = times.late_by(datetime.now(UTC))
        if times.max_start_delay and late > times.max_start_delay:
            fired = f"{timing.cron!r} fired {str(late).partition('.')[0]} ago"
            print(f"not run: {fired}, max_start_delay is {timing.max_start_delay}", file=sys.stderr)
            return
        run_recipe(loaded, address=address, wait=False, quiet=True)
        return
    if to.endswith("cronjob"):
        paths = loaded.recipe.local_paths()
        del paths["store.root"], paths["store.workdir"]  # pods have a folder of their own
        whereabouts("the cluster", paths, shared_disk=kubernetes.claim is not None, option="--claim")
        check_rules(loaded.recipe, cluster="the cluster", driver_here=False)
    else:
        check_scheduled(loaded.recipe, driver_here=timing.env_file is None)
    job = Job(
        name=loaded.recipe.name,
        recipe=str(loaded.path.absolute()),
        overrides=tuple(overrides or ()),
        program=Path(sys.executable).with_name("longreach"),
        folder=Path.cwd(),
        text=loaded.path.read_text(encoding="utf-8"),
        resources=loaded.recipe.resources,
        store_root=loaded.recipe.store.root,
        env_file=timing.env_file.absolute() if timing.env_file else None,
    )
    files = render(times, job, to, _place(kubernetes), enable=enable)
    for time in times.next(5, to):
        print(f"fires {time:%a %Y-%m-%d %H:%M %z}", file=sys.stderr)
    for name, text in files.items():
        if out is None:
            print(text, end="")
            continue
        out.mkdir(parents=True, exist_ok=True)
        (out / name).write_text(text, encoding="utf-8")
        print(out / name)


@app.command()
@option_groups
def submit(
    recipe: RecipeName,
    address: Address = "",
    overrides: Overrides = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    follow: Follow = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print as JSON what would be sent; send nothing.")] = False,
    package: PackageOptions = PackageOptions(),
    with_plan: Annotated[
        bool,
        typer.Option("--plan/--no-plan", help="Ask the store what is done; no, where only the cluster reaches it."),
    ] = True,
    to: Annotated[
        str | None, typer.Option("--render", metavar="k8s", help="Print a RayJob's manifest instead.")
    ] = None,
    pods: PodOptions = PodOptions(),
) -> None:
    """Send a run to a Ray cluster; prints the job's id. What it will do and cost is shown
    before."""
    from longreach.infra import jobs
    from longreach.infra.kubernetes import WORKDIR
    from longreach.pipelines.plan import check_rules

    loaded = load(recipe, overrides)
    if to not in (None, "k8s"):
        raise ValueError(f"--render {to!r}: there is k8s")
    if not (address or to):
        raise ValueError("--address is missing, the dashboard of a Ray cluster: http://HOST:8265")
    url = to or jobs.check_address(address)
    cluster, workdir = f"the cluster at {url}", jobs.WORKDIR
    if to:
        cluster, workdir = "the cluster", WORKDIR
    places = jobs.whereabouts(url, loaded.recipe.local_paths(), shared_disk=package.shared_disk, workdir=workdir)
    check_rules(loaded.recipe, cluster=cluster, driver_here=False)
    changed = [f"{field}={json.dumps(path)}" for field, path in places.items()]
    submission = jobs.Submission(
        name=loaded.recipe.name,
        recipe=loaded.path.read_bytes(),
        overrides=(*(overrides or ()), *changed),
        pip=jobs.pinned() if package.install else (),
    )
    if to:
        print(jobs.manifest(submission, loaded.recipe.resources, _place(pods)), end="")
        return
    if not (yes or dry_run or sys.stdin.isatty()):
        raise ValueError("submit asks before it spends, and nobody is there to answer: add --yes (or --dry-run)")
    plan: dict[str, Any] = {}
    with contextlib.redirect_stdout(sys.stderr):  # the id alone goes to stdout
        if with_plan:
            plan["plan"] = [asdict(row) for row in show_plan(loaded, here=False)]
        print(_ranks(loaded.recipe))
    if dry_run:
        print(submission.as_json(url, **plan))
        return
    if not yes and not typer.confirm(f"submit to {url}?", err=True):
        raise typer.Exit(FAILED)
    with jobs.job_client(url) as client:
        job = jobs.submit(client, submission)
        print(job, flush=True)
        code = jobs.follow(client, job) if follow else 0
    raise typer.Exit(code)


@app.command("jobs")
def list_jobs(address: Address) -> None:
    """List the jobs of a Ray cluster, the newest first, with their drivers' exit codes."""
    from longreach.infra import jobs
    from longreach.pipelines.display import duration

    with jobs.job_client(address) as client:
        listed = jobs.listed(client)
    rows = []
    for job in listed:
        started = took = code = ""
        if job.start_time:  # in milliseconds; Ray has none before the job starts
            began_s = job.start_time / 1000
            ended_s = job.end_time / 1000 if job.end_time else datetime.now().timestamp()
            started = f"{datetime.fromtimestamp(began_s):%Y-%m-%d %H:%M}"
            took = duration(ended_s - began_s)
        if job.driver_exit_code is not None:
            code = str(job.driver_exit_code)
        name = (job.metadata or {}).get("recipe", "")
        rows.append([job.submission_id, name, job.status.value, code, started, took])
    columns = ["job", "recipe", "status", "exit", "started", "took"]
    print_table(columns, rows, {"RUNNING": "bold", "FAILED": "red"})


@app.command()
def logs(job: JobId, address: Address, follow: Follow = False) -> None:
    """Print what a job has written so far; with --follow until it ends, with its exit code."""
    from longreach.infra import jobs

    with jobs.job_client(address) as client:
        if not follow:
            print(client.get_job_logs(job), end="")
            return
        code = jobs.follow(client, job)
    raise typer.Exit(code)


@app.command()
def stop(job: JobId, address: Address) -> None:
    """Ask a job to stop: its training writes checkpoints first; submitting it again resumes."""
    from longreach.infra import jobs

    with jobs.job_client(address) as client:
        asked = client.stop_job(job)
    print(f"{job} was asked to stop" if asked else f"{job} was over already")


def _place(options: PodOptions) -> Place:
    """Return what Kubernetes has to know; what no option names is as Place has it."""
    from longreach.infra.kubernetes import Place

    named = {name: value for name, value in asdict(options).items() if value is not None}
    if "gpu_nodes" in named:
        labels = {}
        for text in named["gpu_nodes"]:
            name, equals, value = text.partition("=")
            if not equals or not name:
                raise ValueError(f"--gpu-node {text!r}: write it as NAME=VALUE")
            labels[name] = value
        named["gpu_nodes"] = labels
    return Place(**named)


def _ranks(recipe: Recipe) -> str:
    wanted = recipe.resources
    each = f"CPUs each: {wanted.cpus_per_worker}, GPUs: {wanted.gpus_per_worker}"
    training = f"training ranks: {wanted.workers} ({each}), ZeRO {wanted.zero_stage}, {wanted.dtype}"
    return f"{training}; CPUs of an evaluation: {wanted.eval_cpus}"
