"""Sentence-Transformers' CrossEncoderTrainer on the same causal LM: its generative reranker, binary cross-entropy.

The prompt is the tokenizer's chat template, as the library asks for it; it tokenises within the step and asks the model
for the logits of the last position alone, both its own defaults. Its sampler is replaced, which would shuffle: the
batches are those of all. It has no teacher and no read-out: L_sup only.
"""

from datasets import Dataset
from measure import Spec, StepClock, trainable
from peft import LoraConfig
from sentence_transformers.base.sampler import DefaultBatchSampler
from sentence_transformers.cross_encoder import CrossEncoder, CrossEncoderTrainer, CrossEncoderTrainingArguments
from sentence_transformers.cross_encoder.losses import BinaryCrossEntropyLoss
from torch.utils.data import SequentialSampler


def text_of(role: str) -> str:
    return '{{ messages | selectattr("role", "eq", "' + role + '") | map(attribute="content") | first }}'


def literal(text: str) -> str:
    """`text` in a template, whatever white space stands at its ends."""
    return "{{ " + repr(text) + " }}"


def in_file_order(dataset, **settings) -> DefaultBatchSampler:
    return DefaultBatchSampler(SequentialSampler(dataset), **settings)


def main() -> None:
    spec = Spec.of_command_line()
    clock = StepClock(spec)
    prompt = spec.prompt()
    template = [literal(prompt["before"]), text_of("query"), literal(prompt["between"]), text_of("document")]
    model = CrossEncoder(
        spec.model,
        device="cpu",
        max_length=spec.max_length,
        processor_kwargs={"chat_template": "".join(template) + literal(prompt["after"])},
    )
    lora = LoraConfig(
        r=spec.lora_r,
        lora_alpha=spec.lora_r,
        lora_dropout=spec.lora_dropout,
        target_modules=spec.targets,
        task_type="CAUSAL_LM",
    )
    model.add_adapter(lora)
    clock.count_computed(model.model.get_input_embeddings())
    clock.count_real(model.model.model)
    trainer = CrossEncoderTrainer(
        model=model,
        args=CrossEncoderTrainingArguments(**spec.trainer_arguments(), batch_sampler=in_file_order),
        train_dataset=Dataset.from_list(spec.pairs()),
        loss=BinaryCrossEntropyLoss(model),
        callbacks=[clock.callback()],
    )
    trainer.train()
    clock.print_result(trainable=trainable(model))


if __name__ == "__main__":
    main()
