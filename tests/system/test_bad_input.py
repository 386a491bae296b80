"""Every mistake a user can make: exit code 2, one line that says what, where and what to do, and nothing written."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import transformers
import yaml
from safetensors.torch import load_file, save_file
from tiny import save_student, save_teacher, sentences

from flipkd_dist import cli, pipeline
from flipkd_dist.config import RunConfig

NAME = "bad"
SHARD = "model-00002-of-00002.safetensors"


class RayStarted(BaseException):
    """Stands for everything that happens after the checks; no `except Exception` catches it."""


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    save_student(folder / "student")
    save_teacher(folder / "teacher")
    return folder


@dataclass
class Desk:
    """A configuration and its data that are right, until a test spoils them."""

    path: Path
    models: Path
    values: dict
    records: list[dict]

    def lines(self) -> list[str]:
        return [json.dumps(record) for record in self.records]

    def write(self, name: str, content: str | bytes | list[str]) -> Path:
        path = self.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, list):
            content = "".join(f"{line}\n" for line in content)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    def set(self, key: str, value) -> None:
        *sections, last = key.split(".")
        values = self.values
        for section in sections:
            values = values.setdefault(section, {})
        values[last] = value

    def own_model(self, kind: str) -> Path:
        """A copy of the student or the teacher to be spoilt."""
        folder = shutil.copytree(self.models / kind, self.path / f"my-{kind}")
        self.set(f"{kind}.model_name_or_path", str(folder))
        return folder

    def edit_json(self, path: Path, **changes) -> None:
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    def save(self) -> None:
        """Write what the test has not written already."""
        for name, content in (("bad.yaml", yaml.safe_dump(self.values)), ("train.jsonl", self.lines())):
            if not (self.path / name).exists():
                self.write(name, content)

    def state(self) -> dict[str, tuple]:
        """Every file and folder with its time of change, so that what was written and removed again shows too."""
        return {
            str(path.relative_to(self.path)): (path.stat().st_mtime_ns, path.is_file() and path.read_bytes())
            for path in [self.path, *sorted(self.path.rglob("*"))]
        }


@pytest.fixture
def desk(tmp_path, models, monkeypatch) -> Desk:
    monkeypatch.chdir(tmp_path)
    texts = sentences(24)
    records = [{"text_a": texts[n], "text_b": texts[n + 12], "label": n % 2, "id": f"pair-{n}"} for n in range(12)]
    values = {
        "name": NAME,
        "output_dir": "runs",
        "data": {"train": "train.jsonl", "max_length": 64},
        "teacher": {"model_name_or_path": str(models / "teacher"), "max_length": 32},
        "student": {
            "model_name_or_path": str(models / "student"),
            "prompt": "same ? {text_a} | {text_b} =",
            "answers": ["yes", "no"],
        },
        "train": {"max_steps": 1, "per_device_train_batch_size": 4},
    }
    return Desk(tmp_path, models, values, records)


@pytest.fixture
def flipkd(monkeypatch, capfd):
    """Run the command line in this process: (exit code, what it printed on stdout, on stderr)."""
    transformers.utils.logging.set_verbosity_error()  # as flipkd sets it before transformers is imported
    monkeypatch.setattr(cli.logger, "handlers", [])  # handlers of other tests hold their stderr

    def ray_started(config):
        raise RayStarted

    monkeypatch.setattr(pipeline, "join_or_start_ray", ray_started)

    def call(*arguments) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["flipkd", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        return stopped.value.code, *capfd.readouterr()

    return call


def assert_one_line(result: tuple[int, str, str], where: str, remedy: str) -> None:
    code, out, err = result
    assert code == 2, err
    assert out == ""
    assert err.startswith("flipkd: ") and err.endswith("\n") and err.count("\n") == 1, err
    assert where in err, err
    assert remedy in err[err.index(where) + len(where) :], err
    assert len(err) < 700, err


def refuse(desk: Desk, flipkd, where: str, remedy: str, *arguments) -> None:
    desk.save()
    before = desk.state()
    code, out, err = flipkd(*(arguments or ["run", "bad.yaml"]))
    assert_one_line((code, out, err.replace(f"{desk.path}/", "")), where, remedy)
    assert desk.state() == before


@pytest.mark.parametrize("verb", ["run", "score", "train", "evaluate", "register"])
def test_the_same_files_without_a_mistake_pass_every_check(desk, flipkd, verb):
    desk.save()
    if verb in ("evaluate", "register"):
        desk.write(f"runs/{NAME}/config.yaml", RunConfig.model_validate(desk.values).to_yaml())
        desk.write(f"runs/{NAME}/adapter/flipkd.json", "{}")
    with pytest.raises(RayStarted):
        flipkd(verb, "bad.yaml")


DATA = {
    "label 2": (lambda d: d.records[4].update(label=2), "data.train: train.jsonl:5: label is 2", ": write 0 or 1"),
    "label text": (
        lambda d: d.records[4].update(label="match"),
        "data.train: train.jsonl:5: label is 'match'",
        ": write 0 or 1",
    ),
    "label NaN": (
        lambda d: d.records[4].update(label=float("nan")),
        "data.train: train.jsonl:5: label is nan",
        ": write 0 or 1",
    ),
    "no label": (
        lambda d: d.records[0].pop("label"),
        "data.train: train.jsonl:1: no column label",
        ": correct the file or data.label",
    ),
    "no text": (
        lambda d: d.records[2].pop("text_b"),
        "data.train: train.jsonl:3: no column text_b",
        ": correct the file or data.text_b",
    ),
    "empty text": (
        lambda d: d.records[11].update(text_a=" \t"),
        "data.train: train.jsonl:12: text_a is empty",
        ": fill it in",
    ),
    "same id": (
        lambda d: d.records[7].update(id="pair-1"),
        "data.train: train.jsonl:8: id 'pair-1' stands at train.jsonl:2",
        ": make ids",
    ),
    "no pairs": (lambda d: d.records.clear(), "data.train: train.jsonl: no pairs in it", ": add some"),
    "broken JSON": (
        lambda d: d.write("train.jsonl", [*d.lines()[:6], '{"text_a": "card', *d.lines()[6:]]),
        "data.train: train.jsonl:7: broken JSON",
        ": write one JSON object a line",
    ),
    "invalid UTF-8": (
        lambda d: d.write("train.jsonl", "\n".join(d.lines()).encode().replace(b"\n", b"\n\xff", 3)),
        "data.train: train.jsonl:2: not UTF-8",
        ": save the file as UTF-8",
    ),
    "missing file": (
        lambda d: d.set("data.train", "trian.jsonl"),
        "data.train: trian.jsonl: no such file",
        ": check the path",
    ),
    "missing second file": (
        lambda d: d.set("data.train", ["train.jsonl", "more.jsonl"]),
        "data.train: more.jsonl: no such file",
        ": check the path",
    ),
    "missing test file": (lambda d: d.set("data.test", "t.csv"), "data.test: t.csv: no such file", ": check the path"),
    "no file named": (lambda d: d.set("data.train", None), "data.train: no pairs are given", ": set it to a file"),
    "extension": (
        lambda d: d.set("data.train", d.write("train.xlsx", "").name),
        "data.train: train.xlsx: unknown extension '.xlsx'",
        ": use .jsonl",
    ),
    "ragged CSV": (
        lambda d: d.set("data.train", d.write("t.csv", ["text_a,text_b,label", "card,pin,0", "my, card,pin,1"]).name),
        "data.train: t.csv:3: fields found: 4",
        ": quote texts",
    ),
}


@pytest.mark.parametrize("mistake", DATA)
def test_data(desk, flipkd, mistake):
    spoil, where, remedy = DATA[mistake]
    spoil(desk)
    refuse(desk, flipkd, where, remedy)


# As the words after `flipkd run`.
SETTINGS = {
    "unknown key": (
        "train.learning_rte=1",
        "bad.yaml: unknown key train.learning_rte",
        ": the nearest known key is train.learning_rate",
    ),
    "unknown section": ("trian.max_steps=1", "bad.yaml: unknown key trian", ": the nearest known key is train"),
    "wrong type": ("train.max_steps=many", "bad.yaml: train.max_steps = 'many': must be", "; correct this value"),
    "negative": (
        "train.learning_rate=-1e-4",
        "bad.yaml: train.learning_rate = -0.0001: must be greater than 0",
        "; correct",
    ),
    "unquoted answers": ("student.answers=[Yes, No]", "bad.yaml: student.answers = [True, False]", ': ["Yes", "No"]'),
    "reentrant checkpointing": (
        "train.gradient_checkpointing_kwargs={use_reentrant: true}",
        "bad.yaml: unknown key train.gradient_checkpointing_kwargs",
        ": the nearest known key is train.gradient_checkpointing",
    ),
    "no equals sign": ("train.max_steps", "override 'train.max_steps'", ": write it as dotted.key=value"),
    "no YAML": (
        "student.prompt={text_a} | {text_b}",
        "override 'student.prompt={text_a} | {text_b}'",
        ": quote a text",
    ),
    "answers": (
        "student.answers=[certainly not, never]",
        "student.answers: must be two different single tokens",
        ": choose others",
    ),
    "one answer": ("student.answers=[same]", "bad.yaml: student.answers = ['same']", "must be two texts"),
    "prompt without b": ("student.prompt='same ? {text_a} ='", "student.prompt: 'same ? {text_a} ='", ": correct it"),
    "prompt swapped": (
        "student.prompt='{text_b} | {text_a}'",
        "student.prompt: {text_b} stands before",
        ": put {text_a} first",
    ),
    "prompt's name": ("student.prompt=finence", "student.prompt: 'finence' must hold", "take one of faq, finance"),
    "max_length": ("data.max_length=5", "data.max_length: 5 tokens leave no room", ": raise it"),
    "attention": (
        "student.attn_implementation=flash_attention_2",
        "student.attn_implementation: flash_attention_2",
        ": take one of auto",
    ),
    "LoRA modules": (
        "student.lora_target_modules=[query]",
        "student.lora_target_modules: ['query'] do not fit",
        ": name linear",
    ),
    "encoder module": (
        "student.encoder_module=query",
        "student.encoder_module: no layer has LoRA on 'query'",
        ": name one of",
    ),
    "no teacher": ("teacher.model_name_or_path=null", "teacher.model_name_or_path is missing", ": name a model folder"),
    "missing model": (
        "student.model_name_or_path=/no/model",
        "student.model_name_or_path = /no/model: neither",
        ": correct it",
    ),
    "missing DeepSpeed": (
        "distributed.deepspeed=zero.json",
        "distributed.deepspeed: zero.json cannot be read",
        ": check it",
    ),
    "several workers": (
        "distributed={num_workers: 2, deepspeed: null}",
        "distributed.deepspeed is null, which trains on one worker",
        ": name a file or set num_workers to 1",
    ),
    "more to test than is kept": (
        "train={test_checkpoints: 3, keep_checkpoints: 2}",
        "train.test_checkpoints: 3 are to be tested, train.keep_checkpoints keeps 2",
        ": keep as many",
    ),
    "nothing to learn": (
        "loss={sup_weight: 0, dist_weight: 0, mcl_weight: 0}",
        "bad.yaml: loss: sup_weight",
        ": nothing would",
    ),
}


@pytest.mark.parametrize("mistake", SETTINGS)
def test_settings(desk, flipkd, mistake):
    override, where, remedy = SETTINGS[mistake]
    refuse(desk, flipkd, where, remedy, "run", "bad.yaml", override)


CONFIG_FILES = {
    "broken YAML": ("name: bad\ndata: {train: [a.jsonl\n", "bad.yaml:3: not readable as YAML", ": correct the file"),
    "twice": (
        "name: bad\nseed: 1\nseed: 2\n",
        "bad.yaml:3: not readable as YAML (found duplicate key",
        ": correct the file",
    ),
    "list": ("- name: bad\n", "bad.yaml: not a mapping of settings", ": write `key: value` lines"),
    "not UTF-8": (b"name: b\xff\n", "bad.yaml: not readable as YAML", ": correct the file"),
    "no name": ("seed: 1\n", "bad.yaml: name is missing", ": add it"),
    "interpolation": ("name: ${nothing}\n", "bad.yaml: Interpolation key 'nothing' not found", ": correct the ${...}"),
    "bare Yes": (
        "name: bad\nstudent: {answers: [Yes, No]}\n",
        "bad.yaml: student.answers = [True, False]",
        ': ["Yes", "No"]',
    ),
}


@pytest.mark.parametrize("mistake", CONFIG_FILES)
def test_configuration_file(desk, flipkd, mistake):
    content, where, remedy = CONFIG_FILES[mistake]
    desk.write("bad.yaml", content)
    refuse(desk, flipkd, where, remedy)


def test_no_configuration_file(desk, flipkd):
    refuse(desk, flipkd, "god.yaml: no such configuration file", ": check the path", "run", "god.yaml")
    refuse(desk, flipkd, f"{desk.models}: not readable", ": correct the file", "run", desk.models)


DEEPSPEED = {
    "no JSON": ('{\n  "zero_optimization": {\n    stage: 3\n', "my.json, line 3: not JSON", ": correct it"),
    "no stage": ("{}", "my.json sets no zero_optimization.stage", ": add one of 1, 2, 3"),
    "stage 0": ('{"zero_optimization": {"stage": 0}}', "my.json: zero_optimization.stage is 0", ": take 1, 2 or 3"),
} | {
    key: (
        json.dumps({"zero_optimization": {"stage": 3}, key: value}),
        f"my.json sets {key}, which {owner} decides",
        ": remove it there",
    )
    for key, value, owner in (
        ("optimizer", {"type": "AdamW"}, "train.learning_rate and train.weight_decay"),
        ("gradient_clipping", 1.0, "train.max_grad_norm"),
        ("train_batch_size", "auto", "train.per_device_train_batch_size"),
        ("bf16", {"enabled": True}, "train.bf16"),
    )
}


@pytest.mark.parametrize("mistake", DEEPSPEED)
def test_deepspeed_file(desk, flipkd, mistake):
    content, where, remedy = DEEPSPEED[mistake]
    desk.write("my.json", content)
    refuse(desk, flipkd, where, remedy, "run", "bad.yaml", "distributed.deepspeed=my.json")


def no_config(desk: Desk) -> None:
    (desk.own_model("student") / "config.json").unlink()


def garbage_config(desk: Desk) -> None:
    (desk.own_model("student") / "config.json").write_text('{"model_type": "glm", ')


def pickled(desk: Desk) -> None:
    weights = desk.own_model("student") / "model.safetensors"
    weights.rename(weights.with_name("pytorch_model.bin"))


def teacher_without_padding(desk: Desk) -> None:
    folder = desk.own_model("teacher")
    desk.edit_json(folder / "tokenizer_config.json", pad_token=None)


def unknown_activation(desk: Desk) -> None:
    desk.edit_json(desk.own_model("student") / "config.json", hidden_act="magic")


def cut_short(kind: str):
    def spoil(desk: Desk) -> None:
        weights = desk.own_model(kind) / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-100])

    return spoil


def missing_shard(desk: Desk) -> None:
    folder = desk.own_model("student")
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": SHARD}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def own_code(desk: Desk) -> None:
    folder = desk.own_model("student")
    classes = {"AutoConfig": "configuration_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnModel"}
    desk.edit_json(folder / "config.json", model_type="own", auto_map=classes)
    (folder / "configuration_own.py").write_text("raise SystemExit('it was run')\n")


def cast_bytes(desk: Desk) -> None:
    desk.set("train.bf16", True)
    desk.set("student.load_in_4bit", True)
    desk.set("student.bnb_4bit_quant_storage", "float32")


def other_names(desk: Desk) -> None:
    desk.set("student.load_in_4bit", True)
    path = desk.own_model("student") / "model.safetensors"
    weights = load_file(path)
    save_file({name.replace("down_proj", "w2"): value for name, value in weights.items()}, path)


def quantised(desk: Desk) -> None:
    method = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    desk.edit_json(desk.own_model("student") / "config.json", quantization_config=method)


STUDENT = "student.model_name_or_path"
MODELS = {
    "no config.json": (
        no_config,
        f"{STUDENT} = my-student: this folder has no config.json",
        ": name the folder of a transformers model",
    ),
    "config.json garbage": (
        garbage_config,
        f"{STUDENT}: my-student/config.json is missing or damaged",
        ": get the model again",
    ),
    "config.json of no use": (
        unknown_activation,
        f"{STUDENT}: my-student: config.json cannot be used",
        ": take another",
    ),
    "pickled weights": (
        pickled,
        f"{STUDENT} = my-student: my-student has no *.safetensors",
        ": convert them with save_pretrained",
    ),
    "student cut short": (
        cut_short("student"),
        "my-student/model.safetensors is missing or damaged",
        ": get the model again",
    ),
    "teacher cut short": (
        cut_short("teacher"),
        "my-teacher/model.safetensors is missing or damaged",
        ": get the model again",
    ),
    "teacher's positions": (
        lambda d: d.set("teacher.max_length", 65),
        "teacher.max_length = 65: ",
        "has 64 positions: set it to 64 or less",
    ),
    "teacher's tokenizer": (
        teacher_without_padding,
        "my-teacher: its tokenizer has no padding token",
        ": set pad_token",
    ),
    "missing shard": (missing_shard, f"my-student/{SHARD} is missing or damaged", ": get the model again"),
    "encoder": (lambda d: d.set(STUDENT, str(d.models / "teacher")), "(bert) is not a causal LM", ": take"),
    "own code": (own_code, "my-student brings its own code", ", which is never run: take its edition"),
    "4-bit storage": (
        cast_bytes,
        "student.bnb_4bit_quant_storage: float32 in a bfloat16 run: engines cast",
        ": take auto, uint8 or bfloat16",
    ),
    "4-bit names": (
        other_names,
        "my-student lacks 2 weights under the names of ",
        "or set student.load_in_4bit to false",
    ),
    "quantised": (quantised, "my-student is quantised already", ": take the original weights"),
}


@pytest.mark.parametrize("mistake", MODELS)
def test_models(desk, flipkd, mistake):
    spoil, where, remedy = MODELS[mistake]
    spoil(desk)
    refuse(desk, flipkd, where, remedy)


def test_output_folder_that_is_a_file(desk, flipkd):
    desk.write("runs", "")
    refuse(desk, flipkd, "output_dir: runs is a file", ": choose another output_dir")


def test_output_folder_without_the_right_to_write(desk, flipkd, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != desk.path)
    refuse(
        desk, flipkd, f"output_dir: {desk.path} cannot be written", ": choose another output_dir or change its rights"
    )


def test_folder_of_something_else(desk, flipkd):
    desk.write(f"runs/{NAME}/thesis.tex", "")
    refuse(desk, flipkd, f"output_dir: runs/{NAME} exists and is not a run folder", ": choose another name")


@pytest.mark.parametrize("verb", ["run", "train", "evaluate", "register"])
def test_folder_of_another_run(desk, flipkd, verb):
    other = RunConfig.model_validate(desk.values)
    other.train.learning_rate = 0.5
    desk.write(f"runs/{NAME}/config.yaml", other.to_yaml())
    desk.write(f"runs/{NAME}/adapter/flipkd.json", "{}")
    where = f"name: runs/{NAME} holds a run with train.learning_rate = 0.5, now 3e-05"
    refuse(desk, flipkd, where, ": choose another name", verb, "bad.yaml")


@pytest.mark.parametrize("verb", ["evaluate", "register"])
def test_before_train(desk, flipkd, verb):
    refuse(desk, flipkd, f"runs/{NAME}: no adapter yet", ": run `flipkd train`", verb, "bad.yaml")


PREDICT = {
    "no such model": (
        ("nowhere", "train.jsonl", "out.jsonl"),
        "nowhere: neither a run folder nor an adapter",
        ": name one",
    ),
    "no model": (
        ("models", "train.jsonl", "out.jsonl"),
        "models: neither a run folder nor an adapter folder",
        ": name one",
    ),
    "broken card": (("adapter", "train.jsonl", "out.jsonl"), "adapter: no readable flipkd.json", ": name a run folder"),
    "no column": (
        ("adapter", "half.jsonl", "out.jsonl"),
        "half.jsonl:1: no column text_b",
        ": correct the file or --text-b",
    ),
    "onto itself": (
        ("adapter", "train.jsonl", "train.jsonl"),
        "--output train.jsonl: this is the input",
        ": name another",
    ),
    "no pairs": (("adapter", "empty.jsonl", "out.jsonl"), "--input empty.jsonl: no pairs in it", ": name a file"),
    "no input": (("adapter", "nothing.csv", "out.jsonl"), "nothing.csv: no such file", ": check the path"),
    "no folder": (
        ("adapter", "train.jsonl", "no/out.jsonl"),
        "no/out.jsonl: there is no folder no",
        ": create it first",
    ),
    "extension": (("adapter", "train.jsonl", "out.xlsx"), "out.xlsx: unknown extension '.xlsx'", ": use .jsonl"),
    "which MLflow": (
        ("models:/bad@champion", "train.jsonl", "out.csv"),
        "--tracking-uri: which MLflow?",
        ": give --tracking-uri",
    ),
}


@pytest.mark.parametrize("mistake", PREDICT)
def test_predict(desk, flipkd, monkeypatch, mistake):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    (model, source, output), where, remedy = PREDICT[mistake]
    (desk.path / "models").mkdir()
    desk.write("adapter/flipkd.json", "{}")
    desk.write("empty.jsonl", "")
    desk.write("half.jsonl", ['{"text_a": "card"}'])
    refuse(desk, flipkd, where, remedy, "predict", model, "--input", source, "--output", output)


PAIRS = {
    "no text column": (("--text", "query"), "faq.csv:2: no column query", ": correct the file or --text"),
    "no group column": (("--group", "intent"), "faq.csv:2: no column intent", ": correct the file or --group"),
    "split": (("--split", "train=0.8,test"), "--split train=0.8,test", ": write it as"),
    "shares": (("--split", "train=0.8,test=0.1"), "the shares must", ": correct them"),
    "no teacher": (("--teacher", "/no/model"), "--teacher = /no/model: neither", ": correct it"),
    "a number": (("--positives", "0"), "Invalid value for '--positives'", ": see flipkd pairs --help"),
}


@pytest.mark.parametrize("mistake", PAIRS)
def test_pairs(desk, flipkd, monkeypatch, mistake):
    more, where, remedy = PAIRS[mistake]
    desk.write("faq.csv", ["text,group", *(f"{text},{n // 4}" for n, text in enumerate(sentences(16)))])
    arguments = ["pairs", "--input", "faq.csv", "--output", "pairs.jsonl"]
    refuse(desk, flipkd, where, remedy, *arguments, *more)
    monkeypatch.setattr(sys, "argv", ["flipkd", *arguments])
    cli.main()  # without the mistake it works
    assert (desk.path / "pairs.jsonl").is_file()


COMMANDS = {
    "no verb": ((), "Missing command", ": see flipkd --help"),
    "unknown verb": (("trian", "bad.yaml"), "No such command 'trian'", ": see flipkd --help"),
    "no configuration": (("run",), "Missing argument 'CONFIG'", ": see flipkd run --help"),
    "no model": (
        ("predict", "--input", "a.csv", "--output", "b.csv"),
        "Missing argument 'MODEL'",
        ": see flipkd predict --help",
    ),
    "no input": (("pairs", "--output", "b.csv"), "Missing option '--input'", ": see flipkd pairs --help"),
    "unknown option": (("run", "bad.yaml", "--fast"), "No such option '--fast'", ": see flipkd run --help"),
}


@pytest.mark.parametrize("mistake", COMMANDS)
def test_command_line(desk, flipkd, mistake):
    arguments, where, remedy = COMMANDS[mistake]
    desk.save()
    before = desk.state()
    assert_one_line(flipkd(*arguments), where, remedy)
    assert desk.state() == before


def process(desk: Desk, *arguments) -> tuple[int, str, str]:
    desk.save()
    ours = ("RAY_ADDRESS", "DS_ACCELERATOR", "HF_HUB_DISABLE_PROGRESS_BARS", "TOKENIZERS_PARALLELISM")
    environment = {key: value for key, value in os.environ.items() if key not in ours}
    command = [sys.executable, "-m", "flipkd_dist", *arguments]
    done = subprocess.run(command, cwd=desk.path, env=environment, capture_output=True, text=True, timeout=300)
    return done.returncode, done.stdout, done.stderr


def test_as_a_process_of_its_own_other_libraries_are_silent_too(desk):
    garbage_config(desk)
    desk.save()
    before = desk.state()
    result = process(desk, "run", "bad.yaml")
    assert_one_line(result, "my-student/config.json is missing or damaged", ": get the model again")
    assert desk.state() == before


@pytest.mark.system
def test_more_workers_than_the_cluster_has(desk):
    desk.save()
    before = desk.state()
    result = process(desk, "train", "bad.yaml", "distributed.num_workers=64")
    assert_one_line(result, "distributed.num_workers: 64 workers need 64 CPU", ": lower num_workers")
    assert desk.state() == before
