"""cluster/ as those programs read it: Ray's autoscaler, a shell, kubectl, docker compose. Nothing is started."""

import json
import os
import shutil
import subprocess

import jsonschema
import pytest
import yaml
from cluster_reader import CLUSTER, ROOT, documents, names
from test_cluster_files import GONE, changed

pytestmark = pytest.mark.system
SITES = [name for name in names() if name.startswith("nccl/")]


def said_by(*command: str, **environment: str) -> str:
    done = subprocess.run(
        command, cwd=ROOT, env={"PATH": os.environ["PATH"], **environment}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def launched(config: dict) -> dict:
    """What `ray up` makes of a file before it asks the provider for anything."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    prepared = prepare_config(config)
    validate_config(prepared)
    return prepared


@pytest.mark.parametrize("name", ["ray_aws.yaml", "ray_gcp.yaml"])
def test_ray_takes_the_launcher_files_and_refuses_broken_ones(name):
    config = documents(name)[0]
    prepared = launched(config)
    commands = " ".join(command for key in prepared if key.endswith("commands") for command in prepared[key])
    assert "ray-wheels" not in commands and prepared["head_node_type"] == "head"  # none of Ray's defaults is left
    trainers = "available_node_types/trainers"
    for path, value in [
        ("idle_timeout_minute", 5),
        ("max_workers", "6"),
        (f"{trainers}/resources", GONE),
        (f"{trainers}/resources/trainer", 0.5),
        (f"{trainers}/max_worker", 2),
        ("initialization_commands", "mount"),
    ]:
        with pytest.raises(jsonschema.ValidationError):
            launched(changed(config, path, value))
    for path, value in [("head_node_type", "absent"), (f"{trainers}/min_workers", 99)]:
        with pytest.raises(ValueError):
            launched(changed(config, path, value))


def test_the_autoscaler_reads_the_groups_of_the_ray_cluster():
    from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr

    cluster = documents("kuberay_cluster.yaml")[0]
    cluster["metadata"]["namespace"] = "default"  # as the API server answers
    nodes = _derive_autoscaling_config_from_ray_cr(cluster)["available_node_types"]
    kept = ("CPU", "GPU", "teacher", "trainer")
    offered = {
        name: {key: node["resources"][key] for key in kept if key in node["resources"]} for name, node in nodes.items()
    }
    assert offered == {
        "headgroup": {"CPU": 0},
        "teachers": {"CPU": 8, "teacher": 4},
        "trainers": {"CPU": 24, "GPU": 4, "trainer": 4},
    }
    assert [nodes[name]["max_workers"] for name in offered] == [0, 4, 2]
    for path, value in [
        ("spec/workerGroupSpecs/0/rayStartParams/resources", '{"teacher": 4}'),  # KubeRay wants it quoted
        ("spec/workerGroupSpecs/0/maxReplicas", GONE),
    ]:
        with pytest.raises((ValueError, KeyError)):
            _derive_autoscaling_config_from_ray_cr(changed(cluster, path, value))


@pytest.mark.parametrize("name", SITES)
def test_a_shell_and_kubectl_read_the_same_variables(name):
    sourced = said_by("bash", "-c", f"env -i bash -c 'set -a; . cluster/{name}; env -0'")
    variables = dict(line.split("=", 1) for line in sourced.split("\0") if line)
    variables = {key: value for key, value in variables.items() if key.split("_")[0] in ("NCCL", "GLOO", "FI")}
    assert len(variables) >= 3
    if shutil.which("kubectl") is None:
        pytest.skip("kubectl is not installed: only the shell was asked")
    command = [
        "kubectl",
        "create",
        "configmap",
        "x",
        f"--from-env-file=cluster/{name}",
        "--dry-run=client",
        "-o",
        "json",
    ]
    assert json.loads(said_by(*command))["data"] == variables


def test_docker_compose_takes_the_mlflow_server():
    compose = ["docker", "compose", "--file", str(CLUSTER / "mlflow_compose.yaml")]
    if shutil.which("docker") is None or subprocess.run([*compose[:2], "version"], capture_output=True).returncode:
        pytest.skip("docker compose is not installed")
    resolved = yaml.safe_load(said_by(*compose, "config", POSTGRES_PASSWORD="x"))
    [port] = resolved["services"]["mlflow"]["ports"]
    assert (port["host_ip"], port["published"], port["target"]) == ("127.0.0.1", "5000", 5000)
    assert "$$(cat" in resolved["services"]["mlflow"]["command"][2]


def test_pairs_that_ray_would_leave_behind_are_refused(tmp_path, monkeypatch):
    """Ray reads the ignore files of every folder on the way; what goes along is asked of Ray itself."""
    from ray._private.runtime_env.packaging import get_uri_for_directory

    from flipkd_dist.errors import UserError
    from flipkd_dist.ray_job import submission

    def submitted(train: str) -> None:
        submission("run", ["bank.yaml", f"data.train={train}"], {"RAY_ADDRESS": "http://head:8265"})

    monkeypatch.chdir(tmp_path)
    (tmp_path / "data/raw").mkdir(parents=True)
    files = ("pairs.jsonl", "other.csv", "data/a.jsonl", "data/raw/b.jsonl", "data/raw/a.jsonl", "data/raw/c.csv")
    for name in files:
        (tmp_path / name).write_text("{}")
    (tmp_path / "bank.yaml").write_text("name: bank\noutput_dir: /shared/runs\ndata: {test: pairs.jsonl}\n")
    (tmp_path / ".gitignore").write_text("*.csv\n/data/a.jsonl\n")
    (tmp_path / "data/raw/.rayignore").write_text("b.*\n")
    for name in files:
        before = get_uri_for_directory(str(tmp_path), include_gitignore=True)
        with (tmp_path / name).open("a") as file:
            file.write(" ")
        if get_uri_for_directory(str(tmp_path), include_gitignore=True) == before:
            with pytest.raises(UserError, match=f"^data.train: {name} is not sent along, .*ignore leaves it out: "):
                submitted(name)
        else:
            submitted(name)
    with pytest.raises(UserError, match=r"data/raw/\.rayignore leaves"):
        submitted("./data/raw/b.jsonl")
    monkeypatch.setenv("RAY_RUNTIME_ENV_IGNORE_GITIGNORE", "1")
    submitted("data/a.jsonl")
