"""Which layers did not move; the first forward itself is checked in tests/parity/test_verify_parity.py."""

from functools import partial

import torch
from tiny import save_student, started_student

from flipkd_dist.engine import PlainEngine
from flipkd_dist.slices import Slice
from flipkd_dist.verify import first_moves, unmoved_layers
from flipkd_dist.world import World


def unmoved(engine: PlainEngine) -> list[int]:
    return unmoved_layers(first_moves(engine, World()))


def part(engine: PlainEngine, name: str) -> Slice:
    [found] = [slice_ for full, slice_ in engine.slices().items() if name in full]
    return found


def test_layers_that_did_not_move(tmp_path):
    student, _ = started_student(save_student(tmp_path))
    for parameter in student.trained_parameters().values():
        parameter.data.zero_()
    engine = PlainEngine(student, partial(torch.optim.AdamW, lr=0.0), 0.0)
    assert unmoved(engine) == [0, 1]
    for name, parameter in engine.parameters.items():
        if ".lora_A." in name:
            parameter.data.fill_(1)  # A is never zero
    assert unmoved(engine) == [0, 1]
    part(engine, "layers.1.self_attn.v_proj.lora_B").values["weight"][0] = 1e-9
    assert unmoved(engine) == [0]  # one tensor of a layer is enough
    part(engine, "layers.0.self_attn.o_proj.lora_B").values["weight"][0] = 1e-9
    assert unmoved(engine) == []


def test_layers_that_did_not_move_with_full_tuning(tmp_path):
    """Weights are never zero, but before the first update their moments are."""
    student, _ = started_student(save_student(tmp_path), tuning="full")
    engine = PlainEngine(student, partial(torch.optim.AdamW, lr=0.0), 0.0)
    assert unmoved(engine) == [0, 1]
    part(engine, "embed_tokens").values["exp_avg"][0] = 1e-9
    part(engine, "layers.1.input_layernorm").values["exp_avg"][0] = 1e-9
    assert unmoved(engine) == [0]
    assert first_moves(engine, World()).keys() == student.trained_parameters().keys()
