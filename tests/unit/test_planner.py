"""The planner's formulas against numbers worked out by hand, and what must follow from them at any size."""

from dataclasses import replace

import pytest
import torch
from storages import Saved
from tiny import CAUSAL, save_student, sentences, started_student

from flipkd_dist.batches import BatchMaker
from flipkd_dist.config import StudentConfig
from flipkd_dist.planner import (
    Layout,
    Workload,
    ZeroSettings,
    activation_bytes,
    gather_bytes,
    packed_bytes,
    predict,
    quant_state,
)
from flipkd_dist.planner_devices import DEVICES
from flipkd_dist.planner_scaling import largest_batch, scaled_step, step_memory
from flipkd_dist.planner_shape import Shape, Target, shape_of
from flipkd_dist.planner_speed import flops_per_token

# Two layers of width 8: q and o of 8 x 8, k and v of 8 x 4, a gated MLP of 16; LoRA of rank 2 on q, k, v, o.
Q, K = 8 * 8, 8 * 4
LAYER = 2 * Q + 2 * K + 3 * 8 * 16
LORA_LAYER = 2 * (2 * (8 + 8) + 2 * (8 + 4))
SHAPE = Shape(
    model_type="llama",
    num_layers=2,
    hidden=8,
    num_heads=2,
    query_width=8,
    key_width=4,
    intermediate=16,
    gated=True,
    eager=False,
    sdpa_repeats_keys=True,
    linear=2 * LAYER,
    largest_linear=8 * 16,
    embedding=100 * 8,
    output_matrix=100 * 8,
    others={8: 5},
    norm_width=16,
    lora_r=2,
    targets=(Target(8, 8, True), Target(8, 4, True), Target(8, 4, True), Target(8, 8, False)),
)
FP32 = Workload(pairs=3, tokens_per_pair=5, value_bytes=4, lora_dropout=0.0, on_gpu=False)
BF16 = replace(FP32, value_bytes=2)
NO_BUCKET = ZeroSettings(reduce_bucket_size=1000, stage3_param_persistence_threshold=0)


def test_the_sizes_of_the_example():
    assert SHAPE.linear == 2 * 576
    assert SHAPE.lora == 2 * LORA_LAYER == 2 * 112
    assert SHAPE.kept == 1152 + 800 + 40  # without the output matrix


def test_one_process_in_fp32():
    found = predict(SHAPE, Layout(0), FP32, ZeroSettings())
    assert (found.weights, found.lora) == (4 * 1992, 4 * 224)
    assert (found.gradients, found.optimizer, found.buckets, found.gather) == (4 * 224, 8 * 224, 0, 0)
    # A token of a layer: 2 norms (8 each), q, k, v and output (8), a log-sum a head, gate, up and their product (16),
    # the input of A of q, k, v (8; that of o is kept already), four outputs of A (2), all of 4 bytes; a mask 3 x 5 x 5.
    token = 2 * 8 + 4 * 8 + 2 + 3 * 16 + 8 + 4 * 2
    mask, first_norm, last_norm, readouts = 3 * 25, 15 * 8, 15 * 8, 3 * 2 * 6
    assert found.activations == 4 * (2 * (15 * token + mask) - first_norm + last_norm + readouts)


def test_bf16_keeps_lora_in_fp32_except_under_stages_1_and_2():
    """PEFT's adapters are fp32; DeepSpeed's stages 1 and 2 cast the module."""
    by_stage = {stage: predict(SHAPE, Layout(stage, 2), BF16, NO_BUCKET) for stage in range(4)}
    assert [by_stage[stage].lora for stage in range(4)] == [4 * 224, 2 * 224, 2 * 224, 4 * 112]
    assert by_stage[0].optimizer == 8 * 224
    assert all(by_stage[stage].optimizer == 12 * 112 for stage in (1, 2, 3))  # fp32 copy and moments, halved
    assert [by_stage[stage].gradients for stage in (0, 1, 3)] == [4 * 224, 2 * (224 + 112), 2 * 112]
    assert by_stage[2].gradients == 2 * (112 + 16)
    assert [by_stage[stage].weights for stage in range(4)] == [2 * 1992] * 3 + [1992]
    assert [by_stage[stage].buckets for stage in range(4)] == [0, 2000, 2000, 2000]
    assert by_stage[2].activations < by_stage[0].activations < by_stage[3].activations


def test_four_bits():
    assert packed_bytes(SHAPE) == 576
    assert quant_state(SHAPE, double_quant=False) == 4 * 18  # 1152 / 64 blocks
    assert quant_state(SHAPE, double_quant=True) == 18 + 4 * 1
    found = predict(SHAPE, Layout(0, load_in_4bit=True), FP32, ZeroSettings())
    assert found.weights == 576 + 22 + 4 * 840
    sharded = predict(SHAPE, Layout(3, 2, load_in_4bit=True), FP32, NO_BUCKET)
    assert sharded.weights == (576 + 4 * 840) // 2 + 22  # the scales stay whole
    dense = predict(SHAPE, Layout(3, 2), FP32, NO_BUCKET)
    # Under ZeRO-3 dense layers keep their inputs, packed ones do not: 8 for q, k, v (not in layer 1), 8 and 16.
    assert dense.activations - sharded.activations == 4 * 15 * (2 * (8 + 8 + 16) - 8)
    assert found.load_peak >= found.weights + 4 * 224


def test_dropout_keeps_an_input_a_target_and_a_mask():
    cpu = replace(FP32, lora_dropout=0.1)
    gpu = replace(cpu, on_gpu=True)
    plain, on_cpu, on_gpu = (activation_bytes(SHAPE, Layout(0), work)[0] for work in (FP32, cpu, gpu))
    assert on_cpu - plain == 15 * 4 * (2 * (32 - 8) + 32 + 8)  # the first layer's input needs no gradient, no mask
    assert on_cpu - on_gpu == 15 * 3 * (32 + 8)


def test_checkpointing_keeps_a_layer_and_the_inputs():
    kept, most = activation_bytes(SHAPE, Layout(0, gradient_checkpointing=True), FP32)
    assert kept == 4 * (2 * 15 * 8 + 15 * 8 + 36)
    assert most - kept == 4 * (15 * 114 + 75)


def test_what_is_gathered():
    assert gather_bytes(SHAPE, Layout(2, 2), FP32, NO_BUCKET) == (0, 0)
    assert gather_bytes(SHAPE, Layout(3, 1), FP32, NO_BUCKET) == (0, 0)
    everything = 4 * (1152 + 40 + 224)
    assert gather_bytes(SHAPE, Layout(3, 2), FP32, NO_BUCKET) == (everything, everything)
    few = replace(NO_BUCKET, stage3_max_live_parameters=900, stage3_prefetch_bucket_size=100)
    kept = gather_bytes(SHAPE, Layout(3, 2), FP32, few)
    assert kept == (everything, 4 * (100 + 128))  # whatever is used again within a billion weights is kept
    few = replace(few, stage3_max_reuse_distance=1000)
    assert gather_bytes(SHAPE, Layout(3, 2), FP32, few) == (4 * (900 + 128), 4 * (100 + 128))


def test_small_tensors_stay_whole_under_stage_3():
    threshold = replace(NO_BUCKET, stage3_param_persistence_threshold=17)
    without, found = (predict(SHAPE, Layout(3, 2), FP32, zero) for zero in (NO_BUCKET, threshold))
    assert found.weights - without.weights == 4 * 40
    assert found.lora - without.lora == 4 * 2 * (6 * 16 + 2 * 8)
    assert found.gather < without.gather


def test_offloading_moves_the_optimizer_to_the_host():
    on, off = (predict(SHAPE, Layout(2, 2, offload_optimizer=offload), BF16, NO_BUCKET) for offload in (True, False))
    assert (on.optimizer, off.host) == (0, 0)
    assert on.host > off.optimizer and on.peak < off.peak


def test_settings_come_from_deepspeeds_keys():
    given = {"stage": 2, "reduce_bucket_size": 5e6, "overlap_comm": True, "round_robin_gradients": True}
    assert ZeroSettings.of(given) == ZeroSettings(reduce_bucket_size=5_000_000, overlap_comm=True)
    assert ZeroSettings.of({"stage": 3}).overlap_comm and not ZeroSettings.of({"stage": 1}).overlap_comm
    doubled = predict(SHAPE, Layout(2, 2), BF16, ZeroSettings.of(given)).buckets
    assert doubled == 2 * predict(SHAPE, Layout(2, 2), BF16, ZeroSettings(reduce_bucket_size=5_000_000)).buckets


@pytest.mark.parametrize("stage", range(4))
@pytest.mark.parametrize("four_bit", [False, True])
def test_more_never_takes_less(stage, four_bit):
    layout = Layout(stage, 4, four_bit)
    base = predict(SHAPE, layout, BF16, NO_BUCKET)
    assert predict(SHAPE, layout, replace(BF16, pairs=4), NO_BUCKET).peak > base.peak
    assert predict(SHAPE, layout, replace(BF16, tokens_per_pair=6), NO_BUCKET).peak > base.peak
    assert predict(replace(SHAPE, lora_r=4), layout, BF16, NO_BUCKET).peak > base.peak
    assert predict(SHAPE, layout, FP32, NO_BUCKET).peak > base.peak
    fewer_ranks = predict(SHAPE, replace(layout, world_size=2), BF16, NO_BUCKET)
    assert fewer_ranks.weights >= base.weights and fewer_ranks.optimizer >= base.optimizer
    assert (fewer_ranks.weights > base.weights) == (stage == 3)
    assert (fewer_ranks.optimizer > base.optimizer) == (stage > 0)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_largest_batch_is_the_last_that_fits(checkpointing):
    layout, memory = Layout(2, 2, gradient_checkpointing=checkpointing), 1e6
    most = largest_batch(SHAPE, layout, BF16, NO_BUCKET, memory)
    assert most > 3
    peaks = [step_memory(SHAPE, layout, replace(BF16, pairs=pairs), NO_BUCKET).peak for pairs in (most, most + 1)]
    assert peaks[0] <= memory < peaks[1]
    assert largest_batch(SHAPE, layout, BF16, NO_BUCKET, 1000) == 0


def test_operations_of_a_token():
    attention = 4 * 5 * 8 * 2
    assert flops_per_token(SHAPE, 5, 1) == 4 * 1152 + 6 * 224 + 3 * attention
    assert flops_per_token(SHAPE, 5, 2) - flops_per_token(SHAPE, 5, 1) == 2 * 1152 + 2 * 224 + attention


def wire_bytes(*arguments, micro_steps=1) -> int:
    return scaled_step(*arguments, DEVICES["h200"], micro_steps).wire_bytes


def test_bytes_on_the_wire():
    readouts = 3 * 2 * 4 * (1 + 1)  # two ranks: sent once, and their gradients once
    assert wire_bytes(SHAPE, Layout(0, 1), FP32, NO_BUCKET) == 0
    assert wire_bytes(SHAPE, Layout(0, 2), FP32, NO_BUCKET) == 4 * 224 + readouts
    assert wire_bytes(SHAPE, Layout(1, 2), BF16, NO_BUCKET) == 2 * 224 + 2 * 112 + readouts
    once = 4 * (1152 + 40 + 224 + 800) // 2 + 4 * 112  # all stays gathered for the backward
    assert wire_bytes(SHAPE, Layout(3, 2), FP32, NO_BUCKET) == once + readouts
    few = replace(NO_BUCKET, stage3_max_live_parameters=200, stage3_prefetch_bucket_size=1, stage3_max_reuse_distance=0)
    again = 4 * (1152 + 40 + 224 - max(200 + 128, 800)) // 2
    assert wire_bytes(SHAPE, Layout(3, 2), FP32, few) == once + again + readouts
    assert wire_bytes(SHAPE, Layout(3, 2), FP32, few, micro_steps=3) == 3 * (once + again + readouts)


def test_the_time_of_a_step():
    device = replace(DEVICES["h200"], bf16_tflops=1e-9, mfu=0.5, memory_gb_s=1e9)
    found = scaled_step(SHAPE, Layout(0), BF16, ZeroSettings(), device, micro_steps=2)
    assert found.step_s == pytest.approx(2 * 15 * flops_per_token(SHAPE, 5, 1) / 500)
    assert found.pairs_per_s == pytest.approx(6 / found.step_s)
    packed = scaled_step(SHAPE, Layout(0, load_in_4bit=True), BF16, ZeroSettings(), replace(device, unpack_per_s=1e3))
    assert packed.step_s == pytest.approx(found.step_s / 2 + 2 * 1152 / 1e3)


@pytest.mark.parametrize("dropout", [0.0, 0.05])
@pytest.mark.parametrize("family", CAUSAL)
def test_activations_are_those_that_autograd_keeps(tmp_path, family, dropout):
    changes = {"hidden_size": 192, "head_dim": 48, "intermediate_size": 512}
    folder = save_student(tmp_path, family, **changes)
    student, encoder = started_student(folder, rank=16, lora_dropout=dropout)
    texts = list(zip(*[iter(sentences(16, shortest=8))] * 2, strict=True))
    batch = BatchMaker(encoder, student, share_prefix=False)(texts)
    student.behind_attention = []  # the plan counts the last layer whole
    saved = Saved()
    with saved:
        student.train()(**batch.tensors(torch.device("cpu")))
    found = saved.drain()
    rows, length = batch.input_ids.shape
    work = Workload(rows, length, 4, dropout, on_gpu=False)
    shape = shape_of(folder, StudentConfig(model_name_or_path=family), 16)
    planned, _ = activation_bytes(shape, Layout(0), work)
    assert planned == pytest.approx(found, rel=0.03)
