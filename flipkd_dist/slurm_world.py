"""What Slurm tells a task that srun started, in the words of PyTorch's rendezvous."""

import re
from collections.abc import Mapping

FIRST_PORT, NUM_PORTS = 20000, 10000  # below what Linux hands out to clients by default
NAMES = {
    "RANK": ("SLURM_PROCID",),
    "LOCAL_RANK": ("SLURM_LOCALID",),
    "WORLD_SIZE": ("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS"),
}


def slurm_world(environ: Mapping[str, str]) -> dict[str, str]:
    """The variables of the rendezvous that are missing in `environ` and follow from Slurm's.

    MASTER_ADDR is the first host of the step, which has rank 0 unless srun distributes tasks otherwise; MASTER_PORT
    follows from the job and the step, so that two of them seldom meet.
    """
    found = {}
    for name, slurm in NAMES.items():
        value = next((environ[one] for one in slurm if one in environ), None)
        if name not in environ and value is not None:
            found[name] = value
    hosts = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST") or environ.get("SLURM_NODELIST")
    if "MASTER_ADDR" not in environ and hosts:
        found["MASTER_ADDR"] = first_host(hosts)
    if "MASTER_PORT" not in environ and "SLURM_JOB_ID" in environ:
        number = int(environ["SLURM_JOB_ID"]) * 7 + int(environ.get("SLURM_STEP_ID", 0))
        found["MASTER_PORT"] = str(FIRST_PORT + number % NUM_PORTS)
    return found


def first_host(hosts: str) -> str:
    """Of a host list such as `gpu[03-05,9]-ib,login1`: `gpu03-ib`."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])+", hosts)[0]  # up to the first comma outside of brackets
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", first)
