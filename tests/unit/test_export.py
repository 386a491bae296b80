"""Adapter and base as one plain folder: PEFT's own merge, the base's files, bounded memory, complete or absent."""

import dataclasses
import gc
import json
import os
import re
import shutil

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from peft import PeftModel
from peft_reference import CARD
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import CAUSAL, pair_table, save_student, sentences, started_student
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GPT2Config

from flipkd_dist import cli, drift, merge, shard_files
from flipkd_dist import export as export_module
from flipkd_dist.adapter import WEIGHTS, AdapterCard, Probe, save_adapter
from flipkd_dist.batches import BatchMaker
from flipkd_dist.config import RunConfig
from flipkd_dist.errors import UserError
from flipkd_dist.evaluate import pair_texts, student_scores
from flipkd_dist.export import export, size_in_bytes
from flipkd_dist.model_files import fingerprint
from flipkd_dist.predict import Matcher
from flipkd_dist.shard_files import INDEX, StoredTensor, plan_shards, stored_tensors, write_shards
from flipkd_dist.world import World

TEXTS = pair_texts(pair_table(6))
LONG = tuple(" ".join(sentences(20, seed, 6)) for seed in (3, 4))  # longer than the card's 120 tokens
FILE = "model.safetensors"


@pytest.fixture(autouse=True)
def gpt2(monkeypatch):
    """A family whose projections are stored transposed, for these tests alone."""
    config = lambda vocab: GPT2Config(vocab_size=vocab, n_embd=48, n_layer=2, n_head=4, n_positions=512)  # noqa: E731
    monkeypatch.setitem(CAUSAL, "gpt2", config)


def trained(folder, family="glm", dtype=torch.float32, settings=None, **changes):
    """The adapter folder of a student in the middle of training; the base lies beside it.

    `dtype` is that of the base's files, `settings` are of StudentConfig, `changes` of the base's configuration.
    """
    settings = settings or {}
    base = save_student(folder / "base", family, **changes)
    if family == "gpt2":  # as published: without the body's prefix
        state = {name.removeprefix("transformer."): value for name, value in load_file(base / FILE).items()}
        save_file(state, base / FILE, metadata={"format": "pt"})
    if dtype != torch.float32:
        AutoModelForCausalLM.from_pretrained(base, dtype=dtype).save_pretrained(base)
    student, encoder = started_student(base, lora_alpha=4.0, **settings)  # of rank 8: a scaling of one half
    state = {name: value.detach().clone() for name, value in student.trained_parameters().items()}
    [p_match], _ = student_scores(student, World(), BatchMaker(encoder, student, True), [("card", "pin")], 1)
    card = dataclasses.replace(
        CARD,
        base_model=str(base),
        base_fingerprint=fingerprint(base),
        encoder_module=student.encoder_module,
        probe=Probe("card", "pin", p_match, 0.5),
        **settings,
    )
    save_adapter(folder / "adapter", student, state, encoder.tokenizer, card)
    return folder / "adapter"


def read(folder):
    """Every tensor of a folder, through its index."""
    index = json.loads((folder / INDEX).read_text())
    found = {}
    for name, file in index["weight_map"].items():
        with safe_open(folder / file, framework="pt") as tensors:
            found[name] = tensors.get_tensor(name)
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in found.values())
    assert {path.name for path in folder.glob("*.safetensors")} == set(index["weight_map"].values())
    return found


def changed(base, found):
    return {
        name for name, value in load_file(base / "model.safetensors").items() if not torch.equal(value, found[name])
    }


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """Shared by the tests that change nothing in it."""
    return trained(tmp_path_factory.mktemp("glm"))


@pytest.mark.parametrize("family", ["glm", "glm4", "qwen2", "llama", "gpt2"])
def test_as_peft_merges_in_the_base_files_names_shapes_and_types(tmp_path, family):
    adapter, base = trained(tmp_path, family), tmp_path / "base"
    export(str(adapter), tmp_path / "merged")
    found, files = read(tmp_path / "merged"), load_file(base / "model.safetensors")
    assert {n: (v.shape, v.dtype) for n, v in found.items()} == {n: (v.shape, v.dtype) for n, v in files.items()}
    peft = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).merge_and_unload()
    plain, info = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert plain.state_dict().keys() == peft.state_dict().keys()
    for name, value in peft.state_dict().items():
        torch.testing.assert_close(plain.state_dict()[name], value, rtol=0, atol=1e-6, msg=name)
    expected = {"gpt2": "c_attn"}.get(family, "[qkvo]_proj")
    assert {name for name in files if re.search(rf"{expected}\.weight$", name)} == changed(base, found)


def test_the_original_glm_is_refused(tmp_path):
    adapter = trained(tmp_path, "glm_original")
    with pytest.raises(UserError, match="transformers has no class for the original GLM"):
        export(str(adapter), tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_a_base_in_bf16_is_merged_in_fp32_and_rounded_once(tmp_path):
    adapter = trained(tmp_path, dtype=torch.bfloat16)
    export(str(adapter), tmp_path / "merged")
    found, files, lora = (
        read(tmp_path / "merged"),
        load_file(tmp_path / "base" / "model.safetensors"),
        load_file(adapter / WEIGHTS),
    )
    name = "model.layers.1.self_attn.q_proj"
    down, up = (lora[f"base_model.model.{name}.lora_{part}.weight"].double() for part in "AB")
    exact = files[f"{name}.weight"].double() + 0.5 * up @ down
    assert {value.dtype for value in found.values()} == {torch.bfloat16}
    different = found[f"{name}.weight"] != exact.to(torch.bfloat16)
    assert different.float().mean() < 0.002  # fp32 may fall on the other side of a tie


def test_shards_reassemble(adapter, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    export(str(adapter), whole, probe=False)
    export(str(adapter), parts, max_shard_size="20KB", probe=False)
    expected, found = read(whole), read(parts)
    assert sorted(path.name for path in whole.glob("*.safetensors")) == ["model.safetensors"]
    files = sorted(parts.glob("*.safetensors"))
    assert len(files) > 5 and files[0].name == f"model-00001-of-{len(files):05}.safetensors"
    for path in files:
        sizes = [value.nbytes for value in load_file(path).values()]
        assert sum(sizes) <= 20_000 or len(sizes) == 1
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)
    plain = AutoModelForCausalLM.from_pretrained(parts).state_dict()
    assert all(torch.equal(plain[name], value) for name, value in expected.items())


def test_a_base_in_shards_with_mixed_types(adapter, tmp_path):
    """Types of different widths stay aligned, scalars and empty tensors included."""
    base = tmp_path / "base"
    AutoModelForCausalLM.from_pretrained(adapter.with_name("base")).save_pretrained(base, max_shard_size="50KB")
    extra = {
        "a.bytes": torch.arange(3, dtype=torch.uint8),
        "b.half": torch.ones(3, dtype=torch.float16),
        "c.scalar": torch.tensor(2.0),
        "d.empty": torch.zeros(0, 4, dtype=torch.bfloat16),
        "e.long": torch.tensor([1, 2]),
    }
    save_file(extra, base / "extra.safetensors")
    index = json.loads((base / INDEX).read_text())
    index["weight_map"] |= dict.fromkeys(extra, "extra.safetensors")
    (base / INDEX).write_text(json.dumps(index))
    stored = stored_tensors(base)
    assert len({one.path for one in stored}) > 3
    target = tmp_path / "merged"
    target.mkdir()
    write_shards(target, stored, lambda _: None, 10**9)
    shutil.copy(base / "config.json", target)
    found = read(target)
    for path in base.glob("*.safetensors"):
        for name, value in load_file(path).items():
            assert torch.equal(found[name], value) and found[name].dtype == value.dtype, name
    for one in stored_tensors(target):
        assert one.start % max(1, one.itemsize) == 0, one  # some readers look at the bytes as they lie


def living_bytes(earlier):
    """Of the tensors that Python can reach and that are not among `earlier`; a shared storage counts once."""
    living = [one for one in gc.get_objects() if isinstance(one, torch.Tensor) and id(one) not in earlier]
    return sum({one.untyped_storage().data_ptr(): one.untyped_storage().nbytes() for one in living}.values())


class Written:
    """A file that notes how much it is given at once."""

    def __init__(self, file, sizes):
        self.file, self.sizes = file, sizes

    def write(self, data):
        self.sizes.append(memoryview(data).nbytes)
        return self.file.write(data)

    def __getattr__(self, name):
        return getattr(self.file, name)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()


def test_no_more_than_one_tensor_and_its_update_is_in_memory(tmp_path, monkeypatch):
    """Bytes of living tensors after every product, and of what is handed to a file at once."""
    living, sizes = [], []
    updated, open_ = merge.Merge._updated, shard_files.Path.open

    def accounted(self, weight, update):
        value = updated(self, weight, update)
        living.append(living_bytes(earlier))
        return value

    def noted(path, mode="r", *rest, **more):
        file = open_(path, mode, *rest, **more)
        return Written(file, sizes) if mode == "wb" else file

    monkeypatch.setattr(merge.Merge, "_updated", accounted)
    monkeypatch.setattr(shard_files.Path, "open", noted)
    monkeypatch.setattr(shard_files, "CHUNK", 4096)
    adapter = trained(tmp_path, num_hidden_layers=6)
    plan = merge.plan_merge(AutoConfig.from_pretrained(tmp_path / "base"), tmp_path / "base", adapter)
    earlier = {id(one) for one in gc.get_objects() if isinstance(one, torch.Tensor)}
    plan.write(tmp_path, 10**9)
    widest = max(one.nbytes for one in plan.stored if one.name in plan.updates)
    assert len(living) == len(plan.updates) == 24 and min(living) > 0
    assert max(living) <= 2 * widest < plan.nbytes / 10  # a weight and its update; one output shard holds everything
    assert sum(sizes) == (tmp_path / "model.safetensors").stat().st_size
    assert max(sizes) <= max(4096, widest, 200 * len(plan.stored))  # the last is the header


def test_the_plan_of_shards():
    sizes = {"a": 4, "b": 4, "c": 9, "d": 1, "e": 7}
    stored = [StoredTensor(name, None, "U8", (size,), 0, size) for name, size in sizes.items()]
    assert [[one.name for one in shard] for shard in plan_shards(stored, 8)] == [["a", "b"], ["c"], ["d", "e"]]
    assert [len(shard) for shard in plan_shards(stored, 1)] == [1] * 5
    assert [len(shard) for shard in plan_shards(stored, 25)] == [5]


def test_sizes():
    assert [size_in_bytes(text) for text in ("5GB", "1.5 mb", "2KiB", "1GiB", "77")] == [
        5 * 10**9,
        1_500_000,
        2048,
        2**30,
        77,
    ]
    for text in ("", "5TB", "-1GB", "0", "0.1", "GB"):
        with pytest.raises(UserError, match=r"--max-shard-size .*: not a size: write it as 5GB"):
            size_in_bytes(text)


def test_what_stands_beside_the_weights(adapter, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(adapter.with_name("base"), base)
    (base / "generation_config.json").write_text('{"max_new_tokens": 3}')
    export(str(adapter), tmp_path / "merged", base_model=str(base), probe=False)
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert config == json.loads((base / "config.json").read_text()) and "quantization_config" not in config
    assert (tmp_path / "merged" / "generation_config.json").read_text() == '{"max_new_tokens": 3}'
    words = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert words("how do i change my pin") == AutoTokenizer.from_pretrained(adapter)("how do i change my pin")
    (base / "generation_config.json").unlink()
    export(str(adapter), tmp_path / "other", base_model=str(base), probe=False)
    assert not (tmp_path / "other" / "generation_config.json").exists()


@pytest.mark.parametrize("family", ["glm", "qwen2"])
def test_the_code_in_the_model_card_reproduces_p_match(tmp_path, monkeypatch, capsys, family):
    adapter = trained(tmp_path, family)
    export(str(adapter), tmp_path / "merged")
    text = (tmp_path / "merged" / "README.md").read_text()
    code = re.search("```python\n(.*?)```", text, re.DOTALL).group(1)
    assert "flipkd_dist" not in code and "peft" not in code
    monkeypatch.chdir(tmp_path / "merged")
    names = {}
    exec(code, names)
    assert capsys.readouterr().out in ("True\n", "False\n")
    texts = [*TEXTS, LONG, ("card", LONG[0]), (LONG[1], "pin"), (LONG[0], LONG[0])]
    expected, _ = Matcher(adapter).predict(texts)
    np.testing.assert_allclose([names["p_match"](*pair) for pair in texts], expected, rtol=0, atol=1e-5)
    assert np.ptp(expected) > 1e-2


def test_the_model_card_says_what_was_done(adapter, tmp_path):
    export(str(adapter), tmp_path / "merged")
    text, card = (tmp_path / "merged" / "README.md").read_text(), AdapterCard.read(adapter)
    for said in (card.base_model, card.base_fingerprint, "step 7", "--merge original", "`yes` (match)", "0.4", "120"):
        assert said in text
    assert card.prompt in text and re.search(r"drift: p\(match\) of 9 pairs .*\(cpu, float32\): largest", text)
    export(str(adapter), tmp_path / "unprobed", probe=False)
    assert "drift: not measured (--no-probe)" in (tmp_path / "unprobed" / "README.md").read_text()


def test_drift_is_measured_on_the_folder_that_was_written(adapter, tmp_path, monkeypatch):
    measured = []
    real = drift.Before.drift
    monkeypatch.setattr(drift.Before, "drift", lambda self, *args: measured.append(real(self, *args)) or measured[-1])
    export(str(adapter), tmp_path / "merged")
    assert measured[-1].num_pairs == 9 and measured[-1].largest < 1e-5 and measured[-1].num_changed == 0
    merged_value = merge.Merge.value

    def doubled(self, one):
        value = merged_value(self, one)
        return None if value is None else 2 * value

    monkeypatch.setattr(merge.Merge, "value", doubled)
    probes = tmp_path / "probes.csv"
    probes.write_text("one,other\n" + "".join(f"{a},{b}\n" for a, b in TEXTS))
    export(str(adapter), tmp_path / "other", probes=probes, text_a="one", text_b="other")
    before, _ = Matcher(adapter).predict(TEXTS)
    after = drift.plain_p_match(
        tmp_path / "other", AdapterCard.read(adapter), TEXTS, torch.float32, torch.device("cpu")
    )
    assert measured[-1].num_pairs == 6 and measured[-1].largest == pytest.approx(np.abs(before - after).max())
    assert measured[-1].mean == pytest.approx(np.abs(before - after).mean()) and measured[-1].largest > 1e-3
    assert measured[-1].num_changed == ((before >= 0.4) != (after >= 0.4)).sum()


def test_probe_pairs(adapter, tmp_path):
    card = AdapterCard.read(adapter)
    assert drift.default_pairs(card, adapter) == [("card", "pin"), *drift.BUILT_IN]
    texts = sentences(200)
    for name, first in (("validation", 0), ("test", 100)):
        lines = [{"text_a": texts[first + i], "text_b": texts[first + i + 1], "label": 1} for i in range(60)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    data = {"train": "t.jsonl", **{name: str(tmp_path / f"{name}.jsonl") for name in ("validation", "test")}}
    config = RunConfig.model_validate({"name": "x", "data": data})
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    pairs = drift.default_pairs(card, tmp_path)
    assert len(pairs) == len(set(pairs)) == 64 and pairs[0] == ("card", "pin")
    assert 28 <= sum(pair[0] in texts[100:160] for pair in pairs) <= 35  # spread over both files
    for name in ("validation", "test"):
        (tmp_path / f"{name}.jsonl").unlink()
    assert drift.default_pairs(card, tmp_path) == [("card", "pin"), *drift.BUILT_IN]


@pytest.mark.parametrize("where", ["_write_shard", "write_companions", "merged_card", "os.replace"])
@pytest.mark.parametrize("how", [KeyboardInterrupt, OSError, "kill"])
def test_an_interrupted_export_leaves_no_folder(adapter, tmp_path, where, how):
    output = tmp_path / "merged"

    def fail(*_):
        if how == "kill":
            os._exit(9)
        raise how

    with pytest.MonkeyPatch.context() as patch:
        owner = {"_write_shard": shard_files, "os.replace": os}.get(where, export_module)
        real = os.replace
        name = where.removeprefix("os.")
        by_name = (lambda a, b: fail() if b == output else real(a, b)) if name == "replace" else fail
        patch.setattr(owner, name, by_name)
        if how == "kill":
            child = os.fork()
            if not child:
                export(str(adapter), output, probe=False)
                os._exit(1)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
        else:
            with pytest.raises(how):
                export(str(adapter), output, probe=False)
            assert list(tmp_path.iterdir()) == []
    assert not output.exists()
    export(str(adapter), output, probe=False)  # and clears away what a kill left
    assert [path.name for path in tmp_path.iterdir()] == ["merged"]


def rewrite(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def renamed(path, old, new):
    state = load_file(path)
    save_file({name.replace(old, new): value for name, value in state.items()}, path)


SPOILED = {
    "dora": (lambda a: rewrite(a / "adapter_config.json", use_dora=True), "use_dora is set, only plain LoRA"),
    "bias": (lambda a: rewrite(a / "adapter_config.json", bias="all"), "bias is set, only plain LoRA"),
    "no config": (lambda a: (a / "adapter_config.json").unlink(), "no readable LoRA adapter"),
    "cut short": (lambda a: os.truncate(a / WEIGHTS, 500), "no readable LoRA adapter"),
    "no B": (lambda a: renamed(a / WEIGHTS, "1.self_attn.q_proj.lora_B", "x"), "belongs to no plain LoRA"),
    "no module": (lambda a: renamed(a / WEIGHTS, "layers.1", "layers.7"), "its base has no module model.layers.7"),
    "norm": (lambda a: renamed(a / WEIGHTS, "self_attn.q_proj", "input_layernorm"), r"\(GlmRMSNorm\) cannot be merged"),
    "output": (lambda a: renamed(a / WEIGHTS, "model.layers.1.self_attn.q_proj", "lm_head"), "lm_head .* cannot be"),
    "shape": (lambda a: renamed(a / WEIGHTS, "self_attn.q_proj", "mlp.down_proj"), "does not fit .*down_proj"),
    "another base": (lambda a: rewrite(a / "flipkd.json", base_fingerprint="0"), "not the base that .* was trained on"),
    "no card": (lambda a: (a / "flipkd.json").unlink(), "neither a run folder nor an adapter folder"),
}


@pytest.mark.parametrize("mistake", SPOILED)
def test_adapters_that_cannot_be_merged(adapter, tmp_path, mistake):
    spoil, said = SPOILED[mistake]
    copy = shutil.copytree(adapter, tmp_path / "adapter")
    spoil(copy)
    with pytest.raises(UserError, match=said) as error:
        export(str(copy), tmp_path / "merged", probe=False)
    assert "\n" not in str(error.value) and [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_bases_that_cannot_be_merged(adapter, tmp_path):
    base = shutil.copytree(adapter.with_name("base"), tmp_path / "base")
    (base / "model.safetensors").rename(base / "weights.safetensors")
    with pytest.raises(UserError, match=r"has neither model\.safetensors nor"):
        stored_tensors(base)
    os.truncate(base / "weights.safetensors", 3000)
    with pytest.raises(UserError, match=r"weights\.safetensors is missing or damaged"):
        stored_tensors(base)


OUTPUTS = {
    "full": "--output .*full: this folder is not empty: name another or remove it",
    "file": "--output .*file: this is a file",
    "no/folder": r"--output .*: there is no folder .*no: create it first",
}


@pytest.mark.parametrize("name", OUTPUTS)
def test_outputs_that_are_refused(adapter, tmp_path, name):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("kept")
    (tmp_path / "file").write_text("kept")
    with pytest.raises(UserError, match=OUTPUTS[name]):
        export(str(adapter), tmp_path / name, probe=False)
    assert (tmp_path / "full" / "mine.txt").read_text() == (tmp_path / "file").read_text() == "kept"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "full"]


def test_an_empty_folder_is_filled(adapter, tmp_path):
    (tmp_path / "merged").mkdir()
    export(str(adapter), tmp_path / "merged", probe=False)
    assert (tmp_path / "merged" / "README.md").is_file()


def test_too_little_room_on_the_disk(adapter, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=10**6))
    with pytest.raises(UserError, match=r"--output .*: 0\.0 GB are needed and 0\.0 GB are free in .*: make room"):
        export(str(adapter), tmp_path / "merged", probe=False)
    assert list(tmp_path.iterdir()) == []


def test_the_command_line(adapter, tmp_path, monkeypatch):
    run = CliRunner().invoke(cli.cli, ["export", str(adapter), "--output", str(tmp_path / "merged")])
    assert run.exit_code == 0, run.output
    (tmp_path / "empty.csv").write_text("text_a,text_b\n")
    for more, said in (
        (["--merge", "dequantized"], "--merge dequantized: this adapter was not trained on a 4-bit base: take"),
        (["--probes", str(tmp_path / "empty.csv")], "no pairs in it"),
        (["--max-shard-size", "big"], "not a size"),
    ):
        run = CliRunner().invoke(cli.cli, ["export", str(adapter), "--output", str(tmp_path / "other"), *more])
        assert isinstance(run.exception, UserError) and said in str(run.exception)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty.csv", "merged"]


def test_a_run_folder_is_a_model(adapter, tmp_path):
    shutil.copytree(adapter, tmp_path / "run" / "adapter")
    export(str(tmp_path / "run"), tmp_path / "merged", probe=False)
    assert changed(adapter.with_name("base"), read(tmp_path / "merged"))
