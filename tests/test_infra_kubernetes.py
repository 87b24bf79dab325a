"""Manifests against KubeRay's own schemas and Kubernetes' own, both strict, and the operator's rules beyond them."""

import copy
import functools
import gzip
import re
from datetime import timedelta
from pathlib import Path

import pytest
import yaml

from longreach.infra import kubernetes as k
from longreach.infra.resources import Resources

jsonschema = pytest.importorskip("jsonschema")
kubernetes_validate = pytest.importorskip("kubernetes_validate")

ROOT = Path(__file__).parent.parent
STATIC = sorted((ROOT / "infra" / "k8s").glob("*.yaml"))
NUMBERS = {
    "cpu": (Resources(workers=3, cpus_per_worker=2), k.Place()),
    "gpu": (Resources(workers=8, gpus_per_worker=1), k.Place(gpu_nodes={"pool": "h100"}, memory="64Gi", claim="work")),
    "queue": (Resources(eval_cpus=4), k.Place(queue="night", namespace="lab")),
}


def strict(schema):
    """Unknown fields are errors, as for `kubectl --validate=strict`."""
    if isinstance(schema, list):
        return [strict(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    made = {key: strict(value) for key, value in schema.items()}
    if isinstance(made.get("properties"), dict) and not made.get("x-kubernetes-preserve-unknown-fields"):
        made.setdefault("additionalProperties", False)
    return made


@functools.cache
def validator(kind):
    packed = gzip.decompress((Path(__file__).parent / "crds" / f"ray.io_{kind.lower()}s.yaml.gz").read_bytes())
    definition = yaml.load(packed, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    (schema,) = [v["schema"]["openAPIV3Schema"] for v in definition["spec"]["versions"] if v["name"] == "v1"]
    return jsonschema.Draft202012Validator(strict(schema))


def problems_of_schema(manifest):
    if manifest["apiVersion"].startswith("ray.io/"):
        return [f"{error.json_path}: {error.message}" for error in validator(manifest["kind"]).iter_errors(manifest)]
    try:
        kubernetes_validate.validate(manifest, "1.35", strict=True)
    except kubernetes_validate.ValidationError as error:
        return [f"{error.path}: {error.message}"]
    return []


def rendered(case):
    """Every manifest that can be made of a case's numbers."""
    resources, place = NUMBERS[case]
    job = k.ray_job("quickstart", ["longreach", "run", k.RECIPE_FILE, "--address", "auto"], resources, place)
    made = [k.ray_cluster("lab", resources, place), job, k.recipe_map("quickstart", "name: quickstart\n", place)]
    made += k.cron_job("quickstart", "0 3 * * 1", "Europe/Berlin", job, place, max_start_delay=timedelta(hours=2))
    if not place.queue:
        made.append(k.ray_cron_job("quickstart", "0 3 * * 1", "Europe/Berlin", job, place))
    return made


@pytest.mark.parametrize("case", NUMBERS)
def test_every_manifest_passes_the_schemas_and_the_operators_rules(case):
    for manifest in yaml.safe_load_all(k.dump(rendered(case))):
        assert not problems_of_schema(manifest)
        assert not k.check(manifest)


def images_of(manifest):
    spec = manifest["spec"]["rayClusterSpec"]
    pods = [spec["headGroupSpec"]["template"], *(group["template"] for group in spec["workerGroupSpecs"])]
    return {container["image"] for pod in pods for container in pod["spec"]["containers"]}


def test_ranks_with_gpus_get_the_image_that_has_cuda():
    built = re.findall(r"-t (longreach:\S+)", (ROOT / "docs" / "cluster.md").read_text(encoding="utf-8"))
    plain, cuda = (k.ray_job("lab", ["true"], NUMBERS[case][0], k.Place()) for case in ("cpu", "gpu"))
    assert [*images_of(plain), *images_of(cuda)] == built
    ours = k.ray_job("lab", ["true"], NUMBERS["gpu"][0], k.Place(image="ours:1.2"))
    assert images_of(ours) == {"ours:1.2"}


@pytest.mark.parametrize("kind", ["RayCluster", "RayJob", "RayCronJob", "CronJob", "Role"])
def test_the_schemas_refuse_what_they_do_not_know(kind):
    (manifest,) = [one for one in rendered("cpu") if one["kind"] == kind]
    assert not problems_of_schema(manifest)
    (manifest["rules"][0] if kind == "Role" else manifest["spec"])["shutdownAfterJobFinnishes"] = True
    assert problems_of_schema(manifest)


def test_a_misspelt_field_deep_in_a_pod_is_found():
    manifest = copy.deepcopy(rendered("cpu")[0])
    manifest["spec"]["headGroupSpec"]["template"]["spec"]["containers"][0]["imagePolicy"] = "Always"
    assert "imagePolicy" in problems_of_schema(manifest)[0]


def test_each_rank_gets_a_pod_with_its_cpus_its_gpu_and_its_memory():
    resources, place = NUMBERS["gpu"]
    spec = k.ray_cluster("lab", resources, place)["spec"]
    (group,) = spec["workerGroupSpecs"]
    assert [group[name] for name in ("replicas", "minReplicas", "maxReplicas")] == [8, 8, 8]
    pod = group["template"]["spec"]
    limits = pod["containers"][0]["resources"]["limits"]
    assert (
        limits == {"cpu": "1", "memory": "64Gi", "nvidia.com/gpu": "1"} == pod["containers"][0]["resources"]["requests"]
    )
    assert pod["nodeSelector"] == {"pool": "h100"}
    assert pod["tolerations"][0]["key"] == "nvidia.com/gpu"
    head = spec["headGroupSpec"]
    assert head["rayStartParams"]["num-cpus"] == "0"
    assert "nodeSelector" not in head["template"]["spec"]


def test_an_evaluations_task_fits_into_one_pod():
    (group,) = k.ray_cluster("lab", *NUMBERS["queue"])["spec"]["workerGroupSpecs"]
    assert group["template"]["spec"]["containers"][0]["resources"]["limits"]["cpu"] == "4"


def test_clusters_ask_for_a_token():
    assert k.ray_cluster("lab", *NUMBERS["cpu"])["spec"]["authOptions"] == {"mode": "token"}


def test_a_core_cron_job_creates_the_same_ray_job_under_a_new_name_and_may_do_nothing_else():
    made = {one["kind"]: one for one in rendered("queue") if one["metadata"]["name"] != "quickstart-recipe"}
    created = yaml.safe_load(made["ConfigMap"]["data"]["rayjob.yaml"])
    assert created["metadata"].pop("generateName") == "quickstart-"
    assert not problems_of_schema(created)
    assert created["spec"] == made["RayJob"]["spec"]
    assert created["metadata"]["labels"][k.QUEUE] == "night"
    assert made["Role"]["rules"] == [{"apiGroups": ["ray.io"], "resources": ["rayjobs"], "verbs": ["create"]}]
    assert made["CronJob"]["spec"]["startingDeadlineSeconds"] == 7200
    assert made["CronJob"]["spec"]["concurrencyPolicy"] == "Forbid"
    assert made["RayJob"]["metadata"]["name"] == "quickstart"  # what is created did not change it


def test_timers_are_suspended_until_somebody_says_otherwise():
    timers = [one for one in rendered("cpu") if "Cron" in one["kind"]]
    assert [one["spec"]["suspend"] for one in timers] == [True, True]


def test_a_ray_cron_job_refuses_a_queue_that_it_could_not_pass_on():
    resources, place = NUMBERS["queue"]
    job = k.ray_job("quickstart", ["true"], resources, place)
    with pytest.raises(ValueError, match="queue 'night': a RayCronJob sets no labels on its RayJobs"):
        k.ray_cron_job("quickstart", "0 3 * * 1", "UTC", job, place)


def test_an_amount_of_memory_without_a_unit_is_refused():
    with pytest.raises(ValueError, match="memory '8': write it like 8Gi"):
        k.Place(memory="8")


PLAIN = Resources()


@pytest.mark.parametrize(
    ("manifest", "problem"),
    [
        (k.ray_job("q" * 48, ["true"], PLAIN, k.Place()), "has 48 characters, but a RayJob takes at most 47: shorten"),
        (k.ray_cluster("8b", PLAIN, k.Place()), "metadata.name '8b': start with a letter"),
        (k.ray_cluster("lab", PLAIN, k.Place(ray_version="2.51.0")), "'2.51.0': authOptions.mode token needs Ray 2.52"),
        (k.ray_job("lab", ["true"], PLAIN, k.Place(ray_version="")), "needs Ray 2.52 or later"),
    ],
    ids=["long", "digit", "old", "unknown"],
)
def test_what_the_operator_would_refuse_is_named_beforehand(manifest, problem):
    (found,) = k.check(manifest)
    assert problem in found


@pytest.mark.parametrize(("target", "longest"), [("RayCronJob", 36), ("CronJob", 41)])
def test_a_timers_name_leaves_room_for_the_names_that_are_made_of_it(target, longest):
    for length in (longest, longest + 1):
        job = k.ray_job("q" * length, ["true"], PLAIN, k.Place())
        timers = [k.ray_cron_job("q" * length, "0 3 * * 1", "UTC", job, k.Place())]
        timers += k.cron_job("q" * length, "0 3 * * 1", "UTC", job, k.Place())
        (timer,) = [manifest for manifest in timers if manifest["kind"] == target]
        assert bool(k.check(timer)) == (length > longest)


# ---- the files in infra/k8s


def static():
    return [(path.name, manifest) for path in STATIC for manifest in yaml.safe_load_all(path.read_text())]


def pods():
    return [(name, m["spec"]["template"]["spec"]) for name, m in static() if "template" in m.get("spec", {})]


def test_the_files_pass_the_schemas():
    assert len(static()) == 9
    for name, manifest in static():
        assert not problems_of_schema(manifest), name
        assert manifest["kind"] == "Namespace" or manifest["metadata"]["namespace"] == k.Place().namespace


def test_every_pod_of_ours_satisfies_the_restricted_profile():
    made = [one["spec"] for case in NUMBERS for one in rendered(case) if one["kind"] in ("RayCluster", "CronJob")]
    ours = [spec["jobTemplate"]["spec"]["template"]["spec"] for spec in made if "jobTemplate" in spec]
    for spec in (spec for spec in made if "headGroupSpec" in spec):
        ours += [group["template"]["spec"] for group in [spec["headGroupSpec"], *spec["workerGroupSpecs"]]]
    assert len(ours) == 9
    for pod in [*ours, *(pod for _, pod in pods())]:
        assert pod["securityContext"]["runAsNonRoot"]
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in pod["containers"]:
            assert container["securityContext"]["allowPrivilegeEscalation"] is False
            assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
            assert {"cpu", "memory"} <= set(container["resources"]["requests"]) & set(container["resources"]["limits"])


def test_servers_are_probed_and_their_secrets_are_references():
    assert [name for name, _ in pods()] == ["mlflow.yaml", "postgres.yaml", "s3.yaml"]
    for name, pod in pods():
        (container,) = pod["containers"]
        assert {"startupProbe", "readinessProbe", "livenessProbe"} <= set(container)
        for variable in container["env"]:
            if re.search("PASSWORD|SECRET|ACCESS_KEY", variable["name"]):
                assert set(variable) == {"name", "valueFrom"}, name
    assert not [name for name, manifest in static() if manifest["kind"] == "Secret"]


def test_services_lead_to_pods():
    labels = [m["spec"]["template"]["metadata"]["labels"] for _, m in static() if "template" in m.get("spec", {})]
    for name, service in ((n, m) for n, m in static() if m["kind"] == "Service"):
        assert [one for one in labels if service["spec"]["selector"].items() <= one.items()], name
