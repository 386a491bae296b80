"""DeepSpeed's file holds the sharding policy; what the run decides is refused there and added by `compose`."""

import json
from pathlib import Path

import pytest

from flipkd_dist.config import RunConfig
from flipkd_dist.ds_config import RUN_OWNED, compose, read_policy
from flipkd_dist.errors import UserError

BUNDLED = sorted((Path(__file__).resolve().parents[2] / "ds_configs").glob("*.json"))


def mistake(path: str | Path) -> str:
    with pytest.raises(UserError) as caught:
        read_policy(str(path))
    assert "\n" not in str(caught.value) and str(caught.value).startswith(f"distributed.deepspeed: {path}")
    return str(caught.value)


@pytest.fixture
def policy_file(tmp_path):
    def write(policy) -> Path:
        path = tmp_path / "policy.json"
        path.write_text(policy if isinstance(policy, str) else json.dumps(policy))
        return path

    return write


def test_a_policy_is_read_as_it_is(policy_file):
    policy = {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}, "steps_per_print": 5}
    assert read_policy(str(policy_file(policy))) == policy


def test_bundled_ones_are_found():
    assert {path.name for path in BUNDLED} >= {"zero1.json", "zero2.json", "zero3.json"}
    assert RunConfig(name="x").distributed.deepspeed in {f"ds_configs/{path.name}" for path in BUNDLED}


@pytest.mark.parametrize("path", BUNDLED, ids=lambda path: path.name)
def test_bundled_ones_are_readable_from_any_folder(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    policy = json.loads(path.read_text())
    assert policy["zero_optimization"]["stage"] in (1, 2, 3)
    for name in (f"ds_configs/{path.name}", path.name, str(path)):
        assert read_policy(name) == policy


def test_a_file_of_ones_own_comes_before_the_bundled_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ds_configs").mkdir()
    (tmp_path / "ds_configs" / "zero3.json").write_text('{"zero_optimization": {"stage": 1}}')
    assert read_policy("ds_configs/zero3.json")["zero_optimization"]["stage"] == 1


@pytest.mark.parametrize(
    "path", ["/nowhere/zero3.json", "/nowhere/ds_configs/zero3.json", "nowhere/zero3.json", "zero9.json"]
)
def test_a_path_that_leads_nowhere_is_not_replaced_by_a_bundled_file(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "cannot be read (FileNotFoundError): check it" in mistake(path)


def test_unreadable_files(policy_file, tmp_path):
    assert "cannot be read (IsADirectoryError)" in mistake(tmp_path)
    assert "policy.json, line 2: not JSON" in mistake(policy_file("{\n  zero: 3}"))
    path = policy_file("")
    path.write_bytes(b'{"\xff": 1}')
    assert "cannot be read (UnicodeDecodeError)" in mistake(path)


@pytest.mark.parametrize(
    "policy", [{}, [], 3, None, {"zero_optimization": 3}, {"zero_optimization": {}}, {"zero": {"stage": 3}}]
)
def test_without_a_stage(policy_file, policy):
    assert "sets no zero_optimization.stage: add one of 1, 2, 3" in mistake(policy_file(policy))


@pytest.mark.parametrize("stage", [0, 4, -1, "3", None, True, [3], {}, "auto"])
def test_other_stages(policy_file, stage):
    said = mistake(policy_file({"zero_optimization": {"stage": stage}}))
    assert f"zero_optimization.stage is {stage!r}: take 1, 2 or 3" in said


@pytest.mark.parametrize("key", ["offload_optimizer", "offload_param"])
def test_offloading_to_disk_is_refused(policy_file, key):
    path = policy_file({"zero_optimization": {"stage": 3, key: {"device": "nvme", "nvme_path": "/x"}}})
    assert f"{key} to nvme: checkpoints do not reach it: take the device cpu" in mistake(path)


def test_a_value_left_to_others_is_refused(policy_file):
    path = policy_file({"zero_optimization": {"stage": 3, "reduce_bucket_size": "auto"}})
    assert "zero_optimization.reduce_bucket_size is auto" in mistake(path)


OWNED = (
    *("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping"),
    *("optimizer", "scheduler", "zero_force_ds_cpu_optimizer"),
    *("bf16", "bfloat16", "fp16", "amp", "torch_autocast"),
)


@pytest.mark.parametrize("key", sorted({*OWNED, *RUN_OWNED}))
def test_what_the_run_decides_is_refused(policy_file, key):
    said = mistake(policy_file({"zero_optimization": {"stage": 3}, key: "auto"}))
    assert f"sets {key}, which {RUN_OWNED[key]} decides: remove it there" in said


def test_every_owner_is_a_setting_or_the_run():
    settings = {f"train.{key}" for key in RunConfig(name="x").train.model_dump()}
    for owner in RUN_OWNED.values():
        assert owner.startswith("the run") or set(owner.split(" and ")) <= settings, owner


def test_compose():
    config = RunConfig.model_validate(
        {
            "name": "x",
            "train": {"per_device_train_batch_size": 5, "gradient_accumulation_steps": 3, "max_grad_norm": 0.7},
        }
    )
    policy = {"zero_optimization": {"stage": 2, "overlap_comm": True}}
    assert compose(policy, config, 4, True) == {
        "zero_optimization": {"stage": 2, "overlap_comm": True},
        "train_batch_size": 60,
        "train_micro_batch_size_per_gpu": 5,
        "gradient_accumulation_steps": 3,
        "gradient_clipping": 0.7,
        "bf16": {"enabled": True},
        "zero_force_ds_cpu_optimizer": False,
    }
    assert compose(policy, config, 1, False)["bf16"] == {"enabled": False}
    assert policy == {"zero_optimization": {"stage": 2, "overlap_comm": True}}


def test_compose_adds_nothing_but_what_a_file_may_not_set():
    added = compose({}, RunConfig(name="x"), 1, False).keys()
    assert added <= RUN_OWNED.keys()
