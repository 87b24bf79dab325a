"""Send a run to a Ray cluster through Ray's Jobs API, and look after it: follow, list, stop.

What is sent is a folder made for it: the sources of the rooms named in ROOMS and the recipe's file,
about 1 MB; no checkout, artifact or file with a password. The cluster runs `python -m
longreach.pipelines run` there, which may be submitted again at any time: what is published is
reused, what is half done resumed, and a second run of a live recipe exits 75.

No environment variable of this machine is sent, since the dashboard shows a job's environment: the
store's and MLflow's credentials belong to the cluster's pods (envFrom a Secret).

    print(Submission("demo", b"name: demo", ("finetune.steps=2",)).as_json("http://127.0.0.1:8265"))
"""

import asyncio
import contextlib
import ipaddress
import json
import logging
import os
import re
import shlex
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from longreach.infra import kubernetes
from longreach.infra.choices import refuse_password
from longreach.infra.resources import Resources
from longreach.infra.versions import installed

ROOMS = ("attention", "infra", "training", "evaluation", "pipelines")
SUFFIXES = (".py", ".yaml", ".tmpl", ".jinja")
RECIPE = "recipe.yaml"
WORKDIR = "/tmp/longreach"
"""store.workdir on a cluster: the job's own folder is deleted with the job."""
AGENT_PORT = 52365
"""Where Ray's dashboard agent listens, unless `ray start` names another port."""
PATIENCE_S = 60
"""Seconds that a stopped driver has before it is killed; Ray's own 3 are too few to write
checkpoints."""


@dataclass(frozen=True)
class Submission:
    """What is sent to the cluster, and nothing else. Raises ValueError: it holds a password."""

    name: str
    recipe: bytes
    """Content of the recipe's file."""
    overrides: tuple[str, ...] = ()
    pip: tuple[str, ...] = ()
    """What the cluster installs for the job; empty: its image has it."""

    def __post_init__(self) -> None:
        for word in " ".join([*self.overrides, self.recipe.decode()]).split():
            refuse_password(
                word,
                "{user}:...@ holds a password, which Ray's dashboard shows to everyone who may see it: leave it out, "
                "and give user and password to the cluster's pods as environment variables",
            )

    def run(self, recipe: str, *program: str) -> list[str]:
        """Return the driver's command, which never waits for another run of the recipe."""
        sets = [word for text in self.overrides for word in ("--set", text)]
        return [*program, "run", recipe, *sets, "--address", "auto", "--no-wait"]

    @property
    def entrypoint(self) -> str:
        """The command for Ray's shell; with `exec`, signals and the exit code are the driver's, not
        the shell's."""
        return "exec " + shlex.join(self.run(RECIPE, "python", "-m", "longreach.pipelines"))

    def files(self) -> dict[str, bytes]:
        """Return content by path in the job's folder: the recipe, and the package `longreach`."""
        root = Path(__file__).parents[1]
        sources = [root / "__init__.py"]
        for room in ROOMS:
            sources += [path for path in sorted((root / room).rglob("*")) if path.suffix in SUFFIXES]
        package = {f"longreach/{path.relative_to(root).as_posix()}": path.read_bytes() for path in sources}
        return {RECIPE: self.recipe, **package}

    def runtime_env(self, folder: str) -> dict[str, Any]:
        """Return the job's environment in Ray's form; `folder` holds its files."""
        env = {"RAY_JOB_STOP_WAIT_TIME_S": str(PATIENCE_S)}
        runtime_env: dict[str, Any] = {"working_dir": folder, "env_vars": env}
        if self.pip:
            runtime_env["pip"] = list(self.pip)
        return runtime_env

    def metadata(self) -> dict[str, str]:
        return {"recipe": self.name, "longreach": installed("longreach") or "unknown"}

    def as_json(self, address: str, **more: Any) -> str:
        """Return everything that would be sent as JSON, with sizes in place of files."""
        files = {path: len(content) for path, content in self.files().items()}
        shown = {"address": address, "entrypoint": self.entrypoint, "metadata": self.metadata()}
        shown |= {"runtime_env": self.runtime_env(f"{len(files)} files, {sum(files.values()):,} bytes")}
        return json.dumps({**shown, "files": files, **more}, indent=1)


def whereabouts(
    address: str, local: dict[str, str], *, shared_disk: bool, workdir: str = WORKDIR, option: str = "--shared-disk"
) -> dict[str, str]:
    """Return what to set, by field, so that a driver elsewhere finds the files that the recipe
    names. Raises ValueError: one of them is a folder of this machine, which the cluster does not
    see.

    Args:
        local: fields that may name a file or folder: `store.root`, `corpus.sources.0.files`, ...
        shared_disk: the cluster sees this machine's disk under the same paths; a loopback address
            says so, too.
        workdir: what a relative store.workdir becomes on another machine.
        option: the command's option that means `shared_disk`, for messages.
    """
    ours = {field: path for field, path in local.items() if "://" not in path}
    sees = shared_disk or _is_loopback(address)
    places = {}
    for field, path in ours.items():
        if field == "store.workdir" and not sees:
            places[field] = path if Path(path).is_absolute() else workdir
        elif not sees:
            fix = "use a package, a dataset or s3://"
            if field == "store.root":
                fix = "--set store.root=s3://bucket/prefix"
            raise ValueError(
                f"{field} {path!r} is on this machine, which {address} does not see: {fix}, or say {option} if "
                "every node of the cluster has it under that path"
            )
        elif field.startswith("store."):
            places[field] = str(Path(path).absolute())
        elif not Path(path).is_absolute():  # made absolute here it would be another choice, with another fingerprint
            raise ValueError(f"{field} {path!r}: a job runs in a folder of its own: write the whole path in the recipe")
    return {field: path for field, path in places.items() if path != ours[field]}


def manifest(submission: Submission, resources: Resources, place: kubernetes.Place) -> str:
    """Return a RayJob and its recipe for `kubectl`. Raises ValueError: the operator would refuse
    it."""
    name = kubernetes.dns_name(submission.name)
    job = kubernetes.ray_job(name, submission.run(kubernetes.RECIPE_FILE, "longreach"), resources, place)
    if problems := kubernetes.check(job):
        raise ValueError("\n".join(problems))
    return kubernetes.dump([kubernetes.recipe_map(name, submission.recipe.decode(), place), job])


def pinned() -> tuple[str, ...]:
    """Return all packages that longreach needs, theirs too, with versions pinned as here, without
    `+cpu`."""
    from packaging.requirements import Requirement

    versions: dict[str, str] = {}
    seen: set[str] = set()
    pending = [Requirement("longreach")]
    while pending:
        package = pending.pop()
        version = installed(package.name)
        if str(package) in seen or version is None:
            continue
        seen.add(str(package))
        versions[package.name.lower().replace("_", "-")] = version.partition("+")[0]
        for needed in map(Requirement, metadata.requires(package.name) or ()):
            if needed.marker is None or any(needed.marker.evaluate({"extra": e}) for e in ("", *package.extras)):
                pending.append(needed)
    del versions["longreach"]  # the job brings its code along
    return tuple(f"{name}=={version}" for name, version in sorted(versions.items()))


# ---- the cluster


def check_address(address: str) -> str:
    """Return a dashboard's address: http://head:8265 for `head`. Raises ValueError: another
    kind."""
    if "://" not in address:
        address = f"http://{address}" if ":" in address else f"http://{address}:8265"
    address = address.rstrip("/")
    parts = urlsplit(address)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.username or parts.hostname == "auto":
        raise ValueError(
            f"address {address!r}: write the dashboard's, http://HOST:8265 (a tunnel: http://127.0.0.1:8265)"
        )
    return address


def _is_loopback(address: str) -> bool:
    host = urlsplit(address).hostname or ""
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"


def token() -> tuple[str | None, str]:
    """Return (the token, its source) as Ray looks for it. Raises ValueError: an unreadable
    RAY_AUTH_TOKEN_PATH."""
    if os.environ.get("RAY_AUTH_MODE") == "disabled":
        return None, "RAY_AUTH_MODE=disabled"
    if given := os.environ.get("RAY_AUTH_TOKEN", "").strip():
        return given, "RAY_AUTH_TOKEN"
    path = os.environ.get("RAY_AUTH_TOKEN_PATH")
    file = Path(path).expanduser() if path else Path.home() / ".ray" / "auth_token"
    try:
        if content := file.read_text().strip():
            return content, str(file)
    except OSError as error:
        if path:
            raise ValueError(f"RAY_AUTH_TOKEN_PATH {path}: {error.strerror}: name the file of Ray's token") from None
    return None, f"no RAY_AUTH_TOKEN, and no token in {file}"


@contextlib.contextmanager
def job_client(address: str) -> Iterator[Any]:
    """Give the block a JobSubmissionClient. Raises ValueError: no answer, or what we send is
    refused."""
    address = check_address(address)
    given, source = token()
    headers, what = None, f"a request without a token ({source})"
    if given:
        headers, what = {"Authorization": f"Bearer {given}"}, f"the token of {source}"
    if given and address.startswith("http://") and not _is_loopback(address):
        print(f"Ray's token goes to {address} unencrypted: use https, or an SSH tunnel and 127.0.0.1", file=sys.stderr)
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    for name in ("dashboard.modules.dashboard_sdk", "dashboard.modules.job.sdk", "_private.runtime_env.packaging"):
        logging.getLogger(f"ray.{name}").setLevel(logging.WARNING)

    try:
        with _winning(address):
            client = JobSubmissionClient(address, headers=headers)
        yield client
    except AuthenticationError:
        raise ValueError(
            f"Ray at {address} refuses {what}: put the cluster's token into RAY_AUTH_TOKEN, or its file's path into "
            "RAY_AUTH_TOKEN_PATH"
        ) from None
    except ConnectionError as error:
        raise ValueError(f"no Ray dashboard answers at {address}: is the cluster, or the tunnel to it, up?") from error
    except RuntimeError as error:
        refusal = re.search(r"status code ([45]\d\d): (.*)", str(error), re.DOTALL)
        if refusal is None:
            raise
        why = f"Ray at {address}: {(refusal[2].strip() or 'no reason').splitlines()[-1]} (HTTP {refusal[1]})"
        if refusal[1].startswith("5"):  # jobs are started by the agent, which a second Ray of a machine may lack
            why += (
                f"; its head may lack the dashboard's agent: where another Ray runs on that machine, port {AGENT_PORT} "
                f"is taken; start the head with ray start --dashboard-agent-listen-port and a free port"
            )
        raise ValueError(why) from error


@contextlib.contextmanager
def _winning(address: str) -> Iterator[None]:
    """Make `address` win: Ray prefers two variables to the address that its client is given."""
    variable = "RAY_API_SERVER_ADDRESS"  # it is preferred to the other one, RAY_ADDRESS
    before = os.environ.get(variable)
    os.environ[variable] = address
    try:
        yield
    finally:
        if before is None:
            del os.environ[variable]
        else:
            os.environ[variable] = before


def submit(client: Any, submission: Submission) -> str:
    """Send a job; return its id at once, while the cluster unpacks (and installs)."""
    with tempfile.TemporaryDirectory(prefix="longreach-submit-") as folder:
        for path, content in submission.files().items():
            target = Path(folder, path)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content)
        env, about = submission.runtime_env(folder), submission.metadata()
        return client.submit_job(entrypoint=submission.entrypoint, runtime_env=env, metadata=about)


def follow(client: Any, job: str) -> int:
    """Print a job's whole log until it ends; return its exit code. Raises ValueError: the
    connection broke."""

    async def lines() -> None:
        async for text in client.tail_job_logs(job):
            print(text, end="", flush=True)

    import aiohttp

    client.get_job_status(job)  # raises if there is no such job; the log would merely be empty
    try:
        asyncio.run(lines())
    except KeyboardInterrupt:
        print(f"\nthe job goes on; to end it: longreach stop {job}", file=sys.stderr)
        raise
    except (aiohttp.ClientError, RuntimeError) as error:
        raise ValueError(f"the log broke off ({error}); the job goes on: longreach logs {job} --follow") from error
    return ended(client, job)


def ended(client: Any, job: str) -> int:
    """Return the exit code of a job that is over; print on stderr why it failed."""
    details = client.get_job_info(job)
    status = details.status.value
    if status == "SUCCEEDED":
        return 0
    why = (details.message or "").partition(", last available logs")[0].partition("\n")[0]  # the log was just printed
    print(f"{job} {status}: {why}", file=sys.stderr)
    return details.driver_exit_code or 1


def listed(client: Any) -> list[Any]:
    """Return Ray's JobDetails of every submitted job, the newest first."""
    return sorted((job for job in client.list_jobs() if job.submission_id), key=lambda job: -(job.start_time or 0))
