"""Files for Kubernetes and Ray's cluster launcher: as their schemas want them, and one with docker-compose.yml."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
from importlib.util import find_spec
from pathlib import Path

import jsonschema
import kubernetes_validate
import pytest
import yaml

ROOT = Path(__file__).parent.parent
INFRA = ROOT / "infra"
RAY = Path(find_spec("ray").origin).parent  # type: ignore[union-attr, arg-type]
COMPOSE = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]
KUBERNETES = "1.37"
BY_HAND = ("job", "rayjob")
"""Are created when someone wants them, each time anew."""


def text(**more):
    return {"type": "object", "additionalProperties": {"type": "string"}} | more


def exactly(required=(), **properties):
    return {"type": "object", "properties": properties, "required": list(required), "additionalProperties": False}


STRING, NUMBER, BOOLEAN, TREE = {"type": "string"}, {"type": "integer"}, {"type": "boolean"}, {"type": "object"}
GROUP = {"rayStartParams": text(), "template": TREE}
CLUSTER = exactly(
    ["headGroupSpec", "workerGroupSpecs"],
    rayVersion=STRING,
    authOptions=exactly(["mode"], mode={"enum": ["token"]}, secretName=STRING),
    enableInTreeAutoscaling=BOOLEAN,
    autoscalerOptions=exactly(idleTimeoutSeconds=NUMBER, resources=TREE, securityContext=TREE),
    headGroupSpec=exactly(["template"], **GROUP),
    workerGroupSpecs={
        "type": "array",
        "items": exactly(
            ["groupName", "minReplicas", "maxReplicas", "template"],
            groupName=STRING, minReplicas=NUMBER, maxReplicas=NUMBER, replicas=NUMBER, **GROUP,
        ),
    },
)  # fmt: skip
JOB = exactly(
    ["entrypoint"],
    clusterSelector=text(), submissionMode={"enum": ["K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"]},
    entrypoint=STRING, runtimeEnvYAML=STRING, shutdownAfterJobFinishes=BOOLEAN,
)  # fmt: skip
KUBERAY = {"RayCluster": CLUSTER, "RayJob": JOB}
"""What we use of the fields of ray.io/v1, after https://docs.ray.io/en/master/kuberay/references/api.html."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A clone's infra/, with the secrets that the kustomization wants."""
    clone = tmp_path_factory.mktemp("clone")
    shutil.copytree(INFRA, clone / "infra", ignore=shutil.ignore_patterns("pictures"))
    environment = {"PATH": "/usr/bin:/bin", "ERPE_SECRETS": "infra/kubernetes/secrets"}
    subprocess.run(["infra/secrets"], cwd=clone, env=environment, check=True, capture_output=True)
    return clone / "infra"


@pytest.fixture(scope="module")
def recipe():
    return yaml.safe_load((INFRA / "kustomization.yaml").read_text())


def documents(path):
    return list(yaml.safe_load_all(path.read_text()))


def resources():
    """Every object in the files, by kind and name or, where it has none, its file's."""
    listed = yaml.safe_load((INFRA / "kustomization.yaml").read_text())["resources"]
    paths = [*(INFRA / each for each in listed), *(INFRA / f"kubernetes/{name}.yaml" for name in BY_HAND)]
    return {(each["kind"], each["metadata"].get("name", path.stem)): each for path in paths for each in documents(path)}


RESOURCES = resources()


def pods():
    """Name -> the specification of a pod, of everything that makes pods."""
    for (kind, name), about in RESOURCES.items():
        if kind in ("Deployment", "StatefulSet", "Job"):
            yield name, about["spec"]["template"]
        if kind == "RayCluster":
            yield f"{name}-head", about["spec"]["headGroupSpec"]["template"]
            for group in about["spec"]["workerGroupSpecs"]:
                yield f"{name}-{group['groupName']}", group["template"]


PODS = dict(pods())


def containers(pod):
    return [*pod["spec"].get("initContainers", []), *pod["spec"]["containers"]]


def container(pod, name):
    return next(each for each in containers(PODS[pod]) if each["name"] == name)


def variables(about):
    """Of a container, from what it says itself and from the file of all clients."""
    own = {each["name"]: each["value"] for each in about.get("env", []) if "value" in each}
    return (client() if "envFrom" in about else {}) | own


def client():
    return dict(line.split("=", 1) for line in (INFRA / "kubernetes/client.env").read_text().splitlines())


def plain(value):
    """As compose reads it where nobody has set a variable."""
    return re.sub(r"\$\{\w+:?-([^}]*)\}", r"\1", str(value)).replace("$$", "$")


@pytest.mark.parametrize("key", RESOURCES, ids="-".join)
def test_manifests_are_what_kubernetes_and_kuberay_allow(key):
    about = RESOURCES[key]
    if key[0] in KUBERAY:
        assert about["apiVersion"] == "ray.io/v1"
        jsonschema.validate(about["spec"], KUBERAY[key[0]])
    else:
        kubernetes_validate.validate(about, KUBERNETES, strict=True)


@pytest.mark.parametrize("name", [name for name in PODS if name.startswith("erpe-")])
def test_pods_in_a_ray_cluster_are_pods(name):
    about = PODS[name]
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name} | about.get("metadata", {})}
    kubernetes_validate.validate(pod | {"spec": about["spec"]}, KUBERNETES, strict=True)


def test_the_kustomization_names_only_what_is_there(recipe, folder):
    known = {"apiVersion", "kind", "namespace", "labels", "resources", "images", "generatorOptions"}
    assert recipe.keys() == known | {"configMapGenerator", "secretGenerator"}
    files = [*recipe["resources"]]
    for generator in [*recipe["configMapGenerator"], *recipe["secretGenerator"]]:
        files += [name.partition("=")[2] or name for name in generator.get("files", [])] + generator.get("envs", [])
    assert all((folder / name).stat().st_size for name in files)
    assert {path.name for path in (INFRA / "kubernetes").glob("*.yaml")} == {
        Path(name).name for name in [*recipe["resources"], *(f"{name}.yaml" for name in BY_HAND)]
    }
    assert RESOURCES["Namespace", recipe["namespace"]]
    used = {about["image"] for pod in PODS.values() for about in containers(pod) if ":" not in about["image"]}
    assert used == {image["name"] for image in recipe["images"]}


@pytest.mark.skipif(not shutil.which("kubectl"), reason="kubectl is not on this machine")
def test_kustomize_builds_it(folder):
    built = subprocess.run(["kubectl", "kustomize", folder], check=True, capture_output=True, text=True).stdout
    kinds = [about["kind"] for about in yaml.safe_load_all(built)]
    assert len(kinds) == len(RESOURCES) - len(BY_HAND) + 4  # what the generators make


def generated(recipe):
    """Name -> keys of every Secret and ConfigMap."""
    for generator in [*recipe["configMapGenerator"], *recipe["secretGenerator"]]:
        yield generator["name"], {Path(name.partition("=")[0]).name for name in generator.get("files", [])}


@pytest.mark.parametrize("name", PODS)
def test_what_a_pod_mounts_is_there(name, recipe):
    made, spec = dict(generated(recipe)), PODS[name]["spec"]
    volumes = {each["name"]: each for each in spec["volumes"]}
    claimed = RESOURCES.get(("StatefulSet", name), {}).get("spec", {}).get("volumeClaimTemplates", [])
    for about in containers(PODS[name]):
        for mount in about["volumeMounts"]:
            if mount["name"] in {claim["metadata"]["name"] for claim in claimed}:
                continue
            volume = volumes[mount["name"]]
            if claim := volume.get("persistentVolumeClaim"):
                assert RESOURCES["PersistentVolumeClaim", claim["claimName"]]
            source = volume.get("secret", {}).get("secretName") or volume.get("configMap", {}).get("name")
            if source:
                assert mount["subPath"] in made[source] and mount["mountPath"].endswith(f"/{mount['subPath']}")
        for each in about.get("envFrom", []):
            assert each["configMapRef"]["name"] in made
    assert RESOURCES["RayCluster", "erpe"]["spec"]["authOptions"]["secretName"] in made


@pytest.mark.parametrize("name", PODS)
def test_pods_are_nobody_special_and_bounded(name):
    spec = PODS[name]["spec"]
    assert spec["securityContext"]["runAsNonRoot"] and spec["securityContext"]["runAsUser"] >= 999
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    # The autoscaler beside the head asks Kubernetes for workers; nobody else asks it for anything.
    assert spec.get("automountServiceAccountToken", True) == (name == "erpe-head")
    for about in containers(PODS[name]):
        assert about["securityContext"] == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
        assert about["resources"]["limits"]["memory"] and about["resources"]["requests"]["cpu"]
        values = [each for each in variables(about) if re.search("PASSWORD$|TOKEN$|KEY$", each)]
        assert not values, "a secret as a variable"


WHERE = {
    "postgres": ("postgres", "postgres"), "migrate": ("mlflow", "migrate"), "mlflow": ("mlflow", "mlflow"),
    "ray-head": ("erpe-head", "ray-head"), "ray-worker": ("erpe-cpu", "ray-worker"), "erpe": ("job", "erpe"),
}  # fmt: skip
"""Service of docker-compose.yml -> pod and container."""


@pytest.mark.parametrize("service", WHERE)
def test_a_container_is_the_service_of_compose(service, recipe):
    here, there = container(*WHERE[service]), COMPOSE[service]
    tags = {image["name"]: image["newTag"] for image in recipe["images"]}
    image = here["image"] if ":" in here["image"] else f"{here['image']}:{tags[here['image']]}"
    assert image == there["image"]
    wanted = {name: plain(value) for name, value in there["environment"].items()}
    if service == "postgres":
        del wanted["POSTGRES_PASSWORD_FILE"], wanted["POSTGRES_INITDB_ARGS"]
    assert {name: variables(here).get(name) for name in wanted} == wanted
    if not service.startswith("ray"):  # which KubeRay starts
        assert here.get("command", there.get("entrypoint")) == there.get("entrypoint")
    if service == "mlflow":
        assert here["args"] == [plain(word) for word in there["command"]]
    mounted = {each["subPath"] for each in here["volumeMounts"] if each["name"] == "secrets"}
    assert mounted == set(there["secrets"])
    limit = plain(there["deploy"]["resources"]["limits"]["memory"])
    assert here["resources"]["limits"]["memory"] == limit.replace("g", "Gi")


def test_probes_are_the_health_checks_of_compose():
    def probe(service):
        return container(*WHERE[service])["readinessProbe"]["exec"]["command"]

    asked = plain(COMPOSE["postgres"]["healthcheck"]["test"][1])
    assert probe("postgres") == ["sh", "-c", asked.replace("@postgres:", "@$POD_IP:")]
    assert ["CMD", *probe("mlflow")] == COMPOSE["mlflow"]["healthcheck"]["test"]
    head, worker = (COMPOSE[name]["healthcheck"]["test"][1:] for name in ("ray-head", "ray-worker"))
    assert shlex.split(probe("ray-head")[2])[1:] == [word.replace("ray-head:", "$POD_IP:") for word in head]
    assert shlex.split(probe("ray-worker")[2])[1:] == [word.replace("ray-head:6379", "$RAY_ADDRESS") for word in worker]
    for name, pod in PODS.items():
        for about in pod["spec"]["containers"]:
            assert name == "job" or {"readinessProbe", "startupProbe"} <= about.keys()


def options(words):
    """`--port=6379` -> port: 6379; a flag: empty."""
    return {word[2:].partition("=")[0]: word.partition("=")[2] for word in words if word.startswith("--")}


def started(service):
    given = {name: plain(value) for name, value in options(COMPOSE[service]["command"]).items()}
    return {name: value for name, value in given.items() if name != "address"}


def test_kuberay_starts_ray_as_compose_does():
    spec = RESOURCES["RayCluster", "erpe"]["spec"]
    own = {"head", "port", "include-dashboard", "disable-usage-stats"}  # KubeRay's part, and a variable's
    wanted = {name: value for name, value in started("ray-head").items() if name not in own}
    assert spec["headGroupSpec"]["rayStartParams"] == wanted
    wanted = {name: value for name, value in started("ray-worker").items() if name not in own}
    assert all(group["rayStartParams"] == wanted for group in spec["workerGroupSpecs"])


def test_the_names_that_clients_use_are_services_that_lead_to_pods():
    for address in re.findall(r"[a-z][\w-]*:\d{4}", " ".join(client().values())):
        host, port = address.split(":")
        service = RESOURCES["Service", host]["spec"]
        assert int(port) in [each["port"] for each in service["ports"]]
        labels = {"ray.io/cluster": "erpe", "ray.io/node-type": "head"}
        assert service["selector"] in (labels, *(pod.get("metadata", {}).get("labels") for pod in PODS.values()))


def test_jobs_run_commands_that_exist_on_the_cluster_that_is_there():
    from typer.testing import CliRunner

    from erpe.cli.app import app

    job = RESOURCES["RayJob", "rayjob"]["spec"]
    assert job["clusterSelector"] == {"ray.io/cluster": "erpe"} and RESOURCES["RayCluster", "erpe"]
    words = container("job", "erpe")["args"]
    entry = shlex.split(job["entrypoint"])
    assert entry[:2] == ["exec", "erpe"] and words[:2] == ["submit", "--follow"] and words[2:] == entry[2:]
    there = {"ERPE_RAY_JOBS": "http://127.0.0.1:9", "PATH": "/usr/bin:/bin"}
    said = CliRunner().invoke(app, words, env=there)
    assert "no response" in str(said.exception), said.output  # it got as far as to try the address


def test_the_launcher_file_is_what_ray_allows_and_starts_ray_as_compose_does():
    given = yaml.safe_load((INFRA / "ray-cluster.yaml").read_text())
    jsonschema.validate(given, json.loads((RAY / "autoscaler/ray-schema.json").read_text()))
    head, worker = (shlex.split(given[f"{kind}_start_ray_commands"][-1]) for kind in ("head", "worker"))
    assert options(head).pop("autoscaling-config") and head[:2] == worker[:2] == ["ray", "start"]
    differ = {"autoscaling-config", "dashboard-host", "address", "num-cpus"}  # CPUs: all that the machine has
    for service, words in (("ray-head", head), ("ray-worker", worker)):
        ours = {name: value for name, value in options(words).items() if name not in differ}
        assert ours == {name: value for name, value in started(service).items() if name not in differ}
    assert given["available_node_types"].keys() == {given["head_node_type"], "gpu"}
    assert given["available_node_types"]["gpu"]["max_workers"] <= given["max_workers"]
    docker = given["docker"]
    found = dict(
        word.removeprefix("--env=").split("=", 1)
        for word in [*docker["run_options"], *docker["head_run_options"]]
        if word.startswith("--env=")
    )
    assert found.keys() == COMPOSE["ray-head"]["environment"].keys()
    files = {name: value for name, value in found.items() if re.search("_FILE$|_PATH$", name)}
    assert set(files.values()) == given["file_mounts"].keys()
