"""A real Slurm of three nodes on this host, for tests: munged, slurmctld and a slurmd each, in a folder of their own.

The nodes are this host at 127.0.0.1, on ports that were free: two with one CPU, one with two (partition `wide`).
Partition `low` is preempted by `high` with a time of grace, `abrupt` without. Needs root and the packages that
tests/system/install.sh installs.
"""

import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest
from doors import free_ports

PROGRAMS = ("munged", "slurmctld", "slurmd", "srun", "sbatch", "scontrol", "scancel", "squeue")
NODES = ("node1", "node2", "node3")
PATIENCE_S = 400
FIRST_PORT, PORTS_PER_JOB, BLOCKS = 20000, 20, 500  # as in the batch scripts
CONFIGURATION = """\
ClusterName=flipkd
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=batch_sched_delay=0,sched_interval=2,bf_interval=2
SlurmdParameters=config_overrides
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
FirstJobId={first_job}
ReturnToService=2
KillWait={kill_wait_s}
SlurmdTimeout=300
NodeName=node1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=1
NodeName=node2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=1
NodeName=node3 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[3]} CPUs=2
PartitionName=low Nodes=node[1-2] Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime=120 MaxTime=INFINITE
PartitionName=abrupt Nodes=node[1-2] PriorityTier=1 PreemptMode=REQUEUE GraceTime=0 MaxTime=INFINITE
PartitionName=high Nodes=node[1-2] PriorityTier=10 PreemptMode=OFF MaxTime=INFINITE
PartitionName=wide Nodes=node3 MaxTime=INFINITE
"""


def _is_free(port: int) -> bool:
    with suppress(OSError), socket.create_server(("", port)):
        return True
    return False


def _first_job() -> int:
    """A job id from which on the ports that the batch scripts derive are free, for some jobs."""
    start = os.getpid()
    for job in range(start, start + BLOCKS):
        ports = (FIRST_PORT + (job + nth) % BLOCKS * PORTS_PER_JOB + offset for nth in range(8) for offset in range(10))
        if all(_is_free(port) for port in ports):
            return job
    pytest.skip("no free ports for jobs")


def wait_until(what: Callable[[], object], said: str, patience_s: float = PATIENCE_S) -> object:
    """The first true answer of `what`, asked four times a second."""
    deadline = time.monotonic() + patience_s
    while not (found := what()):
        assert time.monotonic() < deadline, f"not within {patience_s:g} s: {said}"
        time.sleep(0.25)
    return found


class Slurm:
    """The commands of one cluster; every one of them sees this cluster alone, by SLURM_CONF."""

    def __init__(self, folder: Path):
        self.folder, self.jobs = folder, []
        inherited = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM_", "RAY_"))}
        self.environment = inherited | {
            "SLURM_CONF": str(folder / "slurm.conf"),
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
            "PYTHONPATH": str(Path(__file__).parents[2]),
            "SPT_NOENV": "1",  # Ray's processes rename themselves, and would write over the marks of `processes`
        }
        for key in ("MLFLOW_TRACKING_URI", "MASTER_ADDR", "MASTER_PORT"):
            self.environment.pop(key, None)

    def call(self, *command: object, check: bool = True) -> str:
        """A Slurm command's output, both streams."""
        done = subprocess.run(
            list(map(str, command)),
            env=self.environment,
            cwd=Path(__file__).parents[2],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=60,
        )
        assert not check or done.returncode == 0, f"{command}: {done.stdout}"
        return done.stdout

    def submit(self, *arguments: object, log: Path) -> int:
        """`sbatch`; the job's id."""
        self.jobs.append(int(self.call("sbatch", "--parsable", f"--output={log}", *arguments).split()[-1]))
        return self.jobs[-1]

    def is_idle(self) -> bool:
        said = self.call("sinfo", "--noheader", "--Node", "--format=%N %T", check=False)
        return {tuple(line.split()) for line in said.splitlines()} == {(node, "idle") for node in NODES}

    def job(self, job: int) -> dict[str, str]:
        """What the controller says of a job: JobState, ExitCode, Restarts, Reason ..."""
        return dict(re.findall(r"(\S+?)=(\S*)", self.call("scontrol", "show", "job", job)))

    def state(self, job: int) -> str:
        return self.job(job)["JobState"]

    def wait_for(self, job: int, *states: str, log: Path | None = None) -> float:
        """Wait for one of these states; the seconds it took."""
        start = time.monotonic()
        said = f"job {job} is {states}, not {self.state(job)}"
        try:
            wait_until(lambda: self.state(job) in states, said)
        except AssertionError as error:
            tail = log.read_text()[-3000:] if log is not None and log.exists() else ""
            raise AssertionError(f"{error}; now {self.state(job)}\n{tail}") from None
        return time.monotonic() - start

    def requeued(self, job: int, times: int, log: Path) -> None:
        """Wait until a job has been put back for the nth time; Slurm starts it two minutes later, or by `start_now`."""

        def is_back() -> bool:
            found = self.job(job)
            return found["JobState"] == "PENDING" and int(found["Restarts"]) >= times

        try:
            wait_until(is_back, f"job {job} is back in the queue")
        except AssertionError as error:
            raise AssertionError(f"{error}: {self.job(job)}\n{log.read_text()[-3000:]}") from None

    def start_now(self, job: int) -> None:
        time.sleep(1.1)  # its last start was revoked, to the second: one in the same second would be refused as revoked
        self.call("scontrol", "update", f"JobId={job}", "StartTime=now")

    def processes(self, job: int | None = None) -> list[psutil.Process]:
        """Processes of a job, or everything of this cluster, by their environment."""
        marks = [f"SLURM_CONF={self.folder}/slurm.conf".encode()]
        if job is not None:
            marks.append(f"SLURM_JOB_ID={job}".encode())
        found = []
        for process in psutil.process_iter():
            with suppress(OSError, psutil.Error):
                environment = Path(f"/proc/{process.pid}/environ").read_bytes().split(b"\0")
                if all(mark in environment for mark in marks):
                    found.append(process)
        return found


def _requirements() -> None:
    missing = [program for program in PROGRAMS if shutil.which(program) is None]
    if os.geteuid() != 0:
        pytest.skip("slurmd needs root (and tests/system/install.sh)")
    if missing:
        pytest.skip(f"{missing[0]} is not installed: tests/system/install.sh, as root")


@contextmanager
def slurm_cluster(kill_wait_s: int = 5) -> Iterator[Slurm]:
    """Start the daemons, wait until the nodes are idle; at the end nothing of it runs.

    Args:
        kill_wait_s: seconds between SIGTERM and SIGKILL of a job that is cancelled, requeued or at its limit.
    """
    _requirements()
    folder = Path(tempfile.mkdtemp(prefix="fk", dir="/tmp"))  # sockets need short paths
    slurm = Slurm(folder)
    daemons: list[subprocess.Popen] = []

    def start(*command: object) -> None:
        with (folder / f"{Path(str(command[0])).name}-{len(daemons)}.out").open("wb") as output:
            daemons.append(
                subprocess.Popen(list(map(str, command)), env=slurm.environment, stdout=output, stderr=output)
            )

    names = {"key-file": "munge.key", "pid-file": "munged.pid", "log-file": "munged.log", "seed-file": "munged.seed"}
    own_files = [f"--{option}={folder / name}" for option, name in names.items()]
    try:
        _write(folder, kill_wait_s)
        start("munged", "--foreground", "--force", f"--socket={folder}/munge.socket", *own_files)
        wait_until((folder / "munge.socket").exists, "munged has its socket", 20)
        start("slurmctld", "-D", "-f", folder / "slurm.conf")
        for node in NODES:
            start("slurmd", "-D", "-N", node, "-f", folder / "slurm.conf")
        wait_until(slurm.is_idle, f"the nodes are idle: {slurm.call('sinfo', check=False)}", 60)
        yield slurm
    finally:
        _end(slurm, daemons)
        shutil.rmtree(folder, ignore_errors=True)


def _write(folder: Path, kill_wait_s: int) -> None:
    for name in ("state", *NODES):
        (folder / name).mkdir()
    key = folder / "munge.key"
    key.write_bytes(os.urandom(64))
    key.chmod(0o400)
    values = {"folder": folder, "host": socket.gethostname().split(".")[0], "kill_wait_s": kill_wait_s}
    text = CONFIGURATION.format(**values, ports=free_ports(1 + len(NODES)), first_job=_first_job())
    (folder / "slurm.conf").write_text(text)


def _end(slurm: Slurm, daemons: list[subprocess.Popen]) -> None:
    """Cancel the jobs, end the daemons by their ids, and kill by its id whatever a job left."""
    if len(daemons) > 1:
        slurm.call("scancel", "--full", "--signal=KILL", "--state=RUNNING", check=False)
        slurm.call("scancel", "--user=root", check=False)
    for daemon in reversed(daemons):
        daemon.terminate()
        with suppress(subprocess.TimeoutExpired):
            daemon.wait(20)
        if daemon.poll() is None:
            daemon.kill()
            daemon.wait()
    for process in slurm.processes():
        with suppress(psutil.NoSuchProcess):
            process.kill()
    for job in slurm.jobs:  # what a cancelled job's Ray leaves on its nodes
        shutil.rmtree(f"/tmp/fk{job}", ignore_errors=True)
