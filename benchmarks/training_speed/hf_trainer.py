"""A padded transformers Trainer with LoRA of peft and the same three losses, as one would write it without the project.

One padded batch a step, logits of the whole vocabulary at every position. Options: `logits: last` asks the model for
those of the last position alone, `sampling: group_by_length`, `zero_stage: 1 to 3` trains under DeepSpeed.
"""

import os
from math import ceil
from pathlib import Path
from types import SimpleNamespace

import torch
from measure import Spec, StepClock, trainable
from peft import LoraConfig, get_peft_model
from prepare import run_config
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from flipkd_dist.config import validate
from flipkd_dist.contrast import contrast_rows
from flipkd_dist.losses import contrastive_sum, cosine_matrix, distance_sum, mcl_margins, supervised_sum
from flipkd_dist.preflight import check_inputs
from flipkd_dist.student import initialise_lora
from flipkd_dist.teacher_stage import open_signals


class Collator:
    """Left-padded ids, so that the answer stands at the last position; `side` is 0 and 1 at the two texts, else 2."""

    def __init__(self, padding_id: int):
        self.padding_id = padding_id

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        length = max(row["length"] for row in rows)
        ids = torch.full((len(rows), length), self.padding_id)
        side = torch.full((len(rows), length), 2)
        mask = torch.zeros(len(rows), length, dtype=torch.long)
        for number, row in enumerate(rows):
            start = length - row["length"]
            ids[number, start:] = torch.tensor(row["input_ids"])
            mask[number, start:] = 1
            for text, (first, end) in enumerate((row["text_a"], row["text_b"])):
                side[number, start + first : start + end] = text
        pair = torch.tensor([row["pair"] for row in rows])
        return {"input_ids": ids, "attention_mask": mask, "side": side, "pair": pair}


def mean_of(values: torch.Tensor, where: torch.Tensor) -> torch.Tensor:
    """Mean of values [R, L, r] over the positions of each row's text: [R, r]."""
    return (values * where.unsqueeze(2)).sum(1) / where.sum(1, keepdim=True)


class FlipTrainer(Trainer):
    def prepare_losses(self, signals, config, answer_ids: list[int], keep: int) -> None:
        self.signals, self.config, self.answer_ids, self.keep = signals, config, answer_ids, keep
        self.first_loss = None
        layers = [module for name, module in self.model.named_modules() if name.endswith("q_proj.lora_A.default")]
        self.encoder = layers[-1]

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        seen = []
        with self.encoder.register_forward_hook(lambda _module, _inputs, output: seen.append(output)):
            output = model(
                input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], logits_to_keep=self.keep
            )
        logits = output.logits[:, -1, self.answer_ids]
        rows = contrast_rows(self.signals, inputs["pair"].numpy(), slice(0, len(logits)), self.config.threshold)
        similarity = cosine_matrix(mean_of(seen[0], inputs["side"] == 0), mean_of(seen[0], inputs["side"] == 1))
        margins = mcl_margins(rows.teacher_similarity, rows.positive_column, self.config.margin)
        contrastive, _ = contrastive_sum(similarity, margins, rows.anchor, rows.negative, rows.positive_column)
        loss = (
            supervised_sum(logits, rows.labels) / len(logits)
            + 0.1 * distance_sum(similarity, rows.teacher_similarity, rows.keep) / rows.keep.sum().clamp(min=1)
            + 0.1 * contrastive / rows.anchor.sum().clamp(min=1)
        )
        if self.first_loss is None:
            self.first_loss = loss.item()
        return loss


def features(encoder, pairs: list[dict]) -> list[dict]:
    """Tokenised before training, as `datasets.map` does it, which the clock never sees."""
    rows = []
    for number, pair in enumerate(pairs):
        encoded, start = encoder.encode(pair["text_a"], pair["text_b"]), len(encoder.prefix)
        spans = {
            name: (start + span.start, start + span.stop) for name, span in vars(encoded).items() if "text" in name
        }
        ids = encoder.prefix + encoded.ids
        rows.append({"input_ids": ids, "length": len(ids), "pair": number, **spans})
    return rows


def deepspeed_settings(stage: int | None) -> dict | None:
    """What TrainingArguments takes; on CPU in one process, which DeepSpeed has to be told."""
    if stage is None:
        return None
    os.environ |= {"DS_ACCELERATOR": "cpu", "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29561"}
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # it would be compiled first
    return {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {"stage": stage},
    }


def main() -> None:
    spec = Spec.of_command_line()
    clock = StepClock(spec)
    config = validate(run_config(Path(spec.prepared), Path(spec.prepared) / "runs", spec.options["size"]), "hf_trainer")
    inputs = check_inputs(config)
    arguments = TrainingArguments(
        **spec.trainer_arguments(),
        remove_unused_columns=False,
        deepspeed=deepspeed_settings(spec.options.get("zero_stage")),
    )
    torch.manual_seed(spec.seed)
    model = AutoModelForCausalLM.from_pretrained(spec.model, use_cache=False)
    lora = LoraConfig(
        r=spec.lora_r,
        lora_alpha=spec.lora_r,
        lora_dropout=spec.lora_dropout,
        target_modules=spec.targets,
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(model, lora)
    weights = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    initialise_lora(SimpleNamespace(lora_parameters=lambda: weights), spec.seed)
    clock.count_computed(model.get_input_embeddings())
    clock.count_real(model.get_base_model().model)
    pairs = features(inputs.encoder, spec.pairs())
    if arguments.train_sampling_strategy == "group_by_length":  # it sorts within 50 batches, so as many are needed
        pairs *= ceil(50 * spec.batch_size / len(pairs))
    trainer = FlipTrainer(
        model=model,
        args=arguments,
        train_dataset=pairs,
        data_collator=Collator(inputs.tokenizer.pad_token_id),
        callbacks=[clock.callback()],
    )
    keep = 1 if spec.options.get("logits") == "last" else 0
    trainer.prepare_losses(open_signals(inputs, "train"), config.loss, inputs.encoder.answer_ids, keep)
    trainer.train()
    clock.print_result(first_loss=trainer.first_loss, trainable=trainable(model))


if __name__ == "__main__":
    main()
