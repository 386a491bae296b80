"""What the batch scripts would start, as DRY_RUN=1 prints it, and what they refuse; tests/system runs them."""

import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPTS = ("slurm_ray", "slurm_deepspeed")
SRUN = ("srun", "--overlap", "--kill-on-bad-exit=0", "--wait=0", "--cpus-per-task=1")


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
        rf"{' '.join(SRUN)} python launchers/deepspeed_train.py my\ run.yaml name=a\ b",
    ]


def test_the_commands_of_ray():
    said = bash(
        "slurm_ray", "my run.yaml", DRY_RUN="1", VERB="train", SLURM_NNODES="3", WAIT_S="900"
    ).stdout.splitlines()
    assert "--nodes=3" in said[0] and said[0].endswith("slurm_ray_node.sh &")
    assert said[1].split()[-3:] == ["launchers/wait_for_nodes.py", "3", "900"]
    assert said[2].strip().endswith(r"flipkd train my\ run.yaml") and len(said) == 3


@pytest.fixture
def stand_in(tmp_path):
    """Programs that are shells; the variables that have a script of ours take them."""

    def put(**programs: str) -> dict[str, str]:
        for name, text in programs.items():
            (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
            (tmp_path / name).chmod(0o755)
        return {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}

    return put


@pytest.mark.parametrize("script", SCRIPTS)
def test_what_is_printed_is_what_is_started(stand_in, tmp_path, script):
    started = tmp_path / "started"
    begun = f"for i in {{1..1000}}; do grep -q slurm_ray_node {started} && break; sleep 0.01; done"
    srun = f'[[ "$*" != *wait_for_nodes* ]] || {begun}\nprintf -v line "%q " srun "$@"\necho "$line" >> {started}'
    path = stand_in(srun=srun, scontrol="", flipkd="", python="")
    said = bash(script, "my run.yaml", "name=a b", DRY_RUN="1", **path).stdout.replace("&\n", "\n")
    done = bash(script, "my run.yaml", "name=a b", **path)
    assert done.returncode == 0, done.stderr
    lines = started.read_text().splitlines()
    assert sorted(lines[:-1]) == sorted(said.splitlines())  # one of them runs in the background
    assert lines[-1].split()[2:] == ["--nodes=1", "--ntasks=1", "--ntasks-per-node=1", "rm", "-rf", "/tmp/fk0"]


@pytest.mark.parametrize("node, said", [("0", "--head --node-ip-address=host"), ("1", "--address=host:{port}")])
def test_the_jobs_ray_is_deaf_to_the_signal_of_a_preemption(stand_in, node, said):
    """Also where coreutils are too old for `env --block-signal`."""
    with socket.create_server(("127.0.0.1", 0)) as server:  # the head that another node waits for
        port = server.getsockname()[1]
        variables = dict(PORT=str(port), MASTER_ADDR="localhost", RAY_ADDRESS=f"host:{port}", RAY_TMPDIR="/tmp/fk0")
        variables |= dict(SLURM_CPUS_ON_NODE="3", SLURM_NODEID=node)
        path = stand_in(env="exit 1", ray='echo "$@"; grep SigBlk /proc/self/status')
        path["PATH"] += f"{os.pathsep}{Path(sys.executable).parent}"
        done = subprocess.run(
            ["bash", ROOT / "launchers" / "slurm_ray_node.sh"],
            env=os.environ | variables | path, capture_output=True, text=True, timeout=30,
        )  # fmt: skip
    command, _, mask = done.stdout.partition("SigBlk:")
    assert command.startswith("start ") and said.format(port=port) in command.replace("localhost", "host")
    assert "--num-cpus=3" in command and f"--temp-dir=/tmp/fk0/{node}" in command
    assert int(mask, 16) & 1 << signal.SIGTERM - 1


def test_a_signal_just_before_a_step_reaches_it(stand_in, tmp_path):
    """USR1 comes once the script has asked for it and before it knows the step: here, while it says what begins."""
    step = "trap 'exit 75' USR1; for i in {1..50}; do sleep 0.1; done"
    asks = f"echo $@ >> {tmp_path}/asked; [ $1 = show ] || exit 1; echo JobState=RUNNING"
    tell = "kill -USR1 $SHELL_ID; exec /bin/date"
    shell = ". launchers/slurm_steps.sh; export SHELL_ID=$$; stage train the command; leave 0"
    done = subprocess.run(
        ["bash", "-uc", shell], cwd=ROOT, env=os.environ | stand_in(srun=step, scontrol=asks, date=tell, flipkd=""),
        capture_output=True, text=True, timeout=30,
    )  # fmt: skip
    assert done.returncode in (75, 138), done.stdout  # by its number, where the step had no time to listen
    assert "requeue 0" in (tmp_path / "asked").read_text()


@pytest.mark.parametrize(
    "asked, shown, why",
    [
        ("", "JobState=RUNNING PreemptTime=None", "it stopped by itself, as said above"),
        ("yes", "JobState=RUNNING PreemptTime=None", "scontrol requeue: Job 7; is refused"),
        ("", "JobState=RUNNING PreemptTime=2026-11-23T01:00:00", "scontrol requeue: Job 7; is refused"),
        ("yes", "JobState=CANCELLED PreemptTime=None", "JobState=CANCELLED"),
        ("yes", "", "scontrol show job: nothing"),
    ],
)
@pytest.mark.parametrize("code", [75, 138, 143])
def test_a_job_that_ends_early_and_is_not_put_back_says_why(stand_in, asked, shown, why, code):
    scontrol = '[ $1 = requeue ] || { echo $SHOWN; exit; }; printf "Job $2\nis refused\n" >&2; exit 1'
    shell = f". launchers/slurm_steps.sh; asked=$ASKED; leave {code}"
    variables = dict(ASKED=asked, SHOWN=shown, SLURM_JOB_ID="7") | stand_in(scontrol=scontrol, flipkd="")
    done = subprocess.run(
        ["bash", "-uo", "pipefail", "-c", shell], cwd=ROOT, env=os.environ | variables, capture_output=True, text=True,
        timeout=30,
    )  # fmt: skip
    said = (
        f"flipkd: job 7: ended with {code} before it was done and is not put back ({why}): submit it again to go on\n"
    )
    assert (done.returncode, done.stderr) == (code, said)


@pytest.mark.parametrize("busy", ["show job", "requeue 7"])
def test_a_controller_that_is_busy_is_asked_again(stand_in, tmp_path, busy):
    """As one whose backup takes over; the job does not end for it."""
    scontrol = f"""
        echo "$1 $2" >> {tmp_path}/asked
        if [ "$1 $2" = "{busy}" ] && [ $(grep -c "$1 $2" {tmp_path}/asked) -lt 3 ]; then
            echo "slurm_load_jobs error: Unable to contact slurm controller (connect failure)" >&2; exit 1
        fi
        [ $1 = requeue ] || echo JobState=RUNNING PreemptTime=None
    """
    variables = dict(ASK_EVERY_S="0", SLURM_JOB_ID="7") | stand_in(scontrol=scontrol, flipkd="", sleep="exit 0")
    done = subprocess.run(
        ["bash", "-uo", "pipefail", "-c", ". launchers/slurm_steps.sh; asked=yes; leave 75"], cwd=ROOT,
        env=os.environ | variables, capture_output=True, text=True, timeout=30,
    )  # fmt: skip
    asked = (tmp_path / "asked").read_text().splitlines()
    assert sorted(asked.count(each) for each in ("show job", "requeue 7")) == [1, 3] and asked.count(busy) == 3
    assert "back into the queue" in done.stdout


def test_a_controller_that_never_answers_is_asked_for_a_minute(stand_in, tmp_path):
    scontrol = f"echo $1 $2 >> {tmp_path}/asked; echo Unable to contact slurm controller; exit 1"
    variables = dict(ASK_EVERY_S="0", SLURM_JOB_ID="7") | stand_in(scontrol=scontrol, flipkd="")
    done = subprocess.run(
        ["bash", "-uo", "pipefail", "-c", ". launchers/slurm_steps.sh; asked=yes; leave 75"], cwd=ROOT,
        env=os.environ | variables, capture_output=True, text=True, timeout=30,
    )  # fmt: skip
    assert (tmp_path / "asked").read_text().splitlines().count("show job") == 12
    assert done.returncode == 75
    assert "is not put back (scontrol show job: Unable to contact slurm controller): submit it again" in done.stderr


@pytest.mark.parametrize("tasks", [{"SLURM_NTASKS": "3"}, {"SLURM_NNODES": "3", "SLURM_NTASKS_PER_NODE": "1"}])
def test_a_wrong_number_of_tasks_is_said_before_anything_is_scored(stand_in, tmp_path, tasks):
    (tmp_path / "two.yaml").write_text("name: x\ndistributed: {num_workers: 2}\ndata: {train: pairs.jsonl}\n")
    path = stand_in(srun=f"touch {tmp_path}/started", scontrol="", flipkd="", python=f'exec {sys.executable} "$@"')
    path["PYTHONPATH"] = str(ROOT)
    done = bash("slurm_deepspeed", str(tmp_path / "two.yaml"), **tasks, **path)
    assert done.returncode == 2 and not (tmp_path / "started").exists()
    assert done.stderr.splitlines()[-1].startswith("flipkd: distributed.num_workers: it says 2, the launcher started 3")
    done = bash("slurm_deepspeed", str(tmp_path / "two.yaml"), **path, SLURM_NTASKS="2")
    assert done.returncode == 0 and (tmp_path / "started").exists(), done.stderr


def test_the_projects_own_environment_where_the_active_one_lacks_flipkd(tmp_path):
    """conda's base is active in most shells."""
    shutil.copytree(ROOT / "launchers", tmp_path / "launchers")
    (tmp_path / ".venv/bin").mkdir(parents=True)
    (tmp_path / ".venv/bin/activate").write_text("echo activated\n")
    other = {"PATH": "/usr/bin:/bin", "CONDA_PREFIX": "/opt/conda", "DRY_RUN": "1"}
    assert bash("slurm_deepspeed", "a.yaml", folder=tmp_path, **other).stdout.startswith("activated\n")
    (tmp_path / "flipkd").touch(mode=0o755)
    other["PATH"] += f":{tmp_path}"
    assert bash("slurm_deepspeed", "a.yaml", folder=tmp_path, **other).stdout.startswith("srun ")


@pytest.mark.parametrize("script", SCRIPTS)
def test_no_flipkd_to_be_found_is_said_before_anything_is_started(tmp_path, script):
    shutil.copytree(ROOT / "launchers", tmp_path / "launchers")
    done = bash(script, "a.yaml", folder=tmp_path, PATH="/usr/bin:/bin")
    said = (
        f"flipkd: PATH: no flipkd there, nor in {tmp_path}/.venv: install it there, or activate its environment, then "
        "submit\n"
    )
    assert (done.returncode, done.stdout, done.stderr) == (2, "", said)


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
