"""One configuration, started by every launcher on two workers: the same adapter."""

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from doors import LAUNCHERS, door_config, end, environment, opened, ray_head, same_adapter
from namespaces import Host, hosts
from slurm_cluster import slurm_cluster

from flipkd_dist.metric_log import last_step

pytestmark = pytest.mark.system
SCRIPT = LAUNCHERS / "deepspeed_train.py"
SSH_PORT = 2222  # of the hosts' own network


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return door_config(tmp_path_factory.mktemp("doors"))


@pytest.fixture(scope="module")
def cluster():
    with ray_head() as addresses:
        yield addresses


@pytest.fixture(scope="module")
def reference(config, cluster):
    """The run folder that `flipkd train` leaves; the teacher's store is filled then."""
    opened(["flipkd", "train", config, "name=flipkd"], RAY_ADDRESS=cluster[0])
    return config.parent / "runs" / "flipkd"


@pytest.fixture
def submitted(config, cluster):
    """The command that submits a job with a training of this name, and its variables."""
    variables = dict(VERB="train", RAY_ADDRESS=cluster[1], WORKING_DIR=str(config.parent))
    return lambda name, *overrides: ([LAUNCHERS / "ray_submit.sh", config.name, f"name={name}", *overrides], variables)


def test_ray_job(submitted, reference):
    """Its configuration is a file of the working directory."""
    command, variables = submitted("job")
    opened(command, **variables)
    same_adapter(reference, reference.parent / "job")


def test_ray_job_that_is_stopped_while_it_trains(submitted, reference):
    """With 75 as anywhere, and a checkpoint of its last step."""
    command, variables = submitted("long", "train.max_steps=4000", "train.save_steps=4000")
    folder = reference.parent / "long"
    stopped = subprocess.Popen(
        command, env=environment(**variables, JOB_ID="stopped"), stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 250
        while not (step := last_step(folder / "metrics.jsonl")):
            assert stopped.poll() is None and time.monotonic() < deadline, stopped.communicate()[0][-3000:]
            time.sleep(0.1)
        opened(["ray", "job", "stop", "--no-wait", "stopped"], RAY_ADDRESS=variables["RAY_ADDRESS"])
        said = stopped.communicate(timeout=200)[0]
    finally:
        end(stopped)
    assert stopped.returncode == 75, said[-3000:]
    assert said.splitlines()[-1] == "flipkd: job stopped was stopped: submit it again to go on"
    [saved] = (folder / "checkpoints").glob("step-*/manifest.json")
    reached = json.loads(saved.read_text())["step"]
    assert f"stopped on request with a complete checkpoint of step {reached} of 4000" in said
    assert step <= reached == last_step(folder / "metrics.jsonl") and not (folder / "adapter").exists()


def test_deepspeed(config, reference):
    opened(["deepspeed", "--num_gpus", 2, SCRIPT, config, "name=deepspeed"])
    same_adapter(reference, reference.parent / "deepspeed")


def test_torchrun(config, reference):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    opened([*torchrun, SCRIPT, config, "name=torchrun"])
    same_adapter(reference, reference.parent / "torchrun")


@pytest.fixture
def slurm():
    with slurm_cluster() as cluster:
        yield cluster


def test_sbatch(config, reference, slurm):
    """A task on each of two nodes; the store is complete, so that its first step scores nothing."""
    log = config.parent / "sbatch.log"
    job = slurm.submit(LAUNCHERS / "slurm_deepspeed.sbatch", config, "name=sbatch", log=log)
    print(f"sbatch {slurm.wait_for(job, 'COMPLETED', log=log):.0f} s")
    same_adapter(reference, reference.parent / "sbatch")


# --- two hosts ---


@pytest.fixture(scope="module")
def two_hosts():
    with hosts(2) as pair:
        yield pair


def over(two_hosts: list[Host], config: Path, *arguments: str) -> list[str]:
    """The deepspeed command for both hosts."""
    hostfile = config.parent / "hostfile"
    hostfile.write_text("".join(f"{host.name} slots=1\n" for host in two_hosts))
    meeting = ["--hostfile", str(hostfile), "--master_addr", two_hosts[0].address, "--master_port", "29500"]
    return ["deepspeed", *meeting, *arguments, str(SCRIPT), str(config)]


@pytest.mark.soak
def test_deepspeed_without_ssh(config, reference, two_hosts):
    """The same command on each host, told its number."""
    started = [
        host.start(
            *over(two_hosts, config, "--no_ssh", "--node_rank", str(rank)), "name=no_ssh",
            env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        )
        for rank, host in enumerate(two_hosts)
    ]  # fmt: skip
    try:
        said = [process.communicate(timeout=300)[1] for process in started]
    finally:
        for process in started:
            end(process)
    assert [process.returncode for process in started] == [0, 0], "\n".join(text[-3000:] for text in said)
    same_adapter(reference, reference.parent / "no_ssh")


@pytest.fixture
def ssh(tmp_path, two_hosts):
    """sshd on each host, with keys of its own: the variables that let pdsh in."""
    for program in ("pdsh", "ssh", "/usr/sbin/sshd"):
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed: tests/system/install.sh, as root")
    for key in ("host", "user"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", tmp_path / key], check=True)
    Path("/run/sshd").mkdir(exist_ok=True)  # sshd insists on this empty folder
    settings = tmp_path / "sshd_config"
    settings.write_text(
        f"Port {SSH_PORT}\nHostKey {tmp_path / 'host'}\nAuthorizedKeysFile {tmp_path / 'user.pub'}\nPidFile none\n"
        "PermitRootLogin yes\nPasswordAuthentication no\nUsePAM no\nStrictModes no\n"
    )
    servers = [host.start("/usr/sbin/sshd", "-D", "-q", "-f", settings) for host in two_hosts]
    options = f"-i {tmp_path / 'user'} -p {SSH_PORT} -o BatchMode=yes -o StrictHostKeyChecking=no"
    try:
        yield {"PDSH_SSH_ARGS_APPEND": f"{options} -o UserKnownHostsFile=/dev/null -o LogLevel=ERROR"}
    finally:
        for server in servers:
            server.kill()
            server.wait()


@pytest.mark.soak
def test_deepspeed_with_pdsh(config, reference, two_hosts, ssh):
    """One command on the first host; what the workers need of the environment stands in .deepspeed_env."""
    variables = two_hosts[0].environment | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "HF_HUB_OFFLINE": "1"}
    (config.parent / ".deepspeed_env").write_text("".join(f"{key}={value}\n" for key, value in variables.items()))
    command = over(two_hosts, config, "--no_ssh_check")
    done = two_hosts[0].run(*command, "name=pdsh", env=environment(**ssh), cwd=config.parent)
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
    same_adapter(reference, reference.parent / "pdsh")
