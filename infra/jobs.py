"""Submit a run to a Ray cluster through Ray's Jobs API, and follow or list such jobs.

The submission is a folder made for the job with the source packages in PACKAGES and the recipe file,
about 1 MB. It contains no checkout, no artifact and no file with a password. The cluster runs
`python -m longreach.pipelines run` there. A job may be submitted again at any time: published stages
are reused, unfinished ones are resumed, and a second run of a recipe whose run is live exits with 75.

No environment variable of this machine is sent, since the dashboard shows a job's environment. The
cluster's pods have to supply the credentials of the store and MLflow (envFrom a Secret).

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
import time
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

PACKAGES = ("attention", "infra", "training", "evaluation", "pipelines")
SUFFIXES = (".py", ".yaml", ".tmpl", ".jinja")
RECIPE = "recipe.yaml"
WORKDIR = "/tmp/longreach"
"""store.workdir on a cluster. The job's own folder is unsuitable, since it is deleted with the job."""
AGENT_PORT = 52365
"""The port of Ray's dashboard agent, unless `ray start` names another one."""
FOLLOW_AGAIN_S = 1.0
PATIENCE_S = 60
"""Seconds between stopping a driver and killing it. Ray's default of 3 is too short to write
checkpoints."""


@dataclass(frozen=True)
class Submission:
    """Everything that is sent to the cluster. Raises ValueError if it contains a password."""

    name: str
    recipe: bytes
    """The content of the recipe file."""
    overrides: tuple[str, ...] = ()
    pip: tuple[str, ...] = ()
    """The packages that the cluster installs for the job; empty if its image has them."""

    def __post_init__(self) -> None:
        for word in " ".join([*self.overrides, self.recipe.decode()]).split():
            refuse_password(
                word,
                "{user}:...@ holds a password, which Ray's dashboard shows to all of its users: leave it out, "
                "and give user and password to the cluster's pods as environment variables",
            )

    def run(self, recipe: str, *program: str) -> list[str]:
        """Return the driver's command, which never waits for another run of the recipe."""
        sets = [word for text in self.overrides for word in ("--set", text)]
        return [*program, "run", recipe, *sets, "--address", "auto", "--no-wait"]

    @property
    def entrypoint(self) -> str:
        """The command for Ray's shell. With `exec`, the driver replaces the shell, so that signals reach
        the driver and the exit code is the driver's."""
        return "exec " + shlex.join(self.run(RECIPE, "python", "-m", "longreach.pipelines"))

    def files(self) -> dict[str, bytes]:
        """Return the job's files as path -> content: the recipe and the package `longreach`."""
        root = Path(__file__).parents[1]
        sources = [root / "__init__.py"]
        for package in PACKAGES:
            sources += [path for path in sorted((root / package).rglob("*")) if path.suffix in SUFFIXES]
        contents = {f"longreach/{path.relative_to(root).as_posix()}": path.read_bytes() for path in sources}
        return {RECIPE: self.recipe, **contents}

    def runtime_env(self, folder: str) -> dict[str, Any]:
        """Return the job's `runtime_env` for Ray; `folder` holds its files."""
        env = {"RAY_JOB_STOP_WAIT_TIME_S": str(PATIENCE_S)}
        runtime_env: dict[str, Any] = {"working_dir": folder, "env_vars": env}
        if self.pip:
            runtime_env["pip"] = list(self.pip)
        return runtime_env

    def metadata(self) -> dict[str, str]:
        return {"recipe": self.name, "longreach": installed("longreach") or "unknown"}

    def as_json(self, address: str, **more: Any) -> str:
        """Return everything that would be sent as JSON, with file sizes in place of contents."""
        files = {path: len(content) for path, content in self.files().items()}
        shown = {"address": address, "entrypoint": self.entrypoint, "metadata": self.metadata()}
        shown |= {"runtime_env": self.runtime_env(f"{len(files)} files, {sum(files.values()):,} bytes")}
        return json.dumps({**shown, "files": files, **more}, indent=1)


def whereabouts(
    address: str, local: dict[str, str], *, shared_disk: bool, workdir: str = WORKDIR, option: str = "--shared-disk"
) -> dict[str, str]:
    """Return the fields to override, with their values, so that a driver on another machine finds the
    recipe's files. Raises ValueError if one of them is on this machine, where the cluster cannot
    access it.

    Args:
        local: fields that may name a file or folder: `store.root`, `corpus.sources.0.files`, ...
        shared_disk: whether the cluster has this machine's disk under the same paths. A loopback
            address implies it.
        workdir: the value that replaces a relative store.workdir on another machine.
        option: the command's option for `shared_disk`, used in messages.
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
                f"{field} {path!r} is on this machine, where {address} cannot access it: {fix}, or give {option} if "
                "every node of the cluster has it under that path"
            )
        elif field.startswith("store."):
            places[field] = str(Path(path).absolute())
        elif not Path(path).is_absolute():  # making it absolute here would change the fingerprint
            raise ValueError(
                f"{field} {path!r}: a job runs in a folder of its own; write the absolute path in the recipe"
            )
    return {field: path for field, path in places.items() if path != ours[field]}


def manifest(submission: Submission, resources: Resources, place: kubernetes.Place) -> str:
    """Return a RayJob and its recipe as YAML for `kubectl`. Raises ValueError if the operator would
    reject it."""
    name = kubernetes.dns_name(submission.name)
    job = kubernetes.ray_job(name, submission.run(kubernetes.RECIPE_FILE, "longreach"), resources, place)
    if problems := kubernetes.check(job):
        raise ValueError("\n".join(problems))
    return kubernetes.dump([kubernetes.recipe_map(name, submission.recipe.decode(), place), job])


def pinned() -> tuple[str, ...]:
    """Return all direct and indirect dependencies of longreach, pinned to the versions installed here
    without local parts such as `+cpu`."""
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
    del versions["longreach"]  # the job contains its code
    return tuple(f"{name}=={version}" for name, version in sorted(versions.items()))


# ---- the cluster


def check_address(address: str) -> str:
    """Return a dashboard's full address, such as http://head:8265 for `head`. Raises ValueError for
    an address of another kind."""
    if "://" not in address:
        address = f"http://{address}" if ":" in address else f"http://{address}:8265"
    address = address.rstrip("/")
    parts = urlsplit(address)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.username or parts.hostname == "auto":
        raise ValueError(
            f"address {address!r}: give the dashboard's address, http://HOST:8265 (tunnel: http://127.0.0.1:8265)"
        )
    return address


def _is_loopback(address: str) -> bool:
    host = urlsplit(address).hostname or ""
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"


def token() -> tuple[str | None, str]:
    """Return Ray's token and a text that names its source, in the order in which Ray looks for it.
    Raises ValueError if the file in RAY_AUTH_TOKEN_PATH cannot be read."""
    if os.environ.get("RAY_AUTH_MODE") == "disabled":
        return None, "RAY_AUTH_MODE=disabled"
    if given := os.environ.get("RAY_AUTH_TOKEN", "").strip():
        return given, "RAY_AUTH_TOKEN"
    path = os.environ.get("RAY_AUTH_TOKEN_PATH")
    file = Path(os.path.expanduser(path or "~/.ray/auth_token"))
    try:
        if content := file.read_text().strip():
            return content, str(file)
    except OSError as error:
        if path:
            raise ValueError(f"RAY_AUTH_TOKEN_PATH {path}: {error.strerror}; set it to Ray's token file") from None
    return None, f"no RAY_AUTH_TOKEN, and no token in {file}"


@contextlib.contextmanager
def job_client(address: str) -> Iterator[Any]:
    """Give the block a JobSubmissionClient. Raises ValueError if the dashboard does not respond or
    rejects a request."""
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
        with _address_override(address):
            client = JobSubmissionClient(address, headers=headers)
        yield client
    except AuthenticationError:
        raise ValueError(
            f"Ray at {address} rejects {what}: set RAY_AUTH_TOKEN to the cluster's token, or RAY_AUTH_TOKEN_PATH to "
            "its file"
        ) from None
    except ConnectionError as error:
        raise ValueError(f"no Ray dashboard responds at {address}: is the cluster, or the tunnel to it, up?") from error
    except RuntimeError as error:
        refusal = re.search(r"status code ([45]\d\d): (.*)", str(error), re.DOTALL)
        if refusal is None:
            raise
        why = f"Ray at {address}: {(refusal[2].strip() or 'no reason').splitlines()[-1]} (HTTP {refusal[1]})"
        if refusal[1].startswith("5"):  # the agent starts jobs, and a second Ray on a machine may have none
            why += (
                f"; its head may have no dashboard agent, since port {AGENT_PORT} is taken if another Ray runs on that "
                f"machine: start the head with ray start --dashboard-agent-listen-port and a free port"
            )
        raise ValueError(why) from error


@contextlib.contextmanager
def _address_override(address: str) -> Iterator[None]:
    """Make Ray use `address`: two environment variables override the address given to its client."""
    variable = "RAY_API_SERVER_ADDRESS"  # has precedence over the other one, RAY_ADDRESS
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
    """Submit a job. Return its id at once, while the cluster still unpacks it and installs packages."""
    with tempfile.TemporaryDirectory(prefix="longreach-submit-") as folder:
        for path, content in submission.files().items():
            target = Path(folder, path)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content)
        env, about = submission.runtime_env(folder), submission.metadata()
        return client.submit_job(entrypoint=submission.entrypoint, runtime_env=env, metadata=about)


def follow(client: Any, job: str) -> int:
    """Print a job's whole log until the job ends, and return its exit code. Raises ValueError if the
    connection is lost."""
    printed = 0

    async def lines() -> None:
        nonlocal printed
        begin = 0  # every connection yields the log from its start
        async for text in client.tail_job_logs(job):
            print(text[max(0, printed - begin) :], end="", flush=True)
            begin += len(text)
            printed = max(printed, begin)

    import aiohttp

    where = f"{job} --address {client.get_address()}"
    client.get_job_status(job)  # raises if there is no such job, whose log would only be empty
    try:
        asyncio.run(lines())
        while not client.get_job_status(job).is_terminal():  # Ray's client also ends quietly if a proxy hangs up
            time.sleep(FOLLOW_AGAIN_S)
            asyncio.run(lines())
    except KeyboardInterrupt:
        print(f"\nthe job keeps running; to stop it: longreach stop {where}", file=sys.stderr)
        raise
    except (aiohttp.ClientError, RuntimeError) as error:
        raise ValueError(
            f"the connection was lost ({error}); the job keeps running: longreach logs {where} --follow"
        ) from error
    return ended(client, job)


def ended(client: Any, job: str) -> int:
    """Return the exit code of a job that has ended. If it failed, print the reason on stderr."""
    details = client.get_job_info(job)
    status = details.status.value
    if status == "SUCCEEDED":
        return 0
    why = (details.message or "").partition(", last available logs")[0].partition("\n")[0]  # the log was just printed
    print(f"{job} {status}: {why}", file=sys.stderr)
    return details.driver_exit_code or 1


def listed(client: Any) -> list[Any]:
    """Return Ray's JobDetails of every submitted job, newest first."""
    return sorted((job for job in client.list_jobs() if job.submission_id), key=lambda job: -(job.start_time or 0))
