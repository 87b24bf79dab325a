"""Commands for remote and scheduled runs: submit, jobs, logs, stop, schedule.

longreach submit quickstart --address http://HOST:8265 --dry-run
"""

from __future__ import annotations

import contextlib
import json
import sys
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

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
    str,
    typer.Option(
        metavar="URL", envvar="RAY_API_SERVER_ADDRESS", help="URL of the Ray cluster's dashboard, http://HOST:8265."
    ),
]
JobId = Annotated[str, typer.Argument(metavar="ID", help="Job id, which `submit` prints and `jobs` lists.")]
Follow = Annotated[
    bool, typer.Option("--follow", "-f", help="Follow the logs until the job ends, and exit with its exit code.")
]


@dataclass(frozen=True)
class PodOptions:
    """Options for the pods of a cluster that Kubernetes starts for one run."""

    image: Annotated[str | None, typer.Option(help="Kubernetes: container image with longreach and Ray.")] = None
    namespace: Annotated[str, typer.Option(help="Kubernetes: namespace.")] = "longreach"
    memory: Annotated[str, typer.Option(help="Kubernetes: memory of each rank's pod.")] = "8Gi"


@dataclass(frozen=True)
class KubernetesOptions(PodOptions):
    """Pod options, and options for storage, queue and nodes of a Kubernetes cluster."""

    claim: Annotated[
        str | None, typer.Option(help="Kubernetes: ReadWriteMany PersistentVolumeClaim for the run's folder.")
    ] = None
    queue: Annotated[str | None, typer.Option(help="Kubernetes: name of Kueue's LocalQueue.")] = None
    gpu_nodes: Annotated[
        list[str] | None,
        typer.Option("--gpu-node", metavar="LABEL=VALUE", help="Kubernetes: label of nodes with GPUs. Repeatable."),
    ] = None


@dataclass(frozen=True)
class TimingOptions:
    """Options for when a scheduled run starts, and with which environment."""

    cron: Annotated[str, typer.Option(help="Cron expression of five fields, e.g. '0 3 * * 1' for Mondays at 03:00.")]
    tz: Annotated[str, typer.Option(help="Time zone of the cron expression, e.g. Europe/Berlin.")] = "UTC"
    max_start_delay: Annotated[
        str | None, typer.Option(help="Skip a run that would start later than this after its time, e.g. 2h.")
    ] = None
    env_file: Annotated[
        Path | None, typer.Option(help="systemd and crontab: file of NAME=value lines with keys and passwords.")
    ] = None


@dataclass(frozen=True)
class PackageOptions:
    """Options for what a submitted run finds on the cluster."""

    install: Annotated[
        bool, typer.Option("--install", help="Install this environment's package versions on the cluster first.")
    ] = False
    shared_disk: Annotated[
        bool, typer.Option("--shared-disk", help="Assume that every node has this machine's folders at the same paths.")
    ] = False


@app.command()
@option_groups
def schedule(
    recipe: RecipeName,
    timing: TimingOptions,
    to: Annotated[
        Literal["ray-cronjob", "cronjob", "systemd", "crontab"], typer.Option(help="Target scheduler.")
    ] = "systemd",
    overrides: Overrides = None,
    enable: Annotated[
        bool, typer.Option("--enable", help="Kubernetes: create the schedule active instead of suspended.")
    ] = False,
    out: Annotated[Path | None, typer.Option(help="Folder to write the files to. Default: print them.")] = None,
    kubernetes: KubernetesOptions = KubernetesOptions(),
    run_now: Annotated[
        bool, typer.Option("--run", help="Run the recipe now, unless --max-start-delay has passed since its time.")
    ] = False,
    address: Annotated[str | None, typer.Option(help="With --run: address of a Ray cluster.")] = None,
) -> None:
    """Print the files that run a recipe on a schedule, and show the next fire times."""
    from longreach.infra.jobs import whereabouts
    from longreach.infra.schedule import Job, Schedule, render
    from longreach.pipelines.plan import check_rules, check_scheduled

    loaded = load(recipe, overrides)
    times = Schedule.parse(timing.cron, timing.tz, timing.max_start_delay)
    if run_now:
        late = times.late_by(datetime.now(UTC))
        if times.max_start_delay and late > times.max_start_delay:
            fired = f"{timing.cron!r} fired {str(late).partition('.')[0]} ago"
            print(f"skipped: {fired}, but --max-start-delay is {timing.max_start_delay}", file=sys.stderr)
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
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Submit without asking for confirmation.")] = False,
    follow: Follow = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the submission as JSON without sending it.")
    ] = False,
    package: PackageOptions = PackageOptions(),
    with_plan: Annotated[
        bool,
        typer.Option("--plan/--no-plan", help="Show the plan first. Use --no-plan if only the cluster has the store."),
    ] = True,
    to: Annotated[
        str | None, typer.Option("--render", metavar="k8s", help="Print a RayJob manifest instead of submitting.")
    ] = None,
    pods: PodOptions = PodOptions(),
) -> None:
    """Submit a run to a Ray cluster, after showing its plan and cost, and print the job id."""
    from longreach.infra import jobs
    from longreach.infra.kubernetes import WORKDIR
    from longreach.pipelines.plan import check_rules

    loaded = load(recipe, overrides)
    if to not in (None, "k8s"):
        raise ValueError(f"--render {to!r}: the only target is k8s")
    if not (address or to):
        raise ValueError("--address is missing: give the URL of a Ray cluster's dashboard, http://HOST:8265")
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
        raise ValueError("submit asks for confirmation, but stdin is not a terminal: add --yes (or --dry-run)")
    plan: dict[str, Any] = {}
    with contextlib.redirect_stdout(sys.stderr):  # stdout gets only the job id
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
    """List the jobs of a Ray cluster, newest first, with their drivers' exit codes."""
    from longreach.infra import jobs
    from longreach.pipelines.display import duration

    with jobs.job_client(address) as client:
        listed = jobs.listed(client)
    rows = []
    for job in listed:
        started = took = code = ""
        if job.start_time:  # in milliseconds; None before the job starts
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
    """Print a job's logs so far; with --follow, until it ends."""
    from longreach.infra import jobs

    with jobs.job_client(address) as client:
        if not follow:
            print(client.get_job_logs(job), end="")
            return
        code = jobs.follow(client, job)
    raise typer.Exit(code)


@app.command()
def stop(job: JobId, address: Address) -> None:
    """Ask a job to write checkpoints and stop; submit it again to resume."""
    from longreach.infra import jobs

    with jobs.job_client(address) as client:
        asked = client.stop_job(job)
    print(f"{job} was asked to stop" if asked else f"{job} had already ended")


def _place(options: PodOptions) -> Place:
    """Return the options for Kubernetes; those that were not given keep Place's defaults."""
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
