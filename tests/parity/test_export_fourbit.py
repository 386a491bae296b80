"""Adapters of 4-bit bases merged: into what the layers multiplied with, or into the original weights."""

import re

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from test_export import FILE, TEXTS, changed, read, trained

from flipkd_dist import drift
from flipkd_dist.adapter import AdapterCard
from flipkd_dist.export import export
from flipkd_dist.fourbit import round_trip
from flipkd_dist.predict import Matcher

pytestmark = pytest.mark.parity
FORMS = {
    "nf4": {},
    "nf4, scales in 32 bits": {"bnb_4bit_use_double_quant": False},
    "fp4": {"bnb_4bit_quant_type": "fp4"},
}


def difference(adapter, folder):
    """The largest of p(match), merged against base and adapter."""
    card = AdapterCard.read(adapter)
    before, _ = Matcher(adapter).predict(TEXTS)
    return np.abs(drift.plain_p_match(folder, card, TEXTS, torch.float32, torch.device("cpu")) - before).max()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family", ["glm", "qwen2"])
def test_dequantized_answers_as_in_training_and_original_drifts(tmp_path, family, form):
    adapter = trained(tmp_path, family, settings={"load_in_4bit": True, **FORMS[form]})
    export(str(adapter), tmp_path / "dequantized")
    export(str(adapter), tmp_path / "original", merge="original")
    same, drifted = (difference(adapter, tmp_path / mode) for mode in ("dequantized", "original"))
    assert same <= 1e-4 and drifted > max(1e-3, 10 * same), (same, drifted)
    reported = {}
    for mode in ("dequantized", "original"):
        text = (tmp_path / mode / "README.md").read_text()
        assert f"`--merge {mode}`" in text and "p(match) of 9 pairs before and after merging (cpu, float32)" in text
        reported[mode] = float(re.search(r"largest difference ([\d.e-]+)", text).group(1))
    assert reported["dequantized"] <= 1e-4 and reported["original"] > 1e-3, reported
    print(f"{family}, {form}: dequantized {same:.1e}, original {drifted:.1e}")


def test_the_other_4bit_layers_become_what_they_multiply_with_too(tmp_path):
    adapter, base = trained(tmp_path, dtype=torch.bfloat16, settings={"load_in_4bit": True}), tmp_path / "base"
    export(str(adapter), tmp_path / "merged")
    files, found = load_file(base / FILE), read(tmp_path / "merged")
    linear = {name for name in files if re.search(r"layers\.\d\.(self_attn|mlp)\.\w+_proj\.weight", name)}
    assert changed(base, found) == linear and len(linear) == 2 * (4 + 2)
    for name in linear:
        if ".mlp." in name:
            assert torch.equal(found[name], round_trip(files[name]).to(torch.bfloat16))
    assert {value.dtype for value in found.values()} == {torch.bfloat16}
    export(str(adapter), tmp_path / "original", merge="original", probe=False)
    assert changed(base, read(tmp_path / "original")) == {name for name in linear if ".self_attn." in name}
