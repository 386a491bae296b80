"""What srun tells its tasks, as the variables of PyTorch's rendezvous."""

import pytest

from flipkd_dist.slurm_world import first_host, slurm_world

TASK = {
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_NTASKS": "4",
    "SLURM_JOB_NODELIST": "gpu[07-08]",
    "SLURM_JOB_ID": "41",
    "SLURM_STEP_ID": "2",
}


def test_a_task_of_srun_knows_its_world_and_where_it_meets():
    found = slurm_world(TASK)
    assert {key: found[key] for key in ("RANK", "LOCAL_RANK", "WORLD_SIZE")} == {
        "RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4",
    }  # fmt: skip
    assert found["MASTER_ADDR"] == "gpu07"
    others = [{**TASK, "SLURM_PROCID": rank} for rank in "012"]
    assert {slurm_world(other)["MASTER_PORT"] for other in others} == {found["MASTER_PORT"]}
    for changed in ({"SLURM_JOB_ID": "42"}, {"SLURM_STEP_ID": "3"}):
        assert slurm_world(TASK | changed)["MASTER_PORT"] != found["MASTER_PORT"]
    assert 1024 < int(found["MASTER_PORT"]) < 32768


def test_a_step_may_be_a_part_of_its_job():
    found = slurm_world(TASK | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_NODELIST": "gpu08"})
    assert (found["WORLD_SIZE"], found["MASTER_ADDR"]) == ("1", "gpu08")


def test_what_is_set_stays():
    given = {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}
    assert slurm_world(TASK | given).keys() == {"RANK", "LOCAL_RANK", "WORLD_SIZE"}
    torchrun = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    assert slurm_world(TASK | torchrun) == {}
    assert slurm_world({"HOME": "/root"}) == {}


@pytest.mark.parametrize(
    "hosts, first",
    [
        ("node1", "node1"),
        ("node1,node2", "node1"),
        ("node[1-2]", "node1"),
        ("gpu[03-05,9]-ib,login1", "gpu03-ib"),
        ("r[1-2]n[08,10]", "r1n08"),
    ],
)
def test_the_first_host_of_a_list(hosts, first):
    assert first_host(hosts) == first
