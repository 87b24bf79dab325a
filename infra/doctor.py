"""`longreach doctor`: check whether a run can work on this machine, and say how to fix what is wrong.

Only the check that needs torch imports it, so that the others are fast.

    python -c "from longreach.infra.doctor import doctor; print(*doctor('.longreach'), sep='\\n')"
"""

import contextlib
import importlib.util
import ipaddress
import os
import platform
import re
import shutil
import socket
import sys
import tempfile
import uuid
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from longreach.infra.files import home
from longreach.infra.machine import GIB, usable_cores, usable_memory
from longreach.infra.versions import git_commit, installed

OPEN_PORTS = (5000, 8080, *range(8265, 8275))
"""Default ports of MLflow and Ray's dashboard. If 8265 is taken, Ray uses the next free one."""


@dataclass(frozen=True)
class Check:
    """The result of one of doctor's checks."""

    name: str
    ok: bool
    detail: str
    """What was found on the machine."""
    fix: str = ""
    """What to do if the check fails."""
    needed: bool = True
    """Whether runs fail if this check fails."""


def doctor(root: Path | str, ui_port: int = 5000) -> list[Check]:
    """Check whether runs can work here with artifacts and metrics under `root` (a folder or fsspec
    URL). Return the results."""
    cores, commit = usable_cores(), git_commit()
    recorded = "install git and work in a checkout, so that artifacts record the commit that made them"
    return [
        Check("python", sys.version_info >= (3, 11), platform.python_version(), "use Python 3.11 or newer"),
        *check_requirements(_requirements()),
        _device(),
        Check("cores", cores >= 2, f"{cores}", "set resources.workers=1 to train with one rank", needed=False),
        _memory(),
        _shared_memory(),
        _home(),
        *_root(str(root)),
        _port(ui_port),
        _ray_cluster_file(),
        _open_to_others({*OPEN_PORTS, ui_port, *_tracking_port()}),
        Check("git", commit != "unknown", f"commit {commit}", recorded, needed=False),
    ]


def _home() -> Check:
    fix = "Ray writes there: set HOME to a folder that you can write to"
    folder = home()
    return _writable("home", folder, fix) if folder else Check("home", False, "HOME is not set", fix)


def _requirements() -> list[str]:
    try:
        return metadata.requires("longreach") or []
    except metadata.PackageNotFoundError:
        return ["longreach"]  # reported as missing, with the command that installs it


def check_requirements(requirements: Iterable[str]) -> list[Check]:
    """Return one check for each package that is missing or outside its range, or a single check if
    all fit. `requirements`: as in pyproject.toml; those of extras are ignored."""
    from packaging.requirements import Requirement

    needed = [r for r in map(Requirement, requirements) if r.marker is None or r.marker.evaluate({"extra": ""})]
    unfit = []
    for requirement in needed:
        version = installed(requirement.name)
        if version is None or not requirement.specifier.contains(version, prereleases=True):
            detail = f"{version or 'not installed'}, but {requirement.specifier or 'any version'} is needed"
            unfit.append(Check(requirement.name, False, detail, "make setup (or: pip install -e .)"))
    return unfit or [Check("packages", True, f"{len(needed)} packages are within their ranges")]


def _device() -> Check:
    """Report the GPUs, if any. A GPU that the installed torch cannot use is a failed check."""
    if importlib.util.find_spec("torch") is None:
        return Check("device", False, "torch is not installed", "make setup")
    import torch

    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        flash = "without flash-attn (optional: pip install -e '.[gpu]')"
        if version := installed("flash-attn"):
            flash = f"flash-attn {version}"
        return Check("device", True, f"{', '.join(names)}; CUDA {torch.version.cuda}; {flash}")
    if shutil.which("nvidia-smi") and not torch.version.cuda:
        detail = f"there is a GPU, but torch {torch.__version__} is a CPU build"
        return Check("device", False, detail, "install a CUDA build of torch, or continue on the CPU", needed=False)
    return Check("device", True, "CPU (gloo between ranks)")


def _memory() -> Check:
    total = usable_memory()
    fix = "set resources.workers=1 and a shorter seq_len: two ranks of the quickstart hold about 4 GiB each"
    return Check("memory", total >= 12 * GIB, f"{total / GIB:.0f} GiB", fix, needed=False)


def _shared_memory() -> Check:
    """Check /dev/shm, which holds Ray's object store. Docker's default is 64 MiB, and Ray then falls
    back to a slow disk."""
    if not Path("/dev/shm").exists():
        return Check("/dev/shm", True, "not used on this system")
    size = shutil.disk_usage("/dev/shm").total
    return Check("/dev/shm", size >= GIB, f"{size / GIB:.1f} GiB", "docker run --shm-size=4g", needed=False)


def _root(root: str) -> list[Check]:
    if "://" in root:
        return [_remote_root(root)]
    folder = Path(root).absolute()
    there = next(f for f in (folder, *folder.parents) if f.exists())
    free = shutil.disk_usage(there).free
    room = Check("disk", free >= 10 * GIB, f"{free / GIB:.0f} GiB free", f"free up space under {there}", needed=False)
    return [_writable("root", there, "choose another store.root"), room]


def _remote_root(root: str) -> Check:
    """Write, read and delete one object the way publishing does. A second writer must be rejected."""
    from longreach.infra.artifact import Store

    fix = "correct the URL, or the credentials in the environment (for S3 AWS_ACCESS_KEY_ID, AWS_ENDPOINT_URL)"
    try:
        store = Store(root).checked()
        place = f"{store.base}/doctor-{uuid.uuid4().hex}"
        store.create(place, b"longreach doctor")
        try:
            with contextlib.suppress(FileExistsError):
                store.create(place, b"a second writer")
                no = "it ignores the condition of a conditional put (If-None-Match), so two runs could both publish"
                return Check("root", False, f"{root}: {no}", "choose a store that supports conditional puts")
            if store.fs.cat_file(place) != b"longreach doctor":
                return Check("root", False, f"{root}: reading returns other bytes than written", "choose another store")
        finally:
            store.fs.rm(place)
    except Exception as error:  # noqa: BLE001 (each file system raises its own types)
        return Check("root", False, f"{root}: {error}", fix)
    return Check("root", True, f"{root}: an object can be put once only, read and deleted")


def _writable(name: str, folder: Path, fix: str) -> Check:
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"longreach doctor")
            file.flush()  # on a full disk, creating a file may still succeed
            return Check(name, True, f"{folder} is writable")
    except OSError as error:
        return Check(name, False, f"{folder} is not writable: {error.strerror}", fix)


def _port(port: int) -> Check:
    with socket.socket() as probe:
        used = probe.connect_ex(("127.0.0.1", port)) == 0
    fix = f"unless `longreach ui` is what listens there, use another port: longreach ui --port {port + 1}"
    return Check("port", not used, f"{port} is {'in use' if used else 'free'}", fix, needed=False)


def _ray_cluster_file() -> Check:
    """Check the file that makes `ray.init()` in other programs join a cluster, even a dead one.
    longreach itself ignores it."""
    folder = os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp"
    file = Path(folder, "ray", "ray_current_cluster")
    if not file.exists():
        return Check("ray", True, "no cluster is recorded on this machine")
    address = file.read_text().strip()
    host, _, port = address.rpartition(":")
    with socket.socket() as probe:
        probe.settimeout(1)
        try:
            alive = probe.connect_ex((host, int(port))) == 0
        except (ValueError, OSError):
            alive = False
    if alive:
        return Check("ray", True, f"a cluster runs at {address}; runs start their own unless --address names it")
    return Check("ray", False, f"{file} names {address or 'nothing'}: no cluster there", f"rm {file}", needed=False)


def _tracking_port() -> set[int]:
    """Return the port in MLFLOW_TRACKING_URI. Its host does not matter, since only sockets of this
    machine are checked."""
    match = re.match(r"https?://[^/]*:(\d+)", os.environ.get("MLFLOW_TRACKING_URI", ""))
    return {int(match[1])} if match else set()


def _open_to_others(ports: set[int]) -> Check:
    """Look for a Ray dashboard or MLflow that other machines can reach without a login. Anybody could
    run code there."""
    import psutil

    try:
        connections = psutil.net_connections("tcp")
    except psutil.AccessDenied:
        return Check("open", False, "this system shows sockets only to root", "run doctor as root", needed=False)
    addresses = {connection.laddr for connection in connections if connection.status == psutil.CONN_LISTEN}
    servers = []
    for ip, port in sorted(addresses):
        reachable = port in ports and not ipaddress.ip_address(ip).is_loopback
        if reachable and (name := _without_login(ip, port)):
            servers.append(f"{name} at {ip}:{port}")
    fix = (
        "listen on 127.0.0.1 (use an SSH tunnel from other machines), or require a login: set RAY_AUTH_MODE=token "
        "before Ray starts, or use mlflow server --app-name basic-auth"
    )
    if servers:
        return Check("open", False, f"{'; '.join(servers)}: reachable from other machines without a login", fix)
    return Check("open", True, "neither Ray nor MLflow is reachable from other machines without a login")


def _without_login(ip: str, port: int) -> str:
    """Return which server responds there without a token or password: "Ray's dashboard", "MLflow", or
    "" if neither does."""
    import requests

    address = ipaddress.ip_address(ip)
    if address.is_unspecified:  # all of the machine's addresses
        address = ipaddress.ip_address("127.0.0.1" if address.version == 4 else "::1")
    base = f"http://[{address}]:{port}" if address.version == 6 else f"http://{address}:{port}"
    probes = {
        "Ray's dashboard": ("GET", "/api/version", None, "ray_version"),
        "MLflow": ("POST", "/api/2.0/mlflow/experiments/search", {"max_results": 1}, "experiments"),
    }
    with requests.Session() as session:
        session.trust_env = False  # no proxy, and no login from .netrc
        for name, (method, path, body, key) in probes.items():
            try:  # any sender can choose its `Host` header, so --allowed-hosts is no login
                host = {"Host": f"localhost:{port}"}
                answer = session.request(method, base + path, json=body, headers=host, timeout=3)
                if answer.status_code == 200 and key in answer.json():
                    return name
            except (requests.RequestException, TypeError):  # no HTTP, or no JSON object: neither server
                continue
    return ""
