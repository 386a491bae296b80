"""`flipkd train`'s own loop, from the configuration to the last step, on one process.

Two things are put in from outside: the batches are those of the file in its order, as all contenders have them, and the
log line of each step also tells the clock. Options: `overrides` of the configuration, `switches` out of SWITCHES, which
turn one optimisation off each.
"""

import json
import os
import shutil
from functools import partial
from pathlib import Path

import numpy as np
from measure import Spec, StepClock, trainable
from prepare import run_config

import flipkd_dist.student as student
import flipkd_dist.train as training
import flipkd_dist.workbench as workbench
from flipkd_dist.batches import BatchMaker
from flipkd_dist.config import RunConfig, validate
from flipkd_dist.metric_log import MetricLog
from flipkd_dist.order import Order
from flipkd_dist.run_folder import RunFolder


def one_pair_a_row() -> None:
    workbench.BatchMaker = lambda encoder, student, _share_prefix: BatchMaker(encoder, student, share_prefix=False)


def whole_last_layer() -> None:
    student.behind_attention = lambda *_: []


def data_in_line() -> None:
    training.ahead = map


# A line here, with its name in a variant of `variants.py`, adds an ablation: what it calls runs before training.
SWITCHES = {
    "one_pair_a_row": one_pair_a_row,  # prefix and first texts for every pair, padding
    "whole_last_layer": whole_last_layer,  # its end for every token, not for answers alone
    "data_in_line": data_in_line,  # tokens, rows and teacher's signals made when they are needed
}


class InFileOrder(Order):
    def contrast_batches(self, step: int) -> list[np.ndarray]:
        size = self.contrast_batch_size
        return [np.arange(step * size, (step + 1) * size)]


class ClockedLog(MetricLog):
    def __init__(self, *arguments, clock: StepClock):
        super().__init__(*arguments)
        self.clock = clock

    def add(self, *step) -> None:
        super().add(*step)
        self.clock.end_step()


def run_settings(spec: Spec) -> RunConfig:
    values = run_config(Path(spec.prepared), Path(spec.scratch), spec.options["size"])
    values["seed"] = spec.seed
    values["data"]["train"] = str(Path(spec.scratch) / "pairs.jsonl")
    values["student"] |= {"lora_r": spec.lora_r, "lora_dropout": spec.lora_dropout}
    values["train"] = {
        "max_steps": spec.num_steps,
        "per_device_train_batch_size": spec.batch_size,
        "learning_rate": spec.learning_rate,
        "logging_steps": 1,
        "save_steps": spec.num_steps,
    }
    for override in spec.options.get("overrides", []):
        key, value = override.split("=", 1)
        section, name = key.split(".")
        values.setdefault(section, {})[name] = json.loads(value)
    return validate(values, "ours.py")


def watch(build, clock: StepClock, benches: list):
    def built(config: RunConfig):
        bench = build(config)
        benches.append(bench)
        clock.count_computed(bench.engine.student.model.get_input_embeddings())
        clock.notes["trainable"] = trainable(bench.engine.student)
        return bench

    return built


def main() -> None:
    spec = Spec.of_command_line()
    clock = StepClock(spec)
    lines = "".join(json.dumps(pair) + "\n" for pair in spec.pairs())
    (Path(spec.scratch) / "pairs.jsonl").write_text(lines, encoding="utf-8")
    config = run_settings(spec)
    if config.distributed.deepspeed is not None:
        os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}  # as a launcher does
    folder = RunFolder(config)
    folder.open()
    shutil.copytree(Path(spec.prepared) / "runs" / config.name / "teacher", folder.teacher)
    for switch in spec.options.get("switches", []):
        SWITCHES[switch]()
    benches = []
    training.build = watch(training.build, clock, benches)
    training.MetricLog = partial(ClockedLog, clock=clock)
    order = InFileOrder(spec.num_steps * spec.batch_size, spec.batch_size, 1, spec.seed)
    training.training_order = lambda *_: (order, spec.num_steps)
    training.train(config)
    records = [json.loads(line) for line in folder.metric_log.read_text(encoding="utf-8").splitlines()]
    steps = [record for record in records if "step_seconds" in record]
    encoder = benches[0].inputs.encoder  # tokens as a pair a row has them, for the table
    lengths = [len(encoder.prefix) + len(encoder.encode(pair["text_a"], pair["text_b"]).ids) for pair in spec.pairs()]
    clock.real = [sum(lengths[at : at + spec.batch_size]) for at in range(0, len(lengths), spec.batch_size)]
    timed = steps[spec.warmup :]
    phases = {
        key.removeprefix("seconds_"): sum(record[key] for record in timed) / len(timed)
        for key in timed[0]
        if key.startswith("seconds_")
    }
    clock.print_result(first_loss=steps[0]["loss"], phases=phases)


if __name__ == "__main__":
    main()
