"""`train(config)` and `evaluate(config)`: the same on one process or N, under Ray, `deepspeed`, torchrun or srun."""

import json
import logging
import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from transformers import get_scheduler

from flipkd_dist.adapter import WEIGHTS, AdapterCard, Probe, check_probe, load_weights, save_adapter
from flipkd_dist.base_loader import Whole
from flipkd_dist.batches import BatchMaker
from flipkd_dist.checkpoint import best_checkpoint, keep_newest, save_checkpoint
from flipkd_dist.config import RunConfig
from flipkd_dist.ds_config import compose, read_policy
from flipkd_dist.engine import DeepSpeedEngine, Engine, PlainEngine, ZeroPlacement, join_world, prepare_deepspeed
from flipkd_dist.errors import UserError
from flipkd_dist.evaluate import (
    best_threshold,
    binary_metrics,
    hard_negatives,
    metrics_by_kind,
    pair_texts,
    student_scores,
    teacher_scores,
    thresholds_from,
    token_overlap,
)
from flipkd_dist.metric_log import MetricLog
from flipkd_dist.order import Order
from flipkd_dist.pairs import PairTable
from flipkd_dist.preflight import Inputs, check_inputs
from flipkd_dist.run_folder import write_json, write_whole
from flipkd_dist.step import TrainingStep
from flipkd_dist.student import Student, load_student
from flipkd_dist.verify import check_first_forward
from flipkd_dist.world import World

logger = logging.getLogger("flipkd_dist")
NUM_PROBES = 64  # pairs among which the adapter's probe is chosen


@dataclass
class Workbench:
    """What training and evaluation work with; built in one place."""

    inputs: Inputs
    world: World
    engine: Engine
    make_batch: BatchMaker
    dtype: torch.dtype
    load: Callable[..., Student]  # the student again, for `check_first_forward`

    def scores(self, texts: list[tuple[str, str]], description: str) -> tuple[np.ndarray, np.ndarray]:
        batch_size = self.inputs.config.train.per_device_eval_batch_size
        return student_scores(
            self.engine.student, self.world, self.make_batch, texts, batch_size, description, self.engine.forward
        )


def build(config: RunConfig, weights=None) -> Workbench:
    """config -> data and teacher -> student -> engine; `weights` is a file of LoRA tensors to start from."""
    use_gpu = torch.cuda.is_available() if config.distributed.use_gpu == "auto" else config.distributed.use_gpu
    world = join_world(use_gpu, config.distributed.timeout_s)
    if not world.is_main:
        logger.setLevel(logging.ERROR)
    inputs = check_inputs(config)
    bf16 = use_gpu and torch.cuda.is_bf16_supported() if config.train.bf16 == "auto" else config.train.bf16
    dtype = torch.bfloat16 if bf16 else torch.float32
    ds_config, placement = None, Whole(world.device)
    if config.distributed.deepspeed is not None:
        prepare_deepspeed(use_gpu)
        ds_config = compose(read_policy(config.distributed.deepspeed), config, world.size, bf16)
        placement = ZeroPlacement(ds_config, world.device)
    elif world.size > 1:
        raise UserError("distributed.deepspeed is null, which trains on one worker: name a file or start one process")
    load = partial(
        load_student,
        inputs.base_folder,
        config.student,
        inputs.encoder.answer_ids,
        inputs.store.spec.hidden_size,
        config.seed,
        dtype,
        config.train.gradient_checkpointing,
    )
    student = load(placement=placement)
    if weights is not None:
        load_weights(student, weights)
    make_optimizer = partial(torch.optim.AdamW, lr=0.0, weight_decay=config.train.weight_decay)
    torch.manual_seed(config.seed * 1000 + world.rank)  # dropout differs between ranks
    if ds_config is None:
        engine = PlainEngine(student.to(world.device), make_optimizer, config.train.max_grad_norm)
    else:
        engine = DeepSpeedEngine(student, make_optimizer, ds_config)
    return Workbench(inputs, world, engine, BatchMaker(inputs.encoder, student, inputs.share_prefix), dtype, load)


def train(config: RunConfig, mlflow_run_id: str | None = None) -> None:
    """Fine-tune the student and leave a verified adapter in the run folder."""
    bench = build(config)
    inputs, world, engine = bench.inputs, bench.world, bench.engine
    pairs, validation = inputs.splits["train"], inputs.splits.get("validation")
    step = TrainingStep(engine, world, pairs, inputs.store.vectors(pairs.texts), bench.make_batch, config.loss)
    batch = config.train.per_device_train_batch_size * world.size
    order = Order(len(pairs), batch, config.train.gradient_accumulation_steps, config.seed)
    num_steps = (
        config.train.max_steps if config.train.max_steps > 0 else config.train.num_train_epochs * order.steps_per_epoch
    )
    eval_steps = config.train.eval_steps or config.train.save_steps or order.steps_per_epoch
    learning_rate = schedule(config, num_steps)
    log = MetricLog(config, world, inputs.folder.metric_log, num_steps, mlflow_run_id)
    probes = pair_texts(validation or pairs)[:NUM_PROBES]
    first = bench.make_batch(probes[: config.train.per_device_train_batch_size])
    check_first_forward(engine, world, first, bench.load, config.train.verify)
    base_answers, _ = bench.scores(probes, "probe")  # B is zero: these are the base's own answers
    if world.is_main:
        shutil.rmtree(inputs.folder.checkpoints, ignore_errors=True)

    engine.student.train()
    for number in range(num_steps):
        micro_steps = step.prepare(order.contrast_batches(number))
        rate = learning_rate(number)
        log.add(number + 1, *step(micro_steps, rate), rate, order)
        if number == 0:
            log.check_first_update(engine.lora_state())
        if (number + 1) % eval_steps == 0 or number + 1 == num_steps:
            save_candidate(bench, number + 1, validation, probes, log)
    log.say_truncated()
    world.barrier()
    if world.is_main:
        export_best(bench, probes, base_answers)
        log.tracker.artifact(inputs.folder.metric_log)
    world.barrier()
    engine.close()


def schedule(config: RunConfig, num_steps: int):
    """The learning rate of optimizer step `number`, counted from 0; neither the first nor the last is zero."""
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    warmup = math.ceil(config.train.warmup_ratio * num_steps)
    factor = get_scheduler(config.train.lr_scheduler_type, optimizer, warmup, num_steps + 1).lr_lambdas[0]
    return lambda number: config.train.learning_rate * factor(number + 1)


def save_candidate(bench: Workbench, step: int, validation: PairTable | None, probes: list, log: MetricLog) -> None:
    """Validate and write a checkpoint from which the adapter may be made."""
    config, folder = bench.inputs.config, bench.inputs.folder
    score, threshold = None, 0.5
    if validation is None:
        answers, _ = bench.scores(probes, "probe")
    else:
        answers, cosines = bench.scores(pair_texts(validation), "validate")
        easy = ~hard_negatives(validation)  # as in the headline of the metrics
        labels = validation.label[easy]
        threshold = best_threshold(answers[easy], labels)
        metrics = binary_metrics(answers[easy], labels, threshold)
        readout = binary_metrics(cosines[easy], labels, best_threshold(cosines[easy], labels))
        score = metrics[config.train.metric_for_best_model]
        log.write(
            step,
            {
                **{f"validation_{key}": metrics[key] for key in ("roc_auc", "f1", "accuracy", "average_precision")},
                "validation_readout_roc_auc": readout["roc_auc"],
            },
        )
    state = bench.engine.lora_state()
    if bench.world.is_main:
        manifest = {"score": score, "threshold": threshold, "probes": answers[: len(probes)].tolist()}
        save_checkpoint(folder.checkpoints, step, state, manifest)
        keep_newest(folder.checkpoints, config.train.keep_checkpoints)


def export_best(bench: Workbench, probes: list[tuple[str, str]], base_answers: np.ndarray) -> None:
    """Make `adapter/` out of the best checkpoint; a probe pair must be answered differently from the base."""
    from safetensors.torch import load_file

    inputs, config = bench.inputs, bench.inputs.config
    path, manifest = best_checkpoint(inputs.folder.checkpoints)
    answers = np.array(manifest["probes"])
    chosen = int(np.argmax(np.abs(answers - base_answers)))
    if abs(answers[chosen] - base_answers[chosen]) < 1e-6:
        raise RuntimeError(f"{path}: the adapter answers {len(probes)} probe pairs exactly as its base: train longer")
    student = bench.engine.student
    card = AdapterCard(
        base_model=config.student.model_name_or_path,
        base_fingerprint=inputs.base_fingerprint,
        prompt=config.student.prompt,
        answers=config.student.answers,
        encoder_module=student.encoder_module,
        attn_implementation=config.student.attn_implementation,
        dtype=str(bench.dtype).removeprefix("torch."),
        load_in_4bit=config.student.load_in_4bit,
        bnb_4bit_quant_type=config.student.bnb_4bit_quant_type,
        bnb_4bit_use_double_quant=config.student.bnb_4bit_use_double_quant,
        max_length=config.data.max_length,
        threshold=manifest["threshold"],
        step=manifest["step"],
        probe=Probe(*probes[chosen], float(answers[chosen]), float(base_answers[chosen])),
    )
    stored = load_file(path / WEIGHTS)
    save_adapter(inputs.folder.adapter, student, stored, inputs.tokenizer, card)
    logger.info(
        "adapter/ holds step %d (%s %s); p(match) of its probe pair is %.3f, its base said %.3f",
        manifest["step"],
        config.train.metric_for_best_model,
        "not validated" if manifest["score"] is None else f"{manifest['score']:.4f}",
        card.probe.p_match,
        card.probe.p_match_base,
    )


def evaluate(config: RunConfig) -> None:
    """Rebuild the student from the saved adapter and write metrics.json and the predictions of each split."""
    folder = config.run_dir
    card = AdapterCard.read(folder / "adapter")
    bench = build(config, folder / "adapter" / WEIGHTS)
    [p_match], _ = bench.scores([(card.probe.text_a, card.probe.text_b)], "probe")
    check_probe(p_match, card, bench.dtype)
    rows = {}
    for split in ("validation", "test"):
        pairs = bench.inputs.splits.get(split)
        if pairs is not None:
            answers, cosines = bench.scores(pair_texts(pairs), split)
            vectors = bench.inputs.store.vectors(pairs.texts)
            rows[split] = {
                "student": answers,
                "student_readout": cosines,
                "teacher": teacher_scores(pairs, vectors),
                "token_overlap": token_overlap(pairs),
            }
    if bench.world.is_main:
        write_evaluation(bench.inputs, rows, card)
    bench.world.barrier()
    bench.engine.close()


def write_evaluation(inputs: Inputs, rows: dict[str, dict[str, np.ndarray]], card: AdapterCard) -> None:
    validation = inputs.splits.get("validation")
    thresholds = thresholds_from(rows.get("validation"), validation)
    metrics = {
        "step": card.step,
        "threshold_from": "validation" if validation is not None else "0.5, no validation pairs",
    }
    for split in reversed(rows):  # test first
        pairs = inputs.splits[split]
        metrics |= metrics_by_kind(rows[split], pairs, thresholds, split)
        lines = [
            json.dumps(
                {
                    "id": pairs.ids[i],
                    "label": int(pairs.label[i]),
                    **{row: float(rows[split][row][i]) for row in rows[split]},
                }
            )
            for i in range(len(pairs))
        ]
        write_whole(inputs.folder.path / f"predictions-{split}.jsonl", "\n".join(lines) + "\n")
    write_json(inputs.folder.metrics, metrics)
