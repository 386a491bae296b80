"""What the batch scripts would start, as DRY_RUN=1 prints it, and what they refuse; tests/system runs them."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPTS = ("slurm_ray", "slurm_deepspeed")


def bash(script: str, *arguments: str, folder: Path = ROOT, **variables: str) -> subprocess.CompletedProcess:
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM", "MASTER"))}
    return subprocess.run(
        ["bash", ROOT / "launchers" / f"{script}.sbatch", *arguments],
        cwd=folder,
        env=environment | variables,
        capture_output=True,
        text=True,
        timeout=30,
    )


def test_the_commands_of_plain_deepspeed():
    done = bash("slurm_deepspeed", "my run.yaml", "name=a b", DRY_RUN="1")
    assert done.returncode == 0
    assert [line.split("flipkd ")[-1].strip() for line in done.stdout.splitlines()] == [
        r"score my\ run.yaml name=a\ b",
        r"srun python launchers/deepspeed_train.py my\ run.yaml name=a\ b",
    ]


def test_the_commands_of_ray():
    said = bash("slurm_ray", "my run.yaml", DRY_RUN="1", VERB="train", SLURM_NNODES="3").stdout.splitlines()
    assert "--nodes=3" in said[0] and said[0].endswith("slurm_ray_node.sh &")
    assert said[1].split()[-2:] == ["launchers/wait_for_nodes.py", "3"]
    assert said[2].strip().endswith(r"flipkd train my\ run.yaml") and len(said) == 3


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_signal_comes_to_the_script_and_the_job_may_come_back(script):
    options = (ROOT / "launchers" / f"{script}.sbatch").read_text()
    for line in ("#SBATCH --signal=B:USR1@300", "#SBATCH --requeue", "#SBATCH --open-mode=append"):
        assert line in options


@pytest.mark.parametrize("script", SCRIPTS)
def test_one_line_where_it_cannot_start(script, tmp_path):
    for done, said in ((bash(script), "usage: sbatch"), (bash(script, "a.yaml", folder=tmp_path), "project's folder")):
        assert done.returncode == 2 and done.stdout == ""
        assert done.stderr.startswith("flipkd: ") and said in done.stderr and len(done.stderr.splitlines()) == 1


def test_a_head_that_never_comes_is_said_in_one_line():
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
    command = [sys.executable, ROOT / "launchers" / "wait_for_nodes.py", "2", "1"]
    done = subprocess.run(
        command, env=os.environ | {"RAY_ADDRESS": address}, capture_output=True, text=True, timeout=30
    )
    assert done.returncode == 1
    assert done.stderr.startswith(f"flipkd: RAY_ADDRESS: 0 of 2 Ray nodes at {address} within 1 s")
    assert len(done.stderr.splitlines()) == 1
