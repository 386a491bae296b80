"""Batch scripts on a real Slurm of two nodes: stopped, preempted, cancelled; what comes back ends as if undisturbed."""

import json
import sqlite3
import time
from pathlib import Path

import pytest
import yaml
from doors import same_adapter
from slurm_cluster import Slurm, slurm_cluster, wait_until
from test_run import tiny_config

pytestmark = [pytest.mark.system, pytest.mark.timeout(900)]
STEPS = 60
RAY, DEEPSPEED = "launchers/slurm_ray.sbatch", "launchers/slurm_deepspeed.sbatch"


@pytest.fixture(scope="module")
def slurm():
    with slurm_cluster() as cluster:
        yield cluster


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """A run of two workers with dropout, whose teacher's store is shared by every name."""
    folder = tmp_path_factory.mktemp("slurm")
    file = tiny_config(folder)
    values = yaml.safe_load(file.read_text())
    values["train"] |= {"max_steps": STEPS, "save_steps": 20, "eval_steps": STEPS, "logging_steps": 1}
    values["train"] |= {"learning_rate": 1e-3}
    values["student"]["lora_dropout"] = 0.1
    values["teacher"]["store_path"] = str(folder / "store")
    file.write_text(yaml.safe_dump(values))
    return file


@pytest.fixture(scope="module")
def by_ray(slurm, config):
    """The folder and the log of a run that nothing disturbs, on a Ray of its own on both nodes."""
    log = config.parent / "ray.log"
    job = slurm.submit(RAY, config, "name=ray", log=log)
    seconds = slurm.wait_for(job, "COMPLETED", log=log)
    print(f"ray: {seconds:.0f} s from start to DONE")
    wait_until(lambda: not slurm.processes(job), "no process of a job that is done", 60)
    return config.parent / "runs" / "ray", log.read_text()


def steps(folder: Path) -> list[int]:
    file = folder / "metrics.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    return [line["step"] for line in lines if "loss" in line]


def wait_for_step(slurm: Slurm, job: int, folder: Path, step: int, log: Path) -> None:
    def reached() -> bool:
        state = slurm.state(job)
        assert state not in ("FAILED", "CANCELLED", "COMPLETED", "TIMEOUT"), f"{state}\n{log.read_text()[-3000:]}"
        return any(done >= step for done in steps(folder)[-1:])

    wait_until(reached, f"step {step} of {folder.name}")


def goes_on(slurm: Slurm, job: int, times: int, folder: Path, log: Path) -> None:
    """The job is in the queue for the nth time with a checkpoint of its last step; it starts again."""
    slurm.requeued(job, times, log)
    assert log.read_text().count("back into the queue") == times
    done = steps(folder)[-1]
    assert (folder / "checkpoints" / f"step-{done:06d}" / "manifest.json").exists()
    slurm.start_now(job)
    start = time.monotonic()
    wait_for_step(slurm, job, folder, done + 1, log)
    print(f"restart {times}: {time.monotonic() - start:.0f} s to step {done + 1}")


def check_as_undisturbed(folder: Path, undisturbed: Path, log: Path) -> None:
    same_adapter(undisturbed, folder)
    assert steps(folder) == list(range(1, STEPS + 1))
    assert log.read_text().rstrip().endswith("DONE")
    assert "train" in json.loads((folder / "stages.json").read_text())
    database = sqlite3.connect(folder / "mlflow.db")
    assert database.execute("SELECT status FROM runs").fetchall() == [("FINISHED",)]
    logged = database.execute("SELECT step FROM metrics WHERE key = 'loss' ORDER BY step").fetchall()
    assert logged == [(step,) for step in range(1, STEPS + 1)]


def test_both_scripts_are_accepted(slurm, config):
    for script in (RAY, DEEPSPEED):
        assert "to start at" in slurm.call("sbatch", "--test-only", script, config)


@pytest.fixture(scope="module")
def stub(slurm, tmp_path_factory):
    """Jobs whose stages are shells that end with 75 when asked, or with the code in the file `ends_with`."""
    folder = tmp_path_factory.mktemp("stub")
    program = f"""#!/bin/bash
        [ -z "$DRY_RUN" ] || exit 0
        trap 'sleep 1; echo saved; exit 75' USR1 TERM
        touch {folder}/$SLURM_JOB_ID.${{SLURM_RESTART_COUNT:-0}}.$SLURM_PROCID
        while sleep 0.1; do [ ! -f {folder}/ends_with ] || exit $(cat {folder}/ends_with); done
    """
    cleans = f"#!/bin/bash\necho $SLURM_PROCID >> {folder}/cleaned.$SLURM_JOB_ID\n"
    for name, text in (("flipkd", "#!/bin/bash\n"), ("python", program), ("rm", cleans)):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    path = f"--export=ALL,VIRTUAL_ENV=none,PATH={folder}:{slurm.environment['PATH']}"
    return folder, path


def test_which_job_goes_back_into_the_queue(slurm, stub):
    """One that was asked by USR1 or preempted; not one that ends with 75, fails, or is cancelled by itself.

    One line tells of a job that ended early and is not put back, also where Slurm refuses it.
    """
    folder, path = stub

    def begun(job: int, times: int) -> None:
        names = [f"{job}.{times}.{rank}" for rank in range(2)]
        wait_until(lambda: all((folder / name).exists() for name in names), f"start {times} of job {job}", 60)

    log = folder / "asked.log"
    job = slurm.submit(path, DEEPSPEED, "a.yaml", log=log)
    begun(job, 0)
    slurm.call("scancel", "--batch", "--signal=USR1", job)
    slurm.requeued(job, 1, log)
    said = log.read_text()
    assert said.count("saved") == 2 and said.rindex("saved") < said.index("back into the queue")
    slurm.start_now(job)
    begun(job, 1)
    other = slurm.submit("--partition=high", "--nodes=2", "--wrap=sleep 1", log=folder / "high.log")
    slurm.requeued(job, 2, log)
    slurm.wait_for(other, "COMPLETED")
    slurm.start_now(job)
    begun(job, 2)
    assert slurm.job(job)["PreemptTime"] == "None"  # by which the script would put it back once more
    slurm.call("scancel", job)
    slurm.wait_for(job, "CANCELLED")
    assert not slurm.processes(job)
    assert log.read_text().count("back into the queue") == 2 and "not put back" not in log.read_text()

    log = folder / "refused.log"
    job = slurm.submit(path, "--no-requeue", DEEPSPEED, "a.yaml", log=log)
    begun(job, 0)
    slurm.call("scancel", "--batch", "--signal=USR1", job)
    slurm.wait_for(job, "FAILED", log=log)
    line = log.read_text().splitlines()[-1]
    assert line.startswith(f"flipkd: job {job}: ended with 75 ") and line.endswith("): submit it again to go on")
    assert "(scontrol requeue: " in line and "disabled" in line

    for code in (75, 1, 0):
        (folder / "ends_with").write_text(str(code))
        job = slurm.submit(path, DEEPSPEED, "a.yaml", log=folder / f"{code}.log")
        slurm.wait_for(job, "FAILED", "COMPLETED", log=folder / f"{code}.log")
        assert (slurm.job(job)["ExitCode"], slurm.job(job)["Restarts"]) == (f"{code}:0", "0")
        line = (folder / f"{code}.log").read_text().splitlines()[-1]
        assert {0: "DONE", 1: "not started again", 75: "it stopped by itself"}[code] in line


def test_two_tasks_on_a_node(slurm, stub):
    """Each has its rank, and the clean-up at the end is one task."""
    folder, path = stub
    log = folder / "two.log"
    (folder / "ends_with").write_text("0")
    job = slurm.submit(path, "--partition=wide", "--nodes=1", "--ntasks-per-node=2", DEEPSPEED, "a.yaml", log=log)
    slurm.wait_for(job, "COMPLETED", log=log)
    assert sorted(file.name for file in folder.glob(f"{job}.*")) == [f"{job}.0.0", f"{job}.0.1"]
    assert (folder / f"cleaned.{job}").read_text() == "0\n" and "srun: warning" not in log.read_text()


def test_ray_of_a_job_trains_on_both_nodes(by_ray):
    folder, said = by_ray
    assert steps(folder) == list(range(1, STEPS + 1))
    for stage in ("train", "evaluate", "register"):
        assert stage in json.loads((folder / "stages.json").read_text())
    assert said.rstrip().endswith("DONE") and (folder / "metrics.json").exists()


def test_stopped_before_the_limit_then_preempted_then_done(slurm, config, by_ray):
    """What a job preempts with is cancelled while it trains: of neither does a process stay."""
    folder, log = config.parent / "runs" / "deepspeed", config.parent / "deepspeed.log"
    job = slurm.submit(DEEPSPEED, config, "name=deepspeed", log=log)
    wait_for_step(slurm, job, folder, 3, log)
    slurm.call("scancel", "--batch", "--signal=USR1", job)  # what the controller does before the limit
    goes_on(slurm, job, 1, folder, log)

    other_log = config.parent / "high.log"
    other = slurm.submit("--partition=high", DEEPSPEED, config, "name=high", log=other_log)
    slurm.requeued(job, 2, log)
    trains = "launchers/deepspeed_train.py"
    wait_until(
        lambda: sum(trains in process.cmdline()[:2] for process in slurm.processes(other)) == 2,
        "both tasks of the preemptor",
    )
    assert not slurm.processes(job)
    slurm.call("scancel", other)
    wait_until(lambda: not slurm.processes(other), "no process of a cancelled job", 60)
    slurm.wait_for(other, "CANCELLED")  # it is COMPLETING until the controller knows
    assert slurm.job(other)["Restarts"] == "0"

    goes_on(slurm, job, 2, folder, log)
    slurm.wait_for(job, "COMPLETED", log=log)
    check_as_undisturbed(folder, by_ray[0], log)


def test_a_failed_run_is_not_started_again(slurm, config):
    log = config.parent / "wrong.log"
    job = slurm.submit(DEEPSPEED, config, "train.learning_rat=1", log=log)
    slurm.wait_for(job, "FAILED", log=log)
    assert slurm.job(job)["ExitCode"] == "2:0" and slurm.job(job)["Restarts"] == "0"
    assert "train.learning_rate" in log.read_text() and "failed with exit code 2" in log.read_text()


@pytest.mark.soak
def test_ray_of_a_job_is_stopped_preempted_and_cancelled(slurm, config, by_ray):
    folder, log = config.parent / "runs" / "ray-disturbed", config.parent / "ray-disturbed.log"
    job = slurm.submit(RAY, config, "name=ray-disturbed", log=log)
    wait_for_step(slurm, job, folder, 3, log)
    slurm.call("scancel", "--batch", "--signal=USR1", job)
    goes_on(slurm, job, 1, folder, log)
    other = slurm.submit("--partition=high", "--nodes=2", "--wrap=sleep 5", log=config.parent / "high.log")
    slurm.requeued(job, 2, log)
    assert not slurm.processes(job)
    slurm.wait_for(other, "COMPLETED")
    goes_on(slurm, job, 2, folder, log)
    slurm.wait_for(job, "COMPLETED", log=log)
    check_as_undisturbed(folder, by_ray[0], log)

    folder, log = config.parent / "runs" / "ray-cancelled", config.parent / "ray-cancelled.log"
    job = slurm.submit(RAY, config, "name=ray-cancelled", log=log)
    wait_for_step(slurm, job, folder, 3, log)
    assert len(slurm.processes(job)) > 10
    slurm.call("scancel", job)
    wait_until(lambda: not slurm.processes(job), "no process of a cancelled job", 60)
    slurm.wait_for(job, "CANCELLED")
    assert slurm.job(job)["Restarts"] == "0"


@pytest.mark.soak
def test_preempted_without_grace(slurm, config, by_ray):
    """KillWait is all the time there is: Slurm puts the job back by itself, and what was not saved is done again."""
    folder, log = config.parent / "runs" / "abrupt", config.parent / "abrupt.log"
    job = slurm.submit("--partition=abrupt", DEEPSPEED, config, "name=abrupt", log=log)
    wait_for_step(slurm, job, folder, 33, log)
    other = slurm.submit("--partition=high", "--nodes=2", "--wrap=sleep 5", log=config.parent / "high2.log")
    slurm.requeued(job, 1, log)
    slurm.wait_for(other, "COMPLETED")
    slurm.start_now(job)
    slurm.wait_for(job, "COMPLETED", log=log)
    assert "train: resumed at step" in log.read_text() and "back into the queue" not in log.read_text()
    check_as_undisturbed(folder, by_ray[0], log)


@pytest.mark.soak
def test_the_limit_itself(slurm, config):
    """The controller looks every half minute whose limit is near."""
    folder, log = config.parent / "runs" / "limit", config.parent / "limit.log"
    job = slurm.submit("--time=60", DEEPSPEED, config, "name=limit", "train.max_steps=20000", log=log)
    wait_for_step(slurm, job, folder, 3, log)
    slurm.call("scontrol", "update", f"JobId={job}", "TimeLimit=7")  # minutes; USR1 comes 300 s before
    goes_on(slurm, job, 1, folder, log)
    slurm.call("scancel", job)
    wait_until(lambda: not slurm.processes(job), "no process of a cancelled job", 60)
