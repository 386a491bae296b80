"""Everything that can be the user's mistake, found before anything is written or started."""

import warnings
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, PreTrainedConfig

from flipkd_dist.base import (
    attention_implementation,
    attention_targets,
    check_base,
    check_mode,
    check_parts,
    check_positions,
    drop_output_matrix,
    fills_blank,
    load_tokenizer,
    shares_prefix,
)
from flipkd_dist.base_loader import check_packable, find_parts, four_bit_form
from flipkd_dist.both_ways import check_both_ways
from flipkd_dist.config import RunConfig, StudentConfig
from flipkd_dist.cross_encoder import CrossEncoderSource
from flipkd_dist.ds_config import read_policy
from flipkd_dist.errors import UserError
from flipkd_dist.model_files import check_files, fingerprint, one_line, resolve_model
from flipkd_dist.pair_teacher import PairSource, check_settings, pair_source
from flipkd_dist.pairs import PairTable, read_pairs
from flipkd_dist.prompt import PairEncoder, TextEncoder, student_encoder
from flipkd_dist.run_folder import RunFolder, decisive_settings, digest
from flipkd_dist.store import Store, pair_text
from flipkd_dist.student import default_encoder, last_encoder
from flipkd_dist.teacher_source import TeacherSource, text_teacher
from flipkd_dist.weight_files import WeightFiles

SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Inputs:
    """A run's checked inputs; cheap to make again in every worker."""

    config: RunConfig
    folder: RunFolder
    splits: dict[str, PairTable]
    teacher: TeacherSource | None  # of single texts; None where the teacher knows pairs alone
    store: Store | None
    pair_source: PairSource | None  # a cross-encoder or scored files
    pair_store: Store | None  # of pair scores
    base_folder: Path
    base_fingerprint: str
    tokenizer: object
    encoder: PairEncoder | TextEncoder
    share_prefix: bool

    @property
    def texts(self) -> list[str]:
        return list(dict.fromkeys(text for pairs in self.splits.values() for text in pairs.texts))

    @property
    def lora_rank(self) -> int | None:
        """Of the student: what is configured, else the teacher's hidden size; a bi-encoder's goes first."""
        if self.config.student.tuning == "full":
            return None
        if self.config.student.lora_r is not None:
            return self.config.student.lora_r
        return self.teacher.largest_hidden_size if self.teacher is not None else self.pair_source.hidden_size

    @property
    def _store_keys(self) -> list[str]:
        return [store.spec.key for store in (self.store, self.pair_store) if store is not None]

    @property
    def calibration_key(self) -> str:
        """A hash of all that the fitted curves of teacher.calibrate depend on."""
        return digest(*self._store_keys, self.config.teacher.scale, pairs_content(self.splits["train"]))

    def digest(self, *splits: str) -> str:
        """A hash of what the adapter depends on, and of the named splits."""
        return digest(
            decisive_settings(self.config),
            *self._store_keys,
            self.base_fingerprint,
            [pairs_content(self.splits[split]) for split in splits if split in self.splits],
        )


def pairs_content(pairs: PairTable) -> list:
    """What a hash of pairs is made of."""
    numbers = (pairs.text_a, pairs.text_b, pairs.label, pairs.group_a, pairs.group_b)
    return [pairs.texts, pairs.kind, *(array.tolist() for array in numbers)]


def _model_folder(name: str | None, key: str) -> Path:
    folder = resolve_model(name, key)
    check_files(folder, key)
    return folder


def _check_layers(base_config: PreTrainedConfig, settings: StudentConfig, folder: Path) -> None:
    """Refuse a base whose layers do not serve; found on a copy of it without any weights."""
    name, attention = settings.model_name_or_path, attention_implementation(settings)
    with torch.device("meta"), warnings.catch_warnings(action="ignore"):
        try:
            model = AutoModelForCausalLM.from_config(deepcopy(base_config), attn_implementation=attention)
        except Exception as error:  # transformers raises nearly anything here
            raise UserError(
                f"student.model_name_or_path: {name}: config.json cannot be used ({one_line(error)}): take another"
            ) from None
        check_parts(model, name)
        if settings.load_in_4bit:  # the base is read by its names then, without the renaming that transformers knows
            drop_output_matrix(model)
            check_packable(model, name)
            find_parts(model, WeightFiles(folder, name), torch.float32, "meta", name)
        if settings.tuning == "full":
            return
        targets = settings.lora_target_modules or attention_targets(model)
        try:
            model = get_peft_model(model, LoraConfig(r=1, target_modules=targets, task_type="CAUSAL_LM"))
        except ValueError as error:
            raise UserError(
                f"student.lora_target_modules: {targets} do not fit ({one_line(error)}): name linear layers"
            ) from None
    last_encoder(model, settings.encoder_module or default_encoder(targets))


def check_precision(config: RunConfig, bf16: bool) -> None:
    """Refuse full tuning of bf16 weights of which nobody keeps an fp32 copy.

    Raises:
        UserError
    """
    if config.student.tuning == "full" and bf16 and config.distributed.deepspeed is None:
        raise UserError(
            "student.tuning: full in bf16 needs the fp32 master weights that DeepSpeed keeps: name a file in "
            "distributed.deepspeed, or set train.bf16 to false"
        )


def check_inputs(config: RunConfig, splits: tuple[str, ...] = SPLITS, load: bool = True) -> Inputs:
    """Read and check what the configuration names; starts and writes nothing.

    Args:
        load: load the teachers that are still to score, to see that they are whole.
    Raises:
        UserError: one line for the first mistake.
    """
    if config.distributed.deepspeed is None:
        if config.distributed.max_workers > 1:
            raise UserError(
                "distributed.deepspeed is null, which trains on one worker: name a file or set num_workers to 1"
            )
    else:
        read_policy(config.distributed.deepspeed)
    if config.train.bf16 == "auto":
        if config.student.bnb_4bit_quant_storage not in ("auto", "uint8"):
            raise UserError(
                f"student.bnb_4bit_quant_storage: {config.student.bnb_4bit_quant_storage} is safe in a run of that "
                "dtype alone: set train.bf16 to true or false"
            )
    else:
        check_precision(config, config.train.bf16)
        four_bit_form(config.student, torch.bfloat16 if config.train.bf16 else torch.float32)
    if config.train.test_checkpoints > config.train.keep_checkpoints:
        raise UserError(
            f"train.test_checkpoints: {config.train.test_checkpoints} are to be tested, train.keep_checkpoints keeps "
            f"{config.train.keep_checkpoints}: keep as many"
        )
    folder = RunFolder(config)
    folder.check()
    tables = {}
    for split in splits:
        paths = getattr(config.data, split)
        if split == "train" or paths is not None:
            tables[split] = read_pairs(paths, config.data, f"data.{split}")
    check_settings(config)
    pairs_from = pair_source(config, tables)
    teacher = None if pairs_from is not None and config.teacher.model_name_or_path is None else text_teacher(config)
    base_folder = _model_folder(config.student.model_name_or_path, "student.model_name_or_path")
    base_config = check_base(base_folder, config.student)
    _check_layers(base_config, config.student, base_folder)
    check_positions(base_config, config.data.max_length)
    check_mode(base_config, config.student, config.data.max_length)
    check_both_ways(base_config, config.student)
    tokenizer = load_tokenizer(base_folder)
    student, blank = config.student, fills_blank(base_config)
    encoder = student_encoder(tokenizer, student.mode, student.prompt, student.answers, config.data.max_length, blank)
    inputs = Inputs(
        config=config,
        folder=folder,
        splits=tables,
        teacher=teacher,
        store=None if teacher is None else Store(folder.teacher, teacher.spec),
        pair_source=pairs_from,
        pair_store=None if pairs_from is None else Store(folder.teacher / "pairs", pairs_from.spec),
        base_folder=base_folder,
        base_fingerprint=fingerprint(base_folder),
        tokenizer=tokenizer,
        encoder=encoder,
        share_prefix=shares_prefix(base_config, config.data.max_length),
    )
    if tables and load:
        _check_loading(inputs)
    return inputs


def _check_loading(inputs: Inputs) -> None:
    """Load the models that are still to be used: completely, or they say why not."""
    if inputs.teacher is not None and not inputs.store.is_complete(inputs.texts):
        inputs.teacher.load()
    if isinstance(inputs.pair_source, CrossEncoderSource):
        labelled = (pair_text(*texts) for pairs in inputs.splits.values() for texts in pairs.labelled_texts())
        if not inputs.pair_store.is_complete(labelled):
            inputs.pair_source.load()
