"""`deepspeed` over two hosts, with and without ssh: the adapter of one host."""

import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from doors import LAUNCHERS, door_config, environment, opened, same_adapter
from namespaces import hosts

pytestmark = pytest.mark.system
SCRIPT = LAUNCHERS / "deepspeed_train.py"
SSH_PORT = 2222  # of the hosts' own network


@pytest.fixture(scope="module")
def two_hosts():
    with hosts(2) as pair:
        yield pair


@pytest.fixture(scope="module")
def config(tmp_path_factory, two_hosts):
    """With a hostfile beside it, and the run of one host."""
    config = door_config(tmp_path_factory.mktemp("hosts"))
    (config.parent / "hostfile").write_text("".join(f"{host.name} slots=1\n" for host in two_hosts))
    opened(["flipkd", "score", config, "name=one"])
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    opened([*torchrun, SCRIPT, config, "name=one"])
    return config


def deepspeed(config: Path, host, *arguments: str) -> list[str]:
    meeting = ["--hostfile", "hostfile", "--master_addr", host.address, "--master_port", "29500"]
    return ["deepspeed", *meeting, *arguments, str(SCRIPT), str(config)]


def test_without_ssh(config, two_hosts):
    """The same command on each host, told its number."""
    begun = time.monotonic()
    started = [
        host.start(
            *deepspeed(config, two_hosts[0], "--no_ssh", "--node_rank", str(rank)),
            "name=no_ssh",
            env=environment(),
            cwd=config.parent,
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
        )
        for rank, host in enumerate(two_hosts)
    ]
    try:
        said = [process.communicate(timeout=200)[1] for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0, 0], "\n".join(text[-3000:] for text in said)
    print(f"--no_ssh {time.monotonic() - begun:.0f} s")
    runs = config.parent / "runs"
    same_adapter(runs / "one", runs / "no_ssh")


@pytest.fixture
def ssh(tmp_path, two_hosts):
    """sshd on each host, with keys of its own: the variables that let pdsh in."""
    for program in ("pdsh", "ssh", "/usr/sbin/sshd"):
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed: tests/system/install.sh, as root")
    for key in ("host", "user"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", tmp_path / key], check=True)
    Path("/run/sshd").mkdir(exist_ok=True)  # where sshd insists on an empty folder
    (tmp_path / "sshd_config").write_text(
        f"Port {SSH_PORT}\nHostKey {tmp_path / 'host'}\nAuthorizedKeysFile {tmp_path / 'user.pub'}\nPidFile none\n"
        "PermitRootLogin yes\nPasswordAuthentication no\nUsePAM no\nStrictModes no\n"
    )
    servers = [host.start("/usr/sbin/sshd", "-D", "-e", "-f", tmp_path / "sshd_config") for host in two_hosts]
    options = f"-i {tmp_path / 'user'} -p {SSH_PORT} -o BatchMode=yes -o StrictHostKeyChecking=no"
    try:
        yield {"PDSH_SSH_ARGS_APPEND": f"{options} -o UserKnownHostsFile=/dev/null -o LogLevel=ERROR"}
    finally:
        for server in servers:
            server.kill()
            server.wait()


def test_pdsh(config, two_hosts, ssh):
    """One command on the first host; what the workers need of the environment stands in .deepspeed_env."""
    variables = two_hosts[0].environment | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "HF_HUB_OFFLINE": "1"}
    (config.parent / ".deepspeed_env").write_text("".join(f"{key}={value}\n" for key, value in variables.items()))
    begun = time.monotonic()
    command = [*deepspeed(config, two_hosts[0], "--no_ssh_check"), "name=pdsh"]
    done = two_hosts[0].run(*command, env=environment(**ssh), cwd=config.parent, timeout=200)
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
    print(f"pdsh {time.monotonic() - begun:.0f} s")
    runs = config.parent / "runs"
    same_adapter(runs / "one", runs / "pdsh")
