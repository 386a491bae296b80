"""A training that was killed, stopped or moved to other workers ends with the adapter of an undisturbed one."""

import json
import logging
import os
import shutil
import signal
import time

import numpy as np
import pytest
from gang import gang, run_gang
from safetensors.torch import load_file
from tiny import fill_store, save_student, save_teacher, write_pairs

from flipkd_dist.checkpoint import MANIFEST, newest_checkpoint
from flipkd_dist.config import RunConfig, validate
from flipkd_dist.errors import StoppedOnRequest
from flipkd_dist.metric_log import MetricLog
from flipkd_dist.progress import Progress
from flipkd_dist.slices import MOMENTS
from flipkd_dist.train import train

pytestmark = pytest.mark.parity
STEPS, SAVE_STEPS = 9, 2


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> RunConfig:
    """A configuration whose teacher's store is filled; one worker, whole contrast batches of eight pairs."""
    folder = tmp_path_factory.mktemp("resume")
    values = {
        "name": "prepared",
        "output_dir": str(folder),
        "data": {
            "train": write_pairs(folder / "train.jsonl", 44, 0),
            "validation": write_pairs(folder / "validation.jsonl", 21, 1),
            "max_length": 64,
        },
        "teacher": {"model_name_or_path": str(save_teacher(folder / "teacher")), "max_length": 32},
        "student": {
            "model_name_or_path": str(save_student(folder / "student")),
            "prompt": "same ? {text_a} | {text_b} =",
            "answers": ["yes", "no"],
            "lora_dropout": 0.1,
        },
        "loss": {"threshold": None},
        "train": {
            "max_steps": STEPS,
            "per_device_train_batch_size": 8,
            "learning_rate": 1e-2,
            "save_steps": SAVE_STEPS,
            "eval_steps": 4,
            "logging_steps": 3,  # so that a checkpoint falls between two lines of the log
        },
    }
    config = validate(values, "test")
    fill_store(config)
    return config


def run_config(
    prepared: RunConfig,
    name: str,
    workers: int,
    stage: int | str = 3,
    bf16: bool = False,
    mini_batch_size: int | None = None,
    **student,
) -> RunConfig:
    """The prepared run under another name, on `workers` workers; `stage` of ZeRO (0: no DeepSpeed) or a file."""
    values = prepared.model_dump()
    values["name"] = name
    values["student"] |= student
    values["train"] |= {"per_device_train_batch_size": 8 // workers, "bf16": bf16, "mini_batch_size": mini_batch_size}
    values["distributed"] |= {"num_workers": workers, "timeout_s": 60}
    policy = f"zero{stage}.json" if isinstance(stage, int) else stage
    values["distributed"]["deepspeed"] = policy if stage else None
    config = validate(values, "test")
    if not config.run_dir.exists():
        shutil.copytree(prepared.run_dir / "teacher", config.run_dir / "teacher")
    (config.run_dir / "config.yaml").write_text(config.to_yaml())
    return config


def resume(config: RunConfig, workers: int) -> int:
    """Train to the end on `workers` workers; the number of steps that a checkpoint spared."""
    firsts = run_gang(workers, first_step_of_train, config)
    assert len(set(firsts)) == 1
    return firsts[0]


def first_step_of_train(config: RunConfig) -> int:
    found = []
    original = Progress.resume
    Progress.resume = lambda progress: found.append(original(progress)) or found[0]  # in this forked process alone
    train(config)
    return found[0]


def adapter(config: RunConfig) -> dict[str, np.ndarray]:
    [file] = (config.run_dir / "adapter").glob("*.safetensors")
    return {key: value.float().numpy() for key, value in load_file(file).items()}


def lines(config: RunConfig) -> list[dict]:
    """metrics.jsonl without what the clock says."""
    text = (config.run_dir / "metrics.jsonl").read_text()
    found = [json.loads(line) for line in text.splitlines() if line.endswith("}")]  # a kill may leave half a line
    by_the_clock = ("per_second", "seconds", "_4n", "_6n", "peak_memory")
    return [
        {key: value for key, value in line.items() if not any(part in key for part in by_the_clock)} for line in found
    ]


def kill_when(config: RunConfig, workers: int, ready, delay_s: float = 0.0) -> None:
    """Start the training, wait until `ready()`, and kill every process with SIGKILL."""
    with gang(workers, train, config) as (members, _):
        deadline = time.monotonic() + 120
        while not ready():
            assert time.monotonic() < deadline
            time.sleep(0.002)
        time.sleep(delay_s)
        for member in members:
            os.kill(member.pid, signal.SIGKILL)


def has_line(config: RunConfig, step: int):
    """Whether the attempt that starts now has begun its steps and metrics.jsonl has reached `step`."""
    file = config.run_dir / "metrics.jsonl"
    before = file.stat().st_ino if file.exists() else None  # a start writes the file anew
    return lambda: file.exists() and file.stat().st_ino != before and f'"step": {step},' in file.read_text()


@pytest.fixture(scope="module")
def undisturbed(prepared):
    config = run_config(prepared, "undisturbed", 2)
    run_gang(2, train, config)
    return config


@pytest.fixture(scope="module")
def undisturbed_4bit(prepared):
    config = run_config(prepared, "undisturbed-4bit", 2, load_in_4bit=True)
    run_gang(2, train, config)
    return config


def assert_equal(config: RunConfig, expected: RunConfig) -> None:
    found, wanted = adapter(config), adapter(expected)
    assert found.keys() == wanted.keys()
    for name in wanted:
        np.testing.assert_array_equal(found[name], wanted[name], err_msg=name)


def assert_close(config: RunConfig, expected: RunConfig) -> None:
    found, wanted = adapter(config), adapter(expected)
    assert found.keys() == wanted.keys()
    for name in wanted:
        assert np.linalg.norm(found[name] - wanted[name]) < 1e-5 * np.linalg.norm(wanted[name]), name


def test_two_undisturbed_runs_are_identical(prepared, undisturbed):
    again = run_config(prepared, "again", 2)
    run_gang(2, train, again)
    assert_equal(again, undisturbed)
    assert lines(again) == lines(undisturbed)


def test_kill_9_at_a_random_step(prepared, undisturbed):
    """Bit for bit, dropout included; every step stands once in metrics.jsonl, in its order."""
    config = run_config(prepared, "killed", 2)
    generator = np.random.default_rng()
    kill_when(config, 2, has_line(config, generator.choice([3, 4])), delay_s=generator.uniform(0, 0.1))
    assert not (config.run_dir / "adapter").exists()
    assert resume(config, 2) > 0
    assert_equal(config, undisturbed)
    assert lines(config) == lines(undisturbed)


def test_kill_9_with_a_base_in_four_bits(prepared, undisturbed_4bit):
    config = run_config(prepared, "killed-4bit", 2, load_in_4bit=True)
    kill_when(config, 2, has_line(config, 6))
    assert resume(config, 2) > 0
    assert_equal(config, undisturbed_4bit)


@pytest.mark.soak
@pytest.mark.parametrize("load_in_4bit", [False, True])
@pytest.mark.parametrize("seed", range(8))
def test_kills_at_random(prepared, undisturbed, undisturbed_4bit, seed, load_in_4bit):
    """Three kills of one training, each at a random moment after a random step; `-s` shows where."""
    generator = np.random.default_rng(seed)
    config = run_config(prepared, f"soak-{seed}-{load_in_4bit}", 2, load_in_4bit=load_in_4bit)
    reached = []
    for step in sorted(generator.choice([1, 3, 4, 6, 8], 3, replace=False)):
        kill_when(config, 2, has_line(config, step), delay_s=generator.uniform(0, 0.2))
        reached.append(lines(config)[-1]["step"])
    spared = resume(config, 2)
    print(f"killed after the log's steps {reached}; the last resume began at step {spared}")
    expected = undisturbed_4bit if load_in_4bit else undisturbed
    assert_equal(config, expected)
    assert lines(config) == lines(expected)


def test_kill_9_without_deepspeed(prepared):
    settled = run_config(prepared, "plain-whole", 1, 0)
    run_gang(1, train, settled)
    killed = run_config(prepared, "plain-killed", 1, 0)
    kill_when(killed, 1, has_line(killed, 4))
    assert resume(killed, 1) > 0
    assert_equal(killed, settled)
    assert lines(killed) == lines(settled)


def test_without_the_supervised_loss(prepared):
    """Nothing reads behind the last layer's A then: its B may stay zero, that of every other layer may not."""
    config = run_config(prepared, "unsupervised", 2)
    config = config.model_copy(update={"loss": config.loss.model_copy(update={"sup_weight": 0.0})})
    (config.run_dir / "config.yaml").write_text(config.to_yaml())
    run_gang(2, train, config)
    moved = {name: bool(value.any()) for name, value in adapter(config).items() if ".lora_B." in name}
    assert {name for name, has_moved in moved.items() if not has_moved} == {name for name in moved if ".1." in name}


def test_killed_before_the_first_checkpoint(prepared, undisturbed):
    config = run_config(prepared, "early", 2)
    kill_when(config, 2, has_line(config, 1))
    shutil.rmtree(config.run_dir / "checkpoints", ignore_errors=True)  # where the kill came too late
    assert resume(config, 2) == 0
    assert_equal(config, undisturbed)
    assert lines(config) == lines(undisturbed)


def test_killed_before_the_export(prepared, undisturbed, monkeypatch):
    config = run_config(prepared, "export", 2)

    def die(*_):
        os.kill(os.getpid(), signal.SIGKILL)

    with monkeypatch.context() as patch:
        patch.setattr("flipkd_dist.train.export_best", die)
        kill_when(config, 2, lambda: (config.run_dir / f"checkpoints/step-{STEPS:06d}").exists(), delay_s=0.5)
    assert not (config.run_dir / "adapter").exists()
    assert resume(config, 2) == STEPS
    assert_equal(config, undisturbed)


@pytest.mark.parametrize("how", ["signal", "file"])
def test_stopped_on_request(prepared, undisturbed, how):
    """One rank gets SIGUSR1, or the run folder a file `stop`: all ranks leave with the same complete checkpoint."""
    config = run_config(prepared, f"stopped-{how}", 2)
    ready = has_line(config, 1)
    with gang(2, train, config) as (members, queue):
        while not ready():
            time.sleep(0.002)
        if how == "signal":
            os.kill(members[1].pid, signal.SIGUSR1)
        else:
            (config.run_dir / "stop").touch()
        errors = [queue.get(timeout=60)[2] for _ in members]
    assert all(StoppedOnRequest.__name__ in error for error in errors)
    (config.run_dir / "stop").unlink()
    step = newest_checkpoint(config.run_dir / "checkpoints").step
    assert 1 <= step < STEPS and all(f"step {step} of {STEPS}" in error for error in errors)
    assert resume(config, 2) == step
    assert_equal(config, undisturbed)
    assert lines(config) == lines(undisturbed)


def stop_at(config: RunConfig, workers: int, step: int) -> None:
    """Train until the checkpoint of `step` is there."""
    kill_when(config, workers, lambda: (config.run_dir / f"checkpoints/step-{step:06d}").exists())
    for path in (config.run_dir / "checkpoints").glob("step-*"):
        if int(path.name[-6:]) > step:
            shutil.rmtree(path)


MOVES = [((2, 3), (1, 3)), ((1, 3), (2, 3)), ((2, 3), (2, 2)), ((2, 1), (2, 3)), ((1, 2), (2, 1)), ((1, 0), (2, 3))]


@pytest.mark.parametrize(
    ("before", "after", "load_in_4bit"),
    [
        *((*move, False) for move in MOVES),
        *((*move, True) for move in MOVES[:2]),
        *(pytest.param(*move, True, marks=pytest.mark.soak) for move in MOVES[2:]),
    ],
)
def test_other_workers_and_other_stages(prepared, before, after, load_in_4bit):
    """(workers, ZeRO stage) before and after; dropout 0, since other ranks draw other numbers."""
    name = f"{before}-{after}-{load_in_4bit}".translate(str.maketrans("(), ", "----")).strip("-")
    student = {"lora_dropout": 0.0, "load_in_4bit": load_in_4bit}
    settled = run_config(prepared, f"whole-{name}", *before, **student)
    run_gang(before[0], train, settled)
    moved = run_config(prepared, f"moved-{name}", *before, **student)
    stop_at(moved, before[0], 4)
    moved = run_config(prepared, moved.name, *after, **student)
    assert resume(moved, after[0]) == 4
    assert_close(moved, settled)
    assert [line["step"] for line in lines(moved)] == [line["step"] for line in lines(settled)]


@pytest.mark.parametrize("stage", [0, 3])
def test_on_fewer_devices_in_chunks(prepared, stage):
    """The contrast batches of two devices on one, at most three pairs a forward; dropout 0."""
    settled = run_config(prepared, f"whole-chunks-{stage}", 2, lora_dropout=0.0)
    run_gang(2, train, settled)
    moved = run_config(prepared, f"moved-chunks-{stage}", 2, lora_dropout=0.0)
    stop_at(moved, 2, 4)
    moved = run_config(prepared, moved.name, 1, stage, mini_batch_size=3, lora_dropout=0.0)
    assert resume(moved, 1) == 4
    assert_close(moved, settled)


def test_kill_9_in_chunks(prepared, undisturbed):
    """Dropout draws in a resumed run what it would have drawn, chunk by chunk."""
    settled = run_config(prepared, "chunks-whole", 2, mini_batch_size=2)
    run_gang(2, train, settled)
    assert lines(settled) != lines(undisturbed)  # chunks draw other dropout, so there were some
    killed = run_config(prepared, "chunks-killed", 2, mini_batch_size=2)
    kill_when(killed, 2, has_line(killed, 4))
    assert resume(killed, 2) > 0
    assert_equal(killed, settled)
    assert lines(killed) == lines(settled)


def train_and_stop_at(config: RunConfig, step: int) -> None:
    """Ask for the stop in the middle of a step."""
    add = MetricLog.add

    def add_and_ask(log, number, *rest):
        add(log, number, *rest)
        if number == step:
            (config.run_dir / "stop").touch()

    MetricLog.add = add_and_ask  # in this forked process alone
    train(config)


def test_stopped_where_a_validation_is_due(prepared, undisturbed):
    """The checkpoint comes first, the validation when the training goes on."""
    config = run_config(prepared, "due", 2)
    with gang(2, train_and_stop_at, config, 4) as (members, queue):
        assert all(StoppedOnRequest.__name__ in queue.get(timeout=60)[2] for _ in members)
    (config.run_dir / "stop").unlink()
    found = newest_checkpoint(config.run_dir / "checkpoints")
    assert found.step == 4 and found.manifest["unvalidated"]
    assert resume(config, 2) == 4
    assert_equal(config, undisturbed)
    assert lines(config) == lines(undisturbed)


@pytest.mark.parametrize("stage", [pytest.param(1, marks=pytest.mark.soak), 2, 3])
def test_bf16_goes_on_from_the_fp32_masters(prepared, stage):
    settled = run_config(prepared, f"bf16-whole-{stage}", 2, stage, bf16=True)
    run_gang(2, train, settled)
    killed = run_config(prepared, f"bf16-killed-{stage}", 2, stage, bf16=True)
    stop_at(killed, 2, 6)
    assert resume(killed, 2) == 6
    assert_equal(killed, settled)


@pytest.mark.parametrize("stage", [pytest.param(2, marks=pytest.mark.soak), 3])
def test_with_an_offloaded_optimizer(prepared, tmp_path, stage):
    policy = tmp_path / "offload.json"
    policy.write_text(json.dumps({"zero_optimization": {"stage": stage, "offload_optimizer": {"device": "cpu"}}}))
    settled = run_config(prepared, f"offload-whole-{stage}", 2, str(policy))
    run_gang(2, train, settled)
    killed = run_config(prepared, f"offload-killed-{stage}", 2, str(policy))
    stop_at(killed, 2, 6)
    assert resume(killed, 2) == 6
    assert_equal(killed, settled)


@pytest.mark.parametrize("file", ["rank-00000.safetensors", "rank-00001.safetensors", MANIFEST])
@pytest.mark.parametrize("keep", [0.0, 0.5, 0.999])
def test_a_truncated_checkpoint_is_passed_over(prepared, undisturbed, file, keep, tmp_path, caplog):
    folder = tmp_path / "checkpoints"
    shutil.copytree(undisturbed.run_dir / "checkpoints", folder)
    newest, before = newest_checkpoint(folder), sorted(folder.iterdir())[-2]
    content = (newest.path / file).read_bytes()
    (newest.path / file).write_bytes(content[: int(len(content) * keep)])
    with caplog.at_level(logging.WARNING, logger="flipkd_dist"):
        assert newest_checkpoint(folder).path == before
    assert str(newest.path) in caplog.text and file in caplog.text


def test_the_run_goes_on_from_the_one_before(prepared, undisturbed):
    config = run_config(prepared, "truncated", 2)
    stop_at(config, 2, 6)
    broken = config.run_dir / "checkpoints/step-000006/rank-00001.safetensors"
    broken.write_bytes(broken.read_bytes()[:-100])
    assert resume(config, 2) == 4
    assert_equal(config, undisturbed)
    assert lines(config) == lines(undisturbed)


def both_views(config: RunConfig) -> tuple[dict, dict]:
    """After a training: DeepSpeed's own whole tensors, and this rank's slices of ours."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    from flipkd_dist.engine import DeepSpeedEngine

    views = []

    def look(engine):
        theirs = {
            name: [
                safe_get_full_fp32_param(parameter).flatten().numpy(),
                *(safe_get_full_optimizer_state(parameter, kind).flatten().numpy() for kind in MOMENTS),
            ]
            for name, parameter in engine.parameters.items()
        }
        ours = {
            name: (part.start, [value.numpy().copy() for value in part.values.values()])
            for name, part in engine.slices().items()
        }
        views.append((theirs, ours))

    DeepSpeedEngine.close = look  # in this forked process alone
    train(config)
    return views[0]


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_slices_are_what_deepspeed_holds(prepared, stage):
    config = run_config(prepared, f"views-{stage}", 2, stage)
    ranks = run_gang(2, both_views, config)
    theirs = ranks[0][0]
    covered = dict.fromkeys(theirs, 0)
    for _, ours in ranks:
        for name, (start, values) in ours.items():
            covered[name] += len(values[0])
            for value, whole in zip(values, theirs[name], strict=True):
                np.testing.assert_array_equal(value, whole[start : start + len(value)])
                assert value.any()
    assert covered == {name: len(whole[0]) for name, whole in theirs.items()}
