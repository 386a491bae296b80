"""A signal that comes while the driver waits for Ray ends it at once, with exit code 75 and one line."""

import os
import signal
import subprocess
import sys
import time

import pytest

pytestmark = pytest.mark.system
TASK_S = 300
# As `flipkd evaluate` waits: the command line's own end, with a task of Ray's in place of the workers.
DRIVER = f"""
import time
import ray
from flipkd_dist import cli
from flipkd_dist.config import RunConfig
from flipkd_dist.ray_launch import join_or_start_ray


@cli.cli.command()
def wait():
    join_or_start_ray(RunConfig(name="waiting"))
    task = ray.remote(num_cpus=1)(lambda: time.sleep({TASK_S})).remote()
    print("waits", flush=True)
    ray.get(task)


cli.main()
"""


def test_a_signal_in_a_call_of_rays_is_obeyed_at_once(tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment.pop("RAY_ADDRESS", None)
    command = [sys.executable, "-c", DRIVER, "wait"]
    driver = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert driver.stdout.readline() == "waits\n", driver.stderr.read()[-3000:]
        time.sleep(1)
        began = time.monotonic()
        driver.send_signal(signal.SIGTERM)
        _, said = driver.communicate(timeout=TASK_S - 60)
    finally:
        driver.kill()
    print(f"ended after {time.monotonic() - began:.1f} s")
    assert driver.returncode == 75, said[-3000:]
    assert said.splitlines()[-1] == "flipkd: stopped by SIGTERM: run the same command again to go on"
