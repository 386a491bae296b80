"""The verb `plan`: from a folder with a config.json alone to a table, JSON and a recommendation."""

import json
from dataclasses import replace

import numpy as np
import pytest
from click.testing import CliRunner
from transformers import Qwen2Config

from flipkd_dist.chunks import chunk_slices
from flipkd_dist.cli import cli
from flipkd_dist.config import RunConfig
from flipkd_dist.errors import UserError
from flipkd_dist.order import rows_of_rank, training_order
from flipkd_dist.plan_inputs import layouts
from flipkd_dist.plan_report import Plan, make_plan, table
from flipkd_dist.planner import Layout
from flipkd_dist.planner_devices import DEFAULT, DEVICES, GIB, USABLE, find_device
from flipkd_dist.planner_shape import student_shape

SMALL = dict(hidden_size=256, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2)


@pytest.fixture
def config_file(tmp_path):
    """Names data and weights that do not exist."""
    Qwen2Config(vocab_size=1000, **SMALL).save_pretrained(tmp_path / "student")
    path = tmp_path / "run.yaml"
    path.write_text(
        f"name: x\noutput_dir: {tmp_path}/runs\ndata: {{train: nowhere.csv, max_length: 64}}\n"
        f"student: {{model_name_or_path: {tmp_path}/student, lora_r: 32}}\n"
    )
    return path


def configured(folder, **sections) -> RunConfig:
    student = {"model_name_or_path": str(folder), "lora_r": 32} | sections.pop("student", {})
    return RunConfig.model_validate({"name": "x", "student": student, **sections})


def run(*arguments):
    return CliRunner().invoke(cli, ["plan", *map(str, arguments)], prog_name="flipkd")


def test_a_configuration_alone_is_enough_and_nothing_is_left_behind(config_file):
    before = sorted(config_file.parent.rglob("*"))
    result = run(config_file, "distributed.num_workers=4", "--device", "rtx4090")
    assert result.exit_code == 0, result.output
    assert sorted(config_file.parent.rglob("*")) == before
    lines = result.output.splitlines()
    assert "4 x rtx4090: 24 GiB, 21.6 usable; bf16, 32 pairs a device" in result.output and "64 tokens" in result.output
    rows = [line for line in lines if line.startswith(("DDP", "ZeRO-"))]
    assert len(rows) == 4 + 3 * 8
    assert [row[:6] for row in rows[::4]] == ["DDP   ", *["ZeRO-1"] * 2, *["ZeRO-2"] * 2, *["ZeRO-3"] * 2]
    assert lines[-1].startswith("recommended: ZeRO-1: the lowest stage that fits 32 pairs a device takes ")
    assert lines[-1].count(". ") == 0


def test_json_holds_the_whole_plan(config_file):
    result = run(
        config_file, "--json", "--device-memory", 3, "--tflops", 50, "--num-workers", 2, "--tokens-per-pair", 9
    )
    assert result.exit_code == 0, result.output
    value = json.loads(result.output)
    assert value["version"] == 1 and set(value["rows"][0]) == {
        "layout",
        "runs",
        "fits",
        "largest_pairs",
        "memory",
        "speed",
    }
    plan = Plan.from_dict(value)
    assert json.loads(json.dumps(plan.as_dict())) == value
    assert plan.device == replace(DEVICES[DEFAULT], memory_gib=3, bf16_tflops=50, fp32_tflops=50)
    assert plan.workload.tokens_per_pair == 9 and plan.rows[-1].layout.world_size == 2
    assert table(plan).splitlines()[-1] == f"recommended: {plan.recommendation.reason}"


def test_mistakes_are_one_line(config_file):
    assert "--device gtx1: unknown: take one of" in str(run(config_file, "--device", "gtx1").exception)
    with pytest.raises(UserError, match=r"^distributed\.deepspeed: none\.json cannot be read"):
        make_plan(configured(config_file.parent / "student", distributed={"deepspeed": "none.json"}))
    assert run(config_file, "--num-workers", 0).exit_code == 2


def test_the_device_follows_the_run_unless_it_is_named(config_file):
    folder = config_file.parent / "student"
    assert make_plan(configured(folder)).device.name == DEFAULT
    plan = make_plan(configured(folder, distributed={"use_gpu": False}))
    assert plan.device.name == "cpu" and plan.workload.value_bytes == 4 and not plan.workload.on_gpu
    assert find_device("A100-40GB", tflops=7).tflops(2) == 7
    assert find_device("h100-80gb").wire_gb_s(8) > find_device("h100-80gb").wire_gb_s(9)


def test_stage_0_is_for_one_worker_and_does_not_offload():
    assert not any(layout.offload_optimizer for layout in layouts(2) if layout.stage == 0)
    assert len(layouts(2)) == 28 and layouts(2)[0] == Layout(0, 2)


def test_the_lowest_stage_that_fits_is_recommended(config_file):
    folder = config_file.parent / "student"

    def advice(memory_gib, workers, **sections):
        return make_plan(configured(folder, **sections), None, memory_gib, None, workers).recommendation

    ample = advice(80, 1)
    assert ample.layout == Layout(0, 1) and ample.pairs == 32
    assert advice(80, 2).layout == Layout(1, 2)
    assert "runs in one process only" in advice(80, 2).reason
    whole, checkpointed = (row.memory.peak for row in make_plan(configured(folder)).rows[:2])
    between = (whole + checkpointed) / 2 / USABLE / GIB
    assert advice(between, 1).layout == Layout(0, 1, gradient_checkpointing=True)
    assert "as configured the least is" in advice(between, 1).reason
    kept = advice(80, 2, student={"load_in_4bit": True}, train={"gradient_checkpointing": True})
    assert kept.layout == Layout(1, 2, True, False, True)
    nothing = advice(0.001, 4)
    assert nothing.layout is None and nothing.pairs == 0 and nothing.reason.startswith("nothing fits")


def test_a_smaller_batch_is_proposed_where_the_configured_one_fits_nowhere(config_file):
    folder = config_file.parent / "student"
    plan = make_plan(configured(folder, train={"per_device_train_batch_size": 100_000}), memory_gib=10, num_workers=2)
    best = max(row.largest_pairs for row in plan.rows if row.runs)
    assert 0 < plan.recommendation.pairs == best < 100_000
    assert plan.recommendation.reason.startswith("no layout holds 100000 pairs a device; ZeRO-")


def test_activations_are_those_of_one_forward(config_file):
    folder = config_file.parent / "student"
    chunked = configured(folder, train={"per_device_train_batch_size": 512, "mini_batch_size": 8})
    whole = configured(folder, train={"per_device_train_batch_size": 8})
    plan = make_plan(chunked)
    found, expected = ([row.memory.activations for row in one.rows] for one in (plan, make_plan(whole)))
    readouts = 512 * 32 * 4 * 4  # of all chunks and their gradients
    assert found == [count + readouts for count in expected]
    assert "512 pairs a device and micro-step in 64 chunks" in table(plan)
    assert plan.recommendation.pairs == 8 and "fits 8 pairs a forward" in plan.recommendation.reason
    speed = plan.rows[0].speed
    assert speed.tokens_per_s == pytest.approx(256 * speed.pairs_per_s) and speed.pairs_per_s * speed.step_s == 512
    mfu = 512 * 256 * 4 * student_shape(chunked).linear / (speed.step_s * plan.device.bf16_tflops * 1e12)
    assert speed.mfu_4n == pytest.approx(mfu)


def test_a_policy_of_ones_own_counts(tmp_path, config_file):
    policy = tmp_path / "own.json"
    policy.write_text(json.dumps({"zero_optimization": {"stage": 2, "reduce_bucket_size": 1e6}}))
    config = configured(config_file.parent / "student", distributed={"deepspeed": str(policy)})
    by_stage = {row.layout.stage: row.memory.buckets for row in make_plan(config, num_workers=2).rows}
    assert by_stage == {0: 0, 1: 100_000_000, 2: 2_000_000, 3: 100_000_000}


def test_a_pair_of_texts_alone_is_two_inputs(config_file):
    folder = config_file.parent / "student"
    plan = make_plan(configured(folder, student={"mode": "alone"}))
    assert plan.workload.tokens_per_pair == 2 * make_plan(configured(folder)).workload.tokens_per_pair
    assert make_plan(configured(folder, student={"mode": "alone"}), tokens_per_pair=9).workload.tokens_per_pair == 9


def test_read_outs_that_are_not_counted_are_named(config_file):
    result, read = run(config_file, "student.readout=mean"), run(config_file, "student.readout=mean", "--json")
    assert "note: student.readout mean is not counted: read-outs are 256 wide and not 32, so" in result.output
    plan = Plan.from_dict(json.loads(read.output))
    assert plan.notes and plan == make_plan(
        configured(config_file.parent / "student", student={"readout": "mean"}, data={"max_length": 64})
    )
    assert "note:" not in run(config_file).output


def ranged(folder, least, most, **train) -> RunConfig:
    return configured(folder, distributed={"num_workers": [least, most]}, train=train)


def test_one_worker_of_two_is_planned_as_one_with_the_same_batch_in_the_same_chunks(config_file):
    folder = config_file.parent / "student"
    found = make_plan(ranged(folder, 1, 2), num_workers=1)
    alike = configured(folder, train={"per_device_train_batch_size": 64, "mini_batch_size": 32})
    expected = make_plan(alike)
    # But a range runs under DeepSpeed alone.
    assert found.rows == tuple(replace(row, runs=row.layout.stage > 0) for row in expected.rows)
    assert found.recommendation.layout == Layout(1, 1) and expected.recommendation.layout == Layout(0, 1)
    assert "one process takes no range of workers" in found.recommendation.reason
    assert replace(found, rows=(), recommendation=None) == replace(expected, rows=(), recommendation=None)
    assert "1 x h100-80gb" in table(found) and "64 pairs a device and micro-step in 2 chunks" in table(found)
    assert "(yes), (no): one process is for comparison" in table(found) and "(yes)" not in table(expected)


def test_all_workers_of_a_range_are_planned_as_their_number(config_file):
    folder = config_file.parent / "student"
    two = make_plan(configured(folder, distributed={"num_workers": 2}))
    assert make_plan(ranged(folder, 1, 2), num_workers=2) == make_plan(ranged(folder, 1, 2)) == two
    # In place of a number another one is planned, with as many pairs each.
    assert make_plan(configured(folder, distributed={"num_workers": 4}), num_workers=2) == two


@pytest.mark.parametrize(("workers", "mini_batch"), [(2, None), (3, None), (5, 10), (7, 40), (8, 10)])
def test_a_worker_of_a_range_is_planned_with_what_training_gives_it(config_file, workers, mini_batch):
    config = ranged(config_file.parent / "student", 2, 8, per_device_train_batch_size=30, mini_batch_size=mini_batch)
    order, _ = training_order(config, np.arange(500))
    shares = [rows_of_rank(order.contrast_batch_size, rank, workers) for rank in range(workers)]
    rows = max(share.stop - share.start for share in shares)
    chunks = chunk_slices(rows, rows, config.train.chunk_size)
    work = make_plan(config, num_workers=workers).workload
    assert (work.pairs, work.chunks) == (rows, len(chunks))
    assert work.forward_pairs == max(chunk.stop - chunk.start for chunk in chunks)


@pytest.mark.parametrize("workers", [1, 9])
def test_workers_that_training_would_refuse_are_refused(config_file, workers):
    config = ranged(config_file.parent / "student", 2, 8)
    with pytest.raises(UserError):
        config.distributed.check_started(workers)
    result = run(config_file, "distributed.num_workers=[2,8]", "--num-workers", workers)
    assert str(result.exception) == (
        f"--num-workers: {workers} is outside distributed.num_workers = [2, 8], and training would refuse it: "
        "take a number of that range, or change the range"
    )
