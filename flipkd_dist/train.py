"""`train(config)`: the same on one process or N, under Ray, `deepspeed`, torchrun or srun; resumes by itself."""

import logging
import math
import socket
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from transformers import get_scheduler

from flipkd_dist.adapter import AdapterCard, Probe, save_adapter, save_tuned
from flipkd_dist.ahead import ahead
from flipkd_dist.checkpoint import best_checkpoint, stored
from flipkd_dist.config import RunConfig
from flipkd_dist.errors import StoppedOnRequest
from flipkd_dist.failures import forget, introduce
from flipkd_dist.meter import OPERATIONS, Meter, linear_weights
from flipkd_dist.metric_log import MetricLog
from flipkd_dist.order import training_order
from flipkd_dist.phases import ASIDE, PhaseClock
from flipkd_dist.profiling import StepProfiler
from flipkd_dist.progress import Progress
from flipkd_dist.step import TrainingStep
from flipkd_dist.stop import StopRequest
from flipkd_dist.teacher_stage import open_signals
from flipkd_dist.verify import check_first_forward, first_moves
from flipkd_dist.workbench import Workbench, build
from flipkd_dist.world import World

logger = logging.getLogger("flipkd_dist")
HEARTBEAT_S = 1.0  # between two questions whether rank 0 is done


def train(config: RunConfig, mlflow_run_id: str | None = None) -> None:
    """Fine-tune the student and leave a verified adapter in the run folder.

    Raises:
        StoppedOnRequest: a signal or the file `stop` asked for it; the last step's checkpoint is complete.
    """
    bench = build(config)
    inputs, world, engine = bench.inputs, bench.world, bench.engine
    hosts = world.gather_object(socket.gethostname())
    if world.is_main:
        introduce(inputs.folder.path, hosts)
    signals = open_signals(inputs, "train")
    step = TrainingStep(engine, world, signals, bench.make_batch, config.loss, config.train.chunk_size)
    clock = step.clock = PhaseClock.of(world.device)
    order, num_steps = training_order(config, signals.pairs.text_a)
    learning_rate = schedule(config, num_steps)
    meter = Meter(world, clock, linear_weights(engine.student), bench.dtype, OPERATIONS[config.student.tuning])
    log = MetricLog(config, world, inputs.folder.metric_log, num_steps, mlflow_run_id, meter)
    progress = Progress(bench, order, num_steps, log)
    first = progress.resume()
    progress.check_space(first)
    batch = bench.make_batch(progress.probes[: config.train.pairs_per_forward])
    check_first_forward(engine, world, batch, bench.load, config.train.verify, updated=first > 0)
    profiler = StepProfiler(inputs.folder.profile, world, config.train.profile, num_steps - first)
    with StopRequest(inputs.folder.stop).listening() as stop, profiler.listening():
        engine.student.train()
        log.start_clock()
        prepared = ahead(lambda number: step.prepare(order.contrast_batches(number)), range(first, num_steps))
        for number in range(first, num_steps):
            with profiler.step():
                with clock("data"):
                    micro_steps = next(prepared)
                rate = learning_rate(number)
                done = step(micro_steps, rate)
            log.add(number + 1, *done, rate, order)
            with clock("communication"):
                stopping, saving = stop.made_with(inputs.folder.save, world)
                stopping = stopping and number + 1 < num_steps
            with clock(ASIDE):
                profiler.finish_if_due()
                if number == 0:
                    idle = idle_tensors(bench)
                    moves = first_moves(engine, world)
                    log.check_first_update({name: move for name, move in moves.items() if name not in idle})
                progress.save_if_due(number + 1, stopping, saving)
            if stopping:
                raise StoppedOnRequest(
                    f"stopped on request with a complete checkpoint of step {number + 1} of {num_steps}: "
                    "run the same command again to go on"
                )
    log.say_truncated()

    def finish() -> None:
        log.flush()
        export_best(bench, progress.probes, progress.base_answers)
        log.tracker.artifact(inputs.folder.metric_log)
        forget(inputs.folder.path)

    folder = inputs.folder
    stored(world, folder.checkpoints, folder.adapter, "the adapter", lambda: on_main(world, finish))
    engine.close()


def on_main(world: World, work: Callable[[], None], every_s: float = HEARTBEAT_S) -> None:
    """Rank 0 works while the others wait, longer than a collective may take if need be; every rank must call it."""
    if world.size == 1:
        return work()
    with ThreadPoolExecutor(1) as pool:
        done = pool.submit(work) if world.is_main else None
        while not world.any(done is not None and done.done()):  # a short collective each time: none runs into its limit
            time.sleep(every_s)
    if done is not None:
        done.result()  # raises what the work has raised


def idle_tensors(bench: Workbench) -> set[str]:
    """Trained tensors that no loss reaches; texts encoded alone have nothing but their read-outs."""
    config = bench.inputs.config
    answered = config.loss.sup_weight and config.student.mode == "pair"
    return set() if answered else bench.engine.student.behind_readouts()


def schedule(config: RunConfig, num_steps: int):
    """The learning rate of optimizer step `number`, counted from 0; neither the first nor the last is zero."""
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    warmup = math.ceil(config.train.warmup_ratio * num_steps)
    factor = get_scheduler(config.train.lr_scheduler_type, optimizer, warmup, num_steps + 1).lr_lambdas[0]
    return lambda number: config.train.learning_rate * factor(number + 1)


def export_best(bench: Workbench, probes: list[tuple[str, str]], base_answers: list[float]) -> None:
    """Make `adapter/` out of the best checkpoint; a probe pair must be answered differently from the base."""
    inputs, config = bench.inputs, bench.inputs.config
    best = best_checkpoint(inputs.folder.checkpoints)
    score, answers = best.manifest["score"], np.array(best.manifest["probes"])
    changes = np.abs(answers - np.array(base_answers))
    chosen = int(np.argmax(changes))
    if changes[chosen] < 1e-6:
        raise RuntimeError(f"{best.path}: the adapter answers {len(probes)} probe pairs as its base does: train longer")
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
        threshold=best.manifest["threshold"],
        step=best.step,
        probe=Probe(*probes[chosen], float(answers[chosen]), float(base_answers[chosen])),
        tuning=config.student.tuning,
        mode=config.student.mode,
        readout=config.student.reads,
        bidirectional=config.student.bidirectional,
    )
    folder, state = inputs.folder.adapter, best.weights()
    if card.tuning == "full":
        save_tuned(folder, inputs.base_folder, state, inputs.encoder, card)
    else:
        save_adapter(folder, student, state, inputs.tokenizer, card, idle_tensors(bench))
    logger.info(
        "adapter/ holds step %d (%s %s); p(match) of its probe pair is %.3f, its base said %.3f",
        best.step,
        config.train.metric_for_best_model,
        "not validated" if score is None else f"{score:.4f}",
        card.probe.p_match,
        card.probe.p_match_base,
    )
