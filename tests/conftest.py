"""Shared set-up: one thread a process, no hub, no telemetry, and the test folder importable."""

import os
import sys
from pathlib import Path

os.environ.update(
    OMP_NUM_THREADS="1",
    HF_HUB_OFFLINE="1",
    TOKENIZERS_PARALLELISM="false",
    DS_ACCELERATOR="cpu",
    HF_HUB_DISABLE_PROGRESS_BARS="1",
)
sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent / "unit"))

import torch

torch.set_num_threads(1)
