"""The configuration: its defaults, what a file and the overrides may say, and the one line that answers a mistake."""

from pathlib import Path

import pytest
import yaml

from flipkd_dist.config import RunConfig, listed, load_config, validate, with_overrides
from flipkd_dist.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = sorted([*ROOT.glob("flipkd_dist/samples/*.yaml"), *ROOT.glob("examples/*.yaml")])
DEFAULTS = {
    "name": "x",
    "output_dir": "runs",
    "seed": 42,
    "data": {
        "train": None,
        "validation": None,
        "test": None,
        "format": "auto",
        "text_a": "text_a",
        "text_b": "text_b",
        "label": "label",
        "max_length": 256,
    },
    "teacher": {
        "model_name_or_path": None,
        "weights": None,
        "pooling": "auto",
        "prompt": None,
        "max_length": 128,
        "batch_size": 64,
        "num_workers": 2,
        "num_cpus_per_worker": 1,
        "num_gpus_per_worker": "auto",
        "api_base": None,
        "api_key_env": "OPENAI_API_KEY",
        "requests_per_minute": None,
        "cross_encoder": None,
        "neighbours": 0,
        "scores": None,
        "scale": "auto",
        "calibrate": False,
        "store_path": None,
    },
    "teach": {
        "loss": "cosine",
        "num_train_epochs": 1,
        "max_steps": -1,
        "per_device_train_batch_size": 64,
        "learning_rate": 2.0e-5,
        "warmup_ratio": 0.1,
        "weight_decay": 0.01,
        "save_steps": None,
    },
    "student": {
        "model_name_or_path": None,
        "load_in_4bit": False,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_quant_storage": "auto",
        "lora_r": None,
        "lora_alpha": None,
        "lora_dropout": 0.05,
        "lora_target_modules": None,
        "encoder_module": None,
        "prompt": None,
        "answers": ["Yes", "No"],
        "attn_implementation": "auto",
        "tuning": "lora",
        "mode": "pair",
        "readout": "auto",
        "bidirectional": False,
    },
    "loss": {
        "sup_weight": 1.0,
        "dist_weight": 0.1,
        "mcl_weight": 0.1,
        "margin": 0.06,
        "threshold": 0.5,
        "temperature": 1.0,
        "mcl_negative_margin": "negative",
        "mcl_symmetric": False,
        "contrastive": "mcl",
    },
    "train": {
        "num_train_epochs": 3,
        "max_steps": -1,
        "per_device_train_batch_size": 32,
        "mini_batch_size": None,
        "group_size": 1,
        "per_device_eval_batch_size": 64,
        "gradient_accumulation_steps": 1,
        "learning_rate": 3.0e-5,
        "lr_scheduler_type": "linear",
        "warmup_ratio": 0.05,
        "weight_decay": 0.1,
        "max_grad_norm": 1.0,
        "bf16": "auto",
        "gradient_checkpointing": False,
        "verify": "auto",
        "metric_for_best_model": "roc_auc",
        "save_steps": None,
        "eval_steps": None,
        "logging_steps": 10,
        "keep_checkpoints": 5,
        "test_checkpoints": 1,
        "profile": False,
    },
    "distributed": {
        "num_workers": 1,
        "use_gpu": "auto",
        "resources_per_worker": {},
        "deepspeed": "ds_configs/zero3.json",
        "storage_path": None,
        "timeout_s": 600,
        "max_failures": 3,
    },
    "tracking": {
        "mlflow_tracking_uri": None,
        "experiment": "flipkd",
        "registered_model": None,
        "alias": "champion",
        "parent_run_id": None,
    },
}


def write(folder: Path, text: str) -> Path:
    path = folder / "c.yaml"
    path.write_text(text)
    return path


def mistake(path: Path, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        load_config(path, overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value).replace(f"{path.parent}/", "")


@pytest.fixture
def named(tmp_path) -> Path:
    return write(tmp_path, "name: x\n")


def test_defaults(named):
    assert load_config(named).model_dump() == DEFAULTS


def test_an_empty_section_is_its_defaults(tmp_path):
    text = "name: x\n" + "".join(f"{section}:\n" for section, value in DEFAULTS.items() if isinstance(value, dict))
    assert load_config(write(tmp_path, text)).model_dump() == DEFAULTS


def test_overrides_win_and_leave_the_rest(tmp_path):
    path = write(tmp_path, "name: x\nseed: 7\ntrain: {learning_rate: 0.5, logging_steps: 3}\n")
    config = load_config(path, ["train.learning_rate=0.25", "data.max_length=9", "train.learning_rate=0.125"])
    assert (config.train.learning_rate, config.train.logging_steps) == (0.125, 3)  # the last word, the file
    assert (config.seed, config.data.max_length) == (7, 9)


@pytest.mark.parametrize(
    "override, value",
    [
        ("data.train=[a.jsonl, b.csv]", ["a.jsonl", "b.csv"]),
        ("data.train=org/name:train", "org/name:train"),
        ("data.test=null", None),
        ("data.test=", None),
        ("loss.threshold=null", None),
        ("student.lora_target_modules=[q_proj]", ["q_proj"]),
        ("student.prompt='same ? {text_a} = {text_b}: '", "same ? {text_a} = {text_b}: "),
        ('student.answers=["Yes","No"]', ["Yes", "No"]),
        ("distributed.resources_per_worker={CPU: 2, GPU: 0.5}", {"CPU": 2, "GPU": 0.5}),
        ("distributed.resources_per_worker.CPU=3", {"CPU": 3}),
        ("train.bf16=true", True),
        ("train.bf16=auto", "auto"),
        ("train.max_steps=-1", -1),
        ("tracking.alias='5'", "5"),
    ],
)
def test_overrides_hold_any_yaml_value(tmp_path, override, value):
    path = write(tmp_path, "name: x\ndata: {train: old.jsonl, test: old.jsonl}\n")
    section, key = override.split("=")[0].split(".")[:2]
    assert getattr(getattr(load_config(path, [override]), section), key) == value


@pytest.mark.parametrize("written", ["1e-4", "1E-4", "1.0e-4", "0.0001"])
def test_scientific_notation_is_a_number(tmp_path, written):
    path = write(tmp_path, f"name: x\ntrain: {{learning_rate: {written}}}\n")
    override = [f"train.weight_decay={written}"]
    config = load_config(path, override)
    assert (config.train.learning_rate, config.train.weight_decay) == (1e-4, 1e-4)


def test_whole_numbers_stand_for_floats_but_nothing_else_is_converted(named):
    config = load_config(named, ["train.learning_rate=1", "loss.margin=0"])
    assert (config.train.learning_rate, type(config.train.learning_rate)) == (1.0, float)
    for override in (
        "train.learning_rate='3'", "train.learning_rate=true", "train.max_steps=3.5", "train.max_steps='3'",
        "train.max_steps=true", "seed=null", "data.text_a=5", "loss.mcl_symmetric=1", "loss.mcl_symmetric='false'",
        "student.lora_r=8.0", "student.answers=Yes", "name=5", "train=5", "data.train=5",
    ):  # fmt: skip
        key = override.split("=")[0]
        assert mistake(named, override).startswith(f"c.yaml: {key} = "), override


@pytest.mark.parametrize("key", ["train.learning_rate", "loss.margin", "loss.threshold", "student.lora_alpha"])
@pytest.mark.parametrize("value", [".nan", ".inf", "-.inf"])
def test_numbers_are_finite(named, key, value):
    assert mistake(named, f"{key}={value}").startswith(f"c.yaml: {key} = ")


@pytest.mark.parametrize(
    "override",
    [
        "train.learning_rate=0", "train.max_steps=0", "train.max_steps=-2", "data.max_length=0", "loss.threshold=1.01",
        "loss.temperature=0", "student.lora_dropout=1", "train.warmup_ratio=2", "seed=-1", "train.save_steps=0",
        "distributed.num_workers=0", "distributed.resources_per_worker={CPU: -1}",
        "distributed.resources_per_worker={CPU: .inf}", "data.format=xml", "teacher.pooling=median", "train.bf16=maybe",
        "name=../x", "name=''", "student.answers=[a, b, c]", "student.answers=[a, '']", "train.verify=true",
        "student.bnb_4bit_quant_storage=float16", "teacher.num_workers=[8, 2]", "teacher.num_workers=[0, 2]",
    ],
)  # fmt: skip
def test_values_out_of_range(named, override):
    key = override.split("=")[0]
    assert mistake(named, override).startswith(f"c.yaml: {key} = ")
    assert mistake(named, override).endswith("; correct this value")


def test_a_value_of_several_kinds_lists_all_of_them(named):
    assert "train.bf16 = 'maybe': must be a valid boolean or 'auto';" in mistake(named, "train.bf16=maybe")
    assert "train.mini_batch_size = 0: must be greater than or equal to 1" in mistake(named, "train.mini_batch_size=0")
    assert "train.mini_batch_size = -2: must be greater" in mistake(named, "train.mini_batch_size=-2")
    assert "train.max_steps = 0: must be -1 or greater than or equal to 1;" in mistake(named, "train.max_steps=0")


def test_least_and_most_workers_stand_in_this_order(named):
    said = mistake(named, "teacher.num_workers=[8, 2]")
    assert (
        said == "c.yaml: teacher.num_workers = [8, 2]: [min, max] with min above max: write [2, 8]; correct this value"
    )
    assert load_config(named, ["teacher.num_workers=[2, 2]"]).teacher.num_workers == [2, 2]
    distributed = load_config(named, ["distributed.num_workers=[2, 4]"]).distributed
    assert (distributed.min_workers, distributed.max_workers) == (2, 4)
    assert load_config(named, ["distributed.num_workers=[2, 4]"]).contrast_batch_size == 4 * 32


def test_bare_yes_and_no_are_told_to_be_quoted(tmp_path):
    said = mistake(write(tmp_path, "name: x\nstudent: {answers: [Yes, No]}\n"))
    assert 'quote them: ["Yes", "No"]' in said


@pytest.mark.parametrize(
    "unknown, nearest",
    [
        ("train.learning_rat", "train.learning_rate"),
        ("learning_rate", "train.learning_rate"),
        ("train.threshold", "loss.threshold"),
        ("trian", "train"),
        ("student.lora_rank", "student.lora_r"),
        ("ouput_dir", "output_dir"),
    ],
)
def test_an_unknown_key_names_the_nearest(named, unknown, nearest):
    assert mistake(named, f"{unknown}=1") == f"c.yaml: unknown key {unknown}: the nearest known key is {nearest}"


def test_an_unknown_dotted_key_is_never_sent_to_a_section(named):
    sections = {section for section, value in DEFAULTS.items() if isinstance(value, dict)}
    assert mistake(named, "train.lr=1").rsplit(" ", 1)[1] not in sections


def test_two_mistakes_are_one_line(tmp_path):
    assert "\n" not in mistake(write(tmp_path, "seed: -1\ntrain: {a: 1, b: 2}\nextra: 1\n"))


@pytest.mark.parametrize("values", [None, [], "name", 5])
def test_only_a_mapping_is_validated(values):
    with pytest.raises(UserError, match="the driver: not a mapping"):
        validate(values, "the driver")


def test_examples_were_found():
    assert ROOT / "flipkd_dist/samples/demo.yaml" in EXAMPLES


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_every_example_is_valid(path):
    assert load_config(path).model_dump(exclude_defaults=True).keys() >= {"name", "data", "teacher", "student"}


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["student.bidirectional=true"], "bidirectional: a pair's answer is read causally: set mode to alone"),
        (["student.readout=mean", "student.encoder_module=q_proj"], "encoder_module: readout mean reads no LoRA-A"),
        (["student.mode=alone", "student.answers=[a, b]"], "answers: texts alone are not answered"),
    ],
)
def test_settings_that_nothing_would_read(named, overrides, said):
    assert mistake(named, *overrides).startswith(f"c.yaml: student: {said}")
    assert load_config(named, [overrides[0].replace("bidirectional=true", "mode=alone")])


def test_written_and_read_again_it_is_the_same(tmp_path, named):
    config = load_config(
        named,
        [
            "data.train=[a.jsonl, 'b c.jsonl']",
            "student.prompt='{text_a}: \"ß\"\n | {text_b} #='",
            "student.answers=['是', 'no']",
            "train.learning_rate=1e-7",
            "loss.threshold=null",
            "distributed.resources_per_worker={CPU: 2}",
            "tracking.alias='1e3'",
            "tracking.experiment='true'",
            "tracking.registered_model='null'",
        ],
    )
    text = config.to_yaml()
    assert load_config(write(tmp_path, text)) == config
    assert RunConfig.model_validate(yaml.safe_load(text)) == config  # as the run folder reads it
    assert list(yaml.safe_load(text)) == list(DEFAULTS)


@pytest.mark.parametrize("kind", ["mcl", "infonce", "arccse", "kdmcse"])
def test_a_margin_that_a_loss_would_ignore_is_a_mistake(named, kind):
    choice = f"loss.contrastive={kind}"
    for margin in ("0", "0.06"):  # none, and what stands there if nothing is said
        assert load_config(named, [choice, f"loss.margin={margin}"]).loss.contrastive == kind
    if kind == "mcl":
        assert load_config(named, [choice, "loss.margin=10", "loss.mcl_negative_margin=anchor"]).loss.margin == 10
        return
    said = mistake(named, choice, "loss.mcl_negative_margin=anchor")
    assert said.startswith(f"c.yaml: loss: mcl_negative_margin: {kind} has no such choice")
    said = mistake(named, choice, "loss.margin=10")
    if kind == "infonce":
        assert said.startswith("c.yaml: loss: margin = 10: infonce has none")
        assert mistake(named, choice, "loss.margin=0.3").startswith("c.yaml: loss: margin = 0.3: infonce has none")
    else:
        assert said.startswith(f"c.yaml: loss: margin = 10: that of {kind} is in radians, below pi")
        assert load_config(named, [choice, "loss.margin=3.14"]).loss.margin == 3.14


def test_run_dir_knows_the_home_folder(monkeypatch):
    monkeypatch.setenv("HOME", "/someone")
    assert RunConfig(name="x", output_dir="~/runs").run_dir == Path("/someone/runs/x")


@pytest.mark.parametrize(("mini", "pairs"), [("null", 32), ("8", 8), ("32", 32), ("100", 32)])
def test_pairs_of_a_forward(named, mini, pairs):
    train = load_config(named, [f"train.mini_batch_size={mini}"]).train
    assert train.pairs_per_forward == pairs and train.chunk_size == (32 if mini == "null" else int(mini))


@pytest.mark.parametrize(
    ("others", "message"),
    [
        (["student.load_in_4bit=true"], "tuning: full moves every weight, load_in_4bit freezes them"),
        (["student.readout=lora_a"], "readout: lora_a needs tuning: lora"),
    ],
)
def test_full_tuning_does_not_go_with_lora_or_four_bits(named, others, message):
    assert load_config(named, ["student.tuning=full"]).student.reads == "mean"
    with pytest.raises(UserError, match=message):
        load_config(named, ["student.tuning=full", *others])


def test_overrides_of_a_checked_configuration_name_their_origin():
    config = RunConfig(name="x", student={"prompt": "is ${text_a}: {text_a} {text_b}"})
    changed = with_overrides(config, ["loss.margin=1e-1", "loss.threshold=null", "train.bf16=true"], "row flip")
    assert (changed.loss.margin, changed.loss.threshold, changed.train.bf16) == (0.1, None, True)
    assert changed.student == config.student and config.loss.margin == 0.06
    with pytest.raises(UserError, match=r"^row flip: unknown key loss\.margn: the nearest known key is loss\.margin$"):
        with_overrides(config, ["loss.margn=1"], "row flip")


@pytest.mark.parametrize(
    "text, values",
    [
        ("loss.margin=0,0.02,1e-1,null", [0, 0.02, 0.1, None]),
        ("loss.margin=1", [1]),
        ("student.answers=[a,b],[c,d]", [["a", "b"], ["c", "d"]]),
        ('student.prompt="a, {b}: c",d', ["a, {b}: c", "d"]),
    ],
)
def test_a_list_of_values_is_read_as_each_would_be(text, values):
    assert listed(text) == (text.partition("=")[0], values)


@pytest.mark.parametrize("text", ["loss.margin", "=1", "loss.margin=[1"])
def test_a_list_of_values_that_cannot_be_read(text):
    with pytest.raises(UserError, match=r"write it as dotted\.key=value|not a YAML value"):
        listed(text)
