"""cluster/: what its files call in an image of ours is installed there."""

import pytest
from cluster_reader import documents, names, text
from image_checks import calls, installed, missing, programs
from test_cluster_files import changed

PLACES = [name for name in names() if name.endswith(".yaml") and name != "run.yaml"]
PROBE = "spec/headGroupSpec/template/spec/containers/0/livenessProbe"


def lacking(name: str, documents_of_it: list[dict], dockerfiles: dict[str, str] | None = None) -> list[str]:
    called: dict[str, set[str]] = {}
    for document in documents_of_it:
        for dockerfile, program in calls(document):
            called.setdefault(dockerfile, set()).add(program)
    given = dockerfiles or {}
    return [
        one for dockerfile in called for one in missing(given.get(dockerfile, text(dockerfile)), called[dockerfile])
    ]


def test_calls_are_found():
    line = "ulimit -n 65536; set -a; . /opt/x.env; set +a; A=1 ray start --head && exec mlflow server | cat"
    assert programs(line) == {"ulimit", "set", ".", "ray", "mlflow", "cat"}
    found = {name: {program for document in documents(name) for _, program in calls(document)} for name in PLACES}
    assert {"rsync", "ssh", "ray", "pip"} <= found["ray_gcp.yaml"]
    assert {"flipkd", "ray"} <= found["kuberay_job.yaml"]
    assert {"mlflow", "psycopg2"} <= found["mlflow_kubernetes.yaml"]
    assert {"sh", "mlflow", "psycopg2", "python"} <= found["mlflow_compose.yaml"]
    assert found["ray_aws.yaml"] == set()  # no image
    assert {"rsync", "openssh-clients", "ray", "mlflow", "python"} <= installed(text("Dockerfile"))


@pytest.mark.parametrize("name", PLACES)
def test_an_image_has_what_is_called_in_it(name):
    assert lacking(name, documents(name)) == []


@pytest.mark.parametrize(
    ("name", "dockerfile", "package", "said"),
    [
        ("ray_gcp.yaml", "Dockerfile", " rsync", "rsync: called, and the image does not install rsync"),
        ("ray_gcp.yaml", "Dockerfile", " openssh-clients", "ssh: called, and the image does not install openssh"),
        ("mlflow_compose.yaml", "mlflow.Dockerfile", " psycopg2-binary", "psycopg2: called, "),
        ("mlflow_kubernetes.yaml", "mlflow.Dockerfile", "mlflow psycopg2", "mlflow: called, "),
        ("kuberay_job.yaml", "Dockerfile", ' ".[demo,endpoint]"', "flipkd: called, "),
    ],
)
def test_an_image_without_a_package_is_refused(name, dockerfile, package, said):
    whole = text(dockerfile)
    assert package in whole
    found = lacking(name, documents(name), {dockerfile: whole.replace(package, "")})
    assert any(problem.startswith(said) for problem in found)


@pytest.mark.parametrize(
    ("name", "path", "value"),
    [
        ("kuberay_cluster.yaml", PROBE, {"exec": {"command": ["bash", "-c", "wget -q -O- localhost | cat"]}}),
        ("mlflow_compose.yaml", "services/mlflow/healthcheck/test", ["CMD", "wget", "--spider", "localhost:5000"]),
        ("ray_gcp.yaml", "head_setup_commands", ["wget -q https://example.com/x"]),
    ],
)
def test_a_place_that_calls_what_is_not_there_is_refused(name, path, value):
    found = lacking(name, [changed(documents(name)[0], path, value)])
    assert found == ["wget: called, and the image does not install wget"]
