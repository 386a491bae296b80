"""DRY_RUN=1 of every launcher: the command, with its quotes, and nothing started or written."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

LAUNCHERS = Path(__file__).parents[2] / "launchers"
SCRIPTS = sorted(path for path in LAUNCHERS.iterdir() if path.suffix in (".sh", ".sbatch"))
OVERRIDE = "student.prompt=are they the same ? {text_a} | {text_b}"


@pytest.fixture
def folder(tmp_path):
    """A working directory with a configuration, and stand-ins that tell if a program was started."""
    (tmp_path / "my pairs.jsonl").write_text("{}")
    (tmp_path / "bank.yaml").write_text("name: bank\noutput_dir: /shared/runs\ndata: {train: my pairs.jsonl}\n")
    stand_ins = tmp_path / "bin"
    stand_ins.mkdir()
    for program in ("ray", "deepspeed", "torchrun", "srun", "sbatch"):
        (stand_ins / program).write_text(f"#!/bin/sh\necho {program} >> {tmp_path / 'started'}\n")
        (stand_ins / program).chmod(0o755)
    return tmp_path


def dry_run(folder: Path, *command: object, **environ: str) -> subprocess.CompletedProcess:
    path = os.pathsep.join([str(folder / "bin"), str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = os.environ | {"PATH": path, "DRY_RUN": "1", "PYTHONPATH": str(LAUNCHERS.parent)} | environ
    done = subprocess.run(list(map(str, command)), cwd=folder, env=environment, capture_output=True, text=True)
    assert not (folder / "started").exists()
    return done


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_bash(script):
    assert os.access(script, os.X_OK)
    subprocess.run(["bash", "-n", script], check=True)


def test_ray_submit_prints_its_command(folder):
    before = sorted(folder.rglob("*"))
    secret = {"RAY_ADDRESS": "http://head:8265", "HF_TOKEN": "hf_x", "MLFLOW_TRACKING_PASSWORD": "word"}
    done = dry_run(folder, LAUNCHERS / "ray_submit.sh", "bank.yaml", OVERRIDE, VERB="train", JOB_ID="j 1", **secret)
    assert done.returncode == 0, done.stderr
    said = shlex.split(done.stdout)
    assert said[:5] == ["ray", "job", "submit", "--submission-id", "j 1"]
    assert said[said.index("--working-dir") + 1] == "."
    assert said[said.index("--") + 1 :] == ["python", "-m", "flipkd_dist", "train", "bank.yaml", OVERRIDE]
    assert "hf_x" not in done.stdout and "word" not in done.stdout.replace("word_", "")
    assert sorted(folder.rglob("*")) == before


def test_a_mistake_is_one_line_before_anything_is_sent(folder):
    done = dry_run(folder, LAUNCHERS / "ray_submit.sh", "bank.yaml", "output_dir=runs", RAY_ADDRESS="http://head:8265")
    assert done.returncode == 2 and done.stdout == ""
    [line] = done.stderr.splitlines()
    assert line.startswith("flipkd: output_dir: runs would lie in the job's copy")


@pytest.mark.parametrize("fails", ["update", "install", ""])
def test_packages_that_cannot_be_installed_do_not_end_the_tests(folder, fails):
    """`make test` goes on without a mirror: those tests skip."""
    stand_ins = {"apt-get": f'[ "$1" != "{fails}" ]', "dpkg": "exit 1", "id": "echo 0", "rm": "", "chmod": ""}
    for name, text in stand_ins.items():
        (folder / "bin" / name).write_text(f"#!/bin/sh\n{text}\n")
        (folder / "bin" / name).chmod(0o755)
    script = (LAUNCHERS.parent / "tests/system/install.sh").read_text().replace("/usr/sbin", str(folder / "bin"))
    environment = os.environ | {"PATH": f"{folder / 'bin'}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", "-c", script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert ("will skip" in done.stdout) == bool(fails)


@pytest.mark.parametrize("wait", "10")
def test_a_refused_submission_does_not_pass_for_the_job_of_that_name(folder, wait):
    """Ray refuses a name in use; the job server would tell how the other job ended."""
    for name, text in (("python", "echo '{}'"), ("ray", f'echo "$2" >> {folder}/asked; exit ${{FAILS:-0}}')):
        (folder / "bin" / name).write_text(f"#!/bin/sh\n{text}\n")
        (folder / "bin" / name).chmod(0o755)

    def submit(**environ: str) -> subprocess.CompletedProcess:
        environment = os.environ | {"PATH": f"{folder / 'bin'}:{os.environ['PATH']}", "JOB_ID": "mine", "WAIT": wait}
        command = [LAUNCHERS / "ray_submit.sh", "bank.yaml"]
        return subprocess.run(command, cwd=folder, env=environment | environ, capture_output=True, text=True)

    refused = submit(FAILS="1")
    assert refused.returncode == 1
    assert refused.stderr.splitlines()[-1] == "flipkd: job mine: was not submitted: see above why"
    assert submit().returncode == 0
    assert (folder / "asked").read_text().split() == ["submit", "submit", *["logs"] * int(wait)]


def test_deepspeed_train_prints_its_command_once(folder):
    script, arguments = LAUNCHERS / "deepspeed_train.py", ["bank.yaml", OVERRIDE, "distributed.num_workers=2"]
    first, second = (
        dry_run(folder, sys.executable, script, "--local_rank=0", *arguments, RANK=rank, WORLD_SIZE="2")
        for rank in "01"
    )
    assert first.returncode == second.returncode == 0, first.stderr + second.stderr
    world, _, command = first.stdout.partition(": ")
    assert world == "on 2 processes"
    assert shlex.split(command) == [sys.executable, str(script), "--local_rank=0", *arguments]
    assert second.stdout == ""
