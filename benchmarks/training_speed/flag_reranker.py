"""FlagEmbedding's trainer of decoder-only rerankers, through its own runner: groups, its softmax over a group.

A group is a positive and its negatives; as many groups a step as give the same number of sequences. The prompt's parts
are its instructions before query and passage and the prompt behind them, so that the tokens are the same but for the
tokenizer's leading one. It has no teacher vectors and no read-out.
"""

import json
from pathlib import Path

from FlagEmbedding.abc.finetune.reranker import AbsRerankerDataArguments, AbsRerankerTrainingArguments
from FlagEmbedding.finetune.reranker.decoder_only.base import DecoderOnlyRerankerRunner, RerankerModelArguments
from measure import Spec, StepClock, trainable


def write_groups(spec: Spec) -> Path:
    """The first groups, as many as all steps take, each with what stands behind the passage."""
    _, _, prompt = spec.prompt()["after"].partition("\n")
    lines = (Path(spec.prepared) / "groups.jsonl").read_text(encoding="utf-8").splitlines()
    count = spec.num_steps * spec.batch_size // spec.group_size
    path = Path(spec.scratch) / "groups.jsonl"
    path.write_text("".join(json.dumps(json.loads(line) | {"prompt": prompt}) + "\n" for line in lines[:count]))
    return path


def main() -> None:
    spec = Spec.of_command_line()
    clock = StepClock(spec)
    prompt = spec.prompt()
    behind_query, _, before_passage = prompt["between"].partition("\n")
    behind_passage, _, _ = prompt["after"].partition("\n")
    model_arguments = RerankerModelArguments(
        model_name_or_path=spec.model,
        model_type="decoder",
        use_lora=True,
        lora_rank=spec.lora_r,
        lora_alpha=spec.lora_r,
        lora_dropout=spec.lora_dropout,
        target_modules=spec.targets,
    )
    data_arguments = AbsRerankerDataArguments(
        train_data=[str(write_groups(spec))],
        cache_path=str(Path(spec.scratch) / "cache"),
        train_group_size=spec.group_size,
        query_max_len=spec.max_length,  # these two are bounds before the joint one
        passage_max_len=spec.max_length,
        max_len=spec.max_length,
        query_instruction_for_rerank=prompt["before"],
        query_instruction_format="{}{}" + behind_query,
        passage_instruction_for_rerank=before_passage,
        passage_instruction_format="{}{}" + behind_passage,
    )
    own = {"per_device_train_batch_size": spec.batch_size // spec.group_size, "remove_unused_columns": False}
    runner = DecoderOnlyRerankerRunner(
        model_args=model_arguments,
        data_args=data_arguments,
        training_args=AbsRerankerTrainingArguments(**spec.trainer_arguments() | own),
    )
    runner.trainer.add_callback(clock.callback())
    clock.count_computed(runner.model.model.get_input_embeddings())
    clock.count_real(runner.model.model.get_base_model().model)
    runner.trainer.train()
    clock.print_result(trainable=trainable(runner.model))


if __name__ == "__main__":
    main()
