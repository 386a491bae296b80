"""cluster/: every file passes the check of its kind, and the checks refuse what is broken."""

import json

import kube_checks
import place_checks
import pytest
from cluster_reader import CLUSTER, documents, names, text

from flipkd_dist.config import load_config

GONE = object()


def manifests(name: str) -> list[str]:
    return [problem for document in documents(name) for problem in kube_checks.problems(document)]


def image(name: str) -> list[str]:
    return place_checks.dockerfile_problems(text(name), text(f"{name}.dockerignore"))


CHECKS = {
    "Dockerfile": image,
    "Dockerfile.dockerignore": lambda name: image(name.removesuffix(".dockerignore")),
    "mlflow.Dockerfile": image,
    "mlflow.Dockerfile.dockerignore": lambda name: image(name.removesuffix(".dockerignore")),
    "kuberay_storage.yaml": manifests,
    "kuberay_cluster.yaml": manifests,
    "kuberay_job.yaml": manifests,
    "mlflow_kubernetes.yaml": manifests,
    "mlflow_compose.yaml": lambda name: place_checks.compose_problems(documents(name)[0]),
    "ray_aws.yaml": lambda name: place_checks.launcher_problems(documents(name)[0]),
    "ray_gcp.yaml": lambda name: place_checks.launcher_problems(documents(name)[0]),
    "run.yaml": lambda name: load_config(CLUSTER / name) and [],
    **{
        f"nccl/{site}.env": lambda name: place_checks.env_problems(text(name))
        for site in ("aws_efa", "ethernet", "gcp_gvnic", "gcp_tcpx", "infiniband", "nvlink_node", "roce")
    },
}


def test_every_file_has_a_check():
    assert {*names()} == CHECKS.keys()


@pytest.mark.parametrize("name", CHECKS)
def test_a_file_passes_its_check(name):
    assert CHECKS[name](name) == []


def changed(document: dict, path: str, value: object) -> dict:
    """A copy with another value at a dotted path, or without one."""
    copy = inner = json.loads(json.dumps(document))  # what YAML aliases share is apart now
    *way, last = [int(key) if key.isdigit() else key for key in path.split("/")]
    for key in way:
        inner = inner[key]
    if value is GONE:
        del inner[last]
    else:
        inner[last] = value
    return copy


HEAD, TRAINERS = "spec/headGroupSpec/template/spec", "spec/workerGroupSpecs/1"


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        ("spec/enableAutoscaling", True, "enableAutoscaling: unknown field"),
        ("spec/autoscalerOptions/idleTimeoutMinutes", 5, "idleTimeoutMinutes: unknown field"),
        ("spec/autoscalerOptions/version", "v3", "version: 'v3' is none of"),
        ("spec/headGroupSpec/rayStartParams/num-cpus", 0, "num-cpus: 0 is no str"),
        (f"{TRAINERS}/minReplicas", "1", "minReplicas: '1' is no int"),
        (f"{TRAINERS}/minReplicas", GONE, "minReplicas: missing"),
        (f"{TRAINERS}/maxReplica", 3, "maxReplica: unknown field"),
        ("spec/workerGroupSpecs", {}, "is no list"),
        ("apiVersion", "ray.io/v2", "is none of"),
        (f"{HEAD}/tolerance", [], "'tolerance' was unexpected"),
        (f"{HEAD}/containers/0/ports/0/containerPort", "6379", "is not of type 'integer'"),
        (f"{HEAD}/containers/0/volumeMounts/0/name", "absent", "ray-head: no volume absent"),
        (f"{HEAD}/containers/0/livenessProbe", GONE, "ray-head: no livenessProbe"),
        (f"{HEAD}/containers/0/resources/limits", GONE, "ray-head: requests and limits"),
        (f"{HEAD}/containers/0/securityContext", GONE, "ray-head: may gain privileges"),
        (f"{HEAD}/securityContext/runAsNonRoot", False, "runs as root"),
        (f"{HEAD}/enableServiceLinks", GONE, "enableServiceLinks"),
    ],
)
def test_a_broken_ray_cluster_is_refused(path, value, said):
    document = documents("kuberay_cluster.yaml")[0]
    found = kube_checks.problems(changed(document, path, value))
    assert len(found) == 1 and said in found[0]


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        ("spec/backoffLimits", 2, "backoffLimits: unknown field"),
        ("spec/backoffLimit", "2", "is no int"),
        ("spec/submissionMode", "HttpMode", "is none of"),
        ("spec/rayClusterSpec/headGroup", {}, "headGroup: unknown field"),
        ("kind", "RayJobs", "no such kind"),
    ],
)
def test_a_broken_ray_job_is_refused(path, value, said):
    found = kube_checks.problems(changed(documents("kuberay_job.yaml")[0], path, value))
    assert len(found) == 1 and said in found[0]


POD = "spec/template/spec"


@pytest.mark.parametrize(
    ("kind", "path", "value", "said"),
    [
        ("Deployment", "spec/replica", 1, "'replica' was unexpected"),
        ("Deployment", "spec/replicas", "1", "is not of type"),
        ("Deployment", f"{POD}/containers/0/volumeMounts/0/name", "models", "mlflow: no volume models"),
        ("Deployment", f"{POD}/volumes", GONE, "mlflow: no volume artifacts"),
        ("Deployment", f"{POD}/containers/0/readinessProbe/httpGet/port", "web", "asks port web"),
        ("StatefulSet", "spec/volumeClaimTemplates/0/metadata/name", "data", "postgres: no volume database"),
        ("StatefulSet", "spec/selector", GONE, "'selector' is a required property"),
        ("NetworkPolicy", "spec/ingress/0/ports/0/port", [], "is not"),
        ("Service", "spec/ports/0/targetPorts", 1, "'targetPorts' was unexpected"),
        ("PersistentVolumeClaim", "spec/accessMode", "ReadWriteMany", "'accessMode' was unexpected"),
    ],
)
def test_a_broken_mlflow_server_is_refused(kind, path, value, said):
    document = next(one for one in documents("mlflow_kubernetes.yaml") if one["kind"] == kind)
    found = kube_checks.problems(changed(document, path, value))
    assert len(found) == 1 and said in found[0]


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        ("services/mlflow/restarts", "always", "'restarts' was unexpected"),
        ("services/mlflow/ports/0", [], "services.mlflow.ports.0: [] is not"),
        ("service", {}, "'service' does not match any of the regexes"),
        ("volumes/artifacts", GONE, "mlflow: no volumes artifacts"),
        ("secrets/postgres_password", GONE, "no secrets postgres_password"),
        ("services/mlflow/depends_on", ["database"], "mlflow: no service database"),
        ("services/postgres/healthcheck", GONE, "postgres: no healthcheck"),
        ("networks/inside", GONE, "no networks inside"),
    ],
)
def test_a_broken_compose_file_is_refused(path, value, said):
    found = place_checks.compose_problems(changed(documents("mlflow_compose.yaml")[0], path, value))
    assert any(said in problem for problem in found)


@pytest.mark.parametrize("name", ["ray_aws.yaml", "ray_gcp.yaml"])
@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        ("available_node_types/trainers/node_config/instanceType", "x", "trainers: no machine has instanceType"),
        ("available_node_types/trainers/max_workers", 9, "the node types add up to 13"),
        ("file_mounts", {"/x": "absent"}, "file_mounts: no absent"),
        ("setup_commands", GONE, "setup_commands: not said"),
        ("setup_commands", ["pip install ray"], "pip installs without constraints.txt"),
        ("initialization_commands", ["mount x  # fill in"], "a comment inside a command"),
        ("initialization_commands", ["sudo apt-get install -y x"], "apt-get installs from a list"),
    ],
)
def test_a_broken_launcher_file_is_refused(name, path, value, said):
    found = place_checks.launcher_problems(changed(documents(name)[0], path, value))
    assert len(found) == 1 and said in found[0]


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("COPY launchers launchers", "COPY launcher launchers", "COPY launcher: is not there"),
        ('".[demo,endpoint]"', '".[demo]" torch==2.12.0', "torch==2.12.0: constraints.txt has 2.13.0"),
        ('".[demo,endpoint]"', '".[demo]" ray[default]==2.50.0', "ray==2.50.0"),
        ("python3.11 -m", "python3.12 -m", "python 3.12: tested with 3.11"),
        ("--constraint constraints.txt", "", "pip installs without constraints.txt"),
        ("USER 1000", "", "runs as root"),
        ("USER 1000", "USER root", "runs as root"),
        ("WORKDIR /opt", "WORKDIRS /opt", "WORKDIRS: no instruction"),
        ("COPY ds_configs ds_configs\n", "", "lets through other things"),
    ],
)
def test_a_broken_dockerfile_is_refused(old, new, said):
    whole = text("Dockerfile")
    assert old in whole
    found = place_checks.dockerfile_problems(whole.replace(old, new), text("Dockerfile.dockerignore"))
    assert any(said in problem for problem in found)


def test_an_ignore_file_that_lets_data_through_is_refused():
    for ignored in (text("Dockerfile.dockerignore") + "!runs\n", text("Dockerfile.dockerignore").replace("*\n", "", 1)):
        assert place_checks.dockerfile_problems(text("Dockerfile"), ignored) == [
            "the ignore file lets through other things than those that are copied"
        ]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("NCCL_IB_HCAS=mlx5", "NCCL_IB_HCAS is documented nowhere"),
        ("# NCCL_SOKET_IFNAME=eth0", "NCCL_SOKET_IFNAME is documented nowhere"),
        ("NCCL_NET=AWS Libfabric", "is not the same to every reader"),
        ('NCCL_DEBUG="INFO"', "is not the same to every reader"),
        ("export NCCL_DEBUG=INFO", "neither an assignment nor a comment"),
        ("NCCL_DEBUG=INFO\nNCCL_DEBUG=WARN", "NCCL_DEBUG: said twice"),
    ],
)
def test_a_broken_list_of_variables_is_refused(line, said):
    found = place_checks.env_problems(text("nccl/roce.env").replace("NCCL_DEBUG=WARN\n", "") + line + "\n")
    assert len(found) == 1 and said in found[0]
