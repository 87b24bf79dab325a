"""Manifests for Ray on Kubernetes, as plain dicts made from a recipe's resources. They need KubeRay
1.6 or later; a RayCronJob needs 1.7, since it had no time zones before.

A scheduled run is a RayJob, whose cluster is created for the run and deleted after it. The driver is
`longreach run` on the head, with the recipe mounted from a ConfigMap. It may be started twice or
killed at any time. The operator has rules that are in no schema; `check` tests those that a recipe
can break.

    print(dump([ray_cluster("lab", Resources(workers=4), Place(memory="16Gi"))]))
"""

import re
import shlex
from dataclasses import dataclass, field
from datetime import timedelta
from importlib.metadata import version
from typing import Any

import yaml

from longreach.infra.resources import Resources

Manifest = dict[str, Any]

RECIPE_FILE = "/etc/longreach/recipe.yaml"
WORKDIR = "/var/longreach"
QUEUE = "kueue.x-k8s.io/queue-name"
LONGEST = {"RayCluster": 53, "RayJob": 47, "RayCronJob": 36, "CronJob": 41}
"""Most characters of a name, by kind. KubeRay appends to the names of its three kinds, and
Kubernetes appends six characters for a CronJob's RayJobs."""
TOKENS_SINCE = (2, 52)
"""The first version of Ray that supports token authentication."""


@dataclass(frozen=True)
class Place:
    """What a cluster's manifests need besides Resources."""

    image: str | None = None
    """The image of all pods, which contains longreach and Ray `ray_version`. None: the image that
    docs/cluster.md builds, from Dockerfile.cuda if ranks have GPUs."""
    namespace: str = "longreach"
    memory: str = "8Gi"
    """Memory of one worker's pod."""
    head_memory: str = "4Gi"
    """Memory of the head's pod, where the driver runs."""
    ray_version: str = version("ray")
    secret: str = "longreach-store"
    """A Secret whose keys become environment variables: the store's and MLflow's credentials."""
    claim: str | None = None
    """A ReadWriteMany volume claim for the run's folder; without one, each pod has its own folder."""
    queue: str | None = None
    """The Kueue LocalQueue that jobs wait in."""
    gpu_nodes: dict[str, str] = field(default_factory=dict)
    """Node labels that select the nodes for workers with a GPU."""
    kubectl_image: str = "registry.k8s.io/kubectl:v1.35.0"
    """The image in which a core CronJob creates RayJobs."""

    def __post_init__(self) -> None:
        for name in ("memory", "head_memory"):
            if not re.fullmatch("[1-9][0-9]*[MGT]i", amount := getattr(self, name)):
                raise ValueError(f"{name} {amount!r}: write it like 8Gi or 512Mi")

    def image_for(self, resources: Resources) -> str:
        """Return the image of all pods of a cluster, head and workers alike."""
        if self.image is not None:
            return self.image
        cuda = "-cuda" if resources.gpus_per_worker else ""
        return f"longreach:{version('longreach')}{cuda}"


def ray_cluster(name: str, resources: Resources, place: Place) -> Manifest:
    """Return a long-lived cluster with one pod for each training rank."""
    return _manifest("ray.io/v1", "RayCluster", name, place, spec=_cluster_spec(resources, place))


def ray_job(name: str, entrypoint: list[str], resources: Resources, place: Place) -> Manifest:
    """Return a cluster for one command, which is deleted ten minutes after the command ends.

    The operator submits over HTTP, since a submitter pod would add a shell that interprets `&&` and
    `;` in the entrypoint. There are no retries: each would create a new cluster, and the next fire
    time resumes from the newest checkpoint anyway.
    """
    spec = {
        "entrypoint": shlex.join(entrypoint),
        "submissionMode": "HTTPMode",
        "shutdownAfterJobFinishes": True,
        "ttlSecondsAfterFinished": 600,
        "rayClusterSpec": _cluster_spec(resources, place, recipe_map=f"{name}-recipe"),
    }
    return _manifest("ray.io/v1", "RayJob", name, place, queue=place.queue, spec=spec)


def ray_cron_job(name: str, cron: str, tz: str, job: Manifest, place: Place, *, suspend: bool = True) -> Manifest:
    """Return a RayCronJob, KubeRay's own timer, which is alpha and behind the feature gate RayCronJob.

    It has no concurrency policy and runs every missed fire time at once, so runs rely on the lease
    and on the driver's max_start_delay. Raises ValueError if there is a queue, since a RayCronJob
    sets no labels on its RayJobs.
    """
    if place.queue:
        raise ValueError(
            f"queue {place.queue!r}: a RayCronJob sets no labels on its RayJobs: use --to cronjob, or rename the "
            "LocalQueue to `default`, which Kueue uses for jobs without a queue"
        )
    spec = {"schedule": cron, "timeZone": tz, "suspend": suspend, "jobTemplate": job["spec"]}
    return _manifest("ray.io/v1", "RayCronJob", name, place, spec=spec)


def cron_job(
    name: str, cron: str, tz: str, job: Manifest, place: Place, *, suspend: bool = True,
    max_start_delay: timedelta | None = None,
) -> list[Manifest]:  # fmt: skip
    """Return a Kubernetes CronJob (1.27 or later, for its time zones), whose pod creates a RayJob and
    ends.

    A pod that ran `longreach run` itself would be limited to its own node, and one that submitted to
    a long-lived cluster would need that cluster all week. The pod's service account may create
    RayJobs and nothing else. `Forbid` only covers the seconds of that pod; a lease prevents
    concurrent runs. The pod calls `create` with a generated name, since `apply` would leave last
    week's RayJob unchanged.
    """
    template = {**job, "metadata": {**job["metadata"], "generateName": f"{name}-"}}
    del template["metadata"]["name"]
    creator = f"{name}-creator"
    role = {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": creator}
    container = {
        "name": "create",
        "image": place.kubectl_image,
        "args": ["create", "--filename=/etc/longreach/rayjob.yaml", "--cache-dir=/tmp"],
        "resources": _resources("100m", "128Mi"),
        "securityContext": CONTAINER_SECURITY,
        "volumeMounts": [{"name": "job", "mountPath": "/etc/longreach", "readOnly": True}],
    }
    pod = {
        "serviceAccountName": creator,
        "restartPolicy": "Never",
        "securityContext": {**POD_SECURITY, "runAsUser": 65532},
        "containers": [container],
        "volumes": [{"name": "job", "configMap": {"name": f"{name}-rayjob"}}],
    }
    pods = {"metadata": {"labels": LABELS}, "spec": pod}
    jobs = {"spec": {"backoffLimit": 2, "ttlSecondsAfterFinished": 86400, "template": pods}}
    spec = {"schedule": cron, "timeZone": tz, "suspend": suspend, "concurrencyPolicy": "Forbid", "jobTemplate": jobs}
    if max_start_delay:
        spec["startingDeadlineSeconds"] = int(max_start_delay.total_seconds())
    rule = {"apiGroups": ["ray.io"], "resources": ["rayjobs"], "verbs": ["create"]}
    subject = {"kind": "ServiceAccount", "name": creator, "namespace": place.namespace}
    rbac = "rbac.authorization.k8s.io/v1"
    return [
        _manifest("v1", "ConfigMap", f"{name}-rayjob", place, data={"rayjob.yaml": dump([template])}),
        _manifest("v1", "ServiceAccount", creator, place),
        _manifest(rbac, "Role", creator, place, rules=[rule]),
        _manifest(rbac, "RoleBinding", creator, place, roleRef=role, subjects=[subject]),
        _manifest("batch/v1", "CronJob", name, place, spec=spec),
    ]


def recipe_map(name: str, text: str, place: Place) -> Manifest:
    """Return the ConfigMap with the recipe, which the head of cluster `name` mounts."""
    return _manifest("v1", "ConfigMap", f"{name}-recipe", place, data={"recipe.yaml": text})


def dump(manifests: list[Manifest]) -> str:
    """Return YAML documents for `kubectl apply -f -`."""
    return yaml.dump_all(manifests, Dumper=_Dumper, sort_keys=False, width=120, explicit_start=True, allow_unicode=True)


class _Dumper(yaml.SafeDumper):
    """Writes strings without escapes, and repeats shared parts, so that readers need not look up
    `*id001`."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


_Dumper.add_representer(
    str,
    lambda dumper, text: dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None),
)


def dns_name(name: str) -> str:
    """Return a recipe's name in the characters that Kubernetes allows: `sink+160m.v2` ->
    `sink-160m-v2`."""
    return re.sub("[^a-z0-9-]+", "-", name.lower()).strip("-")


# ---- parts

POD_SECURITY = {"runAsNonRoot": True, "runAsUser": 1000, "fsGroup": 1000, "seccompProfile": {"type": "RuntimeDefault"}}
LABELS = {"app.kubernetes.io/part-of": "longreach"}
CONTAINER_SECURITY = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}


def _manifest(api: str, kind: str, name: str, place: Place, queue: str | None = None, **rest: Any) -> Manifest:
    labels = dict(LABELS)
    if queue:
        labels[QUEUE] = queue
    metadata = {"name": name, "namespace": place.namespace, "labels": labels}
    return {"apiVersion": api, "kind": kind, "metadata": metadata, **rest}


def _resources(cpu: str, memory: str, gpus: int = 0) -> Manifest:
    """Return requests that equal the limits: Ray counts CPUs by the limits, and Kubernetes evicts such
    pods last."""
    amounts = {"cpu": cpu, "memory": memory}
    if gpus:
        amounts["nvidia.com/gpu"] = str(gpus)
    return {"requests": amounts, "limits": amounts}


def _cluster_spec(resources: Resources, place: Place, recipe_map: str | None = None) -> Manifest:
    cpus = max(resources.cpus_per_worker, resources.eval_cpus)  # an evaluation task must fit into one pod, too
    gpus = resources.gpus_per_worker
    image = place.image_for(resources)
    head = _pod("ray-head", image, place, _resources("1", place.head_memory))
    container = head["spec"]["containers"][0]
    if recipe_map:
        mount = {"name": "recipe", "mountPath": RECIPE_FILE.rpartition("/")[0], "readOnly": True}
        head["spec"]["volumes"].append({"name": "recipe", "configMap": {"name": recipe_map}})
        container["volumeMounts"].append(mount)
    ports = {"gcs-server": 6379, "dashboard": 8265, "client": 10001}
    container["ports"] = [{"name": port, "containerPort": number} for port, number in ports.items()]
    worker = _pod("ray-worker", image, place, _resources(str(cpus), place.memory, gpus))
    if gpus:
        worker["spec"]["nodeSelector"] = place.gpu_nodes
        worker["spec"]["tolerations"] = [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}]
    replicas = dict.fromkeys(("replicas", "minReplicas", "maxReplicas"), resources.workers)
    group = {"groupName": "workers", **replicas, "rayStartParams": {}, "template": worker}
    return {
        "rayVersion": place.ray_version,
        "authOptions": {"mode": "token"},
        # With no CPUs for Ray, the head runs only drivers, so that a rank that fills the memory cannot
        # kill them.
        "headGroupSpec": {"rayStartParams": {"num-cpus": "0"}, "template": head},
        "workerGroupSpecs": [group],
    }


def _pod(container: str, image: str, place: Place, resources: Manifest) -> Manifest:
    volume = {"persistentVolumeClaim": {"claimName": place.claim}} if place.claim else {"emptyDir": {}}
    program = {
        "name": container,
        "image": image,
        "workingDir": WORKDIR,
        "envFrom": [{"secretRef": {"name": place.secret, "optional": True}}],
        "resources": resources,
        "securityContext": CONTAINER_SECURITY,
        "volumeMounts": [{"name": "work", "mountPath": WORKDIR}],
    }
    spec = {
        "automountServiceAccountToken": False,
        "terminationGracePeriodSeconds": 120,  # the run takes 25 s to write its checkpoints
        "securityContext": POD_SECURITY,
        "containers": [program],
        "volumes": [{"name": "work", **volume}],
    }
    return {"metadata": {"labels": LABELS}, "spec": spec}


# ---- the operator's rules


def check(manifest: Manifest) -> list[str]:
    """Return what KubeRay rejects although its schema allows it, one line per problem, with field,
    value and fix.

    Of KubeRay's rules (ray-operator/controllers/ray/utils/validation.go, 1.7), our manifests can
    break only those on names and on the Ray version. Everything else that it checks is written
    correctly here, and `Schedule.parse` has checked the cron line and the time zone.
    """
    kind, name = manifest["kind"], manifest["metadata"]["name"]
    problems = []
    limit = LONGEST.get(kind, 253)
    if len(name) > limit:
        problems.append(
            f"metadata.name {name!r} has {len(name)} characters, but a {kind} takes at most {limit}: shorten it"
        )
    if kind.startswith("Ray") and not re.fullmatch("[a-z]([a-z0-9-]*[a-z0-9])?", name):
        problems.append(f"metadata.name {name!r}: start with a letter, and use lower-case letters, digits and - only")
    if kind in ("RayCluster", "RayJob"):
        cluster = manifest["spec"] if kind == "RayCluster" else manifest["spec"]["rayClusterSpec"]
        found = re.match(r"(\d+)\.(\d+)", cluster["rayVersion"])
        if not found or (int(found[1]), int(found[2])) < TOKENS_SINCE:
            problems.append(f"rayVersion {cluster['rayVersion']!r}: authOptions.mode token needs Ray 2.52 or later")
    return problems
