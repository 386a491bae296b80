"""Which layers did not move; the first forward itself is checked in tests/parity/test_verify_parity.py."""

import torch
from tiny import save_student, started_student

from flipkd_dist.verify import unmoved_layers


def test_layers_that_did_not_move(tmp_path):
    student, _ = started_student(save_student(tmp_path))
    state = {name: torch.zeros_like(value) for name, value in student.trained_parameters().items()}
    assert unmoved_layers(state) == [0, 1]
    for name, value in state.items():
        if ".lora_A." in name:
            value.fill_(1)  # A is never zero
    assert unmoved_layers(state) == [0, 1]
    [name] = [name for name in state if "layers.1.self_attn.v_proj.lora_B" in name]
    state[name][0] = 1e-9
    assert unmoved_layers(state) == [0]  # one tensor of a layer is enough
    [name] = [name for name in state if "layers.0.self_attn.o_proj.lora_B" in name]
    state[name][0] = 1e-9
    assert unmoved_layers(state) == []
