"""A rank of its own, freshly started: peak resident memory after loading each of the folders named, and its shard.

RANK=0 LOCAL_RANK=0 WORLD_SIZE=2 MASTER_ADDR=127.0.0.1 MASTER_PORT=29511 python loading_memory.py FOLDER ...
"""

import gc
import json
import os
import sys
from pathlib import Path

import torch

from flipkd_dist.config import StudentConfig
from flipkd_dist.engine import ZeroPlacement, join_world, prepare_deepspeed
from flipkd_dist.student import load_student


def peak() -> int:
    """Bytes."""
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) * 1024


def load(folder: str) -> dict:
    ds_config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    }
    settings = StudentConfig(model_name_or_path=folder, load_in_4bit=True, lora_r=1)
    student = load_student(Path(folder), settings, [5, 6], 1, placement=ZeroPlacement(ds_config))
    base = [parameter for parameter in student.parameters() if not parameter.requires_grad]
    return {
        "shard": sum(p.ds_tensor.numel() * p.ds_tensor.element_size() for p in base),
        "live": sum(p.numel() for p in base),
        "peak": peak(),
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    join_world(use_gpu=False, timeout_s=120)
    prepare_deepspeed(use_gpu=False)
    for name in sys.argv[1:]:
        print("RESULT", json.dumps(load(name)), flush=True)
        gc.collect()
    os._exit(0)
