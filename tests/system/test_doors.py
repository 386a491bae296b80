"""One configuration, started by every launcher on two workers: the same adapter."""

import sys

import pytest
from doors import LAUNCHERS, door_config, opened, ray_head, same_adapter

pytestmark = pytest.mark.system
SCRIPT = LAUNCHERS / "deepspeed_train.py"


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


def test_ray_job(config, cluster, reference):
    opened([LAUNCHERS / "ray_submit.sh", config.name, "name=job"], VERB="train", RAY_ADDRESS=cluster[1],
           WORKING_DIR=str(config.parent))  # fmt: skip
    same_adapter(reference, reference.parent / "job")


def test_deepspeed(config, reference):
    opened(["deepspeed", "--num_gpus", 2, SCRIPT, config, "name=deepspeed"])
    same_adapter(reference, reference.parent / "deepspeed")


def test_torchrun(config, reference):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    opened([*torchrun, SCRIPT, config, "name=torchrun"])
    same_adapter(reference, reference.parent / "torchrun")
