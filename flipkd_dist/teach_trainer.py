"""Fine-tunes an encoder with the Sentence-Transformers trainer. The library is imported inside functions.

What a step trains on is a pure function of (seed, step), so that a resumed training goes on as if never stopped.
"""

import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import BatchSampler
from tqdm import tqdm
from transformers import set_seed
from transformers.trainer_callback import TrainerCallback
from transformers.utils import logging as transformers_logging

from flipkd_dist.config import RunConfig, TeachConfig, TeacherConfig
from flipkd_dist.errors import StoppedOnRequest, UserError
from flipkd_dist.model_files import one_line
from flipkd_dist.order import Order
from flipkd_dist.pairs import PairTable
from flipkd_dist.run_folder import read_json, write_json
from flipkd_dist.stop import StopRequest
from flipkd_dist.store import normalised
from flipkd_dist.world import World

logger = logging.getLogger("flipkd_dist")
MARK = "flipkd.json"  # in a checkpoint: all of it is written
WINDOW = 16  # batches
KEPT_CHECKPOINTS = 2  # the older one goes before the newer one is marked


@dataclass(frozen=True)
class Budget:
    """How long a teaching is, in optimizer steps."""

    num_steps: int
    steps_per_epoch: int
    save_steps: int

    @classmethod
    def of(cls, teach: TeachConfig, num_pairs: int) -> "Budget":
        per_epoch = ceil(num_pairs / teach.per_device_train_batch_size)
        steps = teach.max_steps if teach.max_steps > 0 else per_epoch * teach.num_train_epochs
        return cls(steps, per_epoch, teach.save_steps or per_epoch)


class _Batches(BatchSampler):
    """The pairs of every step of all epochs: to the trainer it is one long epoch.

    Random batches of short texts are mostly padding. So an epoch's order is cut into windows of 16 batches, pairs of
    similar length inside a window share a batch, and the batches of a window come in random order.
    """

    def __init__(self, lengths: np.ndarray, batch_size: int, seed: int, num_steps: int):
        """`lengths`: of the longer text of each pair, in any unit [N]."""
        super().__init__(range(len(lengths)), batch_size, drop_last=False)
        self.windows = Order(len(lengths), WINDOW * batch_size, 1, seed)
        self.lengths, self.num_steps = lengths, num_steps

    def __iter__(self) -> Iterator[list[int]]:
        step = window = 0
        while step < self.num_steps:
            rows = self.windows.contrast_batches(window)[0]
            rows = rows[np.argsort(self.lengths[rows], kind="stable")]
            batches = [rows[first : first + self.batch_size] for first in range(0, len(rows), self.batch_size)]
            mixed = np.random.Generator(np.random.PCG64([self.windows.seed, window, 1])).permutation(len(batches))
            for number in mixed[: self.num_steps - step]:
                yield batches[number].tolist()
            step, window = step + len(batches), window + 1

    def __len__(self) -> int:
        return self.num_steps


class _Course(TrainerCallback):
    """Progress, checkpoints with a mark, and the polite end."""

    def __init__(self, budget: Budget, inputs: str, stop: StopRequest):
        self.budget, self.inputs, self.stop, self.stopped = budget, inputs, stop, False
        self.bar: tqdm | None = None

    def on_train_begin(self, args, state, control, **_) -> None:
        self.bar = tqdm(total=self.budget.num_steps, initial=state.global_step, desc="teach", unit=" steps")

    def on_step_end(self, args, state, control, **_) -> None:
        self.bar.update()
        last = state.global_step >= self.budget.num_steps
        self.stopped = not last and self.stop.made(World())
        control.should_save = last or self.stopped or state.global_step % self.budget.save_steps == 0
        control.should_training_stop = last or self.stopped

    def on_save(self, args, state, control, **_) -> None:
        write_json(
            Path(args.output_dir) / f"checkpoint-{state.global_step}" / MARK,
            {"inputs": self.inputs, "step": state.global_step},
        )

    def on_train_end(self, args, state, control, **_) -> None:
        self.bar.close()


@contextmanager
def _quiet() -> Iterator[None]:
    """Without loading bars, tables of unused weights and advice of the libraries."""
    library = logging.getLogger("sentence_transformers")
    verbosity, level = transformers_logging.get_verbosity(), library.level
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    library.setLevel(logging.ERROR)
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        library.setLevel(level)
        if bars:
            transformers_logging.enable_progress_bar()


def load_model(base: Path, settings: TeacherConfig, device: str) -> Any:
    """A SentenceTransformer of `base`, reading texts as `settings` say; new modules are Pooling and Normalize.

    Raises:
        UserError: the library cannot load it.
    """
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.models import Normalize, Pooling

    modules = read_json(base / "modules.json")
    if any(not module["type"].startswith("sentence_transformers.") for module in modules or ()):
        raise UserError(f"teacher {base}: modules.json names modules of its own code, which is never run: take another")
    options = dict(trust_remote_code=False, local_files_only=True, device=device)
    try:
        model = SentenceTransformer(
            str(base), model_kwargs={"dtype": torch.float32, "use_safetensors": True}, **options
        )
    except Exception as error:  # nearly anything can come out of the libraries here
        raise UserError(f"teacher {base}: cannot be loaded ({one_line(error)}): name another model") from None
    for name, module in list(model.named_children()):
        if isinstance(module, Pooling) and (modules is None or settings.pooling != "auto"):
            mode = "mean" if settings.pooling == "auto" else settings.pooling
            model[int(name)] = Pooling(
                model[0].auto_model.config.hidden_size, pooling_mode=mode, include_prompt=module.include_prompt
            )
    if modules is None:
        model.append(Normalize())
    model.max_seq_length = settings.max_length
    if settings.prompt is not None:
        model.prompts = {**model.prompts, "flipkd": settings.prompt}
        model.default_prompt_name = "flipkd"
    return model


def _loss(model: Any, kind: str) -> torch.nn.Module:
    from sentence_transformers import losses

    return {"contrastive": losses.OnlineContrastiveLoss, "cosine": losses.CosineSimilarityLoss}[kind](model)


def _batches(pairs: PairTable, config: RunConfig, budget: Budget) -> _Batches:
    length = np.array([len(normalised(text)) for text in pairs.texts])
    longer = np.maximum(length[pairs.text_a], length[pairs.text_b])
    return _Batches(longer, config.teach.per_device_train_batch_size, config.seed, budget.num_steps)


def num_tokens(model: Any, pairs: PairTable, config: RunConfig) -> int:
    """What all steps of a teaching read, without padding."""
    tokenizer, budget = model.tokenizer, Budget.of(config.teach, len(pairs))
    texts = [normalised(text) for text in pairs.texts]
    tokens = tokenizer(texts, truncation=True, max_length=model.max_seq_length)["input_ids"]
    length = np.array([len(ids) for ids in tokens])
    of_pair = length[pairs.text_a] + length[pairs.text_b]
    return int(sum(of_pair[batch].sum() for batch in _batches(pairs, config, budget)))


def _trainer(
    model: Any, pairs: PairTable, targets: np.ndarray, config: RunConfig, budget: Budget, folder: Path, use_gpu: bool
) -> Any:
    from datasets import Dataset
    from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments

    teach, bf16 = config.teach, config.train.bf16
    texts = [normalised(text) for text in pairs.texts]

    class Trainer(SentenceTransformerTrainer):
        def get_batch_sampler(self, dataset, *_, **__):
            return _batches(pairs, config, budget)

        def add_model_card_callback(self, default_args_dict):
            pass  # the manifest says what the folder is

        def _save(self, output_dir=None, state_dict=None):
            self.model.save_pretrained(output_dir or self.args.output_dir, create_model_card=False)

    arguments = SentenceTransformerTrainingArguments(
        output_dir=str(folder),
        num_train_epochs=1,  # `_Batches` counts the epochs
        per_device_train_batch_size=teach.per_device_train_batch_size,
        learning_rate=teach.learning_rate,
        warmup_steps=ceil(teach.warmup_ratio * budget.num_steps),
        weight_decay=teach.weight_decay,
        seed=config.seed,
        bf16=use_gpu and (torch.cuda.is_bf16_supported() if bf16 == "auto" else bf16),
        use_cpu=not use_gpu,
        prompts=model.prompts.get(model.default_prompt_name) or None,
        save_strategy="no",  # `_Course` says when
        save_total_limit=KEPT_CHECKPOINTS,
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    arguments._n_gpu = min(arguments.n_gpu, 1)  # several would silently multiply the batch
    number = float if teach.loss == "cosine" else int
    columns = {
        "text_a": [texts[row] for row in pairs.text_a],
        "text_b": [texts[row] for row in pairs.text_b],
        "label": [number(target) for target in targets],
    }
    return Trainer(model, arguments, train_dataset=Dataset.from_dict(columns), loss=_loss(model, teach.loss))


def newest_checkpoint(folder: Path, inputs: str) -> Path | None:
    """The last complete checkpoint of these inputs; what else lies there is removed."""
    steps = {}
    for path in folder.glob("*"):
        mark = read_json(path / MARK) or {}
        if mark.get("inputs") == inputs:
            steps[mark["step"]] = path
        else:
            shutil.rmtree(path, ignore_errors=True)
    return steps[max(steps)] if steps else None


def fine_tune(
    config: RunConfig,
    base: Path,
    pairs: PairTable,
    checkpoints: Path,
    inputs: str,
    stop: StopRequest,
    use_gpu: bool,
    targets: np.ndarray | None = None,
) -> Any:
    """The SentenceTransformer that results; goes on from the newest checkpoint of the same inputs.

    Args:
        inputs: a hash of everything the result depends on; checkpoints carry it.
        stop: asked after every step.
        targets: the cosine that each pair is to have [N], in place of its label; for `teach.loss` cosine.
    Raises:
        StoppedOnRequest: a complete checkpoint has been written.
    """
    from transformers import PrinterCallback

    assert targets is None or config.teach.loss == "cosine", "the other losses know two classes"
    targets = pairs.label if targets is None else targets
    if not use_gpu:  # deepspeed is loaded by the trainer and looks for accelerators
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    budget = Budget.of(config.teach, len(pairs))
    checkpoints.mkdir(parents=True, exist_ok=True)
    start = newest_checkpoint(checkpoints, inputs)
    with _quiet():
        set_seed(config.seed)  # weights that the base lacks are drawn
        model = load_model(base, config.teacher, "cuda" if use_gpu else "cpu")
        trainer = _trainer(model, pairs, targets, config, budget, checkpoints, use_gpu)
        course = _Course(budget, inputs, stop)
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(course)
        if start:
            logger.info("teach: going on from %s", start)
        trainer.train(resume_from_checkpoint=str(start) if start else None)
    if course.stopped:
        raise StoppedOnRequest("stopped on request: run the same command again to go on")
    return model
