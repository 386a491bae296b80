"""cluster/: the files fit each other, the example run, the images, constraints.txt and the guide."""

import re
from collections.abc import Iterator
from fnmatch import fnmatch

import place_checks
import pytest
import yaml
from cluster_reader import CLUSTER, ROOT, documents, names, text

from flipkd_dist.config import load_config


def named(name: str, kind: str, which: str) -> dict:
    return next(one for one in documents(name) if one["kind"] == kind and one["metadata"]["name"] == which)


def ray_pods() -> dict[str, dict]:
    spec = documents("kuberay_cluster.yaml")[0]["spec"]
    groups = {group["groupName"]: group for group in spec["workerGroupSpecs"]}
    return {name: group["template"]["spec"] for name, group in {"head": spec["headGroupSpec"], **groups}.items()}


def test_the_job_s_cluster_is_the_cluster():
    assert documents("kuberay_job.yaml")[0]["spec"]["rayClusterSpec"] == documents("kuberay_cluster.yaml")[0]["spec"]


def test_versions_and_users_are_those_of_the_images():
    assert documents("kuberay_cluster.yaml")[0]["spec"]["rayVersion"] == place_checks.pinned()["ray"]
    version = re.search(r'^version = "(.+)"', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.M).group(1)
    pods = [
        *ray_pods().values(),
        named("mlflow_kubernetes.yaml", "Deployment", "flipkd-mlflow")["spec"]["template"]["spec"],
    ]
    for pod in pods:
        assert pod["containers"][0]["image"].endswith(f":{version}")
        assert pod["securityContext"]["runAsUser"] == pod["securityContext"]["fsGroup"] == 1000
    assert documents("ray_gcp.yaml")[0]["docker"]["image"] == ray_pods()["head"]["containers"][0]["image"]
    for name in ("Dockerfile", "mlflow.Dockerfile"):
        assert "--uid 1000" in text(name) and "USER 1000" in text(name)


def test_pods_mount_the_shared_storage_the_run_s_file_and_memory():
    claim = documents("kuberay_storage.yaml")[0]["metadata"]["name"]
    for pod in ray_pods().values():
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        mounts = {mount["mountPath"]: volumes[mount["name"]] for mount in pod["containers"][0]["volumeMounts"]}
        assert mounts["/mnt/flipkd"]["persistentVolumeClaim"] == {"claimName": claim}
        assert mounts["/config"]["configMap"] == {"name": "flipkd-config"}
        assert mounts["/dev/shm"]["emptyDir"]["medium"] == "Memory"
    mlflow = named("mlflow_kubernetes.yaml", "Deployment", "flipkd-mlflow")["spec"]["template"]["spec"]
    claimed = mlflow["volumes"][0]["persistentVolumeClaim"]["claimName"]
    assert named("mlflow_kubernetes.yaml", "PersistentVolumeClaim", claimed)


def test_the_job_runs_the_file_that_the_guide_puts_there():
    guide = (ROOT / "docs/clusters.md").read_text(encoding="utf-8")
    assert "create configmap flipkd-config --from-file=cluster/run.yaml" in guide
    assert documents("kuberay_job.yaml")[0]["spec"]["entrypoint"] == "flipkd run /config/run.yaml"
    trainers = ray_pods()["trainers"]["containers"][0]["envFrom"][0]["configMapRef"]["name"]
    assert re.search(rf"create configmap {trainers} --from-env-file=cluster/nccl/\w+\.env", guide)
    for source in re.findall(r"cluster/[\w./]+\w", guide):
        assert (ROOT / source).exists(), source


def test_every_value_to_fill_in_is_named_in_the_guide():
    guide = (ROOT / "docs/clusters.md").read_text(encoding="utf-8")
    for name in names():
        for line in text(name).splitlines():
            if "# fill in" in line and not line.lstrip().startswith("#"):
                assert line.split("# fill in")[0].strip().lstrip("- ").split(":")[0].split()[0] in guide, (name, line)


def test_runs_are_tracked_by_the_server_of_the_manifest():
    service = named("mlflow_kubernetes.yaml", "Service", "flipkd-mlflow")
    deployment = named("mlflow_kubernetes.yaml", "Deployment", "flipkd-mlflow")["spec"]["template"]
    container = deployment["spec"]["containers"][0]
    port = service["spec"]["ports"][0]
    assert service["spec"]["selector"].items() <= deployment["metadata"]["labels"].items()
    assert {"name": port["targetPort"], "containerPort": 5000} in container["ports"]
    address = f"{service['metadata']['name']}:{port['port']}"
    for pod in ray_pods().values():
        assert {"name": "MLFLOW_TRACKING_URI", "value": f"http://{address}"} in pod["containers"][0]["env"]
    env = {one["name"]: one.get("value") for one in container["env"]}
    assert any(fnmatch(address, allowed) for allowed in env["MLFLOW_SERVER_ALLOWED_HOSTS"].split(","))
    assert f"--port={port['port']}" in container["command"]


def test_the_server_finds_its_database():
    database = named("mlflow_kubernetes.yaml", "StatefulSet", "flipkd-postgres")["spec"]
    service = named("mlflow_kubernetes.yaml", "Service", database["serviceName"])
    policy = named("mlflow_kubernetes.yaml", "NetworkPolicy", "flipkd-postgres")["spec"]
    server = named("mlflow_kubernetes.yaml", "Deployment", "flipkd-mlflow")["spec"]["template"]
    labels = database["template"]["metadata"]["labels"]
    assert service["spec"]["selector"] == policy["podSelector"]["matchLabels"] == labels
    assert policy["ingress"][0]["from"][0]["podSelector"]["matchLabels"] == server["metadata"]["labels"]
    assert f"@{service['metadata']['name']}:5432/mlflow" in " ".join(server["spec"]["containers"][0]["command"])
    secrets = [
        one["valueFrom"]["secretKeyRef"]
        for pod in (server, database["template"])
        for one in pod["spec"]["containers"][0]["env"]
        if "PASSWORD" in one["name"]
    ]
    assert secrets == [{"name": "flipkd-postgres", "key": "password"}] * 2
    services = documents("mlflow_compose.yaml")[0]["services"]
    assert "@postgres:5432/mlflow" in services["mlflow"]["command"][2]
    assert "POSTGRES_PASSWORD" not in services["postgres"]["environment"]


def settings(value: object) -> Iterator[tuple[str, object]]:
    """Every key with its value, those of {name, value} among them."""
    if isinstance(value, dict):
        yield from value.items()
        if {"name", "value"} <= value.keys():
            yield value["name"], value["value"]
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else []:
        yield from settings(inner)


def test_no_secret_is_written_down():
    found = {}
    for name in names():
        assert not re.search(r"://[^\s/@:]+:[^\s/@]+@", text(name)), name  # a password in an address
        if name.endswith(".yaml"):
            found |= {key: value for key, value in settings(documents(name)) if re.search("(?i)password|token", key)}
    assert found.pop("POSTGRES_PASSWORD_FILE") == "/run/secrets/postgres_password"
    assert found.pop("postgres_password") == {"environment": "POSTGRES_PASSWORD"}
    assert found.pop("automountServiceAccountToken") is False
    assert found == {}


def groups() -> dict[str, dict[str, tuple[int, dict]]]:
    """By place and group: how many nodes at most, and what a node offers."""
    spec, found = documents("kuberay_cluster.yaml")[0]["spec"], {"kuberay": {}}
    for group in spec["workerGroupSpecs"]:
        limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
        own = yaml.safe_load(group["rayStartParams"]["resources"][1:-1].replace("\\", ""))
        offered = {"CPU": int(limits["cpu"]), "GPU": int(limits.get("nvidia.com/gpu", 0)), **own}
        found["kuberay"][group["groupName"]] = (group["maxReplicas"], offered)
    for place in ("aws", "gcp"):
        nodes = documents(f"ray_{place}.yaml")[0]["available_node_types"]
        found[place] = {
            name: (nodes[name]["max_workers"], nodes[name]["resources"]) for name in ("teachers", "trainers")
        }
    return found


@pytest.mark.parametrize("place", ["kuberay", "aws", "gcp"])
def test_actors_and_workers_of_the_run_have_room_on_their_own_nodes_and_on_no_others(place):
    config = load_config(CLUSTER / "run.yaml")
    teacher, distributed = config.teacher, config.distributed
    asked = {
        "teachers": {"CPU": teacher.num_cpus_per_worker, **teacher.resources_per_worker},
        "trainers": {"CPU": 1, "GPU": 1, **distributed.resources_per_worker},
    }
    wanted = {"teachers": teacher.num_workers[1], "trainers": distributed.max_workers}
    for name, need in asked.items():
        for group, (nodes, offered) in groups()[place].items():
            a_node = min(offered.get(key, 0) // amount for key, amount in need.items())
            assert nodes * a_node >= wanted[name] if group == name else a_node == 0, (name, group)
        assert need.keys() - {"CPU", "GPU"} == groups()[place][name][1].keys() - {"CPU", "GPU"}  # the name it goes by
    assert (teacher.num_gpus_per_worker, distributed.use_gpu) == (0, True)


MEMORY_GIB = {"m7i.2xlarge": 32, "r7i.2xlarge": 64, "n2-standard-8": 32, "n2-highmem-8": 64}
PARAMETERS = {"glm-4-9b": 9.4e9}


def heads() -> dict[str, int]:
    """Memory of every head, GiB."""
    limits = ray_pods()["head"]["containers"][0]["resources"]["limits"]
    aws, gcp = (
        documents(f"ray_{place}.yaml")[0]["available_node_types"]["head"]["node_config"] for place in ("aws", "gcp")
    )
    return {
        "kuberay": int(limits["memory"].removesuffix("Gi")),
        "aws": MEMORY_GIB[aws["InstanceType"]],
        "gcp": MEMORY_GIB[gcp["machineType"]],
    }


def test_a_head_has_room_for_the_student_that_it_registers():
    """A base that cannot be streamed is loaded whole there, and on a CPU in fp32."""
    base = load_config(CLUSTER / "run.yaml").student.model_name_or_path.rsplit("/", 1)[-1]
    needed = PARAMETERS[base] * 4 / 2**30
    assert {place: gib for place, gib in heads().items() if gib < needed} == {}


def test_the_guide_says_what_a_cloud_must_allow():
    """Ray's own security group lets in itself and ssh; Ray's own role may not hand on another."""
    guide, aws = (ROOT / "docs/clusters.md").read_text(encoding="utf-8"), documents("ray_aws.yaml")[0]
    assert any("mount -t efs" in command for command in aws["initialization_commands"])
    assert f"`ray-autoscaler-{aws['cluster_name']}`" in guide and "2049" in guide
    workers = [node["node_config"] for name, node in aws["available_node_types"].items() if name != "head"]
    assert all("IamInstanceProfile" in node for node in workers) and "`iam:PassRole`" in guide


def test_paths_of_the_run_are_on_the_storage_that_every_place_mounts():
    config = load_config(CLUSTER / "run.yaml")
    data = (config.data.train, config.data.validation, config.data.test)
    paths = (config.output_dir, *data, config.teacher.model_name_or_path, config.student.model_name_or_path)
    assert all(path.startswith("/mnt/flipkd/") for path in paths)
    for place in ("aws", "gcp"):
        assert "/mnt/flipkd" in " ".join(documents(f"ray_{place}.yaml")[0]["initialization_commands"])
    aws = documents("ray_aws.yaml")[0]  # a new file system there is root's, and Ray runs as another user
    assert aws["initialization_commands"][-1] == f"sudo chown {aws['auth']['ssh_user']} /mnt/flipkd"
    assert "--volume /mnt/flipkd:/mnt/flipkd" in documents("ray_gcp.yaml")[0]["docker"]["run_options"]


@pytest.mark.parametrize("place", ["aws", "gcp"])
def test_nodes_of_a_cloud_start_with_variables_that_are_there(place):
    started = " ".join(documents(f"ray_{place}.yaml")[0]["worker_start_ray_commands"])
    assert (CLUSTER / re.search(r"cluster/(nccl/\w+\.env)", started).group(1)).is_file()


def test_the_package_knows_no_interface():
    for path in (ROOT / "flipkd_dist").rglob("*.py"):
        assert not re.search(r"\b(eth|ens|enp\d+s|eno|ib|bond|wlan)\d+\b", path.read_text(encoding="utf-8")), path
