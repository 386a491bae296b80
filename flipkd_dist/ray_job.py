"""A job of a Ray cluster, seen from the machine that submits it: what goes along, and how it ended.

`launchers/ray_submit.sh` runs this module before and after `ray job submit`. The job begins in a copy of the working
directory, on a machine of the cluster, and Ray removes the copy afterwards.
"""

import json
import logging
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from flipkd_dist.config import RunConfig, load_config
from flipkd_dist.errors import UserError

EXCLUDES = ("runs/", ".git/", ".venv/")  # of the working directory; besides, Ray obeys .gitignore
IGNORES = (".gitignore", ".rayignore")  # in Ray's order
PASSED_ON = (
    "HF_HUB_OFFLINE",
    "HF_HOME",
    "MLFLOW_TRACKING_URI",
    "OMP_NUM_THREADS",
    "DS_ACCELERATOR",
    "FLIPKD_DEBUG",
    "GLOO_SOCKET_IFNAME",
    "NCCL_SOCKET_IFNAME",
    "RAY_JOB_STOP_WAIT_TIME_S",
)
STOP_WAIT_S = 600  # `ray job stop` kills after 3 s, which is no time for a checkpoint
SECRET = re.compile(r"(TOKEN|SECRET|PASSWORD|PASSWD|PASS|PWD|CREDENTIAL|AUTH|KEY)S?(_ID)?$", re.IGNORECASE)
ALWAYS_PATHS = ("teacher.store_path", "distributed.storage_path")  # no hub ids
VERBS = ("run", "score", "teach", "train", "evaluate", "register")


def runtime_env(environ: Mapping[str, str]) -> dict[str, Any]:
    """Ray's runtime environment of the job; all of it can be read in the cluster's dashboard.

    Raises:
        UserError: a secret would go along.
    """
    named = environ.get("PASS_ENV", "").split()
    for name in named:
        if SECRET.search(name):
            raise UserError(
                f"PASS_ENV: {name} looks like a secret, and the cluster shows a job's variables to everyone: "
                "set it on the cluster's nodes"
            )
    variables = {name: environ[name] for name in (*PASSED_ON, *named) if name in environ}
    variables.setdefault("RAY_JOB_STOP_WAIT_TIME_S", str(STOP_WAIT_S))
    for name, value in variables.items():
        _refuse_login(name, value)
    env: dict[str, Any] = {"excludes": list(EXCLUDES), "env_vars": variables}
    if environ.get("PIP"):
        env["pip"] = environ["PIP"]
    if environ.get("PY_MODULES"):
        env["py_modules"] = environ["PY_MODULES"].split()
    return env


def _refuse_login(name: str, value: str) -> None:
    if re.search(r"://[^/\s]*@", value):
        raise UserError(
            f"{name}: holds a user or password, and the cluster shows a job's command and variables to everyone: take "
            "it out, and set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD on the cluster's nodes"
        )


def check_sent(config: RunConfig, environ: Mapping[str, str]) -> None:
    """Refuse paths that the job would not find or would lose; the current folder is the working directory.

    Raises:
        UserError: names the setting.
    """
    if not Path(config.output_dir).is_absolute():
        raise UserError(
            f"output_dir: {config.output_dir} would lie in the job's copy of the working directory, which Ray removes: "
            "give an absolute path on storage that every node shares"
        )
    for key, value in _paths(config, data=False):
        local = value.startswith((".", "~")) or Path(value).exists()
        if "://" not in value and not Path(value).is_absolute() and (local or key in ALWAYS_PATHS):
            raise UserError(
                f"{key}: {value} would be another folder in each job: give an absolute path on storage that every node "
                "shares"
            )
    for key, value in _paths(config, data=True):
        _check_goes_along(key, value)
    address = config.tracking.mlflow_tracking_uri or environ.get("MLFLOW_TRACKING_URI") or ""
    if address.startswith("sqlite:///") and not address.startswith("sqlite:////"):
        raise UserError(
            f"tracking.mlflow_tracking_uri: {address} would lie in the job's copy of the working directory, which Ray "
            "removes: name a server, or an absolute path"
        )


def _paths(config: RunConfig, data: bool) -> Iterator[tuple[str, str]]:
    """(key, path) of the pairs, or of what a run keeps or refers to later."""
    teacher = config.teacher
    if data:
        found = [(f"data.{split}", getattr(config.data, split)) for split in ("train", "validation", "test")]
        found += [("teacher.scores", teacher.scores)]
    else:
        models = [] if teacher.api_base else [("teacher.model_name_or_path", teacher.model_name_or_path)]
        models += [("teacher.cross_encoder", teacher.cross_encoder)]
        models += [("student.model_name_or_path", config.student.model_name_or_path)]
        found = [*models, (ALWAYS_PATHS[0], teacher.store_path), (ALWAYS_PATHS[1], config.distributed.storage_path)]
    for key, value in found:
        yield from ((key, one) for one in ([value] if isinstance(value, str) else value or []))


def _check_goes_along(key: str, value: str) -> None:
    """A relative path of a file has to be among what is sent; a hub id has a colon."""
    path = Path(value)
    if path.is_absolute():
        return
    remedy = "put it there, or give an absolute path on storage that every node shares"
    if value.startswith("~") or not path.resolve().is_relative_to(Path.cwd()):
        raise UserError(f"{key}: {value} is not inside the working directory {Path.cwd()}: {remedy}")
    if path.parts[:1] and f"{path.parts[0]}/" in EXCLUDES:
        raise UserError(f"{key}: {value} is not sent along ({', '.join(EXCLUDES)} stay here): move it")
    if ":" not in value and not path.exists():
        raise UserError(f"{key}: {value} is not in the working directory {Path.cwd()}: {remedy}")
    if path.exists() and (named := _ignored_by(path)):
        raise UserError(
            f"{key}: {value} is not sent along, {named} leaves it out: take it out there, or give an absolute path on "
            "storage that every node shares"
        )


def _ignored_by(path: Path) -> Path | None:
    """The file that keeps a path out of what Ray sends, read as Ray reads it, in each folder on the way there."""
    whole = os.environ.get("RAY_RUNTIME_ENV_IGNORE_GITIGNORE") == "1"  # Ray's own setting for the same
    folder, rules = Path(), []
    for part in Path(os.path.normpath(path)).parts:
        found = [folder / name for name in IGNORES[whole:] if (folder / name).is_file()]
        if found:
            from ray._private.runtime_env.packaging import get_excludes_from_ignore_files

            log = logging.getLogger(__name__)
            rules += zip(found, get_excludes_from_ignore_files(folder, not whole, log), strict=True)
        folder /= part
        for file, leaves_out in rules:
            if leaves_out(folder):
                return file
    return None


def submission(verb: str, arguments: list[str], environ: Mapping[str, str]) -> str:
    """The runtime environment of `flipkd VERB CONFIG [key=value ...]` as JSON, once everything has been checked.

    Raises:
        UserError
    """
    if verb not in VERBS:
        raise UserError(f"VERB: {verb} is none that works on a cluster: take one of {', '.join(VERBS)}")
    if not arguments:
        raise UserError("CONFIG: missing: launchers/ray_submit.sh CONFIG [key=value ...]")
    if not environ.get("RAY_ADDRESS", "").startswith(("http://", "https://")):
        raise UserError("RAY_ADDRESS: is not the address of a job server: export RAY_ADDRESS=http://HEAD:8265")
    for argument in arguments:
        _refuse_login(argument.partition("=")[0], argument)
    path, *overrides = arguments
    _check_goes_along("CONFIG", path)
    check_sent(load_config(path, overrides), environ)
    return json.dumps(runtime_env(environ))


def outcome(status: str, exit_code: int | None, said: str, job: str) -> tuple[int, str]:
    """Exit code and last line for a job that has ended, or is out of sight.

    Args:
        status, exit_code, said: as Ray tells them; `said` ends with the job's last lines.
    """
    if status == "SUCCEEDED":
        return 0, ""
    if status == "STOPPED":
        return 75, f"flipkd: job {job} was stopped: submit it again to go on"
    if status != "FAILED":
        return 1, f"flipkd: job {job} is {status} and goes on: `ray job logs --follow {job}` shows it"
    lines = [line for line in said.splitlines() if line.startswith("flipkd: ")]
    last = lines[-1] if lines else f"flipkd: job {job} failed: `ray job logs {job}` shows why"
    return exit_code if exit_code in (2, 75) else 1, last


def _ask(job: str, environ: Mapping[str, str]) -> tuple[str, int | None, str]:
    from ray.job_submission import JobSubmissionClient

    client = JobSubmissionClient(headers=json.loads(environ.get("RAY_JOB_HEADERS", "null")))
    info = client.get_job_info(job)
    return str(info.status.value), info.driver_exit_code, info.message or ""


def main(arguments: list[str], environ: Mapping[str, str], ask: Callable[..., tuple] = _ask) -> int:
    """`submission VERB CONFIG [key=value ...]` or `outcome JOB`; the exit code."""
    what, *rest = arguments
    try:
        if what == "submission":
            print(submission(rest[0], rest[1:], environ))
            return 0
        code, line = outcome(*ask(rest[0], environ), rest[0])
    except UserError as error:
        code, line = 2, f"flipkd: {error}"
    except Exception as error:  # no job server, no token for it, or no such job
        code, line = (
            1,
            f"flipkd: job {rest[0]}: RAY_ADDRESS does not tell of it ({type(error).__name__}): see above why",
        )
    print(line, end="\n" if line else "", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], os.environ))
