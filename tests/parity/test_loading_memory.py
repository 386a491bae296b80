"""What a rank needs while a four-bit base is loaded into ZeRO-3's shards, in processes of their own."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig

pytestmark = pytest.mark.parity
WORKER = Path(__file__).with_name("loading_memory.py")
LAYERS = 24
SHAPE = dict(hidden_size=1024, intermediate_size=2816, num_attention_heads=16, num_key_value_heads=16, vocab_size=256)
MIB = 2**20


def write_model(folder: Path, num_layers: int) -> int:
    """A Llama of `num_layers` layers in fp32, a file each; the bytes of one layer."""
    folder.mkdir()
    LlamaConfig(num_hidden_layers=num_layers, architectures=["LlamaForCausalLM"], **SHAPE).save_pretrained(folder)
    hidden, inner, vocabulary = SHAPE["hidden_size"], SHAPE["intermediate_size"], SHAPE["vocab_size"]
    shapes = {f"self_attn.{name}_proj": (hidden, hidden) for name in "qkvo"}
    shapes |= {"mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden), "mlp.down_proj": (hidden, inner)}
    layer = {f"{name}.weight": torch.randn(shape) / 30 for name, shape in shapes.items()}
    layer |= {f"{name}_layernorm.weight": torch.ones(hidden) for name in ("input", "post_attention")}
    files = {f"{number}.safetensors": (f"model.layers.{number}.", layer) for number in range(num_layers)}
    rest = {"model.embed_tokens": (vocabulary, hidden), "lm_head": (vocabulary, hidden), "model.norm": (hidden,)}
    files["rest.safetensors"] = ("", {f"{name}.weight": torch.ones(shape) for name, shape in rest.items()})
    index = {}
    for file, (prefix, tensors) in files.items():
        save_file({prefix + name: value for name, value in tensors.items()}, folder / file)
        index |= {prefix + name: file for name in tensors}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return sum(value.nbytes for value in layer.values())


def load_on_two_ranks(*folders: Path) -> list[list[dict]]:
    """What each rank says about each folder."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ranks = []
    for rank in range(2):
        environment = {**os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "DS_ACCELERATOR": "cpu"}
        environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(WORKER.parents[2])}
        command = [sys.executable, str(WORKER), *map(str, folders)]
        ranks.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True))
    try:
        outputs = [rank.communicate(timeout=240)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0, 0]
    lines = [[line for line in output.splitlines() if line.startswith("RESULT ")] for output in outputs]
    return [[json.loads(line.removeprefix("RESULT ")) for line in found] for found in lines]


def test_peak_is_the_shard_two_layers_and_what_a_model_of_one_layer_needs(tmp_path):
    one, many = tmp_path / "one", tmp_path / "many"
    try:
        layer = write_model(one, 1)
        assert write_model(many, LAYERS) == layer and layer * LAYERS > 1e9  # bytes in the files
        for small, large in load_on_two_ranks(one, many):
            assert small["live"] == large["live"] == 0
            assert large["shard"] - small["shard"] == pytest.approx((LAYERS - 1) * layer / 8 / 2, rel=1e-2)
            overhead = small["peak"] - small["shard"] - layer
            bound = large["shard"] + 2 * layer + overhead
            # A rank that held all packed bytes for a moment would need as much again as its shard.
            assert large["shard"] > 1.3 * layer
            print(
                {
                    key: round(value / MIB)
                    for key, value in (small | {"peak of many": large["peak"], "bound": bound}).items()
                }
            )
            assert large["peak"] < bound
    finally:
        shutil.rmtree(many, ignore_errors=True)
