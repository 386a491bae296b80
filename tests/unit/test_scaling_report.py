"""`flipkd plan --scaling` from a folder with a config.json alone."""

import json

import pytest
from test_plan_report import config_file, configured, run  # noqa: F401

from flipkd_dist.errors import UserError
from flipkd_dist.plan_report import make_plan
from flipkd_dist.planner import Layout
from flipkd_dist.scaling_report import WORLDS, make_scaling, table


def test_weak_scaling_keeps_the_pairs_per_device(config_file):  # noqa: F811
    result = run(config_file, "--scaling", "weak", "--tokens-per-pair", 20, "--network", 25)
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    assert "weak scaling, 32 pairs a device, 20 tokens a pair" in lines[0] and "25 between machines" in lines[1]
    cells = [line.split() for line in lines[4:]]
    assert [(int(c[0]), int(c[1]), int(c[2])) for c in cells] == [(size, 32, 32 * size) for size in WORLDS]
    assert WORLDS[0] == 1 and WORLDS[-1] == 1024 and cells[0][12] == "100%"
    assert len({len(line) for line in lines[3:]}) == 1


def test_strong_scaling_keeps_the_contrast_batch(config_file):  # noqa: F811
    result = run(config_file, "--scaling", "strong", "--num-workers", 3, "--json")
    assert result.exit_code == 0, result.output
    value = json.loads(result.output)
    assert value["version"] == 1 and value["kind"] == "strong" and value["layout"]["world_size"] == 3
    steps = value["steps"]
    assert [step["ranks"] for step in steps] == [1, 2, 4, 8, 16, 32]  # 64 do not divide 96 pairs
    assert [step["pairs"] for step in steps] == [96, 48, 24, 12, 6, 3]
    assert {step["columns"] for step in steps} == {96}
    assert steps[0]["efficiency"] == 1 and steps[-1]["efficiency"] < 0.5 and steps[-1]["bottleneck"] == "weights"


def test_the_configuration_decides_layout_and_direction(config_file):  # noqa: F811
    folder = config_file.parent / "student"
    own = config_file.parent / "own.json"
    own.write_text(json.dumps({"zero_optimization": {"stage": 2, "reduce_bucket_size": 1e6}}))
    config = configured(folder, distributed={"deepspeed": str(own)}, train={"gradient_accumulation_steps": 3})
    found = make_scaling(config, "weak")
    assert found.layout.stage == 2 and found.micro_steps == 3 and found.width == 32
    assert "ZeRO-2" in table(found)
    whole = make_scaling(configured(folder, distributed={"deepspeed": None}), "weak")
    assert whole.layout.stage == 0 and "DDP" in table(whole)
    both = make_scaling(
        config.model_copy(update={"loss": config.loss.model_copy(update={"mcl_symmetric": True})}), "weak"
    )
    assert both.steps[-1].gather_bytes == 2 * found.steps[-1].gather_bytes


def test_the_plan_and_its_scaling_say_the_same(config_file):  # noqa: F811
    folder, zero = config_file.parent / "student", "ds_configs/zero3.json"
    train = {"per_device_train_batch_size": 64, "mini_batch_size": 10, "gradient_accumulation_steps": 2}
    config = configured(folder, distributed={"deepspeed": zero}, train=train, loss={"mcl_symmetric": True})
    step = make_scaling(config, "weak").steps[4]
    assert (step.ranks, step.pairs) == (16, 64)
    rows = make_plan(config, num_workers=16).rows
    (row,) = (row for row in rows if row.layout == Layout(3, 16))
    assert (row.speed.step_s, row.speed.pairs_per_s) == (step.step_s, step.pairs_per_s)
    assert (row.speed.wire_bytes, row.memory.peak) == (step.wire_bytes, step.peak_bytes)
    assert row.memory.matrix == step.matrix_bytes > 0


def test_chunks_follow_the_pairs_of_a_device(config_file):  # noqa: F811
    folder = config_file.parent / "student"
    train = {"per_device_train_batch_size": 64}
    whole = make_scaling(configured(folder, train=train), "strong", num_workers=4).steps
    chunked = make_scaling(configured(folder, train=train | {"mini_batch_size": 64}), "strong", num_workers=4).steps
    slower = [one.compute_s > other.compute_s for one, other in zip(chunked, whole, strict=True)]
    assert [step.pairs for step in chunked] == [256, 128, 64, 32, 16, 8, 4, 2, 1]
    assert slower == [True, True, *[False] * 7]


def test_a_number_of_workers_that_would_be_ignored_is_refused(config_file):  # noqa: F811
    with pytest.raises(UserError, match=r"^--num-workers: --scaling weak takes 1 to 1,024 workers by itself"):
        make_scaling(configured(config_file.parent / "student"), "weak", num_workers=4)
    assert run(config_file, "--scaling", "both").exit_code == 2


def test_a_range_of_workers_keeps_its_contrast_batch_and_its_chunks(config_file):  # noqa: F811
    folder = config_file.parent / "student"
    config = configured(folder, distributed={"num_workers": [2, 4]})
    found = make_scaling(config, "strong")
    train = {"per_device_train_batch_size": 32, "mini_batch_size": 32}
    chunked = configured(folder, train=train)
    assert found.steps == make_scaling(chunked, "strong", num_workers=4).steps and found.steps[0].pairs == 128
    (row,) = (row for row in make_plan(config, num_workers=2).rows if row.layout == Layout(3, 2))
    assert (row.speed.step_s, row.memory.peak) == (found.steps[1].step_s, found.steps[1].peak_bytes)
    weak = make_scaling(configured(folder, distributed={"num_workers": 4}), "weak")
    assert make_scaling(config, "weak") == weak
    with pytest.raises(UserError, match=r"^--num-workers: .* = \[2, 4\] is that of 4 workers, .*: leave it out$"):
        make_scaling(config, "strong", num_workers=2)
